"""Rewards that cannot teach anything end a run before its first step, and the error says what would
apply."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run, write_recipe
from PIL import Image

from pg_ground import tokenizer
from pg_ground.cli import parse_config
from pg_ground.config import Data, Grpo, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.training.recorder import Recorder
from pg_ground.training.reward_coverage import KINDS, answers_to, check, measure, table
from pg_ground.types import UserError

TOKENS = tokenizer.load()
DATA = Data(prompt_length=48, suffix_length=96, max_boxes=4)
RECORDS = [
    {"phrase": f"cat {i}", "box": [10 + i, 10, 40 + i, 40], "point": [25 + i, 25],
     "words": word, "loc": f"<loc0{100 + i}><loc0100><loc0400><loc0400> cat", "number": i % 3}
    for i, word in enumerate(["eight", "two", "seven", "one", "five"])
]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    """Returns a function `(**settings) → Examples` of five records."""
    Image.new("RGB", (96, 72)).save(tmp_path / "i.png")
    lines = [json.dumps(record | {"image": "i.png"}) for record in RECORDS]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))

    def examples(**settings: Any) -> Examples:
        return open_examples(
            "grpo/mine", Source(uri=f"jsonl:{tmp_path}/r.jsonl", **settings), DATA, 14
        )

    return examples


def coverage(*parts: Examples, text: dict | None = None, **device: Any) -> tuple[list, Grpo]:
    settings = Grpo(rewards=device, text_rewards=text or {}, max_new_tokens=96)
    return measure(parts, settings, TOKENS, DATA), settings


BOXES = {"boxes": "box"}
COUNT = {"boxes": "box", "suffix": "count"}
JSON_BOXES = {"boxes": "box", "suffix": "json"}
POINTS = {"target": "points", "points": "point"}
JSON_POINTS = POINTS | {"suffix": "json"}
WORDS = {"target": "text", "suffix": "{words}"}
NUMBERS = {"target": "text", "suffix": "{number}"}
LOC_TEXT = {"target": "text", "suffix": "{loc}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "device", "text", "suggestion"),
    [
        (
            LOC_TEXT,
            {"iou": 1.0, "format": 0.2},
            {},
            "name the field of the text in boxes, with target boxes",
        ),
        (WORDS, {"iou": 1.0, "format": 0.2}, {}, "grpo.text_rewards.exact_match"),
        (WORDS, {"iou": 1.0, "length": 0.1}, {}, "grpo.text_rewards.count_exact"),
        (COUNT, {"iou": 1.0}, {}, "grpo.text_rewards.count_exact"),
        (JSON_BOXES, {}, {"json_points": 1.0}, "grpo.text_rewards.json_boxes"),
        (JSON_POINTS, {}, {"json_boxes": 1.0}, "grpo.text_rewards.json_points"),
        (POINTS, {"point_in_box": 1.0}, {}, "grpo.rewards.distance_gaussian"),
        (BOXES, {}, {"json_boxes": 1.0}, "grpo.rewards.iou"),
        (BOXES, {"mask_iou": 1.0}, {}, "grpo.rewards.iou"),
    ],
)
def test_a_question_without_a_reward_is_an_error_that_says_what_would_apply(
    source, settings, device, text, suggestion
):
    coverages, grpo = coverage(source(**settings), text=text, **device)
    with pytest.raises(UserError, match="no reward with a weight") as error:
        check(coverages, grpo)
    message = str(error.value)
    assert message.startswith("source grpo/mine: ") and suggestion in message, message
    assert "first question 0, whose answer is" in message and len(message) < 500


@pytest.mark.slow
def test_one_question_without_a_reward_is_enough(source, tmp_path):
    """One of five answers is no number."""
    source()
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"number": 0', '"number": "none"')
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    examples = open_examples(
        "grpo/mine", Source(uri=f"jsonl:{tmp_path}/r.jsonl", **NUMBERS), DATA, 14
    )
    with pytest.raises(UserError, match=r"1 of 5 questions .*, first question 3, .*'none'"):
        check(*coverage(examples, text={"count_exact": 1.0}))


@pytest.mark.slow
def test_every_source_needs_a_reward(source):
    coverages, grpo = coverage(source(**BOXES), source(**WORDS), iou=1.0)
    assert [part.uncovered is None for part in coverages] == [True, False]
    with pytest.raises(UserError, match="target text"):
        check(coverages, grpo)
    both, grpo = coverage(source(**BOXES), source(**WORDS), text={"exact_match": 1.0}, iou=1.0)
    check(both, grpo)
    assert [part.applies for part in both] == [
        {"iou": 1.0, "exact_match": 0.0},
        {"iou": 0.0, "exact_match": 1.0},
    ]


USER_REWARDS = """
def constant(completion, example):
    return 0.2

