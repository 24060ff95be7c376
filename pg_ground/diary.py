"""What a run writes down between its steps: metrics, measurements, pictures, checkpoints, and the report at the end."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from pg_ground import draw
from pg_ground.checkpoints import Checkpoints
from pg_ground.config import Config, parse
from pg_ground.data.pipeline import BadRecords
from pg_ground.evaluate import results_table
from pg_ground.metrics import MetricsWriter, progress_line, read_metrics
from pg_ground.report import ascii_table, write_report, write_whole
from pg_ground.types import TrainState, UserError

PICTURES_IN_REPORT = 4


class Stopwatch:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str, value: Any) -> Any:
        """Returns `value` once it is computed, having noted the time since the last lap under `time/<phase>_s`."""
        value = jax.block_until_ready(value)
        now = time.perf_counter()
        self.seconds[f"time/{phase}_s"] = now - self._last
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
        self._window: dict[str, list[float]] = {}
        self._lengths = {"sft": config.sft.steps, "grpo": config.grpo.steps}

    def offset(self, stage: str) -> int:
        """Returns the number of steps in the stages before `stage`."""
        return sum(self._lengths[name] for name in self.config.stages[: self.config.stages.index(stage)])

    def open_with(self, record: Mapping[str, Any]) -> None:
        """Takes up the means that were being gathered when a checkpoint was written."""
        self._window = {name: list(values) for name, values in record["window"].items()}

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
    ) -> None:
        """Writes whatever is due after a step of `stage`; `pictures` draws its rollouts."""
        c, done = self.config, int(state.step)
        step, last = self.offset(stage) + done, done == self._lengths[stage]
        for name, value in metrics.items():
            self._window.setdefault(name, []).append(float(value))
        if done % c.log.every == 0 or last:
            means = {name: statistics.fmean(values) for name, values in self._window.items()}
            counts = {f"data/bad_records/{kind}": float(count) for kind, count in self.bad.counts().items()}
            self.writer.write(step, stage, means | counts)
            print(progress_line(step, self.total, stage, means), flush=True)
            self._window = {}
        if (c.eval.every and done % c.eval.every == 0) or last:
            self.measure(step, stage, state.params)
        if pictures is not None and ((c.log.samples_every and done % c.log.samples_every == 0) or last):
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{stage}_{step:08d}.png").write_bytes(draw.png_bytes(pictures()))
        if done % c.checkpoint.every == 0 or last:
            self._write_bad_records()
            record = {"stage": stage, "batches": batches.get_state(), "window": self._window}
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


def claim(workdir: Path, config: Config) -> None:
    """Writes `config.json`, or checks that the run already there is this one.

    Raises:
      UserError: the directory holds a run with other settings (how often to log, measure and save may differ).
    """
    file = workdir / "config.json"
    mine = json.loads(json.dumps(dataclasses.asdict(config)))
    if file.is_file():
        theirs = json.loads(json.dumps(dataclasses.asdict(parse(json.loads(file.read_text(encoding="utf-8"))))))
        differing = [
            f"config.{name} is {new!r}, was {old!r}"
            for (name, new), (_, old) in zip(_leaves(mine), _leaves(theirs), strict=False)
            if new != old and not name.startswith(("log.", "checkpoint."))
        ]
        if differing:
            raise UserError(f"{workdir} holds a run with other settings ({'; '.join(differing[:3])}): choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(mine, indent=1) + "\n")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found
