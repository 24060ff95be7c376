"""Training: the stages of a run one after the other, in one working directory.

A run that is started again on the same directory resumes from its newest checkpoint, bit for bit.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from pg_ground.checkpoints import manager, run_directory
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import PrefetchIterator, TrainingBatches, training_batches
from pg_ground.data.datasets import Examples
from pg_ground.data.text_budgets import Budget, check_budgets, measure_budget
from pg_ground.evals.runner import open_eval_sources
from pg_ground.parallel import multiprocess, sharding
from pg_ground.params import AbstractParams, pick, unflatten
from pg_ground.reporting import metric_writers, progress, provenance
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.reporting.timeline import (
    CHECKPOINT,
    PICTURES,
    RESTORE,
    START_UP,
    STEPS,
    Timeline,
    warnings_to,
)
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.storage.local_copy import open_copy
from pg_ground.storage.paths import FilePath, remove_tree
from pg_ground.tokenizer import Tokenizer, check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training.evaluation import all_programs, make_evaluate
from pg_ground.training.memory_table import memory_table
from pg_ground.training.recorder import Recorder
from pg_ground.training.run_config import check_run_config
from pg_ground.training.setup import Setup, init_params, make_setup
from pg_ground.training.stage import Runtime, Stage
from pg_ground.training.stages import make_stages
from pg_ground.training.timing import StepTimer
from pg_ground.types import (
    POLICY,
    JsonDict,
    JsonObject,
    Params,
    TrainState,
    UserError,
    first_problems,
)

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The parts of a run that come from the config, the tokenizer and the devices."""

    setup: Setup
    mesh: Mesh
    tokenizer: Tokenizer
    stages: list[Stage]


class Resumed(NamedTuple):
    """The checkpoint from which a run continues."""

    step: int
    """Steps of all stages before it."""
    record: JsonDict
    state: TrainState


def train(
    config: Config, workdir: FilePath, accept: Sequence[str] = (), started: float | None = None
) -> FilePath:
    """Runs the stages of a run that are not finished, and returns the path of its report.

    Args:
      accept: settings that may differ from the run that is already in `workdir`.
      started: Unix time at which the process started, for the goodput; None is now.

    Raises:
      UserError: something in `config` does not fit the data, the devices, the checkpoint or the run
        already in `workdir`.
    """
    timeline = Timeline(started)
    with warnings_to(timeline):
        return _train(config, workdir, accept, timeline)


def _train(
    config: Config, workdir: FilePath, accept: Sequence[str], timeline: Timeline
) -> FilePath:
    inputs = prepare(config)
    if multiprocess.is_main_process():
        run_directory.check_can_write(workdir)
    is_new = not has_checkpoint(workdir)
    abstract = inputs.setup.trained | inputs.setup.frozen
    all_params = init_params(config, inputs.setup.model, abstract) if is_new else None
    bad_records = BadRecords()
    streams = {stage.name: open_batches(inputs, stage, bad_records) for stage in inputs.stages}
    eval_sources = open_eval_sources(config.eval, config.data, config.model.image_size)
    check_text_lengths(config, inputs.tokenizer, streams, eval_sources)
    for stage in inputs.stages:
        check_stage(inputs, stage, streams[stage.name])
    check_run_config(workdir, config, accept)
    with timeline.during(START_UP if is_new else RESTORE):
        frozen = store_frozen(workdir, inputs.setup.frozen, all_params)
    trained = None if all_params is None else pick(all_params, inputs.setup.trained.__contains__)
    del all_params

    with ExitStack() as stack:
        is_main = multiprocess.is_main_process()
        record = (run_directory.RECORD_FILES, run_directory.RECORD_FOLDERS) if is_main else ()
        files = stack.enter_context(open_copy(workdir, *record))
        # It ends when the last checkpoint is complete, and before the files are uploaded.
        stack.enter_context(timeline)
        checkpoints = manager.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        stack.enter_context(checkpoints)
        states = {stage.name: stage.abstract_state for stage in inputs.stages}
        with timeline.during(RESTORE):
            resumed = resume_point(checkpoints, states)
        resumed_step = None if resumed is None else resumed.step
        eval_every = {
            name: steps_between_evals(config, name, sum(map(len, batches.datasets)))
            for name, batches in streams.items()
        }
        facts = run_facts(config, eval_every)
        timeline.open(files.path if is_main else None, resumed_step, facts)
        writer = stack.enter_context(
            metric_writers.open_metrics(
                files.path, resumed_step, config.log.wandb, dataclasses.asdict(config)
            )
            if is_main
            else nullcontext()
        )
        recorder = Recorder(
            config,
            files,
            writer,
            checkpoints,
            make_evaluate(
                inputs.setup, inputs.mesh, frozen, eval_sources, inputs.tokenizer, bad_records
            ),
            eval_every,
            bad_records,
            resumed_step,
            timeline,
        )
        print_sizes(inputs)
        runtime = Runtime(inputs.mesh, frozen, inputs.tokenizer, workdir)
        run_stages(inputs, runtime, streams, recorder, trained, resumed)
        timeline.enter(PICTURES)
        path = recorder.close()
        timeline.enter(CHECKPOINT)
        return path


