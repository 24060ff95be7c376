"""COCO's instances: from a file to the question, the answer and the bad records."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.coco import id_key, name_text, read_flag
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.source_check import SourceId, check_source
from pg_ground.data.sources import open_records
from pg_ground.reporting import data_report
from pg_ground.types import UserError

PHRASES = {"category": "category", "list": "classes", "image": "image"}

BOX = [10, 10, 20, 20]
LOC = "<loc0170><loc0128><loc0512><loc0384>"
"""`BOX` in an image of 80 x 60 pixels."""


def image(number: Any, name: str = "a.png", **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 80, "height": 60} | more


def thing(number: Any, image_id: Any, category_id: Any = 0, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": BOX} | more


def instances(**lists: Any) -> dict[str, Any]:
    """Four images, each with a red square; image 3 has a blue square too."""
    return {
        "images": [image(number) for number in range(4)],
        "annotations": [thing(number, number) for number in range(4)] + [thing(4, 3, 1)],
        "categories": [{"id": 0, "name": "red square"}, {"id": 1, "name": "blue square"}],
    } | lists


@pytest.fixture
def write(tmp_path):
    """Writes a file of instances, beside an image with the name a.png."""

    def write_file(value: object) -> Path:
        Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
        (tmp_path / "train.json").write_text(json.dumps(value))
        return tmp_path / "train.json"

    return write_file


def questions(path: Path, ask: str, **entry: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the questions (prompt and answer), and the bad records (`kind: message`)."""
    form = ask.partition("&")[0]
    settings: dict[str, Any] = {
        "phrase": PHRASES[form],
        "prompt": "detect all" if form == "image" else "detect {phrase}",
        "boxes": "boxes",
        "label": "" if form == "category" else "categories",
        "box_format": "xywh_px",
    }
    source = Source(uri=f"coco:{path}?ask={ask}", **settings | entry)
    examples = open_examples("mine", source, Data(max_boxes=4), 14)
    good, bad = [], []
    for index in range(len(examples)):
        try:
            example = examples[index]
            good.append((example.prompt, example.suffix))
        except BadRecord as fault:
            bad.append(f"{fault.kind}: {fault}")
    return good, bad


def readings(path: Path, ask: str) -> list[str]:
    """Returns what `look --check` says about the reading of a source that keeps empty records."""
    source = Source(uri=f"coco:{path}?ask={ask}", phrase=PHRASES[ask], boxes="boxes", empty="keep")
    source_id = SourceId("mine", source, Data(max_boxes=4), 14, 0)
    tables = data_report.tables([check_source(source_id, 1, lambda count: None)])
    return [
        row[-1] for table in tables if table.title == "how records are read" for row in table.rows
    ]


def notes_of(records: Any) -> tuple[str, ...]:
    return records.notes


RED = ("detect red square", f"{LOC} red square")
BLUE = ("detect blue square", f"{LOC} blue square")
GOOD = {
    "category": [RED] * 4 + [BLUE],
    "list": [RED] * 3
    + [("detect red square ; blue square", f"{LOC} red square ; {LOC} blue square")],
    "image": [("detect all", f"{LOC} red square")] * 3
    + [("detect all", f"{LOC} red square ; {LOC} blue square")],
}
"""The questions of `instances()`."""


@pytest.mark.parametrize("ask", GOOD)
def test_a_whole_file_has_no_bad_record(write, ask):
    assert questions(write(instances()), ask) == (GOOD[ask], [])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"images": [image(1), image(1, "b.png")]},
            "entries 0 (a.png) and 1 (b.png) of images have the same id 1",
        ),
        (
            {"images": [image(2), image(3), image("3", "b.png")]},
            "entries 1 (a.png) and 2 (b.png) of images have the same id '3'",
        ),
        ({"images": [image(3.0), image(3)]}, "entries 0 (a.png) and 1 (a.png) of images"),
        ({"images": [image("x", "a.png"), image("x", "c.png")]}, "the same id 'x'"),
        (
            {"categories": [{"id": 1, "name": "red square"}, {"id": 1, "name": "blue square"}]},
            "entries 0 (red square) and 1 (blue square) of categories have the same id 1",
        ),
        (
            {"categories": [{"id": 0, "name": "cat"}, {"id": 5}, {"id": 0.0, "name": "cat"}]},
            "entries 0 (cat) and 2 (cat) of categories",
        ),
        (
            {"annotations": [thing(7, 0), thing(8, 1), thing(7, 1)]},
            "entries 0 and 2 of annotations have the same id 7",
        ),
    ],
)
@pytest.mark.parametrize("ask", PHRASES)
def test_two_entries_with_the_same_id_are_refused_by_both_names(write, lists, message, ask):
    path = write(instances(**lists))
    with pytest.raises(UserError) as refused:
        questions(path, ask)
    assert message in str(refused.value) and f"coco:{path}" in str(refused.value)


