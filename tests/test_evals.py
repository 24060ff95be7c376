"""Measures of rows: published numbers come out, bad files are refused with counts, and laws of each kind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from commands import call
from hypothesis import example, given
from hypothesis import strategies as st

from pg_ground.boxes import host_boxes, iou
from pg_ground.config import Source
from pg_ground.data import run_lengths
from pg_ground.data.box_formats import BOX_ORDERS, format_names, image_extent
from pg_ground.evals import (
    benchmarks,
    cv_bench,
    environment,
    pointing,
    prediction_files,
    rows,
    runner,
    scoring,
)
from pg_ground.evals.intervals import intervals
from pg_ground.rewards import locations, parsers
from pg_ground.types import UserError

FIELDS = {"pred": "extracted_answer", "gold": "ground_truth"}


def score(
    tmp_path: Path, records, benchmark="rec", fields=FIELDS, formats=prediction_files.Formats()
):
    path = tmp_path / "file.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return scoring.rescore(path, benchmark, fields, formats)


def records_of(boxes, gold=(10, 20, 110, 220), **more):
    return [{"extracted_answer": box, "ground_truth": list(gold), **more} for box in boxes]


PUBLISHED = {
    "baseline_rec_results_refcoco_val": (0.8975, 0),
    "baseline_rec_results_refcocog_val": (0.866, 0),
    "original_cot_rec_results_refcoco_val": (0.3265, 1279),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_predictions_give_their_published_numbers(data, name):
    path = data / "predictions" / f"{name}.json"
    found, scored = scoring.rescore(path, "rec", FIELDS, prediction_files.Formats())
    accuracy, unreadable = PUBLISHED[name]
    assert (found["acc50"], found["invalid"], found["n"]) == (accuracy, unreadable, 2000)
    theirs = json.loads(path.read_text())
    assert theirs["accuracy"] == round(100 * found["acc50"], 2)
    assert [row["correct"] for row in scored] == [record["correct"] for record in theirs["results"]]
    low, high = found["intervals"]["acc50"]
    assert low < accuracy < high and found["images"] < 2000


def test_rows_that_were_written_give_the_same_numbers_and_rows(data, tmp_path):
    path = data / "predictions" / "baseline_rec_results_refcoco_val.json"
    first, scored = scoring.rescore(path, "rec", FIELDS, prediction_files.Formats())
    scoring.write_results(tmp_path, first, scored)
    again, rescored = scoring.rescore(
        tmp_path / "predictions.jsonl", "", {}, prediction_files.Formats()
    )
    assert again == {name: value for name, value in first.items() if name != "file_says"}
    assert rows.to_json_lines(rescored) == (tmp_path / "predictions.jsonl").read_text()


def test_rows_hold_any_text(tmp_path):
    texts = ["line\u2028separator", "next\x85line", "half a pair \ud800", "\u732b"]
    found, scored = score(
        tmp_path, [records_of([[10, 20, 110, 220]], question=text)[0] for text in texts]
    )
    scoring.write_results(tmp_path, found, scored)
    again, rescored = scoring.rescore(
        tmp_path / "predictions.jsonl", "", {}, prediction_files.Formats()
    )
    assert again == found and [row["prompt"] for row in rescored] == texts
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
    ],
)
def test_rows_that_somebody_has_edited_are_refused(edit, message, tmp_path):
    _, scored = score(tmp_path, records_of([[10, 20, 110, 220]] * 3))
    path = tmp_path / "rows.jsonl"
    path.write_text(rows.to_json_lines([scored[0], {**scored[1], **edit}, scored[2]]))
    with pytest.raises(UserError, match=message):
        scoring.rescore(path, "", {}, prediction_files.Formats())


POINTS = {
    "Molmo's": '<points x1="10.5" y1="20" x2="30" y2="40.5" alt="cats">cats</points>',
    "one a tag": '<point x="10.5" y="20" alt="cat">cat</point> <point x="30" y="40.5">cat</point>',
    "clicks": "click(x=10.5, y=20) click(x=30, y=40.5)",
    "JSON": '```json\n[{"point_2d": [10.5, 20]}, {"point_2d": [30, 40.5]}]\n```',
    "pairs": "(10.5, 20), (30, 40.5)",
}


@pytest.mark.parametrize("form", POINTS)
def test_points_are_read_in_any_form(form):
    assert [place.numbers for place in locations.read_any(POINTS[form], 2)] == [
        (10.5, 20),
        (30, 40.5),
    ]


FORMS = {
    "a list": [10, 20, 110, 220],
    "numbers as text": ["10", "20", "110", "220"],
    "a list of boxes": [[10, 20, 110, 220], [0, 0, 5, 5]],
    "corners": [[10, 20], [110, 220]],
    "JSON": '```json\n[{"bbox_2d": [10, 20, 110, 220], "label": "x"}]\n```',
    "behind a thought": "<think>[1, 2, 3, 4]</think> the box is [10, 20, 110, 220].",
    "Python in a tag": "<think>3 of 4</think><answer>{'bbox_2d': [10, 20, 110, 220]}</answer>",
    "pairs in text": "<box>(10,20),(110,220)</box>",
    "one pair of brackets a number": "<p>cat</p> {<10><20><110><220>}",
    "a tag that sampling stopped at": "<think>[1, 2, 3, 4]</think><answer>[10, 20, 110, 220]",
    "a tag behind a thought without end": "<think>[1, 2, 3, 4] <answer>[10, 20, 110, 220]",
    "an object": {"x1": 10, "y1": 20, "x2": 110, "y2": 220},
    "a named box": {"bbox": [10, 20, 110, 220], "score": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_box_is_read_in_any_form(form, tmp_path):
    found, _ = score(tmp_path, records_of([FORMS[form]]))
    assert (found["mean_iou"], found["invalid"]) == (1, 0)


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
def test_what_cannot_be_read_is_invalid_and_counts_as_wrong(box, tmp_path):
    found, scored = score(tmp_path, records_of([box, [10, 20, 110, 220]]))
    assert (found["acc50"], found["mean_iou"], found["invalid"], found["center_acc"]) == (
        0.5,
        0.5,
        1,
        1,
    )
    assert scored[0]["iou"] == 0 and scored[0]["correct"] == 0


@pytest.mark.parametrize("form", format_names(BOX_ORDERS))
def test_every_box_format_reads_the_same_box(form, tmp_path):
    order, unit = form.rsplit("_")
    x1, y1, x2, y2 = (
        v * extent / side
        for v, side, extent in zip(
            (10, 20, 110, 220), (640, 480) * 2, image_extent(unit, (640, 480)) * 2, strict=True
        )
    )
    written = {
        "xyxy": [x1, y1, x2, y2],
        "yxyx": [y1, x1, y2, x2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    }[order]
    records = [{"a": {"b": written}, "gold": [10, 20, 110, 220], "size": [640, 480]}]
    fields = {"pred": "a.b", "gold": "gold", "size": "size"}
    found, _ = score(
        tmp_path, records, fields=fields, formats=prediction_files.Formats(form, gold="xyxy_px")
    )
    assert found["mean_iou"] == pytest.approx(1, abs=1e-12)


def test_loc_tokens_are_bins_whatever_the_format_says(tmp_path):
    records = [
        {
            **records_of(["<loc0000><loc0512><loc1023><loc1023> cat"], (512, 0, 1023, 100))[0],
            "width": 1023,
            "height": 100,
        }
    ]
    assert score(tmp_path, records)[0]["mean_iou"] == pytest.approx(1)
    with pytest.raises(UserError, match="size of row 0's image is not known"):
        score(tmp_path, records_of(["<loc0000><loc0512><loc1023><loc1023>"]))


BAD: dict[str, tuple] = {
    "empty": ("", "is empty"),
    "no rows": ([], "has 0 rows"),
    "no JSON": ('{"extracted_answer": 1, "ground_truth": 2}\n{"extracted', "line 2 is not JSON"),
    "missing": (
        [*records_of([[1, 2, 3, 4]]), {"ground_truth": [1, 2, 3, 4]}],
        "1 of 2 rows have no extracted_answer, first row 1",
    ),
    "twice": (
        [{**one, "id": i % 2} for i, one in enumerate(records_of([[1, 2, 3, 4]] * 3))],
        "1 of 3 rows repeat the id .* row 2",
    ),
    "gold": (records_of([[1, 2, 3, 4]], (5, 5, 5, 5)), "gold of 1 of 1 rows is not one box"),
    "rows": ([3], "1 of 1 rows are not objects"),
    "a number": ("3", "is 3: it must be a JSON list, JSON lines or an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_counts(name, tmp_path):
    records, message = BAD[name]
    with pytest.raises(UserError, match=message):
        score(tmp_path, records)


def random_boxes(count: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 300, (count, 2)), rng.uniform(40, 150, (count, 2))
    return np.concatenate([corner, corner + side], 1)


@pytest.mark.parametrize(
    ("wrong", "sizes", "reading"),
    [
        (lambda b: b[[1, 0, 3, 2]], False, "--box-format=yxyx_px would give 1.0000"),
        (
            lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
            False,
            "--box-format=xywh_px would give 1.0000",
        ),
        (
            lambda b: b * 1000 / [640, 480, 640, 480],
            True,
            "--box-format=xyxy_permille would give 1.0000",
        ),
        (
            lambda b: (b / [640, 480, 640, 480])[[1, 0, 3, 2]] * 1023,
            True,
            "--box-format=yxyx_bin would give 1.0000",
        ),
        (
            lambda b: b / [640, 480, 640, 480],
            False,
            "x scaled by 640 and y by 480, as --box-format=xyxy_frac does",
        ),
        (lambda b: b / 2, True, "x scaled by 2 and y by 2 .are these boxes of a resized image"),
    ],
)
@pytest.mark.parametrize("benchmark", ["rec", "objects", "detection"])
def test_boxes_in_another_frame_are_told_with_the_reading_that_fits(
    wrong, sizes, reading, benchmark, tmp_path
):
    records = [
        {
            "extracted_answer": list(wrong(box)),
            "ground_truth": box.tolist(),
            **({"width": 640, "height": 480} if sizes else {}),
        }
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match=reading):
        score(tmp_path, records, benchmark)


def test_gold_in_another_frame_is_told(tmp_path):
    records = [
        {
            "extracted_answer": list(box),
            "ground_truth": list(box * 1000 / [640, 480, 640, 480]),
            "img_size": [640, 480],
        }
        for box in random_boxes()
    ]
    with pytest.raises(UserError, match="--gold-format=xyxy_permille would give 1.0000"):
        score(tmp_path, records)


def test_a_poor_model_is_no_wrong_frame(tmp_path):
    boxes = random_boxes()
    records = [
        {"extracted_answer": list(a), "ground_truth": list(b)}
        for a, b in zip(boxes, boxes[::-1], strict=True)
    ]
    assert score(tmp_path, records)[0]["acc50"] < 0.2


def test_another_number_of_questions_is_not_reported_under_the_benchmark_s_name(tmp_path):
    with pytest.raises(
        UserError, match="refcoco_val has 10834 questions, but there are 2: --benchmark=rec"
    ):
        score(tmp_path, records_of([[1, 2, 3, 4]] * 2), "refcoco_val")
    with pytest.raises(UserError, match="refcoco_val@3 has 3 questions, but there are 2"):
        score(tmp_path, records_of([[1, 2, 3, 4]] * 2), "refcoco_val@3")
    row = {"benchmark": "refcoco_val", "mode": "greedy", "id": 0, "gold": {"boxes": [0]}}
    assert runner.with_benchmark_name([row], is_configured=True)[0]["benchmark"] == "refcoco_val@1"
    assert (
        runner.with_benchmark_name(
            [{**row, "benchmark": "rec", "gold": {"boxes": []}}], is_configured=False
        )[0]["benchmark"]
        == "objects"
    )


coordinate = st.floats(0, 1000, allow_nan=False)


@example((0, 0, 1e-200, 1e-200), (0, 0, 1e-200, 1e-200))
@given(st.tuples(*[coordinate] * 4), st.tuples(*[coordinate] * 4))
def test_iou_is_symmetric_and_a_share(a, b):
    boxes = host_boxes([a, b])
    assert iou(boxes[0], boxes[1]) == iou(boxes[1], boxes[0]) and 0 <= iou(boxes[0], boxes[1]) <= 1


def rows_of(kind: str, predictions, gold, **more):
    return benchmarks.score_rows(
        [
            {
                "source": "s",
                "benchmark": kind,
                "id": i,
                "image": None,
                "size_px": [100, 100],
                "mode": "greedy",
                "rollout": 0,
                "prompt": "",
                "text": "",
                "prediction": p,
                "gold": g,
                **more,
            }
            for i, (p, g) in enumerate(zip(predictions, gold, strict=True))
        ]
    )


def boxes(*found):
    return {"boxes": [{"label": label, "xyxy_px": box} for label, box in found]}


def points(*found):
    return {"points": [{"label": "", "xy_px": point} for point in found]}


A, C = [0, 0, 10, 10], [50, 50, 90, 90]


def test_sets_of_boxes_pay_for_missing_spurious_and_duplicate_ones():
    gold = [boxes(("a", A), ("c", C))] * 4 + [boxes()]
    said = [
        boxes(("c", C), ("a", A)),
        boxes(("a", A)),
        boxes(("a", A), ("a", A), ("c", C)),
        boxes(("a", C), ("c", A)),
        boxes(),
    ]
    found = rows_of("objects", said, gold)
    np.testing.assert_allclose([row["iou"] for row in found], [1, 2 / 3, 4 / 5, 0, 1])
    assert [row["correct"] for row in found] == [1, 0, 0, 0, 1] and [
        row["duplicates"] for row in found
    ] == [0, 0, 1, 0, 0]
    assert benchmarks.compute_metrics(found).values["duplicates_per_image"] == 0.2


def test_detection_ranks_by_scores_where_all_boxes_have_one():
    gold = [boxes(("a", A), ("c", C))]
    said = {
        "boxes": [
            {"label": "a", "xyxy_px": C, "score": 0.1},
            {"label": "a", "xyxy_px": A, "score": 0.9},
        ]
    }
    values = benchmarks.compute_metrics(rows_of("detection", [said], gold)).values
    assert (values["ap"], values["ap50"]) == (pytest.approx(0.5), pytest.approx(0.5))
    for one in said["boxes"]:
        del one["score"]
    assert benchmarks.compute_metrics(rows_of("detection", [said], gold)).values["ap"] == pytest.approx(
        0.25
    )  # the wrong one is first


def test_points_are_matched_for_most_hits():
    gold = {**boxes(("", A), ("", [0, 0, 100, 100])), **points([5, 5], [60, 60])}
    found = rows_of(
        "pointing",
        [points([10, 10], [5, 5]), points([60, 60]), points(), points([5, 5], [60, 60], [7, 7])],
        [gold] * 4,
    )
    assert [row["hits"] for row in found] == [2, 1, 0, 2] and [row["recall"] for row in found] == [
        1,
        0.5,
        0,
        1,
    ]
    assert found[3]["precision"] == 2 / 3 and [row["point_in_box"] for row in found] == [1, 0, 0, 1]
    near = rows_of("pointing", [points([53, 50]), points([60, 50])], [points([50, 50])] * 2)
    assert [row["f1"] for row in near] == [1, 0] and near[0][
        "distance_px"
    ] == 3  # 5 % of the diagonal is 7.07 pixels


@given(st.integers(0, 2**12 - 1), st.integers(0, 99), st.integers(0, 99))
def test_run_lengths_cover_the_cells_of_their_mask(bits, x, y):
    mask = np.array([bits >> i & 1 for i in range(12)], bool).reshape(3, 4)
    assert (
        pointing.covers(run_lengths.encode(mask), (x + 0.5, y + 0.5), (100, 100))
        == mask[int((y + 0.5) * 3 / 100), int((x + 0.5) * 4 / 100)]
    )


def test_a_click_on_the_edge_is_inside(data):
    element = json.loads((data / "gui" / "test.jsonl").read_text().splitlines()[0])["test_samples"][
        0
    ]
    x1, _, x2, y2 = element["bbox"]
    said = [
        points([x1, y2]),
        points([x2 + 1, y2]),
        points(element["point"]),
        points(),
        boxes(("", element["bbox"])),
    ]
    found = rows_of("screenspot", said, [boxes(("", element["bbox"]))] * 5)
    assert [row["correct"] for row in found] == [1, 0, 1, 0, 1]
    assert benchmarks.compute_metrics(found).values["invalid_fraction"] == 0.2


def test_counts_are_exact_and_off_by_their_mean(data, tmp_path):
    records = [
        json.loads(line)
        for line in (data / "counting" / "superclevr_test200.jsonl").read_text().splitlines()
    ]
    for i, record in enumerate(records):
        record["pred"] = [
            record["ground_truth"],
            f"<answer> {record['ground_truth'] + 2} </answer>",
            "many",
            "3 or 4",
        ][i % 4]
    found, _ = score(tmp_path, records, "counting", {"pred": "pred", "gold": "ground_truth"})
    assert (found["accuracy"], found["mae"], found["invalid_fraction"]) == (0.25, 1, 0.5)


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
    ],
)
def test_a_count_is_the_one_number_of_an_answer(text, number):
    assert parsers.number(text, strict=False) == number


def test_cv_bench_s_own_rows_are_read(data):
    records = [
        json.loads(line)
        for line in (data / "cvbench" / "cvbench_rows.jsonl").read_text().splitlines()
    ]
    gold = [cv_bench.gold(record, "row") for record in records]
    assert gold[0] == {
        "choice": "C",
        "choices": ["3", "2", "1", "0"],
        "task": "Count",
        "source": "ADE20K",
    }
    assert all(
        f"({one['choice']})" == record["answer"] for one, record in zip(gold, records, strict=True)
    )
    with pytest.raises(UserError, match="is not a record of CV-Bench"):
        cv_bench.gold({"task": "left", "question": "?"}, "row 3")


def cv_rows(tasks=cv_bench.TASKS):
    """As many rows as published; those of COCO and of Omni3D are right."""
    gold = [
        {
            "choice": "A",
            "choices": ["x", "y"],
            "task": task,
            "source": "Omni3D" if task in ("Depth", "Distance") else ("COCO", "ADE20K")[i % 4 == 0],
        }
        for task, count in tasks.items()
        for i in range(count)
    ]
    return rows_of(
        "cv_bench", [{"choice": "B" if one["source"] == "ADE20K" else "A"} for one in gold], gold
    )


def test_defect_21_cv_bench_is_cv_bench_with_its_published_counts_and_formula():
    found = cv_rows()
    benchmarks.check_question_count(found, "cv_bench")
    values = benchmarks.compute_metrics(found).values
    assert (values["cv_bench_2d"], values["cv_bench_3d"], values["cv_bench"]) == (0.5, 1, 0.75)
    assert values["qualitative"] == 1 - 163 / 1850 and values["relation"] == 1 - 163 / 650
    for lacking in ({"Relation": 649}, {"Relation": 651, "Count": 787}, {"Count": 0}):
        with pytest.raises(UserError, match="--benchmark=multiple_choice"):
            benchmarks.check_question_count(cv_rows(cv_bench.TASKS | lacking), "cv_bench")
    benchmarks.check_question_count(
        cv_rows({task: cv_bench.TASKS[task] for task in cv_bench.QUALITATIVE}),
        "cv_bench_qualitative",
    )


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
        ("A dog is left", None),
        (None, None),
    ],
)
def test_an_option_is_named_once_or_not_at_all(text, letter):
    assert parsers.option(text, ["left", "right"], strict=False) == letter


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(rollouts, data):
    from itertools import combinations

    passed, k = data.draw(st.integers(0, rollouts)), data.draw(st.integers(1, min(rollouts, 4)))
    subsets = list(combinations([True] * passed + [False] * (rollouts - passed), k))
    assert environment.pass_at(k, rollouts, passed) == pytest.approx(
        sum(map(any, subsets)) / len(subsets)
    )


def test_environments_report_rewards_over_rollouts():
    one = {
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
            {**one, "id": i, "rollout": r, "reward": value}
            for i, group in enumerate([(1, 0), (0.2, 0.4)])
            for r, value in enumerate(group)
        ]
    )
    values = benchmarks.compute_metrics(scored).values
    assert values["mean_reward"] == pytest.approx(0.4) and values["std_reward"] == pytest.approx(
        np.std([1, 0, 0.2, 0.4])
    )
    assert (values["pass@1"], values["pass@2"], values["rollouts"]) == (0.25, 0.5, 2)
    assert benchmarks.named_metrics(scored)["eval/s/questions"] == 2


def test_intervals_resample_images_and_repeat():
    rng = np.random.default_rng(1)
    alone = {"x": rng.random(200)}
    together = {"x": np.repeat(alone["x"], 5)}
    first = intervals(alone, [None] * 200)
    assert first == intervals(alone, list(range(200)))
    assert (
        intervals(together, np.repeat(np.arange(200), 5).tolist()) == first
    )  # copies of a row add nothing
    low, high = first["x"]
    assert high - low == pytest.approx(2 * 1.96 * alone["x"].std() / np.sqrt(200), rel=0.15)


def test_what_a_source_is_measured_as_follows_from_what_it_asks():
    for source, name in (
        (Source(), "rec"),
        (Source(target="points"), "pointing"),
        (Source(suffix="count"), "counting"),
        (Source(target="text", suffix="{answer}"), "text"),
        (Source(suffix="json"), "rec"),
    ):
        assert runner.default_benchmark(source) == name


def test_flags_of_files_have_either_spelling(data, capsys, tmp_path):
    path = data / "predictions" / "baseline_rec_results_refcocog_val.json"
    for flag in ("--box-format=xyxy_px", "--box_format=xyxy_px"):
        argv = [
            f"--predictions={path}",
            "--benchmark=rec",
            "--fields=pred=extracted_answer,gold=ground_truth",
            flag,
        ]
        call("evaluate", *argv, f"--out={tmp_path}")
        assert "acc50                 86.60 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["acc50"] == 0.866
    with pytest.raises(UserError, match="did you mean xyxy_px"):
        call(
            "evaluate",
            f"--predictions={path}",
            "--benchmark=rec",
            "--fields=pred=a,gold=b",
            "--box-format=xyxy_pixel",
        )
