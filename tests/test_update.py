"""Laws of the two learning steps on real, tiny models: how a step is divided does not change it.

Steps here are those of plain gradient descent with momentum, whose trace is the gradient itself.
Adam would divide each gradient by its own size, so that an entry of 1e-9, which is all rounding,
would move its parameter as far as one of 1.
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

    The suffix is the first completion of each prompt.
    """
    x = inputs(model)
    batch = unlabelled(*x[:3], x.tokens[:, 0], x.mask[:, 0])
    advantages = jnp.asarray(np.random.default_rng(2).normal(size=(B, G, 1)), jnp.float32)
    return batch, Rollout(x.tokens, x.mask, jnp.where(x.mask, -1.0, 0.0), x.mask), advantages


def state_of(params: Any) -> tuple[TrainState, optax.GradientTransformation]:
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
"""DAPO averages over the tokens of the whole batch, which micro-batches get wrong most easily."""

TEMPERATURE = 0.8


def grpo_update(
    tiny: Any, grad_accum_steps: int, row: Algorithm = ROW, updates: int = 2, minibatches: int = 1
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a reinforced step with two updates and a reference policy, and its arguments."""
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
            num_iterations=updates,
        )

    ref_params = jax.tree.map(lambda a: 1.01 * a, tiny.params)
    return step, (state, ref_params, *batch_of(tiny.model))


def outcome(step: Callable[..., Any], args: tuple[Any, ...]) -> tuple[TrainState, dict[str, float]]:
    state, metrics = jax.jit(step)(*args)
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def whole_steps(pg1, pg2) -> dict[str, tuple[TrainState, dict[str, float]]]:
    """A supervised step of the one and a reinforced step of the other model, on one device and
    in one part."""
    return {"sft": outcome(*sft_update(pg1, 1)), "grpo": outcome(*grpo_update(pg2, 1))}


def assert_same_step(
    found: tuple[TrainState, dict[str, float]], expected: tuple[TrainState, dict[str, float]]
) -> None:
    """Compares the momentum too:

    it is the gradient itself, where parameters are mostly what they were before.
    """
    (state, metrics), (expected_state, expected_metrics) = found, expected
    assert state.step == expected_state.step == 1
    assert_close_trees(state.params, expected_state.params)
    assert_close_trees(state.opt_state, expected_state.opt_state)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(
            value, expected_metrics[name], rtol=CLOSE, atol=CLOSE, err_msg=name
        )


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_do_not_change_a_supervised_step(pg1, whole_steps, parts):
    assert_same_step(outcome(*sft_update(pg1, parts)), whole_steps["sft"])


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_defect_15_micro_batches_do_not_change_a_reinforced_step(pg2, whole_steps, parts):
    """RLLaVA divides by the tokens of a micro-batch, ours by those of the whole; EasyR1 keeps a
    part's metrics, ours add up."""
    assert_same_step(outcome(*grpo_update(pg2, parts)), whole_steps["grpo"])


@pytest.fixture(params=["bigram", pytest.param("pg1", marks=pytest.mark.slow)])
def policy(request) -> Tiny:
    """A policy of three matrices, and PaliGemma, whose updates take ten times as long to
    compile."""
    return random_bigram() if request.param == "bigram" else request.getfixturevalue("pg1")


@pytest.mark.parametrize("name", ["top_entropy", "gspo", "kl_cov"])
def test_micro_batches_do_not_change_a_step_of_rows_that_look_at_the_whole_batch(policy, name):
    """Two minibatches, each an optimizer step, each in one, two or four parts."""
    row = ALGORITHMS[name]._replace(kl_coef=0.1, mask_truncated_completions=True, entropy_coef=0.01)
    expected = outcome(*grpo_update(policy, 1, row, updates=1, minibatches=2))
    assert_same_step(outcome(*grpo_update(policy, 2, row, updates=1, minibatches=2)), expected)


def test_minibatches_are_optimizer_steps_one_after_the_other(policy):
    """The second starts from where the first one ended, on the other half of the questions."""
    step, (state, ref_params, batch, rollout, advantages) = grpo_update(
        policy, 1, ALGORITHMS["grpo"], updates=1, minibatches=2
    )
    found = outcome(step, (state, ref_params, batch, rollout, advantages))[0]
    halves = [update.split(tree, 2) for tree in (batch, rollout, advantages)]
    one, _ = grpo_update(
        policy, 1, ALGORITHMS["grpo"].override(clip_low=9.0, clip_high=9.0), updates=1
    )
    first = outcome(
        one, (state, ref_params, *(jax.tree.map(lambda x: x[0], half) for half in halves))
    )[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found.params, first.params)
    assert max(jax.tree.leaves(moved)) > 1e-4 and found.step == 1


def test_the_kl_coefficient_is_steered_to_its_target():
    policy = random_bigram()
    step, (state, *rest) = grpo_update(policy, 1, ALGORITHMS["grpo"], updates=1)
    state = state._replace(kl_coef=jnp.float32(0.1))

    def steered(target: float) -> float:
        def run(
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

        return float(outcome(run, (state, *rest))[0].kl_coef)

    count = rest[-1].size
    assert steered(1e-9) == pytest.approx(0.1 * (1 + 0.2 * count / 100))
    assert steered(1e9) == pytest.approx(0.1 * (1 - 0.2 * count / 100))
    assert float(outcome(step, (state, *rest))[0].kl_coef) == np.float32(0.1)


def test_a_step_moves_the_parameters_and_the_second_update_is_off_policy(pg2, whole_steps):
    """The control of the comparisons: they are between numbers that a step changes."""
    state, metrics = whole_steps["grpo"]
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), state.params[POLICY], pg2.params)
    assert float(optax.tree.norm(moved)) > 1e-2 and metrics["optim/grad_norm"] > 0.1
    assert metrics["policy/kl"] > 0 and metrics["policy/clip_fraction"] > 0


