"""Detection of labelled boxes judged as COCO does: average precision, by COCO's own code (pycocotools)."""

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

from pg_ground.types import UserError

MOST = 100
"""Boxes of a label and an image that count, those of the highest scores."""


class Predicted(NamedTuple):
    """The boxes of one image that were predicted."""

    xyxy_px: Float[np.ndarray, "N 4"]
    """One that is not finite, or has no width or height, is a prediction that matches nothing."""
    labels: Sequence[str]
    scores: Sequence[float] | None = None
    """Higher is surer. None for all images: what was written earlier is, the first boxes of all images before the second."""


class Annotated(NamedTuple):
    """The boxes of one image that are there."""

    xyxy_px: Float[np.ndarray, "N 4"]
    labels: Sequence[str]
    crowd: Bool[np.ndarray, " N"] | None = None
    """COCO's `iscrowd`: what matches such a box is neither right nor wrong. None is none."""


class Precision(NamedTuple):
    """Fractions of 1: means over labels that have gold boxes (crowds aside), NaN where no label has."""

    ap: float
    """Mean over IoU thresholds .5, .55, …, .95."""
    ap50: float
    ap75: float
    ar100: float
    """Share of gold boxes found, mean over the thresholds, with at most `MOST` predictions of a label and an image."""
    by_label: dict[str, float]
    """`ap` of each label."""
    unknown: int
    """Predictions whose label no gold box has; as in COCO's protocol, they cost nothing."""


def average_precision(predicted: Sequence[Predicted], gold: Sequence[Annotated]) -> Precision:
    """Returns the average precision over images, those of `predicted` and `gold` in the same order.

    Raises:
      UserError: some images have scores and some not, or a score or a gold box is not finite.
    """
    scored = sum(image.scores is not None for image in predicted)
    if 0 < scored < len(predicted):
        raise UserError(
            f"{scored} of {len(predicted)} images have scores for their boxes: it must be all of them, or none"
        )
    labels = sorted({label for image in gold for label in image.labels})
    category = {label: number for number, label in enumerate(labels, 1)}
    boxes_there, boxes_said, images = [], [], defaultdict(set)
    for number, (mine, theirs) in enumerate(zip(predicted, gold, strict=True), 1):
        crowds = np.zeros(len(theirs.labels), bool) if theirs.crowd is None else theirs.crowd
        for box, label, crowd in zip(theirs.xyxy_px, theirs.labels, crowds, strict=True):
            if not np.isfinite(box).all():
                raise UserError(
                    f"image {number}: the gold box {np.asarray(box).tolist()} of {label!r} is not finite"
                )
            boxes_there.append(
                _annotation(len(boxes_there), number, category[label], box)
                | {"iscrowd": int(crowd)}
            )
            images[label].add(number)
        scores = (
            mine.scores
            if mine.scores is not None
            else [-float(place) for place in range(len(mine.labels))]
        )
        for box, label, score in zip(mine.xyxy_px, mine.labels, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(
                    f"image {number}: the score {score} of a box of {label!r} is not finite"
                )
            box = box if np.isfinite(box).all() else np.zeros(4)
            if label in category:
                boxes_said.append(
                    _annotation(len(boxes_said), number, category[label], box)
                    | {"score": float(score)}
                )
                images[label].add(number)
    given = sum(len(image.labels) for image in predicted)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        there, said = _coco(boxes_there), _coco(boxes_said)
        found = {
            label: _evaluated(there, said, category[label], sorted(images[label]))
            for label in labels
        }
    found = {label: one for label, one in found.items() if one is not None}
    measures = (
        np.array(list(found.values())).reshape(-1, 4).mean(axis=0)
        if found
        else np.full(4, math.nan)
    )
    ap, ap50, ap75, ar100 = map(float, measures)
    return Precision(
        ap,
        ap50,
        ap75,
        ar100,
        {label: one[0] for label, one in found.items()},
        given - len(boxes_said),
    )


def _annotation(
    before: int, image: int, category: int, xyxy: Float[np.ndarray, "4"]
) -> dict[str, Any]:
    """Returns a box as COCO's files have it, numbered from 1: pycocotools takes a match with number 0 for none."""
    x1, y1, x2, y2 = map(float, xyxy)
    width, height = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
    place = {"bbox": [x1, y1, width, height], "area": width * height}
    return {"id": before + 1, "image_id": image, "category_id": category, "iscrowd": 0, **place}


def _coco(boxes: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    dataset: Any = {"images": [], "categories": [], "annotations": boxes}
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _evaluated(
    there: COCO, said: COCO, category: int, images: list[int]
) -> tuple[float, float, float, float] | None:
    """Returns ap, ap50, ap75 and ar100 of one label on the images that have it; None where all its gold boxes are crowds.

    Label by label: pycocotools keeps a record for every label and image, and phrases are labels too.
    """
    judge = COCOeval(there, said, "bbox")
    judge.params.imgIds, judge.params.catIds, judge.params.maxDets = images, [category], [MOST]
    judge.params.areaRng, judge.params.areaRngLbl = (
        judge.params.areaRng[:1],
        judge.params.areaRngLbl[:1],
    )
    judge.evaluate()
    judge.accumulate()
    precision, recall = judge.eval["precision"][:, :, 0, 0, 0], judge.eval["recall"][:, 0, 0, 0]
    if (precision < 0).any():
        return None
    by_threshold = precision.mean(axis=1)
    fifty, seventy_five = (int(np.argmin(np.abs(judge.params.iouThrs - t))) for t in (0.5, 0.75))
    return (
        float(by_threshold.mean()),
        float(by_threshold[fifty]),
        float(by_threshold[seventy_five]),
        float(recall.mean()),
    )
