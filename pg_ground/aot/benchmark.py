"""How fast a run's steps are on the devices that are here, phase by phase, beside what these devices could do at best.

python -m pg_ground.bench [--config=configs/quickstart.py] [--steps=10]

Prints JSON. A step is that of `train`, on the config's own data: rollout (prompts to tokens), score (rewards and the reference
policy's pass) and update, or an update alone where there is no reinforced stage. Nothing is written and no checkpoint is read.

Ceilings are the chip's where it is a TPU of `pg_ground.aot.tpu_specs`; else they are measured here: the rate of a large product of
matrices in the dtype of activations, and of copying a large array, on all devices at once. FLOPs are those of matrix products,
counted in each program's jaxpr as if nothing were recomputed. Bytes are what must be moved at least, activations left out: of a
rollout, all weights once, then the decoder's, keys and values for every token; of an update, weights twice, then gradients,
the optimizer's averages and the parameters, each written and read once. `roofline_s` is the longer of the two at the ceilings,
`roofline_share` that over the measured median, `mfu` the share of the FLOPs' ceiling. Steps are dispatched as `train` does.
`idle_share` is the share of a few traced ones in which no device ran anything, and `host_gap_s` that of the median step: how long
the host keeps devices waiting. `compile` is by phase: seconds, and programs read from a cache on disk.
"""

import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.aot import jobs, tpu_specs
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import PrefetchIterator
from pg_ground.parallel import memory_model, sharding
from pg_ground.params import AbstractParams
from pg_ground.training.loop import Inputs, open_batches, prepare
from pg_ground.training.program import Program
from pg_ground.training.setup import init_params
from pg_ground.training.stage import BatchIterator, Runtime
from pg_ground.training.timing import StepTimer
from pg_ground.types import Array

WARM_UP = 2
"""Steps before those that are measured: the first compiles."""


TRACED = 3
"""Steps after them that jax's profiler traces, to see when devices stand idle."""


class Ceilings(NamedTuple):
    """What the devices together could do at best."""

    flops: float
    """A second, of products of matrices in the dtype of activations."""
    bandwidth: float
    """Bytes a second, read and written."""
    measured: bool
    """Here; else they are the chip's published ones."""


class Phase(NamedTuple):
    """What a phase of a step does at least, over all devices."""

    flops: float
    bytes: float


Step = Callable[[int, StepTimer], Array]
"""Dispatches step number n, timed by a watch; returns the mask of what it samples, bool[B, G, T]."""


def ceilings(mesh: Mesh, dtype: jnp.dtype) -> Ceilings:
    """Returns the peaks of a mesh's devices, measured where they are not known."""
    kind = mesh.devices.flat[0].device_kind
    if kind in tpu_specs.DEVICE_KINDS:
        chip = tpu_specs.CHIPS[tpu_specs.DEVICE_KINDS[kind]]
        return Ceilings(chip.flops * mesh.size, chip.hbm_bandwidth * mesh.size, False)
    cpu = mesh.devices.flat[0].platform == "cpu"
    side, words = (1024, 2**25) if cpu else (8192, 2**28)
    place = sharding.batch_sharding(mesh)
    rows = mesh.shape["replica"] * mesh.shape["data"]

    def of(shape: tuple[int, ...]) -> jax.Array:
        return jax.jit(lambda: jnp.ones((rows, *shape), dtype), out_shardings=place)()

    multiply = jax.jit(lambda a, b: jax.vmap(jnp.dot)(a, b))
    copy = jax.jit(lambda a: a + 1)
    matrix, array = of((side, side)), of((words,))
    product_s, copy_s = fastest(partial(multiply, matrix, matrix)), fastest(partial(copy, array))
    return Ceilings(2.0 * rows * side**3 / product_s, 2.0 * array.nbytes / copy_s, True)


