"""A rehearsal finds what would stop the real run, in one line, and says what the run will cost."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run, run_here
from conftest import random_params
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from pg_ground import tokenizer
from pg_ground.checkpoints.export import save
from pg_ground.cli import run_recipe
from pg_ground.config import Config, parse
from pg_ground.data.datasets import open_examples
from pg_ground.models.paligemma import PaliGemma
from pg_ground.rehearsal import costs, data
from pg_ground.rehearsal.checklist import Checklist
from pg_ground.rehearsal.miniatures import write_miniatures
from pg_ground.rehearsal.shrinking import shrink
from pg_ground.rehearsal.stand_in_tokenizer import stand_in_tokenizer
from pg_ground.rehearsal.steps import Rehearsal
from pg_ground.rehearse import topology_of
from pg_ground.types import UserError

RECIPE = "configs/refcoco.py:pg1_3b_224_v5e_8"


def recipe(name: str = "pg1_3b_224_v5e_8") -> Config:
    return parse(run_recipe(ROOT / "configs" / "refcoco.py").get_config(name))


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refcoco")
    write_miniatures(recipe(), folder)
    return folder


@pytest.fixture
def copy(miniature, tmp_path) -> Path:
    return Path(shutil.copytree(miniature, tmp_path / "refcoco"))


def rehearse_inputs(tmp_path: Path, *flags: str) -> Any:
    """Runs the checks that need neither a compiler nor a run."""
    out = f"--out={tmp_path / 'out'}"
    return run_here("rehearse", f"--config={RECIPE}", "--nocompile", "--norun", out, *flags)


def error_line(result: Any) -> str:
    """Returns the only line of the error of a command."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("configs/refcoco.py:pg2_3b_448_v5e_8", "v5e:2x4"),
        ("configs/refcoco.py:pg2_3b_448_v5p_8", "v5p:2x2x1"),
        ("pg2_10b_224_v5e_64", "v5e:8x8"),
        ("mine.py:small_v6e_1", "v6e:1x1"),
        ("configs/refcoco.py:pg2_3b_224_lora_h100", "gpu"),
    ],
)
def test_the_name_of_a_recipe_ends_in_its_slice(name, topology):
    assert topology_of(name) == topology


@pytest.mark.parametrize("name", ["mine.py", "mine.py:pg2_3b_448", "mine.py:x_v5e_7"])
def test_another_name_needs_the_flag(name):
    with pytest.raises(UserError, match="a slice is needed: --topology=…, one of v4"):
        topology_of(name)


def test_a_file_without_a_name_has_a_default_recipe():
    result = run_here("rehearse", "--config=configs/refcoco.py")
    assert result.returncode == 2 and error_line(result).startswith(
        "error: a recipe is needed: --config=configs/refcoco.py:pg2_3b_448_v5e_8, or --topology=…"
    )
    others = ("configs/tiny.py", "configs/tiny_.py", "configs/refcoco.py:pg2_3b_448")
    for name in others:
        with pytest.raises(UserError) as error:
            topology_of(name)
        assert "recipe" not in str(error.value)


def test_flags_that_are_on_say_how_to_turn_them_off():
    text = run_here("rehearse", "--help").stdout
    assert "--nocompile turns it off" in text and "--norun turns it off" in text
    assert "--nodata_only" not in text and "--nohelp" not in text
    for flag, right in (
        ("no-compile", "nocompile"),
        ("no_run", "norun"),
        ("nocompil", "nocompile"),
    ):
        result = run_here("rehearse", f"--config={RECIPE}", f"--{flag}")
        assert result.returncode == 2 and f"did you mean {right}?" in error_line(result)
    assert "did you mean topology?" in run_here("rehearse", "--topolgy=v5e:1x1").stderr


@pytest.mark.parametrize(
    ("path", "first"), [("items[].", "record 1, element 0: "), ("items.0.", "record 1: ")]
)
def test_a_bad_record_is_named_once(tmp_path, path, first):
    items = [{"name": name, "box": [0, 0, 9, 9]} for name in ("cat", "dog")]
    rows = [json.dumps({"image": f"{name}.png", "items": items}) for name in ("a", "b", "a")]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    fields = f'element="all", phrase="{path}name", boxes="{path}box"'
    text = MANY_ROWS.replace('boxes="box"', fields if "[]" in path else fields[15:])
    (tmp_path / "recipe.py").write_text(text.replace("ROWS", str(tmp_path / "rows.jsonl")))
    result = run_here("rehearse", "--data_only", f"--config={tmp_path / 'recipe.py'}")
    assert result.returncode == 2
    error = error_line(result)
    assert f"; {first}" in error and error.count("record 1") == 1 and "b.png" in error


