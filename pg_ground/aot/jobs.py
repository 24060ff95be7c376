"""The programs of a run as ahead-of-time jobs: built for a mesh that need not exist, traced and
compiled for a TPU topology.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import jax
from jax import stages
from jax.sharding import Mesh

from pg_ground.aot import flops, tpu_specs
from pg_ground.aot.bounds import make_bounds
from pg_ground.config import Config
from pg_ground.parallel import sharding
from pg_ground.parallel.sharding import AnyMesh
from pg_ground.training.evaluation import all_programs
from pg_ground.training.program import Program, jit_program
from pg_ground.training.setup import make_setup
from pg_ground.training.stages import make_stages
from pg_ground.types import JsonObject, UserError

FACTS_FILE = "facts.json"
"""Written in the directory of a compilation just before XLA compiles the program."""

DONE_FILE = "done.json"
"""Written after the program is compiled to the end."""


def make_programs(config: Config, mesh: AnyMesh, hbm_bytes: float | None) -> dict[str, Program]:
    """Returns the programs of all stages of a run and of its evaluation, by name.

    Args:
      hbm_bytes: memory of a device; None if it is unknown.

    Raises:
      UserError: the settings do not fit the mesh, the rewards or the algorithms.
    """
    setup = make_setup(config, mesh, hbm_bytes)
    return all_programs(setup, make_stages(setup))


def stage_name(config: Config, mesh: AnyMesh, program: str) -> str:
    """Returns the name of the stage that runs a program; the last stage for the evaluation."""
    stages = make_stages(make_setup(config, mesh, None))
    owners = [stage.name for stage in stages if program in stage.programs()]
    return owners[0] if owners else stages[-1].name


def trace(program: Program, config: Config, mesh: AnyMesh) -> stages.Traced:
    """Returns the traced function of a program (`jax.stages.Traced`)."""
    return jit_program(program, config.mesh, cast(Mesh, mesh)).trace(*program.arguments)


def compile_program(config: Config, topology: str, name: str, directory: Path) -> None:
    """Compiles a program.

    It writes `FACTS_FILE` into `directory` just before XLA compiles, and `DONE_FILE` at the end.

    Raises:
      UserError: there is no such topology or no libtpu, or the mesh does not divide a batch.
    """
    mesh = sharding.make_mesh(config.mesh, topology_devices(topology))
    hbm_bytes = tpu_specs.CHIPS[tpu_specs.parse_topology(topology)[0]].hbm_bytes
    setup = make_setup(config, mesh, hbm_bytes)
    program = all_programs(setup, make_stages(setup))[name]
    start = time.monotonic()
    traced = trace(program, config, mesh)
    trip_count = program.decode_steps or 1
    jaxpr = traced.jaxpr.jaxpr
    facts = {
        "flops": flops.count(jaxpr, trip_count) / mesh.size,
        "useful_flops": useful_flops(config, mesh, name, trip_count) / mesh.size,
        "inside": program.memory.inside,
        "beside": program.memory.beside,
        "expected": program.memory.activations,
        "while_trip_count": trip_count,
        "bounds": make_bounds(setup, mesh, program, jaxpr, trip_count)._asdict(),
    }
    lowered = traced.lower()
    (directory / FACTS_FILE).write_text(json.dumps(facts))
    lowered.compile()
    seconds = time.monotonic() - start
    (directory / DONE_FILE).write_text(json.dumps({"seconds": seconds}))


def topology_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a TPU slice that need not exist.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    version, shape, slices = tpu_specs.parse_topology(topology)
    options: JsonObject = {}
    if all(side == "1" for side in shape.split("x")):
        options = {"chips_per_host_bounds": [1, 1, 1]}
    if slices > 1:
        options = {**options, "num_slices": slices}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{version}:{shape}", **options
        )
        return list(description.devices)
    except Exception as error:  # libtpu's errors have several types
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"--topology={topology}: {message}; is libtpu installed?") from None


def useful_flops(config: Config, mesh: AnyMesh, name: str, trip_count: int) -> float:
    """Returns the operations of a program over all devices if nothing is recomputed.

    Args:
      trip_count: iterations of the decoding loop.
    """
    without_remat = replace(config, model=replace(config.model, remat="none"))
    program = make_programs(without_remat, mesh, None)[name]
    count = flops.count(trace(program, without_remat, mesh).jaxpr.jaxpr, trip_count)
    text = config.model.text
    return count - 2.0 * program.gradient_tokens * text.vocab_size * text.width
