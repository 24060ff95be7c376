"""The forms in which people write boxes, points, names and numbers: from a file to the answer.

Every record is a line of a JSON file beside an image of 80 x 40 pixels.
"""

import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import text
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.examples import to_example
from pg_ground.data.records import BadRecord, short
from pg_ground.types import BOXES, POINTS, Example, UserError

SIDE = 16
SIZE = (80, 40)
PIXELS = np.zeros((40, 80, 3), np.uint8)
BOX = "<loc0256><loc0128><loc0767><loc0512> red square"
"""The answer for the box x 10 to 40, y 10 to 30 in an image of 80 x 40 pixels."""


def opened(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Examples:
    """Returns the questions of JSON lines. Each line is about an image of 80 x 40 pixels."""
    Image.new("RGB", SIZE).save(folder / "i.png")
    default = {"image": "i.png", "phrase": "red square"}
    text = "\n".join(json.dumps(default | row) for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    settings = {"boxes": "box"} | settings
    data = Data(max_boxes=8, prompt_length=64, suffix_length=64)
    return open_examples("a", Source(uri=f"jsonl:{folder}/rows.jsonl", **settings), data, SIDE)


def example(folder: Path, row: dict[str, Any], **settings: Any) -> Example:
    return opened(folder, [row], **settings)[0]


def fault(folder: Path, row: dict[str, Any], **settings: Any) -> str:
    """Returns the kind and the message of a bad record."""
    with pytest.raises(BadRecord) as bad:
        example(folder, row, **settings)
    return f"{bad.value.kind}: {bad.value}"


@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 40, 30],
        ["10", "10", "40", "30"],
        [[[10, 10, 40, 30]]],
        [[10, 10], [40, 30]],
        [[[10, 10], [40, 30]]],
        [[10, 10], [40, 10], [40, 30], [10, 30]],
        {"x1": 10, "y1": 10, "x2": 40, "y2": 30},
        {"xmin": 10, "ymin": 10, "xmax": 40, "ymax": 30, "truncated": 0},
        [{"x_min": "10", "y_min": "10", "x_max": "40", "y_max": "30"}],
        {"XMin": 10, "YMin": 10, "XMax": 40, "YMax": 30},
        {"xmin": [10], "ymin": [10], "xmax": [40], "ymax": [30]},
        {"left": 10, "top": 10, "right": 40, "bottom": 30},
        {"l": 10, "t": 10, "r": 40, "b": 30},
        {"x": 10, "y": 10, "width": 30, "height": 20},
        {"left": 10, "top": 10, "width": 30, "height": 20},
        {"left": 10, "top": 10, "right": 40, "bottom": 30, "width": 30, "height": 20},
        {"cx": 25, "cy": 20, "w": 30, "h": 20},
        {"bndbox": {"xmin": "10", "ymin": "10", "xmax": "40", "ymax": "30"}, "name": "red square"},
        [{"bbox": [10, 10, 40, 30], "label": "red square"}],
        {"red square": [10, 10, 40, 30]},
        {"red square": [[10, 10, 40, 30]], "dog": []},
        "10 10 40 30",
        "[10, 10, 40, 30]",
        "[[10, 10, 40, 30]]",
        '{"bbox_2d": [10, 10, 40, 30], "label": "red square"}',
        '```json\n[{"bbox_2d": [10, 10, 40, 30], "label": "red square"}]\n```',
        "The box is (10, 10), (40, 30).",
        "<|object_ref_start|>red square<|object_ref_end|><|box_start|>(10,10),(40,30)<|box_end|>",
        "<ref>red square</ref><box>[[10, 10, 40, 30]]</box>",
        "<loc0256><loc0128><loc0767><loc0512> red square",
        "<loc0256><loc0128><loc0767><loc0512>red square<eos>",
        "red square<loc_125><loc_250><loc_500><loc_750>",
        "<think>maybe [1, 1, 2, 2]</think><answer>[10, 10, 40, 30]</answer>",
    ],
)
def test_every_form_of_a_box_gives_the_same_answer(tmp_path, box):
    result = example(tmp_path, {"box": box})
    assert result.target == BOXES and result.suffix.endswith("> red square")
    assert result.suffix == BOX or "<loc_" in str(box)
    np.testing.assert_allclose(result.boxes.yxyx, [[0.25, 0.125, 0.75, 0.5]], atol=1e-3)


