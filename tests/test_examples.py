import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.datasets import open_examples
from pg_ground.data.examples import check_formats, loc_text, to_example
from pg_ground.data.images import load_image, resize
from pg_ground.data.record_fields import count_elements, field_at, fill_template, list_path
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records
from pg_ground.data.text_budgets import measure_budget
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import BOXES, POINTS, TEXT, Example, UserError
from pg_ground.vocab import EOS, NEWLINE, PAD

SHARED = Path(__file__).parents[2] / "shared"
needs_golden = pytest.mark.skipif(
    not (SHARED / "golden").exists(), reason="shared/golden is not here"
)
needs_data = pytest.mark.skipif(not (SHARED / "data").exists(), reason="shared/data is not here")

SOURCE = Source(uri="jsonl:x", boxes="box", points="", prompt="detect {phrase}", name="{phrase}")
BLANK = np.zeros((40, 80, 3), np.uint8)


def example(record: dict, image_size: int = 16, **settings) -> Example:
    record = {"image": BLANK, "phrase": "red circle"} | record
    return to_example(record, dataclasses.replace(SOURCE, **settings), "toy", 7, image_size, None)


def kind_and_text(record: dict, **settings) -> tuple[str, str]:
    with pytest.raises(BadRecord) as bad:
        example(record, **settings)
    return bad.value.kind, str(bad.value)


def test_an_example_has_its_source_its_prompt_and_its_answer():
    result = example({"box": [8, 10, 40, 20]})
    assert (result.size, result.source, result.index, result.target) == ((80, 40), "toy", 7, BOXES)
    assert result.image.shape == (16, 16, 3) and result.image.dtype == np.uint8
    assert (result.prompt, result.names) == ("detect red circle", ("red circle",))
    np.testing.assert_array_equal(result.boxes.yxyx, np.array([[0.25, 0.1, 0.5, 0.5]], np.float32))
    assert (
        result.boxes.valid.tolist() == [True]
        and result.boxes.label.tolist() == [0]
        and result.points.yx.shape == (0, 2)
    )
    assert result.suffix == "<loc0256><loc0102><loc0512><loc0512> red circle"


def test_all_box_formats_agree():
    whole = {"px": (80, 40), "frac": (1, 1), "percent": (100, 100), "bin": (1023, 1023)}
    x1, y1, x2, y2 = 0.125, 0.25, 0.5, 0.875
    orders = {
        "xyxy": lambda w, h: [x1 * w, y1 * h, x2 * w, y2 * h],
        "yxyx": lambda w, h: [y1 * h, x1 * w, y2 * h, x2 * w],
        "xywh": lambda w, h: [x1 * w, y1 * h, (x2 - x1) * w, (y2 - y1) * h],
        "cxcywh": lambda w, h: [(x1 + x2) / 2 * w, (y1 + y2) / 2 * h, (x2 - x1) * w, (y2 - y1) * h],
    }
    for order, written in orders.items():
        for unit, (w, h) in whole.items():
            result = example({"box": written(w, h)}, box_format=f"{order}_{unit}")
            np.testing.assert_allclose(
                result.boxes.yxyx, [[y1, x1, y2, x2]], atol=1e-7, err_msg=f"{order}_{unit}"
            )


def test_all_point_formats_agree():
    for unit, (w, h) in {
        "px": (80, 40),
        "frac": (1, 1),
        "percent": (100, 100),
        "bin": (1023, 1023),
    }.items():
        for order, point in {"xy": [0.25 * w, 0.75 * h], "yx": [0.75 * h, 0.25 * w]}.items():
            record = {"point": point}
            result = example(
                record, target="points", boxes="", points="point", point_format=f"{order}_{unit}"
            )
            np.testing.assert_allclose(result.points.yx, [[0.75, 0.25]], atol=1e-7)
            assert result.target == POINTS and result.suffix == "<loc0767><loc0256> red circle"


@pytest.mark.parametrize("setting", ["box_format", "point_format"])
def test_format_that_does_not_exist_is_refused_with_the_nearest(setting):
    check_formats(SOURCE, "toy")
    value = {"box_format": "xyxy_pixel", "point_format": "xy_pz"}[setting]
    nearest = {"box_format": "xyxy_px", "point_format": "xy_px"}[setting]
    with pytest.raises(UserError, match=f"toy: {setting}={value} does not exist.*{nearest}"):
        check_formats(dataclasses.replace(SOURCE, **{setting: value}), "toy")


