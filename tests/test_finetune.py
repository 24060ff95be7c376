"""Training from a checkpoint as a user does it: adapters or a part of the model are trained.

The frozen parameters are stored once.

Checkpoints here have the layout of the published ones; their sizes are those of configs/tiny.py.
"""

import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, arrays, assert_same_run, killed_and_resumed, rows, run, run_here
from conftest import random_params

from pg_ground import config
from pg_ground.checkpoints import export, manager, run_directory, weights
from pg_ground.config import Lora
from pg_ground.models import PaliGemma, lora
from pg_ground.params import flatten, is_adapter, join, unflatten

SETTINGS = Lora(rank=4, alpha=8.0, pattern="llm/layers/.*")

ADAPTERS = (
    "--config.model.lora.rank=4",
    "--config.model.lora.alpha=8.0",
    "--config.model.frozen_dtype=bfloat16",
    "--config.grpo.kl_coef=0.05",
    "--config.grpo.optimizer.lr=0.05",
    "--config.sft.optimizer.lr=0.05",
)


@pytest.fixture(scope="module")
def tiny() -> config.Model:
    return config.parse(runpy.run_path(str(ROOT / "configs/tiny.py"))["get_config"]()).model


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> tuple[Path, dict]:
    """A Hugging Face directory in bfloat16, and its parameters."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    export.save(folder, random_params(PaliGemma(tiny)), tiny, "bfloat16")
    return folder, weights.load(folder)[1]


@pytest.fixture(scope="module")
def adapted(environment, base, tmp_path_factory):
    """A run of both stages that trained adapters on that directory, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    done = run(
        environment,
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *ADAPTERS,
        f"--workdir={workdir}",
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_only_adapters_are_trained_saved_and_referred_to(adapted, base, tiny):
    workdir, printed = adapted
    every = PaliGemma(replace(tiny, lora=SETTINGS)).abstract_params()
    mine = {name for name in every if is_adapter(name)}
    for folder in (run_directory.newest(workdir) / "params", workdir / "reference"):
        assert manager.describe(folder).keys() == mine
    kept = manager.describe(workdir / "frozen")
    assert kept.keys() == every.keys() - mine and {leaf.dtype for leaf in kept.values()} == {
        jnp.dtype("bfloat16")
    }
    trained, total = (sum(every[name].size for name in names) for names in (mine, every))
    frozen_bytes = 2 * (total - trained)
    assert re.search(
        rf"^{total:,} parameters \({4 * trained + frozen_bytes:,} bytes\), "
        rf"{trained:,} of them trained "
        rf"\({4 * trained:,} bytes\); optimizer [\d,]+ bytes$", printed, re.MULTILINE,
    ), printed[:300]  # fmt: skip
    rest = [array for name, array in arrays(workdir).items() if name.startswith("rest")]
    assert (
        2 * trained < sum(array.size for array in rest) < 2 * trained + 10
    )  # adam: two moments of each, and counters


def test_what_is_frozen_is_the_checkpoint_bit_for_bit(adapted, base):
    kept = manager.describe(adapted[0] / "frozen")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for name, leaf in kept.items()
    }
    kept = flatten(manager.restore_tree(adapted[0] / "frozen", unflatten(like)))
    for name, leaf in flatten(base[1]).items():
        np.testing.assert_array_equal(np.asarray(kept[name]), np.asarray(leaf), err_msg=name)


def test_the_run_starts_at_its_checkpoint_and_moves(adapted, base):
    """GRPO starts after SFT moved the adapters. Its reference is the policy at its start."""
    _, trained = weights.load(adapted[0], dtype="float32")
    moved = {
        name: float(np.abs(np.asarray(leaf) - np.asarray(flatten(base[1])[name], np.float32)).max())
        for name, leaf in flatten(trained).items()
    }
    assert all(
        (change > 0) == name.startswith(("llm/layers/attn", "llm/layers/mlp"))
        for name, change in moved.items()
    ), moved
    written = rows(adapted[0])
    kl = [row["policy/kl"] for row in written if "policy/kl" in row]
    assert kl[0] < kl[-1] and kl[-1] > 0
    assert max(row.get("policy/logp_diff_max", 0) for row in written) < 1e-4


