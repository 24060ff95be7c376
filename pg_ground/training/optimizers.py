"""The optax chain of a stage."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pg_ground.config import Optimizer
from pg_ground.params import map_named, matrix_axes


def schedule(c: Optimizer, steps: int) -> optax.Schedule:
    """Returns learning rate by update: a linear warm-up from 0, then `c.schedule`, reaching 0 after `steps` unless constant."""
    rest = max(steps - c.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(c.lr),
        "linear": optax.linear_schedule(c.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(c.lr, rest),
    }[c.schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, c.lr, max(c.warmup_steps, 1)), after], [c.warmup_steps]
    )


def optimizer(
    c: Optimizer, steps: int, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Returns the chain for a stage of `steps` updates: clip by global norm, then adamw (arXiv 1711.05101) or muon.

    `factors` multiply the learning rates of the parameters they name; the norm that is clipped is that before.
    """
    lr = schedule(c, steps)
    clip = clipped(c.clip_norm) if c.clip_norm else optax.identity()
    if c.name == "adamw":
        step = optax.adamw(lr, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
    else:
        step = muon(
            lr,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
    if not factors or all(factor == 1 for factor in factors.values()):
        return optax.chain(clip, step)

    def scale(updates: Any, _: Any) -> Any:
        return map_named(lambda name, update: update * factors[name], updates)

    return optax.chain(clip, step, optax.stateless(scale))


def clipped(norm: float) -> optax.GradientTransformation:
    """Returns what scales gradients down to a global norm of `norm` where theirs is larger.

    As `optax.clip_by_global_norm`, but by one factor: XLA writes out a gradient that is divided, and reads it twice, where it
    multiplies in passing (docs/performance.md, 2026-11-22: a third of an update of 274 million parameters on a CPU).
    """

    def scale(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(scale)


def matrices(params: Any) -> Any:
    """Returns the tree of `params` with the matrix axes of each leaf that is a matrix, None elsewhere."""

    def axes(name: str, leaf: Any) -> MuonDimensionNumbers | None:
        found, rank = matrix_axes(name), leaf.ndim
        return found and MuonDimensionNumbers(*(tuple(rank + a for a in side) for side in found))

    return map_named(axes, params)
