"""What holds of every reward on token ids: the seeds' defects stay away, properties, a million random answers, and adversaries.

Defects carry their number in the register of `../shared/reference/seeds.md`; those of text and training are elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_rewards import (
    BOX,
    FAR,
    FOR_BOXES,
    FOR_POINTS,
    LENGTH,
    ONE_BOX,
    ONE_POINT,
    OTHER,
    SHAPING,
    TOKENS,
    TWO,
    gold_batch,
    judge,
    judge_jitted,
    loc,
    rollout,
)

from pg_ground import boxes
from pg_ground.config import DISTANCE_UNITS, RewardSettings
from pg_ground.data.examples import to_yxyx
from pg_ground.data.records import BadRecord
from pg_ground.rewards.device_rewards import REWARDS, read_answer
from pg_ground.types import BOXES, POINTS, TEXT, Batch
from pg_ground.vocab import EOS, LOC_MAX, LOC_TOKENS, PAD, UNK

DENSE = ("giou", "gaussian_point", "gaussian_coverage")
GAUSSIANS = ("gaussian_point", "gaussian_coverage")

# the seeds' defects


@pytest.mark.parametrize("reward", ["iou", "iou_squared", *DENSE, "detection", "label"])
def test_defect_01_all_classes_are_scored(reward):
    first_only, both = judge(
        reward, TWO, f"{loc(*BOX)} cat", f"{loc(*BOX)} cat ; {loc(*OTHER)} dog"
    )
    assert first_only < 0.7 and both > 0.999


@pytest.mark.parametrize("reward", DENSE)
def test_defect_02_boxes_of_little_overlap_still_get_a_signal(reward):
    y1, x1, y2, x2 = BOX
    lower = [f"{loc(y1 + by, x1, y2 + by, x2)} cat" for by in (250, 450)]
    assert max(judge("iou", ONE_BOX, *lower)) < 0.3
    near, far = judge(reward, ONE_BOX, *lower)
    assert near > far > 0


@pytest.mark.parametrize("reward", FOR_BOXES)
def test_defect_03_a_reversed_box_is_worth_nothing(reward):
    flat = f"{loc(300, 200, 300, 900)} cat"
    for text in (f"{loc(*BOX[2:], *BOX[:2])} cat", flat):
        assert judge(reward, ONE_BOX, text) == [1.0 if reward.startswith("count") else 0.0]


@pytest.mark.parametrize("side", [1 / LOC_MAX, 0.05, 0.1, 1.0, 100.0, 2000.0])
def test_defect_04_coverage_is_at_most_1_in_any_frame(side):
    for y, x in ((0.0, 0.0), (0.1, 0.3)):
        box = jnp.array([y, x, y + 1, x + 1]) * side
        np.testing.assert_allclose(boxes.gaussian_coverage(box, box, 0.5), 1, atol=5e-6)
        assert boxes.gaussian_coverage(box, box, 0.5) <= 1


def test_defect_06_nothing_is_rounded():
    found = judge(
        "gaussian_point", ONE_BOX, *(f"{loc(100 + d, 200, 500 + d, 900)} cat" for d in range(1, 6))
    )
    assert all(abs(value - round(value, 3)) > 1e-6 for value in found) and len(set(found)) == 5


@pytest.mark.parametrize(
    "text",
    [
        "< anything", "box_start", ">x<", "the dog", "", "cat", f"a {loc(*BOX)} cat", f"{loc(*BOX)} cat ;", f"{loc(*BOX)}",
        f"{loc(*BOX)} cat {loc(*BOX)}", f"{loc(*BOX[:3])} cat", f"; {loc(*BOX)} cat", f"{loc(*BOX)} cat ; and no more",
    ],
)  # fmt: skip
def test_defect_09_format_is_a_grammar_of_the_whole_answer(text):
    assert judge("format", ONE_BOX, text) == [0.0]
    assert judge("format", ONE_BOX, f"{loc(*BOX)} cat") == [1.0]


def test_defect_10_abstention_is_right_where_nothing_is_and_junk_is_not():
    nothing = gold_batch([])
    for reward in ("iou", "detection", "label", "count", "format"):
        assert judge(reward, nothing, "", f"{loc(*BOX)} cat") == [1.0, 0.0]


def test_defect_23_the_size_that_an_image_is_resized_to_does_not_matter():
    texts = [f"{loc(300 + d, 550 - d)} cat" for d in (0, 30, 90)]
    large, small = (
        judge("distance_gaussian", ONE_POINT._replace(size=ONE_POINT.size * k), *texts)
        for k in (3, 1)
    )
    np.testing.assert_allclose(large, small, rtol=1e-6)


@pytest.mark.parametrize(
    "reward", ["distance_gaussian", "gaussian_point", "point_in_box", "point_in_mask"]
)
def test_defect_24_more_points_are_not_the_best_of_them(reward):
    right, wrong = f"{loc(300, 550)} cat", f"{loc(900, 30)} cat"
    found = judge(
        reward,
        ONE_POINT,
        right,
        f"{right} ; {wrong}",
        f"{wrong} ; {right}",
        f"{right} ; {wrong} ; {wrong}",
    )
    np.testing.assert_allclose(found, [1, 2 / 3, 2 / 3, 1 / 2], atol=1e-5)


def test_defect_25_only_1024_codes_are_places():
    first = TOKENS.vocab.loc0
    ids = jnp.array([first, first + 1, first + LOC_MAX, first + LOC_TOKENS, first - 1])[None, None]
    names = jnp.full((1, 1, 2), PAD)
    found = read_answer(ids, jnp.ones(ids.shape, bool), jnp.array([BOXES]), names, TOKENS.vocab)
    assert found.stray.tolist() == [[3]] and not found.boxes.valid.any(), (
        "<seg000> follows <loc1023>"
    )
    for bad in (np.nan, np.inf):
        with pytest.raises(BadRecord, match="not finite"):
            to_yxyx([0, 0, bad, 1], "xyxy_px", (10, 10))


# properties

FRACTIONS = st.tuples(
    *[st.floats(0.02, 0.6), st.floats(0.02, 0.6), st.floats(0.02, 0.38), st.floats(0.02, 0.38)]
)
"""y, x, height and width of a proper box."""


def proper(y: float, x: float, height: float, width: float) -> jax.Array:
    return jnp.array([y, x, y + height, x + width])


BINS = st.tuples(*[st.integers(0, LOC_MAX)] * 4)
ANSWERS = st.lists(st.tuples(BINS, st.sampled_from(["cat", "dog", "cow"])), min_size=2, max_size=4)


@settings(deadline=None, max_examples=40)
@given(answers=ANSWERS, data=st.data())
def test_the_order_of_answers_does_not_matter(answers, data):
    shuffled = data.draw(st.permutations(answers))
    points = gold_batch(
        [(BOX, 0), (OTHER, 1)], [((300, 550), 0), ((800, 175), 1)], POINTS, ("cat", "dog")
    )
    for batch, width in ((TWO, 4), (points, 2)):
        texts = [
            " ; ".join(f"{loc(*bins[:width])} {name}" for bins, name in order)
            for order in (answers, shuffled)
        ]
        r = rollout(*texts, *[""] * 6)
        for name, value in judge_jitted(r, batch).items():
            if name != "repetition":  # of a text, not of a set
                np.testing.assert_allclose(
                    value[0, 1], value[0, 0], rtol=0, atol=1e-6, err_msg=name
                )


@settings(deadline=None)
@given(
    mine=FRACTIONS, gold=FRACTIONS, scale=st.tuples(st.floats(0.01, 3000), st.floats(0.01, 3000))
)
def test_gaussians_do_not_see_the_scale_of_an_axis(mine, gold, scale):
    """Gold sides of less than a bin are widened: it is the scale of proper boxes that does not matter."""
    mine, gold = proper(*mine), proper(*gold)
    factor = jnp.array(scale * 2) * 100
    for f in (
        lambda a, g: boxes.gaussian_point(boxes.centre(a), g, 0.5),
        lambda a, g: boxes.gaussian_coverage(a, g, 0.5),
    ):
        plain, scaled = f(mine, gold), f(mine * factor, gold * factor)
        assert 0 <= plain <= 1
        # exponents up to 88, beyond which it is 0, are known to a few 1e-6 of their size: sides are differences of fractions
        np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-6)


@settings(deadline=None)
@given(
    gold=FRACTIONS,
    angle=st.floats(0, 6.3),
    steps=st.lists(st.floats(0, 0.5), min_size=2, max_size=5),
)
def test_nearness_falls_with_distance(gold, angle, steps):
    gold = proper(*gold)
    away = jnp.sort(jnp.array(steps))[:, None] * jnp.array([np.sin(angle), np.cos(angle)])
    moved, at = gold + jnp.tile(away, 2), boxes.centre(gold) + away
    for values in (
        boxes.iou(moved, gold),
        boxes.gaussian_point(boxes.centre(moved), gold, 0.5),
        boxes.gaussian_coverage(moved, gold, 0.5),
        boxes.distance_gaussian(at, boxes.centre(gold), jnp.array([640, 480]), 100.0, 640.0),
        boxes.contains(gold, at).astype(jnp.float32),
    ):
        assert (jnp.diff(values) <= 1e-5).all()


# random tokens

RANGES = {name: (0, 1) for name in REWARDS} | {
    "detection": (-0.3, 1),
    "repetition": (-1, 0),
    "overlong": (-1, 0),
}
"""Of every reward's docstring."""

