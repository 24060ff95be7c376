"""gRefCOCO and GREC: from the published files and from files of predictions to the metrics."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call, run_here
from conftest import PG1
from PIL import Image
from test_eval_runner import copying_programs

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.records import BadRecord
from pg_ground.data.refer import open_refer
from pg_ground.evals import benchmarks, runner
from pg_ground.evals.runner import EvalContext
from pg_ground.parallel import sharding
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

# gRefCOCO's files

SENTENCES = {
    "two": ("the two people on the left", [11, 12]),
    "one": ("man in red", [11]),
    "none": ("the blue elephant", [-1]),
}
BOXES = {11: [4, 6, 20, 30], 12: [40, 10, 16, 20], 13: [2, 2, 8, 8]}
"""Boxes of the annotations as COCO writes them."""


def write_grefcoco(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Writes gRefCOCO's two files, and the images, in miniature.

    Args:
      changes: replaces fields of the ref without a target.
    """
    (folder / "grefcoco").mkdir(parents=True)
    (folder / "images").mkdir()
    refs = [
        {
            "image_id": 581857,
            "split": split,
            "sentences": [{"tokens": [], "raw": text, "sent_id": number, "sent": text}],
            "file_name": "COCO_train2014_000000581857_16.jpg",
            "category_id": [1] * len(ids) if ids != [-1] else [-1],
            "ann_id": ids,
            "sent_ids": [number],
            "ref_id": number,
            "no_target": ids == [-1],
        }
        for number, (split, text, ids) in enumerate(
            [("val", *SENTENCES[name]) for name in SENTENCES] + [("train", "a dog", [13])]
        )
    ]
    refs[2] |= changes or {}
    (folder / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    name = "COCO_train2014_000000581857.jpg"
    coco = {
        "images": [{"id": 581857, "file_name": name, "width": 64, "height": 48}],
        "annotations": [
            {
                "id": number,
                "image_id": 581857,
                "category_id": 1,
                "bbox": box,
                "iscrowd": 0,
                "segmentation": [[box[0], box[1], box[0] + 9, box[1], box[0], box[1] + 9]],
            }
            for number, box in BOXES.items()
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "grefcoco" / "instances.json").write_text(json.dumps(coco))
    Image.new("RGB", (64, 48), "grey").save(folder / "images" / name)
    return folder


def refs_of(folder: Path, split: str = "val") -> list[dict[str, Any]]:
    records = open_refer(f"{folder}?dataset=grefcoco&split_by=unc&split={split}")
    return [records[index] for index in range(len(records))]


def test_refs_have_several_boxes_or_none(tmp_path):
    two, single, none = refs_of(write_grefcoco(tmp_path))
    assert two["boxes"] == [BOXES[11], BOXES[12]] and two["categories"] == ["person"] * 2
    assert len(two["segmentations"]) == 2 and not two["no_target"]
    assert single["boxes"] == [BOXES[11]]
    assert none["boxes"] == [] and none["no_target"] and none["width"] == 64
    for record in (two, single, none):
        assert record["image"] == "COCO_train2014_000000581857.jpg"
        assert record["sentences"][0]["raw"] in {text for text, _ in SENTENCES.values()}
    assert refs_of(tmp_path, "train")[0]["boxes"] == [BOXES[13]]


def test_a_pickle_is_read_before_the_json_as_in_the_toolkit(tmp_path):
    write_grefcoco(tmp_path)
    path = tmp_path / "grefcoco" / "grefs(unc).json"
    refs = json.loads(path.read_text())
    refs[1]["ann_id"] = [12]
    (tmp_path / "grefcoco" / "grefs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    assert refs_of(tmp_path)[1]["boxes"] == [BOXES[12]]


@pytest.mark.parametrize(
    "changes",
    [
        {"ann_id": -1},
        {"ann_id": []},
        {"ann_id": [-1], "no_target": False},
        {"ann_id": ["-1"]},
        {"ann_id": 12, "no_target": False},
    ],
)
def test_forms_of_ids(changes, tmp_path):
    boxes = refs_of(write_grefcoco(tmp_path, changes))[2]["boxes"]
    assert boxes == ([BOXES[12]] if changes["ann_id"] == 12 else [])


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"ann_id": [11], "no_target": True}, "bad_entry"),
        ({"ann_id": [99], "no_target": False}, "missing_annotation"),
        ({"ann_id": [11, None], "no_target": False}, "bad_entry"),
        ({"ann_id": None}, "missing_field"),
        ({"ann_id": [[11]], "no_target": False}, "bad_entry"),
        ({"image_id": 7}, "missing_image"),
        ({"image_id": None}, "missing_field"),
    ],
)
def test_a_damaged_ref_is_one_bad_record(changes, kind, tmp_path):
    records = open_refer(
        f"{write_grefcoco(tmp_path, changes)}?dataset=grefcoco&split_by=unc&split=val"
    )
    assert len(records) == 3 and records[0]["boxes"] and records[1]["boxes"]
    with pytest.raises(BadRecord) as bad:
        records[2]
    assert bad.value.kind == kind and len(str(bad.value)) < 200


