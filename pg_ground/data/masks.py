"""Masks of objects, as annotations give them: polygons, run lengths or images → cells of a square grid over the whole image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image
from pycocotools import mask as coco

from pg_ground.data import run_lengths
from pg_ground.data.images import load_image
from pg_ground.data.records import BadRecord
from pg_ground.types import FilePath


def to_masks(
    value: Any, count: int, size: tuple[int, int], cells: int, root: FilePath | None
) -> Bool[np.ndarray, "K M M"]:
    """Returns the masks of `count` objects: `cells` along each side of the whole image, True where half of a cell is covered.

    An object that covers half of no cell has all those that it touches. What `value`, `size` and `root` are says `whole_masks`.

    Raises:
      BadRecord: bad_mask.
    """
    pixels = whole_masks(value, count, size, root)
    return np.array([_cells(one, cells) for one in pixels], bool).reshape(count, cells, cells)


def whole_masks(
    value: Any, count: int, size: tuple[int, int], root: FilePath | None
) -> list[Bool[np.ndarray, "H W"]]:
    """Returns the masks of `count` objects in pixels of the annotation, each covering some.

    `value` is a mask or a list of them, each one of COCO's polygons [x1, y1, x2, y2, …] in pixels or a list of such, filled as by
    COCO's own tools; COCO's run lengths {counts, size}, compressed or not; or what `open_image` takes, where everything but black
    is the object. For one object, a list of polygons is its own.

    Args:
      size: width and height of the image in pixels.
      root: folder that names of image files are relative to.

    Raises:
      BadRecord: bad_mask.
    """
    each = value if _is_one_for_each(value, count) else [value]
    if len(each) != count:
        raise BadRecord("bad_mask", f"{len(each)} masks for {count} objects")
    masks = [_pixels(one, size, root) for one in each]
    if not all(one.any() for one in masks):
        raise BadRecord("bad_mask", "the mask covers nothing of the image")
    return masks


def _is_one_for_each(value: Any, count: int) -> bool:
    if not isinstance(value, list) or _is_polygon(value):
        return False
    return count != 1 or not value or not all(map(_is_polygon, value))


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and not any(isinstance(x, list | Mapping | bytes | str) for x in value)
    )


def _cells(pixels: Bool[np.ndarray, "H W"], cells: int) -> Bool[np.ndarray, "M M"]:
    covered = np.asarray(
        Image.fromarray(pixels.astype(np.float32)).resize((cells, cells), Image.Resampling.BOX)
    )
    return covered >= 0.5 if (covered >= 0.5).any() else covered > 0


def _pixels(value: Any, size: tuple[int, int], root: FilePath | None) -> Bool[np.ndarray, "H W"]:
    if isinstance(value, list):
        return _filled([value] if _is_polygon(value) else value, size)
    if isinstance(value, Mapping) and "counts" in value:
        return run_lengths.decode(value)
    try:
        return np.asarray(load_image(value, root).any(axis=-1))
    except BadRecord as bad:
        raise BadRecord("bad_mask", f"the mask is no image: {bad}") from None


def _filled(polygons: Sequence[Any], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns the pixels that COCO's own tools fill: Pillow draws the outlines too, 4 % of the usual object."""
    rings = []
    for polygon in polygons:
        try:
            corners = np.array(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError):
            corners = np.zeros((0, 2))
        if len(corners) < 3 or not np.isfinite(corners).all():
            raise BadRecord(
                "bad_mask",
                f"{polygon!r:.60} is no polygon [x1, y1, x2, y2, …] of three corners or more",
            )
        rings.append(np.clip(corners, 0, size).ravel().tolist())
    width, height = size
    return (
        run_lengths.decode(coco.merge(coco.frPyObjects(rings, height, width)))
        if rings
        else np.zeros((height, width), bool)
    )
