"""Reads a file of predictions that another program wrote, by the paths of its fields."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.evals import question_groups
from pg_ground.evals.benchmarks import find_benchmark
from pg_ground.evals.file_answers import FileAnswers, Formats, check_formats, read_answers
from pg_ground.evals.image_identity import stated_image
from pg_ground.evals.question_masks import question_masks
from pg_ground.evals.record_files import fields_of, has_value, value_at
from pg_ground.evals.rows import FROM_FILE, check_unique
from pg_ground.readers import parsers
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError, nearest

USUAL_PATHS: dict[str, tuple[str, ...]] = {
    "pred": (),
    "gold": (),
    "id": ("id", "question_id", "questionId", "questionid", "qid"),
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
    "count": ("count",),
    **question_groups.FIELDS,
}
"""The names that --fields may give a path for, each with the paths that are tried otherwise.

The paths of `pred` and `gold` must be given.
"""

FIELDS_EXAMPLE = "pred=extracted_answer,gold=ground_truth"


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


MISSING = ("error", "wrong", "drop")
"""What happens to rows without a prediction: the file is refused, or they count as wrong answers,
or they are left out."""


NOTHING_KINDS = ("grec", "rejection")
"""Kinds of benchmarks in which an answer without a box may be right. A row without a prediction has
an unreadable box in them, so that it is wrong."""


class FileRows(NamedTuple):
    """The rows of a file of another program."""

    rows: list[JsonDict]
    records: list[JsonObject]
    """The record of each row."""
    answers: FileAnswers
    missing: int
    """Number of the rows without a prediction."""
    notes: list[str]
    """Sentences for the terminal."""


def read_rows(
    records: Sequence[JsonObject],
    path: FilePath,
    benchmark: str,
    fields: Mapping[str, str],
    formats: Formats,
    missing: str = "error",
) -> FileRows:
    """Returns the rows of the records of a file, and how their answers were read.

    Args:
      records: the records of the file.
      path: the file, for error messages.
      benchmark: name of the benchmark.
      fields: the result of `parse_fields`.
      formats: the formats of the coordinates.
      missing: one of MISSING.

    Raises:
      UserError: fields are missing, ids are not unique, the ground truth or all predictions cannot
        be read, or the boxes are in another format than the ground truth.
    """
    definition = find_benchmark(benchmark, "--benchmark")
    kind = definition.kind
    _check_fields(kind, benchmark, fields, records[0], path)
    check_formats(formats)
    if missing not in MISSING:
        raise UserError(f"--missing={missing} does not exist: {nearest(missing, MISSING)}")
    lacking = {i for i, record in enumerate(records) if not has_value(record, fields["pred"])}
    if len(lacking) == len(records):
        missing = "error"  # the path is wrong
    numbers = [i for i in range(len(records)) if missing != "drop" or i not in lacking]
    records = [records[i] for i in numbers]
    columns = _read_columns(records, fields, path, missing)
    answers, sizes = _read_answers(kind, formats, path, fields, columns)
    gold = _grouped_gold(definition.groups, answers.gold, columns, numbers, path)
    rewards = _rewards(columns["pred"], path) if kind == "reward" else []
    rows = []
    for index in range(len(records)):
        prediction = answers.predictions[index]
        if kind in NOTHING_KINDS and numbers[index] in lacking:
            prediction = {"boxes": [{"label": "", "xyxy_px": None}]}
        values = {name: column[index] for name, column in columns.items()}
        row = {
            **_question_fields(values, numbers[index]),
            "benchmark": benchmark,
            "size_px": sizes[index],
            "prediction": prediction,
            "gold": gold[index],
        }
        if kind == "reward":
            row["reward"] = rewards[index]
        rows.append(row)
    notes = [*answers.notes]
    if definition.groups and not any("groups" in answer for answer in gold):
        names = " and ".join(question_groups.GROUPINGS[definition.groups].values)
        notes.append(f"no groups of questions: --fields gives no {names}")
    if lacking:
        fate = "count as wrong answers" if missing == "wrong" else "are left out"
        total = len(numbers) + (len(lacking) if missing == "drop" else 0)
        notes.append(f"{len(lacking)} of {total} rows have no {fields['pred']}: they {fate}")
    return FileRows(rows, list(records), answers, len(lacking), notes)


def _read_answers(
    kind: str,
    formats: Formats,
    path: FilePath,
    fields: Mapping[str, str],
    columns: Mapping[str, list[Any]],
) -> tuple[FileAnswers, list[list[float] | None]]:
    """Returns the answers and the ground truth of a file, and the sizes of the images."""
    sizes = _image_sizes(columns, len(columns["pred"]))
    if kind != "mask_points":
        return read_answers(kind, formats, path, fields, columns, sizes), sizes
    masks, sizes = question_masks(columns, sizes, path)
    # The ground truth is read already. With a readable point in its place, answers that cannot be
    # read at all are an error.
    points = {**columns, "gold": [[0, 0]] * len(masks)}
    answers = read_answers("points", formats, path, fields, points, sizes)
    return answers._replace(gold=masks), sizes


def _grouped_gold(
    grouping: str,
    gold: Sequence[JsonDict],
    columns: Mapping[str, Sequence[Any]],
    numbers: Sequence[int],
    path: FilePath,
) -> list[JsonDict]:
    """Returns the ground truth of each row with its groups, if the file has one of their fields.

    Args:
      grouping: a key of `question_groups.GROUPINGS`, or "".
      numbers: number of each row in the file.
    """
    if not grouping or not question_groups.GROUPINGS[grouping].values.keys() & columns.keys():
        return list(gold)
    absent = [None] * len(gold)
    grouped = []
    for index, answer in enumerate(gold):
        names = question_groups.read_groups(
            grouping,
            lambda name, index=index: columns.get(name, absent)[index],
            f"--predictions={path}: row {numbers[index]}",
        )
        grouped.append(question_groups.with_groups(grouping, answer, names))
    return grouped


def _rewards(values: Sequence[object], path: FilePath) -> list[float | None]:
    """Returns the reward of each row. It is None for null.

    Raises:
      UserError: a reward is no number and no text that is one.
    """
    numbers = [parsers.json_number(value, strict=False) for value in values]
    wrong = [i for i, value in enumerate(values) if value is not None and math.isnan(numbers[i])]
    if wrong:
        raise UserError(
            f"--predictions={path}: the rewards of {len(wrong)} of {len(values)} rows are no "
            f"numbers, first row {wrong[0]}: {values[wrong[0]]!r:.60}"
        )
    if all(map(math.isnan, numbers)):
        raise UserError(f"--predictions={path}: none of {len(values)} rows has a reward")
    return [None if math.isnan(number) else number for number in numbers]


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
        "image": stated_image(image),
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
            raise UserError(
                f"--fields must give the path of {name}, as in {FIELDS_EXAMPLE}; the first row of "
                f"{path} has {fields_of(first_record, name)}"
            )


def _read_columns(
    records: Sequence[JsonObject], fields: Mapping[str, str], path: FilePath, missing: str
) -> dict[str, list[Any]]:
    """Returns the values of all records, by name. Names that the file does not have are absent."""
    required = fields.keys() if missing == "error" else fields.keys() - {"pred"}
    usual = {
        name: next((path for path in paths if path in records[0]), "")
        for name, paths in USUAL_PATHS.items()
    }
    paths = {name: field for name, field in (usual | dict(fields)).items() if field}
    columns = {
        name: _read_column(records, name, field, path, is_required=name in required)
        for name, field in paths.items()
    }
    if "id" in columns and "rollout" in columns:
        keys: Sequence[Any] = list(zip(columns["id"], columns["rollout"], strict=True))
        check_unique(keys, path, paths["id"])
    elif "id" in columns:
        check_unique(columns["id"], path, paths["id"])
    return columns


def _read_column(
    records: Sequence[JsonObject], name: str, field: str, path: FilePath, is_required: bool
) -> list[Any]:
    """Returns the value of each record at a dotted path. A record without the field has None.

    Raises:
      UserError: `is_required`, and a record does not have the field.
    """
    values, lacking = [], []
    for index, record in enumerate(records):
        try:
            values.append(value_at(record, field))
        except LookupError:
            values.append(None)
            lacking.append(index)
    if lacking and is_required:
        first = lacking[0]
        advice = ""
        if name == "pred" and len(lacking) < len(records):
            advice = (
                ": --missing=wrong counts them as wrong answers, --missing=drop leaves them out"
            )
        raise UserError(
            f"--predictions={path}: {len(lacking)} of {len(records)} rows have no {field}, "
            f"first row {first}, which has {fields_of(records[first], field)}{advice}"
        )
    return values


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