def test_a_damaged_file_is_named(tmp_path):
    write_grefcoco(tmp_path)
    path = tmp_path / "grefcoco" / "grefs(unc).json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=r"grefs\(unc\)\.json is no JSON of refs"):
        refs_of(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="the refs files in the folder: none"):
        refs_of(tmp_path)


# A model


@pytest.mark.parametrize("benchmark", ["", "grec"])
def test_a_model_answers_questions_with_several_targets_and_none(benchmark, tmp_path):
    write_grefcoco(tmp_path)
    source = Source(
        uri=f"refer:{tmp_path}?dataset=grefcoco&split_by=unc&split=val&images={tmp_path}/images",
        phrase="sentences[].raw",
        boxes="boxes",
        box_format="xywh_px",
        empty="keep",
        name="",
    )
    named = {"grefcoco": benchmark} if benchmark else {}
    settings = config.Eval(sources={"grefcoco": source}, benchmarks=named, batch_size=2, rollouts=0)
    data = config.Data(prompt_length=32, suffix_length=32, max_boxes=4)
    tokenizer = load_tokenizer()
    context = EvalContext(
        settings, data, 0, tokenizer, sharding.make_mesh(config.Mesh(data=1)), BadRecords()
    )
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    result = runner.evaluate_sources(copying_programs(tokenizer, settings), {}, sources, context)
    assert result.metrics["eval/grefcoco/questions"] == 3 and not result.bad_records
    if benchmark:
        assert [len(row["gold"]["boxes"]) for row in result.predictions] == [2, 1, 0]
        for name in ("precision", "precision_giou", "n_acc", "t_acc", "mean_f1"):
            assert result.metrics[f"eval/grefcoco/{name}"] == 1
    else:
        assert result.predictions[0]["benchmark"] == "objects"


# Files of predictions

RECORDS = [
    # right: two targets in another order
    {"answer": [[40, 10, 56, 30], [4, 6, 24, 36]], "boxes": [[4, 6, 24, 36], [40, 10, 56, 30]]},
    # wrong: one of two targets
    {"answer": [[40, 10, 56, 30]], "boxes": [[4, 6, 24, 36], [40, 10, 56, 30]]},
    # wrong: one box too many
    {"answer": [[4, 6, 24, 36], [4, 6, 24, 36]], "boxes": [[4, 6, 24, 36]]},
    # right and wrong without a target
    {"answer": [], "boxes": []},
    {"answer": [[1, 2, 3, 4]], "boxes": []},
    # wrong: no box for a target
    {"answer": [], "boxes": [[4, 6, 24, 36]]},
]


def scored(folder: Path, records: Sequence[Mapping[str, Any]], *flags: str) -> dict[str, Any]:
    path = folder / "grec.json"
    path.write_text(json.dumps(records))
    call(
        "evaluate",
        f"--predictions={path}",
        "--benchmark=grec",
        "--fields=pred=answer,gold=boxes",
        f"--out={folder}",
        *flags,
    )
    return json.loads((folder / "eval.json").read_text())


def test_the_command_scores_a_file(tmp_path, capsys):
    records = [{**record, "image": f"{i}.jpg"} for i, record in enumerate(RECORDS)]
    report = scored(tmp_path, records)
    assert report["n"] == 6 and report["protocol"] == benchmarks.GREC
    assert report["precision"] == report["precision_giou"] == pytest.approx(2 / 6)
    assert report["n_acc"] == 1 / 2 and report["t_acc"] == 3 / 4
    for name in ("precision", "n_acc", "t_acc"):
        low, high = report["intervals"][name]
        assert low <= report[name] <= high and low < high
    assert "33.33 %" in capsys.readouterr().out


NOTHING = ["", "none", '{"bbox_2d": null}', "There is no such person.", None, [], "<eos>", "[]"]


@pytest.mark.parametrize("answer", NOTHING)
def test_an_answer_without_a_box_says_that_there_is_nothing(answer, tmp_path):
    report = scored(tmp_path, [{"answer": answer, "boxes": []}, RECORDS[0]])
    assert report["n_acc"] == report["precision"] == 1


