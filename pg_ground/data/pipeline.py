"""Sources → batches, by grain: shuffled without end for training, in order and once for measuring."""

import contextlib
import functools
import itertools
import math
import pickle
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Int, UInt8

from pg_ground.config import Data, Source
from pg_ground.data.box_formats import image_extent
from pg_ground.data.examples import (
    answer,
    check_formats,
    check_room,
    elements,
    field_at,
    listed_by,
    question,
    to_batch_row,
    to_example,
)
from pg_ground.data.masks import whole_masks
from pg_ground.data.records import BadRecord, Records, image_folder
from pg_ground.data.sampling import sampled
from pg_ground.data.sources import open_records
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Batch, Example, UserError

SETTLED = 100
"""Records of a source from which a share of them means something: the first bad one of many is no 100 %."""


LONGEST_PERIOD = 100_000
"""Places after which a mixture repeats its pattern at the latest."""

ROWS_IN_BLOCK = 8
"""Rows that a thread or a worker prepares before it hands them over."""

SHORT = 2**16
"""Questions below which an epoch's order is drawn at once. From there on grain computes each place by itself: in 3 us, but in 70
for a source of 600, because it walks a cycle of at least this length."""

PROBED = 16
"""Questions of a source that tell whether its entry makes sense at all."""

CORNER = 0.3
"""Share of both axes within which percent read as pixels lie: all of them in images from 334 pixels a side on."""

