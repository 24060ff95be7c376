"""One record and the config entry that describes it → `Example`.

Every format of boxes and points becomes fractions in `yxyx` and `yx` here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.boxes import encode_loc, whole_corners
from pg_ground.config import Fetch, Source
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    check_format,
    format_names,
    to_fractions,
)
from pg_ground.data.fetch import cached, is_url
from pg_ground.data.image_values import image_name, unwrap
from pg_ground.data.images import open_image, resize
from pg_ground.data.masks import to_masks
from pg_ground.data.record_fields import field_at, fill_template
from pg_ground.data.records import BadRecord
from pg_ground.storage.paths import FilePath
from pg_ground.types import BOXES, POINTS, TEXT, Boxes, Example, Points, Record
from pg_ground.vocab import LOC_MAX

TARGETS = {"boxes": BOXES, "points": POINTS, "text": TEXT}
"""The values of `Source.target`."""

SOURCE_UNITS = ("px", "frac", "percent", "bin")
"""The units that a source's coordinates may have."""


def check_formats(source: Source, source_name: str) -> None:
    """Raises UserError if the source's `box_format` or `point_format` does not exist."""
    for setting, value, orders in (
        ("box_format", source.box_format, BOX_ORDERS),
        ("point_format", source.point_format, POINT_ORDERS),
    ):
        formats = format_names(orders, SOURCE_UNITS)
        check_format(value, f"source {source_name}: {setting}", formats)


class Annotation(NamedTuple):
    """The objects of a record in the record's own numbers."""

    boxes: Float[np.ndarray, "K 4"]
    points: Float[np.ndarray, "K 2"]
    labels: tuple[str, ...]
    """The name of each object; empty if the objects have no names."""


class Objects(NamedTuple):
    """The objects of an example: boxes, points and masks slot by slot."""

    yxyx: Float[np.ndarray, "B 4"]
    yx: Float[np.ndarray, "P 2"]
    masks: Bool[np.ndarray, "N M M"]
    labels: tuple[str, ...]
    """The name of each object that the question asks for; "" for no name."""


def to_example(
    record: Record,
    source: Source,
    source_name: str,
    index: int,
    image_size: int,
    folder: FilePath | None,
    *,
    element: int = 0,
    seed: int = 0,
    resize_by: str = "antialias",
    deep_images: str = "dtype",
    mask_size: int = 0,
    fetch: Fetch | None = None,
) -> Example:
    """Returns the question of `record`, with an image of `image_size` x `image_size` pixels.

    Boxes are clipped to the image. Runs of white space in the prompt and in names become single
    spaces. Objects with the same name and the same loc bins count once. The caller has checked
    `source` with `check_formats`.

    Args:
      record: fields by name.
      source: the config entry, which says where the fields are.
      source_name: its name in the config.
      index: number of the question within the source.
      image_size: pixels.
      folder: the folder that file names of images are relative to.
      element: which element of a list the source's paths with `[]` read.
      seed: with `index`, decides which objects `source.max_objects` keeps.
      resize_by: a value of `data.resize`.
      deep_images: a value of `data.deep_images`.
      mask_size: cells along each side of the objects' masks; 0 reads no masks.
      fetch: settings for images at http(s) urls; None refuses urls.

    Raises:
      BadRecord: missing_field, missing_image, corrupt_image, bad_box, bad_point, bad_mask,
        bad_text, or empty.
    """
    prompt, annotation = read_question(record, source, element)
    image = open_image(image_value(record, source, element, fetch), folder, deep_images)
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    asks_points = source.target == "points"
    objects = _objects(record, source, annotation, element, size, mask_size, folder)
    keep = select_objects(
        objects.yx if asks_points else objects.yxyx,
        objects.labels,
        source.max_objects,
        (seed, index, element),
    )
    objects = _take(objects, keep)
    fractions = objects.yx if asks_points else objects.yxyx
    names = tuple(dict.fromkeys(label for label in objects.labels if label))
    return Example(
        image=resize(image, image_size, resize_by),
        size=size,
        prompt=prompt,
        suffix=format_answer(source, record, element, fractions, objects.labels, size),
        boxes=Boxes(objects.yxyx, *_label_and_valid(objects.labels, names, len(objects.yxyx))),
        points=Points(objects.yx, *_label_and_valid(objects.labels, names, len(objects.yx))),
        target=TARGETS[source.target] if source.suffix == "loc" else TEXT,
        names=names,
        masks=objects.masks,
        source=source_name,
        index=index,
    )


