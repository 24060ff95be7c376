"""Records in files: JSON lines, JSON lists, parquet, and YAML lists of files."""

import codecs
import io
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Int

from pg_ground.data.class_names import (
    Names,
    names_of_schema,
    shared_names,
    with_class_names,
)
from pg_ground.data.records import BadRecord, Records, clip_text, list_names, short
from pg_ground.data.sampling import sample_indices
from pg_ground.storage.codecs import (
    HEAD_BYTES,
    is_plain,
    not_utf8,
    to_utf8,
    unpack,
    without_compression,
)
from pg_ground.storage.json_values import (
    Repeated,
    RepeatedKey,
    decode_json,
    decode_json_lists,
    repeated_key,
)
from pg_ground.storage.paths import FilePath, absolute, expand_path, is_address, to_path
from pg_ground.types import JsonDict, UserError, nearest

logger = logging.getLogger(__name__)

CANNOT_OPEN = (OSError, ImportError)
"""Opening a path raises these. etils raises ImportError if a remote file system has no client."""

CANNOT_PARSE = (pa.ArrowException, OSError, ValueError, OverflowError)
"""pyarrow raises these if a file is no parquet, is cut off, or does not match its footer.

It raises OverflowError for a date that Python cannot hold.
"""

MAX_BYTES_IN_MEMORY = 2**26
"""The size of a JSON lines file up to which it is read into memory: some 200,000 questions."""

PROBED_LINES = 16
"""Lines at the beginning of a file that tell whether it has one record on each line."""

MAX_DECODED_BYTES = 2**28
"""The size of the row groups of one source that stay decoded.

A photograph takes some 100 KB, so this is a few groups of 100 to 1000 photographs.
"""


class JsonLines:
    """The lines of a file, each one JSON object. Blank lines are skipped.

    A file above `MAX_BYTES_IN_MEMORY` is opened again for each record. A file that is compressed,
    or in UTF-16 or UTF-32, stays in memory as UTF-8.
    """

    def __init__(self, path: FilePath, uri: str):
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
                file.seek(0)
                if is_plain(head):
                    self._spans = _line_spans(file)
                    is_small = bool(self._spans) and sum(self._spans[-1]) <= MAX_BYTES_IN_MEMORY
                    file.seek(0)
                    self._content = file.read() if is_small else b""
                else:
                    self._content = to_utf8(file.read(), f"source {uri}: {path.name}")
                    self._spans = _line_spans(io.BytesIO(self._content))
        except CANNOT_OPEN as error:
            raise cannot_open(uri, error) from error
        if not self._spans:
            raise UserError(
                f"source {uri}: the file has no lines; each record is one JSON object on a line"
            )
        self._path = path
        first = self._line(0).removeprefix(codecs.BOM_UTF8).strip()
        if first.startswith(b"[") and self._line(-1).rstrip().endswith(b"]"):
            raise UserError(
                f"source {uri}: the file begins with [ and ends with ], as a JSON list does: "
                f"use json:{path}"
            )
        if first.startswith(b"{"):
            self._check_one_object(first, uri)

    @property
    def root(self) -> FilePath:
        return self._path.parent

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> JsonDict:
        where = f"byte {self._spans[index][0]} of {self._path.name}"
        try:
            record = decode_json(self._line(index))
        except UnicodeDecodeError as error:
            raise BadRecord("bad_json", f"{where}: {not_utf8(error)}") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord("bad_json", f"{where}: {error}") from error
        if not isinstance(record, dict):
            raise BadRecord("bad_json", f"{where}: {short(record)} is not a JSON object")
        return record

    def _check_one_object(self, first: bytes, uri: str) -> None:
        """Raises UserError if the file is one JSON object on many lines, or on its only line.

        An object on one line is a record, unless it is a file of COCO's form.
        """
        is_one_line = len(self._spans) == 1
        if not is_one_line and not _is_part_of_object(first):
            return
        start, length = self._spans[-1]
        whole = self._content or (b"" if start + length > MAX_BYTES_IN_MEMORY else self._read())
        value = _json_or_none(whole.removeprefix(codecs.BOM_UTF8))
        if value is None and any(
            self._is_object(i) for i in range(-1, min(len(self), PROBED_LINES))
        ):
            return  # only some lines are damaged
        if is_one_line and not (
            isinstance(value, dict) and {"images", "annotations"} <= set(value)
        ):
            return
        raise UserError(f"source {uri}: {_one_object_text(value, self._path)}")

    def _is_object(self, index: int) -> bool:
        return isinstance(_json_or_none(self._line(index)), dict)

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read()

    def _line(self, index: int) -> bytes:
        start, length = self._spans[index]
        if self._content:
            return self._content[start : start + length]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(length)