def test_annotations_need_no_ids(write):
    annotations = [thing(None, 0), thing(None, 1), {**thing(0, 2)}, thing([1], 3), thing([1], 3, 1)]
    del annotations[2]["id"]
    assert questions(write(instances(annotations=annotations)), "list") == (GOOD["list"], [])


BAD_ANNOTATIONS = [
    (thing(999, 777), "missing_image", "there is no image with the id 777"),
    (thing(999, -1), "missing_image", "there is no image with the id -1"),
    (thing(999, None), "missing_image", "there is no image_id"),
    (thing(999, [3]), "missing_image", "there is no image with the id [3]"),
    (
        thing(999, "img_3"),
        "missing_image",
        "there is no image with the id 'img_3'; there are ids such as 0",
    ),
    (thing(999, 3, None), "missing_category", "there is no category_id"),
    (thing(999, 3, 9), "missing_category", "there is no category with the id 9"),
    (thing(999, 3, True), "missing_category", "there is no category with the id True"),
    (thing(999, 3, bbox=None), "bad_box", "bbox is None, not 4 numbers"),
    (thing(999, 3, bbox=[]), "bad_box", "bbox is [], not 4 numbers"),
    (thing(999, 3, bbox=[1, 2, 3, 4, 5]), "bad_box", "bbox: [1, 2, 3, 4, 5] is not 4 numbers"),
    (thing(999, 3, bbox=[1, 2, 3, None]), "bad_box", "bbox: [1, 2, 3, nan] is not finite"),
    (thing(999, 3, bbox=[1, 2, float("nan"), 4]), "bad_box", "bbox: [1, 2, nan, 4] is not finite"),
    (thing(999, 3, bbox=[1, 2, True, 4]), "bad_box", "bbox is [1, 2, True, 4], not"),
    (thing(999, 3, bbox="big"), "bad_box", "bbox: the text 'big' has "),
    (thing(999, 3, bbox={"x": 1, "y": 2}), "bad_box", "{'x': 1, 'y': 2} is no box"),
    (thing(999, 3, bbox=[BOX, BOX]), "bad_box", "not 4 numbers"),
    (thing(999, 3, bbox=[1, 2, 3, 10**400]), "bad_box", "not 4 numbers"),
    (
        {"id": 999, "image_id": 3, "category_id": 0},
        "bad_box",
        "annotation 5 (id 999) of train.json: there is no bbox",
    ),
    (thing(999, 3, iscrowd="maybe"), "bad_entry", "iscrowd is 'maybe', which is no flag"),
    (thing(999, 3, iscrowd=2), "bad_entry", "iscrowd is 2, which is no flag"),
    (thing(999, 3, iscrowd=[]), "bad_entry", "iscrowd is [], which is no flag"),
    (None, "bad_entry", "annotation 5 of train.json: it is None, not an object"),
    ("x" * 20_000, "bad_entry", "not an object"),
]


@pytest.mark.parametrize(("entry", "kind", "message"), BAD_ANNOTATIONS)
@pytest.mark.parametrize("at", [0, 5])
def test_a_bad_annotation_is_one_bad_record_and_all_others_stay(write, entry, kind, message, at):
    value = instances()
    value["annotations"].insert(at, entry)
    message = message.replace("annotation 5", f"annotation {at}")
    for ask in ("category", "list"):
        good, bad = questions(write(value), ask)
        assert good == GOOD[ask] and len(bad) == 1
        assert bad[0].startswith(kind) and message in bad[0] and len(bad[0]) < 300
        assert f"annotation {at}" in bad[0] and "of train.json" in bad[0]
    good, bad = questions(write(value), "image")
    if kind == "missing_category":  # the image's record has a box without a name
        assert good == GOOD["image"][:3] and bad[0].startswith("bad_text") and "None" in bad[0]
        assert len(questions(write(value), "image", label="", name="")[0]) == 4
    else:
        assert good == GOOD["image"] and len(bad) == 1 and message in bad[0]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, 0], [5, 5, -3, 10]])
