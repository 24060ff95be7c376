"""Rows: one question with its answer and its ground truth.

Each line of `predictions.jsonl` is a row. All metrics are computed from rows alone. A row has
these fields:

    source       name of the config's entry. `NAME@512` if only 512 of its questions were asked.
                 "" if the row comes from a file of another program.
    benchmark    a name in `benchmarks.BENCHMARKS`
    id           id of the question within its source. (source, id, mode, rollout) is unique.
    image        file name or URL of the image, else a hash of its content, or null if it is not
                 known. Confidence intervals resample images, and questions without an image.
    size_px      [width, height] of the image. null if coordinates are fractions of a 1 x 1 image.
    mode         "greedy", "sampled", or "given" if the row comes from a file of another program
    rollout      number of the sampled answer, from 0. It is 0 for greedy answers.
    prompt       the question as text
    text         the answer as text
    prediction   what the answer says
    gold         the ground truth

`prediction` and `gold` hold the keys that the benchmark reads: `boxes` (each with `label`,
`xyxy_px`, which is null if it cannot be read, and maybe `score`), `points` (each with `label` and
`xy_px`), `number`, `choice`, `text`, `mask` or `masks`.

A row of a model also has `index`, `malformed`, `unfinished`, `reward`, `rewards` (each reward by
its name), `tokens` (length of the completion), `suffix_nll` and `suffix_tokens`, as far as they are
known. The last fields are the scores of the benchmark (`iou`,
`correct`, …). They are for people: a program that reads the file computes them again.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError

Row = JsonObject

Columns = dict[str, Float[np.ndarray, " N"]]
"""A number of each of N rows, by the name of the metric. NaN means that a row does not count."""

GREEDY = "greedy"
SAMPLED = "sampled"
FROM_FILE = "given"
"""Mode of the rows that come from a file of another program."""

REQUIRED_FIELDS = (
    "source",
    "benchmark",
    "id",
    "image",
    "size_px",
    "mode",
    "rollout",
    "prompt",
    "text",
    "prediction",
    "gold",
)
"""The fields of every row. A file was written by this package if its first record has them all."""

OPTIONAL_FIELDS = (
    "index",
    "malformed",
    "unfinished",
    "reward",
    "rewards",
    "tokens",
    "suffix_nll",
    "suffix_tokens",
)
"""The further fields of the rows of a model."""


def column(rows: Sequence[Row], name: str) -> Float[np.ndarray, " N"]:
    """Returns a field of each row as float64. A row without the field, or with null, has NaN."""
    values = [np.nan if row.get(name) is None else float(row[name]) for row in rows]
    return np.array(values, np.float64)


def cluster(row: Row) -> tuple[str, str]:
    """Returns what a confidence interval draws: the image of a row, else its question.

    All rollouts of a question are in one cluster.
    """
    if row["image"] is None:
        return "question", str(row["id"])
    return "image", str(row["image"])


def without_scores(row: Row) -> JsonDict:
    """Returns a row without the fields that its benchmark computed."""
    required = {name: row[name] for name in REQUIRED_FIELDS}
    return required | {name: row[name] for name in OPTIONAL_FIELDS if name in row}


def to_json_lines(rows: Iterable[Row]) -> str:
    """Returns the text of `predictions.jsonl`. Reading it gives every number back bit for bit."""
    return "".join(_to_json(row) + "\n" for row in rows)


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. UTF-8 cannot encode it, but JSON can escape it."""


def _to_json(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if _SURROGATE.search(line) else line


def is_row_file(records: Sequence[JsonObject]) -> bool:
    """Returns whether records are rows that this package wrote."""
    return all(name in records[0] for name in REQUIRED_FIELDS)


def check_rows(rows: Sequence[Row], path: FilePath) -> None:
    """Raises UserError, with counts, if rows lack a field or are not unique."""
    for name in REQUIRED_FIELDS:
        lacking = [index for index, row in enumerate(rows) if name not in row]
        if lacking:
            raise UserError(
                f"--predictions={path}: {len(lacking)} of {len(rows)} rows have no {name}, "
                f"first row {lacking[0]}"
            )
    keys = [(row["source"], row["id"], row["mode"], row["rollout"]) for row in rows]
    check_unique(keys, path, "source, id, mode, rollout")


def check_unique(keys: Sequence[Any], path: FilePath, key_fields: str) -> None:
    """Raises UserError, with counts, if two rows have the same key.

    Args:
      key_fields: the fields of the key, for the error message.
    """
    first_row: dict[str, int] = {}
    repeated = []
    for index, key in enumerate(map(str, keys)):
        if first_row.setdefault(key, index) != index:
            repeated.append(index)
    if repeated:
        key = str(keys[repeated[0]])
        raise UserError(
            f"--predictions={path}: {len(repeated)} of {len(keys)} rows repeat the {key_fields} of "
            f"an earlier row, first row {repeated[0]}, which repeats row {first_row[key]} "
            f"({key:.60})"
        )
