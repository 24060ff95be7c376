"""Policy objectives: importance ratios, the loss of each token, and the weights that average token
losses.

A log-ratio is log π − log π_old of the policy that is trained over the policy that sampled, in
nats.
"""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from pg_ground.rl.options import Option
from pg_ground.types import Array

ClipLow = Annotated[float, Option("the ratio is clipped below 1 - clip_low", minimum=0)]
ClipHigh = Annotated[float, Option("the ratio is clipped above 1 + clip_high", minimum=0)]
LogClipLow = Annotated[float, Option("the log-ratio is clipped below -clip_low", minimum=0)]
LogClipHigh = Annotated[float, Option("the log-ratio is clipped above clip_high", minimum=0)]
WeightCap = Annotated[float, Option("largest weight of a token's gradient", minimum=1)]
RatioCap = Annotated[
    float,
    Option("largest ratio that has a gradient if the advantage is negative", minimum=1),
]

Ratio = Callable[[Float[Array, "B G T"], Bool[Array, "B G T"]], Float[Array, "B G T"]]
"""`(log-ratio of each token, mask)` to the log-ratio that weights each token."""

Objective = Callable[..., tuple[Float[Array, "B G T"], Bool[Array, "B G T"]]]
"""`(log_ratio, logps, advantages, mask, **options)` to the loss of each token, and True if the
clip limits it."""

LossAggregation = Callable[[Bool[Array, "B G T"]], Float[Array, "B G T"]]
"""`mask` to the weight of each token in the loss of a batch."""


def masked_mean(values: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G 1"]:
    """Returns the mean of each completion over its tokens; 0 for a completion without tokens."""
    total = jnp.sum(values * mask, axis=-1, keepdims=True)
    return total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)


# Importance ratios


def per_token(
    log_ratios: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """Returns each token's own log-ratio (PPO, arXiv 1707.06347)."""
    return log_ratios


def per_sequence(
    log_ratios: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """Returns the mean log-ratio of the completion at each of its tokens (GSPO, arXiv
    2507.18071, eq. 7)."""
    return jnp.broadcast_to(masked_mean(log_ratios, mask), log_ratios.shape)


def whole_sequence(
    log_ratios: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """Returns the summed log-ratio of the completion at each of its tokens (RLOO, arXiv
    2402.14740).

    The completion is one action.
    """
    total = jnp.sum(log_ratios * mask, axis=-1, keepdims=True)
    return jnp.broadcast_to(total, log_ratios.shape)


# Objectives


def ppo_clip(
    log_ratio: Array, logps: Array, advantages: Array, mask: Array, *,
    clip_low: ClipLow = 0.2, clip_high: ClipHigh = 0.2, ratio_cap: RatioCap = math.inf,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns −min(min(r, cap)·A, clip(r, 1 − low, 1 + high)·A) (PPO, arXiv 1707.06347, eq. 7).

    `ratio_cap` is dual clip (arXiv 1912.09729), also called two-sided clip (arXiv 2505.07291).
    """
    ratio = jnp.exp(log_ratio)
    low = 1 - clip_low
    high = 1 + clip_high
    capped = jnp.minimum(ratio, ratio_cap)
    loss = -jnp.minimum(capped * advantages, jnp.clip(ratio, low, high) * advantages)
    below = (ratio < low) & (advantages < 0)
    above = (ratio > high) & (advantages > 0)
    return loss, below | above | ((ratio > ratio_cap) & (advantages < 0))


def cispo(
    log_ratio: Array, logps: Array, advantages: Array, mask: Array, *,
    clip_high: WeightCap = 5.0,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns −sg[min(r, clip_high)]·A·logp, so that every token keeps a gradient (CISPO, arXiv
    2506.13585, eq. 4)."""
    ratio = jnp.exp(log_ratio)
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, clip_high))
    return -weight * advantages * logps, (ratio > clip_high) & (advantages > 0)


def sapo(log_ratio: Array, logps: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    """Returns −4/τ·σ(τ(r − 1))·A with τ = 1 for A > 0, else 1.05 (SAPO, arXiv 2511.20347, eq.
    6)."""
    tau = jnp.where(advantages > 0, 1.0, 1.05)
    gate = jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1))
    return -4 / tau * gate * advantages, jnp.zeros_like(mask)


def vespo(log_ratio: Array, logps: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    """Returns −sg[rᵏ·exp(λ(1 − r))]·A·logp (VESPO, arXiv 2602.10693).

    (k, λ) is (2, 3) for A ≥ 0, else (3, 2).
    """
    power = jnp.where(advantages >= 0, 2.0, 3.0)
    decay = jnp.where(advantages >= 0, 3.0, 2.0)
    log_ratio = jnp.maximum(log_ratio, math.log(1e-8))
    weight = jnp.exp(decay + power * log_ratio - decay * jnp.exp(log_ratio))
    return -jax.lax.stop_gradient(weight) * advantages * logps, jnp.zeros_like(mask)


def gmpo(
    log_ratio: Array, logps: Array, advantages: Array, mask: Array, *,
    clip_low: LogClipLow = 0.4, clip_high: LogClipHigh = 0.4,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns −exp(mean of clipped log-ratios)·A at each token of a completion (GMPO, arXiv
    2507.20673, eq. 4)."""
    limited = jnp.clip(log_ratio, -clip_low, clip_high)
    pessimistic = jnp.where(
        advantages > 0, jnp.minimum(log_ratio, limited), jnp.maximum(log_ratio, limited)
    )
    loss = -jnp.exp(masked_mean(pessimistic, mask)) * advantages
    return jnp.broadcast_to(loss, logps.shape), pessimistic != log_ratio


def policy_gradient(
    log_ratio: Array, logps: Array, advantages: Array, mask: Array
) -> tuple[Array, Array]:
    """Returns −A·logp (REINFORCE, Williams 1992)."""
    return -advantages * logps, jnp.zeros_like(mask)


# Loss aggregation, with verl's names (loss_agg_mode)


def seq_mean_token_mean(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that average over the tokens of each completion, then over completions."""
    tokens = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    return mask / tokens / (mask.shape[0] * mask.shape[1])


def token_mean(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that average over all tokens of the batch (DAPO, arXiv 2503.14476).

    Long completions weigh more.
    """
    return mask / jnp.maximum(mask.sum(), 1)


def seq_mean_token_sum(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that sum over the tokens of a completion and average over completions
    (LUSPO, arXiv 2602.05261)."""
    return mask / (mask.shape[0] * mask.shape[1])


def seq_mean_token_sum_norm(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that sum over tokens and divide by the token budget B·G·T (Dr. GRPO, arXiv
    2503.20783)."""
    return mask / mask.size


RATIOS: dict[str, Ratio] = {
    ratio.__name__: ratio for ratio in (per_token, per_sequence, whole_sequence)
}

OBJECTIVES: dict[str, Objective] = {
    objective.__name__: objective
    for objective in (ppo_clip, cispo, sapo, vespo, gmpo, policy_gradient)
}

LOSS_AGG_MODES: dict[str, LossAggregation] = {
    mode.__name__: mode
    for mode in (seq_mean_token_mean, token_mean, seq_mean_token_sum, seq_mean_token_sum_norm)
}
