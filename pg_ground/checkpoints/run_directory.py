"""Paths and settings in the working directory of a run.

WORKDIR/config.json                the settings of the run
WORKDIR/checkpoints/<step>/params  trained parameters; the newest `checkpoint.keep` steps stay
WORKDIR/best/<step>/params         parameters with the best evaluation, if `checkpoint.best`
                                   names a metric
WORKDIR/frozen                     parameters that are not trained, written once
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from pg_ground import config
from pg_ground.types import JsonDict, UserError

BEST = "best"

CONFIG_FILE = "config.json"


class RunCheckpoint(NamedTuple):
    """One checkpoint of a run."""

    workdir: Path
    folder: Path
    """`workdir/checkpoints/<step>` or `workdir/best/<step>`."""


def run_config(workdir: Path) -> config.Config:
    """Returns the configuration with which a run was started.

    Raises:
      UserError: the directory has no `config.json`, or its content is not a configuration.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{workdir} is not the working directory of a run: it has no {CONFIG_FILE}")
    return config.parse(read_json(file))


def is_run(folder: Path) -> bool:
    """Returns whether `folder` is the working directory of a run: `config.json` lists stages."""
    file = folder / CONFIG_FILE
    return file.is_file() and "stages" in read_json(file)


def find_checkpoint(path: Path) -> RunCheckpoint:
    """Returns the checkpoint that `path` means.

    `path` is a working directory (its newest checkpoint), a run's `best`, a step's folder, or the
    `params` folder of a step.

    Raises:
      UserError: `path` does not belong to a run, or the run has no checkpoint.
    """
    if (path / CONFIG_FILE).is_file():
        return RunCheckpoint(path, newest(path))
    if path.name == BEST and (path.parent / CONFIG_FILE).is_file():
        return RunCheckpoint(path.parent, best(path))
    step = path.parent if path.name == "params" else path
    if step.parent.name in ("checkpoints", BEST) and (step / "params").is_dir():
        return RunCheckpoint(step.parent.parent, step)
    raise UserError(
        f"{path} is not a checkpoint: "
        "neither a Hugging Face directory nor the working directory of a run "
        f"(it has no {CONFIG_FILE})"
    )


def best(folder: Path) -> Path:
    """Returns the folder of the newest step in a run's `best` folder.

    Raises:
      UserError: the folder holds no parameters.
    """
    step_folders = [step for step in folder.glob("*") if (step / "params").is_dir()]
    if not step_folders:
        raise UserError(
            f"{folder} is empty: "
            f"expected {folder}/<step>/params of a run with config.checkpoint.best"
        )
    return max(step_folders, key=lambda step: int(step.name))


def newest(workdir: Path) -> Path:
    """Returns the folder of a run's newest checkpoint.

    Raises:
      UserError: the run has no checkpoint.
    """
    numbers = steps(workdir)
    if not numbers:
        raise UserError(
            f"{workdir} has no checkpoint: expected {workdir / 'checkpoints'}/<step>/params"
        )
    return workdir / "checkpoints" / str(max(numbers))


def steps(workdir: Path) -> list[int]:
    """Returns the steps at which a run has a complete checkpoint."""
    return [
        int(folder.name)
        for folder in (workdir / "checkpoints").glob("*")
        if folder.name.isdigit() and (folder / "params").is_dir()
    ]


def check_can_rename(workdir: Path) -> None:
    """Raises UserError if folders in `workdir` cannot be renamed.

    Orbax writes a checkpoint into a folder and renames the folder when it is complete. A bucket
    without hierarchical namespace that is mounted with gcsfuse renames no folders. The run would
    end at its first checkpoint, hours after its start.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    probe, renamed = workdir / ".rename_probe", workdir / ".renamed_probe"
    for folder in (probe, renamed):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        probe.mkdir()
        (probe / "file").write_bytes(b"")
        probe.rename(renamed)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(
            f"--workdir={workdir}: folders cannot be renamed there ({error.strerror}), but a "
            "checkpoint needs that. If it is a mounted bucket, create the bucket with "
            "--enable-hierarchical-namespace, or mount it with --rename-dir-limit=100000"
        ) from error
    finally:
        for folder in (probe, renamed):
            shutil.rmtree(folder, ignore_errors=True)


def read_json(file: Path) -> JsonDict:
    """Returns the JSON object in `file`.

    Raises:
      UserError: the file does not contain a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not an object")
    return content
