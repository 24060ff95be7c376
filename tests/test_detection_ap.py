"""Average precision: equal to pycocotools, equal to its definition, and exact in the edge cases."""

import contextlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pg_ground.evals.detection import Annotated, Predicted, average_precision
from pg_ground.types import UserError

LABELS = ("cat", "dog", "red circle", "ears of a dog")


def random_scene(rng: np.random.Generator) -> tuple[Predicted, Annotated]:
    """Returns the predictions and the ground truth of an image.

    Some ground-truth boxes are crowds. Predictions are near, doubled, missing, invented, or have a
    wrong label. The last label of LABELS has no ground truth.
    """
    count = rng.integers(0, 12)
    corner = rng.uniform(0, 500, (count, 2))
    gold = np.concatenate([corner, corner + rng.uniform(2, 140, (count, 2))], axis=1)
    labels = [LABELS[i] for i in rng.integers(0, 3, count)]
    chosen = rng.integers(0, max(count, 1), rng.integers(0, 2 * count + 1))
    noisy = gold[chosen] + rng.normal(0, 8, (len(chosen), 4))
    noisy = np.sort(noisy.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    noisy_labels = [labels[i] if rng.random() < 0.8 else LABELS[rng.integers(0, 4)] for i in chosen]
    invented = np.tile(rng.uniform(0, 500, (3, 2)), 2) + np.array([0, 0, 60, 40])
    boxes = np.concatenate([noisy, invented])
    predicted_labels = [*noisy_labels, "cat", "dog", "red circle"]
    scores = np.round(rng.random(len(boxes)), 2).tolist()  # rounding makes some scores equal
    prediction = Predicted(boxes, predicted_labels, scores)
    return prediction, Annotated(gold, labels, rng.random(count) < 0.1)


def random_scenes(seed: int, count: int) -> tuple[list[Predicted], list[Annotated]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return [predicted for predicted, _ in scenes], [gold for _, gold in scenes]


def write_coco_files(
    predicted: Sequence[Predicted], gold: Sequence[Annotated], folder: Path
) -> dict[str, int]:
    """Writes `gold.json` and `results.json` in COCO's form, and returns the id of each label."""
    names = sorted({label for image in gold for label in image.labels})
    ids = {name: number for number, name in enumerate(names, 7)}
    annotations, results = [], []
    for image, (prediction, truth) in enumerate(zip(predicted, gold, strict=True), 100):
        for (x1, y1, x2, y2), label, crowd in zip(
            truth.xyxy_px.tolist(), truth.labels, truth.crowd, strict=True
        ):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(crowd),
            }
            annotations.append(annotation)
        for (x1, y1, x2, y2), label, score in zip(
            prediction.xyxy_px.tolist(), prediction.labels, prediction.scores, strict=True
        ):
            if label in ids:
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                results.append({"image_id": image, "category_id": ids[label]} | box)
    images = [{"id": 100 + i, "width": 640, "height": 640} for i in range(len(gold))]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    document = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "gold.json").write_text(json.dumps(document))
    (folder / "results.json").write_text(json.dumps(results))
    return ids


def precision_by_coco(
    predicted: Sequence[Predicted], gold: Sequence[Annotated], folder: Path
) -> tuple[list[float], dict[str, float]]:
    """Returns ap, ap50, ap75, ar100 and the ap of each label by pycocotools alone, from files."""
    ids = write_coco_files(predicted, gold, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "gold.json"))
        evaluator = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"]
    by_label = {name: precision[:, :, k, 0, -1].mean() for k, name in enumerate(ids)}
    return [evaluator.stats[i] for i in (0, 1, 2, 8)], by_label


