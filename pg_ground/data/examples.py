"""One record and the entry that describes it → `Example` → a row of a `Batch`. Box formats but `yxyx` end here."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from pg_ground.config import Data, Fetch, Source
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    check_format,
    format_names,
    to_fractions,
)
from pg_ground.data.fetch import cached, is_url
from pg_ground.data.masks import to_masks
from pg_ground.data.records import BadRecord, open_image
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import (
    BOXES,
    POINTS,
    TEXT,
    Batch,
    Boxes,
    Example,
    FilePath,
    Gold,
    Points,
    UserError,
    expand_path,
)
from pg_ground.vocab import LOC_MAX, PAD

TARGET_NAMES = {"boxes": BOXES, "points": POINTS, "text": TEXT}
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


def image_at(record: Mapping[str, Any], source: Source, element: int, fetch: Fetch | None) -> Any:
    """Returns what a record has for an image; the bytes, where that is an address to fetch from.

    Raises:
      BadRecord: missing_field, or what `fetch.cached` says of an address that cannot be had.
    """
    value = field_at(record, source.image, element)
    if not is_url(value) or fetch is None:
        return value
    return cached(
        value,
        field_at(record, source.image_sha256, element) if source.image_sha256 else None,
        fetch,
    )


class Targets(NamedTuple):
    """What a record says is to be found, as it says it: rows of numbers, and a name for each; "" for none."""

    boxes: Float[np.ndarray, "K 4"]
    points: Float[np.ndarray, "K 2"]
    labels: tuple[str, ...]


def to_example(
    record: Mapping[str, Any],
    source: Source,
    source_name: str,
    index: int,
    image_size: int,
    folder: FilePath | None,
    *,
    element: int = 0,
    seed: int = 0,
    resize_by: str = "antialias",
    mask_size: int = 0,
    fetch: Fetch | None = None,
) -> Example:
    """Returns the question that `record` holds, its image `image_size` pixels square.

    Boxes are clipped to the image. Runs of white space in prompt and name become single spaces. Objects that have the same name
    and the same loc bins count once. `source` is expected to have passed `check_formats`.

    Args:
      folder: folder that file names of images are relative to.
      element: which element of the list that `source`'s paths go through with `[]`.
      seed: of the choice of `source.max_objects`, with `index`.
      resize_by: one of `config.RESIZES`.
      mask_size: cells along each side of the objects' masks; 0 reads none.
      fetch: how images at http(s) addresses are had; None refuses them.

    Raises:
      BadRecord: missing_field, missing_image, corrupt_image, bad_box, bad_point, bad_mask, bad_text, or empty.
    """
    prompt, found = question(record, source, element)
    image = open_image(image_at(record, source, element, fetch), folder)
    size = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
    yxyx, yx = (
        to_yxyx(found.boxes, source.box_format, size),
        to_yx(found.points, source.point_format, size),
    )
    target = TARGET_NAMES[source.target]
    if target == POINTS and source.boxes and len(yxyx) != len(yx):
        raise BadRecord(
            "bad_box",
            f"{len(yxyx)} boxes for {len(yx)} points: each point needs the box it lies in",
        )
    asked = yx if target == POINTS else yxyx
    masks = np.zeros((0, mask_size, mask_size), bool)
    if source.mask and mask_size:
        masks = to_masks(
            field_at(record, source.mask, element), len(asked), size, mask_size, folder
        )
    labels = found.labels or ("",) * len(asked)
    kept = choose(asked, labels, source.max_objects, (seed, index, element))
    yxyx, yx, masks = (
        rows[kept] if len(rows) == len(asked) else rows for rows in (yxyx, yx, masks)
    )
    labels = tuple(labels[i] for i in kept)
    names = tuple(dict.fromkeys(label for label in labels if label))
    label = np.array([names.index(label) if label else 0 for label in labels], np.int32)
    box_label, point_label = (
        label if len(rows) == len(label) else np.zeros(len(rows), np.int32) for rows in (yxyx, yx)
    )
    return Example(
        image=resize(image, image_size, resize_by),
        size=size,
        prompt=prompt,
        suffix=answer(source, record, element, yx if target == POINTS else yxyx, labels, size),
        boxes=Boxes(yxyx, box_label, np.ones(len(yxyx), bool)),
        points=Points(yx, point_label, np.ones(len(yx), bool)),
        target=target if source.suffix == "loc" else TEXT,
        names=names,
        masks=masks,
        source=source_name,
        index=index,
    )


def question(record: Mapping[str, Any], source: Source, element: int) -> tuple[str, Targets]:
    """Returns the prompt of a record and what is to be found, without looking at its image.

    Raises:
      BadRecord: missing_field, bad_box, bad_point, bad_text, or empty for a record without targets that is to be dropped.
    """
    prompt = fill(source.prompt, record, source.phrase, element)
    if not prompt:
        raise BadRecord("bad_text", f"the prompt {source.prompt!r} comes out empty")
    labels: tuple[str, ...] = ()
    boxes, points = np.zeros((0, 4)), np.zeros((0, 2))
    if source.boxes:
        value = field_at(record, source.boxes, element)
        if isinstance(value, Mapping):
            value, labels = _by_label(value)
        boxes = _rows_of_numbers(value, 4, "bad_box")
    if source.points:
        points = _rows_of_numbers(_pairs(field_at(record, source.points, element)), 2, "bad_point")
    count = len(points if source.target == "points" else boxes)
    if not count and source.target != "text" and source.empty == "drop":
        raise BadRecord("empty", f"there are no {source.target}")
    if source.label:
        labels = _labels(field_at(record, source.label, element), count)
    elif not labels and source.name and count:
        labels = (fill(source.name, record, source.phrase, element),) * count
    return prompt, Targets(boxes, points, labels)


def choose(
    fractions: Float[np.ndarray, "K N"], labels: Sequence[str], limit: int, seed: Sequence[int]
) -> Int[np.ndarray, " kept"]:
    """Returns the objects that stay, in their order: of those alike in name and loc codes the first, and `limit` by chance."""
    if len(fractions) < 2:
        return np.arange(len(fractions))
    first: dict[tuple[str, bytes], int] = {}
    for i, (label, row) in enumerate(zip(labels, _loc_codes(fractions), strict=True)):
        first.setdefault((label, row.tobytes()), i)
    kept = np.array(sorted(first.values()), np.int64)
    if limit and len(kept) > limit:
        kept = np.sort(np.random.default_rng(seed).choice(kept, limit, replace=False))
    return kept


def answer(
    source: Source,
    record: Mapping[str, Any],
    element: int,
    fractions: Float[np.ndarray, "K N"],
    labels: Sequence[str],
    size: tuple[int, int],
) -> str:
    """Returns the answer to a question as `source.suffix` says it is written."""
    if source.suffix == "loc":
        return answer_text(fractions, labels)
    if source.suffix == "count":
        return str(len(fractions))
    if source.suffix == "json":
        order = [1, 0, 3, 2][: fractions.shape[1]] if len(fractions) else []
        key = "point_2d" if source.target == "points" else "bbox_2d"
        rows = [
            [round(float(row[axis]) * size[1 - axis % 2]) for axis in order] for row in fractions
        ]
        named = [
            {key: row} | ({"label": label} if label else {})
            for row, label in zip(rows, labels, strict=True)
        ]
        return json.dumps(named, ensure_ascii=False)
    return fill(source.suffix, record, source.phrase, element)


def field_at(record: Mapping[str, Any], path: str, element: int = 0) -> Any:
    """Returns what lies at the dotted `path`; through a list of objects, the list of what lies there in each.

    `objects.bbox` reads `{"objects": {"bbox": [..]}}` and `{"objects": [{"bbox": ..}, {"bbox": ..}]}` alike. `objects[].bbox` is
    that of one of them, number `element`.

    Raises:
      BadRecord: missing_field, with the fields that exist.
    """
    return _descend(record, path.split("."), path, element)


def listed_by(source: Source) -> str:
    """Returns the path of the list that the paths of `source` go through with `[]`; "" if they go through none.

    Raises:
      UserError: they go through several.
    """
    paths = [
        source.image,
        source.image_sha256,
        source.phrase,
        source.boxes,
        source.points,
        source.mask,
        source.label,
    ]
    for template in (source.prompt, source.name, source.suffix):
        paths += re.findall(r"\{([^{}]*)\}", template)
    lists = sorted({path.partition("[]")[0] for path in paths if "[]" in path})
    if len(lists) > 1 or any(path.count("[]") > 1 for path in paths):
        raise UserError(
            f"a source can go through one list with []: its paths go through {', '.join(lists)}, one inside another?"
        )
    return lists[0] if lists else ""


def elements(record: Mapping[str, Any], path: str) -> int:
    """Returns how many elements the list at `path` has.

    Raises:
      BadRecord: missing_field, or it is no list.
    """
    value = field_at(record, path)
    if not isinstance(value, list):
        raise BadRecord(
            "missing_field", f"{path} is {value!r:.60}, but {path}[] goes through a list"
        )
    return len(value)


def fill(template: str, record: Mapping[str, Any], phrase: str, element: int = 0) -> str:
    """Returns `template` with every `{field}` replaced by that field of `record`, in single spaces.

    A template that is the name of a Jinja file (NAME.jinja) is rendered, sandboxed, with the record's fields and `phrase`.

    Args:
      phrase: the dotted path that `{phrase}` stands for.

    Raises:
      BadRecord: missing_field, or bad_text if a field is no text or number.
      UserError: the Jinja file is missing or does not parse.
    """

    def text(match: re.Match[str]) -> str:
        path = phrase if match[1] == "phrase" else match[1]
        value = field_at(record, path, element)
        if (
            not isinstance(value, str | int | float)
            or isinstance(value, bool)
            or not str(value).strip()
        ):
            raise BadRecord(
                "bad_text", f"{path} is {value!r:.60}, which makes no text for {template!r}"
            )
        return str(value)

    if template.endswith(".jinja"):
        fields = dict(record)
        if _has(record, phrase, element):
            fields["phrase"] = field_at(record, phrase, element)
        return " ".join(_render(template, fields).split())
    return " ".join(re.sub(r"\{([^{}]*)\}", text, template).split())


def _has(record: Mapping[str, Any], path: str, element: int) -> bool:
    try:
        field_at(record, path, element)
    except BadRecord:
        return False
    return True


@functools.cache
def _template(path: str) -> jinja2.Template:
    """Returns the template in a file; its filters and attributes are those of Jinja's sandbox."""
    world = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        return world.from_string(Path(expand_path(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"prompt template {path}: {error.strerror or error}") from None
    except (jinja2.TemplateSyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"prompt template {path} is no Jinja: {error}") from None


def _render(path: str, fields: Mapping[str, Any]) -> str:
    template = _template(path)
    try:
        return template.render(fields)
    except jinja2.UndefinedError as error:
        kinds = ", ".join(map(str, fields)) or "none"
        raise BadRecord("missing_field", f"{path}: {error}; the fields are {kinds}") from None
    except (
        Exception
    ) as error:  # a template is a program of the user's: whatever it raises is about this record
        raise BadRecord(
            "bad_text", f"{path} does not render: {type(error).__name__}: {error}"
        ) from None


def to_yxyx(value: Any, box_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 4"]:
    """Returns one box or a list of boxes as `yxyx` fractions of an image of `size` (w, h) pixels, clipped to [0, 1].

    Raises:
      BadRecord: bad_box if one is not four finite numbers, has no area or lies outside the image.
    """
    if not len(value):
        return np.zeros((0, 4), np.float32)
    rows = _rows_of_numbers(value, 4, "bad_box")
    fractions = to_fractions(rows, box_format, size)
    yxyx = np.clip(fractions, 0, 1).astype(np.float32)
    for i in np.flatnonzero((yxyx[:, 2:] <= yxyx[:, :2]).any(1)).tolist():
        has_area = (fractions[i, 2:] > fractions[i, :2]).all()
        reason = f"lies outside an image of {_text(size)} pixels" if has_area else "has no area"
        raise BadRecord("bad_box", f"{_one_of(rows, i)} as {box_format} {reason}")
    return yxyx


def to_yx(value: Any, point_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 2"]:
    """Returns one point or a list of points as `yx` fractions of an image of `size` (w, h) pixels, in [0, 1].

    A point up to one pixel outside is moved to the border.

    Raises:
      BadRecord: bad_point if one is not two finite numbers or lies outside.
    """
    if not len(value):
        return np.zeros((0, 2), np.float32)
    rows = _rows_of_numbers(value, 2, "bad_point")
    yx = to_fractions(rows, point_format, size)
    pixel = 1 / np.array(size[::-1])
    for i in np.flatnonzero(((yx < -pixel) | (yx > 1 + pixel)).any(1)).tolist():
        raise BadRecord(
            "bad_point",
            f"{_one_of(rows, i)} as {point_format} lies outside an image of {_text(size)} pixels",
        )
    return np.clip(yx, 0, 1).astype(np.float32)


def answer_text(coordinates: Float[np.ndarray, "K N"], names: Sequence[str]) -> str:
    """Returns `<locYYYY><locXXXX>… name`, answers joined by " ; "; where the name is "", the loc tokens alone.

    A loc code is `clip(round_half_even(fraction * 1023), 0, 1023)` (big_vision pp/segmentation ops).
    """
    answers = ("".join(f"<loc{code:04d}>" for code in row) for row in _loc_codes(coordinates))
    return " ; ".join(
        f"{loc} {name}" if name else loc for loc, name in zip(answers, names, strict=True)
    )


def resize(
    image: Image.Image | UInt8[np.ndarray, "H W 3"], side: int, how: str = "antialias"
) -> UInt8[np.ndarray, "side side 3"]:
    """Returns `image` as a square of `side` pixels, aspect ratio not kept.

    "antialias" is Pillow's bilinear; "hugging_face" is bicubic, as its SigLIP processor; "big_vision" is bilinear without
    antialiasing and rounded down, as its RefCOCO recipe (tf.image.resize, half-pixel centres).
    """
    of_pillow = isinstance(image, Image.Image)
    if (image.size if of_pillow else image.shape[:2]) == (side, side):
        return np.asarray(image)
    if how == "big_vision":
        image = np.asarray(image)
        rows, columns = (_two_nearest(length, side) for length in image.shape[:2])
        image = _between(image.astype(np.float32), rows, 0)
        return np.clip(_between(image, columns, 1), 0, 255).astype(np.uint8)
    kernel = Image.Resampling.BICUBIC if how == "hugging_face" else Image.Resampling.BILINEAR
    return np.asarray((image if of_pillow else Image.fromarray(image)).resize((side, side), kernel))


def _two_nearest(
    length: int, side: int
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, " side"]]:
    """Returns for each new pixel the two old ones on its sides, and how far it lies towards the second."""
    at = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(length / side) - 0.5
    low = np.floor(at)
    first, second = (np.clip(i, 0, length - 1).astype(np.int64) for i in (low, low + 1))
    return first, second, (at - low).astype(np.float32)


def _between(
    image: Float[np.ndarray, "H W 3"], nearest_two: tuple[Any, Any, Any], axis: int
) -> Float[np.ndarray, "h w 3"]:
    first, second, share = nearest_two
    low, high = image.take(first, axis), image.take(second, axis)
    return low + (high - low) * (share[:, None, None] if axis == 0 else share[None, :, None])


def to_batch_row(example: Example, tokenizer: Tokenizer, data: Data, source_position: int) -> Batch:
    """Returns one row of a `Batch` (no B axis): fixed shapes, padded to `data`'s lengths.

    Raises:
      BadRecord: too_long or too_many_boxes, naming the setting to raise.
    """
    check_room(example, data)
    prompt, prompt_mask = _padded(
        tokenizer.prefix(example.prompt), data.prompt_length, "prompt_length", example.prompt
    )
    suffix, suffix_mask = _padded(
        tokenizer.suffix(example.suffix), data.suffix_length, "suffix_length", example.suffix
    )
    gold = Gold(
        boxes=Boxes(*(_slots(x, data.max_boxes) for x in example.boxes)),
        points=Points(*(_slots(x, data.max_boxes) for x in example.points)),
        target=np.asarray(example.target, np.int32),
        names=_name_ids(example.names, tokenizer, data),
        masks=_slots(example.masks, data.max_boxes),
    )
    return Batch(
        image=example.image,
        prompt=prompt,
        prompt_mask=prompt_mask,
        suffix=suffix,
        suffix_mask=suffix_mask,
        gold=gold,
        size=np.array(example.size, np.int32),
        source=np.asarray(source_position, np.int32),
        index=np.asarray(example.index, np.int32),
    )


def check_room(example: Example, data: Data) -> None:
    """Raises BadRecord (too_many_boxes) if the annotation does not fit into `data.max_boxes` slots."""
    for kind, count in (("boxes", len(example.boxes.yxyx)), ("points", len(example.points.yx))):
        if count > data.max_boxes:
            raise BadRecord(
                "too_many_boxes", f"{count} {kind}, but data.max_boxes is {data.max_boxes}"
            )


def _by_label(value: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the boxes of `{label: list of boxes}` in one list, and the label of each."""
    rows, labels = [], []
    for label, boxes in value.items():
        if not isinstance(boxes, list):
            raise BadRecord(
                "bad_box", f"{label!r} is {boxes!r:.60}, but it must be a list of boxes"
            )
        rows += boxes
        labels += [str(label)] * len(boxes)
    return rows, tuple(labels)


def _pairs(value: Any) -> Any:
    """Returns points given as {x, y} as pairs; anything else as it is."""
    points = [value] if isinstance(value, Mapping) else value
    if not (
        isinstance(points, list) and points and all(isinstance(point, Mapping) for point in points)
    ):
        return value
    lost = next((point for point in points if not {"x", "y"} <= point.keys()), None)
    if lost is not None:
        raise BadRecord("bad_point", f"{lost!r:.60} has no x and y")
    return [[point["x"], point["y"]] for point in points]


def _labels(value: Any, count: int) -> tuple[str, ...]:
    """Returns one name for each of `count` objects."""
    names = value if isinstance(value, list) else [value] * count
    if len(names) != count:
        raise BadRecord("bad_text", f"{len(names)} labels for {count} objects")
    wrong = [
        name
        for name in names
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip()
    ]
    if wrong:
        raise BadRecord("bad_text", f"the label {wrong[0]!r:.60} is no text")
    return tuple(" ".join(str(name).split()) for name in names)


def _descend(value: Any, names: Sequence[str], path: str, element: int) -> Any:
    if not names:
        return value
    if isinstance(value, list):
        return [_descend(item, names, path, element) for item in value]
    if not isinstance(value, Mapping):
        raise BadRecord(
            "missing_field", f"there is no {path}: {names[0]} is looked for in {value!r:.60}"
        )
    name = names[0].removesuffix("[]")
    if name not in value:
        raise BadRecord(
            "missing_field",
            f"there is no {path}: the fields are {', '.join(map(str, value)) or 'none'}",
        )
    inner = value[name]
    if names[0].endswith("[]"):
        if not isinstance(inner, list) or element >= len(inner):
            raise BadRecord(
                "missing_field",
                f"there is no {path}: {name} is {inner!r:.60}, and element {element} of it is wanted",
            )
        inner = inner[element]
    return _descend(inner, names[1:], path, element)


def _rows_of_numbers(value: Any, width: int, kind: str) -> Float[np.ndarray, "K width"]:
    """Returns one row of numbers, or a list of them, as an array."""
    try:
        rows = np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise BadRecord(kind, f"{_short(value)} is not {width} numbers, nor a list of such") from e
    if rows.size == 0 and rows.ndim <= 2:
        return np.zeros((0, width))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise BadRecord(kind, f"{_short(value)} is not {width} numbers, nor a list of such")
    for i in np.flatnonzero(~np.isfinite(rows).all(1)).tolist():
        raise BadRecord(kind, f"{_one_of(rows, i)} is not finite")
    return rows


def _one_of(rows: Float[np.ndarray, "K N"], i: int) -> str:
    """Returns row `i` in the source's own numbers, and which of several it is."""
    return f"[{', '.join(f'{v:g}' for v in rows[i])}]{f' (number {i + 1} of {len(rows)})' if len(rows) > 1 else ''}"


def _short(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.80}"


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _loc_codes(fractions: Float[np.ndarray, "K N"]) -> Int[np.ndarray, "K N"]:
    return np.clip(np.rint(fractions * LOC_MAX), 0, LOC_MAX).astype(np.int32)


def _padded(ids: list[int], length: int, setting: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    if len(ids) > length:
        raise BadRecord(
            "too_long", f"{len(ids)} tokens, but data.{setting} is {length}: {text!r:.80}"
        )
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    return row, np.arange(length) < len(ids)


def _slots(values: Any, count: int) -> np.ndarray:
    """Returns `values` with zeros behind them, `count` in all."""
    out = np.zeros((count, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out


def _name_ids(names: Iterable[str], tokenizer: Tokenizer, data: Data) -> Int[np.ndarray, "C W"]:
    """Returns the ids of each name as it reads behind a loc token, with its space in front."""
    out = np.full((data.max_boxes, data.suffix_length), PAD, np.int32)
    for row, name in zip(out, names, strict=False):
        ids = tokenizer.text(" " + name)
        row[: len(ids)] = ids
    return out