GEMINI_BOX = [250, 125, 750, 500]
"""y1, x1, y2, x2 of the box of `BOX` in thousandths."""
GEMINI_FORMS = [
    {"box_2d": GEMINI_BOX, "label": "red square"},
    [{"box_2d": GEMINI_BOX, "label": "red square"}],
    [{"box_2d": str(GEMINI_BOX), "label": "red square"}],
    {"box_2d": [[250, 125], [750, 500]], "label": "red square"},
    json.dumps([{"box_2d": GEMINI_BOX, "label": "red square"}]),
    f"```json\n{json.dumps({'label': 'red square', 'box_2d': GEMINI_BOX})}\n```",
]


@pytest.mark.parametrize("box", GEMINI_FORMS, ids=str)
def test_gemini_s_boxes_are_read_by_their_convention_and_the_notes_say_so(tmp_path, box):
    result = example(tmp_path, {"box": box})
    assert result.suffix == BOX
    (note,) = [note for note in result.notes if "box_2d" in note]
    assert note.endswith("read as yxyx_permille")


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("box_2d", {"box_2d": GEMINI_BOX}),
        ("box_2d", {"box_2d": [GEMINI_BOX]}),
        ("box_2d", {"box_2d": str(GEMINI_BOX)}),
        ("answer.box_2d", {"answer": {"box_2d": GEMINI_BOX}}),
    ],
)
def test_a_field_that_is_called_box_2d_is_read_as_gemini_s_boxes_are(tmp_path, path, row):
    result = example(tmp_path, row, boxes=path, label="phrase")
    assert result.suffix == BOX
    assert [note for note in result.notes if "box_2d" in note and "yxyx_permille" in note]


def test_a_stated_box_format_overrules_the_convention_of_box_2d(tmp_path):
    for format_name, numbers in (
        ("yxyx_px", [10, 10, 30, 40]),
        ("xywh_px", [10, 10, 30, 20]),
        ("xyxy_permille", [125, 250, 500, 750]),
    ):
        row = {"box": [{"box_2d": numbers, "label": "red square"}], "box_2d": numbers}
        for path in ("box", "box_2d"):
            result = example(tmp_path, row, boxes=path, box_format=format_name, label="phrase")
            assert result.suffix == BOX
            assert any(f"read as {format_name}" in note for note in result.notes)


def test_keys_of_a_box_in_box_2d_state_its_order(tmp_path):
    corners = {"x1": 10, "y1": 10, "x2": 40, "y2": 30}
    assert example(tmp_path, {"box": {"box_2d": corners, "label": "red square"}}).suffix == BOX


@pytest.mark.parametrize("numbers", [[10, 500, 900, 1500], [0, 0, 1001, 1000]])
def test_box_2d_with_coordinates_above_1000_is_a_bad_box(tmp_path, numbers):
    reason = "which Gemini writes as yxyx_permille, but a coordinate is above 1000: set box_format"
    for row, path in (({"box": [{"box_2d": numbers}]}, "box"), ({"box_2d": numbers}, "box_2d")):
        message = fault(tmp_path, row, boxes=path)
        assert message.startswith("bad_box: ") and reason in message


def test_a_list_with_box_2d_and_bbox_is_a_bad_box(tmp_path):
    boxes = [{"box_2d": GEMINI_BOX}, {"bbox": [10, 10, 40, 30]}]
    assert "two forms: yxyx_permille and xyxy_px" in fault(tmp_path, {"box": boxes})


def test_several_boxes_keep_their_names_and_their_order(tmp_path):
    two = "<loc0000><loc0000><loc0512><loc0512> cat ; <loc0512><loc0512><loc1023><loc1023> dog"
    for box in (
        {"cat": [0, 0, 40, 20], "dog": [[40, 20, 80, 40]]},
        [
            {"xmin": 0, "ymin": 0, "xmax": 40, "ymax": 20, "name": "cat"},
            {"xmin": 40, "ymin": 20, "xmax": 80, "ymax": 40, "name": "dog"},
        ],
        "<ref>cat</ref><box>(0,0),(40,20)</box><ref>dog</ref><box>(40,20),(80,40)</box>",
        two + " ;",
    ):
        assert example(tmp_path, {"box": box}).suffix == two
    columns = {"xmin": [0, 40], "ymin": [0, 20], "xmax": [40, 80], "ymax": [20, 40]}
    named = {"box": columns, "label": ["cat", "dog"]}
    assert example(tmp_path, named, label="label").suffix == two


