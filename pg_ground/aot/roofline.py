"""Roofline analysis of a step: peak rates of the devices, minimum work of each phase.

The minimum time of a phase is the longer of its operations at the peak rate of matrix products, and
its bytes at the peak memory bandwidth.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.aot import jobs, tpu_specs
from pg_ground.parallel import memory_model, sharding
from pg_ground.params import AbstractParams
from pg_ground.training.program import Program
from pg_ground.training.setup import Setup
from pg_ground.training.stage import Stage


class Peaks(NamedTuple):
    """Peak rates of all devices together."""

    flops: float
    """Operations per second of matrix products in the dtype of activations."""
    bandwidth: float
    """Bytes per second, read and written."""
    measured: bool
    """Whether the rates were measured here. Otherwise they are the published rates of the chip."""


class MinimumWork(NamedTuple):
    """The work that a phase needs at least, over all devices."""

    flops: float
    bytes: float


def device_peaks(mesh: Mesh, dtype: jnp.dtype) -> Peaks:
    """Returns the published peaks of the mesh's devices, or measures them.

    The measurements are a large matrix product and a copy of a large array, on all devices at once.
    """
    device = mesh.devices.flat[0]
    if device.device_kind in tpu_specs.DEVICE_KINDS:
        chip = tpu_specs.CHIPS[tpu_specs.DEVICE_KINDS[device.device_kind]]
        return Peaks(chip.flops * mesh.size, chip.hbm_bandwidth * mesh.size, False)
    is_cpu = device.platform == "cpu"
    side = 1024 if is_cpu else 8192
    length = 2**25 if is_cpu else 2**28
    rows = mesh.shape["replica"] * mesh.shape["data"]
    batch_sharding = sharding.batch_sharding(mesh)

    def ones(shape: tuple[int, ...]) -> jax.Array:
        return jax.jit(lambda: jnp.ones((rows, *shape), dtype), out_shardings=batch_sharding)()

    multiply = jax.jit(lambda a, b: jax.vmap(jnp.dot)(a, b))
    copy = jax.jit(lambda a: a + 1)
    matrix = ones((side, side))
    array = ones((length,))
    product_s = fastest_run(partial(multiply, matrix, matrix))
    copy_s = fastest_run(partial(copy, array))
    return Peaks(2.0 * rows * side**3 / product_s, 2.0 * array.nbytes / copy_s, True)


def fastest_run(run: Callable[[], Any], repeats: int = 10) -> float:
    """Returns the seconds of the fastest of `repeats` runs, after one run that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def minimum_work(
    setup: Setup, stage: Stage, name: str, decode_steps: int, group_size: int
) -> MinimumWork:
    """Returns the operations and bytes that a phase of a stage needs at least.

    Operations are those of matrix products, as if nothing were recomputed. Bytes leave out
    activations.

    Args:
      setup: the run's setup.
      stage: the stage.
      name: the program of the phase.
      decode_steps: tokens that are decoded one after the other.
      group_size: completions per prompt.
    """
    program = stage.programs()[name]
    trip_count = decode_steps if program.decode_steps else 1
    flops = jobs.useful_flops(setup.config, setup.mesh, name, trip_count)
    if program.decode_steps:
        batch_size = stage.settings.batch_size
        return MinimumWork(flops, sampling_bytes(setup, batch_size, decode_steps, group_size))
    if is_update(program):
        return MinimumWork(flops, update_bytes(setup, stage))
    return MinimumWork(flops, weight_bytes(setup, setup.trained | setup.frozen))


def is_update(program: Program) -> bool:
    """Returns whether a program updates the train state. Only updates donate an argument."""
    return bool(program.donate_argnums)


def sampling_bytes(setup: Setup, batch_size: int, decode_steps: int, group_size: int) -> float:
    """Returns the bytes of sampling `group_size` completions for each of `batch_size` prompts.

    The prefix reads all weights once. Every token reads the decoder's weights, keys and values.
    """
    all_params = setup.trained | setup.frozen
    decoder = {name: leaf for name, leaf in all_params.items() if name.startswith("llm/")}

    def cache_bytes(group: int) -> float:
        work = memory_model.device_work(setup.mesh, batch_size, group, decode_steps)
        return memory_model.cache_bytes(setup.architecture, setup.mesh, work) * setup.mesh.size

    prefix_cache = cache_bytes(0)
    completion_cache = cache_bytes(group_size) - prefix_cache
    # The completions' cache grows with every token, so half of it is read on average.
    bytes_per_token = weight_bytes(setup, decoder) + prefix_cache + completion_cache / 2
    return weight_bytes(setup, all_params) + decode_steps * bytes_per_token


def update_bytes(setup: Setup, stage: Stage) -> float:
    """Returns the bytes of the updates of a step.

    An update reads the weights twice (forward and backward). It reads and writes the gradients,
    the optimizer's averages and the parameters once each.
    """
    param_bytes = jnp.dtype(setup.config.model.param_dtype).itemsize
    trained_bytes = param_bytes * parameter_count(setup.trained)
    read_bytes = weight_bytes(setup, setup.trained | setup.frozen)
    optimizer_bytes = sharding.bytes_per_device(stage.abstract_state().opt_state) * setup.mesh.size
    bytes_per_update = 2 * read_bytes + 2 * (2 * trained_bytes + optimizer_bytes)
    return stage.settings.updates_per_step * bytes_per_update


def weight_bytes(setup: Setup, params: AbstractParams) -> float:
    """Returns the bytes of parameters in the dtype of activations."""
    return jnp.dtype(setup.config.model.dtype).itemsize * parameter_count(params)


def parameter_count(params: AbstractParams) -> float:
    """Returns the number of parameters."""
    return float(sum(np.prod(leaf.shape) for leaf in params.values()))


def roofline_shares(work: MinimumWork, peaks: Peaks, seconds: float) -> dict[str, float]:
    """Returns minimum work and time of a phase, and the shares of the peaks that it reached."""
    minimum_s = max(work.flops / peaks.flops, work.bytes / peaks.bandwidth)
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "mfu": work.flops / peaks.flops / seconds,
        "roofline_s": minimum_s,
        "roofline_share": minimum_s / seconds,
    }
