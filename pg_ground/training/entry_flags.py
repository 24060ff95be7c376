"""Flags that add, change and remove entries of the tables of a config.

The tables are rewards, sources and benchmarks. `--config.grpo.rewards.iou=0.5` adds or changes a
reward, and `--config.grpo.rewards.iou=None` removes it. `--config.eval.sources.NAME.uri=…` adds a
source. `--config.eval.sources=None` empties a table. The flags are read in their order.
"""

import ast
import dataclasses
import logging
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from pg_ground import config
from pg_ground.config import Config, Source
from pg_ground.types import UserError, nearest

logger = logging.getLogger(__name__)

REMOVED = "None"
"""The value of a flag that removes an entry, or all entries."""


class Change(NamedTuple):
    """What one flag says about a table."""

    flag: str
    """The name of the flag, as it was typed, without its value."""
    table: str
    """The dotted name of the table, such as `grpo.rewards`."""
    key: str
    """The entry; "" for all entries."""
    field: str
    """The field of a source; "" for the entry itself."""
    value: str

    @property
    def entry(self) -> str:
        return f"config.{self.table}.{self.key}"


def tables() -> dict[str, Any]:
    """Returns the dotted name of every table of the settings, and the type of its entries."""
    return dict(_tables(Config, ""))


def _tables(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(kind).items():
        origin = typing.get_origin(hint)
        if dataclasses.is_dataclass(hint):
            yield from _tables(typing.cast(type, hint), f"{prefix}{name}.")
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            yield f"{prefix}{name}", typing.get_args(hint)[1]


def take_changes(argv: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Returns the arguments that set no entries, and the changes that the others say.

    A flag of a field of a source stays among the arguments: config_flags reads its value. It is
    among the changes too, because it may add the source.

    Raises:
      UserError: a flag has no value.
    """
    kinds = tables()
    others: list[str] = []
    changes: list[Change] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        place = _place(name, kinds)
        if place is None:
            others.append(argument)
            continue
        table, key, field = place
        if field:
            others.append(argument)
        elif not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{name} has no value: flags look like --name=value")
        changes.append(Change(name, table, key, field, value))
    return others, changes


def _place(name: str, kinds: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Returns the table, the entry and the field that a flag names, or None for other flags."""
    match = re.match(r"--?config\.(.*)", name, re.S)
    if not match:
        return None
    for table, kind in kinds.items():
        if match[1] == table:
            return table, "", ""
        rest = match[1].removeprefix(table)
        if rest == match[1] or rest[:1] not in (".", "["):
            continue
        quoted = re.fullmatch(r"""\[(["'])(.+?)\1\](?:\.(.+))?""", rest, re.S)
        if quoted:
            return table, quoted[2], quoted[3] or ""
        if dataclasses.is_dataclass(kind):
            key, _, field = rest[1:].partition(".")
            return table, key, field
        return table, rest[1:], ""  # a name may have dots: mine.py:centred
    return None


def apply_changes(tree: config_dict.ConfigDict, changes: Sequence[Change]) -> None:
    """Adds, changes and removes entries of the config of a recipe, in the order of the flags.

    Of a source, only the entry is added: config_flags sets its fields.

    Raises:
      UserError: an entry does not exist and cannot be added (with the nearest name that exists), a
        value has another type, or a source is added without its uri.
    """
    kinds = tables()
    removed: set[tuple[int, str]] = set()
    with_uri = {(change.table, change.key) for change in changes if change.field == "uri"}
    for change in changes:
        section = _section(tree, change)
        if section is None:
            continue
        kind = kinds[change.table]
        with section.unlocked(), section.ignore_type():
            if not change.key:
                _empty(section, change)
            elif change.field:
                _add_source(section, change, (change.table, change.key) in with_uri)
            elif change.value == REMOVED:
                _remove(section, change, removed)
            elif dataclasses.is_dataclass(kind):
                names = ", ".join(f.name for f in dataclasses.fields(Source))
                raise UserError(
                    f"{change.flag} is a section: set one of {names}; None removes {change.key}"
                )
            else:
                _set(section, change, kind)
    _check_none_removed_later(tree, changes)


def _section(tree: config_dict.ConfigDict, change: Change) -> config_dict.ConfigDict | None:
    """Returns the table of a change. If a recipe leaves it out, the table has its defaults.

    None if a value stands in the place of a section, which `config.parse` refuses.
    """
    node: Any = tree
    defaults: Any = config.section(Config())
    for name in change.table.split("."):
        defaults = defaults[name]
        if not isinstance(node, config_dict.ConfigDict):
            return None
        if name not in node:
            is_table = name == change.table.rpartition(".")[2]
            with node.unlocked():
                node[name] = defaults if is_table else config_dict.ConfigDict()
        node = node[name]
    return node if isinstance(node, config_dict.ConfigDict) else None


def _empty(section: config_dict.ConfigDict, change: Change) -> None:
    if change.value != REMOVED:
        names = ", ".join(section) or "nothing"
        raise UserError(
            f"{change.flag} is a table with {names}: set one of its entries; None removes all"
        )
    for key in list(section):
        del section[key]


def _remove(section: config_dict.ConfigDict, change: Change, removed: set[tuple[int, str]]) -> None:
    """Removes an entry. Two stages may share a table, so the entry may be gone already."""
    if change.key in section:
        del section[change.key]
        removed.add((id(section), change.key))
    elif (id(section), change.key) not in removed:
        raise UserError(f"{change.entry} cannot be removed: {nearest(change.key, section)}")


def _add_source(section: config_dict.ConfigDict, change: Change, has_uri: bool) -> None:
    """Adds a source with its defaults, or the field of a source that a recipe left out."""
    fields = config.section(Source())
    if change.key not in section:
        new = f"{change.entry}.uri=… adds a source"
        if not has_uri:
            near = nearest(change.key, section)
            raise UserError(f"{change.entry} does not exist: {near} (--{new})")
        section[change.key] = fields
        logger.info("a flag adds %s", change.entry)
        return
    entry = section[change.key]
    is_section = isinstance(entry, config_dict.ConfigDict)
    if is_section and change.field in fields and change.field not in entry:
        with entry.unlocked():
            entry[change.field] = fields[change.field]


def _set(section: config_dict.ConfigDict, change: Change, kind: Any) -> None:
    """Sets the weight of a reward, or the benchmark of a source."""
    value = change.value if kind is str else _weight(change)
    if kind is str:
        _check_benchmark(change)
    if change.key not in section:
        if kind is not str:
            _check_reward(change)
        logger.info("a flag adds %s", change.entry)
    section[change.key] = value


def _weight(change: Change) -> float | tuple[Any, ...]:
    """Returns a number, or (start, end, steps)."""
    try:
        value = ast.literal_eval(change.value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tuple | list):
        return tuple(value)
    raise UserError(
        f"{change.flag}={change.value:.80}: it must be a number or (start, end, steps); None "
        f"removes the reward"
    )


def _check_reward(change: Change) -> None:
    """Raises UserError if there is no reward of the name, or it belongs to the other table."""
    if ".py:" in change.key:
        return  # the start of a run reads the file
    # The rewards import the model's arrays, which most calls do not need.
    from pg_ground.rewards.device_rewards import REWARDS
    from pg_ground.rewards.text_rewards import TEXT_REWARDS

    known: dict[str, Mapping[str, Callable[..., Any]]] = {
        "grpo.rewards": REWARDS,
        "grpo.text_rewards": TEXT_REWARDS,
    }
    others = [table for table in known if change.key in known[table]]
    if change.table in others:
        return
    if others:
        place = f"config.{others[0]}.{change.key}"
        raise UserError(f"{change.entry} does not exist: the reward is {place}")
    raise UserError(f"{change.entry} does not exist: {nearest(change.key, known[change.table])}")


def _check_benchmark(change: Change) -> None:
    from pg_ground.evals.benchmarks import find_benchmark  # as above

    find_benchmark(change.value, change.entry)


def _check_none_removed_later(tree: config_dict.ConfigDict, changes: Sequence[Change]) -> None:
    """Raises UserError if a flag sets a field of a source that a later flag removes."""
    for change in changes:
        section = _section(tree, change)
        if change.field and section is not None and change.key not in section:
            raise UserError(f"{change.flag} has no meaning: a later flag removes {change.entry}")