def test_average_precision_equals_pycocotools(tmp_path, capsys):
    predicted, gold = random_scenes(0, 200)
    precision = average_precision(predicted, gold)
    expected, by_label = precision_by_coco(predicted, gold, tmp_path)
    np.testing.assert_allclose(precision[:4], expected, atol=1e-12)
    assert precision.by_label == pytest.approx(by_label, abs=1e-12)
    assert 0.05 < precision.ap < precision.ap50 < 0.95
    unknown = sum(image.labels.count("ears of a dog") for image in predicted)
    assert precision.unknown == unknown > 0
    assert capsys.readouterr().out == ""


def defined_ap(
    predicted: Sequence[Predicted], gold: Sequence[Annotated], label: str, threshold: float
) -> float:
    """Returns the average precision of a label by its definition.

    Predictions are matched greedily by score. Precision is made monotone, and its mean is taken
    over 101 points of recall.
    """
    ranked, gold_count = [], 0
    for prediction, truth in zip(predicted, gold, strict=True):
        boxes = truth.xyxy_px[[name == label for name in truth.labels]]
        gold_count += len(boxes)
        is_free = np.ones(len(boxes), bool)
        scores = [
            (-score, i)
            for i, (score, name) in enumerate(
                zip(prediction.scores, prediction.labels, strict=True)
            )
            if name == label
        ]
        for negative_score, i in sorted(scores):
            box = prediction.xyxy_px[i]
            sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
            overlap = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0)
            areas = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            iou = np.where(is_free, overlap / (areas - overlap), 0)
            is_hit = bool(len(boxes)) and iou.max() >= threshold
            if is_hit:
                is_free[iou.argmax()] = False
            ranked.append((negative_score, is_hit))
    hits = np.array([is_hit for _, is_hit in sorted(ranked, key=lambda entry: entry[0])])
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    recall = hits.cumsum() / gold_count
    best = [max(precision[recall >= point], default=0.0) for point in np.linspace(0, 1, 101)]
    return float(np.mean(best))


def test_average_precision_follows_its_definition():
    predicted, gold = random_scenes(1, 60)
    rng = np.random.default_rng(0)
    predicted = [
        image._replace(scores=rng.random(len(image.labels)).tolist()) for image in predicted
    ]
    gold = [image._replace(crowd=None) for image in gold]
    precision = average_precision(predicted, gold)
    for threshold, mean in ((0.5, precision.ap50), (0.75, precision.ap75)):
        values = [defined_ap(predicted, gold, label, threshold) for label in precision.by_label]
        assert np.mean(values) == pytest.approx(mean, abs=1e-9)


BOXES = np.array([[10.0, 10, 60, 60], [100, 10, 160, 60], [10, 100, 60, 160]])
GOLD = Annotated(BOXES, ["cat", "cat", "dog"])
NO_BOXES = np.zeros((0, 4))


def test_right_answers_give_1_and_no_answers_give_0():
    right = Predicted(BOXES, GOLD.labels, [0.1, 0.2, 0.3])
    precision = average_precision([right], [GOLD])
    assert precision[:4] == pytest.approx((1, 1, 1, 1))
    assert precision.by_label == pytest.approx({"cat": 1, "dog": 1})
    assert average_precision([Predicted(NO_BOXES, [])], [GOLD])[:4] == (0, 0, 0, 0)
    wrong_labels = right._replace(labels=["dog", "dog", "cat"])
    assert average_precision([wrong_labels], [GOLD]).ap == 0


def test_without_ground_truth_there_is_no_average():
    for predicted in ([], [Predicted(BOXES, ["a", "b", "c"])]):
        precision = average_precision(predicted, [Annotated(NO_BOXES, [])] * len(predicted))
        assert all(map(math.isnan, precision[:4]))
        assert precision.by_label == {}
        assert precision.unknown == 3 * len(predicted)
    crowd = Annotated(BOXES, ["cat"] * 3, np.ones(3, bool))
    assert math.isnan(average_precision([Predicted(BOXES, ["cat"] * 3)], [crowd]).ap)


