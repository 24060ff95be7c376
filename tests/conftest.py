"""What all tests share: eight virtual CPU devices, checked shapes, tiny models, and the folder
`../shared`.
"""

import fcntl
import importlib.util
import os
import pickle
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# JAX reads these variables when it is imported. The tolerances of these tests are those of float32
# on a CPU. The XLA flags change only how long compilation takes: a gradient of a tiny model takes
# 3 s instead of 16 s. Only jaxlib 0.10 knows the second flag, and an unknown flag ends the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
# Compiled programs are shared by the processes of pytest-xdist, by the commands that tests start,
# and by the next run of the tests. Reading a small program takes as long as compiling it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("pg_ground", "shape_checks.checked")

from pg_ground.config import Model, Text, Vision  # noqa: E402
from pg_ground.models import PaliGemma  # noqa: E402
from pg_ground.params import unflatten  # noqa: E402
from pg_ground.types import BOXES, Batch, Boxes, Gold, Points  # noqa: E402
from pg_ground.vocab import BOS, EOS, NEWLINE, PAD  # noqa: E402


class Tiny(NamedTuple):
    """A model with PaliGemma's structure, small enough to compile in a second, and random
    parameters of it.
    """

    model: PaliGemma
    params: Any


PG1 = Model(
    image_size=21,
    vision=Vision(width=12, depth=2, mlp_dim=20, num_heads=2, patch_size=7),
    text=Text(
        width=24,
        depth=2,
        mlp_dim=40,
        num_heads=4,
        num_kv_heads=1,
        head_dim=8,  # × num_heads is not width, so that mixing them up shows
        vocab_size=1280,
        query_scale=8**-0.5,
    ),
    remat="none",
    logits_block=16,
)
"""Gemma 1 in small: one key-value head for all queries, no post-norms."""

PG2 = replace(PG1, text=replace(PG1.text, num_kv_heads=2, post_norms=True, attn_softcap=50.0))
"""Gemma 2 in small: grouped queries, post-norms, soft-capped attention. `final_softcap` is 0, as
PaliGemma 2 transfers.
"""


def random_params(model: PaliGemma) -> Any:
    """Returns normally distributed parameters. Biases and norm scales are random too: values of 0
    or 1 could hide a mistake.

    A standard deviation of 0.25 makes attention logits and vocabulary logits of a few units. Then
    softmax is neither flat nor saturated.
    """
    rng = np.random.default_rng(0)
    shapes = unflatten(model.abstract_params())
    return jax.tree.map(lambda s: jnp.asarray(0.25 * rng.normal(size=s.shape), s.dtype), shapes)


B, G, L, T = 8, 3, 6, 7
"""The axes of `inputs`. B is a multiple of the eight devices and of the micro-batches. T is no
multiple of 3, so the last block of 3 slots is not full.
"""


class Inputs(NamedTuple):
    """The arguments of `completion_logps` after the parameters."""

    image: jax.Array
    prompt: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array


def inputs(model: PaliGemma, seed: int = 0) -> Inputs:
    """Returns random images, prompts of 3 to 6 tokens and completions of 2 to 7 tokens."""
    rng = np.random.default_rng(seed)
    side = model.config.image_size
    prompt_mask = np.arange(L) < rng.integers(3, L + 1, (B, 1))
    prompt = np.where(prompt_mask, rng.integers(4, 100, (B, L)), PAD)
    prompt[:, 0] = BOS
    mask = np.arange(T) < rng.integers(2, T + 1, (B, G, 1))
    tokens = rng.integers(NEWLINE + 1, model.config.text.vocab_size, (B, G, T))
    last = mask & ~np.pad(mask[..., 1:], ((0, 0), (0, 0), (0, 1)))
    tokens = np.where(last, EOS, np.where(mask, tokens, PAD))
    image = rng.uniform(-1, 1, (B, side, side, 3)).astype(np.float32)
    return Inputs(*map(jnp.asarray, (image, prompt, prompt_mask, tokens, mask)))


