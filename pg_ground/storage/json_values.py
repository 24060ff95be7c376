"""Values of JSON in which no object has a key twice.

Python's json keeps the last value of a repeated key and says nothing: a box is lost.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pg_ground.types import JsonDict


class RepeatedKey(ValueError):
    """An object has a key twice."""

    def __init__(self, key: str):
        super().__init__(f"the key {key!r:.60} is there twice")
        self.key = key


class Repeated:
    """An object of JSON in which, or inside of which, a key is there twice. It is no dict."""

    def __init__(self, key: str, fields: JsonDict):
        """Keeps the key that is there twice, and the fields of the object that are there once."""
        self.key = key
        self.fields = fields

    def __repr__(self) -> str:
        return f"<the key {self.key!r:.60} twice>"

    @property
    def fault(self) -> str:
        """What is wrong with the object, in words."""
        return str(RepeatedKey(self.key))


def repeated_key(names: Sequence[str]) -> str | None:
    """Returns the first name that is there twice; None if all names differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _unique(pairs: Sequence[tuple[str, Any]]) -> JsonDict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RepeatedKey(repeated_key([name for name, _ in pairs]) or "")
    return fields


def _marked(pairs: Sequence[tuple[str, Any]]) -> JsonDict | Repeated:
    key = repeated_key([name for name, _ in pairs])
    if key is None:
        return dict(pairs)
    counts = Counter(name for name, _ in pairs)
    return Repeated(key, {name: value for name, value in pairs if counts[name] == 1})


# A decoder that is made once: `json.loads(object_pairs_hook=…)` makes one for each text.
DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Decodes a text as `json.loads` does, but raises `RepeatedKey` for an object with a key twice."""


def decode_json(text: str | bytes) -> Any:
    """Returns the value of a text of JSON.

    Raises:
      RepeatedKey: an object has a key twice. It is a ValueError.
      ValueError: the text is no JSON.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if text.startswith("\ufeff"):
        return json.loads(text)  # which says what is wrong
    return DECODER.decode(text)


def decode_json_lists(text: str | bytes) -> Any:
    """Returns the value of a text of JSON that has lists of objects.

    An object with a key twice is a `Repeated`. It stands in the place of the entry that it is in or
    inside of, so one entry is lost, not the text. An entry is an element of an outermost list.

    Raises:
      RepeatedKey: an object that is inside of no list has a key twice.
      ValueError: the text is no JSON.
    """
    try:
        return decode_json(text)
    except RepeatedKey:
        return _lifted(json.loads(text, object_pairs_hook=_marked))


def _lifted(value: Any) -> Any:
    """Returns a value with the `Repeated` in the outermost lists. Raises RepeatedKey for others."""
    if isinstance(value, Repeated):
        raise RepeatedKey(value.key)
    if isinstance(value, dict):
        return {name: _lifted(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_entry(part) for part in value]
    return value


def _entry(value: Any) -> Any:
    inside = _find_repeated(value)
    if inside is None or value is inside:
        return value
    return Repeated(inside.key, value if isinstance(value, dict) else {})


def _find_repeated(value: Any) -> Repeated | None:
    if isinstance(value, Repeated):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_find_repeated, parts)), None)


def fields_of(entry: object) -> JsonDict:
    """Returns the fields of an entry. If a key is there twice, it is left out.

    A value that is no object has none.
    """
    if isinstance(entry, Repeated):
        return entry.fields
    return entry if isinstance(entry, dict) else {}
