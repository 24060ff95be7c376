"""Paths and settings in the working directory of a run.

WORKDIR/config.json                the settings of the run
WORKDIR/checkpoints/<step>/params  trained parameters; the newest `checkpoint.keep` steps stay
WORKDIR/best/<step>/params         parameters with the best evaluation, if `checkpoint.best`
                                   names a metric
WORKDIR/frozen                     parameters that are not trained, written once
"""

import functools
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pg_ground import config
from pg_ground.storage.paths import INSTALL_GCS, FilePath, children
from pg_ground.types import JsonDict, UserError

BEST = "best"

CONFIG_FILE = "config.json"

RECORD_FILES = (
    *("config.json", "hardware.json", "metrics.jsonl", "timeline.jsonl"),
    *("bad_records.jsonl", "wandb.json"),
)
RECORD_FOLDERS = ("samples", "tb")
"""The files and folders that a run which resumes reads or continues, besides its arrays."""

COMMIT_FILE = "commit_success.txt"
"""Orbax writes this file when all other files of a folder are written.

A folder that is renamed when it is complete would be no sign in a bucket: gs:// and most mounted
buckets rename no folders.
"""


PARTS = ("params", "rest", "record")
"""The folders of a checkpoint. Reading weights needs `params` only."""

TREE_METADATA = "_METADATA"
"""Orbax's file with the names of the arrays of a tree."""

NO_DATA = (TREE_METADATA, COMMIT_FILE, "_sharding", "array_metadatas")
"""Files and folders of a tree that hold no values."""

CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file with the times at which a checkpoint was begun and completed."""

RECORD_FILE = "metadata"
"""Orbax's file with the JSON of the part `record`."""

logger = logging.getLogger(__name__)


class RunCheckpoint(NamedTuple):
    """One checkpoint of a run."""

    workdir: FilePath
    folder: FilePath
    """`workdir/checkpoints/<step>` or `workdir/best/<step>`."""


