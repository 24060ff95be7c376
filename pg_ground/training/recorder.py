"""The recorder works between the steps of a run. It writes metrics, evaluations, pictures,
checkpoints and the report.
"""

import json
import logging
import math
import re
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax

from pg_ground.checkpoints import manager
from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords, in_words, merge_bad_records
from pg_ground.data.batches import BatchIterator, merge_batch_states
from pg_ground.parallel import multiprocess
from pg_ground.reporting import drawing, progress, provenance, report, run_files
from pg_ground.reporting.metric_writers import MetricsWriter
from pg_ground.reporting.tables import ascii_table
from pg_ground.reporting.timeline import CHECKPOINT, EVALUATION, PICTURES, PROFILER, Timeline
from pg_ground.rewards import workers
from pg_ground.storage.files import write_atomically
from pg_ground.storage.local_copy import LocalCopy
from pg_ground.storage.paths import FilePath
from pg_ground.training.stage import RolloutSamples, StepOutput
from pg_ground.types import POLICY, JsonDict, JsonObject, Params, TrainState, UserError, nearest

logger = logging.getLogger(__name__)

UNSCORED = "reward/unscored_fraction"
"""The metric of the share of completions to which no reward with a weight applies."""


class Best(NamedTuple):
    """The best evaluation so far by `config.checkpoint.best`."""

    step: int
    goodness: float
    """The value of the metric, negated if less is better."""


