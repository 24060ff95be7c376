"""Questions about relations: their labels fit, and are true; they are balanced; their reasoning is what the reward asks for."""

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
from pg_ground.data.records import Records
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
from pg_ground.rewards import parsers
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample
from pg_ground.training.rollout_worker import text_question
from pg_ground.types import UserError

NAMES = ("chair", "parking meter", "t-shirt", "dog", "hot dog", "man in black")


def questions(scenes: list[dict], options: str = "") -> Questions:
    return open_relations(f"scenes{options}", lambda _: RecordList(scenes, "scenes", None))


def scene(**boxes: list[float]) -> dict:
    return {
        "image": "1.png",
        "objects": [{"name": name, "box": box} for name, box in boxes.items()],
    }


def x(one: dict) -> float:
    return one["box"][0] + one["box"][2]


def y(one: dict) -> float:
    return one["box"][1] + one["box"][3]


def z(one: dict) -> float:
    return one["depth"]


def gap(one: dict, ref: dict) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(one["xyz"], ref["xyz"], strict=True)))


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def where(a: dict, b: dict) -> str:
    if abs(x(a) - x(b)) > abs(y(a) - y(b)):
        return "left" if x(a) < x(b) else "right"
    return "above" if y(a) < y(b) else "below"


TRUTH = {
    "Where is the {a} relative to the {b}?": lambda a, b: where(a, b),
    "On which side of the {b} is the {a}: left, right, above or below?": lambda a, b: where(a, b),
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
        a, b, key=lambda one: gap(one, r)
    )["name"],
    "Which is farther from the {ref}, the {a} or the {b}?": lambda a, b, r: max(
        a, b, key=lambda one: gap(one, r)
    )["name"],
}
"""What every template asks, in the objects it names."""

pixels, metres = st.integers(0, 500), st.floats(0.5, 9, width=16)


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """Returns a scene of two to four objects, most of which have a depth and a place."""
    objects = []
    for name in NAMES[: draw(st.integers(2, 4))]:
        left, top = draw(pixels), draw(pixels)
        one = {
            "name": name,
            "box": [left, top, left + draw(st.integers(1, 200)), top + draw(st.integers(1, 200))],
        }
        if draw(st.integers(0, 4)):
            one["depth"], one["xyz"] = draw(metres), [draw(metres), draw(metres), draw(metres)]
        objects.append(one)
    return {"image": "1.png", "objects": objects}


@given(st.lists(drawn(), min_size=1, max_size=3))
def test_defect_20_labels_fit_the_type_of_the_question(scenes):
    """A relation, yes or no, or a name of the two, as the question wants; and it is what the geometry says."""
    try:
        found = questions(scenes)
    except UserError:
        assume(False)
    for record, row in zip(map(found.__getitem__, range(len(found))), found.rows, strict=True):
        template, names = TEMPLATES[row[-1]], [one["name"] for one in record["objects"]]
        fits = {"relation": tuple(RELATIONS), "yes/no": ("yes", "no"), "object": tuple(names[:2])}[
            template.kind
        ]
        assert record["answer"] in fits
        assert record["question"] == template.text.format(
            **dict(zip(("a", "b", "ref"), names, strict=False))
        )
        assert record["answer"] == TRUTH[template.text](*record["objects"])
        assert record["task"] == template.task and len(names) == (
            3 if record["task"] == "distance" else 2
        )


def test_every_task_asks_in_five_ways_for_every_kind_of_answer():
    assert {template.text for template in TEMPLATES} == set(TRUTH)
    for task in TASKS:
        mine = [template for template in TEMPLATES if template.task == task]
        assert len(mine) >= 5 and {template.kind for template in mine} == {
            "relation",
            "yes/no",
            "object",
        }


def lies(a: tuple, b: tuple, margin: float) -> str:
    return side(*([float(edge) for edge in box] for box in (a, b)), margin)


box = st.tuples(pixels, pixels, st.integers(1, 200), st.integers(1, 200)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box, box, st.sampled_from([0.0, 0.25, 1.0]))
def test_what_is_left_of_another_has_it_on_its_right(a, b, margin):
    relation, back = lies(a, b, margin), lies(b, a, margin)
    assert back == (RELATIONS[relation].opposite if relation else "")
    mirrored = lies(*((-p[2], p[1], -p[0], p[3]) for p in (a, b)), margin)
    upside_down = lies(*((p[0], -p[3], p[2], -p[1]) for p in (a, b)), margin)
    sideways = relation in ("left", "right")
    assert (mirrored, upside_down) == ((back, relation) if sideways else (relation, back))


@given(box, box, st.sampled_from([0.0, 0.25, 1.0]))
def test_a_wider_margin_only_asks_less(a, b, margin):
    assert lies(a, b, margin + 0.5) in ("", lies(a, b, margin))


