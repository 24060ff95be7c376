"""Adapters of PEFT are merged into their base while it is read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from commands import run_here
from safetensors.numpy import load_file, save_file

from pg_ground.checkpoints import weights
from pg_ground.checkpoints.conversion import convert
from pg_ground.config import Config, Sft, Source
from pg_ground.models import PaliGemma
from pg_ground.params import flatten
from pg_ground.training.setup import init_params
from pg_ground.types import UserError

Tensors = dict[str, np.ndarray]

LAYER = "language_model.model.layers.{}."
TABLE = "language_model.model.embed_tokens"
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
VISION = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
MODULES = (
    *(LAYER.format(i) + matrix for i in range(3) for matrix in MATRICES),
    VISION,
    "vision_tower.vision_model.embeddings.patch_embedding",
    "multi_modal_projector.linear",
)

SPELLINGS = {
    "hub": lambda name: name,
    "memory": lambda name: (
        "model."
        + name.replace("language_model.model.", "language_model.").replace(
            "vision_tower.vision_model.", "vision_tower."
        )
    ),
    "mixed": lambda name: "model." + name,
}


@pytest.fixture(scope="module")
def base(golden) -> Path:
    return golden / "hf_pg1/hub_layout"


@pytest.fixture(scope="module")
def arrays(base) -> Tensors:
    return load_file(base / "model.safetensors")


def factors(arrays: Tensors, rank: int = 4, modules=MODULES, seed: int = 0) -> Tensors:
    """Returns random factors by the hub's names: NAME.lora_A, NAME.lora_B."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module in modules:
        outputs, *inputs = arrays[f"{module}.weight"].shape
        ends = [1] * (len(inputs) - 1)
        tensors[f"{module}.lora_A"] = rng.normal(size=(rank, *inputs)).astype(np.float32)
        tensors[f"{module}.lora_B"] = rng.normal(size=(outputs, rank, *ends)).astype(np.float32)
    return tensors


def write_adapter(
    folder: Path, base: str | Path, tensors: Tensors, spelling=SPELLINGS["hub"], **settings: Any
) -> Path:
    """Writes an adapter as PEFT writes it. `tensors` are by the hub's names."""
    folder.mkdir(parents=True)
    named = {
        "base_model.model."
        + spelling(name)
        + ".weight" * name.endswith(("lora_A", "lora_B")): array
        for name, array in tensors.items()
    }
    save_file({key: np.ascontiguousarray(a) for key, a in named.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "revision": None,
        "alpha_pattern": {},
        "rank_pattern": {},
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def merged(arrays: Tensors, tensors: Tensors, scale=lambda module: 2.0) -> Tensors:
    """Returns the tensors of the base with W + scale · B A, in float32."""
    result = dict(arrays)
    for name, down in tensors.items():
        if name.endswith("lora_A"):
            module = name.removesuffix(".lora_A")
            up = tensors[f"{module}.lora_B"]
            change = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            weight = result[f"{module}.weight"]
            result[f"{module}.weight"] = weight + np.float32(scale(module)) * change.reshape(
                weight.shape
            )
    return result


def write_merged(folder: Path, base: Path, tensors: Tensors) -> Path:
    """Writes a directory as `merge_and_unload` and `save_pretrained` write it."""
    folder.mkdir(parents=True)
    shutil.copy(base / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_equal(folder: Path, expected_folder: Path) -> None:
    """Fails if a name, a dtype or a value of the loaded parameters differs by a rounding."""
    params, expected = (flatten(weights.load(path)[1]) for path in (folder, expected_folder))
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        assert params[name].dtype == array.dtype
        np.testing.assert_allclose(
            np.asarray(params[name], np.float32), np.asarray(array, np.float32), rtol=1e-5,
            atol=1e-5, err_msg=name,
        )  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_loads_as_its_merged_model(base, arrays, tmp_path, spelling, caplog):
    caplog.set_level("INFO", "pg_ground")
    tensors = factors(arrays)
    adapter = write_adapter(tmp_path / "adapter", base, tensors, SPELLINGS[spelling])
    assert_equal(adapter, write_merged(tmp_path / "merged", base, merged(arrays, tensors)))
    assert f"{adapter}: adapter of rank 4 merged into {base}: 24 matrices changed" in caplog.text
    changed = flatten(weights.load(adapter)[1])["llm/layers/mlp/linear"]
    before = flatten(weights.load(base)[1])["llm/layers/mlp/linear"]
    assert np.abs(changed - before).max() > 1


def test_an_adapter_of_zeros_changes_no_bit(base, arrays, tmp_path):
    zeros = {name: np.zeros_like(array) for name, array in factors(arrays).items()}
    adapter = write_adapter(tmp_path / "adapter", base, zeros)
    params, expected = (flatten(weights.load(path)[1]) for path in (adapter, base))
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({"lora_alpha": 16}, 4, lambda _: 4.0),
        ({"use_rslora": True}, 4, lambda _: 4.0),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 16, lambda _: 2.0),
        ({"r": 2, "lora_alpha": 1.5}, 2, lambda _: 0.75),
        ({"alpha_pattern": {"v_proj": 4}}, 4, lambda m: 1.0 if m.endswith("v_proj") else 2.0),
        (
            {"alpha_pattern": {r"layers\.2\.mlp\.down_proj": 1, "proj": 2}},
            4,
            lambda m: 0.25 if m.endswith("layers.2.mlp.down_proj") else 2.0,
        ),
        (
            {"alpha_pattern": {"^multi_modal_projector.linear": 12}},
            4,
            lambda m: 3.0 if m.startswith("multi_modal") else 2.0,
        ),
        ({"r": 9, "rank_pattern": {".*": 4}}, 4, lambda _: 2.0),
    ],
)
def test_scales_are_those_of_peft(base, arrays, tmp_path, settings, rank, scale):
    tensors = factors(arrays, rank)
    adapter = write_adapter(tmp_path / "adapter", base, tensors, **settings)
    expected = merged(arrays, tensors, scale)
    assert_equal(adapter, write_merged(tmp_path / "merged", base, expected))


