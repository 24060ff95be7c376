"""The quickstart and its two controls over several seeds, in one table: GRPO after SFT, against SFT alone for as long.

python benchmarks/quickstart.py --seeds=0,1,2 --workdir=runs/arms [--arms=grpo,sft_loose,sft_exact]

Each run is a process of its own, one after the other; a run that is already finished is only read. Prints one row per run and
writes them to WORKDIR/arms.json: held-out measures at the end of SFT and at the end, and wall seconds of the whole command.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pg_ground import cli
from pg_ground.reporting.files import write_atomically
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError

CONFIG = "configs/quickstart.py"

MEASURES = {
    "acc@.5": "eval/boxes/acc50",
    "IoU": "eval/boxes/mean_iou",
    "sampled IoU": "eval/boxes/sampled_mean_iou",
    "point in box": "eval/points/point_in_box",
    "malformed": "eval/boxes/malformed_fraction",
}


def run_arm(arm: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Returns the measures of one run at the end of each stage, having run it unless it is finished.

    Raises:
      UserError: the run fails.
    """
    summary = workdir / "seconds.json"
    if not summary.is_file():
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "pg_ground.train",
            f"--config={CONFIG}:{arm}",
            f"--workdir={workdir}",
        ]
        if subprocess.run([*command, f"--config.seed={seed}"], check=False).returncode:
            raise UserError(f"the run in {workdir} failed")
        write_atomically(summary, json.dumps(time.perf_counter() - start))
    lines = read_metrics(workdir)
    measured = [line for line in lines if MEASURES["acc@.5"] in line and line["step"] > 0]
    ends = {line["stage"]: {name: line[key] for name, key in MEASURES.items()} for line in measured}
    return {"arm": arm, "seed": seed, "wall_s": json.loads(summary.read_text()), **ends}


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Returns one row per run: each measure at the end, and for runs with two stages after SFT too."""
    rows = []
    for result in results:
        last = result.get("grpo", result["sft"])
        cells = [
            f"{result['sft'][m]:.3f} → {last[m]:.3f}" if "grpo" in result else f"{last[m]:.3f}"
            for m in MEASURES
        ]
        rows.append([result["arm"], str(result["seed"]), *cells, f"{result['wall_s']:.0f}"])
    note = "a → b: after SFT → at the end. Greedy on 512 held-out scenes; sampled at temperature 1."
    return Table(
        "quickstart: GRPO, and the same compute on SFT alone",
        ["arm", "seed", *MEASURES, "wall s"],
        rows,
        note,
    )


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(
        argv, {"seeds": "0,1,2", "arms": "grpo,sft_loose,sft_exact", "workdir": "runs/arms"}
    )
    workdir = Path(own["workdir"])
    results = [
        run_arm(arm, int(seed), workdir / f"{arm}_{seed}")
        for seed in own["seeds"].split(",")
        for arm in own["arms"].split(",")
    ]
    write_atomically(workdir / "arms.json", json.dumps(results, indent=1) + "\n")
    print(ascii_table(table(results)))


if __name__ == "__main__":
    cli.run_script(main)