def test_x_and_y_are_the_centre_if_the_format_says_so(tmp_path):
    box = {"x": 25, "y": 20, "width": 30, "height": 20}
    assert example(tmp_path, {"box": box}, box_format="cxcywh_px").suffix == BOX
    created = [{"label": "red square", "coordinates": box}]
    assert example(tmp_path, {"box": created}, box_format="cxcywh_px").suffix == BOX


def test_a_turned_box_is_a_bad_box(tmp_path):
    box = {"x": 10, "y": 10, "width": 30, "height": 20}
    assert example(tmp_path, {"box": box | {"rotation": 0}}).suffix == BOX
    assert "rotation 45" in fault(tmp_path, {"box": [box | {"rotation": 45}]})


FOUR = {"x1": 10, "y1": 10, "x2": 40, "y2": 10, "x3": 40, "y3": 30, "x4": 10, "y4": 30}


@pytest.mark.parametrize(
    "box",
    [
        FOUR,
        {f"{key[0].upper()}_{key[1]}": str(number) for key, number in FOUR.items()},
        {f"{key[0]}{int(key[1]) - 1}": number for key, number in FOUR.items()},
        FOUR | {"xmin": 10, "ymin": 10, "xmax": 40, "ymax": 30, "label": "red square"},
        [FOUR],
        {key: [number] for key, number in FOUR.items()},
        {"bbox": FOUR},
        json.dumps(FOUR),
        {"xtl": 10, "ytl": 10, "xtr": 40, "ytr": 10, "xbr": 40, "ybr": 30, "xbl": 10, "ybl": 30},
        {"x1": 10, "y1": 10, "x2": 40, "y2": 30, "x3": None, "y3": None},
        {"points": [[10, 10], [40, 30]]},
        [{"label": "red square", "points": [[10, 10], [40, 30]], "shape_type": "rectangle"}],
        {"corners": [[10, 10], [40, 10], [40, 30], [10, 30]]},
    ],
    ids=str,
)
def test_corners_under_keys_are_read_as_lists_of_corners_are(tmp_path, box):
    assert example(tmp_path, {"box": box}).suffix == BOX


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (FOUR | {"y2": 10.5, "y4": 29.5}, "four corners of no upright rectangle"),
        ({key: FOUR[key] for key in list(FOUR)[:6]}, "3 corners"),
        ({key: FOUR[key] for key in list(FOUR)[:5]}, "3 corners"),
        (FOUR | {"x5": 10, "y5": 20}, "5 corners"),
        (FOUR | {"y4": None}, "4 corners"),
        (FOUR | {"xmin": 0, "ymin": 0, "xmax": 4, "ymax": 4}, "states two boxes"),
        (FOUR | {"rotation": 30}, "rotation 30"),
        ({"x1": 1, "x_1": 12, "y1": 1, "x2": 40, "y2": 30}, "two values of x1"),
        ({"xtl": 10, "ytl": 10, "xtr": 40, "ytr": 12, "xbr": 40, "ybr": 30}, "3 corners"),
        ({"points": [[10, 10], [40, 10], [40, 30]]}, "not 4 numbers"),
        ({"points": [[20, 20], [30, 30]], "shape_type": "circle"}, "the shape 'circle'"),
        ({"topLeft": {"x": 10, "y": 10}, "bottomRight": {"x": 40, "y": 30}}, "is no box"),
    ],
)
def test_two_of_more_corners_are_never_a_box(tmp_path, box, reason):
    text = fault(tmp_path, {"box": box})
    assert text.startswith("bad_box") and reason in text, text


def test_percent_in_an_answer_states_its_unit(tmp_path):
    text = "<p>red square</p> {<12><25><50><75>}"
    result = example(tmp_path, {"box": text}, name="")
    np.testing.assert_allclose(result.boxes.yxyx, [[0.25, 0.12, 0.75, 0.5]], atol=1e-3)
    assert result.names == ("red square",) and "minigpt" in result.notes[0]


LABEL_STUDIO = {"x": 12.5, "y": 25, "width": 37.5, "height": 50, "rotation": 0}


@pytest.mark.parametrize(
    "more",
    [
        {"rectanglelabels": ["red square"]},
        {"original_width": 80, "original_height": 40},
        {"rectanglelabels": ["red square"], "original_width": 800, "original_height": 400},
    ],
    ids=str,
)
def test_boxes_of_label_studio_are_percent_unless_the_source_states_a_unit(tmp_path, more):
    for box in (LABEL_STUDIO | more, [LABEL_STUDIO | more]):
        result = example(tmp_path, {"box": box})
        assert result.suffix == BOX
        (note,) = result.notes
        assert note == "keys x y width height (xywh) of Label Studio read as xywh_percent"
    pixels = {"x": 10, "y": 10, "width": 30, "height": 20} | more
    assert example(tmp_path, {"box": pixels}, box_format="xywh_px").suffix == BOX
    text = fault(tmp_path, {"box": pixels | {"width": 120}})
    assert "above 100: box_format = 'xywh_px' reads pixels" in text
    assert "rotation 5" in fault(tmp_path, {"box": LABEL_STUDIO | more | {"rotation": 5}})


