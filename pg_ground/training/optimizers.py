"""The optax chain of a stage."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from pg_ground.config import Optimizer
from pg_ground.params import map_named, matrix_axes
from pg_ground.types import POLICY, Array


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up from 0, then `settings.schedule`.

    It reaches 0 after `steps` updates unless it is constant.
    """
    remaining = max(steps - settings.warmup_steps, 1)
    after_warmup = {
        "constant": optax.constant_schedule(settings.lr),
        "linear": optax.linear_schedule(settings.lr, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(settings.lr, remaining),
    }[settings.schedule]
    warmup = optax.linear_schedule(0.0, settings.lr, max(settings.warmup_steps, 1))
    return optax.join_schedules([warmup, after_warmup], [settings.warmup_steps])


def make_optimizer(
    settings: Optimizer, steps: int, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Returns the chain for `steps` updates: clip by global norm, then adamw (arXiv 1711.05101) or
    muon.

    Args:
      factors: factors of the learning rate by name (`policy/…`) of every trained parameter.
        The norm is clipped before the factors.
    """
    lr = schedule(settings, steps)
    clip = clip_by_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    if settings.name == "adamw":
        step = optax.adamw(lr, b1=settings.b1, b2=settings.b2, weight_decay=settings.weight_decay)
    else:
        step = muon(
            lr,
            weight_decay=settings.weight_decay,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    if not factors or all(factor == 1 for factor in factors.values()):
        return optax.chain(clip, step)

    def factor_of(name: str) -> float:
        # Only the policy has factors. Other trained trees, such as a critic, have factor 1.
        return factors[name] if name.startswith(f"{POLICY}/") else 1.0

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        return map_named(lambda name, update: update * factor_of(name), updates)

    return optax.chain(clip, step, optax.stateless(scale))


def clip_by_norm(norm: float) -> optax.GradientTransformation:
    """Returns a transformation that scales gradients down to the global norm `norm` if their norm
    is larger.

    It multiplies by one factor, unlike `optax.clip_by_global_norm`. XLA fuses the product into the
    next operation, but writes out a quotient and reads it twice (docs/performance.md, 2026-11-22: a
    third of an update of 274 million parameters on a CPU).
    """

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        factor = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda update: update * factor.astype(update.dtype), updates)

    return optax.stateless(scale)


def muon_dimensions(params: PyTree) -> PyTree:
    """Returns the tree of `params` with the matrix axes of each matrix, and None for every other
    parameter."""

    def dimensions(name: str, leaf: Array) -> MuonDimensionNumbers | None:
        axes = matrix_axes(name)
        if axes is None:
            return None
        return MuonDimensionNumbers(*(tuple(leaf.ndim + axis for axis in side) for side in axes))

    return map_named(dimensions, params)
