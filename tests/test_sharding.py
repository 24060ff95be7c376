"""How arrays are split over the devices of a mesh."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pg_ground import config
from pg_ground.config import Lora, Model, Optimizer, variant
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.training.optimizers import make_optimizer
from pg_ground.types import UserError

MESH = config.Mesh()
"""All 8 devices along `data`."""


def spec(name: str, *shape: int, mesh: config.Mesh = MESH) -> PartitionSpec:
    """Returns the partition of one float32 array."""
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
    return sharding.infer_shardings(sharding.make_mesh(mesh), arrays)[name].spec


def axes(partition: PartitionSpec) -> list[str]:
    """Returns the mesh axes of each dimension, as `sharding.RULES` writes them."""
    return ["+".join((part,) if isinstance(part, str) else part or ()) for part in partition]


def test_a_rule_decides_how_a_named_array_is_split():
    assert axes(spec("llm/embedder/input_embedding", 257_152, 2048)) == ["model", "data"]
    gate = spec("llm/layers/mlp/gating_einsum", 18, 2, 2048, 16384)
    assert axes(gate) == ["", "", "data", "model"]
    assert axes(spec("llm/layers/mlp/linear", 18, 16384, 2048)) == ["", "model+data"]


def test_the_optimizers_averages_are_split_as_their_parameters():
    mesh = sharding.make_mesh(config.Mesh(model=2))
    linear = jax.ShapeDtypeStruct((18, 16384, 2048), jnp.float32)
    params = {"policy": {"llm": {"layers": {"mlp": {"linear": linear}}}}}
    opt_state = jax.eval_shape(make_optimizer(Optimizer(), 10).init, params)
    shardings = sharding.infer_shardings(mesh, (params, opt_state))
    matrices = [leaf for leaf in jax.tree.leaves(shardings) if leaf.spec]
    assert len(matrices) == 3
    assert {leaf.spec for leaf in matrices} == {PartitionSpec(None, ("model", "data"))}


def test_a_dimension_that_its_axis_does_not_divide_is_not_split():
    """PaliGemma 1 has one key-value head. SigLIP's hidden width 4304 divides by 16 at most."""
    model_2 = config.Mesh(model=2)
    kv = spec("llm/layers/attn/kv_einsum/w", 18, 2, 1, 2048, 256, mesh=model_2)
    assert axes(kv) == ["", "", "", "data"]
    assert axes(spec("MlpBlock_0/Dense_1/kernel", 27, 4304, 1152)) == ["", "model", "data"]
    assert axes(spec("of/no/rule", 27, 1152, 4303)) == ["", "data"]


MESHES = (
    config.Mesh(),
    config.Mesh(replica=2),
    config.Mesh(model=2),
    config.Mesh(model=4, replica=2),
)


@pytest.mark.parametrize("name", sorted(config.DECODERS))
def test_every_rule_matches_a_parameter_first_and_no_large_array_is_replicated(name):
    shapes = PaliGemma(variant(name, 896)).abstract_params()
    sharding.check_rules(sharding.RULES, list(shapes))
    for settings in MESHES:
        mesh = sharding.make_mesh(settings)
        shardings = sharding.infer_shardings(mesh, shapes)
        for leaf, leaf_sharding in zip(shapes.values(), shardings.values(), strict=True):
            is_split = any("data" in (part or ()) for part in leaf_sharding.spec)
            is_small = int(np.prod(leaf.shape)) * 4 <= sharding.LARGE_BYTES
            assert mesh.shape["data"] == 1 or is_split or is_small


def test_adapters_are_split_too():
    lora = replace(Model(), lora=Lora(rank=64))
    shapes = PaliGemma(lora).abstract_params()
    shardings = sharding.infer_shardings(sharding.make_mesh(MESH), shapes)
    large = [
        name
        for name, leaf in shapes.items()
        if "_lora_" in name and np.prod(leaf.shape) * 4 > sharding.SMALL_BYTES
    ]
    assert large and all(any(shardings[name].spec) for name in large)


def test_small_arrays_are_replicated():
    assert spec("a", 2048) == spec("a") == spec("a", 8, 8) == PartitionSpec()


def test_a_large_array_is_never_replicated_silently():
    message = r"a has shape \(2049, 16383\) .* no axis that 8 devices divide.*config.mesh.replica"
    with pytest.raises(UserError, match=message):
        spec("a", 2049, 16383)


def test_gathered_parameters_stay_split_over_model():
    mesh = sharding.make_mesh(config.Mesh(model=2))
    tree = {"llm/layers/mlp/linear": jax.ShapeDtypeStruct((18, 16384, 2048), jnp.float32)}
    shardings = sharding.gathered_shardings(mesh, tree)
    assert shardings["llm/layers/mlp/linear"].spec == PartitionSpec(None, "model")


WRONG_MESHES: dict[str, config.Mesh] = {
    r"replica 1, data 9, model 1, and there are 8 devices: the product must be from 1 to 8": (
        config.Mesh(data=9)
    ),
    r"replica 3, data -1, model 1, and there are 8 devices: replica \* model must divide 8": (
        config.Mesh(replica=3)
    ),
    r"replica 16, data -1, model 1": config.Mesh(replica=16),
}


@pytest.mark.parametrize("message", WRONG_MESHES)
def test_a_mesh_that_does_not_match_the_devices_is_refused(message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(WRONG_MESHES[message])


def test_a_batch_that_does_not_split_evenly_is_refused():
    mesh = sharding.make_mesh(config.Mesh(model=2, replica=2))
    with pytest.raises(UserError, match="config.grpo.batch_size is 6: it must be a multiple of 4"):
        sharding.check_batch_size(mesh, 6, "grpo.batch_size")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ("llm/layers/mpl/linear", ("data", "")),
            "'llm/layers/mpl/linear' is the first match of no parameter, such as a",
        ),
        (("a", ("rows",)), "'a' names the axis 'rows': there are data and model"),
    ],
)
def test_rules_without_effect_are_refused(rule: Any, message: str):
    with pytest.raises(UserError, match=f"config.mesh.rules: {message}"):
        sharding.check_rules((rule,), ["a"])


def test_a_users_rule_comes_before_the_rules_of_the_package():
    mesh = sharding.make_mesh(MESH)
    name = "llm/layers/mlp/linear"
    tree = {name: jax.ShapeDtypeStruct((16, 16384, 2048), jnp.float32)}
    shardings = sharding.infer_shardings(mesh, tree, (("mlp/linear", ("", "data")),))
    assert axes(shardings[name].spec) == ["", "", "data"]


@pytest.mark.parametrize(
    ("environment_folder", "config_folder", "used"),
    [(None, "F", "F"), ("G", "F", "G"), (None, "", None)],
)
def test_the_environments_compilation_cache_takes_precedence(
    environment_folder, config_folder, used
):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", environment_folder)
        sharding.enable_compilation_cache(config.Mesh(compile_cache=config_folder))
        assert jax.config.jax_compilation_cache_dir == used
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
