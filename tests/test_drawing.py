"""Laws of `pg_ground.reporting.drawing`: a shape lies at its fractions and hides no other shape."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pg_ground.reporting import drawing

GREY = np.full((32, 32, 3), 120, np.uint8)
RED = (255, 0, 0)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def count(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((pixels(picture) == color).all(-1).sum())


# images


def test_to_uint8_covers_the_bytes_and_inverts_the_scale_of_the_model():
    exact = drawing.to_uint8(np.array([[[-1.0, 0.0, 1.0]]], np.float32))
    assert exact.tolist() == [[[0, 128, 255]]]
    clipped = drawing.to_uint8(np.array([[[-3.0, 1.0, 3.0]]], np.float32))
    assert clipped.tolist() == [[[0, 255, 255]]]
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(drawing.to_uint8(every.astype(np.float32) / 127.5 - 1), every)


def test_to_uint8_leaves_bytes_as_they_are():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(drawing.to_uint8(every), every)


def test_a_panel_has_the_aspect_of_the_original_image():
    assert drawing.panel(GREY, boxes=[], points=[], size=(400, 100), scale_to=320).size == (320, 80)
    assert drawing.panel(GREY, boxes=[], points=[], size=(100, 400), scale_to=320).size == (80, 320)
    assert drawing.panel(GREY, boxes=[], points=[], scale_to=64).size == (64, 64)


def test_small_drawings_keep_square_pixels_and_photographs_are_smooth():
    board = np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255, np.uint8)
    small = drawing.panel(board.astype(np.uint8), boxes=[], points=[])
    assert set(np.unique(pixels(small))) == {0, 255}
    large = np.kron(board, np.ones((25, 25, 1))).astype(np.uint8)
    assert len(np.unique(pixels(drawing.panel(large, boxes=[], points=[], scale_to=321)))) > 2


def test_a_png_and_its_address_restore_the_picture():
    picture = drawing.panel(GREY, boxes=[drawing.Shape((0.1, 0.1, 0.5, 0.5), RED)], points=[])
    head, _, data = drawing.data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == drawing.png_bytes(picture)
    restored = Image.open(io.BytesIO(drawing.png_bytes(picture)))
    np.testing.assert_array_equal(pixels(restored), pixels(picture))


def test_a_photograph_is_stored_as_jpeg_and_a_drawing_exactly():
    rng = np.random.default_rng(0)
    small = drawing.photo_uri(rng.integers(0, 255, (128, 128, 3)).astype(np.uint8))
    assert small.startswith("data:image/png;base64,")
    large = drawing.photo_uri(np.full((896, 896, 3), 200, np.uint8))
    assert large.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as picture:
        assert picture.size == (drawing.PHOTO_PX, drawing.PHOTO_PX)


# shapes


@pytest.mark.parametrize("size", [(400, 100), (90, 300), (64, 64)])
def test_the_edges_of_a_box_lie_at_their_fractions_of_the_original_image(size):
    y1, x1, y2, x2 = 0.25, 0.1, 0.75, 0.9
    box = drawing.Shape((y1, x1, y2, x2), RED)
    picture = drawing.panel(GREY, boxes=[box], points=[], size=size)
    rows, columns = np.nonzero((pixels(picture) == RED).all(-1))
    width, height = picture.size
    assert abs(columns.min() - x1 * width) <= 1
    assert abs(columns.max() - x2 * width) <= 1
    assert abs(rows.min() - y1 * height) <= 1
    assert abs(rows.max() - y2 * height) <= 1
    middle = pixels(picture)[height // 2, width // 2]
    assert middle.tolist() == [120, 120, 120], "a box is an outline"
    above = pixels(picture)[rows.min() - 1, width // 2]
    assert above.tolist() == [0, 0, 0], "the outline has a dark halo"


def test_a_point_is_a_cross_whose_centre_lies_at_its_fraction():
    point = drawing.Shape((0.75, 0.25), RED)
    picture = drawing.panel(GREY, boxes=[], points=[point], size=(200, 100))
    rows, columns = np.nonzero((pixels(picture) == RED).all(-1))
    # A line of two pixels lies half a pixel beside its position, which is rounded by up to half a
    # pixel.
    assert abs(columns.mean() - 0.25 * picture.width) <= 1
    assert abs(rows.mean() - 0.75 * picture.height) <= 1
    assert pixels(picture)[round(rows.mean()), columns.max() + 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "fractions", [(0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5), (0.9, 0.8, 0.1, 0.2), (1, 1, 1, 1)]
)
def test_every_box_that_tokens_can_express_is_drawn_inside_the_picture(fractions):
    box = drawing.Shape(fractions, RED, label="a long name")
    picture = drawing.panel(GREY, boxes=[box], points=[], scale_to=96)
    assert picture.size == (96, 96)
    assert count(picture, RED) > 0


@pytest.mark.parametrize(
    "fractions",
    [(0.02, 0.5, 0.08, 0.6), (0.5, 0.9, 0.58, 0.98), (0.94, 0.02, 1, 0.1), (0.3, 0.3, 0.34, 0.34)],
)
@pytest.mark.parametrize("has_point", [False, True])
def test_a_label_hides_neither_its_small_box_nor_its_point(fractions, has_point):
    y1, x1, y2, x2 = fractions

    def drawn(label):
        if not has_point:
            boxes, points = [drawing.Shape(fractions, RED, label)], []
        else:
            boxes = [drawing.Shape(fractions, drawing.GOLD)]
            points = [drawing.Shape(((y1 + y2) / 2, (x1 + x2) / 2), RED, label)]
        return pixels(drawing.panel(GREY, boxes=boxes, points=points))

    bare, labelled = drawn(""), drawn("a long name")
    shapes = (bare != 120).any(-1)
    np.testing.assert_array_equal(labelled[shapes], bare[shapes])
    assert (labelled != bare).any(), "the label is drawn"


def test_labels_do_not_hide_one_another():
    shapes = [
        drawing.Shape((0.5, 0.2 + 0.1 * i, 0.53, 0.22 + 0.1 * i), color, "name")
        for i, color in enumerate(drawing.LABEL_COLORS[:3])
    ]
    alone = [count(drawing.panel(GREY, boxes=[shape], points=[]), shape.color) for shape in shapes]
    together = drawing.panel(GREY, boxes=shapes, points=[])
    assert [count(together, shape.color) for shape in shapes] == alone


def test_an_answer_is_drawn_at_the_original_size_in_pixels_of_the_original_image():
    picture = drawing.draw_answer(
        GREY,
        (400, 200),
        [{"label": "cat", "xyxy_px": [100, 50, 300, 150]}],
        [{"label": "nose", "xy_px": [350, 30]}],
    )
    assert picture.size == (400, 200)
    image = pixels(picture)
    assert image[100, 100].tolist() == list(drawing.LABEL_COLORS[0])
    assert image[150, 200].tolist() == list(drawing.LABEL_COLORS[0])
    assert image[30, 350].tolist() == list(drawing.LABEL_COLORS[1])


# captions


def test_a_caption_stands_beneath_and_does_not_change_the_picture():
    plain = drawing.panel(GREY, boxes=[], points=[], size=(100, 100))
    caption = ["first", "second"]
    captioned = drawing.panel(GREY, boxes=[], points=[], size=(100, 100), caption=caption)
    assert captioned.width == plain.width
    assert captioned.height > plain.height
    np.testing.assert_array_equal(pixels(captioned)[: plain.height], pixels(plain))
    assert (pixels(captioned)[plain.height :] != drawing.PAPER).any(), "there is ink"


def test_a_long_caption_is_wrapped_within_the_panel_and_cut():
    words = drawing.panel(GREY, boxes=[], points=[], caption="<loc0001>" * 400, scale_to=200)
    strip = pixels(words)[200:]
    right_edge = strip[:, -drawing.PAD_PX // 2 :]
    assert (right_edge == drawing.PAPER).all(), "no letter crosses the right edge"
    assert strip.shape[0] <= drawing.LINE_PX * drawing.CAPTION_LINES + 2 * drawing.PAD_PX
    odd = drawing.panel(GREY, boxes=[], points=[], caption="x" * 5000 + "\n\0é漢", scale_to=200)
    assert odd.width == 200


@pytest.mark.parametrize("word", ["<loc0001>", "a word ", "x" * 31 + " ", "mm"])
def test_a_cut_caption_ends_in_an_ellipsis_within_its_width(word):
    font, width = drawing.font_of(drawing.TEXT_PX), 200
    for shift in range(12):
        lines = drawing._wrapped("i" * shift + word * 400, font, width)
        assert len(lines) == drawing.CAPTION_LINES
        assert lines[-1].endswith(" …")
        assert max(map(font.getlength, lines)) <= width
