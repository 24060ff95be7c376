"""Scores of boxes: of one object (referring expressions), and of several objects."""

from collections.abc import Sequence

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
from pg_ground.evals.rows import Columns, Row, cluster, column
from pg_ground.types import JsonDict, JsonObject, UserError

IOU_PERCENT = (30, 50, 75, 95)
"""Thresholds of IoU for accuracy, in percent."""

DUPLICATE_IOU = 0.5
"""A box duplicates an earlier box of the same label in the same answer from this IoU."""


def score_one(row: Row) -> JsonDict:
    """Returns the scores of the first box of an answer against the one ground-truth box.

    This is RefCOCO's protocol with plain IoU. A missing box, or a box without area, is not `valid`
    and has IoU 0. `correct` means IoU >= 0.5. A valid box also has `center` (its centre lies in the
    ground-truth box) and `size_ratio` (its area over the area of the ground-truth box).

    Raises:
      UserError: the ground truth is not one box.
    """
    gold = row["gold"]["boxes"]
    if len(gold) != 1:
        raise UserError(
            f"row {row['id']} has {len(gold)} gold boxes, but {row['benchmark']} takes one: "
            f"--benchmark=objects takes any number"
        )
    predicted = [box["xyxy_px"] for box in row["prediction"]["boxes"]]
    first, target = host_boxes([predicted[0] if predicted else None, gold[0]["xyxy_px"]])
    if not is_proper(target):
        raise UserError(f"row {row['id']}: the gold box {gold[0]['xyxy_px']} has no area")
    overlap = float(iou(first, target))
    scores: JsonDict = {
        "iou": overlap,
        "correct": int(overlap >= 0.5),
        "valid": int(is_proper(first)),
        "duplicates": count_duplicates(row),
    }
    if scores["valid"]:
        slack = 1e-6 * float(np.abs(target).max())
        scores["center"] = int(contains(target, centre(first), slack))
        scores["size_ratio"] = float(area(first) / area(target))
    return scores


def means_one(rows: Sequence[Row]) -> Columns:
    """Returns accuracy at each threshold of IoU, mean IoU, and the validity of the first boxes."""
    overlap = column(rows, "iou")
    columns = {
        f"acc{percent}": (overlap >= percent / 100).astype(np.float64) for percent in IOU_PERCENT
    }
    return columns | {
        "mean_iou": overlap,
        "center_acc": column(rows, "center"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def score_set(row: Row) -> JsonDict:
    """Returns the scores of all boxes of an answer against all ground-truth boxes.

    Boxes are matched one to one for the largest total IoU. Only boxes of the same label match, but
    labels do not count if the ground truth has at most one label. `iou` is
    2 · total IoU / (predicted + gold). `f50` is 2 · hits / (predicted + gold) for hits at IoU 0.5.
    Both are 1 if there are no boxes on either side. `correct` means that `f50` is 1.
    """
    predicted, gold = row["prediction"]["boxes"], row["gold"]["boxes"]
    predicted_boxes = host_boxes(box["xyxy_px"] for box in predicted)
    overlap = pairwise_iou(predicted_boxes, host_boxes(box["xyxy_px"] for box in gold))
    if len({box["label"] for box in gold}) > 1:
        overlap = np.where(_same_label(predicted, gold), overlap, 0)
    matched_iou = overlap[match(overlap)]
    sizes = (len(predicted), len(gold))
    f_scores = {
        f"f{percent}": float(f_measure((matched_iou >= percent / 100).sum(), *sizes))
        for percent in IOU_PERCENT
    }
    proper = is_proper(predicted_boxes)
    return {
        "iou": float(f_measure(matched_iou.sum(), *sizes)),
        "correct": int(f_scores["f50"] == 1),
        "valid": int(proper.all() and (len(proper) > 0 or not gold)),
        **f_scores,
        "predicted": len(predicted),
        "annotated": len(gold),
        "duplicates": count_duplicates(row),
    }


def means_set(rows: Sequence[Row]) -> Columns:
    """Returns the F-measure at each threshold of IoU, mean IoU, and the share of exact answers."""
    columns = {f"acc{percent}": column(rows, f"f{percent}") for percent in IOU_PERCENT}
    return columns | {
        "mean_iou": column(rows, "iou"),
        "all_found": column(rows, "correct"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def count_duplicates(row: Row) -> int:
    """Returns how many boxes of an answer repeat an earlier box of the same label."""
    predicted = row["prediction"]["boxes"]
    boxes = host_boxes(box["xyxy_px"] for box in predicted)
    same = (pairwise_iou(boxes, boxes) >= DUPLICATE_IOU) & _same_label(predicted, predicted)
    return int(np.tril(same, -1).any(axis=-1).sum())


def _same_label(a: Sequence[JsonObject], b: Sequence[JsonObject]) -> Bool[np.ndarray, "P K"]:
    """Returns whether box i of `a` and box j of `b` have the same label."""
    same = [[first["label"] == second["label"] for second in b] for first in a]
    return np.array(same, bool).reshape(len(a), len(b))


def aggregates(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the number of duplicate boxes for each image, and the median of `size_ratio`.

    A question whose image is not known counts as one image.
    """
    images = len(set(map(cluster, rows)))
    metrics = {"duplicates_per_image": float(column(rows, "duplicates").sum() / images)}
    ratios = column(rows, "size_ratio")
    ratios = ratios[~np.isnan(ratios)]
    if len(ratios):
        metrics["box_size_ratio"] = float(np.median(ratios))
    return metrics


def detection_aggregates(rows: Sequence[Row]) -> dict[str, float]:
    """Returns COCO's average precision over answers (fractions of 1), and `aggregates`.

    Boxes are ranked by their scores if all boxes have a score. Otherwise they are ranked by the
    order in which an answer writes them.
    """
    # pycocotools imports matplotlib, which takes a second. Other benchmarks do not wait for it.
    from pg_ground.evals import detection

    has_scores = all("score" in box for row in rows for box in row["prediction"]["boxes"])
    predicted, gold = [], []
    for row in rows:
        boxes = row["prediction"]["boxes"]
        scores = [box["score"] for box in boxes] if has_scores else None
        predicted.append(detection.Predicted(*_boxes_and_labels(boxes), scores))
        gold.append(detection.Annotated(*_boxes_and_labels(row["gold"]["boxes"])))
    precision = detection.average_precision(predicted, gold)
    metrics = {
        "ap": precision.ap,
        "ap50": precision.ap50,
        "ap75": precision.ap75,
        "ar100": precision.ar100,
    }
    defined = {name: value for name, value in metrics.items() if not np.isnan(value)}
    return aggregates(rows) | defined


def _boxes_and_labels(boxes: Sequence[JsonObject]) -> tuple[np.ndarray, list[str]]:
    return host_boxes(box["xyxy_px"] for box in boxes), [box["label"] for box in boxes]
