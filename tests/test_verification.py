"""`convert --verify=N` finds exports from which transformers answers differently.

The models are random. Each export is broken in one way, as a user's hand or another tool breaks it.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, run_here
from conftest import PG1, PG2, random_params
from PIL import Image
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from pg_ground import cli
from pg_ground import convert as convert_command
from pg_ground.checkpoints import export, manager
from pg_ground.checkpoints.conversion import convert
from pg_ground.checkpoints.run_directory import COMMIT_FILE
from pg_ground.config import Config, Lora, Sft, Source
from pg_ground.evals import verification, verification_questions
from pg_ground.models import PaliGemma
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS

TOKENIZER = Path(export.__file__).parents[1] / "assets" / "tiny.model"
VOCAB = 2048

transformers_too = pytest.mark.needs("torch", "transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings


def sizes_of(kind: str):
    base = PG1 if kind == "pg1" else PG2
    final_softcap = 20.0 if kind == "pg2" else 0.0
    return replace(base, text=replace(base.text, vocab_size=VOCAB, final_softcap=final_softcap))


def varied_params(sizes):
    """Returns random parameters whose greedy answers have many different tokens.

    A small embedding keeps a token from predicting itself. A large last norm keeps the logits.
    """
    params = random_params(PaliGemma(sizes))
    params["llm"]["embedder"]["input_embedding"] *= 0.1
    params["llm"]["final_norm"]["scale"] += 9
    return params


@pytest.fixture(scope="module", params=["pg1", "pg2"])
def exported(request, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp(request.param)
    sizes = sizes_of(request.param)
    export.save(folder / "src", varied_params(sizes), sizes)
    shutil.copy(TOKENIZER, folder / "src" / "tokenizer.model")
    convert(folder / "src", folder / "hf", "")
    return SimpleNamespace(kind=request.param, source=folder / "src", folder=folder / "hf")


def verify(source: Path, folder: Path, *flags: str, count: int = 4):
    return run_here("convert", str(source), str(folder), f"--verify={count}", *flags)


# exports that are right


@pytest.mark.slow
@transformers_too
def test_all_tokens_of_a_new_export_are_equal(exported, tmp_path):
    finished = verify(exported.source, tmp_path / "new")
    assert finished.returncode == 0, finished.stderr
    folder, line = finished.stdout.splitlines()[-2:]
    assert folder == str(tmp_path / "new")
    assert line.startswith("4 of 4 answers equal, 128 tokens (")
    # The answers vary, and rounding decides none of their tokens.
    different = int(line.split("(")[1].split()[0])
    margin = float(line.split("smallest margin of a token ")[1].split(",")[0])
    rounding = float(line.split("a log-probability ")[1].split(")")[0])
    assert different >= 10 and margin > 100 * rounding
    assert "tie" not in line


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_in_another_dtype_has_the_same_weights_rounded(exported, tmp_path, dtype):
    finished = verify(exported.source, tmp_path / "new", f"--dtype={dtype}")
    assert finished.returncode == 0, finished.stderr
    assert "4 of 4 answers equal" in finished.stdout


@pytest.mark.slow
@transformers_too
def test_a_directory_is_compared_with_itself(exported):
    finished = verify(exported.folder, exported.folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("4 of 4 answers equal")  # nothing was written


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("exported", ["pg1"], indirect=True)
def test_a_directory_of_another_model_is_named(exported, tmp_path):
    sizes = sizes_of("pg2")
    export.save(tmp_path / "src", random_params(PaliGemma(sizes)), sizes)
    shutil.copy(TOKENIZER, tmp_path / "src" / "tokenizer.model")
    finished = verify(tmp_path / "src", exported.folder, count=1)
    assert finished.returncode == 2
    assert "DST is no export of SRC" in finished.stderr


@pytest.mark.slow
@transformers_too
def test_answers_of_few_tokens_are_a_warning(tmp_path, caplog):
    sizes = sizes_of("pg1")
    params = random_params(PaliGemma(sizes))
    params["llm"]["embedder"]["input_embedding"] *= 4  # each token predicts itself
    export.save(tmp_path / "src", params, sizes)
    shutil.copy(TOKENIZER, tmp_path / "src" / "tokenizer.model")
    convert(tmp_path / "src", tmp_path / "hf", "")
    line = verification.verify(tmp_path / "src", tmp_path / "hf", 1)
    assert line.startswith("1 of 1 answers equal, 32 tokens (2 different")
    assert "fewer than 4 different tokens, so they say little" in caplog.text


def write_photos(folder: Path) -> None:
    """Writes photos of several sizes, smaller and larger than the model's images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(80, 50), (12, 9), (33, 70)]):
        pixels = rng.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{('jpg', 'PNG', 'webp')[i]}")
    (folder / "notes.txt").write_text("no image")


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("exported", ["pg2"], indirect=True)
@pytest.mark.parametrize("kind", ["folder", "config"])
def test_a_users_images_are_asked_about_too(exported, tmp_path, kind):
    write_photos(tmp_path / "photos")
    data = tmp_path / "photos" if kind == "folder" else f"{ROOT / 'configs/tiny.py'}"
    finished = verify(exported.source, exported.folder, f"--verify_data={data}", count=3)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("6 of 6 answers equal")


