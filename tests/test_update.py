"""Micro-batches and devices divide a step of real, tiny models without changing its result.

Both updates are tested: the supervised one and the policy-gradient one. The optimizer is plain
gradient descent with momentum, because its trace is the gradient itself. Adam would divide each
gradient by its own size. An entry of 1e-9 is all rounding, but Adam would move its parameter as far
as an entry of 1 does.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bigram import random_bigram
from conftest import CLOSE, B, G, Tiny, assert_close_trees, inputs, unlabelled

from pg_ground import config
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.params import flatten, is_multiplied
from pg_ground.rl import update
from pg_ground.rl.algorithms import ALGORITHMS, Algorithm
from pg_ground.rl.loss import policy_loss
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.types import POLICY, Batch, Rollout, TrainState
from pg_ground.vocab import vocab_of_size


def batch_of(model: PaliGemma) -> tuple[Batch, Rollout, jax.Array]:
    """Returns a batch, a rollout and advantages.

    The suffix of each prompt is its first completion.
    """
    x = inputs(model)
    batch = unlabelled(*x[:3], x.tokens[:, 0], x.mask[:, 0])
    advantages = jnp.asarray(np.random.default_rng(2).normal(size=(B, G, 1)), jnp.float32)
    return batch, Rollout(x.tokens, x.mask, jnp.where(x.mask, -1.0, 0.0), x.mask), advantages


def state_of(params: Any) -> tuple[TrainState, optax.GradientTransformation]:
    """Returns a state before its first step, and its optimizer."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    trees = {POLICY: jax.tree.map(jnp.copy, params)}
    return TrainState(jnp.int32(0), trees, optimizer.init(trees)), optimizer


