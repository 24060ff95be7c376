"""Sampling: G completions of each prompt, as token ids, in one compiled loop."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8

from pg_ground.types import Array, Params, PrefixCache, Rollout, SuffixCache
from pg_ground.vocab import CONTROL, EOS, PAD


@runtime_checkable
class Policy(Protocol):
    """The part of a model that sampling needs. `pg_ground.models.PaliGemma` has it."""

    def prefill(
        self, params: Params, image: Array, prompt: Array, prompt_mask: Array
    ) -> tuple[PrefixCache, Array]: ...

    def suffix_cache(self, prefix: PrefixCache, group_size: int, length: int) -> SuffixCache: ...

    def extend(
        self, params: Params, prefix: PrefixCache, suffix: SuffixCache, tokens: Array
    ) -> tuple[Array, SuffixCache]: ...


class _Loop(NamedTuple):
    """The carry of the sampling loop."""

    t: Int[jax.Array, ""]
    cache: SuffixCache
    tokens: Int[jax.Array, "B G T"]
    mask: Bool[jax.Array, "B G T"]
    logps: Float[jax.Array, "B G T"]
    alive: Bool[jax.Array, "B G"]
    """True for completions without EOS."""

    @classmethod
    def empty(cls, cache: SuffixCache, shape: tuple[int, int, int]) -> "_Loop":
        return cls(
            t=jnp.int32(0),
            cache=cache,
            tokens=jnp.full(shape, PAD, jnp.int32),
            mask=jnp.zeros(shape, bool),
            logps=jnp.zeros(shape, jnp.float32),
            alive=jnp.ones(shape[:2], bool),
        )

    def append(self, tokens: Int[Array, "B G"], logps: Float[Array, "B G"]) -> "_Loop":
        """Returns the loop after token `t`. A completion that has ended gets PAD."""
        return self._replace(
            t=self.t + 1,
            tokens=self.tokens.at[:, :, self.t].set(jnp.where(self.alive, tokens, PAD)),
            mask=self.mask.at[:, :, self.t].set(self.alive),
            logps=self.logps.at[:, :, self.t].set(jnp.where(self.alive, logps, 0)),
            alive=self.alive & (tokens != EOS),
        )


def sample(
    model: Policy,
    params: Params,
    image: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    key: PRNGKeyArray,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float | Float[Array, ""] | Float[Array, " G"] = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    suppress_tokens: tuple[int, ...] = CONTROL,
) -> Rollout:
    """Returns `group_size` completions of each prompt. The same key gives the same completions.

    The prefix (image and prompt) is computed once per prompt. A completion ends with EOS, and its
    row is PAD after EOS. The loop ends when all completions have ended. `Rollout.logps` are
    log-probabilities of the whole softmax at `temperature` (at 1 if greedy), before `top_k`,
    `top_p` and `suppress_tokens`: `completion_logps` gives the same for the same tokens.

    Args:
      temperature: 0 is greedy. It can differ for each completion of a group.
      top_p: keeps the smallest set of tokens with at least this probability (nucleus, arXiv
        1904.09751); 1 keeps all.
      top_k: keeps this many of the most likely tokens; 0 keeps all.
      suppress_tokens: ids that are never drawn.
    """
    prefix, first_logits = model.prefill(params, image, prompt, prompt_mask)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (group_size,))
    scale = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    vocab_size = first_logits.shape[-1]
    suppressed = jnp.zeros(vocab_size, bool).at[jnp.array(suppress_tokens, int)].set(True)

    def draw(
        logits: Float[Array, "B G V"], t: Int[Array, ""]
    ) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
        logps = jax.nn.log_softmax(logits / scale)
        allowed = _restricted(jnp.where(suppressed, -jnp.inf, logps), top_k, top_p)
        drawn = _categorical_of_platform(jax.random.fold_in(key, t), allowed)
        tokens = jnp.where(temperature > 0, drawn, jnp.argmax(allowed, axis=-1))
        return tokens, jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]

    def step(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.t - 1, 1, axis=2)
        logits, suffix = model.extend(params, prefix, loop.cache, last)
        return loop._replace(cache=suffix).append(*draw(jnp.asarray(logits)[:, :, 0], loop.t))

    shape = (prompt.shape[0], group_size, max_new_tokens)
    empty = _Loop.empty(model.suffix_cache(prefix, group_size, max_new_tokens), shape)
    every_completion = (*shape[:2], vocab_size)
    start = empty.append(*draw(jnp.broadcast_to(first_logits[:, None], every_completion), empty.t))
    end = jax.lax.while_loop(lambda loop: (loop.t < max_new_tokens) & loop.alive.any(), step, start)
    return Rollout(end.tokens, end.mask, end.logps, loss_mask=end.mask)


def _restricted(logps: Float[Array, "... V"], top_k: int, top_p: float) -> Float[Array, "... V"]:
    """Returns `logps` with -inf for the tokens that `top_k` or `top_p` excludes."""
    if top_k:
        threshold = jax.lax.top_k(logps, top_k)[0][..., -1:]
        logps = jnp.where(logps >= threshold, logps, -jnp.inf)
    return nucleus(logps, top_p) if top_p < 1 else logps


def _categorical_of_platform(key: PRNGKeyArray, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    return jax.lax.platform_dependent(key, logits, tpu=jax.random.categorical, default=categorical)


def categorical(key: PRNGKeyArray, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Returns ids drawn with the probabilities softmax(logits).

    An id of probability 0 is never drawn.

    The cumulative distribution is inverted in two stages: first over blocks of ids, then within one
    block. This takes two random numbers per row. `jax.random.categorical` takes one per id, which
    was a third of a small model's rollout on a CPU. On a TPU `jax.random.categorical` is better: it
    generates the numbers inside the argmax, and blocks would copy the logits. The number of blocks
    divides the vocabulary, so a vocabulary that is sharded over up to 64 devices stays sharded.
    """
    blocks = logits.reshape(*logits.shape[:-1], math.gcd(logits.shape[-1], 64), -1)
    highest = logits.max(axis=-1)[..., None, None]
    # 0 itself would draw the very first id, however unlikely it is.
    first, second = jax.random.uniform(key, (2, *logits.shape[:-1], 1), minval=2.0**-24)
    block = _first_beyond(first, jnp.exp(blocks - highest).sum(axis=-1))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
    return block * blocks.shape[-1] + _first_beyond(second, jnp.exp(inside - highest)[..., 0, :])


def _first_beyond(
    share: Float[Array, "... 1"], weights: Float[Array, "... n"]
) -> Int[Array, "..."]:
    """Returns the first index with a weight whose running sum is above `share`, in (0, 1), of
    the total."""
    # The maximum of the running sums is the total. The last sum can differ from it by rounding.
    reached = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    return jnp.argmax(reached > share * reached.max(axis=-1, keepdims=True), axis=-1)


def nucleus(logps: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Returns `logps` with -inf outside the smallest set of likely tokens whose probabilities
    reach `top_p`."""
    ordered = jnp.sort(logps, axis=-1, descending=True)
    probabilities = jnp.exp(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    total = probabilities.sum(axis=-1, keepdims=True)
    count = jnp.sum(before < top_p * total, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(ordered, count - 1, axis=-1)
    return jnp.where(logps >= threshold, logps, -jnp.inf)
