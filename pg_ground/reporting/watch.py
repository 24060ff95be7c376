"""A live view of a run in the terminal, from its files: `report --watch`.

The run may be on another host. Its files may lie in a bucket, may not be there yet, and may end in
half a line.
"""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pg_ground.checkpoints.run_directory import CONFIG_FILE
from pg_ground.reporting import goodput, metric_writers
from pg_ground.reporting.goodput import Goodput
from pg_ground.reporting.progress import duration, eval_words, metric_words
from pg_ground.reporting.report import write_page
from pg_ground.reporting.run_files import Run, read_run
from pg_ground.reporting.timeline import STEPS
from pg_ground.storage.paths import FilePath, is_bucket_error, modified_time
from pg_ground.types import JsonDict, JsonObject, UserError

LOCAL_SECONDS, BUCKET_SECONDS = 5.0, 30.0
"""Seconds between two looks. A run uploads its files to a bucket every 30 seconds."""

SILENCE_SECONDS = 120.0
"""Seconds without a new line after which the view says so, at least."""

SILENCE_FACTOR = 3.0
"""The view says so after this multiple of the longest recent time between lines, if it is more."""

INDENT = 11
"""Characters of the label of a line."""

RECENT_LINES = 20
SHOWN_LOSSES = 5
SHOWN_WARNINGS = 3


class View(NamedTuple):
    """The text about a run at one moment."""

    lines: Sequence[str]
    state: object
    """Differs from the state of an earlier view if there is something new to show."""
    is_run: bool = False
    """Whether the files of a run could be read."""
    has_ended: bool = False
    """Whether the run has ended by itself. A killed run has not: it can start again."""