def test_one_box_and_a_list_of_boxes_are_both_read():
    single, many = [0, 0, 40, 20], [[0, 0, 40, 20], [40, 20, 80, 40]]
    assert example({"box": single}).boxes.yxyx.tolist() == [[0, 0, 0.5, 0.5]]
    result = example({"box": many})
    assert result.boxes.yxyx.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    first, second = "<loc0000><loc0000><loc0512><loc0512>", "<loc0512><loc0512><loc1023><loc1023>"
    assert result.suffix == f"{first} red circle ; {second} red circle"
    assert (
        example({"box": many}, name="").suffix == f"{first} ; {second}"
        and example({"box": many}, name="").names == ()
    )


def test_points_may_have_the_boxes_of_their_objects():
    record = {"point": [[20, 10], [60, 30]], "box": [[0, 0, 40, 20], [40, 20, 80, 40]]}
    result = example(record, target="points", points="point")
    assert result.boxes.yxyx.shape == (2, 4) and result.points.yx.tolist() == [
        [0.25, 0.25],
        [0.75, 0.75],
    ]
    assert result.suffix == "<loc0256><loc0256> red circle ; <loc0767><loc0767> red circle"
    kind, text = kind_and_text(record | {"box": [0, 0, 40, 20]}, target="points", points="point")
    assert kind == "bad_box" and "1 boxes for 2 points" in text


def test_loc_codes_round_half_to_even_and_stay_on_the_grid():
    fractions = np.array([[0.5, 1.5, 2.5, 1022.5]]) / 1023
    assert loc_text(fractions, [""]) == "<loc0000><loc0002><loc0002><loc1022>"
    assert loc_text(np.array([[0.0, 1.0]]), "x") == "<loc0000><loc1023> x"
    codes = np.arange(1024)
    assert loc_text((codes / 1023).astype(np.float32)[None], [""]) == "".join(
        f"<loc{i:04d}>" for i in codes
    )


def test_boxes_are_clipped_to_the_image():
    np.testing.assert_array_equal(example({"box": [-10, -10, 90, 20]}).boxes.yxyx, [[0, 0, 0.5, 1]])


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 5, 20],
        [20, 5, 5, 20],
        [100, 5, 120, 20],
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
        [1, 2, 3],
        [None],
        [[]],
        "1,2,3",
        "no",
        [[0, 0, 5, 5], [1, 2]],
        [[[0, 0, 5]]],
        {"x": 1},
        [10, 10, 300, 30],
    ],
)
def test_unusable_box_is_a_bad_box(box):
    kind, text = kind_and_text({"box": box})
    assert kind == "bad_box" and "\n" not in text


@pytest.mark.parametrize(
    ("box", "message", "settings"),
    [
        (
            [[1, 2, 9, 9], [8, 7, 10.5, 7]],
            "[8, 7, 10.5, 7] (number 2 of 2) as xyxy_px has no area",
            {},
        ),
        (
            [84.25, 3, 95, 9],
            "[84.25, 3, 95, 9] as xyxy_px is outside an image of 80x40 pixels; "
            "it fits as xyxy_percent (box_format)",
            {},
        ),
        (
            [50, 3, -9, 9],
            "[50, 3, -9, 9] as xywh_percent has no area",
            {"box_format": "xywh_percent"},
        ),
        (
            [[1, 2, 9, 9], [1, 2, float("nan"), 9]],
            "[1, 2, nan, 9] (number 2 of 2) is not finite",
            {},
        ),
    ],
)
def test_a_bad_box_is_reported_in_the_numbers_of_the_record(box, message, settings):
    assert kind_and_text({"box": box}, **settings) == ("bad_box", message)
    assert kind_and_text({"box": np.array(box)}, **settings) == ("bad_box", message)


def test_a_bad_point_is_reported_in_the_numbers_of_the_record():
    kind, text = kind_and_text(
        {"point": [[5, 5], [7.5, 66]]}, target="points", boxes="", points="point"
    )
    assert (kind, text) == (
        "bad_point",
        "[7.5, 66] (number 2 of 2) as xy_px is outside an image of 80x40 pixels; "
        "it fits as yx_px (point_format)",
    )


@pytest.mark.parametrize(
    "point", [[90, 5], [5, -9], [float("nan"), 5], [1, 2, 3], [None], {"x": 1}, "5"]
)
def test_unusable_point_is_a_bad_point(point):
    assert (
        kind_and_text({"point": point}, target="points", boxes="", points="point")[0] == "bad_point"
    )


