"""A run's numbers: `metrics.jsonl`, the same for TensorBoard in `tb/` and, if asked for, for Weights & Biases, and the line a
person reads in the terminal.

`step` counts over all stages of a run and never falls. Identical runs write identical bytes but for the values under
`time/` and `perf/`, which depend on the machine, and `data/`, which counts what was read ahead too.
"""

import importlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from pg_ground.types import UserError

FILE = "metrics.jsonl"

WANDB_FILE = "wandb.json"
"""The id of the run at Weights & Biases, where a run is mirrored there."""

SHOWN = (("sft/loss", "loss"), ("reward/total", "reward"), ("accuracy", "acc"), ("policy/kl", "kl"))
"""Metric and its short name, in the order of `progress_line`."""

ACCURACY = ("acc50", "point_in_box", "accuracy")
"""Measures of an evaluation that `accuracy` may stand for."""

EVAL_SHOWN = ("acc50", "mean_iou", "point_in_box")

QUIET_S = 60.0
"""Seconds between the progress lines of a run whose output is not read as it comes: a log of a day has 1,440 of them."""


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tb/` of a working directory, and to its mirror, while it is open."""

    def __init__(self, workdir: Path, purge_step: int = 0, mirror: Any = None):
        self._file = (workdir / FILE).open("a", encoding="utf-8")
        # A file's name is the second of its making: without the suffix, a quick restart would overwrite it.
        suffix = f".from{purge_step}"
        folder = str(workdir / "tb")
        self._tensorboard = SummaryWriter(
            folder, purge_step=purge_step, flush_secs=10, filename_suffix=suffix
        )
        self._mirror = mirror
        self.progress = Progress()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Appends one line, `step` and `stage` first; NaN and infinity become null, and are sent nowhere else."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": int(step), "stage": stage, **{name: finite.get(name) for name in values}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, int(step))
        if self._mirror is not None:
            self._mirror.log(finite, step=int(step))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Sends a picture to TensorBoard and to the mirror."""
        self._tensorboard.add_image(
            name, np.asarray(picture.convert("RGB")), int(step), dataformats="HWC"
        )
        if self._mirror is not None:
            self._mirror.log({name: _wandb().Image(picture)}, step=int(step))

    def close(self) -> None:
        """Leaves the files complete, and the terminal at the start of a line."""
        self.progress.end()
        self._file.close()
        self._tensorboard.close()
        if self._mirror is not None:
            self._mirror.finish()


def open_metrics(
    workdir: Path,
    resume_step: int | None,
    project: str = "",
    settings: Mapping[str, Any] | None = None,
) -> MetricsWriter:
    """Returns a writer that continues after `resume_step`, or starts over when that is None.

    Lines of later steps, and a last line torn by a kill, are dropped; the others keep their bytes. TensorBoard is told to drop
    what is later; of a run that starts over, its old files go.

    Args:
      project: at Weights & Biases, where the run is mirrored; "" for nowhere.
      settings: of the run, for the mirror.

    Raises:
      UserError: a line other than the last is not a metrics line, or the mirror cannot be opened.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    kept = (
        []
        if resume_step is None
        else [line for line, row in _lines(workdir) if row["step"] <= resume_step]
    )
    mirror = _open_mirror(workdir, resume_step, project, settings) if project else None
    temporary = workdir / (FILE + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, workdir / FILE)
    if resume_step is None:
        for stale in (workdir / "tb").glob("events.out.tfevents.*"):
            stale.unlink()
    return MetricsWriter(workdir, 0 if resume_step is None else resume_step + 1, mirror)


def check_mirror(project: str) -> None:
    """Raises UserError where a project is named and wandb is not installed."""
    if project:
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "config.log.wandb names a project, but wandb is not installed: pip install wandb, or leave the setting out"
        ) from None


def _open_mirror(
    workdir: Path, resume_step: int | None, project: str, settings: Mapping[str, Any] | None
) -> Any:
    """Returns the run at Weights & Biases: a new one, or the one that was begun and is gone on with.

    The steps since the checkpoint are sent a second time. They have the same values, and wandb leaves out steps it has had.
    """
    wandb, file = _wandb(), workdir / WANDB_FILE
    known = resume_step is not None and file.is_file()
    run_id = json.loads(file.read_text())["id"] if known else secrets.token_hex(4)
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


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` in order, null as None; a torn last line is left out.

    Raises:
      UserError: a line other than the last is not a metrics line.
    """
    return [row for _, row in _lines(workdir)]


class Progress:
    """Says how a run goes: on a terminal in one line that is written over, elsewhere in a line a minute.

    What is measured, and the last line of a stage, always stays.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._live, self._said = clock, sys.stdout.isatty(), -math.inf
        self._accuracy: dict[str, float] = {}
        self._pending = False

    def show(
        self, step: int, total: int, stage: str, metrics: Mapping[str, float], keep: bool = False
    ) -> None:
        """Says one line of metrics; `keep` lets it stay."""
        measured = accuracy(metrics)
        keep = keep or measured is not None
        if measured is not None:
            self._accuracy = {"accuracy": measured}
            line = progress_line(step, total, stage, metrics)
        else:
            line = progress_line(step, total, stage, {**metrics, **self._accuracy})
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(
                "\r\x1b[K" + (line if keep else line[:width]), end="\n" if keep else "", flush=True
            )
            self._pending = not keep
        elif keep or self._clock() - self._said >= QUIET_S:
            print(line, flush=True)
            self._said = self._clock()

    def end(self) -> None:
        """Leaves the line that was written over where it stands, for what is printed next."""
        if self._pending:
            print(flush=True)
        self._pending = False


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """Returns the first benchmark's accuracy among measures of an evaluation, None among others."""
    for name, value in metrics.items():
        if name.startswith("eval/") and name.rpartition("/")[2] in ACCURACY:
            return value
    return None


def progress_line(step: int, total: int, stage: str, metrics: Mapping[str, float]) -> str:
    """Returns one line: stage, step of total, the main numbers, questions a second, and the time left at this speed."""
    words = [f"{stage:<4} {step:>{len(str(total))}}/{total}"]
    words += [f"{short} {metrics[name]:.4g}" for name, short in SHOWN if name in metrics]
    words += _eval_words(metrics)
    if "perf/images_per_s" in metrics:
        words.append(f"{metrics['perf/images_per_s']:.3g} examples/s")
    seconds = metrics.get("time/step_s", math.nan)
    if math.isfinite(seconds):
        words.append(f"{_duration((total - step) * seconds)} left")
    return "  ".join(words)


def _eval_words(metrics: Mapping[str, float]) -> list[str]:
    """Returns the headline numbers of each benchmark among `eval/<benchmark>/<metric>`."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            benchmark, _, metric = name.removeprefix("eval/").rpartition("/")
            found.setdefault(benchmark, {})[metric] = value
    words = []
    for benchmark, values in found.items():
        shown = [m for m in EVAL_SHOWN if m in values] or list(values)[:1]
        words.append(f"{benchmark}: " + " ".join(f"{m} {values[m]:.4g}" for m in shown))
    return words


def _lines(workdir: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each whole line with its bytes, newline included."""
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
                f"{path}:{number} is {line[:60]!r}: it must be a JSON object with a whole number as step"
            )


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
