"""Which settings a run can change when it continues."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pg_ground.checkpoints.run_directory import COMMIT_FILE
from pg_ground.config import Config, Grpo, Mesh, Optimizer, Sft, Source
from pg_ground.training.run_config import check_run_config
from pg_ground.types import UserError

SOURCES = {"boxes": Source(uri="jsonl:/old/a.jsonl", boxes="box")}
OLD = Config(
    stages=("sft", "grpo"),
    init="/old/weights.npz",
    sft=Sft(steps=6, sources=SOURCES),
    grpo=Grpo(steps=6, sources=SOURCES),
)


def write_run(workdir: Path, step: int, config: Config = OLD) -> Path:
    """Returns a directory with the settings and a checkpoint of a run at a step."""
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / COMMIT_FILE).touch()
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return workdir


def with_grpo(**changes) -> Config:
    return replace(OLD, grpo=replace(OLD.grpo, **changes))


def with_sft(**changes) -> Config:
    return replace(OLD, sft=replace(OLD.sft, **changes))


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (OLD, 8),
        (with_grpo(steps=60), 8),
        (with_grpo(steps=60), 12),
        (with_sft(steps=9), 6),
        (with_grpo(steps=3), 9),
        (replace(OLD, init="/new/weights.npz"), 8),
        (replace(OLD, mesh=Mesh(replica=2)), 8),
        (replace(OLD, data=replace(OLD.data, workers=3)), 8),
        (replace(OLD, eval=replace(OLD.eval, every=7)), 8),
    ],
    ids=[
        "the same", "more steps", "more steps of a finished run", "more steps of the first stage",
        "fewer steps", "weights at another path", "mesh", "data workers", "evaluation",
    ],
)  # fmt: skip
def test_a_change_that_does_not_change_the_steps_made_is_accepted(tmp_path, config, step):
    check_run_config(write_run(tmp_path, step), config)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


COSINE = with_grpo(optimizer=Optimizer(schedule="cosine"))
MOVED = with_grpo(sources={"boxes": replace(SOURCES["boxes"], uri="jsonl:/new/a.jsonl")})


@pytest.mark.parametrize(
    ("old", "config", "accept"),
    [
        (OLD, with_grpo(group_size=2), "grpo.group_size"),
        (OLD, MOVED, "grpo.sources.boxes.uri"),
        (COSINE, replace(COSINE, grpo=replace(COSINE.grpo, steps=60)), "grpo.steps"),
    ],
    ids=["group size", "data at another path", "steps of a decaying learning rate"],
)
def test_a_refused_change_names_the_flag_that_accepts_it(tmp_path, old, config, accept):
    write_run(tmp_path, 8, old)
    with pytest.raises(UserError, match=f"or continue that run with --accept={accept}$"):
        check_run_config(tmp_path, config)
    check_run_config(tmp_path, config, [accept])


def test_a_section_accepts_all_its_settings(tmp_path):
    write_run(tmp_path, 8)
    check_run_config(tmp_path, MOVED, ["grpo.sources"])


@pytest.mark.parametrize(
    ("config", "accept", "message"),
    [
        (with_sft(steps=9), [], "config.sft.steps is 9, was 6: this stage has ended"),
        (with_sft(steps=9), ["sft.steps"], "config.sft.steps is 9, was 6: this stage has ended"),
        (with_grpo(steps=1), [], "config.grpo.steps is 1: the run has already made 2 steps"),
        (with_grpo(group_size=2), ["grpo.goup_size"], "--accept=grpo.goup_size: .*did you mean"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(tmp_path, config, accept, message):
    with pytest.raises(UserError, match=message):
        check_run_config(write_run(tmp_path, 8), config, accept)


def test_nothing_can_be_accepted_before_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint to continue"):
        check_run_config(tmp_path, OLD, ["grpo.steps"])