def _is_part_of_object(line: bytes) -> bool:
    """Returns whether a line can be the first one of an object that is written on several lines."""
    is_record = _json_or_none(line.removesuffix(b",")) is not None
    return not is_record and line.endswith((b"{", b"[", b","))


def _json_or_none(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _one_object_text(value: Any, path: FilePath) -> str:
    """Returns what to do with a file of an object on several lines; `value` is None if of many."""
    if not isinstance(value, dict):
        return (
            "the first line is only a part of a JSON object: write each record on one line, or all "
            "as one list, which is json:PATH"
        )
    if {"images", "annotations"} <= set(value):
        return f"the file has COCO's form: use coco:{path}"
    lists = [str(key) for key, entries in value.items() if _is_list_of_objects(entries)]
    uris = " or ".join(f"json:{path}#{clip_text(key, 40)}" for key in lists[:3])
    if uris:
        return f"the file is one JSON object with a list of records: use {uris}"
    return f"the file is {describe(value)}, not one record on each line"


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


MAX_REASON = 200
"""Characters of another package's error that an error quotes."""


class BadEntry(NamedTuple):
    """An entry of a file that cannot be used: the arguments of its `BadRecord`."""

    kind: str
    message: str


@dataclass(frozen=True)
class RecordList:
    """Records in memory, as they came out of one JSON file with the name `name`."""

    entries: Sequence[Any]
    name: str
    root: FilePath | None
    notes: tuple[str, ...] = ()
    """What the start-up table says about the reading of this source."""

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> JsonDict:
        record = self.entries[index]
        if isinstance(record, BadEntry):
            raise BadRecord(record.kind, record.message)
        if isinstance(record, Repeated):
            raise BadRecord("bad_json", f"entry {index} of {self.name}: {record.fault}")
        if not isinstance(record, dict):
            raise BadRecord(
                "bad_json", f"entry {index} of {self.name}: {short(record)} is not a JSON object"
            )
        return record


class Parquet:
    """The rows of parquet files, one file after the other, as plain Python: dicts, lists, bytes.

    Parquet cannot read a single row. The row group around a row is decoded, and it stays decoded
    until other groups need the memory. So rows in order cost their own bytes, and rows in random
    order cost a group each. No file stays open. A pickled copy starts with no decoded groups.

    Class numbers become the names that their file declares, or `names` if the file declares none.
    """

    def __init__(
        self,
        paths: Sequence[FilePath],
        footers: Sequence[pq.FileMetaData],
        root: FilePath,
        names: Names | None = None,
    ):
        self.root = root
        self._default_names = names or {}
        declared = [names_of_schema(footer.schema.to_arrow_schema().metadata) for footer in footers]
        self._names = [in_file or self._default_names for in_file in declared]
        self.notes = class_notes(declared, self._default_names)
        self._paths = paths
        self._footers = footers
        self._groups = [
            (file, group)
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        groups = [footers[file].row_group(group) for file, group in self._groups]
        self._starts = np.cumsum([0] + [group.num_rows for group in groups])
        self._bytes = [group.total_byte_size for group in groups]
        self._decoded: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Parquet, (self._paths, self._footers, self.root, self._default_names)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> JsonDict:
        row = range(len(self))[index]
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        names = self._names[self._groups[group][0]]
        try:
            rows = self._row_group(group).slice(row - int(self._starts[group]), 1).to_pylist()
            return with_class_names(rows[0], names) if names else rows[0]
        except CANNOT_PARSE as error:
            file, number = self._groups[group]
            where = f"row group {number} of {self._paths[file].name}"
            raise BadRecord("bad_parquet", f"{where}: {one_line(error)}") from error

    @property
    def columns(self) -> list[str]:
        return self._footers[0].schema.to_arrow_schema().names

    def read_columns(self, names: Sequence[str]) -> Iterator[JsonDict | BadRecord]:
        """Yields every row, in order, with the columns `names`, or why it cannot be read."""
        for group, (file, number) in enumerate(self._groups):
            classes = self._names[file]
            try:
                rows = self._read(group, names).to_pylist()
            except CANNOT_PARSE as error:
                where = f"row group {number} of {self._paths[file].name}"
                bad = BadRecord("bad_parquet", f"{where}: {one_line(error)}")
                yield from [bad] * int(self._starts[group + 1] - self._starts[group])
                continue
            for row in rows:
                try:
                    yield with_class_names(row, classes) if classes else row
                except BadRecord as bad:
                    yield bad

    def _row_group(self, group: int) -> pa.Table:
        """Returns a row group. Threads that ask for the same group wait for one reading of it."""
        with self._lock:
            table = self._decoded.pop(group, None)
            must_read = table is None
            table = table or Future()
            self._decoded[group] = table  # the last entry is the one used last
            if must_read:
                self._drop_oldest()
        if must_read:
            try:
                table.set_result(self._read(group))
            except BaseException as error:
                table.set_exception(error)
                with self._lock:
                    self._decoded.pop(group, None)
        return table.result()

    def _drop_oldest(self) -> None:
        """Forgets groups until the others fit `MAX_DECODED_BYTES`. Keeps at least one group."""
        while len(self._decoded) > 1:
            if sum(self._bytes[group] for group in self._decoded) <= MAX_DECODED_BYTES:
                return
            self._decoded.popitem(last=False)

    def _read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns a row group, or only some of its columns."""
        file, number = self._groups[group]
        # A new handle for each reading: pyarrow's handles are not safe to share between threads.
        with self._paths[file].open("rb") as handle:
            parquet = pq.ParquetFile(handle, metadata=self._footers[file], pre_buffer=True)
            return parquet.read_row_group(number, columns=columns and list(columns))


def class_notes(declared: Sequence[Names], default: Names) -> tuple[str, ...]:
    """Returns what the start-up table says about the names of classes."""
    in_files = {path: len(classes) for names in declared for path, classes in names.items()}
    if all(declared):
        default = {}
    counts = [(path, count, "the file") for path, count in in_files.items()]
    counts += [(path, len(classes), "the README") for path, classes in default.items()]
    notes = [f"{'.'.join(path)}: {n} class names from {where}" for path, n, where in counts]
    for path, classes in [
        *[item for names in declared for item in names.items()],
        *default.items(),
    ]:
        shared = shared_names([(str(number), name) for number, name in enumerate(classes)])
        notes += [f"{'.'.join(path)}: {text}" for text in shared]
    return tuple(dict.fromkeys(notes))


@dataclass(frozen=True)
class Joined:
    """Records from several sources: record i is record `index[i]` of source `source[i]`."""

    sources: Sequence[Records]
    source: Int[np.ndarray, " N"]
    index: Int[np.ndarray, " N"]
    root: FilePath

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> JsonDict:
        return self.sources[self.source[index]][int(self.index[index])]


def open_json_lines(location: str) -> Records:
    """Returns the objects on the lines of a file.

    Raises:
      UserError: there is no such file, or it has no lines.
    """
    return JsonLines(to_path(location, f"source jsonl:{location}"), f"jsonl:{location}")


def open_json(location: str) -> Records:
    """Returns the objects of a JSON list, or of the lists of several files, one after the other.

    Args:
      location: `PATH` if the file is the list, or `PATH#results.val` if it is at a dotted key. PATH
        may be a glob pattern. Then the files are sorted by name.

    Raises:
      UserError: there is no such file or key, a file is no JSON, or a value is no list of objects.
    """
    uri = f"json:{location}"
    path, key = _split_key(location, uri)
    try:
        files, root = matching_files(path)
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    if not files:
        raise UserError(f"source {uri}: no file matches")
    entries = [entry for file in files for entry in _json_entries(file, key, uri)]
    return RecordList(entries, path.name, root)


def _json_entries(path: FilePath, key: str, uri: str) -> list[Any]:
    value = load_json(path, uri)
    for part in key.split(".") if key else ():
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"source {uri}: no {part!r} in {describe(value)}")
        value = value[part]
    if not isinstance(value, list) or not any(
        isinstance(entry, dict | Repeated) for entry in value
    ):
        raise UserError(
            f"source {uri}: this is {describe(value)}, but it must be a list of objects, "
            f"or have one at a key (json:PATH#key)"
        )
    return value


def matching_files(path: FilePath) -> tuple[list[FilePath], FilePath]:
    """Returns the files that a path or a glob pattern names, sorted, and their common folder."""
    fixed = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    if fixed is None or path.exists():
        return [path], path.parent
    root = type(path)(*path.parts[:fixed])
    return sorted(root.glob("/".join(path.parts[fixed:]))), root


def open_parquet(location: str) -> Records:
    """Returns the rows of parquet files, sorted by file name.

    Args:
      location: a file, a folder with `*.parquet`, or a glob pattern.

    Raises:
      UserError: there is no such file, a file is no parquet or has other columns than the first
        file, or there are no rows.
    """
    uri = f"parquet:{location}"
    path = to_path(location, f"source {uri}")
    try:
        if path.is_dir():
            paths, root = sorted(path.glob("*.parquet")), path
        else:
            paths, root = matching_files(path)
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    if not paths:
        raise UserError(
            f"source {uri}: no file matches; "
            f"parquet:PATH is a file, a folder with *.parquet, or a pattern"
        )
    return open_parquet_files(paths, root, uri)


def open_parquet_files(
    paths: Sequence[FilePath], root: FilePath, uri: str, names: Names | None = None
) -> Parquet:
    """Returns the rows of parquet files. Only the footers of the files are read now.

    Args:
      paths: the files, in the order of their rows.
      root: the folder that file names in the rows are relative to.
      uri: the name of the source in errors.
      names: the names of classes, for files that declare none.

    Raises:
      UserError: a file is missing, is no parquet, has two columns with one name, or has other
        columns than the first file; or there are no rows.
    """

    def footer(path: FilePath) -> pq.FileMetaData:
        try:
            with path.open("rb") as file:
                return pq.read_metadata(file)
        except (FileNotFoundError, IsADirectoryError, ImportError) as error:
            raise cannot_open(uri, error) from error
        except CANNOT_PARSE as error:
            raise UserError(
                f"source {uri}: {path.name} is no whole parquet file: {one_line(error)}"
            ) from error

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(footer, paths))
    for path, other in zip(paths, footers, strict=True):
        check_columns(other.schema.to_arrow_schema(), path.name, uri)
    columns = set(footers[0].schema.to_arrow_schema().names)
    for path, other in zip(paths, footers, strict=True):
        different = sorted(columns ^ set(other.schema.to_arrow_schema().names))
        if different:
            raise UserError(
                f"source {uri}: only one of {paths[0].name} and {path.name} has "
                f"{list_names(different)}; all files need the same columns"
            )
    rows = Parquet(paths, footers, root, names)
    if not len(rows):
        files = list_names([path.name for path in paths])
        raise UserError(f"source {uri}: there are no rows in {files}")
    return rows


def check_columns(schema: pa.Schema, file_name: str, uri: str) -> None:
    """Raises UserError if two columns have one name: a row would keep the last of them only."""
    name = repeated_key(schema.names)
    if name is not None:
        raise UserError(f"source {uri}: two columns of {file_name} are called {short(name)}")


def open_yaml(location: str) -> Records:
    """Returns the records of several JSON files, one file after the other, each file sampled.

    The file has EasyDistill's form `datasets: [{json_path: a.json, sampling_strategy:
    "random:50%"}]`. Without a strategy all records are used. `sampling.py` lists the strategies.
    A `json_path` is relative to the working directory, as in EasyDistill, or else to the folder of
    the YAML file. Names of images in the records are relative to the folder of the YAML file.

    Args:
      location: `FILE?seed=0`.

    Raises:
      UserError: a file cannot be opened or has another form, a strategy does not exist, or no
        record is left.
    """
    uri = f"yaml:{location}"
    name, options = split_options("yaml", location, ("seed",))
    path = to_path(name, f"source {uri}")
    seed = options.get("seed", "0")
    if not seed.isdecimal():
        raise UserError(f"source {uri}: seed={seed} must be a whole number from 0")
    sources: list[Records] = []
    indices: list[np.ndarray] = []
    for position, entry in enumerate(_yaml_entries(path, uri)):
        try:
            records = _open_json_file(entry["json_path"], path.parent)
            strategy = entry["sampling_strategy"]
            indices.append(sample_indices(len(records), strategy, int(seed) + position))
        except UserError as error:
            raise UserError(f"source {uri}: dataset {position}: {error}") from error
        sources.append(records)
    if not sum(map(len, indices)):
        raise UserError(f"source {uri}: its sampling strategies leave no record")
    source = np.repeat(np.arange(len(indices)), [len(chosen) for chosen in indices])
    return Joined(sources, source, np.concatenate(indices), path.parent)


def split_options(scheme: str, location: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Returns the part before `?`, and the options `a=1&b=2` after it.

    Values are taken as they are written: + and % have no special meaning.

    Args:
      scheme: of the uri, for errors.
      location: the uri without its scheme.
      names: the options that exist.

    Raises:
      UserError: an option does not exist, or has no value.
    """
    name, _, text = location.partition("?")
    options = {}
    for option in text.split("&") if text else ():
        key, _, value = option.partition("=")
        if key not in names:
            raise UserError(f"source {scheme}:{location}: no option {key!r}; {nearest(key, names)}")
        if not value:
            raise UserError(f"source {scheme}:{location}: option {key} has no value")
        options[key] = value
    return name, options


def _line_spans(file: Iterable[bytes]) -> list[tuple[int, int]]:
    """Returns (offset, length) in bytes of every line that is not blank."""
    spans = []
    start = 0
    for line in file:
        if not line.isspace():
            spans.append((start, len(line)))
        start += len(line)
    return spans


def _split_key(location: str, uri: str) -> tuple[FilePath, str]:
    """Returns a path and the key after `#`. The key is "" if a file has `#` in its name."""
    try:
        is_file = "#" not in location or to_path(location, f"source {uri}").is_file()
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    if is_file:
        return to_path(location, f"source {uri}"), ""
    name, _, key = location.rpartition("#")
    return to_path(name, f"source {uri}"), key


