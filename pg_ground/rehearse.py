"""Rehearses a recipe on this machine before a slice is rented.

The command reads a sample of the data and compiles the real programs for the slice. Then it runs
the whole recipe in small: every stage for a few steps on two processes with virtual devices, with
few and narrow layers and the real vocabulary. It kills the run, resumes it, evaluates every
held-out source and exports the result. It ends with a checklist: what ran, hours and chip-hours,
disk, and what was not checked.

The data is that in config.data.dir. If this folder does not exist, the command makes a miniature of
the same layout. --data_only reads every record of the data once, and runs nothing.

Without --topology the end of the recipe's name counts: pg2_3b_448_v5e_8 is v5e:2x4, and …_h100 is
one H100, whose memory and hours come from arithmetic. Exit code 0: everything that could be checked
is right; 2: the checklist names what is wrong.
"""

import inspect
import re
import sys
import tempfile
from pathlib import Path

import jax
from absl import flags

from pg_ground import cli
from pg_ground.aot import tpu_specs
from pg_ground.config import parse
from pg_ground.rehearsal import data
from pg_ground.rehearsal.checklist import Checklist
from pg_ground.rehearsal.processes import signals_exit
from pg_ground.rehearsal.steps import GPU, Limits, Rehearsal
from pg_ground.rehearsal.typed_paths import existing_path
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
    # ml_collections keeps FILE:ARG in its flag.
    file: str = args.flags["config"].config_filename  # pyright: ignore[reportAttributeAccessIssue]
    defaults = parse(cli.load(file))
    if args.flags.data_only:
        _check_data_only(args)
        if not data.has_data(config):
            raise UserError(f"--data_only: {data.missing(config, defaults, _get_data(file))}")
        if config.data.tokenizer:
            existing_path(config.data.tokenizer, "config.data.tokenizer")
        jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU
        with signals_exit():
            check_data(config, workers=0)
        return
    topology = args.flags.topology or topology_of(file)
    if topology != GPU:
        tpu_specs.parse_topology(topology)
    checklist = Checklist(lambda line: print(line, file=sys.stderr, flush=True))
    limits = Limits(args.flags.hours, args.flags.disk_gb)
    with signals_exit(), tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = Path(args.flags.out or Path(temporary) / "rehearsal")
        if folder.exists():
            raise UserError(f"--out={folder} exists already: remove it, or choose another folder")
        folder.mkdir(parents=True)
        rehearsal = Rehearsal(config, defaults, topology, folder, checklist)
        try:
            rehearsal.check_inputs()
            if args.flags.compile:
                rehearsal.estimate(limits)
            else:
                rehearsal.skip_compile(limits)
            if args.flags.run:
                rehearsal.run_small()
            else:
                checklist.skip("run", "--norun")
            rehearsal.list_unchecked()
        finally:
            if checklist.items:
                where = "one GPU" if topology == GPU else topology
                print(ascii_table(checklist.table(f"Rehearsal for {where}")))


def _check_data_only(args: cli.Arguments) -> None:
    """Raises UserError if there is a limit that --data_only does not check."""
    for name in ("hours", "disk_gb"):
        value = args.flags[name].value
        if value:
            raise UserError(f"--{name}={value:g} is not checked with --data_only: omit one of them")


def _get_data(file: str) -> str:
    """Returns what to do without data: the docstring of a recipe says where the data is."""
    name = file.partition(":")[0]
    path = cli.recipe_file(name)
    has_guide = path is not None and bool(cli.run_recipe(path).__doc__)
    return "get the data first" + (f" (the docstring of {name} says how)" if has_guide else "")


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
    name = _default_recipe(config_file)
    topology = f"--topology=…, one of {tpu_specs.topology_names()}"
    if name:
        raise UserError(f"a recipe is needed: --config={config_file}:{name}, or {topology}")
    raise UserError(f"a slice is needed: {topology}")


def _default_recipe(config_file: str) -> str:
    """Returns the recipe that a file without :NAME gives, "" if it has no such name."""
    path = None if ":" in config_file else cli.recipe_file(config_file)
    get_config = getattr(cli.run_recipe(path), "get_config", None) if path else None
    if get_config is None:
        return ""
    parameter = next(iter(inspect.signature(get_config).parameters.values()), None)
    default = parameter.default if parameter else ""
    return default if isinstance(default, str) else ""


if __name__ == "__main__":
    cli.run(COMMAND, main)
