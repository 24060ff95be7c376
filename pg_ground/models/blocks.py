"""Computes a function block by block along an axis, to keep intermediate arrays small."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pg_ground.types import Array


def in_blocks(
    f: Callable[..., PyTree], block: int, axes: tuple[int, ...], *arrays: Array
) -> PyTree:
    """Returns `f(*arrays)`, computed over at most `block` slots at a time.

    The backward pass recomputes each block. Blocks have nearly equal sizes. The last block is
    padded with zeros, and its padding is removed from the result.

    Args:
      f: returns a tree of arrays. Their slots are at the same axis as in the first of `arrays`.
      axes: the axis of the slots in each array.
    """
    length = arrays[0].shape[axes[0]]
    blocks = math.ceil(length / block)
    if blocks == 1:
        return jax.checkpoint(f)(*arrays)
    size = math.ceil(length / blocks)

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, (blocks * size - length) * (i == axis)) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axes[0])
        x = x.reshape(*x.shape[: axes[0]], blocks * size, *x.shape[axes[0] + 2 :])
        return jax.lax.slice_in_dim(x, 0, length, axis=axes[0])

    results = jax.lax.map(lambda parts: jax.checkpoint(f)(*parts), tuple(map(split, arrays, axes)))
    return jax.tree.map(join, results)
