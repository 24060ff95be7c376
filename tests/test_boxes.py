"""The loc grid, the similarities and the matching: numbers of the systems this one replaces, and laws."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pg_ground import boxes
from pg_ground.vocab import LOC_MAX, LOC_TOKENS

PRINTED = 6e-7
"""The golden numbers have 6 decimals: half of the last, and what float32 adds to numbers of at most 1."""

ALPHA = 0.5

set_similarity = jax.jit(boxes.set_similarity)

SIDE_PX = 2000.0
"""Of the square image that golden boxes, given in pixels, are put in; they reach to 1099."""


@pytest.fixture(scope="module")
def seeds(golden):
    return json.loads((golden / "seeds_rewards.json").read_text())


def yxyx(xyxy_px, side_px: float = SIDE_PX, dtype=jnp.float32) -> jax.Array:
    """Returns boxes in pixels, x first, as fractions, y first."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(xyxy_px, float).reshape(-1, 4), 1, 0)
    return jnp.asarray(np.stack([y1, x1, y2, x2], axis=1) / side_px, dtype)


def random_boxes(count: int, seed: int = 0) -> jax.Array:
    """Returns proper boxes with sides of at least 0.05."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.6, (count, 2))
    return jnp.asarray(
        np.concatenate([corner, corner + rng.uniform(0.05, 0.4, (count, 2))], axis=1), jnp.float32
    )


# the loc grid


def test_every_bin_survives_decoding_and_encoding():
    bins = jnp.arange(LOC_TOKENS)
    np.testing.assert_array_equal(boxes.encode_loc(boxes.decode_loc(bins)), bins)


def test_fractions_come_back_within_half_a_bin():
    fractions = jnp.asarray(np.random.default_rng(0).uniform(size=10_000), jnp.float32)
    off = jnp.abs(boxes.decode_loc(boxes.encode_loc(fractions)) - fractions)
    assert off.max() <= 0.5 / LOC_MAX + 1e-6  # float32 knows fraction · 1023 to 6e-5 bins
    assert off.max() >= 0.49 / LOC_MAX


def test_ends_of_the_grid_are_0_and_1_and_what_lies_beyond_is_clipped():
    assert boxes.decode_loc(jnp.array([0, LOC_MAX])).tolist() == [0.0, 1.0]
    assert boxes.encode_loc(jnp.array([0.0, 1.0, -0.5, 1.5, 50.0])).tolist() == [
        0,
        1023,
        0,
        1023,
        1023,
    ]


def test_halves_round_to_the_even_bin():
    halves = np.arange(LOC_MAX) + 0.5
    fractions = jnp.asarray(halves / LOC_MAX, jnp.float32)
    exact = (
        np.asarray(fractions * LOC_MAX) == halves
    )  # others are no ties once float32 has rounded them
    assert exact.sum() > 100
    expected = np.where(np.floor(halves) % 2 == 0, np.floor(halves), np.ceil(halves))
    np.testing.assert_array_equal(np.asarray(boxes.encode_loc(fractions))[exact], expected[exact])


def test_loc_tokens_equal_opentaus(seeds):
    for case in [*seeds["loc_codec"], *seeds["loc_codec_points"]]:
        w, h = case["wh"]
        x_first = case["xyxy"] if "xyxy" in case else case["xy"]
        extent = np.array([w, h] * (len(x_first) // 2), float)
        y_first = (np.array(x_first) / extent).reshape(-1, 2)[:, ::-1].ravel()
        bins = boxes.encode_loc(jnp.asarray(y_first, jnp.float32))
        assert bins.tolist() == [
            int(digits) for digits in re.findall(r"<loc(\d{4})>", case["tokens"])
        ]
        decoded = np.asarray(boxes.decode_loc(bins)).reshape(-1, 2)[:, ::-1].ravel() * extent
        # a float32 fraction times an extent of at most 1,920 px, and the 6 decimals it is compared with
        np.testing.assert_allclose(
            decoded, np.ravel(case["decoded"]), rtol=0, atol=1920 * 2**-24 + 5e-7
        )


# similarities of two boxes


IN_64_BITS = 1e-6
"""The golden numbers have 6 decimals, of which the last is rounded: in float64 nothing else is between theirs and ours."""

PRECISIONS = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@PRECISIONS
def test_single_box_similarities_equal_easydistills(seeds, dtype):
    # boxes of 100 px in 2,000 are fractions near 0.05: in float32 their sides are known to 2^-24 / 0.05
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED + 2**-24 / 0.05
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["exact_unrounded"]:
            mine, gold = (yxyx(case[key], dtype=dtype)[0] for key in ("pred", "gt"))
            found = {
                "point": boxes.gaussian_point(boxes.centre(mine), gold, ALPHA),
                "plane": boxes.gaussian_coverage(mine, gold, ALPHA),
                "iou": boxes.iou(mine, gold),
                "iou2": jnp.square(boxes.iou(mine, gold)),
            }
            for name, value in found.items():
                assert value.dtype == dtype
                np.testing.assert_allclose(value, case[name], rtol=0, atol=bound, err_msg=name)


@PRECISIONS
def test_distance_gaussian_equals_synthetic_groundings(seeds, dtype):
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["distance_gaussian_sigma100"]:
            mine, gold = (
                jnp.array([y / 480, x / 640], dtype) for x, y in (case["pred"], case["gt"])
            )
            found = boxes.distance_gaussian(mine, gold, jnp.array([640, 480]), 100.0, 640.0)
            assert found.dtype == dtype
            np.testing.assert_allclose(found, case["reward"], rtol=0, atol=bound)


def test_distance_gaussian_measures_in_the_scaled_image():
    """The same fraction of a 1280×720 and of a 640×360 image is the same distance; of a 360×640 one it is not."""
    mine, gold = jnp.array([0.4, 0.3]), jnp.array([0.5, 0.5])
    wide, small, tall = (
        boxes.distance_gaussian(mine, gold, jnp.array(s), 100.0, 640.0)
        for s in ((1280, 720), (640, 360), (360, 640))
    )
    assert wide == small
    np.testing.assert_allclose(
        wide, np.exp(-((0.2 * 640) ** 2 + (0.1 * 360) ** 2) / 2 / 100**2), rtol=1e-5
    )
    np.testing.assert_allclose(
        tall, np.exp(-((0.2 * 360) ** 2 + (0.1 * 640) ** 2) / 2 / 100**2), rtol=1e-5
    )


def test_iou_is_symmetric_bounded_and_1_only_for_the_same_box():
    a, b = random_boxes(500), random_boxes(500, seed=1)
    iou = boxes.iou(a, b)
    np.testing.assert_array_equal(iou, boxes.iou(b, a))
    assert (iou >= 0).all() and (iou < 1).all() and (iou > 0).any() and (iou == 0).any()
    np.testing.assert_array_equal(boxes.iou(a, a), jnp.ones(500))


def test_iou_of_a_box_inside_another_is_the_ratio_of_their_areas():
    found = boxes.iou(jnp.array([0.25, 0.25, 0.5, 0.75]), jnp.array([0.0, 0.0, 0.5, 1.0]))
    assert found == 0.25


def test_giou_is_symmetric_bounded_and_at_most_iou():
    a, b = random_boxes(500), random_boxes(500, seed=1)
    giou = boxes.giou(a, b)
    np.testing.assert_array_equal(giou, boxes.giou(b, a))
    assert (giou > -1).all() and (giou < 1).all()
    assert (giou <= boxes.iou(a, b) + 1e-6).all()
    np.testing.assert_array_equal(boxes.giou(a, a), jnp.ones(500))


def test_giou_falls_with_the_distance_of_boxes_that_miss_each_other():
    box = jnp.array([0.0, 0.0, 0.1, 0.1])
    away = jnp.stack([box + jnp.array([0, d, 0, d]) for d in (0.2, 0.3, 0.5, 0.9)])
    assert not boxes.iou(box, away).any()
    assert (jnp.diff(boxes.giou(box, away)) < 0).all()


IMPROPER = [
    [0.5, 0.5, 0.2, 0.8],
    [0.5, 0.8, 0.8, 0.5],
    [0.8, 0.8, 0.5, 0.5],
    [0.5, 0.5, 0.5, 0.8],
    [0.5, 0.5, 0.8, 0.5],
    [0, 0, 0, 0],
]


@pytest.mark.parametrize("improper", IMPROPER)
def test_improper_boxes_are_like_nothing(improper):
    """Reversed, flat and empty ones; EasyDistill's rewards give a reversed box everything."""
    improper, gold = jnp.array(improper, jnp.float32), jnp.array([0.4, 0.4, 0.9, 0.9])
    assert not boxes.is_proper(improper)
    assert (
        boxes.iou(improper, gold) == boxes.iou(gold, improper) == boxes.iou(improper, improper) == 0
    )
    assert (
        boxes.giou(improper, gold)
        == boxes.giou(gold, improper)
        == boxes.giou(improper, improper)
        == -1
    )
    assert boxes.gaussian_coverage(improper, gold, ALPHA) == 0


