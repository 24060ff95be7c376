"""Writes one HTML page about a run, or about several runs.

The page has results, curves, a gallery of rollouts, settings, hardware and times. It is made from
the files of a run (config.json, metrics.jsonl, hardware.json, samples/), and a browser needs no
other file to show it. Several runs share one page: their curves lie over one another, their results
stand side by side, the settings that differ are listed, and each run has its gallery.
"""

from absl import flags

from pg_ground import cli
from pg_ground.reporting.report import FILE, write_page
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "Working directory of a run. May be given several times.", flag_values=values
    )
    cli.define_path(values, "out", f"The page. For one run it is DIR/{FILE} if the flag is absent.")


COMMAND = cli.Command(
    name="report",
    description=__doc__,
    needs="--workdir=DIR: the directory of a run, or of several runs",
    example="--workdir=runs/a --workdir=runs/b --out=both.html",
    define_flags=define_flags,
    arguments=("[DIR …]",),
    takes_config=False,
)


def main(args: cli.Arguments) -> None:
    workdirs = [to_path(path, "--workdir") for path in (*args.flags.workdir, *args.positional)]
    if not workdirs:
        raise UserError("--workdir=DIR is needed: the directory of a run, or of several runs")
    if len(workdirs) > 1 and not args.flags.out:
        raise UserError(
            f"--out=FILE is needed: {len(workdirs)} runs share one page, which belongs to no run"
        )
    out = to_path(args.flags.out, "--out") if args.flags.out else workdirs[0] / FILE
    print(write_page(workdirs, out))


if __name__ == "__main__":
    cli.run(COMMAND, main)
