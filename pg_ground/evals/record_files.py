"""Reads the records of a file of predictions: JSON, JSON lines or CSV, in any layout.

The rows may be a list, lines, a list inside an object (`{"results": […]}`,
`{dataset: {model: [row, …]}}`) or an object of rows by their ids.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.evals.rows import is_row_file
from pg_ground.readers.locations import Several, load_value
from pg_ground.storage.codecs import not_utf8, to_utf8, without_compression
from pg_ground.storage.json_values import DECODER, RepeatedKey, decode_json
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError, nearest

EXPECTED = "it must be a JSON list, JSON lines or an object with `results`"

MAX_DEPTH = 4
"""Largest number of keys on the way to a list of rows that is looked for."""

MAX_NAMES = 90
"""Characters of the names of fields in an error."""

DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
"""The delimiters of a table, by the suffix of its file."""


class RecordFile(NamedTuple):
    """The records of a file."""

    records: list[JsonDict]
    header: JsonDict
    """The values beside the list of records, which are no lists."""
    notes: list[str]
    """Where the records were, if no flag states the path and the path is unusual."""


def read_records(path: FilePath, rows: str = "", pred: str = "") -> RecordFile:
    """Returns the records of a file of predictions.

    Args:
      rows: the dotted path of the list of records. "" looks for a list of records.
      pred: the dotted path of the prediction, by which a record is recognised.

    Raises:
      UserError: the file is missing, is empty, is not JSON (with the line), has an object with a
        key twice, or has no records or several lists of records.
    """
    text = _read_text(path)
    suffix = without_compression(path.name.lower())
    delimiters = next((d for ending, d in DELIMITERS.items() if suffix.endswith(ending)), None)
    if delimiters:
        document: Any = _parse_table(text, path, delimiters)
    else:
        document = _parse(text, path)
    if rows:
        file = _records_at(document, rows, path, pred)
    elif isinstance(document, dict):
        file = _search(document, path, pred)
    else:
        file = RecordFile(document, {}, [])
    _check(file.records, path)
    return file


def _read_text(path: FilePath) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--predictions={path}: {error.strerror or error}") from None
    name = f"--predictions={path}"
    try:
        text = to_utf8(data, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: {not_utf8(error)}") from None
    if not text.strip():
        raise UserError(f"{name} is empty: {EXPECTED}")
    return text


def _check(records: Any, path: FilePath) -> None:
    if not isinstance(records, list):
        raise UserError(f"--predictions={path} is {records!r:.60}: {EXPECTED}")
    if not records:
        raise UserError(f"--predictions={path} has 0 rows")
    wrong = [index for index, record in enumerate(records) if not isinstance(record, dict)]
    if wrong:
        raise UserError(
            f"--predictions={path}: {len(wrong)} of {len(records)} rows are not objects, "
            f"first row {wrong[0]}: {records[wrong[0]]!r:.60}"
        )


# Lists of rows inside an object


class _Rows(NamedTuple):
    """A list of rows, or an object of rows by their ids, inside a document."""

    keys: tuple[str, ...]
    value: Any
    parent: Any

    @property
    def path(self) -> str:
        return ".".join(self.keys)

    def file(self, notes: list[str]) -> RecordFile:
        parent = self.parent if isinstance(self.parent, dict) else {}
        header = {
            name: value for name, value in parent.items() if not isinstance(value, list | dict)
        }
        return RecordFile(_as_records(self.value), header, notes)


def _as_records(value: Any) -> Any:
    """Returns a list of rows. A row of an object has its key as `id`, unless it has an `id`."""
    if isinstance(value, dict):
        return [{"id": key, **row} for key, row in value.items()]
    return value


def _search(document: JsonDict, path: FilePath, pred: str) -> RecordFile:
    """Returns the records of a document that is an object.

    The object is one record if it has a prediction. Its records are `results`, else its only list
    of objects, else the only list of objects or object of rows further inside.

    Raises:
      UserError: there are several lists of records.
    """
    if (pred and has_value(document, pred)) or is_row_file([document]):
        return RecordFile([document], {}, [])
    results = document.get("results")
    if _is_row_list(results):
        return _Rows(("results",), results, document).file([])
    top = [_Rows((name,), value, document) for name, value in document.items()]
    lists = [rows for rows in top if _is_row_list(rows.value)]
    inside = [rows for rows in _find_rows(document, (), None, pred) if rows.keys or pred]
    if len(lists) == 1 and (not pred or not inside or _has_prediction(lists[0].value, pred)):
        return lists[0].file([])
    candidates = inside or lists
    if not candidates:
        return RecordFile([] if results == [] else [document], {}, [])
    if len(candidates) > 1:
        raise UserError(
            f"--predictions={path} has several lists of rows: {_names(candidates)}: "
            f"--rows=PATH names one"
        )
    (rows,) = candidates
    list_name = rows.path or "the objects of the file, by their keys"
    return rows.file([f"rows: {list_name} ({len(rows.value)})"])


def _names(candidates: Sequence[_Rows]) -> str:
    names = [f"{rows.path} ({len(rows.value)})" for rows in candidates]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:60] for name in names[:5]) + more


def _find_rows(value: Any, keys: tuple[str, ...], parent: Any, pred: str) -> Iterator[_Rows]:
    """Yields the lists of rows in a value, and the objects of rows by their ids."""
    if _is_row_list(value) and _has_prediction(value, pred):
        yield _Rows(keys, value, parent)
        return
    if _is_row_object(value) and pred and _has_prediction(list(value.values()), pred):
        yield _Rows(keys, value, parent)
        return
    if len(keys) == MAX_DEPTH:
        return
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _find_rows(part, (*keys, name), value, pred)
    elif _is_row_list(value):
        for index, part in enumerate(value[:100]):
            yield from _find_rows(part, (*keys, str(index)), value, pred)


def _is_row_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_row_object(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(row, dict) for row in value.values())
    )


def _has_prediction(rows: Sequence[Any], pred: str) -> bool:
    """Returns whether one of the first 100 rows has a prediction; True if its path is not known."""
    return not pred or any(isinstance(row, dict) and has_value(row, pred) for row in rows[:100])


def _records_at(document: Any, rows: str, path: FilePath, pred: str) -> RecordFile:
    """Returns the records at a dotted path.

    Raises:
      UserError: there is nothing at the path, or no list of objects. The error names the nearest
        list.
    """
    parent_path = rows.rpartition(".")[0]
    try:
        value = value_at(document, rows)
    except LookupError:
        lists = list(_find_rows(document, (), None, "")) or list(
            _find_rows(document, (), None, pred)
        )
        lists = [rows_inside for rows_inside in lists if rows_inside.keys]
        near = nearest(rows, [candidate.path for candidate in lists][:40])
        raise UserError(f"--rows={rows} is not in {path}: {near[:MAX_NAMES]}") from None
    if not (_is_row_list(value) or _is_row_object(value)):
        raise UserError(f"--rows={rows} of {path} is no list of objects: {value!r:.60}")
    try:
        parent = value_at(document, parent_path) if parent_path else document
    except LookupError:  # the last key has a dot in it
        parent = {}
    return _Rows((rows,), value, parent).file([f"rows: {rows} ({len(value)})"])


# Fields of a record


def value_at(record: Any, field: str) -> Any:
    """Returns the value at a dotted path.

    Numbers in the path are positions in lists. A key may have dots in it. A text on the way is read
    as JSON or as a Python literal, which may stand in a code fence or in prose.

    Raises:
      LookupError: the record has no such field.
    """
    return _value_at(record, field.split("."))


def _value_at(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, str):
        value = load_value(value)
    if isinstance(value, Several):
        found = [_value_at(part, parts) for part in value if has_value(part, ".".join(parts))]
        if found:
            return found
    if isinstance(value, list) and parts[0].isdecimal():
        return _value_at(value[int(parts[0])], parts[1:])
    if isinstance(value, Mapping):
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in value:
                return _value_at(value[name], parts[length:])
    raise LookupError(parts[0])


def has_value(record: JsonObject, field: str) -> bool:
    """Returns whether a record has a value at a dotted path."""
    try:
        value_at(record, field)
    except LookupError:
        return False
    return True


def fields_of(record: JsonObject, field: str) -> str:
    """Returns the names of a record's fields for an error, and the path that is nearest to `field`.

    Names and path have at most MAX_NAMES characters each.
    """
    names = ", ".join(map(str, record)) or "no fields"
    names = names if len(names) <= MAX_NAMES else names[: MAX_NAMES - 1] + "…"
    paths = list(_paths(record, "", 3))[:40]
    same_end = [path for path in paths if path.rpartition(".")[2] == field.rpartition(".")[2]]
    near = same_end[0] if same_end else ""
    if not near:
        question = nearest(field, paths)
        near = question[13:-1] if question.startswith("did you mean ") else ""
    return f"{names}; the nearest path is {near[:MAX_NAMES]}" if near else names


def _paths(value: Any, prefix: str, depth: int) -> Iterator[str]:
    """Yields the dotted paths in a record."""
    if isinstance(value, str) and prefix and value.lstrip()[:1] in ("{", "[", "`"):
        value = load_value(value)
    if isinstance(value, Mapping):
        parts = [(str(name), part) for name, part in value.items()]
    else:
        parts = [("0", value[0])] if isinstance(value, list) and value else []
    for name, part in parts:
        yield prefix + name
        if depth:
            yield from _paths(part, f"{prefix}{name}.", depth - 1)


# Text


def _parse_table(text: str, path: FilePath, delimiters: Sequence[str]) -> list[JsonDict]:
    """Returns the rows of a table whose first line has the names of the columns.

    Raises:
      UserError: two columns have one name, or a row has another number of cells (with the line).
    """
    csv.field_size_limit(2**31 - 1)
    first_line = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(delimiters, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = next(reader)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--predictions={path}: two columns are called {twice!r:.60}")
    records = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(names):
            raise UserError(
                f"--predictions={path}: line {reader.line_num} has {len(cells)} cells, but there "
                f"are {len(names)} columns"
            )
        records.append(dict(zip(names, cells, strict=True)))
    return records


def _parse(text: str, path: FilePath) -> Any:
    """Returns the value of a JSON document, or the list of the records of a JSON-lines file.

    The records of a JSON-lines file may have several lines each, as `json.dump(…, indent=1)` or
    `jq .` write them.
    """
    try:
        return decode_json(text)
    except RepeatedKey as error:
        document_error = _document_error(text)
        if document_error is None:
            raise UserError(f"--predictions={path}: {error}") from None
    except (ValueError, RecursionError) as error:
        document_error = error
    try:
        return _parse_lines(text, path, document_error)
    except UserError as lines_error:
        return _consecutive_objects(text, path, lines_error)


def _document_error(text: str) -> Exception | None:
    """Returns why a text is not one JSON document; None if it is one."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return error
    return None


