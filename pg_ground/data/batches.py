"""Sources → batches, by grain: shuffled and endless for training, in order and once for evals."""

import contextlib
import itertools
import pickle
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Int, UInt8

from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batch_rows import stack_rows
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.mixture import Mixture, Row, UnusableRow, prepare_row
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Batch, JsonDict, JsonObject, UserError

BLOCK_ROWS = 8
"""Rows that a thread or a worker prepares before it hands them over."""

PREFETCH_BATCHES = 2
"""Batches that `PrefetchIterator` prepares ahead.

Two, because on a CPU a step may be over when its call returns. A batch that is started then is
ready one step later.
"""


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator of batches that continues exactly from a saved state."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> JsonDict:
        """Returns the state after the last batch that was returned, as JSON."""
        ...

    def set_state(self, state: JsonObject) -> None:
        """Continues after the batch at which `get_state` returned `state`."""
        ...

    def prepare(self) -> None:
        """Starts to prepare the next batches in the background. Called while the devices work."""
        ...


class BlockSource:
    """A process's positions of a mixture from one position on, a block of rows at a time.

    Grain has a cost for each element that it hands over. Blocks share that cost among their rows.
    """

    def __init__(
        self,
        mixture: Mixture,
        rows: Int[np.ndarray, " rows"],
        batch_size: int,
        start: int,
        size: int,
    ):
        self._mixture = mixture
        self._rows = rows
        self._batch_size = batch_size
        self._start = start
        self._size = size

    def __len__(self) -> int:
        return sys.maxsize // (self._batch_size * self._size * 2)

    def position(self, number: int) -> int:
        """Returns the position in the mixture of this process's row `number`."""
        batch, row = divmod(number, len(self._rows))
        return batch * self._batch_size + int(self._rows[row])

    def __getitem__(self, index: int) -> list[Row]:
        start = self._start + int(index) * self._size
        return [self._mixture[self.position(start + i)] for i in range(self._size)]


