"""Importance-sampling correction: token weights for a sampler whose probabilities differ from the
trainer's.

TIS truncates the weight, MIS masks it. Modes have TRL's names (vllm_importance_sampling_mode).
"""

import functools
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Float

from pg_ground.rl.objectives import whole_sequence
from pg_ground.rl.options import Option
from pg_ground.types import Array

Floor = Annotated[float, Option("smallest weight that a token can have", minimum=0)]
Cap = Annotated[float, Option("largest weight that a token can have", minimum=0)]

Correction = Callable[..., Float[Array, "B G T"]]
"""`(log π_old − log π_sampler, mask, **options)` to the weight of each token."""


def token_truncate(
    log_ratio: Array, mask: Array, *,
    importance_sampling_floor: Floor = 0.0, importance_sampling_cap: Cap = 3.0,
) -> Array:  # fmt: skip
    """Returns π_old / π_sampler of each token, clipped to [floor, cap] (truncated importance
    sampling)."""
    return jnp.clip(jnp.exp(log_ratio), importance_sampling_floor, importance_sampling_cap)


def token_mask(
    log_ratio: Array, mask: Array, *,
    importance_sampling_floor: Floor = 0.0, importance_sampling_cap: Cap = 3.0,
) -> Array:  # fmt: skip
    """Returns π_old / π_sampler of each token; 0 if it lies outside [floor, cap] (masked
    importance sampling)."""
    ratio = jnp.exp(log_ratio)
    inside = (ratio >= importance_sampling_floor) & (ratio <= importance_sampling_cap)
    return jnp.where(inside, ratio, 0)


def for_whole_sequence(correction: Correction) -> Correction:
    """Returns `correction` of the probability of the whole completion, with the same options."""

    @functools.wraps(correction)
    def of_sequence(log_ratio: Array, mask: Array, **options: float) -> Array:
        return correction(whole_sequence(log_ratio, mask), mask, **options)

    return of_sequence


IMPORTANCE_SAMPLING_MODES: dict[str, Correction] = {
    "token_truncate": token_truncate,
    "token_mask": token_mask,
    "sequence_truncate": for_whole_sequence(token_truncate),
    "sequence_mask": for_whole_sequence(token_mask),
}