def fastest(run: Callable[[], Any], times: int = 10) -> float:
    """Returns the seconds of the fastest of several runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def minimum_work(inputs: Inputs, name: str, program: Program, decode_steps: int) -> Phase:
    """Returns the operations and bytes of the named program over all devices.

    Args:
      decode_steps: tokens that were decoded one after the other.
    """
    setup = inputs.setup
    config = setup.config
    trip_count = decode_steps if program.decode_steps else 1
    flops = jobs.useful_flops(config, setup.mesh, name, trip_count)
    width = jnp.dtype(config.model.dtype).itemsize
    all_params = setup.trained | setup.frozen
    if program.decode_steps:
        decoder = {key: leaf for key, leaf in all_params.items() if key.startswith("llm/")}
        settings = config.grpo
        prefix, whole = (
            memory_model.cache_bytes(
                setup.architecture,
                setup.mesh,
                memory_model.device_work(setup.mesh, settings.batch_size, group, decode_steps),
            )
            * inputs.mesh.size
            for group in (0, settings.group_size)
        )
        per_token = width * count(decoder) + prefix + (whole - prefix) / 2
        return Phase(flops, width * count(all_params) + decode_steps * per_token)
    if not program.donate_argnums:
        return Phase(flops, width * count(all_params))
    stage = inputs.stages[-1]
    param_width = jnp.dtype(config.model.param_dtype).itemsize
    trained = count(setup.trained)
    state = stage.abstract_state()
    averages = sharding.bytes_per_device(state.opt_state) * inputs.mesh.size
    per_update = 2 * width * count(all_params) + 4 * param_width * trained + 2 * averages
    return Phase(flops, stage.settings.updates_per_step * per_update)


def count(abstract: AbstractParams) -> float:
    """Returns the number of parameters."""
    return float(sum(np.prod(leaf.shape) for leaf in abstract.values()))


def make_step(
    inputs: Inputs, batches: BatchIterator, opened: Callable[[AbstractContextManager[Any]], Any]
) -> Step:
    """Returns a function that dispatches the steps of the last stage."""
    setup = inputs.setup
    stage = inputs.stages[-1]
    frozen = init_params(setup.config, setup.model, setup.frozen) if setup.frozen else {}
    states = [stage.init(init_params(setup.config, setup.model, setup.trained))]
    opened(stage.open(Runtime(inputs.mesh, frozen, inputs.tokenizer, None), states[0]))

    def step(number: int, timer: StepTimer) -> Array:
        state, output = stage.step(states.pop(), batches, number, timer)
        states.append(state)
        return np.zeros((1, 1, 0), bool) if output.sampled_mask is None else output.sampled_mask

    return step


class Compilations:
    """Seconds that jax spent compiling since last asked, and how many programs it found in its cache on disk."""

    def __init__(self) -> None:
        self.seconds, self.hits = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._spent)
        jax.monitoring.register_event_listener(self._happened)

    def _spent(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(
            "/jax/core/compile/"
        ):  # tracing, lowering, and compiling or reading from the cache
            self.seconds += duration_secs

    def _happened(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"

    def take(self) -> dict[str, float]:
        found = {"seconds": self.seconds, "from_cache": self.hits}
        self.seconds, self.hits = 0.0, 0
        return found


class CompileTimer(StepTimer):
    """A stopwatch that also notes what was compiled in a phase."""

    def __init__(self, compilations: Compilations):
        super().__init__()
        self._compilations = compilations
        self.compiled: dict[str, dict[str, float]] = {}

    def lap(self, phase: str, value: Any) -> Any:
        found = self.compiled.setdefault(phase, {"seconds": 0.0, "from_cache": 0.0})
        for name, count in self._compilations.take().items():
            found[name] += count
        return super().lap(phase, value)


def time_steps(
    step: Step, numbers: Iterable[int], watch: StepTimer
) -> list[tuple[dict[str, float], int]]:
    """Returns the seconds of these steps, and the tokens that each sampled one after the other.

    As in `train`, a step is read once the next is dispatched.
    """

    def read(seconds: Callable[[], dict[str, float]], mask: Array) -> tuple[dict[str, float], int]:
        return seconds(), int(np.asarray(mask).any(axis=(0, 1)).sum())

    found, unread = [], deque()
    for number in numbers:
        unread.append((watch.start_step(), step(number, watch)))
        if len(unread) > 1:
            found.append(read(*unread.popleft()))
    return found + [read(*one) for one in unread]


def idle_share(trace: Path) -> float | None:
    """Returns the share of the traced time in which no device ran a program, None if the trace has nothing of devices."""
    planes = jax.profiler.ProfileData.from_file(str(next(trace.glob("**/*.xplane.pb")))).planes
    lines = [(plane.name, line) for plane in planes for line in plane.lines]
    on_device = [
        line for plane, line in lines if plane.startswith("/device:") and line.name != "Steps"
    ]
    chosen = on_device or [line for _, line in lines if line.name.startswith(("tf_XLA", "XLA"))]
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for line in chosen
        for event in line.events
    )
    if not spans:
        return None
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def peak_bytes(mesh: Mesh) -> tuple[float, str]:
    """Returns the most memory a device held so far, and of what: on a CPU it is this process's resident memory."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"]), "device"
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"


