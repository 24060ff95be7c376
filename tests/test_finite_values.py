"""Weights that are NaN or infinite are refused with their names, however they are stored."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import run_here
from conftest import PG2, random_params
from safetensors.numpy import load_file, save_file

from pg_ground.checkpoints import export, manager, weights
from pg_ground.checkpoints.finite_values import is_finite
from pg_ground.checkpoints.weights import MODEL_FILE
from pg_ground.config import Config
from pg_ground.models import PaliGemma
from pg_ground.models.quantization import abstract_int8
from pg_ground.params import SCALE, flatten, unflatten
from pg_ground.training.setup import init_params
from pg_ground.types import UserError

LINEAR = "llm/layers/mlp/linear"
TABLE = "llm/embedder/input_embedding"
BIAS = "img/embedding/bias"

SCALES = ["--query_scale=0.5", "--attn_softcap=50", "--final_softcap=0"]
"""What `convert` asks for if an `.npz` has the sizes of no published model."""


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    """The parameters of a small PaliGemma 2 by name."""
    return {name: np.array(leaf) for name, leaf in flatten(random_params(PaliGemma(PG2))).items()}


def damaged(params, values: dict[str, float]) -> dict:
    """Returns the tree of `params` with one other value in the middle of each named array."""
    arrays = {name: array.copy() for name, array in params.items()}
    for name, value in values.items():
        arrays[name].flat[arrays[name].size // 2] = value
    return unflatten(arrays)


def load_error(path: Path) -> str:
    with pytest.raises(UserError) as error:
        weights.load(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".npz", ".orbax", ""])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused(params, tmp_path, suffix, dtype, value):
    path = tmp_path / f"a{suffix}"
    export.save(path, damaged(params, {LINEAR: value}), PG2, dtype)
    message = load_error(path)
    assert str(path) in message
    assert f"{LINEAR} (1 of {params[LINEAR].size:,})" in message
    assert "older checkpoint" in message


def test_several_arrays_are_named_with_their_counts(params, tmp_path):
    names = [BIAS, TABLE, LINEAR, "llm/final_norm/scale"]
    export.save(tmp_path / "a.npz", damaged(params, dict.fromkeys(names, np.nan)))
    message = load_error(tmp_path / "a.npz")
    listed = [name for name in names if f"{name} (1 of " in message]
    assert len(listed) == 3 and "and 1 more" in message


def test_every_value_of_an_array_is_counted(params, tmp_path):
    arrays = params | {BIAS: np.full_like(params[BIAS], np.nan)}
    export.save(tmp_path / "a.npz", unflatten(arrays))
    size = params[BIAS].size
    assert f"{BIAS} ({size} of {size})" in load_error(tmp_path / "a.npz")


def test_extreme_finite_values_load(params, tmp_path):
    largest = float(jnp.finfo(jnp.float32).max)
    tree = damaged(params, {LINEAR: largest, BIAS: -largest, TABLE: -0.0})
    export.save(tmp_path / "a.npz", tree)
    loaded = weights.load(tmp_path / "a.npz")[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    export.save(tmp_path / "a.orbax", tree, PG2)
    assert flatten(weights.load(tmp_path / "a.orbax")[1])[LINEAR].max() == np.float32(largest)


def test_an_int8_matrix_of_values_that_are_not_finite_is_refused(params, tmp_path):
    export.save(tmp_path / "a.npz", damaged(params, {LINEAR: np.nan}))
    checkpoint = weights.open_checkpoint(tmp_path / "a.npz")
    values, scale = abstract_int8(LINEAR, params[LINEAR].shape)
    with pytest.raises(UserError, match=f"{LINEAR} \\(1 of"):
        checkpoint.read({LINEAR: values, LINEAR + SCALE: scale})


def test_an_orbax_directory_with_a_bad_scale_is_refused(params, tmp_path):
    manager.save_tree(tmp_path / "a/params", damaged(params, {"llm/final_norm/scale": np.nan}))
    export.save(tmp_path / "b.orbax", unflatten(params), PG2)
    (tmp_path / "a" / MODEL_FILE).write_bytes((tmp_path / "b.orbax" / MODEL_FILE).read_bytes())
    assert "llm/final_norm/scale (1 of 24)" in load_error(tmp_path / "a")


@pytest.mark.parametrize("target", ["b.npz", "b.orbax", "b"])
@pytest.mark.parametrize("source", ["a.npz", "a.orbax"])
def test_convert_ends_with_one_line_and_writes_nothing(params, tmp_path, source, target):
    export.save(tmp_path / source, damaged(params, {TABLE: np.nan, BIAS: np.inf}), PG2)
    needs_scales = source == "a.npz" and target != "b.npz"
    flags = SCALES if needs_scales else []
    finished = run_here("convert", source, target, *flags, cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    line = finished.stderr.splitlines()[-1]
    assert f"{TABLE} (1 of" in line and f"{BIAS} (1 of" in line
    assert [path.name for path in tmp_path.iterdir()] == [source]


def test_training_from_such_weights_ends_before_the_first_step(params, tmp_path):
    export.save(tmp_path / "a.npz", damaged(params, {LINEAR: np.nan}))
    model = PaliGemma(PG2)
    abstract = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        for name, leaf in model.abstract_params().items()
    }
    config = Config(model=PG2, init=str(tmp_path / "a.npz"))
    with pytest.raises(UserError, match=f"{LINEAR} \\(1 of"):
        init_params(config, model, abstract)


def test_values_too_large_for_float16_are_refused_and_not_made_infinite(params, tmp_path):
    export.save(tmp_path / "a.npz", damaged(params, {LINEAR: 70_000.0}))
    finished = run_here("convert", "a.npz", "b.npz", "--dtype=float16", cwd=tmp_path)
    assert finished.returncode == 2
    assert f"{LINEAR} has values up to 70000, too large for float16" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    finished = run_here("convert", "a.npz", "c.npz", "--dtype=bfloat16", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_a_stored_head_with_the_same_nan_is_not_called_untied(params, tmp_path):
    export.save(tmp_path / "a", damaged(params, {TABLE: np.nan}), PG2)
    file = tmp_path / "a/model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file(tensors | {"language_model.lm_head.weight": tensors[key]}, file)
    assert f"{TABLE} (1 of" in load_error(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_check_agrees_with_numpy_for_every_pattern_of_bits(dtype):
    size = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    top = np.arange(2**16, dtype=np.uint16).astype(f"u{size}") << np.array(
        8 * size - 16, f"u{size}"
    )
    values = top.view(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values)
    assert 0 < expected.sum() < expected.size
    assert [is_finite(values[i : i + 1]) for i in range(len(values))] == expected.tolist()
    assert is_finite(values[expected]) and is_finite(values[:0])
    assert not is_finite(values.reshape(256, 256).T)