@pytest.mark.parametrize("answer", ["[[10, 20, 30]]", [[1, 2, 3]], "<box>[[5, 6, 7]]</box>"])
def test_an_unreadable_box_is_a_box(answer, tmp_path):
    report = scored(tmp_path, [{"answer": answer, "boxes": []}, RECORDS[0]])
    assert report["n_acc"] == 0 and report["invalid"] == 1


def test_a_row_without_a_prediction_is_wrong_even_without_a_target(tmp_path):
    records = [{"boxes": []}, RECORDS[0]]
    result = run_here(
        "evaluate",
        f"--predictions={tmp_path}/grec.json",
        "--benchmark=grec",
        "--fields=pred=answer,gold=boxes",
    )
    assert result.returncode == 2
    report = scored(tmp_path, records, "--missing=wrong")
    assert report["n_acc"] == 0 and report["precision"] == 1 / 2 and report["missing"] == 1


@pytest.mark.parametrize("answer", [["{}"], ['{"bbox_2d": null}'], ["", "null"]])
def test_a_file_whose_answers_all_say_nothing_is_scored(answer, tmp_path):
    report = scored(tmp_path, [{"answer": text, "boxes": [[1, 2, 3, 4]]} for text in answer])
    assert report["t_acc"] == 0


# The law: a plain implementation of arXiv 2308.16182, section 4


def plain_overlap(a: Sequence[float], b: Sequence[float], generalized: bool) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    value = width * height / union
    if generalized:
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        value -= (hull - union) / hull
    return value


def plain_f1(
    predicted: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], generalized: bool
) -> float:
    if not gold:
        return 0.0 if predicted else 1.0
    pairs = []
    for i, box in enumerate(predicted):
        for j, target in enumerate(gold):
            pairs.append((-plain_overlap(box, target, generalized), i, j))
    used_predicted, used_gold = set(), set()
    for negative, i, j in sorted(pairs):
        if -negative >= 0.5 and i not in used_predicted and j not in used_gold:
            used_predicted.add(i)
            used_gold.add(j)
    true_positive = len(used_gold)
    false_positive = len(predicted) - true_positive
    false_negative = len(gold) - true_positive
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative)


def random_case(rng: np.random.Generator) -> tuple[list[list[float]], list[list[float]]]:
    """Returns predicted and ground-truth boxes: none, equal, near, far and repeated ones."""
    gold = []
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        x, y = rng.integers(0, 80, 2)
        width, height = rng.integers(2, 40, 2)
        gold.append([x, y, x + width, y + height])
    predicted = []
    for box in gold:
        if rng.random() < 0.85:
            step = rng.choice([0, 0, 1, 4, 9])
            x1, y1, x2, y2 = (number + rng.integers(-step, step + 1) for number in box)
            predicted.append([x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)])
    if rng.random() < 0.2:
        predicted.append([1, 1, 30, 30])
    if predicted and rng.random() < 0.1:
        predicted.append(predicted[0])
    rng.shuffle(predicted)
    return [[float(v) for v in box] for box in predicted], [[float(v) for v in b] for b in gold]


def test_1000_random_cases_equal_the_plain_implementation():
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(1000)]
    rows = [
        {
            "source": "s",
            "benchmark": "grec",
            "id": number,
            "image": f"{number // 3}.jpg",
            "size_px": None,
            "mode": "greedy",
            "rollout": 0,
            "prompt": "",
            "text": "",
            "prediction": {"boxes": [{"label": "", "xyxy_px": box} for box in predicted]},
            "gold": {"boxes": [{"label": "", "xyxy_px": box} for box in gold]},
        }
        for number, (predicted, gold) in enumerate(cases)
    ]
    for name, generalized in (("f1", False), ("f1_giou", True)):
        expected = [plain_f1(*case, generalized) for case in cases]
        assert [row[name] for row in benchmarks.score_rows(rows)] == pytest.approx(expected)
        assert len(set(expected)) > 5
    values = benchmarks.compute_metrics(benchmarks.score_rows(rows)).values
    right, right_generalized, nothing_right, something_right = 0, 0, [], []
    for predicted, gold in cases:
        right += plain_f1(predicted, gold, False) == 1
        right_generalized += plain_f1(predicted, gold, True) == 1
        (something_right if gold else nothing_right).append(bool(predicted) == bool(gold))
    assert values["precision"] == pytest.approx(right / 1000)
    assert values["precision_giou"] == pytest.approx(right_generalized / 1000)
    assert right_generalized < right
    assert values["n_acc"] == pytest.approx(sum(nothing_right) / len(nothing_right))
    assert values["t_acc"] == pytest.approx(sum(something_right) / len(something_right))