def _consecutive_objects(text: str, path: FilePath, lines_error: UserError) -> list[Any]:
    """Returns the objects that stand one after the other in a text.

    Args:
      lines_error: is raised if the text does not begin with an object over several lines.
    """
    values: list[Any] = []
    end = _separator_end(text, 0)
    while end < len(text):
        if text[end] != "{":
            raise lines_error
        try:
            value, end = DECODER.raw_decode(text, end)
        except RecursionError:
            raise lines_error from None
        except RepeatedKey as error:
            line = text.count("\n", 0, end) + 1
            raise UserError(f"--predictions={path}: the object at line {line}: {error}") from None
        except json.JSONDecodeError as error:
            # one object a line: the error of the line is better
            if not values or text.count("\n", 0, end) <= len(values):
                raise lines_error from None
            raise UserError(
                f"--predictions={path}: line {error.lineno} is not JSON: {error.msg}"
            ) from None
        values.append(value)
        end = _separator_end(text, end)
    return values


def _separator_end(text: str, start: int) -> int:
    match = _SEPARATORS.match(text, start)
    return match.end() if match else start


_SEPARATORS = re.compile(r"[\s,]*")
"""A list may have lost its brackets, and its commas stay."""


def _parse_lines(text: str, path: FilePath, document_error: Exception) -> list[Any]:
    """Returns the value of each line.

    Args:
      document_error: why the text is not one JSON document. It is reported if the text does not
        look like JSON lines.
    """
    records = []
    # str.splitlines would also split at Unicode's line separators, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(decode_json(line))
        except RepeatedKey as error:
            raise UserError(f"--predictions={path}: line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            is_document = text.lstrip()[0] == "[" or not records
            wrong_line = getattr(document_error, "lineno", number) if is_document else number
            reason = document_error if wrong_line != number else error
            message = getattr(reason, "msg", reason)
            raise UserError(
                f"--predictions={path}: line {wrong_line} is not JSON: {message}"
            ) from None
    return records