def test_names_and_points_of_label_studio_are_read(tmp_path):
    box = LABEL_STUDIO | {"rectanglelabels": ["dark car"]}
    assert example(tmp_path, {"box": [box]}).names == ("dark car",)
    point = {"x": 25, "y": 50, "width": 0.5, "keypointlabels": ["tip"]}
    read = example(tmp_path, {"point": [point]}, boxes="", points="point", target="points")
    assert read.suffix == "<loc0512><loc0256> tip"


@pytest.mark.parametrize("unit", ["px", "permille", "bin"])
def test_fractions_in_another_unit_are_a_bad_box(tmp_path, unit):
    text = fault(tmp_path, {"box": [0.1, 0.2, 0.5, 0.6]}, box_format=f"xyxy_{unit}")
    assert text.startswith("bad_box") and "xyxy_frac" in text


def test_fields_of_their_own_are_a_box_or_a_point(tmp_path):
    row = {"x1": 10, "y1": 10, "x2": "40", "y2": 30}
    assert example(tmp_path, row, boxes="x1,y1,x2,y2").suffix == BOX
    point = example(tmp_path, {"x": 20, "y": 10}, target="points", boxes="", points="x, y")
    assert point.suffix == "<loc0256><loc0256> red square"
    lists = {"x": [20, 60], "y": [10, 30]}
    points = example(tmp_path, lists, target="points", boxes="", points="x,y", name="")
    assert points.suffix == "<loc0256><loc0256> ; <loc0767><loc0767>"
    sizes = {"x": 10, "y": 10, "width": 30, "height": 20}
    read = example(tmp_path, sizes, boxes="x,y,width,height", box_format="xywh_px")
    assert read.suffix == BOX, "width and height belong to the box, not to the image"
    assert "y2" in fault(tmp_path, row | {"y2": None}, boxes="x1,y1,x2,y2")


@pytest.mark.parametrize(
    "point", [[20, 10], {"x": 20, "y": "10"}, "(20, 10)", '{"point_2d": [20, 10]}', [[[20, 10]]]]
)
def test_every_form_of_a_point_gives_the_same_answer(tmp_path, point):
    result = example(tmp_path, {"point": point}, target="points", boxes="", points="point")
    assert (result.suffix, result.target) == ("<loc0256><loc0256> red square", POINTS)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (
            "<loc0001><loc0002><loc0003>",
            "a part with 3 loc tokens: between ';' must be 4 loc tokens, then a name",
        ),
        ("<loc0001><loc0002><loc0003><loc0004><seg001> cat", "a mask has 16 seg tokens, not 1"),
        ("I see 2 cats at [10, 10, 40, 30]", "5 numbers, which are no rows of 4"),
        ("no", "0 numbers"),
        ({"x": 1, "y": 2}, "its keys would be x1 y1 x2 y2"),
        ({"x1": 10, "y1": 10, "x2": 40, "y2": 30, "left": 1, "top": 1, "w": 2}, ""),
        ({"x1": 0, "y1": 0, "x2": 9, "y2": 9, "x": 5, "y": 5, "w": 2, "h": 2}, "states two boxes"),
        ([[10, 10], [40, 10], [40, 30], [10, 29]], "no upright rectangle"),
        ([{"xmin": 0, "ymin": 0, "xmax": 4, "ymax": 4}, [1, 2, 3, 4]], "is no object"),
        ([{"x1": 0, "y1": 0, "x2": 4, "y2": 4}, {"cx": 9, "cy": 9, "w": 2, "h": 2}], "two forms"),
        ([10, 10, 300, 30], "reaches far beyond an image of 80x40 pixels"),
    ],
)
def test_a_form_with_two_meanings_is_a_bad_box(tmp_path, box, reason):
    if not reason:  # further keys that complete no second box are ignored
        assert example(tmp_path, {"box": box}).suffix == BOX
        return
    text = fault(tmp_path, {"box": box})
    assert text.startswith("bad_box") and reason in text and len(text) < 420