def test_what_is_too_close_to_call_is_not_asked():
    assert (
        lies((0, 0, 10, 10), (0, 0, 10, 10), 0.0)
        == lies((0, 0, 10, 10), (20, 20, 30, 30), 0.0)
        == ""
    )
    assert (
        lies((0, 0, 100, 10), (26, 0, 126, 10), 0.25) == "left"
        and lies((0, 0, 100, 10), (25, 0, 125, 10), 0.25) == ""
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
def test_an_object_is_asked_about_by_a_name_that_is_its_own_and_no_answer(name):
    dogs = [
        {"name": one, "box": [90 * i, 0, 90 * i + 9, 9]}
        for i, one in enumerate(("dog", "cat", "cow", name))
    ]
    found = questions([{"image": "1.png", "objects": dogs}])
    named = {one["name"] for i in range(len(found)) for one in found[i]["objects"]}
    assert named == ({"cat", "cow"} if name.lower() == "dog" else {"dog", "cat", "cow"})


def test_every_answer_to_a_task_comes_equally_often_and_no_question_twice():
    rng = np.random.default_rng(0)
    scenes = []
    for number in range(30):
        corners = rng.uniform(0, 400, (4, 2)) * (
            1,
            0.3,
        )  # more of them lie side by side than one above the other
        objects = [
            {"name": name, "box": [left, top, left + 40, top + 40], "depth": left}
            for name, (left, top) in zip(NAMES, corners.tolist(), strict=False)
        ]
        scenes.append({"image": f"{number}.png", "objects": objects})
    found = questions(scenes)
    records = [found[i] for i in range(len(found))]
    assert len({(record["image"], record["question"]) for record in records}) == len(records) > 500
    seen = Counter()
    for record in records:
        names = [one["name"] for one in record["objects"]]
        seen[
            record["task"],
            names.index(record["answer"]) if record["answer"] in names else record["answer"],
        ] += 1
    assert set(seen) == {
        *(("2d", answer) for answer in ("left", "right", "above", "below", "yes", "no", 0, 1)),
        *(("depth", answer) for answer in ("in front of", "behind", "yes", "no", 0, 1)),
    }
    assert len(set(seen.values())) == 1
    depth = questions(scenes, "?tasks=depth")
    assert {depth[i]["task"] for i in range(50)} == {"depth"}


def test_questions_are_the_same_in_any_order_and_in_a_copy():
    uri = "relations:synthetic:train?side=32&scenes=40&seed=3"
    one, same = open_records(uri), open_records(uri)
    copy = pickle.loads(pickle.dumps(one))
    for i in (5, 0, len(one) - 1):
        for other in (same, copy):
            np.testing.assert_array_equal(one[i]["image"], other[i]["image"])
            assert {**one[i], "image": 0} == {**other[i], "image": 0}
    assert open_records(uri.replace("seed=3", "seed=4"))[0]["question"] != one[0]["question"]
    assert isinstance(one, Records) and one.root is None


def test_a_crowded_scene_is_asked_about_no_more_than_its_share():
    names = [first + last for first, last in itertools.product("bcdfg", ("at", "ot", "ut"))]
    found = questions([scene(**{name: [90 * i, 0, 90 * i + 9, 9] for i, name in enumerate(names)})])
    assert len({one["name"] for i in range(len(found)) for one in found[i]["objects"]}) == MAX_OBJECTS


def earned(record: dict[str, str], answer: str, cot: str) -> float:
    gold = f"{record['cot']} Therefore, the answer is: {record['answer']}"
    example = TextExample(
        f"answer en {record['question']}", gold, (), (), (), (9, 9), "text", "questions", 0, 0
    )
    return TEXT_REWARDS["spatial"](f"{cot} Therefore, the answer is: {answer}", example)


@pytest.mark.parametrize(
    "names", [*itertools.permutations(NAMES, 3), ("Tall green potted plant", "TV", "camel")][::7]
)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.text)
def test_the_reasoning_earns_all_that_its_reward_gives(template, names):
    """1.3, the most there is; a wrong answer costs 0.5 however it is reasoned, and reasoning to another answer earns nothing."""
    wanted = names if template.task == "distance" else names[:2]
    for relation, about in RELATIONS.items():
        if about.task != template.task or template.asked not in ("", relation, about.opposite):
            continue
        right, wrong = write_question(template, relation, wanted), write_question(template, about.opposite, wanted)
        assert right["question"] == wrong["question"] and right["answer"] != wrong["answer"]
        assert earned(right, right["answer"], right["cot"]) == 1.3
        assert (
            earned(right, wrong["answer"], wrong["cot"])
            == earned(right, wrong["answer"], right["cot"])
            == -0.5
        )
        assert earned(right, right["answer"], wrong["cot"]) == 1
        assert not any(character.isdigit() for character in right["cot"])


