"""One step of learning: from a batch to a new `TrainState`. Supervised and reinforced steps are siblings."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, PRNGKeyArray

from pg_ground.params import join
from pg_ground.rl.loss import Algorithm, Focus, PolicyTerms, Tokens, policy_loss, target_logps
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.types import Array, Batch, Rollout, TrainState
from pg_ground.vocab import EOS, Vocab

Metrics = dict[str, Any]
"""float32 scalars by name."""

LossAndMetrics = Callable[[Any, Any], tuple[Float[Array, ""], tuple[Metrics, Metrics]]]
"""(params, part of the batch) to a loss and two dicts of metrics; losses and the first dict add up over parts, of the second
the largest counts."""


@runtime_checkable
class Scorer(Protocol):
    """What this room needs of a model."""

    def completion_logps(
        self,
        params: Any,
        image: Array,
        prompt: Array,
        prompt_mask: Array,
        tokens: Array,
        mask: Array,
        temperature: float,
    ) -> tuple[Array, Array]: ...

    def completion_scores(
        self,
        params: Any,
        image: Array,
        prompt: Array,
        prompt_mask: Array,
        tokens: Array,
        score: Callable[..., Any],
        dropout_key: Any,
    ) -> Any: ...


def sft_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    model: Scorer,
    optimizer: optax.GradientTransformation,
    vocab: Vocab,
    grad_accum_steps: int,
    label_smoothing: float,
    loc_smoothing_bins: float,
    dropout_key: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one supervised step on the suffixes of `batch`, and its metrics.

    The loss is big_vision's: the mean over an example's suffix tokens, EOS included, then over examples (nats). `frozen` has the
    parameters that `state` lacks. Adapters drop inputs only where there is a `dropout_key`.
    """
    questions = batch.suffix.shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, grad_accum_steps)

    def loss(
        params: Any, part_and_key: tuple[Batch, Array | None]
    ) -> tuple[Array, tuple[Metrics, Metrics]]:
        part, key = part_and_key

        def score(hidden: Array, logits: Array, tokens: Array) -> tuple[Array, Array]:
            return (
                target_logps(logits, tokens, vocab, label_smoothing, loc_smoothing_bins),
                target_logps(logits, tokens, vocab, 0.0, 0.0),
            )

        suffix = part.suffix[:, None]
        inputs = (join(frozen, params), part.image, part.prompt, part.prompt_mask, suffix)
        soft, hard = model.completion_scores(*inputs, score, None if key is None else key[0])
        weights = part.suffix_mask / part.suffix_mask.sum(axis=1, keepdims=True) / questions
        value = -jnp.sum(soft[:, 0] * weights)
        return value, ({"sft/loss": value, "sft/nll": -jnp.sum(hard[:, 0] * weights)}, {})

    grads, metrics = accumulate(loss, state.params, (batch, keys), grad_accum_steps)
    return _apply(state, grads, optimizer, state.step + 1), metrics | {
        "optim/grad_norm": optax.tree.norm(grads)
    }


class _Part(NamedTuple):
    """A part of an experience and what was computed of it before its update."""

    experience: PolicyBatch
    mask: Bool[Array, "B G T"]
    weights: Float[Array, "B G T"]
    share: Float[Array, "B G T"]
    """Of each sampled token in all of them, for metrics; of those in the loss, for the entropy bonus."""
    bonus_share: Float[Array, "B G T"]
    old_logps: Float[Array, "B G T"] | None
    focus: Focus | None


