"""Stored tensors that are changed while they are read: new vocabulary rows, another resolution,
int8.
"""

import logging
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import ndimage

from pg_ground.checkpoints import tensor_files
from pg_ground.checkpoints.model_sizes import POSITIONS, TABLE
from pg_ground.checkpoints.tensor_files import BlockIndex, StoredTensor
from pg_ground.checkpoints.vocabulary_rows import GEMMA_ROWS, GEMMA_TABLE_ROWS
from pg_ground.config import Model
from pg_ground.models import quantization
from pg_ground.params import SCALE, AbstractParams
from pg_ground.storage.paths import FilePath
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS

logger = logging.getLogger(__name__)


def with_loc_rows(
    path: FilePath, tensors: dict[str, StoredTensor], model: Model | None
) -> dict[str, StoredTensor]:
    """Returns `tensors` with embedding rows for the loc and seg tokens, if the table belongs to
    a plain Gemma.

    A plain Gemma table has 256,000 or 256,128 rows, or 1,152 rows fewer than the vocabulary of
    `model`. The new rows are normal with standard deviation 0.02, as in big_vision's `extend_rows`,
    and the same every time.
    """
    table = tensors.get(TABLE)
    new_rows = LOC_TOKENS + SEG_TOKENS
    if table is None:
        return tensors
    old_rows, width = table.shape
    if old_rows in GEMMA_TABLE_ROWS:
        base_rows = GEMMA_ROWS
    elif model is not None and old_rows == model.text.vocab_size - new_rows:
        base_rows = old_rows
    else:
        return tensors

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for index, block in table.blocks():
            part = index[0]
            assert isinstance(part, slice)
            if part.start < base_rows:
                stop = min(part.stop, base_rows)
                yield (slice(part.start, stop),), block[: stop - part.start]
        normal = np.random.default_rng(0).standard_normal((new_rows, width), np.float32)
        yield (slice(base_rows, base_rows + new_rows),), (0.02 * normal).astype(table.dtype)

    logger.warning(
        "%s: %d rows appended to the %d of %s, for loc and seg tokens",
        path, new_rows, base_rows, TABLE,
    )  # fmt: skip
    return tensors | {TABLE: table._replace(shape=(base_rows + new_rows, width), blocks=blocks)}


def resampled_positions(tensor: StoredTensor, model: Model) -> StoredTensor:
    """Returns position embeddings for the number of patches of `model`.

    Linear with aligned corners, as big_vision's `resample_posemb`.
    """
    table = tensor_files.read_whole(tensor).astype(np.float32)
    old_side = round(table.shape[1] ** 0.5)
    new_side = model.image_size // model.vision.patch_size
    zoom = (new_side / old_side, new_side / old_side, 1)
    grid = np.asarray(ndimage.zoom(table.reshape(old_side, old_side, -1), zoom, order=1))
    resampled = grid.reshape(1, new_side * new_side, -1).astype(tensor.dtype)
    return tensor_files.from_array(POSITIONS, resampled)


def quantized_tensors(
    tensors: Mapping[str, StoredTensor], abstract: AbstractParams
) -> dict[str, StoredTensor]:
    """Returns `tensors` with int8 values and scales for the matrices with scales in `abstract`."""
    adapted = dict(tensors)
    for name in abstract:
        if name + SCALE in abstract:
            adapted[name] = _quantized(name, tensors[name], "values")
            adapted[name + SCALE] = _quantized(name, tensors[name], "scale")
    return adapted


def _quantized(name: str, tensor: StoredTensor, part: str) -> StoredTensor:
    """Returns the int8 values or the scales of a matrix. Each layer is quantized when it is read.

    The matrix is read once for its values and once for its scales. This keeps one layer in memory.
    """
    values, scale = quantization.abstract_int8(name, tensor.shape)
    abstract = values if part == "values" else scale

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        if not tensor_files.stack_axes(name):
            # The blocks are rows, and a scale needs whole columns.
            matrix = quantization.quantize(name, tensor_files.read_whole(tensor))
            yield (slice(0, abstract.shape[0]),), np.asarray(getattr(matrix, part))
            return
        for index, block in tensor.blocks():
            yield index, np.asarray(getattr(quantization.quantize(name, block), part))

    return StoredTensor(abstract.shape, np.dtype(abstract.dtype), blocks)