def test_point_on_the_far_border_is_kept():
    result = example({"point": [80.5, 40]}, target="points", boxes="", points="point")
    assert result.points.yx.tolist() == [[1, 1]]


def test_dotted_paths_reach_into_objects_and_through_lists():
    assert field_at({"objects": {"bbox": [1, 2]}}, "objects.bbox") == [1, 2]
    assert field_at({"objects": [{"bbox": [1]}, {"bbox": [2]}]}, "objects.bbox") == [[1], [2]]
    nested = {
        "objects": [{"bbox": [0, 0, 40, 20]}, {"bbox": [40, 20, 80, 40]}],
        "meta": {"text": "cat"},
    }
    result = example(nested, boxes="objects.bbox", phrase="meta.text")
    assert result.boxes.yxyx.shape == (2, 4) and result.prompt == "detect cat"


@pytest.mark.parametrize("path", ["bbox", "box.x", "phrase.text", "objects.bbox"])
def test_a_missing_field_is_named_with_the_fields_that_exist(path):
    """A record without the field of the boxes has no boxes. The text names the field even so."""
    kind, text = kind_and_text({"box": [0, 0, 4, 4], "objects": {"area": 3}}, boxes=path)
    assert kind == ("empty" if "bbox" in path else "missing_field") and path in text
    assert path != "bbox" or "image, phrase, box, objects" in text


def test_templates_are_filled_from_the_record_once_and_in_single_spaces():
    record = {"phrase": " a {b}\n cat ", "n": 3, "b": "dog", "meta": {"lang": "en"}}
    assert (
        fill_template("answer {meta.lang}  {phrase} x{n}{b}", record, "phrase")
        == "answer en a {b} cat x3dog"
    )
    assert (
        fill_template("", record, "phrase") == ""
        and fill_template("detect {phrase}", record, "b") == "detect dog"
    )


@pytest.mark.parametrize(
    "record, kind",
    [
        ({}, "missing_field"),
        ({"text": None}, "bad_text"),
        ({"text": ["a"]}, "bad_text"),
        ({"text": "  "}, "bad_text"),
    ],
)
def test_template_over_an_unusable_field_is_a_bad_record(record, kind):
    assert kind_and_text({"box": [0, 0, 4, 4]} | record, prompt="detect {text}")[0] == kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_on_the_upright_image(orientation):
    """For every EXIF orientation, the box is at the position that a viewer shows."""
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[10:20, 8:40] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    result = example({"image": file.getvalue(), "box": [8, 10, 40, 20]}, image_size=80)
    y1, x1, y2, x2 = (result.boxes.yxyx[0] * 80).round().astype(int)
    assert result.size == (80, 40)
    assert result.image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() == 255
    assert result.image.astype(int).sum() == pytest.approx(
        255 * 3 * (y2 - y1) * (x2 - x1), rel=0.01
    )


def test_an_image_of_the_right_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(example({"image": image, "box": [0, 0, 4, 4]}).image, image)


@needs_golden
@pytest.mark.parametrize("name", ["640x480", "97x61", "30x20_up", "427x640"])
@pytest.mark.parametrize("side", [42, 224])
def test_resizing_equals_pillow_and_stays_within_a_grey_level_of_tensorflow(name, side):
    golden = np.load(SHARED / "golden" / "preprocessing" / "images.npz")
    image = np.asarray(
        Image.open(SHARED / "golden" / "preprocessing" / f"{name}.png").convert("RGB")
    )
    resized = resize(image, side).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(resized, golden[f"{name}/{side}/pil_bilinear"], atol=1e-6)
    grey_levels = np.abs(resized - golden[f"{name}/{side}/notebook_antialias_float"]) * 127.5
    assert grey_levels.max() < 1.01 and grey_levels.mean() < 0.3


@needs_data
def test_photographs_convert_to_the_fractions_they_were_annotated_with():
    folder = SHARED / "data" / "refcoco"
    records = open_records(f"jsonl:{folder / 'triples.jsonl'}")
    assert len(records) == 644
    xyxy = dataclasses.replace(
        SOURCE, boxes="bbox_xyxy", phrase="expression", image_root=str(folder / "images")
    )
    xywh = dataclasses.replace(xyxy, boxes="bbox_xywh", box_format="xywh_px")
    for i in range(0, 644, 46):
        row = records[i]
        result = to_example(row, xyxy, "refcoco", i, 224, folder / "images")
        w, h = row["width"], row["height"]
        x1, y1, x2, y2 = row["bbox_xyxy"]
        assert (
            result.size == (w, h)
            and result.image.shape == (224, 224, 3)
            and result.names[0] in result.prompt
        )
        np.testing.assert_allclose(result.boxes.yxyx, [[y1 / h, x1 / w, y2 / h, x2 / w]], atol=1e-6)
        other = to_example(row, xywh, "refcoco", i, 224, folder / "images")
        np.testing.assert_allclose(other.boxes.yxyx, result.boxes.yxyx, atol=0.02 / min(w, h))


