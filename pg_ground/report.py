"""Writes one HTML page about a run, or about several runs.

The page has results, curves, a gallery of rollouts, settings, hardware, goodput and times. It is
made from the files of a run (config.json, metrics.jsonl, timeline.jsonl, hardware.json, samples/),
and a browser needs no other file to show it. Several runs share one page: their curves lie over one
another, their results stand side by side, the settings that differ are listed, and each run has its
gallery.

--watch shows a run in the terminal until it has ended: step, metrics, goodput, cost, time left and
warnings. The run may be on another host, and its directory in a bucket.
"""

import math

from absl import flags

from pg_ground import cli
from pg_ground.reporting.report import FILE, write_page
from pg_ground.reporting.watch import watch
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError

DEFAULT_SECONDS = -math.inf
"""The value of --watch without seconds."""


class SecondsParser(flags.ArgumentParser):
    """Reads --watch as `DEFAULT_SECONDS`, --watch=SECONDS as seconds, and --nowatch as None."""

    def parse(self, argument: str) -> float | None:
        if argument in ("true", "false"):
            return DEFAULT_SECONDS if argument == "true" else None
        return float(argument)

    def flag_type(self) -> str:
        return "float"


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "Working directory of a run. May be given several times.", flag_values=values
    )
    cli.define_path(
        values,
        "out",
        f"The page. For one run it is DIR/{FILE} if the flag is absent. --watch writes no page "
        "without it.",
    )
    seconds_flag = flags.Flag(
        SecondsParser(),
        None,
        "watch",
        None,
        "Show the run in the terminal until it has ended; --watch=SECONDS is the time between two "
        "looks. By default it is 5 seconds, or 30 for a bucket.",
        boolean=True,
    )
    flags.DEFINE_flag(seconds_flag, flag_values=values)
    flags.DEFINE_float(
        "price_per_chip_hour",
        None,
        "Price of a chip for an hour. The cost then has money besides chip-hours.",
        flag_values=values,
    )


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
    out = to_path(args.flags.out, "--out") if args.flags.out else None
    price, seconds = args.flags.price_per_chip_hour, args.flags.watch
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price_per_chip_hour={price:g}: it must be a number from 0")
    if seconds is not None:
        if seconds != DEFAULT_SECONDS and not 0 < seconds < math.inf:
            raise UserError(f"--watch={seconds:g}: it must be a number of seconds above 0")
        if len(workdirs) > 1:
            raise UserError(
                f"--watch shows one run, but there are {len(workdirs)} directories: "
                f"{', '.join(map(str, workdirs[:3]))}"
            )
        watch(workdirs[0], None if seconds == DEFAULT_SECONDS else seconds, out, price)
        return
    if len(workdirs) > 1 and out is None:
        raise UserError(
            f"--out=FILE is needed: {len(workdirs)} runs share one page, which belongs to no run"
        )
    print(write_page(workdirs, out or workdirs[0] / FILE, price))


if __name__ == "__main__":
    cli.run(COMMAND, main)
