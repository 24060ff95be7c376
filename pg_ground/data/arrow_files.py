"""Rows of Arrow files, of folders of `save_to_disk`, and of CSV files.

All are tables of pyarrow. Arrow files on this machine are mapped into memory, so a row costs only
its own bytes.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pg_ground.data.class_names import (
    Names,
    names_of_features,
    names_of_schema,
    with_class_names,
)
from pg_ground.data.records import BadRecord, Records, list_names, short
from pg_ground.data.splits import choose_rows, parse_split
from pg_ground.data.tables import (
    CANNOT_OPEN,
    CANNOT_PARSE,
    cannot_open,
    check_columns,
    class_notes,
    load_json,
    matching_files,
    one_line,
    read_bytes,
    split_options,
)
from pg_ground.storage.codecs import not_utf8, to_utf8
from pg_ground.storage.paths import FilePath, is_address, to_path
from pg_ground.types import JsonDict, UserError

NUMBER = re.compile(r"[ \t]*-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?[ \t]*")
"""A number of JSON. 007, +1, .5 and NaN are none."""

FILE_MAGIC = b"ARROW1"
"""The first bytes of an Arrow file. Files of `datasets` are streams, which have no such bytes."""

DELIMITERS = {"tab": "\t", "semicolon": ";", "pipe": "|", "comma": ","}
"""Values of the option `delimiter` of `csv:`. Any other single character is itself."""


class Batch(NamedTuple):
    """Some rows of a table."""

    rows: pa.RecordBatch
    file: str
    names: Names
    """The class names of the file."""


class ArrowRows:
    """The rows of tables in memory, one table after the other, as dicts, lists, texts and bytes.

    Class numbers become the names that their file declares.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        root: FilePath,
        notes: tuple[str, ...] = (),
        numbers: frozenset[str] = frozenset(),
    ):
        """Keeps the rows.

        Args:
          batches: the rows in their order; all have the same columns.
          root: the folder that file names in the rows are relative to.
          notes: what the start-up table says about the reading.
          numbers: columns of texts that are numbers of JSON.
        """
        self.root = root
        self.notes = notes
        self._batches = batches
        self._numbers = numbers
        self._starts = np.cumsum([0] + [batch.rows.num_rows for batch in batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> JsonDict:
        row = range(len(self))[index]
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        batch = self._batches[number]
        try:
            rows = batch.rows.slice(row - int(self._starts[number]), 1).to_pylist()
            return self._record(rows[0], batch)
        except CANNOT_PARSE as error:
            raise BadRecord("bad_arrow", f"row {row} of {batch.file}: {one_line(error)}") from error

    @property
    def columns(self) -> list[str]:
        return self._batches[0].rows.schema.names

    def read_columns(self, names: Sequence[str]) -> Iterator[JsonDict | BadRecord]:
        """Yields every row, in order, with the columns `names`, or why it cannot be read."""
        for batch in self._batches:
            part = batch.rows.select(list(names))
            for number in range(part.num_rows):
                try:
                    yield self._record(part.slice(number, 1).to_pylist()[0], batch)
                except CANNOT_PARSE as error:
                    yield BadRecord("bad_arrow", f"a row of {batch.file}: {one_line(error)}")
                except BadRecord as bad:
                    yield bad

    def _record(self, row: JsonDict, batch: Batch) -> JsonDict:
        for name in self._numbers & row.keys():
            if row[name] is not None:
                row[name] = json.loads(row[name])
        return with_class_names(row, batch.names) if batch.names else row


def open_arrow(location: str) -> Records:
    """Returns the rows of Arrow files, or of a dataset that `datasets` saved with `save_to_disk`.

    Args:
      location: `PATH?split=SPLIT`. PATH is a file (an IPC file, Feather 2 or a stream), a folder of
        `save_to_disk`, another folder with `*.arrow`, or a glob pattern. SPLIT chooses a split of a
        `DatasetDict`, and can be a slice or a sum such as `train[:10%]+test` (`splits.py`).

    Raises:
      UserError: there is no such file, a file is no whole Arrow file, has two columns with one name
        or has other columns than the first file, the split does not exist, or there are no rows.
    """
    uri = f"arrow:{location}"
    name, options = split_options("arrow", location, ("split",))
    path = to_path(name, f"source {uri}")
    split = options.get("split", "")
    try:
        is_folder = path.is_dir()
        dictionary = path / "dataset_dict.json"
        is_dictionary = is_folder and dictionary.is_file()
        folders = _folders(path, dictionary, uri) if is_dictionary else {}
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    if is_dictionary and not split:
        first = next(iter(folders), "train")
        raise UserError(
            f"source {uri}: the folder has the splits {list_names(folders)}: choose one, as in "
            f"arrow:{name}?split={first}"
        )
    if is_dictionary:
        parts = parse_split(split)
        opened: dict[str, Records] = {}
        for part in parts:
            if part.split not in folders:
                raise UserError(
                    f"source {uri}: no split {part.split!r}; there are {list_names(folders)}"
                )
            if part.split not in opened:
                opened[part.split] = _open_folder(folders[part.split], path, uri, part.split)
        return choose_rows([(part, opened[part.split]) for part in parts], path, uri)
    if is_folder:
        rows = _open_folder(path, path, uri)
        return _slices_of_one(rows, path, split, uri)
    if split:
        raise UserError(f"source {uri}: split= is for folders of save_to_disk")
    try:
        files, root = matching_files(path)
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    return _open_files(files, root, uri, {})


def _folders(path: FilePath, dictionary: FilePath, uri: str) -> dict[str, FilePath]:
    """Returns the folder of each split of a `DatasetDict`."""
    content = load_json(dictionary, uri)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"source {uri}: dataset_dict.json has no list of splits")
    return {split: path / split for split in splits}


def _slices_of_one(rows: "ArrowRows", path: FilePath, split: str, uri: str) -> Records:
    """Returns the rows of a dataset that is one split, or the parts of it that `split` names."""
    if not split:
        return rows
    own = _state(path, uri).get("_split")
    parts = parse_split(split)
    for part in parts:
        if part.split != own:
            raise UserError(
                f"source {uri}: no split {part.split!r}; the folder holds "
                f"{own if own else 'rows without the name of a split'}"
            )
    return choose_rows([(part, rows) for part in parts], path, uri)


def _state(folder: FilePath, uri: str) -> Mapping[str, Any]:
    """Returns the content of state.json, {} if there is none."""
    if not (folder / "state.json").is_file():
        return {}
    state = load_json(folder / "state.json", uri)
    if not isinstance(state, dict):
        raise UserError(f"source {uri}: state.json is {short(state)}, not an object")
    return state


def _open_folder(folder: FilePath, root: FilePath, uri: str, split: str = "") -> ArrowRows:
    """Returns the rows of a folder of `save_to_disk`, or of a folder with Arrow files.

    Args:
      root: the folder that file names in the rows are relative to.
      split: for the error, if the folder is a split.
    """
    try:
        state = _state(folder, uri)
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError(
                f"source {uri}: an old version of datasets saved the order of the rows apart: load "
                f"the dataset and save it again"
            )
        entries = state.get("_data_files", ())
        names = [entry["filename"] for entry in entries]
        features = {}
        if (folder / "dataset_info.json").is_file():
            info = load_json(folder / "dataset_info.json", uri)
            features = info.get("features") or {} if isinstance(info, dict) else {}
        files = [folder / name for name in names] if state else sorted(folder.glob("*.arrow"))
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    except (KeyError, TypeError) as error:
        raise UserError(f"source {uri}: state.json has no _data_files with filenames") from error
    return _open_files(files, root, uri, names_of_features(features), split)


def _open_files(
    files: Sequence[FilePath], root: FilePath, uri: str, default: Names, split: str = ""
) -> ArrowRows:
    """Returns the rows of Arrow files.

    Args:
      default: the class names, for files that declare none.
      split: the split that the files hold, for the error.
    """
    if not files:
        raise UserError(
            f"source {uri}: no file matches; arrow:PATH is a file, a folder of save_to_disk, a "
            f"folder with *.arrow, or a pattern"
        )
    batches: list[Batch] = []
    declared: list[Names] = []
    columns: set[str] = set()
    for file in files:
        schema, parts = _read_file(file, uri)
        check_columns(schema, file.name, uri)
        different = sorted((columns or set(schema.names)) ^ set(schema.names))
        if different:
            raise UserError(
                f"source {uri}: only one of {files[0].name} and {file.name} has "
                f"{list_names(different)}; all files need the same columns"
            )
        columns = set(schema.names)
        declared.append(names_of_schema(schema.metadata))
        names = declared[-1] or default
        batches += [Batch(part, file.name, names) for part in parts if part.num_rows]
    if not batches:
        of_split = f" of split {split}" if split else ""
        raise UserError(
            f"source {uri}: there are no rows in {list_names([file.name for file in files])}"
            f"{of_split}"
        )
    return ArrowRows(batches, root, class_notes(declared, default))


def _read_file(file: FilePath, uri: str) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Returns the columns and the rows of an Arrow file, which stays mapped into memory."""
    try:
        with file.open("rb"):  # an error of Python has the usual words
            pass
        source = (
            pa.BufferReader(read_bytes(file, uri))
            if is_address(file)
            else pa.memory_map(str(file), "r")
        )
        head = source.read(len(FILE_MAGIC))
        if head.startswith(b"PAR1"):
            raise UserError(f"source {uri}: {file.name} is a parquet file: use parquet:PATH")
        is_stream = head != FILE_MAGIC
        source.seek(0)
        if is_stream:
            with pa.ipc.open_stream(source) as stream:
                return stream.schema, list(stream)
        with pa.ipc.open_file(source) as reader:
            return reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (FileNotFoundError, IsADirectoryError, PermissionError, ImportError) as error:
        raise cannot_open(uri, error) from error
    except (*CANNOT_PARSE, EOFError) as error:
        raise UserError(
            f"source {uri}: {file.name} is no whole Arrow file: {one_line(error)}"
        ) from error


def open_csv(location: str) -> Records:
    """Returns the rows of CSV files with a header, in memory.

    A cell is a text. If all cells of a column that are not empty are numbers of JSON, they are
    numbers: 1 and -2.5e3, but not 007, +1 or NaN. An empty cell is None.

    Args:
      location: `PATH?delimiter=CHARACTER`. PATH is a file or a glob pattern. A file may be in
        UTF-8, UTF-16 or UTF-32 and may be compressed. CHARACTER is one character, or tab,
        semicolon, pipe or comma (the default).

    Raises:
      UserError: there is no such file, the file is no CSV or in another encoding, two columns have
        one name, files have different columns, or there are no rows.
    """
    uri = f"csv:{location}"
    name, options = split_options("csv", location, ("delimiter",))
    text = options.get("delimiter", "comma")
    delimiter = DELIMITERS.get(text, text)
    if len(delimiter) != 1 or delimiter in '\n\r"':
        raise UserError(
            f"source {uri}: delimiter={text} must be one character, or {list_names(DELIMITERS)}"
        )
    try:
        files, root = matching_files(to_path(name, f"source {uri}"))
    except CANNOT_OPEN as error:
        raise cannot_open(uri, error) from error
    if not files:
        raise UserError(f"source {uri}: no file matches")
    tables = [_read_csv(file, uri, delimiter) for file in files]
    for file, table in zip(files, tables, strict=True):
        different = sorted(set(tables[0].column_names) ^ set(table.column_names))
        if different:
            raise UserError(
                f"source {uri}: only one of {files[0].name} and {file.name} has "
                f"{list_names(different)}; all files need the same columns"
            )
    batches = [
        Batch(batch, file.name, {})
        for file, table in zip(files, tables, strict=True)
        for batch in table.to_batches()
        if batch.num_rows
    ]
    if not batches:
        raise UserError(f"source {uri}: there are no rows in {list_names([f.name for f in files])}")
    numbers = frozenset(name for name in tables[0].column_names if _are_numbers(name, tables))
    return ArrowRows(batches, root, (), numbers)


def _are_numbers(name: str, tables: Sequence[pa.Table]) -> bool:
    """Returns whether all cells of a column that are not empty are numbers, and there are any."""
    cells = (cell.as_py() for table in tables for cell in table[name])
    filled = (cell for cell in cells if cell is not None)
    first = next(filled, None)
    return first is not None and all(map(NUMBER.fullmatch, itertools.chain((first,), filled)))


def _read_csv(file: FilePath, uri: str, delimiter: str) -> pa.Table:
    """Returns the cells of a file as texts, with None for empty cells."""
    content = to_utf8(read_bytes(file, uri), f"source {uri}: {file.name}", "CSV")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"source {uri}: {file.name} is {not_utf8(error)}") from error
    header = text.strip().partition("\n")[0]
    for name, sign in DELIMITERS.items():
        if delimiter not in header and sign in header:
            raise UserError(
                f"source {uri}: the first line of {file.name} has no {delimiter!r}, but {sign!r}: "
                f"add ?delimiter={name}"
            )
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = next((line for line in lines if line), [])
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(
                f"source {uri}: {file.name} has several columns called {list_names(repeated)}"
            )
        conversion = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        )
        # One block: a row with an image in it may be longer than a block of the default size.
        # No threads: if the program ends soon, pyarrow's threads can abort it.
        reading = pa_csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 2**31 - 1))
        parsing = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        return pa_csv.read_csv(pa.BufferReader(content), reading, parsing, conversion)
    except (*CANNOT_PARSE, csv.Error) as error:
        raise UserError(f"source {uri}: {file.name} is no CSV: {one_line(error)}") from error
