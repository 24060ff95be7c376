"""Rehearses a recipe on this machine before a slice is rented.

The command reads a sample of the data and compiles the real programs for the slice. Then it runs
the whole recipe in small: every stage for a few steps on two processes with virtual devices, with
few and narrow layers and the real vocabulary. It kills the run, resumes it, evaluates every
held-out source and exports the result. It ends with a checklist: what ran, hours and chip-hours,
disk, and what was not checked.

The data is that in config.data.dir. If this folder does not exist, the command makes a miniature of
the same layout. --data_only reads every record of the data once, and runs nothing.

Without --topology the end of the recipe's name counts: pg2_3b_448_v5e_8 is v5e:2x4. Exit code 0:
everything that could be checked is right; 2: the checklist names what is wrong.
"""

import re
import sys
import tempfile
from pathlib import Path

from absl import flags

from pg_ground import cli
from pg_ground.aot import tpu_specs
from pg_ground.rehearsal import data
from pg_ground.rehearsal.checklist import Checklist
from pg_ground.rehearsal.steps import GPU, Limits, Rehearsal
from pg_ground.reporting.tables import ascii_table
from pg_ground.training.data_check import check_data
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", "", "Slice of TPUs: v5e:2x4, …", flag_values=values)
    flags.DEFINE_boolean(
        "data_only", False, "Read every record once, and stop.", flag_values=values
    )
    flags.DEFINE_boolean("compile", True, "Compile the real programs.", flag_values=values)
    flags.DEFINE_boolean("run", True, "Run the recipe in small.", flag_values=values)
    flags.DEFINE_float("hours", 0, "Hours that you have; 0 is no limit.", flag_values=values)
    flags.DEFINE_float(
        "disk_gb", 0, "GB that the working directory has; 0 is no limit.", flag_values=values
    )
    flags.DEFINE_string(
        "out",
        "",
        "Folder of the rehearsal; it must not exist. A temporary one if absent.",
        flag_values=values,
    )


COMMAND = cli.Command(
    name="rehearse",
    description=__doc__,
    needs="--config=FILE",
    example="--config=configs/refcoco.py:pg2_3b_448_v5e_8",
    define_flags=define_flags,
    required=("config",),
)


def main(args: cli.Arguments) -> None:
    config = args.config
    if args.flags.data_only:
        if not data.has_data(config):
            raise UserError(f"--data_only: config.data.dir ({config.data.dir}) does not exist")
        check_data(config, workers=0)
        return
    # ml_collections keeps FILE:ARG in its flag.
    file: str = args.flags["config"].config_filename  # pyright: ignore[reportAttributeAccessIssue]
    topology = args.flags.topology or topology_of(file)
    if topology != GPU:
        tpu_specs.parse_topology(topology)
    checklist = Checklist(lambda line: print(line, file=sys.stderr, flush=True))
    limits = Limits(args.flags.hours, args.flags.disk_gb)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = Path(args.flags.out or Path(temporary) / "rehearsal")
        if folder.exists():
            raise UserError(f"--out={folder} exists already: remove it, or choose another folder")
        folder.mkdir(parents=True)
        rehearsal = Rehearsal(config, topology, folder, checklist)
        try:
            rehearsal.check_inputs()
            if args.flags.compile:
                rehearsal.estimate(limits)
            else:
                checklist.skip("compile", "--nocompile")
            if args.flags.run:
                rehearsal.run_small()
            else:
                checklist.skip("run", "--norun")
            rehearsal.list_unchecked()
        finally:
            if checklist.items:
                where = "one GPU" if topology == GPU else topology
                print(ascii_table(checklist.table(f"Rehearsal for {where}")))


def topology_of(config_file: str) -> str:
    """Returns the slice that the name of a recipe ends in: `…_v5e_8` is v5e:2x4.

    v4 and v5p are sold by their cores, of which a chip has two. `…_h100` is `GPU`.

    Raises:
      UserError: the name does not end in a slice.
    """
    if config_file.endswith("_h100"):
        return GPU
    match = re.search(r"_(v\d\w?|tpu7x)_(\d+)$", config_file)
    if match:
        version, size = match[1], int(match[2])
        chips = size // 2 if version in ("v4", "v5p") else size
        for shape in tpu_specs.TOPOLOGIES.get(version, ()):
            if tpu_specs.chip_count(shape) == chips:
                return f"{version}:{shape}"
    raise UserError(f"--topology is needed: one of {tpu_specs.topology_names()}")


if __name__ == "__main__":
    cli.run(COMMAND, main)
