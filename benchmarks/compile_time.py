"""How long a run's programs take to compile, at a first start and at one that finds them on disk.

python benchmarks/compile_time.py [--config=configs/quickstart.py] [--config.a.b=… …]

Each program of the run is traced, lowered and compiled for the devices that are here, from shapes alone: no parameters are made,
so that models can be timed which would not fit. All of it happens in a fresh process, and again in a second one that has the
first's cache of compiled programs. Seconds; a trace is Python's part, of which a cache saves nothing.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from pg_ground import cli
from pg_ground.aot import jobs
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.training import programs
from pg_ground.types import UserError

COMMAND = cli.Command(
    name="benchmarks/compile_time.py",
    description=__doc__,
    needs="",
    example="--config=configs/quickstart.py",
    define_flags=lambda values: cli.define_path(values, "cache", "Folder of compiled programs."),
    default_config="configs/quickstart.py",
    is_script=True,
)

PARTS = ("trace", "lower", "compile")


def seconds_of(argv: Sequence[str]) -> dict[str, list[float]]:
    """Returns the seconds of tracing, lowering and compiling of each program."""
    args = cli.parse(COMMAND, argv)
    config = args.config
    sharding.set_cpu_devices(config.mesh)
    jax.config.update("jax_compilation_cache_dir", args.flags.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh, found = sharding.make_mesh(config.mesh), {}
    for name in programs.names(config):
        job = jobs.job_of(config, mesh, name, sharding.hbm_bytes(mesh))
        start = time.perf_counter()
        traced = job.function().trace(*job.arguments)
        middle = time.perf_counter()
        lowered = traced.lower()
        end = time.perf_counter()
        lowered.compile()
        found[name] = [middle - start, end - middle, time.perf_counter() - end]
    return found


def main(argv: Sequence[str]) -> None:
    if any(argument.startswith("--cache=") for argument in argv):
        print(json.dumps(seconds_of(argv)))
        return
    with tempfile.TemporaryDirectory() as cache:
        starts = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, __file__, *argv, f"--cache={cache}"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(
                    (done.stderr.strip().splitlines() or ["a process ended without a word"])[
                        -1
                    ].removeprefix("error: ")
                )
            starts.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [
        [name, *(f"{spent:.1f}" for start in starts for spent in start[name])] for name in starts[0]
    ]
    rows.append(
        [
            "all",
            *(f"{sum(part):.1f}" for start in starts for part in zip(*start.values(), strict=True)),
        ]
    )
    heads = ["program", *(f"{part}, {start}" for start in ("first", "second") for part in PARTS)]
    print(ascii_table(Table("seconds by start", heads, rows, f"jax {jax.__version__}")))


if __name__ == "__main__":
    cli.run_script(main)
