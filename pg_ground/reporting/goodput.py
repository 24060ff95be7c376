"""Goodput, cost and time left of a run, from its files.

Goodput is the share of the time since the first start in which the devices made steps that count.
Everything else has a cause, and the causes add up to the whole time. The words come from Cloud
TPU's ML Goodput: goodput, and badput by cause.
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from pg_ground.reporting import timeline
from pg_ground.reporting.progress import duration
from pg_ground.reporting.run_files import Run
from pg_ground.reporting.tables import Table
from pg_ground.reporting.timeline import Session
from pg_ground.types import JsonObject

STEPS = "steps that count"
DATA = "waiting for data"
COMPILATION = "compilation"
LOST_WORK = "lost work (steps made again)"
IDLE = "idle between starts"
UNEXPLAINED = "unexplained"

PHASE_CAUSES = {
    timeline.START_UP: "start-up",
    timeline.RESTORE: "restoring a checkpoint",
    timeline.EVALUATION: "evaluations",
    timeline.CHECKPOINT: "checkpoints",
    timeline.PICTURES: "pictures and report",
    timeline.PROFILER: "profiler",
}
"""The cause that the time of a phase counts for, besides its compilation."""

CAUSES = (STEPS, DATA, COMPILATION, *PHASE_CAUSES.values(), LOST_WORK, IDLE, UNEXPLAINED)
"""The order of a table."""


SMALLEST_SHARE = 0.0005
"""Smaller shares would be shown as 0.0%."""


class Goodput(NamedTuple):
    """Where the time since the first start of a run went, up to its newest line."""

    seconds: dict[str, float]
    """By cause. They add up to `wall_seconds`."""
    wall_seconds: float
    """Without pauses after a finished run that was later continued."""
    chip_seconds: float
    """Chips × seconds in which processes of the run were alive."""
    idle_chip_seconds: float
    """Chips × seconds between a kill and the next start. They cost if the slice was kept."""

    @property
    def share(self) -> float:
        """The goodput, from 0 to 1."""
        return self.share_of(STEPS)

    def share_of(self, cause: str) -> float:
        """Returns the share of a cause, from 0 to 1."""
        return self.seconds[cause] / self.wall_seconds if self.wall_seconds else 0.0

    def losses(self) -> list[str]:
        """Returns the causes of lost time, the largest first, without shares of about 0."""
        causes = [cause for cause in self.seconds if cause != STEPS]
        causes = [cause for cause in causes if self.share_of(cause) >= SMALLEST_SHARE]
        return sorted(causes, key=lambda cause: -self.seconds[cause])


def measure(sessions: Sequence[Session]) -> Goodput:
    """Returns the goodput of a run."""
    seconds = dict.fromkeys(CAUSES, 0.0)
    for index, session in enumerate(sessions):
        later = [other.resumed_step for other in sessions[index + 1 :]]
        for line in session.intervals:
            for cause, value in _interval_seconds(line, min(later, default=None)):
                seconds[cause] = seconds.get(cause, 0.0) + value
    idle = _idle_seconds(sessions)
    alive = sum(session.seconds for session in sessions)
    seconds[IDLE] = sum(idle)
    wall_seconds = alive + sum(idle)
    seconds[UNEXPLAINED] = max(0.0, wall_seconds - sum(seconds.values()))
    return Goodput(
        seconds,
        wall_seconds,
        sum(session.chips * session.seconds for session in sessions),
        sum(session.chips * pause for session, pause in zip(sessions[:-1], idle, strict=True)),
    )


def _interval_seconds(line: JsonObject, resumed_step: int | None) -> Iterator[tuple[str, float]]:
    """Yields the causes of the time of one interval.

    Args:
      resumed_step: the lowest step from which a later start went on; None if there is none.
    """
    compile_s = min(line.get("compile_s", 0.0), line["seconds"])
    yield COMPILATION, compile_s
    if line["phase"] != timeline.STEPS:
        phase = str(line["phase"])
        yield PHASE_CAUSES.get(phase, phase), line["seconds"] - compile_s
        return
    # The rest of the interval, between the ends of steps and the line, stays unexplained.
    step_s = max(0.0, line.get("step_s", 0.0) - compile_s)
    steps = line.get("steps", 0)
    lost = 0.0
    if resumed_step is not None and steps:
        lost = min(max(line["step"] - resumed_step, 0), steps) / steps
    data_s = min(line.get("data_s", 0.0), step_s)
    yield LOST_WORK, lost * step_s
    yield DATA, (1 - lost) * data_s
    yield STEPS, (1 - lost) * (step_s - data_s)


def _idle_seconds(sessions: Sequence[Session]) -> list[float]:
    """Returns the seconds between each start and the one after it in which no process was alive.

    They are 0 after a finished run. The clocks of two hosts can differ, so none is negative.
    """
    return [
        0.0 if session.is_finished else max(0.0, following.started - session.last_time)
        for session, following in pairwise(sessions)
    ]


def goodput_table(goodput: Goodput, title: str, cost_words: str) -> Table:
    """Returns a table of the causes with seconds and shares.

    Args:
      cost_words: the cost of the run so far.
    """
    rows = [
        [cause, f"{seconds:,.1f}", f"{100 * goodput.share_of(cause):.1f}%"]
        for cause, seconds in goodput.seconds.items()
        if seconds > 0 or cause in (STEPS, UNEXPLAINED)
    ]
    rows.append(["all", f"{goodput.wall_seconds:,.1f}", "100.0%"])
    return Table(title, ["goodput and losses", "seconds", "share"], rows, f"Cost: {cost_words}.")


# time left and cost


class TimeLeft(NamedTuple):
    """The work that a run has left."""

    steps: int
    evaluations: int
    seconds: float
    """Of all work whose seconds the run has measured."""
    unmeasured: tuple[str, ...]
    """Work that the run has not done yet, so that its seconds are unknown."""

    def in_words(self) -> str:
        """Returns the time and the work as a phrase."""
        works = [_count(self.steps, "step"), _count(self.evaluations, "evaluation")]
        work = ", ".join(words for words in works if words)
        if not work:
            return duration(0)
        if not self.unmeasured:
            return f"{duration(self.seconds)} ({work})"
        if not self.seconds:
            return f"not measured yet ({work})"
        unknown = ", ".join(self.unmeasured)
        return f"at least {duration(self.seconds)} ({work}; not measured yet: {unknown})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}" if number else ""


def time_left(run: Run) -> TimeLeft:
    """Returns the steps and evaluations that are left, at their median seconds so far."""
    done = run.metrics[-1]["step"] if run.metrics else 0
    seconds = 0.0
    unmeasured = []
    steps_left = 0
    evaluations_left = {True: 0, False: 0}
    first = 0
    for stage, steps in run.stages:
        count = first + steps - max(done, first)
        if count > 0:
            median = median_step_seconds(run, stage)
            steps_left += count
            seconds += count * (median or 0.0)
            unmeasured += [] if median else [f"a step of {stage}"]
        for step in _evaluation_steps(run, stage, steps):
            evaluations_left[step < steps] += first + step > done
        first += steps
    medians = _evaluation_medians(run)
    for is_interim, count in evaluations_left.items():
        seconds += count * (medians[is_interim] or 0.0)
        if count and medians[is_interim] is None:
            unmeasured.append("an evaluation" if is_interim else "the evaluation of a stage's end")
    evaluations = sum(evaluations_left.values())
    return TimeLeft(steps_left, evaluations, seconds, tuple(unmeasured))


def median_step_seconds(run: Run, stage: str) -> float | None:
    """Returns the median of the seconds of a step of a stage on the newest machine; None without
    one.

    Programs are compiled in the first line, so it only counts if there is no other.
    """
    lines = [line for line in run.metrics if line["stage"] == stage and line.get("time/step_s")]
    newest = run.machines[-1]["from_step"] if run.machines else 0
    lines = [line for line in lines if line["step"] > newest] or lines
    return statistics.median(line["time/step_s"] for line in lines[1:] or lines) if lines else None


def _evaluation_steps(run: Run, stage: str, steps: int) -> list[int]:
    """Returns the steps of a stage, from 1, after which the run evaluates."""
    settings = run.config.get("eval", {})
    if not settings.get("sources"):
        return []
    # The run knows the number of its questions, which `eval.every_epochs` needs.
    facts = run.sessions[-1].start if run.sessions else {}
    every = facts.get("eval_every", {}).get(stage, settings.get("every", 0))
    return [*range(every, steps, every), steps] if every else [steps]


def _evaluation_medians(run: Run) -> dict[bool, float | None]:
    """Returns the median seconds of an evaluation, interim or at the end of a stage.

    Both ask the same questions unless `eval.interim_examples` is set.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for session in run.sessions:
        for line in session.intervals:
            if line["phase"] == timeline.EVALUATION:
                value = line["seconds"] - line.get("compile_s", 0.0)
                seconds[bool(line.get("interim"))].append(value)
    if not run.config.get("eval", {}).get("interim_examples"):
        seconds = dict.fromkeys(seconds, seconds[True] + seconds[False])
    return {key: statistics.median(values) if values else None for key, values in seconds.items()}


def cost_words(goodput: Goodput, run: Run, price: float | None) -> str:
    """Returns the chip-hours so far and at the end of the run as a phrase, with money if `price`,
    the price of a chip-hour, is set."""

    def words(chip_seconds: float, unit: str = "") -> str:
        hours = chip_seconds / 3600
        money = "" if price is None else f" ({hours * price:,.2f})"
        return f"{hours_text(hours)}{unit}{money}"

    text = f"{words(goodput.chip_seconds, ' chip-hours')} so far"
    left = time_left(run)
    if left.seconds and run.sessions[-1].end is None:
        bound = "at least" if left.unmeasured else "about"
        end = goodput.chip_seconds + run.sessions[-1].chips * left.seconds
        text += f", {bound} {words(end)} at the end"
    if price is not None:
        text += f", at {price:g} a chip-hour"
    if goodput.idle_chip_seconds:
        text += f"; {words(goodput.idle_chip_seconds)} more if the chips were kept between starts"
    return text


def hours_text(hours: float) -> str:
    """Returns a number of hours with three digits, or with one decimal."""
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"