@needs_data
def test_points_in_percent_with_objects_for_coordinates_are_read_by_path():
    rows = [
        json.loads(line)
        for line in (SHARED / "data" / "gui" / "test.jsonl").read_text().splitlines()
    ]
    source = dataclasses.replace(
        SOURCE,
        target="points",
        image="image_filename",
        points="test_samples.point",
        boxes="test_samples.bbox",
        prompt="point to buttons",
        name="",
    )
    for i, row in enumerate(rows):
        result = to_example(row, source, "gui", i, 56, SHARED / "data" / "gui")
        assert result.size == (row["image_width"], row["image_height"])
        y, x = result.points.yx.T
        y1, x1, y2, x2 = result.boxes.yxyx.T
        assert (
            len(y) == row["sample_count"] and ((y1 <= y) & (y <= y2) & (x1 <= x) & (x <= x2)).all()
        )


def test_batch_row_has_the_shapes_and_types_of_a_batch_without_b():
    tokens = tokenizer.load()
    data = Data(prompt_length=10, suffix_length=16, max_boxes=3)
    row = to_batch_row(example({"box": [[0, 0, 40, 20], [40, 20, 80, 40]]}), tokens, data, 2)
    prompt, suffix = (
        tokens.prefix("detect red circle"),
        tokens.suffix(row_text := example({"box": [0, 0, 40, 20]}).suffix),
    )
    assert row.prompt.tolist() == prompt + [PAD] * (10 - len(prompt)) and NEWLINE in prompt
    assert row.prompt_mask.sum() == len(prompt) and row.prompt_mask[: len(prompt)].all()
    assert row.suffix[row.suffix_mask][-1] == EOS and (row.suffix[~row.suffix_mask] == PAD).all()
    assert row_text and row.suffix[:6].tolist() == suffix[:6]
    assert row.gold.boxes.valid.tolist() == [True, True, False] and row.gold.boxes.yxyx.shape == (
        3,
        4,
    )
    assert row.gold.points.yx.shape == (3, 2) and not row.gold.points.valid.any()
    assert row.gold.names.shape == (3, 16) and row.gold.target == BOXES
    name = tokens.text(" red circle")
    assert (
        row.gold.names[0].tolist() == name + [PAD] * (16 - len(name))
        and not row.gold.names[1:].any()
    )
    assert (row.size.tolist(), int(row.source), int(row.index)) == ([80, 40], 2, 7)
    assert row.image.dtype == np.uint8 and row.image.min() == row.image.max() == 0
    ints = (
        row.prompt,
        row.suffix,
        row.size,
        row.source,
        row.index,
        row.gold.target,
        row.gold.names,
        row.gold.boxes.label,
    )
    assert {x.dtype for x in ints} == {
        np.dtype(np.int32)
    } and row.gold.boxes.yxyx.dtype == np.float32


def test_image_of_a_batch_is_bytes():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    row = to_batch_row(example({"image": image, "box": [0, 0, 4, 4]}), tokenizer.load(), Data(), 0)
    np.testing.assert_array_equal(row.image, image)


def test_name_of_the_gold_answer_follows_its_loc_tokens_in_the_suffix():
    tokens = tokenizer.load()
    row = to_batch_row(
        example({"box": [0, 0, 40, 20], "phrase": "café 12"}), tokens, Data(suffix_length=24), 0
    )
    name = row.gold.names[0][row.gold.names[0] != PAD].tolist()
    assert row.suffix[row.suffix_mask].tolist()[4:-1] == name


@pytest.mark.parametrize(
    "data, kind, setting",
    [
        (Data(prompt_length=4), "too_long", "data.prompt_length is 4"),
        (Data(suffix_length=6), "too_long", "data.suffix_length is 6"),
        (Data(max_boxes=1, suffix_length=64), "too_many_boxes", "data.max_boxes is 1"),
    ],
)
def test_a_question_that_does_not_fit_names_the_setting_to_raise(data, kind, setting):
    result = example(
        {"box": [[0, 0, 40, 20], [0, 0, 40, 30]][: 2 if kind == "too_many_boxes" else 1]}
    )
    with pytest.raises(BadRecord, match=setting) as bad:
        to_batch_row(result, tokenizer.load(), data, 0)
    assert bad.value.kind == kind


