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

import json
from collections.abc import Sequence

from pg_ground import cli
from pg_ground.aot.benchmark import bench
from pg_ground.parallel import sharding
from pg_ground.types import UserError

DEFAULT = "configs/quickstart.py"


def main(argv: Sequence[str]) -> None:
    named = any(argument.split("=")[0] == "--config" for argument in argv)
    given = argv if named else [f"--config={DEFAULT}", *argv]
    config, own = cli.parse(given, {"steps": 10})
    if own["steps"] < 1:
        raise UserError(f"--steps={own['steps']}: it must be at least 1")
    sharding.set_cpu_devices(config.mesh)
    sharding.enable_compilation_cache(config.mesh)
    print(json.dumps(bench(config, own["steps"]), indent=1))


if __name__ == "__main__":
    cli.run(main)
