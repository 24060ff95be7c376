"""Compiles the programs of a run for TPUs that this machine does not have.

The command answers whether the programs fit, and how long they take at best. It prints the memory,
the time at the roofline and the collectives of each program. It needs no TPU, but
libtpu: pip install libtpu. Without libtpu the memory model answers.

Without --full a compilation is stopped once XLA has assigned memory. That answers whether the
programs fit, and takes seconds; generating the code would take minutes. Exit code 0: the programs
fit; 3: they do not fit.
"""

import json
import sys

import jax
from absl import flags

from pg_ground import cli
from pg_ground.aot import compilation, tpu_specs
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", "", "Slice of TPUs: v5e:2x4, v5p:2x2x1, …", flag_values=values)
    cli.define_path(values, "json", "File for all numbers as JSON.")
    flags.DEFINE_list(
        "programs", [], "Programs, separated by commas. All if absent.", flag_values=values
    )
    flags.DEFINE_boolean("full", False, "Compile to the end.", flag_values=values)
    flags.DEFINE_boolean(
        "search", False, "Find the largest batch size that fits.", flag_values=values
    )


COMMAND = cli.Command(
    name="compile",
    description=__doc__,
    needs="--config=FILE and --topology=NAME",
    example="--config=configs/tpu.py:pg1_3b_224_v5e_8 --topology=v5e:2x4",
    define_flags=define_flags,
    required=("config",),
)


def main(args: cli.Arguments) -> None:
    topology = args.flags.topology
    if not topology:
        raise UserError(f"--topology is needed: one of {tpu_specs.topology_names()}")
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU
    if args.flags.search:
        if args.flags.json or args.flags.programs or args.flags.full:
            raise UserError("--search takes none of --json, --programs and --full")
        print(compilation.search_batch_size(args.config, topology))
        return
    result = compilation.compile_run(args.config, topology, args.flags.programs, args.flags.full)
    print(result.text)
    if args.flags.json and result.document:
        write_atomically(
            to_path(args.flags.json, "--json"), json.dumps(result.document, indent=1) + "\n"
        )
    sys.exit(0 if result.fits else 3)


if __name__ == "__main__":
    cli.run(COMMAND, main)
