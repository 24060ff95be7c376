"""Pure update steps: from a batch to a new `TrainState`, supervised and by policy gradient."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, PRNGKeyArray, PyTree

from pg_ground.params import join
from pg_ground.rl.algorithms import Algorithm
from pg_ground.rl.loss import policy_loss, target_logps
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.rl.token_selection import TokenSelection, TokenStatistics
from pg_ground.types import POLICY, Array, Batch, Metrics, Params, Rollout, TrainState
from pg_ground.vocab import EOS, Vocab

LossAndMetrics = Callable[[PyTree, PyTree], tuple[Float[Array, ""], tuple[Metrics, Metrics]]]
"""`(trainable trees, part of a batch)` to a loss and two dicts of metrics.

Losses and the metrics of the first dict are summed over the parts. The metrics of the second dict
are maxima.
"""


@runtime_checkable
class Scorer(Protocol):
    """The part of a model that updates need. `pg_ground.models.PaliGemma` has it."""

    def completion_logps(
        self,
        params: Params,
        image: Array,
        prompt: Array,
        prompt_mask: Array,
        tokens: Array,
        mask: Array,
        temperature: float,
    ) -> tuple[Array, Array]: ...

    def completion_scores(
        self,
        params: Params,
        image: Array,
        prompt: Array,
        prompt_mask: Array,
        tokens: Array,
        score: Callable[..., PyTree],
        dropout_key: PRNGKeyArray | None,
    ) -> PyTree: ...


@jax.named_scope("update")
def sft_update(
    state: TrainState,
    frozen: Params,
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
    """Returns the state after one supervised step on the suffixes of `batch`, and the metrics.

    The loss is big_vision's, in nats: the mean over the suffix tokens of an example, EOS included,
    then over examples.

    Args:
      frozen: the parameters that `state` does not have.
      dropout_key: key of the adapters' dropout; None drops nothing.
    """
    questions = batch.suffix.shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, grad_accum_steps)

    def loss(
        trees: Mapping[str, Params], part_and_key: tuple[Batch, Array | None]
    ) -> tuple[Array, tuple[Metrics, Metrics]]:
        part, key = part_and_key

        def score(hidden: Array, logits: Array, tokens: Array) -> tuple[Array, Array]:
            smoothed = target_logps(logits, tokens, vocab, label_smoothing, loc_smoothing_bins)
            return smoothed, target_logps(logits, tokens, vocab, 0.0, 0.0)

        smoothed, plain = model.completion_scores(
            join(frozen, trees[POLICY]), part.image, part.prompt, part.prompt_mask,
            part.suffix[:, None], score, None if key is None else key[0],
        )  # fmt: skip
        weights = part.suffix_mask / part.suffix_mask.sum(axis=1, keepdims=True) / questions
        value = -jnp.sum(smoothed[:, 0] * weights)
        return value, ({"sft/loss": value, "sft/nll": -jnp.sum(plain[:, 0] * weights)}, {})

    grads, metrics = accumulate_gradients(loss, state.params, (batch, keys), grad_accum_steps)
    metrics = metrics | {"optim/grad_norm": optax.tree.norm(grads)}
    return apply_gradients(state, grads, optimizer)._replace(step=state.step + 1), metrics


class _Part(NamedTuple):
    """A part of a policy batch, with the values that are fixed before its update."""

    policy_batch: PolicyBatch
    mask: Bool[Array, "B G T"]
    """Tokens that are trained."""
    loss_weights: Float[Array, "B G T"]
    metric_weights: Float[Array, "B G T"]
    """Each token's share of all sampled tokens."""
    entropy_weights: Float[Array, "B G T"]
    """Each token's share of all trained tokens."""
    old_logps: Float[Array, "B G T"] | None
    selection: TokenSelection | None


