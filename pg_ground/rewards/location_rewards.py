"""Text rewards for boxes and points: JSON, dicts, lists, box tokens, detection.

Coordinates are in pixels of the original image. Predictions and gold locations are matched one to
one for the largest total similarity, as in `device_rewards`. Missing, spurious and duplicate
locations lower the score. A location that cannot be read counts as a prediction with similarity 0.

The gold text of a question decides: a reward applies if its own reader can read the gold text, and
the locations of that text are gold. So no answer earns more than the gold text. The annotation is
gold only if there is no gold text.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pg_ground import boxes
from pg_ground.readers import locations
from pg_ground.readers.locations import Location, Reading
from pg_ground.readers.parsers import sections
from pg_ground.rewards.text_example import TextExample
from pg_ground.vocab import LOC_MAX

SIGMA_PX = 100.0
"""Sigma of synthetic-grounding's reward, in pixels of the image scaled so that its longer side has
`MAX_SIZE_PX` pixels.
"""

MAX_SIZE_PX = 640.0

ALPHA = 0.5
"""Sigma of EasyDistill's Gaussians, as a fraction of a box's side."""

MATCH_IOU = 0.5
"""Boxes of open-vocabulary detection match above this IoU."""

COORDINATE_LIMIT_PX = 1e7
"""Coordinates are clipped to this size, so that their products are finite."""

HALF_PIXEL = 0.5 + 1e-3
"""Slack of a point in a box. The numbers of a JSON answer are whole pixels, so the right answer can
lie half a pixel outside a narrow box. Boxes are float32, which rounds 10,000 pixels by 1e-3.
"""

Grammar = Callable[[str], Reading]
Similarity = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]
"""(predicted, gold, size of the image) to similarities in [0, 1]; the arrays broadcast over their
leading axes.
"""


def json_format(text: str, example: TextExample) -> float:
    """Returns 1 for JSON points or boxes of the asked kind, each with a label, else 0.

    If the objects of the question have no names, labels are not needed. An empty list earns 1 only
    if there is nothing to find. The value is NaN if the gold text has another form.
    """
    for target, read in (("points", locations.json_points), ("boxes", locations.json_boxes)):
        gold = _gold(example, read, target)
        if gold is None:
            continue
        gold_reading, reading = read(example.gold), read(text)
        if example.gold.strip() and not (gold_reading.ok or gold_reading.ok_unlabelled):
            return math.nan
        has_names = any(location.label for location in gold)
        follows = reading.ok or (reading.ok_unlabelled and not has_names)
        return float(follows and bool(reading.locations) == bool(gold))
    return math.nan


def json_points(text: str, example: TextExample) -> float:
    """Returns the matched nearness of JSON points to gold points, in [0, 1]."""
    return _matched(text, example, locations.json_points, _distance_gaussian, "points")


def json_points_in_boxes(text: str, example: TextExample) -> float:
    """Returns the matched share of JSON points inside gold boxes, one point in each box, in [0, 1].

    The question must ask for points, and the annotation must have the box of each object; else the
    reward is NaN.
    """
    if "points" not in (example.objects, example.target):
        return math.nan
    points = _gold(example, locations.json_points, "points")
    if points is None or len(example.boxes) != len(points):
        return math.nan
    labels = [point.label for point in points]
    gold = [Location(box, label) for box, label in zip(example.boxes, labels, strict=True)]
    return _match(text, gold, example.size, locations.json_points, _inside)


def json_boxes(text: str, example: TextExample) -> float:
    """Returns the matched IoU of JSON boxes and gold boxes, in [0, 1].

    Labels count if the gold boxes have several.
    """
    return _matched(text, example, locations.json_boxes, _iou)


def json_boxes_squared(text: str, example: TextExample) -> float:
    """Returns the matched IoU² of JSON boxes and gold boxes, in [0, 1]."""
    return _matched(text, example, locations.json_boxes, _iou_squared)


def dict_format(text: str, example: TextExample) -> float:
    """Returns 1 for a dict of lists of proper boxes (EasyDistill), else 0."""
    return _follows_grammar(text, example, locations.dict_boxes)


def dict_point(text: str, example: TextExample) -> float:
    """Returns the nearness of a dict's boxes to the centres of gold boxes, in [0, 1].

    Only boxes with the same key match. The unit of the distance is the gold box's side.
    """
    return _matched(text, example, locations.dict_boxes, _gaussian_point)


def dict_coverage(text: str, example: TextExample) -> float:
    """Returns the overlap of a dict's boxes with gold boxes, both as Gaussians, in [0, 1].

    Only boxes with the same key match.
    """
    return _matched(text, example, locations.dict_boxes, _gaussian_coverage)


def dict_iou(text: str, example: TextExample) -> float:
    """Returns the matched IoU of a dict's boxes and gold boxes of the same key, in [0, 1]."""
    return _matched(text, example, locations.dict_boxes, _iou)


