"""A run whose newest checkpoint is damaged continues from the newest whole one, and says so."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from commands import ROOT, assert_same_run, run, run_here, train_tiny

from pg_ground.checkpoints import manager, run_directory
from pg_ground.checkpoints.manager import Checkpoints, Damaged, save_tree
from pg_ground.parallel import multiprocess
from pg_ground.params import flatten
from pg_ground.training.grpo import GrpoStage
from pg_ground.training.loop import resume_point, store_frozen
from pg_ground.types import POLICY, TrainState, UserError


def remove(*names: str) -> Callable[[Path], None]:
    """Returns a damage: files and folders of a checkpoint are missing."""

    def damage(step: Path) -> None:
        for name in names:
            shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()

    return damage


def write(name: str, content: str) -> Callable[[Path], None]:
    """Returns a damage: a file of a checkpoint has another content."""
    return lambda step: (step / name).write_text(content)


def cut(part: str, size: int) -> Callable[[Path], None]:
    """Returns a damage: the files with the values of a part end after `size` bytes."""

    def damage(step: Path) -> None:
        for file in (step / part).rglob("*"):
            if file.is_file() and "d" in file.parts:
                file.write_bytes(file.read_bytes()[:size])

    return damage


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


FAULTS = {
    "params": (remove("params"), "params is missing"),
    "rest": (remove("rest"), "rest is missing"),
    "record": (remove("record"), "record is missing"),
    "names": (remove("params/_METADATA"), "params/_METADATA is missing"),
    "all names": (
        remove("_CHECKPOINT_METADATA", "rest/_METADATA"),
        "rest/_METADATA is missing",
    ),
    "names cut": (write("rest/_METADATA", '{"tree_me'), "rest/_METADATA is no JSON object"),
    "record cut": (write("record/metadata", '{"stage": "sf'), "record/metadata is no JSON object"),
    "record empty": (write("record/metadata", ""), "record/metadata is no JSON object"),
    "record list": (write("record/metadata", "[]"), "record/metadata is no JSON object"),
    "values": (remove("params/d", "params/ocdbt.process_0", "params/manifest.ocdbt"), "no data"),
    "manifest": (remove("rest/manifest.ocdbt"), "rest/manifest.ocdbt is missing"),
}

LATE_FAULTS = {
    "params cut": cut("params", 10),
    "params empty": cut("params", 0),
    "rest cut": cut("rest", 100),
    "manifest empty": write("params/manifest.ocdbt", ""),
    "manifest other": write("rest/manifest.ocdbt", "manifest"),
    "files": remove("rest/d"),
}
"""Damages of the values, which orbax finds while it reads them."""


def state(value: float) -> TrainState:
    """Returns a small state whose values are `value`."""
    weights = {"w": jnp.full((40, 30), value)}
    return TrainState(jnp.int32(value), {POLICY: weights}, {"mu": weights}, jnp.float32(0))


STATES = {"sft": lambda: state(0)}


def save(folder: Path) -> None:
    """Writes three checkpoints, which hold their steps as values."""
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in (2, 5, 7):
            checkpoints.save(step, state(step), {"stage": "sft", "step": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder)
    return folder


def resume(folder: Path) -> tuple[int, float]:
    """Resumes, and returns the step and the values of the checkpoint. Then writes step 7 anew."""
    with Checkpoints(folder, keep=9) as checkpoints:
        resumed = resume_point(checkpoints, STATES)
        assert resumed is not None and resumed.record["step"] == resumed.step
        value = float(resumed.state.params[POLICY]["w"].mean())
        assert int(resumed.state.step) == resumed.step == value
        if resumed.step < 7:
            checkpoints.save(7, state(7), {"stage": "sft", "step": 7})
    return resumed.step, value


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_continues_before_a_checkpoint_without_a_file(saved, tmp_path, caplog, name):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage, reason = FAULTS[name]
    damage(folder / "7")
    assert resume(folder) == (5, 5.0)
    assert f"{folder}/7 is damaged (" in caplog.text and reason in caplog.text
    assert "continues from checkpoint 5, and writes the damaged one again" in caplog.text
    caplog.clear()
    assert resume(folder) == (7, 7.0)
    assert not caplog.text


def test_a_checkpoint_that_was_only_begun_is_named(saved, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    empty(folder / "7")
    assert resume(folder) == (5, 5.0)
    assert f"{folder}/7 is not complete" in caplog.text
    assert resume(folder) == (7, 7.0)


@pytest.mark.slow
def test_a_run_continues_before_damaged_values(saved, tmp_path):
    """In another process: orbax leaves work in its process after the error."""
    program = (
        "import sys, json, pathlib\n"
        "sys.path.insert(0, 'tests')\n"
        "import test_damaged_checkpoints as t\n"
        "for path in sys.argv[1:]: print(json.dumps(t.resume(pathlib.Path(path))))"
    )
    folders = []
    for name, damage in LATE_FAULTS.items():
        folders.append(tmp_path / name.replace(" ", "_"))
        shutil.copytree(saved, folders[-1])
        damage(folders[-1] / "7")
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["[5, 5.0]"] * len(folders)
    for folder in folders:
        assert finished.stderr.count(f"{folder}/7 is damaged (") == 1
        assert not run_directory.fault(folder / "7")
    assert "Traceback" not in finished.stderr


def test_a_run_continues_before_several_damaged_checkpoints(saved, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    remove("params")(folder / "7")
    remove("record")(folder / "5")
    assert resume(folder) == (2, 2.0)
    assert caplog.text.count("continues from checkpoint 2") == 2
    assert [run_directory.is_complete(folder / step) for step in "257"] == [True, False, True]


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in ("2", "5", "7"):
        remove("rest")(folder / step)
    with Checkpoints(folder, keep=9) as checkpoints, pytest.raises(UserError) as error:
        resume_point(checkpoints, STATES)
    assert f"no checkpoint of {folder} can be restored: {folder}/7 is damaged" in str(error.value)
    assert "choose another --workdir" in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5", "7"]


def test_a_process_that_sees_no_damage_goes_back_with_the_others(saved, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    elsewhere = iter(["7 is damaged (its second shard)", ""])

    def gather(value):
        return [value, next(elsewhere)] if value == "" else [value, value]

    monkeypatch.setattr(multiprocess, "all_gather", gather)
    with Checkpoints(folder, keep=9) as checkpoints:
        resumed = resume_point(checkpoints, STATES)
    assert resumed is not None and resumed.step == resumed.record["step"] == 5
    assert sorted(run_directory.steps(tmp_path)) == [2, 5]


def test_the_steps_are_those_of_process_0(saved, tmp_path, monkeypatch):
    """A network drive can show another process an older list."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    with Checkpoints(folder, keep=9) as checkpoints:
        all_steps = checkpoints.steps()
        monkeypatch.setattr(checkpoints, "steps", lambda: all_steps[1:])
        monkeypatch.setattr(
            multiprocess,
            "all_gather",
            lambda value: [value if isinstance(value, str) else all_steps],
        )
        resumed = resume_point(checkpoints, STATES)
    assert resumed is not None and resumed.step == 7


