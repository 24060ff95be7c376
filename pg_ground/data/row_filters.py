"""Row filters: `where="task != 'Count' and len(objects) > 1"` of a source keeps some records.

An expression is parsed as Python is, and a few forms of it are allowed. Nothing is evaluated as
Python: fields, literals, comparisons, `in`, `and`, `or`, `not`, `len(field)` and `field('path')`.
"""

import ast
import decimal
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pg_ground.data.record_fields import MissingField, field_at, steps_of
from pg_ground.data.records import (
    BadRecord,
    ColumnRecords,
    Records,
    clip_text,
    list_names,
    nearest_name,
    short,
)
from pg_ground.types import JsonDict, Record, UserError

FORMS = (
    "a filter has fields, texts, numbers, True, False, None, lists, == != < <= > >=, in, not in, "
    "and, or, not, parentheses, len(field) and field('path')"
)

ORDERS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

MAX_FILTER = 120
"""Characters of a filter that an error quotes."""

_ABSENT = object()
"""The value of a field that a record does not have."""

Values = Mapping[str, Any]
"""The values of a record by the paths that a filter names."""


class Kept(NamedTuple):
    """The records that a filter keeps."""

    indices: Int[np.ndarray, " K"]
    """Numbers of the records, in increasing order.

    A record that cannot be read is kept, so that it counts as a bad record.
    """
    note: str
    """How many records are kept, in words."""


class _NotAllowed(Exception):
    """A part of an expression that a filter cannot have."""

    def __init__(self, node: ast.expr, reason: str):
        super().__init__(reason)
        self.node = node


class _Mismatch(Exception):
    """A record whose values cannot be compared as the filter says."""


