"""Reads every record of a source once, as training does, and says how the records were read."""

import contextlib
import functools
import multiprocessing
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import NamedTuple

from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.frames import REMEDY, check_frames
from pg_ground.data.names import INVISIBLE
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import Budget, check_budgets, measure_budget
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

SPAN = 256
"""Questions that a process reads at a time."""

FEW_QUESTIONS = 2 * SPAN
"""A source with fewer questions is read in this process: it takes seconds to start another one."""

SHOWN = 3
"""Examples that are shown of each kind of fault."""

MAX_NAMES = 100_000
"""Different names that are compared with each other."""

ENDLESS = "synthetic:"
"""The uri of sources that draw their records."""

DRAWN = 1024
"""Questions that are read of an endless source."""


class SourceId(NamedTuple):
    """All that a process needs to open a source."""

    name: str
    source: Source
    data: Data
    image_size: int
    seed: int
    cut_answers: bool = False


@dataclass
class Findings:
    """The counts of some questions of a source."""

    usable: int = 0
    empty: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    """Bad records by kind."""
    faults: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Kind → index and text of its first bad records."""
    notes: Counter[str] = field(default_factory=Counter)
    """How records were read if they left that open → number of records."""
    longest: dict[str, tuple[int, int]] = field(default_factory=dict)
    """prompt, suffix and objects → the largest number, and the index of its question."""
    names: Counter[str] = field(default_factory=Counter)

    def add_fault(self, index: int, kind: str, text: str, count: int = 1) -> None:
        """Counts a bad record, and keeps the text of the first ones."""
        self.bad[kind] += count
        texts = self.faults.setdefault(kind, [])
        if len(texts) < SHOWN:
            texts.append((index, text))

    def add_length(self, name: str, number: int, index: int) -> None:
        """Keeps the largest number and the first question that has it."""
        if number > self.longest.get(name, (-1, 0))[0]:
            self.longest[name] = (number, index)

    def merge(self, later: "Findings") -> None:
        """Adds the findings of questions with higher indices."""
        self.usable += later.usable
        self.empty += later.empty
        for kind, texts in later.faults.items():
            self.faults[kind] = (self.faults.get(kind, []) + texts)[:SHOWN]
        self.bad += later.bad
        self.notes += later.notes
        self.names += later.names
        for name, (number, index) in later.longest.items():
            self.add_length(name, number, index)


class Check(NamedTuple):
    """What is known about a source after all its records were read."""

    name: str
    questions: int
    findings: Findings
    budget: Budget | None
    """None if the source cannot be used at all."""
    problems: list[str]
    """The reasons for which training would stop, in words."""
    seconds: float


def check_source(source_id: SourceId, workers: int, progress: Callable[[int], object]) -> Check:
    """Returns the findings about every question of a source.

    Args:
      source_id: the source.
      workers: processes that read; 0 is one for each core.
      progress: is called with the number of questions that were read since the last call.
    """
    start = time.monotonic()
    try:
        dataset = _open(source_id)
    except UserError as error:
        return Check(source_id.name, 0, Findings(), None, [str(error)], 0.0)
    count = len(dataset)
    if source_id.source.uri.startswith(ENDLESS):
        count = min(count, DRAWN)
    findings = Findings()
    spans = [(first, min(first + SPAN, count)) for first in range(0, count, SPAN)]
    workers = workers if count >= FEW_QUESTIONS else 1
    # Closing matters: an error or Ctrl-C ends the processes.
    with contextlib.closing(_read_spans(source_id, spans, workers)) as parts:
        for part, size in parts:
            findings.merge(part)
            progress(size)
    problems, budget = _problems(dataset, source_id.data, findings, count)
    return Check(source_id.name, count, findings, budget, problems, time.monotonic() - start)


def _read_spans(
    source_id: SourceId, spans: Sequence[tuple[int, int]], workers: int
) -> Generator[tuple[Findings, int]]:
    """Yields the findings of each span, in order, and its number of questions."""
    workers = min(workers or os.cpu_count() or 1, len(spans))
    if workers <= 1:
        for first, stop in spans:
            yield check_span(source_id, first, stop), stop - first
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, _killed_on_error(pool):
        futures = {
            pool.submit(check_span, source_id, first, stop): i
            for i, (first, stop) in enumerate(spans)
        }
        results: dict[int, Findings] = {}
        following = 0
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            while following in results:
                first, stop = spans[following]
                yield results.pop(following), stop - first
                following += 1


@contextlib.contextmanager
def _killed_on_error(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Kills the processes of a pool if the block ends early: they would go on reading."""
    others = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise


