"""Where arrays lie."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pg_ground import config
from pg_ground.config import Config, Lora, Model, variant
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.params import flatten
from pg_ground.training import programs
from pg_ground.types import UserError

MESH = config.Mesh()


def spec(name: str, *shape: int, mesh: config.Mesh = MESH) -> PartitionSpec:
    return sharding.infer_shardings(
        sharding.make_mesh(mesh), {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
    )[name].spec


def axes(found: PartitionSpec) -> list[str]:
    return ["+".join((part,) if isinstance(part, str) else part or ()) for part in found]


def test_a_rule_says_where_a_named_array_lies():
    assert axes(spec("llm/embedder/input_embedding", 257_152, 2048)) == ["model", "data"]
    assert axes(spec("llm/layers/mlp/gating_einsum", 18, 2, 2048, 16384)) == [
        "",
        "",
        "data",
        "model",
    ]
    assert axes(spec("llm/layers/mlp/linear", 18, 16384, 2048)) == ["", "model+data"]


def test_an_optimizers_copies_lie_where_their_parameters_do():
    mesh = sharding.make_mesh(config.Mesh(model=2))
    params = {
        "llm": {"layers": {"mlp": {"linear": jax.ShapeDtypeStruct((18, 16384, 2048), jnp.float32)}}}
    }
    config_ = Config()
    like = programs.state_like(config_, mesh, "grpo", {"llm/layers/mlp/linear": 1.0}, params)
    places = {
        leaf.sharding.spec for leaf in jax.tree.leaves((like.params, like.opt)) if leaf.ndim == 3
    }
    assert places == {PartitionSpec(None, ("model", "data"))}


def test_what_an_axis_does_not_divide_is_split_elsewhere():
    """PaliGemma 1 has one key-value head; SigLIP's hidden width 4304 divides by 16 at most."""
    assert axes(
        spec("llm/layers/attn/kv_einsum/w", 18, 2, 1, 2048, 256, mesh=config.Mesh(model=2))
    ) == ["", "", "", "data"]
    assert axes(spec("MlpBlock_0/Dense_1/kernel", 27, 4304, 1152)) == ["", "model", "data"]
    assert axes(spec("of/no/rule", 27, 1152, 4303)) == ["", "data"]


@pytest.mark.parametrize("name", sorted(config.DECODERS))
def test_every_rule_is_the_first_match_of_a_parameter_and_nothing_large_is_replicated(name):
    shapes = flatten(jax.eval_shape(PaliGemma(variant(name, 896)).init, jax.random.key(0)))
    sharding.check_rules(sharding.RULES, list(shapes))
    for mesh in (
        config.Mesh(),
        config.Mesh(replica=2),
        config.Mesh(model=2),
        config.Mesh(model=4, replica=2),
    ):
        made = sharding.make_mesh(mesh)
        places = sharding.infer_shardings(made, shapes)
        for leaf, place in zip(shapes.values(), places.values(), strict=True):
            split = made.shape["data"] == 1 or any("data" in (part or ()) for part in place.spec)
            assert split or int(np.prod(leaf.shape)) * 4 <= sharding.LARGE_BYTES


def test_adapters_are_split_too():
    lora = replace(Model(), lora=Lora(rank=64))
    shapes = flatten(jax.eval_shape(PaliGemma(lora).init, jax.random.key(0)))
    places = sharding.infer_shardings(sharding.make_mesh(MESH), shapes)
    large = [
        name
        for name, leaf in shapes.items()
        if "_lora_" in name and np.prod(leaf.shape) * 4 > sharding.SMALL_BYTES
    ]
    assert large and all(any(places[name].spec) for name in large)


def test_small_arrays_are_whole_on_every_device():
    assert spec("a", 2048) == spec("a") == spec("a", 8, 8) == PartitionSpec()


def test_a_large_array_is_never_replicated_silently():
    with pytest.raises(
        UserError,
        match=r"a has shape \(2049, 16383\) .* no axis that 8 devices divide.*config.mesh.replica",
    ):
        spec("a", 2049, 16383)


def test_gathered_parameters_keep_their_split_over_model():
    mesh = sharding.make_mesh(config.Mesh(model=2))
    tree = {"llm/layers/mlp/linear": jax.ShapeDtypeStruct((18, 16384, 2048), jnp.float32)}
    assert sharding.gathered_shardings(mesh, tree)["llm/layers/mlp/linear"].spec == PartitionSpec(
        None, "model"
    )


WRONG: dict[str, config.Mesh] = {
    r"replica 1, data 9, model 1, and there are 8 devices: the product must be from 1 to 8": config.Mesh(
        data=9
    ),
    r"replica 3, data -1, model 1, and there are 8 devices: replica \* model must divide 8": config.Mesh(
        replica=3
    ),
    r"replica 16, data -1, model 1": config.Mesh(replica=16),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_mesh_of_other_than_the_devices_there_are_is_refused(said):
    with pytest.raises(UserError, match=said):
        sharding.make_mesh(WRONG[said])


def test_rows_that_do_not_split_evenly_are_refused():
    mesh = sharding.make_mesh(config.Mesh(model=2, replica=2))
    with pytest.raises(UserError, match="config.grpo.batch_size is 6: it must be a multiple of 4"):
        sharding.check_batch_size(mesh, 6, "grpo.batch_size")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            ("llm/layers/mpl/linear", ("data", "")),
            "'llm/layers/mpl/linear' is the first match of no parameter, such as a",
        ),
        (("a", ("rows",)), "'a' names the axis 'rows': there are data and model"),
    ],
)
def test_rules_that_do_nothing_are_refused(rule: Any, said: str):
    with pytest.raises(UserError, match=f"config.mesh.rules: {said}"):
        sharding.check_rules((rule,), ["a"])


def test_a_users_rule_comes_first():
    mesh = sharding.make_mesh(MESH)
    tree = {"llm/layers/mlp/linear": jax.ShapeDtypeStruct((16, 16384, 2048), jnp.float32)}
    assert axes(
        sharding.infer_shardings(mesh, tree, (("mlp/linear", ("", "data")),))[
            "llm/layers/mlp/linear"
        ].spec
    ) == ["", "", "data"]


@pytest.mark.parametrize(
    ("given", "named", "kept"), [(None, "F", "F"), ("G", "F", "G"), (None, "", None)]
)
def test_programs_are_kept_where_the_environment_says_else_where_the_config_does(
    given, named, kept
):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        sharding.enable_compilation_cache(config.Mesh(compile_cache=named))
        assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
