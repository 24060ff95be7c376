"""The optax chain of a stage has a schedule, a clip and an optimizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_params
from optax.contrib import MuonDimensionNumbers

from pg_ground import config
from pg_ground.models import PaliGemma
from pg_ground.params import MATRICES, flatten
from pg_ground.training import optimizers


def tiny_params():
    """Returns random parameters of a model with all kinds of matrices."""
    vision = config.Vision(width=8, depth=2, mlp_dim=16, num_heads=2, patch_size=8)
    text = config.Text(
        width=12,
        depth=3,
        mlp_dim=20,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=1200,
        post_norms=True,
    )
    return random_params(PaliGemma(config.Model(image_size=16, vision=vision, text=text)))


def test_warm_up_rises_to_the_peak_and_the_schedule_ends_at_zero():
    for name in ("linear", "cosine"):
        rate = optimizers.schedule(config.Optimizer(lr=2.0, schedule=name, warmup_steps=10), 110)
        assert [float(rate(step)) for step in (0, 5, 10)] == [0.0, 1.0, 2.0]
        assert float(rate(60)) == pytest.approx(1.0)
        assert float(rate(110)) == pytest.approx(0.0, abs=1e-7)
    assert float(optimizers.schedule(config.Optimizer(lr=2.0), 110)(500)) == 2.0


def test_muon_takes_every_matrix_of_the_layers_and_nothing_else():
    params = tiny_params()
    specs = jax.tree.leaves(
        optimizers.muon_dimensions(params),
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )
    names = {name for name, spec in zip(flatten(params), specs, strict=True) if spec is not None}
    assert all(name.startswith(("img/", "llm/layers/")) for name in names)
    suffixes = {suffix for suffix, _, _ in MATRICES}
    assert {
        suffix for suffix in suffixes if any(name.endswith(suffix) for name in names)
    } == suffixes
    assert not any(
        word in name for name in names for word in ("embedd", "norm", "bias", "LayerNorm")
    )


@pytest.mark.slow
def test_the_muon_update_of_each_matrix_is_orthogonal():
    params = tiny_params()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    chain = optimizers.make_optimizer(config.Optimizer(name="muon", lr=1.0, clip_norm=0.0), 10)
    state = chain.init(params)
    updates, _ = chain.update(grads, state, params)
    # The shape is [layers, heads, D, H]: each layer has one D × (heads·H) matrix.
    query_update = flatten(updates)["llm/layers/attn/q_einsum/w"]
    for layer in query_update:
        matrix = np.moveaxis(np.asarray(layer), 1, 0).reshape(12, -1)
        singular_values = np.linalg.svd(matrix, compute_uv=False)
        singular_values = singular_values / singular_values.mean()
        # Five Newton-Schulz steps leave singular values within about 0.7..1.2.
        assert singular_values.min() > 0.5 and singular_values.max() < 1.5


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_clip_by_norm_equals_optaxs(scale):
    grads = {"a": scale * jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.full(5, scale * 0.1)}
    clipped, expected = (
        clip.update(grads, clip.init(grads))[0]
        for clip in (optimizers.clip_by_norm(1.5), optax.clip_by_global_norm(1.5))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), clipped, expected)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    chain = optimizers.make_optimizer(config.Optimizer(lr=1.0, clip_norm=1.0, b1=0.0), 10)
    small = {"a": jnp.array([0.3, 0.4])}
    large = jax.tree.map(lambda x: 1e4 * x, small)
    updates = [chain.update(g, chain.init(small), small)[0]["a"] for g in (small, large)]
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-5)
