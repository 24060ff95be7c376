"""Laws of every reward on token ids, and of their weighted sum."""

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
    SETTINGS,
    SHAPING,
    TOKENS,
    TWO,
    TWO_POINTS,
    loc,
    make_batch,
    make_rollout,
    read_jitted,
    right,
    score_texts,
    score_with_settings,
    wrong,
)

from pg_ground.config import RewardSettings
from pg_ground.rewards.device_rewards import REWARDS, get_reward, reward_metrics, score
from pg_ground.types import POINTS, Answer, Batch, Rewards, UserError
from pg_ground.vocab import LOC_MAX

CASES = [(name, ONE_BOX) for name in FOR_BOXES] + [(name, ONE_POINT) for name in FOR_POINTS]
IDS = [f"{name}-{'boxes' if batch is ONE_BOX else 'points'}" for name, batch in CASES]
ALL_CASES = pytest.mark.parametrize(("reward", "batch"), CASES, ids=IDS)


def test_the_cases_cover_every_reward():
    assert {name for name, _ in CASES} | {*SHAPING, *FOR_MASKS} == set(REWARDS)


@ALL_CASES
def test_the_right_answer_is_worth_1(reward, batch):
    # The bound is for float32: coverage has four roundings of a logarithm near 5.
    np.testing.assert_allclose(score_texts(reward, batch, right(batch)), 1, rtol=0, atol=4e-6)


@ALL_CASES
def test_rewards_are_in_0_to_1_for_any_completion(reward, batch):
    rng = np.random.default_rng(0)
    texts = [right(batch), wrong(batch), "", "cat", ";"]
    for _ in range(20):
        counts = rng.choice([1, 2, 4, 4, 4, 5], rng.integers(1, 4))
        texts.append(
            " ; ".join(
                loc(*rng.integers(0, 1024, count)) + " cat" * rng.integers(2) for count in counts
            )
        )
    scores = np.array(score_texts(reward, batch, *texts))
    assert (scores >= 0).all() and (scores <= 1).all() and len(set(scores.round(6))) > 1


@ALL_CASES
def test_an_empty_answer_and_the_wrong_kind_are_worth_0(reward, batch):
    other = right(ONE_POINT if batch is ONE_BOX else ONE_BOX)
    lowest = 0.5 if reward == "count_graded" else 0.0  # one too few
    texts = ("", "cat", other, f"{loc(1, 2, 3)} cat")
    assert score_texts(reward, batch, *texts) == [lowest] * 4


@ALL_CASES
def test_spam_lowers_every_reward_but_the_grammar(reward, batch):
    answers = [right(batch)] + [
        " ; ".join([right(batch)] + [wrong(batch)] * more) for more in (1, 2)
    ]
    copies = [right(batch)] + [" ; ".join([right(batch)] * (1 + more)) for more in (1, 2)]
    for texts in (answers, copies):
        scores = score_texts(reward, batch, *texts)
        if reward == "format":
            assert scores == [1.0, 1.0, 1.0]
        elif reward == "count":
            assert scores == [1.0, 0.0, 0.0]
        else:  # 2·Σ / (n + 1), where Σ is 1, or at most 2 by `giou`, which gives a score to any box
            assert scores[0] > scores[1] > scores[2]


def test_iou_of_spam_is_2_over_n_plus_1():
    texts = [" ; ".join([f"{loc(*BOX)} cat"] * n) for n in (1, 2, 3)]
    np.testing.assert_allclose(score_texts("iou", ONE_BOX, *texts), [1, 2 / 3, 1 / 2], rtol=1e-6)


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "giou", "gaussian_point", "gaussian_coverage", "label"]
)
def test_a_reversed_box_counts_as_a_prediction_worth_0(reward):
    flipped = f"{loc(BOX[2], BOX[3], BOX[0], BOX[1])} cat"
    single, beside = score_texts(reward, ONE_BOX, flipped, f"{loc(*BOX)} cat ; {flipped}")
    assert single == 0
    np.testing.assert_allclose(beside, 2 / 3, rtol=1e-5)


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "giou", "gaussian_point", "gaussian_coverage"]
)
def test_nearer_boxes_are_worth_more(reward):
    texts = [f"{loc(*(b + d for b in BOX))} cat" for d in (0, 10, 20, 40, 80)]
    assert (np.diff(score_texts(reward, ONE_BOX, *texts)) < 0).all()


