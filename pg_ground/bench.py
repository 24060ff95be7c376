"""Measures how fast the steps of a run are on the devices of this machine.

Prints JSON with the seconds of each phase, tokens a second, MFU and memory. A step is a step of
`train` on the data of the config: rollout (prompts to tokens), score (rewards and the pass of the
reference policy) and update. Without GRPO a step is one supervised update. Nothing is written, and
no checkpoint is read.

- The ceilings of a TPU are the figures of its data sheet. The ceilings of another device are
  measured here, on all devices at once: the rate of a large matrix product in the dtype of the
  activations, and the rate at which a large array is copied.
- FLOPs are the FLOPs of matrix products, counted in the jaxpr of each program. Operations that the
  backward pass computes again are not counted.
- Bytes are the bytes that a program must move at least, without activations. A rollout reads all
  weights once, and the weights of the decoder, keys and values for every token. An update reads the
  weights twice, and reads and writes the gradients, the averages of the optimizer and the
  parameters.
- `roofline_s` is the longer of the two times at the ceilings. `roofline_share` is `roofline_s`
  divided by the measured median. `mfu` is the share of the ceiling of FLOPs.
- `idle_share` is the share of the time in which no device works, in a few traced steps.
  `host_gap_s` is that time in the median step: how long the host keeps the devices waiting.
- `compile` holds, for each phase, the seconds and the number of programs read from a cache on disk.
"""

import json

from absl import flags

from pg_ground import cli
from pg_ground.aot.benchmark import bench
from pg_ground.parallel import sharding
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 10, "Steps that are timed.", flag_values=values)


COMMAND = cli.Command(
    name="bench",
    description=__doc__,
    needs="",
    example="--config=configs/quickstart.py --steps=10",
    define_flags=define_flags,
    default_config="configs/quickstart.py",
)


def main(args: cli.Arguments) -> None:
    if args.flags.steps < 1:
        raise UserError(f"--steps={args.flags.steps}: it must be at least 1")
    sharding.set_cpu_devices(args.config.mesh)
    sharding.enable_compilation_cache(args.config.mesh)
    print(json.dumps(bench(args.config, args.flags.steps), indent=1))


if __name__ == "__main__":
    cli.run(COMMAND, main)
