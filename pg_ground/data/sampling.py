"""Which records of a source are kept: `all`, `first:N`, `end:N`, `random:N`, where N may be a share, `P%`."""

import math
import re
from fractions import Fraction

import numpy as np
from jaxtyping import Int

from pg_ground.types import UserError

STRATEGY = re.compile(r"(first|end|random):([0-9]+)(\.[0-9]+)?(%)?", re.ASCII)


def sample_indices(count: int, strategy: str, seed: int) -> Int[np.ndarray, " N"]:
    """Returns the indices kept of `count` records, in increasing order.

    `all`; `first:N` and `end:N`, the ones at that end; `random:N`, by `seed`, where a larger N keeps what a smaller one does. N
    beyond `count` is all of them. `P%` is ceil(P · count / 100), and only P may have decimals.

    Raises:
      UserError: `strategy` is none of these.
    """
    if strategy == "all":
        return np.arange(count)
    match = STRATEGY.fullmatch(strategy)
    if match is None or (match[3] and not match[4]):
        raise UserError(
            f"sampling {strategy!r}: there are all, first:N, end:N and random:N, where N is a whole number (first:100) "
            "or a percentage (random:12.5%)"
        )
    word, whole, decimals, percent = match.groups()
    # Exact: in floating point, 0.1 % of 3000 is a little more than 3 and would round up to 4.
    kept = math.ceil(Fraction(whole + (decimals or "")) * count / 100) if percent else int(whole)
    kept = min(kept, count)
    if word == "first":
        return np.arange(kept)
    if word == "end":
        return np.arange(count - kept, count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:kept])
