"""The policy loss as a row of choices (advantage × ratio × objective × average × KL), and the supervised loss beside it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from pg_ground.config import Grpo, nearest
from pg_ground.rl import advantages
from pg_ground.types import Array, UserError
from pg_ground.vocab import LOC_MAX, LOC_TOKENS, Vocab

Ratio = Callable[[Float[Array, "B G T"], Bool[Array, "B G T"]], Float[Array, "B G T"]]
"""(log π − log π_old of each token, mask) to the log-ratio that each token is weighed by."""
Average = Callable[[Bool[Array, "B G T"]], Float[Array, "B G T"]]
Penalty = Callable[[Float[Array, "B G T"], Float[Array, "B G T"]], Float[Array, "B G T"]]
"""(log π − log π_ref, ratio to the old policy) to the penalty of each token, in nats."""
Correction = Callable[
    [Float[Array, "B G T"], Bool[Array, "B G T"], float, float], Float[Array, "B G T"]
]
"""(log π_old − log π_sampler, mask, floor, cap) to the weight of each token."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: a sum over a long completion would otherwise overflow float32."""


class Focus(NamedTuple):
    """What the tokens of a whole batch say about each of them, before an update."""

    keep: Float[Array, "B G T"]
    """Factor of the objective: 0 drops a token from it, though not from the average."""
    restrain: Float[Array, "B G T"]
    """1 where |log-ratio| is added to the loss."""


class Tokens(NamedTuple):
    """What a focus looks at: every token of a minibatch under the policy about to be updated."""

    logps: Float[Array, "B G T"]
    entropy: Float[Array, "B G T"]
    advantage: Float[Array, "B G"]
    mask: Bool[Array, "B G T"]
    key: PRNGKeyArray


