"""All forms of a mask give the same cells, and masks stay with their objects."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.examples import to_example
from pg_ground.data.masks import to_masks, whole_masks
from pg_ground.data.records import BadRecord
from pg_ground.types import Example

SIZE = (80, 48)
"""Width and height."""


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def runs(pixels: np.ndarray) -> dict:
    """Returns COCO's uncompressed run lengths."""
    flat = pixels.T.ravel().astype(int)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    lengths = np.diff(edges).tolist()
    return {"counts": [0, *lengths] if flat[0] else lengths, "size": list(pixels.shape)}


def block(y1: int, x1: int, y2: int, x2: int) -> np.ndarray:
    pixels = np.zeros(SIZE[::-1], bool)
    pixels[y1:y2, x1:x2] = True
    return pixels


TWO = block(0, 0, 24, 20), block(30, 40, 48, 80)


def cells(value, count: int = 1, side: int = 8) -> np.ndarray:
    return to_masks(value, count, SIZE, side, None)


def test_all_forms_of_a_mask_agree():
    pixels = TWO[1]
    polygon = [40, 30, 80, 30, 80, 48, 40, 48]
    grey = pixels.astype(np.uint8) * 255
    images = (png(grey), [png(grey)], {"bytes": png(grey)}, grey)
    for value in (polygon, [polygon], [[polygon]], runs(pixels), [runs(pixels)], *images):
        np.testing.assert_array_equal(cells(value)[0], cells(runs(pixels))[0])
    expected = np.zeros((8, 8), bool)
    expected[5:, 4:] = True  # rows of 6 px from 30, columns of 10 px from 40
    np.testing.assert_array_equal(cells(runs(pixels))[0], expected)


def test_a_mask_for_each_object_and_several_polygons_of_one():
    left, right = [0, 0, 20, 0, 20, 24, 0, 24], [40, 30, 80, 30, 80, 48, 40, 48]
    both = cells([left, right], count=2)
    assert both.shape == (2, 8, 8) and not (both[0] & both[1]).any()
    np.testing.assert_array_equal(cells([left, right], count=1)[0], both[0] | both[1])
    np.testing.assert_array_equal(cells([[left], [right]], count=2), both)
    np.testing.assert_array_equal(cells([runs(pixels) for pixels in TWO], count=2), both)
    np.testing.assert_array_equal(
        cells([png(pixels.astype(np.uint8)) for pixels in TWO], count=2), both
    )
    assert cells([], count=0).shape == (0, 8, 8)


def test_a_cell_is_set_if_half_of_it_is_covered():
    assert not cells(runs(block(0, 0, 48, 10) | block(0, 10, 48, 14)))[0, :, 1].any()
    assert cells(runs(block(0, 0, 48, 10) | block(0, 10, 48, 15)))[0, :, 1].all()


def test_an_object_that_covers_half_of_no_cell_has_the_cells_it_touches():
    grid = cells(runs(block(5, 9, 7, 11)))[0]
    assert grid[:2, :2].all() and grid.sum() == 4


def test_a_grid_finer_than_the_image_is_the_image():
    pixels = np.random.default_rng(0).random((6, 10)) < 0.5
    grid = to_masks(runs(pixels), 1, (10, 6), 30, None)[0]
    np.testing.assert_array_equal(grid, pixels.repeat(5, axis=0).repeat(3, axis=1))


def test_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(1, 50, 2)
        pixels = rng.random((height, width)) < rng.uniform(0.01, 1)
        pixels[0, 0] |= not pixels.any()
        packed = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
        for value in (packed, {**packed, "counts": packed["counts"].decode()}, runs(pixels)):
            grid = (
                to_masks(value, 1, (1, 1), int(height * width), None)[0]
                if height == width
                else None
            )
            if grid is not None:
                np.testing.assert_array_equal(
                    grid, pixels.repeat(width, axis=0).repeat(height, axis=1)
                )
            small = to_masks(value, 1, (1, 1), 5, None)
            np.testing.assert_array_equal(
                small, to_masks(pixels.astype(np.uint8), 1, (1, 1), 5, None)
            )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from NumPy 2, about pycocotools
def test_polygons_cover_the_pixels_of_pycocotools(golden):
    """COCO's samples are equal pixel by pixel. Drawn outlines would change a mask metric by 4 %."""
    path = (
        Path(golden).parent
        / "data"
        / "refcoco"
        / "annotations"
        / "emma_refcocog"
        / "instances.json"
    )
    whole = json.loads(path.read_text())
    images = {image["id"]: image for image in whole["images"]}
    for annotation in whole["annotations"][:100]:
        height, width = (images[annotation["image_id"]][key] for key in ("height", "width"))
        (mask,) = whole_masks(annotation["segmentation"], 1, (width, height), None)
        np.testing.assert_array_equal(
            mask,
            coco.decode(coco.merge(coco.frPyObjects(annotation["segmentation"], height, width))),
        )


