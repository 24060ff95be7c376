"""The position of a run (stage, step, phase), the format of the log, and the progress line.

A training loop reports its position with two calls:

    progress.set_step("grpo", 141)
    with progress.phase("rollout"):
        ...

Every log record and the last line of a failure then say `step 141 of grpo, phase rollout`. The
step counts over all stages of a run, as in `metrics.jsonl`. One process runs one training loop, so
the position is a value of this module.

A library logs with `logging.getLogger(__name__)`. A command runs inside `logs_to_stderr`.
"""

import contextlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

logger = logging.getLogger(__name__)

TERMINAL_METRICS = (
    ("sft/loss", "loss"),
    ("reward/total", "reward"),
    ("accuracy", "acc"),
    ("policy/kl", "kl"),
)
"""Metric and its short name, in the order of `progress_line`."""

ACCURACY_METRICS = ("acc50", "point_in_box", "accuracy")
"""Metrics of an evaluation that the short name `acc` may stand for."""

EVAL_METRICS = ("acc50", "mean_iou", "point_in_box")
"""Metrics of an evaluation that the progress line shows."""

LOG_INTERVAL_S = 60.0
"""Seconds between two progress lines in a log file. A log of one day then has 1,440 lines."""


class Position(NamedTuple):
    """Where a run is."""

    stage: str = ""
    step: int = 0
    """Over all stages of the run."""
    phase: str = ""
    """Part of a step: data, rollout, score, update, evaluation, checkpoint."""

    def __str__(self) -> str:
        """Returns the position in words. Returns "" before the first stage."""
        if not self.stage:
            return self.phase and f"phase {self.phase}"
        phase = f", phase {self.phase}" if self.phase else ""
        return f"step {self.step} of {self.stage}{phase}"


class _State:
    """The values of this process."""

    position = Position()
    process = 0
    line_is_open = False
    """Whether the cursor stands at the end of a progress line."""


def set_step(stage: str, step: int) -> None:
    """Sets the stage and the step that the process works on, and clears the phase."""
    _State.position = Position(stage, step)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Sets the phase inside a `with` block.

    An exception keeps the phase, so that the last line of the failure can name it.
    """
    previous = _State.position.phase
    _State.position = _State.position._replace(phase=name)
    yield
    _State.position = _State.position._replace(phase=previous)


def position() -> Position:
    """Returns the position that was set last."""
    return _State.position


def reset() -> None:
    """Clears the position, as at the start of a process."""
    _State.position = Position()


def set_process(index: int) -> None:
    """Sets the number of this process among the processes of the run."""
    _State.process = index


def process() -> int:
    """Returns the number of this process, 0 for a run of one process."""
    return _State.process


class LogFormatter(logging.Formatter):
    """Formats a record as `TIME process N, POSITION: message`.

    Only a warning or an error names its level.
    """

    def format(self, record: logging.LogRecord) -> str:
        words = [self.formatTime(record, "%Y-%m-%d %H:%M:%S"), f"process {_State.process}"]
        if str(_State.position):
            words[-1] += f", {_State.position}"
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{' '.join(words)}: {level}{record.getMessage()}"
        return text if not record.exc_info else f"{text}\n{self.formatException(record.exc_info)}"


class LogHandler(logging.Handler):
    """Writes records to stderr, below an open progress line.

    Every process writes warnings and errors. Only process 0 writes records of a lower level.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LogFormatter())
        self.addFilter(lambda record: record.levelno >= logging.WARNING or _State.process == 0)

    def emit(self, record: logging.LogRecord) -> None:
        end_line()
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Sends the log records of this package to stderr inside a `with` block, from level INFO.

    The position is cleared at the start, because one process may run several commands.
    """
    reset()
    package = logging.getLogger("pg_ground")
    level, propagate = package.level, package.propagate
    handler = LogHandler()
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False  # a library may add a handler to the root, which repeats each record
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        package.propagate = propagate


def end_line() -> None:
    """Moves the cursor to the next line if a progress line is open."""
    if _State.line_is_open:
        sys.stdout.write("\n")
        sys.stdout.flush()
    _State.line_is_open = False


class Progress:
    """Reports the progress of a run.

    On a terminal the report is one line that is overwritten. Elsewhere it is one log record a
    minute. The lines of an evaluation and the last line of a stage always remain.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._on_terminal = sys.stdout.isatty()
        self._logged_at = -math.inf
        self._accuracy: dict[str, float] = {}

    def show(
        self, step: int, total: int, stage: str, metrics: Mapping[str, float], keep: bool = False
    ) -> None:
        """Reports one line of metrics.

        Args:
          keep: whether the line remains on the terminal.
        """
        new_accuracy = accuracy(metrics)
        keep = keep or new_accuracy is not None
        if new_accuracy is not None:
            self._accuracy = {"accuracy": new_accuracy}
            line = progress_line(step, total, stage, metrics)
        else:
            line = progress_line(step, total, stage, {**metrics, **self._accuracy})
        if self._on_terminal:
            self._overwrite(line, keep)
        elif keep or self._clock() - self._logged_at >= LOG_INTERVAL_S:
            logger.info(line)
            self._logged_at = self._clock()

    def _overwrite(self, line: str, keep: bool) -> None:
        width = shutil.get_terminal_size().columns - 1  # a longer line could not be overwritten
        sys.stdout.write("\r\x1b[K" + (line if keep else line[:width]))
        sys.stdout.flush()
        _State.line_is_open = True
        if keep:
            end_line()

    def end(self) -> None:
        """Moves the cursor below the progress line."""
        end_line()


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """Returns the accuracy of the first benchmark, or None if `metrics` holds no evaluation."""
    for name, value in metrics.items():
        if name.startswith("eval/") and name.rpartition("/")[2] in ACCURACY_METRICS:
            return value
    return None


def progress_line(step: int, total: int, stage: str, metrics: Mapping[str, float]) -> str:
    """Returns one line: stage, step of total, main metrics, examples a second, time left."""
    words = [f"{stage:<4} {step:>{len(str(total))}}/{total}"]
    words += [*metric_words(metrics), *eval_words(metrics)]
    if "perf/images_per_s" in metrics:
        words.append(f"{metrics['perf/images_per_s']:.3g} examples/s")
    seconds = metrics.get("time/step_s", math.nan)
    if math.isfinite(seconds):
        words.append(f"{duration((total - step) * seconds)} left")
    return "  ".join(words)


def metric_words(metrics: Mapping[str, float]) -> list[str]:
    """Returns each of `TERMINAL_METRICS` that is among `metrics`, with its short name."""
    return [f"{short} {metrics[name]:.4g}" for name, short in TERMINAL_METRICS if name in metrics]


def eval_words(metrics: Mapping[str, float]) -> list[str]:
    """Returns the main metrics of each benchmark among `eval/<benchmark>/<metric>`."""
    by_benchmark: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            benchmark, _, metric = name.removeprefix("eval/").rpartition("/")
            by_benchmark.setdefault(benchmark, {})[metric] = value
    words = []
    for benchmark, values in by_benchmark.items():
        shown = [m for m in EVAL_METRICS if m in values] or list(values)[:1]
        words.append(f"{benchmark}: " + " ".join(f"{m} {values[m]:.4g}" for m in shown))
    return words


def duration(seconds: float) -> str:
    """Returns a number of seconds as `1h02m`, `3m04s` or `5s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"
