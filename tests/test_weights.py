"""Checkpoints in and out: sizes, shards, dtypes, other resolutions and vocabularies, runs; and what
is said of bad ones.
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
from pg_ground.checkpoints import export, manager, model_sizes, tensor_files, weights
from pg_ground.checkpoints.conversion import convert
from pg_ground.config import DECODERS, Lora
from pg_ground.models import PaliGemma, lora, quantization
from pg_ground.parallel import sharding
from pg_ground.params import flatten, join, unflatten
from pg_ground.types import UserError

SMALL = {"pg1": PG1, "pg2": PG2}


def host(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def assert_same(found, expected) -> None:
    found, expected = host(found), host(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module", params=SMALL)
def saved(request, tmp_path_factory) -> tuple[config.Model, dict, Path]:
    """A small model, its parameters and the `.npz` they were saved to."""
    model = PaliGemma(SMALL[request.param])
    params, path = random_params(model), tmp_path_factory.mktemp("npz") / "a.npz"
    export.save(path, params)
    return model.config, params, path


PUBLISHED = {
    # parameters at 224 pixels: section 1 of the reference, PaliGemma 1's equal keras-hub's
    # published count
    "pg1_3b": 2_923_335_408,
    "pg2_3b": 3_032_094_960,
    "pg2_10b": 9_662_409_456,
    "pg2_28b": 27_650_192_112,
}

MORE = {448: 884_736, 896: 4_423_680}
"""Parameters that larger images add: position embeddings."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_the_published_number_of_parameters(name):
    for side in (224, 448, 896):
        model = PaliGemma(config.variant(name, side))
        count = sum(leaf.size for leaf in model.abstract_params().values())
        assert count == PUBLISHED[name] + MORE.get(side, 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_the_published_names_and_shapes(golden, name):
    listed = json.loads((golden / "real_key_shapes.json").read_text())[name]
    listed = {key.removeprefix("params/"): tuple(shape) for key, shape in listed.items()}
    model = PaliGemma(config.variant(name))
    assert {key: leaf.shape for key, leaf in model.abstract_params().items()} == listed
    assert model_sizes.model_from_shapes(listed, name) == config.variant(name)


def test_what_shapes_cannot_tell_is_that_of_the_published_model():
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
    model, found = weights.load(path)
    assert_same(found, params)
    assert model.config.text == replace(sizes.text, query_scale=model.config.text.query_scale)
    for name in ("b.npz", "b.orbax", "b"):
        export.save(tmp_path / name, params, sizes)
        again, found = weights.load(tmp_path / name)
        assert_same(found, params)
        assert again.config.text == sizes.text and again.config.vision == sizes.vision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_kept_or_changed_as_asked(saved, tmp_path, dtype):
    sizes, params, _ = saved
    for name in ("a.npz", "a.orbax", "a"):
        export.save(tmp_path / name, params, sizes, dtype)
        expected = {key: np.asarray(leaf).astype(dtype) for key, leaf in host(params).items()}
        for wanted in ("", "bfloat16", "float32"):
            found = weights.load(tmp_path / name, dtype=wanted)[1]
            assert_same(
                found, {key: leaf.astype(wanted or dtype) for key, leaf in expected.items()}
            )
    kinds = {array.dtype for array in np.load(tmp_path / "a.npz").values()}
    assert kinds == {np.dtype("V2") if dtype == "bfloat16" else np.dtype(dtype)}


def test_names_without_their_first_part_compressed_files_and_fortran_order_load_too(
    saved, tmp_path
):
    _, params, _ = saved
    arrays = host(params)
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
    """Every leaf is split where it can be, as training splits it, and blocks are smaller than
    tensors.
    """
    monkeypatch.setattr(sharding, "SMALL_BYTES", 64)
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1000)
    sizes, params, _ = saved
    export.save(tmp_path / f"a{suffix}", params, sizes)
    mesh = sharding.make_mesh(config.Mesh())
    _, found = weights.load(tmp_path / f"a{suffix}", mesh=mesh)
    assert_same(found, params)
    table = found["llm"]["embedder"]["input_embedding"]
    assert (
        table.sharding.spec == PartitionSpec(("model",), ("data",))
        and len(table.addressable_shards) == 8
    )
    assert table.addressable_shards[3].data.shape == (table.shape[0], table.shape[1] // 8)
    split = [
        leaf.sharding.spec
        for leaf in jax.tree.leaves(found)
        if leaf.sharding.spec != PartitionSpec()
    ]
    assert len(set(split)) >= 3
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == jax.tree.leaves(
        sharding.infer_shardings(mesh, found)
    )


def test_a_block_lands_where_an_index_would_put_it():
    """`assemble` against plain indexing, for shards over each axis and blocks of every kind."""
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
            like = jax.ShapeDtypeStruct(
                array.shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
            )
            (found,) = tensor_files.read_sharded({name: stored}, {name: like}).values()
            assert found.sharding.spec == spec
            np.testing.assert_array_equal(found, array)


def test_positions_of_another_resolution_are_refused_or_resampled(saved):

    sizes, params, path = saved
    larger = replace(sizes, image_size=2 * sizes.image_size)
    with pytest.raises(
        UserError,
        match=r"trained at 21 pixels .*9 positions.*image_size is 42 \(36\).*resample_positions",
    ):
        weights.load(path, larger)
    model, found = weights.load(path, larger, resample_positions=True)
    assert model.config.image_size == 42
    old, new = (host(tree)["img/pos_embedding"] for tree in (params, found))
    assert new.shape == (1, 36, old.shape[2])
    grid, finer = old.reshape(3, 3, -1), new.reshape(6, 6, -1)
    np.testing.assert_array_equal(finer, ndimage.zoom(grid, (2, 2, 1), order=1))
    np.testing.assert_allclose(
        finer[[0, 0, -1, -1], [0, -1, 0, -1]], grid[[0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-6
    )
    rest = {name: leaf for name, leaf in flatten(found).items() if name != "img/pos_embedding"}
    assert_same(
        rest, {name: leaf for name, leaf in flatten(params).items() if name != "img/pos_embedding"}
    )


def test_a_table_of_plain_gemma_gets_rows_for_loc_and_seg_tokens(saved, tmp_path, caplog):
    sizes, params, _ = saved
    arrays = host(params)
    table = arrays["llm/embedder/input_embedding"]
    np.savez(tmp_path / "gemma.npz", **arrays | {"llm/embedder/input_embedding": table[:-1152]})
    model, found = weights.load(tmp_path / "gemma.npz", sizes)
    assert "1152 rows appended to the 128 of llm/embedder/input_embedding" in caplog.text
    grown = host(found)["llm/embedder/input_embedding"]
    np.testing.assert_array_equal(grown[:128], table[:128])
    assert model.config == sizes and grown.shape == table.shape
    assert 0.018 < grown[128:].std() < 0.022 and abs(grown[128:].mean()) < 0.001
    np.testing.assert_array_equal(
        grown, host(weights.load(tmp_path / "gemma.npz", sizes)[1])["llm/embedder/input_embedding"]
    )
    caplog.clear()
    export.save(tmp_path / "grown.npz", found)
    assert_same(weights.load(tmp_path / "grown.npz", sizes)[1], found)  # a second time adds nothing
    assert caplog.text == ""


@pytest.mark.parametrize("rows", [256_000, 256_128])
def test_real_gemma_tables_grow_to_257152_rows_without_being_told(saved, tmp_path, rows, caplog):
    _, params, _ = saved
    table = np.zeros((rows, PG1.text.width), np.float16)
    table[:256_000] = 1
    np.savez(tmp_path / "gemma.npz", **host(params) | {"llm/embedder/input_embedding": table})
    model, found = weights.load(tmp_path / "gemma.npz")
    grown = host(found)["llm/embedder/input_embedding"]
    assert model.config.text.vocab_size == 257_152 == len(grown)
    assert (grown[:256_000] == 1).all() and 0.018 < grown[256_000:].astype(np.float32).std() < 0.022
    assert "1152 rows appended to the 256000" in caplog.text


# ---- runs ----


def write_run(workdir: Path, model: config.Model, params, frozen, **settings) -> None:
    """Writes what a run leaves: its settings, its newest checkpoint, and what is frozen."""
    source = config.Source(uri="synthetic:train", boxes="box")
    c = config.Config(
        model=model, sft=replace(config.Sft(), sources={"a": source}), stages=("sft",), **settings
    )
    workdir.mkdir()

    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(c)))
    for step, tree in ((3, jax.tree.map(jnp.zeros_like, params)), (20, params)):
        manager.save_tree(workdir / f"checkpoints/{step}/params", tree)
    if frozen:
        manager.save_tree(workdir / "frozen", frozen)


def test_a_run_loads_its_newest_checkpoint_or_the_one_named(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, None)
    for path in ("run", "run/checkpoints/20", "run/checkpoints/20/params"):
        model, found = weights.load(tmp_path / path)
        assert model.config == sizes
        assert_same(found, params)
    assert not any(
        leaf.any() for leaf in jax.tree.leaves(weights.load(tmp_path / "run/checkpoints/3")[1])
    )


def test_a_run_with_adapters_loads_merged_and_converts(saved, tmp_path):
    sizes, base, _ = saved
    own = replace(
        sizes, lora=Lora(rank=2, alpha=4.0, pattern="llm/layers/.*"), frozen_dtype="bfloat16"
    )
    rng = np.random.default_rng(0)
    adapters = {
        n: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for n, x in PaliGemma(own).abstract_params().items()
        if "_lora_" in n
    }
    adapters = join({}, unflatten(adapters))
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    write_run(tmp_path / "run", own, adapters, small)
    model, found = weights.load(tmp_path / "run", dtype="float32")
    assert model.config == replace(own, lora=Lora())
    assert host(found).keys() == host(base).keys()
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small)
    assert_same(
        found, lora.merge(join(wide, adapters), own.lora)
    )  # what is learned is not rounded to the base's bfloat16
    kept = {name: leaf.dtype for name, leaf in host(weights.load(tmp_path / "run")[1]).items()}
    assert {name for name, kind in kept.items() if kind == np.float32} == {
        name.removesuffix("_lora_a") for name in flatten(adapters) if name.endswith("_lora_a")
    }
    assert (
        np.abs(host(found)["llm/layers/mlp/linear"] - host(base)["llm/layers/mlp/linear"]).max() > 1
    )
    convert(tmp_path / "run", tmp_path / "a.npz", "float32")
    assert_same(weights.load(tmp_path / "a.npz")[1], found)
    convert(tmp_path / "run", tmp_path / "a.orbax", "float32")
    assert_same(weights.load(tmp_path / "a.orbax")[1], found)


