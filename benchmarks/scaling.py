"""Measures how the cost of a step grows with group, completion length, image and batch.

python benchmarks/scaling.py [--axes=group,tokens,image,prompts] [--repeats=3]
    [--attention_block=0] [--json=O]

The model is a small PaliGemma. For each program the table has CPU seconds (the fastest of
`repeats`), the bytes that the program needs beside its arguments and results, and the operations in
its jaxpr, recomputation included. For each axis it has the exponent: the slope of a straight line
through the logarithms. The cost must not grow faster than the operations. Slower growth means that
overhead is spread over more work. It takes ten minutes on two CPU cores.
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
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.training.program import Program, jit_program
from pg_ground.training.setup import init_params, make_setup
from pg_ground.training.stages import make_stages
from pg_ground.types import POLICY, UserError, nearest

# The peers are programs, and import one another as top-level modules.
sys.path.insert(0, str(Path(__file__).parent / "peers"))
import ours
from work import Work

AXES: dict[str, tuple[int, ...]] = {
    "group": (2, 4, 8, 16, 32, 64),
    "tokens": (8, 32, 128, 512),
    "image": (48, 96, 192),
    "prompts": (1, 2, 4, 8, 16),
}
"""The sizes that are varied, one axis at a time. The image is in pixels per side."""

BASE = Work(
    size="tiny",
    prompts=4,
    group=4,
    tokens=16,
    prompt_tokens=16,
    dtype="float32",
    checkpointing=True,
    device="cpu",
    threads=0,
    grad_accum_steps=1,
    variant="",
)

PROGRAMS = ("rollout", "reference", "update")

COLUMNS = [
    "axis",
    "from-to",
    "program",
    "CPU seconds",
    "temporary bytes",
    "operations",
    "seconds",
    "MiB",
]


class Cost(NamedTuple):
    """The cost of one run of a program."""

    seconds: float
    temp_bytes: float
    flops: float


def program_costs(axis: str, value: int, repeats: int, attention_block: int) -> dict[str, Cost]:
    """Returns the cost of each program if one of the sizes has this value."""
    work = BASE if axis == "image" else BASE._replace(**{axis: value})
    recipe = ours.recipe(work)
    image_size = value if axis == "image" else 96
    recipe.model.update(image_size=image_size, attention_block=attention_block)
    c = config.parse(recipe)
    mesh = sharding.make_mesh(c.mesh)
    setup = make_setup(c, mesh, sharding.hbm_bytes(mesh))
    stage = make_stages(setup)[-1]
    state = stage.init(init_params(c, setup.model, setup.trained))
    policy = state.params[POLICY]
    batch = ours.random_batch(setup, mesh, 0)
    key = jax.random.key(0)
    programs = stage.programs()
    costs = {}

    def measure(name: str, *arguments: Any) -> Any:
        costs[name], result = measure_cost(programs[name], arguments, c.mesh, mesh, repeats)
        return result

    rollout = measure("rollout", policy, {}, batch, key)
    logps = measure("reference", policy, {}, batch, rollout)
    advantages = jax.random.normal(key, (*rollout.tokens.shape[:2], 1))
    measure("update", state, {}, PolicyBatch(batch, rollout, advantages, logps), key)
    return costs


def measure_cost(
    program: Program, arguments: tuple[Any, ...], settings: config.Mesh, mesh: Any, repeats: int
) -> tuple[Cost, Any]:
    """Returns the cost of a program on these arguments, and its result."""
    traced = jit_program(program, settings, mesh).trace(*arguments)
    compiled = traced.lower().compile()
    seconds = math.inf
    result = None
    for _ in range(repeats + 1):
        # The program may donate its arguments, so it gets copies.
        copies = jax.block_until_ready(jax.tree.map(lambda leaf: leaf.copy(), arguments))
        start = time.process_time()
        result = jax.block_until_ready(compiled(*copies))
        seconds = min(seconds, time.process_time() - start)
    temp_bytes = float(compiled.memory_analysis().temp_size_in_bytes)
    operations = float(flops.count(traced.jaxpr.jaxpr, program.decode_steps or 1))
    return Cost(seconds, temp_bytes, operations), result


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of log cost over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def table_row(axis: str, program: str, costs: Sequence[Cost]) -> list[str]:
    """Returns the exponents of a program over all sizes of an axis, and between the last two."""
    sizes = AXES[axis]
    exponents = []
    for field in Cost._fields:
        values = [getattr(cost, field) for cost in costs]
        last = exponent(sizes[-2:], values[-2:])
        exponents.append(f"{exponent(sizes, values):.2f} ({last:.2f})")
    return [
        axis,
        f"{sizes[0]}-{sizes[-1]}",
        program,
        *exponents,
        f"{costs[0].seconds:.3f}-{costs[-1].seconds:.3f}",
        f"{costs[0].temp_bytes / 2**20:.0f}-{costs[-1].temp_bytes / 2**20:.0f}",
    ]


def main(argv: Sequence[str]) -> None:
    defaults = {"axes": ",".join(AXES), "repeats": 3, "attention_block": 0, "json": ""}
    flags = cli.parse_script_flags(argv, defaults)
    axes = flags["axes"].split(",")
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"--axes={flags['axes']}: {nearest(axis, AXES)}")
    document = {}
    rows = []
    for axis in axes:
        costs = {
            value: program_costs(axis, value, flags["repeats"], flags["attention_block"])
            for value in AXES[axis]
        }
        document[axis] = {
            value: {name: cost._asdict() for name, cost in by_program.items()}
            for value, by_program in costs.items()
        }
        for name in PROGRAMS:
            rows.append(table_row(axis, name, [by_program[name] for by_program in costs.values()]))
            print(rows[-1], file=sys.stderr, flush=True)
    title = "exponents over all sizes (between the last two)"
    print(ascii_table(Table(title, COLUMNS, rows, "")))
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
