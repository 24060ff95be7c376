"""The command line: flags, settings, help, errors of one line, and exit codes.

Flags are absl flags. `--config=FILE` and `--config.a.b=VALUE` are config flags of ml_collections.
Every call of `parse` makes its own `absl.flags.FlagValues`, so that one process can run several
commands. `config.parse` decides which settings exist and which values they take.

Exit codes: 0 done; 2 the user can mend the cause; 3 another process of the run ended, or a program
of `compile` does not fit; 1 any other error, with a traceback.
"""

import ast
import dataclasses
import inspect
import itertools
import keyword
import os
import re
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path, tuple_parser

from pg_ground import config
from pg_ground.config import Config
from pg_ground.parallel import multiprocess
from pg_ground.parallel.multiprocess import ProcessGroup
from pg_ground.reporting import progress
from pg_ground.storage.paths import is_bucket_error, local_path, to_path
from pg_ground.training import entry_flags
from pg_ground.training.entry_flags import Change
from pg_ground.types import UserError, nearest

DISTRIBUTED = "distributed"
"""The flag that names the other processes of a run: see `multiprocess.initialize`."""

MENDABLE = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
"""Errors of the operating system that another flag or setting mends.

A full disk is not among them.
"""

EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141
"""Exit codes of a shell for a program that a signal ended: 128 + SIGINT and 128 + SIGPIPE."""

COLUMNS = 100

SETTINGS_HELP = """\
--config=FILE names a Python file with a function get_config(), which returns all settings.
--config=FILE:ARG passes ARG to that function. configs/NAME.py is also found in the package.
--config.a.b=VALUE then changes one setting; the last value counts. A setting that neither the
file nor a flag changes keeps its default, which pg_ground/config.py holds. A tuple is written
'("a", "b")' or a,b. Flags also add rewards, sources and benchmarks, and None removes one:
--config.grpo.rewards.iou=1, --config.eval.sources.NAME.uri=URI, --config.eval.sources.NAME=None.
--help together with --config=FILE prints every setting of that file with
its value and its meaning.
"""


class Command(NamedTuple):
    """What a command's line may hold, and what its help says."""

    name: str
    description: str | None
    """The docstring of the command."""
    needs: str
    """The flags without which the command does not run: "--config=FILE and --out=FILE"."""
    example: str
    """Flags of one call that works."""
    define_flags: Callable[[flags.FlagValues], None]
    """Defines the command's own flags, besides --config and --help."""
    required: tuple[str, ...] = ()
    """Names of flags without which the command does not run."""
    arguments: tuple[str, ...] = ()
    """Names of the arguments that are not flags. "[DIR …]" stands for any number."""
    takes_config: bool = True
    default_config: str = ""
    """The value of --config if the flag is absent."""
    distributed: bool = False
    """Whether several processes may run the command together."""
    after_interrupt: str = ""
    """Says how to go on after Ctrl-C."""
    is_script: bool = False
    """Whether the command is a file outside the package."""

    @property
    def program(self) -> str:
        return f"python {self.name}" if self.is_script else f"pg-ground {self.name}"


class Arguments:
    """The parsed command line of one command."""

    def __init__(
        self,
        values: flags.FlagValues,
        settings: Config | None = None,
        positional: Sequence[str] = (),
        group: ProcessGroup | None = None,
    ):
        self.flags = values
        """Each flag is an attribute."""
        self.positional = list(positional)
        self.group = group or ProcessGroup("")
        self._config = settings

    @property
    def config(self) -> Config:
        """The settings.

        Raises:
          UserError: --config is absent.
        """
        if self._config is None:
            raise UserError("--config=FILE is needed, for example --config=configs/quickstart.py")
        return self._config

    def start_processes(self, settings: Mapping[str, Any]) -> None:
        """Connects the processes of a run. Each process must have set up its devices before.

        Args:
          settings: values that must be the same in all processes, besides the config.

        Raises:
          UserError: the settings of two processes differ.
        """
        tree = {"config": dataclasses.asdict(self.config), **settings}
        self.group.start(multiprocess.flatten_settings(tree))
        progress.set_process(jax.process_index())


# running a command


