"""GroundingME, RefCOCOg_rej and Ref-Adv-s: from the published layouts to rejection and accuracy."""

import io
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, run_here
from conftest import PG1
from PIL import Image
from test_eval_runner import copying_programs

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.evals import benchmarks, runner
from pg_ground.evals.runner import EvalContext, Evaluation
from pg_ground.parallel import sharding
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

BOX = [8, 6, 40, 30]


def image() -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", (64, 48)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def groundingme_record(number: int, dimension: str, subtask: str | None, box: Any = BOX) -> Any:
    """Returns a record with the fields of lirang04/GroundingME."""
    return {
        "id": number,
        "description": f"the {dimension} thing {number}",
        "image": image(),
        "bbox": box,
        "detection_type": "object",
        "subtask_l1": dimension,
        "subtask_l2": subtask,
        "width": 64,
        "height": 48,
    }


GROUNDINGME = [
    groundingme_record(0, "Discriminative", "Text"),
    groundingme_record(1, "Spatial", "Counting"),
    groundingme_record(2, "Limited", "Small"),
    # the box of a question without a target may be absent, empty, zero, or the original one
    groundingme_record(3, "Rejection", "Text", None),
    groundingme_record(4, "Rejection", "State", []),
    groundingme_record(5, "Rejection", None, [0, 0, 0, 0]),
    groundingme_record(6, "Rejection", "State", BOX),
]

REF_ADV = [
    {
        "image": image(),
        "file_name": "1.jpg",
        "normal_caption": f"person with {count} others",
        "solution": [8.0, 6.0, 40.0, 30.0],
        "width": 64,
        "height": 48,
        "distractors": json.dumps(["x"] * count),
    }
    for count in (2, 3, 5, 12)
]

REFCOCOG_REJ = [
    {
        "id": number,
        "image": image(),
        "original_exp": "a man",
        "original_bbox": BOX,
        "rejected_exp": "a man who flies",
        "width": 64,
        "height": 48,
    }
    for number in range(3)
]


def evaluate_entry(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], benchmark: str, answer: str = ""
) -> Evaluation:
    """Returns the evaluation of a policy on an entry of configs/data.py, read from a parquet file.

    Args:
      answer: the answer of the policy to every question; "" is the ground truth.
    """
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "test.parquet")
    source = runpy.run_path(str(ROOT / "configs/data.py"))["ENTRIES"][name]
    source = Source(**{**vars(source), "uri": f"parquet:{folder}/test.parquet"})
    settings = config.Eval(
        sources={name: source}, benchmarks={name: benchmark}, batch_size=2, rollouts=0
    )
    tokenizer = load_tokenizer()
    programs = copying_programs(tokenizer, settings)
    if answer:
        ids = tokenizer.suffix(answer)
        copy = programs.answer

        def write(params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = np.zeros((len(batch.prompt), 16), np.int32)
            tokens[:, : len(ids)] = ids
            mask = np.arange(16)[None] < np.full((len(tokens), 1), len(ids))
            return copy(params, batch._replace(suffix=tokens, suffix_mask=mask), *args, **kwargs)

        programs = programs._replace(answer=write)
    data = config.Data(prompt_length=40, suffix_length=16)
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, data, 0, tokenizer, mesh, BadRecords())
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    return runner.evaluate_sources(programs, {}, sources, context)


def metrics_of(result: Evaluation) -> dict[str, float]:
    assert not result.bad_records
    return {name.split("/")[-1]: value for name, value in result.metrics.items()}


def test_a_model_is_measured_on_groundingme(tmp_path):
    # the source has a box for question 6, so a policy that copies it does not reject
    result = evaluate_entry(tmp_path, "groundingme", GROUNDINGME, "groundingme")
    metrics = metrics_of(result)
    assert [len(row["gold"]["boxes"]) for row in result.predictions] == [1, 1, 1, 0, 0, 0, 0]
    assert metrics["questions"] == 7 and metrics["acc50"] == metrics["acc90"] == 1
    assert metrics["rejection_accuracy"] == metrics["rejection"] == 3 / 4
    assert metrics["accuracy"] == pytest.approx(6 / 7) and metrics["wrong_rejections"] == 0
    assert metrics["rejection_state"] == 1 / 2 and metrics["discriminative_text"] == 1
    assert "text" not in metrics and "rejection_counting" not in metrics
    assert result.predictions[5]["gold"]["groups"] == ["rejection"]


@pytest.mark.parametrize(
    ("answer", "rejects"), [("there is nothing", 1), ("<loc0001>", 1), ("<loc0001>" * 4, 0)]
)
def test_a_policy_that_always_writes_the_same(answer, rejects, tmp_path):
    result = evaluate_entry(tmp_path, "groundingme", GROUNDINGME, "groundingme", answer)
    metrics = metrics_of(result)
    assert metrics["rejection_accuracy"] == metrics["wrong_rejections"] == rejects
    assert metrics["acc50"] == 0 and metrics["limited"] == 0


