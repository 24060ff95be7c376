"""Chooses which records of a source are used: all, the first, the last, or random ones."""

import math
import re
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from pg_ground.types import UserError

_STRATEGY = re.compile(r"(first|end|random):([0-9]+)(\.[0-9]+)?(%)?", re.ASCII)


def sample_indices(count: int, strategy: str, seed: int) -> Int[np.ndarray, " N"]:
    """Returns the indices of the chosen records, in increasing order.

    Args:
      count: number of records.
      strategy: "all"; "first:N" or "end:N" for the N records at that end; or "random:N". If N is
        larger than `count`, all records are chosen. N may be a percentage "P%", which is
        ceil(P * count / 100) records. Only a percentage may have decimals.
      seed: decides the random choice. A larger N chooses all records that a smaller N chooses.

    Raises:
      UserError: the strategy does not exist.
    """
    if strategy == "all":
        return np.arange(count)
    match = _STRATEGY.fullmatch(strategy)
    if match is None or (match[3] and not match[4]):
        raise UserError(
            f"sampling {strategy!r} does not exist: write all, first:N, end:N or random:N, with a "
            f"whole number (first:100) or a percentage (random:12.5%)"
        )
    end, whole, decimals, percent = match.groups()
    # Exact: in floating point, 0.1 % of 3000 is a little more than 3 and would round up to 4.
    size = math.ceil(Fraction(whole + (decimals or "")) * count / 100) if percent else int(whole)
    size = min(size, count)
    if end == "first":
        return np.arange(size)
    if end == "end":
        return np.arange(count - size, count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])