def test_boxes_that_miss_are_ranked_by_all_but_iou():
    texts = [f"{loc(600 + d, 200, 700 + d, 900)} cat" for d in (0, 100, 200)]
    assert score_texts("iou", ONE_BOX, *texts) == [0.0, 0.0, 0.0]
    for reward in ("giou", "gaussian_point", "gaussian_coverage"):
        assert (np.diff(score_texts(reward, ONE_BOX, *texts)) < 0).all(), reward


@pytest.mark.parametrize("reward", ["gaussian_point", "distance_gaussian"])
def test_nearer_points_are_worth_more(reward):
    texts = [f"{loc(300 + d, 550)} cat" for d in (0, 10, 20, 40, 80)]
    assert (np.diff(score_texts(reward, ONE_POINT, *texts)) < 0).all()


def test_distance_gaussian_is_in_pixels_of_640():
    scores = score_texts(
        "distance_gaussian", ONE_POINT, f"{loc(300 + 100, 550)} cat", f"{loc(300, 550 + 100)} cat"
    )
    d = np.array([480, 640]) * 100 / LOC_MAX
    np.testing.assert_allclose(scores, np.exp(-((d / 100) ** 2) / 2), rtol=1e-5)


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_is_nan_exactly_where_it_does_not_apply(reward):
    for batch, applies in ((ONE_BOX, FOR_BOXES), (ONE_POINT, FOR_POINTS)):
        scores = np.isnan(score_texts(reward, batch, right(batch), wrong(batch), ""))
        assert scores.tolist() == [reward not in applies + SHAPING] * 3


@pytest.mark.parametrize("reward", ["gaussian_point", "point_in_box", "point_in_mask"])
def test_a_reward_that_needs_the_objects_boxes_is_nan_without_them(reward):
    assert np.isnan(
        score_texts(reward, make_batch([], [((300, 550), 0)], POINTS), f"{loc(300, 550)} cat")
    ).all()


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "gaussian_point", "gaussian_coverage", "detection", "label"]
)
def test_boxes_match_only_within_their_name(reward):
    exact = f"{loc(*BOX)} cat ; {loc(*OTHER)} dog"
    turned = f"{loc(*OTHER)} dog ; {loc(*BOX)} cat"
    swapped = f"{loc(*BOX)} dog ; {loc(*OTHER)} cat"
    half = f"{loc(*BOX)} cat ; {loc(*OTHER)} fox"
    scores = score_texts(reward, TWO, exact, turned, swapped, half, f"{loc(*BOX)} cat")
    np.testing.assert_allclose(scores[:2], 1, atol=4e-6)
    assert scores[2] < 0.3 or reward == "label"
    np.testing.assert_allclose(scores[3], 1 / 2, atol=4e-6)
    np.testing.assert_allclose(scores[4], 1 / 2 if reward == "detection" else 2 / 3, atol=4e-6)


def test_eos_alone_is_right_if_there_is_nothing_to_find():
    nothing = make_batch([])
    for reward in FOR_BOXES:
        silent, boxed, unfinished = (
            *score_texts(reward, nothing, "", f"{loc(*BOX)} cat"),
            *score_texts(reward, nothing, f"{loc(1, 2, 3)} cat", unfinished=True),
        )
        assert silent == 1 and boxed == (0.5 if reward == "count_graded" else 0), reward
        assert unfinished == (0 if reward == "format" else 1), reward


def test_format_needs_eos():
    assert score_texts("format", ONE_BOX, right(ONE_BOX)) == [1.0]
    assert score_texts("format", ONE_BOX, right(ONE_BOX), unfinished=True) == [0.0]


def test_count_is_of_answers_of_the_asked_kind():
    box, point = f"{loc(*BOX)} cat", f"{loc(1, 2)} cat"
    scores = score_texts(
        "count", ONE_BOX, box, wrong(ONE_BOX), f"{box} ; {point}", point, f"{box} ; {box}"
    )
    assert scores == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_count_graded_falls_with_each_answer_too_many_or_too_few():
    answers = [" ; ".join([f"{loc(*BOX)} cat"] * n) for n in range(5)]
    np.testing.assert_allclose(
        score_texts("count_graded", TWO, *answers), [1 / 3, 1 / 2, 1, 1 / 2, 1 / 3], rtol=1e-6
    )


