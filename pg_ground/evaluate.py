"""Measures a policy, or a file of predictions, on benchmarks with published protocols.

A policy is a run (--workdir) or a checkpoint (--params). It answers the sources of config.eval.

A file of predictions needs no model and no config: --predictions=FILE --benchmark=NAME --fields=F.
The file is a JSON list, JSON lines, CSV, or an object that holds a list (--rows=PATH says where).
For a predictions.jsonl that this command has written, neither --benchmark nor --fields is needed.
--fields=pred=a.b,gold=c says which fields of a record hold the prediction and the ground truth. The
format of the answers (Qwen's, Gemini's, Molmo's, …) is detected and printed; --answer-format=NAME
states it.

Both ways write eval.json and predictions.jsonl to --out. For a policy, --out is the directory of
the run or of the checkpoint if the flag is absent; for a file of predictions nothing is written
then. docs/evaluation.md describes the benchmarks and their protocols.

--coco, --supervision, --lmms_eval and --vlmevalkit also write the predicted boxes there, in the
formats of these programs.
"""

import json
from pathlib import Path

from absl import flags

from pg_ground import cli
from pg_ground.evals import benchmarks, exports, prediction_files
from pg_ground.evals.file_answers import Formats
from pg_ground.evals.scoring import rescore, write_results
from pg_ground.parallel import multiprocess
from pg_ground.readers.answer_formats import AUTO, FORMATS
from pg_ground.reporting.tables import Table, ascii_table, results_table
from pg_ground.storage.downloads import KAGGLE
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.types import UserError

POLICY_FLAGS = ("config", "workdir", "params", cli.DISTRIBUTED)
"""Flags that a file of predictions does not take."""

PREDICTIONS_FLAGS = (
    "benchmark",
    "fields",
    "rows",
    "missing",
    "answer_format",
    "box_format",
    "point_format",
    "gold_format",
)
"""Flags that a policy does not take."""


def define_flags(values: flags.FlagValues) -> None:
    cli.define_path(values, "workdir", "A run. Its newest checkpoint is evaluated.")
    cli.define_path(
        values,
        "params",
        "A checkpoint: .npz, Hugging Face directory, ORG/NAME on the Hub, or RUN/best.",
    )
    cli.define_path(values, "out", "Directory for eval.json and predictions.jsonl.")
    cli.define_path(values, "predictions", "A file of predictions, instead of a policy.")
    texts = {
        "benchmark": ("", "Benchmark of --predictions: rec, pointing, counting, detection, …"),
        "fields": ("", "Fields of a prediction record: pred=PATH,gold=PATH,id=PATH,…"),
        "rows": ("", "Where the list of rows is: a path such as refcoco_val.my_model.results."),
        "missing": (
            "error",
            "Rows without a prediction: error, wrong (a wrong answer) or drop (left out).",
        ),
        "answer_format": (AUTO, f"How answers are written: {', '.join([AUTO, *FORMATS])}."),
        "box_format": (
            "",
            "Unit of the predicted boxes. Absent: the answer format's unit, else xyxy_px.",
        ),
        "point_format": (
            "",
            "Unit of the predicted points. Absent: the answer format's unit, else xy_px.",
        ),
        "gold_format": ("", "How the ground truth is written, if it differs."),
    }
    for name, (default, help_text) in texts.items():
        flags.DEFINE_string(name, default, help_text, flag_values=values)
    for name in exports.FORMATS:
        help_text = f"Also write the predicted boxes in the format of {name}."
        flags.DEFINE_boolean(name, False, help_text, flag_values=values)
    cli.define_distributed(values)


COMMAND = cli.Command(
    name="evaluate",
    description=__doc__,
    needs="--config=FILE and --workdir=DIR or --params=PATH; or --predictions=FILE",
    example="--config=configs/quickstart.py --workdir=runs/quickstart",
    define_flags=define_flags,
    distributed=True,
)


def main(args: cli.Arguments) -> None:
    flags_of_others = POLICY_FLAGS if args.flags.predictions else PREDICTIONS_FLAGS
    for name in flags_of_others:
        if args.flags[name].present:
            mode = "a file of predictions" if args.flags.predictions else "a policy"
            raise UserError(f"--{name} has no meaning for {mode}; see pg-ground evaluate --help")
    if args.flags.predictions:
        _score_predictions(args)
    else:
        _evaluate_policy(args)