class TrainingBatches:
    """This process's rows of an endless sequence of batches.

    `get_state` and `set_state` continue exactly, also if `data.workers` changes in between.
    """

    def __init__(
        self,
        mixture: Mixture,
        data: Data,
        rows: Int[np.ndarray, " rows"],
        batch_size: int,
        bad_records: BadRecords,
    ):
        self.datasets = mixture.datasets
        self._mixture = mixture
        self._data = data
        self._bad_records = bad_records
        self._rows = rows
        self._batch_size = batch_size
        self._next = 0
        self._stream: Generator[Row] | None = None

    def get_state(self) -> JsonDict:
        """Returns how many of this process's rows were read, and how many it has in a batch."""
        return {"next": self._next, "rows": len(self._rows)}

    def set_state(self, state: JsonObject) -> None:
        """Continues where `get_state` was called.

        If that process had another number of rows, continues with the first batch that has none of
        the rows that the process had read.
        """
        self.close()
        position = int(state["next"])
        rows = int(state["rows"])
        is_same_split = rows == len(self._rows)
        self._next = position if is_same_split else -(-position // rows) * len(self._rows)

    def prepare(self) -> None:
        """Does nothing: the reading threads and the workers read ahead anyway."""

    def close(self) -> None:
        """Ends the workers and drops what they have read ahead. `next` starts new workers."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._open()
        rows: list[Batch] = []
        unusable = 0
        while len(rows) < len(self._rows):
            row = next(self._stream)
            self._next += 1
            dataset = self.datasets[row.source]
            usable = count_row(self._bad_records, dataset, row.index, row.result, self._data)
            if usable is not None:
                rows.append(usable)
                unusable = 0
                continue
            unusable += 1
            if unusable >= 2 * self._mixture.pass_length():
                raise self._no_usable_row(row)
        return stack_rows(rows)

    def _no_usable_row(self, row: Row) -> UserError:
        assert isinstance(row.result, UnusableRow)
        names = ", ".join(dataset.name for dataset in self.datasets)
        count = sum(map(len, self.datasets))
        return UserError(
            f"{'sources' if len(self.datasets) > 1 else 'source'} {names}: none of {count} "
            f"questions can be used; question {row.index} of {self.datasets[row.source].name}: "
            f"{row.result.message}"
        )

    def _open(self) -> Generator[Row]:
        """Yields the rows from the next position on, which threads and workers read ahead."""
        size = min(BLOCK_ROWS, len(self._rows))
        blocks = grain.MapDataset.source(
            BlockSource(self._mixture, self._rows, self._batch_size, self._next, size)
        )
        threads = self._data.read_threads
        buffer = max(len(self._rows) // size, threads)
        stream = blocks.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer if threads else 0)
        )
        if self._data.workers:
            flags.FLAGS.mark_as_parsed()  # grain asks absl whether to profile its workers
            per_worker = max(1, 2 * buffer // self._data.workers)
            stream = (
                stream.map(_pack_block)
                .mp_prefetch(grain.MultiprocessingOptions(self._data.workers, per_worker))
                .map(_unpack_block)
            )
        # Closing matters: the workers hold shared memory.
        with contextlib.closing(iter(stream)) as opened:
            for block in opened:
                yield from block


class PrefetchIterator:
    """Batches that another thread prepares and puts on the devices while earlier ones are used.

    Its state is the state after the last batch that was returned, not after the last that was
    prepared. On leaving its `with` block it ends the thread and closes the batches.
    """

    def __init__(self, batches: TrainingBatches, put: Callable[[Batch], Batch]):
        """Takes the batches, and the function that puts a batch on the devices."""
        self._batches = batches
        self._put = put
        self._state = batches.get_state()
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[tuple[Batch, JsonDict]]] = deque()

    def __enter__(self) -> "PrefetchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def prepare(self) -> None:
        """Starts to prepare the next batches.

        Called while the devices work, so that the preparation does not delay the devices.
        """
        while len(self._pending) < PREFETCH_BATCHES:
            self._pending.append(self._pool.submit(self._next_batch))

    def _next_batch(self) -> tuple[Batch, JsonDict]:
        batch = jax.block_until_ready(self._put(next(self._batches)))
        return batch, self._batches.get_state()

    def __next__(self) -> Batch:
        if not self._pending:
            self.prepare()
        batch, self._state = self._pending.popleft().result()
        return batch

    def get_state(self) -> JsonDict:
        """Returns the state after the last batch that was returned."""
        return self._state

    def set_state(self, state: JsonObject) -> None:
        """Drops the prepared batches and continues from `state`."""
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()  # waits: the thread must not read on from the new state
        self._pending.clear()
        self._batches.set_state(state)
        self._state = self._batches.get_state()


def training_batches(
    sources: Mapping[str, Source],
    data: Data,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    bad_records: BadRecords,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> TrainingBatches:
    """Returns this process's rows of an endless sequence of batches.

    Sources are mixed by weight, each in a new order every epoch. A batch is the next `batch_size`
    positions of that one sequence. Without bad records, the rows of a batch are the same for any
    number of processes. For a bad record, a process takes the next of its own positions, and its
    later rows move up. This is repeatable with the same number of processes only.

    Args:
      sources: config entries by name.
      data: settings that all sources share.
      tokenizer: of prompts and suffixes.
      image_size: pixels, square.
      batch_size: rows of a batch over all processes.
      seed: of the orders and of all random choices.
      bad_records: counts the records that cannot be used.
      rows: which rows of each batch this process reads, in order; None means all rows.

    Raises:
      UserError: at once if a source cannot be opened; on `next` if too many records are bad, or if
        no record can be used.
    """
    datasets = [
        open_examples(name, source, data, image_size, seed) for name, source in sources.items()
    ]
    rows = np.arange(batch_size) if rows is None else rows
    mixture = Mixture(datasets, tokenizer, data, seed)
    return TrainingBatches(mixture, data, rows, batch_size, bad_records)


def merge_batch_states(states: Sequence[JsonObject]) -> JsonDict:
    """Returns a state from which any number of processes can continue.

    The state stands before the first batch that no process has begun. Without bad records every
    process stands there. With bad records some processes are ahead. The rows that the others had
    not read are left out, and no row is read twice.
    """
    next_batch = max(-(-int(state["next"]) // int(state["rows"])) for state in states)
    return {"next": next_batch, "rows": 1}


def ordered_batches(
    datasets: Sequence[Examples],
    data: Data,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    examples: int,
    bad_records: BadRecords,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[Batch, Bool[np.ndarray, " B"]]]:
    """Yields this process's rows of batches, and which rows count.

    Each source gives its first `examples` usable records, in order, one source after the other.
    The last row of a source fills up its last batch, and the copies do not count. Every process
    reads every record, because only reading shows which records are usable.

    Args:
      datasets: the questions of each source.
      data: settings that all sources share.
      tokenizer: of prompts and suffixes.
      batch_size: rows of a batch over all processes.
      examples: number of questions of each source.
      bad_records: counts the records that cannot be used.
      rows: which rows of each batch this process gets, in order; None means all rows.

    Raises:
      UserError: too many records of a source are bad.
    """
    rows = np.arange(batch_size) if rows is None else rows
    for position, dataset in enumerate(datasets):

        def prepare(
            index: int, dataset: Examples = dataset, position: int = position
        ) -> Batch | None:
            result = prepare_row(dataset, index, tokenizer, data, position, 0)
            return count_row(bad_records, dataset, index, result, data)

        usable = _usable_rows(prepare, len(dataset), examples, batch_size, data.read_threads)
        while chunk := list(itertools.islice(usable, batch_size)):
            filled = chunk + chunk[-1:] * (batch_size - len(chunk))
            yield stack_rows([filled[row] for row in rows]), rows < len(chunk)


def count_row(
    bad_records: BadRecords,
    dataset: Examples,
    index: int,
    result: Batch | UnusableRow,
    data: Data,
) -> Batch | None:
    """Returns the row of a question, or None for a bad record, which it counts and lists.

    An empty record that the source drops is not a bad record: it gives None and is not listed.

    Raises:
      UserError: too many of the source's records are bad.
    """
    bad_records.read(dataset.name, len(dataset))
    if not isinstance(result, UnusableRow):
        return result
    if result.kind != "empty":
        bad_records.add(dataset.name, index, result.kind, result.message)
        bad_records.check(data.bad_record_share)
    return None


def _pack_block(block: list[Row]) -> UInt8[np.ndarray, " bytes"]:
    """Returns a block as one array.

    Grain makes a shared memory for each array that a worker hands over, and a row has a dozen.
    """
    return np.frombuffer(pickle.dumps(block, pickle.HIGHEST_PROTOCOL), np.uint8)


def _unpack_block(block: UInt8[np.ndarray, " bytes"]) -> list[Row]:
    return pickle.loads(block.data)


def _usable_rows(
    prepare: Callable[[int], Batch | None], count: int, limit: int, chunk: int, threads: int
) -> Iterator[Batch]:
    """Yields the first `limit` usable rows of `count` records, in order.

    Reads at most `chunk` records at a time, and no more records than the result needs.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        start = 0
        while limit and start < count:
            stop = min(start + min(limit, chunk), count)
            rows = [row for row in pool.map(prepare, range(start, stop)) if row is not None]
            yield from rows
            limit -= len(rows)
            start = stop
