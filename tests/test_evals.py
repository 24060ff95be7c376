"""Scores and metrics of rows: published numbers are reproduced, and bad files are refused."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from hypothesis import example, given
from hypothesis import strategies as st

from pg_ground.boxes import host_boxes, iou
from pg_ground.data import run_lengths
from pg_ground.data.box_formats import BOX_ORDERS, format_names, image_extent
from pg_ground.evals import benchmarks, cv_bench, environment, pointing, rows, scoring
from pg_ground.evals.file_answers import Formats
from pg_ground.evals.image_identity import image_identity
from pg_ground.evals.intervals import intervals
from pg_ground.readers import locations, parsers
from pg_ground.types import UserError

FIELDS = {"pred": "extracted_answer", "gold": "ground_truth"}
PIXELS = Formats()

Records = Sequence[Mapping[str, Any]]
Report = tuple[dict[str, Any], list[dict[str, Any]]]


def score_records(
    tmp_path: Path,
    records: Any,
    benchmark: str = "rec",
    fields: Mapping[str, str] = FIELDS,
    formats: Formats = PIXELS,
) -> Report:
    """Returns the report and the scored rows of a file with these records, or with this text."""
    path = tmp_path / "file.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return scoring.rescore(path, benchmark, fields, formats)


def score_written_rows(folder: Path) -> Report:
    """Returns the report and the scored rows of a `predictions.jsonl` of this package."""
    return scoring.rescore(folder / "predictions.jsonl", "", {}, PIXELS)


BOX = [10, 20, 110, 220]


def box_records(predicted: Sequence[Any], gold: Sequence[float] = BOX, **fields: Any) -> Records:
    """Returns records with these predictions and one ground-truth box."""
    return [{"extracted_answer": box, "ground_truth": list(gold), **fields} for box in predicted]


PUBLISHED = {
    "baseline_rec_results_refcoco_val": (0.8975, 0),
    "baseline_rec_results_refcocog_val": (0.866, 0),
    "original_cot_rec_results_refcoco_val": (0.3265, 1279),
}
"""Accuracy and number of unreadable answers of published files of predictions."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("baseline_rec_results_refcoco_val", marks=pytest.mark.slow),
        pytest.param("baseline_rec_results_refcocog_val", marks=pytest.mark.slow),
        "original_cot_rec_results_refcoco_val",
    ],
)
def test_published_predictions_give_their_published_numbers(data, name):
    path = data / "predictions" / f"{name}.json"
    report, scored = scoring.rescore(path, "rec", FIELDS, PIXELS)
    accuracy, unreadable = PUBLISHED[name]
    assert (report["acc50"], report["invalid"], report["n"]) == (accuracy, unreadable, 2000)
    published = json.loads(path.read_text())
    assert published["accuracy"] == round(100 * report["acc50"], 2)
    expected = [record["correct"] for record in published["results"]]
    assert [row["correct"] for row in scored] == expected
    low, high = report["intervals"]["acc50"]
    assert low < accuracy < high
    assert report["images"] < 2000


@pytest.mark.slow
def test_written_rows_give_the_same_numbers_and_rows(data, tmp_path):
    path = data / "predictions" / "baseline_rec_results_refcoco_val.json"
    report, scored = scoring.rescore(path, "rec", FIELDS, PIXELS)
    scoring.write_results(tmp_path, report, scored)
    second_report, rescored = score_written_rows(tmp_path)
    del report["file_says"]
    assert second_report == report
    assert rows.to_json_lines(rescored) == (tmp_path / "predictions.jsonl").read_text()


def test_rows_hold_any_text(tmp_path):
    texts = ["line\u2028separator", "next\x85line", "half a pair \ud800", "\u732b"]
    records = [box_records([BOX], question=text)[0] for text in texts]
    report, scored = score_records(tmp_path, records)
    scoring.write_results(tmp_path, report, scored)
    second_report, rescored = score_written_rows(tmp_path)
    assert second_report == report
    assert [row["prompt"] for row in rescored] == texts
    assert "\u732b" in (tmp_path / "predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"prediction": None}, "row 1 .id 1. is not a row of rec"),
        (
            {"prediction": {"boxes": [{"label": "", "xyxy_px": [1, 2]}]}},
            "row 1 .id 1. is not a row of rec",
        ),
        ({"benchmark": "counting"}, "has rows of the benchmarks counting and rec"),
        ({"gold": {"boxes": [{"label": "", "xyxy_px": [5, 5, 5, 9]}]}}, "gold box .* has no area"),
    ],
)
def test_rows_that_were_edited_wrongly_are_refused(edit, message, tmp_path):
    _, scored = score_records(tmp_path, box_records([BOX] * 3))
    edited = [scored[0], {**scored[1], **edit}, scored[2]]
    (tmp_path / "predictions.jsonl").write_text(rows.to_json_lines(edited))
    with pytest.raises(UserError, match=message):
        score_written_rows(tmp_path)


