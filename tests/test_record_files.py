"""Layouts of files of predictions: the same rows have the same score in each."""

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import call

from pg_ground.evals import scoring
from pg_ground.evals.file_answers import Formats
from pg_ground.types import UserError

GOLD = [10, 20, 110, 220]
ROWS = [
    {"id": str(i), "answer": GOLD if i % 4 else [300, 300, 310, 310], "truth": GOLD, "n": i}
    for i in range(20)
]
"""20 rows with 15 right answers."""

FIELDS = {"pred": "answer", "gold": "truth"}


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "answer", "truth", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def fenced(row: Mapping[str, Any]) -> dict[str, Any]:
    text = f"Here it is:\n```json\n{json.dumps({'out': {'box': row['answer']}})}\n```"
    return {"id": row["id"], "response": text, "truth": row["truth"]}


def in_prose(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"response": f"I say { ({'box': row['answer']})!r}.", "truth": str(row["truth"])}


class Layout:
    """A file, the flags that read it, and what the command says about its rows."""

    def __init__(
        self,
        content: Any,
        name: str = "p.json",
        fields: Mapping[str, str] = FIELDS,
        rows: str = "",
        note: str = "",
    ):
        self.content = content
        self.name = name
        self.fields = fields
        self.rows = rows
        self.note = note


LINES = "\n".join(map(json.dumps, ROWS))
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS)
BY_ID = {row["id"]: {k: v for k, v in row.items() if k != "id"} for row in ROWS}
OTHER_ROWS = [{"answer": [0, 0, 1, 1], "truth": GOLD}]
LAYOUTS: dict[str, Layout] = {
    "a list": Layout(ROWS),
    "lines": Layout(LINES),
    "results": Layout({"accuracy": 75.0, "results": ROWS, "errors": [{"a": 1}]}),
    "another key": Layout({"accuracy": 75.0, "predictions": ROWS}),
    "data set and model": Layout({"val": {"qwen": ROWS}}, note="rows: val.qwen (20)"),
    "five levels": Layout({"a": {"b": {"c": {"d": ROWS}}}}, note="rows: a.b.c.d (20)"),
    "beside other lists": Layout(
        {"val": {"qwen": ROWS, "classes": [{"name": "cat"}]}}, note="rows: val.qwen (20)"
    ),
    "a stated list": Layout(
        {"val": {"a": OTHER_ROWS, "b": ROWS}}, rows="val.b", note="rows: val.b (20)"
    ),
    "a stated list with dots": Layout(
        {"val": {"qwen2.5-vl": {"r": ROWS}, "b": OTHER_ROWS}},
        rows="val.qwen2.5-vl.r",
        note="rows: val.qwen2.5-vl.r (20)",
    ),
    "a stated list in a list": Layout(
        [{"model": "a", "r": OTHER_ROWS}, {"model": "b", "r": ROWS}],
        rows="1.r",
        note="rows: 1.r (20)",
    ),
    "by id": Layout(BY_ID, note="rows: the objects of the file, by their keys (20)"),
    "by id inside": Layout({"val": {"qwen": BY_ID}}, note="rows: val.qwen (20)"),
    "JSON in a text": Layout(
        list(map(fenced, ROWS)), fields={"pred": "response.out.box", "gold": "truth"}
    ),
    "Python in prose": Layout(
        list(map(in_prose, ROWS)), fields={"pred": "response.box", "gold": "truth"}
    ),
    "a position": Layout(
        [{"outs": [{"text": str(row["answer"])}], "truth": row["truth"]} for row in ROWS],
        fields={"pred": "outs.0.text", "gold": "truth"},
    ),
    "a name with a dot": Layout(
        [{"m": {"v1.5": row["answer"]}, "truth": row["truth"]} for row in ROWS],
        fields={"pred": "m.v1.5", "gold": "truth"},
    ),
    "CSV": Layout(table(","), "p.csv"),
    "CSV with semicolons": Layout(table(";"), "p.csv"),
    "TSV": Layout(table("\t"), "p.TSV"),
    "CSV of a spreadsheet": Layout(table(",").encode("utf-8-sig"), "p.csv"),
    "compressed CSV": Layout(gzip.compress(table(",").encode()), "p.csv.gz"),
    "compressed lines": Layout(gzip.compress(LINES.encode()), "p.jsonl.gz"),
    "objects over several lines": Layout(PRETTY, "p.jsonl"),
    "objects over several lines with CRLF": Layout(PRETTY.replace("\n", "\r\n"), "p.jsonl"),
    "objects with commas and no brackets": Layout(PRETTY.replace("\n}\n{", "\n},\n{"), "p.jsonl"),
    "objects without line breaks": Layout(PRETTY.replace("\n", ""), "p.json"),
    "a list over several lines": Layout(json.dumps(ROWS, indent=2), "p.jsonl"),
    "an object over several lines": Layout(json.dumps({"results": ROWS}, indent=2), "p.jsonl"),
    "UTF-16": Layout(LINES.encode("utf-16"), "p.jsonl"),
}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_rows_have_the_same_score_in_every_layout(name, tmp_path):
    layout = LAYOUTS[name]
    path = write(tmp_path, layout.name, layout.content)
    report, rows = scoring.rescore(path, "rec", layout.fields, Formats(), layout.rows)
    assert (report["acc50"], report["n"], len(rows)) == (0.75, 20, 20)
    assert report.get("notes", []) == ([layout.note] if layout.note else [])
    if "id" in name:
        assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    says = {"accuracy": 75.0} if "accuracy" in str(layout.content)[:20] else {}
    assert report.get("file_says", {}) == says


def test_one_row_with_lists_of_objects_is_one_row(tmp_path):
    row = {"pred": [{"bbox_2d": GOLD, "label": "a"}], "gold": [{"bbox": GOLD, "label": "a"}]}
    path = write(tmp_path, "p.jsonl", row)
    report, scored = scoring.rescore(path, "objects", {"pred": "pred", "gold": "gold"}, Formats())
    assert report["acc50"] == 1
    scoring.write_results(tmp_path, report, scored)
    again, _ = scoring.rescore(tmp_path / "predictions.jsonl", "", {}, Formats())
    assert (again["n"], again["acc50"]) == (1, 1)


BAD_LAYOUTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "several lists": (
        {"val": {"m1": ROWS, "m2": ROWS[:3]}},
        {},
        r"has several lists of rows: val.m1 \(20\), val.m2 \(3\): --rows=PATH names one",
    ),
    "two lists at the top": (
        {"m1": ROWS, "m2": ROWS},
        {},
        r"several lists of rows: m1 \(20\), m2 \(20\): --rows",
    ),
    "ten lists": (
        {"val": {f"m{i}": ROWS for i in range(10)}},
        {},
        r"m4 \(20\) and 5 more: --rows=PATH names one",
    ),
    "a wrong list": (
        {"val": {"qwen": ROWS, "b": ROWS}},
        {"rows_path": "val.qwem"},
        r"--rows=val.qwem is not in .*: did you mean val.qwen\?",
    ),
    "no list": ({"val": {"a": 3}}, {"rows_path": "val.a"}, "--rows=val.a of .* is no list of obj"),
    "a nested path": (
        [{"out": {"answer": GOLD}, "truth": GOLD}],
        {},
        "1 of 1 rows have no answer, first row 0, which has out, truth; the nearest path is "
        "out.answer",
    ),
    "a path inside a text": (
        [{"out": json.dumps({"result": {"answer": GOLD}}), "truth": GOLD}],
        {},
        "the nearest path is out.result.answer",
    ),
    "a misspelt path": (
        [{"answr": GOLD, "truth": GOLD}],
        {},
        "which has answr, truth; the nearest path is answr",
    ),
    "cells": (
        "answer,truth\n1,2,3\n",
        {"name": "p.csv"},
        "line 2 has 3 cells, but there are 2",
    ),
    "columns": ("answer,answer\n1,2\n", {"name": "p.csv"}, "two columns are called 'answer'"),
    "a table without rows": ("answer,truth\n", {"name": "p.csv"}, "has 0 rows"),
    "1 of 20 without a prediction": (
        [*ROWS[:19], {"id": "19", "truth": GOLD}],
        {},
        "1 of 20 rows have no answer, first row 19, which has id, truth: --missing=wrong counts "
        "them as wrong answers, --missing=drop leaves them out",
    ),
    "1 of 20 without ground truth": (
        [*ROWS[:19], {"id": "19", "answer": GOLD}],
        {"missing": "drop"},
        "1 of 20 rows have no truth, first row 19",
    ),
    "no prediction at all": ([{"truth": GOLD}] * 3, {"missing": "drop"}, "3 of 3 rows have no ans"),
    "an unknown fate": (ROWS, {"missing": "wrnog"}, "--missing=wrnog does not exist: did you mean"),
    "objects over several lines that break off": (
        PRETTY[:-10],
        {"name": "p.jsonl"},
        f"line {PRETTY.count(chr(10))} is not JSON",
    ),
    "a parquet file": (b"PAR1....", {"name": "p.json"}, "is not JSON, but a parquet file"),
    "many long names": (
        [{f"{'x' * 50}{i}": 1 for i in range(100)}],
        {},
        "1 of 1 rows have no answer",
    ),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_an_error_about_a_layout_names_what_helps(name, tmp_path):
    content, arguments, message = BAD_LAYOUTS[name]
    arguments = dict(arguments)
    path = write(tmp_path, arguments.pop("name", "p.json"), content)
    with pytest.raises(UserError, match=message) as error:
        scoring.rescore(path, "rec", FIELDS, Formats(), **arguments)
    text = str(error.value).replace(str(path), "")
    assert len(text) < 450 and "\n" not in text