def load_json(path: FilePath, uri: str) -> Any:
    """Returns the value in a file of JSON, which may be compressed.

    An entry of a list in which a key is there twice is a `Repeated`.

    Raises:
      UserError: the file cannot be opened or unpacked, is not one JSON value, or has a key twice
        outside of all lists.
    """
    try:
        return decode_json_lists(unpack(read_bytes(path, uri), f"source {uri}: {path.name}"))
    except RepeatedKey as error:
        raise UserError(f"source {uri}: in {path.name}, {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"source {uri}: not one JSON value: {not_utf8(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"source {uri}: not one JSON value: {error} (lines of JSON are jsonl:PATH)"
        ) from error


def read_bytes(path: FilePath, uri: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read()
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error


class _UniqueLoader(yaml.SafeLoader):
    """Raises RepeatedKey if a mapping has a key twice, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        key = repeated_key([key.value for key, _ in node.value if isinstance(key.value, str)])
        if key is not None:
            raise RepeatedKey(key)
        return super().construct_mapping(node, deep)


def _yaml_entries(path: FilePath, uri: str) -> list[dict[str, str]]:
    """Returns the entries of `datasets`, each with a `json_path` and a `sampling_strategy`."""
    try:
        with path.open("rb") as file:
            value = yaml.load(file, _UniqueLoader)
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    except RepeatedKey as error:
        raise UserError(f"source {uri}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"source {uri}: not YAML: {one_line(error)}") from error
    form = 'datasets: [{json_path: a.json, sampling_strategy: "random:50%"}]'
    datasets = (
        value.get("datasets") if isinstance(value, dict) and set(value) == {"datasets"} else None
    )
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"source {uri}: this is {describe(value)}, but the form is {form}")
    entries = []
    for position, entry in enumerate(datasets):
        fields = {"sampling_strategy": "all"} | entry if isinstance(entry, dict) else {}
        has_names = set(fields) == {"json_path", "sampling_strategy"}
        if not has_names or not all(isinstance(value, str) for value in fields.values()):
            text = clip_text(str(entry), 120)
            raise UserError(f"source {uri}: dataset {position} is {text}, but the form is {form}")
        entries.append(fields)
    return entries


def _open_json_file(name: str, folder: FilePath) -> Records:
    """Opens a file in the working directory, or else in `folder`."""
    location = name
    if not is_address(name):
        path = Path(expand_path(name))
        other = folder / expand_path(name)
        location = str(path if path.exists() else other)
        if path.exists() and other.exists() and absolute(path) != absolute(other):
            logger.info("%s is read in the working directory, not %s", name, other)
    is_lines = without_compression(location).endswith(".jsonl")
    return open_json_lines(location) if is_lines else open_json(location)


def cannot_open(uri: str, error: OSError | ImportError) -> UserError:
    text = error.strerror if isinstance(error, OSError) else None
    return UserError(f"source {uri}: {text or one_line(error)}")


def one_line(error: Exception) -> str:
    """Returns the text of an error on one line, cut after `MAX_REASON` characters."""
    return clip_text(" ".join(str(error).split()), MAX_REASON)


def describe(value: object) -> str:
    """Returns the kind of a value that was read from JSON or YAML, in a few words."""
    if isinstance(value, dict):
        keys = list_names(list(map(str, value)))
        return f"an object with the keys {keys}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)} that are not all objects" if value else "an empty list"
    return f"{short(value)}"
