"""What a run writes down between its steps: metrics, measurements, pictures, checkpoints, and the report of all of it."""

import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from PIL import Image

from pg_ground.checkpoints import manager, run_directory
from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.checkpoints.run_directory import run_config
from pg_ground.config import Config, nearest
from pg_ground.data import pipeline
from pg_ground.data.pipeline import BadRecords
from pg_ground.parallel import multiprocess
from pg_ground.parallel.multiprocess import flatten_settings
from pg_ground.reporting import drawing, provenance, report
from pg_ground.reporting.files import write_atomically
from pg_ground.reporting.metric_writers import MetricsWriter
from pg_ground.reporting.tables import ascii_table
from pg_ground.rewards import workers
from pg_ground.types import TrainState, UserError


class Pictures(NamedTuple):
    """The first prompts of a step with what was answered to them."""

    sheet: Image.Image
    """Drawn."""
    prompts: list[dict[str, Any]]
    """As `draw.rollout_record` has them."""


class Stopwatch:
    """Seconds of each phase of the steps of a stage. The host dispatches and goes on; only a thread beside waits for devices.

    Devices work in the order of dispatch: a phase lasts from the end of the one before until all that it has is computed.
    """

    def __init__(self) -> None:
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="stopwatch")
        self._laps: list[tuple[str, Future[float]]] = []
        self._end, self._read = 0.0, True

    def step(self) -> Callable[[], dict[str, float]]:
        """Begins a step; returns what waits until devices are through with it and returns its seconds, as `time/<phase>_s`.

        It begins where the step before ended, or now if that has been read: what was done between is no part of it.
        """
        if self._read:
            self._end = time.perf_counter()
        laps = self._laps = []
        self._read = False

        def seconds() -> dict[str, float]:
            found: dict[str, float] = {}
            for phase, end in laps:
                name, before = f"time/{phase}_s", self._end
                self._end = end.result()
                found[name] = found.get(name, 0.0) + self._end - before
            self._read = laps is self._laps
            return found

        return seconds

    def lap(self, phase: str, value: Any) -> Any:
        """Returns `value` at once: what `phase` waits for or computes, but nothing that is donated to a later program."""
        self._laps.append((phase, self._beside.submit(_time_of, value)))
        return value


def _time_of(value: Any) -> float:
    jax.block_until_ready(value)
    return time.perf_counter()


