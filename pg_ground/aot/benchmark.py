"""Times the steps of a run's last stage on this machine, phase by phase, with their roofline.

The steps are the steps of `train`, on the config's own data. Nothing is written and no checkpoint
of a run is read.
"""

import resource
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.aot import roofline
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import PrefetchIterator
from pg_ground.parallel import sharding
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training.loop import Inputs, open_batches
from pg_ground.training.setup import init_params, make_setup
from pg_ground.training.stage import Runtime, Stage, StepOutput
from pg_ground.training.stages import make_stages
from pg_ground.training.timing import StepTimer
from pg_ground.types import JsonDict

T = TypeVar("T")

WARM_UP_STEPS = 2
"""Steps before the measured ones: the first step compiles."""

TRACED_STEPS = 3
"""Steps after the measured ones. jax's profiler traces them, to show how long the devices are
idle."""


class StepTiming(NamedTuple):
    """The measurements of one step."""

    seconds: dict[str, float]
    """By phase."""
    completions: int
    decode_steps: int
    """Tokens that were decoded one after the other: the length of the longest completion."""


RunStep = Callable[[int, StepTimer], StepOutput]
"""Dispatches the step with this number."""


def bench(config: Config, steps: int) -> JsonDict:
    """Returns the measured time of each phase of the last stage, and its roofline time.

    Raises:
      UserError: something in `config` does not fit the data or the devices.
    """
    counter = CompilationCounter()
    inputs = prepare_benchmark(config)
    stage = inputs.stages[-1]
    timer = CompileTimer(counter)
    with open_steps(inputs, stage) as run_step:
        counter.take()  # compilations before the first step belong to no phase
        timings = time_steps(run_step, range(WARM_UP_STEPS + steps), timer)[WARM_UP_STEPS:]
        first_traced = WARM_UP_STEPS + steps
        traced = range(first_traced, first_traced + TRACED_STEPS)
        idle_share = traced_idle_share(run_step, traced, timer)
        peak_bytes, peak_kind = peak_memory(inputs.mesh)
    step_s = statistics.median(sum(timing.seconds.values()) for timing in timings)
    return {
        "stage": stage.name,
        "devices": {
            "count": inputs.mesh.size,
            "kind": inputs.mesh.devices.flat[0].device_kind,
            "jax": jax.__version__,
        },
        "steps": steps,
        "step_s": step_s,
        **measured_rates(inputs, stage, timings, step_s),
        "idle_share": idle_share,
        "host_gap_s": None if idle_share is None else idle_share * step_s,
        "peak_bytes": peak_bytes,
        "peak_bytes_of": peak_kind,
        "compile": timer.compilations,
    }


def prepare_benchmark(config: Config) -> Inputs:
    """Returns the inputs of a run, as `train` prepares them.

    The tokenizer need not have the vocabulary of the model, because the answers mean nothing here.
    The sizes of benchmarks/config.py use this.

    Raises:
      UserError: settings do not fit the devices, the rewards or the algorithm.
    """
    tokenizer = load_tokenizer(tokenizer_file(config.data.tokenizer))
    mesh = sharding.make_mesh(config.mesh)
    setup = make_setup(config, mesh, sharding.hbm_bytes(mesh), tokenizer.vocab)
    return Inputs(setup, mesh, tokenizer, make_stages(setup))


@contextmanager
def open_steps(inputs: Inputs, stage: Stage) -> Iterator[RunStep]:
    """Yields the function that dispatches the steps of a stage, with initial parameters."""
    setup = inputs.setup
    frozen = init_params(setup.config, setup.model, setup.frozen) if setup.frozen else {}
    state = stage.init(init_params(setup.config, setup.model, setup.trained))
    runtime = Runtime(inputs.mesh, frozen, inputs.tokenizer, None)
    stream = open_batches(inputs, stage, BadRecords())
    put_batch = partial(sharding.put_batch, inputs.mesh)
    with PrefetchIterator(stream, put_batch) as batches, stage.open(runtime, state):

        def run_step(number: int, timer: StepTimer) -> StepOutput:
            nonlocal state
            # A stage has learning rates for its configured steps only. A benchmark may run more.
            number %= stage.settings.steps
            state, output = stage.step(state, batches, number, timer)
            return output

        yield run_step


def time_steps(run_step: RunStep, numbers: Iterable[int], timer: StepTimer) -> list[StepTiming]:
    """Returns the timings of some steps.

    As in `train`, a step is read after the next one is dispatched.
    """
    timings = []
    unread: deque[Callable[[], StepTiming]] = deque()
    for number in numbers:
        read_seconds = timer.start_step()
        output = run_step(number, timer)
        unread.append(partial(_read_timing, read_seconds, output))
        if len(unread) > 1:
            timings.append(unread.popleft()())
    return timings + [read_timing() for read_timing in unread]


