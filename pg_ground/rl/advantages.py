"""How much better a completion is than others: `Scores` to `f32[B,G]` advantages.

NaN marks a completion that no reward could judge: it leaves the statistics and gets advantage 0. Statistics of a batch are over
all devices. A group whose rewards are equal has advantage 0 wherever the group is all that a completion is compared with: not in
`over_greedy`, `whitened` and `centred_and_whitened`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground.types import Array

EPSILON = 1e-4
"""Added to a standard deviation, as TRL does: groups whose rewards differ by less than this are not blown up to ±1."""


class Scores(NamedTuple):
    """What completions are compared by."""

    total: Float[Array, "B G"]
    parts: Mapping[str, Float[Array, "B G"]] = {}
    """Each reward by itself, unweighted, and its weight: for estimators that normalise before they add."""
    weights: Mapping[str, float | Float[Array, ""]] = {}
    lengths: Int[Array, "B G"] | int = 1
    """Tokens, EOS included: for estimators that average over tokens."""
    baseline: Float[Array, " B"] | None = None
    """Total of the greedy completion of the same prompt."""
    epsilon: float = EPSILON


Advantage = Callable[[Scores], Float[Array, "B G"]]


def group_mean(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the mean reward of each group, over the completions that have one; 0 for a group without."""
    judged = ~jnp.isnan(rewards)
    return jnp.where(judged, rewards, 0).sum(axis=1, keepdims=True) / jnp.maximum(
        judged.sum(axis=1, keepdims=True), 1
    )


