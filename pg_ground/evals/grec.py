"""Generalized referring expressions (GREC, arXiv 2308.16182): several, one or no target."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pg_ground.boxes import giou, host_boxes, is_proper, pairwise_iou
from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict

MIN_SIMILARITY = 0.5
"""A predicted box hits a ground-truth box from this IoU."""


def score(row: Row) -> JsonDict:
    """Returns the F1 of the boxes of an answer, by IoU and by generalized IoU.

    Boxes are matched one to one, the pair with the largest IoU first. A pair is a hit if its IoU is
    at least `MIN_SIMILARITY`. If there is no target, `f1` is 1 for an answer without a box, and 0
    otherwise. A box that cannot be read counts as a predicted box. `correct` means that `f1` is 1.

    The paper's text says IoU. The published evaluation code compares generalized IoU, which is
    never larger: `f1_giou` is the value of this code.
    """
    predicted = host_boxes(box["xyxy_px"] for box in row["prediction"]["boxes"])
    gold = host_boxes(box["xyxy_px"] for box in row["gold"]["boxes"])
    f1 = _f1(np.asarray(pairwise_iou(predicted, gold)))
    f1_giou = _f1(np.asarray(giou(predicted[:, None], gold[None])))
    return {
        "f1": f1,
        "f1_giou": f1_giou,
        "correct": int(f1 == 1),
        "correct_giou": int(f1_giou == 1),
        "predicted": len(predicted),
        "annotated": len(gold),
        "valid": int(is_proper(predicted).all()),
    }


def _f1(similarity: Float[np.ndarray, "P K"]) -> float:
    """Returns the F1 of the greedy matching of P predicted and K ground-truth boxes."""
    predicted, gold = similarity.shape
    if not gold:
        return float(not predicted)
    hits, remaining = 0, similarity.copy()
    for _ in range(min(predicted, gold)):
        row, col = np.unravel_index(np.argmax(remaining), remaining.shape)
        if remaining[row, col] < MIN_SIMILARITY:
            break
        hits += 1
        remaining[row, :] = remaining[:, col] = 0
    return 2 * hits / (predicted + gold)


def means(rows: Sequence[Row]) -> Columns:
    """Returns Precision@(F1=1, IoU>=.5), N-acc and T-acc.

    `n_acc` is the share of questions without a target whose answer has no box. `t_acc` is the share
    of questions with targets whose answer has a box.
    """
    has_box = column(rows, "predicted") > 0
    has_target = column(rows, "annotated") > 0
    return {
        "precision": column(rows, "correct"),
        "precision_giou": column(rows, "correct_giou"),
        "n_acc": np.where(has_target, np.nan, ~has_box),
        "t_acc": np.where(has_target, has_box, np.nan),
        "mean_f1": column(rows, "f1"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }
