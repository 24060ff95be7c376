"""The recorder writes lines, evaluations, pictures and checkpoints between the steps of a run.

test_command_line.py compares the files of a resumed run with the files of a run without a kill.
"""

import itertools
import math
import runpy
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from PIL import Image

from pg_ground import config
from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.storage.local_copy import LocalCopy
from pg_ground.training import loop, optimizers, recorder, timing
from pg_ground.training.loop import steps_between_evals
from pg_ground.training.setup import learning_rates
from pg_ground.training.stage import RolloutSamples, StepOutput
from pg_ground.types import POLICY, TrainState, UserError


@pytest.fixture
def tiny() -> Config:
    return config.parse(runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]())


def test_the_metric_of_the_best_checkpoint_is_named_with_or_without_its_number_of_questions():
    metrics = {"eval/boxes@512/acc50": 0.5, "eval/boxes@512/mae": math.nan}
    for name in ("eval/boxes/acc50", "eval/boxes@512/acc50"):
        assert recorder.metric_goodness(name, metrics) == 0.5
        assert recorder.metric_goodness("-" + name, metrics) == -0.5
    assert recorder.metric_goodness("-eval/boxes/mae", metrics) == -math.inf
    last = metrics | {"eval/boxes/acc50": 0.7, "eval/boxes@600/acc50": 0.6}
    assert recorder.metric_goodness("eval/boxes/acc50", last) == 0.5
    with pytest.raises(UserError, match="did you mean eval/boxes/acc50"):
        recorder.metric_goodness("eval/boxes/acc5", metrics)


def test_an_epoch_is_the_number_of_steps_that_reads_every_question_once(tiny):
    def steps(stage: str, **settings: float) -> int:
        changed = replace(tiny, eval=replace(tiny.eval, **settings))
        return steps_between_evals(changed, stage, 160)

    assert steps("grpo", every_epochs=0.5) == 10  # 8 questions per step
    assert steps("sft", every_epochs=0.001) == 1
    assert steps("sft", every=7) == 7


