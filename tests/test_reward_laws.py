"""Laws of all rewards on token ids: known defects stay away, properties, random answers and
adversaries.

A test with a number in its name is about the defect of that number in the register of
`../shared/reference/seeds.md`. Defects of text rewards and of training have their tests in other
files.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completions import (
    BOX,
    FAR,
    FOR_BOXES,
    FOR_MASKS,
    FOR_POINTS,
    LENGTH,
    ONE_BOX,
    ONE_POINT,
    OTHER,
    SHAPING,
    TOKENS,
    TWO,
    TWO_POINTS,
    all_rewards,
    loc,
    make_batch,
    make_rollout,
    score_texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_ground import boxes
from pg_ground.config import RewardSettings
from pg_ground.data.examples import loc_text, to_yxyx
from pg_ground.data.records import BadRecord
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.rewards.device_rewards import REWARDS
from pg_ground.types import BOXES, POINTS, TEXT, Batch
from pg_ground.vocab import EOS, LOC_MAX, LOC_TOKENS, PAD, UNK

DENSE = ("giou", "gaussian_point", "gaussian_coverage")
GAUSSIANS = ("gaussian_point", "gaussian_coverage")

# the seeds' defects


@pytest.mark.parametrize("reward", ["iou", "iou_squared", *DENSE, "detection", "label"])
def test_defect_01_all_classes_are_scored(reward):
    first_only, both = score_texts(
        reward, TWO, f"{loc(*BOX)} cat", f"{loc(*BOX)} cat ; {loc(*OTHER)} dog"
    )
    assert first_only < 0.7 and both > 0.999


@pytest.mark.parametrize("reward", DENSE)
def test_defect_02_boxes_of_little_overlap_still_get_a_signal(reward):
    y1, x1, y2, x2 = BOX
    lower = [f"{loc(y1 + by, x1, y2 + by, x2)} cat" for by in (250, 450)]
    assert max(score_texts("iou", ONE_BOX, *lower)) < 0.3
    near, far = score_texts(reward, ONE_BOX, *lower)
    assert near > far > 0


@pytest.mark.parametrize("reward", FOR_BOXES)
def test_defect_03_a_reversed_box_is_worth_nothing(reward):
    flat = f"{loc(300, 200, 300, 900)} cat"
    for text in (f"{loc(*BOX[2:], *BOX[:2])} cat", flat):
        assert score_texts(reward, ONE_BOX, text) == [1.0 if reward.startswith("count") else 0.0]


@pytest.mark.parametrize("side", [1 / LOC_MAX, 0.05, 0.1, 1.0, 100.0, 2000.0])
def test_defect_04_coverage_is_at_most_1_in_any_frame(side):
    for y, x in ((0.0, 0.0), (0.1, 0.3)):
        box = jnp.array([y, x, y + 1, x + 1]) * side
        np.testing.assert_allclose(boxes.gaussian_coverage(box, box, 0.5), 1, atol=5e-6)
        assert boxes.gaussian_coverage(box, box, 0.5) <= 1


def test_defect_06_nothing_is_rounded():
    scores = score_texts(
        "gaussian_point", ONE_BOX, *(f"{loc(100 + d, 200, 500 + d, 900)} cat" for d in range(1, 6))
    )
    assert all(abs(value - round(value, 3)) > 1e-6 for value in scores) and len(set(scores)) == 5


@pytest.mark.parametrize(
    "text",
    [
        "< anything",
        "box_start",
        ">x<",
        "the dog",
        "",
        "cat",
        f"a {loc(*BOX)} cat",
        f"{loc(*BOX)} cat ;",
        f"{loc(*BOX)}",
        f"{loc(*BOX)} cat {loc(*BOX)}",
        f"{loc(*BOX[:3])} cat",
        f"; {loc(*BOX)} cat",
        f"{loc(*BOX)} cat ; and no more",
    ],
)
def test_defect_09_format_is_a_grammar_of_the_whole_answer(text):
    assert score_texts("format", ONE_BOX, text) == [0.0]
    assert score_texts("format", ONE_BOX, f"{loc(*BOX)} cat") == [1.0]


def test_defect_10_abstention_is_right_where_nothing_is_and_junk_is_not():
    nothing = make_batch([])
    for reward in ("iou", "detection", "label", "count", "format"):
        assert score_texts(reward, nothing, "", f"{loc(*BOX)} cat") == [1.0, 0.0]


def test_defect_23_the_size_that_an_image_is_resized_to_does_not_matter():
    texts = [f"{loc(300 + d, 550 - d)} cat" for d in (0, 30, 90)]
    large, small = (
        score_texts("distance_gaussian", ONE_POINT._replace(size=ONE_POINT.size * k), *texts)
        for k in (3, 1)
    )
    np.testing.assert_allclose(large, small, rtol=1e-6)


@pytest.mark.parametrize(
    "reward", ["distance_gaussian", "gaussian_point", "point_in_box", "point_in_mask"]
)
def test_defect_24_more_points_are_not_the_best_of_them(reward):
    right, wrong = f"{loc(300, 550)} cat", f"{loc(900, 30)} cat"
    scores = score_texts(
        reward,
        ONE_POINT,
        right,
        f"{right} ; {wrong}",
        f"{wrong} ; {right}",
        f"{right} ; {wrong} ; {wrong}",
    )
    np.testing.assert_allclose(scores, [1, 2 / 3, 2 / 3, 1 / 2], atol=1e-5)


def test_defect_25_only_1024_codes_are_places():
    first = TOKENS.vocab.loc0
    ids = jnp.array([first, first + 1, first + LOC_MAX, first + LOC_TOKENS, first - 1])[None, None]
    names = jnp.full((1, 1, 2), PAD)
    answer = read_answer(ids, jnp.ones(ids.shape, bool), jnp.array([BOXES]), names, TOKENS.vocab)
    assert answer.stray.tolist() == [[3]] and not answer.boxes.valid.any(), (
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
    for batch, width in ((TWO, 4), (TWO_POINTS, 2)):
        texts = [
            " ; ".join(f"{loc(*bins[:width])} {name}" for bins, name in order)
            for order in (answers, shuffled)
        ]
        r = make_rollout(*texts, *[""] * 6)
        for name, value in all_rewards(r, batch).items():
            if name != "repetition":  # of a text, not of a set
                np.testing.assert_allclose(
                    value[0, 1], value[0, 0], rtol=0, atol=1e-6, err_msg=name
                )


ANYWHERE = st.floats(0, LOC_MAX) | st.integers(0, 2 * LOC_MAX).map(lambda number: number / 2)
"""In loc bins; whole and half ones among them, where rounding has ties."""

LENGTHS = st.floats(1e-3, 1) | st.floats(1, 4) | st.floats(1e-3, LOC_MAX)

SIDE = st.tuples(ANYWHERE, LENGTHS).map(
    lambda span: (min(span[0], LOC_MAX - span[1]), min(span[0] + span[1], LOC_MAX))
)
"""The two ends of a side of a box, in loc bins."""


def neighbours(bins: Sequence[int]) -> list[list[int]]:
    """Returns `bins` with each of them moved by one bin, and moved far outwards."""
    steps = [*np.eye(len(bins), dtype=int), *-np.eye(len(bins), dtype=int)]
    outwards = [-1, -1, 1, 1][: len(bins)]
    moved = [np.add(bins, step) for step in (*steps, outwards, np.multiply(outwards, 9))]
    return [np.clip(row, 0, LOC_MAX).tolist() for row in moved]


def scores_of(texts: Sequence[str], batch: Batch) -> dict[str, np.ndarray]:
    """Returns each reward of each text. The first of each group of 8 is the first text."""
    rows: dict[str, list[float]] = {}
    for start in range(1, len(texts), 7):
        chunk = [texts[0], *texts[start : start + 7]]
        filled = make_rollout(*chunk, *[""] * (8 - len(chunk)))
        for name, values in all_rewards(filled, batch).items():
            rows.setdefault(name, []).extend(np.asarray(values)[0, : len(chunk)].tolist())
    return {name: np.array(values) for name, values in rows.items()}


@settings(deadline=None, max_examples=80)
@given(sides=st.tuples(SIDE, SIDE), other=BINS)
def test_no_answer_beats_the_gold_answer_of_a_box(sides, other):
    """Boxes of any size, also below one bin. The answer that training data would have is compared
    with its neighbours, the whole image, the box rounded outwards, and any other box."""
    (y1, y2), (x1, x2) = sides
    gold = (y1, x1, y2, x2)
    text = loc_text((np.array([gold]) / LOC_MAX).astype(np.float32), ["cat"])
    bins = [int(number) for number in re.findall(r"\d+", text)]
    outwards = [*np.floor(gold[:2]).astype(int), *np.ceil(gold[2:]).astype(int)]
    answers = [*neighbours(bins), outwards, [0, 0, LOC_MAX, LOC_MAX], other]
    # float32 rounds a coordinate by 6e-8. A side has two of them, and an area or a quotient adds up
    # eight sides. Coverage has four roundings of a logarithm near 5.
    bound = 4e-6 + 16 * 6e-8 * LOC_MAX / min(bins[2] - bins[0], bins[3] - bins[1])
    texts = [text, *(f"{loc(*answer)} cat" for answer in answers)]
    scores = scores_of(texts, make_batch([(gold, 0)]))
    for name in set(FOR_BOXES):
        assert scores[name][0] == pytest.approx(1, abs=bound), name
        assert (scores[name] <= scores[name][0] + bound).all(), (name, texts)


@settings(deadline=None, max_examples=40)
@given(
    sides=st.tuples(SIDE, SIDE),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    other=st.tuples(*[st.integers(0, LOC_MAX)] * 2),
)
def test_no_answer_beats_the_gold_answer_of_a_point(sides, share, other):
    """A point anywhere in its box, whose mask is the one cell of the point. `gaussian_point` is
    about the centre of the box, not about the point."""
    (y1, y2), (x1, x2) = sides
    point = np.clip([y1 + share[0] * (y2 - y1), x1 + share[1] * (x2 - x1)], (y1, x1), (y2, x2))
    yx = (np.array([point]) / LOC_MAX).astype(np.float32)
    text = loc_text(yx, ["cat"])
    bins = [int(number) for number in re.findall(r"\d+", text)]
    batch = make_batch([((y1, x1, y2, x2), 0)], [(point, 0)], POINTS)
    cells = np.zeros((1, 3, 32, 32), bool)
    cells[0, 0][tuple(np.minimum((yx[0] * 32).astype(int), 31))] = True
    batch = batch._replace(gold=batch.gold._replace(masks=jnp.asarray(cells)))
    texts = [text, *(f"{loc(*answer)} cat" for answer in (*neighbours(bins), other))]
    scores = scores_of(texts, batch)
    for name in set(FOR_POINTS) - {"gaussian_point"}:
        assert scores[name][0] == pytest.approx(1, abs=4e-6), name
        assert (scores[name] <= scores[name][0] + 4e-6).all(), (name, texts)


@settings(deadline=None)
@given(
    predicted=FRACTIONS,
    gold=FRACTIONS,
    scale=st.tuples(st.floats(0.01, 3000), st.floats(0.01, 3000)),
)
def test_gaussians_do_not_see_the_scale_of_an_axis(predicted, gold, scale):
    """Gold sides of less than a bin are widened: it is the scale of proper boxes that does not
    matter.
    """
    predicted, gold = proper(*predicted), proper(*gold)
    factor = jnp.array(scale * 2) * 100
    for f in (
        lambda a, g: boxes.gaussian_point(boxes.centre(a), g, 0.5),
        lambda a, g: boxes.gaussian_coverage(a, g, 0.5),
    ):
        plain, scaled = f(predicted, gold), f(predicted * factor, gold * factor)
        assert 0 <= plain <= 1
        # float32 has exponents up to 88 (beyond, the value is 0) to a few 1e-6 of their size,
        # because sides are differences of fractions
        np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@settings(deadline=None)
@given(
    gold=FRACTIONS,
    angle=st.floats(0, 6.3),
    steps=st.lists(st.floats(0, 0.5), min_size=2, max_size=5),
)
def test_nearness_falls_with_distance(gold, angle, steps):
    gold = proper(*gold)
    away = jnp.sort(jnp.array(steps))[:, None] * jnp.array([np.sin(angle), np.cos(angle)])
    moved = gold + jnp.tile(away, 2)
    points = boxes.centre(gold) + away
    for values in (
        boxes.iou(moved, gold),
        boxes.gaussian_point(boxes.centre(moved), gold, 0.5),
        boxes.gaussian_coverage(moved, gold, 0.5),
        boxes.distance_gaussian(points, boxes.centre(gold), jnp.array([640, 480]), 100.0, 640.0),
        boxes.contains(gold, points).astype(jnp.float32),
    ):
        assert (jnp.diff(values) <= 1e-5).all()


# random tokens

RANGES = {name: (0, 1) for name in REWARDS} | {
    "detection": (-0.3, 1),
    "repetition": (-1, 0),
    "overlong": (-1, 0),
}
"""Range of each reward, as in its docstring."""

MAX_TOKENS = 16
ANSWERS_AT_ONCE = 512

QUESTIONS = {
    "one box": (ONE_BOX, FOR_BOXES),
    "two boxes": (TWO, FOR_BOXES),
    "no box": (make_batch([]), FOR_BOXES),
    "one point": (ONE_POINT, FOR_POINTS),
    "two points": (TWO_POINTS, FOR_POINTS),
    "no point": (make_batch([], [], POINTS), FOR_POINTS),
    "points without boxes": (
        make_batch([], [((300, 550), 0), ((0, 0), 0)], POINTS),
        tuple(
            name
            for name in FOR_POINTS
            if name not in ("gaussian_point", "point_in_box", "point_in_mask")
        ),
    ),
    "text": (make_batch([], [], TEXT), ()),
}

OTHERS = {
    **{
        f"distance {unit}": ("distance_gaussian", {"distance_unit": unit})
        for unit in ("px", "diagonal", "box")
    },
    "detection as released": ("detection", {"detection_as_released": True}),
    "repetition of one": ("repetition", {"repetition_ngram": 1}),
    "overlong at 8": ("overlong", {"overlong_max_tokens": 8, "overlong_cache_tokens": 8}),
}
"""Rewards with settings other than the defaults."""


@jax.jit
def random_rewards(tokens: jax.Array, mask: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    answer = read_answer(tokens, mask, batch.gold.target, batch.gold.names, TOKENS.vocab)
    scores = {name: reward(answer, batch, RewardSettings()) for name, reward in REWARDS.items()}
    return scores | {
        name: REWARDS[reward](answer, batch, RewardSettings(**settings))
        for name, (reward, settings) in OTHERS.items()
    }


def random_ids(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns random sequences. Most tokens are loc tokens, and some bins are more frequent."""
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
    for _ in range(-(-count // (len(QUESTIONS) * ANSWERS_AT_ONCE))):
        tokens, mask = random_ids(rng, (len(QUESTIONS), ANSWERS_AT_ONCE, MAX_TOKENS))
        for name, scores in random_rewards(tokens, mask, batch).items():
            scores = np.asarray(scores)
            if name in FOR_MASKS:  # no masks are decoded here
                assert np.isnan(scores).all()
                continue
            low, high = RANGES[OTHERS[name][0] if name in OTHERS else name]
            np.testing.assert_array_equal(
                ~np.isnan(scores),
                np.broadcast_to(applies[name][:, None], scores.shape),
                err_msg=name,
            )
            assert np.nanmin(scores) >= low and np.nanmax(scores) <= high, name


@pytest.mark.slow
def test_a_hundred_thousand_random_answers_are_scored_within_range():
    check_random_tokens(100_000)


@pytest.mark.slow
def test_a_million_random_answers_are_scored_within_range():
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
    """Returns a near miss (IoU 0.64; a point an eighth of the width off), and what tries to earn
    more without looking.
    """

    def listed(*places: tuple[int, ...]) -> str:
        return " ; ".join(f"{loc(*place)} cat" for place in places)

    y1, x1, y2, x2 = gold
    middle = ((y1 + y2) // 2, (x1 + x2) // 2)
    half, last = LOC_MAX // 2, LOC_MAX
    if target == POINTS:
        near = (middle[0], middle[1] - (x2 - x1) // 8)
        grid = [(y, x) for y in (256, 768) for x in (256, 640, 896)]
        return listed(near), {
            "empty": "",
            "corners": listed((0, 0), (0, last), (last, 0), (last, last)),
            "grid": listed(*grid),
            "middle of the image": listed((half, half)),
            "duplicates": listed(*[near] * 3),
            "swapped": listed(middle[::-1]),
            "a box": listed(gold),
            "words": "cat " * 20,
            "loc alone": loc(*middle),
        }
    near = shifted(gold, 0.22)
    quarters = [
        (0, 0, half, half),
        (0, half, half, last),
        (half, 0, last, half),
        (half, half, last, last),
    ]
    corners = [(0, 0, 99, 99), (0, 924, 99, last), (924, 0, last, 99), (924, 924, last, last)]
    return listed(near), {
        "empty": "",
        "whole image": listed((0, 0, last, last)),
        "quarters": listed(*quarters),
        "corners": listed(*corners),
        "three whole images": listed(*[(0, 0, last, last)] * 3),
        "duplicates": listed(*[near] * 3),
        "one duplicate": listed(near, near),
        "spam": listed(near, *quarters[2:], quarters[0]),
        "swapped": listed((x1, y1, x2, y2)),
        "reversed": listed((y2, x2, y1, x1)),
        "x first reversed": listed((x2, y2, x1, y1)),
        "dot at the middle": listed((*middle, *middle)),
        "a point": listed(middle),
        "far": listed(FAR),
        "words": "cat " * 20,
        "every loc": loc(*range(0, 960, 40)),
    }


@pytest.mark.parametrize(
    ("recipe", "target"), RECIPES, ids=["+".join(recipe) for recipe, _ in RECIPES]
)
def test_no_adversary_earns_as_much_as_an_honest_near_miss(recipe, target):
    for gold in GOLDS:
        middle = ((gold[0] + gold[2]) // 2, (gold[1] + gold[3]) // 2)
        batch = make_batch([(gold, 0)], [(middle, 0)] if target == POINTS else [], target)
        honest, adversaries = honest_and_adversaries(gold, target)
        texts = [honest, *adversaries.values()]
        parts = [
            np.array(score_texts(name, batch, *texts)) * weight for name, weight in recipe.items()
        ]
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
            < score_texts("iou", make_batch([(gold, 0)]), honest_and_adversaries(gold, BOXES)[0])[0]
            < 0.7
        )
        assert (
            max(len(TOKENS.text(text)) for text in honest_and_adversaries(gold, BOXES)[1].values())
            < LENGTH
        )