def test_a_miniature_has_every_split_of_the_recipe(tmp_path):
    """The rehearsal of a user without data. The counts are the published ones."""
    config, kind = data.prepare(recipe(), tmp_path / "data")
    assert kind == "a miniature, because data/refcoco does not exist"
    counts = data.check_sources(config, is_miniature=True)
    assert len(counts) == 8 and sum(counts.values()) == 57_457
    train = json.loads((tmp_path / "data" / "refcocog" / "instances.json").read_text())
    assert {"id", "file_name", "width", "height"} <= train["images"][0].keys()


def on_files(folder: Path) -> Config:
    """Returns the recipe on a user's files, without the published counts of questions."""
    config = recipe()
    return replace(
        config,
        data=replace(config.data, dir=str(folder)),
        eval=replace(config.eval, benchmarks={}),
    )


def test_a_users_files_are_used(miniature, tmp_path):
    config, kind = data.prepare(on_files(miniature), tmp_path / "unused")
    assert kind == f"yours, in {miniature}" and not (tmp_path / "unused").exists()
    assert set(data.check_sources(config, is_miniature=False).values()) == {24}


def test_a_missing_split_is_found(copy):
    file = copy / "refcoco" / "refs(unc).p"
    refs = [ref for ref in pickle.loads(file.read_bytes()) if ref["split"] != "testB"]
    file.write_bytes(pickle.dumps(refs))
    with pytest.raises(UserError, match=r"eval\.sources\.refcoco_testB.*testB"):
        data.check_sources(on_files(copy), is_miniature=False)


def test_a_wrong_image_root_is_found(copy):
    (copy / "train2014").rename(copy / "val2014")
    with pytest.raises(UserError, match=r"sft\.sources\.combined: 64 of 64 .*64 missing_image"):
        data.check_sources(on_files(copy), is_miniature=False)


@pytest.mark.parametrize(
    "command", [("rehearse",), ("rehearse", "--data_only"), ("look", "--check")]
)
def test_every_split_with_another_number_of_questions_is_named(miniature, tmp_path, command):
    flags = (f"--config.data.dir={miniature}", "--config.eval.benchmarks.refcoco_val=rec")
    if command == ("rehearse",):
        result = rehearse_inputs(tmp_path, *flags)
        assert result.stdout.splitlines()[-1].startswith("data") and "FAILED" in result.stdout
    else:
        result = run_here(*command, f"--config={RECIPE}", *flags)
    assert result.returncode == 2
    error, lines = error_line(result), result.stdout.splitlines()
    assert "training" not in error and "training can start" not in result.stdout
    assert "refcoco+_testA has 5726 questions, but there are 24; " in error
    assert error.count("but there are 24") == 7 and "refcoco_val" not in error
    assert error.count("config.eval.sources.") == 1 and max(map(len, lines)) < 260
    assert error.endswith(
        "files are missing; if these are all questions that you have, give each of these sources "
        "--config.eval.benchmarks.refcoco+_testA=rec"
    )