def run_facts(config: Config, eval_every: Mapping[str, int]) -> JsonObject:
    """Returns the values in the line of a start in the timeline.

    Args:
      eval_every: steps between evaluations by stage.
    """
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return {
        "chips": provenance.chip_count(),
        "eval_every": dict(eval_every),
        "settings": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def resume_point(
    checkpoints: manager.Checkpoints, abstract_states: Mapping[str, Callable[[], TrainState]]
) -> Resumed | None:
    """Returns the newest checkpoint that all processes can restore; None if there is no checkpoint.

    Damaged newer ones no longer count as complete, so that their steps can be written again.

    Args:
      abstract_states: returns the abstract train state of a stage, by the stage's name.

    Raises:
      UserError: no checkpoint can be restored, or the newest one belongs to other settings.
    """
    damaged: dict[int, str] = {}
    for step in multiprocess.all_gather(checkpoints.steps())[0]:
        resumed, problem = None, ""
        try:
            resumed = _restore(checkpoints, step, abstract_states)
        except manager.Damaged as error:
            problem = str(error)
        # The damage can be in the shards of one process only.
        problems = [text for text in multiprocess.all_gather(problem) if text]
        if problems:
            damaged[step] = problems[0]
            continue
        if damaged:
            _withdraw(checkpoints, damaged, step)
        return resumed
    if damaged:
        raise UserError(
            f"no checkpoint of {checkpoints.directory} can be restored: "
            f"{first_problems(list(damaged.values()), limit=3)}: bring a copy "
            "of one back, or choose another --workdir to start again"
        )
    return None


def _restore(
    checkpoints: manager.Checkpoints,
    step: int,
    abstract_states: Mapping[str, Callable[[], TrainState]],
) -> Resumed:
    """Returns a checkpoint. Raises UserError as `resume_point` does, and `manager.Damaged`."""
    record = checkpoints.record(step)
    abstract_state = abstract_states.get(record.get("stage", ""))
    if abstract_state is None:
        raise UserError(
            f"{checkpoints.directory / str(step)} was written in the stage "
            f"{record.get('stage')!r:.40}, which config.stages lacks"
        )
    return Resumed(step, record, checkpoints.restore(step, abstract_state()))


def _withdraw(checkpoints: manager.Checkpoints, damaged: Mapping[int, str], step: int) -> None:
    """Makes damaged checkpoints incomplete, and logs it once."""
    checkpoints.withdraw(list(damaged))
    for problem in damaged.values() if multiprocess.is_main_process() else ():
        logger.warning(
            "%s: the run continues from checkpoint %d, and writes the damaged one again",
            problem, step,
        )  # fmt: skip


def run_stages(
    inputs: Inputs,
    runtime: Runtime,
    streams: Mapping[str, TrainingBatches],
    recorder: Recorder,
    params: Params | None,
    resumed: Resumed | None,
) -> None:
    """Runs the stages that are not finished.

    `params` are the first trained parameters of a new run.
    """
    names = [stage.name for stage in inputs.stages]
    first = names.index(resumed.record["stage"]) if resumed else 0
    for stage in inputs.stages[first:]:
        saved: JsonObject = {}
        if resumed is not None and stage.name == resumed.record["stage"]:
            state = resumed.state
            saved = recorder.restore(resumed.record)
            streams[stage.name].set_state(saved["batches"])
            resumed = None
        else:
            assert params is not None
            state = stage.init(params)
            if stage.name == names[0] and inputs.setup.config.eval.at_start:
                progress.set_step(stage.name, 0)
                recorder.evaluate(0, stage.name, params, is_interim=True)
        state = run_stage(
            stage, runtime._replace(saved=saved), state, streams[stage.name], recorder
        )
        params = state.params[POLICY]


def run_stage(
    stage: Stage,
    runtime: Runtime,
    state: TrainState,
    stream: TrainingBatches,
    recorder: Recorder,
) -> TrainState:
    """Returns the state at the end of a stage."""
    timer = StepTimer()
    put_batch = partial(sharding.put_batch, runtime.mesh)
    with PrefetchIterator(stream, put_batch) as batches, stage.open(runtime, state):
        recorder.timeline.enter(STEPS)
        for number in range(int(state.step), stage.settings.steps):
            progress.set_step(stage.name, recorder.offset(stage.name) + number + 1)
            read_seconds = timer.start_step()
            state, output = stage.step(state, batches, number, timer)
            recorder.on_step_end(stage.name, number + 1, state, batches, output, read_seconds)
        recorder.timeline.enter(START_UP)  # of the next stage, if there is one
    return state


def prepare(config: Config) -> Inputs:
    """Returns tokenizer, mesh, setup and stages of a run, with the settings checked.

    Raises:
      UserError: settings do not fit the devices, the rewards, the algorithms or the tokenizer.
    """
    metric_writers.check_mirror(config.log.wandb)
    tokenizer = load_tokenizer(tokenizer_file(config.data.tokenizer))
    mesh = sharding.make_mesh(config.mesh)
    setup = make_setup(config, mesh, sharding.hbm_bytes(mesh), tokenizer.vocab)
    stages = make_stages(setup)
    if config.eval.sources:
        sharding.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")
    check_vocab_size(tokenizer, setup.model.config.text.vocab_size)
    return Inputs(setup, mesh, tokenizer, stages)


def has_checkpoint(workdir: FilePath) -> bool:
    """Returns whether the directory has a checkpoint to resume from.

    Raises:
      UserError: the processes do not see the same checkpoints.
    """
    steps_by_process = multiprocess.all_gather(sorted(run_directory.steps(workdir)))
    for index, steps in enumerate(steps_by_process):
        if steps != steps_by_process[0]:
            raise UserError(
                f"process 0 finds the checkpoints {steps_by_process[0]} in {workdir}, process "
                f"{index} {steps}: --workdir must be on a file system that all processes share"
            )
    return bool(steps_by_process[0])


def store_frozen(workdir: FilePath, frozen: AbstractParams, all_params: Params | None) -> Params:
    """Returns the frozen parameters.

    A new run writes them once beside its checkpoints, so that it does not need `config.init`.

    Args:
      all_params: all parameters of a new run; None restores the frozen ones.
    """
    path = workdir / "frozen"
    if frozen and all_params is None:
        try:
            return manager.restore_tree(path, unflatten(frozen))
        except UserError as error:
            raise UserError(
                f"{error}: a new run with the same settings writes the same {path.name}, which can "
                "be copied"
            ) from error
    if multiprocess.is_main_process():
        # A run with other settings can have ended before its first checkpoint.
        remove_tree(path)
    multiprocess.barrier("frozen")
    if not frozen:
        return {}
    params = pick(all_params, frozen.__contains__)
    manager.save_tree(path, params)
    return params


def open_batches(inputs: Inputs, stage: Stage, bad_records: BadRecords) -> TrainingBatches:
    """Returns the endless batches of a stage, with the rows that lie on this process's devices."""
    config = inputs.setup.config
    settings = stage.settings
    return training_batches(
        {f"{stage.name}/{name}": source for name, source in settings.sources.items()},
        config.data,
        inputs.tokenizer,
        image_size=config.model.image_size,
        batch_size=settings.batch_size,
        seed=config.seed + stage.data_seed,
        bad_records=bad_records,
        rows=sharding.local_rows(inputs.mesh, settings.batch_size),
    )


def steps_between_evals(config: Config, stage: str, questions: int) -> int:
    """Returns the steps of a stage between evaluations; 0 is only at its end.

    An epoch is one pass over `questions`.
    """
    if not config.eval.every_epochs:
        return config.eval.every
    steps = config.eval.every_epochs * questions / config.stage_settings(stage).batch_size
    return max(1, round(steps))


def check_text_lengths(
    config: Config,
    tokenizer: Tokenizer,
    streams: Mapping[str, TrainingBatches],
    eval_sources: Mapping[str, Examples],
) -> None:
    """Prints the longest texts of every source.

    Raises:
      UserError: a text is longer than its configured length.
    """
    if not config.data.check_records:
        return
    parts: Sequence[Examples] = [
        *(part for stream in streams.values() for part in stream.datasets),
        *eval_sources.values(),
    ]
    budgets = [measure_budget(part, tokenizer, config.data) for part in parts]
    rows = [[str(value) for value in budget[:6]] for budget in budgets]
    heads = ["source", "questions", "measured", "prompt tokens", "suffix tokens", "objects"]
    data = config.data
    limits = f"limits: {data.prompt_length}, {data.suffix_length} and {data.max_boxes}"
    multiprocess.print_once(ascii_table(Table("longest texts", heads, rows, limits)))
    print_readings(budgets)
    check_budgets(budgets, config.data)


def check_stage(inputs: Inputs, stage: Stage, stream: TrainingBatches) -> None:
    """Prints what a stage can learn from its sources.

    Raises:
      UserError: the stage can learn nothing from a source.
    """
    if not inputs.setup.config.data.check_records:
        return
    table = stage.check_data(stream.datasets, inputs.tokenizer)
    if table is not None:
        multiprocess.print_once(ascii_table(table))


def print_readings(budgets: Sequence[Budget]) -> None:
    """Prints how the records of each source are read if they leave that open, and all doubts."""
    rows = [
        [budget.source, records, note]
        for budget in budgets
        for note, records in budget.notes.items()
    ]
    if rows:
        table = Table("how records are read", ["source", "records", "reading"], rows, "")
        multiprocess.print_once(ascii_table(table))
    for budget in budgets:
        for doubt in budget.doubts:
            logger.warning("source %s: %s", budget.source, doubt)


def print_sizes(inputs: Inputs) -> None:
    """Prints the number and size of the parameters, and the estimated memory of each program."""
    multiprocess.print_once(size_line(inputs.setup, inputs.stages[0]))
    programs = all_programs(inputs.setup, inputs.stages)
    table = memory_table(programs, inputs.setup.hbm_bytes, "this run")
    multiprocess.print_once(ascii_table(table))


def size_line(setup: Setup, stage: Stage) -> str:
    """Returns in words the number of parameters, how many are trained, and the bytes of both and
    of the optimizer."""

    def count_and_bytes(tree: PyTree) -> tuple[int, int]:
        sizes = [(int(np.prod(leaf.shape)), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
        return sum(n for n, _ in sizes), sum(n * width for n, width in sizes)

    trained, trained_bytes = count_and_bytes(setup.trained)
    frozen, frozen_bytes = count_and_bytes(setup.frozen)
    optimizer_bytes = count_and_bytes(stage.abstract_state().opt_state)[1]
    return (
        f"{trained + frozen:,} parameters ({trained_bytes + frozen_bytes:,} bytes), "
        f"{trained:,} of them trained ({trained_bytes:,} bytes); optimizer {optimizer_bytes:,} "
        "bytes"
    )
