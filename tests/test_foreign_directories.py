"""Directories as transformers, PEFT and lerobot write them load to the same parameters, or an error
of one line says why not. Nothing is left out without a word.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pg_ground.checkpoints import weights
from pg_ground.checkpoints.conversion import convert
from pg_ground.params import flatten
from pg_ground.types import UserError

V = 1664
"""Rows of the vocabulary of the small model. <image> is the row after them."""

TABLE = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(golden) -> Path:
    return golden / "hf_pg1/hub_layout"


@pytest.fixture(scope="module")
def expected(golden) -> Tensors:
    arrays = np.load(golden / "hf_pg1/as_bv_f32.npz")
    return {name.removeprefix("params/"): array for name, array in arrays.items()}


def write(
    folder: Path,
    base: Path,
    edit: Callable[[Tensors], Tensors] = dict,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a copy of `base` with other tensors and other settings in its config.json."""
    folder.mkdir(parents=True)
    save_file(edit(load_file(base / "model.safetensors")), folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(settings or {})))
    return folder


def assert_loads(folder: Path, expected: Tensors) -> None:
    """Fails if a name or a value of the loaded parameters differs."""
    arrays = flatten(weights.load(folder)[1])
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), array, err_msg=name)


def load_error(folder: Path) -> str:
    """Returns the error of loading `folder`. Fails if it is long or has several lines."""
    with pytest.raises(UserError) as error:
        weights.load(folder)
    with pytest.raises(UserError):
        convert(folder, folder.with_suffix(".npz"), "")
    assert not folder.with_suffix(".npz").exists()
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    assert len(message.replace(str(folder), "")) < 400
    return message


# the head is tied to the embedding


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    "head",
    [HEAD, "lm_head.weight", "model.lm_head.weight", f"model.{HEAD}", f"base_model.model.{HEAD}"],
)
def test_a_tied_head_without_the_embedding_is_the_embedding(base, expected, tmp_path, head, caplog):
    caplog.set_level("INFO", "pg_ground")
    folder = write(tmp_path / "a", base, lambda t: without(t, TABLE) | {head: t[TABLE]})
    assert_loads(folder, expected)
    assert f"the embedding is read from {head}, its tied copy" in caplog.text