def test_a_box_far_beyond_the_image_names_formats_that_fit(tmp_path):
    text = fault(tmp_path, {"box": [0, 0, 70, 80]}, box_format="xyxy_frac")
    assert "it fits as xyxy_percent, xyxy_permille" in text
    assert "it fits as xyxy_px" in fault(tmp_path, {"box": [50, 5, 79, 39]}, box_format="xywh_px")


def test_answers_in_loc_tokens_keep_the_tokens_of_masks(tmp_path):
    """PaliGemma's own training files: the answer of a supervised step equals the file's text."""
    codes = "".join(f"<seg{i:03d}>" for i in range(16))
    cat, dog = "<loc0100><loc0200><loc0300><loc0400>", "<loc0000><loc0000><loc1023><loc1023>"
    text = f"{cat}{codes} cat ; {dog} dog"
    row = {"prefix": "detect cat ; dog", "suffix": text}
    result = example(tmp_path, row, phrase="prefix", prompt="{prefix}", boxes="suffix", name="")
    assert (result.prompt, result.suffix, result.names) == (row["prefix"], text, ("cat", "dog"))


def test_thousandths_are_a_unit_of_sources(tmp_path):
    record = {"box": [125, 250, 500, 750], "point": [250, 250]}
    assert example(tmp_path, record, box_format="xyxy_permille").suffix == BOX
    settings = {"target": "points", "boxes": "", "points": "point"}
    point = example(tmp_path, record, point_format="xy_permille", **settings)
    assert point.suffix == "<loc0256><loc0256> red square"


@pytest.mark.parametrize("target", ["boxes", "points"])
@pytest.mark.parametrize(
    "row",
    [
        *({"o": None}, {}, {"o": []}, {"o": {}}, {"o": ""}, {"o": " "}, {"deep": {"o": None}}),
        *({"o": "[]"}, {"o": "null"}, {"o": math.nan}),
    ],
)
def test_null_absent_and_empty_mean_that_nothing_is_there(tmp_path, row, target):
    path = "deep.o" if "deep" in row else "o"
    settings = {"target": target, "boxes": "", "name": "{phrase}"} | {target: path}
    result = example(tmp_path, row, empty="keep", **settings)
    assert (result.prompt, result.suffix, result.names) == ("detect red square", "", ())
    assert fault(tmp_path, row, **settings).startswith("empty: there are no " + target)
    # The name and the mask of nothing are not needed.
    assert (
        example(tmp_path, row, empty="keep", label="names", mask="masks", **settings).suffix == ""
    )


def test_an_annotation_without_numbers_is_bad_even_if_empty_records_are_kept(tmp_path):
    for box in ([[]], [None], [{"bbox": []}], [[10, 10, 40, 30], []]):
        assert fault(tmp_path, {"box": box}, empty="keep").startswith("bad_box")


@pytest.mark.parametrize(
    "box", [[True, 10, 40, 30], [[1, False, 40, 30]], [[True, 2], [40, 30]], "[True, 2, 40, 30]"]
)
def test_a_flag_is_no_number_of_a_box(tmp_path, box):
    assert fault(tmp_path, {"box": box}).startswith("bad_box")


@pytest.mark.parametrize(
    ("count", "answer"),
    [(3.0, "3"), (3, "3"), ("3", "3"), (-0.0, "0"), (2.5, "2.5"), (1e20, "1e+20")],
)
def test_whole_floats_are_written_as_whole_numbers(tmp_path, count, answer):
    row = {"count": count}
    assert example(tmp_path, row, target="text", boxes="", suffix="{count}").suffix == answer
    template = tmp_path / "p.jinja"
    template.write_text("how many {{ count }}")
    jinja = example(tmp_path, row, target="text", boxes="", suffix="x", prompt=str(template))
    assert jinja.prompt == f"how many {answer}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, True, [1], {"a": 1}, ""])
def test_values_that_are_no_text_are_bad_text(tmp_path, value):
    row = {"box": [10, 10, 40, 30], "v": value}
    assert fault(tmp_path, row, phrase="v").startswith("bad_text: v is ")
    assert fault(tmp_path, row, prompt="detect {v}").startswith("bad_text: v is ")
    assert fault(tmp_path, row | {"v": [value, value]}, label="v").startswith("bad_text")
    if value is None or isinstance(value, float):
        template = tmp_path / "p.jinja"
        template.write_text("detect {{ v }}")
        assert fault(tmp_path, row, prompt=str(template)).startswith("bad_text")


