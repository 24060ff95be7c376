"""Files whose names are written otherwise in the records, and the nearest names of missing ones."""

import bisect
import difflib
import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pg_ground.data.records import BadRecord, clip_text, short_path
from pg_ground.storage.paths import FilePath, is_address, join

MAX_LISTED = 200_000
"""Names of a folder that are compared. A larger folder is not listed: each reader would keep it."""

NEIGHBOURS = 50
"""Names on either side of a missing name that are compared with it, by beginning and by ending."""

QUOTED_PATH = 100

QUOTED_NAME = 33
"""Characters of a path and of a name in an error: of one path and three names, 200."""


class Spelling(NamedTuple):
    """A file whose name differs from the name in the record."""

    path: FilePath
    note: str
    r"""How the name was read, such as "with / for \"."""


class _Listing(NamedTuple):
    """The names in a folder."""

    sorted: list[str]
    by_key: dict[str, list[str]]
    """The names that differ in case or Unicode form only, by `_key`."""


def find_spelling(folder: FilePath, name: str) -> Spelling | None:
    r"""Returns the file that `name` means in another spelling. Returns None if there is none.

    The spellings are / for \, percent signs decoded (%20), another Unicode form, and, on this
    machine, other case.

    Raises:
      BadRecord: missing_image, if several files differ from `name` in case only.
    """
    texts = _rewritten(name)
    for text, notes in texts.items():
        for form in ("", "NFC", "NFD"):
            spelling = unicodedata.normalize(form, text) if form else text
            changes = [*notes, f"in the Unicode form {form}"] if spelling != text else notes
            if changes and _is_file(join(folder, spelling)):
                return Spelling(join(folder, spelling), " and ".join(changes))
    if not isinstance(folder, Path):
        return None
    for text, notes in texts.items():
        paths = list(islice(_equal_but_for_case(join(folder, text), folder), 3))
        if len(paths) > 1:
            names = " and ".join(clip_text(path.name, QUOTED_NAME) for path in paths[:2])
            file = short_path(join(folder, text), QUOTED_PATH)
            raise BadRecord("missing_image", f"there is no file {file}, but {names}")
        if paths:
            return Spelling(paths[0], " and ".join([*notes, "in other case"]))
    return None


def missing_file(folder: FilePath, name: str) -> BadRecord:
    """Returns the error for a file that does not exist, with the three nearest names."""
    path = join(folder, name)
    if _is_folder(path):
        return BadRecord("missing_image", f"{short_path(path, QUOTED_PATH)} is a folder, no file")
    text = f"there is no file {short_path(path, QUOTED_PATH)}"
    path = join(folder, name.replace("\\", "/"))
    existing = next((parent for parent in path.parents if _is_folder(parent)), None)
    if not isinstance(path, Path) or not isinstance(existing, Path):
        return BadRecord("missing_image", text)
    absent = path.relative_to(existing).parts
    nearest = _nearest(existing, absent[0])
    if len(absent) > 1:
        text += f": the folder {clip_text(absent[0], QUOTED_NAME)} is not there"
        if (existing / path.name).exists():
            nearest = [path.name, *nearest[:2]]
    if nearest:
        names = ", ".join(clip_text(entry, QUOTED_NAME) for entry in nearest)
        text += f"; the nearest names are {names}"
    return BadRecord("missing_image", text)


def _rewritten(name: str) -> dict[str, list[str]]:
    """Returns the rewritten names → what was changed. The name itself is the first."""
    texts: dict[str, list[str]] = {name: []}
    slashed = name.replace("\\", "/")
    texts.setdefault(slashed, ["with / for \\"])
    texts.setdefault(unquote(name), ["with %XX decoded"])
    texts.setdefault(unquote(slashed), ["with / for \\", "with %XX decoded"])
    # A name must not become an address, which other rules read.
    return {text: notes for text, notes in texts.items() if not notes or not is_address(text)}


def _is_file(path: FilePath) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a zero byte
        return False


def _is_folder(path: FilePath) -> bool:
    try:
        return isinstance(path, Path) and path.is_dir()
    except OSError:
        return False


def _equal_but_for_case(path: FilePath, folder: Path) -> Iterator[Path]:
    """Yields the files that differ from `path` in case or Unicode form only, below `folder`."""
    assert isinstance(path, Path)
    base = folder if path.is_relative_to(folder) else Path(path.anchor)
    paths: Iterable[Path] = [base]
    for part in path.relative_to(base).parts:
        paths = [entry for parent in paths for entry in _entries(parent, part)]
    return (path for path in paths if _is_file(path))


def _entries(folder: Path, name: str) -> list[Path]:
    """Returns the entry `name` of a folder, or else the entries that differ in case only."""
    try:
        if (folder / name).exists():
            return [folder / name]
    except OSError:  # the name is too long
        return []
    names = _listing(folder).by_key.get(_key(name), [])
    form = unicodedata.normalize("NFC", name)
    exact = [entry for entry in names if unicodedata.normalize("NFC", entry) == form]
    return [folder / entry for entry in exact or names]


def _nearest(folder: Path, name: str) -> list[str]:
    """Returns the three names in a folder that are nearest to `name`."""
    names = _listing(folder).sorted
    around = dict.fromkeys(_around(names, name))
    ends = _sorted_by_end(folder)
    around |= dict.fromkeys(end[::-1] for end in _around(ends, name[::-1]))
    return difflib.get_close_matches(name, list(around), n=3, cutoff=0.0)


def _around(names: list[str], name: str) -> list[str]:
    position = bisect.bisect(names, name)
    return names[max(position - NEIGHBOURS, 0) : position + NEIGHBOURS]


def _key(name: str) -> str:
    """Returns what names that differ in case or Unicode form have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _listing(folder: Path) -> _Listing:
    return _listing_of(str(folder), _modified(folder))


def _sorted_by_end(folder: Path) -> list[str]:
    return _reversed_names(str(folder), _modified(folder))


def _modified(folder: Path) -> int:
    """Returns the time of the last change in a folder, so that a listing is not out of date."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=64)
def _listing_of(folder: str, _modified_ns: int) -> _Listing:
    try:
        with os.scandir(folder) as entries:
            names = sorted(islice((entry.name for entry in entries), MAX_LISTED + 1))
    except OSError:
        names = []
    if len(names) > MAX_LISTED:
        names = []
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(_key(name), []).append(name)
    return _Listing(names, by_key)


@functools.lru_cache(maxsize=64)
def _reversed_names(folder: str, modified_ns: int) -> list[str]:
    return sorted(name[::-1] for name in _listing_of(folder, modified_ns).sorted)
