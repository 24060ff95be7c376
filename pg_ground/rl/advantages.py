"""Advantage estimators: from the rewards of a batch (`Scores`) to `f32[B, G]` advantages.

A completion without a reward is NaN. It is left out of all statistics, and its advantage is 0.
Statistics over the batch include all devices. If all rewards of a group are equal, the group's
advantages are exactly 0. Three estimators are exceptions, because they compare with something
outside the group: `greedy_baseline`, `whitened` and `centred_and_whitened`.

The loss accepts advantages that broadcast to `[B, G, T]`, so an estimator with one value per token
(a critic) fits too.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground.rl.options import Option
from pg_ground.types import Array

AdvantageEpsilon = Annotated[
    float,
    Option(
        "added to standard deviations of rewards, so that tiny differences stay tiny", minimum=1e-12
    ),
]


class Scores(NamedTuple):
    """The rewards that completions are compared by."""

    total: Float[Array, "B G"]
    """Weighted sum of the rewards; NaN if no reward applies."""
    parts: Mapping[str, Float[Array, "B G"]] = {}
    """Each reward without its weight, for estimators that normalise before they sum."""
    weights: Mapping[str, float | Float[Array, ""]] = {}
    lengths: Int[Array, "B G"] | int = 1
    """Number of trained tokens, EOS included, for estimators that average over tokens."""
    baseline: Float[Array, " B"] | None = None
    """Total reward of the greedy completion of the same prompt."""


Advantage = Callable[..., Float[Array, "B G"]]
"""`(scores, **options)` to advantages."""


def group_mean(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the mean reward of each group without NaN; 0 for a group that has only NaN."""
    valid = ~jnp.isnan(rewards)
    total = jnp.where(valid, rewards, 0).sum(axis=1, keepdims=True)
    return total / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)


