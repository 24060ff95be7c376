"""A run's programs, compiled for TPUs that are not there: do they fit, what do they move, how long do they take at best?

python -m pg_ground.compile --config=configs/tpu.py:pg1_3b_224 --topology=v5e:2x4 [--json=O] [--full] [--search]
    [--programs=rollout,update]

Needs `pip install 'pg-ground[tpu]'` and no TPU; without it, says what the analytic table says. Without `--full` a compilation is
stopped once XLA has assigned memory, which answers whether it fits and takes seconds; code generation would take minutes. Exit
code 0: it fits; 3: it does not.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from pg_ground import cli, config
from pg_ground.aot import jobs, tpu_specs
from pg_ground.aot.compilation import advice, as_json, fits, found_by_search, table
from pg_ground.aot.tpu_specs import CHIPS, GIB
from pg_ground.parallel import sharding
from pg_ground.reporting.html_page import ascii_table
from pg_ground.training import programs
from pg_ground.types import UserError

FLAGS = {
    "topology": "",
    "json": "",
    "programs": "",
    "full": False,
    "search": False,
    "child": "",
    "out": "",
}
"""The last two are for the processes that compile."""


def main(argv: Sequence[str]) -> None:
    flags = {
        "topology": "",
        "json": "",
        "programs": "",
        "full": False,
        "search": False,
        "analytic": False,
        "child": "",
        "out": "",
    }
    parsed, own = cli.parse(argv, flags)
    if not own["topology"]:
        raise UserError(f"--topology is needed: one of {tpu_specs.topology_names()}")
    version = tpu_specs.parse_topology(own["topology"])[0]
    jax.config.update("jax_platforms", "cpu")  # where libtpu is installed, jax would look for a TPU
    if own["child"]:
        jobs.compile_program(parsed, own["topology"], own["child"], Path(own["out"]))
        return
    chip = CHIPS[version]
    names = [name for name in own["programs"].split(",") if name] or programs.names(parsed)
    unknown = [name for name in names if name not in programs.names(parsed)]
    if unknown:
        raise UserError(
            f"--programs={own['programs']}: {config.nearest(unknown[0], programs.names(parsed))}"
        )
    plain = [
        argument
        for argument in argv
        if not re.match(r"--(json|programs|full|search|out)\b", argument)
    ]
    if own["search"]:
        print(found_by_search(parsed, plain, version))
        return
    mesh = sharding.abstract_mesh(parsed.mesh, tpu_specs.device_count(own["topology"]))
    for name in names:
        jobs.job_of(
            parsed, mesh, name, chip.hbm_bytes
        )  # what is wrong with the settings is said before anything is compiled
    if importlib.util.find_spec("libtpu") is None:
        counted = jobs.estimates(parsed, mesh, names, chip.hbm_bytes, own["topology"])
        print(ascii_table(counted))
        print("libtpu is not installed, so XLA was not asked: pip install 'pg-ground[tpu]'")
        sys.exit(0 if all(float(row[1]) <= chip.hbm_bytes / GIB for row in counted.rows) else 3)
    found = fits(plain, names, version, own["full"])
    print(ascii_table(table(found, own["topology"], chip)))
    if own["json"]:
        Path(own["json"]).write_text(
            json.dumps(as_json(found, own["topology"], chip), indent=1) + "\n"
        )
    worst = max(found, key=lambda fit: fit.hbm_bytes)
    if worst.hbm_bytes > chip.hbm_bytes:
        print(advice(parsed, worst, chip))
        sys.exit(3)


if __name__ == "__main__":
    cli.run(main)