@pytest.mark.slow
def test_a_part_of_a_benchmark_has_the_number_in_its_name(miniature):
    parts = [f"--config.eval.benchmarks.{name}={name}@24" for name in recipe().eval.sources]
    parts[0] = parts[0].replace("24", "25")
    flags = (f"--config={RECIPE}", f"--config.data.dir={miniature}", *parts)
    result = run_here("rehearse", "--data_only", *flags)
    error = error_line(result)
    assert "@25 has 25 questions, but there are 24: files" in error and error.count("has") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.grpo.batch_size=60", "config.grpo.batch_size is 60: it must be a multiple of 8"),
        ("--config.sft.batch_size=63", "multiple of 8, replica * data of the mesh: 56 or 64"),
        ("--config.eval.batch_size=5", "multiple of 8, replica * data of the mesh: 8"),
        ("--config.eval.batch_size=12", "config.eval.batch_size is 12: it must be a multiple of 8"),
        ("--config.mesh.model=3", "8 devices"),
        ("--config.data.tokenizer=WITHOUT", "is not piece"),
        ("--config.data.tokenizer=SMALL", "has 257152: use the tokenizer.model of the model's own"),
    ],
)
def test_faults_of_settings_are_one_line(flag, message, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    pieces = proto.FromString(stand_in_tokenizer(2048))
    (tmp_path / "SMALL").write_bytes(pieces.SerializeToString())
    pieces.pieces[1000].piece = "<loc00>"  # of 896 to 1919, the loc pieces
    (tmp_path / "WITHOUT").write_bytes(pieces.SerializeToString())
    for name in ("WITHOUT", "SMALL"):
        flag = flag.replace(name, str(tmp_path / name))
    result = rehearse_inputs(tmp_path, flag)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "FAILED" in result.stdout


def test_inputs_that_are_right_give_a_checklist(tmp_path):
    result = rehearse_inputs(tmp_path)
    assert result.returncode == 0, result.stderr
    states = {line[:9].strip(): line for line in result.stdout.splitlines()}
    for name in ("slice", "data", "tokenizer"):
        assert " ok " in states[name]
    for name in ("weights", "your data", "compile", "run", "speed"):
        assert "not checked" in states[name]


# the data alone


def data_only(folder: Path, *flags: str) -> Any:
    """Checks a user's files without the published numbers of questions."""
    names = [f"--config.eval.benchmarks.{name}=rec" for name in recipe().eval.sources]
    flags = (f"--config={RECIPE}", f"--config.data.dir={folder}", *names, *flags)
    return run_here("rehearse", "--data_only", *flags)


def lengthen(folder: Path, words: int) -> None:
    """Adds words to the first train sentence of RefCOCOg."""
    file = folder / "refcocog" / "refs(umd).p"
    refs = pickle.loads(file.read_bytes())
    ref = next(ref for ref in refs if ref["split"] == "train")
    ref["sentences"][0]["raw"] = ref["sentences"][0]["sent"] = " ".join(["zebra"] * words)
    file.write_bytes(pickle.dumps(refs))


SMALL = (
    "tokens are counted with the small tokenizer of the package; --config.data.tokenizer=… counts "
    "as the run does"
)


def test_lengths_of_the_small_tokenizer_are_warnings(copy):
    lengthen(copy, 90)
    result = data_only(copy)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert SMALL in lines and lines[-1] == "training can start with these records"
    (line,) = [line for line in lines if "prompt tokens, but" in line]
    assert line.startswith("source sft/combined: question ")
    assert line.endswith("data.prompt_length is 64: the run's tokenizer may need fewer")


@pytest.mark.slow
def test_lengths_of_the_runs_tokenizer_are_errors(copy, tmp_path):
    lengthen(copy, 90)
    (tmp_path / "tokenizer.model").write_bytes(stand_in_tokenizer(257_152))
    tokenizer_flag = f"--config.data.tokenizer={tmp_path / 'tokenizer.model'}"
    result = data_only(copy, tokenizer_flag)
    assert result.returncode == 2 and SMALL not in result.stdout
    setting = error_line(result).split(": set ")[1]
    assert setting.startswith("--config.data.prompt_length=")
    assert data_only(copy, tokenizer_flag, setting).returncode == 0


@pytest.mark.slow
def test_equal_sources_are_read_once(miniature):
    result = data_only(miniature)
    assert result.returncode == 0, result.stderr
    assert "grpo/combined: the same records as sft/combined" in result.stdout.splitlines()
    records = result.stdout.partition("longest of the usable")[0]
    assert "sft/combined" in records and "grpo/combined" not in records
    other = data_only(miniature, "--config.grpo.sources.combined.prompt=find {phrase}")
    assert other.returncode == 0 and "the same records" not in other.stdout


def test_the_stand_in_of_the_tokenizer_has_room_for_a_users_texts(miniature, tmp_path):
    lengths = []
    for folder, file in ((str(miniature), ""), ("data/refcoco", ""), (str(miniature), "a.model")):
        config = recipe()
        data_settings = replace(config.data, dir=folder, tokenizer=file)
        config = replace(config, data=data_settings)
        rehearsal = Rehearsal(config, recipe(), "v5e:2x4", tmp_path, Checklist(print))
        lengths.append(rehearsal.small_config().data.prompt_length)
    assert lengths == [512, 64, 64]
    tiny = parse(run_recipe(ROOT / "configs" / "tiny.py").get_config())
    rehearsal = Rehearsal(tiny, tiny, "v5e:1x1", tmp_path, Checklist(print))
    assert rehearsal.small_config().data.prompt_length == tiny.data.prompt_length


@pytest.mark.slow
def test_sources_with_one_cause_share_their_lines(copy):
    shutil.rmtree(copy / "train2014")
    result = data_only(copy)
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert sum("there is no file" in line for line in lines) == 3  # of the first source
    assert sum(line.rstrip().endswith("  as sft/combined") for line in lines) == 8
    error = error_line(result)
    assert "source sft/combined: none of 16 questions can be used; record 0, element 0: " in error
    others = "eval/refcoco+_testA, eval/refcoco+_testB, eval/refcoco+_val, and 5 more"
    assert error.endswith(f" (also {others})")


def test_a_folder_beside_the_right_one_is_named(copy):
    for name, folder in (("inner", copy / "refcoco"), ("outer", copy.parent)):
        error = error_line(rehearse_inputs(copy.parent / name, f"--config.data.dir={folder}"))
        assert error.endswith(
            f"No such file or directory; it is in {copy}, which must be the folder"
        )


def test_an_archive_that_is_not_unpacked_is_named(copy):
    shutil.move(copy / "refcocog", copy.parent / "elsewhere")
    (copy / "refcocog.zip").write_bytes(b"PK")
    error = error_line(rehearse_inputs(copy.parent / "a", f"--config.data.dir={copy}"))
    assert error.endswith(f"No such file or directory; unpack {copy / 'refcocog.zip'} there")


@pytest.mark.slow
def test_a_check_of_the_data_ends_with_the_number_of_bad_records(copy):
    picture = sorted((copy / "train2014").iterdir())[0]
    picture.write_bytes(picture.read_bytes()[:-60])
    result = data_only(copy, "--config.data.bad_record_share=0.5")
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"training can start with these records, without the \d+ that cannot be used", last
    )


