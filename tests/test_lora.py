"""Laws of low-rank adapters: they start as nothing, they merge to what they compute, and they alone
are trained.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PG2, inputs, random_params, unlabelled

from pg_ground.config import Lora, Model
from pg_ground.models import PaliGemma, lora
from pg_ground.params import MATRICES, flatten, is_adapter, join, matrix_axes, pick
from pg_ground.rl import update
from pg_ground.types import POLICY, TrainState
from pg_ground.vocab import vocab_of_size

EVERYWHERE = Lora(rank=3, alpha=6.0, pattern=".*")


@functools.cache
def adapted(
    config: Model, settings: Lora = EVERYWHERE
) -> tuple[PaliGemma, dict[str, Any], dict[str, Any]]:
    """Returns a model with adapters, random parameters of the base, and untrained adapters."""
    model = PaliGemma(replace(config, lora=settings))
    fresh = pick(jax.jit(model.init)(jax.random.key(1)), is_adapter)
    return model, random_params(PaliGemma(config)), fresh


def filled(adapters: Any) -> Any:
    """Returns adapters as training might leave them: no factor is zero."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), adapters
    )


@functools.cache
def compiled_logps(model: PaliGemma) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda params: model.completion_logps(params, *inputs(model))[0])


def logps(model: PaliGemma, params: Any) -> np.ndarray:
    return np.asarray(compiled_logps(model)(params))


@pytest.mark.slow
def test_every_matrix_can_have_one_and_its_factors_have_its_axes():
    _, base, fresh = adapted(PG2)
    matrices = {name: leaf for name, leaf in flatten(base).items() if matrix_axes(name)}
    assert {end for end, _, _ in MATRICES if any(name.endswith(end) for name in matrices)} == {
        end for end, _, _ in MATRICES
    }
    flat = flatten(fresh)
    assert len(flat) == 2 * len(matrices)
    for name, leaf in matrices.items():
        product = lora.low_rank_matrix(name, flat[name + "_lora_a"], flat[name + "_lora_b"])
        assert product.shape == leaf.shape and flat[name + "_lora_a"].shape[-1] == 3
        assert not flat[name + "_lora_b"].any() and flat[name + "_lora_a"].all()


@pytest.mark.slow
def test_adapters_are_stacked_over_layers_and_parts():
    _, _, fresh = adapted(PG2)
    text = PG2.text
    kv = flatten(fresh)["llm/layers/attn/kv_einsum/w_lora_b"]
    assert kv.shape == (text.depth, 2, 3, text.num_kv_heads, text.head_dim)
    gating = flatten(fresh)["llm/layers/mlp/gating_einsum_lora_a"]
    assert gating.shape == (text.depth, 2, text.width, 3)
    assert not np.array_equal(gating[0], gating[1]) and not np.array_equal(
        gating[0, 0], gating[0, 1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_first_the_policy_is_the_base_bit_for_bit(dtype):
    model, base, fresh = adapted(replace(PG2, dtype=dtype))
    np.testing.assert_array_equal(
        logps(model, join(base, fresh)), logps(PaliGemma(replace(PG2, dtype=dtype)), base)
    )


@pytest.mark.slow
def test_without_its_section_the_model_ignores_adapters():
    """The base is there as a reference policy in the very arrays of the policy."""
    _, base, fresh = adapted(PG2)
    np.testing.assert_array_equal(
        logps(PaliGemma(PG2), join(base, filled(fresh))), logps(PaliGemma(PG2), base)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        ".*",
        pytest.param("llm/layers/.*", marks=pytest.mark.slow),
        pytest.param("img/.*", marks=pytest.mark.slow),
        ".*/(q_einsum/w|linear)",
    ],
)
def test_merged_parameters_compute_what_the_adapters_do(pattern):
    model, base, fresh = adapted(PG2, replace(EVERYWHERE, pattern=pattern))
    whole = join(base, filled(fresh))
    merged = lora.merge(whole, model.config.lora)
    assert flatten(merged).keys() == flatten(base).keys()
    found, expected = logps(PaliGemma(PG2), merged), logps(model, whole)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - logps(PaliGemma(PG2), base)).max() > 0.05


@pytest.mark.slow
def test_a_pattern_chooses_matrices_by_their_whole_name():
    names = flatten(adapted(PG2, replace(EVERYWHERE, pattern="llm/layers/attn/q_einsum/w"))[2])
    assert set(names) == {"llm/layers/attn/q_einsum/w_lora_a", "llm/layers/attn/q_einsum/w_lora_b"}
    assert not flatten(adapted(PG2, replace(EVERYWHERE, pattern="attn"))[2])