class _PolicyUpdate(NamedTuple):
    """The parts of a policy-gradient update that do not change during a step."""

    model: Scorer
    frozen: Params
    optimizer: optax.GradientTransformation
    algorithm: Algorithm
    temperature: float
    grad_accum_steps: int

    def logps_and_entropy(
        self, trees: Mapping[str, Params], policy_batch: PolicyBatch, parts: int
    ) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
        """Returns log-probabilities and entropies of the completions under the policy in
        `trees`."""
        params = join(self.frozen, trees[POLICY])
        batch = policy_batch.batch
        rollout = policy_batch.rollout
        return completion_logps(self.model, params, batch, rollout, self.temperature, parts)

    def loss(
        self, trees: Mapping[str, Params], part: _Part
    ) -> tuple[Float[Array, ""], tuple[Metrics, Metrics]]:
        """Returns the loss of a part of a minibatch, and its metrics."""
        batch = part.policy_batch
        rollout = batch.rollout
        logps, entropy = self.logps_and_entropy(trees, batch, 1)
        old_logps = jax.lax.stop_gradient(logps) if part.old_logps is None else part.old_logps
        terms = policy_loss(
            logps, old_logps, batch.ref_logps, batch.advantages, part.mask, self.algorithm,
            part.selection, rollout.logps,
        )  # fmt: skip
        bonus = self.algorithm.entropy_coef * jnp.sum(entropy * part.entropy_weights)
        value = jnp.sum(terms.loss * part.loss_weights) - bonus
        means = {
            "policy/loss": value,
            "policy/kl": jnp.sum(terms.kl * part.metric_weights),
            "policy/entropy": jnp.sum(entropy * part.metric_weights),
            "policy/clip_fraction": jnp.sum(terms.clipped * part.metric_weights),
            "policy/correction": jnp.sum(terms.weight * part.metric_weights),
        }
        difference = jnp.abs(logps - rollout.logps) * rollout.loss_mask
        return value, (means, {"policy/logp_diff_max": jnp.max(difference)})

    def select_tokens(
        self, state: TrainState, policy_batch: PolicyBatch, mask: Array, key: PRNGKeyArray
    ) -> TokenSelection | None:
        """Returns the token selection of a minibatch; None if the algorithm has none."""
        selection = self.algorithm.token_selection
        if selection is None:
            return None
        parts = self.grad_accum_steps
        logps, entropy = self.logps_and_entropy(state.params, policy_batch, parts)
        tokens = TokenStatistics(logps, entropy, policy_batch.advantages, mask, key)
        return selection(tokens, **self.algorithm.options_for("token_selection"))

    def on_minibatch(
        self, state: TrainState, minibatch: tuple[PolicyBatch, Array | None, PRNGKeyArray]
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after one optimizer step on a minibatch, and the metrics."""
        policy_batch, old_logps, key = minibatch
        rollout = policy_batch.rollout
        mask = rollout.loss_mask
        if self.algorithm.mask_truncated_completions:
            mask = mask & is_finished(rollout)[..., None]
        part = _Part(
            policy_batch, mask, self.algorithm.loss_agg_mode(mask), _shares(rollout.loss_mask),
            _shares(mask), old_logps, self.select_tokens(state, policy_batch, mask, key),
        )  # fmt: skip
        grads, metrics = accumulate_gradients(self.loss, state.params, part, self.grad_accum_steps)
        metrics = metrics | {"optim/grad_norm": optax.tree.norm(grads)}
        return apply_gradients(state, grads, self.optimizer), metrics


@jax.named_scope("update")
def grpo_update(
    state: TrainState,
    frozen: Params,
    policy_batch: PolicyBatch,
    key: PRNGKeyArray,
    *,
    model: Scorer,
    optimizer: optax.GradientTransformation,
    algorithm: Algorithm,
    temperature: float,
    grad_accum_steps: int,
    minibatches: int,
    num_iterations: int,
    kl_target: float = 0.0,
    kl_horizon: int = 1,
) -> tuple[TrainState, Metrics]:
    """Returns the state after `num_iterations` · `minibatches` policy-gradient updates on one
    rollout, and the metrics.

    The first update starts at the policy that sampled: its ratio is 1. Later updates need the old
    log-probabilities. The same forward pass computes them once; they are never taken from the
    sampler. Each minibatch is one optimizer step with its own normalisers, whatever the number of
    gradient accumulation steps.

    Args:
      frozen: the parameters that `state` does not have.
      key: key of a token selection that draws at random.
      kl_target: nats per token that steer `state.kl_coef` over `kl_horizon` completions; 0 leaves
        it fixed.
    """
    if kl_target:
        algorithm = algorithm._replace(kl_coef=state.kl_coef)
    update = _PolicyUpdate(model, frozen, optimizer, algorithm, temperature, grad_accum_steps)
    old_logps = None
    if num_iterations * minibatches > 1:
        all_parts = grad_accum_steps * minibatches
        old_logps = update.logps_and_entropy(state.params, policy_batch, all_parts)[0]
    parts = split((policy_batch, old_logps), minibatches)

    def iterate(state: TrainState, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(key, minibatches)
        return jax.lax.scan(update.on_minibatch, state, (*parts, keys))

    step = state.step
    state, metrics = jax.lax.scan(iterate, state, jax.random.split(key, num_iterations))
    first_difference = metrics["policy/logp_diff_max"][0, 0]
    metrics = {name: values.mean() for name, values in metrics.items()}
    metrics["policy/logp_diff_max"] = first_difference
    if kl_target:
        completions = policy_batch.rollout.mask.shape[0] * policy_batch.rollout.mask.shape[1]
        metrics["policy/kl_coef"] = state.kl_coef
        state = steer_kl_coef(state, metrics["policy/kl"], kl_target, completions, kl_horizon)
    return state._replace(step=step + 1), metrics


def steer_kl_coef(
    state: TrainState, kl: Float[Array, ""], kl_target: float, completions: int, kl_horizon: int
) -> TrainState:
    """Returns the state with a `kl_coef` that moves `kl` towards `kl_target` (Ziegler et al.
    2019, section 2.2).

    Args:
      completions: completions of this step.
      kl_horizon: completions over which the coefficient can change by 20 %.
    """
    error = jnp.clip(kl / kl_target - 1, -0.2, 0.2)
    return state._replace(kl_coef=state.kl_coef * (1 + error * completions / kl_horizon))


def completion_logps(
    model: Scorer, params: Params, batch: Batch, rollout: Rollout, temperature: float, parts: int
) -> tuple[Float[Array, "B G T"], Float[Array, "B G T"]]:
    """Returns log-probabilities and entropies (nats) of the tokens of a rollout, computed in
    `parts` parts."""

    def score(part: tuple[Batch, Rollout]) -> tuple[Array, Array]:
        questions, completions = part
        return model.completion_logps(
            params, questions.image, questions.prompt, questions.prompt_mask,
            completions.tokens, completions.mask, temperature,
        )  # fmt: skip

    if parts == 1:
        return score((batch, rollout))
    return jax.tree.map(unsplit, jax.lax.map(score, split((batch, rollout), parts)))


def is_finished(rollout: Rollout) -> Bool[Array, "B G"]:
    """Returns True for completions that end in EOS.

    The others are cut off at the maximum length.
    """
    return jnp.any(rollout.mask & (rollout.tokens == EOS), axis=-1)


def _shares(mask: Bool[Array, "B G T"]) -> Float[Array, "B G T"]:
    """Returns the share of each token in all tokens of the mask."""
    return mask / jnp.maximum(mask.sum(), 1)


def apply_gradients(
    state: TrainState, grads: Mapping[str, Params], optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state after one optimizer step on all trainable trees."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state)


def accumulate_gradients(
    loss: LossAndMetrics, trees: Mapping[str, Params], batch: PyTree, parts: int
) -> tuple[Mapping[str, Params], Metrics]:
    """Returns the gradient of `loss` summed over `parts` parts of `batch`, and the metrics.

    Only the activations of one part are in memory at a time.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, (sums, maxima) = gradient(trees, batch)
        return grads, sums | maxima

    def add_part(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        grads, (sums, maxima) = gradient(trees, part)
        total_grads, total_sums, total_maxima = total
        added = jax.tree.map(jnp.add, (total_grads, total_sums), (grads, sums))
        return (*added, jax.tree.map(jnp.maximum, total_maxima, maxima)), None

    split_batch = split(batch, parts)
    first_part = jax.tree.map(lambda x: x[0], split_batch)
    grad_shapes, metric_shapes = jax.eval_shape(gradient, trees, first_part)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grad_shapes, *metric_shapes))
    (grads, sums, maxima), _ = jax.lax.scan(add_part, zeros, split_batch)
    return grads, sums | maxima


def split(tree: PyTree, parts: int) -> PyTree:
    """Returns `[B, …]` leaves as `[parts, B / parts, …]`.

    Part i has the rows i, i + parts, … If B is sharded over devices, it stays sharded within each
    part.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def unsplit(parts: Array) -> Array:
    """Returns the inverse of `split` for one array."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