def test_a_flat_box_costs_its_annotation_and_not_its_image(write, bbox):
    value = instances()
    value["annotations"].insert(1, thing(77, 0, bbox=bbox))
    for ask in PHRASES:
        good, bad = questions(write(value), ask)
        assert good == GOOD[ask] and len(bad) == 1
        assert bad[0].startswith("bad_box: annotation 1 (id 77)") and "no width" in bad[0]
    if min(bbox) == 0:
        good, bad = questions(write(value), "list", flat_boxes="drop")
        assert good == GOOD["list"] and not bad


def test_an_image_whose_annotations_are_all_bad_has_no_empty_answer(write):
    annotations = [thing(0, 0), thing(1, 1, bbox=[])]
    path = write(instances(annotations=annotations, images=[image(0), image(1)]))
    for ask in PHRASES:
        good, bad = questions(path, ask, empty="keep")
        assert good == GOOD[ask][:1]
        assert "bad_box: annotation 1 (id 1)" in bad[-1]
        assert [text.partition(":")[0] for text in bad[:-1]] == ["empty"] * (ask != "category")


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (None, "bad_entry", "image 4 of train.json: it is None, not an object"),
        ({"file_name": "a.png"}, "missing_field", "image 4 of train.json: there is no id"),
        ({"id": 9}, "missing_field", "image 4 (id 9) of train.json: there is no file_name"),
        (image(9, file_name=5), "missing_image", "file_name is 5, which names no file"),
        (image(9, file_name=" "), "missing_image", "file_name is ' ', which names no file"),
        (image([9]), "bad_entry", "id is [9], which is no id"),
    ],
)
def test_a_bad_image_is_one_bad_record_with_its_annotations(write, entry, kind, message):
    value = instances()
    value["images"].append(entry)
    if entry and entry.get("id") == 9:
        value["annotations"] += [thing(10, 9), thing(11, 9, 1)]
    for ask in PHRASES:
        good, bad = questions(write(value), ask)
        assert good == GOOD[ask] and len(bad) == 1
        assert bad[0].startswith(kind) and message in bad[0]


@pytest.mark.parametrize("to_id", [str, float, lambda number: number - 7, lambda n: f"img {n}"])
@pytest.mark.parametrize("number_annotations", [False, True])
def test_ids_of_any_type_match_by_value(write, to_id, number_annotations):
    value = instances()
    for entry in value["images"] + value["categories"]:
        entry["id"] = to_id(entry["id"])
    for entry in value["annotations"]:
        for name in ("image_id", "category_id"):
            same_value = to_id in (str, float) and number_annotations
            entry[name] = entry[name] if same_value else to_id(entry[name])
    for ask in PHRASES:
        assert questions(write(value), ask) == (GOOD[ask], [])


def test_ids_that_are_equal_only_as_numbers_differ_and_the_message_shows_both(write):
    value = instances(images=[image(f"00{number}") for number in range(4)])
    with pytest.raises(UserError) as refused:
        questions(write(value), "category")
    assert "there is no image with the id 0; there are ids such as '000'" in str(refused.value)


def test_the_key_of_an_id():
    keys = [id_key(value) for value in (3, 3.0, "3", "-3", -3, "03", "3.5", 3.5, True, None, [])]
    assert keys == [3, 3, 3, -3, -3, "03", "3.5", None, None, None, None]
    assert id_key("9" * 5000) == "9" * 5000 and id_key(float("nan")) is None


