"""A policy, or somebody's file of predictions, measured on benchmarks with published protocols.

python -m pg_ground.evaluate --config=configs/quickstart.py (--workdir=D | --params=P) [--out=D] [--distributed=auto]
python -m pg_ground.evaluate --predictions=FILE --benchmark=rec --fields=pred=extracted_answer,gold=ground_truth \\
    [--box-format=xyxy_px] [--point-format=xy_px] [--gold-format=…] --out=D

Both write `eval.json` and `predictions.jsonl`; the second takes any JSON list, JSON lines, or object with `results`, and for a
`predictions.jsonl` of ours neither --benchmark nor --fields. Benchmarks and their protocols: docs/evaluation.md.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pg_ground import cli, processes
from pg_ground.measure import benchmarks, files, rows
from pg_ground.pages import Table, ascii_table, write_whole
from pg_ground.types import UserError

SHOWN = ("ap", "ap50", "miou", "acc50", "acc75", "acc95", "mean_iou", "point_in_box", "f1", "accuracy", "mae", "cv_bench",
         "mean_reward", "malformed_fraction", "unfinished_fraction", "suffix_perplexity")  # fmt: skip
"""The measures in a table of results; eval.json has all."""


def results_table(title: str, columns: dict[str, dict[str, float]], note: str = "") -> Table:
    """Returns one row per measure of `SHOWN`, one column per moment (or run)."""
    names = sorted({name for of in columns.values() for name in of if name.rpartition("/")[2].removeprefix("sampled_") in SHOWN})
    rows = [
        [name.removeprefix("eval/"), *(f"{metrics[name]:.3f}" if name in metrics else "" for metrics in columns.values())]
        for name in names
    ]
    return Table(title, ["measure", *columns], rows, note)


def rescore(path: Path, benchmark: str, fields: Mapping[str, str], formats: files.Formats) -> tuple[dict[str, Any], list[Any]]:
    """Returns what `eval.json` says of a file of predictions, and its scored rows.

    Raises:
      UserError: something is wrong with the file, with counts.
    """
    records, besides = rows.read_records(path)
    if rows.is_own(records) and not fields:
        rows.check(records, path)
        known = [rows.bare(record) | ({"benchmark": benchmark} if benchmark else {}) for record in records]
    elif not benchmark:
        raise UserError(f"--benchmark is needed for {path}: one of {', '.join(benchmarks.BENCHMARKS)}")
    else:
        known = files.read(records, path, benchmark, fields, formats)
    for (source, mode), some in benchmarks.grouped(known).items():
        names = {str(row["benchmark"]) for row in some}
        if len(names) > 1:
            raise UserError(f"--predictions={path}: source {source!r}, {mode}, is measured as {' and '.join(sorted(names))}")
        benchmarks.check_count(some, names.pop())
    found = [_scored(row, index, path) for index, row in enumerate(known)]
    claims = {} if rows.is_own(records) else _claims(besides, records, found)
    return benchmarks.report(found) | claims, found


def _scored(row: rows.Row, index: int, path: Path) -> dict[str, Any]:
    try:
        return benchmarks.scored([row])[0]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:  # somebody has edited the file
        said = f"row {index} (id {row['id']!r:.40}) is no row of {row['benchmark']}: {type(error).__name__} {error}"
        raise UserError(f"--predictions={path}: {said}") from error


def _claims(
    besides: Mapping[str, Any], records: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what somebody's file says of itself, beside what is found here."""
    claims: dict[str, Any] = {
        name: value for name, value in besides.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if all("correct" in record for record in records) and all(row["source"] == "" and "correct" in row for row in found):
        claims["correct_agrees"] = sum(bool(a["correct"]) == bool(b["correct"]) for a, b in zip(records, found, strict=True))
    return {"file_says": claims} if claims else {}


def score_file(flags: Mapping[str, Any]) -> None:
    """Prints the measures of a file of predictions, and writes them where --out says."""
    formats = files.Formats(flags["box_format"], flags["point_format"], flags["gold_format"])
    path = Path(flags["predictions"])
    found, scored = rescore(path, flags["benchmark"], files.parse_fields(flags["fields"]), formats)
    if "benchmark" in found:
        table = Table(
            f"{found['benchmark']}: {path}, n = {found['n']}", ["measure", "", "95 %"], benchmarks.shown(found), found["protocol"]
        )
    else:
        table = results_table("held out", {str(path): found})
    print(ascii_table(table))
    if "file_says" in found:
        print(f"the file itself says: {json.dumps(found['file_says'])}")
    if flags["out"]:
        print(write(Path(flags["out"]), found, scored))


def write(out: Path, found: Mapping[str, Any], scored: Sequence[rows.Row]) -> Path:
    """Returns the path of `eval.json`, having written it, and `predictions.jsonl` beside it."""
    write_whole(out / "predictions.jsonl", rows.lines(scored))
    write_whole(out / "eval.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return out / "eval.json"


OF_FILES = {
    "predictions": "",
    "benchmark": "",
    "fields": "",
    "box_format": "xyxy_px",
    "point_format": "xy_px",
    "gold_format": "",
    "out": "",
}


def main(argv: Sequence[str], group: processes.Group) -> None:
    argv = [_with_underscores(argument) for argument in argv]
    if any(argument.partition("=")[0] == "--predictions" for argument in argv):
        score_file(cli.parse_own(argv, OF_FILES))
        return
    from pg_ground import exam  # the model, the data and what they import: a file of predictions needs none of it

    config, own = cli.parse(argv, {"workdir": "", "params": "", "out": "", cli.DISTRIBUTED: ""})
    if bool(own["workdir"]) == bool(own["params"]):
        raise UserError("one of --workdir=RUN, --params=CHECKPOINT and --predictions=FILE is needed")
    if not config.eval.sources:
        raise UserError("config.eval.sources is empty: there is nothing to measure on")
    place = Path(own["workdir"] or own["params"])
    out = Path(own["out"] or (place if place.is_dir() else place.parent))
    told = processes.leaves({"config": dataclasses.asdict(config), "--params": own["params"], "--workdir": own["workdir"]})
    found, bad = exam.measure_checkpoint(config, place, group, told)
    if processes.is_writer():  # each process has read every record, and so has found all that are bad
        document = benchmarks.report(found.predictions) | {"run": {"params": str(place), "bad_records": bad}}
        write(out, document, found.predictions)
    processes.say(ascii_table(results_table("held out", {str(place): found.metrics})))
    processes.say(str(out / "eval.json"))


def _with_underscores(argument: str) -> str:
    """Returns `--box-format=…` as `--box_format=…`; what is behind the sign, and paths of the config, stay."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config"):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    cli.run_together(main)