ROOM, AT_ONCE = 16, 512

QUESTIONS = {
    "one box": (ONE_BOX, FOR_BOXES),
    "two boxes": (TWO, FOR_BOXES),
    "no box": (gold_batch([]), FOR_BOXES),
    "one point": (ONE_POINT, FOR_POINTS),
    "two points": (
        gold_batch(
            [(BOX, 0), (OTHER, 1)], [((300, 550), 0), ((800, 175), 1)], POINTS, ("cat", "dog")
        ),
        FOR_POINTS,
    ),
    "no point": (gold_batch([], [], POINTS), FOR_POINTS),
    "points without boxes": (
        gold_batch([], [((300, 550), 0), ((0, 0), 0)], POINTS),
        tuple(
            name
            for name in FOR_POINTS
            if name not in ("gaussian_point", "point_in_box", "point_in_mask")
        ),
    ),
    "text": (gold_batch([], [], TEXT), ()),
}

OTHERS = {
    **{
        f"distance {unit}": ("distance_gaussian", {"distance_unit": unit})
        for unit in DISTANCE_UNITS
    },
    "detection as released": ("detection", {"detection_as_released": True}),
    "repetition of one": ("repetition", {"repetition_ngram": 1}),
    "overlong at 8": ("overlong", {"overlong_max_tokens": 8, "overlong_cache_tokens": 8}),
}
"""Rewards under other settings than the defaults."""


