"""The VQ-VAE of the `<seg>` tokens (arXiv 2301.02229): masks of 64 x 64 pixels ⇄ 16 codes.

A code is one of 128 vectors.

The weights are big_vision's `vae-oid.npz`. The file has torch's names and order of axes, and so has
this module.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pg_ground.types import Array
from pg_ground.vocab import SEG_TOKENS

SIDE = 64
"""Side of a mask in pixels."""

GRID = 4
"""Codes along each side of a mask, row by row."""

CODEBOOK = "_vq_vae._embedding"

DOWN = ("encoder.0", "encoder.2", "encoder.4", "encoder.6")
UP = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
RESIDUAL = tuple((f"net.{index}", side) for index, side in ((0, 3), (2, 3), (4, 1)))

DECODER = {
    "decoder.0": 1,
    **{
        f"{block}.{layer}": side for block in ("decoder.2", "decoder.3") for layer, side in RESIDUAL
    },
    **dict.fromkeys(UP, 4),
    "decoder.12": 1,
}
"""Layers in order, each with the side of its kernel."""

ENCODER = {
    **dict.fromkeys(DOWN, 4),
    **{
        f"{block}.{layer}": side for block in ("encoder.8", "encoder.9") for layer, side in RESIDUAL
    },
    "encoder.10": 1,
}

Params = dict[str, jax.Array]


def decode(params: Params, codes: Int[Array, "... 16"]) -> Float[Array, "... 64 64"]:
    """Returns the masks of codes, as big_vision's `reconstruct_masks`.

    Values are about -1 to 1, and above 0 at the object.
    """
    x = params[CODEBOOK][codes].reshape(-1, GRID, GRID, params[CODEBOOK].shape[1])
    x = jax.nn.relu(_conv(params, "decoder.0", x))
    for block in ("decoder.2", "decoder.3"):
        x = _residual(params, block, x)
    for layer in UP:
        x = jax.nn.relu(_double(params, layer, x))
    return _conv(params, "decoder.12", x).reshape(*codes.shape[:-1], SIDE, SIDE)


def encode(params: Params, masks: Float[Array, "... 64 64"]) -> Int[Array, "... 16"]:
    """Returns the codes of masks in [0, 1], as big_vision's `encode_to_codebook_indices`.

    A cell has the code of the nearest vector in the codebook.
    """
    x = 2 * (jnp.asarray(masks).reshape(-1, SIDE, SIDE, 1) - 0.5)
    for layer in DOWN:
        x = jax.nn.relu(_conv(params, layer, x, stride=2))
    for block in ("encoder.8", "encoder.9"):
        x = _residual(params, block, x)
    x, book = _conv(params, "encoder.10", x), params[CODEBOOK]
    similarity = jnp.einsum("nhwd,vd->nhwv", x, book, precision=jax.lax.Precision.HIGHEST)
    nearest = jnp.argmin(jnp.square(book).sum(axis=-1) - 2 * similarity, axis=-1)
    return nearest.reshape(*masks.shape[:-2], GRID * GRID)


def _conv(
    params: Params, layer: str, x: Float[jax.Array, "N h w c"], stride: int = 1
) -> Float[jax.Array, "N H W C"]:
    # Full float32, as big_vision decodes on a CPU: values near 0 must not change their sign.
    return params[f"{layer}.bias"] + jax.lax.conv_general_dilated(
        x,
        params[f"{layer}.weight"],
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def _double(
    params: Params, layer: str, x: Float[jax.Array, "N h w c"]
) -> Float[jax.Array, "N H W C"]:
    """Returns a transposed convolution with stride 2 and padding 1, as torch computes it.

    Height and width are doubled.
    """
    return params[f"{layer}.bias"] + jax.lax.conv_transpose(
        x,
        params[f"{layer}.weight"],
        strides=(2, 2),
        padding=((2, 2), (2, 2)),
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        transpose_kernel=True,
        precision=jax.lax.Precision.HIGHEST,
    )


def _residual(
    params: Params, block: str, x: Float[jax.Array, "N h w c"]
) -> Float[jax.Array, "N h w c"]:
    first, second, third = (f"{block}.{layer}" for layer, _ in RESIDUAL)
    y = jax.nn.relu(_conv(params, first, x))
    return x + _conv(params, third, jax.nn.relu(_conv(params, second, y)))


def expected_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that weights must have.

    Widths are as in the file. The input width of a layer is the output width of the layer
    before.
    """
    depth = shapes[CODEBOOK][-1] if shapes[CODEBOOK] else 0
    expected: dict[str, tuple[int, ...]] = {CODEBOOK: (SEG_TOKENS, depth)}
    for layers, first, last in ((DECODER, depth, 1), (ENCODER, 1, depth)):
        input_width = first
        for layer, side in layers.items():
            if f"{layer}.bias" not in shapes:
                continue
            width = input_width if ".net." in layer else (shapes[f"{layer}.bias"] or (0,))[0]
            output_width = last if layer == list(layers)[-1] else width
            expected[f"{layer}.weight"] = (
                (input_width, output_width, side, side)
                if layer in UP
                else (output_width, input_width, side, side)
            )
            expected[f"{layer}.bias"] = (output_width,)
            input_width = output_width
    return expected