def group_std(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    """Returns the standard deviation of each group's rewards with Bessel's correction; 0 for fewer than two of them."""
    return _std(rewards, group_mean(rewards), axis=1)


def has_spread(rewards: Float[Array, "B G"]) -> Bool[Array, " B"]:
    """Returns the groups in which not all rewards are equal."""
    return jnp.nanmax(rewards, axis=1) > jnp.nanmin(rewards, axis=1)


def centred(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3)."""
    return _judged(_above_group(scores.total))


def standardised(scores: Scores) -> Float[Array, "B G"]:
    """Returns (reward − mean) / (std + ε) within the group (GRPO, arXiv 2402.03300, section 4.1.2)."""
    return centred(scores) / (group_std(scores.total) + scores.epsilon)


def batch_scaled(scores: Scores) -> Float[Array, "B G"]:
    """Returns (reward − group's mean) / (std of all rewards of the batch + ε) (TRL's scale_rewards="batch")."""
    return centred(scores) / (_batch_std(scores.total) + scores.epsilon)


def leave_one_out(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus the mean of the group's other rewards (RLOO, arXiv 2402.14740, section 3)."""
    judged = (~jnp.isnan(scores.total)).sum(axis=1, keepdims=True)
    return centred(scores) * judged / jnp.maximum(judged - 1, 1)


def leave_one_out_normalised(scores: Scores) -> Float[Array, "B G"]:
    """Returns leave-one-out advantages in units of their standard deviation over the batch (TRL's normalize_advantages)."""
    found = scores.total * 0 + leave_one_out(scores)
    return has_spread(scores.total)[:, None] * _judged(
        (found - _batch_mean(found)) / (_batch_std(found) + scores.epsilon)
    )


def best_of_group(scores: Scores) -> Float[Array, "B G"]:
    """Returns (best − second best) / (std + ε) for a group's best completion, 0 for the others (pass@k, arXiv 2503.19595)."""
    rewards = jnp.where(jnp.isnan(scores.total), -jnp.inf, scores.total)
    two = jnp.sort(rewards, axis=1, descending=True)[:, :2]
    lead = jnp.where(jnp.isfinite(two[:, 1]), two[:, 0] - two[:, 1], 0)[:, None]
    best = jnp.arange(rewards.shape[1]) == jnp.argmax(rewards, axis=1)[:, None]
    return jnp.where(best, lead / (group_std(scores.total) + scores.epsilon), 0)


def over_greedy(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus that of the greedy completion of the same prompt (ReMax, arXiv 2310.10505, eq. 6)."""
    if scores.baseline is None:
        raise ValueError("ReMax compares with a greedy completion, whose reward is missing")
    return _judged(scores.total - scores.baseline[:, None])


def whitened(scores: Scores) -> Float[Array, "B G"]:
    """Returns rewards with mean 0 and variance 1 over all tokens of the batch (REINFORCE++, arXiv 2501.03262, discount 1)."""
    return _whitened(scores.total, scores.lengths)


def centred_and_whitened(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean, with variance 1 over all tokens of the batch (REINFORCE++-baseline, 2501.03262)."""
    return _whitened(_above_group(scores.total), scores.lengths)


def length_weighted(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean over tokens, the baseline of least variance (OPO, arXiv 2505.23585, eq. 6)."""
    tokens = jnp.where(jnp.isnan(scores.total), 0, scores.lengths)
    above = _above_group(scores.total)
    mean = jnp.sum(jnp.nan_to_num(above) * tokens, axis=1, keepdims=True) / jnp.maximum(
        tokens.sum(axis=1, keepdims=True), 1
    )
    return _judged(above - mean)


def upweighted(scores: Scores) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean, times all completions per completion with a reward (GPG, arXiv 2504.02546)."""
    judged = ~jnp.isnan(scores.total)
    return centred(scores) * judged.sum() / jnp.maximum(jnp.sum(judged & (scores.total != 0)), 1)


def normalised_then_summed(scores: Scores) -> Float[Array, "B G"]:
    """Returns each reward standardised in its group, the weighted sum standardised over the batch (GDPO, arXiv 2601.05242)."""
    each = [
        scores.weights[name] * jnp.nan_to_num(standardised(scores._replace(total=part)))
        for name, part in scores.parts.items()
    ]
    summed = jnp.where(jnp.isnan(scores.total), jnp.nan, sum(each))
    differ = jnp.stack([has_spread(part) for part in scores.parts.values()]).any(axis=0)
    return differ[:, None] * _judged(
        (summed - _batch_mean(summed)) / (_batch_std(summed) + scores.epsilon)
    )


ADVANTAGES: dict[str, Advantage] = {
    f.__name__: f
    for f in (
        centred, standardised, batch_scaled, leave_one_out, leave_one_out_normalised, best_of_group, over_greedy, whitened,
        centred_and_whitened, length_weighted, upweighted, normalised_then_summed,
    )
}  # fmt: skip


def _above_group(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns reward minus the group's mean, NaN where there is none; exactly 0 where all are equal."""
    return jnp.where(has_spread(rewards)[:, None], rewards - group_mean(rewards), rewards * 0)


def _judged(advantages: Float[Array, "B G"]) -> Float[Array, "B G"]:
    return jnp.where(jnp.isnan(advantages), 0, advantages)


def _std(rewards: Array, mean: Array, axis: int | None) -> Array:
    judged = ~jnp.isnan(rewards)
    squares = jnp.where(judged, jnp.square(rewards - mean), 0).sum(
        axis=axis, keepdims=axis is not None
    )
    return jnp.sqrt(squares / jnp.maximum(judged.sum(axis=axis, keepdims=axis is not None) - 1, 1))


def _batch_mean(rewards: Float[Array, "B G"]) -> Float[Array, ""]:
    return jnp.nansum(rewards) / jnp.maximum((~jnp.isnan(rewards)).sum(), 1)


def _batch_std(rewards: Float[Array, "B G"]) -> Float[Array, ""]:
    return _std(rewards, _batch_mean(rewards), axis=None)


def _whitened(values: Float[Array, "B G"], lengths: Int[Array, "B G"] | int) -> Float[Array, "B G"]:
    """Returns `values` less their mean over tokens, by the root of their unbiased variance over tokens plus 1e-8."""
    tokens = jnp.where(jnp.isnan(values), 0, lengths)
    count = jnp.maximum(tokens.sum(), 2)
    mean = jnp.sum(jnp.nan_to_num(values) * tokens) / count
    variance = jnp.sum(jnp.square(jnp.nan_to_num(values) - mean) * tokens) / (count - 1)
    return _judged((values - mean) / jnp.sqrt(variance + 1e-8))