def _read_timing(read_seconds: Callable[[], dict[str, float]], output: StepOutput) -> StepTiming:
    """Waits until the devices have computed a step."""
    seconds = {
        name.removeprefix("time/").removesuffix("_s"): spent
        for name, spent in read_seconds().items()
    }
    if output.sampled_mask is None:
        return StepTiming(seconds, output.completions, 0)
    decode_steps = int(np.asarray(output.sampled_mask).any(axis=(0, 1)).sum())
    return StepTiming(seconds, output.completions, decode_steps)


def measured_rates(
    inputs: Inputs, stage: Stage, timings: list[StepTiming], step_s: float
) -> JsonDict:
    """Returns the device peaks, each phase beside its roofline, and rates per second."""
    config = inputs.setup.config
    peaks = roofline.device_peaks(inputs.mesh, jnp.dtype(config.model.dtype))
    programs = stage.programs()
    completions = timings[0].completions
    decode_steps = round(statistics.mean(timing.decode_steps for timing in timings))
    rates: dict[str, float] = {}
    phases: dict[str, dict[str, float]] = {}
    for phase in timings[0].seconds:
        seconds = [timing.seconds[phase] for timing in timings]
        median = statistics.median(seconds)
        phases[phase] = {"seconds": median, "spread": (max(seconds) - min(seconds)) / median}
        name = stage.phases.get(phase, "")
        if name in programs:
            group_size = completions // stage.settings.batch_size
            work = roofline.minimum_work(inputs.setup, stage, name, decode_steps, group_size)
            phases[phase] |= roofline.roofline_shares(work, peaks, median)
            if programs[name].decode_steps:
                rates["tokens_per_s"] = completions * decode_steps / median
    return {
        "ceilings": peaks._asdict(),
        "phases": phases,
        **rates,
        "tokens_a_completion": decode_steps,
        "completions_per_s": completions / step_s,
        "images_per_s": stage.settings.batch_size / step_s,
    }


class CompilationCounter:
    """Counts the seconds of jax's compilations, and the programs read from its cache on disk."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._cache_hits = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        # Tracing, lowering, and compiling or reading from the cache.
        if event.startswith("/jax/core/compile/"):
            self._seconds += duration_secs

    def _on_event(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._cache_hits += 1

    def take(self) -> tuple[float, int]:
        """Returns the seconds and the cache hits since the last call."""
        counts = self._seconds, self._cache_hits
        self._seconds = 0.0
        self._cache_hits = 0
        return counts


class CompileTimer(StepTimer):
    """A step timer that also counts the compilations of each phase."""

    def __init__(self, counter: CompilationCounter):
        super().__init__()
        self._counter = counter
        self.compilations: dict[str, dict[str, float]] = {}

    def lap(self, phase: str, value: T) -> T:
        seconds, cache_hits = self._counter.take()
        counts = self.compilations.setdefault(phase, {"seconds": 0.0, "from_cache": 0.0})
        counts["seconds"] += seconds
        counts["from_cache"] += cache_hits
        return super().lap(phase, value)


def traced_idle_share(run_step: RunStep, numbers: Iterable[int], timer: StepTimer) -> float | None:
    """Returns the `idle_share` of some traced steps."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python would slow down the host
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            time_steps(run_step, numbers, timer)
        return idle_share(Path(folder))


def idle_share(trace: Path) -> float | None:
    """Returns the share of the traced time in which no device ran a program.

    None means that the trace shows no device.
    """
    spans = sorted(_device_spans(trace))
    if not spans:
        return None
    start = spans[0][0]
    busy = 0.0
    end = start
    for span_start, span_end in spans:
        busy += max(0.0, span_end - max(span_start, end))
        end = max(end, span_end)
    return 1 - busy / (end - start)


def _device_spans(trace: Path) -> list[tuple[float, float]]:
    """Returns start and end, in nanoseconds, of everything that ran on devices.

    On a CPU these are XLA's threads.
    """
    planes = jax.profiler.ProfileData.from_file(str(next(trace.glob("**/*.xplane.pb")))).planes
    lines = [(plane.name, line) for plane in planes for line in plane.lines]
    device_lines = [
        line for plane, line in lines if plane.startswith("/device:") and line.name != "Steps"
    ]
    cpu_lines = [line for _, line in lines if line.name.startswith(("tf_XLA", "XLA"))]
    return [
        (event.start_ns, event.start_ns + event.duration_ns)
        for line in device_lines or cpu_lines
        for event in line.events
    ]


def peak_memory(mesh: Mesh) -> tuple[float, str]:
    """Returns the peak memory in bytes, and its kind.

    The kind is "device", or on a CPU "process" (resident memory).
    """
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"]), "device"
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"
