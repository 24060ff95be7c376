"""The policy loss as a row of five choices: advantage × ratio × clip × average × KL; and the supervised loss beside it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground.config import Grpo, nearest
from pg_ground.rl import advantages
from pg_ground.types import Array, UserError
from pg_ground.vocab import LOC_MAX, LOC_TOKENS, Vocab

LogRatio = Callable[[Float[Array, "B G T"], Bool[Array, "B G T"]], Float[Array, "B G T"]]
Average = Callable[[Bool[Array, "B G T"]], Float[Array, "B G T"]]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: a sum over a long completion would otherwise overflow float32."""


def per_token(differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns each token's own log-ratio (PPO, arXiv 1707.06347)."""
    return differences


def per_sequence(differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns the completion's mean log-ratio at each of its tokens (GSPO, arXiv 2507.18071, eq. 7)."""
    total = jnp.sum(differences * mask, axis=-1, keepdims=True)
    return jnp.broadcast_to(total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1), differences.shape)


def whole_sequence(differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns the completion's summed log-ratio at each of its tokens: a completion is one action (RLOO, arXiv 2402.14740)."""
    return jnp.broadcast_to(jnp.sum(differences * mask, axis=-1, keepdims=True), differences.shape)


def over_sequences(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that average over each completion's tokens, then over completions."""
    return mask / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1) / (mask.shape[0] * mask.shape[1])


def over_tokens(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that average over all tokens of the batch: long completions weigh more (DAPO, arXiv 2503.14476)."""
    return mask / jnp.maximum(mask.sum(), 1)


def over_budget(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that sum over tokens and divide by the token budget B·G·T (Dr. GRPO, arXiv 2503.20783)."""
    return mask / mask.size


class Algorithm(NamedTuple):
    """One row of `ALGORITHMS`."""

    advantage: advantages.Advantage
    log_ratio: LogRatio
    clip_low: float
    clip_high: float
    average: Average
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || reference policy)."""
    kl_corrected: bool = True
    """k3 is weighted by the ratio, which makes its gradient that of the KL (as TRL does); plain k3 otherwise."""


ALGORITHMS: dict[str, Algorithm] = {
    # Shao et al., "DeepSeekMath", arXiv 2402.03300
    "grpo": Algorithm(advantages.standardised, per_token, 0.2, 0.2, over_sequences, kl_coef=0.04),
    # Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783: no std, no length in the average
    "dr_grpo": Algorithm(advantages.centred, per_token, 0.2, 0.2, over_budget),
    # Yu et al., "DAPO", arXiv 2503.14476: clip-higher and the token average
    "dapo": Algorithm(advantages.standardised, per_token, 0.2, 0.28, over_tokens),
    # Zheng et al., "GSPO", arXiv 2507.18071
    "gspo": Algorithm(advantages.standardised, per_sequence, 3e-4, 4e-4, over_sequences),
    # Ahmadian et al., "Back to Basics", arXiv 2402.14740
    "rloo": Algorithm(advantages.leave_one_out, whole_sequence, 0.2, 0.2, over_sequences),
}


def choose(c: Grpo) -> Algorithm:
    """Returns the row that `c.algorithm` names, with what `c` sets instead of the row's own.

    Raises:
      UserError: no such row.
    """
    if c.algorithm not in ALGORITHMS:
        raise UserError(f"config.grpo.algorithm {c.algorithm!r} does not exist: {nearest(c.algorithm, ALGORITHMS)}")
    own = {"clip_low": c.clip_low, "clip_high": c.clip_high, "kl_coef": c.kl_coef}
    return ALGORITHMS[c.algorithm]._replace(**{name: value for name, value in own.items() if value is not None})


class PolicyTerms(NamedTuple):
    """What each token contributes; average them with the row's weights."""

    loss: Float[Array, "B G T"]
    kl: Float[Array, "B G T"]
    """k3 estimate of KL(policy || reference policy) in nats, 0 or more; 0 without a reference."""
    clipped: Bool[Array, "B G T"]
    """The clip holds the token back: its gradient is 0."""


def policy_loss(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    ref_logps: Float[Array, "B G T"] | None,
    advantage: Float[Array, "B G"],
    mask: Bool[Array, "B G T"],
    algorithm: Algorithm,
) -> PolicyTerms:
    """Returns the loss of each token: -min(r·A, clip(r, 1 - low, 1 + high)·A) + kl_coef · k3.

    r is the row's ratio of `logps` to `old_logps` (those of the policy that sampled); on the first update they are equal, r is 1,
    and the gradient is the policy gradient. PPO's clipped objective: arXiv 1707.06347, eq. 7; k3: joschu.net/blog/kl-approx.html.
    """
    log_ratio = algorithm.log_ratio(logps - old_logps, mask)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    a = advantage[..., None]
    loss = -jnp.minimum(ratio * a, jnp.clip(ratio, low, high) * a)
    clipped = ((ratio < low) & (a < 0)) | ((ratio > high) & (a > 0))
    if ref_logps is None:
        return PolicyTerms(loss, jnp.zeros_like(loss), clipped)
    gap = jnp.clip(ref_logps - logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = jnp.exp(gap) - gap - 1
    penalty = kl * ratio if algorithm.kl_corrected else kl
    return PolicyTerms(loss + algorithm.kl_coef * penalty, kl, clipped)


def target_logps(
    logits: Float[Array, "B G t V"],
    tokens: Int[Array, "B G t"],
    vocab: Vocab,
    label_smoothing: float,
    loc_smoothing_bins: float,
) -> Float[Array, "B G t"]:
    """Returns the log-likelihood (nats) of each gold token under its smoothed target distribution.

    `loc_smoothing_bins` spreads the target of a loc token over neighbouring bins, as a Gaussian of that standard deviation;
    `label_smoothing` moves that share of any target evenly onto all other tokens, as big_vision does (`softmax_xent`).
    """
    logps = jax.nn.log_softmax(logits)
    hit = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
    expected = hit
    if loc_smoothing_bins:
        bins = tokens[..., None] - vocab.loc0
        spread = jax.nn.softmax(-0.5 * jnp.square((jnp.arange(LOC_TOKENS) - bins) / loc_smoothing_bins))
        near = jnp.sum(spread * logps[..., vocab.loc0 : vocab.loc0 + LOC_TOKENS], axis=-1)
        expected = jnp.where((bins[..., 0] >= 0) & (bins[..., 0] <= LOC_MAX), near, hit)
    if label_smoothing:
        others = (logps.sum(axis=-1) - hit) / (vocab.size - 1)
        expected = (1 - label_smoothing) * expected + label_smoothing * others
    return expected