FINER = {"px": 100, "bin": 100, "percent": 1}
"""The whole side of an image in the next finer unit: no number of a source that is in that unit is above it."""


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
            return [
                dict(bad[index])
                for _, bad in sorted(self._entries.items())
                for index in sorted(bad)
            ]

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
            over = next(
                (source for source in sorted(self._entries) if self._is_over(source, share)), None
            )
            seen = min(self._read[over], self._size[over]) if over else 0
        if over:
            entries = [entry for entry in self.entries() if entry["source"] == over]
            kinds = ", ".join(
                f"{n} {kind}"
                for kind, n in Counter(entry["kind"] for entry in entries).most_common()
            )
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

    def __init__(
        self,
        name: str,
        source: Source,
        records: Records,
        data: Data,
        image_size: int,
        seed: int = 0,
    ):
        self.name, self.source, self._records, self._data, self._image_size, self._seed = (
            name, source, records, data, image_size, seed,
        )  # fmt: skip
        self._folder = image_folder(records, source)
        self._kept = sampled(len(records), source.sampling, seed)
        if not len(self._kept):
            raise UserError(
                f"source {name}: sampling {source.sampling!r} keeps none of {len(records)} records"
            )
        path = listed_by(source)
        self._list = path
        self._starts: np.ndarray | None = None
        if path and source.element == "all":
            self._starts = np.cumsum(
                [0, *(self._elements(int(record), path) for record in self._kept)]
            )

    def _elements(self, record: int, path: str) -> int:
        """Returns how many questions a record holds; one for a bad record, where that shows."""
        try:
            return elements(self._records[record], path)
        except BadRecord:
            return 1

    def __len__(self) -> int:
        return len(self._kept) if self._starts is None else int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Returns the record that question `index` comes from, and the element of its list."""
        if self._starts is None:
            return int(self._kept[index]), 0
        row = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self._kept[row]), index - int(self._starts[row])

    def record(self, index: int, draw: int = 0) -> tuple[dict[str, Any], int]:
        """Returns the record of question `index`, and the element: where it is drawn at random, by the number `draw`."""
        number, element = self.place(index)
        record = self._records[number]
        if self._list and self.source.element == "random":
            count = elements(record, self._list)
            if not count:
                raise BadRecord("empty", f"{self._list} is empty")
            element = int(np.random.default_rng([self._seed, index, draw]).integers(count))
        return record, element

    def mask(self, index: int, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """Returns the mask of question `index`'s one object, in pixels of its annotation.

        Args:
          size: width and height of the image.

        Raises:
          BadRecord: bad_mask, or missing_field.
        """
        record, element = self.record(index)
        return whole_masks(field_at(record, self.source.mask, element), 1, size, self._folder)[0]

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def example(self, index: int, draw: int = 0) -> Example:
        """Returns question `index`, or raises `BadRecord`; where the element is drawn at random, that of the number `draw`."""
        try:
            record, element = self.record(index, draw)
            example = to_example(
                record,
                self.source,
                self.name,
                index,
                self._image_size,
                self._folder,
                element=element,
                seed=self._seed,
                resize_by=self._data.resize,
                mask_size=self._data.mask_size,
                fetch=self._data.fetch,
            )
            check_room(example, self._data)
        except BadRecord as bad:
            number, element = self.place(index)
            if number == index and not self._list:
                raise
            raise BadRecord(
                bad.kind, f"record {number}{f', element {element}' if self._list else ''}: {bad}"
            ) from None
        return example


def open_examples(
    source_name: str, source: Source, data: Data, image_size: int, seed: int = 0
) -> Examples:
    """Returns the questions of one source.

    Raises:
      UserError: the source cannot be opened or its entry names a format that does not exist.
    """
    check_formats(source, source_name)
    return Examples(
        source_name, source, open_records(source.uri, source_name), data, image_size, seed
    )


class Bad(NamedTuple):
    """Why a question has no row."""

    kind: str
    message: str


class Row(NamedTuple):
    """What came of one place of the mixed sequence: a row of a batch, or the reason why there is none."""

    source: int
    index: int
    found: Batch | Bad


class Mixture:
    """The endless sequence of all sources' questions, mixed by weight, each source in a new order every epoch.

    Random access and nothing else: place i is the same whoever reads it, in whatever order, with however many workers.
    """

    def __init__(self, parts: Sequence[Examples], tokenizer: Tokenizer, data: Data, seed: int):
        self.parts, self._tokenizer, self._data, self._seed = parts, tokenizer, data, seed
        self._pattern, self._ranks, self._shares = mixing_pattern(
            [part.source.weight for part in parts]
        )
        self._orders = [self._order(source) for source in range(len(parts))]

    def __len__(self) -> int:
        return sys.maxsize

    def question(self, place: int) -> tuple[int, int, int]:
        """Returns source, question and the number of the reading (over all epochs) at a place of the sequence."""
        block, offset = divmod(place, len(self._pattern))
        source = int(self._pattern[offset])
        reading = block * int(self._shares[source]) + int(self._ranks[offset])
        return source, self._orders[source][reading], reading

    def pass_length(self) -> int:
        """Returns the number of places within which every question of every source comes."""
        periods = [
            -(-len(part) // int(share))
            for part, share in zip(self.parts, self._shares, strict=True)
        ]
        return max(periods) * len(self._pattern)

    def _order(self, source: int) -> Any:
        count = len(self.parts[source])
        if count < SHORT:
            return ShortOrder(count, (self._seed, source))
        own_seed = int(np.random.SeedSequence([self._seed, source]).generate_state(1)[0])
        return grain.MapDataset.range(count).shuffle(seed=own_seed).repeat(None)

    def __getitem__(self, index: int) -> Row:
        source, number, reading = self.question(int(index))
        found = row_of(
            self.parts[source], int(number), self._tokenizer, self._data, source, reading
        )
        return Row(source, int(number), found)


@dataclass(frozen=True)
class ShortOrder:
    """The questions of one source, epoch after epoch, each in an order of its own."""

    count: int
    seed: tuple[int, ...]

    def __getitem__(self, reading: int) -> int:
        epoch, place = divmod(reading, self.count)
        return int(_permutation(self.count, (*self.seed, epoch))[place])


@functools.lru_cache(64)
def _permutation(count: int, seed: tuple[int, ...]) -> Int[np.ndarray, " count"]:
    return np.random.default_rng(seed).permutation(count)


def mixing_pattern(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a period of the mixture: the source at each place, its how-manieth it is there, and each source's number of places.

    Shares are exact for weights of a few decimals (up to a period of 100,000 places, to 1e-5 beyond), and within a period no
    source is ever a whole place ahead of or behind its share.
    """
    parts = [Fraction(str(weight)) for weight in weights]
    whole = [int(part * math.lcm(*(part.denominator for part in parts))) for part in parts]
    shares = np.array(whole) // math.gcd(*whole)
    if shares.sum() > LONGEST_PERIOD:
        ideal = np.array(weights) / sum(weights) * LONGEST_PERIOD
        shares = np.maximum(np.floor(ideal).astype(np.int64), 1)
        shares[np.argmax(shares)] += LONGEST_PERIOD - shares.sum()
    period = int(shares.sum())
    pattern, ranks, used = (
        np.zeros(period, np.int32),
        np.zeros(period, np.int64),
        np.zeros(len(shares), np.int64),
    )
    for place in range(period):
        due = shares * (place + 1) - used * period
        pattern[place] = np.argmax(due)
        ranks[place] = used[pattern[place]]
        used[pattern[place]] += 1
    return pattern, ranks, shares


