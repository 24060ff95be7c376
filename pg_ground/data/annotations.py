"""The forms in which records write boxes and points → rows of numbers in one format.

The field of a record can hold lists, objects with the usual keys, corner pairs, or text.
docs/data.md has the table of all forms.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pg_ground.data.box_formats import UNITS, split_format
from pg_ground.data.record_fields import plain_text
from pg_ground.data.records import BadRecord, short
from pg_ground.readers.gold_text import read_gold_text
from pg_ground.readers.locations import corner_names, plain_key

BOX_KEYS: dict[tuple[str, ...], str] = {
    ("x1", "y1", "x2", "y2"): "xyxy",
    ("x0", "y0", "x1", "y1"): "xyxy",
    ("xmin", "ymin", "xmax", "ymax"): "xyxy",
    ("xtl", "ytl", "xbr", "ybr"): "xyxy",
    ("left", "top", "right", "bottom"): "xyxy",
    ("l", "t", "r", "b"): "xyxy",
    ("x", "y", "width", "height"): "xywh",
    ("x", "y", "w", "h"): "xywh",
    ("left", "top", "width", "height"): "xywh",
    ("xmin", "ymin", "width", "height"): "xywh",
    ("cx", "cy", "w", "h"): "cxcywh",
    ("cx", "cy", "width", "height"): "cxcywh",
    ("xcenter", "ycenter", "width", "height"): "cxcywh",
}
"""The keys of a box that is an object, in lower case and without "_" → the order of the numbers."""

POINT_KEYS: dict[tuple[str, ...], str] = {
    ("x", "y"): "xy",
    ("cx", "cy"): "xy",
    ("left", "top"): "xy",
}
"""The keys of a point that is an object."""

INNER_KEYS = (
    *("bbox_2d", "bbox", "box_2d", "box", "bndbox", "bounding_box", "coordinates"),
    *("point_2d", "point"),
)
"""Keys of an object under which its box or its point is."""

CORNERS_KEYS = ("points", "corners", "vertices")
"""Keys of an object under which the corners of its box are."""

SHAPES = (None, "", "rectangle", "rect", "polygon", "box")
"""Values of the key `shape_type` whose `points` are corners. Those of a circle are others."""

CONVENTIONS = {"box_2d": "yxyx_permille"}
"""The format that the name of a key or a field states: Gemini writes boxes as `box_2d`."""

UNSTATED_FORMAT = "xyxy_px"
"""The default of box_format. A source with another value states the format itself."""

UNSTATED_FORMATS = (UNSTATED_FORMAT, "xy_px")
"""The defaults of box_format and point_format."""

LABEL_STUDIO_KEYS = ("rectanglelabels", "keypointlabels", "originalwidth")
"""Keys, in lower case and without "_", of the objects of Label Studio, which are in percent."""

TURN_KEYS = ("rotation", "angle", "rotationangle")
"""Keys, in lower case and without "_", of the angle of a box that is not upright."""

NOTHING = ("", "[]", "{}", "null", "none", "nan")
"""Texts, in lower case, which say that there are no objects. Tables write lists as text."""

LABEL_KEYS = ("label", "name", "category", "class")
"""Keys of an object under which its name is."""

LABEL_LISTS = ("rectanglelabels", "keypointlabels")
"""Keys of an object under which a list with its name is."""


class Rows(NamedTuple):
    """Boxes or points of a record."""

    numbers: Float[np.ndarray, "K N"]
    labels: tuple[str, ...]
    """The name of each row, if the value itself has names; else empty."""
    codes: tuple[str, ...]
    """The `<segNNN>` tokens of each row, if the value has them; else empty."""
    format: str
    """`ORDER_UNIT`: the setting, or what the form of the value states."""
    reading: str
    """The form of the value, in words."""


def is_nothing(value: object) -> bool:
    """Returns whether a field says that there are no objects: null, NaN, [], {} or a blank text."""
    if isinstance(value, str):
        return value.strip().lower() in NOTHING
    if isinstance(value, float):
        return bool(np.isnan(value))
    if isinstance(value, np.ndarray):
        return value.size == 0
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def no_rows(width: int, format_name: str) -> Rows:
    """Returns no boxes (`width` 4) or points (`width` 2)."""
    return Rows(np.zeros((0, width)), (), (), format_name, "")


def read_rows(value: object, format_name: str, width: int, path: str = "") -> Rows:
    """Returns the boxes (`width` 4) or points (`width` 2) of a record's field.

    Args:
      value: the value in any form.
      format_name: the setting box_format or point_format. Keys and loc tokens state their own
        order, and loc tokens their own unit.
      path: the path of the field. The last name can state the format, as keys of `CONVENTIONS` do.

    Raises:
      BadRecord: bad_box or bad_point, if the value has no known form or a number is not finite.
    """
    kind = "bad_box" if width == 4 else "bad_point"
    if is_nothing(value):
        return no_rows(width, format_name)
    name = path.rpartition(".")[2].removesuffix("[]")
    if name in CONVENTIONS:
        rows = _read_inner(name, value, format_name, width, kind)
    elif isinstance(value, np.ndarray) and value.dtype == float and value.shape[1:] == (width,):
        rows = Rows(value, (), (), format_name, "lists")  # as `_read` reads it, in less time
    else:
        rows = _read(value, format_name, width, kind)
    is_finite = np.isfinite(rows.numbers)
    if not is_finite.all():
        i = int(np.flatnonzero(~is_finite.all(1))[0])
        raise BadRecord(kind, f"{row_text(rows.numbers, i)} is not finite")
    return rows


def row_text(rows: Float[np.ndarray, "K N"], i: int) -> str:
    """Returns row `i` in the record's own numbers, and its position if there are several."""
    numbers = ", ".join(f"{value:g}" for value in rows[i])
    return f"[{numbers}]" + (f" (number {i + 1} of {len(rows)})" if len(rows) > 1 else "")


