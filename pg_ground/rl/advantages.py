"""How much better a completion is than the others of its group: `f32[B,G]` rewards to `f32[B,G]` advantages.

NaN marks a completion that no reward could judge: it leaves the statistics of its group and gets advantage 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from pg_ground.types import Array

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does: groups whose rewards differ by less than this are not blown up to ±1."""

Advantage = Callable[[Float[Array, "B G"]], Float[Array, "B G"]]


def group_mean(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the mean reward of each group, over the completions that have one; 0 for a group without."""
    judged = ~jnp.isnan(rewards)
    return jnp.where(judged, rewards, 0).sum(axis=1, keepdims=True) / jnp.maximum(judged.sum(axis=1, keepdims=True), 1)


def group_std(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the standard deviation of each group's rewards with Bessel's correction; 0 for fewer than two of them."""
    judged = ~jnp.isnan(rewards)
    squares = jnp.where(judged, jnp.square(rewards - group_mean(rewards)), 0).sum(axis=1, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(judged.sum(axis=1, keepdims=True) - 1, 1))


def centred(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3)."""
    return jnp.where(jnp.isnan(rewards), 0, rewards - group_mean(rewards))


def standardised(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns (reward − mean) / (std + 1e-4) within the group (GRPO, arXiv 2402.03300, section 4.1.2, with TRL's epsilon)."""
    return centred(rewards) / (group_std(rewards) + EPSILON)


def leave_one_out(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740, section 3)."""
    judged = (~jnp.isnan(rewards)).sum(axis=1, keepdims=True)
    return centred(rewards) * judged / jnp.maximum(judged - 1, 1)
