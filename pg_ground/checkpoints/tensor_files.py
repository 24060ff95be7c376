"""Checkpoints on disk as named tensors that are read block by block, and big_vision's `.npz` format
in both directions.

A whole checkpoint is never in host memory. A tensor is a sequence of blocks (one layer, or some
rows), and `read_sharded` copies each block into the shards that it belongs to.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from pg_ground.params import AbstractParams
from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError

BLOCK_BYTES = 64 * 2**20
"""Bytes of a tensor that are read at a time, if the tensor is not a stack of layers."""

BlockIndex = tuple[int | slice, ...]
"""An index into the leading axes of a tensor."""

FLOATS = ("float32", "bfloat16", "float16", "float64")


class StoredTensor(NamedTuple):
    """A tensor on disk (or in memory) whose values are read later."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[tuple[BlockIndex, np.ndarray]]]
    """Yields `(index, block)` in C order. `tensor[index] = block` for all blocks fills the tensor.
    """


def stack_axes(name: str) -> int:
    """Returns how many leading axes of a parameter count layers and parts (keys and values, or gate
    and value).
    """
    if "/layers/" not in name and "/encoderblock/" not in name:
        return 0
    return 2 if name.endswith(("kv_einsum/w", "mlp/gating_einsum")) else 1


def block_indices(
    name: str, shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[BlockIndex, tuple[int, ...]]]:
    """Yields the index and the shape of each block of a tensor.

    A block is one layer (or one part of a layer). A tensor without layers has blocks of rows of at
    most `BLOCK_BYTES`.
    """
    stacked = stack_axes(name)
    if stacked or not shape:
        yield from ((index, shape[stacked:]) for index in np.ndindex(*shape[:stacked]))
        return
    row_bytes = int(np.prod(shape[1:])) * itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield (slice(start, stop),), (stop - start, *shape[1:])


def from_array(name: str, array: Any) -> StoredTensor:
    """Returns an array (of numpy or on devices) as a tensor that can be written."""

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for index, _ in block_indices(name, array.shape, array.dtype.itemsize):
            yield index, np.asarray(array[index])

    return StoredTensor(tuple(array.shape), np.dtype(array.dtype), blocks)


def read_whole(tensor: StoredTensor) -> np.ndarray:
    """Returns all values of a tensor."""
    array = np.empty(tensor.shape, tensor.dtype)
    for index, block in tensor.blocks():
        array[index] = block
    return array


def read_sharded(
    tensors: Mapping[str, StoredTensor], abstract: AbstractParams
) -> dict[str, jax.Array]:
    """Returns the tensors that `abstract` names as arrays with its dtypes and shardings.

    Reads one tensor after the other.
    """
    return {name: _sharded_array(tensors[name], leaf) for name, leaf in abstract.items()}