NAMES = [7, "7", 7.0, "cat", -1, 2**40]
NO_NAMES = [None, ["a", "b"], {}, True, "", "  ", 1.5, float("nan")]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_a_number_is_asked_for_as_text(write, name):
    text = str(int(name)) if isinstance(name, float) else str(name)
    value = instances(categories=[{"id": 0, "name": name}, {"id": 1, "name": 3}])
    path = write(value)
    red, both = (f"detect {text}", f"{LOC} {text}"), f"{LOC} {text} ; {LOC} 3"
    assert questions(path, "category") == ([red] * 4 + [("detect 3", f"{LOC} 3")], [])
    assert questions(path, "list") == ([red] * 3 + [(f"detect {text} ; 3", both)], [])
    assert questions(path, "image")[0][3] == ("detect all", both)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_no_text_is_a_bad_record_where_it_is_needed(write, name):
    value = instances(categories=[{"id": 0, "name": "red square"}, {"id": 1, "name": name}])
    path = write(value)
    good, bad = questions(path, "category")
    assert good == GOOD["category"][:4] and len(bad) == 1
    assert bad[0].startswith("bad_text: category 1 (id 1) of train.json has the name ")
    assert questions(path, "list")[0] == GOOD["list"][:3] and len(questions(path, "list")[1]) == 1
    good, bad = questions(path, "image")
    assert good == GOOD["image"][:3] and bad[0].startswith("bad_text") and "None" in bad[0]
    assert questions(path, "image", label="", name="") == (
        [("detect all", LOC)] * 4,
        [],
    )


def test_a_category_that_is_no_category_is_one_bad_record(write):
    for entry in (None, "cat", {"name": "cat"}, {"id": None, "name": "cat"}):
        categories = [*instances()["categories"], entry]
        good, bad = questions(write(instances(categories=categories)), "list")
        assert good == GOOD["list"] and len(bad) == 1 and "category 2 of train.json" in bad[0]
    without_names = write(instances(categories=None))
    assert len(questions(without_names, "image", label="", name="")[0]) == 4


FLAGS = {
    True: [1, 1.0, True, "1", "true", "True", "YES"],
    False: [0, 0.0, False, None, "0", "false", "No", ""],
    None: [2, -1, "maybe", "2", [], {}, [0], float("nan")],
}


def test_a_flag_may_be_text(write):
    for flag, values in FLAGS.items():
        assert [read_flag(value) for value in values] == [flag] * len(values)
    for value in FLAGS[True] + FLAGS[False]:
        crowd = value in FLAGS[True]
        annotations = [*instances()["annotations"], thing(5, 0, 1, iscrowd=value)]
        path = write(instances(annotations=annotations))
        assert len(questions(path, "category")[0]) == 5 + (not crowd)
        records = open_records(f"coco:{path}?ask=category&crowd=1")
        assert len(records) == 6 and records[1]["iscrowd"] == [int(crowd)]


def test_a_crowd_that_is_left_out_needs_no_other_field(write):
    crowd = {"iscrowd": 1, "image_id": 777}
    value = instances(annotations=[*instances()["annotations"], crowd])
    assert questions(write(value), "category") == (GOOD["category"], [])


@pytest.mark.parametrize(
    "box",
    [
        ["10", "1e1", "20.0", 20],
        [[10, 10, 20, 20]],
        {"x": 10, "y": 10, "width": 20, "height": 20},
        {"x1": 10, "y1": 10, "x2": 30, "y2": "30"},
        "10 10 20 20",
        "[10, 10, 20, 20]",
    ],
)
def test_a_box_may_have_any_form_that_boxes_of_a_record_have(write, box):
    annotations = [thing(0, 0, bbox=box)]
    path = write(instances(annotations=annotations, images=[image(0)]))
    assert questions(path, "category") == ([RED], [])


@pytest.mark.parametrize("sizes", [{}, {"width": None, "height": 0}, {"width": 80}])
def test_the_size_of_an_image_is_not_required(write, sizes):
    images = [{"id": number, "file_name": "a.png"} | sizes for number in range(4)]
    for ask in PHRASES:
        assert questions(write(instances(images=images)), ask) == (GOOD[ask], [])


RED_NOTHING = ("detect red square", "")
BLUE_NOTHING = ("detect blue square", "")


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        ("category", [RED, BLUE, RED_NOTHING, BLUE_NOTHING, RED_NOTHING]),
        ("list", [RED_NOTHING, RED, BLUE_NOTHING, BLUE, RED_NOTHING]),
        (
            "image",
            [("detect all", text) for text in ("", RED[1], "", BLUE[1], "")],
        ),
    ],
)
def test_background_images_ask_for_one_class_each_in_turn(write, ask, expected):
    value = instances(
        images=[image(number) for number in range(5)],
        annotations=[thing(0, 1), thing(1, 3, 1)],
    )
    path = write(value)
    assert questions(path, ask, empty="keep") == (expected, [])
    good, bad = questions(path, ask, empty="drop")
    assert good == [question for question in expected if question[1]]
    assert all(text.startswith(("empty", "bad_text")) for text in bad)
    records = open_records(f"coco:{path}?ask={ask}", keep_empty=True)
    note = "3 background images ask for one class each, in turn"
    assert notes_of(records) == (() if ask == "image" else (note,))
    assert (note in readings(path, ask)) == (ask != "image")
    assert notes_of(open_records(f"coco:{path}?ask={ask}")) == ()