# several objects


BOXES_OF = {
    "box": [[0, 0, 40, 20], [40, 20, 80, 40], [8, 8, 16, 16]],
    "label": ["cat", "dog", "cat"],
}
LOCS = [
    "".join(f"<loc{code:04d}>" for code in codes)
    for codes in ((0, 0, 512, 512), (512, 512, 1023, 1023), (205, 102, 409, 205))
]


def test_each_object_has_its_own_name():
    result = example(BOXES_OF, label="label", prompt="detect all classes")
    assert result.suffix == f"{LOCS[0]} cat ; {LOCS[1]} dog ; {LOCS[2]} cat"
    assert result.names == ("cat", "dog") and result.boxes.label.tolist() == [0, 1, 0]


def test_boxes_keyed_by_label_are_read_in_their_order():
    result = example(
        {"box": {"cat": [BOXES_OF["box"][0]], "bird": [], "dog": [BOXES_OF["box"][1]]}},
        prompt="find",
        name="",
    )
    assert result.suffix == f"{LOCS[0]} cat ; {LOCS[1]} dog" and result.names == ("cat", "dog")


@pytest.mark.parametrize(
    "labels", [["cat"], ["cat", "dog", None], ["cat", "", "dog"], 3.5, [["a"], ["b"], ["c"]]]
)
def test_labels_that_are_no_names_are_bad_text(labels):
    assert kind_and_text(BOXES_OF | {"label": labels}, label="label")[0] == "bad_text"


def test_objects_with_equal_names_and_bins_count_once():
    twice = {"box": [*BOXES_OF["box"], [0.01, 0, 40, 20]], "label": [*BOXES_OF["label"], "cat"]}
    assert example(twice, label="label").suffix == example(BOXES_OF, label="label").suffix
    other = twice | {"label": [*BOXES_OF["label"], "bird"]}
    assert len(example(other, label="label").boxes.yxyx) == 4


def test_max_objects_chooses_without_replacement_in_order_and_by_the_seed():
    points = {"points": [{"x": x, "y": 1} for x in range(40)]}
    entry = {
        "target": "points",
        "boxes": "",
        "points": "points",
        "point_format": "xy_px",
        "max_objects": 8,
    }

    def chosen(seed: int) -> list[int]:
        record = {"image": BLANK, "phrase": "cat"} | points
        result = to_example(
            record, dataclasses.replace(SOURCE, **entry), "toy", 7, 16, None, seed=seed
        )
        assert result.suffix.count(" ; ") == 7
        return np.rint(result.points.yx[:, 1] * 80).astype(int).tolist()

    assert chosen(0) == chosen(0) != chosen(1)
    for seed in range(20):
        assert len(set(chosen(seed))) == 8 and chosen(seed) == sorted(chosen(seed))


def test_points_are_pairs_or_have_x_and_y_and_lie_in_their_unit():
    entry = {"target": "points", "boxes": "", "points": "points", "point_format": "xy_percent"}
    pairs, named = (
        example({"points": points}, **entry)
        for points in ([[50, 25]], [{"x": 50, "y": 25, "z": 1}])
    )
    assert pairs.suffix == named.suffix == "<loc0256><loc0512> red circle"


def test_records_without_targets_are_dropped_or_kept_as_an_empty_answer():
    for entry in ({}, {"target": "points", "boxes": "", "points": "box"}):
        assert kind_and_text({"box": []}, **entry)[0] == "empty"
        result = example({"box": []}, empty="keep", **entry)
        assert (result.suffix, result.names, len(result.boxes.yxyx)) == ("", (), 0)
    assert kind_and_text({"box": {"a": []}})[0] == "empty"


# answers that are no loc tokens


def test_json_answers_are_in_pixels_of_the_original():
    result = example(BOXES_OF, label="label", suffix="json")
    assert json.loads(result.suffix) == [
        {"bbox_2d": [0, 0, 40, 20], "label": "cat"}, {"bbox_2d": [40, 20, 80, 40], "label": "dog"},
        {"bbox_2d": [8, 8, 16, 16], "label": "cat"},
    ]  # fmt: skip
    points = example(
        {"point": [40, 10]}, target="points", boxes="", points="point", suffix="json", name=""
    )
    assert (
        json.loads(points.suffix) == [{"point_2d": [40, 10]}]
        and points.target == TEXT == result.target
    )


