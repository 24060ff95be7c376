"""Command lines: `--config=FILE`, `--config.a.b=value`, a command's own flags; and errors as one line with exit code 2.

A command that may run in several processes has the flag `--distributed`, and exit code 3 where another of them ended.
"""

import ast
import itertools
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import config_dict

from pg_ground import config
from pg_ground.config import Config
from pg_ground.parallel.multiprocess import ProcessGroup, is_lost_process, lost_process_line
from pg_ground.types import UserError

REQUIRED = None
"""Default of a flag that must be given."""

Flags = Mapping[str, str | int | bool | tuple[str, ...] | None]
"""A command's own flags: name to default. One whose default is False is a switch: `--name` alone turns it on; one whose default
is a tuple may be given several times, and has all its values."""


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs `main` on the command line and exits: 0, or 2 with one line on stderr for what the user can mend."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


DISTRIBUTED = "distributed"
"""The flag that `run_together` reads: "" for one process, "auto" or HOST:PORT,INDEX/COUNT (see `multiprocess.initialize`)."""


def run_together(main: Callable[[Sequence[str], ProcessGroup], None]) -> NoReturn:
    """Runs `main` as `run` does, in each of the processes that `--distributed` tells of; 3 where another of them ended."""
    argv, group = sys.argv[1:], None
    try:
        group = ProcessGroup(_last(argv, DISTRIBUTED))
        main(argv, group)
    except (UserError, OSError) as error:
        code, said = 2, f"error: {' '.join(str(error).split())}"
    except BaseException as error:
        if group is None or not group.joined:
            raise
        code, said = (
            (3, lost_process_line(str(error)))
            if is_lost_process(error)
            else (1, traceback.format_exc().rstrip())
        )
    else:
        code, said = 0, ""
    if said:
        print(said, file=sys.stderr)
    if group is None:
        sys.exit(code)
    group.exit(code)


def parse(argv: Sequence[str], own: Flags) -> tuple[Config, dict[str, Any]]:
    """Returns the configuration and the values of a command's `own` flags.

    Raises:
      UserError: a file that is missing or no config, a name that does not exist (with the nearest that does), a bad value.
    """
    given = _pairs(argv, own)
    paths = [value for name, value in given if name == "config"]
    if not paths:
        raise UserError("--config is needed: a file such as configs/quickstart.py")
    tree = load(paths[-1])
    for name, value in given:
        if name.startswith("config."):
            override(tree, name, value)
    return config.parse(tree), _own(
        [pair for pair in given if pair[0].partition(".")[0] != "config"], own
    )


def parse_own(argv: Sequence[str], own: Flags) -> dict[str, Any]:
    """Returns the values of a command's `own` flags, for a command without a config."""
    return _own(_pairs(argv, own), own)


def parse_places(argv: Sequence[str], own: Flags) -> tuple[list[str], dict[str, Any]]:
    """Returns the arguments that are no flags, and the values of a command's `own` flags."""
    places: list[str] = []
    flags: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            flags.append(argument if "=" in argument or not rest else f"{argument}={rest.pop(0)}")
        else:
            places.append(argument)
    return places, parse_own(flags, own)


PACKAGE = Path(__file__).parent

RECIPE_FOLDERS = (PACKAGE, PACKAGE.parent)
"""The folders that hold `configs/`: the package in a wheel, the top of the repository in a checkout."""

_package_numbers = itertools.count()


def load(path: str) -> config_dict.ConfigDict:
    """Returns the config of a recipe: `FILE`, or `FILE:ARGUMENT` to pass `get_config` an argument.

    Raises:
      UserError: the file does not exist, does not run, or has no `get_config`.
    """
    name, colon, argument = path.partition(":")
    file = recipe_file(name)
    if file is None:
        raise UserError(f"--config={path}: there is no file {name}")
    try:
        recipe = run_recipe(file)
        if not hasattr(recipe, "get_config"):
            raise UserError(
                f"--config={path}: {name} has no function get_config, which returns the config"
            )
        return recipe.get_config(argument) if colon else recipe.get_config()
    except UserError:
        raise
    # A config file is a user's program. Whatever it raises is reported in one line.
    except (Exception, SystemExit) as error:
        raise UserError(f"--config={path} does not run: {type(error).__name__}: {error}") from None


