"""Compares rows of `ALGORITHMS`: the quickstart's GRPO stage, from one supervised checkpoint.

python benchmarks/algorithms.py [--algorithms=grpo,dapo,…] [--steps=30] [--out=runs/algorithms]

Every row starts from the same parameters, sees the same questions and takes the same number of
steps (`configs/algorithms.py`). Prints a table and one JSON object: reward and IoU of the sampled
completions in the first and the last third of the steps, held-out greedy accuracy before and after,
the share of clipped tokens, the programs that were compiled, and seconds per step.
"""

import io
import json
import logging
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pg_ground import cli, config
from pg_ground.parallel import sharding
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.training.loop import train

ALGORITHMS = (
    "grpo,dr_grpo,dapo,gspo,gmpo,cispo,sapo,rloo,remax,reinforce_plus_plus_baseline,opo,gdpo"
)

CONFIG = Path(__file__).parents[1] / "configs/algorithms.py"

ACC50 = "eval/boxes@256/acc50"
"""Greedy accuracy on 256 held-out scenes."""

STEP_PROGRAMS = re.compile(
    r"Compiling jit\((rollout|score|reference|_compute_advantages|grpo_update|refill)\)"
)
"""jax's log message for a program of the GRPO step."""

COLUMNS = ["algorithm", "reward", "IoU", "held-out acc@.5", "clipped", "s/step", "compiled"]


class CompilationLog(logging.Handler):
    """Collects the names of the step's programs that jax compiles."""

    def __init__(self):
        super().__init__()
        self.programs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        match = STEP_PROGRAMS.match(record.getMessage())
        if match:
            self.programs.append(match[1])


def make_recipe(algorithm: str, steps: int) -> ConfigDict:
    """Returns the recipe of an algorithm with `steps` GRPO steps."""
    c = cli.load(f"{CONFIG}:{algorithm}").unlock()
    c.grpo.steps = steps
    c.grpo.optimizer.schedule = "constant"
    c.eval.examples = 256
    c.log.update(every=1, samples_every=0)
    c.checkpoint.every = 10_000
    return c


def compare(algorithm: str, steps: int, start: Path, out: Path) -> dict[str, Any]:
    """Returns the results of one algorithm, trained from the checkpoint in `start`."""
    c = make_recipe(algorithm, steps)
    workdir = out / algorithm
    shutil.rmtree(workdir, ignore_errors=True)
    c.stages = ("grpo",)
    c.init = str(start)
    compilations = CompilationLog()
    logging.getLogger("jax._src.dispatch").setLevel(logging.ERROR)
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.propagate = False
    logger.addHandler(compilations)
    with redirect_stdout(io.StringIO()), jax.log_compiles():
        train(config.parse(c), workdir)
    logger.removeHandler(compilations)
    lines = read_metrics(workdir)
    steps_lines = [line for line in lines if "reward/total" in line]
    accuracies = [line[ACC50] for line in lines if ACC50 in line]
    programs = compilations.programs
    return {
        "algorithm": algorithm,
        "reward": first_and_last_third(steps_lines, "reward/total"),
        "iou": first_and_last_third(steps_lines, "reward/iou"),
        "acc50": [accuracies[0], accuracies[-1]],
        "clip_fraction": statistics.mean(line["policy/clip_fraction"] for line in steps_lines),
        "compiled": {name: programs.count(name) for name in sorted(set(programs))},
        "step_s": statistics.median(line["time/step_s"] for line in steps_lines[2:]),
        # JSON has no NaN: it is null in metrics.jsonl.
        "finite": all(line["policy/loss"] is not None for line in steps_lines),
    }


def first_and_last_third(lines: Sequence[dict[str, float]], metric: str) -> list[float]:
    """Returns the mean of a metric in the first and in the last third of the steps."""
    values = [line[metric] for line in lines if line[metric] is not None]
    third = max(1, len(values) // 3)
    return [statistics.mean(values[:third]), statistics.mean(values[-third:])]


def table_row(result: dict[str, Any]) -> list[str]:
    """Returns the cells of one algorithm."""

    def before_and_after(pair: Sequence[float]) -> str:
        return f"{pair[0]:.3f} → {pair[1]:.3f}"

    return [
        result["algorithm"],
        before_and_after(result["reward"]),
        before_and_after(result["iou"]),
        before_and_after(result["acc50"]),
        f"{result['clip_fraction']:.3f}",
        f"{result['step_s']:.3f}",
        ", ".join(f"{name} {count}" for name, count in result["compiled"].items()),
    ]


def main(argv: Sequence[str]) -> None:
    defaults = {"algorithms": ALGORITHMS, "steps": 30, "out": "runs/algorithms"}
    flags = cli.parse_script_flags(argv, defaults)
    out = Path(flags["out"])
    supervised = make_recipe("grpo", 1)
    supervised.stages = ("sft",)
    sharding.set_cpu_devices(config.parse(supervised).mesh)
    start = out / "sft"
    if not (start / "report.html").exists():
        train(config.parse(supervised), start)
    results = []
    for algorithm in flags["algorithms"].split(","):
        results.append(compare(algorithm, flags["steps"], start, out))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    note = (
        f"{flags['steps']} steps each; first → last third of the steps; "
        f"held out: before → after, greedy"
    )
    rows = [table_row(result) for result in results]
    print(ascii_table(Table("algorithms", COLUMNS, rows, note)))
    print(json.dumps(results))


if __name__ == "__main__":
    cli.run_script(main)
