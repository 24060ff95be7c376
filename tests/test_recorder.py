"""What a run writes down between its steps, and when; that its files are those of an unbroken
run is in test_story."""

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
from pg_ground.training import loop, optimizers, recorder, timing
from pg_ground.training.loop import steps_between_evals
from pg_ground.training.setup import learning_rates
from pg_ground.training.stage import RolloutSamples, StepOutput
from pg_ground.types import POLICY, TrainState, UserError


@pytest.fixture
def tiny() -> Config:
    return config.parse(runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]())


def test_the_measure_of_the_best_is_named_with_or_without_its_number_of_questions():
    metrics = {"eval/boxes@512/acc50": 0.5, "eval/boxes@512/mae": math.nan}
    for name in ("eval/boxes/acc50", "eval/boxes@512/acc50"):
        assert (
            recorder.metric_goodness(name, metrics),
            recorder.metric_goodness("-" + name, metrics),
        ) == (
            0.5,
            -0.5,
        )
    assert recorder.metric_goodness("-eval/boxes/mae", metrics) == -math.inf
    with pytest.raises(UserError, match="did you mean eval/boxes/acc50"):
        recorder.metric_goodness("eval/boxes/acc5", metrics)


def test_an_epoch_is_as_many_steps_as_all_questions_of_a_stage_take(tiny):
    def steps(stage: str, **settings: float) -> int:
        changed = replace(tiny, eval=replace(tiny.eval, **settings))
        return steps_between_evals(changed, stage, 160)

    assert steps("grpo", every_epochs=0.5) == 10  # 8 questions per step
    assert steps("sft", every_epochs=0.001) == 1
    assert steps("sft", every=7) == 7


