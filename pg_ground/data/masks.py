"""Masks of objects: from polygons, run lengths or images to a square grid over the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from pycocotools import mask as coco

from pg_ground.data import run_lengths
from pg_ground.data.frames import turn_mask
from pg_ground.data.images import load_nonzero
from pg_ground.data.records import BadRecord
from pg_ground.storage.paths import FilePath


def to_masks(
    value: object,
    count: int,
    size: tuple[int, int],
    cells: int,
    root: FilePath | None,
    orientation: int = 1,
) -> Bool[np.ndarray, "K M M"]:
    """Returns the masks of `count` objects as `cells` x `cells` grids over the whole image.

    A cell is True if the object covers half of it. If the object covers half of no cell, all cells
    that it touches are True. `whole_masks` describes the other arguments.

    Raises:
      BadRecord: bad_mask.
    """
    masks = whole_masks(value, count, size, root, orientation)
    return np.array([_to_cells(mask, cells) for mask in masks], bool).reshape(count, cells, cells)


def whole_masks(
    value: Any,
    count: int,
    size: tuple[int, int],
    root: FilePath | None,
    orientation: int = 1,
) -> list[Bool[np.ndarray, "H W"]]:
    """Returns the masks of `count` objects in pixels of the annotation. No mask is empty.

    Args:
      value: one mask, or a list with a mask for each object. A mask has one of three forms. The
        first is a COCO polygon [x1, y1, x2, y2, …] in pixels, or a list of polygons; COCO's own
        tools fill them in the same way. The second is COCO's run lengths {counts, size},
        compressed or not. The third is an image, as `open_image` takes it, in which every pixel
        that is not black belongs to the object. With `count` 1, a list of polygons is the mask of
        the one object.
      count: number of objects.
      size: width and height in pixels of the frame of the annotation.
      root: the folder that names of image files are relative to.
      orientation: the EXIF orientation of the frame. A mask that has its size is turned upright.

    Raises:
      BadRecord: bad_mask.
    """
    values = value if _has_one_mask_per_object(value, count) else [value]
    if len(values) != count:
        raise BadRecord("bad_mask", f"{len(values)} masks for {count} objects")
    masks = [_to_pixels(item, size, root) for item in values]
    if not all(mask.any() for mask in masks):
        raise BadRecord("bad_mask", "the mask covers no pixel of the image")
    return [
        turn_mask(mask, orientation) if mask.shape == (size[1], size[0]) else mask for mask in masks
    ]


def _has_one_mask_per_object(value: object, count: int) -> bool:
    if not isinstance(value, list) or _is_polygon(value):
        return False
    return count != 1 or not value or not all(map(_is_polygon, value))


def _is_polygon(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return not any(isinstance(item, list | Mapping | bytes | str) for item in value)


def _to_cells(mask: Bool[np.ndarray, "H W"], cells: int) -> Bool[np.ndarray, "M M"]:
    image = Image.fromarray(mask.astype(np.float32))
    coverage = np.asarray(image.resize((cells, cells), Image.Resampling.BOX))
    is_half_covered = coverage >= 0.5
    return is_half_covered if is_half_covered.any() else coverage > 0


def _to_pixels(
    value: object, size: tuple[int, int], root: FilePath | None
) -> Bool[np.ndarray, "H W"]:
    if isinstance(value, list):
        return _fill_polygons([value] if _is_polygon(value) else value, size)
    if isinstance(value, Mapping) and "counts" in value:
        return run_lengths.decode(value)
    try:
        return load_nonzero(value, root)
    except BadRecord as bad:
        raise BadRecord("bad_mask", f"the mask is no image: {bad}") from None


def _fill_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns the pixels inside the polygons, as COCO's own tools fill them.

    Pillow would draw the outlines too, which adds 4 % to the usual object.
    """
    rings = []
    for polygon in polygons:
        try:
            corners = np.array(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            corners = np.zeros((0, 2))
        if len(corners) < 3 or not np.isfinite(corners).all():
            raise BadRecord(
                "bad_mask",
                f"{polygon!r:.60} is no polygon [x1, y1, x2, y2, …] of at least three corners",
            )
        rings.append(np.clip(corners, 0, size).ravel().tolist())
    width, height = size
    if not rings:
        return np.zeros((height, width), bool)
    return run_lengths.decode(coco.merge(coco.frPyObjects(rings, height, width)))
