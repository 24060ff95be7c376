"""Types that features of the future need: critics with advantages per token, tool observations,
trees beside the policy.

Each test uses a seam on a tiny real model, as a stage with that feature would use it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import B, G, T, inputs, unlabelled

from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.rl.algorithms import ALGORITHMS
from pg_ground.rl.loss import policy_loss
from pg_ground.rl.objectives import token_mean
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.rl.update import accumulate_gradients, apply_gradients, grpo_update
from pg_ground.types import POLICY, Array, Batch, Metrics, Rollout, TrainState

CRITIC = "critic"
DAPO = ALGORITHMS["dapo"]


@pytest.fixture(scope="module")
def rollout(pg1) -> tuple[Batch, Rollout]:
    """A batch and its completions.

    Two tokens in the middle are a tool's output: real, but not trained.
    """
    x = inputs(pg1.model)
    batch = unlabelled(*x[:3], x.tokens[:, 0], x.mask[:, 0])
    observation = (jnp.arange(T) >= 2) & (jnp.arange(T) < 4)
    logps = jnp.where(x.mask, -1.0, 0.0)
    return batch, Rollout(x.tokens, x.mask, logps, x.mask & ~observation)


@pytest.fixture(scope="module")
def grpo_step(pg1) -> Callable[[PolicyBatch], tuple[TrainState, Metrics]]:
    """A step of plain gradient descent from the parameters of `pg1`.

    The momentum of its train state is the gradient.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)
    trees = {POLICY: pg1.params}
    state = TrainState(jnp.int32(0), trees, optimizer.init(trees))

    @jax.jit
    def step(policy_batch: PolicyBatch) -> tuple[TrainState, Metrics]:
        return grpo_update(
            state, {}, policy_batch, jax.random.key(0),
            model=pg1.model, optimizer=optimizer, algorithm=DAPO,
            temperature=1.0, grad_accum_steps=2, minibatches=1, num_iterations=1,
        )  # fmt: skip

    return step


def random_advantages(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def gradient_norm(state: TrainState) -> float:
    return float(optax.tree.norm(state.opt_state[0].trace))


@pytest.mark.slow
def test_advantages_of_tokens_go_through_the_whole_update(grpo_step, rollout):
    """[B, G, T] advantages that are equal within a completion give the update of [B, G, 1]."""
    batch, completions = rollout
    advantages = random_advantages(B, G, 1)
    by_completion, _ = grpo_step(PolicyBatch(batch, completions, advantages, None))
    by_token = jnp.broadcast_to(advantages, (B, G, T))
    state, _ = grpo_step(PolicyBatch(batch, completions, by_token, None))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        state.params,
        by_completion.params,
    )
    other, _ = grpo_step(PolicyBatch(batch, completions, random_advantages(B, G, T), None))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), other.params, state.params)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-4


@pytest.mark.slow
def test_tokens_outside_the_loss_mask_have_no_gradient(grpo_step, rollout):
    """Only a tool's output has an advantage here.

    The gradient is exactly 0, and the metrics do not count those tokens.
    """
    batch, completions = rollout
    is_observation = completions.mask & ~completions.loss_mask
    advantages = jnp.where(is_observation, 1.0, 0.0)
    state, metrics = grpo_step(PolicyBatch(batch, completions, advantages, None))
    assert gradient_norm(state) == 0.0
    trained_too = completions._replace(loss_mask=completions.mask)
    state, other_metrics = grpo_step(PolicyBatch(batch, trained_too, advantages, None))
    assert gradient_norm(state) > 1e-3
    assert metrics["policy/entropy"] != other_metrics["policy/entropy"]


@pytest.mark.slow
def test_tokens_outside_the_loss_mask_are_read(grpo_step, rollout):
    """The model attends to a tool's output. Other observations give other gradients of the
    policy's tokens.
    """
    batch, completions = rollout
    advantages = random_advantages(B, G, 1)
    state, _ = grpo_step(PolicyBatch(batch, completions, advantages, None))
    is_observation = completions.mask & ~completions.loss_mask
    other_tokens = jnp.where(is_observation, 7, completions.tokens)
    changed = completions._replace(tokens=other_tokens)
    other, _ = grpo_step(PolicyBatch(batch, changed, advantages, None))
    assert abs(gradient_norm(state) - gradient_norm(other)) > 1e-4


@pytest.mark.slow
def test_a_critic_is_trained_beside_the_policy(pg1, rollout):
    """The critic is a value head on hidden states. Its tree has a name, its loss reaches the tree,
    and its values make advantages per token.
    """
    batch, completions = rollout
    width = pg1.model.config.text.width
    optimizer = optax.adam(1e-2)
    trees = {POLICY: pg1.params, CRITIC: {"value": {"kernel": jnp.zeros((width,))}}}
    state = TrainState(jnp.int32(0), trees, optimizer.init(trees))
    returns = jnp.where(completions.mask, 1.0, 0.0)

    def score(trees: Any, part: tuple[Batch, Rollout]) -> tuple[Array, Array]:
        """Returns the log-probability and the value of each token."""
        questions, rows = part

        def token_scores(hidden: Array, logits: Array, tokens: Array) -> tuple[Array, Array]:
            logps = jax.nn.log_softmax(logits)
            logp = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
            return logp, hidden @ trees[CRITIC]["value"]["kernel"]

        return pg1.model.completion_scores(
            trees[POLICY], questions.image, questions.prompt, questions.prompt_mask, rows.tokens,
            token_scores, None,
        )  # fmt: skip

    def loss(trees: Any, part: Any) -> Any:
        questions, rows, targets = part
        logps, values = score(trees, (questions, rows))
        advantages = jax.lax.stop_gradient(targets - values)  # [B, G, T]
        old_logps = jax.lax.stop_gradient(logps)
        terms = policy_loss(logps, old_logps, None, advantages, rows.loss_mask, DAPO)
        weights = token_mean(completions.loss_mask)[: len(rows.tokens)]
        policy = jnp.sum(terms.loss * weights)
        value = jnp.sum(jnp.square(values - targets) * weights)
        return policy + value, ({"policy/loss": policy, "critic/loss": value}, {})

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, Any]:
        part = (batch, completions, returns)
        grads, metrics = accumulate_gradients(loss, state.params, part, 1)
        return apply_gradients(state, grads, optimizer), metrics

    losses = []
    for _ in range(5):
        state, metrics = step(state)
        losses.append(float(metrics["critic/loss"]))
    assert losses[-1] < 0.9 * losses[0]
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.params[POLICY], pg1.params)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-4
    assert float(jnp.abs(state.params[CRITIC]["value"]["kernel"]).max()) > 1e-3


def test_a_checkpoint_has_every_trainable_tree(tmp_path):
    trees = {POLICY: {"w": jnp.ones((2, 3))}, CRITIC: {"value": {"kernel": jnp.arange(4.0)}}}
    state = TrainState(jnp.int32(3), trees, {"mu": jax.tree.map(jnp.zeros_like, trees)})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {"stage": "ppo"})
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            np.shape(leaf),
            np.asarray(leaf).dtype,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        ),
        state,
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(3, abstract)
    assert restored.params.keys() == {POLICY, CRITIC}
    jax.tree.map(np.testing.assert_array_equal, restored.params, trees)
    assert (tmp_path / "3" / "params").is_dir()