def watch(
    workdir: FilePath,
    seconds: float | None = None,
    page: FilePath | None = None,
    price: float | None = None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> None:
    """Shows a run until it has ended or Ctrl-C is pressed.

    A terminal has one block that is overwritten. Elsewhere each change is a new block.

    Args:
      seconds: time between two looks; None is 5 seconds, or 30 seconds for a bucket.
      page: an HTML page that is written again with every change; None for no page.
      price: the price of a chip for an hour; None for a view without money.

    Raises:
      UserError: the page cannot be written.
    """
    pause = seconds or (LOCAL_SECONDS if isinstance(workdir, Path) else BUCKET_SECONDS)
    display = Display()
    state: object = None
    try:
        while True:
            view = _look_again(workdir, clock(), price, is_first=state is None)
            is_new = view.state != state
            if is_new and view.is_run and page is not None:
                write_page([workdir], page, price)
            display.show(view.lines, is_new)
            if view.has_ended:
                return
            state = view.state
            sleep(pause)
    except KeyboardInterrupt:
        return


def _look_again(workdir: FilePath, now: float, price: float | None, is_first: bool) -> View:
    """Returns the view of a run. After the first look, a bucket that fails is tried again."""
    try:
        return look(workdir, now, price)
    except Exception as error:
        if is_first or not is_bucket_error(error):
            raise
        words = f"{workdir} cannot be read now: {' '.join(str(error).split())[:200]}"
        return View([words], words)


def look(workdir: FilePath, now: float, price: float | None = None) -> View:
    """Returns the view of a run, or of a directory that holds no run yet.

    Args:
      now: Unix time.
      price: the price of a chip for an hour; None for a view without money.
    """
    try:
        if not (workdir / CONFIG_FILE).is_file():
            words = f"{workdir} holds no run yet: waiting for {CONFIG_FILE}"
            return View([words], words)
        run = read_run(workdir, samples_bytes=0)
    except (UserError, FileNotFoundError) as error:  # a file is being replaced
        return View([f"waiting: {error}"], str(error))
    last_time = _last_time(workdir, run)
    silence = max(0.0, now - last_time) if last_time is not None else None
    is_silent = silence is not None and silence > _silence_limit(run)
    reason = _end_reason(run)
    rows = list(_rows(run, price))
    rows.append(("last line", _life_words(run, silence, is_silent, reason)))
    rows += [("warning", words) for words in _warnings(run, now)]
    lines = [f"{label:<{INDENT}}{words}" for label, words in rows]
    newest = run.sessions[-1].last_time if run.sessions else None
    state = (len(run.metrics), len(run.sessions), newest, is_silent, reason)
    return View(lines, state, True, bool(reason))


def _rows(run: Run, price: float | None) -> Iterator[tuple[str, str]]:
    """Yields the label and the text of each line, without the sign of life and the warnings."""
    yield "run", _position_words(run)
    steps = [_finite(line) for line in run.metrics if "time/step_s" in line]
    evaluations = [line for line in map(_finite, run.metrics) if eval_words(line)]
    if steps and metric_words(steps[-1]):
        yield "metrics", f"{'  '.join(metric_words(steps[-1]))}  (step {steps[-1]['step']:,})"
    if evaluations:
        words = "  ".join(eval_words(evaluations[-1]))
        yield "evaluation", f"{words}  (step {evaluations[-1]['step']:,})"
    if steps and "time/step_s" in steps[-1]:
        yield "speed", _speed_words(run, steps[-1])
    if run.sessions:
        measured = goodput.measure(run.sessions)
        yield "goodput", _goodput_words(measured)
        yield "cost", goodput.cost_words(measured, run, price)
    if not _end_reason(run):
        yield "left", goodput.time_left(run).in_words()


def _finite(line: JsonObject) -> JsonDict:
    """Returns the values of a metrics line that are not null."""
    return {name: value for name, value in line.items() if value is not None}


def _position_words(run: Run) -> str:
    total = sum(steps for _, steps in run.stages)
    done = run.metrics[-1]["step"] if run.metrics else 0
    stage = run.metrics[-1]["stage"] if run.metrics else run.stages[0][0]
    words = f"{run.name}: {stage}, step {done:,} of {total:,}"
    words += f" ({100 * done / total:.0f}%)" if total else ""
    phase = _phase(run)
    return words if phase in ("", STEPS) or _end_reason(run) else f"{words}, phase {phase}"


def _phase(run: Run) -> str:
    """Returns the phase in which the run is by its newest line; "" if its files do not say."""
    intervals = run.sessions[-1].intervals if run.sessions else []
    return intervals[-1].get("next", "") if intervals else ""


def _speed_words(run: Run, line: JsonObject) -> str:
    step_s = line["time/step_s"]
    words = [f"{step_s:.3g} s a step"]
    examples = run.config.get(line["stage"], {}).get("batch_size")
    if examples and step_s:
        words.append(f"{examples / step_s:.3g} examples/s")
    if step_s and "time/data_s" in line:
        words.append(f"{100 * line['time/data_s'] / step_s:.1f}% of it waiting for data")
    return ", ".join(words)


def _goodput_words(measured: Goodput) -> str:
    losses = [
        f"{cause} {100 * measured.share_of(cause):.1f}%"
        for cause in measured.losses()[:SHOWN_LOSSES]
    ]
    words = f"{100 * measured.share:.1f}% of {duration(measured.wall_seconds)}"
    return f"{words}; lost: {', '.join(losses)}" if losses else words


def _end_reason(run: Run) -> str:
    """Returns why a run has ended by itself: "finished" or an error. Returns "" if it has not."""
    if run.sessions:
        end = run.sessions[-1].end
        return str(end.get("reason", "ended")) if end else ""
    total = sum(steps for _, steps in run.stages)
    return "finished" if run.metrics and run.metrics[-1]["step"] >= total else ""


def _last_time(workdir: FilePath, run: Run) -> float | None:
    """Returns the Unix time of the newest line; None if no line is there yet."""
    if run.sessions:
        return run.sessions[-1].last_time
    file = workdir / metric_writers.FILE
    return modified_time(file) if run.metrics else None


def _silence_limit(run: Run) -> float:
    """Returns the seconds without a new line that are not unusual."""
    intervals = run.sessions[-1].intervals[-RECENT_LINES:] if run.sessions else []
    longest = max((line["seconds"] for line in intervals), default=0.0)
    return max(SILENCE_SECONDS, SILENCE_FACTOR * longest)


def _life_words(run: Run, silence: float | None, is_silent: bool, reason: str) -> str:
    if silence is None:
        return "none yet"
    if reason:
        return f"{duration(silence)} ago: {reason if reason == 'finished' else f'ended, {reason}'}"
    if not is_silent:
        return f"{duration(silence)} ago"
    words = f"no new line for {duration(silence)}: the run has ended, is evaluating, or hangs"
    phase = _phase(run)
    if phase:
        words += f" (phase {phase})"
    if run.sessions:
        words += f"; {goodput.hours_text(run.sessions[-1].chips * silence / 3600)} chip-hours"
        words += " since then, if its chips are kept"
    return words


def _warnings(run: Run, now: float) -> Iterator[str]:
    """Yields the bad records of the run so far, and its newest warnings."""
    prefix = "data/bad_records/"
    counts: dict[str, float] = {}
    for line in run.metrics:
        new = {name.removeprefix(prefix): n for name, n in line.items() if name.startswith(prefix)}
        counts = new or counts
    if counts:
        kinds = ", ".join(f"{count:,.0f} {kind}" for kind, count in counts.items())
        yield f"{sum(counts.values()):,.0f} bad records ({kinds})"
    warnings = run.sessions[-1].warnings[-SHOWN_WARNINGS:] if run.sessions else []
    for line in warnings:
        yield f"{duration(max(0.0, now - line['time']))} ago: {line.get('text', '')}"


class Display:
    """Shows blocks of lines on stdout."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._shown = 0
        """Lines of the block on the terminal."""

    def show(self, lines: Sequence[str], is_new: bool) -> None:
        """Shows a block. A terminal overwrites the block before; elsewhere only a new block is
        printed."""
        if not self._on_terminal:
            if is_new:
                print("\n".join([*lines, ""]), flush=True)
            return
        size = shutil.get_terminal_size()
        # Only lines that fit into the terminal can be overwritten.
        wrapped = [text for line in lines for text in _wrap(line, size.columns - 1)]
        wrapped = wrapped[: size.lines - 1]
        start = f"\x1b[{self._shown}A\r\x1b[J" if self._shown else ""
        sys.stdout.write(start + "".join(f"{line}\n" for line in wrapped))
        sys.stdout.flush()
        self._shown = len(wrapped)


def _wrap(line: str, width: int) -> list[str]:
    """Returns the lines of a text of at most `width` characters; the later ones are indented."""
    return textwrap.wrap(line, max(width, 2 * INDENT), subsequent_indent=" " * INDENT)
