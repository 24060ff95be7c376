"""What a run writes down between its steps: metrics, measurements, pictures, checkpoints, and the report at the end."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from pg_ground import draw
from pg_ground.checkpoints import Checkpoints
from pg_ground.config import Config
from pg_ground.data.pipeline import BadRecords
from pg_ground.evaluate import results_table
from pg_ground.metrics import MetricsWriter, progress_line, read_metrics
from pg_ground.model.weights import run_config
from pg_ground.report import ascii_table, write_report, write_whole
from pg_ground.types import TrainState, UserError

PICTURES_IN_REPORT = 4


class Stopwatch:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str, value: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Returns `value` once it is computed, having added the time since the last lap to `time/<phase>_s`.

        `meanwhile` is called before waiting, and so while devices compute.
        """
        meanwhile()
        value = jax.block_until_ready(value)
        now = time.perf_counter()
        name = f"time/{phase}_s"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        return value


class Diary:
    """The record of one run, in step with its checkpoints: what a resumed run finds is what it would have written."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        writer: MetricsWriter,
        checkpoints: Checkpoints,
        measure: Callable[[Any], dict[str, float]],
        bad: BadRecords,
    ):
        self.config, self.workdir, self.writer, self.checkpoints, self.bad = config, workdir, writer, checkpoints, bad
        self._measure = measure
        self.resumed: Mapping[str, Any] = {}
        """Record of the checkpoint that the run goes on from."""
        self._window: dict[str, list[float]] = {}
        self._lengths = {"sft": config.sft.steps, "grpo": config.grpo.steps}

    def offset(self, stage: str) -> int:
        """Returns the number of steps in the stages before `stage`."""
        return sum(self._lengths[name] for name in self.config.stages[: self.config.stages.index(stage)])

    def open_with(self, record: Mapping[str, Any]) -> None:
        """Takes up the means and the bad records that had been gathered when a checkpoint was written."""
        self.resumed = record
        self._window = {name: list(values) for name, values in record["window"].items()}
        self.bad.set_state(record["bad_records"])

    def measure(self, step: int, stage: str, params: Any) -> None:
        """Writes the held-out measures of `params`."""
        metrics = self._measure(params)
        if metrics:
            self.writer.write(step, stage, metrics)
            print(progress_line(step, self.total, stage, metrics), flush=True)

    @property
    def total(self) -> int:
        return sum(self._lengths[name] for name in self.config.stages)

    def keep(
        self,
        stage: str,
        state: TrainState,
        batches: Any,
        metrics: Mapping[str, float],
        pictures: Callable[[], Image.Image] | None = None,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes what is due after a step of `stage`; `pictures` draws its rollouts, `also` is for its checkpoint's record."""
        c, done = self.config, int(state.step)
        step, last = self.offset(stage) + done, done == self._lengths[stage]
        for name, value in metrics.items():
            self._window.setdefault(name, []).append(float(value))
        if done % c.log.every == 0 or last:
            means = {name: mean_of_finite(values) for name, values in self._window.items()}
            counts = {f"data/bad_records/{kind}": float(count) for kind, count in self.bad.counts().items()}
            self.writer.write(step, stage, means | counts)
            print(progress_line(step, self.total, stage, means), flush=True)
            self._window = {}
        if (c.eval.every and done % c.eval.every == 0) or last:
            self.measure(step, stage, state.params)
        if pictures is not None and ((c.log.samples_every and done % c.log.samples_every == 0) or last):
            folder = self.workdir / "samples"
            write_whole(folder / f"{stage}_{step:08d}.png", draw.png_bytes(pictures()))
        if done % c.checkpoint.every == 0 or last:
            self._write_bad_records()
            record = {
                "stage": stage,
                "batches": batches.get_state(),
                "window": self._window,
                "bad_records": self.bad.get_state(),
                **(also or {}),
            }
            self.checkpoints.save(step, state, record)

    def close(self) -> Path:
        """Returns the path of the report, having printed the table of results."""
        self._write_bad_records()
        metrics = read_metrics(self.workdir)
        columns: dict[str, dict[str, float]] = {}
        ends = {0: "start"} | {self.offset(stage) + self._lengths[stage]: f"after {stage}" for stage in self.config.stages}
        for line in metrics:
            measured = {name: value for name, value in line.items() if name.startswith("eval/") and value is not None}
            if measured and line["step"] in ends:
                columns[ends[line["step"]]] = measured
        table = results_table("held-out measures (sampled_: at temperature; the rest: greedy)", columns)
        pictures = sorted((self.workdir / "samples").glob("*.png"))[-PICTURES_IN_REPORT:]
        report = write_report(
            self.workdir,
            title=f"pg_ground: {self.workdir.name}",
            config_json=dataclasses.asdict(self.config),
            metrics=metrics,
            tables=[table] if columns else [],
            pictures=[(picture.stem, picture) for picture in pictures],
        )
        if columns:
            print(ascii_table(table))
        return report

    def _write_bad_records(self) -> None:
        entries = self.bad.entries()
        if entries:
            write_whole(self.workdir / "bad_records.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of those that are finite, NaN if none is: a reward is NaN at a step that had no question for it."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


MAY_DIFFER = ("log.", "checkpoint.")
"""Settings that a resumed run may change: they do not touch what is computed."""


def claim(workdir: Path, config: Config) -> None:
    """Writes `config.json`, or checks that the run already there is this one.

    Raises:
      UserError: the directory holds a checkpoint of a run with other settings (but for `MAY_DIFFER`).
    """
    mine = _leaves(dataclasses.asdict(config))
    if any((workdir / "checkpoints").glob("[0-9]*")):
        theirs = _leaves(dataclasses.asdict(run_config(workdir)))
        differing = [
            f"config.{name} is {mine.get(name, 'absent')!r}, was {theirs.get(name, 'absent')!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name, ()) != theirs.get(name, ()) and not name.startswith(MAY_DIFFER)
        ]
        if differing:
            raise UserError(f"{workdir} holds a run with other settings ({'; '.join(differing[:3])}): choose another --workdir")
    write_whole(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
