"""Formats of boxes and points: the order of their numbers, and the unit of their coordinates.

A format is `ORDER_UNIT`. `xywh_px` is left, top, width and height in pixels. `yx_bin` is y
before x in loc bins 0..1023.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from pg_ground.boxes import corners
from pg_ground.types import UserError, nearest
from pg_ground.vocab import LOC_MAX

BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh")
POINT_ORDERS = ("xy", "yx")

UNITS: dict[str, float | None] = {
    "px": None,
    "frac": 1.0,
    "percent": 100.0,
    "permille": 1000.0,
    "bin": float(LOC_MAX),
}
"""The coordinate of the right or lower edge of an image, by unit.

For pixels this is None: the edge is the image's width or height. Qwen-VL and InternVL write
thousandths (permille).
"""


def format_names(orders: Iterable[str], units: Collection[str] = UNITS.keys()) -> list[str]:
    """Returns the names of all formats with these orders and units."""
    return [f"{order}_{unit}" for order in orders for unit in units]


def check_format(value: str, setting: str, formats: Collection[str]) -> None:
    """Raises UserError, which names `setting`, if `value` is not one of `formats`."""
    if value not in formats:
        raise UserError(f"{setting}={value} does not exist: {nearest(value, formats)}")


XYXY_TO_YXYX = np.array([1, 0, 3, 2])


def split_format(name: str) -> tuple[str, str]:
    """Returns the order and the unit of a format."""
    order, _, unit = name.rpartition("_")
    return order, unit


def image_extent(unit: str, size: Sequence[float | int]) -> tuple[float | int, float | int]:
    """Returns the width and height of an image in `unit`. `size` is (width, height) in pixels."""
    extent = UNITS[unit]
    return (size[0], size[1]) if extent is None else (extent, extent)


def to_pixels(
    numbers: Sequence[float | int], format_name: str, size: Sequence[float | int]
) -> list[float]:
    """Returns one box as x1, y1, x2, y2, or one point as x, y, in pixels.

    Args:
      numbers: the box or point in the format.
      format_name: `ORDER_UNIT`.
      size: width and height of the image in pixels.
    """
    order, unit = split_format(format_name)
    width, height = image_extent(unit, size)
    x_scale, y_scale = size[0] / width, size[1] / height
    if order in POINT_ORDERS:
        x, y = numbers if order == "xy" else reversed(numbers)
        return [x * x_scale, y * y_scale]
    x1, y1, x2, y2 = corners(order, *numbers)
    return [x1 * x_scale, y1 * y_scale, x2 * x_scale, y2 * y_scale]


def to_fractions(
    rows: Float[np.ndarray, "K N"], format_name: str, size: tuple[int, int]
) -> Float[np.ndarray, "K N"]:
    """Returns boxes as `yxyx`, or points as `yx`, in fractions of the image. Nothing is clipped.

    Args:
      rows: boxes or points in the format.
      format_name: `ORDER_UNIT`.
      size: width and height of the image in pixels.
    """
    order, unit = split_format(format_name)
    width, height = image_extent(unit, size)
    if order in POINT_ORDERS:
        yx = rows if order == "yx" else rows[:, ::-1]
        return yx / np.array([height, width], np.float64)
    extents = np.array([height, width, height, width], np.float64)
    if order == "xyxy":
        return rows[:, XYXY_TO_YXYX] / extents  # as below, in less time
    x1, y1, x2, y2 = corners(order, *rows.T)
    return np.stack([y1, x1, y2, x2], 1) / extents


def _fits(fractions: Float[np.ndarray, " N"]) -> bool:
    """Returns whether `yxyx` has an area and lies in the image, or whether `yx` lies in it."""
    is_inside = bool((fractions >= 0).all() and (fractions <= 1.01).all())
    if len(fractions) == 2:
        return is_inside
    height, width = fractions[2:] - fractions[:2]
    return bool(is_inside and height > 0 and width > 0 and height * width > 1e-4)


def fitting_formats(
    numbers: Float[np.ndarray, " N"], format_name: str, size: tuple[int, int]
) -> list[str]:
    """Returns other formats in which a box (N is 4) has an area, or a point, and lies in the image.

    Formats with the same unit are returned if there are any, else formats with the same order.
    """
    order, unit = split_format(format_name)
    formats = [
        name
        for name in format_names(BOX_ORDERS if len(numbers) == 4 else POINT_ORDERS)
        if name != format_name and _fits(to_fractions(numbers[None], name, size)[0])
    ]
    return (
        [name for name in formats if split_format(name)[1] == unit]
        or [name for name in formats if split_format(name)[0] == order]
        or formats
    )
