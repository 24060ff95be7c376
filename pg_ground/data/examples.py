"""One record and the config entry that describes it → `Example`.

Every format of boxes and points becomes fractions in `yxyx` and `yx` here.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.boxes import encode_loc, whole_corners
from pg_ground.config import Fetch, Source
from pg_ground.data.annotations import Rows, is_nothing, no_rows, read_rows, row_text
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    check_format,
    fitting_formats,
    format_names,
    split_format,
    to_fractions,
)
from pg_ground.data.chat_turns import check_prompt_roles, turn_notes
from pg_ground.data.fetch import cached, is_url
from pg_ground.data.frames import (
    EXCHANGED,
    UPRIGHT,
    Frame,
    find_frame,
    recorded_size,
    size_text,
    turn_boxes,
    turn_points,
)
from pg_ground.data.image_values import image_name, unwrap
from pg_ground.data.images import Opened, open_oriented, resize
from pg_ground.data.masks import to_masks
from pg_ground.data.names import INVISIBLE, check_unicode, safe_name
from pg_ground.data.record_fields import (
    coordinates_at,
    field_at,
    field_or_none,
    fill_template,
    placeholders,
    plain_text,
    with_setting,
)
from pg_ground.data.records import BadRecord, short
from pg_ground.storage.paths import FilePath
from pg_ground.types import BOXES, POINTS, TEXT, Boxes, Example, Points, Record, UserError

TARGETS = {"boxes": BOXES, "points": POINTS, "text": TEXT}
"""The values of `Source.target`."""

LONGEST_SCHEME = 40
"""Characters in which an address has its `://`."""

FAR_BEYOND = 0.5
"""The part of a side by which a box may reach beyond the image. It is clipped to the image."""

FITS_AS = "; it fits as "
"""In an error about coordinates, before the formats that fit."""


def check_formats(source: Source, source_name: str) -> None:
    """Raises UserError if a format of the source does not exist, or `remove` is no expression."""
    try:
        re.compile(source.remove)
    except re.error as error:
        raise UserError(f"source {source_name}: remove={source.remove!r}: {error}") from None
    for setting, value, orders in (
        ("box_format", source.box_format, BOX_ORDERS),
        ("point_format", source.point_format, POINT_ORDERS),
    ):
        formats = format_names(orders)
        check_format(value, f"source {source_name}: {setting}", formats)


class Annotation(NamedTuple):
    """The objects of a record in the record's own numbers."""

    boxes: Rows
    points: Rows
    labels: tuple[str, ...]
    """The name of each object; empty if the objects have no names."""
    codes: tuple[str, ...]
    """The `<segNNN>` tokens of each object; empty if the record has none."""
    count: int
    """The number of objects that the question is about."""
    absence: str
    """`: there is no bbox: the fields are …` if the record lacks their field, else ""."""


class Objects(NamedTuple):
    """The objects of an example: boxes, points and masks slot by slot."""

    yxyx: Float[np.ndarray, "B 4"]
    yx: Float[np.ndarray, "P 2"]
    masks: Bool[np.ndarray, "N M M"]
    labels: tuple[str, ...]
    """The name of each object that the question asks for; "" for no name."""
    codes: tuple[str, ...] = ()
    """The `<segNNN>` tokens of each object; empty if there are none."""


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
    value = image_value(record, source, element, fetch)
    try:
        opened = open_oriented(value, folder, deep_images)
    except BadRecord as bad:
        raise with_address(bad, record, source, element) from None
    image = opened.image
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    frame = Frame(size, 1, "")
    if len(annotation.boxes.numbers) or len(annotation.points.numbers):
        frame = find_frame(recorded_size(record, source, element), opened, source.frame)
    asks_points = source.target == "points"
    try:
        objects = _objects(record, source, annotation, element, frame, mask_size, folder)
    except BadRecord as bad:
        raise _with_frame(bad, annotation, opened, frame, source) from None
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
        suffix=format_answer(
            source,
            record,
            element,
            fractions,
            objects.labels,
            objects.codes,
            size,
            annotation.count,
        ),
        boxes=Boxes(objects.yxyx, *_label_and_valid(objects.labels, names, len(objects.yxyx))),
        points=Points(objects.yx, *_label_and_valid(objects.labels, names, len(objects.yx))),
        target=TARGETS[source.target] if source.suffix == "loc" else TEXT,
        names=names,
        masks=objects.masks,
        source=source_name,
        index=index,
        notes=(*_notes(annotation, frame, opened), *turn_notes(record, source, element)),
        frames=(frame.size, *filter(None, (_other_frame(opened, frame),))),
    )