def test_counts_and_texts():
    assert example(BOXES_OF, suffix="count", prompt="how many").suffix == "3"
    result = example(
        {"answer": 5},
        target="text",
        boxes="",
        suffix="{answer}",
        prompt="answer en how many {phrase}?",
    )
    assert (result.prompt, result.suffix, result.target) == (
        "answer en how many red circle?",
        "5",
        TEXT,
    )


# paths through lists, templates


SENTENCES = {"sentences": [{"raw": "left dog"}, {"raw": "brown one"}], "box": [0, 0, 40, 20]}


def test_a_path_goes_through_one_element_of_a_list():
    source = dataclasses.replace(SOURCE, phrase="sentences[].raw")
    assert list_path(source) == "sentences" and list_path(SOURCE) == ""
    assert count_elements(SENTENCES, "sentences") == 2
    record = {"image": BLANK} | SENTENCES
    result = [to_example(record, source, "toy", 7, 16, None, element=i) for i in (0, 1)]
    assert [m.prompt for m in result] == ["detect left dog", "detect brown one"]
    assert field_at({"a": {"b": [{"c": 1}, {"c": 2}]}}, "a.b[].c", 1) == 2
    with pytest.raises(BadRecord, match="which has no element 2"):
        field_at(SENTENCES, "sentences[].raw", 2)


def test_two_lists_at_once_are_refused():
    for entry in (
        {"phrase": "a[].b", "boxes": "c[].d"},
        {"phrase": "a[].b[].c"},
        {"prompt": "{a[].b} {c[].d}"},
    ):
        with pytest.raises(UserError, match=r"one list with \[\]"):
            list_path(dataclasses.replace(SOURCE, **entry))


