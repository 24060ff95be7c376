"""Questions about relations: labels are true and balanced, and the reasoning earns its reward."""

import itertools
import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from test_tasks import TASKS as RECIPES
from test_tasks import recipe

from pg_ground import tokenizer
from pg_ground.data.batch_rows import stack_rows
from pg_ground.data.datasets import open_examples
from pg_ground.data.mixture import UnusableRow, prepare_row
from pg_ground.data.records import BadRecord, Records
from pg_ground.data.relations import (
    MAX_OBJECTS,
    RELATIONS,
    TASKS,
    TEMPLATES,
    Questions,
    is_object_name,
    open_relations,
    side,
    write_question,
)
from pg_ground.data.sources import open_records
from pg_ground.data.tables import RecordList
from pg_ground.readers import parsers
from pg_ground.rewards.text_questions import text_question
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample
from pg_ground.types import UserError

NAMES = ("chair", "parking meter", "t-shirt", "dog", "hot dog", "man in black")


def questions(scenes: list[dict], options: str = "") -> Questions:
    return open_relations(f"scenes{options}", lambda _: RecordList(scenes, "scenes", None))


def scene(**boxes: list[float]) -> dict:
    return {
        "image": "1.png",
        "objects": [{"name": name, "box": box} for name, box in boxes.items()],
    }


def x(item: dict) -> float:
    return item["box"][0] + item["box"][2]


def y(item: dict) -> float:
    return item["box"][1] + item["box"][3]


def z(item: dict) -> float:
    return item["depth"]


def gap(item: dict, ref: dict) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(item["xyz"], ref["xyz"], strict=True)))


def yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def direction(a: dict, b: dict) -> str:
    if abs(x(a) - x(b)) > abs(y(a) - y(b)):
        return "left" if x(a) < x(b) else "right"
    return "above" if y(a) < y(b) else "below"


TRUTH = {
    "Where is the {a} relative to the {b}?": lambda a, b: direction(a, b),
    "On which side of the {b} is the {a}: left, right, above or below?": lambda a, b: direction(
        a, b
    ),
    "Is the {a} to the left of the {b}?": lambda a, b: yes(x(a) < x(b)),
    "Is the {a} to the right of the {b}?": lambda a, b: yes(x(a) > x(b)),
    "Is the {a} above the {b}?": lambda a, b: yes(y(a) < y(b)),
    "Is the {a} below the {b}?": lambda a, b: yes(y(a) > y(b)),
    "Which is more to the left, the {a} or the {b}?": lambda a, b: min(a, b, key=x)["name"],
    "Which is more to the right, the {a} or the {b}?": lambda a, b: max(a, b, key=x)["name"],
    "Which is higher up in the image, the {a} or the {b}?": lambda a, b: min(a, b, key=y)["name"],
    "Which is lower down in the image, the {a} or the {b}?": lambda a, b: max(a, b, key=y)["name"],
    "Is the {a} in front of the {b} or behind it?": lambda a, b: (
        "in front of" if z(a) < z(b) else "behind"
    ),
    "Is the {a} in front of the {b}?": lambda a, b: yes(z(a) < z(b)),
    "Is the {a} behind the {b}?": lambda a, b: yes(z(a) > z(b)),
    "Of the {a} and the {b}, which is nearer to the camera?": lambda a, b: min(a, b, key=z)["name"],
    "Of the {a} and the {b}, which is farther from the camera?": lambda a, b: max(a, b, key=z)[
        "name"
    ],
    "Is the {a} closer to the {ref} than the {b} is, or farther?": lambda a, b, r: (
        "closer" if gap(a, r) < gap(b, r) else "farther"
    ),
    "Is the {a} nearer to the {ref} than the {b} is?": lambda a, b, r: yes(gap(a, r) < gap(b, r)),
    "Is the {a} farther from the {ref} than the {b} is?": lambda a, b, r: yes(
        gap(a, r) > gap(b, r)
    ),
    "Which is closer to the {ref}, the {a} or the {b}?": lambda a, b, r: min(
        a, b, key=lambda item: gap(item, r)
    )["name"],
    "Which is farther from the {ref}, the {a} or the {b}?": lambda a, b, r: max(
        a, b, key=lambda item: gap(item, r)
    )["name"],
}
"""The right answer to every template, from the objects that the question names."""

pixels = st.integers(0, 500)
metres = st.floats(0.5, 9, width=16)


@st.composite
def drawn_scenes(draw: st.DrawFn) -> dict:
    """Returns a scene of two to four objects. Most of them have a depth and a position."""
    objects = []
    for name in NAMES[: draw(st.integers(2, 4))]:
        left, top = draw(pixels), draw(pixels)
        item = {
            "name": name,
            "box": [left, top, left + draw(st.integers(1, 200)), top + draw(st.integers(1, 200))],
        }
        if draw(st.integers(0, 4)):
            item["depth"] = draw(metres)
            item["xyz"] = [draw(metres), draw(metres), draw(metres)]
        objects.append(item)
    return {"image": "1.png", "objects": objects}


