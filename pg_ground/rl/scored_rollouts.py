"""From completions to what an update learns from: judged, topped up with fresh groups, compared."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from pg_ground.config import Weight
from pg_ground.rl import advantages
from pg_ground.rl.advantages import Scores
from pg_ground.rl.loss import Algorithm, reward_penalty
from pg_ground.types import Answer, Array, Batch, Rewards, Rollout


class ScoredRollouts(NamedTuple):
    """Groups of completions and how good each is, before they are compared."""

    batch: Batch
    rollout: Rollout
    answer: Answer
    rewards: Rewards
    baseline: Float[Array, " B"] | None
    """Total reward of each prompt's greedy completion, where the algorithm compares with it."""


class PolicyBatch(NamedTuple):
    """What a reinforced step learns from, once for each question of a batch."""

    batch: Batch
    rollout: Rollout
    advantages: Float[Array, "B G"]
    ref_logps: Float[Array, "B G T"] | None
    """Under the reference policy; None where the algorithm does not look at it."""


def weights_at(weights: Mapping[str, Weight], step: int) -> dict[str, float]:
    """Returns the weight of each reward at a step (from 0): a schedule reaches its second value after so many steps."""

    def at(weight: Weight) -> float:
        if not isinstance(weight, tuple):
            return weight
        start, end, steps = weight
        return start + (end - start) * min(step / max(steps, 1), 1.0)

    return {name: at(weight) for name, weight in weights.items()}


def without_greedy(
    rollout: Rollout, answer: Answer, rewards: Rewards, batch: Batch
) -> ScoredRollouts:
    """Returns the completions but for the last of each group, which is the greedy one: its reward is the baseline."""
    rollout, answer, rest = jax.tree.map(lambda leaf: leaf[:, :-1], (rollout, answer, rewards))
    return ScoredRollouts(batch, rollout, answer, rest, rewards.total[:, -1])


def has_spread(sampled: ScoredRollouts) -> Bool[Array, " B"]:
    """Returns the groups in which not all rewards are equal."""
    return advantages.has_spread(sampled.rewards.total)


def refill(kept: ScoredRollouts, fresh: ScoredRollouts) -> ScoredRollouts:
    """Returns `kept` with as many of its groups without spread as can be replaced by groups of `fresh` with spread, in order.

    DAPO's dynamic sampling (arXiv 2503.14476, eq. 11) with shapes that do not change.
    """
    lacking, useful = ~has_spread(kept), has_spread(fresh)
    place = jnp.cumsum(lacking) - 1
    found = lacking & (place < useful.sum())
    source = jnp.argsort(~useful, stable=True)[jnp.clip(place, 0, len(useful) - 1)]

    def take(old: Any, new: Any) -> Any:
        return jnp.where(found.reshape(-1, *[1] * (old.ndim - 1)), new[source], old)

    return jax.tree.map(take, kept, fresh)


def compare(
    sampled: ScoredRollouts,
    ref_logps: Float[Array, "B G T"] | None,
    weights: Mapping[str, float | Float[Array, ""]],
    kl_coef: float | Float[Array, ""],
    row: Algorithm,
    epsilon: float,
) -> PolicyBatch:
    """Returns the completions with their advantages."""
    batch, rollout, _, rewards, baseline = sampled
    total = rewards.total
    if row.kl_in_reward and ref_logps is not None:
        total = total - kl_coef * reward_penalty(rollout.logps, ref_logps, rollout.mask, row)
    scores = Scores(total, rewards.parts, weights, rollout.mask.sum(axis=-1), baseline, epsilon)
    return PolicyBatch(batch, rollout, row.advantage(scores), ref_logps)
