"""Memory and time of a run's programs on one device, by arithmetic: nothing is compiled.

This is for devices that no compiler is asked for, such as a GPU. Operations are counted in the
program, recomputation included. Only the bytes of weights, caches and optimizer are counted, so a
program needs at least the time that is stated. Memory is the memory model's.
"""

from collections.abc import Sequence

import jax

from pg_ground.aot import flops, jobs, roofline
from pg_ground.aot.tpu_specs import Chip
from pg_ground.config import Config
from pg_ground.parallel import sharding
from pg_ground.training.evaluation import all_programs
from pg_ground.training.program import Program
from pg_ground.training.setup import Setup, make_setup
from pg_ground.training.stage import Stage
from pg_ground.training.stages import make_stages
from pg_ground.types import JsonDict


def estimate_run(config: Config, chip: Chip) -> JsonDict:
    """Returns memory and time of each program of a run on one device.

    Returns:
      `programs` has for each name the seconds `step_s` of one run, `flops`, `bytes`, `bound_by`
      (FLOPs or HBM) and the bytes of memory `hbm_bytes`: the fields of `compile_run`'s document.

    Raises:
      UserError: the settings do not fit one device.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    setup = make_setup(config, mesh, chip.hbm_bytes)
    stages = make_stages(setup)
    programs: JsonDict = {}
    for name, program in all_programs(setup, stages).items():
        jaxpr = jobs.trace(program, config, mesh).jaxpr.jaxpr
        operations = flops.count(jaxpr, program.decode_steps or 1)
        size = _moved_bytes(setup, stages, name, program)
        seconds = {"FLOPs": operations / chip.flops, "HBM": size / chip.hbm_bandwidth}
        bound_by = max(seconds, key=lambda resource: seconds[resource])
        programs[name] = {
            "step_s": seconds[bound_by],
            "flops": operations,
            "bytes": size,
            "bound_by": bound_by,
            "hbm_bytes": sum(program.memory.by_kind.values()),
        }
    return {"programs": programs}


def _moved_bytes(setup: Setup, stages: Sequence[Stage], name: str, program: Program) -> float:
    """Returns the bytes that one run of a program reads and writes at least."""
    stage = next((stage for stage in stages if name in stage.programs()), None)
    if stage is None:  # the evaluation
        settings = setup.config.eval
        group = max(1, settings.rollouts)
        return roofline.sampling_bytes(setup, settings.batch_size, program.decode_steps, group)
    if program.decode_steps:
        group = getattr(stage.settings, "group_size", 1)
        batch_size = stage.settings.batch_size
        return roofline.sampling_bytes(setup, batch_size, program.decode_steps, group)
    if roofline.is_update(program):
        return roofline.update_bytes(setup, stage)
    return roofline.weight_bytes(setup, setup.trained | setup.frozen)
