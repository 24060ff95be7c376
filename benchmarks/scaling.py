"""How a step's cost grows with group, completion length, image and batch, beside the growth of its operations by formula.

python benchmarks/scaling.py [--axes=group,tokens,image,prompts] [--repeats=3] [--attention_block=0] [--json=O]

A small model of PaliGemma's architecture. For each program: CPU seconds (the fastest of `repeats`), bytes that it needs beside
its arguments and results, and operations counted in its jaxpr, recomputation included; for each axis the exponent of a straight
line through their logarithms. Cost that grew faster than the operations do would be a fault; slower is overhead that is spread
over more work. Ten minutes on two CPU cores.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pg_ground import cli, config
from pg_ground.aot import flops
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.training import programs
from pg_ground.training.loop import Run, begin, fresh_state
from pg_ground.types import UserError

sys.path.insert(
    0, str(Path(__file__).parent / "peers")
)  # they are programs, and import one another as such
import ours
from work import Work

AXES: dict[str, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32, 64),
    "tokens": (8, 32, 128, 512),
    "image": (48, 96, 192),
    "prompts": (1, 2, 4, 8, 16),
}
"""What is varied, one at a time; an image in pixels a side."""

BASE = Work("tiny", 4, 4, 16, 16, "float32", True, "cpu", 0, 1, "")
PROGRAMS = ("rollout", "reference", "update")


class Cost(NamedTuple):
    """Of one run of a program."""

    seconds: float
    temp_bytes: float
    flops: float


def costs(axis: str, value: int, repeats: int, attention_block: int) -> dict[str, Cost]:
    """Returns what each program costs with one of the sizes changed."""
    w = BASE if axis == "image" else BASE._replace(**{axis: value})
    tree = ours.recipe(w)
    tree.model.update(image_size=value if axis == "image" else 96, attention_block=attention_block)
    c = config.parse(tree)
    mesh = sharding.make_mesh(c.mesh)
    model = PaliGemma(c.model, sharding.activation_sharding(mesh))
    trained, frozen = programs.layout(c, model, mesh)
    factors = programs.factors_of(c, trained | frozen)
    run = Run(c, Path(), model, {}, factors, None, mesh, None, None)  # pyright: ignore[reportArgumentType]: only its programs
    params = begin(c, model, trained)
    state = fresh_state(run, "grpo", params)
    batch, key = ours.random_batch(c, mesh, 0), jax.random.key(0)
    found = {}

    def measure(name: str, program: programs.Program, *arguments: Any) -> Any:
        traced = programs.compiled(program, c, mesh).trace(*arguments)
        ready = traced.lower().compile()
        memory, best, out = ready.memory_analysis(), math.inf, None
        for _ in range(repeats + 1):
            given = jax.block_until_ready(
                jax.tree.map(lambda leaf: leaf.copy(), arguments)
            )  # some are donated
            start = time.process_time()
            out = jax.block_until_ready(ready(*given))
            best = min(best, time.process_time() - start)
        found[name] = Cost(
            best, float(memory.temp_size_in_bytes), float(flops.count(traced.jaxpr.jaxpr, w.tokens))
        )
        return out

    rollout = measure("rollout", programs.rollout(c, model), params, {}, batch, key)
    logps = measure("reference", programs.reference_logps(c, model), params, {}, batch, rollout)
    experience = PolicyBatch(
        batch, rollout, jax.random.normal(key, rollout.tokens.shape[:2]), logps
    )
    measure(
        "update", programs.grpo_update(c, model, mesh, factors, state), state, {}, experience, key
    )
    return found


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of log cost over log value, by least squares."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(
        argv, {"axes": ",".join(AXES), "repeats": 3, "attention_block": 0, "json": ""}
    )
    axes = own["axes"].split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--axes={own['axes']}: {config.nearest(axis, AXES)}")
    everything, rows = {}, []
    for axis in axes:
        values = AXES[axis]
        found = [costs(axis, value, own["repeats"], own["attention_block"]) for value in values]
        everything[axis] = {
            value: {k: v._asdict() for k, v in point.items()}
            for value, point in zip(values, found, strict=True)
        }
        for name in PROGRAMS:
            of = [point[name] for point in found]
            slopes = [
                exponent(values, [getattr(cost, field) for cost in of]) for field in Cost._fields
            ]
            last = [
                exponent(values[-2:], [getattr(cost, field) for cost in of[-2:]])
                for field in Cost._fields
            ]
            both = (f"{a:.2f} ({b:.2f})" for a, b in zip(slopes, last, strict=True))
            seconds = f"{of[0].seconds:.3f}-{of[-1].seconds:.3f}"
            mib = f"{of[0].temp_bytes / 2**20:.0f}-{of[-1].temp_bytes / 2**20:.0f}"
            rows.append([axis, f"{values[0]}-{values[-1]}", name, *both, seconds, mib])
            print(rows[-1], file=sys.stderr, flush=True)
    heads = [
        "axis",
        "from-to",
        "program",
        "CPU seconds",
        "temporary bytes",
        "operations",
        "seconds",
        "MiB",
    ]
    print(ascii_table(Table("exponents over all sizes (between the last two)", heads, rows, "")))
    if own["json"]:
        Path(own["json"]).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
