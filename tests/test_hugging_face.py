"""This package loads directories of transformers, and transformers loads exported directories.

The logits are equal in both directions.
"""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import PG1, PG2, inputs, random_params
from PIL import Image

from pg_ground.assets import make_tokenizer
from pg_ground.checkpoints import export, hugging_face, manager, weights
from pg_ground.checkpoints.conversion import convert
from pg_ground.checkpoints.run_directory import COMMIT_FILE
from pg_ground.checkpoints.scales import Scales
from pg_ground.config import Config, Model, Sft, Source
from pg_ground.evals.prediction import predict
from pg_ground.models import PaliGemma
from pg_ground.params import flatten
from pg_ground.rl.rollout import sample
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

LAYOUTS = ("", "hub_layout", "hub_layout_bf16", "sharded")

LOGIT_TOLERANCE = 2e-3
"""The tolerance of test_golden.py. Rounding moves logits of 43 by 5e-4 at most (measured)."""


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "hf_pg1"


def read_arrays(path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Fails if names, dtypes or values differ in any bit."""
    assert arrays.keys() == expected.keys()
    for name in expected:
        assert arrays[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_parameters(folder, layout):
    model, params = weights.load(folder / layout)
    expected = {
        name.removeprefix("params/"): array
        for name, array in np.load(folder / "as_bv_f32.npz").items()
    }
    if layout.endswith("bf16"):
        expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in expected.items()}
    by_name = flatten(params)
    assert by_name.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(by_name[name]), array, err_msg=name)
    assert model == weights.load(folder / "as_bv_f32.npz")[0]


@pytest.mark.slow
def test_logits_equal_the_logits_of_transformers(folder):
    """The test compares every position that predicts a token.

    These are the last position of the prefix and all positions of the suffix.
    """
    model, params = weights.load(folder)
    io = np.load(folder / "io.npz")
    patches = (model.config.image_size // model.config.vision.patch_size) ** 2
    ids, types, valid = (
        io["input_ids"][:, patches:],
        io["token_type_ids"][:, patches:],
        io["attention_mask"][:, patches:],
    )
    image = jnp.asarray(io["pixel_values"].transpose(0, 2, 3, 1))
    positions = 0
    for row in range(len(ids)):
        prompt, suffix = (
            jnp.asarray(ids[row][(valid[row] == 1) & (types[row] == kind)])[None] for kind in (0, 1)
        )
        cache, first = model.prefill(
            params, image[row : row + 1], prompt, jnp.ones(prompt.shape, bool)
        )
        later, _ = model.extend(
            params, cache, model.suffix_cache(cache, 1, suffix.shape[1]), suffix[:, None]
        )
        logits = jnp.concatenate([first[:, None], later[:, 0]], axis=1)[0]
        start = patches + prompt.shape[1] - 1
        expected = io["logits_uncapped"][
            row, start : start + len(logits), : model.config.text.vocab_size
        ]
        np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=LOGIT_TOLERANCE)
        positions += len(logits)
    assert positions > 20


def test_a_directory_converts_to_an_npz_bit_for_bit(folder, tmp_path):
    convert(folder / "hub_layout", tmp_path / "a.npz", "")
    assert_same(read_arrays(tmp_path / "a.npz"), read_arrays(folder / "as_bv_f32.npz"))


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_npz_to_directory_to_npz_changes_no_bit(golden, tmp_path, dtype):
    for source in (golden / "hf_pg1/as_bv_f32.npz", golden / "bigvision_pg2/ckpt_f32.npz"):
        directory = tmp_path / source.parent.name
        convert(source, directory / "a.npz", dtype)
        scales = Scales(query_scale=16**-0.5) if source.parent.name.endswith("pg2") else Scales()
        convert(directory / "a.npz", directory / "hf", "", scales=scales)
        convert(directory / "hf", directory / "b.npz", "")
        assert_same(read_arrays(directory / "b.npz"), read_arrays(directory / "a.npz"))
        if not dtype:
            assert_same(read_arrays(directory / "a.npz"), read_arrays(source))


def test_large_models_are_written_in_shards_and_read_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 100_000)
    convert(folder / "as_bv_f32.npz", tmp_path / "hf", "")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    convert(tmp_path / "hf", tmp_path / "b.npz", "")
    assert_same(read_arrays(tmp_path / "b.npz"), read_arrays(folder / "as_bv_f32.npz"))


def test_convert_copies_the_tokenizer(folder, golden, tmp_path):
    shutil.copytree(folder / "hub_layout", tmp_path / "src")
    shutil.copy(golden / "preprocessing/tiny_gemma_sp.model", tmp_path / "src/tokenizer.model")
    convert(tmp_path / "src", tmp_path / "dst", "")
    source, copy = (tmp_path / f"{name}/tokenizer.model" for name in ("src", "dst"))
    assert copy.read_bytes() == source.read_bytes()
    assert weights.tokenizer_path(tmp_path / "dst") == str(copy)


def write_run(workdir: Path, sizes: Model) -> Any:
    """Writes the files of a finished run with random parameters, and returns the parameters."""
    params = random_params(PaliGemma(sizes))
    sources = {"boxes": Source(uri="synthetic:scenes", boxes="box")}
    settings = Config(model=sizes, stages=("sft",), sft=Sft(sources=sources))
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    manager.save_tree(workdir / "checkpoints" / "6" / "params", params)
    (workdir / "checkpoints" / "6" / COMMIT_FILE).touch()
    return params


@pytest.mark.parametrize("sizes", [PG1, PG2], ids=["pg1", "pg2"])
@pytest.mark.needs("torch", "transformers")
@pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings of their own
def test_transformers_answers_as_we_do_from_an_exported_run(sizes, tmp_path):
    """The processor of the exported directory makes pixels and ids of a photograph and a prompt."""
    import torch
    import transformers

    sizes = replace(sizes, text=replace(sizes.text, vocab_size=2048))  # the package's tokenizer
    params = write_run(tmp_path / "run", sizes)
    convert(tmp_path / "run", tmp_path / "hf", "")
    pixels = (
        np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8).repeat(9, 0).repeat(9, 1)
    )
    image, prompt = Image.fromarray(pixels), "detect red circle ; blue square"

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    hf_model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    inputs_of_hf = processor(text=f"<image>{prompt}", images=image, return_tensors="pt")
    inputs_of_hf.pop("labels", None)
    # Without token types, the prefix of transformers has causal attention.
    inputs_of_hf["token_type_ids"] = torch.zeros_like(inputs_of_hf["input_ids"])
    length = inputs_of_hf["input_ids"].shape[1]
    generated = hf_model.generate(**inputs_of_hf, max_new_tokens=6, do_sample=False)
    expected = processor.decode(generated[0, length:], skip_special_tokens=True)

    model, _ = weights.load(tmp_path / "run")
    answer = predict(model, params, image, prompt, load_tokenizer(), max_new_tokens=6)
    patches = (sizes.image_size // sizes.vision.patch_size) ** 2
    ids = inputs_of_hf["input_ids"][0, patches:].tolist()
    assert ids == load_tokenizer().prefix(prompt)
    assert answer["text"] == expected and len(expected) > 10


def test_an_exported_checkpoint_without_a_tokenizer_says_so(tmp_path, caplog):
    sizes = replace(PG1, text=replace(PG1.text, vocab_size=2048))
    export.save(tmp_path / "a.npz", random_params(PaliGemma(sizes)))
    convert(tmp_path / "a.npz", tmp_path / "without", "")
    assert "a.npz has no tokenizer, so none is written: --tokenizer=FILE" in caplog.text
    assert not (tmp_path / "without" / "tokenizer.model").exists()
    tokenizer = Path(make_tokenizer.__file__).with_name("tiny.model")
    convert(tmp_path / "a.npz", tmp_path / "with", "", str(tokenizer))
    assert load_tokenizer(str(tmp_path / "with" / "tokenizer.model")).vocab.size == 2048


CAPPED = replace(PG2, text=replace(PG2.text, final_softcap=30.0, query_scale=144**-0.5))


@pytest.mark.parametrize("config", [PG1, PG2, CAPPED], ids=["pg1", "pg2", "pg2_capped"])
@pytest.mark.needs("torch", "transformers")
@pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings of their own
def test_transformers_computes_the_same_logits_from_an_exported_directory(config, tmp_path):
    import torch
    import transformers

    model = PaliGemma(config)
    params = random_params(model)
    export.save(tmp_path / "hf", params, config)
    hf_model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = inputs(model)
    patches = (config.image_size // config.vision.patch_size) ** 2
    prompt = x.prompt[:1, : int(x.prompt_mask[0].sum())]
    suffix = x.tokens[:1, 0]
    prefix_length = patches + prompt.shape[1]
    pixels = torch.tensor(np.asarray(x.image[:1]).transpose(0, 3, 1, 2))
    ids = np.concatenate([np.full((1, patches), config.text.vocab_size), prompt, suffix], axis=1)
    types = np.concatenate([np.zeros((1, prefix_length)), np.ones(suffix.shape)], axis=1)
    with torch.no_grad():
        hf_logits = hf_model(
            pixel_values=pixels,
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.ones(ids.shape).long(),
            token_type_ids=torch.tensor(types).long(),
        ).logits.numpy()
    cache, first = model.prefill(params, x.image[:1], prompt, jnp.ones(prompt.shape, bool))
    later, _ = model.extend(
        params, cache, model.suffix_cache(cache, 1, suffix.shape[1]), suffix[:, None]
    )
    logits = np.concatenate([first[:, None], later[:, 0]], axis=1)
    expected = hf_logits[:, prefix_length - 1 :, : config.text.vocab_size]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
    assert np.abs(expected).max() > 3
    generated = hf_model.generate(
        pixel_values=pixels,
        input_ids=torch.tensor(ids[:, :prefix_length]).long(),
        attention_mask=torch.ones((1, prefix_length)).long(),
        # Without token types, the prefix of transformers has causal attention.
        token_type_ids=torch.zeros((1, prefix_length)).long(),
        max_new_tokens=5,
        do_sample=False,
    )[0, prefix_length:].numpy()
    greedy = sample(
        model,
        params,
        x.image[:1],
        prompt,
        jnp.ones(prompt.shape, bool),
        jax.random.key(0),
        1,
        5,
        0.0,
        suppress_tokens=(),
    )
    np.testing.assert_array_equal(generated, np.asarray(greedy.tokens[0, 0])[: len(generated)])


def test_the_final_softcap_of_a_directory_is_off_in_training_and_kept_by_convert(tmp_path):
    export.save(tmp_path / "a", random_params(PaliGemma(CAPPED)), CAPPED)
    assert weights.load(tmp_path / "a")[0].config.text.final_softcap == 0
    convert(tmp_path / "a", tmp_path / "b", "bfloat16")
    settings = json.loads((tmp_path / "b/config.json").read_text())["text_config"]
    assert (settings["final_logit_softcapping"], settings["query_pre_attn_scalar"]) == (30.0, 144)


def test_layers_of_different_dtypes_are_not_rounded_to_the_first(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder / "hub_layout", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    save_file(
        tensors | {name: tensors[name].astype(ml_dtypes.bfloat16)},
        tmp_path / "mixed/model.safetensors",
    )
    mixed, exact = (
        flatten(weights.load(path)[1])["llm/layers/mlp/linear"]
        for path in (tmp_path / "mixed", folder)
    )
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixed[1:], exact[1:])


def test_a_setting_that_a_gemma1_directory_cannot_store_is_refused(tmp_path):
    model = PaliGemma(replace(PG1, text=replace(PG1.text, query_scale=0.5)))
    with pytest.raises(UserError, match="query_scale"):
        export.save(tmp_path / "hf", random_params(model), model.config)
    assert not list(tmp_path.iterdir())


def convert_error(folder, tmp_path, change):
    """Returns the error of converting a copy of `folder` after `change(copy)`.

    Fails if the error has several lines, or if the conversion leaves a file.
    """
    shutil.copytree(folder, tmp_path / "src")
    change(tmp_path / "src")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "src", tmp_path / "out.npz", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_shard_is_named(folder, tmp_path):
    message = convert_error(
        folder / "sharded",
        tmp_path,
        lambda src: (src / "model-00002-of-00004.safetensors").unlink(),
    )
    assert "model-00002-of-00004.safetensors does not exist" in message
    assert "index.json says that it holds" in message


def test_a_tensor_missing_from_its_shard_is_named(folder, tmp_path):
    def change(src):
        index = json.loads((src / "model.safetensors.index.json").read_text())
        shard = "model-00001-of-00004.safetensors"
        index["weight_map"]["language_model.model.extra.weight"] = shard
        (src / "model.safetensors.index.json").write_text(json.dumps(index))

    message = convert_error(folder / "sharded", tmp_path, change)
    assert "model-00001-of-00004.safetensors lacks language_model.model.extra.weight" in message


@pytest.mark.parametrize("end", [0, 4, 500, -100])
def test_a_truncated_file_is_named(folder, tmp_path, end):
    def change(src):
        data = (src / "model.safetensors").read_bytes()
        (src / "model.safetensors").write_bytes(data[:end])

    message = convert_error(folder / "hub_layout", tmp_path, change)
    assert "model.safetensors cannot be read as safetensors" in message


def convert_error_of_tensors(folder, tmp_path, edit):
    """Returns the error of converting a copy of `folder` after `edit(tensors)`."""
    from safetensors.numpy import load_file, save_file

    def change(src):
        tensors = load_file(src / "model.safetensors")
        edit(tensors)
        save_file(tensors, src / "model.safetensors")

    return convert_error(folder / "hub_layout", tmp_path, change)


def test_every_tensor_that_does_not_fit_is_named_at_once(folder, tmp_path):
    def edit(tensors):
        del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
        del tensors["multi_modal_projector.linear.bias"]
        tensors["vision_tower.vision_model.head.probe"] = np.zeros(3, np.float32)
        name = "language_model.model.layers.2.self_attn.k_proj.weight"
        tensors[name] = tensors[name][:, :-1].copy()
        name = "language_model.model.norm.weight"
        tensors[name] = tensors[name][None]
        for layer in ("foo", "300000"):
            tensors[f"language_model.model.layers.{layer}.weight"] = np.ones(2, "f")

    message = convert_error_of_tensors(folder, tmp_path, edit)
    for part in (
        "layers.1.mlp.up_proj.weight: missing",
        "multi_modal_projector.linear.bias: missing",
        "vision_tower.vision_model.head.probe: not a parameter of a PaliGemma 1",
        "layers.2.self_attn.k_proj.weight: (16, 31) in the file, (16, 32) in layer 0",
        "language_model.model.norm.weight: (1, 32) in the file, "
        "which the pattern 'd -> d' does not fit",
        "language_model.model.layers.foo.weight: not a parameter",
        "language_model.model.layers.300000.weight: not a parameter",
    ):
        assert part in message


def test_an_untied_head_is_refused_and_a_tied_one_is_not(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    table = "language_model.model.embed_tokens.weight"
    shutil.copytree(folder / "hub_layout", tmp_path / "tied")
    tensors = load_file(tmp_path / "tied/model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[table]}, tmp_path / "tied/model.safetensors")
    weights.load(tmp_path / "tied")
    shutil.rmtree(tmp_path / "tied")

    def add_other_head(tensors):
        tensors["language_model.lm_head.weight"] = tensors[table] + 1

    assert "tied" in convert_error_of_tensors(folder, tmp_path, add_other_head)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava', but it must be 'paligemma'"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type is 'llama'"),
        (
            {
                "text_config": {
                    "model_type": "gemma",
                    "num_attention_heads": 3,
                    "num_key_value_heads": 1,
                }
            },
            "(64, 32) in the file, which the heads of config.json (3) or",
        ),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 5e5}}},
            "text_config.rope_theta is 500000.0, but every",
        ),
        ({"text_config": {"rms_norm_eps": 1e-3}}, "text_config.rms_norm_eps is 0.001"),
        ({"text_config": {"head_dim": None}}, "head_dim is None, but it must be a number above 0"),
        (
            {"text_config": {"num_attention_heads": 0}},
            "num_attention_heads is 0, but it must be a number above 0",
        ),
        ({"text_config": []}, "text_config is [], but it must be an object"),
        ({"image_token_index": "x"}, "image_token_index is 'x'"),
        (
            {"vision_config": {"num_attention_heads": 5}},
            "(24, 24) in the file, which the heads of config.json (5) or",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(folder, tmp_path, edit, message):
    def change(src):
        settings = json.loads((src / "config.json").read_text())
        for name, value in edit.items():
            settings[name] = settings[name] | value if isinstance(value, dict) else value
        (src / "config.json").write_text(json.dumps(settings))

    assert message in convert_error(folder / "hub_layout", tmp_path, change)