def by_question(completion, example):
    return example.index / 10

def short(completion, example):
    return -len(completion)

def brief(completion, example):
    return min(1.0, 8 / max(len(completion.split()), 1))

def broken(completion, example):
    return 1 / 0

def odd(completion, example):
    if len(completion) % 2:
        raise ValueError("odd")
    return len(completion) / 100
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("constant", "are 0.2 in total for every answer"),
        ("by_question", "in total for every answer"),
        ("short", ""),
        ("brief", ""),
        ("odd", ""),
        ("broken", r"broken failed on 55 of 55 completions; first with: ZeroDivisionError"),
    ],
)
def test_rewards_that_are_equal_for_every_answer_are_an_error(source, tmp_path, name, message):
    (tmp_path / "mine.py").write_text(USER_REWARDS)
    rewards = {f"{tmp_path}/mine.py:{name}": 1.0}
    if not message:
        check(*coverage(source(**WORDS), text=rewards))
        return
    with pytest.raises(UserError, match=message):
        check(*coverage(source(**WORDS), text=rewards, length=0.1))


@pytest.mark.parametrize(
    ("settings", "device", "suggestion"),
    [
        (COUNT, {"length": 1.0}, "grpo.text_rewards.count_exact"),
        (WORDS, {"length": 1.0, "repetition": 0.5}, "grpo.text_rewards.exact_match"),
        pytest.param(BOXES, {"overlong": -1.0}, "grpo.rewards.iou", marks=pytest.mark.slow),
        pytest.param(
            POINTS, {"length": (0.0, 1.0, 10)}, "grpo.rewards.distance", marks=pytest.mark.slow
        ),
        pytest.param(
            BOXES, {"length": 1.0, "iou": 0.0}, "grpo.rewards.iou", marks=pytest.mark.slow
        ),
    ],
)
def test_rewards_that_see_no_ground_truth_are_not_enough(source, settings, device, suggestion):
    with pytest.raises(UserError, match="see no ground truth, and no other applies") as error:
        check(*coverage(source(**settings), **device))
    message = str(error.value)
    assert suggestion in message and "data.check_records=0" in message, message
    assert all(name in message for name in device if device[name]) and len(message) < 500