def test_a_checkpoint_of_other_settings_is_not_damaged(saved, tmp_path):
    """An older checkpoint would have the same other parts."""

    weights = {"w": jnp.zeros((40, 30))}
    wider = state(0)._replace(params={POLICY: {"w": jnp.zeros((40, 31))}})
    other_optimizer = state(0)._replace(opt_state={"mu": weights, "nu": weights})
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for abstract in (wider, other_optimizer):
        with Checkpoints(folder, keep=9) as checkpoints, pytest.raises(UserError) as error:
            resume_point(checkpoints, {"sft": lambda abstract=abstract: abstract})
        assert not isinstance(error.value, Damaged)
        assert f"{folder}/7 has other parts than this version's runs" in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5", "7"]


def test_an_error_of_the_machine_is_no_damage(saved, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for error in (MemoryError("no memory"), PermissionError(13, "Permission denied")):
        with Checkpoints(folder, keep=9) as checkpoints:

            def fail(folder, abstract, error=error):
                raise ValueError("orbax") from error

            monkeypatch.setattr(manager, "_restore_part", fail)
            with pytest.raises(ValueError, match="orbax"):
                resume_point(checkpoints, STATES)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5", "7"]


# commands that read the weights of a run


@pytest.mark.slow
def test_weights_are_read_from_the_newest_checkpoint_with_parameters(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    numbers = sorted(run_directory.steps(workdir))
    newest = workdir / "checkpoints" / str(numbers[-1])
    older = workdir / "checkpoints" / str(numbers[-2])
    remove("rest")(newest)
    assert run_directory.newest(workdir) == newest  # the weights are there
    remove("params")(newest)
    finished = run_here("convert", str(workdir), str(tmp_path / "a.npz"))
    assert finished.returncode == 0, finished.stderr
    line = f"{newest} is damaged (params is missing): checkpoint {older.name} is taken"
    assert finished.stderr.count(line) == 1
    finished = run_here("convert", str(newest), str(tmp_path / "b.npz"))
    assert finished.returncode == 2
    assert f"{newest} is damaged (params is missing); {older} is the newest" in finished.stderr
    for step in numbers[:-1]:
        remove("params/_METADATA")(workdir / "checkpoints" / str(step))
    finished = run_here("convert", str(workdir), str(tmp_path / "c.npz"))
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert f"{newest} is damaged (params is missing)" in finished.stderr


# whole runs

RUN_FAULTS = {
    "params cut": cut("params", 10),
    "params": remove("params"),
    "rest": remove("rest"),
    "names": remove("_CHECKPOINT_METADATA", "params/_METADATA"),
    "record": write("record/metadata", "{"),
    "rest cut": cut("rest", 50),
    "empty": empty,
}


def continue_damaged(environment, tiny_run: Path, workdir: Path, damage) -> str:
    """Damages the newest checkpoint of a finished run, starts the run again and returns stderr.

    Fails if the run is not the same as before.
    """
    shutil.copytree(tiny_run, workdir)
    newest = max(run_directory.steps(workdir))
    damage(workdir / "checkpoints" / str(newest))
    finished = train_tiny(environment, workdir)
    assert finished.returncode == 0, finished.stderr
    assert_same_run(workdir, tiny_run)
    assert "Traceback" not in finished.stderr
    return finished.stderr


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_ends_as_the_undamaged_one(environment, tiny_run, tmp_path):
    log = continue_damaged(environment, tiny_run, tmp_path / "run", cut("params", 10))
    assert log.count(" is damaged (") == 1 and "continues from checkpoint" in log


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUN_FAULTS)[1:])
def test_every_damage_of_a_run_leads_to_the_same_end(environment, tiny_run, tmp_path, name):
    log = continue_damaged(environment, tiny_run, tmp_path / "run", RUN_FAULTS[name])
    assert log.count(" is not complete" if name == "empty" else " is damaged (") == 1


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_ends_with_one_line(environment, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    for step in run_directory.steps(workdir):
        remove("params")(workdir / "checkpoints" / str(step))
    finished = run(environment, "train", "--config=configs/tiny.py", f"--workdir={workdir}")
    assert finished.returncode == 2
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "can be restored" in errors[0]
    assert json.loads((workdir / "config.json").read_text())["stages"]


def drop_largest(folder: Path) -> None:
    """Removes the largest file of a tree: the file of its values."""
    max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).unlink()


def cut_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])


@pytest.mark.parametrize("damage", [shutil.rmtree, drop_largest, cut_all])
@pytest.mark.parametrize("name", ["frozen", "reference"])
def test_a_damaged_tree_beside_the_checkpoints_is_one_line_with_advice(name, damage, tmp_path):
    tree = {"llm": {"w": jnp.arange(4096, dtype=jnp.float32)}}
    save_tree(tmp_path / name, tree)
    damage(tmp_path / name)
    runtime: Any = SimpleNamespace(workdir=tmp_path)
    stage: Any = SimpleNamespace(_runtime=runtime)
    state = TrainState(jnp.int32(5), {POLICY: tree}, (), jnp.float32(0))
    abstract = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for key, leaf in flatten(tree).items()
    }
    with pytest.raises(UserError) as error:
        if name == "frozen":
            store_frozen(tmp_path, abstract, None)
        else:
            GrpoStage._reference_policy(stage, state)
    message = str(error.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message
    assert f"writes the same {name}" in message and "can be copied" in message
