"""The Gemma 1 and Gemma 2 decoder over a prefix shared by G completions, with big_vision's parameter names.

Every activation is `[B, G, t, …]`: the prefix itself is the case G = 1. A token attends to the prefix cache of its prompt
(one for the whole group: the group is one more axis of the queries, never a repeated batch) and to the tokens of its own
completion. Facts: big_vision/models/proj/paligemma/gemma_bv.py; arXiv 2403.08295 (Gemma), 2408.00118 (Gemma 2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from pg_ground.config import Lora, Text
from pg_ground.model.lora import low_rank
from pg_ground.model.siglip import rematerialised, sinusoids
from pg_ground.types import Array
from pg_ground.vocab import LOC_MAX, LOC_TOKENS, vocab_of_size

MASKED = -2.3819763e38
"""What a masked attention logit becomes: big_vision's value, near the lowest float32."""


class KeyValues(NamedTuple):
    """Keys and values that queries attend to; a layer axis stands in front of all when layers are stacked."""

    k: Float[Array, "... K H"]
    v: Float[Array, "... K H"]


class Embedder(nn.Module):
    """The table that turns ids into vectors, and (tied) vectors into logits."""

    vocab_size: int
    width: int
    coordinate_init: str

    def setup(self) -> None:
        self.table = self.param("input_embedding", self._init, (self.vocab_size, self.width))

    def _init(self, key: Array, shape: tuple[int, int]) -> Float[Array, "V D"]:
        table = jax.random.normal(key, shape) * shape[1] ** -0.5
        if self.coordinate_init == "sinusoid":
            loc0 = vocab_of_size(shape[0]).loc0
            table = table.at[loc0 : loc0 + LOC_TOKENS].set(loc_sinusoids(shape[1]))
        return table

    def encode(self, tokens: Int[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... D"]:
        return self.table[tokens].astype(dtype) * jnp.asarray(self.table.shape[1] ** 0.5, dtype)


class Einsum(nn.Module):
    shape: tuple[int, ...]
    fan_in_axes: tuple[int, ...]
    lora: Lora

    @nn.compact
    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        w = self.param("w", normal_by_fan_in(self.fan_in_axes), self.shape)
        y = jnp.einsum(equation, x, w.astype(x.dtype))
        more = low_rank(self, "w", equation, x, self.shape, self.lora)
        return y if more is None else y + more


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + scale), in float32; the stored scale is the offset from one."""

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class Attention(nn.Module):
    config: Text
    lora: Lora

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B G t D"],
        positions: Int[Array, "B G t"],
        own: KeyValues | None,
        own_mask: Bool[Array, "#B #G #t T"],
        prefix: KeyValues | None,
        prefix_mask: Bool[Array, "B S"] | None,
        write_at: Int[Array, ""],
    ) -> tuple[Float[Array, "B G t D"], KeyValues]:
        c = self.config
        b, g, t, _ = x.shape
        n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
        q = Einsum((n, c.width, h), (1,), self.lora, name="q_einsum")("BGtD,NDH->BGtNH", x)
        new_k, new_v = Einsum((2, k, c.width, h), (2,), self.lora, name="kv_einsum")("BGtD,cKDH->cBGtKH", x)
        q = rope(q, positions) * c.query_scale
        new_k = rope(new_k, positions)
        if own is None:
            own = KeyValues(new_k, new_v)
        else:
            own = KeyValues(
                jax.lax.dynamic_update_slice_in_dim(own.k, new_k, write_at, axis=2),
                jax.lax.dynamic_update_slice_in_dim(own.v, new_v, write_at, axis=2),
            )
        q = q.reshape(b, g, t, k, n // k, h)
        logits = jnp.einsum("BGtKRH,BGTKH->BGKRtT", q, own.k, preferred_element_type=jnp.float32)
        mask = jnp.broadcast_to(own_mask, (b, g, t, own.k.shape[2]))
        if prefix is not None and prefix_mask is not None:
            ahead = jnp.einsum("BGtKRH,BSKH->BGKRtS", q, prefix.k, preferred_element_type=jnp.float32)
            logits = jnp.concatenate([ahead, logits], axis=-1)
            behind = jnp.broadcast_to(prefix_mask[:, None, None], (b, g, t, prefix.k.shape[1]))
            mask = jnp.concatenate([behind, mask], axis=-1)
        if c.attn_softcap:
            logits = softcap(logits, c.attn_softcap)
        weights = jax.nn.softmax(jnp.where(mask[:, :, None, None], logits, MASKED), axis=-1).astype(x.dtype)
        split = weights.shape[-1] - own.k.shape[2]
        out = jnp.einsum("BGKRtT,BGTKH->BGtKRH", weights[..., split:], own.v, preferred_element_type=jnp.float32)
        if prefix is not None:
            behind = weights[..., :split]
            out = out + jnp.einsum("BGKRtS,BSKH->BGtKRH", behind, prefix.v, preferred_element_type=jnp.float32)
        out = out.astype(x.dtype).reshape(b, g, t, n, h)
        return Einsum((n, h, c.width), (0, 1), self.lora, name="attn_vec_einsum")("BGtNH,NHD->BGtD", out), own


class FeedForward(nn.Module):
    """Gated MLP: (gelu(x W0) · x W1) W2."""

    config: Text
    lora: Lora

    @nn.compact
    def __call__(self, x: Float[Array, "B G t D"]) -> Float[Array, "B G t D"]:
        up, down = (2, self.config.width, self.config.mlp_dim), (self.config.mlp_dim, self.config.width)
        gating = self.param("gating_einsum", normal_by_fan_in((1,)), up).astype(x.dtype)
        linear = self.param("linear", normal_by_fan_in((0,)), down).astype(x.dtype)
        gate, value = x @ gating[0], x @ gating[1]
        more = low_rank(self, "gating_einsum", "BGtD,cDF->cBGtF", x, up, self.lora)
        if more is not None:
            gate, value = gate + more[0], value + more[1]
        hidden = nn.gelu(gate, approximate=True) * value
        more = low_rank(self, "linear", "BGtF,FD->BGtD", hidden, down, self.lora)
        return hidden @ linear if more is None else hidden @ linear + more


class Block(nn.Module):
    config: Text
    lora: Lora

    @nn.compact
    def __call__(self, x, positions, own, own_mask, prefix, prefix_mask, write_at):
        def norm(name: str, y: Float[Array, "B G t D"]) -> Float[Array, "B G t D"]:
            return RMSNorm(name=name)(y)

        attn = Attention(self.config, self.lora, name="attn")
        y, own = attn(norm("pre_attention_norm", x), positions, own, own_mask, prefix, prefix_mask, write_at)
        x = x + (norm("post_attention_norm", y) if self.config.post_norms else y)
        y = FeedForward(self.config, self.lora, name="mlp")(norm("pre_ffw_norm", x))
        x = x + (norm("post_ffw_norm", y) if self.config.post_norms else y)
        return x, own


class Decoder(nn.Module):
    config: Text
    dtype: jnp.dtype
    remat: str
    unroll: int
    coordinate_init: str
    lora: Lora

    def setup(self) -> None:
        self.embedder = Embedder(self.config.vocab_size, self.config.width, self.coordinate_init)
        self.layers = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            out_axes=0,
            length=self.config.depth,
            unroll=self.unroll,
        )(self.config, self.lora)
        self.final_norm = RMSNorm()

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns token embeddings, scaled by sqrt(D) as Gemma does (image embeddings are not)."""
        return self.embedder.encode(tokens, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B G t D"],
        positions: Int[Array, "B G t"],
        own: KeyValues | None,
        own_mask: Bool[Array, "#B #G #t T"],
        prefix: KeyValues | None = None,
        prefix_mask: Bool[Array, "B S"] | None = None,
        write_at: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B G t D"], KeyValues]:
        """Returns the final hidden states of `x`, and `own` with the keys and values of `x` written from slot `write_at` on.

        `own` and `prefix` are stacked over layers. `own_mask[…, i, j]` lets token i see slot j of its own completion;
        `own` None means that `x` is all there is of it. Every token sees the slots of the prefix where `prefix_mask` holds.
        """
        x, written = self.layers(x, positions, own, own_mask, prefix, prefix_mask, jnp.asarray(write_at))
        return self.final_norm(x), written

    def vocabulary(self) -> Float[Array, "V D"]:
        """Returns the table that `hidden @ table.T` turns into logits."""
        return self.embedder.table


def normal_by_fan_in(axes: tuple[int, ...]) -> nn.initializers.Initializer:
    """Returns an initializer with variance 1 / (product of the sizes of `axes`)."""

    def init(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jax.random.normal(key, shape) * float(np.prod([shape[a] for a in axes])) ** -0.5

    return init


def loc_sinusoids(width: int) -> Float[Array, "1024 D"]:
    """Returns one row of norm 1 per loc bin, in which neighbouring bins are alike.

    With unrelated rows the 1024 bins are 1024 unrelated classes to a model that starts from nothing.
    """
    rows = sinusoids(np.arange(LOC_TOKENS) / LOC_MAX, width)
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)


def rope(x: Float[Array, "B G t N H"], positions: Int[Array, "B G t"]) -> Float[Array, "B G t N H"]:
    """Returns `x` rotated by its positions: base 10,000, first half of H against the second (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    timescale = 10_000.0 ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Returns `x` squashed smoothly into (-cap, cap)."""
    return jnp.tanh(x / cap) * cap
