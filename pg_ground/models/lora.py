"""Low-rank adapters on the matrices of the model (LoRA, arXiv 2106.09685).

If the config's pattern matches the name of a matrix W, the product is

    x W + (alpha / rank) · (x A) B

A is random and B is zero at the start, so the policy starts as the base, bit for bit. The factors
are beside the matrix in the tree of parameters. Like the matrix, they are stacked over layers.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float

from pg_ground.config import Lora
from pg_ground.models.quantization import QuantizedMatrix, dequantize, stored
from pg_ground.params import DOWN, UP, flatten, is_adapter, is_scale, matrix_axes, unflatten
from pg_ground.types import Array, Params


def low_rank(
    module: nn.Module,
    leaf: str,
    equation: str,
    x: Float[Array, "..."],
    shape: tuple[int, ...],
    lora: Lora,
) -> Float[Array, "..."] | None:
    """Returns the adapter's term of `einsum(equation, x, w)`. Returns None without an adapter.

    `w` is the parameter `leaf` of `module`. Inputs are dropped with probability `lora.dropout` if
    the caller of the model passed a "dropout" key.
    """
    name = "/".join((*module.path, leaf))
    axes = matrix_axes(name)
    if not lora.rank or axes is None or not re.fullmatch(lora.pattern, name):
        return None
    inner, outer = ([len(shape) + axis for axis in side] for side in axes)
    parts = [axis for axis in range(len(shape)) if axis not in (*inner, *outer)]
    of_x, of_w, of_y = re.split(",|->", equation)

    def letters(axes: list[int]) -> str:
        return "".join(of_w[axis] for axis in axes)

    def sizes(axes: list[int]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in axes)

    between = (
        letters(parts) + "".join(letter for letter in of_x if letter not in letters(inner)) + "z"
    )
    inner_axes = range(len(parts), len(parts) + len(inner))
    fan_in = nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", inner_axes, -1, range(len(parts))
    )
    down = module.param(leaf + DOWN, fan_in, (*sizes(parts), *sizes(inner), lora.rank))
    up = module.param(leaf + UP, nn.initializers.zeros, (*sizes(parts), lora.rank, *sizes(outer)))
    if lora.dropout and module.has_rng("dropout"):
        keeps = jax.random.bernoulli(module.make_rng("dropout"), 1 - lora.dropout, x.shape)
        x = jnp.where(keeps, x / (1 - lora.dropout), 0)
    z = jnp.einsum(f"{of_x},{letters(parts)}{letters(inner)}z->{between}", x, down.astype(x.dtype))
    y = jnp.einsum(f"{between},{letters(parts)}z{letters(outer)}->{of_y}", z, up.astype(x.dtype))
    return y * (lora.alpha / lora.rank)


def merge(params: Params, lora: Lora) -> dict[str, Any]:
    """Returns parameters without adapters that compute the same as `params` with adapters.

    Sums are float32, layer by layer. The result has the wider dtype of base and adapter, because
    most changes that adapters learn are smaller than a step of bfloat16. int8 matrices become
    float32.
    """
    flat = flatten(params)
    names = [name for name in flat if not is_adapter(name) and not is_scale(name)]
    return unflatten({name: merged(flat, name, lora) for name in names})


def merged(
    flat: Mapping[str, Array], name: str, lora: Lora, dtype: DTypeLike | None = None
) -> Array:
    """Returns the named parameter, merged with its adapter if it has one.

    Args:
      dtype: dtype of the result; None means the wider dtype of base and adapter.
    """
    matrix = stored(flat, name)
    base = dequantize(matrix) if isinstance(matrix, QuantizedMatrix) else matrix
    if name + DOWN not in flat:
        return base if dtype is None else base.astype(dtype)
    down, up = flat[name + DOWN], flat[name + UP]
    result_dtype = jnp.result_type(base, down) if dtype is None else dtype

    def merge_layer(parts: tuple[Array, Array, Array]) -> Array:
        base, down, up = parts
        change = low_rank_matrix(name, down, up) * (lora.alpha / lora.rank)
        return (base.astype(jnp.float32) + change).astype(result_dtype)

    stacked = "/layers/" in name or "/encoderblock/" in name
    parts = (base, down, up)
    return jax.lax.map(merge_layer, parts) if stacked else merge_layer(parts)


def low_rank_matrix(
    name: str, down: Float[Array, "..."], up: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns A B in float32, in the shape of the named matrix."""
    axes = matrix_axes(name)
    assert axes is not None, name
    inner, outer = axes
    rank = len(inner) + len(outer)
    parts = down.ndim - len(inner) - 1
    a = down.astype(jnp.float32).reshape(*down.shape[:parts], -1, down.shape[-1])
    b = up.astype(jnp.float32).reshape(*up.shape[: parts + 1], -1)
    ab = (a @ b).reshape(*down.shape[:-1], *up.shape[parts + 1 :])
    order = [parts + [*inner, *outer].index(axis) for axis in range(-rank, 0)]
    return ab.transpose(*range(parts), *order)