def test_label_compares_names_alone():
    far, near = loc(*FAR), loc(*BOX)
    texts = (
        f"{far} dog ; {near} cat",
        f"{far} cat ; {near} cat",
        f"{far} cat",
        f"{far} cow ; {near} dog",
        "",
    )
    np.testing.assert_allclose(
        score_texts("label", TWO, *texts), [1, 1 / 2, 2 / 3, 1 / 2, 0], rtol=1e-6
    )


def test_iou_squared_is_the_square_of_iou_for_one_box():
    texts = [f"{loc(*(b + d for b in BOX))} cat" for d in (0, 10, 20, 40, 80)]
    np.testing.assert_allclose(
        score_texts("iou_squared", ONE_BOX, *texts),
        np.square(score_texts("iou", ONE_BOX, *texts)),
        rtol=1e-6,
    )


def test_a_point_on_the_edge_is_in_its_box_and_one_bin_further_is_not():
    y1, x1, y2, x2 = BOX
    inside = [(y1, x1), (y2, x2), (y1, x2), (300, 550)]
    outside = [(y1 - 1, x1), (y2 + 1, x2), (300, x2 + 1), (300, x1 - 1)]
    scores = score_texts("point_in_box", ONE_POINT, *(f"{loc(*yx)} cat" for yx in inside + outside))
    assert scores == [1.0] * 4 + [0.0] * 4


def test_points_lie_in_the_box_and_the_mask_of_their_name():
    right, swapped = (
        f"{loc(300, 550)} {a} ; {loc(800, 175)} {b}" for a, b in (("cat", "dog"), ("dog", "cat"))
    )
    for reward in ("point_in_box", "point_in_mask"):
        scores = score_texts(
            reward,
            TWO_POINTS,
            right,
            swapped,
            f"{loc(310, 600)} cat",
            f"{right} ; {loc(300, 550)} cat",
            "",
        )
        np.testing.assert_allclose(scores, [1, 0, 2 / 3, 4 / 5, 0], rtol=1e-6, err_msg=reward)


def test_a_mask_is_read_cell_by_cell():
    cells = np.random.default_rng(0).random((3, 4, 4)) < 0.5
    batch = ONE_POINT._replace(gold=ONE_POINT.gold._replace(masks=jnp.asarray(cells)[None]))
    grid = [(y, x) for y in range(4) for x in range(4)]
    texts = [f"{loc(128 + 256 * y, 128 + 256 * x)} cat" for y, x in grid]
    assert score_texts("point_in_mask", batch, *texts) == [float(cells[0, y, x]) for y, x in grid]
    corners = [f"{loc(y, x)} cat" for y in (0, LOC_MAX) for x in (0, LOC_MAX)]
    assert (
        score_texts("point_in_mask", batch, *corners)
        == cells[0][[0, 0, -1, -1], [0, -1, 0, -1]].astype(float).tolist()
    )


def test_point_in_mask_does_not_apply_without_masks():
    without = ONE_POINT._replace(gold=ONE_POINT.gold._replace(masks=jnp.zeros((1, 3, 0, 0), bool)))
    assert np.isnan(score_texts("point_in_mask", without, right(ONE_POINT), "")).all()