class Recorder:
    """Writes the record of one run in step with its checkpoints. A resumed run continues the
    record as if the first run had not ended.

    Every process has a recorder with the same numbers. Only process 0 has a `writer`, and only it
    writes.
    """

    def __init__(
        self,
        config: Config,
        files: LocalCopy,
        writer: MetricsWriter | None,
        checkpoints: Checkpoints,
        evaluate: Callable[[Params, bool], dict[str, float]],
        eval_every: Mapping[str, int],
        bad_records: BadRecords,
        resumed_step: int | None,
        timeline: Timeline | None = None,
    ):
        """Args:
        files: the working directory of the run, and its local copy.
        evaluate: trained parameters, and whether the evaluation is an interim one, to held-out
          metrics.
        eval_every: steps between evaluations of each stage, by the stage's name; 0 is only at its
          end.
        resumed_step: the step of the checkpoint that the run resumes from. Everything later is
          written again.
        timeline: gets the time of steps, evaluations, checkpoints and pictures; None if nobody
          reads it.
        """
        self.config = config
        self.files = files
        self.writer = writer
        self.checkpoints = checkpoints
        self.bad_records = bad_records
        self.timeline = timeline or Timeline()
        self._evaluate = evaluate
        self._eval_every = eval_every
        self._stage_steps = {name: config.stage_settings(name).steps for name in config.stages}
        self._unread: deque[Callable[[], None]] = deque()
        """At most one step that is dispatched and not yet read."""
        self._window: dict[str, list[float]] = {}
        """Values of each metric since the last line of metrics.jsonl."""
        self._best: Best | None = None
        self._is_tracing = False
        self._report_failed = False
        self._logged_bad_records = 0
        self._logged_unscored = False
        if writer is not None:
            run_files.delete_samples_after(files.path, resumed_step)
            provenance.record_machine(files.path, resumed_step)

    def offset(self, stage: str) -> int:
        """Returns the number of steps in the stages before `stage`."""
        earlier = self.config.stages[: self.config.stages.index(stage)]
        return sum(self._stage_steps[name] for name in earlier)

    @property
    def total_steps(self) -> int:
        """Number of steps of all stages."""
        return sum(self._stage_steps.values())

    def restore(self, record: JsonObject) -> JsonObject:
        """Restores the recorder from a checkpoint's record.

        Returns the values that this process saved.

        Raises:
          UserError: the record is of an earlier version of the package.
        """
        if not {"processes", "best"} <= record.keys():
            raise UserError(
                f"{self.files.folder} has a checkpoint of an earlier version of this package: "
                "resume it with that version"
            )
        saved = process_record(record["processes"], jax.process_index(), jax.process_count())
        self._window = {name: list(values) for name, values in record["window"].items()}
        self._best = Best(*record["best"]) if record["best"] else None
        self.bad_records.set_state(saved["bad_records"])
        return saved

    def evaluate(self, step: int, stage: str, params: Params, is_interim: bool) -> None:
        """Writes the held-out metrics of the policy's parameters, and saves the parameters if
        they are the best so far."""
        with progress.phase("evaluation"), self.timeline.during(EVALUATION, interim=is_interim):
            metrics = self._evaluate(params, is_interim)
        if metrics:
            self._write(step, stage, metrics)
        if self.config.checkpoint.best:
            goodness = metric_goodness(self.config.checkpoint.best, metrics)
            if self._best is None or goodness > self._best.goodness:
                with self.timeline.during(CHECKPOINT):
                    manager.save_best(self.files.folder, step, params)
                self._best = Best(step, goodness)
        self._update_report()

    def on_step_end(
        self,
        stage: str,
        done: int,
        state: TrainState,
        batches: BatchIterator,
        output: StepOutput,
        read_seconds: Callable[[], dict[str, float]],
    ) -> None:
        """Records step number `done` (from 1) of `stage`, which is dispatched but perhaps not
        finished.

        Its metrics are read when the next step is dispatched, so that the devices do not wait for
        the host. If anything else is due after this step, they are read at once: an evaluation,
        pictures, a checkpoint, a trace, or a line of several processes.
        """
        is_last = done == self._stage_steps[stage]
        step = self.offset(stage) + done

        def is_due(every: int) -> bool:
            return is_last or (every > 0 and done % every == 0)

        log = is_due(self.config.log.every)
        evaluate = is_due(self._eval_every[stage])
        save = is_due(self.config.checkpoint.every)
        draw = output.draw_samples is not None and is_due(self.config.log.samples_every)
        first_traced, last_traced = self.config.log.profile_steps
        trace = step in (first_traced - 1, last_traced)
        # A gather over processes is a program of the devices: it runs after all dispatched work.
        gather = log and jax.process_count() > 1
        bad_counts = self._bad_record_counts() if log else {}
        batch_size = self.config.stage_settings(stage).batch_size
        read = partial(read_metrics, output, read_seconds, batch_size)
        self._unread.append(partial(self._read_step, step, stage, read, log, bad_counts, is_last))
        may_wait = 0 if evaluate or draw or save or trace or gather else 1
        while len(self._unread) > may_wait:
            self._unread.popleft()()
        if evaluate:
            self.evaluate(step, stage, state.params[POLICY], not is_last)
        if draw and output.draw_samples is not None:
            with self.timeline.during(PICTURES):
                self._write_samples(step, stage, output.draw_samples())
        if save:
            self._save(step, stage, state, batches, output)
        self._trace(step)

    def _read_step(
        self,
        step: int,
        stage: str,
        read: Callable[[], Mapping[str, float]],
        log: bool,
        bad_counts: Mapping[str, float],
        is_last: bool,
    ) -> None:
        """Waits for the metrics of a step, and writes a line if one is due."""
        values = read()
        self.timeline.add_step(stage, step, values)
        self._check_rewards(step, values)
        for name, value in values.items():
            self._window.setdefault(name, []).append(float(value))
        if log:
            means = {name: mean_of_finite(values) for name, values in self._window.items()}
            self.timeline.flush()
            self._write(step, stage, means | dict(bad_counts), is_last)
            self._window = {}

    def _check_rewards(self, step: int, values: Mapping[str, float]) -> None:
        """Logs once that some completions have no reward.

        Raises:
          UserError: no completion of the step has a reward, so that nothing was learned.
        """
        share = values.get(UNSCORED, 0.0)
        prefix = "reward/weighted/"
        names = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
        if share == 1:
            raise UserError(
                f"step {step}: every reward is NaN: no reward with a weight ({', '.join(names)}) "
                "applies to any completion of this step"
            )
        if share and not self._logged_unscored:
            logger.warning(
                "step %d: no reward applies to %.0f %% of completions", step, 100 * share
            )
            self._logged_unscored = True

    def _write(
        self, step: int, stage: str, metrics: Mapping[str, float], is_last: bool = False
    ) -> None:
        if self.writer is not None:
            self.writer.write(step, stage, metrics)
            self.writer.progress.show(step, self.total_steps, stage, metrics, is_last)
            self.files.upload_sometimes()

    def _save(
        self, step: int, stage: str, state: TrainState, batches: BatchIterator, output: StepOutput
    ) -> None:
        """Writes a checkpoint with the state of every process."""
        self._write_bad_records()
        process_state = {
            "batches": batches.get_state(),
            "bad_records": self.bad_records.get_state(),
        }
        record = {
            "stage": stage,
            "window": self._window,
            "best": self._best,
            "processes": multiprocess.all_gather(process_state | dict(output.saved)),
        }
        with progress.phase("checkpoint"), self.timeline.during(CHECKPOINT):
            # A run that resumes from this checkpoint reads the metrics up to this step.
            self.files.upload()
            self.checkpoints.save(step, state, record)
        self._update_report()

    def _trace(self, step: int) -> None:
        """Starts the profiler before the first traced step, and stops it after the last one or
        at the end of the run."""
        first, last = self.config.log.profile_steps
        if self._is_tracing and step == min(last, self.total_steps):
            with self.timeline.during(PROFILER):
                jax.profiler.stop_trace()
            self._is_tracing = False
        if first and step == first - 1 and step < self.total_steps:
            jax.profiler.start_trace(self.files.path / "profile")
            self._is_tracing = True

    def _write_samples(self, step: int, stage: str, samples: RolloutSamples) -> None:
        if self.writer is None:
            return
        name = run_files.samples_name(stage, step)
        write_atomically(self.files.path / f"{name}.png", drawing.png_bytes(samples.sheet))
        record = {"stage": stage, "step": step, "prompts": samples.prompts}
        text = json.dumps(record, allow_nan=False) + "\n"
        write_atomically(self.files.path / f"{name}.json", text)
        self.writer.picture(step, "samples", samples.sheet)
        self._update_report()

    def _update_report(self) -> None:
        """Writes the report so far. A failure is logged once, and does not end the run."""
        if self.writer is None:
            return
        with self.timeline.during(PICTURES):
            self._try_to_write_report()
        self.files.upload_sometimes()

    def _try_to_write_report(self) -> None:
        try:
            report.write_report(self.files.path)
        except Exception as error:
            if not self._report_failed:
                message = " ".join(str(error).split())
                logger.warning(
                    "%s was not updated: %s: %s", report.FILE, type(error).__name__, message
                )
            self._report_failed = True

    def close(self) -> FilePath:
        """Returns the path of the report. Process 0 writes it and prints the table of results."""
        self._write_bad_records()
        if multiprocess.is_main_process():
            report.write_report(self.files.path)
            self.files.upload()
            table = report.results(run_files.read_run(self.files.path))
            if table.rows:
                multiprocess.print_once(ascii_table(table))
        multiprocess.barrier("report")
        return self.files.folder / report.FILE

    def _bad_record_counts(self) -> dict[str, float]:
        kinds = Counter(entry["kind"] for entry in self._all_bad_records())
        return {f"data/bad_records/{kind}": float(count) for kind, count in kinds.items()}

    def _all_bad_records(self) -> list[JsonDict]:
        """Returns the bad records of all processes, each once."""
        entries = {
            (entry["source"], entry["index"]): entry
            for process in multiprocess.all_gather(self.bad_records.entries())
            for entry in process
        }
        return [entries[key] for key in sorted(entries)]

    def _write_bad_records(self) -> None:
        entries = self._all_bad_records()
        if entries and multiprocess.is_main_process():
            lines = "".join(json.dumps(entry) + "\n" for entry in entries)
            write_atomically(self.files.path / "bad_records.jsonl", lines)
            if len(entries) > self._logged_bad_records:
                path = self.files.folder / "bad_records.jsonl"
                logger.warning("%s; all are in %s", in_words(entries), path)
                self._logged_bad_records = len(entries)