def test_a_false_positive_in_an_image_without_the_label_costs():
    right = Predicted(BOXES[:1], ["cat"], [0.5])
    wrong = Predicted(BOXES[:1], ["cat"], [0.9])
    gold = [Annotated(BOXES[:1], ["cat"]), Annotated(NO_BOXES, [])]
    assert average_precision([right, wrong], gold).ap == pytest.approx(0.5)


def test_labels_without_ground_truth_are_counted_and_cost_nothing():
    labels = [*GOLD.labels, "cow", "cow", "pig"]
    precision = average_precision([Predicted(np.concatenate([BOXES, BOXES]), labels)], [GOLD])
    assert precision.ap == pytest.approx(1)
    assert precision.unknown == 3


def test_without_scores_the_order_ranks_the_boxes():
    """First boxes of all images come before second boxes. So a wrong second box costs nothing."""
    wrong = np.array([[300.0, 300, 350, 350]])
    right = [BOXES[i : i + 1] for i in range(2)]
    gold = [Annotated(box, ["cat"]) for box in right]
    right_first = [Predicted(np.concatenate([box, wrong]), ["cat", "cat"]) for box in right]
    wrong_first = [Predicted(np.concatenate([wrong, box]), ["cat", "cat"]) for box in right]
    assert average_precision(right_first, gold).ap == pytest.approx(1)
    assert average_precision(wrong_first, gold).ap == pytest.approx(0.5)
    with_scores = [image._replace(scores=[1.0, 0.5]) for image in right_first]
    assert average_precision(with_scores, gold) == average_precision(right_first, gold)


def test_boxes_without_area_match_nothing_and_cost():
    bad = np.array([[np.nan] * 4, [60, 60, 10, 10], [0, 0, np.inf, 5], [10, 10, 10, 60]])
    gold = [Annotated(BOXES[:1], ["cat"])]
    assert average_precision([Predicted(bad, ["cat"] * 4)], gold).ap == 0
    right_last = Predicted(np.concatenate([bad, BOXES[:1]]), ["cat"] * 5)
    assert average_precision([right_last], gold).ap == pytest.approx(0.2)


def test_the_order_of_images_does_not_matter():
    predicted, gold = random_scenes(2, 40)
    order = np.random.default_rng(0).permutation(40)
    predicted = [
        image._replace(scores=(np.arange(len(image.labels)) + i / 40).tolist())
        for i, image in enumerate(predicted)
    ]
    shuffled = average_precision([predicted[i] for i in order], [gold[i] for i in order])
    np.testing.assert_allclose(shuffled[:4], average_precision(predicted, gold)[:4], atol=1e-12)


def test_bad_numbers_are_refused():
    predicted = Predicted(BOXES, GOLD.labels, [1, 2, 3])
    with pytest.raises(UserError, match="1 of 2 images have scores"):
        average_precision([predicted, predicted._replace(scores=None)], [GOLD, GOLD])
    with pytest.raises(UserError, match=r"image 1: the score nan of a box of 'dog' is not finite"):
        average_precision([predicted._replace(scores=[1, 2, math.nan])], [GOLD])
    bad_boxes = BOXES.copy()
    bad_boxes[0, 0] = math.nan
    message = r"image 1: the gold box \[nan, 10\.0, 60\.0, 60\.0\] of 'cat' is not finite"
    with pytest.raises(UserError, match=message):
        average_precision([predicted], [GOLD._replace(xyxy_px=bad_boxes)])


def test_each_image_may_have_its_own_label():
    """Every phrase is a label, as in referring expressions. The work grows with the boxes.

    It does not grow with the number of labels times the number of images.
    """
    corner = np.random.default_rng(0).uniform(0, 500, (2000, 2))
    boxes = np.concatenate([corner, corner + 50], axis=1)
    gold = [Annotated(boxes[i : i + 1], [str(i)]) for i in range(2000)]
    predicted = [Predicted(boxes[i : i + 1], [str(i)]) for i in range(2000)]
    precision = average_precision(predicted, gold)
    assert precision.ap == pytest.approx(1)
    assert len(precision.by_label) == 2000