def test_distance_in_shares_of_the_diagonal_is_that_of_the_image():
    texts = [f"{loc(300 + dy, 550 + dx)} cat" for dy, dx in ((0, 0), (100, 0), (0, 100), (60, -80))]
    in_px, of_diagonal = (
        score_with_settings("distance_gaussian", ONE_POINT, *texts, **settings)
        for settings in (
            {"distance_sigma_px": 80.0},
            {"distance_unit": "diagonal", "distance_sigma_share": 0.1},
        )
    )
    # the diagonal of 640 × 480 is 800
    np.testing.assert_allclose(of_diagonal, in_px, rtol=1e-5)
    larger = ONE_POINT._replace(size=ONE_POINT.size * 7)
    first, second = (
        score_with_settings("distance_gaussian", batch, *texts, distance_unit="diagonal")
        for batch in (larger, ONE_POINT)
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_distance_in_shares_of_the_gold_box_is_that_of_the_object():
    height, width = (BOX[2] - BOX[0]) / LOC_MAX * 480, (BOX[3] - BOX[1]) / LOC_MAX * 640
    text = f"{loc(300 + 50, 550)} cat"
    unit = {"distance_unit": "box", "distance_sigma_share": 0.25}
    sigma = 0.25 * np.hypot(height, width)
    expected = np.exp(-0.5 * (50 / LOC_MAX * 480 / sigma) ** 2)
    np.testing.assert_allclose(
        score_with_settings("distance_gaussian", ONE_POINT, text, **unit), expected, rtol=1e-5
    )
    smaller = make_batch([((200, 375, 400, 725), 0)], [((300, 550), 0)], POINTS)
    half = score_with_settings("distance_gaussian", smaller, f"{loc(300 + 25, 550)} cat", **unit)
    np.testing.assert_allclose(half, expected, rtol=1e-5)
    assert np.isnan(
        score_with_settings(
            "distance_gaussian", make_batch([], [((300, 550), 0)], POINTS), text, **unit
        )
    ).all()


def test_length_is_the_unused_share_of_the_completion():
    rollout = make_rollout(right(ONE_BOX), "")
    used = rollout.mask.sum(axis=-1)[0].tolist()
    np.testing.assert_allclose(
        score_texts("length", ONE_BOX, right(ONE_BOX), ""),
        [1 - n / LENGTH for n in used],
        rtol=1e-6,
    )


def test_overlong_is_the_paper_s():
    """arXiv 2503.14476, equation 13. TRL's docstring: 90 of 100 tokens, cache of 20, is -0.5."""
    lengths = np.array([1, 80, 81, 90, 99, 100])
    mask = jnp.arange(120) < lengths[:, None]
    rollout = make_rollout("")
    answer = read_jitted(
        rollout.tokens, rollout.mask, ONE_BOX.gold.target, ONE_BOX.gold.names, TOKENS.vocab
    )
    answer = answer._replace(tokens=jnp.ones((1, *mask.shape), jnp.int32), mask=mask[None])
    scores = REWARDS["overlong"](
        answer, ONE_BOX, RewardSettings(overlong_max_tokens=100, overlong_cache_tokens=20)
    )
    np.testing.assert_allclose(scores[0], [0, 0, -0.05, -0.5, -0.95, -1], rtol=1e-6)
    longer = REWARDS["overlong"](answer, ONE_BOX, RewardSettings(overlong_cache_tokens=20))
    np.testing.assert_array_equal(longer, 0)
    beyond = answer._replace(mask=jnp.ones((1, 1, 120), bool), tokens=answer.tokens[:, :1])
    assert REWARDS["overlong"](
        beyond, ONE_BOX, RewardSettings(overlong_max_tokens=100)
    ).tolist() == [[-1.0]]


def brute_repetition(ids: list[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return -sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(len(grams), 1)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_repetition_equals_counting(n):
    rng = np.random.default_rng(n)
    lengths = rng.integers(0, 21, 30)
    tokens = rng.integers(5, 8, (1, 30, 20))
    mask = np.arange(20) < lengths[None, :, None]
    rollout = make_rollout("")
    answer = read_jitted(
        rollout.tokens, rollout.mask, ONE_BOX.gold.target, ONE_BOX.gold.names, TOKENS.vocab
    )
    answer = answer._replace(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))
    scores = REWARDS["repetition"](answer, ONE_BOX, RewardSettings(repetition_ngram=n))
    expected = [
        brute_repetition(row[:length].tolist(), n)
        for row, length in zip(tokens[0], lengths, strict=True)
    ]
    np.testing.assert_allclose(scores[0], expected, rtol=1e-6)


def test_repetition_sees_a_loop_and_no_right_answer():
    loop = " ".join(["cat"] * 12)
    tokens, mask = (x[0, 0] for x in make_rollout(loop)[:2])
    expected = brute_repetition(tokens[mask].tolist(), SETTINGS.repetition_ngram)
    np.testing.assert_allclose(
        score_texts("repetition", ONE_BOX, loop, right(ONE_BOX), ""), [expected, 0, 0], rtol=1e-6
    )
    assert expected < -0.4
    assert score_with_settings("repetition", ONE_BOX, loop, repetition_ngram=LENGTH + 1) == [0.0]


def test_a_list_of_different_boxes_repeats_nothing():
    names = ("cat", "red circle")
    rows = [
        " ; ".join(f"{loc(100, 10 + 100 * k, 200, 90 + 100 * k)} {name}" for k in range(3))
        for name in names
    ]
    # the boxes are in one row of the image, so that y1 is the same
    assert score_texts("repetition", ONE_BOX, *rows) == [0.0, 0.0]


# the sum


def score_jitted(answer: Answer, batch: Batch, weights: dict[str, float]) -> Rewards:
    return jax.jit(lambda a, b: score(a, b, weights, SETTINGS))(answer, batch)


def both_kinds() -> tuple[Answer, Batch]:
    """Returns questions about a box and about a point, each with a right and an empty answer."""
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ONE_BOX, ONE_POINT)
    parts = make_rollout(right(ONE_BOX), ""), make_rollout(right(ONE_POINT), "")
    rollout = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)
    return read_jitted(
        rollout.tokens, rollout.mask, batch.gold.target, batch.gold.names, TOKENS.vocab
    ), batch


