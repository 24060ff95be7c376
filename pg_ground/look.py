"""Draws the first examples of every source of a config on one HTML page.

The ground truth is drawn too. Use the page to check the paths and the box format of a source before
a run. The page needs no other file.
"""

from absl import flags

from pg_ground import cli
from pg_ground.reporting.gallery import write_gallery
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("n", 16, "Examples of each source.", flag_values=values)
    cli.define_path(values, "out", "The page.", None)


COMMAND = cli.Command(
    name="look",
    description=__doc__,
    needs="--config=FILE and --out=FILE",
    example="--config=configs/quickstart.py --n=16 --out=look.html",
    define_flags=define_flags,
    required=("config", "out"),
)


def main(args: cli.Arguments) -> None:
    if args.flags.n < 1:
        raise UserError(f"--n is {args.flags.n}: it must be above 0")
    config = args.config
    sources = config.sources_by_section
    out = to_path(args.flags.out, "--out")
    print(write_gallery(out, sources, config.data, config.model.image_size, args.flags.n))


if __name__ == "__main__":
    cli.run(COMMAND, main)
