"""Points in the mask of a question (Point-Bench, arXiv 2505.09990)."""

from collections.abc import Sequence

from pg_ground.evals.pointing import Point, covers
from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict, JsonObject

COUNTED = "counting"
"""The group of questions that ask for a number of points."""


def score(row: Row) -> JsonDict:
    """Returns whether an answer is right, and the share of its points in the mask.

    A question that asks for a number of points is right if the answer has this number of points and
    all of them lie in the mask. Any other question is right if the first point does. An answer
    without a point is wrong. This is the protocol of PointArena's evaluator; `point_share` is
    lmms-eval's metric.
    """
    points = [point["xy_px"] for point in row["prediction"]["points"]]
    inside = [_is_inside(row, point) for point in points]
    gold = row["gold"]
    expected = gold.get("count")
    groups = gold.get("groups", ())
    is_counted = expected is not None and (not groups or COUNTED in groups)
    judged = inside if is_counted else inside[:1]
    has_number = not is_counted or len(points) == expected
    return {
        "correct": int(has_number and len(judged) > 0 and all(judged)),
        "point_share": sum(inside) / len(points) if points else 0.0,
        "predicted": len(points),
        "valid": int(len(points) > 0 and None not in points),
        **({"count_correct": int(len(points) == expected)} if is_counted else {}),
    }


def _is_inside(row: Row, point: Point | None) -> bool:
    """Returns whether a point lies in one of the masks of a question.

    A point on the right or lower edge of the image lies outside, as in PointArena's evaluator.
    """
    if point is None:
        return False
    masks: Sequence[JsonObject] = row["gold"]["masks"]
    width, height = row["size_px"] or masks[0]["size"][::-1]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        return False
    return any(covers(mask, point, (width, height)) for mask in masks)


def means(rows: Sequence[Row]) -> Columns:
    """Returns accuracy, the mean share of points in the mask, and the share of right numbers."""
    return {
        "accuracy": column(rows, "correct"),
        "point_share": column(rows, "point_share"),
        "count_accuracy": column(rows, "count_correct"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }
