"""Reads a file of predictions that another program wrote, by the paths of its fields."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.boxes import host_boxes, is_proper
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    check_format,
    format_names,
    to_pixels,
)
from pg_ground.evals.benchmarks import find_benchmark
from pg_ground.evals.box_format_check import check_box_format
from pg_ground.evals.rows import FROM_FILE, check_unique
from pg_ground.readers import locations, parsers
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError, nearest

USUAL_PATHS: dict[str, tuple[str, ...]] = {
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
"""The names that --fields may give a path for, each with the paths that are tried otherwise.

The paths of `pred` and `gold` must be given.
"""

FIELDS_EXAMPLE = "pred=extracted_answer,gold=ground_truth"


class Formats(NamedTuple):
    """Formats of the coordinates in a file. `<loc>` tokens are always bins, y before x."""

    boxes: str = "xyxy_px"
    points: str = "xy_px"
    gold: str = ""
    """Format of the ground truth. "" is the format of the predictions."""


def parse_fields(text: str) -> dict[str, str]:
    """Returns the dotted path of each name in `pred=a.b,gold=c`.

    Raises:
      UserError: the text does not have this form, or a name does not exist.
    """
    paths: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, path = (piece.strip() for piece in part.partition("="))
        if not equals or not path:
            raise UserError(f"--fields={text}: {part!r} is not name=path, as in {FIELDS_EXAMPLE}")
        if name not in USUAL_PATHS:
            raise UserError(f"--fields={text}: {name} does not exist: {nearest(name, USUAL_PATHS)}")
        paths[name] = path
    return paths


def read_rows(
    records: Sequence[JsonObject],
    path: FilePath,
    benchmark: str,
    fields: Mapping[str, str],
    formats: Formats,
) -> list[JsonDict]:
    """Returns the rows of the records of a file.

    Args:
      records: the records of the file.
      path: the file, for error messages.
      benchmark: name of the benchmark.
      fields: the result of `parse_fields`.
      formats: the formats of the coordinates.

    Raises:
      UserError: fields are missing, ids are not unique, the ground truth cannot be read, or the
        boxes are in another format than the ground truth.
    """
    kind = find_benchmark(benchmark, "--benchmark").kind
    _check_fields(kind, benchmark, fields, records[0], path)
    _check_formats(formats)
    columns = _read_columns(records, fields, path)
    sizes = _image_sizes(columns, len(records))
    reader = _AnswerReader(kind, formats, path, columns, sizes)
    gold = reader.read_gold()
    predictions = [reader.read_prediction(index) for index in range(len(records))]
    if kind in ("box", "boxes", "detection", "click"):
        reader.check_box_format(gold)
    rows = []
    for index in range(len(records)):
        values = {name: column[index] for name, column in columns.items()}
        row = {
            **_question_fields(values, index),
            "benchmark": benchmark,
            "size_px": sizes[index],
            "prediction": predictions[index],
            "gold": gold[index],
        }
        if kind == "reward":
            row["reward"] = parsers.number(values["pred"], strict=False)
        rows.append(row)
    return rows


def _question_fields(values: JsonObject, index: int) -> JsonDict:
    """Returns the fields of a row that do not depend on the benchmark.

    Args:
      values: the values of the record, by name.
      index: number of the record. It is the id of a record without an id.
    """
    image, prediction = values.get("image"), values["pred"]
    return {
        "source": "",
        "id": values.get("id", index),
        "image": image if isinstance(image, str | int) else None,
        "mode": FROM_FILE,
        "rollout": values.get("rollout", 0),
        "prompt": values.get("prompt", ""),
        "text": prediction if isinstance(prediction, str) else values.get("text", ""),
    }


def _check_fields(
    kind: str,
    benchmark: str,
    fields: Mapping[str, str],
    first_record: JsonObject,
    path: FilePath,
) -> None:
    """Raises UserError if the benchmark cannot be computed from these fields."""
    if kind == "mask":
        raise UserError(
            f"--benchmark={benchmark} takes only a predictions.jsonl of this package, because it "
            f"holds decoded masks"
        )
    for name in ("pred",) if kind == "reward" else ("pred", "gold"):
        if name not in fields:
            present = ", ".join(map(str, first_record)) or "no fields"
            raise UserError(
                f"--fields must give the path of {name}, as in {FIELDS_EXAMPLE}; the first row of "
                f"{path} has {present}"
            )


def _check_formats(formats: Formats) -> None:
    check_format(formats.boxes, "--box-format", format_names(BOX_ORDERS))
    check_format(formats.points, "--point-format", format_names(POINT_ORDERS))
    if formats.gold:
        check_format(formats.gold, "--gold-format", format_names((*BOX_ORDERS, *POINT_ORDERS)))


def _read_columns(
    records: Sequence[JsonObject], fields: Mapping[str, str], path: FilePath
) -> dict[str, list[Any]]:
    """Returns the values of all records, by name. Names that the file does not have are absent."""
    usual = {
        name: next((path for path in paths if path in records[0]), "")
        for name, paths in USUAL_PATHS.items()
    }
    paths = {name: field for name, field in (usual | dict(fields)).items() if field}
    columns = {
        name: _read_column(records, field, path, is_required=name in fields)
        for name, field in paths.items()
    }
    if "id" in columns and "rollout" in columns:
        keys: Sequence[Any] = list(zip(columns["id"], columns["rollout"], strict=True))
        check_unique(keys, path, paths["id"])
    elif "id" in columns:
        check_unique(columns["id"], path, paths["id"])
    return columns


def _read_column(
    records: Sequence[JsonObject], field: str, path: FilePath, is_required: bool
) -> list[Any]:
    """Returns the value of each record at a dotted path. A record without the field has None.

    Raises:
      UserError: `is_required`, and a record does not have the field.
    """
    values, lacking = [], []
    for index, record in enumerate(records):
        try:
            values.append(_value_at(record, field))
        except LookupError:
            values.append(None)
            lacking.append(index)
    if lacking and is_required:
        present = ", ".join(map(str, records[lacking[0]])) or "no fields"
        raise UserError(
            f"--predictions={path}: {len(lacking)} of {len(records)} rows have no {field}, "
            f"first row {lacking[0]}, which has {present}"
        )
    return values


def _value_at(record: JsonObject, field: str) -> Any:
    """Returns the value at a dotted path. Numbers in the path are positions in lists.

    Raises:
      LookupError: the record has no such field.
    """
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if isinstance(value, list) and name.isdecimal():
            value = value[int(name)]
        elif isinstance(value, Mapping):
            value = value[name]
        else:
            raise LookupError(name)
    return value


def _image_sizes(columns: Mapping[str, Sequence[Any]], count: int) -> list[list[float] | None]:
    """Returns [width, height] of each image, or None if the file does not have it."""
    if "width" in columns and "height" in columns:
        pairs: Sequence[Any] = list(zip(columns["width"], columns["height"], strict=True))
    else:
        pairs = columns.get("size", [None] * count)
    return [_image_size(pair) for pair in pairs]


def _image_size(pair: object) -> list[float] | None:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    sides = [parsers.number(side, strict=False) for side in pair]
    positive = [side for side in sides if side is not None and side > 0]
    return positive if len(positive) == 2 else None


class _AnswerReader(NamedTuple):
    """The columns of a file, and the formats of its answers."""

    kind: str
    formats: Formats
    path: FilePath
    columns: Mapping[str, Sequence[Any]]
    sizes: Sequence[list[float] | None]

    @property
    def prediction_format(self) -> str:
        """Format of the predictions: of points or of boxes."""
        return self.formats.points if self.kind in ("points", "click") else self.formats.boxes

    @property
    def gold_format(self) -> str:
        """Format of the ground truth."""
        default = self.formats.points if self.kind == "points" else self.formats.boxes
        return self.formats.gold or default

    def read_gold(self) -> list[JsonDict]:
        """Returns the ground truth of each row.

        Raises:
          UserError: the ground truth of a row cannot be read. A prediction that cannot be read is
            only a wrong answer.
        """
        gold = [self._gold_answer(index) for index in range(len(self.sizes))]
        wrong = [index for index, answer in enumerate(gold) if answer is None]
        if wrong:
            expected = "one box" if self.kind in ("box", "click") else "an answer that can be read"
            value = self.columns["gold"][wrong[0]]
            raise UserError(
                f"--predictions={self.path}: the gold of {len(wrong)} of {len(gold)} rows is not "
                f"{expected}, first row {wrong[0]}: {value!r:.80}"
            )
        return [answer for answer in gold if answer is not None]

    def _gold_answer(self, index: int) -> JsonDict | None:
        """Returns the ground truth of a row, or None if it cannot be read."""
        if self.kind == "reward":
            return {}
        value = self.columns["gold"][index]
        if self.kind == "count":
            number = parsers.number(value, strict=False)
            return None if number is None else {"number": number}
        if self.kind == "text":
            return {"text": parsers.words(value)}
        if self.kind == "choice":
            return self._gold_choice(value, index)
        if self.kind == "points" and self.gold_format.partition("_")[0] in POINT_ORDERS:
            return self._gold_points(value, index)
        boxes = self._objects(value, 4, self.gold_format, index, self.prediction_format)
        proper = is_proper(host_boxes(box["xyxy_px"] for box in boxes))
        if not proper.all() or (self.kind in ("box", "click") and len(boxes) != 1):
            return None
        return {"boxes": boxes}

    def _gold_choice(self, value: object, index: int) -> JsonDict | None:
        choices = self._choices(index)
        letter = parsers.option(value, choices, strict=False)
        if letter is None:
            return None
        names = [name for name in ("task", "source") if name in self.columns]
        labels = {name: self.columns[name][index] for name in names}
        return {"choice": letter, "choices": choices, **labels}

    def _gold_points(self, value: object, index: int) -> JsonDict | None:
        points = self._objects(value, 2, self.gold_format, index, self.prediction_format)
        if any(point["xy_px"] is None for point in points):
            return None
        masks = {"masks": self.columns["masks"][index]} if "masks" in self.columns else {}
        return {"points": points, **masks}

    def read_prediction(self, index: int) -> JsonDict:
        """Returns the prediction of a row. An unreadable object stays, without coordinates."""
        value = self.columns["pred"][index]
        if self.kind == "reward":
            return {}
        if self.kind == "count":
            return {"number": parsers.number(value, strict=False)}
        if self.kind == "text":
            return {"text": parsers.words(value)}
        if self.kind == "choice":
            return {"choice": parsers.option(value, self._choices(index), strict=False)}
        if self.kind not in ("points", "click"):
            boxes = self._objects(value, 4, self.formats.boxes, index, self.gold_format)
            return {"boxes": boxes}
        points = self._objects(value, 2, self.formats.points, index, self.gold_format)
        if self.kind == "points":
            return {"points": points, "boxes": []}
        boxes = self._objects(value, 4, self.formats.boxes, index, self.gold_format)
        boxes = [box for box in boxes if box["xyxy_px"] is not None]
        return {"points": [] if boxes else points, "boxes": boxes}

    def _choices(self, index: int) -> list[str]:
        choices = self.columns["choices"][index] if "choices" in self.columns else None
        return list(map(str, choices)) if isinstance(choices, list) else []

    def _objects(
        self, value: object, width: int, format_name: str, index: int, other_format: str
    ) -> list[JsonDict]:
        """Returns the boxes (`width` 4) or points (`width` 2) of a value, in pixels.

        Args:
          other_format: the format of the answers that these objects are compared with.
        """
        key, loc_format = ("xyxy_px", "yxyx_bin") if width == 4 else ("xy_px", "yx_bin")
        objects = []
        for location in locations.read_any(value, width):
            coordinates = None
            if location.numbers is not None:
                written_format = loc_format if location.is_loc else format_name
                size = self._size(index, written_format, other_format)
                coordinates = to_pixels(location.numbers, written_format, size)
            score = {} if location.score is None else {"score": location.score}
            objects.append({"label": location.label, key: coordinates, **score})
        return objects

    def _size(self, index: int, format_name: str, other_format: str) -> list[float]:
        """Returns the size of the image of a row.

        Without a known size it is 1 x 1: pixels stay pixels, and fractions stay fractions.

        Raises:
          UserError: the size is not known, but fractions are compared with pixels.
        """
        size = self.sizes[index]
        is_fraction = not format_name.endswith("_px")
        if size is None and is_fraction and other_format.endswith("_px"):
            raise UserError(
                f"--predictions={self.path}: {format_name} is compared with {other_format}, but "
                f"the size of row {index}'s image is not known: --fields=…,width=W,height=H "
                f"(or size=…)"
            )
        return size or [1.0, 1.0]

    def check_box_format(self, gold: Sequence[JsonObject]) -> None:
        """Raises UserError if the predicted boxes are in another format than the ground truth.

        Boxes are paired in the order in which they are written. Loc tokens have one format only, so
        they are left out.
        """
        predicted, gold_boxes, sizes = [], [], []
        for index, value in enumerate(self.columns["pred"]):
            pairs = zip(locations.read_any(value, 4), gold[index]["boxes"], strict=False)
            for location, gold_box in pairs:
                if location.numbers is None or location.is_loc or not any(location.numbers):
                    continue
                predicted.append(location.numbers)
                gold_boxes.append(gold_box["xyxy_px"])
                sizes.append(self.sizes[index])
        check_box_format(predicted, gold_boxes, sizes, self.formats.boxes, self.gold_format)
