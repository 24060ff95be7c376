"""COCO's average precision of labelled boxes, by COCO's own code (pycocotools)."""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pg_ground.types import JsonDict, UserError

MAX_DETECTIONS = 100
"""Number of boxes that count for each label and image: the boxes with the highest scores."""


class Predicted(NamedTuple):
    """The predicted boxes of one image."""

    xyxy_px: Float[np.ndarray, "N 4"]
    """A box that is not finite, or has no width or height, matches nothing but counts."""
    labels: Sequence[str]
    scores: Sequence[float] | None = None
    """A higher score is surer. It is None for all images or for none.

    Without scores the order of the boxes ranks them: the first boxes of all images come before the
    second boxes.
    """


class Annotated(NamedTuple):
    """The ground-truth boxes of one image."""

    xyxy_px: Float[np.ndarray, "N 4"]
    labels: Sequence[str]
    crowd: Bool[np.ndarray, " N"] | None = None
    """COCO's `iscrowd`. A prediction that matches a crowd is neither right nor wrong. None means
    that no box is a crowd."""


class Precision(NamedTuple):
    """Fractions of 1. They are means over the labels with ground-truth boxes that are not crowds.

    They are NaN if there is no label with ground-truth boxes.
    """

    ap: float
    """Mean over the IoU thresholds .5, .55, …, .95."""
    ap50: float
    ap75: float
    ar100: float
    """Share of the ground-truth boxes that are found: the mean over the thresholds, with at most
    MAX_DETECTIONS predictions for each label and image."""
    by_label: dict[str, float]
    """`ap` of each label."""
    unknown: int
    """Number of predictions whose label no ground-truth box has. They cost nothing, as in COCO."""


def average_precision(predicted: Sequence[Predicted], gold: Sequence[Annotated]) -> Precision:
    """Returns the average precision over images.

    Args:
      predicted: the predictions of each image.
      gold: the ground truth of each image, in the same order.

    Raises:
      UserError: only some images have scores, or a score or a ground-truth box is not finite.
    """
    with_scores = sum(image.scores is not None for image in predicted)
    if 0 < with_scores < len(predicted):
        raise UserError(
            f"{with_scores} of {len(predicted)} images have scores for their boxes: "
            f"either all images must have scores, or none"
        )
    labels = sorted({label for image in gold for label in image.labels})
    categories = {label: number for number, label in enumerate(labels, 1)}
    images = defaultdict(set)  # the images with ground truth or predictions of each label
    gold_boxes, predicted_boxes = [], []
    for number, (prediction, truth) in enumerate(zip(predicted, gold, strict=True), 1):
        gold_boxes += _gold_annotations(truth, number, categories)
        predicted_boxes += _predicted_annotations(prediction, number, categories)
        for label in {*truth.labels, *prediction.labels} & categories.keys():
            images[label].add(number)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        gold_coco, predicted_coco = _coco(gold_boxes), _coco(predicted_boxes)
        scores = {
            label: _evaluate_label(gold_coco, predicted_coco, category, sorted(images[label]))
            for label, category in categories.items()
        }
    scores = {label: values for label, values in scores.items() if values is not None}
    means = np.full(4, math.nan)
    if scores:
        means = np.array(list(scores.values())).reshape(-1, 4).mean(axis=0)
    ap, ap50, ap75, ar100 = map(float, means)
    by_label = {label: values[0] for label, values in scores.items()}
    total = sum(len(image.labels) for image in predicted)
    return Precision(ap, ap50, ap75, ar100, by_label, total - len(predicted_boxes))


def _gold_annotations(truth: Annotated, image: int, categories: dict[str, int]) -> list[JsonDict]:
    """Returns the ground-truth boxes of an image in COCO's form, without ids."""
    crowds = np.zeros(len(truth.labels), bool) if truth.crowd is None else truth.crowd
    annotations = []
    for box, label, crowd in zip(truth.xyxy_px, truth.labels, crowds, strict=True):
        if not np.isfinite(box).all():
            raise UserError(
                f"image {image}: the gold box {np.asarray(box).tolist()} of {label!r} is not finite"
            )
        annotation = _annotation(image, categories[label], box)
        annotations.append(annotation | {"iscrowd": int(crowd)})
    return annotations


def _predicted_annotations(
    prediction: Predicted, image: int, categories: dict[str, int]
) -> list[JsonDict]:
    """Returns the predicted boxes of an image in COCO's form, without ids.

    Boxes whose label no ground-truth box has are left out. A box that is not finite becomes a box
    without area, which matches nothing.
    """
    scores = prediction.scores
    if scores is None:
        scores = [-float(rank) for rank in range(len(prediction.labels))]
    annotations = []
    for box, label, score in zip(prediction.xyxy_px, prediction.labels, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(f"image {image}: the score {score} of a box of {label!r} is not finite")
        if label in categories:
            finite_box = box if np.isfinite(box).all() else np.zeros(4)
            annotation = _annotation(image, categories[label], finite_box)
            annotations.append(annotation | {"score": float(score)})
    return annotations


def _annotation(image: int, category: int, xyxy: Float[np.ndarray, "4"]) -> JsonDict:
    """Returns a box in COCO's form, without an id."""
    x1, y1, x2, y2 = map(float, xyxy)
    width, height = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
    return {
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "bbox": [x1, y1, width, height],
        "area": width * height,
    }


def _coco(annotations: list[JsonDict]) -> COCO:
    """Returns pycocotools' index of boxes.

    Ids count from 1, because pycocotools reads a match with id 0 as no match.
    """
    numbered = [{"id": number, **box} for number, box in enumerate(annotations, 1)]
    coco = COCO()
    dataset: Any = {"images": [], "categories": [], "annotations": numbered}
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _evaluate_label(
    gold: COCO, predicted: COCO, category: int, images: list[int]
) -> tuple[float, float, float, float] | None:
    """Returns ap, ap50, ap75 and ar100 of one label. None if all its ground-truth boxes are crowds.

    Labels are evaluated one by one on their own images. pycocotools would keep a record for every
    pair of a label and an image, and in referring expressions every phrase is a label.

    Args:
      images: the images with ground truth or predictions of the label.
    """
    evaluator = COCOeval(gold, predicted, "bbox")
    settings = evaluator.params
    settings.imgIds = images
    settings.catIds = [category]
    settings.maxDets = [MAX_DETECTIONS]
    settings.areaRng = settings.areaRng[:1]  # the first range is all areas
    settings.areaRngLbl = settings.areaRngLbl[:1]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"][:, :, 0, 0, 0]  # [threshold, recall]
    recall = evaluator.eval["recall"][:, 0, 0, 0]
    if (precision < 0).any():
        return None
    by_threshold = precision.mean(axis=1)
    at_50, at_75 = (int(np.argmin(np.abs(settings.iouThrs - value))) for value in (0.5, 0.75))
    return (
        float(by_threshold.mean()),
        float(by_threshold[at_50]),
        float(by_threshold[at_75]),
        float(recall.mean()),
    )