def per_token(
    differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """Returns each token's own log-ratio (PPO, arXiv 1707.06347)."""
    return differences


def per_sequence(
    differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """Returns the completion's mean log-ratio at each of its tokens (GSPO, arXiv 2507.18071, eq. 7)."""
    return jnp.broadcast_to(_mean(differences, mask), differences.shape)


def whole_sequence(
    differences: Float[Array, "B G T"], mask: Bool[Array, "B G T"]
) -> Float[Array, "B G T"]:
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


def summed_sequences(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns weights that sum over each completion's tokens and average over completions (LUSPO, arXiv 2602.05261)."""
    return mask / (mask.shape[0] * mask.shape[1])


def k1(gap: Array, ratio: Array) -> Array:
    """Returns log π − log π_ref: unbiased for the KL, but as a loss its expected gradient on-policy is 0; for rewards."""
    return gap


def k2(gap: Array, ratio: Array) -> Array:
    """Returns half the squared gap, whose gradient on-policy is that of the KL (joschu.net/blog/kl-approx.html)."""
    return jnp.square(gap) / 2


def k3(gap: Array, ratio: Array) -> Array:
    """Returns exp(−gap) − 1 + gap, 0 or more (joschu.net/blog/kl-approx.html)."""
    return jnp.exp(-gap) - 1 + gap


def k3_corrected(gap: Array, ratio: Array) -> Array:
    """Returns k3 weighted by the ratio, whose gradient is that of the KL also off-policy (arXiv 2512.02556)."""
    return k3(gap, ratio) * ratio


def absolute(gap: Array, ratio: Array) -> Array:
    """Returns |log π − log π_ref|."""
    return _size(gap)


def straight_through(estimate: Penalty) -> Penalty:
    """Returns a penalty with the value of `estimate` and the gradient of k2."""

    def penalty(gap: Array, ratio: Array) -> Array:
        slope = k2(gap, ratio)
        return slope + jax.lax.stop_gradient(estimate(gap, ratio) - slope)

    return penalty


def token_truncate(gap: Array, mask: Array, floor: float, cap: float) -> Array:
    """Returns π_old / π_sampler of each token, cut off below and above (truncated importance sampling, as in TRL)."""
    return jnp.clip(jnp.exp(gap), floor, cap)


def token_mask(gap: Array, mask: Array, floor: float, cap: float) -> Array:
    """Returns π_old / π_sampler of each token, 0 where it is outside [floor, cap] (masked importance sampling, as in TRL)."""
    ratio = jnp.exp(gap)
    return jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0)


def sequence_truncate(gap: Array, mask: Array, floor: float, cap: float) -> Array:
    """Returns `token_truncate` of the whole completion's probability."""
    return token_truncate(whole_sequence(gap, mask), mask, floor, cap)


def sequence_mask(gap: Array, mask: Array, floor: float, cap: float) -> Array:
    """Returns `token_mask` of the whole completion's probability."""
    return token_mask(whole_sequence(gap, mask), mask, floor, cap)


class Algorithm(NamedTuple):
    """One row of `ALGORITHMS`."""

    advantage: advantages.Advantage
    ratio: Ratio
    objective: "Objective"
    average: Average
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float = math.inf
    """Largest ratio with a gradient where the advantage is negative: dual clip (1912.09729), two-sided clip (2505.07291)."""
    kl_coef: float = 0.0
    kl: Penalty = k3_corrected
    kl_in_reward: bool = False
    """The penalty is taken off the completion's reward, not added to the loss."""
    entropy_coef: float = 0.0
    focus: Callable[[Tokens, float], Focus] | None = None
    focus_share: float = 1.0
    """Share of all tokens that the focus is about."""
    correction: Correction | None = None
    correction_floor: float = 0.0
    correction_cap: float = 3.0
    off_policy_kl: float = math.inf
    """Completions with a negative advantage count only if the mean of log π_old − log π is at most this (arXiv 2512.02556)."""
    mask_truncated_completions: bool = False
    """Completions cut off at max_new_tokens leave the loss, though not the statistics of their group (DAPO, arXiv 2503.14476)."""


Objective = Callable[
    [
        Float[Array, "B G T"],
        Float[Array, "B G T"],
        Float[Array, "B G 1"],
        Bool[Array, "B G T"],
        Algorithm,
    ],
    tuple[Float[Array, "B G T"], Bool[Array, "B G T"]],
]
"""(log-ratio, logps, advantage, mask, row) to each token's loss, and where the clip holds it back."""


def clipped(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −min(min(r, cap)·A, clip(r, 1 − low, 1 + high)·A) (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = jnp.exp(log_ratio)
    low, high = 1 - row.clip_low, 1 + row.clip_high
    loss = -jnp.minimum(jnp.minimum(ratio, row.ratio_cap) * a, jnp.clip(ratio, low, high) * a)
    return loss, ((ratio < low) & (a < 0)) | ((ratio > high) & (a > 0)) | (
        (ratio > row.ratio_cap) & (a < 0)
    )


def capped_weight(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −sg[min(r, high)]·A·logp: every token keeps a gradient (CISPO, arXiv 2506.13585, eq. 4)."""
    ratio = jnp.exp(log_ratio)
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, row.clip_high))
    return -weight * a * logps, (ratio > row.clip_high) & (a > 0)


def soft_gate(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −4/τ·σ(τ(r − 1))·A, τ 1 for positive and 1.05 for other advantages (SAPO, arXiv 2511.20347, eq. 6)."""
    tau = jnp.where(a > 0, 1.0, 1.05)
    return -4 / tau * jax.nn.sigmoid(tau * (jnp.exp(log_ratio) - 1)) * a, jnp.zeros_like(mask)


def smooth_weight(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −sg[rᵏ·exp(λ(1 − r))]·A·logp, (k, λ) = (2, 3) for A ≥ 0, else (3, 2) (VESPO, arXiv 2602.10693)."""
    k, decay = jnp.where(a >= 0, 2.0, 3.0), jnp.where(a >= 0, 3.0, 2.0)
    log_ratio = jnp.maximum(log_ratio, math.log(1e-8))
    weight = jax.lax.stop_gradient(jnp.exp(decay + k * log_ratio - decay * jnp.exp(log_ratio)))
    return -weight * a * logps, jnp.zeros_like(mask)


def geometric(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −exp(mean of clipped log-ratios)·A at each token of a completion (GMPO, arXiv 2507.20673, eq. 4)."""
    held = jnp.clip(log_ratio, -row.clip_low, row.clip_high)
    kept = jnp.where(a > 0, jnp.minimum(log_ratio, held), jnp.maximum(log_ratio, held))
    loss = -jnp.exp(_mean(kept, mask)) * a
    return jnp.broadcast_to(loss, logps.shape), kept != log_ratio


def policy_gradient(
    log_ratio: Array, logps: Array, a: Array, mask: Array, row: Algorithm
) -> tuple[Array, Array]:
    """Returns −A·logp (REINFORCE, Williams 1992)."""
    return -a * logps, jnp.zeros_like(mask)


def top_entropy(tokens: Tokens, share: float) -> Focus:
    """Keeps the `share` of tokens with the highest entropy (arXiv 2506.01939), from a quantile in float32, as TRL has it."""
    ordered = jnp.sort(
        jnp.where(tokens.mask, tokens.entropy.astype(jnp.float32), jnp.inf), axis=None
    )
    last = jnp.maximum(tokens.mask.sum() - 1, 0)
    place = (1 - share) * last
    low = jnp.floor(place).astype(jnp.int32)
    threshold = ordered[low] + (place - low) * (ordered[jnp.minimum(low + 1, last)] - ordered[low])
    keep = (tokens.entropy >= threshold) & tokens.mask
    return Focus(keep.astype(tokens.logps.dtype), jnp.zeros_like(tokens.logps))


def clip_cov(tokens: Tokens, share: float) -> Focus:
    """Drops a random `share` of tokens among those whose covariance of logp and advantage is in (1, 5) (arXiv 2505.22617)."""
    covariance = _covariance(tokens)
    eligible = (covariance > 1) & (covariance < 5) & tokens.mask
    lot = jnp.where(
        eligible, jax.random.uniform(tokens.key, eligible.shape, tokens.logps.dtype), -1.0
    )
    return Focus(1.0 - (_largest(lot, tokens.mask, share) & eligible), jnp.zeros_like(tokens.logps))


def kl_cov(tokens: Tokens, share: float) -> Focus:
    """Holds back, by |log-ratio|, the `share` of tokens with the largest covariance of logp and advantage (2505.22617)."""
    top = _largest(jnp.where(tokens.mask, _covariance(tokens), -jnp.inf), tokens.mask, share)
    return Focus(jnp.ones_like(tokens.logps), top.astype(tokens.logps.dtype))


def _size(values: Array) -> Array:
    """Returns absolute values, with gradient 0 at 0, where a ratio or a gap starts; jnp.abs has 1 there."""
    return values * jnp.sign(values)


def _named(*functions: Callable[..., Any]) -> dict[str, Any]:
    return {f.__name__: f for f in functions}


CHOICES: dict[str, Mapping[str, Any]] = {
    "advantage": advantages.ADVANTAGES,
    "ratio": _named(per_token, per_sequence, whole_sequence),
    "objective": _named(clipped, capped_weight, soft_gate, smooth_weight, geometric, policy_gradient),
    "average": _named(over_sequences, over_tokens, over_budget, summed_sequences),
    "kl": _named(k1, k2, k3, k3_corrected, absolute)
    | {f"{f.__name__}+": straight_through(f) for f in (k1, k3, absolute)},
    "focus": _named(top_entropy, clip_cov, kl_cov),
    "correction": _named(token_truncate, token_mask, sequence_truncate, sequence_mask),
}  # fmt: skip
"""What a row can be made of, by the name of its field: `config.grpo.<field>` chooses another than the row's own."""

NUMBERS = ("clip_low", "clip_high", "ratio_cap", "kl_coef", "kl_in_reward", "entropy_coef", "focus_share", "correction_floor",
           "correction_cap", "off_policy_kl", "mask_truncated_completions")  # fmt: skip
"""The other fields of a row, which `config.grpo` can set too."""

READERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "clip_low": ("objective", (clipped, geometric)),
    "clip_high": ("objective", (clipped, geometric, capped_weight)),
    "ratio_cap": ("objective", (clipped,)),
    "focus_share": ("focus", (top_entropy, clip_cov, kl_cov)),
    "correction_floor": (
        "correction",
        (token_truncate, token_mask, sequence_truncate, sequence_mask),
    ),
    "correction_cap": (
        "correction",
        (token_truncate, token_mask, sequence_truncate, sequence_mask),
    ),
}
"""Numbers that not every row looks at: by name, the field that decides it and the choices of that field that do."""

_grpo = Algorithm(advantages.standardised, per_token, clipped, over_sequences)

ALGORITHMS: dict[str, Algorithm] = {
    # Shao et al., "DeepSeekMath", arXiv 2402.03300
    "grpo": _grpo._replace(kl_coef=0.04),
    # Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783: no std, no length in the average
    "dr_grpo": _grpo._replace(advantage=advantages.centred, average=over_budget),
    # Yu et al., "DAPO", arXiv 2503.14476: clip-higher, the token average; with grpo.dynamic_sampling and the reward "overlong" all of it
    "dapo": _grpo._replace(average=over_tokens, clip_high=0.28),
    # "Part I: Tricks or Traps?", arXiv 2508.08221 (Lite PPO): group mean, batch std, token average
    "lite_ppo": _grpo._replace(advantage=advantages.batch_scaled, average=over_tokens),
    # "INTELLECT-2", arXiv 2505.07291: two-sided clip
    "two_sided": _grpo._replace(average=over_tokens, ratio_cap=4.0),
    # Ye et al., "Mastering Complex Control in MOBA Games", arXiv 1912.09729: dual clip, as RLLaVA has it
    "dual_clip": _grpo._replace(average=over_tokens, ratio_cap=3.0),
    # Zheng et al., "GSPO", arXiv 2507.18071
    "gspo": _grpo._replace(ratio=per_sequence, clip_low=3e-4, clip_high=4e-4),
    # "Length-unbiased sequence policy optimization", arXiv 2602.05261
    "luspo": _grpo._replace(ratio=per_sequence, average=summed_sequences),
    # Zhao et al., "GMPO", arXiv 2507.20673
    "gmpo": _grpo._replace(objective=geometric, clip_low=0.4, clip_high=0.4),
    # "MiniMax-M1", arXiv 2506.13585, with the cap of ScaleRL, arXiv 2510.13786
    "cispo": _grpo._replace(objective=capped_weight, average=over_tokens, clip_high=5.0),
    # "SAPO", arXiv 2511.20347
    "sapo": _grpo._replace(objective=soft_gate),
    # "VESPO", arXiv 2602.10693
    "vespo": _grpo._replace(ratio=whole_sequence, objective=smooth_weight, average=over_tokens),
    # Ahmadian et al., "Back to Basics", arXiv 2402.14740
    "rloo": _grpo._replace(advantage=advantages.leave_one_out, ratio=whole_sequence, kl_in_reward=True, kl=k1),
    # Li et al., "ReMax", arXiv 2310.10505: the greedy completion is the baseline
    "remax": _grpo._replace(advantage=advantages.over_greedy, average=over_tokens, kl_in_reward=True, kl=k1),
    # Hu, "REINFORCE++", arXiv 2501.03262; the penalty is that of the whole completion, not of the tokens still to come
    "reinforce_plus_plus": _grpo._replace(advantage=advantages.whitened, average=over_tokens, kl_in_reward=True, kl=k1),
    "reinforce_plus_plus_baseline": _grpo._replace(advantage=advantages.centred_and_whitened, average=over_tokens, kl=k2),
    # Hao et al., "OPO", arXiv 2505.23585: exactly on-policy
    "opo": _grpo._replace(advantage=advantages.length_weighted, objective=policy_gradient, average=over_tokens),
    # Chu et al., "GPG", arXiv 2504.02546
    "gpg": _grpo._replace(advantage=advantages.upweighted, objective=policy_gradient, average=over_tokens),
    # "Optimizing Language Models for Inference Time Objectives", arXiv 2503.19595: what counts is a group's best
    "pass_at_k": _grpo._replace(advantage=advantages.best_of_group),
    # "GDPO", arXiv 2601.05242: rewards are normalised one by one
    "gdpo": _grpo._replace(advantage=advantages.normalised_then_summed),
    # Wang et al., "Beyond the 80/20 Rule", arXiv 2506.01939
    "top_entropy": _grpo._replace(average=over_tokens, clip_high=0.28, focus=top_entropy, focus_share=0.2),
    # Cui et al., "The Entropy Mechanism", arXiv 2505.22617
    "clip_cov": _grpo._replace(average=over_tokens, clip_low=math.inf, clip_high=math.inf, focus=clip_cov, focus_share=2e-4),
    "kl_cov": _grpo._replace(average=over_tokens, clip_low=math.inf, clip_high=math.inf, focus=kl_cov, focus_share=2e-4),
}  # fmt: skip


def choose(c: Grpo) -> Algorithm:
    """Returns the row that `c.algorithm` names, with what `c` sets instead of the row's own.

    Raises:
      UserError: no such row, or no such choice of one of its fields.
    """
    row = ALGORITHMS[_one_of("algorithm", c.algorithm, ALGORITHMS)]
    named = {field: getattr(c, field) for field in CHOICES if getattr(c, field) is not None}
    chosen = {
        field: CHOICES[field][_one_of(field, name, CHOICES[field])] for field, name in named.items()
    }
    row = row._replace(
        **chosen, **{name: getattr(c, name) for name in NUMBERS if getattr(c, name) is not None}
    )
    _check(row, c)
    return row


def _check(row: Algorithm, c: Grpo) -> None:
    """Raises UserError for choices that cancel each other or learn nothing."""
    penalised = bool(row.kl_coef or c.kl_target)
    of_batch = row.advantage in (advantages.over_greedy, advantages.whitened)
    k1_in_loss = penalised and row.kl is k1 and not row.kl_in_reward
    unheard = penalised and row.kl_in_reward and row.advantage is advantages.normalised_then_summed
    narrow = row.objective is capped_weight and row.clip_high < 1
    twice = row.correction is not None and row.objective is smooth_weight
    abrupt = c.kl_target and c.kl_horizon <= 0.2 * c.batch_size * c.group_size
    wrong = {
        "kl_target steers kl_coef, which is 0: set one to start from": c.kl_target
        and not row.kl_coef,
        "kl is k1, whose gradient in a loss is 0 on average: set kl_in_reward, or k2, k3 or k3_corrected": k1_in_loss,
        "kl_in_reward has no effect on advantage = normalised_then_summed, which takes rewards one by one": unheard,
        f"clip_high is {row.clip_high:g}, but objective = capped_weight takes it for the largest ratio: at least 1": narrow,
        "correction multiplies a loss, but objective = smooth_weight has its own weight of a completion": twice,
        "correction_floor is above correction_cap": row.correction_floor > row.correction_cap,
        "ratio_cap is below 1, where a step starts": row.ratio_cap < 1,
        "off_policy_kl is below 0": row.off_policy_kl < 0,
        "resample looks at the spread within groups, which is not what this advantage compares": c.dynamic_sampling
        and of_batch,
        "kl_horizon is so short that one step can turn kl_coef around: above 0.2 * batch_size * group_size": abrupt,
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"config.grpo.{what}")
    for name, (field, choices) in READERS.items():
        if getattr(c, name) is not None and getattr(row, field) not in choices:
            readers = ", ".join(choice.__name__ for choice in choices)
            raise UserError(
                f"config.grpo.{name} has no effect on {c.algorithm}: it is read where {field} is one of {readers}"
            )


def _one_of(field: str, name: str, table: Mapping[str, Any]) -> str:
    if name not in table:
        raise UserError(f"config.grpo.{field} {name!r} does not exist: {nearest(name, table)}")
    return name


class PolicyTerms(NamedTuple):
    """What each token contributes; average them with the row's weights."""

    loss: Float[Array, "B G T"]
    kl: Float[Array, "B G T"]
    """k3 estimate of KL(policy || reference policy) in nats, 0 or more; 0 without a reference."""
    clipped: Bool[Array, "B G T"]
    """The clip holds the token back: its gradient is 0, or for `capped_weight` and `geometric` smaller."""
    weight: Float[Array, "B G T"]
    """Of the correction for another policy having sampled; 1 without one."""


def policy_loss(
    logps: Float[Array, "B G T"],
    old_logps: Float[Array, "B G T"],
    ref_logps: Float[Array, "B G T"] | None,
    advantage: Float[Array, "B G"],
    mask: Bool[Array, "B G T"],
    row: Algorithm,
    focus: Focus | None = None,
    sampled_logps: Float[Array, "B G T"] | None = None,
) -> PolicyTerms:
    """Returns the loss of each token: objective × correction × focus + kl_coef · penalty.

    `old_logps` are those of the policy that sampled, as the trainer computes them; on the first update they equal `logps`, the
    ratio is 1, and the gradient is the policy gradient. `sampled_logps` are the sampler's own: where the row corrects for the
    difference, its weight is 1 up to rounding.
    """
    differences = jnp.clip(logps - old_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = jnp.clip(row.ratio(differences, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    a = advantage[..., None]
    loss, held = row.objective(log_ratio, logps, a, mask, row)
    if row.off_policy_kl < math.inf:
        loss = loss * (
            (a >= 0) | (_mean(-jax.lax.stop_gradient(differences), mask) <= row.off_policy_kl)
        )
    weight = jnp.ones_like(loss)
    if row.correction is not None and sampled_logps is not None:
        gap = jnp.clip((old_logps - sampled_logps) * mask, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        weight = jax.lax.stop_gradient(
            row.correction(gap, mask, row.correction_floor, row.correction_cap)
        )
    loss = loss * weight
    if focus is not None:
        loss = loss * focus.keep + focus.restrain * _size(differences)
    if ref_logps is None:
        return PolicyTerms(loss, jnp.zeros_like(loss), held, weight)
    gap = jnp.clip(logps - ref_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if not row.kl_in_reward:
        loss = loss + row.kl_coef * row.kl(gap, jnp.exp(log_ratio))
    return PolicyTerms(loss, k3(gap, jnp.exp(log_ratio)), held, weight)


def reward_penalty(
    logps: Float[Array, "B G T"],
    ref_logps: Float[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    row: Algorithm,
) -> Float[Array, "B G"]:
    """Returns the KL(policy || reference policy) estimated over a completion's tokens (nats), to be taken off its reward."""
    gap = jnp.clip(logps - ref_logps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.sum(row.kl(gap, jnp.ones_like(gap)) * mask, axis=-1)


def _mean(values: Float[Array, "B G T"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G 1"]:
    """Returns each completion's mean over its tokens."""
    return jnp.sum(values * mask, axis=-1, keepdims=True) / jnp.maximum(
        mask.sum(axis=-1, keepdims=True), 1
    )


def _covariance(tokens: Tokens) -> Float[Array, "B G T"]:
    """Returns each token's share in the covariance of advantage and log-probability over the batch."""
    count = jnp.maximum(tokens.mask.sum(), 1)

    def centred(values: Array) -> Array:
        return values - jnp.sum(values * tokens.mask) / count

    return centred(tokens.advantage[..., None]) * centred(tokens.logps)


def _largest(
    values: Float[Array, "B G T"], mask: Bool[Array, "B G T"], share: float
) -> Bool[Array, "B G T"]:
    """Returns where the largest `share` of the tokens are, at least one."""
    count = jnp.maximum(jnp.floor(share * mask.sum()), 1)
    rank = jnp.argsort(jnp.argsort(-values, axis=None)).reshape(values.shape)
    return rank < count


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
        spread = jax.nn.softmax(
            -0.5 * jnp.square((jnp.arange(LOC_TOKENS) - bins) / loc_smoothing_bins)
        )
        near = jnp.sum(spread * logps[..., vocab.loc0 : vocab.loc0 + LOC_TOKENS], axis=-1)
        expected = jnp.where((bins[..., 0] >= 0) & (bins[..., 0] <= LOC_MAX), near, hit)
    if label_smoothing:
        others = (logps.sum(axis=-1) - hit) / (vocab.size - 1)
        expected = (1 - label_smoothing) * expected + label_smoothing * others
    return expected