def run_config(workdir: FilePath) -> config.Config:
    """Returns the configuration with which a run was started.

    Raises:
      UserError: the directory has no `config.json`, or its content is not a configuration.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{workdir} is not the working directory of a run: it has no {CONFIG_FILE}")
    return config.parse(read_json(file))


def is_run(folder: FilePath) -> bool:
    """Returns whether `folder` is the working directory of a run: `config.json` lists stages."""
    file = folder / CONFIG_FILE
    return file.is_file() and "stages" in read_json(file)


def find_checkpoint(path: FilePath) -> RunCheckpoint:
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
    is_step = step.parent.name in ("checkpoints", BEST) and step.name.isdigit()
    if is_step and step.is_dir():
        if not is_complete(step) and not is_complete(step / "params"):
            raise UserError(f"{step} is not complete: the run ended while it was written")
        if not (step / "params").is_dir():
            raise UserError(damage(step, "params is missing"))
        return RunCheckpoint(step.parent.parent, step)
    raise UserError(
        f"{path} is not a checkpoint: "
        "neither a Hugging Face directory nor the working directory of a run "
        f"(it has no {CONFIG_FILE})"
    )


def best(folder: FilePath) -> FilePath:
    """Returns the folder of the newest step in a run's `best` folder.

    Raises:
      UserError: the folder holds no parameters.
    """
    # `evaluate` can write files beside the steps.
    step_folders = [
        step for step in children(folder) if step.name.isdigit() and is_complete(step / "params")
    ]
    if not step_folders:
        raise UserError(
            f"{folder} is empty: "
            f"expected {folder}/<step>/params of a run with config.checkpoint.best"
        )
    return max(step_folders, key=lambda step: int(step.name))


def newest(workdir: FilePath) -> FilePath:
    """Returns the folder of a run's newest checkpoint whose parameters are whole.

    The names of damaged newer ones are logged.

    Raises:
      UserError: the run has no checkpoint, or all are damaged.
    """
    numbers = sorted(steps(workdir), reverse=True)
    folders = [workdir / "checkpoints" / str(number) for number in numbers]
    if not folders:
        raise UserError(
            f"{workdir} has no checkpoint: expected {workdir / 'checkpoints'}/<step>/params"
        )
    for folder in folders:
        if not fault(folder, ("params",)):
            break
    else:
        raise UserError(damage(folders[0], fault(folders[0], ("params",))))
    for damaged in folders[: folders.index(folder)]:
        _warn_of_damage(damaged, fault(damaged, ("params",)), folder)
    return folder


@functools.cache  # a command can ask for the newest checkpoint several times
def _warn_of_damage(damaged: FilePath, reason: str, folder: FilePath) -> None:
    logger.warning(
        "%s is damaged (%s): checkpoint %s is taken, the newest whole one",
        damaged, reason, folder.name,
    )  # fmt: skip


def fault(step: FilePath, parts: Sequence[str] = PARTS) -> str:
    """Returns what is missing in the folder of a checkpoint, or "" if nothing is.

    Only the names of files are read, and small files of JSON: values can still be damaged.
    """
    for part in parts:
        names = {path.name for path in children(step / part)}
        file = RECORD_FILE if part == "record" else TREE_METADATA
        if not names - {COMMIT_FILE}:
            return f"{part} is {'empty' if (step / part).is_dir() else 'missing'}"
        if file not in names:
            return f"{part}/{file} is missing"
        try:
            read_json(step / part / file)
        except UserError:
            return f"{part}/{file} is no JSON object"
        if part != "record" and not names - set(NO_DATA):
            return f"{part} has no data"
        if "d" in names and "manifest.ocdbt" not in names:
            return f"{part}/manifest.ocdbt is missing"
    return ""


def damage(step: FilePath, reason: str) -> str:
    """Returns an error that says why the parameters of a checkpoint cannot be read, and names the
    newest older checkpoint that has parameters."""
    older = older_checkpoint(step, ("params",))
    text = f"{step} is damaged ({reason})"
    return f"{text}; {older} is the newest whole one before it" if older else text


def older_checkpoint(step: FilePath, parts: Sequence[str] = PARTS) -> FilePath | None:
    """Returns the newest complete checkpoint before `step` that has these parts; None if there is
    none."""
    folders = [
        folder
        for folder in children(step.parent)
        if folder.name.isdigit() and step.name.isdigit() and int(folder.name) < int(step.name)
        if is_complete(folder) and not fault(folder, parts)
    ]
    return max(folders, key=lambda folder: int(folder.name), default=None)


def steps(workdir: FilePath) -> list[int]:
    """Returns the steps at which a run has a complete checkpoint."""
    return [
        int(folder.name)
        for folder in children(workdir / "checkpoints")
        if folder.name.isdigit() and is_complete(folder)
    ]


def is_complete(folder: FilePath) -> bool:
    """Returns whether everything of a checkpoint, or of a tree of arrays, is written.

    Orbax notes the time in its metadata just before it writes `COMMIT_FILE`. Older versions of
    orbax write no such file.
    """
    if (folder / COMMIT_FILE).is_file():
        return True
    try:
        return read_json(folder / CHECKPOINT_METADATA).get("commit_timestamp_nsecs") is not None
    except (OSError, UserError):
        return False


def check_can_write(workdir: FilePath) -> None:
    """Raises UserError if a run cannot write its checkpoints to the address `workdir`.

    Otherwise the run would end at its first checkpoint.
    """
    if isinstance(workdir, Path):
        return
    if not str(workdir).startswith("gs://"):
        raise UserError(
            f"--workdir={workdir}: a run can be written to a path of this machine or to gs://"
        )
    probe = workdir / ".write_probe"
    try:
        probe.write_bytes(b"1")
        probe.unlink()
        # Orbax asks for the kind of bucket.
        importlib.import_module("google.cloud.storage").Client().get_bucket(workdir.parts[2])
    except ImportError:
        raise UserError(f"--workdir={workdir} needs google-cloud-storage: {INSTALL_GCS}") from None
    # The client of the bucket, its transport and its login have exceptions of their own.
    except Exception as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--workdir={workdir}: a run cannot be written there ({words}); the account needs "
            "roles/storage.objectUser and roles/storage.legacyBucketReader"
        ) from error


def read_json(file: FilePath) -> JsonDict:
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