def read_metrics(
    output: StepOutput, read_seconds: Callable[[], dict[str, float]], questions: int
) -> dict[str, float]:
    """Returns the metrics, seconds and rates of a step on the host.

    Waits until the devices have finished the step.
    """
    values = {name: float(value) for name, value in jax.device_get(output.metrics).items()}
    seconds = read_seconds()
    step_s = sum(seconds.values())
    rates = {"perf/images_per_s": questions / step_s}
    if output.completions:
        rates["perf/completions_per_s"] = output.completions / step_s
        rates["perf/tokens_per_s"] = values["completion/length"] * output.completions / step_s
    return values | seconds | {"time/step_s": step_s} | rates


def metric_goodness(metric: str, metrics: Mapping[str, float]) -> float:
    """Returns the value of a metric, negated if its name starts with "-".

    More is better, and NaN is worst.

    `eval/boxes/acc50` also means `eval/boxes@512/acc50`, the metric on a limited number of
    questions. If there are several, it means the metric of the fewest questions, which every
    evaluation of the run has.

    Raises:
      UserError: there is no such metric.
    """
    name = metric.removeprefix("-")
    limits = {full: re.search(r"@(\d+)(?=/[^/]*$)", full) for full in metrics}
    limited = {full: int(limit[1]) for full, limit in limits.items() if limit}
    values = dict(metrics)
    for full in sorted(limited, key=lambda full: -limited[full]):
        values[full.replace(f"@{limited[full]}/", "/")] = metrics[full]
    if name not in values:
        raise UserError(
            f"config.checkpoint.best is {metric!r}, which is not evaluated: {nearest(name, values)}"
        )
    value = -values[name] if metric.startswith("-") else values[name]
    return -math.inf if math.isnan(value) else value


def process_record(parts: Sequence[JsonObject], index: int, count: int) -> JsonObject:
    """Returns the saved values that process `index` of `count` resumes from.

    If the number of processes has changed, all resume from the furthest position in the data.
    Counts go to process 0.
    """
    if len(parts) == count:
        return parts[index]
    counted = parts if index == 0 else []
    record: JsonDict = {
        "batches": merge_batch_states([part["batches"] for part in parts]),
        "bad_records": merge_bad_records([part["bad_records"] for part in counted]),
    }
    if "reward_workers" in parts[0]:
        record["reward_workers"] = workers.merge_states(
            [part["reward_workers"] for part in counted]
        )
    return record


def mean_of_finite(values: Sequence[float]) -> float:
    """Returns the mean of the finite values; NaN if there is none.

    A reward is NaN at a step without a question for it.
    """
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