@pytest.mark.parametrize("name", ["refs(umd).p", "instances.json"])
def test_a_cut_file_is_unpacked_again(copy, name):
    file = copy / "refcocog" / name
    file.write_bytes(file.read_bytes()[:-100])
    error = error_line(rehearse_inputs(copy.parent, f"--config.data.dir={copy}"))
    assert name in error and error.endswith("if the file was cut, download and unpack it again")


def test_many_faults_are_printed_and_the_error_names_the_first(here):
    flags = (f"--config={RECIPE}", "--data_only", "--config.data.dir=weights")
    result = run_here("rehearse", *flags, cwd=here)
    assert result.returncode == 2
    error = error_line(result)
    assert "config.sft.sources.combined.uri" in error and not error.endswith(" more")
    # Three files are missing. Several sources need each.
    assert error.count("No such file or directory") == 3
    assert "(also eval/refcoco_testB, eval/refcoco_val)" in error


# paths


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The user's folder, with a folder of data and one of weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data/refcoco").mkdir(parents=True)
    (tmp_path / "weights/pg2_448").mkdir(parents=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.dir=data/refcocoo", "data/refcocoo does not exist: did you mean data/refcoco?"),
        ("data.dir=dta/refcoco", "dta/refcoco does not exist: did you mean data?"),
        ("data.dir=weights/refs", "weights/refs does not exist: weights has pg2_448"),
        ("data.dir=weights/pg2_448", "weights/pg2_448 is empty"),
        ("init=weights/pg2_44", "weights/pg2_44 does not exist: did you mean weights/pg2_448?"),
        ("init=weights/nothing", "weights/nothing does not exist: weights has pg2_448"),
        ("data.tokenizer=weights/pg2", "weights/pg2 does not exist: did you mean weights/pg2_448?"),
        ("data.tokenizer=weigths", "weigths does not exist: did you mean weights?"),
        ("eval.vqvae=data/vqvae.npz", "data/vqvae.npz does not exist: data has refcoco"),
        ("init=weight.npz", "weight.npz does not exist: did you mean weights?"),
        ("init=weights/pg2_448", "weights/pg2_448 is not a checkpoint: neither a Hugging Face"),
    ],
)
def test_a_typed_path_without_files_fails(here, flag, message):
    flags = (f"--config={RECIPE}", "--nocompile", "--norun", f"--config.{flag}")
    result = run_here("rehearse", *flags, cwd=here)
    assert result.returncode == 2 and "FAILED" in result.stdout
    setting = flag.partition("=")[0]
    separator = ": " if "not a checkpoint" in message else "="
    assert f"error: config.{setting}{separator}{message}" in error_line(result)
    if setting == "data.dir":
        result = run_here("rehearse", f"--config={RECIPE}", "--data_only", flags[-1], cwd=here)
        assert f"error: --data_only: config.{setting}={message}" in error_line(result)