@jax.jit
def judge_ids(tokens: jax.Array, mask: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    answer = read_answer(tokens, mask, batch.gold.target, batch.gold.names, TOKENS.vocab)
    found = {name: reward(answer, batch, RewardSettings()) for name, reward in REWARDS.items()}
    return found | {
        name: REWARDS[reward](answer, batch, RewardSettings(**of))
        for name, (reward, of) in OTHERS.items()
    }


def random_ids(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequences of loc tokens for the most part, some bins more often than others, and what else a policy may sample."""
    vocab = TOKENS.vocab
    words = [
        *TOKENS.text(" cat"),
        *TOKENS.text(" dog"),
        *vocab.separators,
        *vocab.spaces,
        EOS,
        UNK,
        vocab.seg0,
        vocab.loc0 - 1,
    ]
    common = rng.choice([0, LOC_MAX, *BOX, *OTHER, 300, 550], shape)
    bins = np.where(rng.random(shape) < 0.5, common, rng.integers(0, LOC_TOKENS, shape))
    tokens = np.where(rng.random(shape) < 0.7, vocab.loc0 + bins, rng.choice(words, shape))
    ends = np.where(
        rng.random((*shape[:-1], 1)) < 0.3, rng.integers(0, shape[-1], (*shape[:-1], 1)), shape[-1]
    )
    tokens = np.where(np.arange(shape[-1]) == ends, EOS, tokens)
    mask = np.cumsum(tokens == EOS, axis=-1) - (tokens == EOS) == 0
    return np.where(mask, tokens, PAD).astype(np.int32), mask


def check_random_tokens(count: int) -> None:
    batch = jax.tree.map(
        lambda *rows: jnp.concatenate(rows), *(batch for batch, _ in QUESTIONS.values())
    )
    applies = {
        name: np.array([name in fit + SHAPING for _, fit in QUESTIONS.values()]) for name in REWARDS
    }
    applies |= {name: applies[reward] for name, (reward, _) in OTHERS.items()}
    applies["distance box"] = applies["distance box"] & applies["point_in_box"]
    rng = np.random.default_rng(0)
    for _ in range(-(-count // (len(QUESTIONS) * AT_ONCE))):
        tokens, mask = random_ids(rng, (len(QUESTIONS), AT_ONCE, ROOM))
        for name, found in judge_ids(tokens, mask, batch).items():
            found = np.asarray(found)
            low, high = RANGES[OTHERS[name][0] if name in OTHERS else name]
            np.testing.assert_array_equal(
                ~np.isnan(found), np.broadcast_to(applies[name][:, None], found.shape), err_msg=name
            )
            assert np.nanmin(found) >= low and np.nanmax(found) <= high, name


def test_a_hundred_thousand_random_answers_are_judged_within_range():
    check_random_tokens(100_000)


@pytest.mark.slow
def test_a_million_random_answers_are_judged_within_range():
    check_random_tokens(1_000_000)


# adversaries

FOR_BOX_QUESTIONS = (
    {"iou": 1.0, "format": 0.2},
    {"giou": 1.0, "format": 0.2},
    {"gaussian_point": 1.0, "gaussian_coverage": 1.0, "format": 1.0},
    {"iou_squared": 0.5, "format": 0.5},
    {"detection": 1.0, "format": 0.2},
)
FOR_POINT_QUESTIONS = (
    {"distance_gaussian": 0.8, "format": 0.2},
    {"point_in_box": 1.0, "format": 0.2},
    {"point_in_mask": 1.0, "format": 0.2},
    {"gaussian_point": 1.0, "format": 0.2},
)
RECIPES = [(recipe, BOXES) for recipe in FOR_BOX_QUESTIONS] + [
    (recipe, POINTS) for recipe in FOR_POINT_QUESTIONS
]

GOLDS = [(120, 560, 400, 880), (60, 620, 260, 980), (200, 700, 420, 860), (40, 540, 440, 760)]
"""Off the diagonal and out of the corners, of 4 to 10 % of the image."""


def shifted(gold: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Returns the box, moved to the left by a share of its width: IoU (1 - share) / (1 + share)."""
    by = round(share * (gold[3] - gold[1]))
    return gold[0], gold[1] - by, gold[2], gold[3] - by


def honest_and_adversaries(gold: tuple[int, ...], target: int) -> tuple[str, dict[str, str]]:
    """Returns a near miss (IoU 0.64; a point an eighth of the width off), and what tries to earn more without looking."""

    def listed(*places: tuple[int, ...]) -> str:
        return " ; ".join(f"{loc(*place)} cat" for place in places)

    y1, x1, y2, x2 = gold
    middle = ((y1 + y2) // 2, (x1 + x2) // 2)
    half, last = LOC_MAX // 2, LOC_MAX
    if target == POINTS:
        near = (middle[0], middle[1] - (x2 - x1) // 8)
        grid = [(y, x) for y in (256, 768) for x in (256, 640, 896)]
        return listed(near), {
            "empty": "", "corners": listed((0, 0), (0, last), (last, 0), (last, last)), "grid": listed(*grid),
            "middle of the image": listed((half, half)), "duplicates": listed(*[near] * 3), "swapped": listed(middle[::-1]),
            "a box": listed(gold), "words": "cat " * 20, "loc alone": loc(*middle),
        }  # fmt: skip
    near = shifted(gold, 0.22)
    quarters = [
        (0, 0, half, half),
        (0, half, half, last),
        (half, 0, last, half),
        (half, half, last, last),
    ]
    corners = [(0, 0, 99, 99), (0, 924, 99, last), (924, 0, last, 99), (924, 924, last, last)]
    return listed(near), {
        "empty": "", "whole image": listed((0, 0, last, last)), "quarters": listed(*quarters), "corners": listed(*corners),
        "three whole images": listed(*[(0, 0, last, last)] * 3), "duplicates": listed(*[near] * 3),
        "one duplicate": listed(near, near), "spam": listed(near, *quarters[2:], quarters[0]),
        "swapped": listed((x1, y1, x2, y2)), "reversed": listed((y2, x2, y1, x1)), "x first reversed": listed((x2, y2, x1, y1)),
        "dot at the middle": listed((*middle, *middle)), "a point": listed(middle), "far": listed(FAR), "words": "cat " * 20,
        "every loc": loc(*range(0, 960, 40)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "target"), RECIPES, ids=["+".join(recipe) for recipe, _ in RECIPES]
)
def test_no_adversary_earns_as_much_as_an_honest_near_miss(recipe, target):
    for gold in GOLDS:
        middle = ((gold[0] + gold[2]) // 2, (gold[1] + gold[3]) // 2)
        batch = gold_batch([(gold, 0)], [(middle, 0)] if target == POINTS else [], target)
        honest, adversaries = honest_and_adversaries(gold, target)
        texts = [honest, *adversaries.values()]
        parts = [np.array(judge(name, batch, *texts)) * weight for name, weight in recipe.items()]
        total = np.sum(parts, axis=0)
        assert not np.isnan(total).any()
        for name, earned in zip(adversaries, total[1:], strict=True):
            assert earned < total[0] - 0.02, (
                f"{name}: {earned} where the near miss earns {total[0]} of {gold}"
            )


def test_the_near_miss_is_one():
    for gold in GOLDS:
        assert (
            0.6
            < judge("iou", gold_batch([(gold, 0)]), honest_and_adversaries(gold, BOXES)[0])[0]
            < 0.7
        )
        assert (
            max(len(TOKENS.text(text)) for text in honest_and_adversaries(gold, BOXES)[1].values())
            < LENGTH
        )