def test_whole_floats_are_names_and_fractions_are_not(tmp_path):
    row = {"box": [10, 10, 40, 30], "v": 2.0}
    assert example(tmp_path, row, label="v").suffix.endswith("> 2")
    assert fault(tmp_path, row | {"v": 2.5}, label="v").startswith("bad_text")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"put it in \boxed{}", r"put it in \boxed{}"),
        (r"put it in \boxed{{}}", r"put it in \boxed{}"),
        (r"\boxed{{{answer}}}", r"\boxed{7}"),
        ('as {"bbox_2d": [x1, y1]}', 'as {"bbox_2d": [x1, y1]}'),
        ('as {{"a": {answer}}}', 'as {"a": 7}'),
        ("{ answer }", "{ answer }"),
        ("{{answer}}", "{answer}"),
        ("{answer}{answer}", "77"),
        ("{a b.c}", "deep"),
        ("a { b", "a { b"),
    ],
)
def test_braces_in_templates(tmp_path, template, text):
    row = {"answer": 7, "a b": {"c": "deep"}}
    result = example(tmp_path, row, target="text", boxes="", prompt=template, suffix="x")
    assert result.prompt == text
    assert "there is no 1 (prompt of" in fault(
        tmp_path, row, prompt=r"\frac{1}{2}", target="text", boxes=""
    )
    assert "write {{1}} for braces" in fault(tmp_path, row, prompt="{1}", target="text", boxes="")


@pytest.mark.parametrize(
    "path",
    ["messages.1.content", "messages[1].content", "messages.-1.content", "a.b", "m.x.y", "k.7"],
)
def test_paths_reach_elements_of_lists_and_names_with_dots(tmp_path, path):
    row = {
        "messages": [{"content": "no"}, {"content": "red square"}],
        "a.b": "red square",
        "a": {"c": 1},
        "m": {"x.y": "red square"},
        "k": {"7": "red square"},
        "box": [10, 10, 40, 30],
    }
    assert example(tmp_path, row, phrase=path).suffix == BOX


def test_paths_that_lead_nowhere_name_the_nearest_field(tmp_path):
    row = {"messages": [{"content": "a"}], "bbox": [1, 1, 4, 4], "objects": [{"0": [1, 1, 4, 4]}]}
    assert "messages has 1 element" in fault(
        tmp_path, row, phrase="messages.7.content", boxes="bbox"
    )
    assert "did you mean bbox?" in fault(tmp_path, row, boxes="bbx")
    assert "did you mean phrase?" in fault(tmp_path, row, prompt="{phrse}", boxes="bbox")
    # Fields named by digits are fields, as before.
    assert len(example(tmp_path, row, boxes="objects.0").boxes.yxyx) == 1


@pytest.mark.parametrize(
    ("name", "replaced", "escaped"),
    [
        ("square; left", "square, left", "square； left"),
        ("sign <loc0012> here", "sign here", "sign ‹loc0012› here"),
        ("a;b;c", "a,b,c", "a；b；c"),
        ("<seg003>cat", "cat", "‹seg003›cat"),
        ("cat<eos>", "cat", "cat‹eos›"),
        ("<bos> cat", "cat", "‹bos› cat"),
        ("a <pad> cat", "a cat", "a ‹pad› cat"),
        ("<s>cat</s>", "cat", "‹s›cat‹/s›"),
    ],
)
def test_names_with_the_grammar_of_answers(tmp_path, name, replaced, escaped):
    row = {"box": [10, 10, 40, 30], "phrase": name}
    assert "set unsafe_names to replace or escape" in fault(tmp_path, row)
    for setting, expected in (("replace", replaced), ("escape", escaped)):
        question = example(tmp_path, row, unsafe_names=setting)
        assert (question.names, question.prompt) == ((expected,), f"detect {expected}")
    assert example(tmp_path, row, suffix="json").names == (name,), "JSON can hold every name"
    labels = row | {"label": ["ok"], "box": [[10, 10, 40, 30]]}
    assert example(tmp_path, labels, label="label").names == ("ok",)


INVISIBLE_NAMES = {
    "cat\u200b": "cat",
    "\ufeffred cat": "red cat",
    "ca\xadt": "cat",
    "\u202ecat\u202c": "cat",
    "\u2066cat\u2069 left": "cat left",
    "cat\x00": "cat",
    "\x07cat \x1b[0m": "cat [0m",
    "cat\x9b": "cat",
    "c\u200dat": "cat",
    "cat\ufe0f": "cat",
    "cat \u3164": "cat",
    "cat\U000e0041\U000e0042": "cat",
    "\u200fחתול": "חתול",
}
"""Names that look like other names."""