def test_a_typed_tokenizer_counts_in_a_check_of_the_data(here, miniature):
    flags = (f"--config.data.dir={miniature}", "--config.data.tokenizer=weights/pg2")
    result = run_here("rehearse", "--data_only", f"--config={RECIPE}", *flags, cwd=here)
    assert result.returncode == 2 and error_line(result).endswith("did you mean weights/pg2_448?")


@pytest.mark.parametrize(("folder", "fault"), [("refcoco", "is empty"), ("", "does not exist")])
def test_data_that_the_recipe_names_may_be_absent(here, folder, fault):
    if not folder:
        (here / "data/refcoco").rmdir()
    result = run_here("rehearse", f"--config={RECIPE}", "--nocompile", "--norun", cwd=here)
    assert result.returncode == 0, result.stderr
    assert f"a miniature, because data/refcoco {fault}" in result.stdout
    assert "there is no checkpoint.npz here: --config.init=FOLDER names yours" in result.stdout
    assert f"nothing is in {here / 'data/refcoco'}" in result.stdout
    result = run_here("rehearse", f"--config={RECIPE}", "--data_only", cwd=here)
    assert result.returncode == 2 and error_line(result) == (
        f"error: --data_only: config.data.dir (data/refcoco) {fault}: get the data first "
        "(the docstring of configs/refcoco.py says how)"
    )


def tiny_inputs(init: Path, *flags: str) -> Any:
    inputs = ("--config=configs/tiny.py", "--topology=v5e:1x1", "--nocompile", "--norun")
    return run_here("rehearse", *inputs, f"--config.init={init}", *flags)


def write_tiny(path: Path) -> None:
    model = parse(run_recipe(ROOT / "configs" / "tiny.py").get_config()).model
    save(path, random_params(PaliGemma(model)), model)


@pytest.mark.slow
def test_weights_are_opened_as_the_run_does(tmp_path):
    write_tiny(tmp_path / "a.npz")
    result = tiny_inputs(tmp_path / "a.npz")
    assert result.returncode == 0, result.stderr
    assert "a.npz has the model's arrays (their values were not read)" in result.stdout
    wider = tiny_inputs(tmp_path / "a.npz", "--config.model.text.mlp_dim=160")
    assert wider.returncode == 2 and "mlp" in error_line(wider)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:5000])
    assert "b.npz" in error_line(tiny_inputs(tmp_path / "b.npz"))


@pytest.mark.slow
def test_a_folder_of_weights_lacks_a_file(tmp_path):
    folder = tmp_path / "weights"
    write_tiny(folder)
    assert tiny_inputs(folder).returncode == 0
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    error = error_line(tiny_inputs(folder))
    assert "has model-00001-of-00002.safetensors, but neither model.safetensors nor" in error
    (folder / "config.json").unlink()
    assert "it has no config.json" in error_line(tiny_inputs(folder))


# limits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hours=0.1",), "--hours=0.1 cannot be checked: libtpu is not installed: pip install"),
        (("--hours=2", "--nocompile"), "--hours=2 cannot be checked: leave --nocompile out"),
        (("--disk_gb=0.001", "--nocompile"), "--disk_gb=0.001: the run writes"),
        (("--hours=2", "--data_only"), "--hours=2 is not checked with --data_only"),
        (("--disk_gb=2", "--data_only"), "--disk_gb=2 is not checked with --data_only"),
    ],
)
def test_a_limit_that_cannot_be_checked_fails(monkeypatch, flags, message):
    monkeypatch.setattr(importlib.util, "find_spec", without_libtpu(importlib.util.find_spec))
    inputs = ("--config=configs/tiny.py", "--topology=v5e:1x1", "--norun")
    result = run_here("rehearse", *inputs, *flags)
    assert result.returncode == 2 and error_line(result).startswith(f"error: {message}")


def without_libtpu(find_spec: Any) -> Any:
    return lambda name, *others: None if name == "libtpu" else find_spec(name, *others)


