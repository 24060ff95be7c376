"""Counts and lists the records that cannot be used."""

import re
import threading
from collections import Counter
from collections.abc import Sequence

from pg_ground.types import JsonDict, Record, UserError

MIN_RECORDS = 100
"""The share of bad records is taken of at least this many records.

Otherwise a bad first record would be a share of 100 %.
"""

RECORD = re.compile(r"record \d+[:,] ")
"""The beginning of a message that names its record."""


class BadRecords:
    """The bad records of a run, by source, index and kind. Several threads may use it at once."""

    def __init__(self):
        self._lock = threading.Lock()
        self._size: dict[str, int] = {}
        self._read: Counter[str] = Counter()
        self._entries: dict[str, dict[int, JsonDict]] = {}

    def read(self, source: str, size: int, n: int = 1) -> None:
        """Counts `n` records as read, good or bad. `size` is the number of the source's records."""
        with self._lock:
            self._size[source] = size
            self._read[source] += n

    def add(self, source: str, index: int, kind: str, message: str) -> None:
        """Lists a record as bad. A record that is read again is listed once."""
        entry = {"source": source, "index": index, "kind": kind, "message": message}
        with self._lock:
            self._entries.setdefault(source, {}).setdefault(index, entry)

    def counts(self) -> dict[str, int]:
        """Returns the number of different bad records of each kind."""
        return dict(Counter(entry["kind"] for entry in self.entries()))

    def entries(self) -> list[JsonDict]:
        """Returns source, index, kind and message of every bad record, by source and index."""
        with self._lock:
            return [
                dict(entries[index])
                for _, entries in sorted(self._entries.items())
                for index in sorted(entries)
            ]

    def get_state(self) -> JsonDict:
        """Returns all counts and entries as JSON."""
        entries = self.entries()
        with self._lock:
            return {"size": dict(self._size), "read": dict(self._read), "entries": entries}

    def set_state(self, state: Record) -> None:
        """Restores what `get_state` returned."""
        with self._lock:
            self._size = dict(state["size"])
            self._read = Counter(state["read"])
        for entry in state["entries"]:
            self.add(entry["source"], entry["index"], entry["kind"], entry["message"])

    def check(self, max_share: float) -> None:
        """Raises UserError if a source has more than `max_share` bad records, or only bad ones.

        The share is taken of the records that were read, and of at least `MIN_RECORDS` records
        (or of all records of a smaller source).
        """
        with self._lock:
            source = next((s for s in sorted(self._entries) if self._exceeds(s, max_share)), None)
            if source is None:
                return
            read = min(self._read[source], self._size[source])
        entries = [entry for entry in self.entries() if entry["source"] == source]
        kinds = Counter(entry["kind"] for entry in entries).most_common()
        first = entries[0]
        raise UserError(
            f"source {source}: {len(entries)} of {read} records read cannot be used "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds)}), but "
            f"data.bad_record_share allows {max_share:g}; "
            f"{numbered(first['index'], first['message'])}"
        )

    def _exceeds(self, source: str, max_share: float) -> bool:
        bad = len(self._entries[source])
        return exceeds_share(bad, self._read[source], self._size[source], max_share)


def exceeds_share(bad: int, read: int, size: int, max_share: float) -> bool:
    """Returns whether a source has too many bad records, or only bad ones.

    Args:
      bad: bad records among the records that were read.
      read: records that were read. At least `MIN_RECORDS` are assumed.
      size: all records of the source.
      max_share: a value of `data.bad_record_share`.
    """
    return bad > max_share * min(max(read, MIN_RECORDS), size) or bad == size


def numbered(index: int, message: str, noun: str = "record") -> str:
    """Returns the message of a bad record. If it names no record, `noun` and `index` precede it."""
    return message if RECORD.match(message) else f"{noun} {index}: {message}"


def in_words(entries: Sequence[Record]) -> str:
    """Returns the number of bad records, their kinds and the first of them as text."""
    kinds = Counter(entry["kind"] for entry in entries).most_common()
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    first = entries[0]
    noun = "record" if len(entries) == 1 else "records"
    return (
        f"{len(entries)} {noun} cannot be used ({counts}); "
        f"first {first['source']} {first['index']}: {first['message']:.200}"
    )


def merge_bad_records(states: Sequence[Record]) -> JsonDict:
    """Returns the states of several `BadRecords` as one state."""
    read: Counter[str] = Counter()
    for state in states:
        read.update(state["read"])
    return {
        "size": {source: size for state in states for source, size in state["size"].items()},
        "read": dict(read),
        "entries": [entry for state in states for entry in state["entries"]],
    }
