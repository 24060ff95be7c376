"""Bounds on the figures of a compiled program, by arithmetic on its jaxpr and its arguments.

`compile` reads XLA's program. A release of XLA that writes something new could be misread, and
the figures would be wrong without a sign. A figure outside these bounds is an error.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pg_ground.aot import flops
from pg_ground.parallel.sharding import AnyMesh
from pg_ground.training.program import Program
from pg_ground.training.setup import Setup
from pg_ground.types import JsonObject

SLACK = 2.0
"""Factor of the upper bounds.

In all programs of configs/tpu.py XLA moves 0.02 to 1.0 of `flops.product_bytes` (2026-11-27, jax
0.10.2 and 0.12.0.1): it keeps results in the memory on the chip. The largest share is 1.6: an
evaluation of configs/refcoco.py at 448 pixels on v6e, where few tokens follow a long prefix. A
misread program was 170 times too large.
"""

COLLECTIVE_SLACK = 1.5

WEIGHTS = ("parameters", "optimizer", "reference", "rollout weights")
"""Kinds of arguments that a program reads at least once."""


class Bounds(NamedTuple):
    """The smallest and the largest possible value of each figure of one device."""

    hbm_traffic: tuple[float, float]
    """Bytes that a run reads from HBM and writes to it."""
    collectives: tuple[float, float]
    """Bytes of all collectives of a run."""
    memory: tuple[float, float]
    """Bytes of HBM that XLA assigns: at least the arguments."""


def make_bounds(
    setup: Setup, mesh: AnyMesh, program: Program, jaxpr: core.Jaxpr, trip_count: int
) -> Bounds:
    """Returns the bounds of a program.

    Args:
      jaxpr: the traced program.
      trip_count: iterations of each `while` loop.
    """
    product_bytes = flops.product_bytes(
        jaxpr, trip_count, mesh.shape["replica"] * mesh.shape["data"]
    )
    inside = program.memory.inside
    read_bytes = sum(inside.get(kind, 0.0) for kind in WEIGHTS)
    # Optimizer state is not an operand of a product. An update reads and writes it.
    moved_bytes = product_bytes + 4 * read_bytes
    return Bounds(
        # Half, because a reference policy can share arrays, and a program need not read each one.
        hbm_traffic=(0.5 * read_bytes, SLACK * moved_bytes),
        collectives=(0.0, COLLECTIVE_SLACK * _collective_bytes(setup, mesh, jaxpr, trip_count)),
        memory=(sum(inside.values()), np.inf),
    )


def _collective_bytes(setup: Setup, mesh: AnyMesh, jaxpr: core.Jaxpr, trip_count: int) -> float:
    """Returns about the bytes of collectives if every weight is gathered whenever it is used.

    A forward pass gathers the weights once. A gradient gathers them twice and scatters their
    gradients, at most in float32. A token gathers them if they stay sharded. Each block of logits
    may gather the embedding, and scatter its gradient.
    """
    if mesh.size == 1:
        return 0.0
    settings = [setup.config.stage_settings(stage) for stage in setup.config.stages]
    gradients = max(stage.updates_per_step * stage.grad_accum_steps for stage in settings)
    itemsize = jnp.dtype(setup.config.model.dtype).itemsize
    weights = itemsize * sum(
        float(np.prod(leaf.shape)) for leaf in (setup.trained | setup.frozen).values()
    )
    model = setup.config.model
    tokens = max(setup.config.data.suffix_length, setup.config.grpo.max_new_tokens)
    blocks = tokens / model.logits_block
    embedding = itemsize * model.text.vocab_size * model.text.width
    gathered = weights * (1 + 4 * gradients + trip_count)
    gathered += embedding * (1 + 2 * gradients) * blocks
    if mesh.shape["model"] == 1:
        return gathered
    # Devices that split a matrix add up their parts of each result.
    rows = mesh.shape["replica"] * mesh.shape["data"]
    return gathered + 2 * flops.product_bytes(jaxpr, trip_count, rows)


def find_violation(
    bounds: JsonObject, hbm_traffic: float, collectives: float, memory: float
) -> str | None:
    """Returns which figure is outside its bounds, in words; None if all are inside.

    Args:
      bounds: the fields of a `Bounds`.
    """
    figures = {
        "hbm_traffic": ("bytes moved in HBM", hbm_traffic),
        "collectives": ("bytes of collectives", collectives),
        "memory": ("bytes of memory", memory),
    }
    for name, (words, value) in figures.items():
        low, high = bounds[name]
        if not low <= value <= high:
            return f"{value:.4g} {words}, but arithmetic allows {low:.4g} to {high:.4g}"
    return None
