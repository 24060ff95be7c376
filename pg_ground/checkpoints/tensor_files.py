"""Checkpoints on disk as named tensors that are read piece by piece, and big_vision's `.npz` in both directions.

Nothing here ever holds a whole checkpoint: a tensor comes as a sequence of blocks (a layer, or some rows), and `assemble` puts
each block into the shards it belongs to.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from pg_ground.types import UserError

BLOCK_BYTES = 64 * 2**20
"""Tensors that are no stack of layers are read so much at a time."""

Where = tuple[int | slice, ...]
"""An index of a tensor's leading axes."""

FLOATS = ("float32", "bfloat16", "float16", "float64")


class Stored(NamedTuple):
    """A tensor that is read when asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[tuple[Where, np.ndarray]]]
    """Yields `(where, block)` in C order; `tensor[where] = block` for all of them makes the tensor."""


def stack_axes(name: str) -> int:
    """Returns how many leading axes of the named parameter count layers and parts (keys and values, gate and value)."""
    if "/layers/" not in name and "/encoderblock/" not in name:
        return 0
    return 2 if name.endswith(("kv_einsum/w", "mlp/gating_einsum")) else 1


def wheres(
    name: str, shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[Where, tuple[int, ...]]]:
    """Yields index and shape of each block of a tensor: one layer (or part of one), or as many rows as `BLOCK_BYTES` holds."""
    stacked = stack_axes(name)
    if stacked or not shape:
        yield from ((index, shape[stacked:]) for index in np.ndindex(*shape[:stacked]))
        return
    rows = max(1, BLOCK_BYTES // max(1, int(np.prod(shape[1:])) * itemsize))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield (slice(start, stop),), (stop - start, *shape[1:])


def in_memory(name: str, array: Any) -> Stored:
    """Returns an array (of numpy or on devices) as a tensor to write."""

    def blocks() -> Iterator[tuple[Where, np.ndarray]]:
        for where, _ in wheres(name, array.shape, array.dtype.itemsize):
            yield where, np.asarray(array[where])

    return Stored(tuple(array.shape), np.dtype(array.dtype), blocks)


def whole(tensor: Stored) -> np.ndarray:
    """Returns all of a tensor."""
    out = np.empty(tensor.shape, tensor.dtype)
    for where, block in tensor.blocks():
        out[where] = block
    return out


def assemble(
    tensors: Mapping[str, Stored], like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns the arrays of `tensors` with the dtype and the sharding that `like` has for each; one tensor at a time."""
    return {name: _array(tensors[name], wanted) for name, wanted in like.items()}


def _array(tensor: Stored, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a tensor as an array: the shards of this process are filled block by block, then handed over one by one."""
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    indices: Mapping[jax.Device, Any] = sharding.addressable_devices_indices_map(tensor.shape)
    keys = {
        device: tuple(
            part.indices(size)[:2] for part, size in zip(index, tensor.shape, strict=True)
        )
        for device, index in indices.items()
    }
    shards = {
        key: np.empty([stop - start for start, stop in key], like.dtype) for key in keys.values()
    }
    for where, block in tensor.blocks():
        for key, shard in shards.items():
            _deposit(shard, key, where, block)
    arrays = []
    left = list(keys.values())
    for device, key in keys.items():
        left.remove(key)
        shard = shards[key] if key in left else shards.pop(key)
        arrays.append(jax.block_until_ready(jax.device_put(shard, device)))
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, arrays)


def _deposit(
    shard: np.ndarray, region: tuple[tuple[int, int], ...], where: Where, block: np.ndarray
) -> None:
    """Copies the part of `tensor[where] = block` that lies in the region of `shard`."""
    into: list[int | slice] = []
    taken: list[slice] = []
    for axis, (start, stop) in enumerate(region):
        index = where[axis] if axis < len(where) else slice(0, stop)
        if isinstance(index, slice):
            first, last = max(start, index.start), min(stop, index.stop)
            into.append(slice(first - start, last - start))
            taken.append(slice(first - index.start, last - index.start))
            empty = first >= last
        else:
            into.append(index - start)
            empty = not start <= index < stop
        if empty:
            return
    shard[tuple(into)] = block[tuple(taken)]


def open_npz(path: str | Path) -> dict[str, Stored]:
    """Returns the tensors of a big_vision `.npz` by name, without the `params/` prefix; bfloat16 is stored as 2-byte void.

    Raises:
      UserError: no such file, or one that is cut short, is no `.npz`, or holds something else than numbers. Reading a block
        raises it too, for a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            heads = {member: _head(archive, member) for member in archive.namelist()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a big_vision .npz checkpoint is wanted") from None
    # NotImplementedError: zipfile's word for a compression that it does not know
    except (
        ValueError,
        OSError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path} cannot be read as a big_vision .npz checkpoint: {error}") from None
    tensors = {}
    for member, (shape, fortran, dtype) in heads.items():
        name = member.removesuffix(".npy").removeprefix("params/")
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
        if kind.name not in FLOATS:
            raise UserError(
                f"{path} is no big_vision .npz checkpoint: {name} in it has dtype {dtype}, not one of {', '.join(FLOATS)}"
            )
        tensors[name] = Stored(shape, kind, _npz_blocks(path, member, name, shape, kind, fortran))
    return tensors


def _head(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, order (True for Fortran's) and dtype of an array, leaving its data unread."""
    with archive.open(member) as stream:
        return _read_head(stream)


def _read_head(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(stream)


def _npz_blocks(
    path: str | Path, member: str, name: str, shape: tuple[int, ...], dtype: np.dtype, fortran: bool
) -> Callable[[], Iterator[tuple[Where, np.ndarray]]]:
    def blocks() -> Iterator[tuple[Where, np.ndarray]]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                _read_head(stream)
                if fortran:
                    array = np.frombuffer(stream.read(), dtype).reshape(shape[::-1]).T
                    yield from in_memory(name, array).blocks()
                    return
                for where, size in wheres(name, shape, dtype.itemsize):
                    data = stream.read(int(np.prod(size)) * dtype.itemsize)
                    yield where, np.frombuffer(data, dtype).reshape(size)
                stream.read(1)  # at the end of a member the checksum is compared
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: {name} of shape {shape} cannot be read: {error}") from None

    return blocks


def save_npz(path: Path, tensors: Mapping[str, Stored], dtype: str) -> None:
    """Writes a big_vision `.npz`, names under `params/`, block by block; `dtype` "" keeps each tensor's own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, tensor in tensors.items():
            kind = np.dtype(dtype or tensor.dtype)
            head = {
                "descr": np.lib.format.dtype_to_descr(_void(kind)),
                "fortran_order": False,
                "shape": tensor.shape,
            }
            with archive.open(f"params/{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, head)
                for _, block in tensor.blocks():
                    stream.write(
                        np.ascontiguousarray(block.astype(kind, copy=False)).view(_void(kind)).data
                    )


def _void(dtype: np.dtype) -> np.dtype:
    """Returns the dtype a file calls this one: numpy knows no bfloat16."""
    return np.dtype("V2") if dtype == ml_dtypes.bfloat16 else dtype