@pytest.mark.slow
def test_factors_start_with_the_variance_of_their_inputs():
    """1 / fan-in for each matrix, whether it stands alone or as one of two parts."""
    _, _, fresh = adapted(
        replace(PG2, text=replace(PG2.text, width=96, mlp_dim=64)), replace(EVERYWHERE, rank=64)
    )
    for name in ("mlp/linear", "mlp/gating_einsum", "attn/kv_einsum/w", "attn/q_einsum/w"):
        leaf = np.asarray(flatten(fresh)[f"llm/layers/{name}_lora_a"])
        assert leaf.std() == pytest.approx(leaf.shape[-2] ** -0.5, rel=0.05)


def test_the_scale_is_alpha_over_rank():
    _, base, fresh = adapted(PG2)
    whole = join(base, filled(fresh))
    name = "llm/layers/mlp/linear"
    once = flatten(lora.merge(whole, EVERYWHERE))[name] - flatten(base)[name]
    twice = flatten(lora.merge(whole, replace(EVERYWHERE, alpha=12.0)))[name] - flatten(base)[name]
    a, b = (flatten(whole)[name + end] for end in ("_lora_a", "_lora_b"))
    np.testing.assert_allclose(once, 2 * (a @ b), atol=1e-6)
    np.testing.assert_allclose(twice, 2 * once, atol=1e-6)


@functools.cache
def compiled(model: PaliGemma) -> Any:
    keep = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p),
        lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), g),
    )

    def run(frozen: Any, params: Any, dropout_key: Any) -> tuple[Any, Any]:
        x = inputs(model)
        state, metrics = update.sft_update(
            TrainState(jnp.int32(0), {POLICY: params}, keep.init({POLICY: params})),
            frozen,
            unlabelled(*x[:3], x.tokens[:, 0], x.mask[:, 0]),
            model=model,
            optimizer=keep,
            vocab=vocab_of_size(model.config.text.vocab_size),
            grad_accum_steps=1,
            label_smoothing=0.0,
            loc_smoothing_bins=0.0,
            dropout_key=dropout_key,
        )
        return state.opt_state[POLICY], metrics

    return jax.jit(run)


def step(model: PaliGemma, frozen: Any, params: Any, dropout_key: Any = None) -> tuple[Any, Any]:
    """Returns the gradient of a supervised step, and its metrics."""
    return compiled(model)(frozen, params, dropout_key)


@pytest.mark.slow
def test_the_gradient_of_a_part_is_that_part_of_the_whole_gradient():
    """Freezing changes nothing but what is differentiated."""
    model, base, fresh = adapted(PG2)
    whole, _ = step(model, {}, join(base, filled(fresh)))
    part, _ = step(model, base, filled(fresh))
    assert flatten(part).keys() == flatten(fresh).keys()
    for name, gradient in flatten(part).items():
        expected = np.asarray(flatten(whole)[name])
        np.testing.assert_allclose(
            gradient, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=name
        )
        assert np.abs(expected).max() > 0, name


@pytest.mark.slow
def test_a_checkpoint_in_bfloat16_can_stay_so_while_it_is_frozen():
    model, base, fresh = adapted(PG2)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small)
    (a, _), (b, _) = step(model, small, filled(fresh)), step(model, wide, filled(fresh))
    for name, gradient in flatten(a).items():
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(
            gradient,
            flatten(b)[name],
            rtol=0,
            atol=1e-5 * np.abs(flatten(b)[name]).max(),
            err_msg=name,
        )


@pytest.mark.slow
def test_dropout_needs_a_key_and_follows_it():
    model, base, fresh = adapted(PG2, replace(EVERYWHERE, dropout=0.5))
    params = filled(fresh)
    losses = [
        float(step(model, base, params, key)[1]["sft/loss"])
        for key in (None, *map(jax.random.key, (0, 0, 1)))
    ]
    sure = float(step(adapted(PG2)[0], base, params)[1]["sft/loss"])
    assert losses[0] == sure and losses[1] == losses[2]
    assert len({losses[0], losses[1], losses[3]}) == 3


@pytest.mark.slow
def test_dropout_keeps_the_mean():
    """An adapter's output is linear in its input, so its mean over keys is that without dropout."""
    settings = replace(EVERYWHERE, dropout=0.3, pattern="img/head/kernel")
    model, base, fresh = adapted(PG2, settings)
    whole = join(base, filled(fresh))
    image = inputs(model).image[:1]

    def embed(key):
        apply = model.network.apply
        return apply(
            {"params": whole},
            image,
            rngs={"dropout": key},
            method=lambda network, image: network.img(image),
        )

    many = jax.vmap(embed)(jax.random.split(jax.random.key(0), 4000))
    sure = model.network.apply(
        {"params": whole}, image, method=lambda network, image: network.img(image)
    )
    error = np.asarray(many.std(axis=0) / 4000**0.5)
    assert (np.abs(many.mean(axis=0) - sure) < 5 * error + 1e-5).all() and error.max() > 0
