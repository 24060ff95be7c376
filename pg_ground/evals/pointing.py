"""Scores of points: all points against all objects, and one click against one element."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from pg_ground.boxes import contains, f_measure, host_boxes, match
from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict, JsonObject, UserError

Point = Sequence[float | int]
"""x and y in pixels."""

HIT_DISTANCE = 0.05
"""A point hits an object without mask and box within this share of the image's diagonal."""


def score_set(row: Row) -> JsonDict:
    """Returns precision, recall, F1 and distances of the points of an answer.

    Points and objects are matched one to one for the largest number of hits (Molmo's protocol,
    arXiv 2409.17146). A hit lies in the mask of the object. Without masks, a hit lies in the box of
    the object or on its edge. Without boxes, a hit lies within `HIT_DISTANCE` of its point.
    `point_in_box` compares the first point with the first box. For `distance_px`, points and
    ground-truth points are matched for the smallest total distance; the value is the mean distance.

    Raises:
      UserError: the ground truth has only points, and the size of the image is not known.
    """
    points = [point["xy_px"] for point in row["prediction"]["points"]]
    readable = [point for point in points if point is not None]
    distance = _distances(readable, [point["xy_px"] for point in row["gold"].get("points", [])])
    inside = _hits(row, readable, distance)
    objects = inside.shape[1]
    hits = float(inside[match(inside.astype(np.float64))].sum())
    scores: JsonDict = {
        "hits": hits,
        "predicted": len(points),
        "annotated": objects,
        "precision": hits / len(points) if points else float(not objects),
        "recall": hits / objects if objects else float(not points),
        "f1": float(f_measure(hits, len(points), objects)),
        "valid": int(len(readable) == len(points) and (len(points) > 0 or not objects)),
    }
    scores["correct"] = int(scores["f1"] == 1)
    boxes = [box["xyxy_px"] for box in row["gold"].get("boxes", [])]
    if boxes:
        first = points[0] if points else None
        scores["point_in_box"] = int(first is not None and in_boxes(boxes[:1], first)[0])
    pairs = distance[match(-distance)]
    if len(pairs):
        scores |= _distance_scores(row, float(pairs.mean()))
    return scores


def _distances(points: Sequence[Point], targets: Sequence[Point]) -> Float[np.ndarray, "P K"]:
    """Returns the distance of each point from each target, in pixels."""
    distance = [[np.hypot(p[0] - t[0], p[1] - t[1]) for t in targets] for p in points]
    return np.array(distance, np.float64).reshape(len(points), len(targets))


def _hits(
    row: Row, points: Sequence[Point], distance: Float[np.ndarray, "P T"]
) -> Bool[np.ndarray, "P K"]:
    """Returns whether each of P points hits each of K objects.

    Args:
      distance: distance of the points from the T ground-truth points.
    """
    gold, size = row["gold"], row["size_px"]
    boxes = [box["xyxy_px"] for box in gold.get("boxes", [])]
    masks = gold.get("masks", [])
    if masks:
        inside = [[covers(mask, point, size) for mask in masks] for point in points]
        return np.array(inside, bool).reshape(len(points), len(masks))
    if boxes:
        inside = [in_boxes(boxes, point) for point in points]
        return np.array(inside, bool).reshape(len(points), len(boxes))
    if size is None and distance.shape[1]:
        raise UserError(
            f"row {row['id']} has only gold points: give boxes, masks, or the size of the image "
            f"(--fields=…,width=W,height=H)"
        )
    return distance <= HIT_DISTANCE * math.hypot(*(size or (1, 1)))


def _distance_scores(row: Row, distance_px: float) -> dict[str, float]:
    """Returns a distance in pixels, and as a share of the image's diagonal if the size is known."""
    scores = {"distance_px": distance_px}
    if row["size_px"]:
        scores["distance"] = distance_px / math.hypot(*row["size_px"])
    return scores


def means_set(rows: Sequence[Row]) -> Columns:
    """Returns precision, recall, F1, distances, and the share of answers with unreadable points."""
    names = ("precision", "recall", "f1", "point_in_box", "distance_px", "distance")
    columns = {name: column(rows, name) for name in names}
    return columns | {"invalid_fraction": 1 - column(rows, "valid")}


def score_click(row: Row) -> JsonDict:
    """Returns whether the first point lies in the ground-truth box (with edges), and distances.

    This is ScreenSpot's protocol (arXiv 2401.10935). An answer that is a box counts by the centre
    of the box, as in ScreenSpot's evaluators. Distances are from the centre of the ground-truth
    box.
    """
    click = click_of(row["prediction"])
    target = row["gold"]["boxes"][0]["xyxy_px"]
    scores: JsonDict = {
        "valid": int(click is not None),
        "correct": int(click is not None and in_boxes([target], click)[0]),
    }
    if click is not None:
        x, y = _centre(target)
        scores |= _distance_scores(row, math.hypot(click[0] - x, click[1] - y))
    return scores


def click_of(prediction: JsonObject) -> Point | None:
    """Returns the first point of an answer, or the centre of its first box. None if unreadable."""
    points, boxes = prediction.get("points", []), prediction.get("boxes", [])
    if points:
        return points[0]["xy_px"]
    if boxes and boxes[0]["xyxy_px"] is not None:
        return _centre(boxes[0]["xyxy_px"])
    return None


def _centre(xyxy: Sequence[float | int]) -> tuple[float, float]:
    return (xyxy[0] + xyxy[2]) / 2, (xyxy[1] + xyxy[3]) / 2


def means_click(rows: Sequence[Row]) -> Columns:
    """Returns accuracy (also as `point_in_box`), distances, and the share of invalid answers."""
    correct = column(rows, "correct")
    return {
        "accuracy": correct,
        "point_in_box": correct,
        "distance_px": column(rows, "distance_px"),
        "distance": column(rows, "distance"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def aggregates(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the median of the distances."""
    distances = column(rows, "distance_px")
    distances = distances[~np.isnan(distances)]
    return {"median_distance_px": float(np.median(distances))} if len(distances) else {}


def in_boxes(boxes: Sequence[Sequence[float | int]], point: Point) -> Bool[np.ndarray, " K"]:
    """Returns whether a point lies in each box or on its edge.

    The tolerance is a millionth of the largest coordinate of the box.
    """
    edges = host_boxes(boxes)
    slack = 1e-6 * np.abs(edges).max(axis=-1, keepdims=True)
    return np.asarray(contains(edges, np.array(point, np.float64), slack))


def covers(mask: JsonObject, point: Point, size: Sequence[float | int] | None) -> bool:
    """Returns whether a mask covers a point.

    Args:
      mask: run lengths over the whole image, which may have another resolution than the image.
      size: width and height of the image. None means that they are those of the mask.
    """
    height, width = mask["size"]
    x = point[0] / (size[0] if size else width)
    y = point[1] / (size[1] if size else height)
    if not (0 <= x <= 1 and 0 <= y <= 1):
        return False
    # Run lengths go down the columns. A point on the right or lower edge is in the last cell.
    cell = min(int(x * width), width - 1) * height + min(int(y * height), height - 1)
    ends: Float[np.ndarray, " runs"] = np.cumsum(mask["counts"])
    return bool(np.searchsorted(ends, cell, side="right") % 2)
