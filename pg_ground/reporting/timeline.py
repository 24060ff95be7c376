"""What a run does at every moment, in `timeline.jsonl`: the source of its goodput.

Every start of the run appends lines to the file, and no line is ever removed. So the file also has
the steps that a kill has lost. There are three kinds of lines, all with the Unix time in seconds:

    {"time": …, "event": "start", "chips": 8, "resumed_step": 500, …}
    {"time": …, "phase": "steps", "seconds": 4.1, "step": 510, "next": "evaluation", …}
    {"time": …, "event": "warning", "text": …}, and {"time": …, "event": "end", "reason": …}

A line with a phase ends an interval; `next` is the phase that begins. The intervals of one start
have no gaps. A killed run has no `end`.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import jax

from pg_ground.parallel import multiprocess
from pg_ground.storage.files import naming
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject

FILE = "timeline.jsonl"

START_UP = "start-up"
RESTORE = "restore"
STEPS = "steps"
EVALUATION = "evaluation"
CHECKPOINT = "checkpoint"
PICTURES = "pictures"
PROFILER = "profiler"

FINISHED = "finished"
"""The reason of the end of a run that made all its steps."""

COMPILE_EVENTS = "/jax/core/compile/"
"""Beginning of the names of jax's events for tracing, lowering and compiling."""

NUMBERS = ("time", "seconds", "step", "steps", "step_s", "data_s", "compile_s", "chips")
"""The values of a line that are numbers, if it has them."""

WARNINGS_LIMIT = 100
"""Most warnings that one start of a run writes."""

TEXT_LIMIT = 300
"""Most characters of a warning or of a reason."""


class Session(NamedTuple):
    """One start of a run, until its process ended or until now."""

    start: JsonObject
    """The line of the start."""
    intervals: list[JsonObject]
    """The lines with a phase, in order."""
    warnings: list[JsonObject]
    end: JsonObject | None
    """The line of the end; None for a run that goes on, was killed or lost another process."""

    @property
    def started(self) -> float:
        """Unix time of the start of the process."""
        return self.start["time"]

    @property
    def last_time(self) -> float:
        """Unix time of the newest line."""
        lines = [self.start, *self.intervals[-1:], *self.warnings[-1:], *filter(None, [self.end])]
        return max(line["time"] for line in lines)

    @property
    def seconds(self) -> float:
        """Seconds from the start to the newest line."""
        return self.last_time - self.started

    @property
    def chips(self) -> int:
        """Number of chips, or of hosts if the run is on CPUs."""
        return self.start.get("chips", 1)

    @property
    def resumed_step(self) -> int:
        """The step of the checkpoint from which the run went on; 0 for a run from step 1."""
        return self.start.get("resumed_step") or 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps were made."""
        return self.end is not None and self.end.get("reason") == FINISHED


class Timeline:
    """Writes the timeline of one start of a run.

    The lines before `open` wait in memory, because the working directory is checked first. No
    method waits for a device.
    """

    def __init__(self, started: float | None = None, clock: Callable[[], float] | None = None):
        """Begins with the phase `START_UP`.

        Args:
          started: Unix time at which the process started; None is now.
          clock: returns the Unix time. By default it does not jump if the time of the host is set.
        """
        offset = time.time() - time.perf_counter()
        self._clock = clock or (lambda: time.perf_counter() + offset)
        self._started = self._clock() if started is None else started
        self._path: Path | None = None
        self._file: IO[bytes] | None = None
        self._waiting: list[JsonDict] | None = []
        """Lines before `open`; None afterwards."""
        self._lock = threading.Lock()  # threads that read data can warn
        self._warnings = 0
        self._phase = START_UP
        self._facts: JsonObject = {}
        self._begin = self._started
        self._step = 0
        self._steps: JsonDict = {}
        _count_compilation()
        self._compiled = _compilation.seconds

    def open(self, workdir: Path | None, resumed_step: int | None, facts: JsonObject) -> None:
        """Appends the line of the start, and all lines that wait.

        A new run with other settings than the run before it removes the older lines.

        Args:
          workdir: the local folder of the run; None in a process that writes no files.
          facts: JSON values for the line of the start. `settings` tells runs apart.
        """
        start = {"time": round(self._started, 3), "event": "start", "resumed_step": resumed_step}
        self._step = resumed_step or 0
        if workdir is not None:
            self._path = workdir / FILE
            content = _whole_lines(self._path)
            if resumed_step is None and not _is_same_run(content, facts):
                content = b""
            with naming(self._path):
                self._file = self._path.open("r+b" if self._path.exists() else "w+b")
                self._file.truncate(len(content))
                self._file.seek(len(content))
        waiting, self._waiting = self._waiting or [], None
        for line in [start | dict(facts), *waiting]:
            self._append(line)

    def enter(self, phase: str, **facts: Any) -> None:
        """Ends the interval of the present phase, and begins one of `phase`.

        Args:
          facts: JSON values for the line of the new interval.
        """
        self._end_interval(phase)
        self._phase, self._facts = phase, facts

    @contextlib.contextmanager
    def during(self, phase: str, **facts: Any) -> Iterator[None]:
        """Makes the `with` block an interval of `phase`.

        An exception keeps the phase, so that the line of the end follows it.
        """
        previous, previous_facts = self._phase, self._facts
        if phase != previous:
            self.enter(phase, **facts)
        yield
        if phase != previous:
            self.enter(previous, **previous_facts)

    def add_step(self, stage: str, step: int, seconds: Mapping[str, float]) -> None:
        """Adds a step whose seconds `seconds` has as `time/step_s` and `time/data_s`."""
        self._step = step
        totals = self._steps or {"stage": stage, "steps": 0, "step_s": 0.0, "data_s": 0.0}
        totals["steps"] += 1
        for name in ("step_s", "data_s"):
            totals[name] += seconds.get(f"time/{name}", 0.0)
        self._steps = totals

    def flush(self) -> None:
        """Writes the interval so far."""
        self._end_interval(self._phase)

    def warn(self, text: str) -> None:
        """Writes a warning of the run, if there are not too many of them."""
        self._warnings += 1
        if self._warnings <= WARNINGS_LIMIT:
            words = " ".join(text.split())[:TEXT_LIMIT]
            self._append({"time": round(self._clock(), 3), "event": "warning", "text": words})

    def _end_interval(self, following: str) -> None:
        now = self._clock()
        compiled = _compilation.seconds
        line: JsonDict = {
            "time": round(now, 3),
            "phase": self._phase,
            "seconds": round(now - self._begin, 4),
            "step": self._step,
        }
        if compiled > self._compiled:
            line["compile_s"] = round(min(compiled - self._compiled, now - self._begin), 4)
        for name, value in self._steps.items():
            line[name] = round(value, 4) if isinstance(value, float) else value
        self._append(line | dict(self._facts) | {"next": following})
        self._begin, self._compiled, self._steps = now, compiled, {}

    def _append(self, line: JsonDict) -> None:
        with self._lock:
            if self._waiting is not None:
                self._waiting.append(line)
            elif self._file is not None and self._path is not None:
                with naming(self._path):
                    self._file.write(json.dumps(line).encode() + b"\n")
                    self._file.flush()

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes the line of the end, unless another process of the run ended first: such a run
        usually starts again."""
        if self._file is None:
            return
        # A full disk can be the error itself.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.flush()
            if error is None or not multiprocess.is_lost_process(error):
                reason = FINISHED if error is None else _reason(error)
                self._append({"time": round(self._clock(), 3), "event": "end", "reason": reason})
        self.close()

    def close(self) -> None:
        """Closes the file without a line of the end. Later lines are not written."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text.split())[:TEXT_LIMIT]


@contextlib.contextmanager
def warnings_to(timeline: Timeline) -> Iterator[None]:
    """Writes the warnings and errors that this package logs to the timeline too."""
    handler = _WarningHandler(timeline)
    package = logging.getLogger("pg_ground")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


class _WarningHandler(logging.Handler):
    def __init__(self, timeline: Timeline):
        super().__init__(logging.WARNING)
        self._timeline = timeline

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed file
            self._timeline.warn(record.getMessage())


class _Compilation(threading.local):
    """The seconds in which this thread traced, lowered and compiled programs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []

    def add(self, begin: float, end: float) -> None:
        """Adds a span of time. Spans inside it, of functions that it calls, count once."""
        while self._spans and self._spans[-1][0] >= begin:
            inner_begin, inner_end = self._spans.pop()
            self.seconds -= inner_end - inner_begin
        begin = max(begin, self._spans[-1][1]) if self._spans else begin
        self._spans.append((begin, end))
        self.seconds += end - begin


