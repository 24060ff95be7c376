"""The endless sequence of the questions of several sources, mixed by weight."""

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from pg_ground.config import Data
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.datasets import Examples
from pg_ground.data.records import BadRecord
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Batch

MAX_PERIOD = 100_000
"""The largest number of positions after which a mixture repeats its pattern."""

MIN_GRAIN_SHUFFLE = 2**16
"""The number of questions from which grain shuffles a source.

Grain computes each position by itself in 3 us. For a source of 600 questions it takes 70 us,
because it walks a cycle of at least this length. So the order of a smaller source is drawn at once.
"""


class UnusableRow(NamedTuple):
    """The reason why a question has no row."""

    kind: str
    message: str


class Row(NamedTuple):
    """The result for one position of the mixture."""

    source: int
    """Position of the source among the mixture's sources."""
    index: int
    """Number of the question within the source."""
    result: Batch | UnusableRow


class Pattern(NamedTuple):
    """One period of a mixture of N sources."""

    source: Int[np.ndarray, " period"]
    """The source at each position."""
    rank: Int[np.ndarray, " period"]
    """How often that source came before within the period."""
    counts: Int[np.ndarray, " N"]
    """How many positions each source has."""


class Mixture:
    """The endless sequence of all sources' questions, mixed by weight.

    Each source comes in a new order every epoch. Position i is the same for every reader, in any
    order of reading, with any number of workers.
    """

    def __init__(self, datasets: Sequence[Examples], tokenizer: Tokenizer, data: Data, seed: int):
        self.datasets = datasets
        self._tokenizer = tokenizer
        self._data = data
        self._seed = seed
        self._pattern = mixing_pattern([dataset.source.weight for dataset in datasets])
        self._orders = [self._order(source) for source in range(len(datasets))]

    def __len__(self) -> int:
        return sys.maxsize

    def locate(self, position: int) -> tuple[int, int, int]:
        """Returns the source, the question, and the draw at a position.

        The draw counts how often the source came before, over all epochs.
        """
        period, offset = divmod(position, len(self._pattern.source))
        source = int(self._pattern.source[offset])
        draw = period * int(self._pattern.counts[source]) + int(self._pattern.rank[offset])
        return source, int(self._orders[source][draw]), draw

    def pass_length(self) -> int:
        """Returns the number of positions in which every question of every source comes."""
        periods = [
            -(-len(dataset) // int(count))
            for dataset, count in zip(self.datasets, self._pattern.counts, strict=True)
        ]
        return max(periods) * len(self._pattern.source)

    def _order(self, source: int) -> Any:
        count = len(self.datasets[source])
        if count < MIN_GRAIN_SHUFFLE:
            return EpochOrder(count, (self._seed, source))
        seed = int(np.random.SeedSequence([self._seed, source]).generate_state(1)[0])
        return grain.MapDataset.range(count).shuffle(seed=seed).repeat(None)

    def __getitem__(self, index: int) -> Row:
        source, question, draw = self.locate(int(index))
        dataset = self.datasets[source]
        result = prepare_row(dataset, question, self._tokenizer, self._data, source, draw)
        return Row(source, question, result)


def prepare_row(
    dataset: Examples, index: int, tokenizer: Tokenizer, data: Data, position: int, draw: int
) -> Batch | UnusableRow:
    """Returns the row of a question, or the reason why it has none.

    Args:
      dataset: the questions of a source.
      index: number of the question.
      tokenizer: of the texts.
      data: lengths of the row.
      position: position of the source among the config's entries.
      draw: decides which element of a list is used, if the source draws elements at random.
    """
    try:
        example = dataset.example(index, draw)
        return to_batch_row(example, tokenizer, data, position, dataset.cut_answers)
    except BadRecord as bad:
        return UnusableRow(bad.kind, str(bad))


@dataclass(frozen=True)
class EpochOrder:
    """The order of a source's questions: an endless sequence with a new permutation each epoch."""

    count: int
    seed: tuple[int, ...]

    def __getitem__(self, draw: int) -> int:
        epoch, position = divmod(draw, self.count)
        return int(_permutation(self.count, (*self.seed, epoch))[position])


@functools.lru_cache(64)
def _permutation(count: int, seed: tuple[int, ...]) -> Int[np.ndarray, " count"]:
    return np.random.default_rng(seed).permutation(count)


def mixing_pattern(weights: Sequence[float]) -> Pattern:
    """Returns one period of a mixture.

    Shares are exact for weights with a few decimals, if the period has at most `MAX_PERIOD`
    positions; otherwise they are exact to 1e-5. At each position of the period, the number of
    positions that a source has had differs from its share by less than one.
    """
    counts = _counts(weights)
    period = int(counts.sum())
    source = np.zeros(period, np.int32)
    rank = np.zeros(period, np.int64)
    used = np.zeros(len(counts), np.int64)
    for position in range(period):
        deficit = counts * (position + 1) - used * period
        chosen = np.argmax(deficit)
        source[position] = chosen
        rank[position] = used[chosen]
        used[chosen] += 1
    return Pattern(source, rank, counts)


def _counts(weights: Sequence[float]) -> Int[np.ndarray, " N"]:
    """Returns each source's number of positions in a period."""
    fractions = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * denominator) for fraction in fractions]
    counts = np.array(whole) // math.gcd(*whole)
    if counts.sum() > MAX_PERIOD:
        ideal = np.array(weights) / sum(weights) * MAX_PERIOD
        counts = np.maximum(np.floor(ideal).astype(np.int64), 1)
        counts[np.argmax(counts)] += MAX_PERIOD - counts.sum()
    return counts