def test_an_adapter_of_the_embedding_is_merged_and_reported(base, arrays, tmp_path, caplog):
    rng = np.random.default_rng(1)
    table = arrays[f"{TABLE}.weight"]
    down = rng.normal(size=(4, len(table))).astype(np.float32)
    up = rng.normal(size=(table.shape[1], 4)).astype(np.float32)
    tensors = {f"{TABLE}.lora_embedding_A": down, f"{TABLE}.lora_embedding_B": up}
    adapter = write_adapter(tmp_path / "adapter", base, tensors)
    expected = arrays | {f"{TABLE}.weight": table + 2 * (up @ down).T}
    assert_equal(adapter, write_merged(tmp_path / "merged", base, expected))
    assert "changes the embedding. The head is tied to it" in caplog.text


def test_an_embedding_that_was_trained_as_a_whole_needs_its_head(base, arrays, tmp_path):
    table = arrays[f"{TABLE}.weight"] + 1
    saved = {f"{TABLE}.weight": table, "language_model.lm_head.weight": table}
    expected = write_merged(tmp_path / "merged", base, arrays | {f"{TABLE}.weight": table})
    assert_equal(write_adapter(tmp_path / "both", base, saved), expected)
    del saved["language_model.lm_head.weight"]
    tied = write_adapter(tmp_path / "tied", base, saved, ensure_weight_tying=True)
    assert_equal(tied, expected)
    folder = write_adapter(tmp_path / "apart", base, saved)
    with pytest.raises(UserError, match="the head .* differs from the embedding"):
        weights.load(folder)


@pytest.mark.parametrize("wrapper", ["", "modules_to_save.", "modules_to_save.default."])
def test_tensors_that_are_trained_as_a_whole_replace_those_of_the_base(
    base, arrays, tmp_path, wrapper
):
    kernel = arrays["multi_modal_projector.linear.weight"] * 2
    bias = np.ones_like(arrays[f"{VISION}.bias"])
    tensors = factors(arrays, modules=MODULES[:7])
    saved = tensors | {
        f"multi_modal_projector.linear.{wrapper}weight": kernel,
        f"{VISION}.base_layer.bias": bias,
    }
    adapter = write_adapter(tmp_path / "adapter", base, saved, bias="all")
    expected = merged(arrays, tensors) | {
        "multi_modal_projector.linear.weight": kernel,
        f"{VISION}.bias": bias,
    }
    assert_equal(adapter, write_merged(tmp_path / "merged", base, expected))


