"""Measures how long the programs of a run take to compile, without and with a compilation cache.

python benchmarks/compile_time.py [--config=configs/quickstart.py] [--config.a.b=… …]

Each program of the run is traced, lowered and compiled for the devices of this machine. Only the
shapes of the parameters are needed, so that models can be timed that would not fit. This happens in
a fresh process, and again in a second process that has the first one's cache of compiled programs.
The table has seconds. Tracing is Python's part, and a cache does not save it.
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


def compile_seconds(argv: Sequence[str]) -> dict[str, list[float]]:
    """Returns the seconds of tracing, lowering and compiling of each program."""
    args = cli.parse(COMMAND, argv)
    config = args.config
    sharding.set_cpu_devices(config.mesh)
    jax.config.update("jax_compilation_cache_dir", args.flags.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = sharding.make_mesh(config.mesh)
    programs = jobs.make_programs(config, mesh, sharding.hbm_bytes(mesh))
    seconds = {}
    for name, program in programs.items():
        start = time.perf_counter()
        traced = jobs.trace(program, config, mesh)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        seconds[name] = [traced_at - start, lowered_at - traced_at, end - lowered_at]
    return seconds


def run_in_process(argv: Sequence[str], cache: str) -> dict[str, list[float]]:
    """Returns `compile_seconds` of a fresh process.

    Raises:
      UserError: the process failed; the text is its last line.
    """
    command = [sys.executable, __file__, *argv, f"--cache={cache}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["the process ended without a message"]
        raise UserError(lines[-1].removeprefix("error: "))
    return json.loads(finished.stdout.splitlines()[-1])


def main(argv: Sequence[str]) -> None:
    if any(argument.startswith("--cache=") for argument in argv):
        print(json.dumps(compile_seconds(argv)))
        return
    with tempfile.TemporaryDirectory() as cache:
        starts = [run_in_process(argv, cache) for _ in ("first", "second")]
    seconds = {name: [part for start in starts for part in start[name]] for name in starts[0]}
    seconds["all"] = [sum(column) for column in zip(*seconds.values(), strict=True)]
    rows = [[name, *(f"{part:.1f}" for part in parts)] for name, parts in seconds.items()]
    columns = ["program", *(f"{part}, {start}" for start in ("first", "second") for part in PARTS)]
    print(ascii_table(Table("seconds by start", columns, rows, f"jax {jax.__version__}")))


if __name__ == "__main__":
    cli.run_script(main)