@given(st.lists(drawn_scenes(), min_size=1, max_size=3))
def test_defect_20_labels_fit_the_type_of_the_question(scenes):
    """The answer has the kind that the question asks for, and follows from the geometry."""
    try:
        dataset = questions(scenes)
    except UserError:
        assume(False)
    for record, row in zip(
        map(dataset.__getitem__, range(len(dataset))), dataset.rows, strict=True
    ):
        template = TEMPLATES[row[-1]]
        names = [item["name"] for item in record["objects"]]
        answers = {
            "relation": tuple(RELATIONS),
            "yes/no": ("yes", "no"),
            "object": tuple(names[:2]),
        }[template.kind]
        assert record["answer"] in answers
        assert record["question"] == template.text.format(
            **dict(zip(("a", "b", "ref"), names, strict=False))
        )
        assert record["answer"] == TRUTH[template.text](*record["objects"])
        assert record["task"] == template.task
        assert len(names) == (3 if record["task"] == "distance" else 2)


def test_every_task_asks_in_five_ways_for_every_kind_of_answer():
    assert {template.text for template in TEMPLATES} == set(TRUTH)
    for task in TASKS:
        templates = [template for template in TEMPLATES if template.task == task]
        assert len(templates) >= 5 and {template.kind for template in templates} == {
            "relation",
            "yes/no",
            "object",
        }


def relation_of_boxes(a: tuple, b: tuple, margin: float) -> str:
    return side(*([float(edge) for edge in box] for box in (a, b)), margin)


box = st.tuples(pixels, pixels, st.integers(1, 200), st.integers(1, 200)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box, box, st.sampled_from([0.0, 0.25, 1.0]))
def test_opposite_relations_hold_in_the_opposite_order(a, b, margin):
    relation, back = relation_of_boxes(a, b, margin), relation_of_boxes(b, a, margin)
    assert back == (RELATIONS[relation].opposite if relation else "")
    mirrored = relation_of_boxes(*((-p[2], p[1], -p[0], p[3]) for p in (a, b)), margin)
    upside_down = relation_of_boxes(*((p[0], -p[3], p[2], -p[1]) for p in (a, b)), margin)
    sideways = relation in ("left", "right")
    assert (mirrored, upside_down) == ((back, relation) if sideways else (relation, back))


@given(box, box, st.sampled_from([0.0, 0.25, 1.0]))
def test_a_wider_margin_only_removes_questions(a, b, margin):
    assert relation_of_boxes(a, b, margin + 0.5) in ("", relation_of_boxes(a, b, margin))


def test_unclear_relations_are_not_asked_about():
    assert (
        relation_of_boxes((0, 0, 10, 10), (0, 0, 10, 10), 0.0)
        == relation_of_boxes((0, 0, 10, 10), (20, 20, 30, 30), 0.0)
        == ""
    )
    assert (
        relation_of_boxes((0, 0, 100, 10), (26, 0, 126, 10), 0.25) == "left"
        and relation_of_boxes((0, 0, 100, 10), (25, 0, 125, 10), 0.25) == ""
    )
    near, far = (
        {"name": name, "box": [0, 0, 9, 9], "depth": depth}
        for name, depth in (("cup", 1.0), ("jug", 1.25))
    )
    with pytest.raises(UserError, match="no relation is clear for"):
        questions([{"image": "1.png", "objects": [near, far]}])
    assert (
        questions([{"image": "1.png", "objects": [near, far]}], "?margin_m=0.2")[0]["task"]
        == "depth"
    )


@pytest.mark.parametrize(
    "name", ["dog", "Dog", "left horse", "horse no 2", "7", "pony on top of it", "A"]
)
def test_questions_are_about_objects_with_unique_names_that_are_no_answers(name):
    animals = [
        {"name": animal, "box": [90 * i, 0, 90 * i + 9, 9]}
        for i, animal in enumerate(("dog", "cat", "cow", name))
    ]
    dataset = questions([{"image": "1.png", "objects": animals}])
    named = {item["name"] for i in range(len(dataset)) for item in dataset[i]["objects"]}
    assert named == ({"cat", "cow"} if name.lower() == "dog" else {"dog", "cat", "cow"})