def test_gaussians_are_bounded_and_1_only_at_the_gold():
    a, gold = random_boxes(500), random_boxes(500, seed=1)
    point, coverage = (
        boxes.gaussian_point(boxes.centre(a), gold, ALPHA),
        boxes.gaussian_coverage(a, gold, ALPHA),
    )
    for values in (point, coverage):
        assert (values >= 0).all() and (values < 1).all() and (values > 0.1).any()
    np.testing.assert_array_equal(
        boxes.gaussian_point(boxes.centre(gold), gold, ALPHA), jnp.ones(500)
    )
    # ln 2 + ln s + ln s − ln(s² + s²) cancels to a few float32 steps of ln s, which is at most 5
    np.testing.assert_allclose(boxes.gaussian_coverage(gold, gold, ALPHA), 1, rtol=0, atol=4e-6)
    assert (boxes.gaussian_coverage(gold, gold, ALPHA) <= 1).all()


def test_gaussians_do_not_see_a_scaling_of_either_axis():
    """So fractions of the image and pixels of it agree; EasyDistill's epsilon made 4 or 16 of normalised boxes."""
    a, gold = random_boxes(500), random_boxes(500, seed=1)
    scale = jnp.array([640.0, 480.0, 640.0, 480.0])
    for f in (
        lambda x, g: boxes.gaussian_point(boxes.centre(x), g, ALPHA),
        lambda x, g: boxes.gaussian_coverage(x, g, ALPHA),
    ):
        # an exponent of up to 88 (beyond is 0) known to float32's 1e-7, through products rounded in another order
        np.testing.assert_allclose(f(a * scale, gold * scale), f(a, gold), rtol=1e-4, atol=1e-7)