@pytest.mark.parametrize(
    ("value", "count", "message"),
    [
        ([1, 2, 3, 4], 1, "three corners"),
        ([[1, 2, 3, 4, 5]], 1, "no polygon"),
        ([[1, 2, "x", 4, 5, 6]], 1, "no polygon"),
        ([[1, 2, float("nan"), 4, 5, 6]], 1, "no polygon"),
        ([-9, -9, -5, -9, -5, -5], 2, "1 masks for 2 objects"),
        ([runs(TWO[0])], 2, "1 masks for 2 objects"),
        ([], 1, "0 masks for 1 objects"),
        ({"counts": [5, 5], "size": [48, 80]}, 1, "runs of 10 pixels"),
        ({"counts": [-1, 48 * 80 + 1], "size": [48, 80]}, 1, "runs of 3840"),
        ({"counts": [2**62, 2**62, 2**62, 2**62, 48 * 80], "size": [48, 80]}, 1, "runs of 3840"),
        ({"counts": [[48 * 80]], "size": [48, 80]}, 1, "runs of 3840"),
        ({"counts": "zzzz", "size": [48, 80]}, 1, "not COCO's run lengths"),
        ({"counts": "", "size": [48, 80]}, 1, "not COCO's run lengths"),
        ({"counts": [1, "a"], "size": [48, 80]}, 1, "not COCO's run lengths"),
        ({"counts": [10**12], "size": [10**6, 10**6]}, 1, "not COCO's run lengths"),
        ({"counts": [48 * 80], "size": [48, 80]}, 1, "covers no pixel"),
        ({"counts": [1]}, 1, "not COCO's run lengths"),
        (b"no image", 1, "no image"),
        ("nowhere.png", 1, "no image"),
        (png(np.zeros((4, 4), np.uint8)), 1, "covers no pixel"),
        (None, 1, "no image"),
        (3.5, 1, "no image"),
    ],
)
def test_a_mask_that_cannot_be_read_is_a_bad_mask(value, count, message):
    with pytest.raises(BadRecord, match=message) as bad:
        cells(value, count)
    assert bad.value.kind == "bad_mask"


def test_compressed_runs_of_any_text_are_read_or_refused():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = bytes(rng.integers(0, 256, rng.integers(0, 30)).tolist())
        try:
            cells({"counts": text, "size": [48, 80]})
        except BadRecord as bad:
            assert bad.kind == "bad_mask"


NUMBERS = st.integers() | st.integers(-5, 90) | st.floats()
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.binary(max_size=5)
ANYTHING = st.recursive(
    PLAIN | st.lists(NUMBERS, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.fixed_dictionaries({"counts": inner, "size": inner | st.just([48, 80])})
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(value=ANYTHING, count=st.integers(0, 3))
def test_any_value_is_a_mask_or_a_bad_mask(value, count):
    try:
        assert cells(value, count).shape == (count, 8, 8)
    except BadRecord as bad:
        assert bad.kind == "bad_mask"


# masks of questions


def example(record: dict, mask_size: int = 8, **settings) -> Example:
    source = Source(
        **{"boxes": "boxes", "mask": "masks", "label": "names", "prompt": "detect", **settings}
    )
    record = {"image": np.zeros((*SIZE[::-1], 3), np.uint8), **record}
    return to_example(record, source, "toy", 0, 16, None, mask_size=mask_size)


RECORD = {
    "boxes": [[0, 0, 20, 24], [40, 30, 80, 48], [0, 0, 20, 24]],
    "masks": [runs(TWO[0]), runs(TWO[1]), runs(TWO[0])],
    "names": ["cat", "dog", "cat"],
}


def test_masks_stay_with_their_objects():
    result = example(RECORD)
    assert len(result.boxes.yxyx) == 2, "two are alike"
    np.testing.assert_array_equal(result.masks, cells(RECORD["masks"][:2], 2))
    single = example(RECORD, max_objects=1)
    at = 0 if single.names == ("cat",) else 1
    np.testing.assert_array_equal(single.masks, cells(RECORD["masks"][at]))


def test_masks_of_points_and_through_lists():
    record = {
        "objects": [{"at": [10, 10], "mask": runs(TWO[0])}, {"at": [60, 40], "mask": runs(TWO[1])}]
    }
    result = example(
        record,
        boxes="",
        points="objects.at",
        target="points",
        mask="objects.mask",
        label="",
        name="",
    )
    np.testing.assert_array_equal(result.masks, cells([runs(pixels) for pixels in TWO], 2))
    second = to_example(
        {"image": np.zeros((*SIZE[::-1], 3), np.uint8), **record},
        Source(
            points="objects[].at",
            target="points",
            mask="objects[].mask",
            name="",
            prompt="point",
        ),
        "toy",
        0,
        16,
        None,
        element=1,
        mask_size=8,
    )
    np.testing.assert_array_equal(second.masks, result.masks[1:])


def test_a_row_has_slots_for_the_masks_of_all_its_boxes():
    row = to_batch_row(
        example(RECORD), tokenizer.load(), Data(max_boxes=3, mask_size=8, suffix_length=32), 0
    )
    assert row.gold.masks.shape == (3, 8, 8) and row.gold.masks.dtype == bool
    assert row.gold.masks.any(axis=(1, 2)).tolist() == [True, True, False]


def test_without_a_size_no_mask_is_read():
    result = example({**RECORD, "masks": "nonsense"}, mask_size=0)
    assert result.masks.shape == (0, 0, 0)
    row = to_batch_row(result, tokenizer.load(), Data(max_boxes=3, suffix_length=32), 0)
    assert row.gold.masks.shape == (3, 0, 0)


def test_a_record_without_the_field_says_so():
    with pytest.raises(BadRecord, match="there is no masks") as bad:
        example({name: value for name, value in RECORD.items() if name != "masks"})
    assert bad.value.kind == "missing_field"