@pytest.mark.slow
def test_a_source_with_only_shaping_among_others_is_an_error(source):
    """The other source has a reward; the numbers have none but the length."""
    with pytest.raises(UserError, match=r"\(iou\) applies, except length, which see") as error:
        check(*coverage(source(**BOXES), source(**COUNT), iou=1.0, length=0.1))
    assert "5 of 5 questions" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "device", "text"),
    [
        (BOXES, {"iou": 1.0, "format": 0.2}, {}),
        (BOXES, {"format": 1.0}, {}),
        (POINTS, {"distance_gaussian": 1.0}, {}),
        (COUNT, {}, {"count_exact": 1.0}),
        (JSON_BOXES, {}, {"json_format": 0.2, "json_boxes": 0.8}),
        (JSON_POINTS, {}, {"json_points": 1.0}),
        (NUMBERS, {}, {"math": 1.0, "think_boxed_format": 0.1}),
        (WORDS, {}, {"agent": 1.0}),
        (WORDS, {"repetition": 1.0}, {"think_answer_format": 1.0}),
        (LOC_TEXT, {}, {"token_f1": 1.0}),
        (BOXES, {"iou": -1.0}, {}),
        (BOXES, {"iou": (0.0, 1.0, 10)}, {}),
    ],
)
def test_rewards_that_apply_and_differ_pass(source, settings, device, text, caplog):
    coverages, grpo = coverage(source(**settings), text=text, **device)
    check(coverages, grpo)
    (part,) = coverages
    names = set(device) | set(text)
    assert part.uncovered is None and part.constant is None and part.questions == 5
    assert all(part.applies[name] == 1 for name in names)
    rows = table(coverages, grpo).rows
    assert [row[0] for row in rows] == ["grpo/mine"] * len(names)


@pytest.mark.slow
def test_what_is_doubtful_is_logged(source, caplog):
    check(*coverage(source(**WORDS), text={"exact_match": 1.0, "json_boxes": 0.5}))
    assert "the reward json_boxes applies to no question of any source" in caplog.text
    caplog.clear()
    check(*coverage(source(**WORDS), text={"exact_match": 0.1}, length=1.0))
    assert not caplog.text
    check(*coverage(source(**BOXES), iou=-1.0))
    assert "earn less than other answers" in caplog.text and "'nothing'" in caplog.text
    caplog.clear()
    settings = Grpo(rewards={"iou": 1.0}, max_new_tokens=5)
    check(measure([source(**BOXES)], settings, TOKENS, DATA), settings)
    assert "5 of 5 gold answers have more tokens than grpo.max_new_tokens=5" in caplog.text


def test_bad_records_are_no_questions(source):
    (part,) = coverage(source(boxes="words"), source(**BOXES), iou=1.0)[0]
    assert part.source == "grpo/mine" and part.questions == 5


def test_answers_differ_from_the_gold_text():
    for gold in ("<loc0100><loc0900><loc1000><loc1023> cat", "[10, 20, 30, 40]", "8", "left"):
        answers = answers_to(gold, "another")
        assert answers[0] == gold and gold in answers[1] and "another" in answers
        assert len(answers) == len(KINDS)
    assert answers_to("8", "")[8] == "9"
    assert answers_to("<loc0100><loc1000>", "")[8] == "<loc0202><loc0898>"
    assert answers_to("[1, 2, 30, 40]", "")[3] == "<|box_start|>(1,2),(30,40)<|box_end|>"


COUNTS = [{"question": word, "ground_truth": i + 1} for i, word in enumerate(("cows", "cats"))]
SPATIAL = [{"question": f"Where is {i}?", "cot": "I see it.", "answer": word}
           for i, word in enumerate(("left", "right"))]  # fmt: skip