class Blocks:
    """A process's places of a mixture from one on, some at a time: what grain spends on what it hands on is spent on several."""

    def __init__(
        self,
        mixture: Mixture,
        rows: Int[np.ndarray, " rows"],
        batch_size: int,
        first: int,
        size: int,
    ):
        self._mixture, self._rows, self._batch_size, self._first, self._size = (
            mixture,
            rows,
            batch_size,
            first,
            size,
        )

    def __len__(self) -> int:
        return sys.maxsize // (self._batch_size * self._size * 2)

    def place(self, number: int) -> int:
        """Returns the place of the whole sequence that is this process's `number`-th."""
        batch, row = divmod(number, len(self._rows))
        return batch * self._batch_size + int(self._rows[row])

    def __getitem__(self, index: int) -> list[Row]:
        start = self._first + int(index) * self._size
        return [self._mixture[self.place(start + i)] for i in range(self._size)]


class Batches:
    """This process's rows of batches without end. `get_state` and `set_state` continue exactly, whatever `data.workers` is."""

    def __init__(
        self,
        mixture: Mixture,
        data: Data,
        rows: Int[np.ndarray, " rows"],
        batch_size: int,
        bad: BadRecords,
    ):
        self.parts, self._mixture, self._data, self._bad = mixture.parts, mixture, data, bad
        self._rows, self._batch_size = rows, batch_size
        self._next, self._stream = 0, None

    def get_state(self) -> dict[str, Any]:
        """Returns how many places of this process's sequence have been used, and how many it has of each batch."""
        return {"next": self._next, "rows": len(self._rows)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was; after a process with more or fewer rows, with the first batch that it had not begun."""
        self.close()
        places, rows = int(state["next"]), int(state["rows"])
        self._next = places if rows == len(self._rows) else -(-places // rows) * len(self._rows)

    def close(self) -> None:
        """Ends the workers and drops what they have read ahead; `next` starts new ones."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._open()
        found: list[Batch] = []
        unusable = 0
        while len(found) < len(self._rows):
            row = next(self._stream)
            self._next += 1
            usable = note(self._bad, self.parts[row.source], row.index, row.found, self._data)
            if usable is not None:
                found.append(usable)
            unusable = 0 if usable is not None else unusable + 1
            if unusable >= 2 * self._mixture.pass_length() and isinstance(row.found, Bad):
                names, count = (
                    ", ".join(part.name for part in self.parts),
                    sum(map(len, self.parts)),
                )
                raise UserError(
                    f"source{'s' * (len(self.parts) > 1)} {names}: none of {count} questions can be used; "
                    f"question {row.index} of {self.parts[row.source].name}: {row.found.message}"
                )
        return stack(found)

    def _open(self) -> Generator[Row]:
        """Yields the rows from the next place on; read ahead by threads and by processes, as far as there are any."""
        size = min(ROWS_IN_BLOCK, len(self._rows))
        blocks = grain.MapDataset.source(
            Blocks(self._mixture, self._rows, self._batch_size, self._next, size)
        )
        threads = self._data.read_threads
        ahead = max(len(self._rows) // size, threads)
        mine = blocks.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        )
        if self._data.workers:
            flags.FLAGS.mark_as_parsed()  # grain asks absl whether to profile its workers
            per_worker = max(1, 2 * ahead // self._data.workers)
            mine = (
                mine.map(_packed)
                .mp_prefetch(grain.MultiprocessingOptions(self._data.workers, per_worker))
                .map(_unpacked)
            )
        with contextlib.closing(iter(mine)) as opened:  # its workers hold shared memory
            for block in opened:
                yield from block


class Ahead:
    """Batches, each put in its place on the devices by another thread while those before it are worked on.

    The state is that after the last batch that was handed out, not after the last that was prepared.
    """

    def __init__(self, batches: Batches, place: Callable[[Batch], Batch]):
        self._batches, self._place = batches, place
        self._state = batches.get_state()
        self._pool = ThreadPoolExecutor(1)
        self._coming: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def _prepare(self) -> tuple[Batch, dict[str, Any]]:
        batch = jax.block_until_ready(self._place(next(self._batches)))
        return batch, self._batches.get_state()

    def prepare(self) -> None:
        """Starts on the next two batches. Called once the devices are at work, so that this does not stand in their way.

        Two, because on a CPU a step may be over when its call returns: what is started then is ready one step later.
        """
        while len(self._coming) < 2:
            self._coming.append(self._pool.submit(self._prepare))

    def __next__(self) -> Batch:
        if not self._coming:
            self.prepare()
        batch, self._state = self._coming.popleft().result()
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the state to go on from."""
        return self._state


def training_batches(
    sources: Mapping[str, Source],
    data: Data,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    bad: BadRecords,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Batches:
    """Returns this process's rows of batches without end.

    Sources are mixed by weight, each in a new order every epoch. A batch is the next `batch_size` places of that one sequence,
    the same in the same rows whatever the number of processes is, as long as no record is bad. For a bad record a process takes
    the next place of its own, and what follows moves up in its rows: the same every time, but not with any other number.

    Args:
      batch_size: rows of a batch over all processes.
      rows: those of each batch that this process reads, in order; all of them unless given.

    Raises:
      UserError: at once if a source cannot be opened; on `next` if too many records are bad, or none can be used.
    """
    parts = [
        open_examples(name, source, data, image_size, seed) for name, source in sources.items()
    ]
    mine = np.arange(batch_size) if rows is None else rows
    return Batches(Mixture(parts, tokenizer, data, seed), data, mine, batch_size, bad)


def furthest(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the state before the first batch that none of several processes has begun, from which any number of them can go on.

    Without bad records that is where they all are. With them some are ahead: the places that the others had still before them
    are left out, and none is read twice.
    """
    return {
        "next": max(-(-int(state["next"]) // int(state["rows"])) for state in states),
        "rows": 1,
    }


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns states of several `BadRecords` as one."""
    read = sum((Counter(state["read"]) for state in states), Counter())
    sizes = {source: size for state in states for source, size in state["size"].items()}
    return {
        "size": sizes,
        "read": dict(read),
        "entries": [entry for state in states for entry in state["entries"]],
    }


def ordered_batches(
    parts: Sequence[Examples],
    data: Data,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    examples: int,
    bad: BadRecords,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> Iterator[tuple[Batch, Bool[np.ndarray, " B"]]]:
    """Yields this process's rows of batches and which count: the first `examples` usable records of each source.

    Sources come one after the other, in order. The last batch of a source is filled up with its last row, which does
    not count again. Every process reads every record: which ones are usable is known only then.

    Args:
      rows: those of each batch that this process gets, in order; all of them unless given.

    Raises:
      UserError: too many records of a source are bad.
    """
    mine = np.arange(batch_size) if rows is None else rows
    for position, opened in enumerate(parts):

        def prepare(
            index: int, opened: Examples = opened, position: int = position
        ) -> Batch | None:
            return note(
                bad, opened, index, row_of(opened, index, tokenizer, data, position, 0), data
            )

        for usable in _chunks(
            _usable_rows(prepare, len(opened), examples, batch_size, data.read_threads), batch_size
        ):
            filled = usable + usable[-1:] * (batch_size - len(usable))
            yield stack([filled[row] for row in mine]), mine < len(usable)


def row_of(
    opened: Examples, index: int, tokenizer: Tokenizer, data: Data, position: int, draw: int
) -> Batch | Bad:
    """Returns the row of a question, or why there is none."""
    try:
        return to_batch_row(opened.example(index, draw), tokenizer, data, position)
    except BadRecord as bad:
        return Bad(bad.kind, str(bad))


def note(
    bad: BadRecords, opened: Examples, index: int, found: Batch | Bad, data: Data
) -> Batch | None:
    """Returns a row as it is; a bad record is counted and listed, but for one that is empty and to be dropped.

    Raises:
      UserError: too many of the source's records are bad.
    """
    bad.read(opened.name, len(opened))
    if not isinstance(found, Bad):
        return found
    if found.kind != "empty":
        bad.add(opened.name, index, found.kind, found.message)
        bad.check(data.bad_record_share)
    return None


class Budget(NamedTuple):
    """What the texts of a source need."""

    source: str
    questions: int
    measured: int
    prompt_tokens: int
    suffix_tokens: int
    objects: int
    worst: dict[str, int]
    """For prompt_length, suffix_length and max_boxes: the question that needs most."""


def budget(opened: Examples, tokenizer: Tokenizer, data: Data) -> Budget:
    """Returns the longest prompt and suffix (in tokens) and the most objects of a source, over `data.check_records` questions.

    The images of `PROBED` of these are opened (and fetched); no others are looked at.

    Raises:
      UserError: none of the first questions can be read, or no image of those probed, or their coordinates all lie in one corner,
        which a wrong unit does.
    """
    count = len(opened)
    chosen = _spread(count, data.check_records)
    most = {"prompt_length": 0, "suffix_length": 0, "max_boxes": 0}
    worst = dict.fromkeys(most, 0)
    failures: list[str] = []
    readable: list[int] = []
    for index in chosen:
        try:
            record, element = opened.record(index)
            prompt, found = question(record, opened.source, element)
            objects = found.points if opened.source.target == "points" else found.boxes
            kept = min(len(objects), opened.source.max_objects or len(objects))
            zeros = np.zeros((kept, objects.shape[1]), np.float32)
            names = (
                sorted(found.labels, key=len)[len(objects) - kept :]
                if found.labels
                else ("",) * kept
            )
            suffix = answer(opened.source, record, element, zeros, names, (9999, 9999))
        except BadRecord as bad:
            failures.append(f"question {index}: {bad}")
            if len(failures) == min(PROBED, len(chosen)) and not any(most.values()):
                raise UserError(
                    f"source {opened.name}: none of {len(failures)} questions can be used; {failures[0]}"
                ) from None
            continue
        readable.append(index)
        lengths = (
            len(tokenizer.prefix(prompt)),
            len(tokenizer.suffix(suffix)),
            max(len(found.boxes[:kept]), kept),
        )
        for setting, length in zip(most, lengths, strict=True):
            if length > most[setting]:
                most[setting], worst[setting] = length, index
    probe(opened, [readable[i] for i in _spread(len(readable), PROBED)])
    prompt_tokens, suffix_tokens, objects = most.values()
    return Budget(opened.name, count, len(chosen), prompt_tokens, suffix_tokens, objects, worst)


def probe(opened: Examples, indices: Sequence[int]) -> None:
    """Raises UserError if no image of these questions can be used, or if they lie in one corner and fit a finer unit.

    Percent or fractions read as pixels do that, and so do fractions read as percent. Objects that are truly there would have to
    lie within 100 pixels (or bins, or 1 percent) of the corner, in all of the questions.
    """
    examples: list[Example] = []
    failures: list[str] = []
    for index in indices:
        try:
            examples.append(opened[index])
        except BadRecord as bad:
            if bad.kind != "too_many_boxes":  # `check_budgets` says what to do
                failures.append(f"question {index}: {bad}")
    if failures and len(failures) == len(indices):
        raise UserError(
            f"source {opened.name}: none of {len(failures)} questions can be used; {failures[0]}"
        )
    boxes, points = [one.boxes.yxyx[:, 2:] for one in examples], [one.points.yx for one in examples]
    for setting, corners in (("box_format", boxes), ("point_format", points)):
        value: str = getattr(opened.source, setting)
        unit = value.rsplit("_", 1)[1]
        told = [
            (yx, np.array(image_extent(unit, one.size)[::-1]))
            for one, yx in zip(examples, corners, strict=True)
            if len(yx)
        ]
        if len(told) < PROBED // 4 or sum(len(yx) for yx, _ in told) < PROBED // 2:
            continue  # the objects of a few pictures may well lie together
        share, number = (
            np.median([yx.max() for yx, _ in told]),
            max(np.max(yx * sides) for yx, sides in told),
        )
        if share < CORNER and number <= 1.01 * FINER.get(unit, 0):
            raise UserError(
                f"source {opened.name}: most objects lie in the first {CORNER:.0%} of both axes and no coordinate is above "
                f"{number:.3g}, so {setting} = {value!r} has probably the wrong unit (px, frac, percent and bin exist)"
            )


def _spread(count: int, wanted: int) -> list[int]:
    """Returns at most `wanted` of `count` indices, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)).tolist()


def check_budgets(budgets: Sequence[Budget], data: Data) -> None:
    """Raises UserError if a question does not fit into the configured lengths, naming the one that needs most."""
    for one in budgets:
        needs = {
            "prompt_length": one.prompt_tokens,
            "suffix_length": one.suffix_tokens,
            "max_boxes": one.objects,
        }
        for setting, need in needs.items():
            room = getattr(data, setting)
            if need > room:
                raise UserError(
                    f"source {one.source}: question {one.worst[setting]} needs data.{setting}={need}, but it is {room}: raise "
                    f"it{', or set max_objects of the source' if setting != 'prompt_length' else ''}"
                )


def _packed(block: list[Row]) -> UInt8[np.ndarray, " bytes"]:
    """Returns a block in one array: grain makes a shared memory for each array that a worker hands over, a row has a dozen."""
    return np.frombuffer(pickle.dumps(block, pickle.HIGHEST_PROTOCOL), np.uint8)


def _unpacked(block: UInt8[np.ndarray, " bytes"]) -> list[Row]:
    return pickle.loads(block.data)


def stack(rows: Sequence[Batch]) -> Batch:
    """Returns rows as one batch, with B in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _usable_rows(
    prepare: Callable[[int], Batch | None], count: int, wanted: int, at_once: int, threads: int
) -> Iterator[Batch]:
    """Yields the first `wanted` usable rows of `count` records in order, reading no record more than that takes."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
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
