"""Frozen matrices in int8 with one float32 scale per output channel.

int8 takes a quarter of the bytes of float32, and half of the bytes of bfloat16.

A quantized matrix is two parameters: `NAME` holds the int8 values and `NAME_scale` the scales. Both
are ordinary arrays, so checkpoints, sharding rules and memory estimates need no special case. The
scheme is symmetric: the largest absolute value of a channel becomes 127, as in LLM.int8() (arXiv
2208.07339). Adapters are trained on a frozen quantized base, as in QLoRA (arXiv 2305.14314).
Trained parameters cannot be int8, because int8 has no gradient.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int8

from pg_ground.params import SCALE, AbstractParams, matrix_axes
from pg_ground.types import Array

UNQUANTIZED_DTYPE = "bfloat16"
"""Dtype of other frozen parameters (embeddings, norms, biases), if matrices are int8."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """`values * scale` approximates a matrix."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]
    """As many axes as `values`, with size 1 at the axes that a product sums over."""


Matrix = Float[Array, "..."] | QuantizedMatrix


def quantize(name: str, matrix: Float[Array, "..."]) -> QuantizedMatrix:
    """Returns the named matrix in int8. Works on numpy and on jax arrays.

    The error of each value is at most half a step: 1/254 of the largest absolute value of its
    output channel.
    """
    axes = matrix_axes(name)
    assert axes is not None, name
    matrix = matrix.astype("float32")
    # a product, not a division by 127, which XLA rounds in another way than numpy
    scale = abs(matrix).max(axis=axes[0], keepdims=True) * (1 / 127)
    scale = scale + (scale == 0)  # a channel of zeros stays zeros
    return QuantizedMatrix((matrix / scale).round().astype("int8"), scale)


def dequantize(matrix: QuantizedMatrix) -> Float[Array, "..."]:
    """Returns the float32 matrix that `matrix` approximates."""
    return matrix.values.astype("float32") * matrix.scale


def matrix_param(
    module: nn.Module, leaf: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Matrix:
    """Returns the parameter `leaf` of a module: quantized if its scale is among the parameters."""
    values = module.param(leaf, init, shape)
    if not module.has_variable("params", leaf + SCALE):
        return values
    return QuantizedMatrix(values, module.get_variable("params", leaf + SCALE))


def product(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """Returns `einsum(equation, x, matrix)` in the dtype of `x`.

    Every product with a parameter matrix calls this function.

    A quantized matrix is multiplied as integers (bfloat16 holds -127 to 127 exactly), and the
    result is scaled: the scale of an output channel is a common factor of its sum.
    """
    if not isinstance(matrix, QuantizedMatrix):
        return jnp.einsum(equation, x, matrix.astype(x.dtype))
    _, of_matrix, of_result = re.split(",|->", equation)
    y = jnp.einsum(equation, x, matrix.values.astype(x.dtype))
    letters = [letter for letter in of_matrix if letter in of_result]
    summed = [axis for axis, letter in enumerate(of_matrix) if letter not in of_result]
    order = sorted(range(len(letters)), key=lambda axis: of_result.index(letters[axis]))
    absent = [axis for axis, letter in enumerate(of_result) if letter not in letters]
    scale = jnp.squeeze(matrix.scale, summed).transpose(order)
    return y * jnp.expand_dims(scale, absent).astype(x.dtype)


def stored(params: Mapping[str, Array], name: str) -> Matrix:
    """Returns the named parameter from a flat tree: quantized if its scale is in the tree."""
    if name + SCALE not in params:
        return params[name]
    return QuantizedMatrix(params[name], params[name + SCALE])


def abstract_int8(
    name: str, shape: tuple[int, ...]
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the abstract arrays of the named matrix in int8: values and scales."""
    axes = matrix_axes(name)
    assert axes is not None, name
    scale_shape = list(shape)
    for axis in axes[0]:
        scale_shape[axis] = 1
    values = jax.ShapeDtypeStruct(shape, jnp.int8)
    return values, jax.ShapeDtypeStruct(tuple(scale_shape), jnp.float32)


def abstract_frozen(name: str, shape: tuple[int, ...], frozen_dtype: str) -> AbstractParams:
    """Returns the abstract arrays of a frozen parameter: two for an int8 matrix."""
    if frozen_dtype == "int8" and matrix_axes(name):
        values, scale = abstract_int8(name, shape)
        return {name: values, name + SCALE: scale}
    dtype = UNQUANTIZED_DTYPE if frozen_dtype == "int8" else frozen_dtype
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}


def cast_params(params: Mapping[str, Array], abstract: AbstractParams) -> dict[str, Array]:
    """Returns float parameters in the dtypes of `abstract`.

    A matrix is quantized if `abstract` has its scales.
    """
    arrays: dict[str, Array] = {}
    for name, leaf in abstract.items():
        if name + SCALE in abstract:
            matrix = quantize(name, params[name])
            arrays |= {name: matrix.values, name + SCALE: matrix.scale}
        elif name not in arrays:
            arrays[name] = params[name].astype(leaf.dtype)
    return {name: arrays[name] for name in abstract}
