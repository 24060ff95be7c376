"""Memory and hours of one GPU come from counts of operations and bytes, without a compiler."""

from dataclasses import replace

import jax
import pytest
from commands import ROOT

from pg_ground.aot import estimates
from pg_ground.aot.tpu_specs import H100, Chip
from pg_ground.cli import run_recipe
from pg_ground.config import Config, parse
from pg_ground.models import PaliGemma

pytestmark = pytest.mark.slow  # each test traces the programs of a run

TINY: Config = parse(run_recipe(ROOT / "configs" / "tiny.py").get_config())

B, G, S, T = 8, 4, 16 + 8, 8
"""Prompts, completions of each, tokens of a prefix (16 patches) and tokens of a completion."""

BYTES = 2
"""Bytes of a weight or of an activation: bfloat16."""


def config() -> Config:
    model = replace(TINY.model, dtype="bfloat16", remat="none")
    return replace(TINY, model=model)


def parameters(prefix: str = "") -> int:
    params = jax.eval_shape(PaliGemma(config().model).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params[prefix] if prefix else params))


def sampling_flops() -> int:
    """Returns two operations per multiplication: the prefixes once, then the tokens."""
    model = config().model
    v, t = model.vision, model.text
    patches = (model.image_size // v.patch_size) ** 2
    block = patches * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + 2 * patches**2 * v.width
    tower = patches * v.patch_size**2 * 3 * v.width + v.depth * block + patches * v.width * t.width
    heads = t.num_heads * t.head_dim
    matrices = t.width * (2 * heads + 2 * t.num_kv_heads * t.head_dim + 3 * t.mlp_dim)
    vocabulary = t.vocab_size * t.width
    prefix = tower + t.depth * (S * matrices + 2 * S**2 * heads) + vocabulary
    token = t.depth * (matrices + 2 * (S + T) * heads) + vocabulary
    return 2 * B * (prefix + T * G * token)


def sampling_bytes() -> float:
    """Returns all weights once, and the decoder's weights, keys and values for each token."""
    text = config().model.text
    values = 2 * text.depth * text.num_kv_heads * text.head_dim
    cache = values * B * (S + G * T / 2)
    return BYTES * (parameters() + T * (parameters("llm") + cache))


def test_sampling_is_counted_as_by_hand():
    program = estimates.estimate_run(config(), H100)["programs"]["rollout"]
    assert program["flops"] == pytest.approx(sampling_flops(), rel=0.02)
    assert program["bytes"] == pytest.approx(sampling_bytes(), rel=1e-6)


def test_an_update_reads_weights_twice_and_moves_gradients_averages_and_parameters():
    program = estimates.estimate_run(config(), H100)["programs"]["update"]
    moved = parameters() * (2 * BYTES + 2 * (4 + 4 + 8))  # float32, and Adam's two averages
    assert program["bytes"] == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    ("flops", "bandwidth", "bound_by"), [(1e6, 1e15, "FLOPs"), (1e15, 1e6, "HBM")]
)
def test_the_slower_resource_gives_the_seconds(flops, bandwidth, bound_by):
    chip = Chip(1e9, flops, bandwidth, 1.0)
    programs = estimates.estimate_run(config(), chip)["programs"]
    assert set(programs) == {"sft", "rollout", "reference", "update", "evaluation"}
    for program in programs.values():
        assert program["bound_by"] == bound_by
        expected = program["flops" if bound_by == "FLOPs" else "bytes"] / 1e6
        assert program["step_s"] == pytest.approx(expected)


def test_the_update_is_all_updates_of_a_step():
    one, two, four = (
        estimates.estimate_run(replace(config(), grpo=grpo), H100)["programs"]["update"]
        for grpo in (replace(config().grpo, num_iterations=iterations) for iterations in (1, 2, 4))
    )
    assert four["flops"] - two["flops"] == pytest.approx(2 * one["flops"], rel=0.01)
    assert [two["bytes"], four["bytes"]] == [2 * one["bytes"], 4 * one["bytes"]]


@pytest.mark.parametrize("file", ["refcoco", "pixmo_points", "detection", "gui"])
def test_the_recipes_state_the_numbers_of_one_h100(file):
    """The row of each recipe in the docstring: GiB, and seconds of the three programs."""
    path = ROOT / "configs" / f"{file}.py"
    module = run_recipe(path)
    lines = path.read_text(encoding="utf-8").split('"""')[1].splitlines()
    names = [name for name in module.RECIPES if name.endswith("_h100")]
    assert names
    for name in names:
        recipe = parse(module.get_config(name))
        programs = estimates.estimate_run(recipe, H100)["programs"]
        row = next(line for line in lines if line.startswith(name)).split()[1:]
        gib = max(program["hbm_bytes"] for program in programs.values()) / 2**30
        assert gib * 2**30 < H100.hbm_bytes
        seconds = [f"{programs[key]['step_s']:.2f}" for key in ("sft", "rollout", "update")]
        assert row[:7] == ["H100", "*", str(recipe.grpo.batch_size), f"{gib:.1f}", *seconds]
