"""Signs that the coordinates of a source are in another unit, or in another order, than stated."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    UNITS,
    format_names,
    image_extent,
    split_format,
    to_fractions,
)
from pg_ground.types import UserError

CORNER = 0.3
"""The part of each axis, from 0, in which coordinates of a wrong unit lie.

Percent values that are read as pixels lie in it if the sides of the image have at least 334 pixels.
"""

FINER_EXTENT = {"px": 100, "bin": 100, "permille": 100, "percent": 1}
"""The extent of an image in the unit that is mistaken for this unit.

Percent is mistaken for pixels, bins and thousandths, and fractions for percent. No coordinate of a
source in the mistaken unit is above this number.
"""

FEW_OBJECTS = 8
"""Fewer objects say nothing about the unit: they may really be in one corner."""

FEW_IMAGES = 4

MANY_OBJECTS = 200
"""So many objects in pixels have coordinates of any size up to the side of the image."""

SLACK = 0.02
"""The part of a side by which careless annotators draw a box beyond the image."""

MOST = 1 / 3
"""The share of objects beyond the image that shows another unit if all objects fit that unit."""

BEYOND_SHARE = 0.1
"""The share of the objects that reach beyond the image if their numbers are in another order."""


class Coordinates(NamedTuple):
    """The boxes or the points of one record."""

    numbers: Float[np.ndarray, "K N"]
    """As the record has them."""
    format: str
    size: tuple[int, int] | None
    """Width and height of the image; None if the image was not opened."""
    stored: tuple[int, int] | None = None
    """Width and height before EXIF, if the coordinates may belong to that frame."""


def check_units(source: str, setting: str, records: Sequence[Coordinates]) -> str:
    """Returns a doubt about the unit of a source in words, or "".

    Args:
      source: its name, for the text.
      setting: "box_format" or "point_format", for the text.
      records: the coordinates of some records, those with an image among them.

    Raises:
      UserError: the unit or the order of the numbers is wrong.
    """
    records = [record for record in records if len(record.numbers)]
    if not records:
        return ""
    format_name = records[0].format
    records = [record for record in records if record.format == format_name]
    measured = [record for record in records if record.size is not None]
    before_exif = _before_exif(measured, format_name)
    if before_exif:
        raise UserError(f"source {source}: {before_exif}: set frame = 'stored'")
    fault = (
        _fractions(records, format_name)
        or _one_corner(measured, format_name)
        or _beyond(measured, format_name)
        or _top_number(records, measured, format_name)
    )
    if fault:
        units = ", ".join(UNITS)
        raise UserError(
            f"source {source}: {fault}, so {setting} = {format_name!r} has probably the wrong unit "
            f"or order (the units are {units})"
        )
    return _doubt(records, measured, setting, format_name)


def _fractions(records: Sequence[Coordinates], format_name: str) -> str:
    """Returns a fault if all numbers fit fractions, but another unit is stated."""
    unit = split_format(format_name)[1]
    numbers = np.concatenate([record.numbers for record in records])
    enough = len(numbers) >= (2 if numbers.shape[1] == 4 else 4)
    if unit == "frac" or not enough or np.abs(numbers).max() > 1:
        return ""
    return f"no coordinate of {len(numbers)} objects is above 1"


def _one_corner(records: Sequence[Coordinates], format_name: str) -> str:
    """Returns a fault if all coordinates are in one corner and fit a finer unit.

    Percent or fractions that are read as pixels lie in one corner, and so do fractions that are
    read as percent. Right coordinates cause this fault only if all objects of all these records are
    within 100 pixels (or 100 bins, or 1 percent) of the corner.
    """
    unit = split_format(format_name)[1]
    objects = sum(len(record.numbers) for record in records)
    if len(records) < FEW_IMAGES or objects < FEW_OBJECTS:
        return ""
    far_corners = [_far_corners(record) for record in records]
    share = np.median([corners.max() for corners in far_corners])
    largest = max(
        np.max(corners * np.array(image_extent(unit, record.size or (1, 1))[::-1]))
        for corners, record in zip(far_corners, records, strict=True)
    )
    if share >= CORNER or largest > 1.01 * FINER_EXTENT.get(unit, 0):
        return ""
    return (
        f"most objects are in the first {CORNER:.0%} of both axes and no coordinate is above "
        f"{largest:.3g}"
    )


def _far_corners(record: Coordinates) -> Float[np.ndarray, "K 2"]:
    """Returns y and x of the farthest corner of each object, in fractions."""
    fractions = to_fractions(record.numbers, record.format, record.size or (1, 1))
    return fractions[:, -2:]


def _beyond(records: Sequence[Coordinates], format_name: str) -> str:
    """Returns a fault if many objects reach beyond the image, and none does in another format."""
    words = _many_beyond(records, format_name)
    if not words:
        return ""
    order, unit = split_format(format_name)
    orders = BOX_ORDERS if order in BOX_ORDERS else POINT_ORDERS
    # A finer unit always fits, so it is evidence only if a large part of the objects is beyond.
    total = sum(len(record.numbers) for record in records)
    beyond = sum(_count_beyond(record, format_name) for record in records)
    others = [
        name
        for name in format_names(orders)
        if name != format_name
        and (split_format(name)[1] == unit or (beyond >= MOST * total and name.startswith(order)))
    ]
    fitting = [
        name for name in others if not any(_count_beyond(record, name) for record in records)
    ]
    if not fitting:
        return ""
    return f"{words}, none as {' or '.join(fitting[:2])}"


def _before_exif(records: Sequence[Coordinates], format_name: str) -> str:
    """Returns a fault if many objects reach beyond the image, and none does before EXIF."""
    words = _many_beyond(records, format_name)
    stored = [record._replace(size=record.stored or record.size) for record in records]
    if not words or any(_count_beyond(record, format_name) for record in stored):
        return ""
    return f"{words}, none in the frame before EXIF"


def _many_beyond(records: Sequence[Coordinates], format_name: str) -> str:
    """Returns in words how many objects reach beyond the image; "" if these are few."""
    total = sum(len(record.numbers) for record in records)
    beyond = sum(_count_beyond(record, format_name) for record in records)
    if total < FEW_OBJECTS or beyond < BEYOND_SHARE * total:
        return ""
    return f"{beyond} of {total} objects reach beyond the image as {format_name}"


def _count_beyond(record: Coordinates, format_name: str) -> int:
    """Returns the number of objects that reach beyond the image, or that have no area."""
    size = record.size or (1, 1)
    fractions = to_fractions(record.numbers, format_name, size)
    slack = SLACK + 2 / np.array([size[1], size[0]] * (fractions.shape[1] // 2))
    is_beyond = ((fractions < -slack) | (fractions > 1 + slack)).any(1)
    if fractions.shape[1] == 4:
        is_beyond |= (fractions[:, 2:] <= fractions[:, :2]).any(1)
    return int(is_beyond.sum())


def _sides(record: Coordinates) -> int:
    return min(record.size or (0, 0))


def _top_number(
    records: Sequence[Coordinates], measured: Sequence[Coordinates], format_name: str
) -> str:
    """Returns a fault if many objects in pixels end exactly at 100 or at 1000."""
    numbers = np.concatenate([record.numbers for record in records])
    if split_format(format_name)[1] != "px" or len(numbers) < MANY_OBJECTS or not measured:
        return ""
    largest = float(numbers.max())
    for extent in (100, 1000):
        wide = np.mean([_sides(record) >= 1.2 * extent for record in measured])
        if 0.97 * extent < largest <= extent and wide >= 0.9:
            return (
                f"no coordinate of {len(numbers)} objects is above {largest:g}, but the images are "
                f"larger"
            )
    return ""


def _doubt(
    records: Sequence[Coordinates], measured: Sequence[Coordinates], setting: str, format_name: str
) -> str:
    """Returns a doubt that is no fault: right coordinates can look like this too."""
    beyond = _many_beyond(measured, format_name)
    if beyond:
        return f"{beyond}: they are cut at its border, or left out as bad"
    order, unit = split_format(format_name)
    numbers = np.concatenate([record.numbers for record in records])
    largest = float(numbers.max())
    if len(numbers) < FEW_OBJECTS or largest > 1000:
        return ""
    wide = [max(record.size) for record in measured if record.size and max(record.size) > 1200]
    if unit == "px" and largest > 500 and measured and len(wide) * 2 >= len(measured):
        return (
            f"no coordinate is above 1000 and the images have up to {max(wide)} pixels: if these "
            f"are thousandths, set {setting} = '{order}_permille'"
        )
    if unit == "bin" and largest > 950 and len(numbers) >= 50:
        return (
            f"no loc bin is above {largest:g}: if these are thousandths, set {setting} = "
            f"'{order}_permille'"
        )
    return ""