@pytest.mark.slow
def test_evaluate_and_convert_take_the_merged_policy(adapted, environment, tmp_path):
    workdir, _ = adapted
    done = run(
        environment,
        "evaluate",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    found, last = json.loads((tmp_path / "eval.json").read_text()), rows(workdir)[-1]
    for name in ("eval/boxes/mean_iou", "eval/points/point_in_box"):
        assert found[name] == pytest.approx(last[name], abs=0.05)
    done = run(environment, "convert", str(workdir), str(tmp_path / "hf"), "--dtype=float32")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'hf'}\n", done.stderr
    for name, leaf in flatten(weights.load(tmp_path / "hf")[1]).items():
        expected = flatten(weights.load(workdir, dtype="float32")[1])[name]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected), err_msg=name)


def test_merging_a_trained_run_keeps_its_logits(adapted, tiny):
    """Merged adapters of a run give the same logits, and the same parameters that it exports."""
    workdir, _ = adapted
    model = PaliGemma(replace(tiny, lora=SETTINGS))
    like = {}
    for folder in (workdir / "frozen", run_directory.newest(workdir) / "params"):
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
            for n, x in manager.describe(folder).items()
        }
        like |= flatten(manager.restore_tree(folder, unflatten(found)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), join(like, {}))
    rng = np.random.default_rng(0)
    inputs = (
        jnp.asarray(rng.uniform(-1, 1, (4, 32, 32, 3)), jnp.float32),
        jnp.asarray(rng.integers(4, 800, (4, 6))),
        jnp.ones((4, 6), bool),
    )
    tokens = jnp.asarray(rng.integers(110, 2048, (4, 2, 5)))

    def logits(model: PaliGemma, params: dict) -> list[np.ndarray]:
        prefix, first = model.prefill(params, *inputs)
        rest, _ = model.extend(
            params, prefix, model.suffix_cache(prefix, *tokens.shape[1:]), tokens
        )
        return [np.asarray(first), np.asarray(rest)]

    found = logits(model, params)
    assert all(np.ptp(array) > 1 for array in found)
    for merged in (lora.merge(params, SETTINGS), weights.load(workdir, dtype="float32")[1]):
        for left, right in zip(logits(PaliGemma(tiny), merged), found, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "delay_s"), [(3, 1.5), (6, 0.2)], ids=["sft", "grpo"]
)  # the first checkpoint is at step 4
def test_a_killed_run_resumes_without_the_checkpoint_it_came_from(
    adapted, base, environment, tmp_path, lines, delay_s
):
    workdir = tmp_path / "run"
    flags = (f"--config.init={base[0]}", *ADAPTERS)
    hidden = base[0].with_name("hidden")
    try:
        killed_and_resumed(
            environment,
            workdir,
            lines,
            delay_s,
            flags,
            between=lambda: shutil.move(base[0], hidden),
        )
    finally:
        shutil.move(hidden, base[0])
    assert_same_run(adapted[0], workdir)


def test_parts_can_be_frozen_and_slowed_by_pattern(environment, base, tmp_path):
    table = "((r'img/.*', 0), (r'llm/embedder/.*', 0.001), (r'.*', 1))"
    flags = (
        "--config.stages=sft",
        f"--config.lr_factors={table}",
        "--config.sft.optimizer.lr=0.01",
    )
    done = run(
        environment,
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *flags,
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    found = flatten(weights.load(tmp_path / "run")[1])
    moved = {
        name: float(np.abs(np.asarray(found[name]) - np.asarray(leaf, np.float32)).max())
        for name, leaf in flatten(base[1]).items()
    }
    assert not any(change for name, change in moved.items() if name.startswith("img/"))
    assert 0 < moved["llm/embedder/input_embedding"] < 1e-4 < 1e-2 < moved["llm/layers/mlp/linear"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--config.lr_factors=(('img/.*', 0),)"],
            "config.lr_factors has no pattern for llm/embedder/input_embedding",
        ),
        (
            ["--config.lr_factors=(('vit/.*', 0), ('.*', 1))"],
            "'vit/.*' is the first match of no parameter",
        ),
        (
            ["--config.lr_factors=(('.*',),)"],
            "config.lr_factors[0] is ('.*',), but it must have 2 elements",
        ),
        (
            ["--config.model.lora.rank=4", "--config.model.lora.pattern=nothing"],
            "config.model.lora.pattern",
        ),
        (
            ["--config.model.lora.pattern=llm/("],
            "config.model.lora.pattern is 'llm/(': it must be a regular expression",
        ),
        (["--config.model.image_size=64"], "was trained at 32 pixels"),
        (
            ["--config.model.text.depth=3"],
            "llm/layers/mlp/linear: (2, 32, 16) in the file, (3, 32, 16) in the model",
        ),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_end_in_one_line(base, tmp_path, flags, said):
    done = run_here(
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *flags,
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()
