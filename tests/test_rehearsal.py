"""A rehearsal finds what would stop the real run, in one line, and says what the run will cost."""

import dataclasses
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, run, run_here
from sentencepiece import sentencepiece_model_pb2

from pg_ground import tokenizer
from pg_ground.cli import run_recipe
from pg_ground.config import Config, parse
from pg_ground.data.datasets import open_examples
from pg_ground.rehearsal import costs, data
from pg_ground.rehearsal.miniatures import write_miniatures
from pg_ground.rehearsal.shrinking import shrink
from pg_ground.rehearsal.stand_in_tokenizer import stand_in_tokenizer
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
    with pytest.raises(UserError, match="--topology is needed: one of v4"):
        topology_of(name)


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


def test_another_number_of_questions_than_published_is_found(miniature, tmp_path):
    result = rehearse_inputs(tmp_path, f"--config.data.dir={miniature}")
    assert result.returncode == 2
    assert "refcoco+_testA has 5726 questions, but there are 24" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("data") and "FAILED" in result.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.grpo.batch_size=60", "config.grpo.batch_size is 60: it must be a multiple of 8"),
        ("--config.eval.batch_size=12", "config.eval.batch_size is 12: it must be a multiple of 8"),
        ("--config.mesh.model=3", "8 devices"),
        ("--config.data.tokenizer=WITHOUT", "is not piece"),
        ("--config.data.tokenizer=SMALL", "but the model (model.text.vocab_size) has 257152"),
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


def test_a_recipe_of_one_gpu_is_rehearsed(tmp_path):
    config = "--config=configs/refcoco.py:pg2_3b_224_lora_h100"
    result = run_here("rehearse", config, "--norun", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "Rehearsal for one GPU" in result.stdout and "GB of checkpoints" in result.stdout


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


# costs


def test_hours_are_steps_times_seconds():
    config = recipe()
    programs = {"sft": 1.0, "rollout": 0.2, "update": 0.8, "evaluation": 0.5}
    document = {"programs": {name: {"step_s": seconds} for name, seconds in programs.items()}}
    questions = dict.fromkeys(config.eval.sources, 1280)  # ten batches of 128
    cost = costs.run_costs(config, "v5e:2x4", document, questions)
    assert cost.chips == 8
    assert cost.hours["sft"] == pytest.approx(1250 / 3600)
    assert cost.hours["grpo"] == pytest.approx(2000 * 1.0 / 3600)
    # 512 questions of 8 splits at the start, 6 times within SFT and 9 times within GRPO; all twice
    batches = 8 * 4 * (1 + 6 + 9) + 2 * 8 * 10
    assert cost.hours["evaluations"] == pytest.approx(batches * 0.5 / 3600)
    two_updates = replace(config, grpo=replace(config.grpo, num_iterations=2))
    cost = costs.run_costs(two_updates, "v5e:2x4", document, questions)
    assert cost.hours["grpo"] == pytest.approx(2000 * 1.8 / 3600)


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
        ("--disk_gb=50", "--disk_gb=50: the run needs"),
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
