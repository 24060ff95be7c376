"""Splits as `datasets` writes them: `train`, `train[:10%]`, `train[100:200]`, `train[:9]+test`."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pg_ground.data.records import BadRecord, ColumnRecords, Records, list_names
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError

SLICE = re.compile(r"(?P<split>.+)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]", re.ASCII)


class Part(NamedTuple):
    """Some rows of a split."""

    split: str
    start: str
    """A number of rows or a percentage, which may be negative; "" for the first row."""
    stop: str
    """As `start`; "" for the end."""

    @property
    def text(self) -> str:
        is_whole = not self.start and not self.stop
        return self.split if is_whole else f"{self.split}[{self.start}:{self.stop}]"


class Chosen:
    """Rows of several readers, one part after the other."""

    def __init__(
        self, parts: Sequence[tuple[Records, range]], root: FilePath | None, notes: tuple[str, ...]
    ):
        self.root = root
        self.notes = notes
        self._parts = parts
        self._starts: Int[np.ndarray, " P_1"] = np.cumsum([0] + [len(rows) for _, rows in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> JsonDict:
        row = range(len(self))[index]
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        records, rows = self._parts[number]
        return records[rows[row - int(self._starts[number])]]


class ChosenColumns(Chosen):
    """Rows of several readers of tables, whose columns can be read alone."""

    @property
    def columns(self) -> list[str]:
        names = [_table(records).columns for records, _ in self._parts]
        return list(dict.fromkeys(name for part in names for name in part))

    def read_columns(self, names: Sequence[str]) -> Iterator[JsonDict | BadRecord]:
        """Yields every row, in order, with the columns `names`, or why it cannot be read."""
        for records, rows in self._parts:
            table = _table(records)
            existing = [name for name in names if name in table.columns]
            for number, row in enumerate(table.read_columns(existing)):
                if number >= rows.stop:
                    break
                if number >= rows.start:
                    yield row


def _table(records: Records) -> ColumnRecords:
    assert isinstance(records, ColumnRecords)
    return records


def parse_split(text: str) -> list[Part]:
    """Returns the parts of a sum of splits and slices.

    Brackets without a colon and numbers in them belong to the name of a split.
    """
    parts = []
    for part in map(str.strip, text.split("+")):
        match = SLICE.fullmatch(part)
        if match is None:
            parts.append(Part(part, "", ""))
        else:
            parts.append(Part(match["split"], match["start"] or "", match["stop"] or ""))
    return parts


def rows_of(part: Part, count: int, uri: str) -> range:
    """Returns the rows of a part of a split with `count` rows, as `datasets` computes them.

    A percentage is rounded to the nearest number of rows. A negative end counts from the last row.

    Raises:
      UserError: the slice reaches beyond the split, or holds no row.
    """
    ends = []
    for text, default in ((part.start, 0), (part.stop, count)):
        number = int(text.removesuffix("%") or default) if text else default
        is_percent = text.endswith("%")
        limit = 100 if is_percent else count
        if abs(number) > limit:
            has = "100 percent" if is_percent else f"{count} rows"
            raise UserError(
                f"source {uri}: the slice {part.text} reaches beyond the split, which has {has}"
            )
        if is_percent:
            number = round(number * count / 100)
        ends.append(number + count if number < 0 else number)
    rows = range(ends[0], ends[1])
    if not rows:
        raise UserError(
            f"source {uri}: the slice {part.text} holds none of the {count} rows of the split"
        )
    return rows


def choose_rows(parts: Sequence[tuple[Part, Records]], root: FilePath | None, uri: str) -> Records:
    """Returns the rows of the parts, one part after the other.

    Args:
      parts: each part with all rows of its split.
      root: the folder that file names in the rows are relative to.

    Raises:
      UserError: a slice reaches beyond its split, or holds no row.
    """
    if len(parts) == 1 and parts[0][0].text == parts[0][0].split:
        return parts[0][1]
    chosen = [(records, rows_of(part, len(records), uri)) for part, records in parts]
    notes = [note for records, _ in chosen for note in getattr(records, "notes", ())]
    pairs = zip(parts, chosen, strict=True)
    counts = [f"{len(rows):,} of {part.text}" for (part, _), (_, rows) in pairs]
    notes.append(f"the rows are {list_names(counts)}")
    is_table = all(isinstance(records, ColumnRecords) for records, _ in chosen)
    kind = ChosenColumns if is_table else Chosen
    return kind(chosen, root, tuple(dict.fromkeys(notes)))