CLOSE = 1e-5
"""The bound for two ways to compute log-probabilities of a tiny model in float32.

float32 rounds a number to 2^-24 = 6e-8 of its size. Logits stay below 10. Each logit is the end of
two layers of sums over at most 40 terms. In another order, the sums differ by about ten roundings
of the largest number on the way: 1e-5 = 17 · 10 · 6e-8. A gradient adds these terms over the tokens
of a batch. Its error is compared with the norm of the whole parameter: in the norm, the roundings
of single entries average out.
"""


def assert_close_trees(actual: Any, expected: Any, bound: float = CLOSE) -> None:
    """Fails if the error of a leaf is larger than `bound` · (norm of the leaf + 1e-3 · norm of the
    tree).

    The second term is for leaves whose gradient is a small difference of large terms. For example,
    the gradient of the key bias is 0 in theory.
    """
    tree_norm = float(optax.tree.norm(expected))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        error = np.linalg.norm(np.asarray(a) - np.asarray(b))
        norm = np.linalg.norm(np.asarray(b))
        name = jax.tree_util.keystr(path)
        assert error <= bound * (norm + 1e-3 * tree_norm), f"{name}: error {error}, norm {norm}"


def unlabelled(image: Any, prompt: Any, prompt_mask: Any, suffix: Any, suffix_mask: Any) -> Batch:
    """Returns a batch without annotations: learning steps do not read them."""
    b = len(prompt)
    none, zeros = jnp.zeros((b, 1), bool), jnp.zeros((b, 1), jnp.int32)
    gold = Gold(
        Boxes(jnp.zeros((b, 1, 4)), zeros, none),
        Points(jnp.zeros((b, 1, 2)), zeros, none),
        jnp.full(b, BOXES),
        zeros[..., None],
        jnp.zeros((b, 1, 0, 0), bool),
    )
    size, row = jnp.full((b, 2), image.shape[1]), jnp.arange(b)
    return Batch(image, prompt, prompt_mask, suffix, suffix_mask, gold, size, row, row)


@pytest.fixture(scope="session")
def pg1() -> Tiny:
    model = PaliGemma(PG1)
    return Tiny(model, random_params(model))


@pytest.fixture(scope="session")
def pg2() -> Tiny:
    model = PaliGemma(PG2)
    return Tiny(model, random_params(model))


@pytest.fixture(scope="session", params=[pytest.param("pg1", marks=pytest.mark.slow), "pg2"])
def tiny(request) -> Tiny:
    """Both tiny models, one after the other. PG2 has every part that PG1 has."""
    return request.getfixturevalue(request.param)


def shared_folder(name: str) -> Path:
    """Returns the folder `../shared/name`, which is no part of the project.

    A test that needs the folder skips if it is absent.
    """
    path = Path(__file__).parents[2] / "shared" / name
    if not path.is_dir():
        pytest.skip(f"../shared/{name} is not here")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers of other implementations."""
    return shared_folder("golden")


@pytest.fixture(scope="session")
def data() -> Path:
    """Real annotations, photographs and predictions."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Returns the environment of the commands that tests start: one CPU device, and the flags and
    programs of the tests.
    """
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


@pytest.fixture(scope="session")
def tiny_start(environment, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Returns the working directory and the output of an undisturbed run of configs/tiny.py.

    The run has 6 + 6 steps. The processes of pytest-xdist share it. A test must not change it.
    """
    from commands import train_tiny

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    workdir, output = folder / "tiny_run", folder / "tiny_run.pickle"
    with (folder / "tiny_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            output.write_bytes(pickle.dumps(train_tiny(environment, workdir)))
    return workdir, pickle.loads(output.read_bytes())


@pytest.fixture(scope="session")
def tiny_run(tiny_start) -> Path:
    """Returns the working directory of the run of `tiny_start`."""
    workdir, finished = tiny_start
    assert finished.returncode == 0, finished.stderr
    return workdir


INSTALL = {
    "torch": "interop",
    "transformers": "interop",
    "tensorflow_datasets": "interop",
    "gcsfs": "dev",
    "libtpu": "dev",
    "playwright": "dev",
    "nbclient": "dev",
    "build": "dev",
}
"""The packages that the README's test command does not install, and the extra that installs each.
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test with the mark `needs(*packages)` if one of the packages is not installed."""
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if importlib.util.find_spec(package) is None:
                extra = INSTALL[package]
                pytest.skip(f"{package} is not installed: pip install -e '.[{extra}]'")
