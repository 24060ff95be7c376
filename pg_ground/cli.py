"""Command lines: `--config=FILE`, `--config.a.b=value`, a command's own flags; and errors as one line with exit code 2."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_dict, config_flags

from pg_ground import config
from pg_ground.config import Config
from pg_ground.types import UserError

REQUIRED = None
"""Default of a flag that must be given."""


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `main` on the command line and exits: 0, or 2 with one line on stderr for what the user can mend."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def parse(argv: Sequence[str], own: Mapping[str, str | int | None]) -> tuple[Config, dict[str, Any]]:
    """Returns the configuration and the values of a command's `own` flags (name to default, `REQUIRED` for none).

    Raises:
      UserError: a file that is missing or no config, a name that does not exist (with the nearest that does), a bad value.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    _define(values, own)
    path, overrides = _config_arguments(argv)
    _check_overrides(_load(path), overrides)
    _parse(values, argv, own)
    return config.parse(values["config"].value), {name: values[name].value for name in own}


def parse_own(argv: Sequence[str], own: Mapping[str, str | int | None]) -> dict[str, Any]:
    """Returns the values of a command's `own` flags, for a command without a config."""
    values = flags.FlagValues()
    _define(values, own)
    _parse(values, argv, own)
    return {name: values[name].value for name in own}


def _define(values: flags.FlagValues, own: Mapping[str, str | int | None]) -> None:
    for name, default in own.items():
        define = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_string
        define(name, default, "", flag_values=values)


def _parse(values: flags.FlagValues, argv: Sequence[str], own: Mapping[str, str | int | None]) -> None:
    try:
        rest = values(["", *argv])[1:]
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag: flags look like --name=value")
    missing = [name for name, default in own.items() if default is REQUIRED and values[name].value is None]
    if missing:
        raise UserError(f"--{missing[0]} is needed")


def _config_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of `--config` and the dotted paths of its overrides."""
    path, overrides = "", []
    for position, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            path = value if equals else argv[position + 1] if position + 1 < len(argv) else ""
        elif argument.startswith("-") and name.startswith("config."):
            overrides.append(name.removeprefix("config."))
    if not path:
        raise UserError("--config is needed: a file such as configs/quickstart.py")
    return path, overrides


def _load(path: str) -> config_dict.ConfigDict:
    """Returns what `get_config` in the file returns; `FILE:ARGUMENT` passes it an argument."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        values(["", f"--config={path}"])
        return values["config"].value
    except (OSError, flags.Error) as error:
        raise UserError(f"--config={path} cannot be read: {error}") from None
    except UserError:
        raise
    except Exception as error:  # a config file is a program of the user's: whatever it raises is theirs to read, in one line
        raise UserError(f"--config={path} does not run: {type(error).__name__}: {error}") from None


def _check_overrides(loaded: config_dict.ConfigDict, overrides: Sequence[str]) -> None:
    for override in overrides:
        node: Any = loaded
        names = override.split(".")
        for depth, name in enumerate(names):
            place = ".".join(["config", *names[:depth]])
            if not isinstance(node, config_dict.ConfigDict):
                raise UserError(f"--config.{override}: {place} is a value, not a section")
            if name not in node:
                raise UserError(f"--config.{override}: {place}.{name} does not exist: {config.nearest(name, node)}")
            node = node.get_oneway_ref(name).get() if node.get(name) is None else node[name]
        if isinstance(node, config_dict.ConfigDict):
            raise UserError(f"--config.{override} is a section: set one of {', '.join(sorted(node))}")


def missing(what: str) -> NoReturn:
    """Raises UserError: a flag among several that must be given."""
    raise UserError(f"{what} is needed")