def run(
    command: Command, main: Callable[[Arguments], None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs `main` with the parsed command line, and exits with the exit code of its end."""
    argv = sys.argv[1:] if argv is None else argv
    group = None
    code = 0
    with progress.logs_to_stderr():
        try:
            # Joining comes before the config file runs, because the file may ask jax for a device.
            group = ProcessGroup(_distributed(argv) if command.distributed else "")
            main(parse(command, argv, group))
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            joined = group is not None and group.joined
            code = report_error(error, joined, command.after_interrupt)
    if group is None:
        sys.exit(code)
    group.exit(code)


def run_script(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs the `main` of a script with the arguments of the process, and exits as `run` does."""
    code = 0
    with progress.logs_to_stderr():
        try:
            main(sys.argv[1:])
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            code = report_error(error)
    sys.exit(code)


def report_error(error: BaseException, joined: bool = False, after_interrupt: str = "") -> int:
    """Prints why a command ended, and returns its exit code.

    The last line says the step, the stage and the phase of a run, if a step has begun. Nothing is
    printed if the reader of stdout has ended, as `head` does.

    Args:
      joined: whether other processes belong to the run.
      after_interrupt: says how to go on after Ctrl-C.
    """
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return EXIT_CLOSED_PIPE
    progress.end_line()
    position = str(progress.position())
    if isinstance(error, KeyboardInterrupt):
        at = f" at {position}" if position else ""
        more = f": {after_interrupt}" if after_interrupt else ""
        code, words, position = EXIT_INTERRUPTED, [f"stopped by Ctrl-C{at}{more}"], ""
    elif isinstance(error, (UserError, *MENDABLE)) or is_bucket_error(error):
        code, words = 2, [_mendable_text(error)]
    elif joined and multiprocess.is_lost_process(error):
        code, words = 3, [multiprocess.lost_process_line(str(error)).removeprefix("error: ")]
    else:
        traceback.print_exception(error)
        code, words = 1, [f"{type(error).__name__}: {one_line(str(error))}"]
        words.append(f"process {progress.process()}")
    if position:
        words.append(f"at {position}")
    details = f" ({', '.join(words[1:])})" if words[1:] else ""
    print(f"error: {words[0]}{details}", file=sys.stderr)
    return code


def _mendable_text(error: BaseException) -> str:
    text = one_line(str(error))
    if isinstance(error, UserError):
        return text
    if isinstance(error, FileNotFoundError) and " " not in text:  # of a bucket
        return f"there is no file or folder {text}"
    return text if isinstance(error, MENDABLE) else f"a bucket cannot be used: {text[:500]}"


def _stdout_is_closed() -> bool:
    """Returns whether stdout is a pipe that nobody reads any more.

    Python then writes to the null device at its exit, where it would print an error otherwise.
    """
    try:
        number = sys.stdout.fileno()
    except OSError:  # stdout is no file, as in a test
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def one_line(text: str) -> str:
    return " ".join(text.split())


def _distributed(argv: Sequence[str]) -> str:
    """Returns the value of --distributed before the other flags are parsed, "" if it is absent."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string(DISTRIBUTED, "", "", flag_values=values)
    try:
        values(["", *argv], known_only=True)
    except flags.Error as error:
        raise _user_error(error, values) from None
    return values[DISTRIBUTED].value or ""


# parsing


class _PathParser(flags.ArgumentParser):
    """Expands a leading ~ of a path, and refuses an address that cannot be read or written."""

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        return str(to_path(argument, f"--{self._name}")) if argument else ""

    def flag_type(self) -> str:
        return "path"


def define_path(
    values: flags.FlagValues,
    name: str,
    help_text: str,
    default: str | None = "",
) -> None:
    """Defines a flag whose value is a path or an address. A leading ~ is the home directory."""
    flags.DEFINE(_PathParser(name), name, default, help_text, flag_values=values)


def define_distributed(values: flags.FlagValues) -> None:
    """Defines --distributed, for a command that several processes may run together."""
    flags.DEFINE_string(
        DISTRIBUTED,
        "",
        "The processes of the run: auto for a TPU pod, Slurm or MPI, or HOST:PORT,INDEX/COUNT.",
        flag_values=values,
    )


def parse(command: Command, argv: Sequence[str], group: ProcessGroup | None = None) -> Arguments:
    """Returns the parsed command line. Prints the help and exits if --help is among the flags.

    Raises:
      UserError: a flag or a setting does not exist (with the nearest name that does), a value is
        missing or has another type, a needed flag is absent, or the config file does not run.
    """
    if not argv and command.needs and not command.default_config:
        raise UserError(f"{command.program} needs {command.needs}; see {command.program} --help")
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_boolean("help", False, "Print this text.", short_name="h", flag_values=values)
    command.define_flags(values)
    argv = [_with_underscores(argument, values) for argument in argv]
    if command.takes_config:
        argv, changes = entry_flags.take_changes(argv)
        argv = _config_first(argv, command.default_config)
        if changes and not (argv and argv[0].startswith("--config=")):
            raise UserError(f"{changes[0].flag} needs --config=FILE beside it")
        _define_config(values, argv, changes)
    try:
        positional = values([command.program, *argv])[1:]
    except (flags.Error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _user_error(error, values) from None
    tree = values["config"].value if command.takes_config else None
    settings = None if tree is None else config.parse(tree)
    if values["help"].value:
        print(help_text(command, values, settings), flush=True)
        sys.exit(0)
    _check_complete(command, values, positional)
    return Arguments(values, settings, positional, group)


def parse_config(argv: Sequence[str]) -> Config:
    """Returns the settings of a command line that holds only --config and --config.a.b."""
    command = Command("", "", "--config=FILE", "", lambda _: None)
    return parse(command, argv).config


REQUIRED = None
"""Default of a flag of `parse_script_flags` that must be set."""


def parse_script_flags(
    argv: Sequence[str], defaults: Mapping[str, str | int | float | bool | None]
) -> dict[str, Any]:
    """Returns the flags of a script by name. The type of a flag is the type of its default.

    Raises:
      UserError: as `parse`.
    """

    def define_flags(values: flags.FlagValues) -> None:
        define = {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
        }
        for name, default in defaults.items():
            define.get(type(default), flags.DEFINE_string)(name, default, "", flag_values=values)

    required = tuple(name for name, default in defaults.items() if default is REQUIRED)
    script = sys.modules["__main__"]
    command = Command(
        name=Path(sys.argv[0]).name,
        description=script.__doc__,
        needs=" and ".join(f"--{name}" for name in required),
        example="",
        define_flags=define_flags,
        required=required,
        takes_config=False,
        is_script=True,
    )
    values = parse(command, argv).flags
    return {name: values[name].value for name in defaults}


def _check_complete(command: Command, values: flags.FlagValues, positional: list[str]) -> None:
    """Raises UserError if a flag or an argument is missing, or if there is one too many."""
    for name in command.required:
        if values[name].value is None:
            if name == "config" and positional and positional[0].partition(":")[0].endswith(".py"):
                raise UserError(
                    f"{positional[0]!r} is not a flag: did you mean --config={positional[0]}?"
                )
            raise UserError(f"--{name} is needed: {command.program} needs {command.needs}")
    any_number = any("…" in name for name in command.arguments)
    if positional and not command.arguments:
        raise UserError(f"{positional[0]!r} is not a flag: flags look like --name=value")
    if command.arguments and not any_number and len(positional) != len(command.arguments):
        names = " ".join(command.arguments)
        count = len(positional)
        raise UserError(
            f"{count} path{'s' * (count != 1)} given, but {command.program} {names} takes "
            f"{len(command.arguments)}"
        )


def _with_underscores(argument: str, values: flags.FlagValues) -> str:
    """Returns `--box-format=…` as `--box_format=…` if there is a flag of that name."""
    name, equals, value = argument.partition("=")
    flag = name.lstrip("-").replace("-", "_")
    return f"--{flag}{equals}{value}" if name.startswith("--") and flag in values else argument


def _user_error(error: Exception, values: flags.FlagValues) -> UserError:
    """Returns an error of absl or of config_flags as one line."""
    text = one_line(str(error))
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        if name.startswith("config."):
            return UserError(f"--{name} needs --config=FILE beside it")
        names = [flag for flag in values if "." not in flag and flag != "h"]
        if name.startswith("no"):
            names += [f"no{flag}" for flag in names if values[flag].boolean and flag != "help"]
        return UserError(f"--{name} does not exist: {nearest(name, names)}")
    if isinstance(error, flags.IllegalFlagValueError) and error.__context__ is not None:
        # absl's text is `flag --NAME=VALUE: REASON`
        assignment = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
        kind = values[assignment.partition("=")[0].lstrip("-")].parser.flag_type()
        return UserError(f"{one_line(assignment)}: it must be of type {kind}")
    if text.startswith("Missing value for flag "):
        flag = text.removeprefix("Missing value for flag ")
        return UserError(f"{flag} has no value: flags look like --name=value")
    return UserError(text.removeprefix("flag "))


# settings


class _ConfigFileParser(flags.ArgumentParser):
    """Runs a config file, and checks the names of the settings that the command line changes.

    ml_collections' own parser hides the cause of a failure behind several lines.
    """

    def __init__(self, overrides: Sequence[str], changes: Sequence[Change]):
        self._overrides = overrides
        self._changes = changes

    def parse(self, argument: str) -> config_dict.ConfigDict:
        tree = load(argument)
        entry_flags.apply_changes(tree, self._changes)
        for name in self._overrides:
            check_setting(tree, name)
        return tree

    def flag_type(self) -> str:
        return "file"


class _TupleParser(tuple_parser.TupleParser):
    """Reads `a,b` and `a,` as tuples of texts, besides Python's `("a", "b")`."""

    def parse(self, argument: Any) -> tuple:
        if isinstance(argument, str):
            try:
                ast.literal_eval(argument)
            except (ValueError, SyntaxError):
                if not argument.startswith("("):
                    return tuple(argument.removesuffix(",").split(","))
        return super().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def _define_config(
    values: flags.FlagValues, argv: Sequence[str], changes: Sequence[Change]
) -> None:
    """Defines --config and one flag for each `--config.a.b` in `argv`.

    Args:
      changes: what other flags say about rewards, sources and benchmarks.
    """
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A Python file with a function get_config(), or FILE:ARG to pass it an argument.",
        flag_values=values,
        lock_config=False,
        sys_argv=["", *argv],
    )
    overrides = [name for name in map(_setting_name, argv) if name]
    values["config"].parser = _ConfigFileParser(overrides, changes)


def _setting_name(argument: str) -> str:
    """Returns `a.b` for `--config.a.b=VALUE`, and "" for any other argument."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    return match[1] if match else ""


def _config_first(argv: Sequence[str], default: str) -> list[str]:
    """Returns the arguments with `--config=FILE` first, as config_flags needs them.

    Of several values of --config, or of one setting, only the last stays.

    Args:
      default: the file if `argv` names none.
    """
    file = default
    others: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            others.append(_quoted(argument))
        elif equals:
            file = value
        else:
            file = next(arguments, "")
            if not file or file.startswith("--"):
                raise UserError(f"{name} has no value: flags look like --name=value")
    last_index = {argument.partition("=")[0]: i for i, argument in enumerate(others)}
    others = [
        argument
        for i, argument in enumerate(others)
        if not _setting_name(argument)
        or "=" not in argument
        or i == last_index[argument.partition("=")[0]]
    ]
    return [f"--config={file}", *others] if file else others


def _quoted(argument: str) -> str:
    """Returns `--config.sft.sources.my-data.uri=…` as `--config.sft.sources["my-data"].uri=…`.

    config_flags reads a path as Python does: only a name of Python may stand behind a dot.
    """
    name = _setting_name(argument)
    if not name or "[" in name:
        return argument
    parts = name.split(".")
    path = parts[0] + "".join(
        f".{part}" if part.isidentifier() and not keyword.iskeyword(part) else f'["{part}"]'
        for part in parts[1:]
    )
    return argument.replace(name, path, 1)


PACKAGE = Path(__file__).parent

RECIPE_FOLDERS = (PACKAGE, PACKAGE.parent)
"""The folders that hold `configs/`: the package in a wheel, the repository in a checkout."""

_package_numbers = itertools.count()


def load(path: str) -> config_dict.ConfigDict:
    """Returns the config of a recipe: `FILE`, or `FILE:ARGUMENT` to pass `get_config` an argument.

    Raises:
      UserError: the file does not exist, does not run, or has no `get_config`.
    """
    name, colon, argument = path.partition(":")
    file = recipe_file(name)
    if file is None:
        local_path(path, "--config")
        raise UserError(f"--config={path}: there is no file {name}")
    try:
        recipe = run_recipe(file)
        if not hasattr(recipe, "get_config"):
            raise UserError(
                f"--config={path}: {name} has no function get_config, which returns the config"
            )
        if colon and not inspect.signature(recipe.get_config).parameters:
            raise UserError(
                f"--config={path}: get_config() of {name} takes no argument after the :"
            )
        settings = recipe.get_config(argument) if colon else recipe.get_config()
        if not isinstance(settings, config_dict.ConfigDict):
            raise UserError(
                f"--config={path}: get_config() of {name} returns {type(settings).__name__}: it "
                "must return a ConfigDict, for example config.template()"
            )
        return settings
    except UserError:
        raise
    # A config file is a user's program. Whatever it raises is reported in one line.
    except (Exception, SystemExit) as error:
        text = one_line(str(error))
        raise UserError(f"--config={path} does not run: {type(error).__name__}: {text}") from None


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


def check_setting(tree: config_dict.ConfigDict, name: str) -> None:
    """Raises UserError if `name` (`a.b`) is not a setting of `tree` that a flag can change."""
    flag = f"--config.{name}"
    parts = config_path.split(name)
    node: Any = tree
    for depth, part in enumerate(parts):
        path = ".".join(["config", *parts[:depth]])
        if not isinstance(node, config_dict.ConfigDict):
            raise UserError(f"{flag}: {path} is a value, not a section")
        if part not in node:
            new_name = config.renamed_setting(".".join(map(str, parts)))
            if new_name is not None:
                raise UserError(f"config.{'.'.join(map(str, parts))} is now config.{new_name}")
            raise UserError(config.unknown_setting(f"{path}.{part}", node))
        node = node[part]
    if isinstance(node, config_dict.ConfigDict):
        raise UserError(f"{flag} is a section: set one of {', '.join(sorted(node.keys()))}")


# help


def help_text(command: Command, values: flags.FlagValues, settings: Config | None = None) -> str:
    """Returns the help of a command: purpose, flags, one example, and how settings are found.

    Args:
      settings: if given, every setting is listed with its value and its meaning.
    """
    usage = " ".join([command.program, *command.arguments, "[--flag=value …]"])
    parts = [
        f"Usage: {usage}",
        (command.description or "").strip(),
        f"Needed: {command.needs}." if command.needs else "",
        "Flags:\n" + "\n".join(_flag_lines(command, values)),
        f"Example:\n  {command.program} {command.example}" if command.example else "",
    ]
    if command.takes_config:
        parts.append("How settings are found:\n" + textwrap.indent(SETTINGS_HELP, "  ").rstrip())
    if settings is not None:
        parts.append("Settings:\n" + "\n".join(_setting_lines(settings)))
    return "\n\n".join(part for part in parts if part)


def _flag_lines(command: Command, values: flags.FlagValues) -> Iterator[str]:
    types = {"string": "TEXT", "int": "NUMBER", "float": "NUMBER", "path": "PATH", "file": "FILE"}
    for name in values:
        flag = values[name]
        if name == flag.short_name or "." in name:
            continue
        head = (
            f"--{name}"
            if flag.boolean
            else f"--{name}={types.get(flag.parser.flag_type(), 'TEXT')}"
        )
        head = f"-h, {head}" if name == "help" else head
        default = "" if flag.boolean or not flag.default else f" Default: {flag.default}."
        if flag.boolean and flag.default:
            default = f" It is on; --no{name} turns it off."
        if name == "config" and command.default_config:
            default = f" Default: {command.default_config}."
        yield textwrap.fill(
            f"{flag.help}{default}",
            COLUMNS,
            initial_indent=f"  {head:<22} ",
            subsequent_indent=" " * 25,
        )


def _setting_lines(settings: Config) -> Iterator[str]:
    for setting in config.describe(settings):
        line = f"  config.{setting.name} = {setting.value!r}"
        if not setting.help:
            yield line
        elif len(line) + len(setting.help) + 4 <= COLUMNS:
            yield f"{line}  # {setting.help}"
        else:
            yield textwrap.fill(
                setting.help, COLUMNS, initial_indent="  # ", subsequent_indent="  # "
            )
            yield line
