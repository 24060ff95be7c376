"""Average precision: equal to pycocotools on files of COCO's form, and to its definition; and what the protocol leaves open."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pg_ground.evals.detection import Annotated, Predicted, average_precision
from pg_ground.types import UserError

LABELS = ("cat", "dog", "red circle", "ears of a dog")


def scene(rng: np.random.Generator) -> tuple[Predicted, Annotated]:
    """Returns an image's gold boxes, some of them crowds, and predictions: good, doubled, of other labels, missing, made up."""
    count = rng.integers(0, 12)
    corner = rng.uniform(0, 500, (count, 2))
    gold = np.concatenate([corner, corner + rng.uniform(2, 140, (count, 2))], axis=1)
    labels = [LABELS[i] for i in rng.integers(0, 3, count)]
    picked = rng.integers(0, max(count, 1), rng.integers(0, 2 * count + 1))
    noisy = np.sort(
        (gold[picked] + rng.normal(0, 8, (len(picked), 4))).reshape(-1, 2, 2), axis=1
    ).reshape(-1, 4)
    named = [labels[i] if rng.random() < 0.8 else LABELS[rng.integers(0, 4)] for i in picked]
    made_up = np.tile(rng.uniform(0, 500, (3, 2)), 2) + np.array([0, 0, 60, 40])
    boxes = np.concatenate([noisy, made_up])
    names = [*named, "cat", "dog", "red circle"]
    scores = np.round(rng.random(len(names)), 2).tolist()  # so that some are equal
    return Predicted(boxes, names, scores), Annotated(gold, labels, rng.random(count) < 0.1)


def scenes(seed: int, count: int) -> tuple[list[Predicted], list[Annotated]]:
    rng = np.random.default_rng(seed)
    both = [scene(rng) for _ in range(count)]
    return [mine for mine, _ in both], [gold for _, gold in both]


def by_coco(predicted, gold, folder) -> tuple[float, ...]:
    """Returns ap, ap50, ap75, ar100 and the ap of each label: files of COCO's form, read and judged by pycocotools alone."""
    categories = [
        {"id": i + 7, "name": name}
        for i, name in enumerate(sorted({one for image in gold for one in image.labels}))
    ]
    ids = {one["name"]: one["id"] for one in categories}
    whole = {
        "images": [{"id": 100 + i, "width": 640, "height": 640} for i in range(len(gold))],
        "categories": categories,
    }
    whole["annotations"], results = [], []
    for i, (mine, theirs) in enumerate(zip(predicted, gold, strict=True)):
        for (x1, y1, x2, y2), label, crowd in zip(
            theirs.xyxy_px.tolist(), theirs.labels, theirs.crowd, strict=True
        ):
            one = {
                "image_id": 100 + i,
                "category_id": ids[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": int(crowd),
            }
            whole["annotations"].append(
                one | {"id": len(whole["annotations"]) + 1, "area": (x2 - x1) * (y2 - y1)}
            )
        for (x1, y1, x2, y2), label, score in zip(
            mine.xyxy_px.tolist(), mine.labels, mine.scores, strict=True
        ):
            if label in ids:
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                results.append({"image_id": 100 + i, "category_id": ids[label]} | box)
    (folder / "gold.json").write_text(json.dumps(whole))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "gold.json"))
        judge = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    each = {name: judge.eval["precision"][:, :, k, 0, -1].mean() for k, name in enumerate(ids)}
    return (*(judge.stats[i] for i in (0, 1, 2, 8)), each)


def test_average_precision_equals_pycocotools(tmp_path, capsys):
    predicted, gold = scenes(0, 200)
    found = average_precision(predicted, gold)
    *theirs, each = by_coco(predicted, gold, tmp_path)
    np.testing.assert_allclose(found[:4], theirs, atol=1e-12)
    assert found.by_label == pytest.approx(each, abs=1e-12)
    assert 0.05 < found.ap < found.ap50 < 0.95
    assert found.unknown == sum(image.labels.count("ears of a dog") for image in predicted) > 0
    assert capsys.readouterr().out == ""


def plain_ap(predicted, gold, label: str, threshold: float) -> float:
    """Returns average precision from its definition: greedy matching by score, precision made monotone, 101 points of recall."""
    rows, there = [], 0
    for mine, theirs in zip(predicted, gold, strict=True):
        boxes = theirs.xyxy_px[[one == label for one in theirs.labels]]
        there += len(boxes)
        free = np.ones(len(boxes), bool)
        own = [
            (-score, i)
            for i, (score, one) in enumerate(zip(mine.scores, mine.labels, strict=True))
            if one == label
        ]
        for score, i in sorted(own):
            box = mine.xyxy_px[i]
            sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
            overlap = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0)
            areas = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
            iou = np.where(free, overlap / (areas - overlap), 0)
            hit = bool(len(boxes)) and iou.max() >= threshold
            if hit:
                free[iou.argmax()] = False
            rows.append((score, hit))
    hits = np.array([hit for _, hit in sorted(rows, key=lambda row: row[0])])
    precision, recall = hits.cumsum() / np.arange(1, len(hits) + 1), hits.cumsum() / there
    return float(
        np.mean([max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)])
    )


def test_average_precision_is_what_it_is_defined_as():
    predicted, gold = scenes(1, 60)
    rng = np.random.default_rng(0)
    predicted = [one._replace(scores=rng.random(len(one.labels)).tolist()) for one in predicted]
    gold = [one._replace(crowd=None) for one in gold]
    found = average_precision(predicted, gold)
    for threshold, mean in ((0.5, found.ap50), (0.75, found.ap75)):
        assert np.mean(
            [plain_ap(predicted, gold, label, threshold) for label in found.by_label]
        ) == pytest.approx(mean, abs=1e-9)


