"""A user trains adapters, or a part of the model, from a checkpoint.

The frozen parameters are stored once.

These checkpoints have the layout of published checkpoints and the sizes of configs/tiny.py.
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
    """The directory and the output of a run that trained adapters on `base` in both stages."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    finished = run(
        environment,
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *ADAPTERS,
        f"--workdir={workdir}",
    )
    assert finished.returncode == 0, finished.stderr
    return workdir, finished.stdout


@pytest.mark.slow
def test_only_adapters_are_trained_and_saved_as_policy_and_reference(adapted, base, tiny):
    workdir, output = adapted
    abstract = PaliGemma(replace(tiny, lora=SETTINGS)).abstract_params()
    adapter_names = {name for name in abstract if is_adapter(name)}
    for folder in (run_directory.newest(workdir) / "params", workdir / "reference"):
        assert manager.describe(folder).keys() == adapter_names
    frozen = manager.describe(workdir / "frozen")
    assert frozen.keys() == abstract.keys() - adapter_names
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    trained, total = (
        sum(abstract[name].size for name in names) for names in (adapter_names, abstract)
    )
    frozen_bytes = 2 * (total - trained)
    assert re.search(
        rf"^{total:,} parameters \({4 * trained + frozen_bytes:,} bytes\), "
        rf"{trained:,} of them trained "
        rf"\({4 * trained:,} bytes\); optimizer [\d,]+ bytes$", output, re.MULTILINE,
    ), output[:300]  # fmt: skip
    optimizer_size = sum(
        array.size for name, array in arrays(workdir).items() if name.startswith("rest")
    )
    # Adam has two moments of each trained parameter, and a few counters.
    assert 2 * trained < optimizer_size < 2 * trained + 10


def load_tree(folder: Path) -> dict[str, jax.Array]:
    """Returns the saved arrays of a folder by name, on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in manager.describe(folder).items()
    }
    return flatten(manager.restore_tree(folder, unflatten(abstract)))


@pytest.mark.slow
def test_frozen_parameters_equal_the_checkpoint_bit_for_bit(adapted, base):
    frozen = load_tree(adapted[0] / "frozen")
    for name, leaf in flatten(base[1]).items():
        np.testing.assert_array_equal(np.asarray(frozen[name]), np.asarray(leaf), err_msg=name)


@pytest.mark.slow
def test_a_run_starts_at_its_checkpoint_and_changes_only_adapted_matrices(adapted, base):
    """SFT moves the adapters before GRPO starts.

    The reference of GRPO is the policy at the start of GRPO.
    """
    _, trained = weights.load(adapted[0], dtype="float32")
    moved = {
        name: float(np.abs(np.asarray(leaf) - np.asarray(flatten(base[1])[name], np.float32)).max())
        for name, leaf in flatten(trained).items()
    }
    assert all(
        (change > 0) == name.startswith(("llm/layers/attn", "llm/layers/mlp"))
        for name, change in moved.items()
    ), moved
    metrics = rows(adapted[0])
    kl = [row["policy/kl"] for row in metrics if "policy/kl" in row]
    assert kl[0] < kl[-1]
    assert kl[-1] > 0
    assert max(row.get("policy/logp_diff_max", 0) for row in metrics) < 1e-4


@pytest.mark.slow
def test_evaluate_and_convert_use_the_merged_policy(adapted, environment, tmp_path):
    workdir, _ = adapted
    finished = run(
        environment,
        "evaluate",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--out={tmp_path}",
    )
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "eval.json").read_text())
    last_row = rows(workdir)[-1]
    for name in ("eval/boxes/mean_iou", "eval/points/point_in_box"):
        assert metrics[name] == pytest.approx(last_row[name], abs=0.05)
    finished = run(environment, "convert", str(workdir), str(tmp_path / "hf"), "--dtype=float32")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{tmp_path / 'hf'}\n"
    for name, leaf in flatten(weights.load(tmp_path / "hf")[1]).items():
        expected = flatten(weights.load(workdir, dtype="float32")[1])[name]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected), err_msg=name)


@pytest.mark.slow
def test_merging_a_trained_run_keeps_its_logits(adapted, tiny):
    """The logits of merged adapters and of exported parameters equal the logits of the run."""
    workdir, _ = adapted
    model = PaliGemma(replace(tiny, lora=SETTINGS))
    saved = load_tree(workdir / "frozen") | load_tree(run_directory.newest(workdir) / "params")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), join(saved, {}))
    rng = np.random.default_rng(0)
    inputs = (
        jnp.asarray(rng.uniform(-1, 1, (4, 32, 32, 3)), jnp.float32),
        jnp.asarray(rng.integers(4, 800, (4, 6))),
        jnp.ones((4, 6), bool),
    )
    tokens = jnp.asarray(rng.integers(110, 2048, (4, 2, 5)))

    def logits(model: PaliGemma, params: dict) -> list[np.ndarray]:
        prefix, first = model.prefill(params, *inputs)
        later, _ = model.extend(
            params, prefix, model.suffix_cache(prefix, *tokens.shape[1:]), tokens
        )
        return [np.asarray(first), np.asarray(later)]

    expected = logits(model, params)
    assert all(np.ptp(array) > 1 for array in expected)
    for merged in (lora.merge(params, SETTINGS), weights.load(workdir, dtype="float32")[1]):
        for array, expected_array in zip(logits(PaliGemma(tiny), merged), expected, strict=True):
            np.testing.assert_allclose(array, expected_array, rtol=0, atol=2e-3)


@pytest.mark.slow
# The first checkpoint is at step 4.
@pytest.mark.parametrize(("lines", "delay_s"), [(3, 1.5), (6, 0.2)], ids=["sft", "grpo"])
def test_a_killed_run_resumes_without_the_checkpoint_of_its_start(
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


@pytest.mark.slow
def test_lr_factors_freeze_parts_and_slow_parts_by_pattern(environment, base, tmp_path):
    lr_factors = "((r'img/.*', 0), (r'llm/embedder/.*', 0.001), (r'.*', 1))"
    flags = (
        "--config.stages=sft",
        f"--config.lr_factors={lr_factors}",
        "--config.sft.optimizer.lr=0.01",
    )
    finished = run(
        environment,
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *flags,
        f"--workdir={tmp_path / 'run'}",
    )
    assert finished.returncode == 0, finished.stderr
    trained = flatten(weights.load(tmp_path / "run")[1])
    moved = {
        name: float(np.abs(np.asarray(trained[name]) - np.asarray(leaf, np.float32)).max())
        for name, leaf in flatten(base[1]).items()
    }
    assert not any(change for name, change in moved.items() if name.startswith("img/"))
    assert 0 < moved["llm/embedder/input_embedding"] < 1e-4 < 1e-2 < moved["llm/layers/mlp/linear"]


@pytest.mark.parametrize(
    ("flags", "message"),
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
def test_a_setting_that_does_not_fit_the_checkpoint_gives_an_error_of_one_line(
    base, tmp_path, flags, message
):
    finished = run_here(
        "train",
        "--config=configs/tiny.py",
        f"--config.init={base[0]}",
        *flags,
        f"--workdir={tmp_path / 'run'}",
    )
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