def list_format(text: str, example: TextExample) -> float:
    """Returns 1 for one proper box as `[x1, y1, x2, y2]`, else 0.

    The numbers must be natural numbers (EasyDistill).
    """
    return _follows_grammar(text, example, locations.list_boxes)


def list_point(text: str, example: TextExample) -> float:
    """Returns the nearness of listed boxes to the centres of gold boxes, in [0, 1].

    The unit of the distance is the gold box's side.
    """
    return _matched(text, example, locations.list_boxes, _gaussian_point)


def list_coverage(text: str, example: TextExample) -> float:
    """Returns the overlap of listed boxes with gold boxes, both as Gaussians, in [0, 1]."""
    return _matched(text, example, locations.list_boxes, _gaussian_coverage)


def list_iou(text: str, example: TextExample) -> float:
    """Returns the matched IoU of listed boxes and gold boxes, in [0, 1]."""
    return _matched(text, example, locations.list_boxes, _iou)


def list_iou_squared(text: str, example: TextExample) -> float:
    """Returns the matched IoU² of listed boxes and gold boxes, in [0, 1].

    This is RLLaVA's grounding accuracy.
    """
    return _matched(text, example, locations.list_boxes, _iou_squared)


def box_tokens_format(text: str, example: TextExample) -> float:
    """Returns 1 for one proper box in Qwen2-VL's box tokens (RLLaVA's grounding format), else 0.

    The gold text may also be a bare list, as in RLLaVA's data. The bare list itself earns 0 then.
    """
    gold_grammars = (locations.box_tokens, locations.list_boxes)
    return _follows_grammar(text, example, locations.box_tokens, gold_grammars)


def ovd_format(text: str, example: TextExample) -> float:
    """Returns 1 for proper boxes with confidences inside answer tags, else 0."""
    return _follows_grammar(text, example, locations.ovd)


def ovd_f(text: str, example: TextExample) -> float:
    """Returns 2·Σ IoU / (n_predicted + n_gold) over detections, in [0, 1].

    The value is 1 if both counts are 0.
    """
    detections = _detect(text, example)
    if not detections:
        return math.nan
    total, predicted = float(detections.overlap.sum()), len(detections.overlap)
    return float(boxes.f_measure(total, predicted, detections.gold))


def ovd_iou(text: str, example: TextExample) -> float:
    """Returns Σ IoU / max(n_predicted, n_gold) over detections, in [0, 1] (RLLaVA's).

    The value is 1 if both counts are 0.
    """
    detections = _detect(text, example)
    if not detections:
        return math.nan
    return _share(detections.overlap.sum(), max(len(detections.overlap), detections.gold))


def ovd_confidence(text: str, example: TextExample) -> float:
    """Returns the mean of c over detections and 1 − c over other predictions, in [0, 1].

    The reward is RLLaVA's. The value is at most the mean of c over the detections alone. So other
    predictions can only lower it, and earn nothing by themselves. The value is 1 if nothing is
    predicted and there is nothing to find.
    """
    detections = _detect(text, example)
    if not detections:
        return math.nan
    hit = detections.overlap > 0
    if not hit.any():
        return float(not detections.gold and not hit.size)
    right = np.where(hit, detections.confidence, 1 - detections.confidence)
    return float(min(right.mean(), detections.confidence[hit].mean()))


