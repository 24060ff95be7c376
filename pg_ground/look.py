"""The first examples of every source of a config, gold boxes and points drawn: one self-contained page.

Run `python -m pg_ground.look --config=configs/quickstart.py --n=16 --out=look.html`.
"""

from collections.abc import Sequence
from pathlib import Path

from pg_ground import cli
from pg_ground.reporting.gallery import look
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    config, flags = cli.parse(argv, {"n": 16, "out": cli.REQUIRED})
    if flags["n"] < 1:
        raise UserError(f"--n is {flags['n']}: it must be above 0")
    print(look(config, n=flags["n"], out=Path(flags["out"])))


if __name__ == "__main__":
    cli.run(main)
