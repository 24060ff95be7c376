"""Laws of `pg_ground.reporting.rollout_pictures`: each completion has the colour of its reward."""

import numpy as np
import pytest
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.reporting import drawing, rollout_pictures
from pg_ground.reporting.rollout_pictures import draw_rollout, reward_color, reward_scale
from pg_ground.types import BOXES, POINTS, TEXT, Answer, Batch, Boxes, Gold, Points, Rewards

THREE_BOXES = [[[[0.05, 0.05, 0.4, 0.4]], [[0.5, 0.5, 0.95, 0.95]], [[0.1, 0.6, 0.3, 0.9]]]]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def count(picture: Image.Image, color: tuple[int, int, int]) -> int:
    return int((pixels(picture) == color).all(-1).sum())


def rollout(rewards, gold=(0.2, 0.2, 0.8, 0.8), target=BOXES, sampled=None):
    """Returns one prompt with a completion for each reward.

    The completions are boxes equal to the ground truth, or points at its centre.
    """
    g = len(rewards)
    if sampled is None:
        sampled = np.tile(np.array(gold, np.float32), (1, g, 1, 1))
    boxes = np.array(sampled, np.float32)
    slot = np.zeros((1, g, 1), np.int32)
    is_point = np.full((1, g, 1), target == POINTS)
    answer = Answer(
        boxes=Boxes(boxes, slot, ~is_point),
        points=Points((boxes[..., :2] + boxes[..., 2:]) / 2, slot, is_point),
        masks=np.zeros((1, g, 1, 0, 0), bool),
        stray=np.zeros((1, g), np.int32),
        finished=np.ones((1, g), bool),
        grammatical=np.ones((1, g), bool),
        tokens=np.zeros((1, g, 1), np.int32),
        mask=np.ones((1, g, 1), bool),
    )
    return gold_batch(gold, target), answer, Rewards(np.array([rewards], np.float32), {})


def gold_batch(gold, target) -> Batch:
    """Returns a batch of one question whose ground truth is one box, and its centre."""
    box = np.array([[gold]], np.float32)
    label = np.zeros((1, 1), np.int32)
    valid = np.ones((1, 1), bool)
    annotation = Gold(
        boxes=Boxes(box, label, valid),
        points=Points((box[..., :2] + box[..., 2:]) / 2, label, valid & (target == POINTS)),
        target=np.array([target]),
        names=np.zeros((1, 1, 2), np.int32),
        masks=np.zeros((1, 1, 0, 0), bool),
    )
    empty = np.zeros((1, 1), np.int32)
    return Batch(
        image=np.zeros((1, 32, 32, 3), np.float32),
        prompt=empty,
        prompt_mask=empty > 0,
        suffix=empty,
        suffix_mask=empty > 0,
        gold=annotation,
        size=np.array([[200, 100]]),
        source=np.zeros(1, np.int32),
        index=np.zeros(1, np.int32),
    )


# colours


def test_reward_colours_get_brighter_and_end_at_viridis():
    brightness = [np.dot(reward_color(r), (0.299, 0.587, 0.114)) for r in np.linspace(0, 1, 33)]
    assert (np.diff(brightness) > 0).all(), "readable without colour vision"
    assert reward_color(0.0) == reward_color(-2.0) == rollout_pictures.VIRIDIS[0]
    assert reward_color(1.0) == reward_color(1.2) == rollout_pictures.VIRIDIS[-1]
    assert reward_color(float("nan")) == rollout_pictures.UNSCORED


ABOVE_1 = np.nextafter(np.float32(1), np.float32(2))
BELOW_0 = np.nextafter(np.float32(0), np.float32(-1))


@pytest.mark.parametrize(
    ("total", "scale"),
    [
        ([0.2, 0.8], (0.0, 1.0)),
        ([0.4, 0.4], (0.0, 1.0)),
        ([-0.3, 0.5], (-0.5, 1.0)),
        ([-0.5, 3.0], (-0.5, 3.0)),
        ([0.1, 2.2], (0.0, 2.5)),
        ([np.nan, np.inf, 1.4], (0.0, 1.5)),
        ([np.nan, np.nan], (0.0, 1.0)),
        ([ABOVE_1, BELOW_0], (0.0, 1.0)),
    ],
)
def test_the_scale_covers_all_rewards_and_is_never_narrower_than_0_to_1(total, scale):
    assert reward_scale(np.array([total], np.float32)) == scale


def test_rewards_beyond_0_and_1_differ_in_colour():
    batch, answer, rewards = rollout([-0.5, 1.2, 3.0], sampled=THREE_BOXES)
    picture = draw_rollout(batch, answer, rewards, 0, "detect cat", ["a", "b", "c"])
    colors = {reward_color(reward, (-0.5, 3.0)) for reward in (-0.5, 1.2, 3.0)}
    assert len(colors) == 3
    assert all(count(picture, color) > 100 for color in colors)
    legend = rollout_pictures.reward_legend(picture.width, (-0.5, 3.0))
    np.testing.assert_array_equal(pixels(picture)[-legend.height :], pixels(legend))
    usual_legend = rollout_pictures.reward_legend(picture.width)
    assert (pixels(legend) != pixels(usual_legend)).any(), "the legend has the ends of the scale"


