"""Tests of the loc grid, the similarities and the matching: numbers of other systems, and laws."""

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
"""The golden numbers have 6 decimals. The bound is half of the last one, and float32's error for
numbers of at most 1.
"""

ALPHA = 0.5

set_similarity = jax.jit(boxes.set_similarity)

SIDE_PX = 2000.0
"""Side of the square image for the golden boxes, which are in pixels and reach to 1099."""


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


def test_the_grid_ends_at_0_and_1_and_other_fractions_are_clipped():
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
    # the others are no ties after float32 has rounded them
    exact = np.asarray(fractions * LOC_MAX) == halves
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
        # the bound is for a float32 fraction times at most 1,920 px, and for 6 decimals
        np.testing.assert_allclose(
            decoded, np.ravel(case["decoded"]), rtol=0, atol=1920 * 2**-24 + 5e-7
        )


# similarities of two boxes


IN_64_BITS = 1e-6
"""The golden numbers have 6 decimals, and the last is rounded. In float64 there is no other
difference.
"""

PRECISIONS = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@PRECISIONS
def test_single_box_similarities_equal_easydistills(seeds, dtype):
    # boxes of 100 px in 2,000 have sides near 0.05: float32 has them to 2^-24 / 0.05
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED + 2**-24 / 0.05
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["exact_unrounded"]:
            predicted, gold = (yxyx(case[key], dtype=dtype)[0] for key in ("pred", "gt"))
            values = {
                "point": boxes.gaussian_point(boxes.centre(predicted), gold, ALPHA),
                "plane": boxes.gaussian_coverage(predicted, gold, ALPHA),
                "iou": boxes.iou(predicted, gold),
                "iou2": jnp.square(boxes.iou(predicted, gold)),
            }
            for name, value in values.items():
                assert value.dtype == dtype
                np.testing.assert_allclose(value, case[name], rtol=0, atol=bound, err_msg=name)


@PRECISIONS
def test_distance_gaussian_equals_synthetic_groundings(seeds, dtype):
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["distance_gaussian_sigma100"]:
            predicted, gold = (
                jnp.array([y / 480, x / 640], dtype) for x, y in (case["pred"], case["gt"])
            )
            value = boxes.distance_gaussian(predicted, gold, jnp.array([640, 480]), 100.0, 640.0)
            assert value.dtype == dtype
            np.testing.assert_allclose(value, case["reward"], rtol=0, atol=bound)