def test_every_answer_to_a_task_comes_equally_often_and_no_question_twice():
    rng = np.random.default_rng(0)
    scenes = []
    for number in range(30):
        # More objects are side by side than above each other.
        corners = rng.uniform(0, 400, (4, 2)) * (1, 0.3)
        objects = [
            {"name": name, "box": [left, top, left + 40, top + 40], "depth": left}
            for name, (left, top) in zip(NAMES, corners.tolist(), strict=False)
        ]
        scenes.append({"image": f"{number}.png", "objects": objects})
    dataset = questions(scenes)
    records = [dataset[i] for i in range(len(dataset))]
    assert len({(record["image"], record["question"]) for record in records}) == len(records) > 500
    counts = Counter()
    for record in records:
        names = [item["name"] for item in record["objects"]]
        answer = record["answer"]
        counts[record["task"], names.index(answer) if answer in names else answer] += 1
    assert set(counts) == {
        *(("2d", answer) for answer in ("left", "right", "above", "below", "yes", "no", 0, 1)),
        *(("depth", answer) for answer in ("in front of", "behind", "yes", "no", 0, 1)),
    }
    assert len(set(counts.values())) == 1
    depth = questions(scenes, "?tasks=depth")
    assert {depth[i]["task"] for i in range(50)} == {"depth"}


def test_questions_are_the_same_in_any_order_and_in_a_copy():
    uri = "relations:synthetic:train?side=32&scenes=40&seed=3"
    first, same = open_records(uri), open_records(uri)
    copy = pickle.loads(pickle.dumps(first))
    for i in (5, 0, len(first) - 1):
        for other in (same, copy):
            np.testing.assert_array_equal(first[i]["image"], other[i]["image"])
            assert {**first[i], "image": 0} == {**other[i], "image": 0}
    assert open_records(uri.replace("seed=3", "seed=4"))[0]["question"] != first[0]["question"]
    assert isinstance(first, Records) and first.root is None


def test_a_crowded_scene_gives_questions_about_six_objects():
    names = [first + last for first, last in itertools.product("bcdfg", ("at", "ot", "ut"))]
    dataset = questions(
        [scene(**{name: [90 * i, 0, 90 * i + 9, 9] for i, name in enumerate(names)})]
    )
    objects = [item["name"] for i in range(len(dataset)) for item in dataset[i]["objects"]]
    assert len(set(objects)) == MAX_OBJECTS


def reward(record: dict[str, str], answer: str, cot: str) -> float:
    gold = f"{record['cot']} Therefore, the answer is: {record['answer']}"
    example = TextExample(
        f"answer en {record['question']}", gold, (), (), (), (9, 9), "text", "questions", 0, 0
    )
    return TEXT_REWARDS["spatial"](f"{cot} Therefore, the answer is: {answer}", example)


@pytest.mark.parametrize(
    "names", [*itertools.permutations(NAMES, 3), ("Tall green potted plant", "TV", "camel")][::7]
)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.text)
def test_the_reasoning_earns_the_full_reward(template, names):
    """The full reward is 1.3.

    A wrong answer costs 0.5 with any reasoning. Reasoning for the other answer earns nothing.
    """
    names = names if template.task == "distance" else names[:2]
    for relation, fact in RELATIONS.items():
        if fact.task != template.task or template.asked not in ("", relation, fact.opposite):
            continue
        right = write_question(template, relation, names)
        wrong = write_question(template, fact.opposite, names)
        assert right["question"] == wrong["question"] and right["answer"] != wrong["answer"]
        assert reward(right, right["answer"], right["cot"]) == 1.3
        assert (
            reward(right, wrong["answer"], wrong["cot"])
            == reward(right, wrong["answer"], right["cot"])
            == -0.5
        )
        assert reward(right, right["answer"], wrong["cot"]) == 1
        assert not any(character.isdigit() for character in right["cot"])


def test_a_name_that_the_reward_would_read_as_an_answer_is_not_used():
    for phrase in (*itertools.chain(*parsers.RELATIONS.values()), "yes", "no"):
        assert not is_object_name(phrase) and not is_object_name(f"the {phrase} dog")
    for name in NAMES:
        assert is_object_name(name) and parsers.choice(name).kind == ""
    assert not is_object_name("A") and parsers.choice("A").kind == "option"