@pytest.mark.parametrize("other_group", [[0.0, 3.0, 3.0], [-0.5, 0.0, 0.0]])
def test_equal_rewards_have_one_colour_on_the_scale_of_the_whole_batch(other_group):
    batch, answer, rewards = rollout([-0.5, 1.2, 3.0], sampled=THREE_BOXES)
    total = np.array([[1.0, 1.0, 1.0], other_group], np.float32)
    together = rewards._replace(total=total)
    picture = draw_rollout(batch, answer, together, 0, "detect cat", ["a", "b", "c"])
    image = pixels(picture)[: picture.width // 2]
    color = reward_color(1.0, reward_scale(total))
    shown = set(map(tuple, image.reshape(-1, 3).tolist()))
    assert shown == {(128, 128, 128), drawing.GOLD, drawing.HALO, color}


# panels


@pytest.mark.parametrize(("target", "gold", "lines"), [
    (BOXES, None, ["gold  <loc0205><loc0205><loc0818><loc0818>"]),
    (POINTS, None, ["gold  <loc0512><loc0512>"]),
    (TEXT, None, []),
    (TEXT, "<think>I see 8 cows.</think> <answer>8</answer>",
     ["gold  <think>I see 8 cows.</think> <answer>8</answer>"]),
    (BOXES, "<loc0205><loc0205><loc0818><loc0818> cat ; <loc0001><loc0001><loc0002><loc0002> dog",
     ["gold  <loc0205><loc0205><loc0818><loc0818> cat ; "
      "<loc0001><loc0001><loc0002><loc0002> dog"]),
    (BOXES, "", ["gold  nothing"]),
])  # fmt: skip
def test_the_caption_has_the_ground_truth_as_it_is_written(monkeypatch, target, gold, lines):
    captions = []
    monkeypatch.setattr(
        drawing,
        "_with_caption",
        lambda picture, paragraphs, width: captions.extend(paragraphs) or picture,
    )
    batch, answer, rewards = rollout([0.0, 1.0], target=target)
    draw_rollout(batch, answer, rewards, 0, "the prompt", ["a", "b"], gold=gold)
    assert captions == [
        "the prompt",
        *lines,
        "mean 0.50  of 2 completions, 2 different",
        "best 1.00  b",
        "worst 0.00  a",
    ]


def test_a_rollout_shows_ground_truth_and_each_completion_in_the_colour_of_its_reward():
    batch, answer, rewards = rollout([0.0, 1.0, float("nan")], sampled=THREE_BOXES)
    texts = ["a cat", "b cat", "c cat"]
    picture = draw_rollout(batch, answer, rewards, 0, "detect cat", texts)
    image = picture.crop((0, 0, picture.width, picture.width // 2))
    first, last = rollout_pictures.VIRIDIS[0], rollout_pictures.VIRIDIS[-1]
    for color in (drawing.GOLD, first, last, rollout_pictures.UNSCORED):
        assert count(image, color) > 100, color


@pytest.mark.parametrize("floats", [False, True])
def test_a_rollout_shows_the_image_of_the_pipeline(floats):
    """Compares each pixel beside the shapes, for images of bytes and for images in [-1, 1]."""
    side, scale = 32, 12
    batches = training_batches(
        {"a": Source(uri=f"synthetic:train?side={side}", boxes="box")},
        Data(prompt_length=8, suffix_length=8),
        tokenizer.load(),
        image_size=side,
        batch_size=1,
        seed=0,
        bad_records=BadRecords(),
    )
    drawn_batch, answer, rewards = rollout([0.0, 1.0])
    # All shapes, with their lines, lie between these pixels.
    low, high = round(0.2 * side * scale) - 8, round(0.8 * side * scale) + 8
    for _ in range(4):
        batch = next(batches)
        image = batch.image[0]
        assert image.dtype == np.uint8
        in_batch = batch.image.astype(np.float32) / 127.5 - 1 if floats else batch.image
        batch = batch._replace(gold=drawn_batch.gold, image=in_batch)
        texts = ["a", "b"]
        picture = draw_rollout(batch, answer, rewards, 0, "detect it", texts, scale_to=side * scale)
        shown = pixels(picture)[: side * scale]
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        bare = np.ones(shown.shape[:2], bool)
        bare[low:high, low:high] = False
        assert len(np.unique(enlarged[bare])) > 1
        np.testing.assert_array_equal(shown[bare], enlarged[bare])


def test_points_are_drawn_as_crosses():
    sampled = [[[[0, 0, 0.2, 0.2]], [[0.6, 0.6, 1, 1]]]]
    batch, answer, rewards = rollout([1.0, 1.0], target=POINTS, sampled=sampled)
    picture = draw_rollout(batch, answer, rewards, 0, "point cat", ["a", "b"])
    image = pixels(picture)[: picture.width // 2]
    rows, columns = np.nonzero((image == rollout_pictures.VIRIDIS[-1]).all(-1))
    assert {round(c / picture.width, 1) for c in (columns.min(), columns.max())} == {0.1, 0.8}
    assert rows.max() < picture.width // 2


def test_a_group_without_rewards_is_drawn_in_grey():
    batch, answer, rewards = rollout([float("nan")] * 2)
    picture = draw_rollout(batch, answer, rewards, 0, "detect cat", ["", "x"])
    assert count(picture, rollout_pictures.UNSCORED) > 100


def test_a_sheet_holds_every_panel_whole():
    colors = [(i * 40, 10, 200) for i in range(5)]
    panels = [Image.new("RGB", (30 + i, 50 - i), color) for i, color in enumerate(colors)]
    sheet = rollout_pictures.sheet(panels, columns=3)
    for panel, color in zip(panels, colors, strict=True):
        assert count(sheet, color) == panel.width * panel.height