def _score_predictions(args: cli.Arguments) -> None:
    """Prints the metrics of a file of predictions, and writes them if --out is set."""
    path = to_path(args.flags.predictions, "--predictions")
    export_formats = _export_formats(args)
    if export_formats and not args.flags.out:
        raise UserError(f"--{export_formats[0]} writes a file: --out=DIR is needed")
    formats = Formats(
        args.flags.box_format,
        args.flags.point_format,
        args.flags.gold_format,
        args.flags.answer_format,
    )
    fields = prediction_files.parse_fields(args.flags.fields)
    document, rows = rescore(
        path, args.flags.benchmark, fields, formats, args.flags.rows, args.flags.missing
    )
    if "benchmark" in document:
        title = f"{document['benchmark']}: {path}, n = {document['n']}"
        columns = ["metric", "", "95 %"]
        table = Table(title, columns, benchmarks.table_rows(document), document["protocol"])
    else:
        table = results_table("held out", {str(path): document})
    print(ascii_table(table))
    if "questions" in document.get("resampled", ""):
        print("95 %: questions are resampled, because images have no names (--fields=…,image=PATH)")
    for note in document.get("notes", ()):
        print(note)
    if "file_says" in document:
        print(f"the file itself says: {json.dumps(document['file_says'])}")
    if args.flags.out:
        out = to_path(args.flags.out, "--out")
        print(write_results(out, document, rows))
        for file in exports.write_exports(out, rows, export_formats):
            print(file)


def _evaluate_policy(args: cli.Arguments) -> None:
    """Prints the metrics of a run or a checkpoint, and writes them."""
    # These import the model and the data, which a file of predictions does not need.
    from pg_ground.evals.evaluation import evaluate
    from pg_ground.parallel import sharding

    workdir, params = args.flags.workdir, args.flags.params
    if bool(workdir) == bool(params):
        raise UserError(
            "one of --workdir=RUN, --params=CHECKPOINT and --predictions=FILE is needed"
        )
    out = _results_folder(args)
    sharding.set_cpu_devices(args.config.mesh)
    sharding.enable_compilation_cache(args.config.mesh)
    args.start_processes({"--params": params, "--workdir": workdir})
    evaluation = evaluate(args.config, workdir=workdir, params=params)
    if multiprocess.is_main_process():
        # every process has read every record, so process 0 knows all bad records
        run = {"params": workdir or params, "bad_records": evaluation.bad_records}
        document = benchmarks.make_report(evaluation.predictions) | {"run": run}
        write_results(out, document, evaluation.predictions)
        exports.write_exports(out, evaluation.predictions, _export_formats(args))
    multiprocess.print_once(
        ascii_table(results_table("held out", {workdir or params: evaluation.metrics}))
    )
    if evaluation.bad_records:
        counts = ", ".join(f"{count} {kind}" for kind, count in evaluation.bad_records.items())
        multiprocess.print_once(f"records that cannot be used, and are left out: {counts}")
    multiprocess.print_once(str(out / "eval.json"))


def _export_formats(args: cli.Arguments) -> list[str]:
    """Returns the formats of other programs whose flags are set."""
    return [name for name in exports.FORMATS if args.flags[name].value]


def _results_folder(args: cli.Arguments) -> FilePath:
    """Returns the folder for the results of a policy: --out, or the folder of the policy."""
    if args.flags.out:
        return to_path(args.flags.out, "--out")
    name = args.flags.workdir or args.flags.params
    flag = "--workdir" if args.flags.workdir else "--params"
    is_elsewhere = name.startswith((KAGGLE, "hf://"))
    path = Path() if is_elsewhere else to_path(name, flag)
    if is_elsewhere or (not path.exists() and not path.suffix):
        raise UserError(f"{flag}={name} is no folder for results: --out=DIR is needed")
    return path if path.is_dir() else path.parent


if __name__ == "__main__":
    cli.run(COMMAND, main)
