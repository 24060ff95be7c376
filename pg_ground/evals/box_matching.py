"""Overlap and matching of boxes in pixels: plain IoU, without a pixel added to widths and heights."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Box = Sequence[float | int]
"""x1 y1 x2 y2 in pixels; JSON has whole numbers without a point."""


def is_proper(box: Box | None) -> bool:
    """Returns whether a box can be read and has a width, a height and an area, which could underflow."""
    return box is not None and box[2] > box[0] and box[3] > box[1] and area(box) > 0


def area(box: Box) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def iou_of(a: Box | None, b: Box | None) -> float:
    """Returns intersection over union in [0, 1]; 0 where either box is not proper."""
    if a is None or b is None or not (is_proper(a) and is_proper(b)):
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / (area(a) + area(b) - overlap)


def holds(box: Box, point: Sequence[float | int]) -> bool:
    """Returns whether a point lies in a box or on its edge, give or take a millionth of its coordinates' size."""
    slack = 1e-6 * max(abs(v) for v in box)
    return (
        box[0] - slack <= point[0] <= box[2] + slack
        and box[1] - slack <= point[1] <= box[3] + slack
    )


def matched(
    similarity: Float[np.ndarray, "P K"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns rows and columns of the one-to-one matching with the largest total similarity."""
    if 0 in similarity.shape:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    from scipy.optimize import (
        linear_sum_assignment,  # 0.3 s to import, which a file of single boxes does not wait for
    )

    return linear_sum_assignment(similarity, maximize=True)
