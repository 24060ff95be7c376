"""Writers of a run's metrics: `metrics.jsonl`, TensorBoard in `tb/`, and Weights & Biases.

`step` counts over all stages of a run and never decreases. Two identical runs write identical
bytes, except for the values under `time/` and `perf/`, which depend on the machine, and under
`data/`, which count records that were read ahead.
"""

import importlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from pg_ground.reporting.progress import Progress
from pg_ground.storage.files import naming
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError

FILE = "metrics.jsonl"

WANDB_FILE = "wandb.json"
"""Holds the id of the run at Weights & Biases."""


class MetricsWriter:
    """Appends metrics to `metrics.jsonl`, to `tb/` and to a mirror, until it is closed."""

    def __init__(self, workdir: Path, purge_step: int = 0, mirror: Any = None):
        """Opens the files.

        Args:
          purge_step: TensorBoard drops the events of this step and of later steps.
          mirror: the run at Weights & Biases, or None.
        """
        self._path = workdir / FILE
        self._file = self._path.open("a", encoding="utf-8")
        # TensorBoard names a file by the second in which it is made. Without the suffix, a run that
        # restarts within one second would overwrite the file.
        self._tensorboard = SummaryWriter(
            str(workdir / "tb"),
            purge_step=purge_step,
            flush_secs=10,
            filename_suffix=f".from{purge_step}",
        )
        self._mirror = mirror
        self.progress = Progress()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Appends one line that starts with `step` and `stage`.

        NaN and infinity are null in the file. TensorBoard and the mirror do not receive them.

        Raises:
          OSError: the file cannot be written; the error names it.
        """
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": int(step), "stage": stage, **{name: finite.get(name) for name in values}}
        with naming(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, int(step))
        if self._mirror is not None:
            self._mirror.log(finite, step=int(step))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Sends a picture to TensorBoard and to the mirror."""
        pixels = np.asarray(picture.convert("RGB"))
        self._tensorboard.add_image(name, pixels, int(step), dataformats="HWC")
        if self._mirror is not None:
            self._mirror.log({name: _wandb().Image(picture)}, step=int(step))

    def close(self) -> None:
        """Completes the files and ends the progress line."""
        self.progress.end()
        with naming(self._path):
            self._file.close()
        self._tensorboard.close()
        if self._mirror is not None:
            self._mirror.finish()


def open_metrics(
    workdir: Path,
    resume_step: int | None,
    project: str = "",
    settings: JsonObject | None = None,
) -> MetricsWriter:
    """Returns a writer that continues after `resume_step`, or that starts over if it is None.

    Lines of later steps are dropped, and so is a last line that a kill has cut off. All other lines
    keep their bytes. TensorBoard drops later events. A run that starts over deletes its old events.

    Args:
      project: the project at Weights & Biases that mirrors the run; "" for none.
      settings: the settings of the run, for the mirror.

    Raises:
      UserError: a line other than the last is not a metrics line, or the mirror cannot be opened.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lines: list[bytes] = []
    if resume_step is not None:
        lines = [line for line, row in _lines(workdir) if row["step"] <= resume_step]
    mirror = _open_mirror(workdir, resume_step, project, settings) if project else None
    temporary = workdir / (FILE + ".tmp")
    temporary.write_bytes(b"".join(lines))
    os.replace(temporary, workdir / FILE)
    if resume_step is None:
        for stale in (workdir / "tb").glob("events.out.tfevents.*"):
            stale.unlink()
    return MetricsWriter(workdir, 0 if resume_step is None else resume_step + 1, mirror)


def check_mirror(project: str) -> None:
    """Raises UserError if `project` is set and wandb is not installed."""
    if project:
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "config.log.wandb names a project, but wandb is not installed: pip install wandb, "
            "or remove the setting"
        ) from None


def _open_mirror(
    workdir: Path, resume_step: int | None, project: str, settings: JsonObject | None
) -> Any:
    """Returns the run at Weights & Biases: a new one, or the run that `wandb.json` names.

    A resumed run sends the steps after its checkpoint a second time. Their values are the same, and
    wandb ignores steps that it has.
    """
    wandb = _wandb()
    file = workdir / WANDB_FILE
    continues = resume_step is not None and file.is_file()
    run_id = json.loads(file.read_text())["id"] if continues else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=project,
            id=run_id,
            name=workdir.resolve().name,
            dir=str(workdir),
            config=dict(settings or {}),
            resume="allow",
        )
    except wandb.Error as error:
        raise UserError(f"config.log.wandb={project}: {error}") from None
    file.write_text(json.dumps({"project": project, "id": run_id}) + "\n")
    return run


def read_metrics(workdir: FilePath) -> list[JsonDict]:
    """Returns the lines of `metrics.jsonl` in order, with None for null.

    A last line that a kill has cut off is left out.

    Raises:
      UserError: a line other than the last is not a metrics line.
    """
    return [row for _, row in _lines(workdir)]


def _lines(workdir: FilePath) -> Iterator[tuple[bytes, JsonDict]]:
    """Yields the bytes (newline included) and the values of each whole line."""
    path = workdir / FILE
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            yield line, row
        elif number < len(lines):
            raise UserError(
                f"{path}:{number} is {line[:60]!r}: it must be a JSON object with a whole number "
                "as step"
            )


def _row(line: bytes) -> JsonDict | None:
    """Returns the values of a line, or None if the line is cut off or is not a metrics line."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