def sft_update(tiny: Any, grad_accum_steps: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a supervised step as a function, and its arguments."""
    state, optimizer = state_of(tiny.params)
    vocab = vocab_of_size(tiny.model.config.text.vocab_size)

    def step(state: TrainState, batch: Batch) -> Any:
        return update.sft_update(
            state,
            {},
            batch,
            model=tiny.model,
            optimizer=optimizer,
            vocab=vocab,
            grad_accum_steps=grad_accum_steps,
            label_smoothing=0.1,
            loc_smoothing_bins=2.0,
        )

    return step, (state, batch_of(tiny.model)[0])


ROW = ALGORITHMS["dapo"]._replace(kl_coef=0.1)
"""DAPO averages over the tokens of the whole batch.

Micro-batches compute this average wrong most easily.
"""

TEMPERATURE = 0.8


def grpo_update(
    tiny: Any,
    grad_accum_steps: int,
    row: Algorithm = ROW,
    num_iterations: int = 2,
    minibatches: int = 1,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a policy-gradient step with a reference policy as a function, and its arguments.

    By default the step has two updates.
    """
    state, optimizer = state_of(tiny.params)

    def step(
        state: TrainState, ref_params: Any, batch: Batch, rollout: Rollout, advantages: jax.Array
    ) -> Any:
        ref_logps = update.completion_logps(
            tiny.model, ref_params, batch, rollout, TEMPERATURE, grad_accum_steps * minibatches
        )[0]
        return update.grpo_update(
            state,
            {},
            PolicyBatch(batch, rollout, advantages, ref_logps),
            jax.random.key(0),
            model=tiny.model,
            optimizer=optimizer,
            algorithm=row,
            temperature=TEMPERATURE,
            grad_accum_steps=grad_accum_steps,
            minibatches=minibatches,
            num_iterations=num_iterations,
        )

    ref_params = jax.tree.map(lambda a: 1.01 * a, tiny.params)
    return step, (state, ref_params, *batch_of(tiny.model))


def run_step(
    step: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[TrainState, dict[str, float]]:
    """Returns the state and the metrics after one compiled step."""
    state, metrics = jax.jit(step)(*args)
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def whole_steps(pg1, pg2) -> dict[str, tuple[TrainState, dict[str, float]]]:
    """Returns the results of a supervised step of `pg1` and of a policy-gradient step of `pg2`.

    Both steps run on one device, with the whole batch in one part.
    """
    return {"sft": run_step(*sft_update(pg1, 1)), "grpo": run_step(*grpo_update(pg2, 1))}


def assert_same_step(
    result: tuple[TrainState, dict[str, float]], expected: tuple[TrainState, dict[str, float]]
) -> None:
    """Compares the parameters, the momentum and the metrics of two steps.

    A step changes the parameters little, so most of a parameter is its old value. The momentum is
    the gradient itself.
    """
    state, metrics = result
    expected_state, expected_metrics = expected
    assert state.step == expected_state.step == 1
    assert_close_trees(state.params, expected_state.params)
    assert_close_trees(state.opt_state, expected_state.opt_state)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(
            value, expected_metrics[name], rtol=CLOSE, atol=CLOSE, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_do_not_change_a_supervised_step(pg1, whole_steps, parts):
    assert_same_step(run_step(*sft_update(pg1, parts)), whole_steps["sft"])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_defect_15_micro_batches_do_not_change_a_policy_gradient_step(pg2, whole_steps, parts):
    """Our losses are divided by the tokens of the whole batch, and the metrics of all parts add up.

    RLLaVA divides by the tokens of a micro-batch. EasyR1 keeps the metrics of one part.
    """
    assert_same_step(run_step(*grpo_update(pg2, parts)), whole_steps["grpo"])


@pytest.fixture(params=["bigram", pytest.param("pg1", marks=pytest.mark.slow)])
def policy(request) -> Tiny:
    """Returns a policy of three matrices, or PaliGemma in slow tests.

    The updates of PaliGemma take ten times as long to compile.
    """
    return random_bigram() if request.param == "bigram" else request.getfixturevalue("pg1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_entropy", "gspo", "kl_cov"])
def test_micro_batches_do_not_change_a_step_of_rows_that_read_the_whole_batch(policy, name):
    """Each of two minibatches is an optimizer step, with one part or with two parts."""
    row = ALGORITHMS[name]._replace(kl_coef=0.1, mask_truncated_completions=True, entropy_coef=0.01)
    expected = run_step(*grpo_update(policy, 1, row, num_iterations=1, minibatches=2))
    assert_same_step(
        run_step(*grpo_update(policy, 2, row, num_iterations=1, minibatches=2)), expected
    )


@pytest.mark.slow
def test_minibatches_are_optimizer_steps_one_after_the_other(policy):
    """The second optimizer step starts at the result of the first.

    The second step has the other half of the questions.
    """
    step, (state, ref_params, batch, rollout, advantages) = grpo_update(
        policy, 1, ALGORITHMS["grpo"], num_iterations=1, minibatches=2
    )
    both_steps = run_step(step, (state, ref_params, batch, rollout, advantages))[0]
    halves = [update.split(tree, 2) for tree in (batch, rollout, advantages)]
    half_step, _ = grpo_update(
        policy, 1, ALGORITHMS["grpo"].override(clip_low=9.0, clip_high=9.0), num_iterations=1
    )
    first_step = run_step(
        half_step, (state, ref_params, *(jax.tree.map(lambda x: x[0], half) for half in halves))
    )[0]
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), both_steps.params, first_step.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-4 and both_steps.step == 1


def test_the_kl_coefficient_is_steered_to_its_target():
    policy = random_bigram()
    step, (state, *arguments) = grpo_update(policy, 1, ALGORITHMS["grpo"], num_iterations=1)
    state = state._replace(kl_coef=jnp.float32(0.1))

    def steered_kl_coef(target: float) -> float:
        def steered_step(
            state: TrainState,
            ref_params: Any,
            batch: Batch,
            rollout: Rollout,
            advantages: jax.Array,
        ) -> Any:
            ref_logps = update.completion_logps(
                policy.model, ref_params, batch, rollout, TEMPERATURE, 1
            )[0]
            return update.grpo_update(
                state, {}, PolicyBatch(batch, rollout, advantages, ref_logps), jax.random.key(0),
                model=policy.model, optimizer=state_of(policy.params)[1],
                algorithm=ALGORITHMS["grpo"], temperature=TEMPERATURE, grad_accum_steps=1,
                minibatches=1, num_iterations=1, kl_target=target, kl_horizon=100,
            )  # fmt: skip

        return float(run_step(steered_step, (state, *arguments))[0].kl_coef)

    completions = arguments[-1].size
    assert steered_kl_coef(1e-9) == pytest.approx(0.1 * (1 + 0.2 * completions / 100))
    assert steered_kl_coef(1e9) == pytest.approx(0.1 * (1 - 0.2 * completions / 100))
    assert float(run_step(step, (state, *arguments))[0].kl_coef) == np.float32(0.1)


def test_a_step_moves_the_parameters_and_the_second_update_is_off_policy(pg2, whole_steps):
    """A step changes the numbers that the other tests compare."""
    state, metrics = whole_steps["grpo"]
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), state.params[POLICY], pg2.params)
    assert float(optax.tree.norm(moved)) > 1e-2 and metrics["optim/grad_norm"] > 0.1
    assert metrics["policy/kl"] > 0 and metrics["policy/clip_fraction"] > 0


