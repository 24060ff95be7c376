"""Tests of the readers of boxes and points: which texts each grammar accepts and refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_ground.readers import locations
from pg_ground.readers.locations import Location, Reading

BOX = (100.0, 100.0, 200.0, 300.0)


def numbers_of(reading: Reading) -> list[tuple[float, ...] | None]:
    return [location.numbers for location in reading.locations]


@pytest.mark.parametrize(
    ("text", "numbers", "ok"),
    [
        ('{"point_2d":[1,2],"label":"cat"}', [(1, 2)], True),
        (
            '[{"point_2d":[1.5,-2],"label":"cat"},{"point_2d":[3,4e1],"label":""}]',
            [(1.5, -2), (3, 40)],
            True,
        ),
        ('<think>a</think><answer>{"point_2d":[1,2],"label":"cat"}</answer>', [(1, 2)], True),
        ("[]", [], True),
        ('```json\n[{"point_2d":[1,2],"label":"cat"}]\n```', [(1, 2)], False),
        ('Here: {"point_2d":[1,2],"label":"cat"}', [(1, 2)], False),
        ("{'point_2d':[1,2],'label':'cat'}", [(1, 2)], False),
        ('[{"point_2d":[1,2],"label":"cat"},{"point_2d":[3,', [(1, 2)], False),
        ('{"point_2d":[1,2]}', [(1, 2)], False),
        ('{"point_2d":[1,2],"label":3}', [(1, 2)], False),
        ('{"point_2d":[1,2],"label":"cat","score":1}', [(1, 2)], False),
        ('{"point_2d":["1","2"],"label":"cat"}', [None], False),
        ('{"point_2d":[true,2],"label":"cat"}', [None], False),
        ('{"point_2d":[1,2,3],"label":"cat"}', [None], False),
        ('{"point_2d":[NaN,2],"label":"cat"}', [None], False),
        ('{"point_2d":[Infinity,2],"label":"cat"}', [None], False),
        ('{"point_2d":[1e999,2],"label":"cat"}', [None], False),
        ('{"point_2d":[1' + "0" * 400 + ',2],"label":"cat"}', [None], False),
        ("[1, 2]", [None, None], False),
        ("no point", [], False),
        ("", [], False),
    ],
)
def test_json_points(text, numbers, ok):
    reading = locations.json_points(text)
    assert numbers_of(reading) == numbers
    assert reading.ok == ok


def test_json_boxes():
    text = '[{"bbox_2d":[100,100,200,300],"label":"cat"}]'
    for whole, ok in (
        (text, True),
        (text[1:-1], True),
        (f"```json\n{text}\n```", False),
        (text[:-1], False),
    ):
        assert locations.json_boxes(whole) == Reading((Location(BOX, "cat"),), ok)
    assert not locations.json_boxes(text.replace("[100,100,200,300]", "[200,300,100,100]")).ok


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("{0: [[100,100,200,300]], 1: []}", True),
        ('{"0": [[100,100,200,300]], "1": []}', True),
        ("<answer>{0: [[100,100,200,300]]}</answer>", True),
        ("```json\n{0: [[100,100,200,300]]}\n```", False),
        ('The boxes: {"0": [[100,100,200,300]]}.', False),
        ("{0: [100,100,200,300]}", False),
    ],
)
def test_dict_boxes(text, ok):
    reading = locations.dict_boxes(text)
    assert reading.ok == ok and {location.label for location in reading.locations} == {"0"}
    if "[[" in text:
        assert numbers_of(reading) == [BOX]


def test_a_dict_counts_the_boxes_that_it_cannot_read():
    reading = locations.dict_boxes('{"0": [[1,2,3], [100,100,200,300]], "1": 7}')
    assert [location.label for location in reading.locations] == ["0", "0", "1"] and not reading.ok
    assert list(map(locations.is_proper, reading.locations)) == [False, True, False]
    assert locations.dict_boxes("[[1,2,3,4]]") == Reading((), False)


@pytest.mark.parametrize(
    ("text", "numbers", "ok"),
    [
        ("[100,100,200,300]", [BOX], True),
        ("[100, 100, 200, 300]", [BOX], True),
        ("[100.0,100,200,300]", [BOX], False),
        ("(100,100,200,300)", [BOX], False),
        ("(100,100),(200,300)", [BOX], False),
        ("a box [100,100,200,300]", [BOX], False),
        ("[100,100,200,300] [100,100,200,300]", [BOX, BOX], False),
        ("[[100,100,200,300]]", [BOX], False),
        ("[200,300,100,100]", [(200, 300, 100, 100)], False),
        ("[150,200,150,200]", [(150, 200, 150, 200)], False),
        ("[-100,100,200,300]", [(-100, 100, 200, 300)], False),
        ("[1e2,100,200,300]", [], False),
        ("[nan,100,200,300]", [], False),
        ("[١,٢,٣,٤]", [], False),
        ("[100,100,200]", [], False),
        ("", [], False),
    ],
)
def test_list_boxes(text, numbers, ok):
    reading = locations.list_boxes(text)
    assert numbers_of(reading) == numbers and reading.ok == ok


def test_box_tokens():
    text = (
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,100),(200,300)<|box_end|>"
    )
    for whole in (text, text + "<|im_end|>", text[text.index("<|box_start|>") :]):
        reading = locations.box_tokens(whole)
        assert numbers_of(reading) == [BOX] and reading.ok
    for whole in (
        "< anything",
        "box_start",
        ">x<",
        text + " so",
        text.replace("(200,300)", "(50,50)"),
        "",
    ):
        assert not locations.box_tokens(whole).ok, whole


def test_ovd():
    entry = "{'Position': [100, 100, 200, 300], 'Confidence': 0.9}"
    for entries in (entry, entry.replace("'", '"'), entry.replace("}", ", 'label': 'cat'}")):
        for text in (
            f"<answer>[{entries}]</answer>",
            f"<think>so</think>\n<answer>\n[{entries}]</answer>",
        ):
            reading = locations.ovd(text)
            (location,) = reading.locations
            assert (location.numbers, location.score, reading.ok) == (BOX, 0.9, True)
    assert locations.ovd("<answer>[]</answer>") == Reading((), True)
    assert numbers_of(locations.ovd(f"<answer>[{entry}, {{'Position': [1,</answer>")) == [BOX]
    bare = locations.ovd(f"[{entry}]")
    assert not bare.ok and numbers_of(bare) == [BOX]
    for confidence in ("-5", "1.01", "NaN", "1e999", "'high'", "True"):
        reading = locations.ovd(f"<answer>[{entry.replace('0.9', confidence)}]</answer>")
        assert not reading.ok and numbers_of(reading) == [None]


@given(st.lists(st.tuples(*[st.integers(0, 999)] * 2), max_size=5), st.text(max_size=9))
def test_a_point_that_json_writes_is_read(points, label):
    text = json.dumps([{"point_2d": point, "label": label} for point in points])
    expected = tuple(Location(tuple(map(float, point)), label) for point in points)
    assert locations.json_points(text) == Reading(expected, True)


def test_special_tokens_are_no_part_of_a_label():
    text = (
        "<bos><loc0001><loc0002><loc0003><loc0004><seg001><seg127> red car ; "
        "<loc0005><loc0006><eos>"
    )
    assert locations.loc_segments(text) == [
        Location((1, 2, 3, 4), "red car", written="yxyx_bin"),
        Location((5, 6), "", written="yx_bin"),
    ]


CAT = {"bbox_2d": [100, 100, 200, 300], "label": "cat"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([CAT]),
        str(CAT),
        f"The cat: {json.dumps(CAT)}.",
        f'[{json.dumps(CAT)}, {{"bbox_2d": [1, 2',
        f"```json\n{json.dumps(CAT)}\n```",
        f"<think>[1, 2, 3, 4]</think><answer>[{json.dumps(CAT)}",
    ],
)
def test_objects_have_their_labels_in_any_text(text):
    assert locations.read_any(text, 4) == [Location(BOX, "cat")]


def test_bare_numbers_beside_objects_are_read_in_order():
    text = f"[1, 2, 3, 4] then {json.dumps(CAT)} and (5, 6, 7, 8)"
    numbers = [location.numbers for location in locations.read_any(text, 4)]
    assert numbers == [(1, 2, 3, 4), BOX, (5, 6, 7, 8)]


@pytest.mark.parametrize("value", [[], {}, None, 7, "", "cat", {"label": "cat"}])
def test_a_value_without_a_location_has_none(value):
    assert locations.read_any(value, 4) == []


@pytest.mark.parametrize(
    "value",
    [
        {"bbox_2d": [1, 2, 3]},
        [[1, 2, 3]],
        [{"bbox_2d": None}],
        '{"bbox_2d": [1, 2, "x", 4]}',
        {"x1": 1, "y1": 1, "x2": 9, "y2": 1, "x3": 9, "y3": 9},
        "x1=1, y1=1, x2=9, y2=2, x3=9, y3=9, x4=1, y4=9",
    ],
)
def test_a_location_that_cannot_be_read_still_counts(value):
    assert [location.numbers for location in locations.read_any(value, 4)] == [None]