def test_a_merged_matrix_has_the_wider_dtype(golden, arrays, tmp_path):
    name = LAYER.format(0) + "self_attn.q_proj"
    tensors = factors(arrays, modules=[LAYER.format(i) + "self_attn.q_proj" for i in range(3)])
    base = golden / "hf_pg1/hub_layout_bf16"
    for dtype, result in ((np.float32, np.float32), (ml_dtypes.bfloat16, ml_dtypes.bfloat16)):
        adapter = tmp_path / np.dtype(dtype).name
        write_adapter(adapter, base, {key: a.astype(dtype) for key, a in tensors.items()})
        params = flatten(weights.load(adapter)[1])
        assert params["llm/layers/attn/q_einsum/w"].dtype == result
        assert params["llm/layers/mlp/linear"].dtype == ml_dtypes.bfloat16
    exact = merged(load_file(base / "model.safetensors"), tensors)[f"{name}.weight"]
    first = np.asarray(flatten(weights.load(tmp_path / "float32")[1])["llm/layers/attn/q_einsum/w"])
    np.testing.assert_allclose(first[0].transpose(0, 2, 1).reshape(exact.shape), exact, rtol=1e-5)


# commands


@pytest.fixture
def adapter(base, arrays, tmp_path) -> Path:
    shutil.copytree(base, tmp_path / "base")
    return write_adapter(tmp_path / "adapter", "../base", factors(arrays, modules=MODULES[:7]))


def test_convert_and_config_init_read_an_adapter(adapter, base, golden, tmp_path):
    shutil.copy(golden / "preprocessing/tiny_gemma_sp.model", tmp_path / "base/tokenizer.model")
    for target in ("a.npz", "a"):
        finished = run_here("convert", str(adapter), str(tmp_path / target))
        assert finished.returncode == 0, finished.stderr
        assert "adapter of rank 4 merged into ../base" in finished.stderr
    model, params = weights.load(tmp_path / "a.npz")
    expected = flatten(weights.load(adapter)[1])
    assert (tmp_path / "a/tokenizer.model").is_file()  # of the base
    assert weights.tokenizer_path(adapter) == str(adapter / "../base/tokenizer.model")
    sources = {"a": Source(uri="synthetic:train", boxes="box")}
    config = Config(
        model=model.config, init=str(adapter), stages=("sft",), sft=Sft(sources=sources)
    )
    start = flatten(init_params(config, model, PaliGemma(model.config).abstract_params()))
    for name, array in expected.items():
        np.testing.assert_array_equal(flatten(params)[name], array, err_msg=name)
        np.testing.assert_array_equal(start[name], array, err_msg=name)
    before = flatten(weights.load(base)[1])["llm/layers/mlp/linear"]
    assert np.abs(start["llm/layers/mlp/linear"] - before).max() > 1


# adapters that cannot be merged


def load_error(folder: Path) -> str:
    """Returns the error of loading `folder`. Fails if it is long or has several lines."""
    with pytest.raises(UserError) as error:
        weights.load(folder)
    with pytest.raises(UserError):
        convert(folder, folder.with_suffix(".npz"), "")
    assert not folder.with_suffix(".npz").exists()
    message = str(error.value)
    assert folder.name in message and "\n" not in message and len(message) < 900
    return message


@pytest.mark.parametrize("name", ["/nowhere/paligemma-3b", "../gone", "models/paligemma/local"])
def test_an_absent_base_is_named(arrays, tmp_path, name):
    folder = write_adapter(tmp_path / "a", name, factors(arrays, modules=MODULES[:1]))
    message = load_error(folder)
    assert f"{folder} is a PEFT adapter of {name}, which is not on this machine" in message
    assert "put the base there, or merge the adapter in PEFT (merge_and_unload)" in message


def test_a_base_that_the_hub_does_not_give_is_named(arrays, tmp_path, monkeypatch):
    def fail(repo, revision, **_):
        raise OSError(f"{repo} at {revision} cannot be reached")

    monkeypatch.setattr("pg_ground.storage.downloads.snapshot_download", fail)
    name = "google/paligemma-3b-pt-224"
    tensors = factors(arrays, modules=MODULES[:1])
    message = load_error(write_adapter(tmp_path / "a", name, tensors, revision="bfloat16"))
    assert f"is a PEFT adapter of {name}, which is not on this machine" in message
    assert f"{name} at bfloat16 cannot be reached" in message