def on_devices(mesh: Any, args: tuple[Any, ...], whole: int) -> tuple[Any, ...]:
    """Returns `args` on the mesh:

    parameters and optimizer split as `train` does, the `[B, …]` rest along B.
    """
    placed = [jax.device_put(tree, sharding.infer_shardings(mesh, tree)) for tree in args[:whole]]
    return (*placed, *(sharding.put_batch(mesh, tree) for tree in args[whole:]))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_eight_devices_make_the_step_of_one(request, whole_steps, monkeypatch, stage):
    """Arrays up to 4 MiB are not split in earnest; here all are."""
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    mesh = sharding.make_mesh(config.Mesh())
    assert mesh.size == 8
    step, args = (
        sft_update(request.getfixturevalue("pg1"), 1)
        if stage == "sft"
        else grpo_update(request.getfixturevalue("pg2"), 1)
    )
    args = on_devices(mesh, args, whole=1 if stage == "sft" else 2)
    split = [leaf for leaf in jax.tree.leaves(args[0].params) if not leaf.is_fully_replicated]
    assert len(split) > 10 and all(len(leaf.addressable_shards) == 8 for leaf in split)
    state, metrics = jax.jit(step, out_shardings=(sharding.infer_shardings(mesh, args[0]), None))(
        *args
    )
    kept = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.is_fully_replicated]
    assert len(kept) == len(split)
    assert_same_step(
        (jax.device_get(state), {name: float(value) for name, value in metrics.items()}),
        whole_steps[stage],
    )


