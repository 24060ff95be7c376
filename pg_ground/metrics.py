"""A run's numbers: `metrics.jsonl`, its mirror for TensorBoard in `tb/`, and the line a person reads in the terminal.

`step` counts over all stages of a run and never falls. Identical runs write identical bytes but for the values under
`time/` and `perf/`, which depend on the machine, and `data/`, which counts what was read ahead too.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pg_ground.types import UserError

FILE = "metrics.jsonl"

SHOWN = (
    ("sft/loss", "loss"),
    ("reward/total", "reward"),
    ("reward/iou", "iou"),
    ("policy/kl", "kl"),
    ("policy/entropy", "entropy"),
    ("completion/length", "length"),
    ("completion/malformed_fraction", "malformed"),
    ("optim/grad_norm", "grad"),
)
"""Metric and its short name, in the order of `progress_line`."""

EVAL_SHOWN = ("acc50", "mean_iou", "point_in_box")


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tb/` of a working directory while it is open."""

    def __init__(self, workdir: Path, purge_step: int = 0):
        self._file = (workdir / FILE).open("a", encoding="utf-8")
        # A file's name is the second of its making: without the suffix, a quick restart would overwrite it.
        suffix = f".from{purge_step}"
        folder = str(workdir / "tb")
        self._tensorboard = SummaryWriter(folder, purge_step=purge_step, flush_secs=10, filename_suffix=suffix)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Appends one line, `step` and `stage` first; NaN and infinity become null, and are not sent to TensorBoard."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": int(step), "stage": stage, **{name: finite.get(name) for name in values}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Leaves both files complete."""
        self._file.close()
        self._tensorboard.close()


def open_metrics(workdir: Path, resume_step: int | None) -> MetricsWriter:
    """Returns a writer that continues after `resume_step`, or starts over when that is None.

    Lines of later steps, and a last line torn by a kill, are dropped; the others keep their bytes.

    Raises:
      UserError: a line other than the last is not a metrics line.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    kept = [] if resume_step is None else [line for line, row in _lines(workdir) if row["step"] <= resume_step]
    temporary = workdir / (FILE + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, workdir / FILE)
    return MetricsWriter(workdir, purge_step=0 if resume_step is None else resume_step + 1)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` in order, null as None; a torn last line is left out.

    Raises:
      UserError: a line other than the last is not a metrics line.
    """
    return [row for _, row in _lines(workdir)]


def progress_line(step: int, total: int, stage: str, metrics: Mapping[str, float]) -> str:
    """Returns one line for the terminal: stage, step of total, the main numbers, seconds a step and time left."""
    words = [f"{stage:<4} {step:>{len(str(total))}}/{total}"]
    words += [f"{short} {metrics[name]:.4g}" for name, short in SHOWN if name in metrics]
    words += _eval_words(metrics)
    if "time/step_s" in metrics:
        seconds = metrics["time/step_s"]
        words.append(f"{seconds:.3g} s/step")
        if math.isfinite(seconds):
            words.append(f"ETA {_duration((total - step) * seconds)}")
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
            raise UserError(f"{path}:{number} is {line[:60]!r}: it must be a JSON object with a whole number as step")


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
