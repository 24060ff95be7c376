"""Bootstrap intervals of means, by image: expressions of one image are not independent."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

REPLICATES = 1000
SEED = 0
AT_ONCE = 4_000_000
"""Drawn images held in memory."""


def intervals(
    columns: Mapping[str, Float[np.ndarray, " N"]], images: Sequence[Any]
) -> dict[str, list[float]]:
    """Returns the 95 % percentile interval of each column's mean over its numbers that are not NaN, to six decimals.

    Images are drawn with replacement, all rows of one together (the cluster bootstrap: Cameron, Gelbach & Miller 2008); a row
    whose image is not known (None) is one of its own. Always the same draws.
    """
    if not columns:
        return {}
    names = [("row", i) if image is None else ("image", image) for i, image in enumerate(images)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group, count = np.array([number[name] for name in names]), len(number)
    values = np.stack(list(columns.values()), axis=1)
    known = ~np.isnan(values)
    sums, counts = (np.zeros((count, values.shape[1])) for _ in range(2))
    np.add.at(sums, group, np.where(known, values, 0.0))
    np.add.at(counts, group, known)
    rng = np.random.default_rng(SEED)
    means = []
    for start in range(0, REPLICATES, step := max(1, AT_ONCE // count)):
        number_here = min(step, REPLICATES - start)
        drawn = (
            rng.integers(0, count, (number_here, count)) + count * np.arange(number_here)[:, None]
        )
        times = (
            np.bincount(drawn.ravel(), minlength=number_here * count)
            .reshape(number_here, count)
            .astype(np.float64)
        )
        total, n = times @ sums, times @ counts
        means.append(np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0))
    found = np.concatenate(means)
    ends = {name: found[:, i][~np.isnan(found[:, i])] for i, name in enumerate(columns)}
    return {
        name: np.percentile(m, (2.5, 97.5)).round(6).tolist() for name, m in ends.items() if len(m)
    }