@functools.lru_cache(maxsize=1)
def _open(source_id: SourceId) -> Examples:
    return open_examples(*source_id)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(tokenizer_file(path))


def check_span(source_id: SourceId, first: int, stop: int) -> Findings:
    """Returns the findings about the questions from `first` to before `stop`."""
    dataset = _open(source_id)
    data = source_id.data
    tokenizer = _tokenizer(data.tokenizer)
    findings = Findings()
    for index in range(first, stop):
        try:
            example = dataset[index]
            row = to_batch_row(example, tokenizer, data, 0, dataset.cut_answers)
        except BadRecord as bad:
            if bad.kind == "empty":
                findings.empty += 1
            else:
                findings.add_fault(index, bad.kind, str(bad))
            continue
        findings.usable += 1
        findings.notes.update(example.notes)
        findings.add_length("prompt", int(row.prompt_mask.sum()), index)
        findings.add_length("suffix", int(row.suffix_mask.sum()), index)
        objects = max(len(example.boxes.valid), len(example.points.valid))
        findings.add_length("objects", objects, index)
        if len(findings.names) < MAX_NAMES:
            findings.names.update(example.names)
    return findings


def _problems(
    dataset: Examples, data: Data, findings: Findings, count: int
) -> tuple[list[str], Budget | None]:
    """Returns the reasons for which training would stop, and the lengths of the source."""
    problems = []
    bad_records = BadRecords()
    bad_records.read(dataset.name, count, count)
    listed = 0
    for kind, texts in findings.faults.items():
        for index, text in texts:
            bad_records.add(dataset.name, index, kind, text)
        for _ in range(findings.bad[kind] - len(texts)):
            listed += 1
            bad_records.add(dataset.name, count + listed, kind, "")
    budget = None
    try:
        budget = measure_budget(dataset, _tokenizer(data.tokenizer), data)
        others = [doubt for doubt in budget.doubts if not doubt.endswith(REMEDY)]
        frames = check_frames(dataset.name, findings.notes)  # of all records, not of the probed
        budget = budget._replace(doubts=[*others, *frames])
        check_budgets([budget], data)
        bad_records.check(data.bad_record_share)
    except UserError as error:
        problems.append(str(error))
    if not problems and not findings.usable:
        problems.append(f"source {dataset.name}: none of {count} questions can be used")
    return problems, budget


def name_collisions(names: Counter[str]) -> list[str]:
    """Returns the names that look alike, in words, the most frequent first.

    They differ in case, in blanks, in invisible characters or in their Unicode form only.

    The model learns such names as different objects.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        text = unicodedata.normalize("NFKC", INVISIBLE.sub("", name)).casefold()
        groups.setdefault("".join(text.split()), []).append(name)
    collisions = [group for group in groups.values() if len(group) > 1]
    collisions.sort(key=lambda group: -sum(names[name] for name in group))
    return [
        ", ".join(f"{_distinct(name, group):.60} ({names[name]})" for name in sorted(group))
        for group in collisions
    ]


def _distinct(name: str, group: Sequence[str]) -> str:
    """Returns a name in quotes, with escapes if names of its group would look the same."""
    is_plain = all(unicodedata.is_normalized("NFKC", other) for other in group)
    return repr(name) if is_plain else ascii(name)
