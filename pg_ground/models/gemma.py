"""The Gemma 1 and Gemma 2 decoder, with big_vision's parameter names.

G completions share one prefix. Every activation is `[B, G, t, …]`, and a prefix has G = 1. A token
attends to the prefix cache of its prompt and to the tokens of its own completion. The group is an
axis of the queries, so the prefix cache is never repeated.

Sources: big_vision/models/proj/paligemma/gemma_bv.py; Gemma (arXiv 2403.08295); Gemma 2 (arXiv
2408.00118).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from pg_ground.config import Lora, Text
from pg_ground.models.blocks import in_blocks
from pg_ground.models.lora import low_rank
from pg_ground.models.quantization import Matrix, matrix_param, product
from pg_ground.models.siglip import rematerialised, sinusoids
from pg_ground.types import Array, ShardingHooks
from pg_ground.vocab import LOC_MAX, LOC_TOKENS, vocab_of_size

MASKED = -2.3819763e38
"""Value of a masked attention logit: big_vision's constant, near the lowest float32."""


class KeyValues(NamedTuple):
    """Keys and values that queries attend to. Stacked layers add an axis in front."""

    k: Float[Array, "... K H"]
    v: Float[Array, "... K H"]


class Seen(NamedTuple):
    """Keys and values with their mask.

    Keys of a prompt are `[B, S, K, H]`. Keys of a completion are `[B, G, S, K, H]`.
    """

    kv: KeyValues
    mask: Bool[Array, "#B #G S"] | None
    """True at filled slots. None means that all slots are filled."""
    causal: bool = False
    """True means that the keys belong to the queries themselves, and query t sees keys 0 to t."""


