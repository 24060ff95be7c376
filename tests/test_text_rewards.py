"""Laws of the text rewards, the numbers of the systems that they replace, and these systems'
defects.

A test with a number in its name is about the defect of that number in section 6 of
`../shared/reference/seeds.md`.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parsers import TEXTS

from pg_ground import boxes, tokenizer
from pg_ground.config import Source
from pg_ground.data.examples import format_answer
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample

BOX, OTHER = (100, 100, 200, 300), (300, 300, 400, 400)
QUESTION = "What is the spatial relationship between the chair and the table?"


def ask(
    gold: str = "", target: str = "text", size: tuple[int, int] = (640, 480), **fields
) -> TextExample:
    blank = TextExample("", gold, (), (), (), size, target, "source", 0, 9)
    return blank._replace(**fields)


def ask_boxes(
    *gold: tuple, labels: tuple[str, ...] = (), size: tuple[int, int] = (640, 480)
) -> TextExample:
    floats = tuple(tuple(map(float, box)) for box in gold)
    return ask(target="boxes", boxes=floats, labels=labels or ("",) * len(gold), size=size)


def ask_points(
    *gold: tuple, labels: tuple[str, ...] = (), size: tuple[int, int] = (640, 480)
) -> TextExample:
    floats = tuple(tuple(map(float, point)) for point in gold)
    return ask(target="points", points=floats, labels=labels or ("",) * len(gold), size=size)


def reward(name: str, text: str, example: TextExample) -> float:
    return TEXT_REWARDS[name](text, example)


def recipe(weights: dict[str, float], text: str, example: TextExample) -> float:
    return sum(weight * reward(name, text, example) for name, weight in weights.items())


def json_points(*points: tuple, label: str = "cat") -> str:
    return json.dumps([{"point_2d": list(point), "label": label} for point in points])


def json_boxes(*corners: tuple, label: str = "cat") -> str:
    return json.dumps([{"bbox_2d": list(box), "label": label} for box in corners])


def detections(*entries: tuple) -> str:
    """Returns an answer with (box, confidence) entries."""
    objects = [{"Position": list(box), "Confidence": confidence} for box, confidence in entries]
    return f"<think>so</think><answer>{objects}</answer>"


LIST_NAMES = ("list_point", "list_coverage", "list_iou", "list_iou_squared")
DICT_NAMES = ("dict_point", "dict_coverage", "dict_iou", "dict_format")


def as_dict(boxes_by_key: dict) -> str:
    return json.dumps(boxes_by_key)


@pytest.fixture(scope="module")
def seeds(golden) -> dict:
    return json.loads((golden / "seeds_rewards.json").read_text())


POINT_RECIPE = {"json_format": 0.2, "json_points": 0.8}
LIST_RECIPE = {"list_format": 1.0, "list_point": 1.0, "list_coverage": 1.0}
DICT_RECIPE = {"dict_format": 1.0, "dict_point": 1.0, "dict_coverage": 1.0}
TOKENS_RECIPE = {"box_tokens_format": 0.5, "list_iou_squared": 0.5}
OVD_RECIPE = {"think_answer_format": 0.34, "ovd_iou": 0.33, "ovd_confidence": 0.33}
COUNT_RECIPE = {"think_answer_format": 0.5, "count_exact": 0.5}
MATH_RECIPE = {"think_boxed_format": 0.1, "math": 0.9}

EXACT = 1e-6
"""The numbers of other systems have six digits. The bound is half of the last digit, and the error
of a float64 sum.
"""


# the systems that are replaced


def test_points_equal_synthetic_grounding(seeds):
    for row in seeds["distance_gaussian_sigma100"]:
        assert reward(
            "json_points", json_points(row["pred"]), ask_points(row["gt"])
        ) == pytest.approx(row["reward"], abs=EXACT)


@pytest.mark.parametrize(
    ("point", "gold", "value"),
    [
        ((421, 198), (421, 198), 1.0),
        ((421, 198), (400, 210), 0.976939),
        ((421, 198), (521, 198), 0.685225),
        ((421, 198), (421, 398), 0.308268),
        ((0, 0), (320, 320), 0.200029),
        ((0, 0), (640, 480), 0.2),
    ],
)
def test_the_point_environment_scores_as_its_table_says(point, gold, value):
    assert recipe(POINT_RECIPE, json_points(point), ask_points(gold)) == pytest.approx(
        value, abs=EXACT
    )


def test_distance_is_measured_in_the_scaled_image():
    example = ask_points((410.0, 325.5), size=(1280, 720))
    value = reward("json_points", json_points((400, 300)), example)
    assert value == pytest.approx(0.990666, abs=EXACT)


def test_boxes_equal_easydistill_unrounded(seeds):
    for row in seeds["exact_unrounded"]:
        text, example = str(row["pred"]), ask_boxes(row["gt"])
        for key, name in (
            ("point", "list_point"),
            ("plane", "list_coverage"),
            ("iou", "list_iou"),
            ("iou2", "list_iou_squared"),
        ):
            assert reward(name, text, example) == pytest.approx(row[key], abs=EXACT), (name, text)
        example = ask(json.dumps({"0": [row["gt"]]}))
        assert reward("dict_coverage", as_dict({"0": [row["pred"]]}), example) == pytest.approx(
            row["plane"], abs=EXACT
        )


IMPROPER = ("[200,300,100,100]", "[150,200,150,200]")


def test_boxes_equal_easydistill_rounded(seeds):
    """But for reversed and empty boxes (defect 3), to the rounding (defect 6)."""
    rows = [
        row
        for row in seeds["easydistill_single_seed_values_rounded3"]
        if row["completion"] not in IMPROPER
    ]
    assert len(rows) == 7
    for row in rows:
        example = ask_boxes(row["gt"])
        assert reward("list_format", row["completion"], example) == row["format"]
        for key, name in (("gaussian_point", "list_point"), ("gaussian_plane", "list_coverage")):
            assert reward(name, row["completion"], example) == pytest.approx(
                row[key], abs=5e-4 + EXACT
            )


@pytest.mark.parametrize(
    ("text", "point", "coverage", "iou"),
    [
        ("[140,190,160,210]", 1.0, 0.275974, 0.02),
        ("[0,0,300,400]", 1.0, 0.692820, 0.166667),
        ("[-110,120,210,330]", 0.131, 0.685, None),
        ("[110.5,120,210.5,330]", 0.948, 0.987, None),
        ("the box [110,120,210,330]", 0.950041, 0.987058, 0.653226),
    ],
)
def test_boxes_score_as_easydistills_table_says(text, point, coverage, iou):
    example = ask_boxes(BOX)
    rounding = EXACT if iou else 5e-4
    assert reward("list_point", text, example) == pytest.approx(point, abs=rounding)
    assert reward("list_coverage", text, example) == pytest.approx(coverage, abs=rounding)
    if iou:
        assert reward("list_iou", text, example) == pytest.approx(iou, abs=EXACT)
    assert reward("list_format", text, example) == (text[1:].replace(",", "").rstrip("]").isdigit())


GOLD_DICT = {
    "0": [[456, 337, 725, 557]],
    "1": [],
    "2": [[849, 407, 961, 482], [965, 480, 1099, 550]],
    "3": [],
}
WIDE = (1280, 720)


def test_dicts_equal_the_micro_f(seeds):
    for row in seeds["proposed_multi_micro_f"]:
        for key, name in (("point", "dict_point"), ("plane", "dict_coverage"), ("iou", "dict_iou")):
            for text in (as_dict(row["pred"]), str({int(k): v for k, v in row["pred"].items()})):
                value = reward(name, text, ask(json.dumps(row["gt"]), size=WIDE))
                assert value == pytest.approx(row[key], abs=EXACT), (name, text)


@pytest.mark.parametrize(
    ("predicted", "point", "coverage"),
    [
        (GOLD_DICT, 1.0, 1.0),
        ({**GOLD_DICT, "0": GOLD_DICT["0"] * 2, "2": []}, 0.4, 0.4),
        ({"0": [], "1": [], "2": [], "3": []}, 0.0, 0.0),
        ({"0": GOLD_DICT["2"], "2": GOLD_DICT["0"]}, 0.021652, 0.136905),
    ],
)
def test_dicts_score_as_the_table_says(predicted, point, coverage):
    example = ask(json.dumps(GOLD_DICT), size=WIDE)
    assert reward("dict_point", as_dict(predicted), example) == pytest.approx(point, abs=EXACT)
    assert reward("dict_coverage", as_dict(predicted), example) == pytest.approx(
        coverage, abs=EXACT
    )


def test_dict_format_equals_easydistill(seeds):
    for row in seeds["easydistill_multi_seed_values (class 0 only, IoU>=0.5 gate: buggy)"]:
        assert reward("dict_format", row["completion"], ask(json.dumps(row["gt"]))) == row["format"]


def test_annotated_boxes_and_a_gold_text_are_the_same_gold():
    labels = tuple(key for key, corners in GOLD_DICT.items() for _ in corners)
    annotated = ask_boxes(
        *(box for corners in GOLD_DICT.values() for box in corners), labels=labels, size=WIDE
    )
    text = as_dict({"0": [[460, 340, 720, 560]], "2": [[849, 407, 961, 482]]})
    for name in ("dict_point", "dict_coverage", "dict_iou", "dict_format"):
        assert reward(name, text, annotated) == reward(
            name, text, ask(json.dumps(GOLD_DICT), size=WIDE)
        )
    for gold, name in ((json_boxes(BOX), "json_boxes"), ("[100,100,200,300]", "list_iou")):
        text = gold.replace("200", "210")
        assert reward(name, text, ask(gold)) == reward(name, text, ask_boxes(BOX))


def test_grounding_equals_rllava(seeds):
    for row in seeds["rllava_grounding"]:
        example = ask(row["gt"])
        assert recipe(TOKENS_RECIPE, row["response"], example) == pytest.approx(
            row["score"]["overall"], abs=EXACT
        )
        assert reward("list_iou_squared", row["response"], example) == pytest.approx(
            row["score"]["accuracy"], abs=EXACT
        )


def test_open_vocabulary_detection_equals_rllava(seeds):
    for row in seeds["rllava_ovd"]:
        text = f"<think>so</think><answer>{row['answer']}</answer>"
        example = ask(row["gt"])
        assert recipe(OVD_RECIPE, text, example) == pytest.approx(
            row["score"]["overall"], abs=EXACT
        )
        for key, name in (
            ("format", "think_answer_format"),
            ("iou", "ovd_iou"),
            ("confidence", "ovd_confidence"),
        ):
            assert reward(name, text, example) == pytest.approx(row["score"][key], abs=EXACT)


FAR = (500, 10, 600, 60)


@pytest.mark.parametrize(
    ("entries", "total"),
    [
        (((BOX, 1.0), (OTHER, 0.9)), 0.9835),
        (((BOX, 1.0), (BOX, 1.0), (BOX, 1.0)), 0.56),
        ((), 0.34),
    ],
)
def test_open_vocabulary_detection_scores_as_rllavas_table_says(entries, total):
    assert recipe(OVD_RECIPE, detections(*entries), ask_boxes(BOX, OTHER)) == pytest.approx(total)


@pytest.mark.parametrize(
    ("answer", "total"),
    [
        ("<think>a</think><answer>5</answer>", 1.0),
        ("<think>a</think> <answer>5.0</answer>", 1.0),
        ("5", 0.5),
        ("<think>a</think><answer>5 cars</answer>", 0.5),
        ("<think>a</think><answer>10/2</answer>", 0.5),
        ("<think>a</think><answer>5</answer> cars", 0.5),
        ("<think>a</think><answer>4</answer>", 0.5),
        ("", 0.0),
    ],
)
def test_counting_scores_as_rllavas_table_says(answer, total):
    assert recipe(COUNT_RECIPE, answer, ask("5")) == total


@pytest.mark.parametrize(
    ("answer", "gold", "total"),
    [
        (r"<think>a</think>\boxed{5}", "5", 1.0),
        (r"\boxed{5}", "5", 0.9),
        (r"<think>a</think>\boxed{6}", "5", 0.1),
        (r"\boxed{\frac{1}{2}}", "0.5", 0.9),
        (r"\boxed{140^\circ}", "140", 0.9),
        (r"\boxed{4}, no, \boxed{5}", "5", 0.9),
        (r"\boxed{5}, no, \boxed{4}", "5", 0.0),
        ("5", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_mathematics_scores_as_rllavas_table_says(answer, gold, total):
    assert recipe(MATH_RECIPE, answer, ask(gold)) == pytest.approx(total)


README_THOUGHT = (
    "Looking at the image, I need to determine the spatial relationship between the chair and the "
    "table. I can see that the chair is positioned further to the left side compared to the table. "
    "This visual comparison allows me to conclude that the chair is left of the table."
)

SEED_QUALITY = (0.890909, 0.963636, 0.072727)
"""Of the first three golden rows, in ReinforceSight: keywords counted."""


def test_spatial_answers_equal_reinforcesight(seeds):
    """Its reward less its keyword count and its constant (defect 19), where it reads the answer
    (defect 18).
    """
    for row, quality in zip(seeds["reinforcesight_reward"][:3], SEED_QUALITY, strict=True):
        answer = reward("spatial_answer", row["text"], ask(row["gt"], prompt=QUESTION))
        assert answer == pytest.approx(row["R"] - 0.3 * quality - 0.2, abs=EXACT)


# defects


def test_defect_01_all_classes_count(seeds):
    """Class 2 is missing: EasyDistill gave 1, 1 and ⅔."""
    rows = seeds["easydistill_multi_seed_values (class 0 only, IoU>=0.5 gate: buggy)"]
    for row, value in zip(rows[1:3], (0.499811, 0.399849), strict=True):
        assert reward("dict_point", row["completion"], ask(json.dumps(row["gt"]))) == pytest.approx(
            value, abs=EXACT
        )
        assert row["point"] > value + 0.2


def test_defect_02_no_overlap_is_needed_to_be_near():
    """EasyDistill gave 0 for the first, at an IoU of .27."""
    shifted = as_dict({"0": [[606, 337, 875, 557]], "2": GOLD_DICT["2"]})
    example = ask(json.dumps(GOLD_DICT), size=WIDE)
    assert reward("dict_point", shifted, example) > 0.7
    far = [
        reward("list_point", f"[{x},100,{x + 100},300]", ask_boxes(BOX)) for x in (250, 300, 350)
    ]
    assert far == sorted(far, reverse=True) and far[-1] > 0


@pytest.mark.parametrize("text", IMPROPER)
def test_defect_03_an_improper_box_earns_nothing(text):
    assert recipe(LIST_RECIPE, text, ask_boxes(BOX)) == 0
    assert reward("json_format", json_boxes(json.loads(text)), ask_boxes(BOX)) == 0
    assert (
        reward("dict_format", as_dict({"0": [json.loads(text)]}), ask_boxes(BOX, labels=("0",)))
        == 0
    )


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
@pytest.mark.parametrize("name", ["list_point", "list_coverage", "list_iou"])
def test_defect_04_any_frame_gives_the_same(scale, name):
    values = {"list_point": 0.950041, "list_coverage": 0.987058, "list_iou": 0.653226}
    example = ask_boxes(
        tuple(x * scale for x in BOX), size=(max(round(640 * scale), 1), max(round(480 * scale), 1))
    )
    text = "[" + ",".join(f"{x * scale:.6f}" for x in (110, 120, 210, 330)) + "]"
    assert reward(name, text, example) == pytest.approx(values[name], abs=EXACT)
    assert reward(
        name, "[" + ",".join(f"{x * scale:.6f}" for x in BOX) + "]", example
    ) == pytest.approx(1)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').abort()",
        "{0: [[1/0]]}",
        "[1/0,1,2,3]",
        "{0: exit()}",
        "{'Position': exit()}",
    ],
)
def test_defect_05_nothing_is_evaluated(text):
    for whole in (text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}"):
        for name in TEXT_REWARDS:
            assert reward(name, whole, ask_boxes(BOX)) in (0, -0.5) or math.isnan(
                reward(name, whole, ask_boxes(BOX))
            )


def test_defect_06_nothing_is_rounded():
    assert reward("list_point", "[110,120,210,330]", ask_boxes(BOX)) != 0.95


def test_defect_08_a_row_with_one_box_is_a_row():
    for example in (ask("[100,100,200,300]"), ask_boxes(BOX)):
        assert recipe(LIST_RECIPE, "[100,100,200,300]", example) == 3


@pytest.mark.parametrize(
    "text",
    [
        *(
            "< anything",
            "box_start",
            ">x<",
            "object_ref_start",
            "[100,100,200,300] so",
            "<think>a</think>",
        ),
        *(
            "<think>a</think><answer>5</answer> so",
            "so <think>a</think><answer>5</answer>",
            "<answer>5</answer>",
        ),
        *(
            "<think>a</think><answer>5</answer><answer>5</answer>",
            "<think>a<think>b</think></think><answer>5</answer>",
        ),
    ],
)
def test_defect_09_formats_take_the_whole_text(text):
    for name in TEXT_REWARDS:
        if name.endswith("_format"):
            assert reward(name, text, ask_boxes(BOX)) in (
                0,
                pytest.approx(math.nan, nan_ok=True),
            ), name


OVD_NAMES = ("ovd_f", "ovd_iou", "ovd_confidence", "ovd_calibration", "ovd_ap", "ovd")


@pytest.mark.parametrize("name", OVD_NAMES)
def test_defect_10_junk_without_confidence_earns_nothing(name):
    example = ask_boxes(BOX, OTHER)
    for junk in (((FAR, 0.0),), ((FAR, 0.0), ((0, 0, 9, 9), 0.0)), ((FAR, -5),), ()):
        assert reward(name, detections(*junk), example) == 0
    honest = ((110, 110, 210, 310), 0.8)
    alone = reward(name, detections(honest), example)
    assert alone > 0
    for junk in (0.0, 0.3, 0.7, 1.0, -5):
        assert (
            reward(
                name,
                detections(honest, *[((500 + i, 10, 600, 60), junk) for i in range(9)]),
                example,
            )
            <= alone
        )


@pytest.mark.parametrize("name", OVD_NAMES)
def test_defect_10_a_right_abstention_earns_all(name):
    for example in (ask_boxes(), ask("<answer>[]</answer>")):
        assert reward(name, "<think>none</think><answer>[]</answer>", example) == 1
        assert reward(name, detections((FAR, 0.0)), example) == 0
        assert reward(name, detections((FAR, 1.0)), example) <= 0


@pytest.mark.parametrize(
    "text", ["", "<answer></answer>", "<answer>e</answer>", "The answer is: banana", "."]
)
def test_defect_18_no_answer_is_wrong(text):
    assert reward("spatial", text, ask("left", prompt=QUESTION)) == -0.5
    assert reward("spatial", text, ask("(C)", prompt=QUESTION)) == -0.5


SEARCHES = "<think>I look.</think><search>Eiffel tower height</search>"
SAYS = "<think>I know.</think><answer>{}</answer>"


def test_defect_11_tools_without_the_right_answer_earn_nothing():
    """There, a wrong answer after one tool call is worth 1.4, gibberish after one 1.2, and three
    calls 3.6.
    """
    example = ask("330 metres")
    for text in (
        SEARCHES,
        SEARCHES * 3,
        SEARCHES + SAYS.format("red"),
        SEARCHES + "gibberish",
        SEARCHES + "<answer> </answer>",
    ):
        assert reward("agent", text, example) == 0, text
    right = SAYS.format("330 metres")
    assert reward("agent", right, example) == 1
    assert (
        reward("agent", SEARCHES + right, example)
        == reward("agent", SEARCHES * 5 + right, example)
        == pytest.approx(1.2)
    )
    half = SAYS.format("330 feet")
    assert reward("agent", SEARCHES + half, example) < reward("agent", right, example)


@pytest.mark.parametrize(
    ("act", "gold", "same", "other"),
    [
        ("problem", "{'dark', 'rotation90'}", "{'rotation90', 'dark'}", "{'dark'}"),
        ("code", "x = img[0:9]  # crop", "```python\nx = img[ 0:9 ]\n```", "x = img[0:8]"),
        ("code", "not python at all", "not python at all", "print('anything')"),
        ("answer", "a red car", "the red car", "blue bus"),
        ("search", "height of tower", "tower of height", "rain"),
    ],
)
def test_defect_12_a_turn_is_compared_with_the_gold_one(act, gold, same, other):
    """There, a right problem is always worth 0, and any code at all 0.9."""

    def turn(what, kind=act):
        return f"<think>so</think><{kind}>{what}</{kind}>"

    example = ask(turn(gold))
    assert reward("agent_step", turn(same), example) == 1
    elsewhere = "code" if act == "answer" else "answer"
    for text in (turn(other), turn(same, elsewhere), turn(same) + turn(same), same, ""):
        assert reward("agent_step", text, example) == 0, text
    assert reward("agent_format", turn(same), example) == 1
    assert reward("agent_format", SEARCHES + turn(same), example) == 1
    for text in (
        f"<{act}>{same}</{act}>",
        turn(same) + " more",
        turn(""),
        turn(same).replace("<think>", ""),
        "",
    ):
        assert reward("agent_format", text, example) == 0, text


def test_defect_18_an_answer_is_one_relation():
    example = ask("left", prompt=QUESTION)
    for text in (
        "left",
        "left.",
        "<think>x</think><answer>left</answer>",
        "The answer is: to the left of the table",
    ):
        assert reward("spatial", text, example) == 1, text
    for text in (
        "The answer is: to the left of and to the right of",
        "left, right",
        "not left",
        "It is leftover",
    ):
        assert reward("spatial", text, example) == reward("spatial", text, ask("right")) == -0.5, (
            text
        )
    assert reward("spatial", "The answer is: in front of", ask("in front of")) == 1
    assert (
        reward("spatial", "Answer: (C)", ask("(C)")) == 1
        and reward("spatial", "(B)", ask("(C)")) == -0.5
    )
    assert (
        reward("spatial", "the red chair", ask("Red chair")) == 1
        and reward("spatial", "chair", ask("table")) == -0.5
    )
    assert reward("spatial", "yes", ask("no")) == -0.5 and reward("spatial", "No.", ask("no")) == 1


KEYWORDS = (
    "left right above below position relative because therefore see observe image compared side "
    "chair table "
)


def test_defect_19_keywords_are_no_reasoning(seeds):
    example = ask("left", prompt=QUESTION)
    rows = {
        row["text"]: reward("spatial", row["text"], example)
        for row in seeds["reinforcesight_reward"]
    }
    assert list(rows.values()) == [1.3, -0.5, 1.0, 1.0]
    stuffed = KEYWORDS * 3
    assert reward("spatial", f"{stuffed}. The answer is: left", example) == 1
    assert reward("spatial", f"{stuffed}. The answer is: banana", example) == -0.5
    assert (
        reward("spatial", f"<think>{README_THOUGHT}</think><answer>left</answer>", example) == 1.3
    )


@pytest.mark.parametrize(
    ("change", "quality"),
    [
        (("left side", "left side by 3 m"), 0.5),
        (("left side", "left side by some pixels"), 0.5),
        (("the table", "it"), 0.5),
        (("is left of the table.", "is right of the table."), 0.0),
        ((README_THOUGHT[:-40], ""), 0.0),
        ((README_THOUGHT, README_THOUGHT * 4), 0.0),
    ],
)
def test_defect_19_reasoning_is_qualitative_names_the_objects_and_leads_to_the_answer(
    change, quality
):
    text = f"<think>{README_THOUGHT.replace(*change)}</think><answer>left</answer>"
    assert reward("spatial", text, ask("left", prompt=QUESTION)) == pytest.approx(1 + 0.3 * quality)
    choices = f"{QUESTION} Select from the following choices.\n(A) right\n(B) left"
    assert reward(
        "spatial", text.replace(">left<", ">(B)<"), ask("(B)", prompt=choices)
    ) == pytest.approx(1 + 0.3 * quality)


WHICH = "Which is closer to the dog, the parking meter or the hot dog?"
WHETHER = "Is the hot dog closer to the dog than the parking meter is?"
OUTWARDS = (
    "I need to compare how far the parking meter and the hot dog are from the dog. Going outwards, "
    "the hot dog comes first and then the parking meter. "
)


@pytest.mark.parametrize(
    ("question", "gold", "end", "quality"),
    [
        (WHICH, "hot dog", "So it is the hot dog.", 1),
        (WHICH, "hot dog", "So it is the dog.", 0),
        (WHICH, "hot dog", "Not the parking meter but the hot dog.", 0),
        (WHICH, "hot dog", "By a meter, it is the hot dog.", 0.5),
        (WHETHER, "yes", "So yes, it is closer.", 1),
        (WHETHER, "yes", "So no, it is farther.", 0),
        (WHETHER, "yes", "Yes or no.", 0),
        (WHETHER, "yes", "It is closer.", 0),
        (f"{WHICH}\n(A) parking meter\n(B) hot dog", "(B)", "So it is the hot dog.", 1),
        (f"{WHICH}\n(A) parking meter\n(B) hot dog", "(B)", "So it is the dog.", 0),
    ],
)
def test_reasoning_leads_to_yes_or_no_or_an_object_where_that_is_the_answer(
    question, gold, end, quality
):
    thought = f"{OUTWARDS}{end} Therefore, the answer is: "
    example = ask(thought + gold, prompt=question)
    assert reward("spatial", thought + gold, example) == pytest.approx(1 + 0.3 * quality)
    assert reward("spatial", f"{thought}horse", example) == -0.5


def test_defect_24_a_list_is_not_the_best_of_it():
    example = ask_points((421, 198))
    assert recipe(POINT_RECIPE, json_points((421, 198)), example) == 1
    near = recipe(POINT_RECIPE, json_points((400, 210)), example)
    for text in (
        json_points((421, 198), (9, 9)),
        json_points(*[(x, 198) for x in range(1, 640, 20)]),
        "[]",
        "",
        "[0]",
    ):
        assert recipe(POINT_RECIPE, text, example) < near
    assert recipe(POINT_RECIPE, "[]", example) == 0
    assert recipe(POINT_RECIPE, "[]", ask_points()) == 1
    assert recipe(POINT_RECIPE, json_points((1, 1)), ask_points()) == 0


@pytest.mark.parametrize("answer", ["1 2 3 4 5", "1, 2, 3, 4, 5", "4 or 5", "5 4"])
def test_enumerations_are_wrong(answer):
    for text in (
        answer,
        f"<answer>{answer}</answer>",
        rf"\boxed{{{answer}}}",
        f"<think>{answer}</think><answer></answer>",
    ):
        for name in ("count_exact", "count_graded", "math", "exact_match"):
            assert reward(name, text, ask("5")) == 0, (name, text)
    several = "".join(f"<answer>{n}</answer>" for n in range(1, 6))
    assert reward("count_exact", several, ask("5")) == 0 and reward("math", several, ask("5")) == 0


def test_defect_27_loc_tokens_reach_the_text():
    tokens = tokenizer.load()
    text = "<loc0100><loc0200><loc0500><loc0900> cat"
    assert tokens.decode(tokens.text(text)) == text


# laws

ROUNDING = 1e-12
RANGES = {
    "spatial": (-0.5, 1.3),
    "spatial_answer": (-0.5, 1),
    "ovd_calibration": (-1, 1),
    "ovd": (-1 / 3, 1),
}

EXAMPLES = (
    ask_boxes(),
    ask_boxes(BOX),
    ask_boxes(BOX, OTHER, labels=("cat", "dog")),
    ask_boxes((5, 5, 5, 5), size=(10, 10)),
    ask_points((1, 2)),
    ask_points((1, 2), (3, 4), labels=("cat", "dog"))._replace(
        boxes=((0.0, 0.0, 2.0, 3.0), (2.0, 2.0, 4.0, 5.0))
    ),
    ask("5"),
    ask("left", prompt=QUESTION),
    ask("(A)"),
    ask(json.dumps(GOLD_DICT)),
    ask("[100,100,200,300]"),
    ask(json_points((1, 2))),
    ask(json_points((math.nan, 2))),
    ask(""),
)


@settings(max_examples=150, deadline=None)
@given(
    TEXTS | TEXTS.map(lambda inner: f"<think>so</think><answer>{inner}</answer>"),
    st.sampled_from(EXAMPLES),
)
def test_every_reward_takes_every_text_and_stays_in_range(text, example):
    for name, function in TEXT_REWARDS.items():
        value = function(text, example)
        low, high = RANGES.get(name, (0, 1))
        assert isinstance(value, float) and (math.isnan(value) or low <= value <= high), name


HUGE = (
    st.floats(-1e300, 1e300)
    | st.integers(-(10**400), 10**400)
    | st.sampled_from([math.nan, math.inf])
)
COORDINATES = HUGE | st.integers(0, 700)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[COORDINATES] * 4), max_size=6), st.sampled_from(EXAMPLES[:6]))
def test_any_coordinates_stay_in_range(corners, example):
    texts = (
        json_boxes(*corners),
        str([list(box) for box in corners]),
        as_dict({"0": [list(box) for box in corners]}),
        json_points(*[box[:2] for box in corners]),
        detections(*[(box, 0.5) for box in corners]),
    )
    for text in texts:
        for name, function in TEXT_REWARDS.items():
            value, (low, high) = function(text, example), RANGES.get(name, (0, 1))
            assert math.isnan(value) or low - ROUNDING <= value <= high + ROUNDING, name


CORNERS = st.lists(st.integers(0, 300), min_size=2, max_size=2, unique=True).map(sorted)
PROPER = st.tuples(CORNERS, CORNERS).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PROPER, max_size=4), st.lists(PROPER, max_size=4), st.randoms(use_true_random=False)
)
def test_order_does_not_count(predicted, gold, random):
    confidence = [random.choice([0.2, 0.5, 0.9]) for _ in predicted]
    order = random.sample(range(len(predicted)), len(predicted))
    other = [gold[i] for i in random.sample(range(len(gold)), len(gold))]
    shuffled = [predicted[i] for i in order]
    for name in ("json_boxes", "json_boxes_squared"):
        same = reward(name, json_boxes(*shuffled), ask_boxes(*other))
        assert reward(name, json_boxes(*predicted), ask_boxes(*gold)) == pytest.approx(same)
    for name in OVD_NAMES:
        text, again = (
            detections(*[(predicted[i], confidence[i]) for i in rows])
            for rows in (range(len(predicted)), order)
        )
        assert reward(name, text, ask_boxes(*gold)) == pytest.approx(
            reward(name, again, ask_boxes(*other))
        )
    for name in ("list_point", "list_coverage", "list_iou"):
        text, again = (
            "; ".join(str(list(box)) for box in corners) for corners in (predicted, shuffled)
        )
        assert reward(name, text, ask_boxes(*gold)) == pytest.approx(
            reward(name, again, ask_boxes(*other))
        )


@settings(max_examples=100, deadline=None)
@given(PROPER, PROPER)
def test_the_host_agrees_with_the_device(predicted, gold):
    """The bound is for float32: sides and offsets of up to 300 steps in 300 give an exponent of up
    to 0.5 · 2 · 600², with 8 roundings of 6e-8."""
    a, b = (
        jnp.array([box[1], box[0], box[3], box[2]], jnp.float32) / 300 for box in (predicted, gold)
    )
    example, text = ask_boxes(gold, size=(300, 300)), str(list(predicted))
    for name, device in (
        ("list_iou", boxes.iou(a, b)),
        ("list_point", boxes.gaussian_point(boxes.centre(a), b, 0.5)),
        ("list_coverage", boxes.gaussian_coverage(a, b, 0.5)),
    ):
        assert reward(name, text, example) == pytest.approx(float(device), abs=1e-4), name
    example, text = ask_points(gold[:2], size=(300, 200)), json_points(predicted[:2])
    yx, gold_yx = (np.array([box[1] / 200, box[0] / 300], np.float32) for box in (predicted, gold))
    device = boxes.distance_gaussian(
        jnp.array(yx), jnp.array(gold_yx), jnp.array([300, 200]), 100.0, 640.0
    )
    assert reward("json_points", text, example) == pytest.approx(float(device), abs=1e-4)


@given(st.integers(0, 600), st.integers(0, 600))
def test_nearer_is_better(a, b):
    near, far = sorted((a, b), key=lambda x: abs(x - 300))
    example = ask_points((300, 100))
    assert reward("json_points", json_points((near, 100)), example) >= reward(
        "json_points", json_points((far, 100)), example
    )
    example = ask_boxes((300, 100, 400, 200))
    for name in ("list_point", "list_coverage", "list_iou"):
        nearer, farther = (reward(name, f"[{x},100,{x + 100},200]", example) for x in (near, far))
        assert nearer >= farther, name


ADVERSARIES = {
    "silent": [],
    "nothing": ["x"],
    "whole image": [(0, 0, 640, 480)],
    "four of it": [(100, 100, 200, 300)] * 4,
    "spam": [(x, y, x + 100, y + 200) for x in range(0, 540, 60) for y in range(0, 280, 70)],
    "swapped axes": [(100, 100, 300, 200)],
    "reversed": [(200, 300, 100, 100)],
    "corners": [(0, 0, 9, 9), (631, 0, 640, 9), (0, 471, 9, 480), (631, 471, 640, 480)],
}


@pytest.mark.parametrize("corners", ADVERSARIES.values(), ids=ADVERSARIES)
def test_adversaries_earn_less_than_a_near_miss(corners):
    miss, bare = (108, 112, 212, 310), [box for box in corners if box != "x"]
    spell = {
        "list": (LIST_RECIPE, lambda p: "; ".join(str(list(q)) for q in p), ask_boxes(BOX)),
        "dict": (
            DICT_RECIPE,
            lambda p: as_dict({"0": [list(q) for q in p]}),
            ask_boxes(BOX, labels=("0",)),
        ),
        "json": (
            {"json_format": 0.2, "json_boxes_squared": 0.8},
            lambda p: json_boxes(*p),
            ask_boxes(BOX),
        ),
        "ovd": (OVD_RECIPE, lambda p: detections(*[(q, 1.0) for q in p]), ask_boxes(BOX)),
        "our ovd": (
            {"ovd_format": 0.2, "ovd": 0.8},
            lambda p: detections(*[(q, 0.9) for q in p]),
            ask_boxes(BOX),
        ),
        "points": (
            POINT_RECIPE,
            lambda p: json_points(*[((q[0] + q[2]) / 2, q[1]) for q in p]),
            ask_points((150, 100)),
        ),
    }
    for name, (weights, write, example) in spell.items():
        if name == "points" and corners in ([(100, 100, 300, 200)], [(200, 300, 100, 100)]):
            continue  # a point has no extent to swap or reverse
        text = "nothing" if corners == ["x"] else write(bare)
        assert recipe(weights, text, example) < recipe(weights, write([miss]), example)


@st.composite
def annotations(draw) -> tuple[tuple[int, int], np.ndarray]:
    """Returns the size of an image of 8 to 6000 pixels, and f32[K, 4] boxes of any size in it."""
    size = draw(st.tuples(*[st.integers(8, 6000)] * 2))
    sides = [draw(st.floats(0.2, n) | st.floats(0.2, 5)) for n in size * draw(st.integers(1, 3))]
    boxes = []
    for width, height in zip(sides[::2], sides[1::2], strict=True):
        x, y = (
            draw(st.floats(0, max(n - side, 0)))
            for n, side in zip(size, (width, height), strict=True)
        )
        boxes.append([y / size[1], x / size[0], (y + height) / size[1], (x + width) / size[0]])
    return size, np.clip(np.array(boxes), 0, 1).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(annotations(), st.integers(0, 3))
def test_no_answer_beats_the_gold_answer(annotation, axis):
    """The gold text of a JSON source is compared with each edge moved by a pixel, and with boxes a
    quarter larger. Boxes of less than a pixel are gold too."""
    size, yxyx = annotation
    source = Source(boxes="box", suffix="json")
    names, codes = ("x",) * len(yxyx), ("",) * len(yxyx)
    gold = json.loads(format_answer(source, {}, 0, yxyx, names, codes, size, len(yxyx)))
    rows = [tuple(entry["bbox_2d"]) for entry in gold]
    x1, y1, x2, y2 = rows[0]
    others = [tuple(n + step * (i == axis) for i, n in enumerate(rows[0])) for step in (-1, 1)]
    others.append((x1, y1, x2 + 1 + (x2 - x1) // 4, y2 + 1 + (y2 - y1) // 4))
    spellings = (
        (lambda p: json_boxes(*p), ("json_boxes", "json_boxes_squared", "json_format")),
        (lambda p: str([list(q) for q in p]), LIST_NAMES),
        (lambda p: as_dict({"0": [list(q) for q in p]}), DICT_NAMES),
        (lambda p: detections(*[(q, 1) for q in p]), (*OVD_NAMES, "ovd_format")),
    )
    for write, names in spellings:
        example = ask(write(rows), size=size)
        for name in names:
            best = reward(name, example.gold, example)
            assert best == pytest.approx(1, abs=1e-9), name
            for other in others:
                assert reward(name, write([other, *rows[1:]]), example) <= best + 1e-9, name


@pytest.mark.parametrize("side", [1, 2, 3, 5, 40])
def test_the_exact_box_earns_more_coverage_than_a_larger_one(side):
    """A loc bin is 3.9 by 2.9 pixels here. Smaller gold boxes were widened, but not the answers."""
    example = ask_boxes((100, 100, 100 + side, 100 + side), size=(4000, 3000))
    exact, wider, larger, far_larger = (
        reward("list_coverage", str([100, 100, 100 + w, 100 + h]), example)
        for w, h in ((side, side), (side + 1, side), (side + 1, side + 1), (80, 80))
    )
    assert exact == pytest.approx(1) and wider <= 1 and larger <= 1 and far_larger < 0.99


# single rewards


@pytest.mark.parametrize(
    "name",
    ["count_exact", "count_graded", "math", "token_f1", "exact_match", "spatial_answer", "spatial"],
)
def test_rewards_of_words_do_not_apply_to_questions_about_locations(name):
    assert math.isnan(reward(name, "5", ask_boxes(BOX)._replace(gold="5")))
    assert math.isnan(reward(name, "5", ask("")))


@pytest.mark.parametrize(
    "name", ["json_points", "json_boxes", "json_format", "dict_point", "list_iou", "ovd"]
)
def test_rewards_of_locations_do_not_apply_to_other_questions(name):
    assert math.isnan(reward(name, "[1,2,3,4]", ask("left")))
    if name not in ("json_format", "json_points"):
        assert math.isnan(reward(name, "[1,2,3,4]", ask_points((1, 2))))


def test_labels_count_where_there_are_several():
    example = ask_boxes(BOX, OTHER, labels=("cat", "dog"))
    right = [{"bbox_2d": list(BOX), "label": "Cat"}, {"bbox_2d": list(OTHER), "label": "dog"}]
    swapped = [{**entry, "label": name} for entry, name in zip(right, ("dog", "cat"), strict=True)]
    assert (
        reward("json_boxes", json.dumps(right), example) == 1
        and reward("json_boxes", json.dumps(swapped), example) == 0
    )
    assert (
        reward("json_boxes", json_boxes(BOX, label="the cat"), ask_boxes(BOX, labels=("cat",))) == 1
    )


def test_points_in_boxes():
    example = ask_points((150, 200), (350, 350))._replace(boxes=(BOX, OTHER))
    for points, value in (
        (((101, 101), (399, 301)), 1),
        (((101, 101), (102, 102)), 0.5),
        (((101, 101),), 2 / 3),
        (((0, 0), (9, 9)), 0),
        ((), 0),
    ):
        assert reward("json_points_in_boxes", json_points(*points), example) == pytest.approx(value)
    assert math.isnan(reward("json_points_in_boxes", "[]", ask_points((1, 2))))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_calibration_is_best_at_the_probability(p):
    """A box with confidence c is right with probability p."""
    confidences = [c / 100 for c in range(101)]
    earned = np.array(
        [
            [reward("ovd_calibration", detections((q, c)), ask_boxes(BOX)) for q in (BOX, FAR)]
            for c in confidences
        ]
    )
    mean = earned @ [p, 1 - p]
    assert confidences[mean.argmax()] == p and mean.max() == pytest.approx(p * p)


def test_average_precision():
    example = ask_boxes(BOX, OTHER)
    for entries, value in (
        (((BOX, 0.9), (OTHER, 0.8)), 1),
        (((BOX, 0.9), (FAR, 0.8), (OTHER, 0.7)), (1 + 2 / 3) / 2),
        (((FAR, 0.9), (BOX, 0.8)), 0.25),
        (((FAR, 0.9), (BOX, 0.9)), 0.25),
        (((BOX, 0.9), (BOX, 0.8)), 0.5),
        (((BOX, 0.9), (FAR, 0.1)), 0.5),
    ):
        assert reward("ovd_ap", detections(*entries), example) == pytest.approx(value)


def test_counts():
    assert [reward("count_graded", text, ask("5")) for text in ("5", "six", "3", "", "x")] == [
        1,
        0.5,
        1 / 3,
        0,
        0,
    ]
    assert (
        reward("count_exact", "five", ask("5"))
        == reward("count_exact", "5", ask("<answer>five</answer>"))
        == 1
    )
    assert math.isnan(reward("count_exact", "5", ask("left")))


def test_mathematics():
    for answer, gold in (
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"<think>\boxed{3}</think><answer>5</answer>", r"\boxed{3}"),
        ("<answer>2/4</answer>", r"$\frac{1}{2}$"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    ):
        assert reward("math", answer, ask(gold)) == 1, answer
    assert reward("math", "<answer>" + "9" * 201 + "</answer>", ask("9")) == 0
    assert math.isnan(reward("math", "5", ask("")))


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["{", "(((", " [", "|", "-", "\\(", r"\frac{", "1/", "9", "$"])
def test_nonsense_is_no_mathematics(piece):
    for text in (piece * (199 // len(piece)), piece * 1000):
        assert reward("math", f"<answer>{text}</answer>", ask("5")) == 0


def test_mathematics_needs_no_main_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reward, "math", r"\boxed{5}", ask("5")).result() == 1


def test_squad():
    assert reward(
        "token_f1", "<answer>The red car</answer>", ask("a red, red bus")
    ) == pytest.approx(2 * 1 / (2 + 3))
    assert reward("exact_match", "<answer>The Red Car!</answer>", ask("red car")) == 1
    assert (
        reward("exact_match", "car red", ask("red car")) == 0
        and reward("token_f1", "car red", ask("red car")) == 1
    )
    assert reward("token_f1", "", ask("red car")) == 0