def image_value(record: Record, source: Source, element: int, fetch: Fetch | None) -> Any:
    """Returns a record's image value. If it is a url and `fetch` is not None, returns the bytes.

    Raises:
      BadRecord: missing_field, missing_image, or the reasons of `fetch.cached` if the url cannot be
        fetched.
    """
    value = unwrap(field_at(record, source.image, element))
    name = None if fetch is None else image_name(value)
    if fetch is None or not is_url(name):
        return value
    return cached(name, image_sha256(record, source, element), fetch)


def image_sha256(record: Record, source: Source, element: int) -> str | None:
    """Returns the sha256 that a record has for its image; None if the source has no such field."""
    if not source.image_sha256:
        return None
    value = unwrap(field_at(record, source.image_sha256, element))
    return None if value is None else str(value)


def read_question(record: Record, source: Source, element: int) -> tuple[str, Annotation]:
    """Returns the prompt of a record and its objects. The image is not opened.

    Raises:
      BadRecord: missing_field, bad_box, bad_point or bad_text; or empty, if the record has no
        objects and the source drops empty records.
    """
    prompt = fill_template(source.prompt, record, source.phrase, element)
    if not prompt:
        raise BadRecord("bad_text", f"the prompt {source.prompt!r} comes out empty")
    labels: tuple[str, ...] = ()
    boxes = np.zeros((0, 4))
    points = np.zeros((0, 2))
    if source.boxes:
        value = field_at(record, source.boxes, element)
        if isinstance(value, Mapping):
            value, labels = _boxes_by_label(value)
        boxes = _to_rows(value, 4, "bad_box")
    if source.points:
        points = _to_rows(_to_pairs(field_at(record, source.points, element)), 2, "bad_point")
    count = len(points if source.target == "points" else boxes)
    if not count and source.target != "text" and source.empty == "drop":
        raise BadRecord("empty", f"there are no {source.target}")
    if source.label:
        labels = _to_labels(field_at(record, source.label, element), count)
    elif not labels and source.name and count:
        labels = (fill_template(source.name, record, source.phrase, element),) * count
    return prompt, Annotation(boxes, points, labels)


def select_objects(
    fractions: Float[np.ndarray, "K N"], labels: Sequence[str], limit: int, seed: Sequence[int]
) -> Int[np.ndarray, " n"]:
    """Returns the indices of the objects to keep, in increasing order.

    Of objects with equal names and equal loc bins, the first is kept. If more than `limit` remain
    and `limit` is not 0, a random choice by `seed` is kept.
    """
    if len(fractions) < 2:
        return np.arange(len(fractions))
    first: dict[tuple[str, bytes], int] = {}
    for i, (label, row) in enumerate(zip(labels, encode_loc(fractions), strict=True)):
        first.setdefault((label, row.tobytes()), i)
    indices = np.array(sorted(first.values()), np.int64)
    if limit and len(indices) > limit:
        indices = np.sort(np.random.default_rng(seed).choice(indices, limit, replace=False))
    return indices


def format_answer(
    source: Source,
    record: Record,
    element: int,
    fractions: Float[np.ndarray, "K N"],
    labels: Sequence[str],
    size: tuple[int, int],
) -> str:
    """Returns the answer to a question, in the form that `source.suffix` names."""
    if source.suffix == "loc":
        return loc_text(fractions, labels)
    if source.suffix == "count":
        return str(len(fractions))
    if source.suffix == "json":
        key = "point_2d" if source.target == "points" else "bbox_2d"
        return _json_text(fractions, labels, size, key)
    return fill_template(source.suffix, record, source.phrase, element)


