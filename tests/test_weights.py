"""Checkpoints load and save in every format, dtype, sharding, resolution and vocabulary.

Directories of runs load too. An error names the file and the tensor.
"""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import run_here
from conftest import PG1, PG2, random_params
from jax.sharding import PartitionSpec
from scipy import ndimage

from pg_ground import config
from pg_ground.checkpoints import (
    export,
    manager,
    model_sizes,
    run_directory,
    tensor_files,
    weights,
)
from pg_ground.checkpoints.conversion import convert
from pg_ground.config import DECODERS, Lora
from pg_ground.models import PaliGemma, lora, quantization
from pg_ground.parallel import sharding
from pg_ground.params import flatten, join, unflatten
from pg_ground.types import UserError

SMALL = {"pg1": PG1, "pg2": PG2}


def host_arrays(params) -> dict[str, np.ndarray]:
    """Returns the parameters as numpy arrays by name."""
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def assert_same(params, expected_params) -> None:
    """Fails if names, dtypes or values differ in any bit."""
    arrays = host_arrays(params)
    expected = host_arrays(expected_params)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.fixture(scope="module", params=[pytest.param("pg1", marks=pytest.mark.slow), "pg2"])
def saved(request, tmp_path_factory) -> tuple[config.Model, dict, Path]:
    """A small model, its parameters and the `.npz` file with the parameters."""
    model = PaliGemma(SMALL[request.param])
    params = random_params(model)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    export.save(path, params)
    return model.config, params, path


PUBLISHED = {
    # Numbers of parameters at 224 pixels, counted from the shapes of big_vision's models. The
    # number of PaliGemma 1 equals the number that keras-hub publishes.
    "pg1_3b": 2_923_335_408,
    "pg2_3b": 3_032_094_960,
    "pg2_10b": 9_662_409_456,
    "pg2_28b": 27_650_192_112,
}