def _read(value: Any, format_name: str, width: int, kind: str) -> Rows:
    if type(value) is list and all(type(number) in (float, int) for number in value):
        return _read_lists(value, format_name, width, kind)  # as below, in less time
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return _read_text(value, format_name, width, kind)
    if isinstance(value, Mapping):
        rows = _read_keys(value, format_name, width, kind)
        return _read_labels(value, format_name, width, kind) if rows is None else rows
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return _join([_read_object(item, format_name, width, kind) for item in value], kind)
    if _is_list_of_texts(value):
        return _join([_read_text(item, format_name, width, kind) for item in value], kind)
    return _read_lists(value, format_name, width, kind)


def _is_list_of_texts(value: Any) -> bool:
    """Returns whether each element of a list is a text with several numbers."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(item, str) and len(item.split()) + item.count("<") > 1 for item in value)


def _read_text(text: str, format_name: str, width: int, kind: str) -> Rows:
    try:
        content = read_gold_text(text, width)
    except ValueError as error:
        raise BadRecord(kind, f"the text {short(text)} has {error}") from None
    if content.value is not None:
        rows = _read(content.value, format_name, width, kind)
        return rows._replace(reading=f"{content.reading}: {rows.reading}")
    numbers = np.array([item.numbers for item in content.objects]).reshape(-1, width)
    labels = tuple(item.label for item in content.objects)
    codes = tuple(item.codes for item in content.objects)
    return Rows(
        numbers,
        labels if any(labels) else (),
        codes if any(codes) else (),
        content.format or format_name,
        content.reading,
    )


def _read_keys(value: Mapping[Any, Any], format_name: str, width: int, kind: str) -> Rows | None:
    """Returns the rows of an object whose keys are the usual ones; None if they are not.

    The values are numbers, or lists with one number for each row.
    """
    fields = {plain_key(key): item for key, item in value.items()}
    candidates: list[tuple[tuple[str, ...], str, Any]] = []
    filled = (key for key, item in fields.items() if not is_nothing(item))
    corners = corner_names(filled) if width == 4 else []
    if corners:
        rows = _corner_rows(value, fields, corners, format_name, kind)
        candidates.append((tuple(f"x{name} y{name}" for name in corners), "xyxy", rows))
    named = {f"{axis}{name}" for axis in "xy" for name in corners}
    for keys, order in (BOX_KEYS if width == 4 else POINT_KEYS).items():
        if all(key in fields for key in keys) and named.isdisjoint(keys):
            columns = _columns([fields[key] for key in keys])
            if columns is not None:
                candidates.append((keys, order, columns))
    if not candidates:
        return None
    turn = next((fields[key] for key in TURN_KEYS if key in fields), 0)
    if turn not in (0, None, "0", [0] * len(candidates[0][2])):
        raise BadRecord(kind, f"{short(value)} with rotation {short(turn)}, but boxes are upright")
    keys, order, columns = candidates[0]
    _check_spellings(value, fields, keys, kind)
    if order == "xywh" and keys[0] == "x" and format_name.startswith("cxcywh"):
        order = "cxcywh"  # some tools name the centre x and y
    if width == 4:
        for other_keys, other_order, other in candidates[1:]:
            if not np.allclose(_to_xyxy(columns, order), _to_xyxy(other, other_order), atol=1e-6):
                names = f"{' '.join(keys)} and {' '.join(other_keys)}"
                raise BadRecord(kind, f"{short(value)} states two boxes, by {names}")
    unit = split_format(format_name)[1]
    label = _label(value)
    labels = (label,) * len(columns) if label else ()
    reading = f"keys {' '.join(keys)} ({order})"
    if format_name in UNSTATED_FORMATS and any(key in fields for key in LABEL_STUDIO_KEYS):
        unit = "percent"
        reading += " of Label Studio"
        if columns.max() > 101:  # a box may reach a little beyond the image
            remedy = f": box_format = '{order}_px' reads pixels" if width == 4 else ""
            raise BadRecord(
                kind,
                f"{row_text(columns, 0)} has the keys of Label Studio, which writes percent, but a "
                f"number is above 100{remedy}",
            )
    return Rows(columns, labels, (), f"{order}_{unit}", reading)


def _check_spellings(
    value: Mapping[Any, Any], fields: Mapping[str, Any], keys: Sequence[str], kind: str
) -> None:
    """Raises BadRecord if two spellings of a key, such as x1 and x_1, have different values."""
    if len(fields) == len(value):
        return
    used = " ".join(keys).split()
    for key, item in value.items():
        name = plain_key(key)
        if name in used and repr(fields[name]) != repr(item):
            raise BadRecord(kind, f"{short(value)} has two values of {name}")


def _corner_rows(
    value: Mapping[Any, Any],
    fields: Mapping[str, Any],
    corners: Sequence[str],
    format_name: str,
    kind: str,
) -> Float[np.ndarray, "K 4"]:
    """Returns the boxes (xyxy) of an object whose keys name the corners, such as x1 y1 … x4 y4."""
    names = [f"{axis}{corner}" for corner in corners for axis in "xy"]
    columns = _columns([fields.get(name) for name in names])
    if len(corners) != 4 or columns is None:
        raise BadRecord(
            kind, f"{short(value)} has the keys of {len(corners)} corners: a box has 2 or 4"
        )
    polygons = columns.reshape(-1, 4, 2).tolist()
    return _read_lists(polygons, f"xyxy_{split_format(format_name)[1]}", 4, kind).numbers


def _to_xyxy(rows: Float[np.ndarray, "K 4"], order: str) -> Float[np.ndarray, "K 4"]:
    first, size = rows[:, :2], rows[:, 2:]
    if order == "xyxy":
        return rows
    first = first - size / 2 if order == "cxcywh" else first
    return np.concatenate([first, first + size], 1)


def _columns(values: Sequence[Any]) -> Float[np.ndarray, "K N"] | None:
    """Returns one row of numbers, or rows from columns of one length; None for other values."""
    try:
        columns = np.asarray([_numeric(value) for value in values], np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return columns[None] if columns.ndim == 1 else columns.T if columns.ndim == 2 else None


def _numeric(value: Any) -> Any:
    """Returns a number, or a list of numbers. Numbers can be text."""
    if isinstance(value, list | tuple):
        return [_numeric(item) for item in value]
    if isinstance(value, bool) or value is None:
        raise ValueError("no number")
    return float(value) if isinstance(value, str) else value


def _label(value: Mapping[Any, Any]) -> str:
    names = [value[key] for key in LABEL_KEYS if key in value]
    lists = [value[key] for key in LABEL_LISTS if key in value]
    names += [item[0] for item in lists if isinstance(item, list | tuple) and len(item) == 1]
    texts = map(plain_text, names)
    return next((" ".join(text.split()) for text in texts if text and text.strip()), "")


def _read_object(item: Any, format_name: str, width: int, kind: str) -> Rows:
    """Returns the rows of one element of a list of objects."""
    if not isinstance(item, Mapping):
        raise BadRecord(kind, f"{short(item)} is no object, but others of its list are")
    rows = _read_keys(item, format_name, width, kind)
    if rows is not None:
        return rows
    inner = next((key for key in _inner_keys(width) if key in item), None)
    if width == 4 and item.get("shape_type") not in SHAPES:
        raise BadRecord(kind, f"{short(item)} has the shape {short(item['shape_type'])}, no box")
    if inner is None:
        if width == 2:
            raise BadRecord(kind, f"{short(item)} has no x and y")
        raise BadRecord(kind, _no_keys(item))
    rows = _read_inner(inner, item[inner], format_name, width, kind)
    label = _label(item)
    if label and not rows.labels:
        return rows._replace(labels=(label,) * len(rows.numbers))
    return rows


def _inner_keys(width: int) -> tuple[str, ...]:
    return INNER_KEYS + CORNERS_KEYS if width == 4 else INNER_KEYS


def _read_inner(name: str, value: Any, format_name: str, width: int, kind: str) -> Rows:
    """Returns the rows under a key or a field, whose name states a format if it has a convention.

    Raises:
      BadRecord: also if a coordinate is larger than the unit of the convention allows.
    """
    items = value if isinstance(value, list | tuple) else [value]
    has_keys = any(isinstance(item, Mapping) for item in items)
    convention = CONVENTIONS.get(name, format_name)
    if format_name != UNSTATED_FORMAT or has_keys or width != 4:
        convention = format_name
    rows = _read(value, convention, width, kind)
    if convention != format_name and rows.format == convention:
        extent = UNITS[split_format(convention)[1]] or np.inf
        for i in np.flatnonzero((rows.numbers > extent).any(1)).tolist():
            raise BadRecord(
                kind,
                f"{row_text(rows.numbers, i)} is under {name}, which Gemini writes as "
                f"{convention}, but a coordinate is above {extent:g}: set box_format",
            )
    return rows._replace(reading=f"{name}: {rows.reading}")


def _read_labels(value: Mapping[Any, Any], format_name: str, width: int, kind: str) -> Rows:
    """Returns the rows of `{label: boxes}`, or of an object that has its box under a key."""
    if any(key in value for key in _inner_keys(width)):
        return _read_object(value, format_name, width, kind)
    parts = []
    for label, inner in value.items():
        if is_nothing(inner):
            continue
        if not isinstance(inner, list | tuple | Mapping | np.ndarray):
            if width == 2:
                raise BadRecord(kind, f"{short(value)} has no x and y")
            raise BadRecord(kind, _no_keys(value))
        rows = _read(inner, format_name, width, kind)
        name = " ".join(str(label).split())
        parts.append(rows._replace(labels=(name,) * len(rows.numbers)))
    if not parts:
        return no_rows(width, format_name)
    rows = _join(parts, kind)
    return rows._replace(reading=f"by label, {rows.reading}")


def _no_keys(value: object) -> str:
    return (
        f"{short(value)} is no box: its keys would be x1 y1 x2 y2, xmin ymin xmax ymax, "
        "left top right bottom, or x y width height"
    )


def _join(parts: Sequence[Rows], kind: str) -> Rows:
    """Returns the rows of several values as one. All have one format."""
    formats = list(dict.fromkeys(part.format for part in parts))
    if len(formats) > 1:
        raise BadRecord(kind, f"the record has objects in two forms: {' and '.join(formats)}")
    names = [part.labels or ("",) * len(part.numbers) for part in parts]
    codes = [part.codes or ("",) * len(part.numbers) for part in parts]
    return Rows(
        np.concatenate([part.numbers for part in parts]),
        sum(names, ()) if any(part.labels for part in parts) else (),
        sum(codes, ()) if any(part.codes for part in parts) else (),
        formats[0],
        parts[0].reading,
    )


def _read_lists(value: Any, format_name: str, width: int, kind: str) -> Rows:
    """Returns the rows of lists of numbers."""
    if _has_flag(value):  # numpy would read True as 1
        raise _wrong_shape(value, width, kind)
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong_shape(value, width, kind) from error
    while array.ndim > 2 and 1 in array.shape[:-1]:
        array = array.squeeze(array.shape.index(1))
    if array.ndim == 1 and len(array) == width:
        array = array[None]
    if array.ndim == 2 and array.shape[1] == width and len(array):
        return Rows(array, (), (), format_name, "lists")
    if width == 4 and array.ndim in (2, 3) and array.shape[-2:] == (2, 2):
        pairs = array.reshape(-1, 4)
        return Rows(pairs, (), (), _corner_format(value, format_name, kind), "corner pairs")
    if width == 4 and array.ndim in (2, 3) and array.shape[-2:] == (4, 2):
        polygons = array.reshape(-1, 4, 2)
        boxes = np.concatenate([polygons.min(1), polygons.max(1)], 1)
        if not all(_is_upright(polygon) for polygon in polygons):
            raise BadRecord(kind, f"{short(value)} are four corners of no upright rectangle")
        return Rows(boxes, (), (), _corner_format(value, format_name, kind), "four corners")
    raise _wrong_shape(value, width, kind)


def _has_flag(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_flag, value))
    return isinstance(value, bool | np.bool_ | bytes)


def _is_upright(polygon: Float[np.ndarray, "4 2"]) -> bool:
    """Returns whether four corners are the corners of a rectangle with upright sides."""
    low, high = polygon.min(0), polygon.max(0)
    corners = {(float(x), float(y)) for x in (low[0], high[0]) for y in (low[1], high[1])}
    return {(float(x), float(y)) for x, y in polygon} == corners and len(corners) == 4


def _corner_format(value: object, format_name: str, kind: str) -> str:
    """Returns the format of boxes that are written as corners."""
    order, unit = split_format(format_name)
    if order not in ("xyxy", "yxyx"):
        raise BadRecord(
            kind, f"{short(value)} are corners, but box_format is {format_name}: set xyxy_{unit}"
        )
    return format_name


def _wrong_shape(value: object, width: int, kind: str) -> BadRecord:
    reason = f"{short(value, 80)} is not {width} numbers, and not a list of {width} numbers"
    return BadRecord(kind, reason)
