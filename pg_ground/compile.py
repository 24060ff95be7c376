"""Compiles a run's programs for TPUs: do they fit, and how long do they take at best?

python -m pg_ground.compile --config=configs/tpu.py:pg1_3b_224 --topology=v5e:2x4 [--json=O]
    [--full] [--search] [--programs=rollout,update]

Needs `pip install 'pg-ground[tpu]'` and no TPU. Without libtpu the memory model answers. Without
`--full` a compilation is stopped once XLA has assigned memory. This answers whether the programs
fit, and takes seconds; generating the code would take minutes. Exit code 0: the programs fit; 3:
they do not.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from pg_ground import cli
from pg_ground.aot import compilation, tpu_specs
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    flags = {"topology": "", "json": "", "programs": "", "full": False, "search": False}
    config, values = cli.parse(argv, flags)
    if not values["topology"]:
        raise UserError(f"--topology is needed: one of {tpu_specs.topology_names()}")
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU
    names = [name for name in values["programs"].split(",") if name]
    if values["search"]:
        print(compilation.search_batch_size(config, values["topology"]))
        return
    result = compilation.compile_run(config, values["topology"], names, values["full"])
    print(result.text)
    if values["json"] and result.document:
        Path(values["json"]).write_text(json.dumps(result.document, indent=1) + "\n")
    sys.exit(0 if result.fits else 3)


if __name__ == "__main__":
    cli.run(main)