def group_std(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the standard deviation of each group with Bessel's correction; 0 for fewer than
    two rewards."""
    return _std(rewards, group_mean(rewards), axis=1)


def has_spread(rewards: Float[Array, "B G"]) -> Bool[Array, " B"]:
    """Returns True for each group whose rewards are not all equal."""
    return jnp.nanmax(rewards, axis=1) > jnp.nanmin(rewards, axis=1)


def centred(scores: Scores) -> Float[Array, "B G"]:
    """Returns the reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3)."""
    return _zero_if_nan(_above_group_mean(scores.total))


def standardised(
    scores: Scores, *, advantage_epsilon: AdvantageEpsilon = 1e-4
) -> Float[Array, "B G"]:
    """Returns (reward − mean) / (std + ε) within the group (GRPO, arXiv 2402.03300, section
    4.1.2)."""
    return centred(scores) / (group_std(scores.total) + advantage_epsilon)


def batch_scaled(
    scores: Scores, *, advantage_epsilon: AdvantageEpsilon = 1e-4
) -> Float[Array, "B G"]:
    """Returns (reward − group's mean) / (std of the whole batch + ε) (TRL's
    scale_rewards="batch")."""
    return centred(scores) / (_batch_std(scores.total) + advantage_epsilon)


def leave_one_out(scores: Scores) -> Float[Array, "B G"]:
    """Returns the reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740,
    section 3)."""
    count = (~jnp.isnan(scores.total)).sum(axis=1, keepdims=True)
    return centred(scores) * count / jnp.maximum(count - 1, 1)


def leave_one_out_normalised(
    scores: Scores, *, advantage_epsilon: AdvantageEpsilon = 1e-4
) -> Float[Array, "B G"]:
    """Returns leave-one-out advantages, standardised over the batch (TRL's
    normalize_advantages)."""
    advantages = scores.total * 0 + leave_one_out(scores)  # NaN stays NaN for the statistics
    standard = (advantages - _batch_mean(advantages)) / (_batch_std(advantages) + advantage_epsilon)
    return has_spread(scores.total)[:, None] * _zero_if_nan(standard)


def best_of_group(
    scores: Scores, *, advantage_epsilon: AdvantageEpsilon = 1e-4
) -> Float[Array, "B G"]:
    """Returns (best − second best) / (std + ε) for the best completion, else 0 (pass@k, arXiv
    2503.19595)."""
    rewards = jnp.where(jnp.isnan(scores.total), -jnp.inf, scores.total)
    top_two = jnp.sort(rewards, axis=1, descending=True)[:, :2]
    lead = jnp.where(jnp.isfinite(top_two[:, 1]), top_two[:, 0] - top_two[:, 1], 0)[:, None]
    is_best = jnp.arange(rewards.shape[1]) == jnp.argmax(rewards, axis=1)[:, None]
    return jnp.where(is_best, lead / (group_std(scores.total) + advantage_epsilon), 0)


def greedy_baseline(scores: Scores) -> Float[Array, "B G"]:
    """Returns the reward minus the reward of the greedy completion (ReMax, arXiv 2310.10505, eq.
    6)."""
    if scores.baseline is None:
        raise ValueError("ReMax compares with a greedy completion, but its reward is missing")
    return _zero_if_nan(scores.total - scores.baseline[:, None])


def whitened(scores: Scores) -> Float[Array, "B G"]:
    """Returns rewards with mean 0 and variance 1 over all tokens (REINFORCE++, arXiv 2501.03262,
    discount 1)."""
    return _whiten(scores.total, scores.lengths)


def centred_and_whitened(scores: Scores) -> Float[Array, "B G"]:
    """Returns the reward minus the group's mean, whitened over all tokens (REINFORCE++-baseline,
    arXiv 2501.03262)."""
    return _whiten(_above_group_mean(scores.total), scores.lengths)


def length_weighted(scores: Scores) -> Float[Array, "B G"]:
    """Returns the reward minus the group's mean over tokens (OPO, arXiv 2505.23585, eq. 6).

    This baseline has the least variance if the squared gradient norm grows with the length.
    """
    tokens = jnp.where(jnp.isnan(scores.total), 0, scores.lengths)
    above = _above_group_mean(scores.total)
    total = jnp.sum(jnp.nan_to_num(above) * tokens, axis=1, keepdims=True)
    return _zero_if_nan(above - total / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1))


def upweighted(scores: Scores) -> Float[Array, "B G"]:
    """Returns the centred reward × completions / completions with a reward other than 0 (GPG,
    arXiv 2504.02546)."""
    valid = ~jnp.isnan(scores.total)
    nonzero = jnp.sum(valid & (scores.total != 0))
    return centred(scores) * valid.sum() / jnp.maximum(nonzero, 1)


def normalised_then_summed(
    scores: Scores, *, advantage_epsilon: AdvantageEpsilon = 1e-4
) -> Float[Array, "B G"]:
    """Returns the weighted sum of rewards that are standardised one by one (GDPO, arXiv
    2601.05242).

    The sum is standardised over the batch.
    """
    standard_parts = [
        scores.weights[name]
        * jnp.nan_to_num(
            standardised(scores._replace(total=part), advantage_epsilon=advantage_epsilon)
        )
        for name, part in scores.parts.items()
    ]
    total = jnp.where(jnp.isnan(scores.total), jnp.nan, sum(standard_parts))
    differs = jnp.stack([has_spread(part) for part in scores.parts.values()]).any(axis=0)
    standard = (total - _batch_mean(total)) / (_batch_std(total) + advantage_epsilon)
    return differs[:, None] * _zero_if_nan(standard)


ADVANTAGES: dict[str, Advantage] = {
    estimator.__name__: estimator
    for estimator in (
        centred, standardised, batch_scaled, leave_one_out, leave_one_out_normalised, best_of_group,
        greedy_baseline, whitened, centred_and_whitened, length_weighted, upweighted,
        normalised_then_summed,
    )
}  # fmt: skip


def _above_group_mean(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns the reward minus the group's mean.

    Equal rewards give exactly 0, and NaN stays NaN.
    """
    return jnp.where(has_spread(rewards)[:, None], rewards - group_mean(rewards), rewards * 0)


def _zero_if_nan(advantages: Float[Array, "B G"]) -> Float[Array, "B G"]:
    return jnp.where(jnp.isnan(advantages), 0, advantages)


def _std(rewards: Array, mean: Array, axis: int | None) -> Array:
    valid = ~jnp.isnan(rewards)
    keepdims = axis is not None
    squares = jnp.where(valid, jnp.square(rewards - mean), 0).sum(axis=axis, keepdims=keepdims)
    return jnp.sqrt(squares / jnp.maximum(valid.sum(axis=axis, keepdims=keepdims) - 1, 1))


def _batch_mean(rewards: Float[Array, "B G"]) -> Float[Array, ""]:
    return jnp.nansum(rewards) / jnp.maximum((~jnp.isnan(rewards)).sum(), 1)


def _batch_std(rewards: Float[Array, "B G"]) -> Float[Array, ""]:
    return _std(rewards, _batch_mean(rewards), axis=None)


def _whiten(rewards: Float[Array, "B G"], lengths: Int[Array, "B G"] | int) -> Float[Array, "B G"]:
    """Returns (reward − mean) / sqrt(unbiased variance + 1e-8). Both statistics are over tokens."""
    tokens = jnp.where(jnp.isnan(rewards), 0, lengths)
    count = jnp.maximum(tokens.sum(), 2)
    mean = jnp.sum(jnp.nan_to_num(rewards) * tokens) / count
    squares = jnp.square(jnp.nan_to_num(rewards) - mean) * tokens
    variance = jnp.sum(squares) / (count - 1)
    return _zero_if_nan((rewards - mean) / jnp.sqrt(variance + 1e-8))