def ovd_calibration(text: str, example: TextExample) -> float:
    """Returns Σ (2·c·detected − c²) / max(n_predicted, n_gold), in [−1, 1]; 1 if both counts are 0.

    This is Brier's score minus the score of confidence 0. If a box is right with probability p, the
    mean is largest at c = p, and is p² there. A box with confidence 0 earns nothing. The value is
    not cut off at 0, because then a wrong box could have any confidence.
    """
    detections = _detect(text, example)
    if not detections:
        return math.nan
    confidence = detections.confidence
    earned = 2 * confidence * (detections.overlap > 0) - np.square(confidence)
    return _share(earned.sum(), max(len(detections.overlap), detections.gold))


def ovd_ap(text: str, example: TextExample) -> float:
    """Returns average precision, in [0, 1]: the area under the interpolated precision over recall.

    Predictions with equal confidence enter together. The value is 1 if nothing is predicted and
    there is nothing to find.
    """
    detections = _detect(text, example)
    if not detections:
        return math.nan
    if not detections.gold:
        return float(not len(detections.overlap))
    cuts = np.unique(detections.confidence)[::-1]
    entered = detections.confidence >= cuts[:, None]
    hits = (entered & (detections.overlap > 0)).sum(axis=-1)
    precision = np.maximum.accumulate((hits / entered.sum(axis=-1))[::-1])[::-1]
    area = (np.diff(hits, prepend=0) * precision).sum()
    return _share(area, detections.gold)


def ovd(text: str, example: TextExample) -> float:
    """Returns the mean of `ovd_f`, `ovd_calibration` and `ovd_ap`, in [−⅓, 1].

    The value is 1 for `[]` if there is nothing to find.
    """
    return (ovd_f(text, example) + ovd_calibration(text, example) + ovd_ap(text, example)) / 3


def _gold(example: TextExample, read: Grammar, target: str) -> Sequence[Location] | None:
    """Returns the locations of the gold text, else the annotation.

    The value is None if the question asks for other objects, or has a gold text of another form.
    """
    if example.objects and (example.objects != target or example.target == target):
        return None  # the answer is about other objects, or in loc tokens
    if example.target not in (target, "text"):
        return None
    if example.gold.strip():
        reading = read(example.gold)
        if read is locations.list_boxes and sections(example.gold).answer.strip() == "[]":
            return ()  # a list without boxes
        is_legible = all(location.numbers is not None for location in reading.locations)
        return reading.locations if is_legible and (reading.ok or reading.locations) else None
    annotated = example.points if target == "points" else example.boxes
    if example.target == "text" and not annotated:
        return None
    # The labels may belong to the boxes of a question that also has points.
    is_labelled = len(example.labels) == len(annotated)
    labels = example.labels if is_labelled else ("",) * len(annotated)
    return [Location(xy, label) for xy, label in zip(annotated, labels, strict=True)]


def _follows_grammar(
    text: str, example: TextExample, read: Grammar, gold_grammars: Sequence[Grammar] = ()
) -> float:
    """Returns 1 if a completion follows a grammar, else 0; NaN if the gold text does not.

    Args:
      gold_grammars: the grammars that the gold text may have; () is `read` alone.
    """
    if _gold(example, read, "boxes") is None:
        return math.nan
    gold = example.gold
    if gold.strip() and not any(grammar(gold).ok for grammar in gold_grammars or (read,)):
        return math.nan
    return float(read(text).ok)


def _predicted(text: str, gold: Sequence[Location], read: Grammar) -> Sequence[Location]:
    """Returns the locations of a completion.

    If there is nothing to find, a text without a location must abstain: by an empty text, by `[]`,
    `{}`, or as the grammar does. Any other text counts as a location that cannot be read.
    """
    reading = read(text)
    if gold or reading.locations or reading.ok:
        return reading.locations
    cut = sections(text)
    abstains = cut.form != "broken" and cut.answer.strip() in ("", "[]", "{}")
    return () if abstains else (Location(None, score=0.0),)


def _matched(
    text: str, example: TextExample, read: Grammar, similarity: Similarity, target: str = "boxes"
) -> float:
    """Returns the F-measure of the best matching of predicted with gold locations, in [0, 1]."""
    gold = _gold(example, read, target)
    return math.nan if gold is None else _match(text, gold, example.size, read, similarity)


