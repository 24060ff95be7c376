"""Boxes, points and masks stay on their object in every frame and at every size of the image.

Each image is drawn: one red rectangle on black, stored as a phone stores it. The box of the record
must mark the red pixels of the upright image.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.frames import AFTER, BEFORE, COPY, SIZE_FIELDS, UNDECIDED
from pg_ground.data.records import BadRecord
from pg_ground.data.source_check import SourceId, check_source
from pg_ground.data.text_budgets import Budget, measure_budget
from pg_ground.types import UserError

WIDTH, HEIGHT = 80, 60
"""The stored image."""

BOX = (48, 6, 72, 24)
"""The red rectangle in the stored image: x1, y1, x2, y2."""

DATA = Data(max_boxes=4, prompt_length=32, suffix_length=32, mask_size=64)


def save(path: Path, orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Writes the image with an EXIF orientation, resized to `size`."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x1, y1, x2, y2 = BOX
    pixels[y1:y2, x1:x2] = (255, 0, 0)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    image.save(path, exif=exif)


def open_row(folder: Path, row: dict[str, Any], **settings: Any) -> Examples:
    default = {
        "image": "i.png",
        "phrase": "bar",
        "box": list(BOX),
        "width": WIDTH,
        "height": HEIGHT,
    }
    (folder / "rows.jsonl").write_text(json.dumps(default | row), encoding="utf-8")
    settings = {"boxes": "box"} | settings
    source = Source(uri=f"jsonl:{folder}/rows.jsonl", **settings)
    return open_examples("a", source, DATA, 64)


def red_box(example: Any) -> np.ndarray:
    """Returns the yxyx fractions of the red pixels of the model's image."""
    red = example.image[..., 0] > 127
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / red.shape[0]


def check_on_red(example: Any) -> None:
    """The box, and the mask if there is one, covers the red pixels of the model's image."""
    np.testing.assert_allclose(example.boxes.yxyx[0], red_box(example), atol=0.03)
    if len(example.masks):
        red = example.image[..., 0] > 127
        union = (red | example.masks[0]).sum()
        assert (red & example.masks[0]).sum() / union > 0.9


@pytest.mark.parametrize("orientation", [0, 1, 5, 6, 7, 8])
def test_boxes_of_the_stored_frame_are_turned_with_the_image(tmp_path, orientation):
    """The recorded size fits only the stored frame if the turn exchanges the sides."""
    save(tmp_path / "i.png", orientation)
    x1, y1, x2, y2 = BOX
    rows = {
        "polygon": [x1, y1, x2, y1, x2, y2, x1, y2],
        "rle": None,
    }
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = 1
    run_lengths: Any = coco.encode(np.asfortranarray(mask))
    rows["rle"] = {"size": [HEIGHT, WIDTH], "counts": run_lengths["counts"].decode()}
    for field, value in rows.items():
        check_on_red(open_row(tmp_path, {field: value}, mask=field)[0])
    points = open_row(
        tmp_path, {"box": [(x1 + x2) / 2, (y1 + y2) / 2]}, boxes="", points="box", target="points"
    )[0]
    y1, x1, y2, x2 = red_box(points)
    np.testing.assert_allclose(points.points.yx[0], [(y1 + y2) / 2, (x1 + x2) / 2], atol=0.03)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_frame_can_be_stated(tmp_path, orientation):
    save(tmp_path / "i.png", orientation)
    stored = open_row(tmp_path, {}, frame="stored")
    check_on_red(stored[0])
    y1, x1, y2, x2 = red_box(stored[0])
    upright = Image.new("RGB", stored[0].size).size
    box = [x1 * upright[0], y1 * upright[1], x2 * upright[0], y2 * upright[1]]
    row = {"box": box, "width": upright[0], "height": upright[1]}
    for frame in ("auto", "upright"):
        check_on_red(open_row(tmp_path, row, frame=frame)[0])
    without_size = row | {"width": None, "height": None}
    check_on_red(open_row(tmp_path, without_size)[0])


@pytest.mark.parametrize("size", [(40, 30), (160, 120), (100, 75), (53, 40)])
def test_boxes_of_an_image_that_was_resized_are_scaled(tmp_path, size):
    save(tmp_path / "i.png", 1, size)
    example = open_row(tmp_path, {})[0]
    check_on_red(example)
    assert example.size == size and example.notes == ("another size than the file",)
    save(tmp_path / "i.png", 6, size)
    example = open_row(tmp_path, {})[0]
    check_on_red(example)
    assert example.notes == ("another size than the file; the frame before EXIF",)


RED = (48, 6, 72, 24)


def write_coco(folder: Path, orientations: list[int], square: int = -1, **image: Any) -> Source:
    """Writes one image for each orientation, with its boxes before EXIF. One image is square."""
    images, annotations = [], []
    for i, orientation in enumerate(orientations):
        size = (60, 60) if i == square else (WIDTH, HEIGHT)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        box = (36, 6, 54, 24) if i == square else RED
        pixels[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(folder / f"{i}.png", exif=exif)
        sides = {"width": size[0], "height": size[1]}
        images.append({"id": i, "file_name": f"{i}.png"} | sides | image)
        bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": bbox})
    categories = [{"id": 1, "name": "bar"}]
    text = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(text), encoding="utf-8")
    uri = f"coco:{folder}/coco.json?ask=category"
    return Source(uri=uri, phrase="category", boxes="boxes", box_format="xywh_px")


def measure(source: Source) -> Budget:
    return measure_budget(open_examples("a", source, DATA, 64), tokenizer.load(), DATA)


def test_images_that_may_be_before_exif_are_an_error_beside_images_that_are(tmp_path):
    source = write_coco(tmp_path, [6, 6, 3, 6, 8, 2], square=3)
    text = "3 images are before EXIF, as the size says, and no size says it of 3 others"
    with pytest.raises(UserError) as error:
        measure(source)
    assert (
        str(error.value) == f"source a: the boxes of {text}: frame = 'stored' reads all before EXIF"
    )
    check = check_source(SourceId("a", source, DATA, 64, 0), 1, lambda n: None)
    assert text in check.problems[0]
    stored = dataclasses.replace(source, frame="stored")
    assert measure(stored).doubts == []
    for example in map(open_examples("a", stored, DATA, 64).example, range(6)):
        check_on_red(example)


def test_an_image_after_exif_in_the_same_source_makes_it_a_doubt(tmp_path):
    source = write_coco(tmp_path, [6, 6, 3])
    coco_file = tmp_path / "coco.json"
    content = json.loads(coco_file.read_text())
    content["images"][1] |= {"width": HEIGHT, "height": WIDTH}
    content["annotations"][1]["bbox"] = [6, 6, 20, 20]
    coco_file.write_text(json.dumps(content))
    budget = measure(source)
    assert budget.notes == {AFTER: "1 of 3", BEFORE: "1 of 3", UNDECIDED: "1 of 3"}
    (doubt,) = budget.doubts
    assert "1 others, which are read after EXIF, as 1 are: frame = 'stored' reads all" in doubt
    check = check_source(SourceId("a", source, DATA, 64, 0), 1, lambda n: None)
    assert not check.problems and check.budget and check.budget.doubts == [doubt]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_record_without_a_size_says_how_it_is_read(tmp_path, orientation):
    row = {"box": [4, 4, 20, 20], "width": None}
    save(tmp_path / "i.png", orientation)
    assert open_row(tmp_path, row)[0].notes == (UNDECIDED,)
    assert "frame = 'stored'" in UNDECIDED
    for frame in ("upright", "stored"):
        assert open_row(tmp_path, row, frame=frame)[0].notes == ()
    save(tmp_path / "i.png", 1)
    assert open_row(tmp_path, row)[0].notes == ()


def test_boxes_beyond_an_image_that_exif_turns_name_the_frame(tmp_path):
    """Boxes that reach a little beyond the upright image of 60 x 80 pixels, or far beyond it."""
    source = write_coco(tmp_path, [6] * 9, width=None, height=None)
    with pytest.raises(UserError, match=r"9 of 9 objects .*before EXIF: set frame = 'stored'$"):
        measure(source)
    assert measure(dataclasses.replace(source, frame="stored")).doubts == []
    save(tmp_path / "i.png", 6)
    far = {"box": [4, 4, WIDTH * 1.17, 20], "width": None}
    for row in (far, far | {"box": [61, 4, 79, 20]}):
        with pytest.raises(BadRecord, match=r"before EXIF turns the image \(frame = 'stored'\)$"):
            open_row(tmp_path, row)[0]
    assert len(open_row(tmp_path, row, frame="stored")[0].boxes.yxyx) == 1


def test_percent_is_turned_and_needs_no_size(tmp_path):
    save(tmp_path / "i.png", 6)
    x1, y1, x2, y2 = BOX
    percent = [100 * x1 / WIDTH, 100 * y1 / HEIGHT, 100 * x2 / WIDTH, 100 * y2 / HEIGHT]
    check_on_red(open_row(tmp_path, {"box": percent}, box_format="xyxy_percent")[0])


@pytest.mark.parametrize(
    ("file_size", "row", "settings"),
    [
        ((64, 64), {}, {}),
        ((60, 80), {}, {}),
        ((80, 60), {"width": 81, "height": 70}, {}),
        ((80, 60), {"width": 60, "height": 80}, {}),
        ((80, 60), {"meta": {"w": 99, "h": 60}}, {"size": "meta.w,meta.h"}),
        ((80, 60), {"meta": [1, 2, 3]}, {"size": "meta"}),
        ((80, 60), {"meta": ["a", "b"]}, {"size": "meta"}),
    ],
)
def test_a_size_of_another_image_is_a_bad_record(tmp_path, file_size, row, settings):
    save(tmp_path / "i.png", 1, file_size)
    with pytest.raises(BadRecord) as bad:
        open_row(tmp_path, row, **settings)[0]
    assert bad.value.kind == "wrong_size"
    if not settings:
        assert f"{file_size[0]}x{file_size[1]}" in str(bad.value), "the image's size is named"
        assert "set size or frame of the source" in str(bad.value)


@pytest.mark.parametrize(
    "row",
    [
        {"width": None, "height": None},
        {"width": "80", "height": "60"},
        {"width": 80.0, "height": 60},
        {"width": 0, "height": 0},
        {"width": 999},
        {"height": None, "width": 7},
        {"width": 1.5, "height": 0.2},
        {"width": 10**400, "height": 60},
        {"width": 80, "height": -(10**400)},
    ],
)
def test_a_size_that_says_nothing_is_not_compared(tmp_path, row):
    save(tmp_path / "i.png", 1)
    row = row | ({"height": None} if row == {"width": 999} else {})
    check_on_red(open_row(tmp_path, row)[0])


@pytest.mark.parametrize("file_size", [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2)])
@pytest.mark.parametrize(
    ("row", "settings"),
    [
        *(({first: WIDTH, second: HEIGHT}, {}) for first, second in SIZE_FIELDS),
        ({"img_width": str(WIDTH), "img_height": float(HEIGHT)}, {}),
        ({"meta": {"width": WIDTH, "height": HEIGHT}}, {}),
        ({"size": {"width": WIDTH, "height": HEIGHT, "depth": 3}}, {}),
        ({"image": {"path": "i.png", "width": WIDTH, "height": HEIGHT}}, {}),
        ({"meta": {"width": 1, "height": 9, "box": list(BOX)}, "img_w": WIDTH, "img_h": HEIGHT},
         {"boxes": "meta.box"}),
    ],
)  # fmt: skip
def test_the_usual_fields_of_a_size_are_compared_with_the_image(tmp_path, file_size, row, settings):
    save(tmp_path / "i.png", 1, file_size)
    example = open_row(tmp_path, {"width": None, "height": None} | row, **settings)[0]
    check_on_red(example)
    assert example.notes == (() if file_size == (WIDTH, HEIGHT) else (COPY,))


@pytest.mark.parametrize("row", [{"w": 9, "h": 7}, {"meta": {"w": 9}}, {"meta": [1, 2]}])
def test_sides_that_may_be_those_of_a_box_are_no_size(tmp_path, row):
    save(tmp_path / "i.png", 1)
    check_on_red(open_row(tmp_path, {"width": None, "height": None} | row)[0])


def test_the_comparison_can_be_switched_off_and_texts_need_none(tmp_path):
    save(tmp_path / "i.png", 1)
    wrong = {"width": 999, "height": 10}
    check_on_red(open_row(tmp_path, wrong, size="")[0])
    assert open_row(tmp_path, wrong, target="text", boxes="", suffix="yes")[0].suffix == "yes"
    named = {"width": 999, "height": 10, "w": WIDTH, "h": HEIGHT}
    check_on_red(open_row(tmp_path, named, size="w,h")[0])
    check_on_red(open_row(tmp_path, wrong | {"wh": [WIDTH, HEIGHT]}, size="wh")[0])


def test_masks_for_the_benchmark_are_in_the_frame_of_the_image(tmp_path):
    save(tmp_path / "i.png", 6)
    x1, y1, x2, y2 = BOX
    opened = open_row(tmp_path, {"polygon": [x1, y1, x2, y1, x2, y2, x1, y2]}, mask="polygon")
    size = opened[0].size
    assert size == (HEIGHT, WIDTH)
    mask = opened.mask(0, size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / np.array(size[::-1] * 2)
    np.testing.assert_allclose(box, red_box(opened[0]), atol=0.03)