def recipe_file(name: str) -> Path | None:
    """Returns the file called `name`, or the recipe of that name that ships with the package.

    So `configs/tiny.py` works in any working directory. Returns None if there is no file.
    """
    file = Path(name).expanduser()
    shipped = [folder / file for folder in RECIPE_FOLDERS if file.parts[:1] == ("configs",)]
    return next((path for path in (file, *shipped) if path.is_file()), None)


def run_recipe(file: Path) -> ModuleType:
    """Returns the module that results from running `file`.

    The file's folder counts as a package of its own, so a recipe imports a file beside it with
    `from . import quickstart`, in a checkout, in a wheel and in a user's folder alike.
    """
    package = ModuleType(f"_recipes_{next(_package_numbers)}")
    package.__path__ = [str(file.resolve().parent)]
    sys.modules[package.__name__] = package
    loader = SourceFileLoader(f"{package.__name__}.{file.stem}", str(file))
    module = module_from_spec(ModuleSpec(loader.name, loader, origin=str(file)))
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    # Not loader.exec_module: its bytecode is stale if a file changes twice within a second.
    exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    return module


def override(tree: config_dict.ConfigDict, path: str, text: str) -> None:
    """Sets the value at `path` (`config.a.b`) to what `text` spells, in the type it has.

    Raises:
      UserError: no such path, or a text of another type.
    """
    *parents, name = path.split(".")[1:]
    node: Any = tree
    for depth, part in enumerate([*parents, name]):
        place = ".".join(["config", *parents[:depth]])
        if not isinstance(node, config_dict.ConfigDict):
            raise UserError(f"--{path}: {place} is a value, not a section")
        if not node:
            raise UserError(
                f"--{path}: {place} is empty, and is filled in the config file: c.{place[7:]} = {{'{part}': …}}"
            )
        if part not in node:
            raise UserError(f"{place}.{part} does not exist: {config.nearest(part, node)}")
        if depth < len(parents):
            node = node[part]
    value = node[name]
    if isinstance(value, config_dict.ConfigDict):
        found = ", ".join(sorted(value.keys()))
        raise UserError(
            f"--{path} is a section: "
            + (f"set one of {found}" if found else "it is filled in the config file")
        )
    node[name] = _spelled(text, node.get_type(name), path)


def _spelled(text: str, kind: type, path: str) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
        value = float(value) if kind is float and type(value) is int else value
    except (ValueError, SyntaxError, TypeError):
        value = text
    if kind is tuple and isinstance(value, (str, list)):
        value = tuple(text.removesuffix(",").split(",")) if isinstance(value, str) else tuple(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"--{path}={text}: it must be of type {kind.__name__}")
    return value


def _pairs(argv: Sequence[str], own: Flags) -> list[tuple[str, str]]:
    """Returns the flags in order: `--name=value` and `--name value` alike."""
    found, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("-") or not name.strip("-"):
            raise UserError(f"{argument!r} is not a flag: flags look like --name=value")
        if not equals and own.get(name.lstrip("-")) is False:
            value = "true"
        elif not equals:
            if not rest:
                raise UserError(f"{argument} has no value: flags look like --name=value")
            value = rest.pop(0)
        found.append((name.lstrip("-"), value))
    return found


def _last(argv: Sequence[str], name: str) -> str:
    """Returns the last value of a flag, before anything else is known of the command line; "" without one."""
    value = ""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        found, equals, own = argument.lstrip("-").partition("=")
        if argument.startswith("-") and found == name:
            value = own if equals else following
    return value


def _own(given: Sequence[tuple[str, str]], own: Flags) -> dict[str, Any]:
    values: dict[str, Any] = dict(own)
    for name, text in given:
        if name not in own:
            raise UserError(f"--{name} does not exist: {config.nearest(name, own)}")
        kind = type(own[name]) if isinstance(own[name], int) else str
        value = _spelled(text, kind, name)
        values[name] = (*values[name], value) if isinstance(own[name], tuple) else value
    lacking = [name for name, value in values.items() if value is REQUIRED]
    if lacking:
        raise UserError(f"--{lacking[0]} is needed")
    return values