_compilation = _Compilation()
_listeners: list[Callable[..., None]] = []


def _count_compilation() -> None:
    """Makes jax report its compilations to `_compilation`, once per process."""

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith(COMPILE_EVENTS):
            end = time.perf_counter()
            _compilation.add(end - duration_secs, end)

    if not _listeners:
        _listeners.append(listen)
        jax.monitoring.register_event_duration_secs_listener(listen)


def process_start() -> float:
    """Returns the Unix time at which this process started; now if the system does not say."""
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, LookupError, AttributeError):
        return now
    return now - max(age, 0.0)


def _whole_lines(path: Path) -> bytes:
    """Returns the content of a file up to its last newline: a kill can cut off a line."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def _is_same_run(content: bytes, facts: JsonObject) -> bool:
    """Returns whether the newest start in the file had the same settings."""
    sessions = parse(content)
    return bool(sessions) and sessions[-1].start.get("settings") == facts.get("settings")


def read_sessions(workdir: FilePath) -> list[Session]:
    """Returns the starts of a run in order; [] if the run has no timeline."""
    path = workdir / FILE
    return parse(path.read_bytes()) if path.is_file() else []


def parse(content: bytes) -> list[Session]:
    """Returns the starts in the content of a timeline.

    Lines that are cut off or damaged are left out. Their time then belongs to no phase.
    """
    sessions: list[Session] = []
    for text in content.splitlines(keepends=True):
        line = _line(text)
        if line is None:
            continue
        if line.get("event") == "start":
            sessions.append(Session(line, [], [], None))
        elif not sessions:
            continue
        elif line.get("event") == "warning":
            sessions[-1].warnings.append(line)
        elif line.get("event") == "end":
            sessions[-1] = sessions[-1]._replace(end=line)
        else:
            sessions[-1].intervals.append(line)
    return sessions


def _line(text: bytes) -> JsonDict | None:
    """Returns the values of a line; None for a line that is no part of a timeline."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(line, dict) or not all(_is_number(line.get(name, 0)) for name in NUMBERS):
        return None
    is_interval = isinstance(line.get("phase"), str) and {"seconds", "step"} <= line.keys()
    has_kind = is_interval or isinstance(line.get("event"), str)
    return line if has_kind and "time" in line else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
