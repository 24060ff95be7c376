"""Sources → batches, by grain: shuffled without end for training, in order and once for measuring."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Bool

from pg_ground.config import Data, Source
from pg_ground.data.examples import check_formats, check_room, to_batch_row, to_example
from pg_ground.data.records import BadRecord, Records
from pg_ground.data.sources import open_records
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Batch, Example, UserError

SETTLED = 100
"""Records of a source from which a share of them means something: the first bad one of many is no 100 %."""


class BadRecords:
    """What could not be used, by source, index and kind. Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._size: dict[str, int] = {}
        self._read: Counter[str] = Counter()
        self._entries: dict[str, dict[int, dict[str, Any]]] = {}

    def read(self, source: str, size: int, n: int = 1) -> None:
        """Counts `n` records of `source`, which has `size`, as read, usable or not."""
        with self._lock:
            self._size[source] = size
            self._read[source] += n

    def add(self, source: str, index: int, kind: str, message: str) -> None:
        """Lists a record as bad, once however often it is read."""
        entry = {"source": source, "index": index, "kind": kind, "message": message}
        with self._lock:
            self._entries.setdefault(source, {}).setdefault(index, entry)

    def counts(self) -> dict[str, int]:
        """Returns the number of different bad records of each kind."""
        return dict(Counter(entry["kind"] for entry in self.entries()))

    def entries(self) -> list[dict[str, Any]]:
        """Returns source, index, kind and message of every bad record, by source and index."""
        with self._lock:
            return [dict(bad[index]) for _, bad in sorted(self._entries.items()) for index in sorted(bad)]

    def get_state(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        entries = self.entries()
        with self._lock:
            return {"size": dict(self._size), "read": dict(self._read), "entries": entries}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `get_state` returned."""
        with self._lock:
            self._size, self._read = dict(state["size"]), Counter(state["read"])
        for entry in state["entries"]:
            self.add(entry["source"], entry["index"], entry["kind"], entry["message"])

    def check(self, share: float) -> None:
        """Raises UserError if more than `share` of a source, as far as it was read, or all of it cannot be used.

        Until `SETTLED` records are read, or all of a smaller source, the share is taken of that many.
        """
        with self._lock:
            over = next((source for source in sorted(self._entries) if self._is_over(source, share)), None)
            seen = min(self._read[over], self._size[over]) if over else 0
        if over:
            entries = [entry for entry in self.entries() if entry["source"] == over]
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(entry["kind"] for entry in entries).most_common())
            first = entries[0]
            raise UserError(
                f"source {over}: {len(entries)} of {seen} records read cannot be used ({kinds}), where "
                f"data.bad_record_share allows {share:g}; record {first['index']}: {first['message']}"
            )

    def _is_over(self, source: str, share: float) -> bool:
        bad, size = len(self._entries[source]), self._size[source]
        seen = min(max(self._read[source], SETTLED), size)
        return bad > share * seen or bad == size


class Examples:
    """The questions of one source by index. Indexing raises `BadRecord` for a record that cannot be used."""

    def __init__(self, name: str, source: Source, records: Records, data: Data, image_size: int):
        self.name = name
        self._source = source
        self._records = records
        self._data = data
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        example = to_example(record, self._source, self.name, index, self._image_size, self._records.root)
        check_room(example, self._data)
        return example


def open_examples(source_name: str, source: Source, data: Data, image_size: int) -> Examples:
    """Returns the questions of one source.

    Raises:
      UserError: the source cannot be opened or its entry names a format that does not exist.
    """
    check_formats(source, source_name)
    return Examples(source_name, source, open_records(source.uri), data, image_size)


def training_batches(
    sources: Mapping[str, Source],
    data: Data,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    bad: BadRecords,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Returns this process's rows of batches without end; `get_state` and `set_state` continue exactly.

    Sources are mixed by weight (grain cuts weights to hundredths of the smallest), each in a new order every epoch.
    Process p of n takes records p, p + n, … of that one sequence, so that the processes' rows together are the same
    whatever n is, as long as no record is bad.

    Args:
      batch_size: rows of a batch over all processes.

    Raises:
      UserError: at once if a source cannot be opened; on `next` if too many records are bad.
    """
    rows = _rows_per_process(batch_size, process_count)
    parts = []
    for position, (name, source) in enumerate(sources.items()):
        opened = open_examples(name, source, data, image_size)
        parts.append(_shuffled(len(opened), _preparer(opened, tokenizer, data, position, bad), seed, position))
    mixed = grain.MapDataset.mix(parts, [source.weight for source in sources.values()])
    read_ahead = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=max(rows, data.read_threads))
    return iter(mixed[process_index::process_count].to_iter_dataset(read_ahead).batch(rows, batch_fn=stack))


def ordered_batches(
    sources: Mapping[str, Source],
    data: Data,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    batch_size: int,
    examples: int,
    bad: BadRecords,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, Bool[np.ndarray, " B"]]]:
    """Yields this process's rows of batches and which count: the first `examples` usable records of each source.

    Sources come one after the other, in order. The last batch of a source is filled up with its last row, which does
    not count again. Every process reads every record: which ones are usable is known only then.

    Raises:
      UserError: a source cannot be opened, or too many of its records are bad.
    """
    per_process = _rows_per_process(batch_size, process_count)
    mine = slice(process_index * per_process, (process_index + 1) * per_process)
    for position, (name, source) in enumerate(sources.items()):
        opened = open_examples(name, source, data, image_size)
        prepare = _preparer(opened, tokenizer, data, position, bad)
        for rows in _chunks(_usable_rows(prepare, len(opened), examples, batch_size, data.read_threads), batch_size):
            filled = rows + rows[-1:] * (batch_size - len(rows))
            yield stack(filled[mine]), (np.arange(batch_size) < len(rows))[mine]


def stack(rows: Sequence[Batch]) -> Batch:
    """Returns rows as one batch, with B in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _preparer(
    opened: Examples, tokenizer: Tokenizer, data: Data, position: int, bad: BadRecords
) -> Callable[[int], Batch | None]:
    """Returns the function from a record number to its row, or to None for a bad record, which goes into `bad`."""

    def prepare(index: int) -> Batch | None:
        bad.read(opened.name, len(opened))
        try:
            return to_batch_row(opened[int(index)], tokenizer, data, position)
        except BadRecord as e:
            bad.add(opened.name, int(index), e.kind, str(e))
            bad.check(data.bad_record_share)
            return None

    return prepare


def _shuffled(count: int, prepare: Callable[[int], Batch | None], seed: int, position: int) -> grain.MapDataset:
    """Returns the rows of a source in an endless random order that is its own, and another every epoch."""
    own_seed = int(np.random.SeedSequence([seed, position]).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(seed=own_seed).repeat(None).map(prepare)


def _usable_rows(prepare: Callable[[int], Batch | None], count: int, wanted: int, at_once: int, threads: int) -> Iterator[Batch]:
    """Yields the first `wanted` usable rows of `count` records in order, reading no record more than that takes."""
    with ThreadPoolExecutor(threads) as pool:
        start = 0
        while wanted and start < count:
            stop = min(start + min(wanted, at_once), count)
            rows = [row for row in pool.map(prepare, range(start, stop)) if row is not None]
            yield from rows
            wanted -= len(rows)
            start = stop


def _chunks(rows: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(f"a batch of {batch_size} cannot be split over {process_count} processes: make it a multiple")
    return batch_size // process_count
