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
from pg_ground.data import pipeline
from pg_ground.models import PaliGemma
from pg_ground.parallel import memory_model, sharding
from pg_ground.params import AbstractParams, unflatten
from pg_ground.rl.scored_rollouts import weights_at
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training import programs
from pg_ground.training.loop import Run, begin, check, fresh_state, open_stream
from pg_ground.training.recorder import Stopwatch
from pg_ground.training.rollout_worker import LOTS, RolloutWorker, make_reward_workers
from pg_ground.types import Array

PROGRAMS = {
    "grpo": {"rollout": "rollout", "score": "reference", "update": "update"},
    "sft": {"update": "sft"},
}
"""By stage, the program that a phase of a step spends its time in."""

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


Step = Callable[[int, Stopwatch], Array]
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


def least(config: Config, mesh: Mesh, name: str, turns: int) -> Phase:
    """Returns operations and bytes of the named program over all devices; `turns` tokens are sampled one after the other."""
    model = PaliGemma(config.model, sharding.activation_sharding(mesh))
    trained, frozen = programs.layout(config, model, mesh)
    width, wide = (
        jnp.dtype(config.model.dtype).itemsize,
        jnp.dtype(config.model.param_dtype).itemsize,
    )
    mine, all_of_it = size(trained), size(trained | frozen)
    flops = jobs.useful_flops(config, mesh, name, turns)
    if name == "rollout":
        prompts, group = config.grpo.batch_size, config.grpo.group_size
        shared, whole = (
            memory_model.cache(config, mesh, memory_model.work(config, mesh, prompts, g, turns))
            * mesh.size
            for g in (0, group)
        )
        decoder = size(
            {name: leaf for name, leaf in (trained | frozen).items() if name.startswith("llm/")}
        )
        return Phase(
            flops, width * all_of_it + turns * (width * decoder + shared + (whole - shared) / 2)
        )
    if name == "reference":
        return Phase(flops, width * all_of_it)
    stage = "sft" if name == "sft" else "grpo"
    factors = programs.factors_of(config, trained | frozen)
    averages = (
        sharding.bytes_per_device(
            programs.state_like(config, mesh, stage, factors, unflatten(trained)).opt
        )
        * mesh.size
    )
    once = 2 * width * all_of_it + 2 * wide * mine + 2 * averages + 2 * wide * mine
    return Phase(flops, programs.updates_a_step(config, stage) * once)


def size(like: AbstractParams) -> float:
    """Returns the number of parameters."""
    return float(sum(np.prod(leaf.shape) for leaf in like.values()))


def reinforced(
    run: Run, batches: Any, opened: Callable[[AbstractContextManager[Any]], Any]
) -> Step:
    """Returns the reinforced stage of `train.grpo`."""
    c, mesh = run.config.grpo, run.mesh
    model, frozen = run.model, run.frozen
    trained = begin(run.config, model, programs.layout(run.config, model, mesh)[0])
    state = fresh_state(run, "grpo", trained)
    ref_params = jax.tree.map(jnp.copy, state.params) if programs.looks_at_reference(c) else None
    compare = programs.compiled(programs.grpo_compare(run.config, model), run.config, mesh)
    learn = programs.compiled(
        programs.grpo_update(run.config, model, mesh, run.factors, state), run.config, mesh
    )
    read, read_frozen = (programs.reader(run.config, mesh, tree) for tree in (state.params, frozen))
    sampler = RolloutWorker(
        run.config, model, mesh, read_frozen(frozen), run.tokenizer, opened(make_reward_workers(c))
    )
    key, held = jax.random.key(run.config.seed), [state]

    def step(number: int, watch: Stopwatch) -> Array:
        state, own_key = held.pop(), jax.random.fold_in(key, number)
        by_reward = weights_at(c.all_rewards, number)
        sampled, _ = sampler(
            read(state.params), batches.__next__, own_key, by_reward, watch, batches.prepare
        )
        learned_from, _ = watch.lap(
            "score", compare(sampled, frozen, ref_params, by_reward, state.kl_coef)
        )
        state, updated = learn(state, frozen, learned_from, jax.random.fold_in(own_key, LOTS))
        watch.lap("update", updated)
        held.append(state)
        return sampled.rollout.mask

    return step