def on_devices(mesh: Any, args: tuple[Any, ...], num_states: int) -> tuple[Any, ...]:
    """Returns `args` on the mesh. The first `num_states` of them are states or parameters.

    Parameters and optimizer are split as `train` splits them. The other arguments are `[B, …]`, and
    are split along B.
    """
    sharded = [
        jax.device_put(tree, sharding.infer_shardings(mesh, tree)) for tree in args[:num_states]
    ]
    return (*sharded, *(sharding.put_batch(mesh, tree) for tree in args[num_states:]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_eight_devices_make_the_step_of_one(request, whole_steps, monkeypatch, stage):
    """Real runs do not split arrays up to 4 MiB. This test splits all arrays."""
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    mesh = sharding.make_mesh(config.Mesh())
    assert mesh.size == 8
    step, args = (
        sft_update(request.getfixturevalue("pg1"), 1)
        if stage == "sft"
        else grpo_update(request.getfixturevalue("pg2"), 1)
    )
    args = on_devices(mesh, args, num_states=1 if stage == "sft" else 2)
    split = [leaf for leaf in jax.tree.leaves(args[0].params) if not leaf.is_fully_replicated]
    assert len(split) > 10 and all(len(leaf.addressable_shards) == 8 for leaf in split)
    state, metrics = jax.jit(step, out_shardings=(sharding.infer_shardings(mesh, args[0]), None))(
        *args
    )
    still_split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
    assert len(still_split) == len(split)
    assert_same_step(
        (jax.device_get(state), {name: float(value) for name, value in metrics.items()}),
        whole_steps[stage],
    )


def test_defect_22_supervised_steps_learn_from_the_suffix_alone(pg1):
    """The negative log-likelihood is a mean over suffix tokens, EOS included, then over examples.

    Tokens outside the masks of suffix and prompt do not change the loss.
    """
    step, (state, batch) = sft_update(pg1, 1)
    _, metrics = run_step(step, (state, batch))
    suffix, mask = batch.suffix[:, None], batch.suffix_mask[:, None]
    logps = jax.jit(pg1.model.completion_logps)(
        state.params[POLICY], batch.image, batch.prompt, batch.prompt_mask, suffix, mask
    )[0]
    expected = -jnp.mean(logps.sum(axis=-1)[:, 0] / batch.suffix_mask.sum(axis=-1))
    np.testing.assert_allclose(metrics["sft/nll"], expected, rtol=CLOSE)
    other = batch._replace(
        suffix=jnp.where(batch.suffix_mask, batch.suffix, 77),
        prompt=jnp.where(batch.prompt_mask, batch.prompt, 99),
    )
    assert run_step(step, (state, other))[1]["sft/loss"] == pytest.approx(
        metrics["sft/loss"], rel=CLOSE
    )


MESHES = {
    "2 replicas": config.Mesh(replica=2),
    "2 to a matrix": config.Mesh(model=2),
    "both": config.Mesh(replica=2, model=2),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("2 replicas", marks=pytest.mark.slow),
        pytest.param("2 to a matrix", marks=pytest.mark.slow),
        pytest.param("both", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_makes_the_step_of_one_device(pg2, whole_steps, monkeypatch, name):
    """Two axes split the prompts. Heads and hidden units split the matrices.

    The model has sharding constraints for activations.
    """
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    mesh = sharding.make_mesh(MESHES[name])
    model = PaliGemma(pg2.model.config, sharding.activation_sharding(mesh))
    step, args = grpo_update(pg2._replace(model=model), 2)
    args = on_devices(mesh, args, num_states=2)
    split = [leaf for leaf in jax.tree.leaves(args[0].params) if not leaf.is_fully_replicated]
    assert len(split) > 10 and mesh.size == 8
    assert_same_step(run_step(step, args), whole_steps["grpo"])


@pytest.mark.slow
def test_two_updates_are_policy_gradients_against_the_policy_that_sampled(pg2, whole_steps):
    """The test writes out both updates and compares them with the step.

    The ratios of both updates are to the policy before the step. The reference policy has a third
    set of parameters.
    """
    _, (state, ref_params, _, rollout, advantages) = grpo_update(pg2, 1)
    optimizer = state_of(pg2.params)[1]
    x = inputs(pg2.model)
    logps_of = jax.jit(lambda params: pg2.model.completion_logps(params, *x, TEMPERATURE)[0])
    old = logps_of(state.params[POLICY])
    ref = logps_of(ref_params)

    @jax.jit
    def update_fn(params: Any, opt_state: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logps = pg2.model.completion_logps(params, *x, TEMPERATURE)[0]
            terms = policy_loss(logps, old, ref, advantages, rollout.mask, ROW)
            return jnp.sum(terms.loss * rollout.mask) / rollout.mask.sum()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    policy = state.params[POLICY]
    first_params, first_opt_state = update_fn(policy, optimizer.init(policy))
    second_params, second_opt_state = update_fn(first_params, first_opt_state)
    step_state, metrics = whole_steps["grpo"]
    assert_close_trees(step_state.params[POLICY], second_params)
    momentum = step_state.opt_state[0].trace[POLICY]
    assert_close_trees(momentum, second_opt_state[0].trace)
    with pytest.raises(AssertionError, match="error .*, norm"):
        assert_close_trees(momentum, first_opt_state[0].trace)
    # Without an importance-sampling correction, only this metric reads the sampler's
    # log-probabilities. It compares them with the policy before the first update.
    difference = np.max(np.abs(old - rollout.logps) * rollout.mask)
    np.testing.assert_allclose(metrics["policy/logp_diff_max"], difference, rtol=1e-6)


def test_unsplit_is_the_inverse_of_split_and_each_part_has_rows_of_every_device():
    """Part i has the rows i, i + parts, … So the rows of a device are in every part."""
    x = jnp.arange(24).reshape(8, 3)
    for parts in (1, 2, 4, 8):
        split_rows = update.split(x, parts)
        assert split_rows.shape == (parts, 8 // parts, 3)
        np.testing.assert_array_equal(split_rows[0, :, 0], x[::parts, 0])
        np.testing.assert_array_equal(update.unsplit(split_rows), x)


@pytest.mark.slow
def test_gradients_of_matrices_are_gathered_in_the_dtype_of_their_products(pg1):
    """The gradients of matrices have the parameters' dtype float32, but are bfloat16 numbers.

    The gradient of the embedding table is summed in a finer dtype.
    """
    x = inputs(pg1.model)

    def gradient(dtype: str) -> dict[str, jax.Array]:
        model = PaliGemma(replace(pg1.model.config, dtype=dtype))
        loss = jax.jit(jax.grad(lambda params: -jnp.mean(model.completion_logps(params, *x)[0])))
        return flatten(loss(pg1.params))

    exact = gradient("float32")
    rounded = gradient("bfloat16")
    for name, leaf in rounded.items():
        assert leaf.dtype == jnp.float32
        assert not is_multiplied(name) or bool(jnp.all(leaf == leaf.astype(jnp.bfloat16))), name
    table = rounded["llm/embedder/input_embedding"]
    assert not bool(jnp.all(table == table.astype(jnp.bfloat16)))
    error = optax.tree.norm(jax.tree.map(jnp.subtract, rounded, exact))
    size = optax.tree.norm(exact)
    # A gradient passes through about 20 products and sums. Each rounds to 2^-9.
    assert error < 0.05 * size
