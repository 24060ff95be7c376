"""Records in files of text: JSON lines."""

import io
import json
from pathlib import Path
from typing import Any

from pg_ground.data.records import BadRecord
from pg_ground.types import UserError


class JsonLines:
    """The lines of a file, each one JSON object; blank lines do not count. Lines are found once and read on demand."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                self._spans = _line_spans(file)
        except OSError as e:
            raise UserError(f"source jsonl:{path}: {e.strerror or e}") from e
        if not self._spans:
            raise UserError(f"source jsonl:{path}: the file has no lines; each record is one JSON object on a line")
        self._path = path

    @property
    def root(self) -> Path:
        return self._path.parent

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = self._spans[index]
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(length)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRecord("bad_json", f"byte {start} of {self._path.name}: {e}") from e
        if not isinstance(record, dict):
            raise BadRecord("bad_json", f"byte {start} of {self._path.name}: {record!r:.60} is not a JSON object")
        return record


def _line_spans(file: io.BufferedReader) -> list[tuple[int, int]]:
    """Returns (offset, length) in bytes of every line that is not blank."""
    spans = []
    start = 0
    for line in file:
        if not line.isspace():
            spans.append((start, len(line)))
        start += len(line)
    return spans