def supervised(run: Run, batches: Any) -> Step:
    """Returns the supervised stage of `train.sft`."""
    trained = begin(run.config, run.model, programs.layout(run.config, run.model, run.mesh)[0])
    state = fresh_state(run, "sft", trained)
    learn = programs.sft_update(
        run.config, run.model, run.mesh, run.factors, state, run.tokenizer.vocab
    )
    learn = programs.compiled(learn, run.config, run.mesh)
    key, held = jax.random.key(run.config.seed), [state]

    def step(number: int, watch: Stopwatch) -> Array:
        batch = watch.lap("data", next(batches))
        dropout_key = jax.random.fold_in(key, number) if run.config.model.lora.dropout else None
        state, updated = learn(held.pop(), run.frozen, batch, dropout_key=dropout_key)
        watch.lap("update", updated)
        batches.prepare()
        held.append(state)
        return np.zeros((1, 1, 0), bool)

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


class Watch(Stopwatch):
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


def in_turn(
    step: Step, numbers: Iterable[int], watch: Stopwatch
) -> list[tuple[dict[str, float], int]]:
    """Returns the seconds of these steps, and the tokens that each sampled one after the other.

    As in `train`, a step is read once the next is dispatched.
    """

    def read(seconds: Callable[[], dict[str, float]], mask: Array) -> tuple[dict[str, float], int]:
        return seconds(), int(np.asarray(mask).any(axis=(0, 1)).sum())

    found, unread = [], deque()
    for number in numbers:
        unread.append((watch.step(), step(number, watch)))
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
    """Returns what `steps` steps of the last stage of `config` took, and what they would at the devices' ceilings.

    Raises:
      UserError: something in `config` does not fit the data or the devices.
    """
    compilations = Compilations()
    tokenizer, mesh, bad = (
        load_tokenizer(config.data.tokenizer),
        sharding.make_mesh(config.mesh),
        pipeline.BadRecords(),
    )
    check(config, mesh)
    stage = config.stages[-1]
    c = config.grpo if stage == "grpo" else config.sft
    model = PaliGemma(config.model, sharding.activation_sharding(mesh))
    trained, frozen = programs.layout(config, model, mesh)
    factors = programs.factors_of(config, trained | frozen)
    kept = begin(config, model, frozen) if frozen else {}
    run = Run(config, Path(), model, kept, factors, tokenizer, mesh, None, bad)  # pyright: ignore[reportArgumentType]: no diary
    watch = Watch(compilations)
    with ExitStack() as stack:
        stream = open_stream(config, stage, tokenizer, mesh, bad)
        batches = stack.enter_context(pipeline.Ahead(stream, partial(sharding.put_batch, mesh)))
        step = (
            reinforced(run, batches, stack.enter_context)
            if stage == "grpo"
            else supervised(run, batches)
        )
        compilations.take()
        timed = in_turn(step, range(WARM_UP + steps), watch)[WARM_UP:]
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing Python would slow down the host
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                in_turn(step, range(WARM_UP + steps, WARM_UP + steps + TRACED), watch)
            idle = idle_share(Path(folder))
        held, kind = peak_bytes(mesh)
    top, mean_turns = (
        ceilings(mesh, jnp.dtype(config.model.dtype)),
        round(statistics.mean(turns for _, turns in timed)),
    )
    measured = [
        {name[len("time/") : -len("_s")]: spent for name, spent in seconds.items()}
        for seconds, _ in timed
    ]
    whole = statistics.median(sum(spent.values()) for spent in measured)
    phases = {}
    for phase in measured[0]:
        found = [spent[phase] for spent in measured]
        phases[phase] = {
            "seconds": statistics.median(found),
            "spread": (max(found) - min(found)) / statistics.median(found),
        }
        name = PROGRAMS[stage].get(phase)
        if name in programs.names(config):
            phases[phase] |= shares(
                least(config, mesh, name, mean_turns), top, phases[phase]["seconds"]
            )
    completions = c.batch_size * config.grpo.group_size if stage == "grpo" else 0
    rates = (
        {"tokens_per_s": completions * mean_turns / phases["rollout"]["seconds"]}
        if completions
        else {}
    )
    return {
        "stage": stage,
        "devices": {
            "count": mesh.size,
            "kind": mesh.devices.flat[0].device_kind,
            "jax": jax.__version__,
        },
        "ceilings": top._asdict(),
        "steps": steps,
        "step_s": whole,
        "phases": phases,
        **rates,
        "tokens_a_completion": mean_turns,
        "completions_per_s": completions / whole,
        "images_per_s": c.batch_size / whole,
        "idle_share": idle,
        "host_gap_s": None if idle is None else idle * whole,
        "peak_bytes": held,
        "peak_bytes_of": kind,
        "compile": watch.compiled,
    }


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