CHAIR = {"name": "chair", "box": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"objects": [CHAIR]}, "scene 1 has objects; it needs an image and a list of objects"),
        ({"image": "1.png"}, "scene 1 has image; it needs"),
        ({"image": "1.png", "objects": {"chair": [1, 2, 3, 4]}}, "list of objects"),
        (
            {"image": "1.png", "objects": [CHAIR, {"box": [1, 2, 3, 4]}]},
            "scene 1, object 1 is .*; it needs a name",
        ),
        (
            {"image": "1.png", "objects": [{"name": "chair"}]},
            "scene 1, object 0: box is None, not 4 numbers",
        ),
        ({"image": "1.png", "objects": [CHAIR | {"box": [3, 2, 1, 4]}]}, "x1 < x2"),
        ({"image": "1.png", "objects": [CHAIR | {"box": [1, 2, 3]}]}, "4 numbers"),
        (
            {"image": "1.png", "objects": [CHAIR | {"depth": "far"}]},
            "depth is 'far', not 1 number, metres",
        ),
        ({"image": "1.png", "objects": [CHAIR | {"depth": math.nan}]}, "depth is nan"),
        ({"image": "1.png", "objects": [CHAIR | {"xyz": [1, 2]}]}, "3 numbers"),
        (5, "scene 1: byte"),
        ({"image": "1.png", "objects": [CHAIR, {"name": None, "box": [1, 2, 3, 4]}]}, "a name"),
        ({"image": "1.png", "objects": [CHAIR, None]}, "object 1 is None; it needs a name"),
    ],
)
def test_a_scene_of_another_form_is_one_bad_record(line, message, tmp_path):
    good = {"image": "1.png", "objects": [CHAIR, {"name": "sofa", "box": [50, 2, 60, 9]}]}
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, (good, line, good))))
    records = open_records(f"relations:jsonl:{path}")
    path.write_text("\n".join(map(json.dumps, (good, good))))
    expected = open_records(f"relations:jsonl:{path}")
    path.write_text("\n".join(map(json.dumps, (good, line, good))))
    questions = [records[i]["question"] for i in range(len(records) - 1)]
    assert sorted(questions) == sorted(expected[i]["question"] for i in range(len(expected)))
    with pytest.raises(BadRecord, match=message) as bad:
        records[len(records) - 1]
    assert bad.value.kind in ("missing_field", "bad_json", "bad_entry", "bad_box")
    assert str(bad.value).startswith("scene 1")
    with pytest.raises(IndexError):
        records[len(records)]
    path.write_text(json.dumps(line))
    with pytest.raises(UserError, match=message.replace("scene 1", "scene 0")):
        open_records(f"relations:jsonl:{path}")


def test_a_name_that_is_a_number_is_not_asked_for(tmp_path):
    objects = [CHAIR, {"name": "sofa", "box": [50, 2, 60, 9]}, {"name": 7, "box": [90, 2, 99, 9]}]
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"image": "1.png", "objects": objects}))
    records = open_records(f"relations:jsonl:{path}")
    names = {item["name"] for i in range(len(records)) for item in records[i]["objects"]}
    assert names == {"chair", "sofa"}


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("relations:jsonl:none.jsonl", "No such file"),
        ("relations:scenes.jsonl", "jsonl:PATH"),
        ("relations:synthetic:train?scenes=9&tasks=3d", "no task '3d'"),
        ("relations:synthetic:train?scenes=9&tasks=dept", "did you mean depth"),
        (
            "relations:synthetic:train?scenes=9&tasks=2d,depth",
            r"no relation is clear for depth \(needs depth\)",
        ),
        (
            "relations:synthetic:train?scenes=9&margin=wide",
            "margin=wide, but it must be a number from 0",
        ),
        ("relations:synthetic:train?scenes=9&margin_m=-1", "margin_m=-1"),
        ("relations:synthetic:train?scenes=0", "scenes=0, but it must be a whole number from 1"),
        ("relations:synthetic:train?scenes=9&marign=1", "no option marign"),
        ("relations:synthetic:train", "set how many to use"),
    ],
)
def test_a_wrong_uri_is_refused_with_the_right_form(uri, message):
    with pytest.raises(UserError, match=message):
        open_records(uri)


def test_the_supervised_answer_of_a_recipe_earns_the_full_reward(tmp_path):
    uri = "relations:synthetic:train?scenes=30&side=32"
    c = recipe("relations", f"--config.grpo.sources.questions.uri={uri}")
    tokens = tokenizer.load()
    drawn = open_examples("questions", c.grpo.sources["questions"], c.data, 28)
    Image.new("RGB", (640, 480)).save(tmp_path / "1.png")
    rooms = [scene(sofa=[9, 9, 99, 99], vase=[300, 20, 330, 80]) | {"image": "1.png"}]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rooms)))
    uri = f"relations:jsonl:{tmp_path}/s.jsonl"
    c = recipe("relations", f"--config.grpo.sources.questions.uri={uri}")
    from_file = open_examples("questions", c.grpo.sources["questions"], c.data, 28)
    assert RECIPES["relations"].text_rewards == {"spatial": 1.0}
    for examples in (drawn, from_file):
        for index in range(min(len(examples), 20)):
            row = prepare_row(examples, index, tokens, c.data, 0, 0)
            assert not isinstance(row, UnusableRow)
            question = text_question(stack_rows([row]), 0, tokens)
            assert len(examples[index].names) == len(question.boxes) == 2
            assert TEXT_REWARDS["spatial"](examples[index].suffix, question) == 1.3