POINT_FORMS = {
    "Molmo's": '<points x1="10.5" y1="20" x2="30" y2="40.5" alt="cats">cats</points>',
    "one a tag": '<point x="10.5" y="20" alt="cat">cat</point> <point x="30" y="40.5">cat</point>',
    "clicks": "click(x=10.5, y=20) click(x=30, y=40.5)",
    "JSON": '```json\n[{"point_2d": [10.5, 20]}, {"point_2d": [30, 40.5]}]\n```',
    "pairs": "(10.5, 20), (30, 40.5)",
}


@pytest.mark.parametrize("form", POINT_FORMS)
def test_points_are_read_in_any_form(form):
    points = locations.read_any(POINT_FORMS[form], 2)
    assert [point.numbers for point in points] == [(10.5, 20), (30, 40.5)]


BOX_FORMS = {
    "a list": BOX,
    "numbers as text": ["10", "20", "110", "220"],
    "a list of boxes": [BOX, [0, 0, 5, 5]],
    "corners": [[10, 20], [110, 220]],
    "JSON": '```json\n[{"bbox_2d": [10, 20, 110, 220], "label": "x"}]\n```',
    "behind a thought": "<think>[1, 2, 3, 4]</think> the box is [10, 20, 110, 220].",
    "Python in a tag": "<think>3 of 4</think><answer>{'bbox_2d': [10, 20, 110, 220]}</answer>",
    "pairs in text": "<box>(10,20),(110,220)</box>",
    "one pair of brackets a number": "<p>cat</p> {<10><20><110><220>}",
    "a tag that sampling stopped at": "<think>[1, 2, 3, 4]</think><answer>[10, 20, 110, 220]",
    "a tag behind a thought without end": "<think>[1, 2, 3, 4] <answer>[10, 20, 110, 220]",
    "an object": {"x1": 10, "y1": 20, "x2": 110, "y2": 220},
    "a named box": {"bbox": BOX, "score": 0.5},
}


@pytest.mark.parametrize("form", BOX_FORMS)
def test_a_box_is_read_in_any_form(form, tmp_path):
    report, _ = score_records(tmp_path, box_records([BOX_FORMS[form]]))
    assert (report["mean_iou"], report["invalid"]) == (1, 0)


@pytest.mark.parametrize(
    "box",
    [
        None,
        [],
        [0, 0, 0, 0],
        [1, 2, 3],
        [110, 220, 10, 20],
        "no",
        "__import__('os').abort()",
        [1, 2, 3, math.nan],
        [True, 2, 3, 4],
        {"bbox": None},
        [[1, 2], 3],
    ],
)
def test_an_unreadable_box_is_invalid_and_wrong(box, tmp_path):
    report, scored = score_records(tmp_path, box_records([box, BOX]))
    assert (report["acc50"], report["mean_iou"]) == (0.5, 0.5)
    assert (report["invalid"], report["center_acc"]) == (1, 1)
    assert scored[0]["iou"] == 0
    assert scored[0]["correct"] == 0