# exports that are wrong


REMOVED = object()


def edit(file: str, *path: str, value: object) -> Callable[[Path], None]:
    """Returns a function that sets one value in a JSON file of a folder, or removes it."""

    def apply(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        section = settings
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
        if value is REMOVED:
            del section[path[-1]]
        (folder / file).write_text(json.dumps(settings))

    return apply


def swap(*parts: str) -> Callable[[Path], None]:
    """Returns a function that swaps two tensors of one shape, named by parts of their names."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        first, second = (next(name for name in tensors if part in name) for part in parts)
        tensors[first], tensors[second] = tensors[second], tensors[first]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_pieces(change: Callable) -> Callable[[Path], None]:
    """Returns a function that edits the pieces of tokenizer.model."""

    def apply(folder: Path) -> None:
        proto = sentencepiece_model_pb2.ModelProto.FromString(TOKENIZER.read_bytes())
        change(proto)
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())

    return apply


def shift_locs(proto) -> None:
    """`<loc0001>` gets the id of `<loc0000>`, and so on."""
    first = VOCAB - LOC_TOKENS - SEG_TOKENS
    names = [proto.pieces[first + i].piece for i in range(LOC_TOKENS)]
    for i in range(LOC_TOKENS):
        proto.pieces[first + i].piece = names[(i + 1) % LOC_TOKENS]


def swap_locs_and_segs(proto) -> None:
    first = VOCAB - LOC_TOKENS - SEG_TOKENS
    names = [proto.pieces[first + i].piece for i in range(LOC_TOKENS + SEG_TOKENS)]
    for i, name in enumerate(names[LOC_TOKENS:] + names[:LOC_TOKENS]):
        proto.pieces[first + i].piece = name


def drop_locs(proto) -> None:
    """As plain Gemma's tokenizer."""
    del proto.pieces[VOCAB - LOC_TOKENS - SEG_TOKENS :]


def mark_locs_special(folder: Path) -> None:
    """`skip_special_tokens=True` removes the loc tokens then."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    first = VOCAB - LOC_TOKENS - SEG_TOKENS
    settings["extra_special_tokens"] = [f"<loc{i:04d}>" for i in range(LOC_TOKENS)]
    settings["added_tokens_decoder"] = {
        str(first + i): {"content": f"<loc{i:04d}>", "special": True} for i in range(LOC_TOKENS)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


PREPROCESSOR = "preprocessor_config.json"

BROKEN_PROCESSOR = {
    "image mean": (edit(PREPROCESSOR, "image_mean", value=[0.485, 0.456, 0.406]), "grey levels"),
    "image std": (edit(PREPROCESSOR, "image_std", value=[0.25, 0.25, 0.25]), "grey levels"),
    "image scale": (edit(PREPROCESSOR, "rescale_factor", value=1 / 127.5), "grey levels"),
    "no normalisation": (edit(PREPROCESSOR, "do_normalize", value=False), "grey levels"),
    "nearest pixels": (edit(PREPROCESSOR, "resample", value=0), "grey levels"),
    "image size": (edit(PREPROCESSOR, "size", value={"height": 28, "width": 28}), "21"),
    "image tokens": (edit(PREPROCESSOR, "image_seq_length", value=4), "image"),
    "no image tokens": (edit(PREPROCESSOR, "image_seq_length", value=REMOVED), "image_seq_length"),
    "loc tokens shifted": (change_pieces(shift_locs), "'<loc0000>' at id 1919"),
    "loc behind seg": (change_pieces(swap_locs_and_segs), "'<loc0000>' at id 1024"),
    "no loc tokens": (change_pieces(drop_locs), ""),
    "another processor": (edit(PREPROCESSOR, "processor_class", value="SiglipProcessor"), ""),
    "no preprocessor": (lambda folder: (folder / PREPROCESSOR).unlink(), "cannot be read"),
    "special locs": (mark_locs_special, "skip_special_tokens removes"),
}  # fmt: skip

BROKEN_MODEL = {
    "image token id": (edit("config.json", "image_token_index", value=VOCAB + 5), ""),
    "key heads": (edit("config.json", "text_config", "num_key_value_heads", value=4), ""),
    "vision heads": (edit("config.json", "vision_config", "num_attention_heads", value=3), "heads"),
    "keys and values": (swap("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"), "differ"),
    "gate and up": (swap("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"), "llm/layers/mlp"),
    "vision layers": (swap("encoder.layers.0.mlp.fc1.weight", "encoder.layers.1.mlp.fc1.weight"),
                      "img/Transformer"),
    "norms": (swap("model.layers.0.input_layernorm", "model.layers.1.input_layernorm"), "norm"),
}  # fmt: skip

BROKEN_PG2 = {
    "no final soft-cap": (
        edit("config.json", "text_config", "final_logit_softcapping", value=None),
        "final_logit_softcapping 0, but the model has 20",
    ),
    "another final soft-cap": (
        edit("config.json", "text_config", "final_logit_softcapping", value=30.0),
        "final_logit_softcapping 30, but the model has 20",
    ),
    "attention soft-cap": (
        edit("config.json", "text_config", "attn_logit_softcapping", value=1.0),
        "attn_logit_softcapping 1, but the model has 50",
    ),
    "query scale": (
        edit("config.json", "text_config", "query_pre_attn_scalar", value=144),
        "query_pre_attn_scalar",
    ),
    "norms after": (
        swap("0.post_attention_layernorm", "0.post_feedforward_layernorm"),
        "post_attention_norm",
    ),
}


def assert_found(exported, tmp_path, break_export, text) -> str:
    shutil.copytree(exported.folder, tmp_path / "hf")
    break_export(tmp_path / "hf")
    finished = verify(exported.source, tmp_path / "hf", count=2)
    assert finished.returncode == 2, finished.stdout
    line = finished.stderr.strip().splitlines()[-1]
    assert text in line, line
    return line


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("fault", BROKEN_PROCESSOR)
@pytest.mark.parametrize("exported", ["pg1"], indirect=True)
def test_a_broken_processor_is_found(exported, tmp_path, fault):
    assert_found(exported, tmp_path, *BROKEN_PROCESSOR[fault])


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("fault", BROKEN_MODEL)
def test_a_broken_model_is_found(exported, tmp_path, fault):
    assert_found(exported, tmp_path, *BROKEN_MODEL[fault])


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("fault", BROKEN_PG2)
@pytest.mark.parametrize("exported", ["pg2"], indirect=True)
def test_a_broken_gemma_2_is_found(exported, tmp_path, fault):
    assert_found(exported, tmp_path, *BROKEN_PG2[fault])


@pytest.mark.slow
@transformers_too
def test_a_causal_prefix_is_found(exported, tmp_path, monkeypatch):
    """As processors of 2024, which return no `token_type_ids`.

    In transformers 5.23, SDPA attention of a Gemma 1 without token types still has a full prefix,
    if no prompt is padded. A Gemma 2 has eager attention, and its prefix is causal then.
    """
    from transformers import PaliGemmaProcessor

    with_types = PaliGemmaProcessor.__call__

    def without_types(self, *args, **kwargs):
        inputs = with_types(self, *args, **kwargs)
        del inputs["token_type_ids"]
        return inputs

    monkeypatch.setattr(PaliGemmaProcessor, "__call__", without_types)
    line = assert_found(exported, tmp_path, lambda folder: None, "causal mask: pass token_type_ids")
    if exported.kind == "pg2":
        assert "The first difference is token " in line and " in transformers, " in line


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("\n", "the newline after the prompt is missing"),
        ("<bos>", "BOS before the prompt is missing"),
    ],
)
@pytest.mark.parametrize("exported", ["pg1"], indirect=True)
def test_a_missing_newline_or_bos_is_found(exported, tmp_path, monkeypatch, word, text):
    """As a processor that does not know the layout of a PaliGemma prompt."""
    from transformers import PaliGemmaProcessor

    whole = PaliGemmaProcessor.prepare_inputs_layout

    def without(self, *args, **kwargs):
        images, texts, *others = whole(self, *args, **kwargs)
        return images, [text.replace(word, "") for text in texts], *others

    monkeypatch.setattr(PaliGemmaProcessor, "prepare_inputs_layout", without)
    assert_found(exported, tmp_path, lambda folder: None, text)


@pytest.mark.slow
@transformers_too
@pytest.mark.parametrize("exported", ["pg2"], indirect=True)
def test_a_sliding_window_is_found(exported, tmp_path):
    """Gemma 2 has one. PaliGemma 2 was trained without it."""

    def slide(folder: Path) -> None:
        edit("config.json", "text_config", "sliding_window", value=4)(folder)
        edit("config.json", "text_config", "layer_types", value=["sliding_attention"] * 2)(folder)

    assert_found(exported, tmp_path, slide, "Likely cause: config.json")


# questions, and commands that cannot verify


def test_questions_are_different_and_not_all_square():
    questions = verification_questions.draw_questions(8, 21)
    assert len({question.prompt for question in questions}) == 8
    shapes = {question.image.shape[:2] for question in questions}
    assert len(shapes) == 3 and min(map(min, shapes)) > 21
    again = verification_questions.draw_questions(8, 21)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(questions, again, strict=True))
    tokenizer = load_tokenizer()
    assert all(tokenizer.decode(tokenizer.text(q.prompt)) == q.prompt for q in questions)


def test_a_users_images_have_the_drawn_prompts(tmp_path):
    write_photos(tmp_path / "photos")
    drawn = verification_questions.draw_questions(8, 21)
    questions = verification_questions.make_questions(8, 21, tmp_path / "photos")
    assert [question.prompt for question in questions[8:]] == [q.prompt for q in drawn[:3]]
    assert [question.image.shape[:2] for question in questions[8:]] == [(80, 50), (12, 9), (33, 70)]


def test_the_sources_of_a_config_ask_in_turn():
    config = cli.parse_config([f"--config={ROOT / 'configs/tiny.py'}"])
    questions = verification_questions.make_questions(4, 21, config)[4:]
    words = [question.prompt.split()[0] for question in questions]
    assert words == ["detect", "point", "detect", "point"]
    assert all(min(question.image.shape[:2]) > 21 for question in questions)


@pytest.mark.parametrize(
    ("value", "count", "message"),
    [
        ("photos", 0, "--verify=N is absent"),
        ("nowhere", 1, "is no folder, and no FILE.py or FILE.py:NAME"),
        ("empty", 1, "has no image: names end in .jpg"),
        ("broken", 1, "a.jpg: no image format that Pillow knows"),
        ("no_sources.py", 1, "the config has no eval.sources"),
    ],
)
def test_data_that_cannot_be_asked_about_is_one_line(tmp_path, value, count, message):
    write_photos(tmp_path / "photos")
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no image")
    shutil.copy(ROOT / "configs/tiny.py", tmp_path)
    (tmp_path / "no_sources.py").write_text(
        "from . import tiny\n\n\ndef get_config():\n    c = tiny.get_config().unlock()\n"
        "    c.eval.sources = {}\n    return c.lock()\n"
    )
    with pytest.raises(UserError) as raised:
        data = convert_command.verification_data(str(tmp_path / value), count)
        verification_questions.make_questions(count, 21, data)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_only_a_hugging_face_directory_is_verified(tmp_path):
    for name in ("a.npz", "a.orbax"):
        finished = verify(tmp_path / "src", tmp_path / name)
        assert finished.returncode == 2
        assert "--verify=4 compares a Hugging Face directory, but DST is" in finished.stderr
    finished = run_here("convert", str(tmp_path), str(tmp_path / "hf"), "--verify=-1")
    assert finished.returncode == 2 and "--verify=-1: it is a number" in finished.stderr


def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch):
    find = verification.importlib.util.find_spec
    monkeypatch.setattr(
        verification.importlib.util,
        "find_spec",
        lambda name: None if name == "transformers" else find(name),
    )
    export.save(tmp_path / "src", random_params(PaliGemma(PG1)), PG1)
    finished = verify(tmp_path / "src", tmp_path / "hf")
    assert finished.returncode == 2
    # Without torch, the line names both.
    assert "--verify needs " in finished.stderr
    assert "transformers: pip install 'pg-ground[verify]'" in finished.stderr
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_without_a_tokenizer_names_the_flag(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    export.save(tmp_path / "src", random_params(PaliGemma(PG1)), PG1)
    finished = verify(tmp_path / "src", tmp_path / "src")
    assert finished.returncode == 2
    assert "has no tokenizer.model, and --verify needs one: --tokenizer=FILE" in finished.stderr


@pytest.mark.slow
@transformers_too
def test_a_run_with_adapters_is_exported_and_verified(tmp_path):
    """The adapters are merged on both sides, and the run has the package's tokenizer."""
    sizes = sizes_of("pg2")
    sizes = replace(sizes, lora=Lora(rank=2, alpha=4.0, pattern="llm/layers/.*"))
    params = varied_params(sizes)
    sources = {"boxes": Source(uri="synthetic:scenes", boxes="box")}
    settings = Config(model=sizes, stages=("sft",), sft=Sft(sources=sources))
    step = tmp_path / "run" / "checkpoints" / "6"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    manager.save_tree(step / "params", params)
    (step / COMMIT_FILE).touch()
    finished = verify(tmp_path / "run", tmp_path / "hf", "--dtype=bfloat16", count=2)
    assert finished.returncode == 0, finished.stderr
    assert "2 of 2 answers equal" in finished.stdout
    assert (tmp_path / "hf" / "README.md").is_file()