def test_a_shard_without_one_name_of_the_tied_tensor_loads(golden, expected, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(golden / "hf_pg1/sharded", folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name in content["weight_map"] if name.endswith("embed_tokens.weight"))
    shard = folder / content["weight_map"][name]
    tensors = load_file(shard)
    save_file(without(tensors, name) | {"lm_head.weight": tensors[name]}, shard)
    content["weight_map"]["lm_head.weight"] = shard.name
    index.write_text(json.dumps(content))  # lists both
    assert_loads(folder, expected)


def test_a_head_that_is_not_tied_does_not_become_the_embedding(base, tmp_path):
    folder = write(
        tmp_path / "a",
        base,
        lambda t: without(t, TABLE) | {HEAD: t[TABLE]},
        {"tie_word_embeddings": False},
    )
    assert "tie_word_embeddings of its config.json is false" in load_error(folder)
    folder = write(tmp_path / "b", base, lambda t: t | {HEAD: t[TABLE][:V]})
    message = load_error(folder)
    assert f"the shape ({V}, 32), and {TABLE} ({V + 64}, 32)" in message


# which file has a tensor


def test_a_tensor_in_two_shards_is_refused(golden, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(golden / "hf_pg1/sharded", folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, array = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: array + 1}, second)
    assert f"{second.name} has {name}, and {first.name} too" in load_error(folder)


def test_a_single_file_beside_an_index_is_read_and_said(golden, base, expected, tmp_path, caplog):
    folder = tmp_path / "a"
    shutil.copytree(golden / "hf_pg1/sharded", folder)
    for shard in folder.glob("model-*.safetensors"):
        save_file({name: array + 1 for name, array in load_file(shard).items()}, shard)
    shutil.copy(base / "model.safetensors", folder)
    assert_loads(folder, expected)
    assert (
        "has model.safetensors and model.safetensors.index.json: the first is read" in caplog.text
    )


# rows beyond the vocabulary


@pytest.mark.parametrize("rows", [V, V + 1, V + 64])
def test_tables_without_added_tokens_load(base, expected, tmp_path, rows, caplog):
    folder = write(tmp_path / "a", base, lambda t: t | {TABLE: t[TABLE][:rows].copy()})
    assert_loads(folder, expected)
    assert not caplog.text


@pytest.mark.parametrize("extra", [2, 4, 8, 63, 65, 128])
def test_rows_of_added_tokens_are_refused(base, tmp_path, extra):
    def grow(t):
        words = np.resize(t[TABLE][:V], (extra - 1, 32))
        return t | {TABLE: np.concatenate([t[TABLE][: V + 1], words])}

    message = load_error(write(tmp_path / "a", base, grow))
    assert f"has {V + extra} rows, {extra - 1} of them behind <image> ({V})" in message
    assert f"resize_token_embeddings({V + 1})" in message


@pytest.mark.parametrize("missing", [1, 64, 1000])
def test_missing_rows_of_the_vocabulary_are_refused(base, tmp_path, missing):
    folder = write(tmp_path / "a", base, lambda t: t | {TABLE: t[TABLE][: V - missing].copy()})
    message = load_error(folder)
    assert f"has {V - missing} rows" in message
    assert f"{missing} rows of the vocabulary are missing" in message


TOKENIZERS = {
    "added_tokens.json": lambda tokens: {text: number for number, text in tokens.items()},
    "tokenizer_config.json": lambda tokens: {
        "model_max_length": 10**9,
        "added_tokens_decoder": {str(n): {"content": text} for n, text in tokens.items()},
    },
    "tokenizer.json": lambda tokens: {
        "added_tokens": [{"id": number, "content": text} for number, text in tokens.items()]
    },
}


@pytest.mark.parametrize("file", TOKENIZERS)
def test_added_tokens_among_the_filler_rows_are_refused_by_name(base, tmp_path, file):
    folder = write(tmp_path / "a", base)
    tokens = {V: "<image>"} | {V + i: f"[ACT{i}]" for i in range(1, 8)}
    (folder / file).write_text(json.dumps(TOKENIZERS[file](tokens)))
    message = load_error(folder)
    assert "rows of 7 tokens that were added" in message
    assert "'[ACT1]', '[ACT2]', '[ACT3]', and 4 more" in message


@pytest.mark.parametrize("file", TOKENIZERS)
def test_rows_that_are_no_tokens_of_the_tokenizer_are_filler(base, expected, tmp_path, file):
    """As `resize_token_embeddings(…, pad_to_multiple_of=8)` writes them."""
    folder = write(tmp_path / "a", base, lambda t: t | {TABLE: t[TABLE][: V + 8].copy()})
    tokens = {0: "<pad>", V: "<image>"}
    (folder / file).write_text(json.dumps(TOKENIZERS[file](tokens)))
    assert_loads(folder, expected)


def test_trained_rows_among_the_filler_rows_are_reported(base, expected, tmp_path, caplog):
    def train(t):
        table = t[TABLE].copy()
        table[V + 1 : V + 4] = table[300:303]
        return t | {TABLE: table}

    assert_loads(write(tmp_path / "a", base, train), expected)
    numbers = f"{V + 1}, {V + 2}, {V + 3}"
    assert f"3 rows of {TABLE} behind <image> look like rows of tokens ({numbers})" in caplog.text


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_filler_rows_as_published_are_not_reported(base, expected, tmp_path, noise, caplog):
    """The mean of all rows, without noise or with it."""

    def fill(t):
        table = t[TABLE].copy()
        random = np.random.default_rng(0).normal(size=(64, 32)) * table.std()
        table[V:] = table[:V].mean(axis=0) + noise * random
        return t | {TABLE: table}

    assert_loads(write(tmp_path / "a", base, fill), expected)
    assert not caplog.text


# directories that cannot be read


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 4}, "quantised (gptq)"),
        ({"quant_method": "fp8"}, "quantised (fp8)"),
        ({"quant_method": "torchao"}, "quantised (torchao)"),
    ],
)
def test_quantised_directories_are_refused(base, tmp_path, method, text):
    def pack(t):
        return t | {QUERY: np.zeros((t[QUERY].size // 2, 1), np.uint8)}

    message = load_error(write(tmp_path / "a", base, pack, {"quantization_config": method}))
    assert text in message and "dequantize()" in message


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (["pytorch_model.bin"], "has pytorch_model.bin, but only safetensors"),
        (
            [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)],
            "has pytorch_model-00001-of-00003.bin and 2 more, but only safetensors",
        ),
        (["flax_model.msgpack"], "has flax_model.msgpack, but only safetensors"),
        (["model-q4.gguf"], "has model-q4.gguf, but only safetensors"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "has model-00001-of-00002.safetensors and 1 more, but neither model.safetensors nor "
            "model.safetensors.index.json",
        ),
        ([], "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_weights_in_other_files_are_named(base, tmp_path, files, text):
    folder = write(tmp_path / "a", base)
    (folder / "model.safetensors").unlink()
    for file in files:
        (folder / file).write_bytes(b"PK\x03\x04")
    assert text in load_error(folder)


def test_peft_models_that_are_not_merged_are_refused(base, tmp_path):
    def wrap(t):
        return {f"base_model.model.{k}".replace("q_proj.", "q_proj.base_layer."): t[k] for k in t}

    def add_factors(t):
        factor = np.zeros((4, 32), np.float32)
        return t | {QUERY.replace(".weight", ".lora_A.default.weight"): factor}

    for name, edit in (("a", wrap), ("b", add_factors)):
        message = load_error(write(tmp_path / name, base, edit))
        assert "adapters are not merged" in message and "merge_and_unload()" in message


def test_a_merged_peft_model_with_the_prefix_of_its_wrapper_loads(base, expected, tmp_path):
    folder = write(tmp_path / "a", base, lambda t: {f"base_model.model.{k}": t[k] for k in t})
    assert_loads(folder, expected)


def test_an_error_lists_twenty_problems(base, tmp_path):
    def add(t):
        return t | {f"language_model.model.extra.{i:03}": np.zeros(2, "f") for i in range(50)}

    folder = write(tmp_path / "a", base, add)
    with pytest.raises(UserError, match=r"extra\.019: not a parameter .*; and 30 more$"):
        weights.load(folder)