BOXES = np.array([[10.0, 10, 60, 60], [100, 10, 160, 60], [10, 100, 60, 160]])
GOLD = Annotated(BOXES, ["cat", "cat", "dog"])
NONE = np.zeros((0, 4))


def test_right_answers_are_worth_1_and_no_answers_0():
    right = Predicted(BOXES, GOLD.labels, [0.1, 0.2, 0.3])
    found = average_precision([right], [GOLD])
    assert found[:4] == pytest.approx((1, 1, 1, 1)) and found.by_label == pytest.approx(
        {"cat": 1, "dog": 1}
    )
    assert average_precision([Predicted(NONE, [])], [GOLD])[:4] == (0, 0, 0, 0)
    assert average_precision([right._replace(labels=["dog", "dog", "cat"])], [GOLD]).ap == 0


def test_where_nothing_is_there_is_no_average():
    for predicted in ([], [Predicted(BOXES, ["a", "b", "c"])]):
        found = average_precision(predicted, [Annotated(NONE, [])] * len(predicted))
        assert (
            all(map(math.isnan, found[:4]))
            and found.by_label == {}
            and found.unknown == 3 * len(predicted)
        )
    crowd = Annotated(BOXES, ["cat"] * 3, np.ones(3, bool))
    assert math.isnan(average_precision([Predicted(BOXES, ["cat"] * 3)], [crowd]).ap)


def test_a_false_alarm_in_an_image_without_the_label_costs():
    right, wrong = Predicted(BOXES[:1], ["cat"], [0.5]), Predicted(BOXES[:1], ["cat"], [0.9])
    found = average_precision([right, wrong], [Annotated(BOXES[:1], ["cat"]), Annotated(NONE, [])])
    assert found.ap == pytest.approx(0.5)


def test_labels_that_no_gold_box_has_are_counted_and_cost_nothing():
    more = Predicted(np.concatenate([BOXES, BOXES]), [*GOLD.labels, "cow", "cow", "pig"])
    found = average_precision([more], [GOLD])
    assert found.ap == pytest.approx(1) and found.unknown == 3


def test_without_scores_what_is_written_first_is_surer():
    """In every image: first boxes stand before all second ones, so that a wrong second box costs nothing."""
    wrong = np.array([[300.0, 300, 350, 350]])
    there = [Annotated(BOXES[i : i + 1], ["cat"]) for i in range(2)]
    good_first = [
        Predicted(np.concatenate([BOXES[i : i + 1], wrong]), ["cat", "cat"]) for i in range(2)
    ]
    bad_first = [
        Predicted(np.concatenate([wrong, BOXES[i : i + 1]]), ["cat", "cat"]) for i in range(2)
    ]
    assert average_precision(good_first, there).ap == pytest.approx(1)
    assert average_precision(bad_first, there).ap == pytest.approx(0.5)
    as_scores = [one._replace(scores=[1.0, 0.5]) for one in good_first]
    assert average_precision(as_scores, there) == average_precision(good_first, there)


def test_boxes_that_are_none_match_nothing_and_cost():
    bad = np.array([[np.nan] * 4, [60, 60, 10, 10], [0, 0, np.inf, 5], [10, 10, 10, 60]])
    there = Annotated(BOXES[:1], ["cat"])
    alone = average_precision([Predicted(bad, ["cat"] * 4)], [there])
    assert alone.ap == 0
    behind = Predicted(np.concatenate([bad, BOXES[:1]]), ["cat"] * 5)
    assert average_precision([behind], [there]).ap == pytest.approx(0.2)


def test_the_order_of_images_does_not_matter():
    predicted, gold = scenes(2, 40)
    order = np.random.default_rng(0).permutation(40)
    predicted = [
        one._replace(scores=(np.arange(len(one.labels)) + i / 40).tolist())
        for i, one in enumerate(predicted)
    ]
    shuffled = average_precision([predicted[i] for i in order], [gold[i] for i in order])
    np.testing.assert_allclose(shuffled[:4], average_precision(predicted, gold)[:4], atol=1e-12)


def test_bad_numbers_are_refused():
    one = Predicted(BOXES, GOLD.labels, [1, 2, 3])
    with pytest.raises(UserError, match="1 of 2 images have scores"):
        average_precision([one, one._replace(scores=None)], [GOLD, GOLD])
    with pytest.raises(UserError, match=r"image 1: the score nan of a box of 'dog' is not finite"):
        average_precision([one._replace(scores=[1, 2, math.nan])], [GOLD])
    with pytest.raises(
        UserError,
        match=r"image 1: the gold box \[nan, 10\.0, 60\.0, 60\.0\] of 'cat' is not finite",
    ):
        average_precision(
            [one],
            [GOLD._replace(xyxy_px=BOXES * [[math.nan, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])],
        )


def test_each_image_may_have_a_label_of_its_own():
    """One phrase for each image, as in referring expressions: the work grows with the boxes, not with labels times images."""
    corner = np.random.default_rng(0).uniform(0, 500, (2000, 2))
    boxes = np.concatenate([corner, corner + 50], axis=1)
    gold = [Annotated(boxes[i : i + 1], [str(i)]) for i in range(2000)]
    found = average_precision([Predicted(boxes[i : i + 1], [str(i)]) for i in range(2000)], gold)
    assert found.ap == pytest.approx(1) and len(found.by_label) == 2000