def test_total_is_the_weighted_sum_of_the_rewards_that_apply():
    scores = score_jitted(*both_kinds(), {"iou": 2.0, "distance_gaussian": 3.0, "format": 0.5})
    np.testing.assert_allclose(scores.total, [[2.5, 0], [3.5, 0]], rtol=1e-6)
    assert scores.parts.keys() == {"iou", "distance_gaussian", "format"}
    np.testing.assert_array_equal(np.isnan(scores.parts["iou"]), [[False, False], [True, True]])
    np.testing.assert_array_equal(
        np.isnan(scores.parts["distance_gaussian"]), [[True, True], [False, False]]
    )


def test_total_is_nan_where_no_weighted_reward_applies():
    scores = score_jitted(*both_kinds(), {"iou": 1.0, "format": 0.0})
    np.testing.assert_allclose(scores.total, [[1, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(scores.parts["format"], [[1, 0], [1, 0]])


def test_weight_0_measures_and_does_not_count():
    plain = score_jitted(*both_kinds(), {"format": 1.0})
    beside = score_jitted(*both_kinds(), {"format": 1.0, "iou": 0.0, "count": 0.0})
    np.testing.assert_array_equal(plain.total, beside.total)
    assert beside.parts.keys() == {"format", "iou", "count"}


def test_metrics_are_means_over_the_completions_that_have_a_score():
    answer, batch = both_kinds()
    rewards = score_jitted(answer, batch, {"iou": 1.0, "format": 0.0})
    rollout = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        make_rollout(right(ONE_BOX), ""),
        make_rollout(right(ONE_POINT), ""),
    )
    weights = {"iou": 2.0, "format": 0.0}
    metrics = {
        name: float(value)
        for name, value in reward_metrics(rollout, answer, rewards, weights).items()
    }
    assert (
        metrics["reward/iou"] == metrics["reward/total"] == 0.5 and metrics["reward/format"] == 0.5
    )
    assert metrics["reward/weighted/iou"] == 1 and metrics["reward/weighted/format"] == 0
    np.testing.assert_allclose(metrics["reward/std"], (2**-0.5 + 0) / 2, rtol=1e-6)
    assert metrics["group/zero_std_fraction"] == 0.5
    assert metrics["completion/length"] == float(rollout.mask.sum()) / 4
    assert (
        metrics["completion/unfinished_fraction"] == 0
        and metrics["completion/malformed_fraction"] == 0.5
    )


def test_an_unknown_reward_is_refused_with_the_nearest():
    with pytest.raises(
        UserError,
        match=r"config.grpo.rewards.gaussian_points does not exist: did you mean gaussian_point\?",
    ):
        get_reward("gaussian_points")
    with pytest.raises(
        UserError, match=r"config\.grpo\.rewards\.zzz does not exist: there are count, .*iou"
    ):
        get_reward("zzz")
