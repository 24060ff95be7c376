"""Laws of `pg_ground.reporting.drawing`: what is drawn lies where the fractions say, in the colour that the reward says."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.reporting import drawing
from pg_ground.types import BOXES, POINTS, TEXT, Answer, Batch, Boxes, Gold, Points, Rewards

GREY = np.full((32, 32, 3), 120, np.uint8)
RED = (255, 0, 0)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def count(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((pixels(picture) == color).all(-1).sum())


def rollout(rewards, gold=(0.2, 0.2, 0.8, 0.8), target=BOXES, sampled=None):
    """One prompt with a sample for each reward: boxes that follow the gold, or points at its middle."""
    g = len(rewards)
    boxes = (
        np.tile(np.array(gold, np.float32), (1, g, 1, 1))
        if sampled is None
        else np.array(sampled, np.float32)
    )
    slot = np.zeros((1, g, 1), np.int32)
    as_points = np.full((1, g, 1), target == POINTS)
    answer = Answer(
        boxes=Boxes(boxes, slot, ~as_points),
        points=Points((boxes[..., :2] + boxes[..., 2:]) / 2, slot, as_points),
        masks=np.zeros((1, g, 1, 0, 0), bool),
        stray=np.zeros((1, g), np.int32),
        finished=np.ones((1, g), bool),
        grammatical=np.ones((1, g), bool),
        tokens=np.zeros((1, g, 1), np.int32),
        mask=np.ones((1, g, 1), bool),
    )
    at = np.array([[gold]], np.float32)
    one = np.ones((1, 1), bool)
    annotation = Gold(
        boxes=Boxes(at, np.zeros((1, 1), np.int32), one),
        points=Points(
            (at[..., :2] + at[..., 2:]) / 2, np.zeros((1, 1), np.int32), one & (target == POINTS)
        ),
        target=np.array([target]),
        names=np.zeros((1, 1, 2), np.int32),
        masks=np.zeros((1, 1, 0, 0), bool),
    )
    nothing = np.zeros((1, 1), np.int32)
    batch = Batch(
        image=np.zeros((1, 32, 32, 3), np.float32),
        prompt=nothing, prompt_mask=nothing > 0, suffix=nothing, suffix_mask=nothing > 0,
        gold=annotation, size=np.array([[200, 100]]), source=np.zeros(1, np.int32), index=np.zeros(1, np.int32),
    )  # fmt: skip
    return batch, answer, Rewards(np.array([rewards], np.float32), {})


def test_to_uint8_spans_the_bytes_and_undoes_the_model_scale():
    assert drawing.to_uint8(np.array([[[-1.0, 0.0, 1.0]]], np.float32)).tolist() == [
        [[0, 128, 255]]
    ]
    assert drawing.to_uint8(np.array([[[-3.0, 1.0, 3.0]]], np.float32)).tolist() == [
        [[0, 255, 255]]
    ]
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(drawing.to_uint8(every.astype(np.float32) / 127.5 - 1), every)


def test_to_uint8_leaves_bytes_as_they_are():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(drawing.to_uint8(every), every)


def test_panel_has_the_aspect_of_the_original():
    assert drawing.panel(GREY, boxes=[], points=[], size=(400, 100), scale_to=320).size == (320, 80)
    assert drawing.panel(GREY, boxes=[], points=[], size=(100, 400), scale_to=320).size == (80, 320)
    assert drawing.panel(GREY, boxes=[], points=[], scale_to=64).size == (64, 64)


@pytest.mark.parametrize("size", [(400, 100), (90, 300), (64, 64)])
def test_box_edges_lie_at_their_fractions_of_the_original(size):
    y1, x1, y2, x2 = 0.25, 0.1, 0.75, 0.9
    picture = drawing.panel(
        GREY, boxes=[drawing.Shape((y1, x1, y2, x2), RED)], points=[], size=size
    )
    rows, columns = np.nonzero((pixels(picture) == RED).all(-1))
    width, height = picture.size
    assert abs(columns.min() - x1 * width) <= 1 and abs(columns.max() - x2 * width) <= 1
    assert abs(rows.min() - y1 * height) <= 1 and abs(rows.max() - y2 * height) <= 1
    assert pixels(picture)[height // 2, width // 2].tolist() == [120, 120, 120], (
        "a box is an outline"
    )
    assert pixels(picture)[rows.min() - 1, width // 2].tolist() == [0, 0, 0], "with a dark halo"


def test_point_is_a_cross_centred_at_its_fraction():
    picture = drawing.panel(
        GREY, boxes=[], points=[drawing.Shape((0.75, 0.25), RED)], size=(200, 100)
    )
    rows, columns = np.nonzero((pixels(picture) == RED).all(-1))
    # A line of two pixels lies half a pixel beside its place, which is itself rounded by up to half a pixel.
    assert (
        abs(columns.mean() - 0.25 * picture.width) <= 1
        and abs(rows.mean() - 0.75 * picture.height) <= 1
    )
    assert pixels(picture)[round(rows.mean()), columns.max() + 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "at", [(0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5), (0.9, 0.8, 0.1, 0.2), (1, 1, 1, 1)]
)
def test_any_box_that_tokens_can_spell_is_drawn_inside_the_picture(at):
    picture = drawing.panel(
        GREY, boxes=[drawing.Shape(at, RED, label="a long name")], points=[], scale_to=96
    )
    assert picture.size == (96, 96) and count(picture, RED) > 0


@pytest.mark.parametrize(
    "at",
    [(0.02, 0.5, 0.08, 0.6), (0.5, 0.9, 0.58, 0.98), (0.94, 0.02, 1, 0.1), (0.3, 0.3, 0.34, 0.34)],
)
def test_a_label_hides_neither_its_small_box_nor_its_point(at):
    def drawn(label, *, inside):
        boxes = [drawing.Shape(at, drawing.GOLD if inside else RED, "" if inside else label)]
        points = (
            [drawing.Shape(((at[0] + at[2]) / 2, (at[1] + at[3]) / 2), RED, label)]
            if inside
            else []
        )
        return pixels(drawing.panel(GREY, boxes=boxes, points=points))

    for inside in (False, True):
        bare, labelled = drawn("", inside=inside), drawn("a long name", inside=inside)
        shapes = (bare != 120).any(-1)
        np.testing.assert_array_equal(labelled[shapes], bare[shapes])
        assert (labelled != bare).any(), "it is drawn"


def test_labels_do_not_hide_one_another():
    shapes = [
        drawing.Shape((0.5, 0.2 + 0.1 * i, 0.53, 0.22 + 0.1 * i), color, "name")
        for i, color in enumerate(drawing.LABEL_COLORS[:3])
    ]
    alone = [count(drawing.panel(GREY, boxes=[shape], points=[]), shape.color) for shape in shapes]
    together = drawing.panel(GREY, boxes=shapes, points=[])
    assert [count(together, shape.color) for shape in shapes] == alone


def test_small_drawings_keep_square_pixels_and_photographs_are_smooth():
    board = np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255, np.uint8)
    assert set(np.unique(pixels(drawing.panel(board.astype(np.uint8), boxes=[], points=[])))) == {
        0,
        255,
    }
    large = np.kron(board, np.ones((25, 25, 1))).astype(np.uint8)
    assert len(np.unique(pixels(drawing.panel(large, boxes=[], points=[], scale_to=321)))) > 2


def test_caption_stands_beneath_and_leaves_the_picture_alone():
    plain = drawing.panel(GREY, boxes=[], points=[], size=(100, 100))
    captioned = drawing.panel(
        GREY, boxes=[], points=[], size=(100, 100), caption=["first", "second"]
    )
    assert captioned.width == plain.width and captioned.height > plain.height
    np.testing.assert_array_equal(pixels(captioned)[: plain.height], pixels(plain))
    assert (pixels(captioned)[plain.height :] != drawing.PAPER).any(), "there is ink"


def test_long_caption_is_wrapped_within_the_panel_and_cut():
    words = drawing.panel(GREY, boxes=[], points=[], caption="<loc0001>" * 400, scale_to=200)
    strip = pixels(words)[200:]
    assert (strip[:, -drawing.PAD_PX // 2 :] == drawing.PAPER).all(), (
        "nothing runs over the right edge"
    )
    assert strip.shape[0] <= drawing.LINE_PX * drawing.CAPTION_LINES + 2 * drawing.PAD_PX
    assert (
        drawing.panel(GREY, boxes=[], points=[], caption="x" * 5000 + "\n\0é漢", scale_to=200).width
        == 200
    )


@pytest.mark.parametrize("word", ["<loc0001>", "a word ", "x" * 31 + " ", "mm"])
def test_a_cut_caption_ends_in_an_ellipsis_within_its_width(word):
    font, width = drawing._font(drawing.TEXT_PX), 200
    for shift in range(12):
        lines = drawing._wrapped("i" * shift + word * 400, font, width)
        assert len(lines) == drawing.CAPTION_LINES and lines[-1].endswith(" …")
        assert max(map(font.getlength, lines)) <= width


def test_reward_colours_get_brighter_and_end_at_viridis():
    brightness = [
        np.dot(drawing.reward_color(r), (0.299, 0.587, 0.114)) for r in np.linspace(0, 1, 33)
    ]
    assert (np.diff(brightness) > 0).all(), "readable without colour vision"
    assert drawing.reward_color(0.0) == drawing.reward_color(-2.0) == drawing.VIRIDIS[0]
    assert drawing.reward_color(1.0) == drawing.reward_color(1.2) == drawing.VIRIDIS[-1]
    assert drawing.reward_color(float("nan")) == drawing.UNJUDGED


def test_the_scale_of_rewards_reaches_as_far_as_they_do_and_is_never_narrower_than_0_to_1():
    for total, scale in (
        ([0.2, 0.8], (0.0, 1.0)),
        ([0.4, 0.4], (0.0, 1.0)),
        ([-0.3, 0.5], (-0.5, 1.0)),
        ([-0.5, 3.0], (-0.5, 3.0)),
        ([0.1, 2.2], (0.0, 2.5)),
        ([np.nan, np.inf, 1.4], (0.0, 1.5)),
        ([np.nan, np.nan], (0.0, 1.0)),
        (
            [
                np.nextafter(np.float32(1), np.float32(2)),
                np.nextafter(np.float32(0), np.float32(-1)),
            ],
            (0.0, 1.0),
        ),
    ):
        assert drawing.reward_scale(np.array([total], np.float32)) == scale, total


def test_rewards_beyond_0_and_1_differ_in_colour_and_equal_ones_do_not():
    sampled = [[[[0.05, 0.05, 0.4, 0.4]], [[0.5, 0.5, 0.95, 0.95]], [[0.1, 0.6, 0.3, 0.9]]]]
    batch, answer, rewards = rollout([-0.5, 1.2, 3.0], sampled=sampled)
    picture = drawing.draw_rollout(batch, answer, rewards, 0, "detect cat", ["a", "b", "c"])
    colors = {drawing.reward_color(reward, (-0.5, 3.0)) for reward in (-0.5, 1.2, 3.0)}
    assert len(colors) == 3 and all(count(picture, color) > 100 for color in colors)
    legend = drawing.reward_legend(picture.width, (-0.5, 3.0))
    np.testing.assert_array_equal(pixels(picture)[-legend.height :], pixels(legend))
    assert (pixels(legend) != pixels(drawing.reward_legend(picture.width))).any(), (
        "it says which rewards its ends are"
    )
    for others in (
        [0.0, 3.0, 3.0],
        [-0.5, 0.0, 0.0],
    ):  # another group of the batch, whose panel is beside this one
        together = rewards._replace(total=np.array([[1.0, 1.0, 1.0], others], np.float32))
        picture = drawing.draw_rollout(batch, answer, together, 0, "detect cat", ["a", "b", "c"])
        scale = drawing.reward_scale(together.total)
        seen = set(map(tuple, pixels(picture)[: picture.width // 2].reshape(-1, 3).tolist()))
        assert seen == {
            (128, 128, 128),
            drawing.GOLD,
            drawing.HALO,
            drawing.reward_color(1.0, scale),
        }


@pytest.mark.parametrize(("target", "gold", "said"), [
    (BOXES, None, ["gold  <loc0205><loc0205><loc0818><loc0818>"]),
    (POINTS, None, ["gold  <loc0512><loc0512>"]),
    (TEXT, None, []),
    (TEXT, "<think>I see 8 cows.</think> <answer>8</answer>", ["gold  <think>I see 8 cows.</think> <answer>8</answer>"]),
    (BOXES, "<loc0205><loc0205><loc0818><loc0818> cat ; <loc0001><loc0001><loc0002><loc0002> dog",
     ["gold  <loc0205><loc0205><loc0818><loc0818> cat ; <loc0001><loc0001><loc0002><loc0002> dog"]),
    (BOXES, "", ["gold  nothing"]),
])  # fmt: skip
def test_the_caption_says_gold_as_it_is_written(monkeypatch, target, gold, said):
    seen = []
    monkeypatch.setattr(
        drawing,
        "_with_caption",
        lambda picture, paragraphs, width: seen.extend(paragraphs) or picture,
    )
    drawing.draw_rollout(
        *rollout([0.0, 1.0], target=target), 0, "the prompt", ["a", "b"], gold=gold
    )
    assert seen == [
        "the prompt",
        *said,
        "mean 0.50  of 2 completions, 2 different",
        "best 1.00  b",
        "worst 0.00  a",
    ]


def test_rollout_shows_gold_and_each_sample_in_the_colour_of_its_reward():
    sampled = [[[[0.05, 0.05, 0.4, 0.4]], [[0.5, 0.5, 0.95, 0.95]], [[0.1, 0.6, 0.3, 0.9]]]]
    batch, answer, rewards = rollout([0.0, 1.0, float("nan")], sampled=sampled)
    picture = drawing.draw_rollout(
        batch, answer, rewards, 0, "detect cat", ["a cat", "b cat", "c cat"]
    )
    seen = picture.crop((0, 0, picture.width, picture.width // 2))
    for color in (drawing.GOLD, drawing.VIRIDIS[0], drawing.VIRIDIS[-1], drawing.UNJUDGED):
        assert count(seen, color) > 100, color


@pytest.mark.parametrize("floats", [False, True])
def test_rollout_shows_the_image_that_the_pipeline_gave(floats):
    """Wherever nothing is drawn on it, pixel by pixel: as bytes, which is what batches carry, and in [-1, 1]."""
    side, scale = 32, 12
    source, data = (
        Source(uri=f"synthetic:train?side={side}", boxes="box"),
        Data(prompt_length=8, suffix_length=8),
    )
    batches = training_batches(
        {"a": source},
        data,
        tokenizer.load(),
        image_size=side,
        batch_size=1,
        seed=0,
        bad_records=BadRecords(),
    )
    boxes, answer, rewards = rollout([0.0, 1.0])
    low, high = (
        round(0.2 * side * scale) - 8,
        round(0.8 * side * scale) + 8,
    )  # of all that is drawn, with its lines
    for _ in range(4):
        batch = next(batches)
        image = batch.image[0]
        assert image.dtype == np.uint8
        batch = batch._replace(
            gold=boxes.gold,
            image=batch.image.astype(np.float32) / 127.5 - 1 if floats else batch.image,
        )
        drawn = pixels(
            drawing.draw_rollout(
                batch, answer, rewards, 0, "detect it", ["a", "b"], scale_to=side * scale
            )
        )
        shown, given = drawn[: side * scale], image.repeat(scale, 0).repeat(scale, 1)
        bare = np.ones(shown.shape[:2], bool)
        bare[low:high, low:high] = False
        assert len(np.unique(given[bare])) > 1
        np.testing.assert_array_equal(shown[bare], given[bare])


def test_rollout_of_points_draws_crosses():
    batch, answer, rewards = rollout(
        [1.0, 1.0], target=POINTS, sampled=[[[[0, 0, 0.2, 0.2]], [[0.6, 0.6, 1, 1]]]]
    )
    picture = drawing.draw_rollout(batch, answer, rewards, 0, "point cat", ["a", "b"])
    rows, columns = np.nonzero(
        (pixels(picture)[: picture.width // 2] == drawing.VIRIDIS[-1]).all(-1)
    )
    assert {round(c / picture.width, 1) for c in (columns.min(), columns.max())} == {0.1, 0.8}
    assert rows.max() < picture.width // 2


def test_rollout_without_any_judged_completion_is_drawn():
    batch, answer, rewards = rollout([float("nan")] * 2)
    picture = drawing.draw_rollout(batch, answer, rewards, 0, "detect cat", ["", "x"])
    assert count(picture, drawing.UNJUDGED) > 100


def test_sheet_holds_every_panel_whole():
    colors = [(i * 40, 10, 200) for i in range(5)]
    panels = [Image.new("RGB", (30 + i, 50 - i), color) for i, color in enumerate(colors)]
    sheet = drawing.rollout_sheet(panels, columns=3)
    for one, color in zip(panels, colors, strict=True):
        assert count(sheet, color) == one.width * one.height


def test_answer_is_drawn_at_original_resolution_in_pixels_of_the_original():
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


def test_png_and_its_address_give_the_picture_back():
    picture = drawing.panel(GREY, boxes=[drawing.Shape((0.1, 0.1, 0.5, 0.5), RED)], points=[])
    head, _, data = drawing.data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == drawing.png_bytes(picture)
    np.testing.assert_array_equal(
        pixels(Image.open(io.BytesIO(drawing.png_bytes(picture)))), pixels(picture)
    )