@pytest.mark.parametrize("box_format", format_names(BOX_ORDERS))
def test_every_box_format_reads_the_same_box(box_format, tmp_path):
    order, unit = box_format.rsplit("_")
    extents = image_extent(unit, (640, 480)) * 2
    x1, y1, x2, y2 = (
        pixels * extent / side
        for pixels, side, extent in zip(BOX, (640, 480) * 2, extents, strict=True)
    )
    written = {
        "xyxy": [x1, y1, x2, y2],
        "yxyx": [y1, x1, y2, x2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    }[order]
    records = [{"a": {"b": written}, "gold": BOX, "size": [640, 480]}]
    fields = {"pred": "a.b", "gold": "gold", "size": "size"}
    formats = Formats(box_format, gold="xyxy_px")
    report, _ = score_records(tmp_path, records, fields=fields, formats=formats)
    assert report["mean_iou"] == pytest.approx(1, abs=1e-12)


def test_loc_tokens_are_bins_whatever_the_format_says(tmp_path):
    text = "<loc0000><loc0512><loc1023><loc1023>"
    gold = (512, 0, 1023, 100)
    records = box_records([f"{text} cat"], gold, width=1023, height=100)
    assert score_records(tmp_path, records)[0]["mean_iou"] == pytest.approx(1)
    with pytest.raises(UserError, match="size of row 0's image is not known"):
        score_records(tmp_path, box_records([text]))


BAD_FILES: dict[str, tuple[Any, str]] = {
    "empty": ("", "is empty"),
    "no rows": ([], "has 0 rows"),
    "no JSON": ('{"extracted_answer": 1, "ground_truth": 2}\n{"extracted', "line 2 is not JSON"),
    "missing": (
        [*box_records([[1, 2, 3, 4]]), {"ground_truth": [1, 2, 3, 4]}],
        "1 of 2 rows have no extracted_answer, first row 1",
    ),
    "twice": (
        [{**record, "id": i % 2} for i, record in enumerate(box_records([[1, 2, 3, 4]] * 3))],
        "1 of 3 rows repeat the id .* row 2",
    ),
    "gold": (box_records([[1, 2, 3, 4]], (5, 5, 5, 5)), "gold of 1 of 1 rows is not one box"),
    "rows": ([3], "1 of 1 rows are not objects"),
    "a number": ("3", "is 3: it must be a JSON list, JSON lines or an object"),
}
"""Contents of a file, and the error."""


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_counts(name, tmp_path):
    records, message = BAD_FILES[name]
    with pytest.raises(UserError, match=message):
        score_records(tmp_path, records)


SIZE = np.array([640, 480, 640, 480])
"""Width and height of the images of `random_boxes`."""


def random_boxes(count: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (count, 2))
    side = rng.uniform(40, 150, (count, 2))
    return np.concatenate([corner, corner + side], 1)


@pytest.mark.parametrize(
    ("write", "has_sizes", "message"),
    [
        (lambda b: b[[1, 0, 3, 2]], False, "--box-format=yxyx_px would give 1.0000"),
        (
            lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
            False,
            "--box-format=xywh_px would give 1.0000",
        ),
        (lambda b: b * 1000 / SIZE, True, "--box-format=xyxy_permille would give 1.0000"),
        (
            lambda b: (b / SIZE)[[1, 0, 3, 2]] * 1023,
            True,
            "--box-format=yxyx_bin would give 1.0000",
        ),
        (
            lambda b: b / SIZE,
            False,
            "x scaled by 640 and y by 480, as --box-format=xyxy_frac does",
        ),
        (lambda b: b / 2, True, "x scaled by 2 and y by 2 .are these boxes of a resized image"),
    ],
)
@pytest.mark.parametrize("benchmark", ["rec", "objects", "detection"])
def test_boxes_in_another_format_are_refused_and_the_fitting_format_is_named(
    write, has_sizes, message, benchmark, tmp_path
):
    size = {"width": 640, "height": 480} if has_sizes else {}
    records = [
        {"extracted_answer": list(write(box)), "ground_truth": box.tolist(), **size}
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match=message):
        score_records(tmp_path, records, benchmark)


def test_ground_truth_in_another_format_is_refused(tmp_path):
    records = [
        {
            "extracted_answer": list(box),
            "ground_truth": list(box * 1000 / SIZE),
            "img_size": [640, 480],
        }
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match="--gold-format=xyxy_permille would give 1.0000"):
        score_records(tmp_path, records)


@pytest.mark.parametrize(
    ("write_gold", "unit"),
    [
        (lambda b: b * 1000 / SIZE, "permille"),
        (lambda b: (b * 1000 / SIZE).round(), "permille"),
        (lambda b: b * 100 / SIZE, "percent"),
        (lambda b: b * 1023 / SIZE, "bin"),
    ],
)
@pytest.mark.parametrize(
    "write", [lambda b: b, lambda b: b[[1, 0, 3, 2]]], ids=["xyxy_px", "yxyx_px"]
)
def test_without_sizes_pixels_against_another_unit_name_the_gold_format(
    write, write_gold, unit, tmp_path
):
    """No unit of the predictions can be right: they are pixels."""
    records = [
        {"extracted_answer": list(write(box)), "ground_truth": list(write_gold(box))}
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match=f"--gold-format=xyxy_{unit}") as error:
        score_records(tmp_path, records)
    message = str(error.value)
    assert "_px --gold-format" in message and "names width and height" in message
    assert not any(f"--box-format={order}_{unit}" in message for order in ("xyxy", "yxyx"))


@pytest.mark.parametrize(("unit", "extent"), [("permille", 1000), ("percent", 100)])
def test_without_sizes_thousandths_against_pixels_name_the_box_format(unit, extent, tmp_path):
    records = [
        {"extracted_answer": list(box * extent / SIZE), "ground_truth": box.tolist()}
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match=f"--box-format=xyxy_{unit} ") as error:
        score_records(tmp_path, records)
    assert "--gold-format" not in str(error.value)


@pytest.mark.parametrize("has_sizes", [False, True])
@pytest.mark.parametrize(
    ("unit", "gold_unit"),
    [("permille", "frac"), ("percent", "permille"), ("frac", "bin"), ("px", "frac")],
)
def test_both_flags_are_named_if_both_sides_are_in_another_unit(
    unit, gold_unit, has_sizes, tmp_path
):
    extents = {"frac": 1, "percent": 100, "permille": 1000, "bin": 1023}
    size = {"img_size": [640, 480]} if has_sizes else {}
    records = [
        {
            "extracted_answer": list(box * extents[unit] / SIZE if unit in extents else box),
            "ground_truth": list(box * extents[gold_unit] / SIZE),
            **size,
        }
        for box in random_boxes()
    ]
    flags = f"--box-format=xyxy_{unit} --gold-format=xyxy_{gold_unit}"
    if unit == "px" and has_sizes:
        flags = f"--gold-format=xyxy_{gold_unit} would give 1.0000"
    with pytest.raises(UserError, match=flags) as error:
        score_records(tmp_path, records)
    assert ("--fields also names width and height" in str(error.value)) == (
        unit == "px" and not has_sizes
    )


def test_poor_predictions_are_not_taken_for_another_format(tmp_path):
    boxes = random_boxes()
    records = [
        {"extracted_answer": list(predicted), "ground_truth": list(gold)}
        for predicted, gold in zip(boxes, boxes[::-1], strict=True)
    ]
    assert score_records(tmp_path, records)[0]["acc50"] < 0.2


def test_a_part_of_a_benchmark_is_not_reported_under_its_name(tmp_path):
    records = box_records([[1, 2, 3, 4]] * 2)
    message = "refcoco_val has 10834 questions, but there are 2: --benchmark=rec"
    with pytest.raises(UserError, match=message):
        score_records(tmp_path, records, "refcoco_val")
    with pytest.raises(UserError, match="refcoco_val@3 has 3 questions, but there are 2"):
        score_records(tmp_path, records, "refcoco_val@3")


coordinate = st.floats(0, 1000, allow_nan=False)


@example((0, 0, 1e-200, 1e-200), (0, 0, 1e-200, 1e-200))
@given(st.tuples(*[coordinate] * 4), st.tuples(*[coordinate] * 4))
def test_iou_is_symmetric_and_a_share(a, b):
    first, second = host_boxes([a, b])
    assert iou(first, second) == iou(second, first)
    assert 0 <= iou(first, second) <= 1


def scored_rows(
    benchmark: str, predictions: Sequence[Any], gold: Sequence[Any]
) -> list[dict[str, Any]]:
    """Returns the scored rows of predictions about images of 100 x 100 pixels."""
    row = {
        "source": "s",
        "benchmark": benchmark,
        "image": None,
        "size_px": [100, 100],
        "mode": "greedy",
        "rollout": 0,
        "prompt": "",
        "text": "",
    }
    pairs = enumerate(zip(predictions, gold, strict=True))
    return benchmarks.score_rows(
        [{**row, "id": i, "prediction": answer, "gold": truth} for i, (answer, truth) in pairs]
    )


def metric_values(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    return benchmarks.compute_metrics(scored).values


def boxes_answer(*labelled: tuple[str, list[float]]) -> dict[str, Any]:
    return {"boxes": [{"label": label, "xyxy_px": box} for label, box in labelled]}


def points_answer(*points: list[float]) -> dict[str, Any]:
    return {"points": [{"label": "", "xy_px": point} for point in points]}


A = [0, 0, 10, 10]
C = [50, 50, 90, 90]


def test_missing_spurious_and_duplicate_boxes_cost():
    gold = [boxes_answer(("a", A), ("c", C))] * 4 + [boxes_answer()]
    predictions = [
        boxes_answer(("c", C), ("a", A)),
        boxes_answer(("a", A)),
        boxes_answer(("a", A), ("a", A), ("c", C)),
        boxes_answer(("a", C), ("c", A)),
        boxes_answer(),
    ]
    scored = scored_rows("objects", predictions, gold)
    np.testing.assert_allclose([row["iou"] for row in scored], [1, 2 / 3, 4 / 5, 0, 1])
    assert [row["correct"] for row in scored] == [1, 0, 0, 0, 1]
    assert [row["duplicates"] for row in scored] == [0, 0, 1, 0, 0]
    assert metric_values(scored)["duplicates_per_image"] == 0.2


def test_detection_ranks_by_scores_if_all_boxes_have_one():
    gold = [boxes_answer(("a", A), ("c", C))]
    wrong = {"label": "a", "xyxy_px": C}
    right = {"label": "a", "xyxy_px": A}
    prediction = {"boxes": [wrong | {"score": 0.1}, right | {"score": 0.9}]}
    values = metric_values(scored_rows("detection", [prediction], gold))
    assert (values["ap"], values["ap50"]) == (pytest.approx(0.5), pytest.approx(0.5))
    values = metric_values(scored_rows("detection", [{"boxes": [wrong, right]}], gold))
    assert values["ap"] == pytest.approx(0.25)  # the wrong box is written first


def test_points_are_matched_for_most_hits():
    gold = boxes_answer(("", A), ("", [0, 0, 100, 100])) | points_answer([5, 5], [60, 60])
    predictions = [
        points_answer([10, 10], [5, 5]),
        points_answer([60, 60]),
        points_answer(),
        points_answer([5, 5], [60, 60], [7, 7]),
    ]
    scored = scored_rows("pointing", predictions, [gold] * 4)
    assert [row["hits"] for row in scored] == [2, 1, 0, 2]
    assert [row["recall"] for row in scored] == [1, 0.5, 0, 1]
    assert scored[3]["precision"] == 2 / 3
    assert [row["point_in_box"] for row in scored] == [1, 0, 0, 1]


def test_a_point_without_a_box_is_hit_within_5_percent_of_the_diagonal():
    """5 % of the diagonal of 100 x 100 pixels is 7.07 pixels."""
    predictions = [points_answer([53, 50]), points_answer([60, 50])]
    scored = scored_rows("pointing", predictions, [points_answer([50, 50])] * 2)
    assert [row["f1"] for row in scored] == [1, 0]
    assert scored[0]["distance_px"] == 3


@given(st.integers(0, 2**12 - 1), st.integers(0, 99), st.integers(0, 99))
def test_run_lengths_cover_the_cells_of_their_mask(bits, x, y):
    mask = np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4)
    is_covered = pointing.covers(run_lengths.encode(mask), (x + 0.5, y + 0.5), (100, 100))
    assert is_covered == mask[int((y + 0.5) * 3 / 100), int((x + 0.5) * 4 / 100)]


def test_a_click_on_the_edge_is_inside(data):
    first_line = (data / "gui" / "test.jsonl").read_text().splitlines()[0]
    element = json.loads(first_line)["test_samples"][0]
    x1, _, x2, y2 = element["bbox"]
    predictions = [
        points_answer([x1, y2]),
        points_answer([x2 + 1, y2]),
        points_answer(element["point"]),
        points_answer(),
        boxes_answer(("", element["bbox"])),
    ]
    gold = boxes_answer(("", element["bbox"]))
    scored = scored_rows("screenspot", predictions, [gold] * 5)
    assert [row["correct"] for row in scored] == [1, 0, 1, 0, 1]
    assert metric_values(scored)["invalid_fraction"] == 0.2


def test_counts_are_exact_and_have_a_mean_absolute_error(data, tmp_path):
    lines = (data / "counting" / "superclevr_test200.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for i, record in enumerate(records):
        count = record["ground_truth"]
        record["pred"] = [count, f"<answer> {count + 2} </answer>", "many", "3 or 4"][i % 4]
    fields = {"pred": "pred", "gold": "ground_truth"}
    report, _ = score_records(tmp_path, records, "counting", fields)
    assert (report["accuracy"], report["mae"], report["invalid_fraction"]) == (0.25, 1, 0.5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5),
        ("There are five dogs.", 5),
        ("<answer>1,024</answer>", 1024),
        ("5, no 6", None),
        ("", None),
        ("3rd", None),
        (4.0, 4),
        (True, None),
        (None, None),
        ("five (5)", 5),
        ("one hundred", None),
        ("thirty-one", None),
        ("9" * 400, None),
        ("[421,198]", None),
        ("(421,198)", None),
        ("[[421,198]].", None),
        ("at [421,198]", None),
        ("(421, 198, 300)", None),
        ("about (1,024)", 1024),
        ("[1024]", 1024),
        ("[7]", 7),
    ],
)
def test_a_count_is_the_one_number_of_an_answer(text, number):
    assert parsers.number(text, strict=False) == number