@pytest.mark.parametrize("annotations", [None, []])
def test_a_file_without_annotations_shows_background_only(write, annotations):
    path = write(instances(annotations=annotations))
    expected = [RED_NOTHING, BLUE_NOTHING, RED_NOTHING, BLUE_NOTHING]
    assert questions(path, "category", empty="keep") == (expected, [])
    assert questions(path, "list", empty="keep") == (expected, [])
    with pytest.raises(UserError, match="there are no objects in it"):
        questions(path, "category")


def test_classes_of_a_crowd_are_not_asked_for_as_background(write):
    crowds = [thing(0, 0), thing(1, 1, 0, iscrowd=1), thing(2, 2, 0, iscrowd="1")]
    crowds += [thing(3, 2, 1, iscrowd=1), thing(4, 3, 5, iscrowd=1)]
    path = write(instances(annotations=crowds))
    assert questions(path, "category", empty="keep")[0] == [RED, BLUE_NOTHING]
    good, bad = questions(path, "list", empty="keep")
    assert good == [RED, BLUE_NOTHING]
    assert bad == ["empty: 'a.png' shows crowds of all classes"] * 2


def test_names_of_background_are_names_that_are_text(write):
    categories = [{"id": 0, "name": None}, {"id": 1, "name": 7}, {"id": 2, "name": "7"}]
    path = write(instances(annotations=[], categories=categories))
    assert questions(path, "list", empty="keep")[0] == [("detect 7", "")] * 4
    assert [name_text(value) for value in NO_NAMES] == [None] * len(NO_NAMES)


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        ({1: "cat", 7: "cat"}, ["2 classes (1, 7) have the name 'cat' and are one class"]),
        (
            {1: "traffic light", 2: "dog", 3: "traffic  light ", 4: " traffic light"},
            ["3 classes (1, 3, 4) have the name 'traffic light' and are one class"],
        ),
        ({"a": 3, "b": "3", "c": 3.0}, ["3 classes (a, b, c) have the name '3' and are one class"]),
        ({1: "cat", 2: "Cat", 3: "cats", 4: None, 5: None}, []),
        (
            {i: f"n{i // 2}" for i in range(16)},
            [f"2 classes ({2 * i}, {2 * i + 1}) have the name 'n{i}' and are one class"
             for i in range(5)] + ["3 more names of several classes"],
        ),
    ],
)  # fmt: skip
def test_categories_that_share_one_name_are_listed(write, names, notes):
    categories = [{"id": number, "name": name} for number, name in names.items()]
    first = next(iter(names))
    path = write(
        instances(categories=categories, annotations=[thing(i, i, first) for i in range(4)])
    )
    for ask in PHRASES:
        assert [text for text in readings(path, ask) if "class" in text] == notes


@pytest.mark.parametrize("other", ["red square", "red  square", " red square ", "red\tsquare"])
def test_categories_with_one_name_are_one_question(write, other):
    names = [{"id": 0, "name": "red square"}, {"id": 1, "name": other}]
    boxes = [thing(0, 0), thing(1, 0, 1, bbox=[30, 10, 20, 20])]
    path = write(instances(images=[image(0)], categories=names, annotations=boxes))
    ((prompt, answer),), bad = questions(path, "category")
    assert prompt == "detect red square" and answer.count("red square") == 2 and not bad


@pytest.mark.parametrize("ask", PHRASES)
@pytest.mark.parametrize("orphans", [0, 1, 3])
def test_annotations_without_an_image_cast_doubt_on_empty_answers(write, ask, orphans):
    """The message of each names the id that is missing. Which image was meant cannot be known."""
    lost = [thing(90 + i, ("x9", 999, "00")[i]) for i in range(orphans)]
    path = write(instances(annotations=[thing(0, 0), *lost]))
    text = f"{orphans} annotation{'s name' if orphans > 1 else ' names'} no image of the file: "
    assert any(note.startswith(text) for note in readings(path, ask)) == bool(orphans)
    _, bad = questions(path, ask, empty="keep")
    messages = [message for message in bad if message.startswith("missing_image")]
    assert len(messages) == orphans
    for message, missing in zip(messages, ("'x9'", "999", "'00'"), strict=False):
        assert f"there is no image with the id {missing}" in message
    whole = write(instances(annotations=[thing(i, i) for i in range(4)] + lost))
    records = open_records(f"coco:{whole}?ask={ask}", "mine", True, True)
    assert not any("no image of the file" in note for note in notes_of(records))


