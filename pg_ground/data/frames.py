"""The frame of a record's coordinates: the size of its image, and how the pixels are turned.

A record can state the size of the image that was annotated. The file can have another size, because
it is a resized copy. A phone stores an image lying on its side, with a tag (EXIF) that says how to
turn it. Some tools annotate the stored pixels, and other tools the upright image.
"""

import decimal
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from pg_ground.config import Source
from pg_ground.data.images import Opened
from pg_ground.data.record_fields import field_or_none, paths_of
from pg_ground.data.records import BadRecord, short
from pg_ground.types import Record, UserError

SIZE_FIELDS = (
    ("width", "height"),
    ("image_width", "image_height"),
    ("imageWidth", "imageHeight"),
    ("img_width", "img_height"),
    ("imgWidth", "imgHeight"),
    ("image_w", "image_h"),
    ("img_w", "img_h"),
)
"""Fields that state the size of an image, if the source does not name others.

`w` and `h` may be sides of a box. `original_width` may be the size before someone made the images
and the boxes smaller.
"""

SIZE_PARENTS = ("image", "size", "image_size", "image_info", "img_info", "meta", "metadata")
"""Fields whose object may have the `SIZE_FIELDS`, if the record itself has none."""

RATIO_TOLERANCE = 0.02
"""A copy's side may differ by one pixel from the exact ratio, and by this share of the side."""

NUMBERS = (int, float, str, decimal.Decimal, np.number)
"""The types of a side. A text is a side if it is a number."""

FrameKey = tuple[tuple[int, int], int]
"""The size of a frame, and its EXIF orientation."""

UPRIGHT: int = 1
"""The EXIF orientation of an image that needs no turn."""

EXCHANGED: int = 5
"""EXIF orientations from here on exchange width and height."""

COPY = "another size than the file"

BEFORE = "the frame before EXIF"
AFTER = "the frame after EXIF, as the size says"
UNDECIDED = (
    "the frame after EXIF, but no size says so: frame = 'stored' reads the frame before EXIF"
)
"""Notes about an image that EXIF turns, if the frame is not stated."""

REMEDY = "frame = 'stored' reads all before EXIF"


class Frame(NamedTuple):
    """The image that a record's coordinates belong to."""

    size: tuple[int, int]
    """Width and height in pixels."""
    orientation: int
    """The EXIF orientation that turns the frame upright; 1 if it is upright."""
    note: str
    """"" if the file has this size, else what was concluded, in words."""


def recorded_size(record: Record, source: Source, element: int = 0) -> tuple[int, int] | None:
    """Returns the width and height that a record states for its image; None if it states none.

    Raises:
      BadRecord: wrong_size, if `source.size` names fields that hold no size.
    """
    if not source.size:
        return None
    if source.size != "auto":
        return _named_size(record, source.size, element)
    own, parents = _size_fields(source.boxes, source.points)
    size = _size_of(record, own)
    for parent in parents:
        if size is None and isinstance(fields := record.get(parent), Mapping):
            size = _size_of(fields, SIZE_FIELDS)
    return size


def _size_of(record: Record, names: Sequence[tuple[str, str]]) -> tuple[int, int] | None:
    """Returns the first size that the fields of a record state; None if they state none."""
    for fields in names:
        if fields[0] in record:
            sides = [_to_side(record.get(field)) for field in fields]
            if all(sides):
                return sides[0], sides[1]
    return None