def _match(
    text: str,
    gold: Sequence[Location],
    size: tuple[int, int],
    read: Grammar,
    similarity: Similarity,
) -> float:
    predicted = _predicted(text, gold, read)
    table = _similarities(predicted, gold, similarity, size)
    table = table * _same_label(predicted, gold, read)
    return float(boxes.f_measure(float(boxes.matched_total(table)), *table.shape))


def _similarities(
    predicted: Sequence[Location],
    gold: Sequence[Location],
    similarity: Similarity,
    size: tuple[int, int],
) -> Float[np.ndarray, "P K"]:
    """Returns the similarity of each prediction with each gold location.

    The value is 0 for a prediction that is not proper.
    """
    table = np.zeros((len(predicted), len(gold)))
    proper = [i for i, location in enumerate(predicted) if locations.is_proper(location)]
    if proper and gold:
        a = np.array([predicted[i].numbers for i in proper], float)
        a = np.clip(a, -COORDINATE_LIMIT_PX, COORDINATE_LIMIT_PX)
        b = np.array([location.numbers for location in gold], float)
        table[proper] = similarity(a[:, None], b[None], size)
    return table


def _same_label(
    predicted: Sequence[Location], gold: Sequence[Location], read: Grammar
) -> Bool[np.ndarray, "P K"]:
    """Returns which predictions may match which gold locations.

    Labels must be equal if the gold has several, or if the grammar is a dict. A list has no labels.
    """
    labels = [location.label.strip().casefold() for location in predicted]
    gold_labels = [location.label.strip().casefold() for location in gold]
    several = read is not locations.list_boxes and len(set(gold_labels)) > 1
    if not (several or read is locations.dict_boxes):
        return np.ones((len(labels), len(gold_labels)), bool)
    same = [[label == gold_label for gold_label in gold_labels] for label in labels]
    return np.array(same, bool).reshape(len(labels), len(gold_labels))


def _share(part: float, whole: int) -> float:
    return float(part / whole) if whole else 1.0


def _distance_gaussian(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns exp(−d² / 2σ²) of points in the scaled image (synthetic-grounding's reward)."""
    distance_px = np.linalg.norm(a - b, axis=-1) * (MAX_SIZE_PX / max(size))
    return np.asarray(boxes.gaussian(distance_px, SIGMA_PX))


def _inside(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return np.asarray(boxes.contains(b, a, slack=HALF_PIXEL), float)


def _iou(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return np.asarray(boxes.iou(a, b))


def _iou_squared(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return np.square(boxes.iou(a, b))


def _gaussian_point(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    one_bin = np.array(size) / LOC_MAX
    return np.asarray(boxes.gaussian_point(boxes.centre(a), b, ALPHA, one_bin))


def _gaussian_coverage(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    one_bin = np.array(size) / LOC_MAX
    return np.asarray(boxes.gaussian_coverage(a, b, ALPHA, one_bin))


class _Detections(NamedTuple):
    overlap: Float[np.ndarray, " P"]
    """IoU with the matched gold box; 0 for a prediction without a match."""
    confidence: Float[np.ndarray, " P"]
    gold: int
    """Number of gold boxes."""


def _detect(text: str, example: TextExample) -> _Detections | None:
    """Returns the detections.

    By falling confidence, each prediction takes the free gold box of its label with the largest
    IoU.
    """
    gold = _gold(example, locations.ovd, "boxes")
    if gold is None:
        return None
    predicted = _predicted(text, gold, locations.ovd)
    free = _similarities(predicted, gold, _iou, example.size)
    free = free * _same_label(predicted, gold, locations.ovd)
    confidence = np.array([location.score for location in predicted], float)
    overlap = np.zeros(len(predicted))
    order = sorted(range(len(predicted)), key=lambda row: _rank(predicted[row]))
    for row in order if gold else ():
        if free[row].max() > MATCH_IOU:
            column = free[row].argmax()
            overlap[row] = free[row, column]
            free[:, column] = 0
    return _Detections(overlap, confidence, len(gold))


def _rank(prediction: Location) -> tuple[float, ...]:
    """Returns the sort key of a prediction: confidence, then coordinates.

    So the order of predictions in the text does not count.
    """
    return -(prediction.score or 0.0), *(prediction.numbers or (math.nan,) * 4)
