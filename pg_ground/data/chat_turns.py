"""Turns of chats: which elements of a list a source reads by their numbers, and which it does not.

`messages.0.content` and `messages.1.content` are the first question and its answer. A longer chat
has more of both, and the source does not read these.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.config import Source
from pg_ground.data.record_fields import field_or_none, paths_of, placeholders, steps_of
from pg_ground.data.records import BadRecord, list_names
from pg_ground.types import Record

INDEX = re.compile(r"-?\d+")

ROLE_KEYS = ("role", "from")
"""Keys of a message under which its speaker is."""

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt"),
    "system": ("system", "developer", "tool", "function"),
}
"""Names of the speakers of chats, in lower case."""

TURN_KEYS = ("assistant", "answer", "response", "gpt", "output")
"""Keys of an element that is a whole turn, as {"user": .., "assistant": ..}."""


class Reading(NamedTuple):
    """Elements of a list that the paths of a source read."""

    path: str
    """The path of the list."""
    inner: tuple[str, ...]
    """The paths inside an element; "" is the element itself."""
    indices: tuple[int, ...]
    """The numbers as the paths have them, in increasing order."""
    in_prompt: tuple[int, ...]
    """The numbers that the prompt reads."""


@functools.lru_cache(maxsize=64)
def readings(source: Source) -> tuple[Reading, ...]:
    """Returns the lists from which the texts and coordinates of a source take single elements.

    A list that another path reads as a whole is left out.
    """
    prompt_paths = _template_paths(source.prompt, source)
    paths = [*prompt_paths, *_template_paths(source.name, source), source.label, source.mask]
    paths += _template_paths(source.suffix, source)
    paths += [*paths_of(source.boxes), *paths_of(source.points)]
    parts = [part for path in filter(None, paths) for part in _parts(path)]
    whole = {part.path for part in parts if part.index is None}
    parents = dict.fromkeys(part.path for part in parts if part.path not in whole)
    of_prompt = [part for path in prompt_paths for part in _parts(path)]
    return tuple(
        Reading(
            parent,
            tuple(dict.fromkeys(part.inner for part in parts if part.path == parent)),
            _indices(parts, parent),
            _indices(of_prompt, parent),
        )
        for parent in parents
    )


def _template_paths(template: str, source: Source) -> list[str]:
    return [source.phrase if path == "phrase" else path for path in placeholders(template)]


class _Part(NamedTuple):
    """A part of a path that can be a list."""

    path: str
    index: int | None
    """The number of the element that the path reads; None if it reads the whole list."""
    inner: str
    """The path inside the element."""


def _parts(path: str) -> list[_Part]:
    steps = steps_of(path)
    parts = []
    for i in range(1, len(steps) + 1):
        following = steps[i] if i < len(steps) else ""
        index = int(following) if INDEX.fullmatch(following) else None
        parts.append(_Part(".".join(steps[:i]), index, ".".join(steps[i + 1 :])))
    return parts


def _indices(parts: Sequence[_Part], path: str) -> tuple[int, ...]:
    """Returns the numbers of the elements of the list at `path` that are read."""
    numbers = {part.index for part in parts if part.path == path and part.index is not None}
    return tuple(sorted(numbers))


def turn_notes(record: Record, source: Source, element: int) -> tuple[str, ...]:
    """Returns which elements of the record's lists are read, if others of a list are not.

    Messages of the user and of the system do not count, lists of numbers neither, and no element
    without the field that is read of the others.
    """
    notes = []
    for reading in readings(source):
        items = _items(record, reading.path, element)
        used = {index % len(items) for index in reading.indices} if items else set()
        unused = [items[i] for i in _answers(items) if i not in used]
        if not any(_has_text(item, path) for item in unused for path in reading.inner):
            continue
        names = " and ".join(f"{reading.path}.{index}" for index in reading.indices)
        verb = "are" if len(reading.indices) > 1 else "is"
        what = "more than one turn" if _is_chat(items) else f"more elements in {reading.path}"
        notes.append(f"{what}: only {names} {verb} read")
    return tuple(notes)


def check_prompt_roles(record: Record, source: Source, element: int) -> None:
    """Raises BadRecord (bad_text) if the prompt of a chat is no message of its user.

    A chat that begins with a message of the system has its question one element later.
    """
    for reading in readings(source):
        items = _items(record, reading.path, element)
        numbers = [i for i in reading.in_prompt if -len(items) <= i < len(items)]
        roles = [_role(items[i]) for i in numbers]
        if not roles or "user" in roles or None in roles:
            continue
        names = list_names(f"{reading.path}.{i}" for i in numbers)
        raise BadRecord(
            "bad_text",
            f"the prompt reads {names}, which is a message of the {roles[0]}, not of the user: "
            f"name another message in prompt, counted from the end as in {reading.path}.-2",
        )


def _items(record: Record, path: str, element: int) -> Sequence[Any]:
    """Returns the list at a path; nothing if there is no list, or a list of numbers."""
    try:
        value = field_or_none(record, path, element)
    except BadRecord:
        return ()
    if not isinstance(value, list | tuple) or any(isinstance(item, int | float) for item in value):
        return ()
    return value


def _has_text(item: Any, path: str) -> bool:
    """Returns whether an element has what a source reads of another element."""
    if not path:
        return item is not None
    try:
        return field_or_none({"item": item}, f"item.{path}") is not None
    except BadRecord:
        return False


def _answers(items: Sequence[Any]) -> list[int]:
    """Returns the numbers of the elements that are no message of the user or of the system."""
    return [i for i, item in enumerate(items) if _role(item) not in ("user", "system")]


def _is_chat(items: Sequence[Any]) -> bool:
    return any(_role(item) or (isinstance(item, Mapping) and _has_turn(item)) for item in items)


def _has_turn(item: Mapping[Any, Any]) -> bool:
    return any(key in item for key in TURN_KEYS)


def _role(item: object) -> str | None:
    """Returns user, assistant or system; None if an element names no speaker that is known."""
    if not isinstance(item, Mapping):
        return None
    name = next((item[key] for key in ROLE_KEYS if key in item), None)
    text = name.strip().lower() if isinstance(name, str) else ""
    return next((role for role, names in ROLES.items() if text in names), None)
