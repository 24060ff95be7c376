"""The policy loss of each token, and the log-likelihood of supervised targets."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground.rl.algorithms import Algorithm
from pg_ground.rl.kl import absolute_value, k3
from pg_ground.rl.objectives import masked_mean
from pg_ground.rl.token_selection import TokenSelection
from pg_ground.types import Array
from pg_ground.vocab import LOC_MAX, LOC_TOKENS, Vocab

MAX_LOG_RATIO = 20.0
"""Log-ratios are clipped to ± this value before exp. The sum over a long completion would overflow
float32.
"""


class PolicyTerms(NamedTuple):
    """The contribution of each token. The weights of the loss aggregation average it."""

    loss: Float[Array, "B G T"]
    kl: Float[Array, "B G T"]
    """k3 estimate of KL(policy || reference policy) in nats, never negative; 0 without a
    reference policy."""
    clipped: Bool[Array, "B G T"]
    """True if the clip limits the token.

    Its gradient is then 0, or smaller for `cispo` and `gmpo`.
    """
    weight: Float[Array, "B G T"]
    """Importance-sampling correction; 1 without one."""


def policy_loss(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    ref_logps: Float[Array, "B G T"] | None,
    advantages: Float[Array, "B G #T"],
    mask: Bool[Array, "B G T"],
    algorithm: Algorithm,
    selection: TokenSelection | None = None,
    sampler_logps: Float[Array, "B G T"] | None = None,
) -> PolicyTerms:
    """Returns the loss of each token: objective × correction × selection + kl_coef × KL.

    Args:
      logps: log-probabilities under the policy that is trained.
      old_logps: log-probabilities under the policy that sampled, computed by the trainer. On the
        first update they equal `logps`: the ratio is 1, and the gradient is the policy gradient.
      ref_logps: log-probabilities under the reference policy; None without a KL.
      advantages: one value per completion, or one per token.
      mask: True for tokens that are trained.
      sampler_logps: log-probabilities that the sampler computed, for the importance-sampling
        correction.
    """
    token_log_ratios = jnp.clip(logps - old_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = jnp.clip(algorithm.ratio(token_log_ratios, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss, clipped = algorithm.objective(
        log_ratio, logps, advantages, mask, **algorithm.options_for("objective")
    )
    if algorithm.off_policy_kl < math.inf:
        drift = masked_mean(-jax.lax.stop_gradient(token_log_ratios), mask)
        loss = loss * ((advantages >= 0) | (drift <= algorithm.off_policy_kl))
    weight = jnp.ones_like(loss)
    if algorithm.importance_sampling_mode is not None and sampler_logps is not None:
        gap = jnp.clip((old_logps - sampler_logps) * mask, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        options = algorithm.options_for("importance_sampling_mode")
        weight = jax.lax.stop_gradient(algorithm.importance_sampling_mode(gap, mask, **options))
    loss = loss * weight
    if selection is not None:
        loss = loss * selection.factor + selection.penalised * absolute_value(token_log_ratios)
    if ref_logps is None:
        return PolicyTerms(loss, jnp.zeros_like(loss), clipped, weight)
    gap = jnp.clip(logps - ref_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if not algorithm.kl_in_reward:
        penalty = algorithm.kl_estimator(gap, jnp.exp(log_ratio))
        loss = loss + algorithm.kl_coef * penalty
    return PolicyTerms(loss, k3(gap, jnp.exp(log_ratio)), clipped, weight)


def completion_kl(
    logps: Float[Array, "B G T"],
    ref_logps: Float[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    algorithm: Algorithm,
) -> Float[Array, "B G"]:
    """Returns KL(policy || reference policy) in nats, estimated over the tokens of each
    completion."""
    gap = jnp.clip(logps - ref_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.sum(algorithm.kl_estimator(gap, jnp.ones_like(gap)) * mask, axis=-1)


def target_logps(
    logits: Float[Array, "B G t V"],
    tokens: Int[Array, "B G t"],
    vocab: Vocab,
    label_smoothing: float,
    loc_smoothing_bins: float,
) -> Float[Array, "B G t"]:
    """Returns the log-likelihood in nats of each target token under its smoothed target
    distribution.

    Args:
      label_smoothing: share of every target that is spread evenly over all other tokens, as in
        big_vision's `softmax_xent`.
      loc_smoothing_bins: standard deviation of a Gaussian that spreads the target of a loc token
        over neighbouring bins.
    """
    logps = jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
    expected = target
    if loc_smoothing_bins:
        bins = tokens[..., None] - vocab.loc0
        distance = (jnp.arange(LOC_TOKENS) - bins) / loc_smoothing_bins
        spread = jax.nn.softmax(-0.5 * jnp.square(distance))
        smoothed = jnp.sum(spread * logps[..., vocab.loc0 : vocab.loc0 + LOC_TOKENS], axis=-1)
        is_loc = (bins[..., 0] >= 0) & (bins[..., 0] <= LOC_MAX)
        expected = jnp.where(is_loc, smoothed, target)
    if label_smoothing:
        others = (logps.sum(axis=-1) - target) / (vocab.size - 1)
        expected = (1 - label_smoothing) * expected + label_smoothing * others
    return expected
