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

from pg_ground import cli
from pg_ground.evals import benchmarks, prediction_files
from pg_ground.evals.scoring import rescore, write_results
from pg_ground.parallel import multiprocess
from pg_ground.reporting.tables import Table, ascii_table, results_table
from pg_ground.types import UserError


def score_file(flags: Mapping[str, Any]) -> None:
    """Prints the measures of a file of predictions, and writes them where --out says."""
    formats = prediction_files.Formats(
        flags["box_format"], flags["point_format"], flags["gold_format"]
    )
    path = Path(flags["predictions"])
    found, scored = rescore(
        path, flags["benchmark"], prediction_files.parse_fields(flags["fields"]), formats
    )
    if "benchmark" in found:
        table = Table(
            f"{found['benchmark']}: {path}, n = {found['n']}",
            ["metric", "", "95 %"],
            benchmarks.table_rows(found),
            found["protocol"],
        )
    else:
        table = results_table("held out", {str(path): found})
    print(ascii_table(table))
    if "file_says" in found:
        print(f"the file itself says: {json.dumps(found['file_says'])}")
    if flags["out"]:
        print(write_results(Path(flags["out"]), found, scored))


OF_FILES = {
    "predictions": "",
    "benchmark": "",
    "fields": "",
    "box_format": "xyxy_px",
    "point_format": "xy_px",
    "gold_format": "",
    "out": "",
}


def main(argv: Sequence[str], group: multiprocess.ProcessGroup) -> None:
    argv = [_with_underscores(argument) for argument in argv]
    if any(argument.partition("=")[0] == "--predictions" for argument in argv):
        score_file(cli.parse_own(argv, OF_FILES))
        return
    # These import the model and the data, which a file of predictions does not need.
    from pg_ground.evals.evaluation import evaluate
    from pg_ground.parallel import sharding

    config, own = cli.parse(argv, {"workdir": "", "params": "", "out": "", cli.DISTRIBUTED: ""})
    if bool(own["workdir"]) == bool(own["params"]):
        raise UserError(
            "one of --workdir=RUN, --params=CHECKPOINT and --predictions=FILE is needed"
        )
    if not config.eval.sources:
        raise UserError("config.eval.sources is empty: there is nothing to measure on")
    place = Path(own["workdir"] or own["params"])
    out = Path(own["out"] or (place if place.is_dir() else place.parent))
    told = multiprocess.flatten_settings(
        {
            "config": dataclasses.asdict(config),
            "--params": own["params"],
            "--workdir": own["workdir"],
        }
    )
    sharding.set_cpu_devices(config.mesh)
    sharding.enable_compilation_cache(config.mesh)
    group.start(told)
    found = evaluate(config, workdir=own["workdir"], params=own["params"])
    if (
        multiprocess.is_main_process()
    ):  # each process has read every record, and so has found all that are bad
        document = benchmarks.make_report(found.predictions) | {
            "run": {"params": str(place), "bad_records": found.bad_records}
        }
        write_results(out, document, found.predictions)
    multiprocess.print_once(ascii_table(results_table("held out", {str(place): found.metrics})))
    multiprocess.print_once(str(out / "eval.json"))


def _with_underscores(argument: str) -> str:
    """Returns `--box-format=…` as `--box_format=…`; what is behind the sign, and paths of the config, stay."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith("--config"):
        return argument
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    cli.run_together(main)
