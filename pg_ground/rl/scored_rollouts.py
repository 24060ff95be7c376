"""Completions with their rewards. Dynamic sampling refills them. They become a policy batch."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from pg_ground.rl import advantages
from pg_ground.rl.advantages import Scores
from pg_ground.rl.algorithms import Algorithm
from pg_ground.rl.loss import completion_kl
from pg_ground.types import Answer, Array, Batch, Rewards, Rollout

Weight = float | tuple[float, float, int]
"""Weight of a reward: fixed, or a linear schedule (start, end, steps)."""


class ScoredRollouts(NamedTuple):
    """G completions of each prompt with their answers and rewards."""

    batch: Batch
    rollout: Rollout
    answer: Answer
    rewards: Rewards
    baseline: Float[Array, " B"] | None
    """Total reward of each prompt's greedy completion; None unless the advantage needs it."""


class PolicyBatch(NamedTuple):
    """The data of one policy update."""

    batch: Batch
    rollout: Rollout
    advantages: Float[Array, "B G #T"]
    """One value per completion `[B, G, 1]`, or one per token `[B, G, T]`."""
    ref_logps: Float[Array, "B G T"] | None
    """Log-probabilities under the reference policy; None without a KL."""


def weights_at(weights: Mapping[str, Weight], step: int) -> dict[str, float]:
    """Returns the weight of each reward at a step. The first step is 0."""

    def at_step(weight: Weight) -> float:
        if not isinstance(weight, tuple):
            return weight
        start, end, steps = weight
        return start + (end - start) * min(step / max(steps, 1), 1.0)

    return {name: at_step(weight) for name, weight in weights.items()}


def split_off_greedy(
    rollout: Rollout, answer: Answer, rewards: Rewards, batch: Batch
) -> ScoredRollouts:
    """Returns the rollouts without the last completion of each group.

    It is greedy, and its reward is the baseline.
    """
    sampled_rollout, sampled_answer, sampled_rewards = jax.tree.map(
        lambda leaf: leaf[:, :-1], (rollout, answer, rewards)
    )
    baseline = rewards.total[:, -1]
    return ScoredRollouts(batch, sampled_rollout, sampled_answer, sampled_rewards, baseline)


def has_spread(scored: ScoredRollouts) -> Bool[Array, " B"]:
    """Returns True for each group whose total rewards are not all equal."""
    return advantages.has_spread(scored.rewards.total)


def refill(scored: ScoredRollouts, fresh: ScoredRollouts) -> ScoredRollouts:
    """Returns `scored` with groups of `fresh` that have spread in place of groups without spread,
    in order.

    This is DAPO's dynamic sampling (arXiv 2503.14476, eq. 11) with constant shapes.
    """
    without_spread = ~has_spread(scored)
    useful = has_spread(fresh)
    rank = jnp.cumsum(without_spread) - 1
    replaced = without_spread & (rank < useful.sum())
    source = jnp.argsort(~useful, stable=True)[jnp.clip(rank, 0, len(useful) - 1)]

    def replace(old: Array, new: Array) -> Array:
        return jnp.where(replaced.reshape(-1, *[1] * (old.ndim - 1)), new[source], old)

    return jax.tree.map(replace, scored, fresh)


def compute_advantages(
    scored: ScoredRollouts,
    ref_logps: Float[Array, "B G T"] | None,
    weights: Mapping[str, float | Float[Array, ""]],
    kl_coef: float | Float[Array, ""],
    algorithm: Algorithm,
) -> PolicyBatch:
    """Returns the policy batch of scored rollouts.

    Args:
      weights: weight of each reward at this step.
      kl_coef: weight of the KL, if the algorithm subtracts it from the reward.
    """
    rollout = scored.rollout
    total = scored.rewards.total
    if algorithm.kl_in_reward and ref_logps is not None:
        kl = completion_kl(rollout.logps, ref_logps, rollout.loss_mask, algorithm)
        total = total - kl_coef * kl
    lengths = rollout.loss_mask.sum(axis=-1)
    scores = Scores(total, scored.rewards.parts, weights, lengths, scored.baseline)
    estimates = algorithm.advantage(scores, **algorithm.options_for("advantage"))
    return PolicyBatch(scored.batch, rollout, per_token(estimates), ref_logps)


def per_token(estimates: Float[Array, "B G"] | Float[Array, "B G T"]) -> Float[Array, "B G #T"]:
    """Returns advantages that broadcast to `[B, G, T]`.

    A value per completion gets a last axis of length 1.
    """
    return estimates[..., None] if estimates.ndim == 2 else estimates