@pytest.mark.parametrize(
    ("missing", "accuracy", "questions"), [("wrong", 14 / 20, 20), ("drop", 14 / 19, 19)]
)
def test_rows_without_a_prediction_are_wrong_or_left_out(missing, accuracy, questions, tmp_path):
    records = [
        {k: v for k, v in row.items() if k != "answer" or i != 3} for i, row in enumerate(ROWS)
    ]
    path = write(tmp_path, "p.json", records)
    report, rows = scoring.rescore(path, "rec", FIELDS, Formats(), missing=missing)
    assert (report["acc50"], report["n"]) == (accuracy, questions)
    assert report["missing"] == 1
    assert report["notes"][0].startswith("1 of 20 rows have no answer: they ")
    assert [row["id"] for row in rows] == [
        r["id"] for r in records if missing == "wrong" or "answer" in r
    ]


@pytest.mark.parametrize(
    ("benchmark", "gold"), [("text", "none"), ("counting", 3), ("multiple_choice", "A")]
)
def test_a_missing_prediction_is_a_wrong_answer_of_every_kind(benchmark, gold, tmp_path):
    records: Sequence[Any] = [{"g": gold, "p": gold}, {"g": gold}, {"g": gold, "p": None}]
    path = write(tmp_path, "p.json", records)
    fields = {"pred": "p", "gold": "g"}
    report, _ = scoring.rescore(path, benchmark, fields, Formats(), missing="wrong")
    assert report["accuracy"] == pytest.approx(1 / 3)


def test_the_command_takes_the_flags(tmp_path, capsys):
    path = write(tmp_path, "p.json", {"val": {"a": [*ROWS, {"truth": GOLD}], "b": ROWS}})
    call(
        "evaluate",
        f"--predictions={path}",
        "--benchmark=rec",
        "--fields=pred=answer,gold=truth",
        "--rows=val.a",
        "--missing=wrong",
    )
    printed = capsys.readouterr().out
    assert "rows: val.a (21)" in printed
    assert "1 of 21 rows have no answer: they count as wrong answers" in printed
    with pytest.raises(UserError, match="--rows has no meaning for a policy"):
        call("evaluate", "--config=configs/tiny.py", "--workdir=run", "--rows=a")


@pytest.mark.parametrize("field", ["id", "question_id", "questionId", "qid"])
def test_the_usual_names_of_ids_are_read(field, tmp_path):
    renamed = [{field if key == "id" else key: row[key] for key in row} for row in ROWS]
    _, rows = scoring.rescore(write(tmp_path, "p.json", renamed), "rec", FIELDS, Formats())
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    with pytest.raises(UserError, match=f"20 of 40 rows repeat the id .*{field}|{field}.*repeat"):
        twice = write(tmp_path, "p.json", renamed * 2)
        scoring.rescore(twice, "rec", FIELDS, Formats())