class Coming:
    """A result that is there once it is set."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def block_until_ready(self) -> None:
        assert self._event.wait(60)


def test_phases_add_up_to_the_time_between_the_ends_of_steps(monkeypatch):
    """The clock says how often it has been asked:

    once where a step begins after a pause, and at the end of each phase.
    """
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    watch, results = timing.StepTimer(), [Coming() for _ in range(6)]
    first = watch.start_step()
    assert [
        watch.lap(phase, result)
        for phase, result in zip(("data", "score", "score"), results, strict=False)
    ] == results[:3]
    second = watch.start_step()  # before anything of the first is computed
    watch.lap("update", results[3])
    for result in results:
        result.set()
    assert first() == {"time/data_s": 1.0, "time/score_s": 2.0} and second() == {
        "time/update_s": 1.0
    }
    next(ticks)  # something that is no part of a step
    third = watch.start_step()
    watch.lap("update", results[4])
    assert third() == {"time/update_s": 1.0} and next(ticks) == 8


def test_an_error_of_a_program_comes_where_its_step_is_read():
    def fail(_: jax.Array) -> jax.Array:
        raise ValueError("a fault of the device")

    watch = timing.StepTimer()
    seconds = watch.start_step()
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of the device"):
        watch.lap("rollout", jax.jit(lambda x: jax.pure_callback(fail, x, x))(jnp.ones(3)))
        seconds()


class Saved(Checkpoints):
    """Checkpoints that are only noted."""

    def __init__(self, happened: list[str]):
        self._happened = happened

    def save(self, step, state, record) -> None:
        self._happened.append(f"save {step} {record['window'].get('sft/loss')}")


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


def test_a_step_is_read_behind_the_next_and_before_what_is_due_after_it(tiny, tmp_path):
    """Eight steps, a line every second, a measurement after the third, a checkpoint after the
    fifth, and all at the end."""
    happened: list[str] = []

    def measure(_: object) -> dict[str, float]:
        happened.append("measure")
        return {}

    def read(step: int) -> dict[str, float]:
        happened.append(f"read {step}")
        return {"time/update_s": 1.0}

    c = replace(tiny, sft=replace(tiny.sft, steps=8), checkpoint=replace(tiny.checkpoint, every=5))
    kept = recorder.Recorder(
        c, tmp_path, None, Saved(happened), measure, {"sft": 3}, BadRecords(), None
    )
    state, batches = (
        TrainState(jnp.int32(0), {POLICY: {}}, {}, jnp.float32(0)),
        NoBatches(),
    )
    for step in range(1, 9):
        happened.append(f"dispatch {step}")
        output = StepOutput({"sft/loss": jnp.float32(step)})
        kept.on_step_end("sft", step, state, batches, output, partial(read, step))
    assert happened == [
        *("dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3", "measure"),
        *("dispatch 4", "dispatch 5", "read 4", "read 5", "save 5 [5.0]"),
        *(
            "dispatch 6",
            "read 6",
            "measure",
            "dispatch 7",
            "dispatch 8",
            "read 7",
            "read 8",
            "measure",
            "save 8 None",
        ),
    ]


def test_a_step_is_read_before_its_pictures_and_where_a_trace_begins_or_ends(
    tiny, tmp_path, monkeypatch
):
    """Pictures after every third of five steps, a trace of the second and third; nothing else is
    due before the end."""
    happened: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: happened.append("trace"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("traced"))
    log = replace(tiny.log, samples_every=3, profile_steps=(2, 3))
    c = replace(
        tiny,
        stages=("grpo",),
        grpo=replace(tiny.grpo, steps=5),
        log=log,
        checkpoint=replace(tiny.checkpoint, every=9),
    )
    saved = Saved(happened)
    kept = recorder.Recorder(
        c, tmp_path, None, saved, lambda _: {}, {"grpo": 0}, BadRecords(), None
    )  # pyright: ignore[reportArgumentType]
    state, batches = (
        TrainState(jnp.int32(0), {POLICY: {}}, {}, jnp.float32(0)),
        NoBatches(),
    )

    def note(what: str, value: object) -> object:
        happened.append(what)
        return value

    for step in range(1, 6):
        happened.append(f"dispatch {step}")
        samples = RolloutSamples(Image.new("RGB", (1, 1)), [])
        draw = partial(note, f"draw {step}", samples)
        read = partial(note, f"read {step}", {"time/update_s": 1.0})
        output = StepOutput({"reward": jnp.float32(1)}, draw_samples=draw)
        kept.on_step_end("grpo", step, state, batches, output, read)
    assert happened == [
        *(
            "dispatch 1",
            "read 1",
            "trace",
            "dispatch 2",
            "dispatch 3",
            "read 2",
            "read 3",
            "draw 3",
            "traced",
        ),
        *("dispatch 4", "dispatch 5", "read 4", "read 5", "draw 5", "save 5 None"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_dispatches_a_step_before_it_reads_the_last(stage, tiny, tmp_path, monkeypatch):
    happened, lap, read_metrics = [], timing.StepTimer.lap, recorder.read_metrics

    def noted_lap(self, phase, value):
        happened.append(phase)
        return lap(self, phase, value)

    def noted_read(*arguments):
        happened.append("read")
        return read_metrics(*arguments)

    monkeypatch.setattr(timing.StepTimer, "lap", noted_lap)
    monkeypatch.setattr(recorder, "read_metrics", noted_read)
    short = {
        stage: replace(tiny.sft if stage == "sft" else tiny.grpo, steps=3),
        "mesh": replace(tiny.mesh, data=1),
    }
    c = replace(
        tiny,
        stages=(stage,),
        eval=replace(tiny.eval, sources={}),
        data=replace(tiny.data, check_records=0),
        **short,
    )
    loop.train(c, tmp_path / "run")
    step = ["data", "update"] if stage == "sft" else ["data", "rollout", *["score"] * 3, "update"]
    assert happened == [*step, *step, "read", *step, "read", "read"]


@pytest.mark.parametrize(("stage", "updates"), [("sft", 1), ("grpo", 4)])
def test_the_learning_rate_of_a_step_is_the_rate_of_its_last_update(stage, updates, tiny):
    c = replace(tiny, grpo=replace(tiny.grpo, minibatches=2, num_iterations=2))
    settings = c.stage_settings(stage)
    schedule = optimizers.schedule(settings.optimizer, settings.steps * updates)
    expected = [float(schedule(updates * step - 1)) for step in range(1, settings.steps + 1)]
    np.testing.assert_array_equal(learning_rates(settings), np.float32(expected))