def _sharded_array(tensor: StoredTensor, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a tensor as a sharded array.

    The shards of this process are filled on the host, block by block. Then they are copied to their
    devices, one by one.
    """
    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    indices: Mapping[jax.Device, Any] = sharding.addressable_devices_indices_map(tensor.shape)
    regions = {
        device: tuple(
            part.indices(size)[:2] for part, size in zip(index, tensor.shape, strict=True)
        )
        for device, index in indices.items()
    }
    shards = {
        region: np.empty([stop - start for start, stop in region], abstract.dtype)
        for region in regions.values()
    }
    for index, block in tensor.blocks():
        for region, shard in shards.items():
            _copy_block(shard, region, index, block)
    arrays = []
    remaining = list(regions.values())
    for device, region in regions.items():
        remaining.remove(region)
        # The last device that needs a shard takes it out of host memory.
        shard = shards[region] if region in remaining else shards.pop(region)
        arrays.append(jax.block_until_ready(jax.device_put(shard, device)))
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, arrays)


def _copy_block(
    shard: np.ndarray, region: tuple[tuple[int, int], ...], index: BlockIndex, block: np.ndarray
) -> None:
    """Copies the part of `tensor[index] = block` that lies in the region of `shard`."""
    target: list[int | slice] = []
    source: list[slice] = []
    for axis, (start, stop) in enumerate(region):
        part = index[axis] if axis < len(index) else slice(0, stop)
        if isinstance(part, slice):
            first = max(start, part.start)
            last = min(stop, part.stop)
            target.append(slice(first - start, last - start))
            source.append(slice(first - part.start, last - part.start))
            is_empty = first >= last
        else:
            target.append(part - start)
            is_empty = not start <= part < stop
        if is_empty:
            return
    shard[tuple(target)] = block[tuple(source)]


def open_npz(path: FilePath) -> dict[str, StoredTensor]:
    """Returns the tensors of a big_vision `.npz` by name, without the prefix `params/`.

    big_vision stores bfloat16 as a 2-byte void dtype.

    Raises:
      UserError: the file does not exist, is cut short, is not an `.npz`, or holds a dtype that is
        not a float. A damaged block raises UserError when it is read.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            headers = {
                member: _read_member_header(archive, member) for member in archive.namelist()
            }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a big_vision .npz checkpoint") from None
    # zipfile raises NotImplementedError for a compression that it does not support
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
    for member, header in headers.items():
        name = member.removesuffix(".npy").removeprefix("params/")
        if header.dtype.name not in FLOATS:
            raise UserError(
                f"{path} is not a big_vision .npz checkpoint: "
                f"{name} in it has dtype {header.dtype}, not one of {', '.join(FLOATS)}"
            )
        blocks = _npz_blocks(path, member, name, header)
        tensors[name] = StoredTensor(header.shape, header.dtype, blocks)
    return tensors


class _Header(NamedTuple):
    """The header of one array in an `.npz`."""

    shape: tuple[int, ...]
    is_fortran: bool
    """The values are in Fortran order, not in C order."""
    dtype: np.dtype


def _read_member_header(archive: zipfile.ZipFile, member: str) -> _Header:
    with archive.open(member) as stream:
        return _read_header(stream)


def _read_header(stream: Any) -> _Header:
    version = np.lib.format.read_magic(stream)
    is_version_1 = version == (1, 0)
    shape, is_fortran, dtype = (
        np.lib.format.read_array_header_1_0(stream)
        if is_version_1
        else np.lib.format.read_array_header_2_0(stream)
    )
    is_bfloat16 = dtype == np.dtype("V2")
    return _Header(shape, is_fortran, np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else dtype)


def _npz_blocks(
    path: FilePath, member: str, name: str, header: _Header
) -> Callable[[], Iterator[tuple[BlockIndex, np.ndarray]]]:
    """Returns the function that reads an array of an `.npz` block by block."""
    shape, is_fortran, dtype = header

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        try:
            with (
                path.open("rb") as file,
                zipfile.ZipFile(file) as archive,
                archive.open(member) as stream,
            ):
                _read_header(stream)
                if is_fortran:
                    array = np.frombuffer(stream.read(), dtype).reshape(shape[::-1]).T
                    yield from from_array(name, array).blocks()
                    return
                for index, size in block_indices(name, shape, dtype.itemsize):
                    content = stream.read(int(np.prod(size)) * dtype.itemsize)
                    yield index, np.frombuffer(content, dtype).reshape(size)
                stream.read(1)  # zipfile compares the checksum at the end of a member
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: {name} of shape {shape} cannot be read: {error}") from None

    return blocks


def save_npz(path: Path, tensors: Mapping[str, StoredTensor], dtype: str) -> None:
    """Writes a big_vision `.npz` block by block, with names under `params/`.

    With `dtype` "" each tensor keeps its dtype.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, tensor in tensors.items():
            target_dtype = np.dtype(dtype or tensor.dtype)
            file_dtype = _npz_dtype(target_dtype)
            header = {
                "descr": np.lib.format.dtype_to_descr(file_dtype),
                "fortran_order": False,
                "shape": tensor.shape,
            }
            with archive.open(f"params/{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for _, block in tensor.blocks():
                    values = np.ascontiguousarray(block.astype(target_dtype, copy=False))
                    stream.write(values.view(file_dtype).data)


def _npz_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in the file.

    numpy files cannot name bfloat16, so big_vision writes a 2-byte void.
    """
    return np.dtype("V2") if dtype == ml_dtypes.bfloat16 else dtype