def test_records_of_cv_bench_are_read(data):
    lines = (data / "cvbench" / "cvbench_rows.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    gold = [cv_bench.gold(record, "row") for record in records]
    assert gold[0] == {
        "choice": "C",
        "choices": ["3", "2", "1", "0"],
        "task": "Count",
        "source": "ADE20K",
    }
    assert [f"({truth['choice']})" for truth in gold] == [record["answer"] for record in records]
    with pytest.raises(UserError, match="is not a record of CV-Bench"):
        cv_bench.gold({"task": "left", "question": "?"}, "row 3")


def cv_bench_rows(task_counts: Mapping[str, int] = cv_bench.TASKS) -> list[dict[str, Any]]:
    """Returns scored rows, so many of each task. Answers of COCO and of Omni3D are right."""
    gold = []
    for task, count in task_counts.items():
        for i in range(count):
            source = "ADE20K" if i % 4 == 0 else "COCO"
            if task in ("Depth", "Distance"):
                source = "Omni3D"
            gold.append({"choice": "A", "choices": ["x", "y"], "task": task, "source": source})
    predictions = [{"choice": "B" if truth["source"] == "ADE20K" else "A"} for truth in gold]
    return scored_rows("cv_bench", predictions, gold)


def test_cv_bench_has_its_published_counts_and_formula():
    scored = cv_bench_rows()
    benchmarks.check_question_count(scored, "cv_bench")
    values = metric_values(scored)
    assert (values["cv_bench_2d"], values["cv_bench_3d"], values["cv_bench"]) == (0.5, 1, 0.75)
    assert values["qualitative"] == 1 - 163 / 1850
    assert values["relation"] == 1 - 163 / 650
    for wrong_counts in ({"Relation": 649}, {"Relation": 651, "Count": 787}, {"Count": 0}):
        wrong_rows = cv_bench_rows(cv_bench.TASKS | wrong_counts)
        with pytest.raises(UserError, match="--benchmark=multiple_choice"):
            benchmarks.check_question_count(wrong_rows, "cv_bench")
    qualitative = {task: cv_bench.TASKS[task] for task in cv_bench.QUALITATIVE}
    benchmarks.check_question_count(cv_bench_rows(qualitative), "cv_bench_qualitative")


def shown(scored: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Returns the value and the interval of each metric as the command shows them."""
    table = benchmarks.table_rows(benchmarks.make_report(scored))
    return {name: (value, interval) for name, value, interval in table}


def test_every_share_of_cv_bench_is_a_percentage_with_an_interval():
    values = shown(cv_bench_rows())
    expected = {"cv_bench": 75, "cv_bench_2d": 50, "cv_bench_3d": 100, "distance": 100}
    expected |= {"ade20k": 0, "omni3d": 100, "depth": 100, "count": 75}
    for name, percent in expected.items():
        value, interval = values[name]
        assert value == f"{percent:.2f} %", name
        low, high = map(float, interval.split(" to "))
        assert low <= percent <= high, name
    low, high = map(float, values["accuracy"][1].split(" to "))
    assert low < float(values["accuracy"][0].split()[0]) < high
    assert values["invalid"] == ("0", "")


def test_the_interval_of_the_headline_follows_from_the_draws():
    """ADE20K is half right and counts a quarter, so the headline moves a quarter as much."""
    gold = [
        {"choice": "A", "choices": ["x", "y"], "task": "Count", "source": source}
        for source in ("ADE20K", "COCO", "Omni3D")
        for _ in range(100)
    ]
    predictions = [{"choice": "A" if i >= 100 or i % 2 else "B"} for i in range(300)]
    ranges = benchmarks.make_report(scored_rows("multiple_choice", predictions, gold))["intervals"]
    part, headline = np.array(ranges["ade20k"]), np.array(ranges["cv_bench"])
    np.testing.assert_allclose(headline, 0.75 + part / 4, atol=2e-6)
    assert ranges["cv_bench_3d"] == [1, 1]


def test_metrics_that_are_no_shares_are_no_percentages():
    gold = boxes_answer(("", A)) | points_answer([5, 5])
    pointing_values = shown(scored_rows("pointing", [points_answer([5, 8])], [gold]))
    assert pointing_values["distance"][0] == f"{3 / math.hypot(100, 100):.4g}"
    assert (pointing_values["distance_px"][0], pointing_values["f1"][0]) == ("3", "100.00 %")
    boxes = shown(scored_rows("detection", [boxes_answer(("", A))], [boxes_answer(("", A))]))
    assert (boxes["ap"][0], boxes["duplicates_per_image"][0]) == ("100.00 %", "0")
    rows = rollout_rows(2, [None] * 100)
    rewards = shown([{**row, "rewards": {"iou": 0.5}, "tokens": 7} for row in rows])
    names = ("mean_reward", "reward_iou", "completion_length", "rollouts", "pass@1", "pass_rate")
    assert [rewards[name][0] for name in names] == ["0.44", "0.5", "7", "2", "44.00 %", "44.00 %"]
    counts = shown(scored_rows("counting", [{"number": 3}], [{"number": 5}]))
    assert (counts["mae"][0], counts["accuracy"][0]) == ("2", "0.00 %")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("b.", "B"),
        ("B. right", "B"),
        ("The answer is (A).", "A"),
        ("Answer: B", "B"),
        ("right", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ('{"answer": "B"}', "B"),
        ("", None),
        ("<answer>e</answer>", None),
        ("(A) or (B)", None),
        ("<think>(A)</think><answer>(B)</answer>", "B"),
        ("not left", None),
        ("(D)", None),
        ("A dog is left", "A"),  # a reward reads this relation too
        ("I see it. Therefore, the answer is: left", "A"),
        ("I see it.\nTherefore, the answer is: right.", "B"),
        ("the answer is: to the left of it", "A"),
        ("The answer is: on the right side", "B"),
        ("(A) is not right.\nThe answer is: (B)", "B"),
        ("(A) is left, (B) is right. The answer is B.", "B"),
        ("The answer is:\n(B)", "B"),
        ("The answer is: (A) or (B)", None),
        ("The answer is: not left", None),
        ("It is left.\nIt is right.", "B"),
        ("left or right", None),
        ("the answer is: left, not right", None),
        ("The left lamp hides it, so it is above", None),
        (None, None),
    ],
)
def test_an_option_is_named_once_or_not_at_all(text, letter):
    assert parsers.option(text, ["left", "right"], strict=False) == letter


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("The answer is: the chair.", ["a chair", "table"], "A"),
        ("I compare both. Therefore, the answer is: The Table", ["a chair", "table"], "B"),
        ("Final answer: cat", ["dog", "the cat"], "B"),
        ("The answer is: chair", ["chair", "a chair"], "A"),
        ("The answer is: the chair", ["chair", "a chair"], None),
        ("The object is: lamp", ["bed", "lamp"], "B"),
        ("Yes, the dog is there", ["no", "yes"], "B"),
        ("2.5", ["25", "2.5"], "B"),
        ("-1", ["1", "2"], None),
        ("beneath it", ["above", "below"], "B"),
        ("the answer is: in front", ["behind the car", "in front of the car"], "B"),
        ("left", ["left lamp", "left chair"], None),
    ],
)
def test_a_sentence_names_an_option_by_its_words(text, choices, letter):
    assert parsers.option(text, choices, strict=False) == letter


@pytest.mark.parametrize(
    ("prediction", "gold", "is_right"),
    [
        ("left", "I look.\n<b> Therefore, the answer is: left", True),
        ("I look. Therefore, the answer is: left", "left", True),
        ("to the left of it", "left", True),
        ("on the right", "left", False),
        ("not left", "left", False),
        ("left and right", "left", False),
        ("left chair", "left lamp", False),
        ("The answer is: a left lamp", "a left lamp", True),
        ("beneath", "below", True),
        ("(B) right", "(B)", True),
        ("(A) or (B)", "(B)", False),
        ("Yes, it is.", "yes", True),
        ("yes and no", "yes", False),
        ("The answer is: Red.", "red", True),
        ("blue", "red", False),
        ("<answer>red</answer>", "red", True),
    ],
)
def test_a_text_is_right_if_it_states_the_gold_text(prediction, gold, is_right, tmp_path):
    records = [{"p": prediction, "g": gold}]
    report, _ = score_records(tmp_path, records, "text", {"pred": "p", "gold": "g"})
    assert report["accuracy"] == is_right


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(rollouts, data):
    passed = data.draw(st.integers(0, rollouts))
    k = data.draw(st.integers(1, min(rollouts, 4)))
    subsets = list(combinations([True] * passed + [False] * (rollouts - passed), k))
    share = sum(map(any, subsets)) / len(subsets)
    assert environment.pass_at(k, rollouts, passed) == pytest.approx(share)


def test_environments_report_rewards_over_rollouts():
    row = {
        "source": "s",
        "benchmark": "environment",
        "image": None,
        "size_px": None,
        "mode": "sampled",
        "prompt": "",
        "text": "",
        "prediction": {},
        "gold": {},
    }
    scored = benchmarks.score_rows(
        [
            {**row, "id": question, "rollout": rollout, "reward": reward}
            for question, rewards in enumerate([(1, 0), (0.2, 0.4)])
            for rollout, reward in enumerate(rewards)
        ]
    )
    values = metric_values(scored)
    assert values["mean_reward"] == pytest.approx(0.4)
    assert values["std_reward"] == pytest.approx(np.std([1, 0, 0.2, 0.4]))
    assert (values["pass@1"], values["pass@2"], values["rollouts"]) == (0.25, 0.5, 2)
    assert benchmarks.named_metrics(scored)["eval/s/questions"] == 2


def test_rewards_of_a_file_are_numbers(tmp_path):
    records = [{"r": value} for value in (1, "0.5", None, 0)]
    report, scored = score_records(tmp_path, records, "environment", {"pred": "r"})
    assert [row["reward"] for row in scored] == [1, 0.5, None, 0]
    assert (report["mean_reward"], report["unscored_fraction"], report["pass@1"]) == (
        0.5,
        0.25,
        0.5,
    )
    for value in ("[421,198]", "(421,198)", "1,024", [3], True, "nan", {"r": 1}):
        message = f"the rewards of 1 of 5 rows are no numbers, first row 4: {value!r}"
        with pytest.raises(UserError, match=re.escape(message)):
            score_records(tmp_path, [*records, {"r": value}], "environment", {"pred": "r"})


def test_a_file_without_a_reward_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of 2 rows has a reward"):
        score_records(tmp_path, [{"r": None}] * 2, "environment", {"pred": "r"})


def test_intervals_resample_images_and_repeat():
    rng = np.random.default_rng(1)
    single = {"x": rng.random(200)}
    repeated = {"x": np.repeat(single["x"], 5)}
    first = intervals(single, [None] * 200)
    assert first == intervals(single, list(range(200)))
    images = np.repeat(np.arange(200), 5).tolist()
    assert intervals(repeated, images) == first, "copies of a row add no information"
    low, high = first["x"]
    normal_width = 2 * 1.96 * single["x"].std() / np.sqrt(200)
    assert high - low == pytest.approx(normal_width, rel=0.15)


def rollout_rows(repeats: int, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns scored rows of 100 questions. The answers to 44 questions are always right."""
    row = {"source": "", "benchmark": "environment", "size_px": None, "mode": "given"}
    row |= {"prompt": "", "text": "", "prediction": {}, "gold": {}}
    return benchmarks.score_rows(
        [
            {**row, "id": q, "rollout": r, "image": images[q], "reward": float(q % 25 < 11)}
            for q in range(100)
            for r in range(repeats)
        ]
    )


def test_equal_rollouts_of_a_question_do_not_narrow_the_interval():
    no_names = [None] * 100
    once, often = (benchmarks.make_report(rollout_rows(repeats, no_names)) for repeats in (1, 8))
    assert once["intervals"]["pass_rate"] == often["intervals"]["pass_rate"] == [0.34, 0.54]
    assert (often["resampled"], often["images"], often["n"]) == ("questions", 0, 100)
    named = benchmarks.make_report(rollout_rows(8, [f"{q}.jpg" for q in range(100)]))
    assert named["intervals"]["pass_rate"] == [0.34, 0.54]
    assert (named["resampled"], named["images"]) == ("images", 100)
    # four questions on each image that agree with each other: a quarter of the clusters
    shared = benchmarks.make_report(rollout_rows(8, [f"{q // 4}.jpg" for q in range(100)]))
    low, high = shared["intervals"]["pass_rate"]
    assert shared["images"] == 25 and high - low > 0.2
    mixed = benchmarks.make_report(rollout_rows(8, ["0.jpg", *[None] * 99]))
    assert (mixed["resampled"], mixed["images"]) == ("images and questions", 1)


def test_rollouts_of_another_program_are_one_cluster_for_each_question(tmp_path, capsys):
    records = [{"id": q, "rollout": r, "reward": q % 2} for q in range(20) for r in range(5)]
    (tmp_path / "p.json").write_text(json.dumps(records))
    call(
        "evaluate",
        f"--predictions={tmp_path}/p.json",
        "--benchmark=environment",
        "--fields=pred=reward",
        f"--out={tmp_path}",
    )
    assert "questions are resampled, because images have no names" in capsys.readouterr().out
    low, high = json.loads((tmp_path / "eval.json").read_text())["intervals"]["pass_rate"]
    assert high - low >= 0.4


@pytest.mark.parametrize(
    ("image", "identity"),
    [
        ("a.jpg", "a.jpg"),
        (7, 7),
        ({"path": "a.jpg", "bytes": None}, "a.jpg"),
        (["a.jpg"], "a.jpg"),
        ({"path": None}, None),
        (None, None),
        ([1, 2], None),
        ("data:image/png;base64,iVBORw0KGgo=", "sha256:"),
    ],
)
def test_the_image_of_a_row_is_its_name_or_a_hash(image, identity, tmp_path):
    record = box_records([BOX], image=image)[0]
    (row,) = score_records(tmp_path, [record])[1]
    if identity == "sha256:":
        assert row["image"].startswith(identity) and len(row["image"]) == 23
    else:
        assert row["image"] == identity


def test_an_image_without_a_name_is_known_by_its_content():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    values = [pixels, pixels[::-1], pixels.reshape(2, 8, 3), b"one", b"two", {"bytes": b"one"}]
    names = [image_identity(value, 0) for value in values]
    assert len(set(names)) == 5 and names[3] == names[5]
    assert image_identity(pixels.copy(), 1) == names[0]
    packed = {"path": "a.jpg", "bytes": b"one"}
    assert image_identity(packed, 0) == image_identity("a.jpg", 0) == "a.jpg"
    assert [image_identity(None, number) for number in (3, 4)] == ["record 3", "record 4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions=p.json", "--workdir=run"], "--workdir has no meaning for a file"),
        (
            ["--predictions=p.json", "--config=configs/tiny.py"],
            "--config has no meaning",
        ),
        (
            ["--config=configs/tiny.py", "--workdir=run", "--benchmark=rec"],
            "--benchmark has no",
        ),
    ],
)
def test_a_flag_of_the_other_mode_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        call("evaluate", *arguments)


@pytest.mark.slow
def test_flags_of_the_command_have_either_spelling(data, capsys, tmp_path):
    path = data / "predictions" / "baseline_rec_results_refcocog_val.json"
    for flag in ("--box-format=xyxy_px", "--box_format=xyxy_px"):
        arguments = [
            f"--predictions={path}",
            "--benchmark=rec",
            "--fields=pred=extracted_answer,gold=ground_truth",
            flag,
            f"--out={tmp_path}",
        ]
        call("evaluate", *arguments)
        assert "acc50                 86.60 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["acc50"] == 0.866
    arguments = [
        f"--predictions={path}",
        "--benchmark=rec",
        "--fields=pred=a,gold=b",
        "--box-format=xyxy_pixel",
    ]
    with pytest.raises(UserError, match="did you mean xyxy_px"):
        call("evaluate", *arguments)
