"""PaliGemma as functions of its parameters: prefill, extend, completion_logps, completion_scores.

PaliGemma (arXiv 2407.07726, 2412.03555) is a prefix language model. Image and prompt attend to each
other in both directions. A completion token attends to the prefix and to earlier tokens of its
completion. The prefix never attends to a completion. So the prefix is computed once per prompt, and
the result is exact for any number of completions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from pg_ground.config import Model
from pg_ground.models.blocks import in_blocks
from pg_ground.models.gemma import Decoder, KeyValues, softcap
from pg_ground.models.siglip import Tower
from pg_ground.params import AbstractParams, flatten, is_multiplied, map_named
from pg_ground.types import NO_HOOKS, Array, Params, PrefixCache, ShardingHooks, SuffixCache

Image = Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"]
"""Floats in [-1, 1], or bytes."""

Score = Callable[[Float[Array, "B G t D"], Float[Array, "B G t V"], Int[Array, "B G t"]], PyTree]
"""(hidden, logits, tokens) → a tree of `[B, G, t]` arrays.

`hidden` are the hidden states after the final norm, in the dtype of activations, at the positions
that predict `tokens`. `logits` are float32. A value head reads `hidden`. XLA removes unused
arguments.
"""


class Network(nn.Module):
    """The parameters, and the passes through them: prefix, suffix, and both together."""

    config: Model
    hooks: ShardingHooks

    def setup(self) -> None:
        c = self.config
        options = (
            jnp.dtype(c.dtype),
            c.remat,
            c.scan_unroll,
            c.attention_block,
            c.coordinate_init,
            c.lora,
            self.hooks,
        )
        self.img = Tower(c.vision, c.text.width, *options)
        self.llm = Decoder(c.text, *options)

    def prefix(
        self, image: Image, prompt: Int[Array, "B L"], prompt_mask: Bool[Array, "B L"]
    ) -> tuple[PrefixCache, Float[Array, "B D"]]:
        """Returns the cache of image and prompt, and the hidden state of the last prompt token."""
        x, mask = self._embed_prefix(image, prompt, prompt_mask)
        positions = jnp.cumsum(mask, axis=1) - 1
        hidden, new = self.llm(x[:, None], positions[:, None], mask[:, None])
        return PrefixCache(new.k[:, :, 0], new.v[:, :, 0], mask), last_of(hidden[:, 0], mask)

    def _embed_prefix(
        self, image: Image, prompt: Int[Array, "B L"], prompt_mask: Bool[Array, "B L"]
    ) -> tuple[Array, Array]:
        patches = self.img(image)
        x = jnp.concatenate([patches, self.llm.embed(prompt)], axis=1)
        return x, jnp.concatenate([jnp.ones(patches.shape[:2], bool), prompt_mask], axis=1)

    def suffix(
        self,
        prefix: PrefixCache,
        suffix: SuffixCache | None,
        tokens: Int[Array, "B G t"],
        mask: Bool[Array, "B G t"] | None = None,
    ) -> tuple[Float[Array, "B G t D"], SuffixCache]:
        """Returns the hidden states of the next t tokens of each row, and the extended cache.

        `mask` is True at real tokens; None means that all are real. Only real tokens are added to
        the cache.
        """
        t = tokens.shape[2]
        past, past_mask, length = None, None, jnp.zeros((1, 1), jnp.int32)
        if suffix is not None:
            past, length = KeyValues(suffix.k, suffix.v), jnp.asarray(suffix.length)
            past_mask = jnp.arange(suffix.k.shape[3]) < length[..., None]
        slots = length[..., None] + (
            jnp.arange(t) if mask is None else jnp.cumsum(mask, axis=2) - 1
        )
        positions = prefix.mask.sum(axis=1)[:, None, None] + slots
        hidden, new = self.llm(
            self.llm.embed(tokens),
            jnp.broadcast_to(positions, tokens.shape),
            mask,
            past,
            past_mask,
            KeyValues(prefix.k, prefix.v),
            prefix.mask[:, None],
        )
        added = jnp.asarray(t) if mask is None else mask.sum(axis=2)
        if past is not None:
            # Written once, after the loop over layers: inside it, all of the cache would be
            # rewritten.
            new = jax.tree.map(lambda old, x: write_slots(old, x, slots, mask), past, new)
        return hidden, SuffixCache(new.k, new.v, length + added)

    def both(
        self,
        image: Image,
        prompt: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        tokens: Int[Array, "B G t"],
    ) -> tuple[Float[Array, "B D"], Float[Array, "B G t D"]]:
        """Returns the hidden states of the last prompt token and of t completion tokens.

        `prefix` and `suffix` would return the same.
        """
        x, mask = self._embed_prefix(image, prompt, prompt_mask)
        t = tokens.shape[2]
        positions = jnp.broadcast_to(mask.sum(axis=1)[:, None, None] + jnp.arange(t), tokens.shape)
        before, hidden = self.llm.both(x, mask, self.llm.embed(tokens), positions)
        return last_of(before, mask), hidden

    def vocabulary(self) -> Float[Array, "V D"]:
        return self.llm.vocabulary()

    def __call__(self, image, prompt, prompt_mask, tokens):
        cache, _ = self.prefix(image, prompt, prompt_mask)
        return self.suffix(cache, None, tokens)


@dataclass(frozen=True)
class PaliGemma:
    """The policy. It has sizes only: parameters are the first argument of every method."""

    config: Model
    hooks: ShardingHooks = NO_HOOKS

    @cached_property
    def network(self) -> Network:
        return Network(self.config, self.hooks)

    def init(self, key: PRNGKeyArray) -> Params:
        """Returns random float32 parameters."""
        size = self.config.image_size
        image = jnp.zeros((1, size, size, 3), jnp.float32)
        prompt = jnp.zeros((1, 1), jnp.int32)
        return Network(self.config, NO_HOOKS).init(
            key, image, prompt, jnp.ones((1, 1), bool), prompt[:, None]
        )["params"]

    def abstract_params(self) -> AbstractParams:
        """Returns shape and dtype of the parameters that `init` returns, by slash-joined name."""
        return dict(_abstract_params(self.config))

    def prefill(
        self,
        params: Params,
        image: Image,
        prompt: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
    ) -> tuple[PrefixCache, Float[Array, "B V"]]:
        """Returns the cache of image and prompt, and float32 logits of the first completion token.

        Prompts can be padded on either side. `prompt_mask` is True at real tokens. Every prompt has
        at least one real token.
        """
        cache, hidden = self._apply(params, "prefix", image, prompt, prompt_mask)
        return cache, self._logits(self._vocabulary(params), hidden)

    def suffix_cache(self, prefix: PrefixCache, group_size: int, length: int) -> SuffixCache:
        """Returns an empty cache: `group_size` completions per prompt of up to `length` tokens."""
        layers, b, _, k, h = prefix.k.shape
        zeros = jnp.zeros((layers, b, group_size, length, k, h), prefix.k.dtype)
        return SuffixCache(zeros, zeros, jnp.zeros((1, 1), jnp.int32))

    def extend(
        self,
        params: Params,
        prefix: PrefixCache,
        suffix: SuffixCache,
        tokens: Int[Array, "B G t"],
        mask: Bool[Array, "B G t"] | None = None,
    ) -> tuple[Float[Array, "B G t V"], SuffixCache]:
        """Returns float32 logits of the token after each of `tokens`, and the extended cache.

        t = 1 decodes, and t = T scores whole completions. All completions of a prompt attend to its
        one prefix cache.

        Args:
          mask: True at real tokens, if some rows add fewer than t tokens. The extended cache then
            has a length for each row. None means that all tokens are real, and rows of one length
            keep one length. Ignore the logits at tokens that are not real.
        """
        hidden, suffix = self._apply(params, "suffix", prefix, suffix, tokens, mask)
        return self._logits(self._vocabulary(params), hidden), suffix

    def completion_logps(
        self,
        params: Params,
        image: Image,
        prompt: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        tokens: Int[Array, "B G T"],
        mask: Bool[Array, "B G T"],
        temperature: float = 1.0,
    ) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
        """Returns natural log-probabilities of `tokens`, and entropies (nats) of their
        distributions.

        The distribution is the softmax of logits / `temperature`. Both results are 0 where `mask`
        is False.
        """

        def score(
            _: Float[Array, "B G t D"],
            logits: Float[Array, "B G t V"],
            chosen: Int[Array, "B G t"],
        ) -> tuple[Array, Array]:
            logps = jax.nn.log_softmax(logits / temperature)
            entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
            return jnp.take_along_axis(logps, chosen[..., None], axis=-1)[..., 0], entropy

        logps, entropy = self.completion_scores(params, image, prompt, prompt_mask, tokens, score)
        return jnp.where(mask, logps, 0), jnp.where(mask, entropy, 0)

    def completion_scores(
        self,
        params: Params,
        image: Image,
        prompt: Int[Array, "B L"],
        prompt_mask: Bool[Array, "B L"],
        tokens: Int[Array, "B G T"],
        score: Score,
        dropout_key: PRNGKeyArray | None = None,
    ) -> PyTree:
        """Returns `score`'s tree of `[B, G, T]` arrays for `tokens`, teacher-forced.

        The logits of at most `config.logits_block` completion tokens are in memory at a time, in
        the backward pass too. Inputs of adapters are dropped (`config.lora.dropout`) only with a
        `dropout_key`.
        """
        params = self._with_cast_matrices(params)
        inputs = (image, prompt, prompt_mask, tokens[:, :, :-1])
        first, hidden = self._apply(params, "both", *inputs, dropout_key=dropout_key)
        first = jnp.broadcast_to(first[:, None, None], (*tokens.shape[:2], 1, first.shape[-1]))
        hidden = jnp.concatenate([first, hidden], axis=2)
        table = self._vocabulary(params)
        return in_blocks(
            lambda h, chosen: score(h, self._logits(table, h), chosen),
            self.config.logits_block,
            (2, 2),
            hidden,
            tokens,
        )

    def _apply(
        self, params: Params, method: str, *args: object, dropout_key: PRNGKeyArray | None = None
    ) -> Any:
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.network.apply({"params": params}, *args, method=method, rngs=rngs)

    def _with_cast_matrices(self, params: Params) -> Params:
        """Returns parameters whose matrices have the dtype of activations.

        Each layer would cast its matrices to the same values. With the cast before the loop over
        layers, the gradients that the loop gathers have the same dtype and half the size (PG2 10B,
        eight chips of v5p, 64 prompts: 21.8 GiB instead of 23.7).
        """
        dtype = jnp.dtype(self.config.dtype)

        def cast(name: str, leaf: Array) -> Array:
            # Each layer casts its int8 matrices. Casting all of them here would copy the base.
            return leaf.astype(dtype) if is_multiplied(name) and leaf.dtype != jnp.int8 else leaf

        return map_named(cast, params)

    def _vocabulary(self, params: Params) -> Float[Array, "V D"]:
        return self._apply(params, "vocabulary")

    def _logits(
        self, table: Float[Array, "V D"], hidden: Float[Array, "... D"]
    ) -> Float[Array, "... V"]:
        # The cast is inside the loop over blocks. So the gradients of the blocks add up in the
        # table's dtype, and not in the dtype of activations.
        table = table.astype(hidden.dtype)
        logits = jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)
        cap = self.config.text.final_softcap
        return softcap(logits, cap) if cap else logits


def write_slots(
    cache: Float[Array, "layers B G T K H"],
    new: Float[Array, "layers B G t K H"],
    slots: Int[Array, "#B #G t"],
    mask: Bool[Array, "B G t"] | None,
) -> Float[Array, "layers B G T K H"]:
    """Returns `cache` with `new` in the given slots of each row, where `mask` holds.

    Without a mask, slots are consecutive. If they are also equal in all rows, one slice is written.
    """
    if mask is None and slots.shape[:2] == (1, 1):
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slots[0, 0, 0], axis=3)
    b, g, size = cache.shape[1:4]
    rows, completions = jnp.arange(b)[:, None, None], jnp.arange(g)[:, None]
    slots = slots if mask is None else jnp.where(mask, slots, size)  # beyond the last slot: dropped
    return jnp.asarray(cache).at[:, rows, completions, slots].set(new, mode="drop")


def last_of(hidden: Float[Array, "B S D"], mask: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Returns the states at the last slot of each row where `mask` is True."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


@cache  # tracing `init` takes 0.3 s, and a checkpoint needs the shapes several times
def _abstract_params(config: Model) -> AbstractParams:
    return flatten(jax.eval_shape(PaliGemma(config).init, jax.random.key(0)))