def test_a_model_is_measured_on_changed_expressions(tmp_path):
    metrics = metrics_of(evaluate_entry(tmp_path, "refcocog_rej", REFCOCOG_REJ, "rejection"))
    assert metrics["rejection_accuracy"] == metrics["accuracy"] == 1 and "acc50" not in metrics
    box = "<loc0100><loc0100><loc0300><loc0300>"
    metrics = metrics_of(evaluate_entry(tmp_path, "refcocog_rej", REFCOCOG_REJ, "rejection", box))
    assert metrics["rejection_accuracy"] == 0


def test_a_model_is_measured_by_the_number_of_distractors(tmp_path):
    result = evaluate_entry(tmp_path, "ref_adv_s", REF_ADV, "ref_adv_s")
    metrics = metrics_of(result)
    assert [row["gold"]["groups"] for row in result.predictions] == [
        ["distractors_2_3"],
        ["distractors_2_3"],
        ["distractors_4_6"],
        ["distractors_7"],
    ]
    for name in ("acc50", "acc75", "acc90", "distractors_2_3", "distractors_7"):
        assert metrics[name] == 1
    assert "rejection_accuracy" not in metrics


def test_a_record_of_an_unknown_dimension_is_refused(tmp_path):
    rows = [*GROUNDINGME, groundingme_record(7, "Reasoning", None)]
    with pytest.raises(UserError, match=r"record 7: dimension \(subtask_l1\) is 'Reasoning'"):
        evaluate_entry(tmp_path, "groundingme", rows, "groundingme")


# Files of predictions


def evaluate_file(folder: Path, benchmark: str, text: str, *flags: str) -> Any:
    path = folder / "results.json"
    path.write_text(text)
    return run_here(
        "evaluate", f"--predictions={path}", f"--benchmark={benchmark}", f"--out={folder}", *flags
    )


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())


