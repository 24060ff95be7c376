"""Boxes: of one object (referring expressions), and of several."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from pg_ground.boxes import (
    area,
    centre,
    contains,
    f_measure,
    host_boxes,
    iou,
    is_proper,
    match,
    pairwise_iou,
)
from pg_ground.evals.rows import Row, column
from pg_ground.types import UserError

PERCENT = (30, 50, 75, 95)
SAME = 0.5
"""Two boxes of one name in one answer with so much IoU are one box twice."""

Columns = dict[str, np.ndarray]


def score_one(row: Row) -> dict[str, Any]:
    """Returns how the first box of an answer fits the one gold box: `iou`, `correct` (IoU >= 0.5), `valid` and the like.

    RefCOCO's protocol: plain IoU. A box without area, or none, is invalid, with IoU 0. `center` (whether its centre lies in
    the gold box) and `size_ratio` (its area over the gold box's) are those of a valid box.

    Raises:
      UserError: the gold is not one box.
    """
    gold = row["gold"]["boxes"]
    if len(gold) != 1:
        raise UserError(
            f"row {row['id']} has {len(gold)} gold boxes, but {row['benchmark']} takes one: --benchmark=objects takes any number"
        )
    predicted = [one["xyxy_px"] for one in row["prediction"]["boxes"]]
    first, target = host_boxes([(predicted or [None])[0], gold[0]["xyxy_px"]])
    overlap, valid = float(iou(first, target)), bool(is_proper(first))
    found: dict[str, Any] = {
        "iou": overlap,
        "correct": int(overlap >= 0.5),
        "valid": int(valid),
        "duplicates": duplicates(row),
    }
    if valid:
        slack = 1e-6 * float(np.abs(target).max())
        found |= {
            "center": int(contains(target, centre(first), slack)),
            "size_ratio": float(area(first) / area(target)),
        }
    return found


def columns_one(rows: Sequence[Row]) -> Columns:
    overlap = column(rows, "iou")
    found = {f"acc{percent}": (overlap >= percent / 100).astype(np.float64) for percent in PERCENT}
    return found | {
        "mean_iou": overlap,
        "center_acc": column(rows, "center"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def score_set(row: Row) -> dict[str, Any]:
    """Returns how the boxes of an answer fit all gold boxes, matched one to one within names for the largest total IoU.

    `iou` is 2·Σ / (predicted + gold), `f50` and the like 2·hits / (predicted + gold) at that IoU, 1 where nothing is answered to
    nothing; `correct` where all is found and nothing else. Names do not count where the question has at most one.
    """
    predicted, gold = row["prediction"]["boxes"], row["gold"]["boxes"]
    named = len({one["label"] for one in gold}) > 1
    predicted_boxes = host_boxes(one["xyxy_px"] for one in predicted)
    overlap = pairwise_iou(predicted_boxes, host_boxes(one["xyxy_px"] for one in gold))
    if named:
        overlap = np.where(_same_label(predicted, gold), overlap, 0)
    hits, sizes = overlap[match(overlap)], (len(predicted), len(gold))
    proper = is_proper(predicted_boxes)
    shares = {
        f"f{percent}": float(f_measure((hits >= percent / 100).sum(), *sizes))
        for percent in PERCENT
    }
    return {
        "iou": float(f_measure(hits.sum(), *sizes)),
        "correct": int(shares["f50"] == 1),
        "valid": int(proper.all() and (len(proper) > 0 or not gold)),
        **shares,
        "predicted": len(predicted),
        "annotated": len(gold),
        "duplicates": duplicates(row),
    }


def columns_set(rows: Sequence[Row]) -> Columns:
    found = {f"acc{percent}": column(rows, f"f{percent}") for percent in PERCENT}
    return found | {
        "mean_iou": column(rows, "iou"),
        "all_found": column(rows, "correct"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def duplicates(row: Row) -> int:
    """Returns how many boxes of an answer repeat an earlier one of the same name."""
    predicted = row["prediction"]["boxes"]
    edges = host_boxes(one["xyxy_px"] for one in predicted)
    same = (pairwise_iou(edges, edges) >= SAME) & _same_label(predicted, predicted)
    return int(np.tril(same, -1).any(axis=-1).sum())


def _same_label(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> Bool[np.ndarray, "P K"]:
    """Returns whether box i of `a` and box j of `b` have the same label."""
    same = [[first["label"] == second["label"] for second in b] for first in a]
    return np.array(same, bool).reshape(len(a), len(b))


def others(rows: Sequence[Row]) -> dict[str, float]:
    """Returns duplicates an image (a row of an unknown one is one), and the median of valid boxes' area over the gold one's."""
    images = {
        str(row["image"]) if row["image"] is not None else index for index, row in enumerate(rows)
    }
    ratios = column(rows, "size_ratio")
    known = ratios[~np.isnan(ratios)]
    found = {"duplicates_per_image": float(column(rows, "duplicates").sum() / len(images))}
    return found | ({"box_size_ratio": float(np.median(known))} if len(known) else {})


def detected(rows: Sequence[Row]) -> dict[str, float]:
    """Returns COCO's average precision over answers (shares of 1), beside `others`.

    Boxes are ranked by their scores where all have one, else by the order in which they are written.
    """
    from pg_ground.evals import (
        detection,  # pycocotools brings matplotlib: a second, which other benchmarks do not wait for
    )

    def of(row: Row, what: str) -> tuple[np.ndarray, list[str]]:
        boxes = row[what]["boxes"]
        return np.array([one["xyxy_px"] or [np.nan] * 4 for one in boxes], np.float64).reshape(
            -1, 4
        ), [b["label"] for b in boxes]

    surely = all("score" in one for row in rows for one in row["prediction"]["boxes"])
    scores = [
        [one["score"] for one in row["prediction"]["boxes"]] if surely else None for row in rows
    ]
    said = [
        detection.Predicted(*of(row, "prediction"), score)
        for row, score in zip(rows, scores, strict=True)
    ]
    found = detection.average_precision(
        said, [detection.Annotated(*of(row, "gold")) for row in rows]
    )
    measures = {"ap": found.ap, "ap50": found.ap50, "ap75": found.ap75, "ar100": found.ar100}
    known = {name: value for name, value in measures.items() if not np.isnan(value)}
    return others(rows) | known
