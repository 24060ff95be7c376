"""Somebody's predictions → rows: by dotted field paths and formats, with counts for what is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground.boxes import host_boxes, is_proper
from pg_ground.config import nearest
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    check_format,
    format_names,
    to_pixels,
)
from pg_ground.evals.benchmarks import benchmark_of
from pg_ground.evals.box_format_check import check_box_format
from pg_ground.evals.rows import GIVEN, check_unique
from pg_ground.rewards import locations, parsers
from pg_ground.types import UserError

USUAL: dict[str, tuple[str, ...]] = {
    "pred": (),
    "gold": (),
    "id": ("id", "question_id"),
    "image": ("image", "image_path", "image_id", "img_filename"),
    "prompt": ("question", "prompt", "expression"),
    "text": ("model_output", "output", "response", "text"),
    "width": ("image_width", "width"),
    "height": ("image_height", "height"),
    "size": ("size_px", "img_size"),
    "choices": ("choices",),
    "task": ("task",),
    "source": ("source",),
    "masks": ("masks",),
    "rollout": ("rollout",),
}
"""What --fields may name, and where it is looked for otherwise. What is predicted and what is gold has to be said."""


class Formats(NamedTuple):
    """How coordinates are written; `<loc>` tokens are always bins, y before x."""

    boxes: str = "xyxy_px"
    points: str = "xy_px"
    gold: str = ""
    """Of the gold ones, where it is another."""


def parse_fields(text: str) -> dict[str, str]:
    """Returns the dotted paths of `pred=a.b,gold=c`.

    Raises:
      UserError: it is not of that form, or names what there is not.
    """
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, path = (piece.strip() for piece in part.partition("="))
        if not equals or not path:
            raise UserError(
                f"--fields={text}: {part!r} is not name=path, as in pred=extracted_answer,gold=ground_truth"
            )
        if name not in USUAL:
            raise UserError(f"--fields={text}: {name} does not exist: {nearest(name, USUAL)}")
        found[name] = path
    return found


def read(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    benchmark: str,
    given: Mapping[str, str],
    formats: Formats,
) -> list[dict[str, Any]]:
    """Returns the rows of a file.

    Raises:
      UserError: fields are missing, ids come twice, gold answers cannot be read, or boxes are in another frame than gold.
    """
    kind = benchmark_of(benchmark, "--benchmark").kind
    if kind == "mask":
        raise UserError(
            f"--benchmark={benchmark} takes a predictions.jsonl of this package alone: it holds the masks that codes stand for"
        )
    wanted = ("pred",) if kind == "reward" else ("pred", "gold")
    for name in wanted:
        if name not in given:
            raise UserError(
                f"--fields must say where {name} is, as in pred=extracted_answer,gold=ground_truth; "
                f"the first row of {path} has {', '.join(map(str, records[0])) or 'no fields'}"
            )
    usual = {
        name: next((path for path in paths if path in records[0]), "")
        for name, paths in USUAL.items()
    }
    fields = {name: path for name, path in (usual | dict(given)).items() if path}
    _check_formats(formats)
    columns = {name: _column(records, field, path, name in given) for name, field in fields.items()}
    if "id" in columns:
        by = list(zip(columns["id"], columns.get("rollout", [0] * len(records)), strict=True))
        check_unique(by if "rollout" in columns else columns["id"], path, fields["id"])
    sizes = _sizes(columns, len(records))
    reader = _Reader(kind, formats, path, columns, sizes)
    gold, predictions = reader.gold(), reader.predictions()
    if kind in ("box", "boxes", "detection", "click"):
        reader.check_box_format(gold)
    rows = []
    for index in range(len(records)):
        at = {name: values[index] for name, values in columns.items()}
        said = at["pred"] if isinstance(at["pred"], str) else at.get("text", "")
        rows.append(
            {
                "source": "",
                "benchmark": benchmark,
                "id": at.get("id", index),
                "image": at.get("image") if isinstance(at.get("image"), str | int) else None,
                "size_px": sizes[index],
                "mode": GIVEN,
                "rollout": at.get("rollout", 0),
                "prompt": at.get("prompt", ""),
                "text": said,
                "prediction": predictions[index],
                "gold": gold[index],
            }
            | ({"reward": parsers.number(at["pred"], strict=False)} if kind == "reward" else {})
        )
    return rows


def _check_formats(formats: Formats) -> None:
    check_format(formats.boxes, "--box-format", format_names(BOX_ORDERS))
    check_format(formats.points, "--point-format", format_names(POINT_ORDERS))
    if formats.gold:
        check_format(formats.gold, "--gold-format", format_names((*BOX_ORDERS, *POINT_ORDERS)))


def _column(
    records: Sequence[Mapping[str, Any]], field: str, path: Path, needed: bool
) -> list[Any]:
    found, lacking = [], []
    for index, record in enumerate(records):
        value: Any = record
        for name in [field] if field in record else field.split("."):
            if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            elif isinstance(value, Mapping) and name in value:
                value = value[name]
            else:
                lacking.append(index)
                value = None
                break
        found.append(value)
    if lacking and needed:
        raise UserError(
            f"--predictions={path}: {len(lacking)} of {len(records)} rows have no {field}, first row {lacking[0]}, "
            f"which has {', '.join(map(str, records[lacking[0]])) or 'no fields'}"
        )
    return found


def _sizes(columns: Mapping[str, Sequence[Any]], count: int) -> list[list[float] | None]:
    if "width" in columns and "height" in columns:
        pairs: Sequence[Any] = list(zip(columns["width"], columns["height"], strict=True))
    else:
        pairs = columns.get("size", [None] * count)
    found: list[list[float] | None] = []
    for pair in pairs:
        numbers = (
            [parsers.number(side, strict=False) for side in pair]
            if isinstance(pair, list | tuple) and len(pair) == 2
            else []
        )
        whole = [side for side in numbers if side is not None and side > 0]
        found.append(whole if len(whole) == 2 else None)
    return found


class _Reader(NamedTuple):
    """The columns of a file, and how its answers are to be read."""

    kind: str
    formats: Formats
    path: Path
    columns: Mapping[str, Sequence[Any]]
    sizes: Sequence[list[float] | None]

    def form(self) -> str:
        """Returns the format of what is predicted."""
        return self.formats.points if self.kind in ("points", "click") else self.formats.boxes

    def gold_form(self) -> str:
        """Returns the format of what is gold."""
        return self.formats.gold or (
            self.formats.points if self.kind == "points" else self.formats.boxes
        )

    def gold(self) -> list[dict[str, Any]]:
        """Returns the gold answers; an annotation that cannot be read is an error, not a question."""
        of_points = self.kind == "points" and self.gold_form().partition("_")[0] in POINT_ORDERS
        found, wrong = [], []
        for index in range(len(self.sizes)):
            gold = self._gold_of(index, of_points)
            found.append(gold)
            if gold is None:
                wrong.append(index)
        if wrong:
            what = "one box" if self.kind in ("box", "click") else "an answer that can be read"
            value = self.columns["gold"][wrong[0]]
            raise UserError(
                f"--predictions={self.path}: the gold of {len(wrong)} of {len(found)} rows is not {what}, first row {wrong[0]}: "
                f"{value!r:.80}"
            )
        return found

    def _gold_of(self, index: int, of_points: bool) -> dict[str, Any] | None:
        if self.kind == "reward":
            return {}
        value = self.columns["gold"][index]
        if self.kind == "count":
            said = parsers.number(value, strict=False)
            return None if said is None else {"number": said}
        if self.kind == "text":
            return {"text": parsers.words(value)}
        if self.kind == "choice":
            choices = self._choices(index)
            letter = parsers.option(value, choices, strict=False)
            about = {
                name: self.columns[name][index]
                for name in ("task", "source")
                if name in self.columns
            }
            return None if letter is None else {"choice": letter, "choices": choices, **about}
        if of_points:
            points = self._located(value, 2, self.gold_form(), index, self.form())
            masks = {"masks": self.columns["masks"][index]} if "masks" in self.columns else {}
            return (
                None if any(one["xy_px"] is None for one in points) else {"points": points, **masks}
            )
        boxes = self._located(value, 4, self.gold_form(), index, self.form())
        proper = is_proper(host_boxes(one["xyxy_px"] for one in boxes))
        if not proper.all() or (self.kind in ("box", "click") and len(boxes) != 1):
            return None
        return {"boxes": boxes}

    def predictions(self) -> list[dict[str, Any]]:
        """Returns what is answered; what cannot be read stays an answer."""
        return [
            self._prediction_of(index, value) for index, value in enumerate(self.columns["pred"])
        ]

    def _prediction_of(self, index: int, value: Any) -> dict[str, Any]:
        if self.kind == "reward":
            return {}
        if self.kind == "count":
            return {"number": parsers.number(value, strict=False)}
        if self.kind == "text":
            return {"text": parsers.words(value)}
        if self.kind == "choice":
            return {"choice": parsers.option(value, self._choices(index), strict=False)}
        if self.kind in ("points", "click"):
            points = self._located(value, 2, self.formats.points, index, self.gold_form())
            boxes = (
                []
                if self.kind == "points"
                else self._located(value, 4, self.formats.boxes, index, self.gold_form())
            )
            boxes = [one for one in boxes if one["xyxy_px"] is not None]
            return {"points": [] if boxes else points, "boxes": boxes}
        return {"boxes": self._located(value, 4, self.formats.boxes, index, self.gold_form())}

    def _choices(self, index: int) -> list[str]:
        found = self.columns["choices"][index] if "choices" in self.columns else None
        return list(map(str, found)) if isinstance(found, list) else []

    def _located(
        self, value: Any, width: int, form: str, index: int, other: str
    ) -> list[dict[str, Any]]:
        key = "xyxy_px" if width == 4 else "xy_px"
        found = []
        for place in locations.read_any(value, width):
            written = ("yxyx_bin" if width == 4 else "yx_bin") if place.is_loc else form
            numbers = (
                None
                if place.numbers is None
                else to_pixels(place.numbers, written, self._size(index, written, other))
            )
            score = {} if place.score is None else {"score": place.score}
            found.append({"label": place.label, key: numbers, **score})
        return found

    def _size(self, index: int, form: str, other: str) -> list[float]:
        """Returns the size of a row's image; without one, fractions are those of a 1 x 1 image, and pixels are pixels.

        Args:
          other: the format of what stands against it.
        """
        size = self.sizes[index]
        if size is None and not form.endswith("_px") and other.endswith("_px"):
            raise UserError(
                f"--predictions={self.path}: {form} stands against {other}, and the size of row {index}'s image is not known: "
                f"--fields=…,width=W,height=H (or size=…)"
            )
        return size or [1.0, 1.0]

    def check_box_format(self, gold: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError where the boxes answered are in another frame than the gold ones."""
        pairs = [
            (place.numbers, one["xyxy_px"], self.sizes[i])
            for i, value in enumerate(self.columns["pred"])
            for place, one in zip(
                locations.read_any(value, 4), gold[i]["boxes"], strict=False
            )  # as they are written
            if place.numbers is not None and not place.is_loc and any(place.numbers)
        ]
        given, theirs, sizes = (
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            [pair[2] for pair in pairs],
        )
        check_box_format(given, theirs, sizes, self.formats.boxes, self.gold_form())