@functools.lru_cache(maxsize=64)
def _size_fields(boxes: str, points: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the `SIZE_FIELDS` and the `SIZE_PARENTS` that hold no coordinates of a source."""
    coordinates = {*paths_of(boxes), *paths_of(points)}
    roots = {re.split(r"[.\[]", path)[0] for path in coordinates}
    return (
        [fields for fields in SIZE_FIELDS if coordinates.isdisjoint(fields)],
        [parent for parent in SIZE_PARENTS if parent not in roots],
    )


def _named_size(record: Record, text: str, element: int) -> tuple[int, int] | None:
    values = [field_or_none(record, path, element) for path in paths_of(text)]
    if len(values) == 1 and isinstance(values[0], list | tuple | np.ndarray):
        values = list(values[0])
    if all(value is None for value in values):
        return None
    sides = [_to_side(value) for value in values]
    if len(sides) != 2 or not all(sides):
        raise BadRecord("wrong_size", f"{text} is {short(values)}, not a width and a height")
    return sides[0], sides[1]


def _to_side(value: object) -> int:
    """Returns a side in pixels; 0 if the value is no whole number above 0. A number can be text."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        return 0
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return 0
    return int(number) if 0 < number < 1e9 and number == int(number) else 0


def find_frame(recorded: tuple[int, int] | None, opened: Opened, frame: str) -> Frame:
    """Returns the frame of a record's coordinates.

    Args:
      recorded: the size that the record states.
      opened: the image.
      frame: the setting: "upright", "stored", or "auto". "auto" takes the frame that the recorded
        size fits, and the upright frame if both fit or there is no size; a note says so.

    Raises:
      BadRecord: wrong_size, if the recorded size is no size of this image or of a resized copy.
    """
    image = opened.image
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    upright: FrameKey = (size, UPRIGHT)
    stored: FrameKey = (opened.stored, opened.orientation)
    candidates = [stored] if frame == "stored" else [upright]
    if frame == "auto" and opened.orientation != UPRIGHT:
        candidates.append(stored)
    note = UNDECIDED if len(candidates) > 1 else ""
    if recorded is None:
        return Frame(*candidates[0], note)
    exact = [candidate for candidate in candidates if candidate[0] == recorded]
    fitting = exact or [candidate for candidate in candidates if _is_copy(recorded, candidate[0])]
    if fitting:
        orientation = fitting[0][1]
        if len(fitting) < len(candidates):
            note = AFTER if orientation == UPRIGHT else BEFORE
        notes = filter(None, ("" if exact else COPY, note))
        return Frame(recorded, orientation, "; ".join(notes))
    states = f"the record says {size_text(recorded)}, but the image has {size_text(size)} pixels"
    turned = f" ({size_text(opened.stored)} before EXIF)" if opened.stored != size else ""
    raise BadRecord("wrong_size", f"{states}{turned}: set size or frame of the source")


def check_frames(source: str, notes: Mapping[str, int]) -> list[str]:
    """Returns a doubt about the frames of a source's records in words, or nothing.

    Args:
      source: its name, for the text.
      notes: the notes of the examples → their numbers.

    Raises:
      UserError: the sizes of some records say that they are before EXIF. No size says that a record
        is after EXIF. Other records would be read so without a reason.
    """
    before, after, undecided = (
        sum(count for note, count in notes.items() if ending in note.split("; "))
        for ending in (BEFORE, AFTER, UNDECIDED)
    )
    if not before or not undecided:
        return []
    text = (
        f"the boxes of {before} images are before EXIF, as the size says, and no size says it of "
        f"{undecided} others"
    )
    if not after:
        raise UserError(f"source {source}: {text}: {REMEDY}")
    return [f"{text}, which are read after EXIF, as {after} are: {REMEDY}"]


def _is_copy(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Returns whether two sizes have the same ratio of the sides, up to rounding."""
    return any(
        abs(first[i] * second[1 - i] / first[1 - i] - second[i])
        <= min(1.0, RATIO_TOLERANCE * second[i])
        for i in (0, 1)
    )


def size_text(size: tuple[int, int]) -> str:
    """Returns `WIDTHxHEIGHT`."""
    return f"{size[0]}x{size[1]}"


Turn = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

_TURNS: dict[int, Turn] = {
    2: lambda y, x: (y, 1 - x),
    3: lambda y, x: (1 - y, 1 - x),
    4: lambda y, x: (1 - y, x),
    5: lambda y, x: (x, y),
    6: lambda y, x: (x, 1 - y),
    7: lambda y, x: (1 - x, 1 - y),
    8: lambda y, x: (1 - x, y),
}
"""EXIF orientation → where a point of the stored frame is in the upright frame, in fractions."""


def turn_points(yx: Float[np.ndarray, "K 2"], orientation: int) -> Float[np.ndarray, "K 2"]:
    """Returns points of the stored frame in the upright frame. Both are fractions."""
    if orientation == UPRIGHT:
        return yx
    return np.stack(_TURNS[orientation](yx[:, 0], yx[:, 1]), 1).astype(yx.dtype)


def turn_boxes(yxyx: Float[np.ndarray, "K 4"], orientation: int) -> Float[np.ndarray, "K 4"]:
    """Returns boxes of the stored frame in the upright frame. Both are fractions."""
    if orientation == UPRIGHT:
        return yxyx
    first = turn_points(yxyx[:, :2], orientation)
    second = turn_points(yxyx[:, 2:], orientation)
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], 1)


def turn_mask(mask: Bool[np.ndarray, "H W"], orientation: int) -> Bool[np.ndarray, "h w"]:
    """Returns a mask of the stored frame in the upright frame."""
    if orientation == UPRIGHT:
        return mask
    if orientation >= EXCHANGED:
        mask = mask.T
    # After the exchange of the axes: 2, 6 and 3, 7 flip x; 4, 8 and 3, 7 flip y.
    if orientation in (3, 4, 7, 8):
        mask = mask[::-1]
    return mask[:, ::-1] if orientation in (2, 3, 6, 7) else mask