def test_hours_need_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", without_libtpu(importlib.util.find_spec))
    inputs = ("--config=configs/tiny.py", "--topology=v5e:1x1", "--norun")
    result = run_here("rehearse", *inputs)
    assert result.returncode == 0, result.stderr
    assert "libtpu is not installed: pip install -e '.[tpu]'" in result.stdout


def test_a_batch_that_does_not_fit_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", without_libtpu(importlib.util.find_spec))
    flags = ("--norun", "--config.sft.batch_size=80000", "--config.grpo.batch_size=80000")
    result = run_here("rehearse", "--config=configs/tiny.py", "--topology=v5e:1x1", *flags)
    assert result.returncode == 2 and len(error_line(result)) < 200
    assert re.match(
        r"error: the programs do not fit v5e:1x1 \(.*\d.*\)(: .*)?$", error_line(result)
    )
    assert "│" in result.stdout or "---" in result.stdout


@pytest.mark.slow
def test_a_recipe_of_one_gpu_is_rehearsed(tmp_path):
    config = "--config=configs/refcoco.py:pg2_3b_224_lora_h100"
    result = run_here("rehearse", config, "--norun", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "Rehearsal for one GPU" in result.stdout and "GB of checkpoints" in result.stdout
    states = {line.split(" ")[0]: line for line in result.stdout.splitlines() if line}
    assert " ok " in states["memory"] and "of 80 GB by arithmetic, not compiled" in states["memory"]
    assert " ok " in states["hours"] and "h at best by arithmetic, " in states["hours"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hours=0.5", "--hours=0.5: the run needs 1.0 h at best by arithmetic"),
        ("--config.sft.batch_size=2048", "sft needs about "),
        ("--config.model.remat=none", "by arithmetic, and one H100 has 80 GB: choose a smaller"),
    ],
)
def test_one_gpu_that_is_too_small_or_too_slow_is_found(flag, message, tmp_path):
    config = "--config=configs/refcoco.py:pg2_3b_224_lora_h100"
    result = run_here("rehearse", config, "--norun", f"--out={tmp_path / 'out'}", flag)
    assert result.returncode == 2 and "FAILED" in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_folder_that_exists_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    result = rehearse_inputs(tmp_path)
    assert result.returncode == 2 and "exists already" in result.stderr


# the small run


def test_the_small_run_has_the_kinds_of_the_real_one():
    real = recipe("pg2_3b_448_lora_v5e_1")
    small = shrink(real, 4, "t.model", "cache")
    assert small.model.text.vocab_size == real.model.text.vocab_size == 257_152
    assert small.model.image_size == 448 and small.model.text.depth == small.model.vision.depth == 2
    assert small.model.lora.rank == 4 and small.model.frozen_dtype == "bfloat16"
    assert small.stages == real.stages and small.grpo.rewards == real.grpo.rewards
    assert (small.sft.batch_size, small.grpo.batch_size) == (4, 4)
    parse(dataclasses.asdict(small))
    widths = [(model.text.width, model.vision.width) for model in (real.model, small.model)]
    assert widths == [(2304, 1152), (144, 144)]


def test_the_stand_in_has_paligemmas_ids(tmp_path):
    file = tmp_path / "t.model"
    file.write_bytes(stand_in_tokenizer(257_152))
    loaded = tokenizer.load(str(file))
    assert loaded.vocab[:3] == (257_152, 256_000, 257_024)
    assert loaded.suffix("<loc0000><loc1023>") == [256_000, 257_023, 1]
    assert loaded.decode(loaded.suffix("red circle")) == "red circle"


def test_the_small_run_has_room_for_the_suffixes_of_its_data(tmp_path):
    config = parse(run_recipe(ROOT / "configs" / "detection.py").get_config("pg2_3b_448_v5e_8"))
    write_miniatures(config, tmp_path)
    config = replace(config, data=replace(config.data, dir=str(tmp_path)))
    file = tmp_path / "t.model"
    file.write_bytes(stand_in_tokenizer(257_152))
    pieces = tokenizer.load(str(file))
    examples = open_examples("sft/train", config.sft.sources["train"], config.data, 56)
    longest = max(len(pieces.suffix(example.suffix)) for example in examples)
    assert data.longest_suffix(config, pieces) == longest < config.data.suffix_length / 4


# costs