POSITION_PARAMETERS = {448: 884_736, 896: 4_423_680}
"""Number of parameters that larger images add to the position embeddings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_the_published_number_of_parameters(name):
    for side in (224, 448, 896):
        model = PaliGemma(config.variant(name, side))
        count = sum(leaf.size for leaf in model.abstract_params().values())
        assert count == PUBLISHED[name] + POSITION_PARAMETERS.get(side, 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_the_published_names_and_shapes(golden, name):
    published = json.loads((golden / "real_key_shapes.json").read_text())[name]
    shapes = {key.removeprefix("params/"): tuple(shape) for key, shape in published.items()}
    model = PaliGemma(config.variant(name))
    assert {key: leaf.shape for key, leaf in model.abstract_params().items()} == shapes
    assert model_sizes.model_from_shapes(shapes, name) == config.variant(name)


def test_settings_that_do_not_change_a_shape_have_the_published_values():
    scales = {name: text.attention_scale**-2 for name, text in DECODERS.items()}
    assert scales == pytest.approx({"pg1_3b": 256, "pg2_3b": 256, "pg2_10b": 256, "pg2_28b": 144})
    assert {name: text.attn_softcap for name, text in DECODERS.items()} == dict.fromkeys(
        PUBLISHED, 50.0
    ) | {"pg1_3b": 0.0}
    assert not any(text.final_softcap for text in DECODERS.values())
    with pytest.raises(UserError, match="did you mean pg2_3b"):
        config.variant("pg2_3B")


def test_save_and_load_are_inverses(saved, tmp_path):
    sizes, params, path = saved
    model, loaded = weights.load(path)
    assert_same(loaded, params)
    assert model.config.text == replace(sizes.text, query_scale=model.config.text.query_scale)
    for name in ("b.npz", "b.orbax", "b"):
        export.save(tmp_path / name, params, sizes)
        model, loaded = weights.load(tmp_path / name)
        assert_same(loaded, params)
        assert model.config.text == sizes.text
        assert model.config.vision == sizes.vision


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_stays_unless_the_caller_names_another(saved, tmp_path, dtype):
    sizes, params, _ = saved
    for name in ("a.npz", "a.orbax", "a"):
        export.save(tmp_path / name, params, sizes, dtype)
        expected = {key: array.astype(dtype) for key, array in host_arrays(params).items()}
        for load_dtype in ("", "bfloat16", "float32"):
            loaded = weights.load(tmp_path / name, dtype=load_dtype)[1]
            assert_same(
                loaded, {key: array.astype(load_dtype or dtype) for key, array in expected.items()}
            )
    dtypes = {array.dtype for array in np.load(tmp_path / "a.npz").values()}
    assert dtypes == {np.dtype("V2") if dtype == "bfloat16" else np.dtype(dtype)}


def test_an_npz_without_prefix_or_compressed_or_in_fortran_order_loads(saved, tmp_path):
    _, params, _ = saved
    arrays = host_arrays(params)
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(
        tmp_path / "compressed.npz", **{f"params/{name}": array for name, array in arrays.items()}
    )
    np.savez(
        tmp_path / "fortran.npz",
        **{f"params/{name}": np.asfortranarray(array) for name, array in arrays.items()},
    )
    for name in ("plain", "compressed", "fortran"):
        assert_same(weights.load(tmp_path / f"{name}.npz")[1], params)


@pytest.mark.parametrize("suffix", [".npz", ".orbax", ""])
def test_parameters_go_straight_into_their_shards(saved, tmp_path, monkeypatch, suffix):
    """A loaded leaf has the sharding that training gives it.

    The limits of this test are small. Each leaf with divisible axes is split, and blocks are
    smaller than tensors.
    """
    monkeypatch.setattr(sharding, "SMALL_BYTES", 64)
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1000)
    sizes, params, _ = saved
    export.save(tmp_path / f"a{suffix}", params, sizes)
    mesh = sharding.make_mesh(config.Mesh())
    _, loaded = weights.load(tmp_path / f"a{suffix}", mesh=mesh)
    assert_same(loaded, params)
    table = loaded["llm"]["embedder"]["input_embedding"]
    assert table.sharding.spec == PartitionSpec(("model",), ("data",))
    assert len(table.addressable_shards) == 8
    assert table.addressable_shards[3].data.shape == (table.shape[0], table.shape[1] // 8)
    split_specs = {
        leaf.sharding.spec
        for leaf in jax.tree.leaves(loaded)
        if leaf.sharding.spec != PartitionSpec()
    }
    assert len(split_specs) >= 3
    assert [leaf.sharding for leaf in jax.tree.leaves(loaded)] == jax.tree.leaves(
        sharding.infer_shardings(mesh, loaded)
    )


def test_blocks_fill_shards_as_plain_indexing_does():
    """`read_sharded` returns the original array for shards over each axis and every kind of block.

    A block is some rows, a layer, or a part of a layer.
    """
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 2, 16, 24)).astype(np.float32)
    mesh = sharding.make_mesh(config.Mesh())
    for name in (
        "llm/embedder/input_embedding",
        "llm/layers/attn/q_einsum/w",
        "llm/layers/mlp/gating_einsum",
    ):
        stored = tensor_files.from_array(name, array)
        assert [tensor_files.stack_axes(name)] == [
            len(next(iter(stored.blocks()))[0]) if "layers" in name else 0
        ]
        np.testing.assert_array_equal(tensor_files.read_whole(stored), array)
        for axis in (0, 2, 3):
            spec = PartitionSpec(*(None,) * axis, "data")
            abstract = jax.ShapeDtypeStruct(
                array.shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
            )
            (loaded,) = tensor_files.read_sharded({name: stored}, {name: abstract}).values()
            assert loaded.sharding.spec == spec
            np.testing.assert_array_equal(loaded, array)


def test_positions_of_another_resolution_are_refused_or_resampled(saved):
    sizes, params, path = saved
    larger = replace(sizes, image_size=2 * sizes.image_size)
    with pytest.raises(
        UserError,
        match=r"trained at 21 pixels .*9 positions.*image_size is 42 \(36\).*resample_positions",
    ):
        weights.load(path, larger)
    model, loaded = weights.load(path, larger, resample_positions=True)
    assert model.config.image_size == 42
    old, new = (host_arrays(tree)["img/pos_embedding"] for tree in (params, loaded))
    assert new.shape == (1, 36, old.shape[2])
    old_grid = old.reshape(3, 3, -1)
    new_grid = new.reshape(6, 6, -1)
    np.testing.assert_array_equal(new_grid, ndimage.zoom(old_grid, (2, 2, 1), order=1))
    corners = ([0, 0, -1, -1], [0, -1, 0, -1])
    np.testing.assert_allclose(new_grid[corners], old_grid[corners], atol=1e-6)
    other_params, other_loaded = (
        {name: leaf for name, leaf in flatten(tree).items() if name != "img/pos_embedding"}
        for tree in (params, loaded)
    )
    assert_same(other_loaded, other_params)


def test_a_table_of_plain_gemma_gets_rows_for_loc_and_seg_tokens(saved, tmp_path, caplog):
    sizes, params, _ = saved
    arrays = host_arrays(params)
    table = arrays["llm/embedder/input_embedding"]
    np.savez(tmp_path / "gemma.npz", **arrays | {"llm/embedder/input_embedding": table[:-1152]})
    model, loaded = weights.load(tmp_path / "gemma.npz", sizes)
    assert "1152 rows appended to the 128 of llm/embedder/input_embedding" in caplog.text
    grown_table = host_arrays(loaded)["llm/embedder/input_embedding"]
    np.testing.assert_array_equal(grown_table[:128], table[:128])
    assert model.config == sizes
    assert grown_table.shape == table.shape
    assert 0.018 < grown_table[128:].std() < 0.022
    assert abs(grown_table[128:].mean()) < 0.001
    loaded_again = host_arrays(weights.load(tmp_path / "gemma.npz", sizes)[1])
    np.testing.assert_array_equal(grown_table, loaded_again["llm/embedder/input_embedding"])
    caplog.clear()
    export.save(tmp_path / "grown.npz", loaded)
    # A table with all rows gets no more rows.
    assert_same(weights.load(tmp_path / "grown.npz", sizes)[1], loaded)
    assert caplog.text == ""


@pytest.mark.parametrize("rows", [256_000, 256_128])
def test_real_gemma_tables_grow_to_257152_rows_without_a_setting(saved, tmp_path, rows, caplog):
    _, params, _ = saved
    table = np.zeros((rows, PG1.text.width), np.float16)
    table[:256_000] = 1
    np.savez(
        tmp_path / "gemma.npz", **host_arrays(params) | {"llm/embedder/input_embedding": table}
    )
    model, loaded = weights.load(tmp_path / "gemma.npz")
    grown_table = host_arrays(loaded)["llm/embedder/input_embedding"]
    assert model.config.text.vocab_size == 257_152 == len(grown_table)
    assert (grown_table[:256_000] == 1).all()
    assert 0.018 < grown_table[256_000:].astype(np.float32).std() < 0.022
    assert "1152 rows appended to the 256000" in caplog.text


# runs


def write_run(workdir: Path, model: config.Model, params, frozen, **settings) -> None:
    """Writes the files of a run: the config, two checkpoints and the frozen parameters.

    All parameters of the older checkpoint are 0.
    """
    source = config.Source(uri="synthetic:train", boxes="box")
    c = config.Config(
        model=model, sft=replace(config.Sft(), sources={"a": source}), stages=("sft",), **settings
    )
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(c)))
    for step, tree in ((3, jax.tree.map(jnp.zeros_like, params)), (20, params)):
        manager.save_tree(workdir / f"checkpoints/{step}/params", tree)
        (workdir / f"checkpoints/{step}" / run_directory.COMMIT_FILE).touch()
    if frozen:
        manager.save_tree(workdir / "frozen", frozen)


def test_a_run_loads_its_newest_checkpoint_or_the_checkpoint_of_the_path(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, None)
    for path in ("run", "run/checkpoints/20", "run/checkpoints/20/params"):
        model, loaded = weights.load(tmp_path / path)
        assert model.config == sizes
        assert_same(loaded, params)
    older = weights.load(tmp_path / "run/checkpoints/3")[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(older))


@pytest.mark.slow
def test_a_run_with_adapters_loads_merged_and_converts(saved, tmp_path):
    sizes, base, _ = saved
    adapted = replace(
        sizes, lora=Lora(rank=2, alpha=4.0, pattern="llm/layers/.*"), frozen_dtype="bfloat16"
    )
    rng = np.random.default_rng(0)
    adapters = {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in PaliGemma(adapted).abstract_params().items()
        if "_lora_" in name
    }
    adapters = join({}, unflatten(adapters))
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    write_run(tmp_path / "run", adapted, adapters, frozen)
    model, loaded = weights.load(tmp_path / "run", dtype="float32")
    assert model.config == replace(adapted, lora=Lora())
    arrays = host_arrays(loaded)
    base_arrays = host_arrays(base)
    assert arrays.keys() == base_arrays.keys()
    # A merged parameter is not rounded to bfloat16, the dtype of the base.
    frozen_f32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen)
    assert_same(loaded, lora.merge(join(frozen_f32, adapters), adapted.lora))
    default_arrays = host_arrays(weights.load(tmp_path / "run")[1])
    assert {name for name, array in default_arrays.items() if array.dtype == np.float32} == {
        name.removesuffix("_lora_a") for name in flatten(adapters) if name.endswith("_lora_a")
    }
    name = "llm/layers/mlp/linear"
    assert np.abs(arrays[name] - base_arrays[name]).max() > 1
    convert(tmp_path / "run", tmp_path / "a.npz", "float32")
    assert_same(weights.load(tmp_path / "a.npz")[1], loaded)
    convert(tmp_path / "run", tmp_path / "a.orbax", "float32")
    assert_same(weights.load(tmp_path / "a.orbax")[1], loaded)


def int8_params(model: config.Model, params) -> dict:
    """Returns the frozen parameters of a run with `frozen_dtype` int8."""
    abstract: dict = {}
    for name, leaf in flatten(params).items():
        abstract |= quantization.abstract_frozen(name, leaf.shape, "int8")
    return quantization.cast_params(flatten(params), abstract)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".orbax", ""])
def test_matrices_are_quantized_while_they_are_read(saved, tmp_path, monkeypatch, suffix):
    """Each layer is quantized alone.

    The projector is a matrix without layers. It is quantized as a whole, although its blocks are
    rows.
    """
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 100)
    sizes, params, _ = saved
    weights_path = tmp_path / f"a{suffix}"
    export.save(weights_path, params, sizes)
    expected = int8_params(sizes, params)
    mesh = sharding.make_mesh(config.Mesh())
    shardings = sharding.infer_shardings(mesh, expected)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in expected.items()
    }
    arrays = weights.open_checkpoint(weights_path).read(abstract)
    assert {name: leaf.sharding for name, leaf in arrays.items()} == shardings
    assert_same(arrays, expected)


@pytest.mark.slow
def test_a_run_with_adapters_on_int8_loads_merged(saved, tmp_path):
    sizes, base, _ = saved
    adapted = replace(sizes, lora=Lora(rank=2, alpha=4.0, pattern="llm/.*"), frozen_dtype="int8")
    rng = np.random.default_rng(0)
    adapters = {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for name, leaf in PaliGemma(adapted).abstract_params().items()
        if "_lora_" in name
    }
    frozen = int8_params(sizes, base)
    write_run(tmp_path / "run", adapted, unflatten(adapters), unflatten(frozen))
    loaded = weights.load(tmp_path / "run")[1]
    assert_same(loaded, lora.merge(unflatten(frozen | adapters), adapted.lora))
    assert flatten(loaded).keys() == flatten(base).keys()
    convert(tmp_path / "run", tmp_path / "a.npz", "")
    assert_same(weights.load(tmp_path / "a.npz")[1], loaded)


@pytest.mark.slow
def test_a_run_without_its_frozen_parameters_is_refused_with_a_missing_name(saved, tmp_path):
    adapted = replace(saved[0], lora=Lora(rank=2))
    params = PaliGemma(adapted).init(jax.random.key(0))
    adapters = {name: leaf for name, leaf in flatten(params).items() if "_lora_" in name}
    write_run(tmp_path / "run", adapted, unflatten(adapters), None)
    with pytest.raises(UserError, match="llm/final_norm/scale: missing"):
        weights.load(tmp_path / "run")


def test_frozen_parameters_of_another_run_are_refused(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, {"llm": {"final_norm": params["llm"]["final_norm"]}})
    with pytest.raises(UserError, match="both hold llm/final_norm/scale"):
        weights.load(tmp_path / "run")


def test_a_run_of_other_sizes_than_the_model_is_refused(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, None)
    export.save(tmp_path / "a.orbax", params, sizes)
    for name in ("run", "a.orbax"):
        other = replace(sizes, text=replace(sizes.text, mlp_dim=48))
        assert (
            "llm/layers/mlp/linear: (2, 40, 24) in the file, (2, 48, 24) in the model"
            in load_error(tmp_path / name, other)
        )
        for field, value in (("query_scale", 0.5), ("attn_softcap", 7.0)):
            other = replace(sizes, text=replace(sizes.text, **{field: value}))
            message = load_error(tmp_path / name, other)
            assert f"says {field} " in message
            assert f"but model.text.{field} is {value:g}" in message


def test_a_run_resamples_its_positions_too(saved, tmp_path):
    sizes, params, path = saved
    write_run(tmp_path / "run", sizes, params, None)
    larger = replace(sizes, image_size=2 * sizes.image_size)
    assert "trained at 21 pixels" in load_error(tmp_path / "run", larger)
    positions, expected = (
        host_arrays(weights.load(source, larger, resample_positions=True)[1])["img/pos_embedding"]
        for source in (tmp_path / "run", path)
    )
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_run_gives_an_error_of_one_line(saved, tmp_path):
    write_run(tmp_path / "run", saved[0], saved[1], None)
    files = (tmp_path / "run/checkpoints/20/params").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    # After this error Orbax leaves work in its process, which would disturb later tests.
    finished = subprocess.run(
        [sys.executable, "-m", "pg_ground.convert", "run", "a.npz"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 2, finished.stderr
    assert len(errors) == 1
    assert "params cannot be restored" in errors[0]
    assert len(errors[0]) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# bad input: an error of one line names the file, the tensor and the expected value


def load_error(path: Path, sizes: config.Model | None = None) -> str:
    """Returns the error of loading a checkpoint.

    Fails if the error has several lines or does not name the checkpoint. Fails if loading or
    converting the checkpoint leaves a file.
    """
    files_before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        weights.load(path, sizes)
    if sizes is None:
        with pytest.raises(UserError):
            convert(path, path.parent / "out.npz", "")
    assert sorted(path.parent.iterdir()) == files_before
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_a_truncated_npz_is_refused(saved, tmp_path, fraction):
    data = saved[2].read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: int(fraction * len(data))])
    assert "cannot be read as a big_vision .npz" in load_error(tmp_path / "cut.npz")


def test_a_damaged_tensor_is_named(saved, tmp_path):
    with zipfile.ZipFile(saved[2]) as archive:
        info = archive.getinfo("params/llm/layers/mlp/linear.npy")
    data = bytearray(saved[2].read_bytes())
    data[info.header_offset + 1000] ^= 255
    (tmp_path / "bad.npz").write_bytes(data)
    message = load_error(tmp_path / "bad.npz")
    assert "llm/layers/mlp/linear of shape (2, 40, 24) cannot be read: Bad CRC-32" in message


def test_a_checkpoint_of_another_variant_is_refused_with_both_shapes(saved):
    message = load_error(
        saved[2],
        replace(PG1, text=replace(PG1.text, width=32, post_norms=not saved[0].text.post_norms)),
    )
    assert "llm/final_norm/scale: (24,) in the file, (32,) in the model" in message
    name = "llm/layers/post_ffw_norm/scale"
    assert (
        f"{name}: not a parameter" in message
        if saved[0].text.post_norms
        else f"{name}: missing, (2, 32) in the model" in message
    )


def test_another_patch_size_is_refused_with_both_shapes(saved):
    message = load_error(saved[2], replace(saved[0], vision=replace(saved[0].vision, patch_size=3)))
    assert "img/embedding/kernel: (7, 7, 3, 12) in the file, (3, 3, 3, 12) in the model" in message


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 9, 12), (1, 0, 12)])
def test_positions_that_form_no_square_are_refused(saved, tmp_path, shape):
    np.savez(
        tmp_path / "odd.npz",
        **host_arrays(saved[1]) | {"img/pos_embedding": np.zeros(shape, np.float32)},
    )
    assert f"img/pos_embedding: {shape}" in load_error(tmp_path / "odd.npz")


@pytest.mark.slow
def test_adapters_are_merged_before_they_are_written(saved, tmp_path):
    adapted = replace(saved[0], lora=Lora(rank=2))
    params = PaliGemma(adapted).init(jax.random.key(0))
    with pytest.raises(UserError, match="with its lora section is needed to merge them"):
        export.save(tmp_path / "a.npz", params)
    export.save(tmp_path / "a.npz", params, adapted)
    assert not any("lora" in name for name in np.load(tmp_path / "a.npz").files)


def test_numbers_that_are_no_floats_are_refused(saved, tmp_path):
    arrays = host_arrays(saved[1]) | {"img/head/bias": np.zeros(24, np.int64)}
    np.savez(tmp_path / "ints.npz", **arrays)
    assert "img/head/bias in it has dtype int64" in load_error(tmp_path / "ints.npz")


def test_a_path_with_nothing_in_it_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such file or directory" in load_error(tmp_path / "nowhere")
    assert "is not a checkpoint" in load_error(tmp_path / "empty")


def test_no_file_is_overwritten_and_no_partial_file_remains(saved, tmp_path, monkeypatch):
    sizes, params, path = saved
    (tmp_path / "existing.npz").write_text("text")
    with pytest.raises(UserError, match=r"existing\.npz exists already"):
        convert(path, tmp_path / "existing.npz", "")
    assert (tmp_path / "existing.npz").read_text() == "text"

    def fail(*_):
        raise OSError("No space left on device")

    for name, function in (("a.npz", "save_npz"), ("a", "read_whole"), ("a.orbax", "read_whole")):
        monkeypatch.setattr(tensor_files, function, fail)
        if name == "a":
            monkeypatch.setattr("pg_ground.checkpoints.hugging_face.read_whole", fail)
        with pytest.raises(OSError, match="No space"):
            export.save(tmp_path / name, params, sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["existing.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only"], "1 path given, but pg-ground convert SRC DST takes 2"),
        (["nowhere.npz", "b"], "nowhere.npz: no such file"),
        (
            ["nowhere.npz", "b", "--dtype=int8"],
            "--dtype=int8: it must be one of float32, bfloat16, float16",
        ),
        (["a", "b", "--type=1"], "--type does not exist"),
    ],
)
def test_an_error_of_the_command_is_one_line(tmp_path, arguments, message):
    finished = run_here("convert", *arguments, cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bfloat16_in_a_file_is_bfloat16_in_memory(saved, tmp_path):
    export.save(tmp_path / "a.npz", saved[1], dtype="bfloat16")
    loaded = weights.load(tmp_path / "a.npz")[1]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(loaded)}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}