def test_a_jinja_file_is_a_template_in_a_sandbox(tmp_path):
    def prompt(text: str, **record) -> str:
        path = tmp_path / f"{abs(hash(text))}.jinja"
        path.write_text(text)
        return example({"box": [0, 0, 4, 4]} | record, prompt=str(path), name="").prompt

    several = "detect {{ phrase|upper }}{% for n in names %} ; {{ n }}{% endfor %}"
    assert prompt(several, names=["a", "b"]) == "detect RED CIRCLE ; a ; b"
    for text, message in (
        ("{{ nothing }}", "'nothing' is undefined; the fields are image, phrase, box"),
        ("{{ phrase.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ):
        with pytest.raises(BadRecord, match=message):
            prompt(text)
    with pytest.raises(UserError, match="is not valid Jinja"):
        prompt("{% for %}")
    with pytest.raises(UserError, match=r"prompt template nowhere\.jinja: No such file"):
        example({"box": [0, 0, 4, 4]}, prompt="nowhere.jinja")


# resizing


@needs_golden
@pytest.mark.parametrize(("how", "reference"), [
    ("big_vision", "bv_resize"), ("antialias", "pil_bilinear"), ("hugging_face", "hf_pil_bicubic"),
])  # fmt: skip
def test_resizing_equals_its_reference(how, reference):
    """Pillow's modes are exact. float32 rounding moves big_vision's by at most one grey level."""
    folder = SHARED / "golden" / "preprocessing"
    images = np.load(folder / "images.npz")
    names = [name for name in images.files if name.endswith(f"/{reference}")]
    for name in names:
        photo, side, _ = name.split("/")
        resized = resize(load_image(f"{photo}.png", folder), int(side), how).astype(np.float32)
        expected = images[name] if images[name].min() >= 0 else (images[name] + 1) * 127.5
        off = np.abs(resized - expected)
        assert off.max() <= 1.001 and np.mean(off > 0.01) <= (5e-4 if how == "big_vision" else 0)
    assert len(names) == 8


# fuzz


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.sampled_from(["image", "sentences", "box", "labels", "points"]), VALUES, st.booleans())
def test_any_value_in_any_field_makes_an_example_or_a_bad_record(field, value, within):
    """No mutated record raises another exception, or gives coordinates outside the image."""
    boxes = [[0, 0, 4, 4], [2, 2, 9, 9]]
    record = {
        "image": BLANK,
        "sentences": [{"raw": "cat"}],
        "box": boxes,
        "labels": ["a", "b"],
        "points": [[1, 2], [3, 3]],
    }
    if within and isinstance(record[field], list):
        value = [*record[field][:1], value]
    source = dataclasses.replace(
        SOURCE,
        phrase="sentences[].raw",
        label="labels",
        target="points" if field == "points" else "boxes",
        points="points",
        empty="keep",
        max_objects=2,
    )
    try:
        result = to_example(record | {field: value}, source, "fuzz", 0, 8, None)
    except BadRecord as bad:
        assert bad.kind
        return
    assert (result.boxes.yxyx >= 0).all() and (result.boxes.yxyx <= 1).all() and result.prompt
    assert (result.boxes.yxyx[:, 2:] > result.boxes.yxyx[:, :2]).all() and result.suffix.count(
        "<loc"
    ) % 2 == 0


FLAT = {
    "no height": ([10, 20, 30, 20], [10, 20, 30, 21]),
    "no width": ([10, 20, 10, 30], [10, 20, 11, 30]),
    "a dot": ([10, 20, 10, 20], [10, 20, 11, 21]),
    "at the right border": ([80, 5, 80, 9], [79, 5, 80, 9]),
    "at the lower border": ([5, 40, 9, 40], [5, 39, 9, 40]),
}


@pytest.mark.parametrize(("flat", "widened"), FLAT.values(), ids=FLAT)
def test_a_box_without_an_area_is_bad_or_left_out_or_one_pixel_wide(flat, widened):
    proper = [1, 2, 30, 35]
    record = {"boxes": [proper, flat], "names": ["cat", "dog"]}
    fields = {"boxes": "boxes", "label": "names", "name": ""}
    kind, text = kind_and_text(record, **fields)
    assert kind == "bad_box" and "no area" in text
    wide = example(record, **fields, flat_boxes="widen")
    pixels = wide.boxes.yxyx[:, [1, 0, 3, 2]] * [80, 40, 80, 40]
    np.testing.assert_allclose(pixels, [proper, widened], atol=1e-4)
    assert wide.names == ("cat", "dog") and wide.suffix.count("<loc") == 8
    dropped = example(record, **fields, flat_boxes="drop")
    np.testing.assert_allclose(dropped.boxes.yxyx, wide.boxes.yxyx[:1])
    assert dropped.names == ("cat",) and dropped.suffix.count("<loc") == 4


@pytest.mark.parametrize("flat_boxes", ["widen", "drop"])
@pytest.mark.parametrize("box", [[30, 20, 10, 35], [90, 5, 90, 9], [-5, -5, -5, 3]])
def test_reversed_boxes_and_boxes_outside_stay_bad(box, flat_boxes):
    assert kind_and_text({"box": box}, flat_boxes=flat_boxes)[0] == "bad_box"


def test_a_record_of_flat_boxes_alone_is_empty():
    record = {"box": [10, 20, 30, 20]}
    assert kind_and_text(record, flat_boxes="drop") == (
        "empty",
        "none of 1 boxes has a width and a height",
    )
    assert example(record, flat_boxes="drop", empty="keep").suffix == ""


def test_points_and_boxes_stay_together_without_flat_boxes():
    record = {"boxes": [[1, 2, 9, 2], [10, 10, 20, 20]], "points": [[5, 2], [15, 15]]}
    fields = {"target": "points", "boxes": "boxes", "points": "points", "flat_boxes": "drop"}
    result = example(record, **fields)
    assert (len(result.points.yx), len(result.boxes.yxyx)) == (1, 1)
    np.testing.assert_allclose(result.points.yx, [[15 / 40, 15 / 80]], rtol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "phrase", "right"),
    [
        ("answer en how many {phrase} are there?", "How many are there?", "answer en {phrase}"),
        ("answer en how many {phrase}", "how many cows", "answer en {phrase}"),
        ("How many {phrase}?", "How many cows are there?", "{phrase}"),
        ("point to {phrase}", "Point to the cat", "{phrase}"),
        ("are there {phrase} in it?", "Is a cat here?", "{phrase}"),
    ],
)  # fmt: skip
def test_a_phrase_that_is_the_question_of_the_prompt_is_a_bad_text(prompt, phrase, right):
    kind, text = kind_and_text({"box": [1, 2, 30, 35], "phrase": phrase}, prompt=prompt)
    assert kind == "bad_text" and text.endswith(f"set prompt = {right!r}"), text


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("answer en how many {phrase} are there?", "cows"),
        ("answer en how many {phrase} are there?", "many small cows"),
        ("answer en {phrase}", "How many items are there?"),
        ("{phrase} Answer in one word.", "What is left?"),
        ("detect {phrase}", "detect"),
        ("{phrase}", "Where is it?"),
    ],
)
def test_other_phrases_are_no_nested_questions(prompt, phrase):
    result = example({"box": [1, 2, 30, 35], "phrase": phrase}, prompt=prompt)
    assert result.prompt == prompt.replace("{phrase}", phrase)


@pytest.mark.parametrize(
    ("settings", "value", "ending"),
    [
        ({"box_format": "xyxy_px"}, [84, 45, 95, 99], "; it fits as xyxy_percent, xyxy_permille"),
        (
            {"box_format": "xyxy_percent"},
            [101, 101, 400, 900],
            "xyxy_permille, xyxy_bin (box_format)",
        ),
        ({"box_format": "xyxy_frac"}, [2, 3, 40, 30], "; it fits as xyxy_px, xyxy_percent"),
        ({"box_format": "xyxy_px"}, [50, 5, 20, 30], "it fits as xywh_px (box_format)"),
        ({"box_format": "xyxy_px"}, [30, 60, 35, 70], "; it fits as yxyx_px (box_format)"),
        ({"box_format": "xyxy_px"}, [5, 5, 5, 20], "has no area"),
        ({"box_format": "xyxy_px"}, [5000, 5, 5010, 20], "an image of 80x40 pixels"),
        (
            {"target": "points", "point_format": "xy_px"},
            [7, 66],
            "; it fits as yx_px (point_format)",
        ),
        ({"target": "points", "point_format": "xy_frac"}, [40, 20], "xy_px, xy_percent"),
        ({"target": "points", "point_format": "xy_px"}, [900, 990], "xy_bin (point_format)"),
    ],
)
def test_a_box_or_a_point_outside_of_its_image_names_the_formats_that_fit(settings, value, ending):
    paths = {"points": "at", "boxes": ""} if "target" in settings else {"boxes": "at"}
    kind, text = kind_and_text({"at": value}, **settings, **paths)
    assert kind in ("bad_box", "bad_point") and ending in text and len(text) < 200
    assert text.endswith(ending) or ending.endswith(("permille", "percent"))


SETTINGS_OF_PATHS = {
    "image": ({"image": "img.url"}, "there is no img.url (image of the source): the fields are"),
    "boxes": ({"boxes": "bbox"}, "there is no bbox (boxes of the source): the fields are"),
    "label": ({"label": "label"}, "there is no label (label of the source): "),
    "phrase": ({"phrase": "phrases"}, "there is no phrases (phrase of the source): "),
    "prompt": ({"prompt": "find {noun}"}, "there is no noun (prompt of the source): "),
    "name": ({"name": "{noun}"}, "there is no noun (name of the source): "),
    "suffix": ({"suffix": "{answer}"}, "there is no answer (suffix of the source): "),
    "prompt and name": (
        {"prompt": "{noun}", "name": "{noun}"},
        "there is no noun (prompt and name of the source): ",
    ),
    "count": (
        {"suffix": "{count}"},
        "there is no count (suffix of the source): the fields are image, phrase, box; "
        "suffix = 'count' writes the number of objects",
    ),
    "list": ({"phrase": "names[].raw"}, "there is no names[].raw (phrase of the source): "),
    "points": (
        {"target": "points", "points": "x,y"},
        "there are no points: there is no x (points of the source): ",
    ),
}


@pytest.mark.parametrize("kind", SETTINGS_OF_PATHS)
def test_a_missing_field_is_named_with_the_setting_that_names_it(tmp_path, kind):
    """From a file to the error of the question and to the error before the first step."""
    settings, text = SETTINGS_OF_PATHS[kind]
    Image.new("RGB", (80, 40)).save(tmp_path / "i.png")
    record = {"image": "i.png", "phrase": "cat", "box": [8, 10, 40, 20]}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(record)] * 20))
    source = dataclasses.replace(SOURCE, uri=f"jsonl:{tmp_path}/a.jsonl", **settings)
    data = Data(suffix_length=32)
    opened = open_examples("a", source, data, 16)
    with pytest.raises(BadRecord) as bad:
        opened[3]
    assert text in str(bad.value) and bad.value.kind in ("missing_field", "empty")
    with pytest.raises(UserError) as refused:
        measure_budget(opened, load_tokenizer(), data)
    assert text in str(refused.value)
