"""`evaluate --coco --supervision --lmms_eval --vlmevalkit`: other programs score the files as we
do."""

import base64
import contextlib
import csv
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pg_ground.evals import exports

LABELS = ("cat", "dog", "red circle", "<loc> & é")


def write_rows(
    path: Path, benchmark: str, count: int, with_scores: bool, seed: int = 0, images: int = 7
) -> None:
    """Writes a predictions.jsonl of `count` answers with 0 to 6 boxes each."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        total = 1 if benchmark == "rec" else int(rng.integers(1, 6))
        corners = np.sort(rng.random((total, 2, 2)), axis=1).reshape(total, 4) * np.tile(
            (640, 480), 2
        )
        labels = [LABELS[rng.integers(0, 3)] for _ in range(total)]
        gold = [
            {"label": label, "xyxy_px": box.tolist()}
            for label, box in zip(labels, corners, strict=True)
        ]
        boxes = []
        for box in gold:
            noisy = np.array(box["xyxy_px"]) + rng.normal(size=4) * 12
            label = box["label"] if rng.random() < 0.8 else LABELS[rng.integers(0, 4)]
            boxes.append({"label": label, "xyxy_px": noisy.tolist()})
        if rng.random() < 0.3:
            boxes.append({"label": "cat", "xyxy_px": None})
        if rng.random() < 0.2:
            boxes = []
        if with_scores:
            boxes = [box | {"score": float(rng.random())} for box in boxes]
        lines.append({
            "source": "val", "benchmark": benchmark, "id": i, "image": f"{i % images}.jpg",
            "size_px": [640, 480], "mode": "greedy", "rollout": 0, "prompt": f"detect {i}",
            "text": "", "prediction": {"boxes": boxes}, "gold": {"boxes": gold},
        })  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluate(path: Path, *flags: str) -> dict:
    """Runs the command and returns the content of eval.json."""
    out = path.parent / "out"
    finished = run_here("evaluate", f"--predictions={path}", f"--out={out}", *flags)
    assert finished.returncode == 0, finished.stderr
    return json.loads((out / "eval.json").read_text())


@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize("images", [1, 7, 40])
def test_pycocotools_computes_our_ap_from_the_files(tmp_path, with_scores, images):
    write_rows(tmp_path / "p.jsonl", "detection", 40, with_scores, seed=images, images=images)
    ours = evaluate(tmp_path / "p.jsonl", "--coco")
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO(tmp_path / "out" / "coco_gold.json")
        evaluator = COCOeval(
            gold, gold.loadRes(str(tmp_path / "out" / "coco_results.json")), "bbox"
        )
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = {1: "ap50", 2: "ap75", 0: "ap"}
    assert 0.05 < ours["ap50"] < 1
    for number, name in names.items():
        np.testing.assert_allclose(evaluator.stats[number], ours[name], atol=1e-12)
    assert {category["name"] for category in gold.cats.values()} <= set(LABELS)
    assert len(gold.imgs) <= 40 and all("jpg" in image["file_name"] for image in gold.imgs.values())


def test_rows_of_one_image_with_other_labels_are_one_image(tmp_path):
    write_rows(tmp_path / "p.jsonl", "detection", 2, True, images=1)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for row, label in zip(rows, ("cat", "dog"), strict=True):
        for box in row["gold"]["boxes"] + row["prediction"]["boxes"]:
            box["label"] = label
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(tmp_path / "p.jsonl", "--coco")
    images = json.loads((tmp_path / "out" / "coco_gold.json").read_text())["images"]
    assert images == [{"id": 1, "file_name": "0.jpg", "width": 640, "height": 480}]


def test_supervision_reads_the_detections(tmp_path):
    supervision = pytest.importorskip("supervision")
    write_rows(tmp_path / "p.jsonl", "detection", 12, True)
    evaluate(tmp_path / "p.jsonl", "--supervision")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    lines = (tmp_path / "out" / "supervision.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    for text, row in zip(lines, rows, strict=True):
        line = json.loads(text)
        detections = supervision.Detections(
            xyxy=np.array(line["xyxy"], float).reshape(-1, 4),
            confidence=np.array(line["confidence"], float),
            class_id=np.array(line["class_id"], int),
            data={"class_name": np.array(line["class_name"], str)},
        )
        boxes = [box for box in row["prediction"]["boxes"] if box["xyxy_px"] is not None]
        assert len(detections) == len(boxes)
        for i, box in enumerate(boxes):
            np.testing.assert_array_equal(detections.xyxy[i], box["xyxy_px"])
            assert detections.data["class_name"][i] == box["label"]
            assert detections.confidence[i] == box["score"]


def test_lines_for_supervision_have_equal_lengths_and_no_unreadable_box(tmp_path):
    write_rows(tmp_path / "p.jsonl", "detection", 12, False)
    evaluate(tmp_path / "p.jsonl", "--supervision")
    for text in (tmp_path / "out" / "supervision.jsonl").read_text().splitlines():
        line = json.loads(text)
        lengths = {len(line[name]) for name in ("xyxy", "confidence", "class_id", "class_name")}
        assert len(lengths) == 1 and None not in line["xyxy"]
        assert line["image"].endswith(".jpg") and line["size_px"] == [640, 480]


def plain_accuracy(path: Path) -> float:
    """Returns the share of samples whose first box has an IoU of at least .5, by the samples."""
    hits = []
    for text in path.read_text().splitlines():
        sample = json.loads(text)
        answer = sample["filtered_resps"][0]
        a = [float(value) for value in answer.strip("[]").split(", ")] if answer else [0.0] * 4
        b = sample["doc"]["bbox"]
        width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        hits.append(width * height / (sum(areas) - width * height) >= 0.5)
    return float(np.mean(hits))


def test_samples_for_lmms_eval_have_our_accuracy(tmp_path):
    write_rows(tmp_path / "p.jsonl", "rec", 60, False)
    ours = evaluate(tmp_path / "p.jsonl", "--lmms_eval")
    assert 0.2 < ours["acc50"] < 1
    assert plain_accuracy(tmp_path / "out" / "lmms_eval.jsonl") == pytest.approx(ours["acc50"])


def test_lmms_eval_scores_the_samples_as_we_do(tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("lmms_eval")
    task = importlib.import_module("lmms_eval.tasks.refcoco.utils_rec")
    write_rows(tmp_path / "p.jsonl", "rec", 60, False)
    ours = evaluate(tmp_path / "p.jsonl", "--lmms_eval")
    lines = (tmp_path / "out" / "lmms_eval.jsonl").read_text().splitlines()
    results = [
        task.refcoco_bbox_rec_process_result(sample["doc"], sample["filtered_resps"])
        for sample in map(json.loads, lines)
    ]
    scored = [result["refcoco_ACC@0.5"] for result in results]
    accuracy = task.refcoco_bbox_rec_aggregation_result(scored, "ACC@0.5")
    assert accuracy == pytest.approx(ours["acc50"])


# VLMEvalKit


def write_boxes(path: Path, boxes: list, gold: list, **fields: object) -> None:
    """Writes a predictions.jsonl with a question for each pair of boxes."""
    write_rows(path, "rec", len(boxes), False)
    rows = [json.loads(line) | fields for line in path.read_text().splitlines()]
    for row, box, target in zip(rows, boxes, gold, strict=True):
        row["prediction"] = {"boxes": [{"label": "cat", "xyxy_px": box}]}
        row["gold"] = {"boxes": [{"label": "cat", "xyxy_px": target}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def plain_precision(folder: Path) -> dict[str, float]:
    """Returns the share of hits by split, by VLMEvalKit's rules of coordinates.

    Four numbers up to 1.5 are fractions, up to 1000 they are thousandths, and else they are pixels.
    The corners of a box can have any order, and a box ends at the border of the image.
    """
    answers = {
        row["index"]: row["prediction"] for row in read_tsv(folder / "vlmevalkit_predictions.tsv")
    }
    hits: dict[str, list[bool]] = {}
    for row in read_tsv(folder / "vlmevalkit.tsv"):
        assert len(base64.b64decode(row["image"], validate=True)) > 48
        size = np.array([float(row["width"]), float(row["height"])])
        b = np.array([float(row[f"bbox_{name}"]) for name in ("x1", "y1", "x2", "y2")])
        text = answers.pop(row["index"])
        a = np.array([float(number) for number in text.strip("[]").split(",") if number] or [0] * 4)
        scale = size if a.max() <= 1.5 else size / 1000 if a.max() <= 1000 else 1
        corners = np.clip(np.sort(a.reshape(2, 2) * scale, axis=0), 0, size)
        overlap = np.clip(
            np.minimum(corners[1], b[2:]) - np.maximum(corners[0], b[:2]), 0, None
        ).prod()
        union = (corners[1] - corners[0]).prod() + (b[2:] - b[:2]).prod() - overlap
        hits.setdefault(row["split"], []).append(bool(overlap / union >= 0.5))
    assert not answers
    return {split: float(np.mean(values)) for split, values in hits.items()}


def write_inside(path: Path, seed: int) -> None:
    """Writes 60 questions whose predicted boxes lie in the image. Some have no answer, or corners
    in the wrong order."""
    write_rows(path, "rec", 60, False, seed=seed)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        for box in row["prediction"]["boxes"]:
            if box["xyxy_px"] is not None:
                box["xyxy_px"] = np.clip(box["xyxy_px"], 0, [640, 480] * 2).tolist()
                if i % 9 == 0:
                    box["xyxy_px"] = box["xyxy_px"][2:] + box["xyxy_px"][:2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plain_reader_of_the_files_for_vlmevalkit_has_our_accuracy(tmp_path, seed):
    write_inside(tmp_path / "p.jsonl", seed)
    ours = evaluate(tmp_path / "p.jsonl", "--vlmevalkit")
    assert 0.2 < ours["acc50"] < 1
    assert plain_precision(tmp_path / "out") == {"val": pytest.approx(ours["acc50"])}


def test_vlmevalkit_scores_the_files_as_we_do(tmp_path, monkeypatch):
    pytest.importorskip("vlmeval")
    task = importlib.import_module("vlmeval.dataset.refcoco")
    write_inside(tmp_path / "p.jsonl", 0)
    ours = evaluate(tmp_path / "p.jsonl", "--vlmevalkit")
    monkeypatch.setenv("LMUData", str(tmp_path / "out"))
    dataset = task.RefCOCODataset("vlmevalkit")
    table = dataset.evaluate(str(tmp_path / "out" / "vlmevalkit_predictions.tsv"))
    scores = dict(zip(table["Split"], table["Precision@1"], strict=True))
    assert scores["val"] == pytest.approx(100 * ours["acc50"])


@pytest.mark.parametrize(
    ("size", "box", "gold", "hit"),
    [
        ([640, 480], [0, 0, 600, 400], [0, 0, 600, 400], 1),  # pixels would be thousandths
        ([2000, 1500], [1200, 900, 1900, 1400], [1200, 900, 1900, 1400], 1),
        ([640, 480], [300, 200, 300, 400], [0, 0, 600, 400], 0),  # no width
        ([640, 480], [600, 400, 0, 0], [0, 0, 600, 400], 0),  # corners in the wrong order
        ([640, 480], None, [0, 0, 600, 400], 0),
        ([1000, 10], [0, 0, 0.5, 9], [0, 0, 0.5, 9], 1),  # numbers below 1.5 are pixels here
        (None, [30, 20, 300, 400], [30, 20, 300, 400], 1),  # the size is unknown
        (None, [30, 20, 90, 400], [30, 20, 300, 400], 0),
        ([640, 480], [-900, 0, 2000, 480], [0, 0, 640, 480], 1),  # cut at the border
    ],
)
def test_boxes_for_vlmevalkit_have_its_scale(tmp_path, size, box, gold, hit):
    write_boxes(tmp_path / "p.jsonl", [box], [gold], size_px=size)
    evaluate(tmp_path / "p.jsonl", "--vlmevalkit")
    assert plain_precision(tmp_path / "out") == {"val": hit}


@pytest.mark.parametrize(
    ("benchmark", "split"),
    [
        ("refcoco_testA", "RefCOCO_testA"),
        ("refcoco+_val", "RefCOCO+_val"),
        ("refcocog_test", "RefCOCOg_test"),
        ("lisa_grounding", "val"),
    ],
)
def test_splits_have_the_names_of_vlmevalkit(tmp_path, benchmark, split):
    boxes = [[0, 0, 9, 9]]
    write_boxes(tmp_path / "p.jsonl", boxes, boxes, benchmark=benchmark, prompt='a "b"\n\tc')
    # `evaluate` refuses a part of a benchmark's questions.
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    exports.write_exports(tmp_path, rows, ["vlmevalkit"])
    assert plain_precision(tmp_path) == {split: 1.0}
    for name in ("vlmevalkit", "vlmevalkit_predictions"):
        assert read_tsv(tmp_path / f"{name}.tsv")[0]["question"] == 'a "b"\n\tc'


# files that cannot be written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coco"], "--coco writes a file: --out=DIR is needed"),
        (["--lmms_eval", "--out=OUT"], "--lmms_eval needs questions with one gold box: none of 3"),
        (["--vlmevalkit", "--out=OUT"], "--vlmevalkit needs questions with one gold box: none of"),
    ],
)
def test_files_that_cannot_be_written_are_errors(tmp_path, flags, message):
    write_rows(tmp_path / "p.jsonl", "detection", 3, True, seed=5)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for row in rows:
        row["gold"]["boxes"] *= 2
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    finished = run_here("evaluate", f"--predictions={tmp_path / 'p.jsonl'}", *flags)
    assert finished.returncode == 2 and message in finished.stderr


def test_rows_without_boxes_are_an_error(tmp_path):
    row = {
        "source": "a", "benchmark": "counting", "id": 0, "image": "a.jpg", "size_px": [8, 8],
        "mode": "greedy", "rollout": 0, "prompt": "how many", "text": "3",
        "prediction": {"number": 3}, "gold": {"number": 3},
    }  # fmt: skip
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    finished = run_here(
        "evaluate", f"--predictions={tmp_path / 'p.jsonl'}", f"--out={tmp_path}", "--supervision"
    )
    assert finished.returncode == 2
    assert "--supervision writes boxes, but none of 1 rows has boxes" in finished.stderr