class RowFilter:
    """An expression over the fields of a record.

    A field that a record does not have is None. Both sides of a comparison are of one kind: text,
    number, True or False. None equals only None and has no order.
    """

    def __init__(self, text: str, setting: str):
        """Reads an expression.

        Args:
          text: the expression.
          setting: where it comes from, for errors.

        Raises:
          UserError: the text is no expression, or it has a form that a filter cannot have.
        """
        self._setting = f"{setting} ({clip_text(' '.join(text.split()), MAX_FILTER)})"
        self._paths: dict[str, None] = {}
        stripped = text.strip()
        try:
            body = ast.parse(stripped, mode="eval").body
            self._holds = self._condition(body)
        except SyntaxError as error:
            reason = f"{error.msg}; a field that is no name of Python is field('NAME')"
            raise self._bad_place(text, (error.offset or 1) - 1, reason) from None
        except _NotAllowed as error:
            # Positions of nodes count bytes.
            start = len(_lines(stripped)[error.node.lineno - 1][: error.node.col_offset].decode())
            raise self._bad_place(text, start, str(error)) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"{self._setting}: {short(str(error), 100)}") from None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the fields that the expression names."""
        return tuple(self._paths)

    def keeps(self, record: Record) -> bool:
        """Returns whether a record satisfies the expression.

        Raises:
          UserError: a value of the record cannot be compared as the expression says.
        """
        try:
            return self._holds(self._values(record))
        except (_Mismatch, BadRecord) as error:
            raise UserError(f"{self._setting}: {error}") from None

    def choose(self, records: Records) -> Kept:
        """Returns which records satisfy the expression. All records are read once.

        If the reader can read single columns, only the columns of the expression are read.

        Raises:
          UserError: no record has a field that the expression names; no record satisfies the
            expression; or a record has a value that cannot be compared as the expression says. The
            error names the record.
        """
        if isinstance(records, ColumnRecords):
            self._check_columns(records.columns)
        indices: list[int] = []
        unreadable = 0
        missing: dict[str, str] = dict.fromkeys(self._paths, "")
        for index, record in enumerate(_rows(records, self.paths)):
            if isinstance(record, BadRecord):
                unreadable += 1
                indices.append(index)
                continue
            try:
                values = self._values(record, missing)
                if self._holds(values):
                    indices.append(index)
            except (_Mismatch, BadRecord) as error:
                raise UserError(f"{self._setting}: record {index}: {error}") from None
        if unreadable < len(records):
            for path, reason in missing.items():
                if reason:
                    raise UserError(f"{self._setting}: no record has {path}: {reason}")
        kept = len(indices) - unreadable
        if not kept:
            raise UserError(f"{self._setting} keeps none of {len(records):,} records")
        note = f"where keeps {kept:,} of {len(records):,} records"
        note += f"; {unreadable:,} more cannot be read" if unreadable else ""
        return Kept(np.asarray(indices, np.int64), note)

    def _check_columns(self, columns: Sequence[str]) -> None:
        """Raises UserError if the files have no column of a path."""
        for path in self._paths:
            if not columns_of(path, columns):
                near = nearest_name(steps_of(path)[0], columns)
                raise UserError(
                    f"{self._setting}: no record has {path}: the fields are "
                    f"{list_names(columns)}{near}"
                )

    def _values(self, record: Record, missing: dict[str, str] | None = None) -> Values:
        """Returns the values of a record.

        Args:
          missing: the reason for which no record so far has a path. It is "" or removed if a
            record has it.
        """
        values = {}
        for path in self._paths:
            try:
                values[path] = _plain(field_at(record, path))
                if missing:
                    missing.pop(path, None)
            except MissingField as error:
                if not error.is_absent:
                    raise
                values[path] = None
                if missing and path in missing:
                    missing[path] = missing[path] or error.reason
        return values

    def _bad_place(self, text: str, start: int, reason: str) -> UserError:
        blanks = len(text) - len(text.lstrip())
        return UserError(f"{self._setting}: character {blanks + start + 1}: {reason}")

    # Each function returns a function of the values of a record.

    def _condition(self, node: ast.expr) -> Callable[[Values], bool]:
        match node:
            case ast.BoolOp(op, parts):
                holds = [self._condition(part) for part in parts]
                together = all if isinstance(op, ast.And) else any
                return lambda values: together(part(values) for part in holds)
            case ast.UnaryOp(ast.Not(), inner):
                inside = self._condition(inner)
                return lambda values: not inside(values)
            case ast.Compare():
                return self._comparison(node)
            case ast.Constant(bool() as value):
                return lambda _: value
            case ast.Name() | ast.Attribute() | ast.Subscript() | ast.Call():
                operand = self._operand(node)
                name = ast.unparse(node)

                def holds_itself(values: Values) -> bool:
                    value = operand(values)
                    if not isinstance(value, bool):
                        raise _Mismatch(
                            f"{name} is {short(value)}, not true or false: compare it, as in "
                            f"{name} != None"
                        )
                    return value

                return holds_itself
        raise _NotAllowed(node, f"this is no comparison; {FORMS}")

    def _comparison(self, node: ast.Compare) -> Callable[[Values], bool]:
        operands = [node.left, *node.comparators]
        read = [self._operand(operand) for operand in operands]
        names = [ast.unparse(operand) for operand in operands]
        tests = [_test(op, node) for op in node.ops]

        def holds(values: Values) -> bool:
            left = read[0](values)
            for i, test in enumerate(tests):
                right = read[i + 1](values)
                if not test(left, right, names[i], names[i + 1]):
                    return False
                left = right
            return True

        return holds

    def _operand(self, node: ast.expr) -> Callable[[Values], Any]:
        literal = _literal(node)
        if literal is not _ABSENT:
            return lambda _: literal
        match node:
            case ast.Call(ast.Name("len"), [argument], []):
                operand = self._operand(argument)
                name = ast.unparse(argument)
                return lambda values: _length(operand(values), name)
            case ast.Call(ast.Name("field"), [ast.Constant(str() as path)], []):
                return self._field(node, path)
            case ast.Call():
                raise _NotAllowed(node, f"this is no len(field) or field('path'); {FORMS}")
            case ast.Name() | ast.Attribute() | ast.Subscript():
                return self._field(node, _path(node))
        raise _NotAllowed(node, f"this is no field and no literal; {FORMS}")

    def _field(self, node: ast.expr, path: str) -> Callable[[Values], Any]:
        if not path or "[]" in path:
            raise _NotAllowed(node, f"{path or 'an empty path'} is no path of one value")
        self._paths[path] = None
        return lambda values: values[path]


def columns_of(path: str, columns: Sequence[str]) -> list[str]:
    """Returns the columns of a table that the path of a field can begin with."""
    steps = steps_of(path)
    starts = {".".join(steps[: count + 1]) for count in range(len(steps))}
    starts |= {start.removesuffix("[]") for start in starts}
    return [column for column in columns if column in starts]


def _rows(records: Records, paths: Sequence[str]) -> Iterator[JsonDict | BadRecord]:
    """Yields every record, with the fields at `paths` at least, or why it cannot be read."""
    if isinstance(records, ColumnRecords):
        names = dict.fromkeys(name for path in paths for name in columns_of(path, records.columns))
        yield from records.read_columns(list(names))
        return
    for index in range(len(records)):
        try:
            yield records[index]
        except BadRecord as bad:
            yield bad


def _path(node: ast.expr) -> str:
    """Returns the path that `a.b[1].c` or `a['b'][1].c` means."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return f"{_path(value)}.{name}"
        case ast.Subscript(value, ast.Constant(str() as name)):
            return f"{_path(value)}.{name}"
        case ast.Subscript(value, index):
            number = _literal(index)
            if isinstance(number, int) and not isinstance(number, bool):
                return f"{_path(value)}[{number}]"
            raise _NotAllowed(index, "an index is a whole number or a name in quotes")
    raise _NotAllowed(node, f"this is no field; {FORMS}")


