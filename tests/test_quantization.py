"""Laws of int8 matrices: their error, the products that read them, and adapters that are trained on
top of them.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CLOSE, PG1, PG2, G, T, inputs, random_params, unlabelled

from pg_ground import config
from pg_ground.config import Lora, Model
from pg_ground.models import PaliGemma, lora, quantization
from pg_ground.params import (
    MATRICES,
    SCALE,
    flatten,
    is_adapter,
    is_scale,
    join,
    matrix_axes,
    pick,
    unflatten,
)
from pg_ground.rl import update
from pg_ground.types import POLICY, TrainState
from pg_ground.vocab import vocab_of_size

ADAPTERS = Lora(rank=3, alpha=6.0, pattern=".*")


def stored_in_int8(params: Any) -> dict[str, Any]:
    """Returns float parameters with every matrix in int8 and everything else unchanged."""
    flat = flatten(params)
    int8: dict[str, Any] = {}
    for name, leaf in flat.items():
        if matrix_axes(name):
            matrix = quantization.quantize(name, leaf)
            int8 |= {name: matrix.values, name + SCALE: matrix.scale}
        else:
            int8[name] = leaf
    return unflatten(int8)


def in_float(params: Any) -> dict[str, Any]:
    """Returns the float parameters that int8 parameters stand for."""
    return lora.merge(params, Lora())


@functools.cache
def base(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns random parameters of a model, in float32 and with matrices in int8."""
    params = random_params(PaliGemma(model))
    return params, stored_in_int8(params)


def logps(model: PaliGemma, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.completion_logps(p, *inputs(model))[0])(params))


models = pytest.mark.parametrize(
    "sizes", [pytest.param(PG1, id="pg1", marks=pytest.mark.slow), pytest.param(PG2, id="pg2")]
)


@models
def test_each_value_is_within_half_a_step_of_the_original(sizes):
    params, int8 = map(flatten, base(sizes))
    matrices = [name for name in params if matrix_axes(name)]
    assert len(matrices) == len(MATRICES) and set(map(matrix_axes, matrices)) != {None}
    for name in matrices:
        axes, _ = matrix_axes(name) or ((), ())
        largest = np.abs(params[name]).max(axis=axes, keepdims=True)
        restored = quantization.dequantize(quantization.stored(int8, name))
        assert int8[name].dtype == jnp.int8 and int8[name + SCALE].shape == largest.shape
        assert np.abs(int8[name]).max() == 127
        assert (np.abs(restored - params[name]) <= largest / 254 * 1.0001).all()


def test_a_channel_of_zeros_stays_zeros():
    matrix = jnp.zeros((4, 3)).at[:, 1].set(jnp.arange(4.0))
    restored = quantization.dequantize(quantization.quantize("mlp/linear", matrix))
    np.testing.assert_allclose(restored, matrix, atol=3 / 254)
    assert not np.asarray(restored)[:, [0, 2]].any()


@pytest.mark.slow
@models
def test_the_model_computes_with_int8_what_it_computes_with_their_float_values(sizes):
    """Scoring, and decoding one token: the two ways through the gated MLP."""
    model = PaliGemma(sizes)
    int8 = base(sizes)[1]
    np.testing.assert_allclose(logps(model, int8), logps(model, in_float(int8)), rtol=0, atol=CLOSE)
    x = inputs(model)

    @jax.jit
    def decode(params: Any) -> jax.Array:
        prefix, _ = model.prefill(params, *x[:3])
        cache = model.suffix_cache(prefix, G, T)
        return model.extend(params, prefix, cache, x.tokens[:, :, :1])[0]

    np.testing.assert_allclose(decode(int8), decode(in_float(int8)), rtol=0, atol=CLOSE)


@pytest.mark.slow
@models
def test_log_probabilities_stay_near_those_of_float32(sizes):
    """The error of a value is uniform in half a step: 1/254/3**0.5 = 0.23 % of its channel's
    largest, about 0.5 % of its channel's root mean square. Some 20 products on the way to a logit
    add 20**0.5 times as much: 2 % of logits of 3 units is 0.06.
    """
    model = PaliGemma(sizes)
    params, int8 = base(sizes)
    mask = np.asarray(inputs(model).mask)
    error = np.abs(logps(model, int8) - logps(model, params))[mask]
    assert 1e-4 < np.median(error) < 0.06 and error.max() < 5 * 0.06


@pytest.mark.slow
@models
def test_adapters_learn_on_a_frozen_int8_base(sizes):
    """A supervised step moves every adapter that has a gradient, lowers the loss, and leaves the
    base as it is.
    """
    model = PaliGemma(replace(sizes, lora=ADAPTERS))
    int8 = base(sizes)[1]
    adapters = pick(jax.jit(model.init)(jax.random.key(1)), is_adapter)
    optimizer = optax.adam(1e-2)
    x = inputs(model)

    @jax.jit
    def step(state: TrainState, frozen: Any) -> Any:
        return update.sft_update(
            state, frozen, unlabelled(*x[:3], x.tokens[:, 0], x.mask[:, 0]), model=model,
            optimizer=optimizer, vocab=vocab_of_size(sizes.text.vocab_size), grad_accum_steps=1,
            label_smoothing=0.0, loc_smoothing_bins=0.0, dropout_key=None,
        )  # fmt: skip

    trees = {POLICY: adapters}
    state = TrainState(jnp.int32(0), trees, optimizer.init(trees))
    losses = []
    for _ in range(3):
        state, metrics = step(state, int8)
        losses.append(float(metrics["sft/loss"]))
    assert losses[2] < losses[1] < losses[0] and metrics["optim/grad_norm"] > 0
    learned = flatten(state.params[POLICY])
    for name, leaf in flatten(adapters).items():
        assert np.asarray(learned[name] != leaf).any(), name
    merged = lora.merge(join(int8, state.params[POLICY]), ADAPTERS)
    assert not any(map(is_scale, flatten(merged)))
    np.testing.assert_allclose(
        logps(PaliGemma(sizes), merged), logps(model, join(int8, state.params[POLICY])), atol=1e-4
    )


def test_matrices_take_a_quarter_of_float32():
    """Counted from the shapes of PaliGemma 1 3B: scales add less than 0.2 %."""
    model = PaliGemma(config.variant("pg1_3b", 224))
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    matrices = {name: leaf for name, leaf in shapes.items() if matrix_axes(name)}
    stored: dict[str, Any] = {}
    for name, leaf in matrices.items():
        stored |= quantization.abstract_frozen(name, leaf.shape, "int8")
    float_bytes = sum(leaf.size * 4 for leaf in matrices.values())
    int8_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in stored.values())
    assert float_bytes > 8e9 and 0.25 < int8_bytes / float_bytes < 0.2505


def test_casting_gives_exactly_the_arrays_that_were_announced():
    params = flatten(base(PG2)[0])
    abstract: dict[str, Any] = {}
    for name, leaf in params.items():
        abstract |= quantization.abstract_frozen(name, leaf.shape, "int8")
    arrays = quantization.cast_params(params, abstract)
    assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == {
        name: (x.shape, x.dtype) for name, x in abstract.items()
    }
    assert arrays["llm/embedder/input_embedding"].dtype == jnp.bfloat16
    name = "llm/layers/mlp/linear"
    np.testing.assert_array_equal(arrays[name], flatten(base(PG2)[1])[name])