def count(path: Path, ask: str, **entry: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the questions for the number of objects, and the bad records."""
    prompt = "how many?" if ask.startswith("image") else "how many {phrase}?"
    return questions(path, ask, **{"prompt": prompt, "suffix": "count"} | entry)


RED_COUNT = ("how many red square?", "1")
BLUE_COUNT = ("how many blue square?", "1")


@pytest.mark.parametrize(
    ("entry", "counted"),
    [
        (thing(9, 3, 0, bbox=[1, 2, "x", 4]), [BLUE_COUNT]),
        (thing(9, 3, 0, bbox=[5, 5, 0, 0]), [BLUE_COUNT]),
        (thing(9, 3, 0, iscrowd="maybe"), [BLUE_COUNT]),
        (thing(9, 3, 1, bbox=None), [RED_COUNT]),
        (thing(9, 3, 9), []),
        (thing(9, 3, 0, iscrowd=1), [BLUE_COUNT]),
        (thing(9, 3, 5, iscrowd=1), []),
    ],
)
@pytest.mark.parametrize("crowd", [0, 1])
def test_a_count_beside_lost_objects_or_crowds_is_a_bad_record(write, entry, counted, crowd):
    """Image 3 has a red and a blue square, and the entry. The other images have a red one."""
    path = write(instances(annotations=[*instances()["annotations"], entry]))
    unknown = entry["category_id"] > 1
    is_lost = bool(entry.get("iscrowd") != 1 or (crowd and unknown))
    good, bad = count(path, f"category&crowd={crowd}")
    assert good == [RED_COUNT] * 3 + counted
    what = "annotations that cannot be used" if is_lost else "crowds"
    text = f"bad_count: the count is unknown: 'a.png' has {what} (1)"
    are_counts = [fault.startswith(text) for fault in bad]
    assert are_counts == [True] * (2 - len(counted)) + [False] * is_lost
    good, bad = count(path, f"list&crowd={crowd}")
    assert good == [RED_COUNT] * 3 and len(bad) == 1 + is_lost
    good, bad = count(path, f"image&crowd={crowd}", label="")
    is_counted = unknown and "iscrowd" not in entry  # this question needs no name
    assert [answer for _, answer in good] == ["1"] * 3 + ["3"] * is_counted


def test_a_crowd_of_another_class_does_not_change_a_count(write):
    crowd = thing(9, 0, 1, iscrowd=1)
    path = write(instances(annotations=[*instances()["annotations"], crowd]))
    assert count(path, "list")[0][0] == RED_COUNT
    assert count(path, "category") == ([RED_COUNT] * 4 + [BLUE_COUNT], [])
    good, bad = count(path, "image")
    assert [answer for _, answer in good] == ["1", "1", "2"] and "crowds (1)" in bad[0]


def test_nothing_is_counted_as_0_beside_a_crowd(write):
    path = write(instances(annotations=[thing(0, 0), thing(1, 1, 0, iscrowd=1)]))
    good, bad = count(path, "image", empty="keep")
    assert [answer for _, answer in good] == ["1", "0", "0"]
    assert len(bad) == 1 and "crowds (1)" in bad[0]


def test_answers_that_lack_objects_are_said(write):
    lost = [thing(9, 3, bbox=None), thing(10, 3, bbox=None), thing(11, 0, bbox=None)]
    text = "annotations that cannot be used: their objects are in no answer"
    for n, note in ((3, f"2 images have {text}"), (1, f"1 image has {text}"), (0, "")):
        path = write(instances(annotations=[*instances()["annotations"], *lost[:n]]))
        for ask in PHRASES:
            assert "".join(line for line in readings(path, ask) if text in line) == note
    path = write(instances(annotations=[*instances()["annotations"], thing(9, 777)]))
    text = "1 annotation names no image of the file: some counts may be wrong"
    assert notes_of(open_records(f"coco:{path}", counts=True)) == (text,)
