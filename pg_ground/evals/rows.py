"""Rows: what was asked, answered and annotated, one a line of `predictions.jsonl`. All measures are computed from rows alone.

A row has

    source      name of the config's entry, `NAME@512` where only 512 of its questions were asked; "" for somebody's file
    benchmark   what it is measured as: a name in `benchmarks.BENCHMARKS`
    id          of the question within its source; with `mode` and `rollout` it names the row
    image       file name or address of the image, or null: intervals resample images
    size_px     [width, height] of the image, or null where coordinates are fractions of a 1 x 1 image
    mode        "greedy" or "sampled" (then `rollout` counts from 0), or "given"
    prompt, text         what was asked and answered, as text
    prediction, gold     what both say: `boxes` (`label`, `xyxy_px`, which is null where unreadable; `score`), `points` (`label`,
                         `xy_px`), `number`, `choice` or `text`
    index, malformed, unfinished, reward, suffix_nll, suffix_tokens    where they are known: of who asked, and of the model

and behind these what its benchmark finds of it (`iou`, `correct` …), which is for people and is computed anew by who reads it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pg_ground.types import UserError

Row = Mapping[str, Any]

GREEDY, SAMPLED, GIVEN = "greedy", "sampled", "given"

OWN = (
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
"""The fields that every row has; a file whose first record has them is ours."""

TOLD = ("index", "malformed", "unfinished", "reward", "suffix_nll", "suffix_tokens")
"""The fields that a row has besides, where they are known."""


def column(rows: Sequence[Row], name: str) -> Float[np.ndarray, " N"]:
    """Returns a number of each row, NaN where it has none."""
    return np.array(
        [np.nan if row.get(name) is None else float(row[name]) for row in rows], np.float64
    )


def bare(row: Row) -> dict[str, Any]:
    """Returns a row without what a benchmark found of it."""
    return {name: row[name] for name in OWN} | {name: row[name] for name in TOLD if name in row}


def lines(rows: Iterable[Row]) -> str:
    """Returns rows as `predictions.jsonl`; numbers are written so that reading gives them back bit for bit."""
    return "".join(_line(row) + "\n" for row in rows)


_HALF = re.compile("[\ud800-\udfff]")
"""Of a surrogate pair: only JSON's escapes can spell one alone."""


def _line(row: Row) -> str:
    line = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if _HALF.search(line) else line


def read_records(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the records of a JSON list, of JSON lines, or of an object with a list; and what the object says besides.

    Raises:
      UserError: the file is missing, empty, no JSON (with the line), or holds no records.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--predictions={path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not text.strip():
        raise UserError(
            f"--predictions={path} is empty: a JSON list, JSON lines or an object with `results` is wanted"
        )
    found, besides = _parsed(text, path), {}
    if isinstance(found, dict):
        listed = {name: value for name, value in found.items() if isinstance(value, list) and value}
        name = "results" if "results" in listed else next(iter(listed), "")
        besides = {key: value for key, value in found.items() if not isinstance(value, list)}
        found = listed.get(name, [])
    if not isinstance(found, list):
        raise UserError(
            f"--predictions={path} is {found!r:.60}: a JSON list, JSON lines or an object with `results` is wanted"
        )
    if not found:
        raise UserError(f"--predictions={path} has 0 rows")
    wrong = [index for index, record in enumerate(found) if not isinstance(record, dict)]
    if wrong:
        raise UserError(
            f"--predictions={path}: {len(wrong)} of {len(found)} rows are no objects, first row {wrong[0]}: "
            f"{found[wrong[0]]!r:.60}"
        )
    return found, besides


def _parsed(text: str, path: Path) -> Any:
    """Returns a JSON document, or the list of a JSON-lines file; an object alone on its line is a record or holds them."""
    parts = text.split(
        "\n"
    )  # not splitlines: JSON's strings may hold the other ends of lines that Unicode has
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        whole = error
    else:
        has_records = isinstance(value, dict) and any(
            isinstance(v, list) and v and isinstance(v[0], dict) for v in value.values()
        )
        return [value] if isinstance(value, dict) and not has_records else value
    records = []
    for number, part in enumerate(parts, 1):
        if not part.strip():
            continue
        try:
            records.append(json.loads(part))
        except (ValueError, RecursionError) as error:
            line = (
                getattr(whole, "lineno", number)
                if text.lstrip()[0] == "[" or not records
                else number
            )
            reason = whole if line != number else error
            raise UserError(
                f"--predictions={path}: line {line} is not JSON: {getattr(reason, 'msg', reason)}"
            ) from None
    return records


def is_own(records: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether records are rows of this package."""
    return all(name in records[0] for name in OWN)


def check(rows: Sequence[Row], path: Path) -> None:
    """Raises UserError, with counts, where rows lack a field or two have one name."""
    for name in OWN:
        lacking = [index for index, row in enumerate(rows) if name not in row]
        if lacking:
            raise UserError(
                f"--predictions={path}: {len(lacking)} of {len(rows)} rows have no {name}, first row {lacking[0]}"
            )
    check_unique(
        [(row["source"], row["id"], row["mode"], row["rollout"]) for row in rows],
        path,
        "source, id, mode, rollout",
    )


def check_unique(names: Sequence[Any], path: Path, what: str) -> None:
    """Raises UserError where two rows have one name."""
    seen: dict[str, int] = {}
    twice = []
    for index, name in enumerate(map(str, names)):
        if seen.setdefault(name, index) != index:
            twice.append(index)
    if twice:
        first = seen[str(names[twice[0]])]
        raise UserError(
            f"--predictions={path}: {len(twice)} of {len(names)} rows repeat the {what} of an earlier one, first row {twice[0]}, "
            f"which has that of row {first} ({names[twice[0]]!s:.60})"
        )