class PendingResult:
    """A result that is ready after a call of `set`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def block_until_ready(self) -> None:
        assert self._event.wait(60)


def test_phases_add_up_to_the_time_between_the_ends_of_steps(monkeypatch):
    """Each call of this test's clock returns the number of earlier calls.

    The timer calls it at the start of a step after a pause, and at the end of each phase.
    """
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    timer = timing.StepTimer()
    results = [PendingResult() for _ in range(6)]
    read_first = timer.start_step()
    assert [
        timer.lap(phase, result)
        for phase, result in zip(("data", "score", "score"), results, strict=False)
    ] == results[:3]
    read_second = timer.start_step()  # before any result of the first step is ready
    timer.lap("update", results[3])
    for result in results:
        result.set()
    assert read_first() == {"time/data_s": 1.0, "time/score_s": 2.0}
    assert read_second() == {"time/update_s": 1.0}
    next(ticks)  # time between two steps
    read_third = timer.start_step()
    timer.lap("update", results[4])
    assert read_third() == {"time/update_s": 1.0}
    assert next(ticks) == 8


def test_an_error_of_a_program_is_raised_when_its_step_is_read():
    def fail(_: jax.Array) -> jax.Array:
        raise ValueError("a fault of the device")

    timer = timing.StepTimer()
    read_seconds = timer.start_step()
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of the device"):
        timer.lap("rollout", jax.jit(lambda x: jax.pure_callback(fail, x, x))(jnp.ones(3)))
        read_seconds()


class FakeCheckpoints(Checkpoints):
    """Checkpoints that add an event to a list and write no file."""

    def __init__(self, events: list[str]):
        self._events = events

    def save(self, step, state, record) -> None:
        self._events.append(f"save {step} {record['window'].get('sft/loss')}")


class NoBatches:
    """A batch iterator without batches."""

    def __next__(self):
        raise StopIteration

    def prepare(self) -> None:
        pass

    def get_state(self) -> dict:
        return {}

    def set_state(self, state) -> None:
        pass


def test_a_step_is_read_after_the_next_dispatch_and_before_its_evaluation_or_checkpoint(
    tiny, tmp_path
):
    """Every second step of eight writes a line, and every third step is evaluated on the interim
    questions.

    A checkpoint is due after the fifth step. All three are due after the last step.
    """
    events: list[str] = []

    def evaluate(_: object, is_interim: bool) -> dict[str, float]:
        events.append("evaluate some" if is_interim else "evaluate all")
        return {}

    def read(step: int) -> dict[str, float]:
        events.append(f"read {step}")
        return {"time/update_s": 1.0}

    c = replace(tiny, sft=replace(tiny.sft, steps=8), checkpoint=replace(tiny.checkpoint, every=5))
    run_recorder = recorder.Recorder(
        c,
        LocalCopy(tmp_path),
        None,
        FakeCheckpoints(events),
        evaluate,
        {"sft": 3},
        BadRecords(),
        None,
    )
    state = TrainState(jnp.int32(0), {POLICY: {}}, {}, jnp.float32(0))
    batches = NoBatches()
    for step in range(1, 9):
        events.append(f"dispatch {step}")
        output = StepOutput({"sft/loss": jnp.float32(step)})
        run_recorder.on_step_end("sft", step, state, batches, output, partial(read, step))
    assert events == [
        *("dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3", "evaluate some"),
        *("dispatch 4", "dispatch 5", "read 4", "read 5", "save 5 [5.0]"),
        *("dispatch 6", "read 6", "evaluate some", "dispatch 7", "dispatch 8"),
        *("read 7", "read 8", "evaluate all", "save 8 None"),
    ]


def test_a_step_is_read_before_its_pictures_and_at_both_ends_of_a_trace(
    tiny, tmp_path, monkeypatch
):
    """Every third step of five draws pictures, and steps 2 and 3 are traced.

    Nothing else is due before the end.
    """
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: events.append("start trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop trace"))
    log = replace(tiny.log, samples_every=3, profile_steps=(2, 3))
    c = replace(
        tiny,
        stages=("grpo",),
        grpo=replace(tiny.grpo, steps=5),
        log=log,
        checkpoint=replace(tiny.checkpoint, every=9),
    )
    checkpoints = FakeCheckpoints(events)
    run_recorder = recorder.Recorder(
        c, LocalCopy(tmp_path), None, checkpoints, lambda *_: {}, {"grpo": 0}, BadRecords(), None
    )  # pyright: ignore[reportArgumentType]
    state = TrainState(jnp.int32(0), {POLICY: {}}, {}, jnp.float32(0))
    batches = NoBatches()

    def record(event: str, value: object) -> object:
        events.append(event)
        return value

    for step in range(1, 6):
        events.append(f"dispatch {step}")
        samples = RolloutSamples(Image.new("RGB", (1, 1)), [])
        draw = partial(record, f"draw {step}", samples)
        read = partial(record, f"read {step}", {"time/update_s": 1.0})
        output = StepOutput({"reward": jnp.float32(1)}, draw_samples=draw)
        run_recorder.on_step_end("grpo", step, state, batches, output, read)
    assert events == [
        *("dispatch 1", "read 1", "start trace", "dispatch 2", "dispatch 3"),
        *("read 2", "read 3", "draw 3", "stop trace"),
        *("dispatch 4", "dispatch 5", "read 4", "read 5", "draw 5", "save 5 None"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_dispatches_a_step_before_it_reads_the_step_before(
    stage, tiny, tmp_path, monkeypatch
):
    events = []
    lap = timing.StepTimer.lap
    read_metrics = recorder.read_metrics

    def recording_lap(self, phase, value):
        events.append(phase)
        return lap(self, phase, value)

    def recording_read(*arguments):
        events.append("read")
        return read_metrics(*arguments)

    monkeypatch.setattr(timing.StepTimer, "lap", recording_lap)
    monkeypatch.setattr(recorder, "read_metrics", recording_read)
    settings = {
        stage: replace(tiny.sft if stage == "sft" else tiny.grpo, steps=3),
        "mesh": replace(tiny.mesh, data=1),
    }
    c = replace(
        tiny,
        stages=(stage,),
        eval=replace(tiny.eval, sources={}),
        data=replace(tiny.data, check_records=0),
        **settings,
    )
    loop.train(c, tmp_path / "run")
    step = ["data", "update"] if stage == "sft" else ["data", "rollout", *["score"] * 3, "update"]
    assert events == [*step, *step, "read", *step, "read", "read"]


@pytest.mark.parametrize(("stage", "updates"), [("sft", 1), ("grpo", 4)])
def test_the_learning_rate_of_a_step_is_the_rate_of_its_last_update(stage, updates, tiny):
    c = replace(tiny, grpo=replace(tiny.grpo, minibatches=2, num_iterations=2))
    settings = c.stage_settings(stage)
    schedule = optimizers.schedule(settings.optimizer, settings.steps * updates)
    expected = [float(schedule(updates * step - 1)) for step in range(1, settings.steps + 1)]
    np.testing.assert_array_equal(learning_rates(settings), np.float32(expected))