def _json_text(
    fractions: Float[np.ndarray, "K N"], labels: Sequence[str], size: tuple[int, int], key: str
) -> str:
    """Returns boxes or points as JSON, x before y, in whole pixels of the original image.

    A box is at least one pixel wide and high.
    """
    is_box = fractions.shape[1] == 4
    x_first = fractions[:, [1, 0, 3, 2] if is_box else [1, 0]].astype(np.float64)
    pixels = x_first * (size * 2 if is_box else size)
    rows = whole_corners(pixels, size) if is_box else np.round(pixels).astype(np.int32)
    objects = [
        {key: numbers} | ({"label": label} if label else {})
        for numbers, label in zip(rows.tolist(), labels, strict=True)
    ]
    return json.dumps(objects, ensure_ascii=False)


def loc_text(fractions: Float[np.ndarray, "K N"], names: Sequence[str]) -> str:
    """Returns `<locYYYY><locXXXX>… name`, with " ; " between objects; a name "" is left out.

    The bins are those of `boxes.encode_loc`, as in big_vision's pp/segmentation ops. A box is at
    least one bin wide and high.
    """
    texts = []
    is_box = fractions.ndim == 2 and fractions.shape[1] == 4
    rows = whole_corners(fractions * LOC_MAX) if is_box else encode_loc(fractions)
    for bins, name in zip(rows, names, strict=True):
        loc = "".join(f"<loc{code:04d}>" for code in bins)
        texts.append(f"{loc} {name}" if name else loc)
    return " ; ".join(texts)