def groundingme_results() -> list[dict[str, Any]]:
    """Returns the detailed results of GroundingME's evaluator for all 1005 questions."""
    dimensions = ["Discriminative", "Spatial", "Limited", "Rejection"]
    results = []
    for number in range(1005):
        dimension = dimensions[number % 4]
        gold = [0, 0, 0, 0] if dimension == "Rejection" else [100, 100, 300, 200]
        # right, an IoU of .8, wrong, and nothing in turn
        pred = [gold, [100, 100, 260, 200], [400, 1, 500, 9], [0, 0, 0, 0]][number // 4 % 4]
        results.append(
            {
                "id": number,
                "subtask_l1": dimension,
                "subtask_l2": "",
                "response": "…",
                "pred_bbox": pred,
                "gt_bbox": gold,
            }
        )
    return results


GROUNDINGME_FLAGS = ("--rows=detailed_results", "--fields=pred=pred_bbox,gold=gt_bbox")


def test_the_results_of_groundingme_are_scored(tmp_path):
    results = groundingme_results()
    text = json.dumps({"model": "m", "total_samples": 1005, "detailed_results": results})
    result = evaluate_file(tmp_path, "groundingme", text, *GROUNDINGME_FLAGS)
    assert result.returncode == 0, result.stderr
    report = report_of(tmp_path)
    assert report["n"] == 1005
    rejections = [row for row in results if row["subtask_l1"] == "Rejection"]
    right = [row["pred_bbox"] == [0, 0, 0, 0] for row in rejections]
    assert report["rejection"] == report["rejection_accuracy"] == pytest.approx(np.mean(right))
    assert report["acc50"] == pytest.approx(0.5, abs=0.01)
    assert report["acc90"] == pytest.approx(0.25, abs=0.01)
    assert report["wrong_rejections"] == pytest.approx(0.25, abs=0.01)
    for name in ("accuracy", "rejection_accuracy", "acc75", "discriminative", "rejection"):
        low, high = report["intervals"][name]
        assert low < report[name] < high
    text = json.dumps({"detailed_results": results[1:]})
    part = evaluate_file(tmp_path, "groundingme", text, *GROUNDINGME_FLAGS)
    assert part.returncode == 2 and "--benchmark=rejection takes any" in part.stderr


def test_the_predictions_of_ref_adv_are_scored(tmp_path):
    lines = [
        {
            "row_idx": number,
            "file_name": f"{number // 2:012}.jpg",
            "normal_caption": "the plate without a fork",
            "image_source": "coco_val2017",
            "human_authored": True,
            "use_negation": True,
            "distractor_count": [2, 5, 9][number % 3],
            "gt_bbox_xyxy": [297.0, 345.0, 427.0, 440.0],
            "pred_box_xyxy_first": [[297.0, 345.0, 427.0, 440.0], []][number % 2],
            "first_iou": 1.0 - number % 2,
            "parse_error": ["", "no_bbox_found"][number % 2],
        }
        for number in range(1142)
    ]
    text = "\n".join(map(json.dumps, lines))
    fields = "--fields=pred=pred_box_xyxy_first,gold=gt_bbox_xyxy,image=file_name,id=row_idx"
    result = evaluate_file(tmp_path, "ref_adv_s", text, fields)
    assert result.returncode == 0, result.stderr
    report = report_of(tmp_path)
    assert report["n"] == 1142 and report["images"] == 571
    assert report["acc50"] == report["acc90"] == 0.5 and report["wrong_rejections"] == 0.5
    for name in ("distractors_2_3", "distractors_4_6", "distractors_7"):
        assert report[name] == pytest.approx(0.5, abs=0.01) and name in report["intervals"]


NOTHING = ['{"bbox_2d": null}', "", "No matching object.", [0, 0, 0, 0], None, "[0, 0, 0, 0]", []]


@pytest.mark.parametrize("answer", NOTHING)
@pytest.mark.parametrize("gold", [[], None, [0, 0, 0, 0], "", [[0, 0, 0, 0]]])
def test_forms_of_nothing(answer, gold, tmp_path):
    rows = [
        {"answer": answer, "gold": gold},
        {"answer": BOX, "gold": BOX},
        {"answer": BOX, "gold": gold},
        {"answer": answer, "gold": BOX},
        {"answer": [[1, 2, 3]], "gold": gold},
    ]
    result = evaluate_file(
        tmp_path, "rejection", json.dumps(rows), "--fields=pred=answer,gold=gold"
    )
    assert result.returncode == 0, result.stderr
    report = report_of(tmp_path)
    assert report["rejection_accuracy"] == pytest.approx(1 / 3)
    assert report["acc50"] == report["wrong_rejections"] == 1 / 2 and report["accuracy"] == 2 / 5
    assert report["invalid"] == 1


def test_several_targets_are_refused(tmp_path):
    rows = [{"answer": BOX, "gold": [BOX, [1, 1, 5, 5]]}]
    result = evaluate_file(
        tmp_path, "rejection", json.dumps(rows), "--fields=pred=answer,gold=gold"
    )
    assert result.returncode == 2 and "is not one box or none" in result.stderr


def test_a_missing_row_is_no_rejection(tmp_path):
    rows = json.dumps([{"gold": []}, {"answer": BOX, "gold": BOX}])
    flags = ("--fields=pred=answer,gold=gold", "--missing=wrong")
    assert evaluate_file(tmp_path, "rejection", rows, *flags).returncode == 0
    assert report_of(tmp_path)["rejection_accuracy"] == 0


# The law: a plain implementation in loops


def plain_iou(box: Sequence[float] | None, gold: Sequence[float] | None) -> float:
    """GroundingME's `compute_iou`, with None for its box of zeros."""
    if gold is None:
        return 1.0 if box is None else 0.0
    if box is None:
        return 0.0
    width = max(0, min(box[2], gold[2]) - max(box[0], gold[0]))
    height = max(0, min(box[3], gold[3]) - max(box[1], gold[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, gold)]
    return width * height / (sum(areas) - width * height)


def test_1000_random_cases_equal_the_plain_implementation():
    rng = np.random.default_rng(0)
    dimensions = ("discriminative", "spatial", "limited", "rejection")
    rows, cases = [], []
    for number in range(1000):
        dimension = dimensions[rng.integers(4)]
        x, y = rng.integers(0, 30, 2).tolist()
        width, height = rng.integers(2, 30, 2).tolist()
        gold = None if dimension == "rejection" else [x, y, x + width, y + height]
        shift = int(rng.integers(0, 6))
        box = None if rng.random() < 0.3 else [x + shift, y, x + shift + width, y + height]
        predicted = [] if box is None else [box, [0, 0, 1, 1]][: rng.integers(1, 3)]
        cases.append((dimension, plain_iou(box, gold), box is None, gold is None))
        rows.append(
            {
                "source": "s",
                "benchmark": "groundingme@1000",
                "id": number,
                "image": None,
                "size_px": None,
                "mode": "greedy",
                "rollout": 0,
                "prompt": "",
                "text": "",
                "prediction": {"boxes": [{"label": "", "xyxy_px": b} for b in predicted]},
                "gold": {
                    "boxes": [] if gold is None else [{"label": "", "xyxy_px": gold}],
                    "groups": [dimension],
                },
            }
        )
    values = benchmarks.compute_metrics(benchmarks.score_rows(rows)).values

    def share(name: str, hits: Sequence[bool]) -> None:
        assert 0 < sum(hits) < len(hits), name
        assert values[name] == pytest.approx(sum(hits) / len(hits)), name

    share("accuracy", [iou >= 0.5 for _, iou, _, _ in cases])
    share("accuracy75", [iou >= 0.75 for _, iou, _, _ in cases])
    for percent in (50, 75, 90):
        present = [iou >= percent / 100 for _, iou, _, absent in cases if not absent]
        share(f"acc{percent}", present)
    share("rejection_accuracy", [nothing for _, _, nothing, absent in cases if absent])
    share("wrong_rejections", [nothing for _, _, nothing, absent in cases if not absent])
    for name in dimensions:
        share(name, [iou >= 0.5 for dimension, iou, _, _ in cases if dimension == name])
    assert values["mean_iou"] == pytest.approx(np.mean([iou for _, iou, _, _ in cases]))
