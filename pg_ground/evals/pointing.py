"""Points: all of them against all gold objects, and one click against one element."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pg_ground.boxes import contains, host_boxes, match
from pg_ground.evals.rows import Row, column
from pg_ground.types import UserError

WITHIN = 0.05
"""Share of the image's diagonal within which a point hits a gold point that has neither mask nor box."""

Columns = dict[str, np.ndarray]


def score_set(row: Row) -> dict[str, Any]:
    """Returns `precision`, `recall` and `f1` of an answer's points, and their distance from the gold points.

    Points and objects are matched one to one, for as many hits as can be (Molmo's protocol, arXiv 2409.17146: a hit lies in the
    object's mask). Without masks a hit lies in the object's box, edges included; without boxes within `WITHIN` of its point.
    `point_in_box` is of the first point and the first box. `distance_px` is the mean over the pairs of points whose sum is least.

    Raises:
      UserError: there are only gold points, and the image's size is not known.
    """
    points, gold = [one["xy_px"] for one in row["prediction"]["points"]], row["gold"]
    targets = [one["xy_px"] for one in gold.get("points", [])]
    readable = [point for point in points if point is not None]
    regions, masks = [one["xyxy_px"] for one in gold.get("boxes", [])], gold.get("masks", [])
    distance = np.array(
        [[np.hypot(p[0] - g[0], p[1] - g[1]) for g in targets] for p in readable], np.float64
    )
    distance = distance.reshape(len(readable), len(targets))
    if masks:
        inside = np.array(
            [[covers(mask, p, row["size_px"]) for mask in masks] for p in readable], bool
        )
    elif regions:
        inside = np.array([in_boxes(regions, p) for p in readable], bool)
    elif row["size_px"] is None and targets:
        raise UserError(
            f"row {row['id']} has only gold points: give boxes, masks, or the image's size (--fields=…,width=W,height=H)"
        )
    else:
        inside = distance <= WITHIN * math.hypot(*(row["size_px"] or (1, 1)))
    number = len(masks or regions or targets)
    inside = inside.reshape(len(readable), number)
    hits, said = float(inside[match(inside.astype(np.float64))].sum()), len(points)
    found: dict[str, Any] = {
        "hits": hits,
        "predicted": said,
        "annotated": number,
        "precision": hits / said if said else float(not number),
        "recall": hits / number if number else float(not said),
        "f1": 2 * hits / (said + number) if said + number else 1.0,
        "valid": int(len(readable) == said and (said > 0 or not number)),
    }
    found["correct"] = int(found["f1"] == 1)
    if regions:
        found["point_in_box"] = int(
            bool(points) and points[0] is not None and in_boxes(regions[:1], points[0])[0]
        )
    pairs = distance[match(-distance)]
    if len(pairs):
        found["distance_px"] = float(pairs.mean())
        if row["size_px"]:
            found["distance"] = float(pairs.mean()) / math.hypot(*row["size_px"])
    return found


def columns_set(rows: Sequence[Row]) -> Columns:
    names = ("precision", "recall", "f1", "point_in_box", "distance_px", "distance")
    return {name: column(rows, name) for name in names} | {
        "invalid_fraction": 1 - column(rows, "valid")
    }


def score_click(row: Row) -> dict[str, Any]:
    """Returns whether the first point lies in the gold box or on its edge (ScreenSpot, arXiv 2401.10935), and its distance.

    A box that is answered counts by its centre, as in ScreenSpot's evaluators. `distance_px` is from the box's centre.
    """
    points, boxes = row["prediction"].get("points", []), row["prediction"].get("boxes", [])
    first = points[0]["xy_px"] if points else None
    if not points and boxes and boxes[0]["xyxy_px"] is not None:
        x1, y1, x2, y2 = boxes[0]["xyxy_px"]
        first = [(x1 + x2) / 2, (y1 + y2) / 2]
    target = row["gold"]["boxes"][0]["xyxy_px"]
    found: dict[str, Any] = {
        "valid": int(first is not None),
        "correct": int(first is not None and in_boxes([target], first)[0]),
    }
    if first is not None:
        found["distance_px"] = math.hypot(
            first[0] - (target[0] + target[2]) / 2, first[1] - (target[1] + target[3]) / 2
        )
        if row["size_px"]:
            found["distance"] = found["distance_px"] / math.hypot(*row["size_px"])
    return found


def columns_click(rows: Sequence[Row]) -> Columns:
    names = {
        "accuracy": "correct",
        "point_in_box": "correct",
        "distance_px": "distance_px",
        "distance": "distance",
    }
    return {name: column(rows, field) for name, field in names.items()} | {
        "invalid_fraction": 1 - column(rows, "valid")
    }


def others(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the median of the rows' distances."""
    known = column(rows, "distance_px")
    known = known[~np.isnan(known)]
    return {"median_distance_px": float(np.median(known))} if len(known) else {}


def in_boxes(
    boxes: Sequence[Sequence[float | int]], point: Sequence[float | int]
) -> Bool[np.ndarray, " K"]:
    """Returns whether a point lies in each box or on its edge, within a millionth of the largest coordinate."""
    edges = host_boxes(boxes)
    slack = 1e-6 * np.abs(edges).max(axis=-1, keepdims=True)
    return np.asarray(contains(edges, np.array(point, np.float64), slack))


def covers(
    mask: Mapping[str, Any], point: Sequence[float | int], size: Sequence[float | int] | None
) -> bool:
    """Returns whether the cell of a mask (run lengths over the whole image) that a point lies in is set."""
    height, width = mask["size"]
    x, y = point[0] / (size[0] if size else width), point[1] / (size[1] if size else height)
    if not (0 <= x <= 1 and 0 <= y <= 1):
        return False
    cell = min(int(x * width), width - 1) * height + min(int(y * height), height - 1)
    ends: Float[np.ndarray, " runs"] = np.cumsum(mask["counts"])
    return bool(np.searchsorted(ends, cell, side="right") % 2)