def to_yxyx(value: Any, box_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 4"]:
    """Returns one box or a list of boxes as `yxyx` fractions, clipped to [0, 1].

    Args:
      value: numbers as the record has them.
      box_format: `ORDER_UNIT`.
      size: width and height of the image in pixels.

    Raises:
      BadRecord: bad_box if a box is not four finite numbers, has no area, or is outside the image.
    """
    if not len(value):
        return np.zeros((0, 4), np.float32)
    rows = _to_rows(value, 4, "bad_box")
    fractions = to_fractions(rows, box_format, size)
    yxyx = np.clip(fractions, 0, 1).astype(np.float32)
    for i in np.flatnonzero((yxyx[:, 2:] <= yxyx[:, :2]).any(1)).tolist():
        has_area = (fractions[i, 2:] > fractions[i, :2]).all()
        reason = f"is outside an image of {_size_text(size)} pixels" if has_area else "has no area"
        raise BadRecord("bad_box", f"{_row_text(rows, i)} as {box_format} {reason}")
    return yxyx


def to_yx(value: Any, point_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 2"]:
    """Returns one point or a list of points as `yx` fractions in [0, 1].

    A point that is outside by at most one pixel moves to the border.

    Args:
      value: numbers as the record has them.
      point_format: `ORDER_UNIT`.
      size: width and height of the image in pixels.

    Raises:
      BadRecord: bad_point if a point is not two finite numbers, or is outside the image.
    """
    if not len(value):
        return np.zeros((0, 2), np.float32)
    rows = _to_rows(value, 2, "bad_point")
    yx = to_fractions(rows, point_format, size)
    pixel = 1 / np.array(size[::-1])
    for i in np.flatnonzero(((yx < -pixel) | (yx > 1 + pixel)).any(1)).tolist():
        reason = f"is outside an image of {_size_text(size)} pixels"
        raise BadRecord("bad_point", f"{_row_text(rows, i)} as {point_format} {reason}")
    return np.clip(yx, 0, 1).astype(np.float32)


def _objects(
    record: Record,
    source: Source,
    annotation: Annotation,
    element: int,
    size: tuple[int, int],
    mask_size: int,
    folder: FilePath | None,
) -> Objects:
    """Returns the annotated objects in fractions of the image."""
    yxyx = to_yxyx(annotation.boxes, source.box_format, size)
    yx = to_yx(annotation.points, source.point_format, size)
    asks_points = source.target == "points"
    if asks_points and source.boxes and len(yxyx) != len(yx):
        raise BadRecord(
            "bad_box", f"{len(yxyx)} boxes for {len(yx)} points: each point needs its object's box"
        )
    count = len(yx if asks_points else yxyx)
    masks = np.zeros((0, mask_size, mask_size), bool)
    if source.mask and mask_size:
        value = field_at(record, source.mask, element)
        masks = to_masks(value, count, size, mask_size, folder)
    return Objects(yxyx, yx, masks, annotation.labels or ("",) * count)


def _take(objects: Objects, indices: Int[np.ndarray, " n"]) -> Objects:
    """Returns some of the objects. Arrays of another length than the labels stay whole."""
    count = len(objects.labels)
    yxyx, yx, masks = (
        rows[indices] if len(rows) == count else rows
        for rows in (objects.yxyx, objects.yx, objects.masks)
    )
    return Objects(yxyx, yx, masks, tuple(objects.labels[i] for i in indices))


def _label_and_valid(
    labels: Sequence[str], names: Sequence[str], count: int
) -> tuple[Int[np.ndarray, " count"], Bool[np.ndarray, " count"]]:
    """Returns the fields `label` and `valid` of `count` slots that are all used.

    `label` is the index of each object's name in `names`; zeros if the counts differ.
    """
    valid = np.ones(count, bool)
    if len(labels) != count:
        return np.zeros(count, np.int32), valid
    return np.array([names.index(label) if label else 0 for label in labels], np.int32), valid


def _boxes_by_label(value: Record) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the boxes of `{label: list of boxes}` in one list, and the label of each."""
    rows: list[Any] = []
    labels: list[str] = []
    for label, boxes in value.items():
        if not isinstance(boxes, list):
            raise BadRecord("bad_box", f"{label!r} is {boxes!r:.60}: it must be a list of boxes")
        rows += boxes
        labels += [str(label)] * len(boxes)
    return rows, tuple(labels)


def _to_pairs(value: object) -> Any:
    """Returns points that are {x, y} objects as [x, y] pairs. Returns other values unchanged."""
    points = [value] if isinstance(value, Mapping) else value
    if not isinstance(points, list) or not points:
        return value
    if not all(isinstance(point, Mapping) for point in points):
        return value
    incomplete = next((point for point in points if not {"x", "y"} <= point.keys()), None)
    if incomplete is not None:
        raise BadRecord("bad_point", f"{incomplete!r:.60} has no x and y")
    return [[point["x"], point["y"]] for point in points]


def _to_labels(value: object, count: int) -> tuple[str, ...]:
    """Returns one name for each of `count` objects."""
    names = value if isinstance(value, list) else [value] * count
    if len(names) != count:
        raise BadRecord("bad_text", f"{len(names)} labels for {count} objects")
    for name in names:
        is_text = isinstance(name, str | int) and not isinstance(name, bool)
        if not is_text or not str(name).strip():
            raise BadRecord("bad_text", f"the label {name!r:.60} is no text")
    return tuple(" ".join(str(name).split()) for name in names)


def _to_rows(value: object, width: int, kind: str) -> Float[np.ndarray, "K width"]:
    """Returns one row of numbers, or a list of rows, as an array. Raises BadRecord(`kind`)."""
    try:
        rows = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise _wrong_shape(value, width, kind) from error
    if rows.size == 0 and rows.ndim <= 2:
        return np.zeros((0, width))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise _wrong_shape(value, width, kind)
    for i in np.flatnonzero(~np.isfinite(rows).all(1)).tolist():
        raise BadRecord(kind, f"{_row_text(rows, i)} is not finite")
    return rows


def _wrong_shape(value: object, width: int, kind: str) -> BadRecord:
    text = " ".join(repr(value).split())
    return BadRecord(kind, f"{text:.80} is not {width} numbers, and not a list of {width} numbers")


def _row_text(rows: Float[np.ndarray, "K N"], i: int) -> str:
    """Returns row `i` in the record's own numbers, and its position if there are several."""
    numbers = ", ".join(f"{value:g}" for value in rows[i])
    return f"[{numbers}]" + (f" (number {i + 1} of {len(rows)})" if len(rows) > 1 else "")


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
