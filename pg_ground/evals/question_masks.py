"""Reads the mask and the number of points of each question in a file of predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

from pg_ground.data import run_lengths
from pg_ground.data.masks import whole_masks
from pg_ground.data.records import BadRecord
from pg_ground.readers import parsers
from pg_ground.readers.locations import load_value
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError


def question_masks(
    columns: Mapping[str, Sequence[Any]], sizes: Sequence[list[float] | None], path: FilePath
) -> tuple[list[JsonDict], list[list[float] | None]]:
    """Returns the ground truth of each row, `masks` and maybe `count`, and the sizes of the images.

    A mask is run lengths, polygons, or the name of an image file beside the file of predictions.
    The size of an image that is not stated is the size of its mask.

    Args:
      columns: the values of all rows, by name.
      sizes: width and height of each image, or None.
      path: the file of predictions.

    Raises:
      UserError: a mask cannot be read.
    """
    gold: list[JsonDict] = []
    image_sizes: list[list[float] | None] = []
    for index, (value, size) in enumerate(zip(columns["gold"], sizes, strict=True)):
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            value = load_value(value)  # a CSV holds run lengths as text
        frame = (int(size[0]), int(size[1])) if size else (0, 0)
        try:
            if value is None:
                raise BadRecord("bad_mask", "there is no mask")
            if isinstance(value, list) and not size:
                raise BadRecord("bad_mask", "polygons need the size of the image, width and height")
            mask = whole_masks(value, 1, frame, path.parent)[0]
        except BadRecord as bad:
            raise UserError(
                f"--predictions={path}: the mask of row {index} cannot be read: {bad}"
            ) from None
        count = (
            parsers.number(columns["count"][index], strict=False) if "count" in columns else None
        )
        gold.append(
            {"masks": [run_lengths.encode(mask)]} | ({} if count is None else {"count": count})
        )
        height, width = mask.shape
        image_sizes.append(size or [float(width), float(height)])
    return gold, image_sizes
