"""One target or none: rejection of expressions that describe nothing (GroundingME, 2512.17495)."""

from collections.abc import Sequence

import numpy as np

from pg_ground.boxes import host_boxes, iou, is_proper
from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict, JsonObject, UserError

IOU_PERCENT = (50, 75, 90)
"""Thresholds of IoU for accuracy, in percent."""

NO_BOX = [0, 0, 0, 0]
"""A box with these corners says that there is nothing, as in GroundingME's evaluator."""


def score(row: Row) -> JsonDict:
    """Returns the IoU of the first box of an answer with the target, and whether it is rejected.

    If there is a target, `iou` is plain IoU, and 0 for an answer without a box. If there is none,
    `iou` is 1 for an answer without a box, and 0 otherwise. A box that cannot be read is a box.
    `correct` means that `iou` is at least .5.

    Raises:
      UserError: there are several targets.
    """
    predicted, gold = (written_boxes(row[side]["boxes"]) for side in ("prediction", "gold"))
    if len(gold) > 1:
        raise UserError(
            f"row {row['id']} has {len(gold)} gold boxes, but {row['benchmark']} takes one or "
            f"none: --benchmark=grec takes any number"
        )
    if gold:
        first = predicted[0]["xyxy_px"] if predicted else None
        first_box, target = host_boxes([first, gold[0]["xyxy_px"]])
        overlap = float(iou(first_box, target))
    else:
        overlap = float(not predicted)
    return {
        "iou": overlap,
        "correct": int(overlap >= 0.5),
        "rejected": int(not predicted),
        "annotated": len(gold),
        "valid": int(is_proper(host_boxes(box["xyxy_px"] for box in predicted)).all()),
    }


def written_boxes(boxes: Sequence[JsonObject]) -> list[JsonObject]:
    """Returns boxes without boxes that stand for nothing (NO_BOX)."""
    return [box for box in boxes if box["xyxy_px"] is None or list(box["xyxy_px"]) != NO_BOX]


def means(rows: Sequence[Row]) -> Columns:
    """Returns accuracy over all questions, with a target, and without a target.

    `accuracy`, `accuracy75` and `accuracy90` are over all questions, `accP` over the questions with
    a target. `rejection_accuracy` is the share of questions without a target that are rejected, and
    `wrong_rejections` the share of questions with a target that are rejected.
    """
    overlap, rejected = column(rows, "iou"), column(rows, "rejected")
    has_target = column(rows, "annotated") > 0
    right = {percent: (overlap >= percent / 100).astype(np.float64) for percent in IOU_PERCENT}
    return {
        **{f"accuracy{percent if percent > 50 else ''}": right[percent] for percent in right},
        **{f"acc{percent}": np.where(has_target, right[percent], np.nan) for percent in right},
        "rejection_accuracy": np.where(has_target, np.nan, rejected),
        "wrong_rejections": np.where(has_target, rejected, np.nan),
        "mean_iou": overlap,
        "invalid_fraction": 1 - column(rows, "valid"),
    }
