"""Runs the quickstart and its two controls with several seeds: GRPO after SFT, or SFT alone.

python benchmarks/quickstart.py --seeds=0,1,2 --workdir=runs/arms [--arms=grpo,sft_loose,sft_exact]

The controls spend the same compute on SFT. Each run is a process of its own, one after the other. A
run that is already finished is only read. Prints one row per run: held-out metrics at the end of
SFT and at the end of the run, and wall seconds of the whole command. The rows are also written to
WORKDIR/arms.json.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pg_ground import cli
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.storage.files import write_atomically
from pg_ground.types import UserError

CONFIG = "configs/quickstart.py"

METRICS = {
    "acc@.5": "eval/boxes/acc50",
    "IoU": "eval/boxes/mean_iou",
    "sampled IoU": "eval/boxes/sampled_mean_iou",
    "point in box": "eval/points/point_in_box",
    "malformed": "eval/boxes/malformed_fraction",
}
"""The metrics by their column."""


def run_arm(arm: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Returns the metrics of one run at the end of each stage. Starts the run if it is missing.

    Raises:
      UserError: the run fails.
    """
    seconds_file = workdir / "seconds.json"
    if not seconds_file.is_file():
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "pg_ground.train",
            f"--config={CONFIG}:{arm}",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
        ]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"the run in {workdir} failed")
        write_atomically(seconds_file, json.dumps(time.perf_counter() - start))
    evaluations = [
        line for line in read_metrics(workdir) if METRICS["acc@.5"] in line and line["step"] > 0
    ]
    ends = {
        line["stage"]: {column: line[metric] for column, metric in METRICS.items()}
        for line in evaluations
    }
    wall_s = json.loads(seconds_file.read_text())
    return {"arm": arm, "seed": seed, "wall_s": wall_s, **ends}


def result_table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns one row per run: each metric at the end, and for two stages also after SFT."""
    rows = []
    for result in results:
        has_grpo = "grpo" in result
        end = result["grpo"] if has_grpo else result["sft"]
        cells = [
            f"{result['sft'][column]:.3f} → {end[column]:.3f}" if has_grpo else f"{end[column]:.3f}"
            for column in METRICS
        ]
        rows.append([result["arm"], str(result["seed"]), *cells, f"{result['wall_s']:.0f}"])
    return Table(
        "quickstart: GRPO, and the same compute on SFT alone",
        ["arm", "seed", *METRICS, "wall s"],
        rows,
        "a → b: after SFT → at the end. Greedy on 512 held-out scenes; sampled at temperature 1.",
    )


def main(argv: Sequence[str]) -> None:
    defaults = {"seeds": "0,1,2", "arms": "grpo,sft_loose,sft_exact", "workdir": "runs/arms"}
    flags = cli.parse_script_flags(argv, defaults)
    workdir = Path(flags["workdir"])
    results = [
        run_arm(arm, int(seed), workdir / f"{arm}_{seed}")
        for seed in flags["seeds"].split(",")
        for arm in flags["arms"].split(",")
    ]
    write_atomically(workdir / "arms.json", json.dumps(results, indent=1) + "\n")
    print(ascii_table(result_table(results)))


if __name__ == "__main__":
    cli.run_script(main)