def _other_frame(opened: Opened, frame: Frame) -> tuple[int, int] | None:
    """Returns the size of the image before EXIF, if EXIF exchanges the sides and the coordinates
    are read after it."""
    is_exchanged = opened.orientation >= EXCHANGED and frame.size == opened.stored[::-1]
    return opened.stored if is_exchanged and frame.orientation == UPRIGHT else None


def _with_frame(
    bad: BadRecord, annotation: Annotation, opened: Opened, frame: Frame, source: Source
) -> BadRecord:
    """Returns an error about coordinates, with the setting `frame` if they fit before EXIF only."""
    stored = _other_frame(opened, frame)
    if stored is None or bad.kind not in ("bad_box", "bad_point"):
        return bad
    boxes, points = annotation.boxes, annotation.points
    try:
        to_yxyx(boxes.numbers, boxes.format, stored, source.flat_boxes != "bad")
        to_yx(points.numbers, points.format, stored)
    except BadRecord:
        return bad
    text = str(bad).partition(FITS_AS)[0]
    return BadRecord(bad.kind, f"{text}; it fits before EXIF turns the image (frame = 'stored')")


def _notes(annotation: Annotation, frame: Frame, opened: Opened) -> tuple[str, ...]:
    """Returns how the boxes, the points, their frame and the image were read, in words."""
    notes = []
    for rows in (annotation.boxes, annotation.points):
        if rows.reading not in ("", "lists"):
            notes.append(f"{rows.reading} read as {rows.format}")
    return (*notes, *filter(None, (frame.note, opened.note)))


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


def image_address(record: Record, source: Source, element: int) -> str:
    """Returns the http(s) address of a record's image, or "" if the image is no address."""
    try:
        value = unwrap(field_at(record, source.image, element))
        # The text of a whole image takes long to tell from a name.
        may_be_address = isinstance(value, str) and "://" in value[:LONGEST_SCHEME]
        name = image_name(value) if may_be_address else None
    except BadRecord:
        return ""
    return name if is_url(name) else ""


def with_address(bad: BadRecord, record: Record, source: Source, element: int) -> BadRecord:
    """Returns an error about a fetched image with the address of the image.

    Errors about other images are returned unchanged: they name the file, or its size in bytes.
    """
    address = image_address(record, source, element)
    if not address or address in str(bad):
        return bad
    return BadRecord(bad.kind, f"{address!r:.200}: {bad}")


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
    check_prompt_roles(record, source, element)
    boxes, points, absence = _read_rows(record, source, element)
    asks_points = source.target == "points"
    rows = points if asks_points else boxes
    count = len(rows.numbers)
    if not count and source.target != "text" and source.empty == "drop":
        raise BadRecord("empty", nothing_there(source) + absence)
    prompt = _fill(source.prompt, record, source, element)
    if source.unsafe_names != "refuse":
        prompt = " ".join(INVISIBLE.sub("", prompt).split())
    if not prompt:
        raise BadRecord("bad_text", f"the prompt {short(source.prompt)} comes out empty")
    _check_nesting(record, source, element)
    labels = rows.labels
    if source.label and (count or not is_nothing(field_or_none(record, source.label, element))):
        labels = _to_labels(field_at(record, source.label, element), count)
    elif not labels and source.name and count:
        labels = (_fill(source.name, record, source, element),) * count
    names = tuple(_without(label, source) for label in labels)
    labels = tuple(safe_name(name, source) for name in names)
    for name, label in zip(names, labels, strict=True):
        if name != label:
            # The prompt asks for the name of the answer.
            prompt = prompt.replace(" ".join(name.split()), label)
    return prompt, Annotation(boxes, points, labels, rows.codes, count, absence)


def nothing_there(source: Source) -> str:
    """Returns the message of a record without boxes or points."""
    return f"there are no {source.target}"


def _read_rows(record: Record, source: Source, element: int) -> tuple[Rows, Rows, str]:
    """Returns the boxes and the points of a record, and the field that is absent, in words."""
    boxes = no_rows(4, source.box_format)
    points = no_rows(2, source.point_format)
    absence = ""
    if source.boxes:
        value = coordinates_at(record, source.boxes, element)
        absence = _absence(record, source.boxes, source, element) if value is None else ""
        boxes = read_rows(value, source.box_format, 4, source.boxes)
    if source.points:
        value = coordinates_at(record, source.points, element)
        if source.target == "points":
            absence = _absence(record, source.points, source, element) if value is None else ""
        points = read_rows(value, source.point_format, 2)
    return boxes, points, absence