BOXES_OF_CLASSES = [
    {"instruction": "Find them.", "abs_box": {"0": [[5 * i, 5, 40, 50]], "1": []}} for i in range(3)
]
DETECTIONS = [
    {"problem": "Detect dogs", "solution": f"<answer>[{{'Position': [1, {i}, 30, 40], "
     "'Confidence': 1}]</answer>"}
    for i in range(2)
]  # fmt: skip
EXPRESSIONS = [{"expression": f"dog {i}", "bbox_xyxy": [i, 2, 40, 50]} for i in range(3)]
SAMPLES = [
    {"name": "Search", "bbox": [8, 8, 30, 20], "point": [19, 14]},
    {"name": "Send", "bbox": [50, 50, 60, 60], "point": [55, 55]},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "image", "records"),
    [
        ("tiny.py", "", []),
        ("quickstart.py", "", []),
        ("tasks.py:relations", "", []),
        ("tasks.py:counting", "image_path", COUNTS),
        ("tasks.py:spatial", "image_path", SPATIAL),
        ("tasks.py:open_vocabulary", "image", DETECTIONS),
        ("tasks.py:multi_box", "image_path", BOXES_OF_CLASSES),
        ("tasks.py:grounding", "image", EXPRESSIONS),
        ("tasks.py:single_box", "image", EXPRESSIONS),
        ("tasks.py:point_environment", "image_filename", [{"test_samples": SAMPLES}]),
    ],
)
def test_the_rewards_of_every_recipe_can_teach(tmp_path, recipe, image, records, caplog):
    flags = [f"--config={ROOT}/configs/{recipe}"]
    if records:
        root = parse_config(flags).grpo.sources["questions"].image_root
        (tmp_path / root).mkdir(exist_ok=True)
        Image.new("RGB", (96, 72)).save(tmp_path / root / "i.png")
        form = "json" if recipe.endswith("multi_box") else "jsonl"
        lines = [json.dumps(record | {image: "i.png"}) for record in records]
        text = "[" + ",".join(lines) + "]" if form == "json" else "\n".join(lines)
        (tmp_path / f"r.{form}").write_text(text)
        flags.append(f"--config.grpo.sources.questions.uri={form}:{tmp_path}/r.{form}")
    if recipe.endswith("relations"):
        few = "relations:synthetic:train?side=64&scenes=64"
        flags.append(f"--config.grpo.sources.questions.uri={few}")
    c = parse_config(flags)
    parts = [
        open_examples(f"grpo/{name}", source, c.data, c.model.image_size)
        for name, source in c.grpo.sources.items()
    ]
    coverages = measure(parts, c.grpo, TOKENS, c.data)
    check(coverages, c.grpo)
    assert [part.source for part in coverages] == [part.name for part in parts]
    assert "earn less" not in caplog.text


def test_a_step_without_a_reward_ends_the_run_and_some_are_logged_once(caplog):
    recorder = SimpleNamespace(_logged_unscored=False)
    weighted = {"reward/weighted/iou": np.nan, "reward/iou": np.nan}
    for step, share in enumerate((0.0, 0.25, 0.5)):
        Recorder._check_rewards(recorder, step, weighted | {"reward/unscored_fraction": share})
    assert [record.getMessage() for record in caplog.records] == [
        "step 1: no reward applies to 25 % of completions"
    ]
    with pytest.raises(UserError, match=r"step 4: every reward is NaN: .*\(iou\) applies to any"):
        Recorder._check_rewards(recorder, 4, weighted | {"reward/unscored_fraction": 1.0})
    Recorder._check_rewards(recorder, 5, {"sft/loss": 1.0})


RECIPE = """
import runpy
from pg_ground.config import Source, section

def get_config():
    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()
    c.stages = ("grpo",)
    source = Source(uri="jsonl:FOLDER/r.jsonl", target="text", suffix="{words}")
    c.grpo.sources = {"mine": section(source)}
    c.grpo.rewards = {"iou": 1.0, "format": 0.2}
    c.grpo.steps = 1
    c.eval.sources = {}
    return c.lock()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--dry_run",),
        ("--workdir=RUN",),
        (),
    ],
)
def test_a_run_whose_rewards_apply_to_nothing_ends_with_one_line(
    source, environment, tmp_path, flags
):
    """Without the check before the first step, the first step ends the run."""
    source()
    recipe = write_recipe(tmp_path, "", RECIPE)
    more = flags or ("--workdir=RUN", "--config.data.check_records=0")
    done = run(
        environment, "train", recipe, *(f.replace("RUN", str(tmp_path / "run")) for f in more)
    )
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    if flags:
        assert "error: source grpo/mine: no reward with a weight (format, iou)" in line
        assert not list(tmp_path.glob("run/metrics.jsonl"))
    else:
        assert "step 1: every reward is NaN: no reward with a weight (format, iou)" in line
        assert not list(tmp_path.glob("run/checkpoints/1"))