def grpo_step(
    state: TrainState,
    frozen: Any,
    experience: PolicyBatch,
    key: PRNGKeyArray,
    *,
    model: Scorer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    temperature: float,
    grad_accum_steps: int,
    minibatches: int,
    updates: int,
    kl_target: float = 0.0,
    kl_horizon: int = 1,
) -> tuple[TrainState, Metrics]:
    """Returns the state after `updates` · `minibatches` policy-gradient updates on one rollout, and its metrics.

    The first update starts at the policy that sampled, so its ratio is 1 and only its gradient acts; for later ones the old
    log-probabilities are recomputed once by this same forward pass, never taken from the sampler. `frozen` has the parameters
    that the state lacks. Each minibatch is one optimizer step and has its own normalisers, whatever the number of micro-batches.

    Args:
      key: of the tokens that a row chooses by lot.
      kl_target: nats a token that `state.kl_coef` is steered to, over `kl_horizon` completions; 0 leaves it.
    """

    def fixed(params: Any, experience: PolicyBatch, parts: int) -> tuple[Array, Array]:
        return logps_of(
            model, join(frozen, params), experience.batch, experience.rollout, temperature, parts
        )

    row = algorithm._replace(kl_coef=state.kl_coef) if kl_target else algorithm
    old_logps = None
    if updates * minibatches > 1:
        old_logps = fixed(state.params, experience, grad_accum_steps * minibatches)[0]

    def loss(params: Any, part: _Part) -> tuple[Array, tuple[Metrics, Metrics]]:
        (_, r, a, ref), mask, weights, share, bonus_share, old, focus = part
        logps, entropy = fixed(params, part.experience, 1)
        old = jax.lax.stop_gradient(logps) if old is None else old
        terms: PolicyTerms = policy_loss(logps, old, ref, a, mask, row, focus, r.logps)
        value = jnp.sum(terms.loss * weights) - row.entropy_coef * jnp.sum(entropy * bonus_share)
        means = {
            "policy/loss": value,
            "policy/kl": jnp.sum(terms.kl * share),
            "policy/entropy": jnp.sum(entropy * share),
            "policy/clip_fraction": jnp.sum(terms.clipped * share),
            "policy/correction": jnp.sum(terms.weight * share),
        }
        return value, (means, {"policy/logp_diff_max": jnp.max(jnp.abs(logps - r.logps) * r.mask)})

    def one_update(
        state: TrainState, given: tuple[PolicyBatch, Array | None, PRNGKeyArray]
    ) -> tuple[TrainState, Metrics]:
        experience, old, key = given
        r = experience.rollout
        mask = r.mask & ended(r)[..., None] if row.mask_truncated_completions else r.mask
        focus = None
        if row.focus is not None:
            logps, entropy = fixed(state.params, experience, grad_accum_steps)
            focus = row.focus(
                Tokens(logps, entropy, experience.advantages, mask, key), row.focus_share
            )
        all_tokens, learned = (tokens / jnp.maximum(tokens.sum(), 1) for tokens in (r.mask, mask))
        part = _Part(experience, mask, row.average(mask), all_tokens, learned, old, focus)
        grads, metrics = accumulate(loss, state.params, part, grad_accum_steps)
        return _apply(state, grads, optimizer, state.step), metrics | {
            "optim/grad_norm": optax.tree.norm(grads)
        }

    def once(state: TrainState, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(one_update, state, (*parts, jax.random.split(key, minibatches)))

    step, parts = state.step, split((experience, old_logps), minibatches)
    state, metrics = jax.lax.scan(once, state, jax.random.split(key, updates))
    first = metrics["policy/logp_diff_max"][0, 0]
    metrics = {name: values.mean() for name, values in metrics.items()} | {
        "policy/logp_diff_max": first
    }
    if kl_target:
        metrics["policy/kl_coef"] = state.kl_coef
        error = jnp.clip(metrics["policy/kl"] / kl_target - 1, -0.2, 0.2)
        state = state._replace(
            kl_coef=state.kl_coef * (1 + error * experience.advantages.size / kl_horizon)
        )
    return state._replace(step=step + 1), metrics


def logps_of(
    model: Scorer, params: Any, batch: Batch, rollout: Rollout, temperature: float, parts: int
) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
    """Returns log-probabilities and entropies (nats) of the tokens of a rollout, worked through in `parts` parts."""

    def score(part: tuple[Batch, Rollout]) -> tuple[Array, Array]:
        b, r = part
        return model.completion_logps(
            params, b.image, b.prompt, b.prompt_mask, r.tokens, r.mask, temperature
        )

    if parts == 1:
        return score((batch, rollout))
    return jax.tree.map(unsplit, jax.lax.map(score, split((batch, rollout), parts)))


def ended(rollout: Rollout) -> Bool[Array, "B G"]:
    """Returns which completions end in EOS, and not because there was no more room."""
    return jnp.any(rollout.mask & (rollout.tokens == EOS), axis=-1)


def _apply(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, step: Array
) -> TrainState:
    updates, opt = optimizer.update(grads, state.opt, state.params)
    return state._replace(step=step, params=optax.apply_updates(state.params, updates), opt=opt)


def accumulate(loss: LossAndMetrics, params: Any, batch: Any, parts: int) -> tuple[Any, Metrics]:
    """Returns the gradient of `loss` summed over `parts` parts of `batch`, and its metrics; one part's activations at once."""
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (sums, largest) = gradient(params, batch)
        return grads, sums | largest

    def add(total: Any, part: Any) -> tuple[Any, None]:
        grads, (sums, largest) = gradient(params, part)
        grads_so_far, sums_so_far, largest_so_far = total
        plus = jax.tree.map(jnp.add, (grads_so_far, sums_so_far), (grads, sums))
        return (*plus, jax.tree.map(jnp.maximum, largest_so_far, largest)), None

    split_batch = split(batch, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split_batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1]))
    (grads, sums, largest), _ = jax.lax.scan(add, zeros, split_batch)
    return grads, sums | largest


def split(tree: Any, parts: int) -> Any:
    """Returns `[B, …]` leaves as `[parts, B / parts, …]`.

    Part i has rows i, i + parts, …: a B that is split over devices stays so within each part.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def unsplit(parts: Array) -> Array:
    """Returns the inverse of `split` for one array."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