def _absence(record: Record, path: str, source: Source, element: int) -> str:
    """Returns `: there is no bbox: the fields are …`, or "" if the field is there and is null."""
    try:
        for part in path.split(","):
            field_at(record, part.strip(), element)
    except BadRecord as bad:
        return f": {with_setting(bad, source)}"
    return ""


def _fill(template: str, record: Record, source: Source, element: int) -> str:
    """Returns a filled template without the parts that `source.remove` names."""
    text = fill_template(template, record, source.phrase, element)
    check_unicode(text)
    return _without(text, source) if text else text


def _without(text: str, source: Source) -> str:
    """Returns a text without the parts that `source.remove` names, with single spaces.

    Raises:
      BadRecord: bad_text, if nothing is left.
    """
    if not source.remove or not text:
        return text
    remainder = " ".join(re.sub(source.remove, " ", text).split())
    if not remainder:
        raise BadRecord(
            "bad_text", f"remove = {short(source.remove)} leaves nothing of {short(text)}"
        )
    return remainder


def _check_nesting(record: Record, source: Source, element: int) -> None:
    """Raises BadRecord (bad_text) if the phrase is itself the question that the prompt asks.

    An example is "how many {phrase} are there?" with the phrase "How many cows are there?".
    """
    before, placeholder, after = source.prompt.partition("{phrase}")
    words, asks = before.casefold().split(), after.rstrip().endswith("?")
    if not placeholder or (len(words) < 2 and not asks):
        return
    phrase = _fill("{phrase}", record, source, element)
    phrase_words = phrase.casefold().split()
    repeated = next(
        (n for n in range(min(len(words), len(phrase_words)), 1, -1)
         if words[-n:] == phrase_words[:n]),
        0,
    )  # fmt: skip
    if repeated or (asks and phrase.endswith("?")):
        fault = f"repeats {' '.join(words[-repeated:])!r} of" if repeated else "asks around"
        start = " ".join(before.split()[: len(words) - repeated])
        whole = f"{start} {{phrase}}".strip() if repeated else "{phrase}"
        raise BadRecord(
            "bad_text",
            f"the prompt {short(source.prompt)} {fault} the phrase {short(phrase)}: "
            f"set prompt = {whole!r}",
        )


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


def is_count(source: Source, answer: str) -> bool:
    """Returns whether an answer is a count, so that the question needs no room for its objects."""
    if source.suffix == "count":
        return True
    fields = [path.split(".")[-1] for path in placeholders(source.suffix)]
    return fields == ["count"] or (source.target == "text" and answer.isdecimal())


def format_answer(
    source: Source,
    record: Record,
    element: int,
    fractions: Float[np.ndarray, "K N"],
    labels: Sequence[str],
    codes: Sequence[str],
    size: tuple[int, int],
    count: int,
) -> str:
    """Returns the answer to a question, in the form that `source.suffix` names.

    Args:
      fractions: boxes or points of the objects that the answer names.
      labels: their names.
      codes: their `<segNNN>` tokens, or nothing.
      size: width and height of the image in pixels, for JSON.
      count: the number of objects of the record, for "count".
    """
    if source.suffix == "loc":
        return loc_text(fractions, labels, codes)
    if source.suffix == "count":
        return str(count)
    if source.suffix == "json":
        key = "point_2d" if source.target == "points" else "bbox_2d"
        return _json_text(fractions, labels, size, key)
    return _fill(source.suffix, record, source, element)


def _json_text(
    fractions: Float[np.ndarray, "K N"], labels: Sequence[str], size: tuple[int, int], key: str
) -> str:
    """Returns boxes or points as JSON, x before y, in whole pixels of the original image.

    A box is at least one pixel wide and high.
    """
    is_box = fractions.shape[1] == 4
    x_first = fractions[:, [1, 0, 3, 2] if is_box else [1, 0]].astype(np.float64)
    rows = whole_corners(x_first, size) if is_box else np.round(x_first * size).astype(np.int32)
    objects = [
        {key: numbers} | ({"label": label} if label else {})
        for numbers, label in zip(rows.tolist(), labels, strict=True)
    ]
    return json.dumps(objects, ensure_ascii=False)