VISIBLE_NAMES = [
    "👩\u200d🚀",
    "می\u200cخواهم",
    "❤️",
    "🏴\U000e0067\U000e0062\U000e007f",
    "क्\u200dष",
    "1️⃣",
    "café",
]


@pytest.mark.parametrize("suffix", ["loc", "json"])
@pytest.mark.parametrize("name", INVISIBLE_NAMES, ids=ascii)
def test_a_name_with_a_character_that_nobody_sees_is_bad_or_cleaned(tmp_path, name, suffix):
    """From the phrase, from `label`, and from the keys of {label: boxes}."""
    box = [10, 10, 40, 30]
    for row, entry in (
        ({"box": box, "phrase": name}, {}),
        ({"box": box, "kind": name}, {"label": "kind"}),
        ({"box": [box, [5, 5, 20, 20]], "kind": ["dog", name]}, {"label": "kind"}),
        ({"box": {name: [box]}}, {}),
    ):
        text = fault(tmp_path, row, suffix=suffix, **entry)
        assert text.startswith("bad_text: the name ") and "set unsafe_names to replace" in text
        assert "the invisible character U+" in text and text.isprintable()
        for choice in ("replace", "escape"):
            names = example(tmp_path, row, suffix=suffix, unsafe_names=choice, **entry).names
            assert names[-1] == INVISIBLE_NAMES[name]


@pytest.mark.parametrize("name", VISIBLE_NAMES)
def test_joiners_of_scripts_and_emoji_stay(tmp_path, name):
    row = {"box": [10, 10, 40, 30], "phrase": name}
    assert example(tmp_path, row).names == (name,)
    assert example(tmp_path, row, unsafe_names="replace").names == (name,)


@pytest.mark.parametrize("suffix", ["loc", "json"])
@pytest.mark.parametrize("labels", [["<img>cat", "the dog"], "<img> cat", {"<img>cat": 0}])
def test_remove_holds_for_names_from_labels(tmp_path, labels, suffix):
    box = [10, 10, 40, 30]
    remove = r"<\w+>|^the "
    if isinstance(labels, dict):
        result = example(tmp_path, {"box": {"<img>cat": [box]}}, remove=remove, suffix=suffix)
    else:
        boxes = [box, [50, 10, 70, 30]] if isinstance(labels, list) else [box]
        row = {"box": boxes, "kind": labels}
        result = example(tmp_path, row, label="kind", remove=remove, suffix=suffix)
    assert result.names == (("cat", "dog") if isinstance(labels, list) else ("cat",))
    assert "img" not in result.suffix and "cat" in result.suffix


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ({"kind": "<img>"}, {"label": "kind"}),
        ({"kind": ["<img> <img>"]}, {"label": "kind"}),
        ({"noun": "<img>"}, {"name": "{noun}"}),
        ({"noun": "<img>"}, {"prompt": "{noun}"}),
        ({"noun": "<img>"}, {"suffix": "{noun}"}),
    ],
)
def test_a_text_of_which_remove_leaves_nothing_is_bad_text(tmp_path, row, entry):
    row = {"box": [[10, 10, 40, 30]]} | row
    text = fault(tmp_path, row, remove="<img>", **entry)
    assert text.startswith("bad_text: remove = '<img>' leaves nothing of '<img>")


@pytest.mark.parametrize(
    "name", ["<loc12>", "；", "a: b", "cat)", "<image>", "猫", "a <loc> b", "<b>"]
)
def test_other_signs_in_names_stay(tmp_path, name):
    row = {"box": [10, 10, 40, 30], "phrase": name}
    assert example(tmp_path, row).names == (name,)


def test_a_name_of_which_nothing_is_left_is_bad_text(tmp_path):
    row = {"box": [10, 10, 40, 30], "phrase": " ; <loc0001>"}
    assert fault(tmp_path, row, unsafe_names="replace").startswith("bad_text: nothing is left")


class RoughTokenizer(tokenizer.Tokenizer):
    """A tokenizer without Chinese characters, in which the ";" behind "merge" is no separator."""

    def text(self, text: str) -> list[int]:
        ids = self.pieces.Encode(re.sub("[\u4e00-\u9fff]", "_", text))
        return [i for i in ids if "merge" not in text or i not in self.vocab.separators]


def to_row(folder, row, tokens, **settings):
    part = opened(folder, [row], **settings)
    return to_batch_row(part[0], tokens, Data(max_boxes=8, prompt_length=64, suffix_length=64), 0)


