"""What each grammar takes and what it refuses, and that its parser returns something for every text, soon."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_ground.rewards import parsers
from pg_ground.rewards.parsers import Choice, sections

BOX = (100.0, 100.0, 200.0, 300.0)
PLACES = (
    parsers.json_points,
    parsers.json_boxes,
    parsers.ovd,
    parsers.dict_boxes,
    parsers.list_boxes,
    parsers.box_tokens,
)
PARSERS = (
    *PLACES,
    *(
        sections,
        parsers.number,
        parsers.choice,
        parsers.conclusion,
        parsers.last_boxed,
        parsers.think_boxed,
    ),
    parsers.relations,
)

PIECES = st.sampled_from(
    [
        *(
            '{"point_2d":[',
            '{"bbox_2d":[',
            "{'Position': [",
            "'Confidence': ",
            '"label":"',
            "```json\n",
            "\n```",
            "{0: [[",
            "]]}",
            "]}",
        ),
        *(
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            r"\boxed{",
            "<|box_start|>",
            "<|box_end|>",
            "answer is: ",
            "left",
            "(A)",
        ),
        *(
            "[",
            "]",
            "{",
            "}",
            "(",
            ")",
            ",",
            ":",
            '"',
            "'",
            "\\",
            "1",
            "-",
            ".",
            "1e999",
            "NaN",
            "Infinity",
            "٣",
            "²",
            "\0",
            "\ud800",
        ),
    ]
)
TEXTS = (
    st.text()
    | st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)
    | st.binary().map(lambda b: b.decode("latin-1"))
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_every_parser_takes_every_text(text):
    for parse in PARSERS:
        parse(text)
    for parse in PLACES:
        found = parse(text)
        assert len(found.places) == len(found.labels) == len(found.confidences)
        assert {len(place) for place in found.places} <= {2 if parse is parsers.json_points else 4}
        assert all(0 <= confidence <= 1 for confidence in found.confidences)
        if found.ok:
            assert all(map(parsers.is_proper, found.places))


LONG = 100_000


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "[",
            "{",
            "(",
            '{"a":',
            "-",
            "not ",
            "~",
            "'",
            '"',
            "\\",
            "'\\",
            "1",
            "1,",
            "[1,",
            "[1,2,3,",
            "(1,2),",
            "((",
            " ",
            "\n",
        ),
        *(
            "<think>",
            "<answer>",
            "</answer>",
            "<think></think>",
            r"\boxed{",
            "}",
            "{}",
            '{"point_2d"',
            '{"point_2d"}',
            "{'Position'}",
        ),
        *(
            "answer is ",
            "answer: ",
            "the ",
            "left ",
            "(A)",
            "A. ",
            ". ",
            "<|object_ref_start|>",
            "1.1",
            "[[",
            "0x1",
            "```",
        ),
        *(
            "{0: [[1,2,3,4]], ",
            "[1,2,3,4]",
            "1_",
            "1e9",
            "٣",
            "closer to ",
            "﷐",
            "1or ",
            "a.b",
            "1+",
            "\0",
        ),
    ],
)
def test_long_texts_are_read_in_linear_time(piece):
    """Ten times as long takes some ten times as long: quadratic time would be minutes."""
    text = piece * (LONG // len(piece))
    for parse in PARSERS:
        for whole in (text, "<answer>" + text, "[" + text + "]", "{" + text + "}"):
            started = time.perf_counter()
            parse(whole)
            assert time.perf_counter() - started < 5, parse


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("5", "bare", "5"),
        ("<answer>5</answer>", "answer", "5"),
        ("<think>a</think><answer>5</answer>", "think_answer", "5"),
        ("<think>a\nb</think>\n <answer>\n5</answer>", "think_answer", "\n5"),
        ("<think></think><answer>5</answer>", "think_answer", "5"),
        ("<think>a</think><answer> </answer>", "broken", " "),
        ("<think>a</think><answer>5</answer>.", "broken", "5"),
        ("so <think>a</think><answer>5</answer>", "broken", "5"),
        ("<think>a</think>so<answer>5</answer>", "broken", "5"),
        ("<think>a</think><answer>4</answer><answer>5</answer>", "broken", ""),
        ("<think>a<think>b</think><answer>5</answer>", "broken", "5"),
        ("<answer>5</answer><think>a</think>", "broken", "5"),
        ("<think>a</think>5", "broken", "5"),
        ("<think>a 5", "broken", ""),
        ("<answer>5", "broken", ""),
        ("<answer><answer>5</answer></answer>", "broken", ""),
        ("", "bare", ""),
    ],
)
def test_sections(text, form, answer):
    assert sections(text)[1:] == (answer, form)


@pytest.mark.parametrize(
    ("text", "places", "ok"),
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
def test_json_points(text, places, ok):
    found = parsers.json_points(text)
    assert [None if math.isnan(place[0]) else place for place in found.places] == places
    assert found.ok == ok


def test_json_boxes():
    text = '[{"bbox_2d":[100,100,200,300],"label":"cat"}]'
    for whole, ok in (
        (text, True),
        (text[1:-1], True),
        (f"```json\n{text}\n```", False),
        (text[:-1], False),
    ):
        found = parsers.json_boxes(whole)
        assert (found.places, found.labels, found.ok) == ((BOX,), ("cat",), ok)
    assert not parsers.json_boxes(text.replace("[100,100,200,300]", "[200,300,100,100]")).ok


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
    found = parsers.dict_boxes(text)
    assert found.ok == ok and set(found.labels) == {"0"}
    if "[[" in text:
        assert found.places == (BOX,)


def test_dict_boxes_keeps_what_it_cannot_read():
    found = parsers.dict_boxes('{"0": [[1,2,3], [100,100,200,300]], "1": 7}')
    assert found.labels == ("0", "0", "1") and not found.ok
    assert [parsers.is_proper(place) for place in found.places] == [False, True, False]
    assert (
        parsers.dict_boxes("[[1,2,3,4]]").places == () and not parsers.dict_boxes("[[1,2,3,4]]").ok
    )


@pytest.mark.parametrize(
    ("text", "places", "ok"),
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
def test_list_boxes(text, places, ok):
    found = parsers.list_boxes(text)
    assert list(found.places) == places and found.ok == ok


def test_box_tokens():
    text = (
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,100),(200,300)<|box_end|>"
    )
    for whole in (text, text + "<|im_end|>", text[text.index("<|box_start|>") :]):
        assert parsers.box_tokens(whole)[0] == (BOX,) and parsers.box_tokens(whole).ok
    for whole in (
        "< anything",
        "box_start",
        ">x<",
        text + " so",
        text.replace("(200,300)", "(50,50)"),
        "",
    ):
        assert not parsers.box_tokens(whole).ok, whole


def test_ovd():
    entry = "{'Position': [100, 100, 200, 300], 'Confidence': 0.9}"
    for entries in (entry, entry.replace("'", '"'), entry.replace("}", ", 'label': 'cat'}")):
        for text in (
            f"<answer>[{entries}]</answer>",
            f"<think>so</think>\n<answer>\n[{entries}]</answer>",
        ):
            found = parsers.ovd(text)
            assert (found.places, found.confidences, found.ok) == ((BOX,), (0.9,), True)
    assert parsers.ovd("<answer>[]</answer>") == ((), (), (), True)
    assert parsers.ovd(f"<answer>[{entry}, {{'Position': [1,</answer>").places == (BOX,)
    assert not parsers.ovd(f"[{entry}]").ok and parsers.ovd(f"[{entry}]").places == (BOX,)
    for confidence in ("-5", "1.01", "NaN", "1e999", "'high'", "True"):
        found = parsers.ovd(f"<answer>[{entry.replace('0.9', confidence)}]</answer>")
        assert not found.ok and all(math.isnan(x) for place in found.places for x in place)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("5", 5),
            ("5.0", 5),
            ("5.", 5),
            (" 5\n", 5),
            ("five", 5),
            ("Five.", 5),
            ("zero", 0),
            ("1,000", 1000),
            ("-3", -3),
        ),
        *(
            ("<answer>5</answer>", 5),
            ("<think>a 4</think>\n<answer> 5 </answer>", 5),
            ("<answer>five</answer>", 5),
        ),
        *(
            ("5 cars", None),
            ("1 2 3 4 5", None),
            ("4 or 5", None),
            ("10/2", None),
            ("", None),
            ("٥", None),
            ("²", None),
        ),
        *(
            ("1,2", None),
            ("NaN", None),
            ("inf", None),
            ("9" * 400, None),
            ("<answer>4</answer><answer>5</answer>", None),
        ),
    ],
)
def test_number(text, value):
    found = parsers.number(text)
    assert math.isnan(found) if value is None else found == value


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        *(
            ("left", "relation", "left"),
            ("Left.", "relation", "left"),
            ("to the left of the table", "relation", "left"),
        ),
        *(
            ("on the left side of", "relation", "left"),
            ("on top of it", "relation", "above"),
            ("underneath", "relation", "below"),
        ),
        *(
            ("in front of", "relation", "in front of"),
            ("closer to the camera", "relation", "in front of"),
        ),
        *(
            ("nearer", "relation", "closer"),
            ("less distant", "relation", "closer"),
            ("more distant", "relation", "farther"),
        ),
        *(
            ("(C)", "option", "C"),
            ("C", "option", "C"),
            ("C.", "option", "C"),
            ("(b) left", "option", "B"),
            ("B. left", "option", "B"),
        ),
        *(("yes", "yes/no", "yes"), ("No.", "yes/no", "no")),
        *(
            ("", "", ""),
            ("e", "", ""),
            ("bright", "", ""),
            ("the chair", "", ""),
            ("G", "", ""),
            ("A chair", "", ""),
        ),
        *(
            ("to the left of and to the right of", "", ""),
            ("(A) or (B)", "", ""),
            ("yes and no", "", ""),
            ("not left", "", ""),
        ),
    ],
)
def test_choice(text, kind, value):
    assert parsers.choice(text) == Choice(kind, value)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("left.", "", "left."),
        ("I see.\n\nTherefore, the answer is: left", "I see.\n\nTherefore, the ", "left"),
        (
            "The answer is: right\nNo.\nThe answer is: left\n",
            "The answer is: right\nNo.\nThe ",
            "left",
        ),
        ("Answer: (C)", "", "(C)"),
        ("<think>so</think><answer>left</answer>", "so", "left"),
        ("I see.\nleft", "I see.", "left"),
        ("", "", ""),
    ],
)
def test_conclusion(text, reasoning, answer):
    assert parsers.conclusion(text) == (reasoning, answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("5", None),
    ],
)
def test_last_boxed(text, value):
    assert parsers.last_boxed(text) == value


def test_think_boxed():
    assert parsers.think_boxed(r"<think>a</think> so \boxed{5}")
    for text in (
        r"\boxed{5}",
        r"<think>\boxed{5}</think>5",
        r"<think>a</think>\boxed{4}\boxed{5}",
        r"<think>a</think>\boxed{ }",
    ):
        assert not parsers.think_boxed(text)


@given(st.lists(st.tuples(*[st.integers(0, 999)] * 2), max_size=5), st.text(max_size=9))
def test_what_json_writes_is_read(points, label):
    text = json.dumps([{"point_2d": point, "label": label} for point in points])
    assert parsers.json_points(text) == (
        tuple(points),
        (label,) * len(points),
        (1.0,) * len(points),
        True,
    )
