"""Scores a file of predictions again, and writes the results of an evaluation."""

import json
from collections.abc import Mapping, Sequence

from pg_ground.data.records import BadRecord
from pg_ground.evals import benchmarks, prediction_files, record_files, rows
from pg_ground.evals.file_answers import Formats
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError


def rescore(
    path: FilePath,
    benchmark: str,
    fields: Mapping[str, str],
    formats: Formats,
    rows_path: str = "",
    missing: str = "error",
) -> tuple[JsonDict, list[JsonDict]]:
    """Returns the content of `eval.json` for a file of predictions, and its scored rows.

    For a file of another program, `answers` says in which formats the answers were read, if a
    format was detected or stated, and `notes` are sentences about the file.

    Args:
      path: `predictions.jsonl` of this package, or a file of another program.
      benchmark: name of the benchmark. It may be "" for a file of this package.
      fields: paths of the fields in a record, as `prediction_files.parse_fields` returns them. It
        is empty for a file of this package.
      formats: formats of the coordinates in a file of another program.
      rows_path: dotted path of the list of rows in a file of another program.
      missing: what happens to its rows without a prediction (`prediction_files.MISSING`).

    Raises:
      UserError: the file cannot be read as predictions. The message has counts.
    """
    records, header, notes = record_files.read_records(path, rows_path, fields.get("pred", ""))
    about_file: JsonDict = {}
    if rows.is_row_file(records) and not fields:
        rows.check_rows(records, path)
        unscored = [rows.without_scores(record) for record in records]
        if benchmark:
            unscored = [row | {"benchmark": benchmark} for row in unscored]
    elif not benchmark:
        names = ", ".join(benchmarks.BENCHMARKS)
        raise UserError(f"--benchmark is needed for {path}: one of {names}")
    else:
        file = prediction_files.read_rows(records, path, benchmark, fields, formats, missing)
        unscored, records = file.rows, file.records
        about_file = {
            "answers": file.answers.summary,
            "missing": file.missing,
            "notes": [*notes, *file.notes],
        }
    _check_benchmarks(unscored, path)
    scored = [_score_row(row, index, path) for index, row in enumerate(unscored)]
    report = benchmarks.make_report(scored)
    report |= {name: value for name, value in about_file.items() if value}
    if not rows.is_row_file(records):
        report |= _claims(header, records, scored)
    return report, scored


def _check_benchmarks(unscored: Sequence[rows.Row], path: FilePath) -> None:
    """Raises UserError if a source has several benchmarks or another number of questions."""
    for (source, mode), group in benchmarks.group_by_source(unscored).items():
        names = sorted({str(row["benchmark"]) for row in group})
        if len(names) > 1:
            raise UserError(
                f"--predictions={path}: source {source!r}, {mode}, has rows of the benchmarks "
                f"{' and '.join(names)}"
            )
        benchmarks.check_question_count(group, names[0])


EDITED_ROW_ERRORS = (
    *(LookupError, TypeError, ValueError, ArithmeticError, AttributeError),
    BadRecord,
)
"""Errors that scoring raises for a row whose fields were changed by hand."""


def _score_row(row: rows.Row, index: int, path: FilePath) -> JsonDict:
    try:
        return benchmarks.score_rows([row])[0]
    except EDITED_ROW_ERRORS as error:
        # Only a row that was edited by hand can fail here.
        raise UserError(
            f"--predictions={path}: row {index} (id {row['id']!r:.40}) is not a row of "
            f"{row['benchmark']}: {type(error).__name__} {error}"
        ) from error


def _claims(
    header: JsonObject,
    records: Sequence[JsonObject],
    scored: Sequence[JsonObject],
) -> JsonDict:
    """Returns what a file of another program says about its own predictions, as `file_says`.

    These are the numbers in its header. If its records have `correct`, `correct_agrees` counts the
    records whose `correct` equals ours.
    """
    claims: JsonDict = {
        name: value
        for name, value in header.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    has_ours = all(row["source"] == "" and "correct" in row for row in scored)
    if has_ours and all("correct" in record for record in records):
        pairs = zip(records, scored, strict=True)
        claims["correct_agrees"] = sum(
            bool(record["correct"]) == bool(row["correct"]) for record, row in pairs
        )
    return {"file_says": claims} if claims else {}


def write_results(out: FilePath, report: JsonObject, scored: Sequence[rows.Row]) -> FilePath:
    """Writes `eval.json` and `predictions.jsonl` to the folder `out`.

    Returns:
      the path of `eval.json`.
    """
    write_atomically(out / "predictions.jsonl", rows.to_json_lines(scored))
    write_atomically(out / "eval.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return out / "eval.json"
