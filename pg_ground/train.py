"""Teaches a PaliGemma to ground phrases: supervised fine-tuning, then GRPO, in one working directory.

python -m pg_ground.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.grpo.steps=500 …]
python -m pg_ground.train --config=configs/quickstart.py --dry_run [--workdir=runs/quickstart]
python -m pg_ground.train --config=configs/quickstart.py --workdir=runs/quickstart --distributed=auto    (on every host of a pod)

Started again on the same directory, it goes on where its newest checkpoint is, bit for bit.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pg_ground import cli
from pg_ground.parallel import multiprocess, sharding
from pg_ground.training.dry_run import dry_run
from pg_ground.training.loop import train
from pg_ground.types import UserError


def main(argv: Sequence[str], group: multiprocess.ProcessGroup) -> None:
    config, own = cli.parse(argv, {"workdir": "", "dry_run": False, cli.DISTRIBUTED: ""})
    if own["dry_run"] and own[cli.DISTRIBUTED]:
        raise UserError("--dry_run is for one process: leave out --distributed")
    sharding.set_cpu_devices(config.mesh)
    sharding.enable_compilation_cache(config.mesh)
    group.start(
        multiprocess.flatten_settings(
            {"config": dataclasses.asdict(config), "--workdir": own["workdir"]}
        )
    )
    if own["dry_run"]:
        print(dry_run(config, Path(own["workdir"]) if own["workdir"] else None))
    elif own["workdir"]:
        multiprocess.print_once(str(train(config, Path(own["workdir"]))))
    else:
        raise UserError("--workdir is needed, or --dry_run")


if __name__ == "__main__":
    cli.run_together(main)