def test_hours_are_steps_times_seconds():
    config = recipe()
    programs = {"sft": 1.0, "rollout": 0.2, "update": 0.8, "evaluation": 0.5}
    document = {"programs": {name: {"step_s": seconds} for name, seconds in programs.items()}}
    questions = dict.fromkeys(config.eval.sources, 1280)  # ten batches of 128
    cost = costs.run_costs(config, 8, document, questions)
    assert cost.chips == 8
    assert cost.hours["sft"] == pytest.approx(1250 / 3600)
    assert cost.hours["grpo"] == pytest.approx(2000 * 1.0 / 3600)
    # 512 questions of 8 splits at the start, 6 times within SFT and 9 times within GRPO; all twice
    batches = 8 * 4 * (1 + 6 + 9) + 2 * 8 * 10
    assert cost.hours["evaluations"] == pytest.approx(batches * 0.5 / 3600)
    # The program `update` does all updates of a step.
    two_updates = replace(config, grpo=replace(config.grpo, num_iterations=2))
    cost = costs.run_costs(two_updates, 8, document, questions)
    assert cost.hours["grpo"] == pytest.approx(2000 * 1.0 / 3600)


def test_disk_is_that_of_the_checkpoints():
    """PaliGemma 1 3B has 2.92 billion parameters; Adam has two numbers for each of them."""
    size = costs.checkpoint_bytes(recipe(), 8)
    assert size == pytest.approx((3 * 3 + 1) * 4 * 2.9235e9, rel=1e-3)  # two, one that is written


@pytest.mark.slow
@pytest.mark.needs("libtpu")
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hours=0.1", "--hours=0.1: the run needs"),
        ("--disk_gb=50", "--disk_gb=50: the run writes 117 GB"),
    ],
)
def test_a_slice_that_is_too_small_is_found(flag, message, environment, tmp_path):
    flags = (f"--config={RECIPE}", f"--out={tmp_path / 'out'}", "--norun", flag)
    result = run(environment, "rehearse", *flags)
    assert result.returncode == 2
    assert message in result.stderr and "chip-hours" in result.stdout


