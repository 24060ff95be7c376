"""Runs one command of the package: `pg-ground COMMAND …` or `python -m pg_ground COMMAND …`."""

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pg_ground.types import nearest

COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "report",
    "look",
    "prefetch",
    "pack",
    "convert",
    "compile",
    "bench",
    "rehearse",
)
"""The commands. Each is a module of the package with `COMMAND` and `main`."""


def overview() -> str:
    """Returns every command with the first line of its docstring."""
    lines = ["Usage: pg-ground COMMAND [--flag=value …]", "", "Commands:"]
    lines += [f"  {name:<10} {_summary(name)}" for name in COMMANDS]
    return "\n".join([*lines, "", "pg-ground COMMAND --help describes the flags of a command."])


def _summary(name: str) -> str:
    """Returns the first line of a command's docstring. The module is read and not imported."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that the first argument names. Prints the commands if there is none."""
    name, *others = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "help", "--help", "-h"):
        try:
            print(overview(), flush=True)
        except BrokenPipeError:  # the reader has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        sys.exit(0)
    if name not in COMMANDS:
        mend = nearest(name, COMMANDS)
        print(f"error: there is no command {name!r}: {mend}", file=sys.stderr)
        sys.exit(2)
    # A config file may import its neighbours: `python -m` has the current folder on the path, and
    # a console script has not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from pg_ground import cli

    command = importlib.import_module(f"pg_ground.{name}")
    cli.run(command.COMMAND, command.main, others)


if __name__ == "__main__":
    main()