def bench(config: Config, steps: int) -> dict[str, Any]:
    """Returns how long `steps` steps of the last stage of `config` took, and how long they would take at the devices' peaks.

    Raises:
      UserError: something in `config` does not fit the data or the devices.
    """
    compilations = Compilations()
    inputs = prepare(config)
    mesh = inputs.mesh
    stage = inputs.stages[-1]
    timer = CompileTimer(compilations)
    with ExitStack() as stack:
        stream = open_batches(inputs, stage, BadRecords())
        batches = stack.enter_context(PrefetchIterator(stream, partial(sharding.put_batch, mesh)))
        step = make_step(inputs, batches, stack.enter_context)
        compilations.take()
        timed = time_steps(step, range(WARM_UP + steps), timer)[WARM_UP:]
        traced = range(WARM_UP + steps, WARM_UP + steps + TRACED)
        idle = trace_idle_share(step, traced, timer)
        memory_bytes, memory_kind = peak_bytes(mesh)
    peaks = ceilings(mesh, jnp.dtype(config.model.dtype))
    decode_steps = round(statistics.mean(tokens for _, tokens in timed))
    seconds = [
        {name.removeprefix("time/").removesuffix("_s"): spent for name, spent in step_s.items()}
        for step_s, _ in timed
    ]
    step_s = statistics.median(sum(spent.values()) for spent in seconds)
    programs = stage.programs()
    phases = {}
    for phase in seconds[0]:
        spent = [by_phase[phase] for by_phase in seconds]
        median = statistics.median(spent)
        phases[phase] = {"seconds": median, "spread": (max(spent) - min(spent)) / median}
        name = stage.phases.get(phase, "")
        if name in programs:
            work = minimum_work(inputs, name, programs[name], decode_steps)
            phases[phase] |= shares(work, peaks, median)
    samples = "rollout" in phases
    completions = stage.settings.batch_size * config.grpo.group_size if samples else 0
    rates: dict[str, float] = {}
    if samples:
        rates["tokens_per_s"] = completions * decode_steps / phases["rollout"]["seconds"]
    return {
        "stage": stage.name,
        "devices": {
            "count": mesh.size,
            "kind": mesh.devices.flat[0].device_kind,
            "jax": jax.__version__,
        },
        "ceilings": peaks._asdict(),
        "steps": steps,
        "step_s": step_s,
        "phases": phases,
        **rates,
        "tokens_a_completion": decode_steps,
        "completions_per_s": completions / step_s,
        "images_per_s": stage.settings.batch_size / step_s,
        "idle_share": idle,
        "host_gap_s": None if idle is None else idle * step_s,
        "peak_bytes": memory_bytes,
        "peak_bytes_of": memory_kind,
        "compile": timer.compiled,
    }


def trace_idle_share(step: Step, numbers: Iterable[int], timer: StepTimer) -> float | None:
    """Returns the share of some traced steps in which no device ran a program; None if the trace has no devices."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing Python would slow down the host
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            time_steps(step, numbers, timer)
        return idle_share(Path(folder))


def shares(phase: Phase, top: Ceilings, seconds: float) -> dict[str, float]:
    """Returns what a phase does at least, and how near to that `seconds` is."""
    at_best = max(phase.flops / top.flops, phase.bytes / top.bandwidth)
    mfu = phase.flops / top.flops / seconds
    return {
        **phase._asdict(),
        "mfu": mfu,
        "roofline_s": at_best,
        "roofline_share": at_best / seconds,
    }