@pytest.mark.slow
def test_a_whole_recipe_is_rehearsed(environment, tmp_path):
    out = tmp_path / "out"
    result = run(environment, "rehearse", f"--config={RECIPE}", "--nocompile", f"--out={out}")
    assert result.returncode == 0, result.stderr
    for name in ("train", "resume", "evaluate", "export"):
        assert f"\n{name} " in result.stdout and "FAILED" not in result.stdout
    lines = (out / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert max(steps) == 5 and (out / "export/model.safetensors").exists()
    metrics = json.loads((out / "scores/eval.json").read_text())
    assert len(metrics["sources"]) == 8


FLAGSHIPS = ("detection", "gui", "pixmo_points", "refcoco")


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_every_flagship_recipe_has_a_miniature(name, tmp_path):
    """Each source is opened and read, as the run does. The images of PixMo are fetched."""
    module = run_recipe(ROOT / "configs" / f"{name}.py")
    for recipe_name in module.RECIPES:
        config = parse(module.get_config(recipe_name))
    config, kind = data.prepare(config, tmp_path / "data")
    assert kind.startswith("a miniature, because data/")
    counts = data.check_sources(config, is_miniature=True)
    assert counts.keys() == config.eval.sources.keys()


def test_pictures_of_pixmo_come_from_the_web(tmp_path):
    """An image with another hash is a bad record, and the check names its source."""
    config = parse(run_recipe(ROOT / "configs/pixmo_points.py").get_config())
    config, _ = data.prepare(config, tmp_path / "data")
    name, source = "held_out", replace(config.eval.sources["held_out"], sampling="all")
    examples = open_examples(name, source, config.data, 28)
    texts = [examples[index].suffix for index in range(len(examples))]
    assert texts[-1] == "" and all(text.startswith("<loc") for text in texts[:-1])
    for file in (tmp_path / "data" / "web").glob("pixmo-points-train*"):
        file.write_bytes(b"another image")
    shutil.rmtree(tmp_path / "data" / "fetched")
    with pytest.raises(
        UserError, match=r"points: 6 of 6 questions cannot be used \(6 wrong_sha256"
    ):
        data.check_sources(config, is_miniature=True)


def test_the_guide_of_each_flagship_names_its_commands():
    """A newcomer has only the docstring."""
    for name in FLAGSHIPS:
        guide = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
        for word in ("rehearse", "data/", "hf download", "train", "evaluate", "convert", "Hours"):
            assert word in guide, (name, word)
        assert "TABLE" not in guide
        recipes = run_recipe(ROOT / "configs" / f"{name}.py").RECIPES
        for line in guide.splitlines():
            if line.startswith("pg") and "v" in line:
                assert line.split()[0] in recipes, line


def pixmo_with_bad_rows(folder: Path, bad: int) -> Config:
    """Returns the recipe of PixMo-Points, whose first `bad` images of counts are no images."""
    config = parse(run_recipe(ROOT / "configs/pixmo_points.py").get_config())
    config, _ = data.prepare(config, folder)
    for number in range(bad):
        (folder / "web" / f"pixmo-count-train-00000-of-00001-{number}.png").write_bytes(b"another")
    return config


@pytest.mark.parametrize("bad", [0, 1, 5])
def test_the_picture_of_the_export_is_the_first_that_can_be_used(tmp_path, bad):
    config = pixmo_with_bad_rows(tmp_path / "data", bad)
    name, source = next(iter(config.grpo.sources.items()))
    examples = open_examples(name, source, config.data, config.model.image_size)
    np.testing.assert_array_equal(np.asarray(data.first_image(config)), examples[bad].image)


def test_a_source_without_a_picture_is_one_line(tmp_path):
    config = pixmo_with_bad_rows(tmp_path / "data", 6)
    with pytest.raises(UserError) as error:
        data.first_image(config)
    text = "config.grpo.sources.counts: no question can be used; question 0: "
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


WAITING = """#!/bin/sh
trap "" INT TERM HUP
echo $$ >> "$PIDS"
while true; do sleep 0.1; done
"""
"""Takes the place of Python in the rehearsal's processes. Only SIGKILL ends it."""

DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from pg_ground import cli, rehearse
sys.executable = sys.argv[1]
cli.run(rehearse.COMMAND, rehearse.main, sys.argv[2:])
"""


def children_of(number: int) -> list[int]:
    """Returns the processes that a process has started. Only Linux says so."""
    file = Path(f"/proc/{number}/task/{number}/children")
    if not file.exists():
        pytest.skip("there is no /proc with children")
    return [int(text) for text in file.read_text().split()]


MANY_ROWS = """
from ml_collections import ConfigDict
from pg_ground import config
from pg_ground.config import Source

def get_config():
    c = config.template()
    c.stages = ("sft",)
    c.sft.sources = {"rows": config.section(Source(uri="jsonl:ROWS", boxes="box"))}
    return c
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_check_of_all_records_that_is_ended_takes_its_processes_with_it(
    environment, tmp_path, ending, code
):
    Image.fromarray(np.zeros((2000, 3000, 3), np.uint8)).save(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "phrase": "cat", "box": [0, 0, 9, 9]})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 100_000)  # an hour
    recipe_file = tmp_path / "recipe.py"
    recipe_file.write_text(MANY_ROWS.replace("ROWS", str(tmp_path / "rows.jsonl")))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, sys.executable, f"--config={recipe_file}", "--data_only"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    numbers: list[int] = []
    try:
        while process.poll() is None and len(numbers) < 3:  # two that read, and their tracker
            time.sleep(0.05)
            numbers = children_of(process.pid)
        time.sleep(0.5)
        process.send_signal(ending)
        output = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == code, output
    deadline = time.monotonic() + 10
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    orphans = [number for number in numbers if is_running(number)]
    for number in orphans:
        os.kill(number, signal.SIGKILL)
    assert numbers and not orphans


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_rehearsal_that_is_ended_takes_its_processes_with_it(environment, tmp_path, ending, code):
    """The signal comes to the rehearsal alone, as from a job scheduler."""
    (tmp_path / "python").write_text(WAITING)
    (tmp_path / "python").chmod(0o755)
    pids, out = tmp_path / "pids", tmp_path / "out"
    flags = ("--config=configs/tiny.py", "--topology=v5e:1x1", "--nocompile", f"--out={out}")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "python"), *flags],
        env={**environment, "PIDS": str(pids)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while process.poll() is None and not (pids.exists() and len(pids.read_text().split()) == 2):
            time.sleep(0.05)
        numbers = [int(text) for text in pids.read_text().split()]
        assert all(map(is_running, numbers))
        process.send_signal(ending)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == code, output
    assert not any(map(is_running, numbers))
    (line,) = [
        line for line in output.splitlines() if line.startswith("train ") and "…" not in line
    ]
    assert "FAILED" in line and line.endswith("stopped")