def test_distance_gaussian_measures_in_the_scaled_image():
    """The same fraction of a 1280×720 and of a 640×360 image is the same distance; of a 360×640 one
    it is not.
    """
    predicted, gold = jnp.array([0.4, 0.3]), jnp.array([0.5, 0.5])
    wide, small, tall = (
        boxes.distance_gaussian(predicted, gold, jnp.array(s), 100.0, 640.0)
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
    value = boxes.iou(jnp.array([0.25, 0.25, 0.5, 0.75]), jnp.array([0.0, 0.0, 0.5, 1.0]))
    assert value == 0.25


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
def test_improper_boxes_have_no_similarity(improper):
    """The boxes are reversed, flat or empty. EasyDistill's rewards give a reversed box the full
    score.
    """
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


def test_gaussians_do_not_change_with_the_scale_of_an_axis():
    """So fractions and pixels agree. EasyDistill's epsilon gives 4 or 16 for normalised boxes."""
    a, gold = random_boxes(500), random_boxes(500, seed=1)
    scale = jnp.array([640.0, 480.0, 640.0, 480.0])
    for f in (
        lambda x, g: boxes.gaussian_point(boxes.centre(x), g, ALPHA),
        lambda x, g: boxes.gaussian_coverage(x, g, ALPHA),
    ):
        # exponents of up to 88 (beyond, the value is 0) with float32's error of 1e-7, and products
        # that are rounded in another order
        np.testing.assert_allclose(f(a * scale, gold * scale), f(a, gold), rtol=1e-4, atol=1e-7)


def test_gaussians_fall_with_distance():
    gold = jnp.array([0.4, 0.4, 0.6, 0.6])
    for step in ([0.05, 0], [0, 0.05], [-0.03, 0.04]):
        moved = jnp.stack([gold + k * jnp.array(step * 2) for k in range(6)])
        assert (jnp.diff(boxes.gaussian_point(boxes.centre(moved), gold, ALPHA)) < 0).all()
        assert (jnp.diff(boxes.gaussian_coverage(moved, gold, ALPHA)) < 0).all()


def test_coverage_depends_on_the_size_and_the_point_does_not():
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
    # half a bin is one sigma; float32 has 0.5 + d to 1e-4 of d
    np.testing.assert_allclose(near, np.exp(-0.5), rtol=1e-3)
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
    """Returns the largest total of all one-to-one matchings."""
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
    value = jax.vmap(boxes.matched_total)(jnp.asarray(values, jnp.float32))
    expected = [brute_force(table) for table in values]
    # a sum of at most 5 values below 1
    np.testing.assert_allclose(value, expected, rtol=0, atol=5 * 2**-23)
    on_host = [boxes.matched_total(np.float32(table)) for table in values]
    np.testing.assert_allclose(on_host, expected, rtol=0, atol=5 * 2**-23)


@pytest.mark.slow
@PRECISIONS
def test_similarity_of_sets_equals_the_micro_f_of_all_classes(seeds, dtype):
    # sides of 70 px in 2,000: see above
    bound = IN_64_BITS if dtype is jnp.float64 else PRINTED + 2**-24 / 0.035
    with jax.enable_x64(dtype is jnp.float64):
        for case in seeds["proposed_multi_micro_f"]:
            predicted, labels = labelled_boxes(case["pred"], dtype)
            gold, gold_labels = labelled_boxes(case["gt"], dtype)
            if not labels:
                predicted, labels = jnp.zeros((1, 4), dtype), ["unused"]
            used = jnp.array([label != "unused" for label in labels])
            same = jnp.array([[a == b for b in gold_labels] for a in labels])
            pairs = predicted[:, None], gold[None]
            similarities = {
                "point": boxes.gaussian_point(boxes.centre(pairs[0]), pairs[1], ALPHA),
                "plane": boxes.gaussian_coverage(*pairs, ALPHA),
                "iou": boxes.pairwise_iou(predicted, gold),
            }
            for name, similarity in similarities.items():
                within_label = jnp.where(same, similarity, 0)
                value = set_similarity(within_label, used, jnp.ones(len(gold), bool))
                assert value.dtype == dtype
                np.testing.assert_allclose(value, case[name], rtol=0, atol=bound, err_msg=name)


def labelled_boxes(by_label: dict[str, list], dtype) -> tuple[jax.Array, list[str]]:
    """Returns all boxes of a dict of lists, and the label of each."""
    corners = [box for boxes_of_label in by_label.values() for box in boxes_of_label]
    labels = [label for label, boxes_of_label in by_label.items() for _ in boxes_of_label]
    return yxyx(corners, dtype=dtype), labels


def set_value(values, predicted, gold) -> float:
    return float(
        set_similarity(
            jnp.asarray(values, jnp.float32), jnp.asarray(predicted, bool), jnp.asarray(gold, bool)
        )
    )


def test_an_empty_answer_is_right_if_there_is_nothing_to_find():
    assert set_value(np.ones((2, 3)), [0, 0], [0, 0, 0]) == 1
    assert set_value(np.ones((1, 1)), [0], [0]) == 1


def test_spurious_answers_alone_and_missing_answers_alone_are_worth_0():
    assert set_value(np.ones((2, 3)), [1, 0], [0, 0, 0]) == 0
    assert set_value(np.ones((2, 3)), [0, 0], [1, 0, 0]) == 0


def test_duplicates_and_spurious_answers_cost():
    one_gold = np.array([[1.0, 0], [1.0, 0], [1.0, 0]])  # three copies of the one right answer
    value = [set_value(one_gold, [1, i > 0, i > 1], [1, 0]) for i in range(3)]
    np.testing.assert_allclose(value, [1, 2 / 3, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(set_value(np.eye(3), [1, 1, 1], [1, 1, 0]), 4 / 5, rtol=1e-6)


def test_missing_answers_cost():
    np.testing.assert_allclose(set_value(np.eye(3), [1, 1, 0], [1, 1, 1]), 4 / 5, rtol=1e-6)


def test_one_answer_matches_one_gold_only():
    np.testing.assert_allclose(set_value(np.ones((2, 2)), [1, 0], [1, 1]), 2 / 3, rtol=1e-6)


def test_values_in_unused_slots_do_not_count():
    values = np.random.default_rng(0).uniform(size=(2, 3))
    padded = np.pad(values, ((0, 2), (0, 1)), constant_values=9.0)
    assert set_value(padded, [1, 1, 0, 0], [1, 1, 1, 0]) == set_value(values, [1, 1], [1, 1, 1])


def test_order_does_not_matter():
    values = np.random.default_rng(0).uniform(size=(4, 4))
    whole = set_value(values, np.ones(4), np.ones(4))
    for order in ([3, 1, 0, 2], [1, 0, 3, 2]):
        np.testing.assert_allclose(
            set_value(values[order], np.ones(4), np.ones(4)), whole, rtol=1e-6
        )
        np.testing.assert_allclose(
            set_value(values[:, order], np.ones(4), np.ones(4)), whole, rtol=1e-6
        )


def test_similarity_of_sets_is_bounded_and_symmetric():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values, predicted, gold = rng.uniform(size=(3, 4)), rng.random(3) < 0.6, rng.random(4) < 0.6
        value = set_value(values, predicted, gold)
        assert 0 <= value <= 1
        np.testing.assert_allclose(set_value(values.T, gold, predicted), value, rtol=1e-6)


def test_leading_axes_are_independent():
    rng = np.random.default_rng(2)
    values, predicted, gold = (
        rng.uniform(size=(2, 3, 4, 2)),
        rng.random((2, 3, 4)) < 0.5,
        rng.random((2, 1, 2)) < 0.7,
    )
    value = set_similarity(
        jnp.asarray(values, jnp.float32), jnp.asarray(predicted), jnp.asarray(gold)
    )
    for b, g in np.ndindex(2, 3):
        np.testing.assert_allclose(
            value[b, g], set_value(values[b, g], predicted[b, g], gold[b, 0]), rtol=1e-6
        )


# the host


HOST = np.random.default_rng(3).integers(0, 1024, (500, 2, 4)) / LOC_MAX


@pytest.mark.parametrize(
    "function",
    [
        boxes.iou,
        boxes.giou,
        lambda a, b: boxes.gaussian_point(boxes.centre(a), b, ALPHA),
        lambda a, b: boxes.gaussian_coverage(a, b, ALPHA),
        lambda a, b: boxes.contains(a, boxes.centre(b)),
    ],
)
def test_the_host_computes_in_float64_and_agrees_with_the_device(function):
    a, b = HOST[:, 0], HOST[:, 1]
    on_host = function(a, b)
    on_device = function(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert isinstance(on_host, np.ndarray) and isinstance(on_device, jax.Array)
    assert on_host.dtype == (bool if on_device.dtype == bool else np.float64)
    # GIoU divides by hulls of one bin; the others lose a few roundings of 6e-8
    np.testing.assert_allclose(on_device, on_host, rtol=0, atol=2e-4)


def test_detect_counts_alike_on_the_host_and_the_device():
    rng = np.random.default_rng(4)
    iou, may_match = rng.random((5, 4)), rng.random((5, 4)) < 0.7
    arguments = (iou, may_match, np.ones(4))
    on_host = boxes.detect(*arguments, (0.25, 0.5))
    on_device = boxes.detect(*map(jnp.asarray, arguments), (0.25, 0.5))
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)


def test_an_unreadable_box_is_not_proper():
    rows = boxes.host_boxes([(1, 2, 3, 4), None, (1, 2, 1, 4), (0, 0, 1e-200, 1e-200)])
    assert rows.dtype == np.float64
    assert boxes.is_proper(rows).tolist() == [True, False, False, False]
    assert boxes.iou(rows, rows).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert boxes.host_boxes([]).shape == (0, 4)


def test_a_matching_of_an_empty_set_is_empty():
    rows, columns = boxes.match(np.zeros((0, 3)))
    assert not len(rows) and not len(columns)
    assert boxes.matched_total(np.zeros((3, 0))) == 0
    assert boxes.f_measure(0.0, 0, 0) == 1 and boxes.f_measure(1.0, 1, 1) == 1
