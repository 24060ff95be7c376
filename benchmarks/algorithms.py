"""Rows of `ALGORITHMS` side by side: the quickstart's reinforced stage for some steps each, all from one supervised checkpoint.

python benchmarks/algorithms.py [--algorithms=grpo,dapo,… --steps=30 --out=runs/algorithms]

Every row starts from the same parameters, sees the same questions and spends the same steps (`configs/algorithms.py`). Prints a
table and one JSON object: reward and IoU of the sampled completions in the first and the last third of the steps, held-out greedy
accuracy before and after, the programs that were compiled, seconds a step, and what moved.
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

from pg_ground import cli, config
from pg_ground.parallel import sharding
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.training.loop import train

ROWS = "grpo,dr_grpo,dapo,gspo,gmpo,cispo,sapo,rloo,remax,reinforce_plus_plus_baseline,opo,gdpo"
CONFIG = Path(__file__).parents[1] / "configs/algorithms.py"
ACC50 = "eval/boxes@256/acc50"
"""Of 256 of the held-out scenes."""
PROGRAMS = re.compile(r"Compiling jit\((roll|judge|compare|learn|grpo_update|refill)\)")


class Compiled(logging.Handler):
    """Counts the compilations of the programs of a reinforced step."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = PROGRAMS.match(record.getMessage())
        if found:
            self.names.append(found[1])


def get(name: str, steps: int) -> Any:
    """Returns the recipe of a row, cut to `steps` reinforced steps."""
    c = cli.load(f"{CONFIG}:{name}").unlock()
    c.grpo.steps, c.log.every, c.log.samples_every, c.checkpoint.every = steps, 1, 0, 10_000
    c.grpo.optimizer.schedule, c.eval.examples = "constant", 256
    return c


def run(name: str, steps: int, start: Path, out: Path) -> dict[str, Any]:
    """Returns the figures of one row, its stage begun at the checkpoint in `start`."""
    c, workdir = get(name, steps), out / name
    shutil.rmtree(workdir, ignore_errors=True)
    c.stages, c.init = ("grpo",), str(start)
    counter = Compiled()
    logging.getLogger("jax._src.dispatch").setLevel(logging.ERROR)
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.propagate = False
    logger.addHandler(counter)
    with redirect_stdout(io.StringIO()), jax.log_compiles():
        train(config.parse(c), workdir)
    logger.removeHandler(counter)
    lines = read_metrics(workdir)
    learned = [line for line in lines if "reward/total" in line]
    held_out = [line for line in lines if ACC50 in line]
    third = max(1, len(learned) // 3)

    def means(key: str) -> list[float]:
        values = [line[key] for line in learned]
        return [statistics.mean(values[:third]), statistics.mean(values[-third:])]

    return {
        "algorithm": name,
        "reward": means("reward/total"),
        "iou": means("reward/iou"),
        "acc50": [held_out[0][ACC50], held_out[-1][ACC50]],
        "clip_fraction": statistics.mean(line["policy/clip_fraction"] for line in learned),
        "compiled": {key: counter.names.count(key) for key in sorted(set(counter.names))},
        "step_s": statistics.median(line["time/step_s"] for line in learned[2:]),
        "finite": all(line["policy/loss"] == line["policy/loss"] for line in learned),
    }


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(argv, {"algorithms": ROWS, "steps": 30, "out": "runs/algorithms"})
    out = Path(own["out"])
    first = get("grpo", 1)
    first.stages = ("sft",)
    sharding.set_cpu_devices(config.parse(first).mesh)
    start = out / "sft"
    if not (start / "report.html").exists():
        train(config.parse(first), start)
    rows = []
    for name in own["algorithms"].split(","):
        rows.append(run(name, own["steps"], start, out))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    def both(pair: Sequence[float]) -> str:
        return f"{pair[0]:.3f} → {pair[1]:.3f}"

    cells = [
        [r["algorithm"], both(r["reward"]), both(r["iou"]), both(r["acc50"]), f"{r['clip_fraction']:.3f}", f"{r['step_s']:.3f}",
         ", ".join(f"{name} {count}" for name, count in r["compiled"].items())]
        for r in rows
    ]  # fmt: skip
    heads = ["algorithm", "reward", "IoU", "held-out acc@.5", "clipped", "s/step", "compiled"]
    note = (
        f"{own['steps']} steps each; first → last third of them; held out: before → after, greedy"
    )
    print(ascii_table(Table("algorithms", heads, cells, note)))
    print(json.dumps(rows))


if __name__ == "__main__":
    cli.run_script(main)
