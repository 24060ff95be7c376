"""A run as one page that needs nothing else: results, curves, a gallery of rollouts, settings, hardware, times.

python -m pg_ground.report --workdir=D [--workdir=E …] [--out=O.html]

The page is a function of the files of a run (`config.json`, `metrics.jsonl`, `hardware.json`, `samples/`), and is written anew as
often as the run is measured or draws its rollouts. Of several runs it is a comparison: curves over one another, results side by
side, the settings that differ, a gallery of each.
"""

from collections.abc import Sequence
from pathlib import Path

from pg_ground import cli
from pg_ground.reporting.files import write_atomically
from pg_ground.reporting.report import FILE, SAMPLES_BYTES, distinct_names, read_run, report_html
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    places, flags = cli.parse_places(argv, {"workdir": (), "out": ""})
    workdirs = [Path(place) for place in (*flags["workdir"], *places)]
    if not workdirs:
        raise UserError("--workdir is needed: the directory of a run, or of several")
    if len(workdirs) > 1 and not flags["out"]:
        raise UserError(
            f"--out is needed: {len(workdirs)} runs share a page, which has no directory of its own"
        )
    out = Path(flags["out"]) if flags["out"] else workdirs[0] / FILE
    budget = SAMPLES_BYTES // len(workdirs)
    runs = [
        read_run(workdir, name, budget)
        for workdir, name in zip(workdirs, distinct_names(workdirs), strict=True)
    ]
    write_atomically(out, report_html(runs))
    print(out)


if __name__ == "__main__":
    cli.run(main)
