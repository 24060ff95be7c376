"""Tests of the readers of sections, numbers, options and relations: which texts they accept and
refuse, and their time.
"""

import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_ground.readers import answer_formats, locations, parsers
from pg_ground.readers.parsers import Choice, sections

GRAMMARS = (
    locations.json_points,
    locations.json_boxes,
    locations.ovd,
    locations.dict_boxes,
    locations.list_boxes,
    locations.box_tokens,
)
READERS = (
    *GRAMMARS,
    lambda text: locations.read_any(text, 2),
    lambda text: locations.read_any(text, 4),
    locations.loc_segments,
    locations.first_width,
    *(
        partial(answer_formats.read, width=4, form=form)
        for form in answer_formats.FORMATS.values()
        if form.read
    ),
    answer_formats.detect,
    lambda text: answer_formats.detect_all([text, "[[012,345,678,901]]", '{"box_2d": [1]}']),
    answer_formats.without_special_tokens,
    lambda text: answer_formats.without_echo(text, text[: len(text) // 2]),
    sections,
    lambda text: parsers.number(text, strict=True),
    lambda text: parsers.number(text, strict=False),
    lambda text: parsers.option(text, ("left", "right"), strict=True),
    lambda text: parsers.option(text, ("left", "right"), strict=False),
    lambda text: parsers.option(text, ("in front of it", "a chair", "yes"), strict=False),
    parsers.words,
    parsers.stated,
    lambda text: parsers.same_choice(text, "left") or parsers.same_choice("left", text),
    parsers.choice,
    parsers.conclusion,
    parsers.last_boxed,
    parsers.think_boxed,
    parsers.turns,
    parsers.relations,
)

PIECES = st.sampled_from(
    [
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
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        r"\boxed{",
        "<|box_start|>",
        "<|box_end|>",
        "<loc_7>",
        "<patch_index_0044>",
        "<object>",
        "<ref>",
        "<box>",
        "</box>",
        "<|det|>",
        "<points x1=",
        "y1=",
        '{"box_2d": [',
        "[[012,345,",
        "{<10><20>",
        "<bos>",
        "answer is: ",
        "left",
        "(A)",
        "<loc0100>",
        "<seg001>",
        ";",
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
    ]
)
LONG_PIECES = [
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
    "<loc0001>",
    ";",
    '{"box":[1,2,3,4]}',
    "x=1 y=",
    "<loc_1>",
    "cat<loc_1>",
    "<patch_index_0044>",
    "<phrase>",
    "<object>",
    "<ref>",
    "<box>",
    "<box>[",
    "<|box_start|>",
    "<|box_start|>(",
    "<|det|>",
    "<|begin_of_box|>",
    "<point x",
    "<points coords=",
    '<points coords="1 1 200 300">',
    "xmin=1 ",
    "<xmin>1</xmin>",
    "user\n",
    "assistant\n",
    "[INST]",
    "<|user|>",
    "<points x1=1 ",
    "x1",
    "x1=1 y1=1 ",
    'alt="',
    '"box_2d":',
    '"point":[',
    '"label":"',
    '"x_min":',
    '{"xmin":1',
    "[[012,",
    "[[012,345,678,901;",
    "{<1>",
    "<p>",
    "<bos>",
    "<|im_start|>",
    "assistant:",
]
TEXTS = (
    st.text()
    | st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)
    | st.binary().map(lambda data: data.decode("latin-1"))
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_every_reader_takes_every_text(text):
    for read in READERS:
        read(text)
    for read in GRAMMARS:
        reading = read(text)
        widths = {len(location.numbers) for location in reading.locations if location.numbers}
        assert widths <= {2 if read is locations.json_points else 4}
        scores = [location.score for location in reading.locations if location.score is not None]
        assert all(0 <= score <= 1 for score in scores)
        if reading.ok:
            assert all(map(locations.is_proper, reading.locations))


@pytest.mark.parametrize("length", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("piece", LONG_PIECES)
def test_long_texts_are_read_in_linear_time(piece, length):
    """Quadratic time would be minutes. CPU time does not depend on a busy machine."""
    text = piece * (length // len(piece))
    for read in READERS:
        for whole in (text, "<answer>" + text, "[" + text + "]", "{" + text + "}"):
            start = time.process_time()
            read(whole)
            assert time.process_time() - start < 1e-4 * length, read


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
    ("text", "number"),
    [
        ("5", 5),
        ("5.0", 5),
        ("5.", 5),
        (" 5\n", 5),
        ("five", 5),
        ("Five.", 5),
        ("zero", 0),
        ("1,000", 1000),
        ("-3", -3),
        ("<answer>5</answer>", 5),
        ("<think>a 4</think>\n<answer> 5 </answer>", 5),
        ("<answer>five</answer>", 5),
        ("5 cars", None),
        ("1 2 3 4 5", None),
        ("4 or 5", None),
        ("10/2", None),
        ("", None),
        ("٥", None),
        ("²", None),
        ("1,2", None),
        ("NaN", None),
        ("inf", None),
        ("9" * 400, None),
        ("<answer>4</answer><answer>5</answer>", None),
    ],
)
def test_a_strict_number_is_the_whole_answer(text, number):
    assert parsers.number(text, strict=True) == number


@pytest.mark.parametrize(
    ("value", "number", "strict_number"),
    [
        (4, 4, 4),
        (4.5, 4.5, 4.5),
        ([4], 4, 4),
        ("8 cows", 8, None),
        (["8 cows"], 8, None),
        ([4, 5], None, None),
        (True, None, None),
        (None, None, None),
        (float("inf"), None, None),
        (10**400, None, None),
    ],
)
def test_a_number_may_also_be_a_json_value(value, number, strict_number):
    assert parsers.number(value, strict=False) == number
    assert parsers.number(value, strict=True) == strict_number


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("left", "relation", "left"),
        ("Left.", "relation", "left"),
        ("to the left of the table", "relation", "left"),
        ("on the left side of", "relation", "left"),
        ("on top of it", "relation", "above"),
        ("underneath", "relation", "below"),
        ("in front of", "relation", "in front of"),
        ("closer to the camera", "relation", "in front of"),
        ("nearer", "relation", "closer"),
        ("less distant", "relation", "closer"),
        ("more distant", "relation", "farther"),
        ("(C)", "option", "C"),
        ("C", "option", "C"),
        ("C.", "option", "C"),
        ("(b) left", "option", "B"),
        ("B. left", "option", "B"),
        ("yes", "yes/no", "yes"),
        ("No.", "yes/no", "no"),
        ("", "", ""),
        ("e", "", ""),
        ("bright", "", ""),
        ("the chair", "", ""),
        ("G", "", ""),
        ("A chair", "", ""),
        ("to the left of and to the right of", "", ""),
        ("(A) or (B)", "", ""),
        ("yes and no", "", ""),
        ("not left", "", ""),
    ],
)
def test_choice(text, kind, value):
    assert parsers.choice(text) == Choice(kind, value)
    assert parsers.option(text, strict=True) == (value if kind == "option" else None)


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
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("5", None),
    ],
)
def test_last_boxed(text, content):
    assert parsers.last_boxed(text) == content


def test_think_boxed():
    assert parsers.think_boxed(r"<think>a</think> so \boxed{5}")
    for text in (
        r"\boxed{5}",
        r"<think>\boxed{5}</think>5",
        r"<think>a</think>\boxed{4}\boxed{5}",
        r"<think>a</think>\boxed{ }",
    ):
        assert not parsers.think_boxed(text)
