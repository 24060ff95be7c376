"""Every reward on every form of gold answer, from a record in a file to the reward.

A record goes through a file, a source entry, an example and a batch. Its gold text earns the most,
a shifted answer earns less, and garbage earns the least. All other rewards are NaN. The rewards
that apply to each question are written out.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, RewardSettings, Source
from pg_ground.data.batch_rows import stack_rows, to_batch_row
from pg_ground.data.datasets import open_examples
from pg_ground.readers import parsers
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.rewards.device_rewards import REWARDS
from pg_ground.rewards.text_example import TextExample
from pg_ground.rewards.text_questions import text_question
from pg_ground.rewards.text_rewards import TEXT_REWARDS
from pg_ground.types import Batch
from pg_ground.vocab import PAD

SIZE = (341, 1023)
"""Pixels are whole loc bins, so the gold text loses nothing: 3 bins in x, 1 bin in y."""

BOXES = [[30, 30, 130, 130], [160, 60, 260, 180]]
POINTS = [[80, 80], [210, 120]]
NAMES = ["cat", "dog"]
SHIFT_PX = 60
"""A point in the middle of a box of 100 pixels leaves the box."""

GARBAGE = "zq ] [ 7"
DATA = Data(prompt_length=48, suffix_length=160, max_boxes=4, mask_size=24)
TOKENS = tokenizer.load()

FORMATS = {
    *("format", "count", "count_graded", "label"),
    *(name for name in TEXT_REWARDS if name.endswith("_format")),
}
"""Rewards that a shift of locations does not change. `count_graded` is also a text reward."""

ANY_TEXT = {"agent_format", "think_answer_format", "think_boxed_format"}
"""Text rewards that judge the form of any completion."""

WRAPPED = {"math", "agent", "box_tokens_format"} | ANY_TEXT
"""Text rewards whose form the policy must add if the gold text is bare."""

LISTS = {"list_point", "list_coverage", "list_iou", "list_iou_squared"}
NAMELESS = LISTS | {"token_f1", "label"} | FORMATS
"""Rewards that swapped names do not change."""

WORDS = {"token_f1", "exact_match", "agent"} | ANY_TEXT
SPATIAL = {"spatial", "spatial_answer"}
LOC_BOXES = {
    *("iou", "iou_squared", "giou", "gaussian_point", "gaussian_coverage", "detection"),
    *("label", "format", "count", "count_graded"),
}
LOC_POINTS = {"distance_gaussian", "point_in_mask", "label", "format", "count", "count_graded"}
CONFIDENT = {"ovd", "ovd_calibration"}
"""Text rewards that are below 0 for a wrong box with confidence 1. Garbage has no confidence."""

SHAPING = {"length", "repetition", "overlong"}
"""Device rewards of the length of any completion. They have no gold answer."""


class Case(NamedTuple):
    """A question, answers to it, and the rewards that apply to it."""

    name: str
    source: Source
    record: dict[str, Any]
    gold: str
    shifted: str
    """The gold answer with another number or word, or with all locations moved; "" for none."""
    swapped: str
    """The gold answer with the names of two objects swapped; "" for none."""
    device: set[str]
    text: set[str]


def loc(x1: int, y1: int, *corner: int) -> str:
    bins = [y1, 3 * x1] + ([corner[1], 3 * corner[0]] if corner else [])
    return "".join(f"<loc{code:04d}>" for code in bins)


def write(form: str, key: str, objects: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    pairs = list(zip(objects, names, strict=True))
    if form == "count":
        return str(len(pairs))
    if form == "loc":
        return " ; ".join(f"{loc(*numbers)} {name}".strip() for numbers, name in pairs)
    labels = [{"label": name} if name else {} for name in names]
    entries = zip(objects, labels, strict=True)
    return json.dumps([{key: numbers} | label for numbers, label in entries])


def location_case(form: str, target: str, has_boxes: bool, names: Sequence[str]) -> Case:
    """Returns a question about the first objects, one for each of `names`."""
    count = len(names)
    boxes, points = BOXES[:count], POINTS[:count]
    objects, key = (boxes, "bbox_2d") if target == "boxes" else (points, "point_2d")
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    record = {"phrase": "them", "boxes": boxes, "points": points, "masks": polygons, "names": names}
    source = Source(
        target=target,
        boxes="boxes" if has_boxes else "",
        points="points" if target == "points" else "",
        mask="masks",
        label="names" if any(names) else "",
        name="",
        suffix=form,
        empty="keep",
    )
    moved = [[n + SHIFT_PX * (axis % 2 == 0) for axis, n in enumerate(row)] for row in objects]
    gold = write(form, key, objects, names)
    shifted = write(form, key, moved, names) if form != "count" else str(count + 1)
    device, text = applicable(form, target, has_boxes, count)
    return Case(
        f"{form}-{target}{'-with-boxes' * has_boxes}-{'-'.join(names) or count}",
        source,
        record,
        gold,
        shifted if shifted != gold else "",
        write(form, key, objects, names[::-1]) if count == 2 and form != "count" else "",
        device,
        text,
    )


def applicable(form: str, target: str, has_boxes: bool, count: int) -> tuple[set[str], set[str]]:
    """Returns the device rewards and the text rewards that apply to a question."""
    in_boxes = has_boxes or count == 0
    if form == "loc" and target == "boxes":
        return LOC_BOXES, ANY_TEXT
    if form == "loc":
        return LOC_POINTS | ({"gaussian_point", "point_in_box"} if in_boxes else set()), ANY_TEXT
    if form == "count":
        return set(), WORDS | SPATIAL | {"count_exact", "count_graded", "math"}
    text = WORDS | {"json_format"} | (SPATIAL if count else set())
    if target == "boxes":
        text |= {"json_boxes", "json_boxes_squared"} | LISTS
    else:
        text |= {"json_points"} | ({"json_points_in_boxes"} if in_boxes else set())
    return set(), text


def text_case(name: str, gold: str, shifted: str, text: set[str]) -> Case:
    source = Source(target="text", suffix="{answer}", prompt="{phrase}")
    record = {"phrase": "What is where?", "answer": gold}
    return Case(name, source, record, gold, shifted, "", set(), text)


DICT = {"dict_point", "dict_coverage", "dict_iou", "dict_format"}
OVD = {"ovd_format", "ovd_f", "ovd_iou", "ovd_confidence", "ovd_calibration", "ovd_ap", "ovd"}
CASES = [
    *(
        location_case(form, target, has_boxes, names)
        for form in ("loc", "json", "count")
        for target, has_boxes in (("boxes", True), ("points", False), ("points", True))
        for names in (NAMES, NAMES[:1], [""], [])
    ),
    text_case(
        "list",
        "[30, 30, 130, 130]",
        "[90, 30, 190, 130]",
        WORDS | LISTS | SPATIAL | {"list_format", "box_tokens_format", "math"},
    ),
    text_case(
        "dict",
        '{"0": [[30, 30, 130, 130]], "1": [[160, 60, 260, 180]]}',
        '{"0": [[90, 30, 190, 130]], "1": [[220, 60, 320, 180]]}',
        WORDS | DICT | LISTS | SPATIAL,
    ),
    text_case("no-dict", '{"0": []}', "", WORDS | DICT | SPATIAL),
    text_case(
        "detections",
        "<answer>[{'Position': [30, 30, 130, 130], 'Confidence': 1}]</answer>",
        "<answer>[{'Position': [90, 30, 190, 130], 'Confidence': 1}]</answer>",
        WORDS | OVD | LISTS | SPATIAL | {"agent_step"},
    ),
    text_case(
        "no-detections",
        "<answer>[]</answer>",
        "",
        # an empty JSON list in answer tags has the grammar of JSON boxes and points too
        WORDS
        | OVD
        | LISTS
        | {"json_format", "json_boxes", "json_boxes_squared", "json_points"}
        | {"agent_step"},
    ),
    text_case(
        "box-tokens",
        "<|box_start|>(30,30),(130,130)<|box_end|>",
        "<|box_start|>(90,30),(190,130)<|box_end|>",
        WORDS | LISTS | SPATIAL | {"box_tokens_format"},
    ),
    text_case("word", "left", "right", WORDS | SPATIAL | {"math"}),
    text_case("option", "(B)", "(A)", WORDS | SPATIAL | {"math"}),
    text_case("sentence", "I see. The answer is: left", "It is right.", WORDS | SPATIAL),
    text_case(
        "thoughts",
        "<think>a</think> <answer>3</answer>",
        "<think>a</think> <answer>4</answer>",
        WORDS | SPATIAL | {"count_exact", "count_graded", "math", "agent_step"},
    ),
    text_case(
        "boxed",
        "<think>a</think> \\boxed{3}",
        "<think>a</think> \\boxed{4}",
        WORDS | SPATIAL | {"math"},
    ),
    text_case(
        "search",
        "<think>a</think><search>red cat</search>",
        "<think>a</think><search>dog</search>",
        WORDS - {"agent"} | SPATIAL | {"agent_step"},
    ),
]
IDS = [case.name for case in CASES]


def wrapped(gold: str) -> tuple[str, str, str]:
    """Returns the gold answer in answer tags, in a box, and as box tokens, if it is in none yet."""
    bare = parsers.sections(gold).answer or "none"
    expression = parsers.last_boxed(gold) or bare
    numbers = gold.strip("[]").replace(" ", "").split(",")
    tokens = "<|box_start|>({},{}),({},{})<|box_end|>".format(*(numbers + ["0"] * 4))
    think = "<think>so</think> "
    return f"{think}<answer>{bare}</answer>", f"{think}\\boxed{{{expression}}}", tokens


class Scores(NamedTuple):
    """Scores {reward: [questions, answers]}. The answers are gold, shifted, garbage, swapped, and
    three of `wrapped`."""

    suffixes: list[str]
    """The suffix of each example."""
    device: dict[str, np.ndarray]
    text: dict[str, np.ndarray]


@jax.jit
def device_scores(tokens: jax.Array, mask: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    gold = batch.gold
    answer = read_answer(
        tokens, mask, gold.target, gold.names, TOKENS.vocab, None, gold.masks.shape[-1]
    )
    return {name: reward(answer, batch, RewardSettings()) for name, reward in REWARDS.items()}


def token_ids(answers: Sequence[Sequence[str]]) -> np.ndarray:
    ids = np.full((len(answers), len(answers[0]), DATA.suffix_length), PAD, np.int32)
    for q, texts in enumerate(answers):
        for a, text in enumerate(texts):
            suffix = TOKENS.suffix(text)
            ids[q, a, : len(suffix)] = suffix
    return ids


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Scores:
    folder = tmp_path_factory.mktemp("records")
    Image.new("RGB", SIZE).save(folder / "i.png")
    rows, suffixes = [], []
    for number, case in enumerate(CASES):
        file = folder / f"{number}.jsonl"
        file.write_text(json.dumps(case.record | {"image": "i.png"}) + "\n")
        source = replace(case.source, uri=f"jsonl:{file}")
        example = open_examples(f"grpo/{number}", source, DATA, 14)[0]
        rows.append(to_batch_row(example, TOKENS, DATA, number))
        suffixes.append(example.suffix)
    batch = stack_rows(rows)
    answers = [
        (case.gold, case.shifted, GARBAGE, case.swapped, *wrapped(case.gold)) for case in CASES
    ]
    ids = token_ids(answers)
    targets = [case.source.target for case in CASES]
    questions = [text_question(batch, row, TOKENS, targets) for row in range(len(CASES))]
    text = {
        name: [[reward(text, questions[q]) for text in texts] for q, texts in enumerate(answers)]
        for name, reward in TEXT_REWARDS.items()
    }
    return Scores(
        suffixes,
        jax.device_get(device_scores(ids, ids != PAD, batch)),
        {name: np.array(values) for name, values in text.items()},
    )


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_these_rewards_apply_and_no_other(scores, number):
    case = CASES[number]
    assert scores.suffixes[number] == case.gold
    for parts, expected in ((scores.device, case.device | SHAPING), (scores.text, case.text)):
        applies = {name for name, values in parts.items() if not np.isnan(values[number]).any()}
        partly = {name for name, values in parts.items() if not np.isnan(values[number]).all()}
        assert applies == partly == expected


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_gold_earns_the_most_a_shifted_answer_less_and_garbage_the_least(scores, number):
    case = CASES[number]
    parts = [("device", name, scores.device[name][number]) for name in case.device]
    parts += [("text", name, scores.text[name][number]) for name in case.text]
    for kind, name, values in parts:
        gold, shifted, garbage, swapped, *rest = values
        if name in WRAPPED:
            gold = max(gold, *rest)
        # float32: coverage has four roundings of a logarithm near 5
        assert gold == pytest.approx(1, abs=4e-6), (kind, name)
        if name not in CONFIDENT:
            assert garbage <= min(values) + 1e-6, (kind, name)
        if case.gold or name == "format":
            assert garbage < gold, (kind, name)
        counts = kind == "text" and name == "count_graded"
        if case.shifted and (name not in FORMATS or counts):
            assert shifted < gold, (kind, name)
        if case.swapped and name not in NAMELESS:
            assert swapped < gold, (kind, name)


PIXELS = (96, 72)
TWO_POINTS = {"phrase": "them", "points": [[25, 25], [65, 40]], "names": ["cat", "dog"]}
IN_JSON = {"target": "points", "points": "points", "label": "names", "suffix": "json"}
RIGHT = '[{"point_2d": [25, 25], "label": "cat"}, {"point_2d": [65, 40], "label": "dog"}]'


@pytest.fixture
def ask(tmp_path):
    """Returns a function `(record, **settings of the source) → TextExample`."""
    Image.new("RGB", PIXELS).save(tmp_path / "i.png")

    def question(record: dict[str, Any], **settings: Any) -> TextExample:
        (tmp_path / "r.jsonl").write_text(json.dumps(record | {"image": "i.png"}) + "\n")
        source = Source(uri=f"jsonl:{tmp_path}/r.jsonl", **settings)
        example = open_examples("grpo/s", source, DATA, 14)[0]
        batch = stack_rows([to_batch_row(example, TOKENS, DATA, 0)])
        return text_question(batch, 0, TOKENS, [source.target])

    return question


def score(name: str, text: str, question: TextExample) -> float:
    return TEXT_REWARDS[name](text, question)


def test_a_right_point_in_json_earns_1_and_garbage_0_if_there_are_no_boxes(ask):
    point = ask(
        {"phrase": "cat", "point": [25, 25]}, target="points", points="point", suffix="json"
    )
    assert (point.gold, point.objects) == ('[{"point_2d": [25, 25], "label": "cat"}]', "points")
    assert score("json_points", point.gold, point) == 1
    # 12 of 96 pixels are 80 of 640; sigma is 100
    shifted = '[{"point_2d": [37, 25], "label": "cat"}]'
    assert score("json_points", shifted, point) == pytest.approx(np.exp(-0.5 * 0.8**2))
    for garbage in ("", "[]", "junk", "[0]", "[[25, 25]]", "<answer></answer>", "{}"):
        assert score("json_points", garbage, point) == 0, garbage


def test_names_of_points_count_though_the_points_have_no_boxes(ask):
    question = ask(TWO_POINTS, **IN_JSON)
    assert question.labels == ("cat", "dog")
    swapped = RIGHT.replace("cat", "x").replace("dog", "cat").replace("x", "dog")
    first_alone = json.dumps(json.loads(RIGHT)[:1])
    assert score("json_points", RIGHT, question) == 1
    assert score("json_points", swapped, question) < 0.1
    assert score("json_points", first_alone, question) == pytest.approx(2 / 3)


def test_json_points_in_boxes_applies_to_json_questions(ask):
    record = TWO_POINTS | {"boxes": [[10, 10, 40, 40], [50, 20, 80, 60]]}
    question = ask(record, **IN_JSON, boxes="boxes")
    one_outside = RIGHT.replace("65", "90")
    for text, value in ((RIGHT, 1), (one_outside, 0.5), ("[]", 0), ("junk", 0)):
        assert score("json_points_in_boxes", text, question) == value
    assert np.isnan(score("json_boxes", RIGHT, question))
    # a gold point that is rounded to whole pixels can lie outside a narrow box
    narrow = {"phrase": "x", "points": [[25.4, 30]], "boxes": [[25.3, 10, 25.45, 60]]}
    question = ask(narrow, target="points", points="points", boxes="boxes", suffix="json")
    assert score("json_points_in_boxes", question.gold, question) == 1


def test_labels_are_not_needed_if_the_objects_have_no_names(ask):
    unnamed = ask({"phrase": "x", "box": [1, 2, 30, 40]}, boxes="box", name="", suffix="json")
    named = ask({"phrase": "x", "box": [1, 2, 30, 40]}, boxes="box", suffix="json")
    without, with_label = (
        json.dumps([{"bbox_2d": [1, 2, 30, 40]} | label]) for label in ({}, {"label": "x"})
    )
    for question, text, value in (
        (unnamed, without, 1),
        (unnamed, with_label, 1),
        (named, with_label, 1),
        (named, without, 0),
    ):
        assert score("json_format", text, question) == value
        assert score("json_boxes", text, question) == 1


@pytest.mark.parametrize("text", ["junk", "there is nothing", "<answer>junk</answer>", "][", "0"])
def test_only_an_abstention_is_right_if_there_is_nothing_to_find(ask, text):
    nothing = {"phrase": "x", "boxes": [], "points": []}
    for target in ("boxes", "points"):
        question = ask(
            nothing, target=target, boxes="boxes", points="points", suffix="json", empty="keep"
        )
        assert question.gold == "[]"
        for name in (f"json_{target}", "json_format"):
            assert (score(name, "[]", question), score(name, text, question)) == (1, 0)
    answer = ask({"phrase": "x", "answer": "<answer>[]</answer>"}, target="text", suffix="{answer}")
    for name in OVD:
        assert (score(name, answer.gold, answer), score(name, text, answer)) == (1, 0), name


def test_the_gold_text_decides_and_not_the_annotation_beside_it(ask):
    record = {"phrase": "x", "box": [1, 2, 30, 40], "answer": "[100, 200, 300, 400]"}
    question = ask(record, target="text", boxes="box", suffix="{answer}")
    assert question.boxes and question.objects == ""
    assert score("list_iou", "[100, 200, 300, 400]", question) == 1
    assert score("list_iou", "[1, 2, 30, 40]", question) == 0
    for reward in ("json_boxes", "json_format", "dict_iou", "ovd"):
        assert np.isnan(score(reward, "[1, 2, 30, 40]", question))


@pytest.mark.slow
@pytest.mark.parametrize(
    "box",
    [[10, 10, 10.2, 10.2], [299.7, 199.9, 300, 200], [0, 0, 0.4, 200], [150.6, 3.5, 151.4, 4]],
)
def test_a_gold_box_below_a_pixel_or_a_bin_is_a_proper_box(tmp_path, box):
    Image.new("RGB", (3000, 2000)).save(tmp_path / "i.png")
    record = {"image": "i.png", "phrase": "x", "box": box}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    for form in ("loc", "json"):
        source = Source(uri=f"jsonl:{tmp_path}/r.jsonl", boxes="box", suffix=form)
        example = open_examples("grpo/s", source, DATA, 14)[0]
        batch = stack_rows([to_batch_row(example, TOKENS, DATA, 0)])
        question = text_question(batch, 0, TOKENS, ["boxes"])
        if form == "json":
            for name in ("json_boxes", "json_format", "list_iou", "list_coverage"):
                assert score(name, example.suffix, question) == pytest.approx(1), name
            continue
        ids = token_ids([[example.suffix, GARBAGE]])
        scores = jax.device_get(device_scores(ids, ids != PAD, batch))
        assert scores["format"].tolist() == [[1, 0]]
        for name in ("iou", "giou", "gaussian_coverage"):
            assert scores[name][0, 0] > scores[name][0, 1] == 0, name