def int8_params(model: config.Model, params) -> dict:
    """Returns the frozen parameters of a run with `frozen_dtype` int8."""
    abstract: dict = {}
    for name, leaf in flatten(params).items():
        abstract |= quantization.abstract_frozen(name, leaf.shape, "int8")
    return quantization.cast_params(flatten(params), abstract)


@pytest.mark.parametrize("suffix", [".npz", ".orbax", ""])
def test_matrices_are_quantized_while_they_are_read(saved, tmp_path, monkeypatch, suffix):
    """Each layer by itself, and a matrix without layers (the projector) although its blocks are
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


def test_a_run_without_its_frozen_part_is_refused_with_the_names(saved, tmp_path):
    sizes = saved[0]
    own = replace(sizes, lora=Lora(rank=2))
    adapters = {
        n: x for n, x in flatten(PaliGemma(own).init(jax.random.key(0))).items() if "_lora_" in n
    }
    write_run(tmp_path / "run", own, unflatten(adapters), None)
    with pytest.raises(UserError, match="llm/final_norm/scale: missing"):
        weights.load(tmp_path / "run")


def test_a_frozen_part_of_another_run_is_refused(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, {"llm": {"final_norm": params["llm"]["final_norm"]}})
    with pytest.raises(UserError, match="both hold llm/final_norm/scale"):
        weights.load(tmp_path / "run")


def test_a_run_of_other_sizes_than_those_wanted_is_refused(saved, tmp_path):
    sizes, params, _ = saved
    write_run(tmp_path / "run", sizes, params, None)
    export.save(tmp_path / "a.orbax", params, sizes)
    for name in ("run", "a.orbax"):
        other = replace(sizes, text=replace(sizes.text, mlp_dim=48))
        assert (
            "llm/layers/mlp/linear: (2, 40, 24) in the file, (2, 48, 24) in the model"
            in refused(tmp_path / name, other)
        )
        for field, value in (("query_scale", 0.5), ("attn_softcap", 7.0)):
            said = refused(
                tmp_path / name, replace(sizes, text=replace(sizes.text, **{field: value}))
            )
            assert f"says {field} " in said and f"but model.text.{field} is {value:g}" in said


def test_a_run_resamples_its_positions_too(saved, tmp_path):
    sizes, params, path = saved
    write_run(tmp_path / "run", sizes, params, None)
    larger = replace(sizes, image_size=2 * sizes.image_size)
    assert "trained at 21 pixels" in refused(tmp_path / "run", larger)
    found, expected = (
        weights.load(p, larger, resample_positions=True)[1] for p in (tmp_path / "run", path)
    )
    np.testing.assert_array_equal(
        host(found)["img/pos_embedding"], host(expected)["img/pos_embedding"]
    )


def test_damaged_checkpoints_of_a_run_are_told_in_one_line(saved, tmp_path):
    write_run(tmp_path / "run", saved[0], saved[1], None)
    largest = max(
        (tmp_path / "run/checkpoints/20/params").rglob("*"), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    done = subprocess.run(  # what orbax leaves running would trouble the tests after this one
        [sys.executable, "-m", "pg_ground.convert", "run", "a.npz"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        done.returncode == 2
        and len(told) == 1
        and "params cannot be restored" in told[0]
        and len(told[0]) < 600
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- bad input: one line that names the file, the tensor and what was expected ----


def refused(path: Path, sizes: config.Model | None = None) -> str:
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        weights.load(path, sizes)
    if sizes is None:
        with pytest.raises(UserError):
            convert(path, path.parent / "out.npz", "")
    assert sorted(path.parent.iterdir()) == before  # nothing half-written
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_npz_is_refused(saved, tmp_path, share):
    data = saved[2].read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: int(share * len(data))])
    assert "cannot be read as a big_vision .npz" in refused(tmp_path / "cut.npz")


def test_a_damaged_tensor_is_named(saved, tmp_path):
    with zipfile.ZipFile(saved[2]) as archive:
        info = archive.getinfo("params/llm/layers/mlp/linear.npy")
    data = bytearray(saved[2].read_bytes())
    data[info.header_offset + 1000] ^= 255
    (tmp_path / "bad.npz").write_bytes(data)
    text = refused(tmp_path / "bad.npz")
    assert "llm/layers/mlp/linear of shape (2, 40, 24) cannot be read: Bad CRC-32" in text


def test_a_checkpoint_of_another_variant_is_refused_with_both_shapes(saved):
    text = refused(
        saved[2],
        replace(PG1, text=replace(PG1.text, width=32, post_norms=not saved[0].text.post_norms)),
    )
    assert "llm/final_norm/scale: (24,) in the file, (32,) in the model" in text
    name = "llm/layers/post_ffw_norm/scale"
    assert (
        f"{name}: not a parameter" in text
        if saved[0].text.post_norms
        else f"{name}: missing, (2, 32) in the model" in text
    )


def test_another_patch_size_is_refused_with_both_shapes(saved):
    text = refused(saved[2], replace(saved[0], vision=replace(saved[0].vision, patch_size=3)))
    assert "img/embedding/kernel: (7, 7, 3, 12) in the file, (3, 3, 3, 12) in the model" in text


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 9, 12), (1, 0, 12)])
def test_positions_that_are_no_square_are_refused(saved, tmp_path, shape):
    np.savez(
        tmp_path / "odd.npz", **host(saved[1]) | {"img/pos_embedding": np.zeros(shape, np.float32)}
    )
    assert f"img/pos_embedding: {shape}" in refused(tmp_path / "odd.npz")


def test_adapters_are_never_written_by_chance(saved, tmp_path):
    own = replace(saved[0], lora=Lora(rank=2))
    params = PaliGemma(own).init(jax.random.key(0))
    with pytest.raises(UserError, match="with its lora section is needed to merge them"):
        export.save(tmp_path / "a.npz", params)
    export.save(tmp_path / "a.npz", params, own)
    assert not any("lora" in name for name in np.load(tmp_path / "a.npz").files)


def test_numbers_that_are_no_floats_are_refused(saved, tmp_path):
    arrays = host(saved[1]) | {"img/head/bias": np.zeros(24, np.int64)}
    np.savez(tmp_path / "ints.npz", **arrays)
    assert "img/head/bias in it has dtype int64" in refused(tmp_path / "ints.npz")


def test_a_path_with_nothing_in_it_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such file or directory" in refused(tmp_path / "nowhere")
    assert "is not a checkpoint" in refused(tmp_path / "empty")


def test_nothing_is_overwritten_and_nothing_left_half_written(saved, tmp_path, monkeypatch):
    sizes, params, path = saved
    (tmp_path / "there.npz").write_text("mine")
    with pytest.raises(UserError, match=r"there\.npz exists already"):
        convert(path, tmp_path / "there.npz", "")
    assert (tmp_path / "there.npz").read_text() == "mine"

    def fail(*_):
        raise OSError("No space left on device")

    for name, what in (("a.npz", "save_npz"), ("a", "read_whole"), ("a.orbax", "read_whole")):
        monkeypatch.setattr(tensor_files, what, fail)
        if name == "a":
            monkeypatch.setattr("pg_ground.checkpoints.hugging_face.read_whole", fail)
        with pytest.raises(OSError, match="No space"):
            export.save(tmp_path / name, params, sizes)
    assert [p.name for p in tmp_path.iterdir()] == ["there.npz"]


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_the_command_ends_in_one_line(tmp_path, arguments, said):
    done = run_here("convert", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_bfloat16_in_a_file_is_bfloat16_in_memory(saved, tmp_path):
    export.save(tmp_path / "a.npz", saved[1], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.load(tmp_path / "a.npz")[1])} == {
        np.dtype(ml_dtypes.bfloat16)
    }