class Embedder(nn.Module):
    """The table that turns ids into vectors. It is also the (tied) table of the logits."""

    vocab_size: int
    width: int
    coordinate_init: str
    hooks: ShardingHooks

    def setup(self) -> None:
        self.table = self.param("input_embedding", self._init, (self.vocab_size, self.width))

    def _init(self, key: Array, shape: tuple[int, int]) -> Float[Array, "V D"]:
        table = jax.random.normal(key, shape) * shape[1] ** -0.5
        if self.coordinate_init == "sinusoid":
            loc0 = vocab_of_size(shape[0]).loc0
            table = table.at[loc0 : loc0 + LOC_TOKENS].set(loc_sinusoids(shape[1]))
        return table

    def encode(self, tokens: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... D"]:
        rows = self.hooks.activations(self.hooks.lookup(self.table, tokens))
        return rows.astype(dtype) * jnp.asarray(self.table.shape[1] ** 0.5, dtype)


class Einsum(nn.Module):
    shape: tuple[int, ...]
    fan_in_axes: tuple[int, ...]
    lora: Lora

    @nn.compact
    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        w = matrix_param(self, "w", normal_by_fan_in(self.fan_in_axes), self.shape)
        y = product(equation, x, w)
        adapter_term = low_rank(self, "w", equation, x, self.shape, self.lora)
        return y if adapter_term is None else y + adapter_term


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + scale), in float32. The stored scale is the offset from one."""

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class Attention(nn.Module):
    config: Text
    block: int
    lora: Lora

    def setup(self) -> None:
        c, lora = self.config, self.lora
        self.q_einsum = Einsum((c.num_heads, c.width, c.head_dim), (1,), lora)
        self.kv_einsum = Einsum((2, c.num_kv_heads, c.width, c.head_dim), (2,), lora)
        self.attn_vec_einsum = Einsum((c.num_heads, c.head_dim, c.width), (0, 1), lora)

    def __call__(
        self,
        x: Float[Array, "B G t D"],
        positions: Int[Array, "B G t"],
        mask: Bool[Array, "#B #G t"] | None,
        past: KeyValues | None,
        past_mask: Bool[Array, "#B #G T"] | None,
        prefix: KeyValues | None,
        prefix_mask: Bool[Array, "B 1 S"] | None,
    ) -> tuple[Float[Array, "B G t D"], KeyValues]:
        q, new = self._project(x, positions)
        # Prompts attend in both directions. Completions have a prefix and attend causally.
        seen = [Seen(new, mask, causal=prefix is not None)]
        if past is not None:
            seen.insert(0, Seen(past, past_mask))
        if prefix is not None:
            seen.insert(0, Seen(prefix, prefix_mask))
        out = attend(q, seen, self.config.attn_softcap, self.block)
        return self.attn_vec_einsum("BGtNH,NHD->BGtD", out), new

    def _project(
        self, x: Float[Array, "B G t D"], positions: Int[Array, "B G t"]
    ) -> tuple[Float[Array, "B G t N H"], KeyValues]:
        """Returns scaled queries, and keys with values. RoPE is applied to queries and keys."""
        q = self.q_einsum("BGtD,NDH->BGtNH", x)
        k, v = self.kv_einsum("BGtD,cKDH->cBGtKH", x)
        return rope(q, positions) * self.config.attention_scale, KeyValues(rope(k, positions), v)


def attend(
    q: Float[Array, "B G t N H"], seen: Sequence[Seen], cap: float, block: int
) -> Float[Array, "B G t N H"]:
    """Returns the attention output: one softmax over all keys in `seen`.

    Args:
      cap: soft-cap of the attention logits; 0 means none.
      block: largest number of queries per prompt whose logits are in memory at a time, in the
        backward pass too. It counts the queries of all completions of the prompt. At least one
        query of each completion is computed at a time. 0 means all queries.
    """

    def read(q: Float[Array, "B G t N H"], index: Int[Array, " t"]) -> Float[Array, "B G t N H"]:
        b, g, t, n, h = q.shape
        k = seen[0].kv.k.shape[-2]
        q, logits, masks = q.reshape(b, g, t, k, n // k, h), [], []
        for (keys, _), mask, causal in seen:
            slots = jnp.arange(keys.shape[-3])
            logits.append(
                jnp.einsum(
                    f"BGtKRH,{axes(keys)}KH->BGKRtS", q, keys, preferred_element_type=jnp.float32
                )
            )
            visible = jnp.ones((), bool) if mask is None else mask[:, :, None]
            if causal:
                visible = visible & (slots <= index[:, None])
            masks.append(jnp.broadcast_to(visible, (b, g, t, slots.size)))
        together = jnp.concatenate(logits, axis=-1)
        if cap:
            together = softcap(together, cap)
        together = jnp.where(jnp.concatenate(masks, axis=-1)[:, :, None, None], together, MASKED)
        weights, out, start = jax.nn.softmax(together, axis=-1).astype(q.dtype), jnp.float32(0), 0
        for (_, values), _, _ in seen:
            part = weights[..., start : start + values.shape[-3]]
            out += jnp.einsum(
                f"BGKRtS,{axes(values)}KH->BGtKRH", part, values, preferred_element_type=jnp.float32
            )
            start += values.shape[-3]
        return out.astype(q.dtype).reshape(b, g, t, n, h)

    def axes(x: Array) -> str:
        return "BS" if x.ndim == 4 else "BGS"

    length = q.shape[2]
    at_once = max(block // q.shape[1], 1) if block else length
    return (read if length <= at_once else partial(in_blocks, read, at_once, (2, 0)))(
        q, jnp.arange(length)
    )


class FeedForward(nn.Module):
    """Gated MLP: (gelu(x W0) · x W1) W2."""

    config: Text
    lora: Lora

    @nn.compact
    def __call__(self, x: Float[Array, "B G t D"]) -> Float[Array, "B G t D"]:
        up, down = (
            (2, self.config.width, self.config.mlp_dim),
            (self.config.mlp_dim, self.config.width),
        )
        gating = matrix_param(self, "gating_einsum", normal_by_fan_in((1,)), up)
        linear = matrix_param(self, "linear", normal_by_fan_in((0,)), down)
        gate, value = both_products(x, gating)
        adapter_term = low_rank(self, "gating_einsum", "BGtD,cDF->cBGtF", x, up, self.lora)
        if adapter_term is not None:
            gate, value = gate + adapter_term[0], value + adapter_term[1]
        hidden = nn.gelu(gate, approximate=True) * value
        y = product("BGtF,FD->BGtD", hidden, linear)
        adapter_term = low_rank(self, "linear", "BGtF,FD->BGtD", hidden, down, self.lora)
        return y if adapter_term is None else y + adapter_term


def both_products(x: Float[Array, "B G t D"], matrix: Matrix) -> tuple[Array, Array]:
    """Returns x W0 and x W1, where `matrix` holds W0 and W1, `[2, D, F]`.

    The time of a decoding step is the time to read the weights. For two products, a TPU first
    copies the two matrices of a layer out of the stack of layers. That moves three times the bytes
    of one product (PG1 3B, v5e-8, 64 tokens: 634 GB per rollout instead of 325). On a CPU one
    product is slower than two.
    """

    def two_products(x: Array, matrix: Matrix) -> tuple[Array, Array]:
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], matrix) for i in range(2))
        return product("BGtD,DF->BGtF", x, first), product("BGtD,DF->BGtF", x, second)

    def one_product(x: Array, matrix: Matrix) -> tuple[Array, Array]:
        gate, value = product("BGtD,cDF->cBGtF", x, matrix)
        return gate, value

    if x.shape[2] > 1:
        return two_products(x, matrix)
    return jax.lax.platform_dependent(x, matrix, tpu=one_product, default=two_products)


class Block(nn.Module):
    config: Text
    attention_block: int
    lora: Lora
    hooks: ShardingHooks

    def setup(self) -> None:
        self.pre_attention_norm, self.pre_ffw_norm = RMSNorm(), RMSNorm()
        self.attn, self.mlp = (
            Attention(self.config, self.attention_block, self.lora),
            FeedForward(self.config, self.lora),
        )
        if self.config.post_norms:
            self.post_attention_norm, self.post_ffw_norm = RMSNorm(), RMSNorm()

    def __call__(self, x, positions, mask, past, past_mask, prefix, prefix_mask):
        x = self.hooks.activations(x)
        y, new = self.attn(
            self.pre_attention_norm(x), positions, mask, past, past_mask, prefix, prefix_mask
        )
        return self._add_and_mlp(x, y), new

    def both(self, streams, prefix_positions, prefix_mask, positions):
        """Returns the results of the block for prefixes and for their completions.

        The completions see the keys and values of the prefixes.
        """
        before, x = streams
        before, seen = self(before, prefix_positions, prefix_mask, None, None, None, None)
        prefix = KeyValues(seen.k[:, 0], seen.v[:, 0])
        x, _ = self(x, positions, None, None, None, prefix, prefix_mask)
        return (before, x), None

    def _add_and_mlp(
        self, x: Float[Array, "B G t D"], y: Float[Array, "B G t D"]
    ) -> Float[Array, "B G t D"]:
        y = self.post_attention_norm(y) if self.config.post_norms else y
        x = self.hooks.activations(x + y)
        y = self.mlp(self.pre_ffw_norm(x))
        return self.hooks.activations(x + (self.post_ffw_norm(y) if self.config.post_norms else y))


class Decoder(nn.Module):
    config: Text
    dtype: jnp.dtype
    remat: str
    unroll: int
    attention_block: int
    coordinate_init: str
    lora: Lora
    hooks: ShardingHooks

    def setup(self) -> None:
        self.embedder = Embedder(
            self.config.vocab_size, self.config.width, self.coordinate_init, self.hooks
        )

        def over_layers(*in_axes: object) -> dict[str, Any]:
            axes = {
                "variable_axes": {"params": 0},
                "split_rngs": {"params": True, "dropout": True},
                "in_axes": in_axes,
            }
            return axes | {"length": self.config.depth, "unroll": self.unroll}

        same = nn.broadcast
        self.layers = nn.scan(
            rematerialised(Block, self.remat, ("__call__", "both")),
            methods={
                "__call__": over_layers(same, same, 0, same, 0, same),
                "both": over_layers(same, same, same),
            },
        )(self.config, self.attention_block, self.lora, self.hooks)
        self.final_norm = RMSNorm()

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns token embeddings, scaled by sqrt(D) as Gemma does (image embeddings are not)."""
        return self.hooks.activations(self.embedder.encode(tokens, self.dtype))

    def __call__(
        self,
        x: Float[Array, "B G t D"],
        positions: Int[Array, "B G t"],
        mask: Bool[Array, "#B #G t"] | None,
        past: KeyValues | None = None,
        past_mask: Bool[Array, "#B #G T"] | None = None,
        prefix: KeyValues | None = None,
        prefix_mask: Bool[Array, "B 1 S"] | None = None,
    ) -> tuple[Float[Array, "B G t D"], KeyValues]:
        """Returns the final hidden states of `x`, and its keys and values stacked over layers.

        Without `prefix`, each token sees all real tokens of `x`. With `prefix`, each token sees the
        real tokens of the prefix, of its row's `past`, and of `x` up to itself.

        Args:
          mask: True at real tokens; None means that all are real. The other masks are the same.
          past: keys and values of earlier completion tokens, stacked over layers.
          prefix: keys and values of the prompts, stacked over layers.
        """
        x, new = self.layers(x, positions, mask, past, past_mask, prefix, prefix_mask)
        return self.final_norm(x), new

    def both(
        self,
        before: Float[Array, "B S D"],
        prefix_mask: Bool[Array, "B S"],
        x: Float[Array, "B G t D"],
        positions: Int[Array, "B G t"],
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B G t D"]]:
        """Returns the final hidden states of prefixes and of their completions.

        Two calls would return the same. Here each layer computes both, so its weights are gathered
        once and no cache is kept.
        """
        prefix_mask = prefix_mask[:, None]
        prefix_positions = jnp.cumsum(prefix_mask, axis=2) - 1
        streams = (before[:, None], x)
        (before, x), _ = self.layers.both(streams, prefix_positions, prefix_mask, positions)
        return self.final_norm(before[:, 0]), self.final_norm(x)

    def vocabulary(self) -> Float[Array, "V D"]:
        """Returns the table that `hidden @ table.T` turns into logits."""
        return self.hooks.logits_table(self.embedder.table)


def normal_by_fan_in(axes: tuple[int, ...]) -> nn.initializers.Initializer:
    """Returns an initializer with variance 1 / (product of the sizes of `axes`)."""

    def init(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jax.random.normal(key, shape) * float(np.prod([shape[a] for a in axes])) ** -0.5

    return init


def loc_sinusoids(width: int) -> Float[Array, "1024 D"]:
    """Returns one row of norm 1 per loc bin. Neighbouring bins have similar rows.

    With random rows, a model without pretraining would have to learn 1024 unrelated classes.
    """
    rows = sinusoids(np.arange(LOC_TOKENS) / LOC_MAX, width)
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def rope(x: Float[Array, "B G t N H"], positions: Int[Array, "B G t"]) -> Float[Array, "B G t N H"]:
    """Returns `x` rotated by its positions (RoPE, arXiv 2104.09864).

    The base is 10,000. The first half of H is rotated with the second half.
    """
    half = x.shape[-1] // 2
    timescale = 10_000.0 ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Returns `x` squashed smoothly into (-cap, cap)."""
    return jnp.tanh(x / cap) * cap