def test_a_base_that_is_no_hugging_face_directory_is_refused(arrays, tmp_path):
    (tmp_path / "base").mkdir()
    folder = write_adapter(tmp_path / "a", "../base", factors(arrays, modules=MODULES[:1]))
    assert "base is no Hugging Face directory" in load_error(folder)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA can be read"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
        ({"use_dora": True}, "use_dora is True, which cannot be merged"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is [[0, 2], [1, 3]]"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices is [7]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"r": 8}, "but r of adapter_config.json is 8"),
        ({"lora_alpha": "high"}, "lora_alpha is 'high', no number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern has the pattern '('"),
    ],
)
def test_settings_of_other_adapters_are_refused(base, arrays, tmp_path, settings, text):
    tensors = factors(arrays, modules=MODULES[:1])
    assert text in load_error(write_adapter(tmp_path / "a", base, tensors, **settings))


QUERY = LAYER.format(0) + "self_attn.q_proj"

OTHER_TENSORS: Mapping[str, tuple[Any, str]] = {
    "no partner": (
        lambda t: {key: a for key, a in t.items() if not key.endswith("B")},
        "has no partner",
    ),
    "magnitude": (
        lambda t: t | {f"{QUERY}.lora_magnitude_vector": np.ones(64, "f")},
        "lora_magnitude_vector is not a factor",
    ),
    "bias of a factor": (
        lambda t: t | {f"{QUERY}.lora_B.bias": np.ones(64, "f")},
        "lora_B.bias is not a factor",
    ),
    "other module": (
        lambda t: {key.replace("q_proj", "qkv_proj"): a for key, a in t.items()},
        "which the base",
    ),
    "other layer": (
        lambda t: {key.replace("layers.0", "layers.17"): a for key, a in t.items()},
        "did you mean",
    ),
    "other width": (
        lambda t: {key: np.pad(a, ((0, 0), (0, 2 * key.endswith("A")))) for key, a in t.items()},
        "changes a matrix of shape (64, 34)",
    ),
    "head": (
        lambda t: {key.replace(QUERY, "language_model.lm_head"): a for key, a in t.items()},
        "changes the head",
    ),
    "other bias": (
        lambda t: t | {f"{VISION}.bias": np.ones(3, "f")},
        "changes a matrix of shape (3,)",
    ),
}


@pytest.mark.parametrize("name", OTHER_TENSORS)
def test_tensors_that_do_not_fit_the_base_are_refused(base, arrays, tmp_path, name):
    edit, text = OTHER_TENSORS[name]
    tensors = edit(factors(arrays, modules=[QUERY]))
    assert text in load_error(write_adapter(tmp_path / "a", base, tensors))


def test_added_tokens_of_an_adapter_are_refused(base, arrays, tmp_path):
    """PEFT saves the embedding and the head of a resized model."""
    table = arrays[f"{TABLE}.weight"]
    grown = np.concatenate([table[:1665], table[:3]])
    saved = {f"{TABLE}.weight": grown, "language_model.lm_head.weight": grown}
    message = load_error(write_adapter(tmp_path / "a", base, saved))
    assert "has 1668 rows, 3 of them behind <image> (1664)" in message
    same_rows = factors(arrays, modules=[QUERY])
    folder = write_adapter(tmp_path / "b", base, same_rows)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 1664, "<act>": 1665}))
    with pytest.raises(UserError, match="rows of 1 tokens that were added .*'<act>'"):
        weights.load(folder)


def test_files_that_are_missing_are_named(base, arrays, tmp_path):
    folder = write_adapter(tmp_path / "a", base, factors(arrays, modules=[QUERY]))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "has adapter_config.json but no adapter_model.safetensors" in load_error(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not JSON" in load_error(folder)


def test_a_merged_model_beside_the_config_of_an_adapter_is_a_model(base, tmp_path):
    shutil.copytree(base, tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text("{}")
    params, expected = (flatten(weights.load(path)[1]) for path in (tmp_path / "a", base))
    np.testing.assert_array_equal(
        params["llm/layers/mlp/linear"], expected["llm/layers/mlp/linear"]
    )


def test_a_model_and_an_adapter_in_one_folder_are_refused(base, arrays, tmp_path):
    folder = write_adapter(tmp_path / "a", base, factors(arrays, modules=[QUERY]))
    shutil.copy(base / "model.safetensors", folder)
    shutil.copy(base / "config.json", folder)
    assert "holds the weights of a model and of an adapter" in load_error(folder)