def test_defect_22_supervised_steps_learn_from_the_suffix_alone(pg1):
    """The loss is the mean log-likelihood of suffix tokens, EOS included; what stands where
    there is no suffix says nothing."""
    step, (state, batch) = sft_update(pg1, 1)
    _, metrics = outcome(step, (state, batch))
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
    assert outcome(step, (state, other))[1]["sft/loss"] == pytest.approx(
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
        "both",
    ],
)
def test_any_mesh_makes_the_step_of_one_device(pg2, whole_steps, monkeypatch, name):
    """Prompts over two axes, matrices over heads and hidden units, with the model's own places
    for activations."""
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    mesh = sharding.make_mesh(MESHES[name])
    model = PaliGemma(pg2.model.config, sharding.activation_sharding(mesh))
    step, args = grpo_update(pg2._replace(model=model), 2)
    args = on_devices(mesh, args, whole=2)
    split = [leaf for leaf in jax.tree.leaves(args[0].params) if not leaf.is_fully_replicated]
    assert len(split) > 10 and mesh.size == 8
    assert_same_step(outcome(step, args), whole_steps["grpo"])


def test_two_updates_are_policy_gradients_against_the_policy_that_sampled(pg2, whole_steps):
    """Written out:

    both ratios are to the parameters before the step, and the reference is the third set of them.
    """
    _, (state, ref_params, _, rollout, advantages) = grpo_update(pg2, 1)
    optimizer = state_of(pg2.params)[1]
    x = inputs(pg2.model)
    logps = jax.jit(lambda params: pg2.model.completion_logps(params, *x, TEMPERATURE)[0])
    old, ref = logps(state.params[POLICY]), logps(ref_params)

    @jax.jit
    def learn(params: Any, opt: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            now = pg2.model.completion_logps(params, *x, TEMPERATURE)[0]
            terms = policy_loss(now, old, ref, advantages, rollout.mask, ROW)
            return jnp.sum(terms.loss * rollout.mask) / rollout.mask.sum()

        updates, opt = optimizer.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    policy = state.params[POLICY]
    first = learn(policy, optimizer.init(policy))
    second = learn(*first)
    expected, metrics = whole_steps["grpo"]
    assert_close_trees(expected.params[POLICY], second[0])
    momentum = expected.opt_state[0].trace[POLICY]
    assert_close_trees(momentum, second[1][0].trace)
    with pytest.raises(AssertionError, match="off by"):
        assert_close_trees(momentum, first[1][0].trace)
    # the sampler's own log-probabilities are only compared with, and before the first update
    difference = np.max(np.abs(old - rollout.logps) * rollout.mask)
    np.testing.assert_allclose(metrics["policy/logp_diff_max"], difference, rtol=1e-6)


def test_split_and_join_are_inverses_and_keep_devices_together():
    x = jnp.arange(24).reshape(8, 3)
    for parts in (1, 2, 4, 8):
        halves = update.split(x, parts)
        assert halves.shape == (parts, 8 // parts, 3)
        np.testing.assert_array_equal(halves[0, :, 0], x[::parts, 0])
        np.testing.assert_array_equal(update.unsplit(halves), x)


def test_gradients_of_matrices_are_gathered_in_the_dtype_of_their_products(pg1):
    """They come in the parameters' float32, but are bfloat16 numbers.

    The embedding table's are summed finer.
    """
    x = inputs(pg1.model)

    def gradient(dtype: str) -> dict[str, jax.Array]:
        model = PaliGemma(replace(pg1.model.config, dtype=dtype))
        loss = jax.jit(jax.grad(lambda params: -jnp.mean(model.completion_logps(params, *x)[0])))
        return flatten(loss(pg1.params))

    exact, found = gradient("float32"), gradient("bfloat16")
    for name, g in found.items():
        assert g.dtype == jnp.float32
        assert not is_multiplied(name) or bool(jnp.all(g == g.astype(jnp.bfloat16))), name
    table = found["llm/embedder/input_embedding"]
    assert not bool(jnp.all(table == table.astype(jnp.bfloat16)))
    error, size = (
        optax.tree.norm(tree) for tree in (jax.tree.map(jnp.subtract, found, exact), exact)
    )
    assert (
        error < 0.05 * size
    )  # 2^-9 for each of the 20 or so products and sums that a gradient passes through