def test_gaussians_fall_with_distance():
    gold = jnp.array([0.4, 0.4, 0.6, 0.6])
    for step in ([0.05, 0], [0, 0.05], [-0.03, 0.04]):
        moved = jnp.stack([gold + k * jnp.array(step * 2) for k in range(6)])
        assert (jnp.diff(boxes.gaussian_point(boxes.centre(moved), gold, ALPHA)) < 0).all()
        assert (jnp.diff(boxes.gaussian_coverage(moved, gold, ALPHA)) < 0).all()


def test_coverage_sees_size_where_the_point_does_not():
    gold = jnp.array([0.4, 0.4, 0.6, 0.6])
    grown = jnp.stack([gold + k * jnp.array([-0.05, -0.05, 0.05, 0.05]) for k in range(5)])
    assert (jnp.diff(boxes.gaussian_coverage(grown, gold, ALPHA)) < 0).all()
    np.testing.assert_allclose(boxes.gaussian_point(boxes.centre(grown), gold, ALPHA), 1, atol=1e-6)


def test_a_flat_gold_box_still_has_a_scale():
    flat = jnp.array([0.5, 0.2, 0.5, 0.8])
    near, far = (
        boxes.gaussian_point(jnp.array([0.5 + d, 0.5]), flat, ALPHA)
        for d in (0.5 / LOC_MAX, 5 / LOC_MAX)
    )
    np.testing.assert_allclose(
        near, np.exp(-0.5), rtol=1e-3
    )  # half a bin is one sigma of half a bin; float32 knows 0.5 + d to 1e-4 of d
    assert 0 <= far < 1e-6