def loc_text(
    fractions: Float[np.ndarray, "K N"], names: Sequence[str], codes: Sequence[str] = ()
) -> str:
    """Returns `<locYYYY><locXXXX>… name`, with " ; " between objects; a name "" is left out.

    The `<segNNN>` tokens of an object stand between its loc tokens and its name.

    `boxes.encode_loc` gives the bins, as in big_vision's pp/segmentation ops. A box is at
    least one bin wide and high.
    """
    texts = []
    is_box = fractions.ndim == 2 and fractions.shape[1] == 4
    rows = whole_corners(fractions) if is_box else encode_loc(fractions)
    tokens = codes or ("",) * len(names)
    for bins, name, mask in zip(rows.tolist(), names, tokens, strict=True):
        loc = "".join(f"<loc{code:04d}>" for code in bins) + mask
        texts.append(f"{loc} {name}" if name else loc)
    return " ; ".join(texts)


def to_yxyx(
    value: Any, box_format: str, size: tuple[int, int], widen: bool = False
) -> Float[np.ndarray, "K 4"]:
    """Returns one box or a list of boxes as `yxyx` fractions, clipped to [0, 1].

    Args:
      value: numbers as the record has them.
      box_format: `ORDER_UNIT`.
      size: width and height of the image in pixels.
      widen: gives a box in the image without width or height one pixel.

    Raises:
      BadRecord: bad_box if a box is not four finite numbers, has no area, or is outside the image.
    """
    rows = read_rows(value, box_format, 4).numbers
    if not len(rows):
        return np.zeros((0, 4), np.float32)
    fractions = to_fractions(rows, box_format, size)
    if widen:
        fractions = _widened(fractions, size)
    yxyx = np.clip(fractions, 0, 1).astype(np.float32)
    _check_boxes(rows, yxyx, fractions, box_format, size)
    return yxyx


def _check_boxes(
    rows: Float[np.ndarray, "K 4"],
    yxyx: Float[np.ndarray, "K 4"],
    fractions: Float[np.ndarray, "K 4"],
    box_format: str,
    size: tuple[int, int],
) -> None:
    """Raises BadRecord as `to_yxyx` does.

    Args:
      rows: boxes in the format.
      yxyx: the boxes in fractions, clipped.
      fractions: the boxes in fractions, before they were clipped.
    """
    is_flat = yxyx[:, 2:] <= yxyx[:, :2]
    is_far = np.abs(fractions - 0.5) > 0.5 + FAR_BEYOND
    order, unit = split_format(box_format)
    largest = np.abs(rows).max(1)
    # a box of zeros fits every unit; it is here only if boxes without area are allowed
    is_tiny = (largest > 0) & (largest <= 1) & (unit not in ("frac", "percent"))
    if not (is_flat.any() or is_far.any() or is_tiny.any()):
        return
    for i in np.flatnonzero(is_flat.any(1)).tolist():
        has_area = (fractions[i, 2:] > fractions[i, :2]).all()
        reason = f"is outside an image of {size_text(size)} pixels" if has_area else "has no area"
        has_no_side = (fractions[i, 2:] == fractions[i, :2]).any()
        others = "" if has_no_side else _fits_as(rows[i], box_format, size)
        raise BadRecord("bad_box", f"{row_text(rows, i)} as {box_format} {reason}{others}")
    for i in np.flatnonzero(is_tiny).tolist():
        raise BadRecord(
            "bad_box",
            f"{row_text(rows, i)} as {box_format} has no coordinate above 1; it fits as "
            f"{order}_frac",
        )
    for i in np.flatnonzero(is_far.any(1)).tolist():
        raise BadRecord(
            "bad_box",
            f"{row_text(rows, i)} as {box_format} reaches far beyond an image of "
            f"{size_text(size)} pixels{_fits_as(rows[i], box_format, size)}",
        )


def _fits_as(numbers: Float[np.ndarray, " N"], format_name: str, size: tuple[int, int]) -> str:
    """Returns `; it fits as xyxy_bin (box_format)` for the formats that fit, or ""."""
    setting = "box_format" if len(numbers) == 4 else "point_format"
    formats = fitting_formats(numbers, format_name, size)
    return f"{FITS_AS}{', '.join(formats)} ({setting})" if formats else ""


def _has_no_length(fractions: Float[np.ndarray, "K 4"]) -> Bool[np.ndarray, "K 2"]:
    """Returns which sides of each box, in y and x, lie in the image and have no length."""
    low, high = fractions[:, :2], fractions[:, 2:]
    return (low == high) & (low >= 0) & (low <= 1)


