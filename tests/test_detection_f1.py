"""F1 over labels: from COCO's files and files of predictions to the metrics of the protocol."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_here
from conftest import PG1
from PIL import Image
from test_eval_runner import copying_programs

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.evals import benchmarks, detection_f1, runner
from pg_ground.evals.runner import EvalContext
from pg_ground.parallel import sharding
from pg_ground.tokenizer import load as load_tokenizer

# A model


@pytest.mark.parametrize("ask", ["category", "image"])
@pytest.mark.parametrize(
    "image",
    [
        {"file_name": "val2017/1.jpg"},  # COCO
        {"coco_url": "http://images.cocodataset.org/val2017/1.jpg"},  # LVIS v1
    ],
)
def test_a_model_is_measured_on_the_files_of_coco_and_lvis(ask, image, tmp_path):
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "val2017" / "1.jpg")
    boxes = {1: [[4, 6, 20, 30], [40, 10, 16, 20]], 2: [[2, 2, 50, 40]]}
    lvis = {
        "images": [
            {
                **image,
                "id": 1,
                "width": 64,
                "height": 48,
                "neg_category_ids": [3],
                "not_exhaustive_category_ids": [],
            }
        ],
        "annotations": [
            {"id": 10 * c + i, "image_id": 1, "category_id": c, "bbox": box, "area": 1.0}
            for c in boxes
            for i, box in enumerate(boxes[c])
        ],
        "categories": [{"id": i, "name": n} for i, n in ((1, "cat"), (2, "hot dog"), (3, "zoo"))],
    }
    (tmp_path / "lvis_v1_val.json").write_text(json.dumps(lvis))
    source = Source(
        uri=f"coco:{tmp_path}/lvis_v1_val.json?ask={ask}&images={tmp_path}",
        phrase="category" if ask == "category" else "phrase",
        boxes="boxes",
        box_format="xywh_px",
        label="" if ask == "category" else "categories",
        prompt="detect {phrase}" if ask == "category" else "detect all classes",
        name="{phrase}" if ask == "category" else "",
    )
    settings = config.Eval(
        sources={"lvis": source}, benchmarks={"lvis": "detection_f1"}, batch_size=1, rollouts=0
    )
    data = config.Data(prompt_length=32, suffix_length=64, max_boxes=4)
    tokenizer = load_tokenizer()
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, data, 0, tokenizer, mesh, BadRecords())
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    result = runner.evaluate_sources(copying_programs(tokenizer, settings), {}, sources, context)
    assert result.metrics["eval/lvis/f1_50"] == result.metrics["eval/lvis/macro_f1_50"] == 1
    assert result.metrics["eval/lvis/questions"] == (2 if ask == "category" else 1)
    hits = [row["by_label"] for row in result.predictions]
    assert {label: counts[:3] for row in hits for label, counts in row.items()} == {
        "cat": [2, 2, 2],
        "hot dog": [1, 1, 1],
    }


# Files of predictions


def evaluate_file(folder: Path, rows: Sequence[dict[str, Any]], *flags: str) -> dict[str, Any]:
    path = folder / "answers.json"
    path.write_text(json.dumps(rows))
    result = run_here(
        "evaluate",
        f"--predictions={path}",
        "--benchmark=detection_f1",
        "--fields=pred=answer,gold=boxes",
        f"--out={folder}",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "eval.json").read_text()) | {"printed": result.stdout}


CAT, DOG = [10, 10, 60, 60], [80, 80, 120, 120]
ROWS = [
    # cat: one hit of two predictions; dog: no prediction
    {
        "answer": {"cat": [CAT, [200, 200, 240, 240]]},
        "boxes": {"cat": [CAT], "dog": [DOG]},
        "image": "1.jpg",
    },
    # cat: a hit at IoU .5 but not at .95; a bird is no label of the file
    {"answer": {"cat": [[10, 10, 60, 50]], "bird": [DOG]}, "boxes": {"cat": [CAT]}, "image": "2"},
    # dog: one of two, at IoU 1
    {"answer": {"dog": [DOG]}, "boxes": {"dog": [DOG, CAT]}, "image": "3.jpg"},
    # zebra: never predicted
    {"answer": {}, "boxes": {"zebra": [CAT]}, "image": "4.jpg"},
]


def test_the_command_reports_published_and_macro_means(tmp_path):
    report = evaluate_file(tmp_path, ROWS)
    # cat: precision 2/3 and recall 2/2 at .5; 1/3 and 1/2 at .95. dog: 1/1 and 1/3
    assert report["precision_50"] == pytest.approx((2 / 3 + 1) / 2)
    assert report["recall_50"] == pytest.approx((1 + 1 / 3) / 2)
    p, r = 5 / 6, 2 / 3
    assert report["f1_50"] == pytest.approx(2 * p * r / (p + r))
    p, r = (1 / 3 + 1) / 2, (1 / 2 + 1 / 3) / 2
    assert report["f1_95"] == pytest.approx(2 * p * r / (p + r))
    # zebra counts with 0 in the macro mean
    p, r = (2 / 3 + 1) / 3, (1 + 1 / 3) / 3
    assert report["macro_f1_50"] == pytest.approx(2 * p * r / (p + r))
    # an IoU of .8 is a hit at the first seven thresholds
    p = (2 / 3 * 7 + 1 / 3 * 3) / 10
    assert report["precision_mean"] == pytest.approx((p + 1) / 2)
    assert report["protocol"] == benchmarks.DETECTION_F1
    for name in ("f1_mean", "f1_50", "f1_95", "macro_f1_mean", "precision_50"):
        low, high = report["intervals"][name]
        assert low <= report[name] <= high and low < high
    assert "f1_mean" in report["printed"] and "%" in report["printed"]


@pytest.mark.parametrize("answer", [[[1, 2, 3]], '[{"bbox_2d": [1, 2], "label": "cat"}]'])
def test_an_unreadable_box_is_a_wrong_box(answer, tmp_path):
    rows = [{"answer": answer, "boxes": {"": [CAT]}}, {"answer": [CAT], "boxes": {"": [CAT]}}]
    report = evaluate_file(tmp_path, rows)
    assert report["recall_50"] == 1 / 2 and report["invalid"] == 1


def test_a_duplicate_is_a_wrong_box(tmp_path):
    report = evaluate_file(tmp_path, [{"answer": {"a": [CAT] * 10}, "boxes": {"a": [CAT]}}])
    assert report["precision_mean"] == 1 / 10 and report["recall_mean"] == 1
    assert report["duplicates_per_image"] == 9


def test_rows_of_this_package_give_the_same_numbers(tmp_path):
    report = evaluate_file(tmp_path, ROWS)
    result = run_here(
        "evaluate", f"--predictions={tmp_path}/predictions.jsonl", f"--out={tmp_path}/again"
    )
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "again" / "eval.json").read_text())
    for name in ("f1_mean", "macro_f1_95", "recall_mean", "intervals"):
        assert again[name] == report[name]


def test_a_file_without_targets_has_no_f1(tmp_path):
    report = evaluate_file(tmp_path, [{"answer": {"a": [CAT]}, "boxes": []}])
    assert "f1_mean" not in report and report["duplicates_per_image"] == 0


# The law: a plain implementation in loops


def plain_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def plain_metrics(images: Sequence[tuple[list[Any], list[Any]]]) -> dict[str, float]:
    """Each image is its predicted and its ground-truth boxes, as (label, box)."""
    labels = sorted({label for _, gold in images for label, _ in gold})
    precision: dict[str, list[float]] = {label: [] for label in labels}
    recall: dict[str, list[float]] = {label: [] for label in labels}
    for percent in range(50, 100, 5):
        for label in labels:
            true_positive = predicted_count = gold_count = 0
            for predicted, gold in images:
                targets = [box for name, box in gold if name == label]
                used = [False] * len(targets)
                for name, box in predicted:
                    if name != label:
                        continue
                    predicted_count += 1
                    best, best_target = percent / 100, None
                    for index, target in enumerate(targets):
                        if not used[index] and plain_iou(box, target) >= best:
                            best, best_target = plain_iou(box, target), index
                    if best_target is not None:
                        used[best_target] = True
                        true_positive += 1
                gold_count += len(targets)
            precision[label].append(true_positive / predicted_count if predicted_count else 0)
            recall[label].append(true_positive / gold_count)
    metrics = {}
    for suffix, chosen in (("50", [0]), ("95", [9]), ("mean", range(10))):
        published, macro = [], []
        for name, values in (("precision", precision), ("recall", recall)):
            averages = [sum(values[label][t] for t in chosen) / len(chosen) for label in labels]
            positive = [value for value in averages if value > 0]
            published.append(sum(positive) / len(positive) if positive else 0)
            macro.append(sum(averages) / len(averages))
            metrics[f"{name}_{suffix}"] = published[-1]
        for name, (p, r) in (("f1", published), ("macro_f1", macro)):
            metrics[f"{name}_{suffix}"] = 2 * p * r / (p + r) if p + r else 0
    return metrics


def random_image(rng: np.random.Generator, labels: int) -> tuple[list[Any], list[Any]]:
    gold = []
    for _ in range(rng.integers(0, 6)):
        x, y = rng.integers(0, 60, 2)
        width, height = rng.integers(4, 40, 2)
        gold.append((f"l{rng.integers(labels)}", [x, y, x + width, y + height]))
    predicted = []
    for label, (x1, y1, x2, y2) in gold:
        step = rng.choice([0, 1, 3, 8])
        if rng.random() < 0.8:
            shift = rng.integers(-step, step + 1, 2)
            box = [x1 + shift[0], y1 + shift[1], x2 + shift[0], y2]
            name = label if rng.random() < 0.9 else "l0"
            predicted.append((name, [*box[:3], max(box[3], box[1] + 1)]))
        if rng.random() < 0.2:
            predicted.append(predicted[-1] if predicted else ("other", [1, 1, 9, 9]))
    rng.shuffle(predicted)
    to_float = lambda pairs: [(str(name), [float(v) for v in box]) for name, box in pairs]  # noqa: E731
    return to_float(predicted), to_float(gold)


def to_row(number: int, image: tuple[list[Any], list[Any]]) -> dict[str, Any]:
    predicted, gold = (
        {"boxes": [{"label": label, "xyxy_px": box} for label, box in side]} for side in image
    )
    return {
        "source": "s",
        "benchmark": "detection_f1",
        "id": number,
        "image": f"{number}.jpg",
        "size_px": None,
        "mode": "greedy",
        "rollout": 0,
        "prompt": "",
        "text": "",
        "prediction": predicted,
        "gold": gold,
    }


def test_1000_random_images_equal_the_plain_implementation():
    rng = np.random.default_rng(0)
    images = [random_image(rng, labels=1 + number % 7) for number in range(1000)]
    rows = benchmarks.score_rows([to_row(*pair) for pair in enumerate(images)])
    seen = set()
    for start in range(0, 1000, 10):  # 100 files of ten images
        part = slice(start, start + 10)
        values = benchmarks.compute_metrics(rows[part]).values
        expected = plain_metrics(images[part])
        assert {name: values[name] for name in expected} == pytest.approx(expected)
        seen.add(round(expected["f1_mean"], 6))
    assert len(seen) > 90
    values = benchmarks.compute_metrics(rows).values
    expected = plain_metrics(images)
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert expected["f1_95"] < expected["f1_mean"] < expected["f1_50"]


def test_the_interval_of_f1_is_the_interval_of_drawn_files(monkeypatch):
    rng = np.random.default_rng(1)
    images = [random_image(rng, labels=3) for _ in range(12)]
    rows = benchmarks.score_rows([to_row(*pair) for pair in enumerate(images)])
    replicates = [
        plain_metrics([images[i] for i in range(12) for _ in range(int(draws[i]))])["f1_mean"]
        for batch in detection_f1.draw_counts(12)
        for draws in batch[:200]
    ]
    monkeypatch.setattr(detection_f1, "draw_counts", lambda n: [next(DRAWS(n))[:200]])
    monkeypatch.setattr(detection_f1, "MAX_CELLS", 500)  # several parts
    low, high = detection_f1.ranges(rows)["f1_mean"]
    assert [low, high] == pytest.approx(np.percentile(replicates, (2.5, 97.5)), abs=1e-6)


DRAWS = detection_f1.draw_counts
