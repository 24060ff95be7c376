"""One record and the entry that describes it → `Example` → a row of a `Batch`. Box formats but `yxyx` end here."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from pg_ground.config import Data, Source, nearest
from pg_ground.data.records import BadRecord, load_image
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import BOXES, POINTS, Batch, Boxes, Example, Gold, Points, UserError
from pg_ground.vocab import LOC_MAX, PAD

ASKS = {"boxes": BOXES, "points": POINTS}
UNITS = ("px", "frac", "percent", "bin")
BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh")
POINT_ORDERS = ("xy", "yx")


def check_formats(source: Source, source_name: str) -> None:
    """Raises UserError if `box_format` or `point_format` is none that exists."""
    for setting, value, orders in (
        ("box_format", source.box_format, BOX_ORDERS),
        ("point_format", source.point_format, POINT_ORDERS),
    ):
        formats = [f"{order}_{unit}" for order in orders for unit in UNITS]
        if value not in formats:
            raise UserError(f"source {source_name}: {setting} {value!r} does not exist: {nearest(value, formats)}")


def to_example(
    record: Mapping[str, Any], source: Source, source_name: str, index: int, image_size: int, root: Path | None
) -> Example:
    """Returns the question that `record` holds, its image `image_size` pixels square.

    Boxes are clipped to the image. Runs of white space in prompt and name become single spaces. `source` is expected to
    have passed `check_formats`.

    Args:
      root: folder of the records, which `source.image_root` is relative to.

    Raises:
      BadRecord: missing_field, missing_image, corrupt_image, bad_box, bad_point or bad_text.
    """
    prompt = fill(source.prompt, record, source.phrase)
    name = fill(source.name, record, source.phrase)
    if not prompt:
        raise BadRecord("bad_text", f"the prompt {source.prompt!r} comes out empty")
    pixels = load_image(field_at(record, source.image), root / source.image_root if root else None)
    size = (pixels.shape[1], pixels.shape[0])
    yxyx, yx = np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32)
    if source.boxes:
        yxyx = to_yxyx(field_at(record, source.boxes), source.box_format, size)
    if source.points:
        yx = to_yx(field_at(record, source.points), source.point_format, size)
    asks = ASKS[source.asks]
    if asks == POINTS and source.boxes and len(yxyx) != len(yx):
        raise BadRecord("bad_box", f"{len(yxyx)} boxes for {len(yx)} points: each point needs the box it lies in")
    return Example(
        image=resize(pixels, image_size),
        size=size,
        prompt=prompt,
        suffix=answer_text(yxyx if asks == BOXES else yx, name),
        boxes=Boxes(yxyx, np.zeros(len(yxyx), np.int32), np.ones(len(yxyx), bool)),
        points=Points(yx, np.zeros(len(yx), np.int32), np.ones(len(yx), bool)),
        asks=asks,
        names=(name,) if name else (),
        source=source_name,
        index=index,
    )


def field_at(record: Mapping[str, Any], path: str) -> Any:
    """Returns what lies at the dotted `path`; through a list of objects, the list of what lies there in each.

    `objects.bbox` reads `{"objects": {"bbox": [..]}}` and `{"objects": [{"bbox": ..}, {"bbox": ..}]}` alike.

    Raises:
      BadRecord: missing_field, with the fields that exist.
    """
    return _descend(record, path.split("."), path)


def fill(template: str, record: Mapping[str, Any], phrase: str) -> str:
    """Returns `template` with every `{field}` replaced by that field of `record`, in single spaces.

    Args:
      phrase: the dotted path that `{phrase}` stands for.

    Raises:
      BadRecord: missing_field, or bad_text if a field is no text or number.
    """

    def text(match: re.Match[str]) -> str:
        path = phrase if match[1] == "phrase" else match[1]
        value = field_at(record, path)
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise BadRecord("bad_text", f"{path} is {value!r:.60}, which makes no text for {template!r}")
        return str(value)

    return " ".join(re.sub(r"\{([^{}]*)\}", text, template).split())


def to_yxyx(value: Any, box_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 4"]:
    """Returns one box or a list of boxes as `yxyx` fractions of an image of `size` (w, h) pixels, clipped to [0, 1].

    Raises:
      BadRecord: bad_box if there is none, or one is not four finite numbers or has no area inside the image.
    """
    order, unit = box_format.rsplit("_", 1)
    a, b, c, d = _rows_of_numbers(value, 4, "bad_box").T
    if order == "xyxy":
        edges = (a, b, c, d)
    elif order == "yxyx":
        edges = (b, a, d, c)
    elif order == "xywh":
        edges = (a, b, a + c, b + d)
    else:
        edges = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    x1, y1, x2, y2 = edges
    yxyx = np.clip(np.stack([y1, x1, y2, x2], 1) / _one(unit, size)[[1, 0, 1, 0]], 0, 1).astype(np.float32)
    flat = (yxyx[:, 2] <= yxyx[:, 0]) | (yxyx[:, 3] <= yxyx[:, 1])
    if flat.any():
        raise BadRecord("bad_box", f"{value!r:.80} as {box_format} has no area in an image of {_text(size)} pixels")
    return yxyx


def to_yx(value: Any, point_format: str, size: tuple[int, int]) -> Float[np.ndarray, "K 2"]:
    """Returns one point or a list of points as `yx` fractions of an image of `size` (w, h) pixels, in [0, 1].

    A point up to one pixel outside is moved to the border.

    Raises:
      BadRecord: bad_point if there is none, or one is not two finite numbers or lies outside.
    """
    order, unit = point_format.rsplit("_", 1)
    rows = _rows_of_numbers(value, 2, "bad_point")
    yx = (rows if order == "yx" else rows[:, ::-1]) / _one(unit, size)[::-1]
    pixel = 1 / np.array(size[::-1])
    if ((yx < -pixel) | (yx > 1 + pixel)).any():
        raise BadRecord("bad_point", f"{value!r:.80} as {point_format} is outside an image of {_text(size)} pixels")
    return np.clip(yx, 0, 1).astype(np.float32)


def answer_text(coordinates: Float[np.ndarray, "K N"], name: str) -> str:
    """Returns `<locYYYY><locXXXX>… name`, answers joined by " ; "; without a name, the loc tokens alone.

    A loc code is `clip(round_half_even(fraction * 1023), 0, 1023)` (big_vision pp/segmentation ops).
    """
    behind = f" {name}" if name else ""
    return " ; ".join("".join(f"<loc{code:04d}>" for code in row) + behind for row in _loc_codes(coordinates))


def resize(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Returns `image` as a square of `side` pixels: Pillow's antialiased bilinear, aspect ratio not kept."""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def to_batch_row(example: Example, tokenizer: Tokenizer, data: Data, source_position: int) -> Batch:
    """Returns one row of a `Batch` (no B axis): fixed shapes, padded to `data`'s lengths.

    Raises:
      BadRecord: too_long or too_many_boxes, naming the setting to raise.
    """
    check_room(example, data)
    prompt, prompt_mask = _padded(tokenizer.prefix(example.prompt), data.prompt_length, "prompt_length", example.prompt)
    suffix, suffix_mask = _padded(tokenizer.suffix(example.suffix), data.suffix_length, "suffix_length", example.suffix)
    gold = Gold(
        boxes=Boxes(*(_slots(x, data.max_boxes) for x in example.boxes)),
        points=Points(*(_slots(x, data.max_boxes) for x in example.points)),
        asks=np.asarray(example.asks, np.int32),
        names=_name_ids(example.names, tokenizer, data),
    )
    return Batch(
        image=example.image.astype(np.float32) / 127.5 - 1,
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
            raise BadRecord("too_many_boxes", f"{count} {kind}, but data.max_boxes is {data.max_boxes}")


def _descend(value: Any, names: Sequence[str], path: str) -> Any:
    if not names:
        return value
    if isinstance(value, list):
        return [_descend(item, names, path) for item in value]
    if not isinstance(value, Mapping):
        raise BadRecord("missing_field", f"there is no {path}: {names[0]} is looked for in {value!r:.60}")
    if names[0] not in value:
        raise BadRecord("missing_field", f"there is no {path}: the fields are {', '.join(map(str, value)) or 'none'}")
    return _descend(value[names[0]], names[1:], path)


def _rows_of_numbers(value: Any, width: int, kind: str) -> Float[np.ndarray, "K width"]:
    """Returns one row of numbers, or a list of them, as an array."""
    try:
        rows = np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise BadRecord(kind, f"{value!r:.80} is not {width} numbers, nor a list of such") from e
    rows = rows[None] if rows.ndim == 1 and rows.size else rows
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise BadRecord(kind, f"{value!r:.80} is not {width} numbers, nor a list of such")
    if not np.isfinite(rows).all():
        raise BadRecord(kind, f"{value!r:.80} is not finite")
    return rows


def _one(unit: str, size: tuple[int, int]) -> Float[np.ndarray, " 2"]:
    """Returns what the whole width and the whole height are in `unit`."""
    whole = {"px": size, "frac": (1, 1), "percent": (100, 100), "bin": (LOC_MAX, LOC_MAX)}
    return np.array(whole[unit], np.float64)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _loc_codes(fractions: Float[np.ndarray, "K N"]) -> Int[np.ndarray, "K N"]:
    return np.clip(np.rint(fractions * LOC_MAX), 0, LOC_MAX).astype(np.int32)


def _padded(ids: list[int], length: int, setting: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    if len(ids) > length:
        raise BadRecord("too_long", f"{len(ids)} tokens, but data.{setting} is {length}: {text!r:.80}")
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