def _widened(
    fractions: Float[np.ndarray, "K 4"], size: tuple[int, int]
) -> Float[np.ndarray, "K 4"]:
    """Returns boxes with one pixel where a side in the image has no length."""
    is_flat = _has_no_length(fractions)
    if not is_flat.any():
        return fractions
    pixel = 1 / np.array(size[::-1])
    low, high = fractions[:, :2], fractions[:, 2:]
    first = np.where(is_flat, np.minimum(low, 1 - pixel), low)
    return np.concatenate([first, np.where(is_flat, first + pixel, high)], axis=1)


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
    rows = read_rows(value, point_format, 2).numbers
    if not len(rows):
        return np.zeros((0, 2), np.float32)
    yx = to_fractions(rows, point_format, size)
    pixel = 1 / np.array(size[::-1])
    for i in np.flatnonzero(((yx < -pixel) | (yx > 1 + pixel)).any(1)).tolist():
        reason = f"is outside an image of {size_text(size)} pixels"
        others = _fits_as(rows[i], point_format, size)
        raise BadRecord("bad_point", f"{row_text(rows, i)} as {point_format} {reason}{others}")
    return np.clip(yx, 0, 1).astype(np.float32)


def _objects(
    record: Record,
    source: Source,
    annotation: Annotation,
    element: int,
    frame: Frame,
    mask_size: int,
    folder: FilePath | None,
) -> Objects:
    """Returns the annotated objects in fractions of the upright image."""
    boxes, points = annotation.boxes, annotation.points
    widen = source.flat_boxes != "bad"
    fractions = to_yxyx(boxes.numbers, boxes.format, frame.size, widen)
    yxyx = turn_boxes(fractions, frame.orientation)
    yx = turn_points(to_yx(points.numbers, points.format, frame.size), frame.orientation)
    asks_points = source.target == "points"
    if asks_points and source.boxes and len(yxyx) != len(yx):
        raise BadRecord(
            "bad_box", f"{len(yxyx)} boxes for {len(yx)} points: each point needs its object's box"
        )
    count = len(yx if asks_points else yxyx)
    masks = np.zeros((0, mask_size, mask_size), bool)
    if (
        source.mask
        and mask_size
        and (source.boxes or source.points)  # else the mask belongs to the question
        and (count or not is_nothing(field_or_none(record, source.mask, element)))
    ):
        value = field_at(record, source.mask, element)
        masks = to_masks(value, count, frame.size, mask_size, folder, frame.orientation)
    objects = Objects(yxyx, yx, masks, annotation.labels or ("",) * count, annotation.codes)
    return _without_flat(objects, source, boxes, frame) if source.flat_boxes == "drop" else objects


def _without_flat(objects: Objects, source: Source, boxes: Rows, frame: Frame) -> Objects:
    """Returns the objects whose boxes have a width and a height.

    Raises:
      BadRecord: empty, if none is left and the source drops empty records.
    """
    fractions = to_fractions(boxes.numbers, boxes.format, frame.size)
    keep = np.flatnonzero(~_has_no_length(fractions).any(axis=1))
    if len(fractions) and not len(keep) and source.empty == "drop" and source.target == "boxes":
        raise BadRecord("empty", f"none of {len(fractions)} boxes has a width and a height")
    return _take(objects, keep) if len(objects.labels) == len(fractions) else objects


def _take(objects: Objects, indices: Int[np.ndarray, " n"]) -> Objects:
    """Returns the objects at increasing indices. Arrays of another length than the labels stay
    whole."""
    count = len(objects.labels)
    if len(indices) == count:
        return objects
    yxyx, yx, masks = (
        rows[indices] if len(rows) == count else rows
        for rows in (objects.yxyx, objects.yx, objects.masks)
    )
    labels = tuple(objects.labels[i] for i in indices)
    codes = tuple(objects.codes[i] for i in indices) if objects.codes else ()
    return Objects(yxyx, yx, masks, labels, codes)


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


def _to_labels(value: object, count: int) -> tuple[str, ...]:
    """Returns one name for each of `count` objects."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    names = value if isinstance(value, list | tuple) else [value] * count
    if len(names) != count:
        raise BadRecord("bad_text", f"{len(names)} labels for {count} objects")
    texts = []
    for name in names:
        is_fraction = isinstance(name, float | np.floating) and not float(name).is_integer()
        text = None if is_fraction else plain_text(name)
        if text is None or not text.strip():
            raise BadRecord("bad_text", f"the label {short(name)} is no text")
        texts.append(" ".join(text.split()))
    return tuple(texts)
