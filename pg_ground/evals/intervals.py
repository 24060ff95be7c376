"""Bootstrap confidence intervals of means.

They resample images, not rows, because the rows of one image depend on each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

REPLICATES = 1000
SEED = 0

MAX_DRAWS = 4_000_000
"""Largest number of drawn images in memory at once."""


def intervals(
    columns: Mapping[str, Float[np.ndarray, " N"]],
    images: Sequence[Any],
    combined: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {},
) -> dict[str, list[float]]:
    """Returns the 95 % percentile interval of the mean of each column, rounded to six decimals.

    The result also has the intervals of the metrics that `combined` computes from the means.

    Images are drawn with replacement, and each image brings all its rows (the cluster bootstrap:
    Cameron, Gelbach & Miller 2008). The draws are the same in every call.

    Args:
      columns: a number of each row, by name. NaN means that a row does not count.
      images: the image of each row. A row whose image is None counts as its own image.
      combined: returns metrics of the means, by name. It gets the means of each replicate as
        arrays f64[R]. A replicate in which a part of a metric is NaN does not count for it.
    """
    if not columns:
        return {}
    clusters = [
        ("row", row) if image is None else ("image", image) for row, image in enumerate(images)
    ]
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    cluster_of_row = np.array([numbers[cluster] for cluster in clusters])
    values = np.stack(list(columns.values()), axis=1)
    counts = ~np.isnan(values)
    cluster_sums = np.zeros((len(numbers), values.shape[1]))
    cluster_counts = np.zeros((len(numbers), values.shape[1]))
    np.add.at(cluster_sums, cluster_of_row, np.where(counts, values, 0.0))
    np.add.at(cluster_counts, cluster_of_row, counts)
    means = dict(zip(columns, _replicate_means(cluster_sums, cluster_counts).T, strict=True))
    result = {}
    for name, replicates in {**means, **combined(means)}.items():
        interval = percentile_interval(replicates)
        if interval:
            result[name] = interval
    return result


def percentile_interval(replicates: Float[np.ndarray, " R"]) -> list[float]:
    """Returns the 95 % interval of replicates, rounded to six decimals. NaN does not count.

    The result is empty if all replicates are NaN.
    """
    defined = replicates[~np.isnan(replicates)]
    return np.percentile(defined, (2.5, 97.5)).round(6).tolist() if len(defined) else []


def draw_counts(images: int) -> Iterator[Float[np.ndarray, "r I"]]:
    """Yields how often each of REPLICATES replicates draws each of I images, some at a time.

    The draws are the same in every call.
    """
    rng = np.random.default_rng(SEED)
    for start in range(0, REPLICATES, step := max(1, MAX_DRAWS // images)):
        replicates = min(step, REPLICATES - start)
        draws = rng.integers(0, images, (replicates, images))
        # Adding `images` for each replicate lets one bincount count the draws of all replicates.
        offset_draws = draws + images * np.arange(replicates)[:, None]
        counts = np.bincount(offset_draws.ravel(), minlength=replicates * images)
        yield counts.reshape(replicates, images).astype(np.float64)


def _replicate_means(
    sums: Float[np.ndarray, "I C"], counts: Float[np.ndarray, "I C"]
) -> Float[np.ndarray, "R C"]:
    """Returns the mean of each of C columns in each of R replicates. NaN if no drawn row counts.

    Args:
      sums: sum of each column over the rows of each of I images.
      counts: number of the rows that count.
    """
    means = []
    for draws in draw_counts(len(sums)):
        total, n = draws @ sums, draws @ counts
        means.append(np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0))
    return np.concatenate(means)