# points in shapes


def test_a_box_contains_its_corners_edges_and_middle():
    box = jnp.array([0.2, 0.3, 0.4, 0.7])
    inside = jnp.array([[0.2, 0.3], [0.4, 0.7], [0.2, 0.7], [0.3, 0.3], [0.3, 0.5]])
    assert boxes.contains(box, inside).all()
    assert not boxes.contains(box, jnp.array([[0.19999, 0.5], [0.3, 0.70001], [0.41, 0.29]])).any()
    assert not boxes.contains(box[jnp.array([2, 3, 0, 1])], inside).any(), (
        "a reversed box contains nothing"
    )


@pytest.mark.parametrize("side", [1, 2, 5, 64])
def test_a_point_is_covered_where_its_cell_is_set(side):
    rng = np.random.default_rng(side)
    mask, yx = rng.random((3, side, side)) < 0.5, rng.random((3, 50, 2))
    yx[:, :4] = [[0, 0], [0, 1], [1, 0], [1, 1]]
    cell = np.minimum(np.floor(np.float32(yx) * np.float32(side)), side - 1).astype(int)
    expected = [mask[i][tuple(cell[i].T)] for i in range(3)]
    np.testing.assert_array_equal(
        boxes.covers(jnp.asarray(mask), jnp.asarray(yx, jnp.float32)), expected
    )


# sets


def brute_force(similarity: np.ndarray) -> float:
    if similarity.shape[0] > similarity.shape[1]:
        similarity = similarity.T
    rows, columns = similarity.shape
    return max(
        similarity[range(rows), list(chosen)].sum()
        for chosen in itertools.permutations(range(columns), rows)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (2, 2), (2, 5), (4, 3), (4, 4), (5, 5)])
