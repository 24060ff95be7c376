"""A policy, or somebody's file of predictions, measured on benchmarks with published protocols.

python -m pg_ground.evaluate --config=configs/quickstart.py (--workdir=D | --params=P) [--out=D] [--distributed=auto]
python -m pg_ground.evaluate --predictions=FILE --benchmark=rec --fields=pred=extracted_answer,gold=ground_truth \\
    [--box-format=xyxy_px] [--point-format=xy_px] [--gold-format=…] --out=D

Both write `eval.json` and `predictions.jsonl`; the second takes any JSON list, JSON lines, or object with `results`, and for a
`predictions.jsonl` of ours neither --benchmark nor --fields. Benchmarks and their protocols: docs/evaluation.md.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pg_ground.evals import benchmarks, prediction_files, rows
from pg_ground.reporting.files import write_atomically
from pg_ground.types import UserError


def rescore(
    path: Path, benchmark: str, fields: Mapping[str, str], formats: prediction_files.Formats
) -> tuple[dict[str, Any], list[Any]]:
    """Returns what `eval.json` says of a file of predictions, and its scored rows.

    Raises:
      UserError: something is wrong with the file, with counts.
    """
    records, besides = rows.read_records(path)
    if rows.is_own(records) and not fields:
        rows.check(records, path)
        known = [
            rows.bare(record) | ({"benchmark": benchmark} if benchmark else {})
            for record in records
        ]
    elif not benchmark:
        raise UserError(
            f"--benchmark is needed for {path}: one of {', '.join(benchmarks.BENCHMARKS)}"
        )
    else:
        known = prediction_files.read(records, path, benchmark, fields, formats)
    for (source, mode), some in benchmarks.grouped(known).items():
        names = {str(row["benchmark"]) for row in some}
        if len(names) > 1:
            raise UserError(
                f"--predictions={path}: source {source!r}, {mode}, is measured as {' and '.join(sorted(names))}"
            )
        benchmarks.check_count(some, names.pop())
    found = [_scored(row, index, path) for index, row in enumerate(known)]
    claims = {} if rows.is_own(records) else _claims(besides, records, found)
    return benchmarks.report(found) | claims, found


def _scored(row: rows.Row, index: int, path: Path) -> dict[str, Any]:
    try:
        return benchmarks.scored([row])[0]
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
    ) as error:  # somebody has edited the file
        said = f"row {index} (id {row['id']!r:.40}) is no row of {row['benchmark']}: {type(error).__name__} {error}"
        raise UserError(f"--predictions={path}: {said}") from error


def _claims(
    besides: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns what somebody's file says of itself, beside what is found here."""
    claims: dict[str, Any] = {
        name: value
        for name, value in besides.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if all("correct" in record for record in records) and all(
        row["source"] == "" and "correct" in row for row in found
    ):
        claims["correct_agrees"] = sum(
            bool(a["correct"]) == bool(b["correct"]) for a, b in zip(records, found, strict=True)
        )
    return {"file_says": claims} if claims else {}


def write_results(out: Path, found: Mapping[str, Any], scored: Sequence[rows.Row]) -> Path:
    """Returns the path of `eval.json`, having written it, and `predictions.jsonl` beside it."""
    write_atomically(out / "predictions.jsonl", rows.lines(scored))
    write_atomically(out / "eval.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return out / "eval.json"
