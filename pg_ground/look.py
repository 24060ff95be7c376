"""Draws the first examples of every source of a config on one HTML page.

The ground truth is drawn too. Use the page to check the paths and the box format of a source before
a run. The page needs no other file.

With --check, it reads every record once instead, as training does, and prints the bad records by
kind, how records were read, the longest texts and which rewards apply. It exits with 2 if training
would stop.
"""

from absl import flags

from pg_ground import cli
from pg_ground.reporting.gallery import write_gallery
from pg_ground.storage.paths import to_path
from pg_ground.training.data_check import check_data
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("n", 16, "Examples of each source.", flag_values=values)
    cli.define_path(values, "out", "The page.", None)
    flags.DEFINE_boolean(
        "check", False, "Read every record once and print tables; no page.", flag_values=values
    )
    flags.DEFINE_integer(
        "workers", 0, "Processes of --check; 0 is one for each core.", flag_values=values
    )


COMMAND = cli.Command(
    name="look",
    description=__doc__,
    needs="--config=FILE and --out=FILE, or --config=FILE and --check",
    example="--config=configs/quickstart.py --n=16 --out=look.html",
    define_flags=define_flags,
    required=("config",),
)


def main(args: cli.Arguments) -> None:
    if args.flags.n < 1:
        raise UserError(f"--n is {args.flags.n}: it must be above 0")
    if args.flags.workers < 0:
        raise UserError(f"--workers is {args.flags.workers}: it must be 0 or more")
    config = args.config
    if args.flags.check:
        check_data(config, args.flags.workers)
        return
    if args.flags.out is None:
        raise UserError(f"--out is needed: {COMMAND.program} needs {COMMAND.needs}")
    sources = config.sources_by_section
    out = to_path(args.flags.out, "--out")
    print(write_gallery(out, sources, config.data, config.model.image_size, args.flags.n))


if __name__ == "__main__":
    cli.run(COMMAND, main)
