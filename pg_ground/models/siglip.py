"""The SigLIP vision tower, with big_vision's parameter names (big_vision/models/vit.py)."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8

from pg_ground.config import Lora, Vision
from pg_ground.models.blocks import in_blocks
from pg_ground.models.lora import low_rank
from pg_ground.models.quantization import matrix_param, product
from pg_ground.types import Array, ShardingHooks


class Dense(nn.Module):
    """einsum(x, kernel) + bias, with the kernel in big_vision's shape."""

    equation: str
    shape: tuple[int, ...]
    lora: Lora
    init: Callable[..., nn.initializers.Initializer] = nn.initializers.xavier_uniform

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        of_x, of_w, of_y = re.split(",|->", self.equation)
        inner = [axis for axis, letter in enumerate(of_w) if letter in of_x]
        outer = [axis for axis, letter in enumerate(of_w) if letter in of_y]
        kernel = matrix_param(self, "kernel", self.init(inner, outer), self.shape)
        bias = self.param("bias", nn.initializers.zeros, tuple(self.shape[axis] for axis in outer))
        y = product(self.equation, x, kernel)
        adapter_term = low_rank(self, "kernel", self.equation, x, self.shape, self.lora)
        return (y if adapter_term is None else y + adapter_term) + bias.astype(x.dtype)


class MlpBlock(nn.Module):
    config: Vision
    lora: Lora

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        width, hidden = self.config.width, self.config.mlp_dim
        x = Dense("BPD,DF->BPF", (width, hidden), self.lora)(x)
        return Dense("BPF,FD->BPD", (hidden, width), self.lora)(nn.gelu(x, approximate=True))


class Attention(nn.Module):
    """Multi-head attention of every patch to every patch.

    The logits of at most `block` patches are in memory at a time; 0 means all patches.
    """

    config: Vision
    block: int
    lora: Lora

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        width, heads = self.config.width, self.config.num_heads
        shape = (width, heads, width // heads)
        q, k, v = (
            Dense("BPD,DNH->BPNH", shape, self.lora, name=name)(x)
            for name in ("query", "key", "value")
        )

        def read(q: Float[Array, "B p N H"]) -> Float[Array, "B p N H"]:
            logits = jnp.einsum(
                "BpNH,BQNH->BNpQ", q * shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
            )
            weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
            return jnp.einsum("BNpQ,BQNH->BpNH", weights, v)

        y = in_blocks(read, self.block, (1,), q) if 0 < self.block < x.shape[1] else read(q)
        return Dense("BPNH,NHD->BPD", (*shape[1:], width), self.lora, name="out")(y)


class EncoderBlock(nn.Module):
    """One pre-norm block. The second result is None, because `nn.scan` needs two."""

    config: Vision
    dtype: jnp.dtype
    attention_block: int
    lora: Lora
    hooks: ShardingHooks

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], _: None) -> tuple[Float[Array, "B P D"], None]:
        x = self.hooks.activations(x)
        attention = Attention(
            self.config, self.attention_block, self.lora, name="MultiHeadDotProductAttention_0"
        )
        x = self.hooks.activations(x + attention(nn.LayerNorm(dtype=self.dtype)(x)))
        return self.hooks.activations(
            x + MlpBlock(self.config, self.lora)(nn.LayerNorm(dtype=self.dtype)(x))
        ), None


class Encoder(nn.Module):
    config: Vision
    dtype: jnp.dtype
    remat: str
    unroll: int
    attention_block: int
    lora: Lora
    hooks: ShardingHooks

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        c = self.config
        blocks = nn.scan(
            rematerialised(EncoderBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.depth,
            unroll=self.unroll,
        )
        x, _ = blocks(
            c, self.dtype, self.attention_block, self.lora, self.hooks, name="encoderblock"
        )(x, None)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class Tower(nn.Module):
    """Image to one embedding per patch, in row-major order, as wide as the decoder.

    `head` is the multimodal projector. big_vision stores it as the classifier head of the tower.
    """

    config: Vision
    out_width: int
    dtype: jnp.dtype
    remat: str
    unroll: int
    attention_block: int
    coordinate_init: str
    lora: Lora
    hooks: ShardingHooks

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"]
    ) -> Float[Array, "B P D"]:
        c = self.config
        if image.dtype == jnp.uint8:
            image = image.astype(jnp.float32) / 127.5 - 1
        x = patches(image.astype(self.dtype), c.patch_size)
        # A product computes the same as nn.Conv. On a CPU, XLA's gradient of a convolution takes
        # twenty times as long.
        kernel = (c.patch_size, c.patch_size, 3, c.width)
        x = Dense(
            "BPyxC,yxCD->BPD", kernel, Lora(), nn.initializers.lecun_normal, name="embedding"
        )(x)
        init = (
            sinusoids_2d
            if self.coordinate_init == "sinusoid"
            else nn.initializers.normal(c.width**-0.5)
        )
        posemb = self.param("pos_embedding", init, (1, x.shape[1], c.width))
        x = self.hooks.activations(x + posemb.astype(x.dtype))
        x = Encoder(
            c,
            self.dtype,
            self.remat,
            self.unroll,
            self.attention_block,
            self.lora,
            self.hooks,
            name="Transformer",
        )(x)
        return Dense(
            "BPD,DO->BPO",
            (c.width, self.out_width),
            self.lora,
            nn.initializers.lecun_normal,
            name="head",
        )(x)


def patches(image: Float[Array, "B H W 3"], side: int) -> Float[Array, "B P y x 3"]:
    """Returns the squares of `side` pixels that an image consists of, in row-major order."""
    b, height, width, _ = image.shape
    x = image.reshape(b, height // side, side, width // side, side, 3)
    return x.swapaxes(2, 3).reshape(b, -1, side, side, 3)


def sinusoids(coordinate: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, "n D"]:
    """Returns one row of norm sqrt(width / 2) per coordinate in [0, 1].

    Near coordinates have similar rows. A row has sines and cosines with wavelengths from two images
    to 1/32 of an image.
    """
    waves = width // 2
    angle = coordinate[:, None] * np.pi * 2.0 ** np.linspace(0, 6, waves)
    rows = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.pad(rows, ((0, 0), (0, width - 2 * waves)))


def sinusoids_2d(_: Array, shape: tuple[int, int, int]) -> Float[Array, "1 P D"]:
    """Returns position embeddings of a square grid: sinusoids of y, then of x."""
    side, half = round(shape[1] ** 0.5), shape[2] // 2
    centres = (np.arange(side) + 0.5) / side
    y, x = np.repeat(centres, side), np.tile(centres, side)
    rows = np.concatenate([sinusoids(y, half), sinusoids(x, shape[2] - half)], axis=1)
    return jnp.asarray(rows[None], jnp.float32)


def rematerialised(
    block: type[nn.Module], policy: str, methods: tuple[str, ...] = ("__call__",)
) -> type[nn.Module]:
    """Returns `block` with activations that are recomputed in the backward pass.

    The block must be used in a scan. A scan already prevents the common-subexpression elimination
    that would undo the recomputation.

    Args:
      policy: a name in `jax.checkpoint_policies`, which says what is saved; "none" saves
        everything.
    """
    if policy == "none":
        return block
    return nn.remat(
        block, prevent_cse=False, policy=getattr(jax.checkpoint_policies, policy), methods=methods
    )