def test_matching_is_the_best_of_all_permutations(shape):
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(12, *shape))
    values[:4] *= rng.random((4, *shape)) < 0.5  # zeros, as between names that differ
    values[4:6] = np.round(values[4:6] * 2) / 2  # ties
    found = jax.vmap(boxes.matched_total)(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(
        found, [brute_force(v) for v in values], rtol=0, atol=5 * 2**-23
    )  # a sum of at most 5 values below 1


@PRECISIONS
def test_similarity_of_sets_equals_the_micro_f_of_all_classes(seeds, dtype):
    # sides of 70 px in 2,000: see above
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED + 2**-24 / 0.035
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["proposed_multi_micro_f"]:
            (mine, my_labels), (gold, gold_labels) = (
                (
                    yxyx([box for found in by_label.values() for box in found], dtype=dtype),
                    [k for k, v in by_label.items() for _ in v],
                )
                for by_label in (case["pred"], case["gt"])
            )
            if not my_labels:
                mine, my_labels = jnp.zeros((1, 4), dtype), ["unused"]
            predicted = jnp.array([label != "unused" for label in my_labels])
            same = jnp.array([[a == b for b in gold_labels] for a in my_labels])
            pairs = mine[:, None], gold[None]
            similarities = {
                "point": boxes.gaussian_point(boxes.centre(pairs[0]), pairs[1], ALPHA),
                "plane": boxes.gaussian_coverage(*pairs, ALPHA),
                "iou": boxes.iou(*pairs),
            }
            for name, similarity in similarities.items():
                found = set_similarity(
                    jnp.where(same, similarity, 0), predicted, jnp.ones(len(gold), bool)
                )
                assert found.dtype == dtype
                np.testing.assert_allclose(found, case[name], rtol=0, atol=bound, err_msg=name)


def sets(values, predicted, gold) -> float:
    return float(
        set_similarity(
            jnp.asarray(values, jnp.float32), jnp.asarray(predicted, bool), jnp.asarray(gold, bool)
        )
    )


def test_nothing_found_where_nothing_is_is_right():
    assert sets(np.ones((2, 3)), [0, 0], [0, 0, 0]) == 1
    assert sets(np.ones((1, 1)), [0], [0]) == 1


def test_anything_where_nothing_is_and_nothing_where_something_is_are_worth_0():
    assert sets(np.ones((2, 3)), [1, 0], [0, 0, 0]) == 0
    assert sets(np.ones((2, 3)), [0, 0], [1, 0, 0]) == 0


def test_duplicates_and_spurious_answers_cost():
    one_gold = np.array([[1.0, 0], [1.0, 0], [1.0, 0]])  # three copies of the one right answer
    found = [sets(one_gold, [1, i > 0, i > 1], [1, 0]) for i in range(3)]
    np.testing.assert_allclose(found, [1, 2 / 3, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(sets(np.eye(3), [1, 1, 1], [1, 1, 0]), 4 / 5, rtol=1e-6)


def test_missing_answers_cost():
    np.testing.assert_allclose(sets(np.eye(3), [1, 1, 0], [1, 1, 1]), 4 / 5, rtol=1e-6)


def test_one_answer_serves_one_gold_only():
    np.testing.assert_allclose(sets(np.ones((2, 2)), [1, 0], [1, 1]), 2 / 3, rtol=1e-6)


def test_unused_slots_are_worth_nothing_whatever_they_hold():
    values = np.random.default_rng(0).uniform(size=(2, 3))
    padded = np.pad(values, ((0, 2), (0, 1)), constant_values=9.0)
    assert sets(padded, [1, 1, 0, 0], [1, 1, 1, 0]) == sets(values, [1, 1], [1, 1, 1])


def test_order_does_not_matter():
    values = np.random.default_rng(0).uniform(size=(4, 4))
    whole = sets(values, np.ones(4), np.ones(4))
    for order in ([3, 1, 0, 2], [1, 0, 3, 2]):
        np.testing.assert_allclose(sets(values[order], np.ones(4), np.ones(4)), whole, rtol=1e-6)
        np.testing.assert_allclose(sets(values[:, order], np.ones(4), np.ones(4)), whole, rtol=1e-6)


def test_similarity_of_sets_is_bounded_and_symmetric():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values, predicted, gold = rng.uniform(size=(3, 4)), rng.random(3) < 0.6, rng.random(4) < 0.6
        found = sets(values, predicted, gold)
        assert 0 <= found <= 1
        np.testing.assert_allclose(sets(values.T, gold, predicted), found, rtol=1e-6)


def test_leading_axes_are_looked_at_one_by_one():
    rng = np.random.default_rng(2)
    values, predicted, gold = (
        rng.uniform(size=(2, 3, 4, 2)),
        rng.random((2, 3, 4)) < 0.5,
        rng.random((2, 1, 2)) < 0.7,
    )
    found = set_similarity(
        jnp.asarray(values, jnp.float32), jnp.asarray(predicted), jnp.asarray(gold)
    )
    for b, g in np.ndindex(2, 3):
        np.testing.assert_allclose(
            found[b, g], sets(values[b, g], predicted[b, g], gold[b, 0]), rtol=1e-6
        )
