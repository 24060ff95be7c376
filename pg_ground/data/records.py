"""What every reader of a source has in common: records by index, bad records, and paths."""

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pg_ground.config import Source
from pg_ground.storage.paths import FilePath, join
from pg_ground.types import JsonDict

MAX_QUOTE = 60
"""Characters of a value that an error quotes."""

MAX_MESSAGE = 400
"""Characters of the longest message of a bad record."""

MAX_NAMES = 10
"""Fields, files and names that an error lists."""


class BadRecord(Exception):
    """A record that cannot be used.

    `kind` is the name under which the record is counted. The text says what is wrong with it. A
    text of more than `MAX_MESSAGE` characters is cut. Line breaks and characters that no terminal
    can write are escaped, because the text quotes data.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(clip_text(_printable(message), MAX_MESSAGE))
        self.kind = kind


UNUSABLE = "unusable"
"""The only field of a packed record, or of a packed image, that cannot be used."""


def unusable_fields(bad: BadRecord) -> JsonDict:
    """Returns a record, or the value of an image field, that `check_usable` refuses as `bad`."""
    return {UNUSABLE: {"kind": bad.kind, "message": str(bad)}}


def check_usable(fields: Mapping[str, Any]) -> None:
    """Raises the BadRecord for which `unusable_fields` returned `fields`."""
    fault = fields.get(UNUSABLE) if len(fields) == 1 else None
    if isinstance(fault, Mapping) and fault.keys() == {"kind", "message"}:
        raise BadRecord(str(fault["kind"]), str(fault["message"]))


def short(value: object, limit: int = MAX_QUOTE) -> str:
    """Returns `repr(value)` on one line, of about `limit` characters at most.

    A longer value ends in its size: `'/9j/4AAQ…' (18302 characters)`.
    """
    size = ""
    if isinstance(value, str | bytes) and len(value) > limit:
        size = f" ({len(value)} {'bytes' if isinstance(value, bytes) else 'characters'})"
    elif isinstance(value, list | tuple) and len(value) > limit // 2:
        size = f" ({len(value)} elements)"
    # `repr` of a text of ten megabytes would be built only to be cut.
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = limit
    shortener.maxlist = shortener.maxtuple = limit // 2
    shortener.maxdict = shortener.maxset = 10
    text = repr(value[:limit]) if size and isinstance(value, str | bytes) else shortener.repr(value)
    return clip_text(" ".join(text.split()), limit) + size


def short_path(path: object, limit: int = 120) -> str:
    """Returns a path as text, or `…` and its last `limit` characters."""
    text = str(path)
    return text if len(text) <= limit else f"…{text[-limit:]}"


def clip_text(text: str, limit: int) -> str:
    """Returns `text`, or its first `limit` characters and `…`."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def list_names(names: Iterable[object]) -> str:
    """Returns `a, b, c`; only the first `MAX_NAMES` names, each cut after 40 characters."""
    texts = [clip_text(" ".join(str(name).split()), 40) for name in names]
    more = f" and {len(texts) - MAX_NAMES} more" if len(texts) > MAX_NAMES else ""
    return (", ".join(texts[:MAX_NAMES]) or "none") + more


def nearest_name(name: str, names: Iterable[object]) -> str:
    """Returns `; did you mean NAME?` for the existing name that is most similar, or ""."""
    texts = [str(candidate)[:100] for candidate in names]
    by_case = {text.lower(): text for text in texts}
    matches = difflib.get_close_matches(name[:100].lower(), list(by_case), n=1)
    return f"; did you mean {by_case[matches[0]]}?" if matches else ""


@runtime_checkable
class Records(Protocol):
    """Random access to the records of one source. Indexing is safe from several threads."""

    @property
    def root(self) -> FilePath | None:
        """The folder that file names in the records are relative to; None if there are no files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> JsonDict:
        """Returns record `index`, or raises `BadRecord`."""
        ...


@runtime_checkable
class ColumnRecords(Records, Protocol):
    """Records of a table whose columns can be read alone, without the images in other columns."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""
        ...

    def read_columns(self, names: Sequence[str]) -> Iterator[JsonDict | BadRecord]:
        """Yields every record, in order, with these columns only, or why it cannot be read."""
        ...


def image_folder(records: Records, source: Source) -> FilePath | None:
    """Returns the folder of the image files, or None if the records have no files."""
    return join(records.root, source.image_root) if records.root else None
