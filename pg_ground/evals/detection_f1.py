"""F1 of labelled boxes over labels, as generative detectors report it (arXiv 2510.12798)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from pg_ground.boxes import host_boxes, is_proper, pairwise_iou
from pg_ground.evals.grounding import count_duplicates
from pg_ground.evals.intervals import draw_counts, percentile_interval
from pg_ground.evals.rows import Columns, Row, cluster, column
from pg_ground.types import JsonDict, JsonObject

IOU_PERCENT = tuple(range(50, 100, 5))
"""Thresholds of IoU in percent: 50, 55, …, 95."""

COUNTS = 2 + len(IOU_PERCENT)
"""Numbers of each label: predicted and annotated boxes, and hits at each threshold."""

MAX_CELLS = 20_000_000
"""Largest number of counts of labels in memory at once, over all replicates of the bootstrap."""


def score(row: Row) -> JsonDict:
    """Returns the number of boxes and hits of each label of an answer, as `by_label`.

    The value of a label is [predicted, annotated, hits at each threshold of IOU_PERCENT]. Predicted
    boxes take the free ground-truth box of their label with the largest IoU, if that IoU reaches
    the threshold: the box with the highest score first, if all boxes have scores, otherwise the
    box that is written first. This is COCO's matching.
    """
    predicted, gold = row["prediction"]["boxes"], row["gold"]["boxes"]
    if predicted and all("score" in box for box in predicted):
        predicted = sorted(predicted, key=lambda box: -box["score"])
    labels = dict.fromkeys(box["label"] for box in (*gold, *predicted))
    by_label = {}
    for label in labels:
        sides = [_boxes_of(boxes, label) for boxes in (predicted, gold)]
        hits = _hits(np.asarray(pairwise_iou(*sides))).sum(axis=-1).tolist()
        by_label[label] = [len(sides[0]), len(sides[1]), *hits]
    proper = is_proper(host_boxes(box["xyxy_px"] for box in predicted))
    return {
        "by_label": by_label,
        "predicted": len(predicted),
        "annotated": len(gold),
        "valid": int(proper.all() and (len(proper) > 0 or not gold)),
        "duplicates": count_duplicates(row),
    }


def _boxes_of(boxes: Sequence[JsonObject], label: str) -> Float[np.ndarray, "N 4"]:
    return host_boxes(box["xyxy_px"] for box in boxes if box["label"] == label)


def _hits(overlap: Float[np.ndarray, "P K"]) -> Bool[np.ndarray, "T P"]:
    """Returns whether each of P predicted boxes takes one of K boxes, at each of T thresholds."""
    thresholds = np.array(IOU_PERCENT)[:, None] / 100
    hits = np.zeros((len(thresholds), len(overlap)), bool)
    if 0 in overlap.shape:
        return hits
    is_free = np.ones((len(thresholds), overlap.shape[1]), bool)
    for number, values in enumerate(overlap):
        candidates = np.where(is_free & (values >= thresholds), values, -1.0)
        # the last of equal boxes, as in COCO's code
        best = values.size - 1 - np.argmax(candidates[:, ::-1], axis=1)
        hits[:, number] = candidates.max(axis=1) >= 0
        is_free[hits[:, number], best[hits[:, number]]] = False
    return hits


def means(rows: Sequence[Row]) -> Columns:
    """Returns the share of answers with an unreadable box, or without a box for their targets."""
    return {"invalid_fraction": 1 - column(rows, "valid")}


def aggregates(rows: Sequence[Row]) -> dict[str, float]:
    """Returns precision, recall and F1 over labels, and the number of duplicates for each image."""
    counts = _LabelCounts(rows)
    duplicates = float(column(rows, "duplicates").sum() / counts.images)
    total = counts.drawn(np.ones((1, counts.images)))
    metrics = {name: float(values[0]) for name, values in f1_metrics(total).items()}
    defined = {name: value for name, value in metrics.items() if not np.isnan(value)}
    return {"duplicates_per_image": duplicates} | defined


def ranges(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Returns the 95 % intervals of the metrics of `f1_metrics`. The bootstrap draws images."""
    counts = _LabelCounts(rows)
    replicates: dict[str, list[Float[np.ndarray, " R"]]] = defaultdict(list)
    for draws in draw_counts(counts.images):
        step = max(1, MAX_CELLS // max(1, counts.columns))
        for start in range(0, len(draws), step):
            drawn = counts.drawn(draws[start : start + step])
            for name, values in f1_metrics(drawn).items():
                replicates[name].append(values)
    intervals = {name: percentile_interval(np.concatenate(v)) for name, v in replicates.items()}
    return {name: interval for name, interval in intervals.items() if interval}


class _LabelCounts:
    """The counts of `score` by image, for the labels with ground-truth boxes.

    Predicted boxes of other labels cost nothing, as in COCO.
    """

    def __init__(self, rows: Sequence[Row]):
        from scipy.sparse import csr_array  # scipy takes 0.3 s to import

        annotated = (label for row in rows for label, c in row["by_label"].items() if c[1])
        labels = {label: number for number, label in enumerate(dict.fromkeys(annotated))}
        clusters: dict[tuple[str, str], int] = {}
        values, images, columns = [], [], []
        for row in rows:
            image = clusters.setdefault(cluster(row), len(clusters))
            for label, counts in row["by_label"].items():
                if label in labels:
                    values += counts
                    images += [image] * COUNTS
                    columns += range(labels[label] * COUNTS, (labels[label] + 1) * COUNTS)
        self.images = len(clusters)
        self.columns = len(labels) * COUNTS
        positions = (np.array(images, np.int64), np.array(columns, np.int64))
        shape = (self.images, self.columns)
        self._matrix = csr_array((np.array(values, np.float64), positions), shape=shape)

    def drawn(self, draws: Float[np.ndarray, "R I"]) -> Float[np.ndarray, "R L N"]:
        """Returns the counts over the drawn images.

        Args:
          draws: how often each replicate has each image.
        """
        return (self._matrix.T @ draws.T).T.reshape(len(draws), self.columns // COUNTS, COUNTS)


def f1_metrics(counts: Float[np.ndarray, "R L N"]) -> dict[str, Float[np.ndarray, " R"]]:
    """Returns precision, recall and F1 at IoU .5, at IoU .95, and of the mean over thresholds.

    F1 is the harmonic mean of precision and recall, which are means over labels. The published
    script averages over the labels whose value is above 0; `macro_f1` averages over all labels with
    ground-truth boxes.

    All values are NaN if no label has ground-truth boxes.

    Args:
      counts: [predicted, annotated, hits at each threshold] of each of L labels in R replicates.
    """
    predicted, annotated, hits = counts[..., :1], counts[..., 1:2], counts[..., 2:]
    exists = annotated[..., 0] > 0
    metrics = {}
    by_label = {
        "precision": hits / np.maximum(predicted, 1) * exists[..., None],
        "recall": hits / np.maximum(annotated, 1) * exists[..., None],
    }
    for suffix, part in (("mean", slice(None)), ("50", slice(0, 1)), ("95", slice(-1, None))):
        averages, macro_averages = [], []
        for name, shares in by_label.items():
            values = shares[..., part].mean(axis=-1)
            total = values.sum(axis=-1)
            average = total / np.maximum((values > 0).sum(axis=-1), 1)
            metrics[f"{name}_{suffix}"] = average
            averages.append(average)
            macro_averages.append(total / np.maximum(exists.sum(axis=-1), 1))
        metrics[f"f1_{suffix}"] = _harmonic_mean(*averages)
        metrics[f"macro_f1_{suffix}"] = _harmonic_mean(*macro_averages)
    is_defined = exists.any(axis=-1)
    return {name: np.where(is_defined, values, np.nan) for name, values in metrics.items()}


def _harmonic_mean(
    a: Float[np.ndarray, " R"], b: Float[np.ndarray, " R"]
) -> Float[np.ndarray, " R"]:
    return 2 * a * b / np.where(a + b > 0, a + b, 1)
