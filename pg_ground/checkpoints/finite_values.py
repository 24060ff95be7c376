"""Checks that the weights of a checkpoint are finite while they are read.

A damaged file or a run that diverged can leave NaN or inf in a checkpoint. Such a model answers
nothing, and each of its losses is NaN.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pg_ground.checkpoints.tensor_files import BlockIndex, StoredTensor
from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError, first_problems

LISTED_ARRAYS = 3
"""Number of arrays that an error names."""

ADVICE = "the file is damaged or its training diverged: take another copy or an older checkpoint"


def with_finite_check(
    path: FilePath, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Returns `tensors`, whose blocks raise UserError if an array has values that are not finite.

    The error names the first `LISTED_ARRAYS` of these arrays. Then all tensors are read once more,
    to count their values. A checkpoint of finite values costs one pass over each block in memory.
    """
    return {name: _checked(path, name, tensors) for name in tensors}


def _checked(path: FilePath, name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    tensor = tensors[name]

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for index, block in tensor.blocks():
            if not is_finite(block):
                raise UserError(_message(path, _counts(tensors)))
            yield index, block

    return tensor._replace(blocks=blocks)


def _counts(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Returns the number of values that are not finite, and of all values, for each tensor with
    such values.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        blocks = (block for _, block in tensor.blocks() if not is_finite(block))
        with np.errstate(invalid="ignore"):  # signalling NaN
            count = sum(int(np.count_nonzero(~np.isfinite(block))) for block in blocks)
        if count:
            counts[name] = (count, int(np.prod(tensor.shape)))
    return counts


def is_finite(block: np.ndarray) -> bool:
    """Returns whether all values of an array of floats are finite.

    The bits of inf and NaN are the largest of each sign, read as an integer. Two maxima need no
    memory and take a tenth of the time of `np.isfinite` for bfloat16.
    """
    if not block.size:
        return True
    size = block.dtype.itemsize
    infinity = np.array([np.inf, -np.inf]).astype(block.dtype)
    positive = infinity.view(f"i{size}")[0]
    negative = infinity.view(f"u{size}")[1]
    return bool(block.view(f"i{size}").max() < positive and block.view(f"u{size}").max() < negative)


def check_arrays(path: FilePath, arrays: Mapping[str, jax.Array]) -> None:
    """Checks arrays on devices, such as the arrays of an orbax directory.

    All processes call this together, and all of them raise or none.

    Raises:
      UserError: a float array has values that are not finite.
    """
    floats = {
        name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)
    }
    # A sum is one pass without a second array. It is not finite if a value is not finite.
    sums = {name: jnp.sum(array, dtype=jnp.float32) for name, array in floats.items()}
    suspects = [name for name, total in sums.items() if not np.isfinite(np.asarray(total))]
    counts = {name: int(jnp.count_nonzero(~jnp.isfinite(floats[name]))) for name in suspects}
    problems = {name: (count, arrays[name].size) for name, count in counts.items() if count}
    if problems:
        raise UserError(_message(path, problems))


def _message(path: FilePath, counts: Mapping[str, tuple[int, int]]) -> str:
    arrays = [f"{name} ({count:,} of {size:,})" for name, (count, size) in counts.items()]
    return (
        f"{path} holds values that are NaN or infinite: "
        f"{first_problems(arrays, ', ', LISTED_ARRAYS)}; {ADVICE}"
    )


def with_range_check(
    path: FilePath, tensors: Mapping[str, StoredTensor], dtype: str
) -> dict[str, StoredTensor]:
    """Returns `tensors`, whose blocks raise UserError if a value is too large for `dtype`.

    Args:
      path: the file that is written, for the error.
      dtype: the dtype in which the tensors are written; "" keeps their dtypes.
    """
    if not dtype:
        return dict(tensors)
    limit = float(jnp.finfo(dtype).max)
    return {
        name: _in_range(path, name, tensor, dtype)
        if float(jnp.finfo(tensor.dtype).max) > limit
        else tensor
        for name, tensor in tensors.items()
    }


def _in_range(path: FilePath, name: str, tensor: StoredTensor, dtype: str) -> StoredTensor:
    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for index, block in tensor.blocks():
            with np.errstate(over="ignore"):
                rounded = block.astype(dtype)
            if not is_finite(rounded) and is_finite(block):
                largest = np.abs(block.astype(np.float64)).max()
                raise UserError(
                    f"{path}: {name} has values up to {largest:.6g}, too large for {dtype}: "
                    "choose bfloat16 or float32"
                )
            yield index, rounded

    return StoredTensor(tensor.shape, np.dtype(dtype), blocks)