def test_a_name_that_the_reward_would_take_for_an_answer_is_not_asked_about():
    for phrase in (*itertools.chain(*parsers.RELATIONS.values()), "yes", "no"):
        assert not is_object_name(phrase) and not is_object_name(f"the {phrase} dog")
    for name in NAMES:
        assert is_object_name(name) and parsers.choice(name).kind == ""
    assert not is_object_name("A") and parsers.choice("A").kind == "option"


CHAIR = {"name": "chair", "box": [1, 2, 3, 4]}


@pytest.mark.parametrize(("line", "message"), [
    ({"objects": [CHAIR]}, "scene 1 has objects; it needs an image and a list of objects"),
    ({"image": "1.png"}, "scene 1 has image; it needs"),
    ({"image": "1.png", "objects": {"chair": [1, 2, 3, 4]}}, "list of objects"),
    ({"image": "1.png", "objects": [CHAIR, {"box": [1, 2, 3, 4]}]}, "scene 1, object 1 is .*; it needs a name"),
    ({"image": "1.png", "objects": [{"name": "chair"}]}, "scene 1, object 0: box is None, not 4 numbers"),
    ({"image": "1.png", "objects": [CHAIR | {"box": [3, 2, 1, 4]}]}, "x1 < x2"),
    ({"image": "1.png", "objects": [CHAIR | {"box": [1, 2, 3]}]}, "4 numbers"),
    ({"image": "1.png", "objects": [CHAIR | {"depth": "far"}]}, "depth is 'far', not 1 number, metres"),
    ({"image": "1.png", "objects": [CHAIR | {"depth": math.nan}]}, "depth is nan"),
    ({"image": "1.png", "objects": [CHAIR | {"xyz": [1, 2]}]}, "3 numbers"),
    ([], "scene 1: byte"),
])  # fmt: skip
def test_a_scene_of_another_form_is_refused_by_its_number(line, message, tmp_path):
    good = {"image": "1.png", "objects": [CHAIR, {"name": "sofa", "box": [50, 2, 60, 9]}]}
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, (good, line))))
    with pytest.raises(UserError, match=message):
        open_records(f"relations:jsonl:{tmp_path}/s.jsonl")
    assert len(open_records(f"relations:jsonl:{tmp_path}/s.jsonl?scenes=1"))


@pytest.mark.parametrize(("uri", "message"), [
    ("relations:jsonl:none.jsonl", "No such file"),
    ("relations:scenes.jsonl", "jsonl:PATH"),
    ("relations:synthetic:train?scenes=9&tasks=3d", "no task '3d'"),
    ("relations:synthetic:train?scenes=9&tasks=dept", "did you mean depth"),
    ("relations:synthetic:train?scenes=9&tasks=2d,depth", r"no relation is clear for depth \(needs depth\)"),
    ("relations:synthetic:train?scenes=9&margin=wide", "margin=wide, but it must be a number from 0"),
    ("relations:synthetic:train?scenes=9&margin_m=-1", "margin_m=-1"),
    ("relations:synthetic:train?scenes=0", "scenes=0, but it must be a whole number from 1"),
    ("relations:synthetic:train?scenes=9&marign=1", "no option marign"),
    ("relations:synthetic:train", "set how many to use"),
])  # fmt: skip
def test_a_wrong_uri_says_what_would_be_right(uri, message):
    with pytest.raises(UserError, match=message):
        open_records(uri)


def test_a_recipe_reads_them_and_its_supervised_answer_earns_the_most(tmp_path):
    c, tokens = (
        recipe(
            "relations",
            "--config.grpo.sources.questions.uri=relations:synthetic:train?scenes=30&side=32",
        ),
        tokenizer.load(),
    )
    drawn = open_examples("questions", c.grpo.sources["questions"], c.data, 28)
    Image.new("RGB", (640, 480)).save(tmp_path / "1.png")
    rooms = [scene(sofa=[9, 9, 99, 99], vase=[300, 20, 330, 80]) | {"image": "1.png"}]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rooms)))
    c = recipe(
        "relations", f"--config.grpo.sources.questions.uri=relations:jsonl:{tmp_path}/s.jsonl"
    )
    read = open_examples("questions", c.grpo.sources["questions"], c.data, 28)
    assert RECIPES["relations"].text_rewards == {"spatial": 1.0}
    for found in (drawn, read):
        for index in range(min(len(found), 20)):
            row = prepare_row(found, index, tokens, c.data, 0, 0)
            assert not isinstance(row, UnusableRow)
            asked = text_question(stack_rows([row]), 0, tokens)
            assert len(found[index].names) == len(asked.boxes) == 2
            assert TEXT_REWARDS["spatial"](found[index].suffix, asked) == 1.3
