"""One step of learning: from a batch to a new `TrainState`. Supervised and reinforced steps are siblings."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from pg_ground.params import join
from pg_ground.rl.loss import Algorithm, PolicyTerms, policy_loss, target_logps
from pg_ground.types import Array, Batch, Rollout, TrainState
from pg_ground.vocab import Vocab

Metrics = dict[str, Any]
"""float32 scalars by name."""

LossAndMetrics = Callable[[Any, Any], tuple[Float[Array, ""], tuple[Metrics, Metrics]]]
"""(params, part of the batch) to a loss and two dicts of metrics; losses and the first dict add up over parts, of the second
the largest counts."""


@runtime_checkable
class Scorer(Protocol):
    """What this room needs of a model."""

    def completion_logps(
        self, params: Any, image: Array, prompt: Array, prompt_mask: Array, tokens: Array, mask: Array, temperature: float
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
    micro_batches: int,
    label_smoothing: float,
    loc_smoothing_bins: float,
    dropout_key: Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one supervised step on the suffixes of `batch`, and its metrics.

    The loss is big_vision's: the mean over an example's suffix tokens, EOS included, then over examples (nats). `frozen` has the
    parameters that `state` lacks. Adapters drop inputs only where there is a `dropout_key`.
    """
    questions = batch.suffix.shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)

    def loss(params: Any, part_and_key: tuple[Batch, Array | None]) -> tuple[Array, tuple[Metrics, Metrics]]:
        part, key = part_and_key

        def score(logits: Array, tokens: Array) -> tuple[Array, Array]:
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

    grads, metrics = accumulate(loss, state.params, (batch, keys), micro_batches)
    return _apply(state, grads, optimizer, state.step + 1), metrics | {"optim/grad_norm": optax.tree.norm(grads)}


def grpo_step(
    state: TrainState,
    frozen: Any,
    ref_params: Any,
    batch: Batch,
    rollout: Rollout,
    advantages: Float[Array, "B G"],
    *,
    model: Scorer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    temperature: float,
    micro_batches: int,
    updates: int,
) -> tuple[TrainState, Metrics]:
    """Returns the state after `updates` policy-gradient updates on one rollout, and its metrics.

    The first update starts at the policy that sampled, so its ratio is 1 and only its gradient acts; for later ones the old
    log-probabilities are recomputed once by this same forward pass, never taken from the sampler. `ref_params` is read only if
    the row's `kl_coef` is not 0; `frozen` has the parameters that both lack. Normalisers are those of the whole batch, whatever
    the number of micro-batches.
    """
    weights = algorithm.average(rollout.mask)
    share = rollout.mask / jnp.maximum(rollout.mask.sum(), 1)

    def score(params: Any, part: tuple[Batch, Rollout]) -> tuple[Array, Array]:
        b, r = part
        return model.completion_logps(join(frozen, params), b.image, b.prompt, b.prompt_mask, r.tokens, r.mask, temperature)

    def fixed(params: Any) -> Float[Array, "B G T"]:
        parts = split((batch, rollout), micro_batches)
        return unsplit(jax.lax.map(lambda part: score(params, part)[0], parts))

    ref_logps = fixed(ref_params) if algorithm.kl_coef else None
    old_logps = fixed(state.params) if updates > 1 else None

    def loss(params: Any, part: Any) -> tuple[Array, tuple[Metrics, Metrics]]:
        b, r, a, w, s, old, ref = part
        logps, entropy = score(params, (b, r))
        terms: PolicyTerms = policy_loss(logps, jax.lax.stop_gradient(logps) if old is None else old, ref, a, r.mask, algorithm)
        value = jnp.sum(terms.loss * w)
        means = {
            "policy/loss": value,
            "policy/kl": jnp.sum(terms.kl * s),
            "policy/entropy": jnp.sum(entropy * s),
            "policy/clip_fraction": jnp.sum(terms.clipped * s),
        }
        return value, (means, {"policy/logp_diff_max": jnp.max(jnp.abs(logps - r.logps) * r.mask)})

    def one_update(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        parts = (batch, rollout, advantages, weights, share, old_logps, ref_logps)
        grads, metrics = accumulate(loss, state.params, parts, micro_batches)
        return _apply(state, grads, optimizer, state.step), metrics | {"optim/grad_norm": optax.tree.norm(grads)}

    step = state.step
    state, metrics = jax.lax.scan(one_update, state, length=updates)
    first = metrics["policy/logp_diff_max"][0]
    metrics = {name: values.mean() for name, values in metrics.items()} | {"policy/logp_diff_max": first}
    return state._replace(step=step + 1), metrics


def _apply(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, step: Array) -> TrainState:
    updates, opt = optimizer.update(grads, state.opt, state.params)
    return TrainState(step, optax.apply_updates(state.params, updates), opt)


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
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def unsplit(parts: Array) -> Array:
    """Returns the inverse of `split` for one array."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