class Recorder:
    """The record of one run, in step with its checkpoints: what a resumed run finds is what it would have written.

    Every process keeps one, of the same numbers; only process 0 writes, and has a `writer`.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        writer: MetricsWriter | None,
        saved: Checkpoints,
        measure: Callable[[Any], dict[str, float]],
        measure_every: Mapping[str, int],
        bad: BadRecords,
        found: int | None,
    ):
        """Args:
        measure_every: steps of each stage between measurements; 0 is only at its end.
        found: the step of the checkpoint that the run goes on from: what it wrote later, it will write again.
        """
        self.config, self.workdir, self.writer, self.checkpoints, self.bad = (
            config,
            workdir,
            writer,
            saved,
            bad,
        )
        self._measure, self._measure_every = measure, measure_every
        self._report_fails = False
        if writer is not None:
            report.forget_samples(workdir, found)
            provenance.note(workdir, found)
        self.resumed: Mapping[str, Any] = {}
        """What this process goes on from, of the checkpoint's record."""
        self._unread: deque[Callable[[], None]] = deque()
        """At most one step that is dispatched and has not been read."""
        self._window: dict[str, list[float]] = {}
        self._best: tuple[int, float] | None = None
        """Step of the best measurement so far and how good it is (`goodness`)."""
        self._tracing = False
        self._lengths = {"sft": config.sft.steps, "grpo": config.grpo.steps}

    def offset(self, stage: str) -> int:
        """Returns the number of steps in the stages before `stage`."""
        return sum(
            self._lengths[name] for name in self.config.stages[: self.config.stages.index(stage)]
        )

    def open_with(self, record: Mapping[str, Any]) -> None:
        """Takes up what had been gathered when a checkpoint was written."""
        if not {"processes", "best"} <= record.keys():
            raise UserError(
                f"{self.workdir} has a checkpoint of an earlier version of this package: go on with that one"
            )
        self.resumed = own_part(record["processes"], jax.process_index(), jax.process_count())
        self._window = {name: list(values) for name, values in record["window"].items()}
        self._best = record["best"] and tuple(record["best"])
        self.bad.set_state(self.resumed["bad_records"])

    def measure(self, step: int, stage: str, params: Any) -> None:
        """Writes the held-out measures of `params`, and `params` too if they are the best so far."""
        metrics = self._measure(params)
        if metrics:
            self._write(step, stage, metrics)
        if self.config.checkpoint.best:
            found = goodness(self.config.checkpoint.best, metrics)
            if self._best is None or found > self._best[1]:
                manager.save_best(self.workdir, step, params)
                self._best = step, found
        self._update_report()

    def _write(
        self, step: int, stage: str, metrics: Mapping[str, float], last: bool = False
    ) -> None:
        if self.writer is not None:
            self.writer.write(step, stage, metrics)
            self.writer.progress.show(step, self.total, stage, metrics, last)

    @property
    def total(self) -> int:
        return sum(self._lengths[name] for name in self.config.stages)

    def keep(
        self,
        stage: str,
        done: int,
        state: TrainState,
        batches: Any,
        metrics: Callable[[], Mapping[str, float]],
        pictures: Callable[[], Pictures] | None = None,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes in step number `done` of `stage`, which is dispatched; `metrics` waits for its numbers.

        They are read when the next step is dispatched too, so that devices do not wait for the host; at once if anything else
        is due after this step, which is then written. `pictures` draws its rollouts, `also` is for its checkpoint's record.
        With measures, pictures and checkpoints the report is written anew.
        """
        c, last = self.config, done == self._lengths[stage]

        def due(every: int) -> bool:
            return last or (every > 0 and done % every == 0)

        step, log = self.offset(stage) + done, due(c.log.every)
        measure, save = due(self._measure_every[stage]), due(c.checkpoint.every)
        show = pictures is not None and due(c.log.samples_every)
        first_traced, last_traced = c.log.profile_steps
        trace = step in (first_traced - 1, last_traced)
        tell = (
            log and jax.process_count() > 1
        )  # by a program of the devices, which comes after all that they have to do
        counts = self._bad_counts() if log else {}
        self._unread.append(partial(self._note, step, stage, metrics, log, counts, last))
        while len(self._unread) > (0 if measure or show or save or trace or tell else 1):
            self._unread.popleft()()
        if measure:
            self.measure(step, stage, state.params)
        if pictures is not None and show:
            self._show(step, stage, pictures())
        if save:
            self._write_bad_records()
            mine = {
                "batches": batches.get_state(),
                "bad_records": self.bad.get_state(),
                **(also or {}),
            }
            record = {
                "stage": stage,
                "window": self._window,
                "best": self._best,
                "processes": multiprocess.all_gather(mine),
            }
            self.checkpoints.save(step, state, record)
            self._update_report()
        self._trace(step)

    def _note(
        self,
        step: int,
        stage: str,
        metrics: Callable[[], Mapping[str, float]],
        log: bool,
        counts: Any,
        last: bool,
    ) -> None:
        """Waits for the numbers of a step, and writes a line where one is due."""
        for name, value in metrics().items():
            self._window.setdefault(name, []).append(float(value))
        if log:
            means = {name: mean_of_finite(values) for name, values in self._window.items()}
            self._write(step, stage, means | counts, last)
            self._window = {}

    def _trace(self, step: int) -> None:
        """Starts the profiler after the step before the first to be traced, and ends it after the last, or the run's last."""
        first, last = self.config.log.profile_steps
        if self._tracing and step == min(last, self.total):
            jax.profiler.stop_trace()
            self._tracing = False
        if first and step == first - 1 and step < self.total:
            jax.profiler.start_trace(self.workdir / "profile")
            self._tracing = True

    def _show(self, step: int, stage: str, pictures: Pictures) -> None:
        if self.writer is None:
            return
        name = report.samples_name(stage, step)
        write_atomically(self.workdir / f"{name}.png", drawing.png_bytes(pictures.sheet))
        sample = {"stage": stage, "step": step, "prompts": pictures.prompts}
        write_atomically(self.workdir / f"{name}.json", json.dumps(sample, allow_nan=False) + "\n")
        self.writer.picture(step, "samples", pictures.sheet)
        self._update_report()

    def _update_report(self) -> None:
        """Writes the report so far. Whatever goes wrong is said once and costs the page, not the run."""
        if self.writer is None:
            return
        try:
            report.write_report(self.workdir)
        except Exception as error:
            if not self._report_fails:
                self.writer.progress.end()
                said = " ".join(str(error).split())
                print(
                    f"{report.FILE} was not updated: {type(error).__name__}: {said}",
                    file=sys.stderr,
                    flush=True,
                )
            self._report_fails = True

    def close(self) -> Path:
        """Returns the path of the report. Process 0 has written it, and printed the table of results."""
        self._write_bad_records()
        if multiprocess.is_main_process():
            report.write_report(self.workdir)
            table = report.results(report.read_run(self.workdir))
            if table.rows:
                print(ascii_table(table))
        multiprocess.barrier("report")
        return self.workdir / report.FILE

    def _bad_counts(self) -> dict[str, float]:
        kinds = Counter(entry["kind"] for entry in self._bad_records())
        return {f"data/bad_records/{kind}": float(count) for kind, count in kinds.items()}

    def _bad_records(self) -> list[dict[str, Any]]:
        """Returns those that any process has come across, each once."""
        found = {
            (entry["source"], entry["index"]): entry
            for part in multiprocess.all_gather(self.bad.entries())
            for entry in part
        }
        return [found[place] for place in sorted(found)]

    def _write_bad_records(self) -> None:
        entries = self._bad_records()
        if entries and multiprocess.is_main_process():
            write_atomically(
                self.workdir / "bad_records.jsonl",
                "".join(json.dumps(entry) + "\n" for entry in entries),
            )


def goodness(measure: str, metrics: Mapping[str, float]) -> float:
    """Returns the value of a measure, negated where its name begins with "-": more is better, and NaN is worst.

    `eval/boxes/acc50` is `eval/boxes@512/acc50` where only so many questions are asked.

    Raises:
      UserError: nothing of that name was measured.
    """
    name = measure.removeprefix("-")
    known = {re.sub(r"@\d+(?=/[^/]*$)", "", full): value for full, value in metrics.items()} | dict(
        metrics
    )
    if name not in known:
        raise UserError(
            f"config.checkpoint.best is {measure!r}, which is not measured: {nearest(name, known)}"
        )
    value = -known[name] if measure.startswith("-") else known[name]
    return -math.inf if math.isnan(value) else value


def own_part(parts: Sequence[Mapping[str, Any]], index: int, count: int) -> Mapping[str, Any]:
    """Returns what process `index` of `count` goes on from, of what as many or other processes left behind.

    Others share the place in the data that is furthest; what had been counted goes to process 0.
    """
    if len(parts) == count:
        return parts[index]
    counted = parts if index == 0 else []
    found: dict[str, Any] = {
        "batches": pipeline.furthest([part["batches"] for part in parts]),
        "bad_records": pipeline.merged([part["bad_records"] for part in counted]),
    }
    if "judges" in parts[0]:
        found["judges"] = workers.merged([part["judges"] for part in counted])
    return found


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of those that are finite, NaN if none is: a reward is NaN at a step that had no question for it."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


MAY_DIFFER = ("log.", "checkpoint.every", "checkpoint.keep", "mesh.")
"""Settings that a resumed run may change: they do not touch what is computed, or, on another mesh, only the order of its sums."""


def claim(workdir: Path, config: Config) -> None:
    """Writes `config.json`, or checks that the run already there is this one.

    Raises:
      UserError: the directory holds a checkpoint of a run with other settings (but for `MAY_DIFFER`), or not all processes see
        the same there.
    """
    mine = flatten_settings(dataclasses.asdict(config))
    if any((workdir / "checkpoints").glob("[0-9]*")):
        theirs = flatten_settings(dataclasses.asdict(run_config(workdir)))
        differing = [
            f"config.{name} is {mine.get(name, 'absent')!r}, was {theirs.get(name, 'absent')!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name, ()) != theirs.get(name, ()) and not name.startswith(MAY_DIFFER)
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run with other settings ({'; '.join(differing[:3])}): choose another --workdir"
            )
    file = workdir / "config.json"
    multiprocess.barrier("claim")  # all have looked before anything changes
    if multiprocess.is_main_process():
        if not run_directory.steps(
            workdir
        ):  # what a run left that ended before its first checkpoint is not this one's
            manager.remove_tree(workdir / run_directory.BEST)
        write_atomically(file, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    multiprocess.barrier("claimed")
    seen = multiprocess.all_gather(file.is_file())
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not find {file}, which process 0 has written: --workdir must be on a file system "
            f"that all processes share"
        )