def test_a_gold_answer_that_its_reader_reads_differently_is_a_bad_record(tmp_path):
    tokens = RoughTokenizer(*tokenizer.load())
    two = {"box": [[0, 0, 40, 20], [40, 20, 80, 40]]}
    to_row(tmp_path, two | {"names": ["猫", "a"]}, tokens, label="names")
    with pytest.raises(BadRecord, match="the names '猫' and '犬' are the same tokens"):
        to_row(tmp_path, two | {"names": ["猫", "犬"]}, tokens, label="names")
    with pytest.raises(BadRecord, match="is read back as 1 objects, not 2"):
        to_row(tmp_path, two | {"phrase": "merge"}, tokens)


def may_be_invisible(sign: str) -> bool:
    is_filler = sign in "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
    is_selector = "\ufe00" <= sign <= "\ufe0f" or "\U000e0000" <= sign <= "\U000e007f"
    return (
        unicodedata.category(sign) in ("Cc", "Cf") or is_filler or is_selector or sign == "\u2065"
    )


@settings(max_examples=200, deadline=None)
@given(name=text(min_size=1, max_size=12))
def test_every_other_name_is_read_back(name):
    """Law: a name is refused, or the answer in token ids is read back exactly."""
    record = {"image": PIXELS, "phrase": "x", "box": [[0, 0, 9, 9], [9, 9, 20, 20]], "n": name}
    source = Source(boxes="box", label="n")
    try:
        result = to_example(record, source, "a", 0, SIDE, None)
    except BadRecord as bad:
        assert bad.kind == "bad_text"
        assert not name.strip() or set(name) & {";", "<"} or any(map(may_be_invisible, name))
        return
    data = Data(max_boxes=8, prompt_length=64, suffix_length=256)
    to_batch_row(result, tokenizer.load(), data, 0)


def test_parts_of_prompts_can_be_removed(tmp_path):
    row = {"phrase": "<image>\nred square", "box": [10, 10, 40, 30]}
    result = example(tmp_path, row, remove=r"<image>\s*")
    assert (result.prompt, result.suffix) == ("detect red square", BOX)
    with pytest.raises(UserError, match=r"source a: remove='\('"):
        opened(tmp_path, [row], remove="(")


@pytest.mark.parametrize("form", ["boxes", "points"])
def test_a_count_is_the_number_of_objects_in_the_record(tmp_path, form):
    """Neither `max_objects` nor equal bins nor the room for boxes changes the number."""
    box, point = [10, 10, 40, 30], [10, 10]
    row = {"o": [box if form == "boxes" else point] * 40}
    settings = {"boxes": "", "target": form, "suffix": "count", "max_objects": 8} | {form: "o"}
    assert example(tmp_path, row, **settings).suffix == "40"
    settings.pop("max_objects")
    assert example(tmp_path, row, **settings).suffix == "40"
    labels = {"o": {"cat": [box] * 2, "dog": [box]}} if form == "boxes" else {"o": [point] * 3}
    assert example(tmp_path, labels, **settings).suffix == "3"
    assert example(tmp_path, {"o": None}, empty="keep", **settings).suffix == "0"


def test_no_error_quotes_a_long_value(tmp_path):
    """A data URI, a long caption or a list of 5,000 numbers is cut in every message."""
    long = "x" * 20_000
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"image": f"data:image/png;base64,{long}", "box": [1, 1, 9, 9]}, {}),
        ({"box": long}, {}),
        ({"box": list(range(5000))}, {}),
        ({"box": {long: 1}}, {}),
        ({"box": [1, 1, 9, 9], "phrase": {"a": long}}, {}),
        ({"box": [1, 1, 9, 9], "phrase": long + ";"}, {}),
        ({"box": [1, 1, 9, 9], "names": [long] * 9}, {"label": "names"}),
        ({"box": [1, 1, 9, 9], "image": long}, {}),
        ({f"key{i}": 1 for i in range(1000)}, {}),
        ({"box": [1, 1, 9, 9], "mask": {"counts": long}}, {"mask": "mask"}),
    ]
    data = Data(max_boxes=8, mask_size=16)
    for row, changes in rows:
        part = opened(tmp_path, [row], **changes)
        part = Examples("a", part.source, part._records, data, SIDE)
        with pytest.raises(BadRecord) as bad:
            part[0]
        assert len(str(bad.value)) < 480, str(bad.value)[:100]
    assert len(short(long)) < 120 and "20000 characters" in short(long)
    assert len(short([[long] * 99] * 99)) < 120