def _literal(node: ast.expr) -> Any:
    """Returns the value of a literal, or `_ABSENT` if `node` is none."""
    match node:
        case ast.Constant(bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, ast.Constant(int() | float() as number)):
            if isinstance(number, bool):
                return _ABSENT
            return -number if isinstance(sign, ast.USub) else number
        case ast.List(items) | ast.Tuple(items):
            values = [_literal(item) for item in items]
            for item, value in zip(items, values, strict=True):
                if value is _ABSENT:
                    raise _NotAllowed(item, "a list holds texts, numbers, True, False and None")
            return values
    return _ABSENT


def _test(op: ast.cmpop, node: ast.Compare) -> Callable[[Any, Any, str, str], bool]:
    """Returns the test of two values. Their names are for errors."""
    match op:
        case ast.Eq() | ast.Is():
            return _equal
        case ast.NotEq() | ast.IsNot():
            return lambda left, right, *names: not _equal(left, right, *names)
        case ast.In():
            return _contained
        case ast.NotIn():
            return lambda left, right, *names: not _contained(left, right, *names)
    compare = ORDERS.get(type(op))
    if compare is None:
        raise _NotAllowed(node, FORMS)

    def ordered(left: Any, right: Any, left_name: str, right_name: str) -> bool:
        for value, name in ((left, left_name), (right, right_name)):
            if value is None:
                raise _Mismatch(f"{name} is null, which has no order: write {name} != None and …")
        if _kind(left) != _kind(right) or _kind(left) not in ("text", "a number"):
            raise _unlike(left, right, left_name, right_name)
        return bool(compare(left, right))

    return ordered


def _equal(left: Any, right: Any, left_name: str, right_name: str) -> bool:
    if left is None or right is None:
        return left is right
    if _kind(left) != _kind(right):
        raise _unlike(left, right, left_name, right_name)
    return bool(left == right)


def _contained(left: Any, right: Any, left_name: str, right_name: str) -> bool:
    """Returns whether a list has an element, or a text has a part."""
    if isinstance(right, str) and isinstance(left, str):
        return left in right
    if not isinstance(right, list):
        raise _Mismatch(
            f"{right_name} is {short(right)}, but {left_name} in {right_name} needs a list"
        )
    others = [item for item in right if item is not None]
    if left is None:
        return len(others) < len(right)
    if others and all(_kind(item) != _kind(left) for item in others):
        raise _unlike(left, others[0], left_name, f"an element of {right_name}")
    return any(_kind(item) == _kind(left) and item == left for item in others)


def _length(value: Any, name: str) -> int:
    if not isinstance(value, str | list | Mapping):
        raise _Mismatch(f"{name} is {short(value)}, which has no length")
    return len(value)


def _unlike(left: Any, right: Any, left_name: str, right_name: str) -> _Mismatch:
    texts = [
        f"{name} is {_kind(value)}" + ("" if name == repr(value) else f" ({short(value)})")
        for value, name in ((left, left_name), (right, right_name))
    ]
    return _Mismatch(f"{texts[0]} and {texts[1]}, which cannot be compared")


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float() | decimal.Decimal():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return f"a value of type {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Returns a value in which numpy's numbers and arrays are Python's numbers and lists."""
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.item() if isinstance(value, np.generic) else value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _lines(text: str) -> list[bytes]:
    return text.encode("utf-8", "surrogatepass").splitlines(keepends=True)
