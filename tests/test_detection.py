"""Tests of the counts of the detection reward: big_vision's results, a loop as in the paper, and
laws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completions import BOX, OTHER, TWO, loc, score_texts, score_with_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_ground import boxes
from pg_ground.rewards.device_rewards import DETECTION_THRESHOLDS, DUPLICATE_WEIGHT, RELEASED_SHARES

detect = jax.jit(boxes.detect, static_argnums=3)

COORDINATE, CLASS = 3, 1004
"""Where coordinates 0..1000 and class 0 begin in big_vision's sequences of y1 x1 y2 x2 class
confidence.
"""

LAST = {"0.5": 0.5, "0.6": 0.6, "0.7": 0.7, "0.8": 0.85, "0.9": 0.95}
"""The thresholds of the golden results. Two or three share a first decimal; the file has the last.
"""


def read(sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes as fractions, classes, and which entries are not padding."""
    groups = sequence.reshape(*sequence.shape[:-1], -1, 6)
    return (
        np.clip(groups[..., :4] - COORDINATE, 0, 1000) / 1000,
        groups[..., 4] - CLASS,
        groups[..., 5] > 0,
    )


def detections(
    golden, dtype: type, thresholds: tuple[float, ...], weight: np.ndarray
) -> boxes.Detections:
    """Returns our counts of the golden sequences, [3 images, 4 samples, N].

    Args:
      weight: weight of each class.
    """
    predicted, predicted_class, predicted_used = read(golden["pred"])
    gold, gold_class, gold_used = (x[:, None] for x in read(golden["gt"]))
    iou = boxes.pairwise_iou(jnp.asarray(predicted, dtype), jnp.asarray(gold, dtype))
    same_class = predicted_class[..., None] == gold_class[..., None, :]
    may_match = same_class & predicted_used[..., None] & gold_used[..., None, :]
    return detect(iou, jnp.asarray(may_match), jnp.asarray(weight[gold_class], dtype), thresholds)


def reward_of(counts: boxes.Detections) -> jax.Array:
    return jnp.asarray(counts.weight - DUPLICATE_WEIGHT * counts.duplicate_weight)


@pytest.fixture(scope="module")
def released(golden) -> dict[str, np.ndarray]:
    with np.load(golden / "detection_reward.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weight(released) -> np.ndarray:
    """Returns the weight of each of 80 classes, 0 for a class that does not occur.

    The file does not have the weights. Its 60 rewards are linear in the weights of the 12 classes
    that occur, and our counts are the coefficients. So least squares gives the weights. With any
    other count than big_vision's, the equations would not hold.
    """
    with jax.enable_x64(True):
        by_class = [
            detections(released, np.float64, tuple(LAST.values()), one_hot)
            for one_hot in np.eye(80)
        ]
        coefficients = np.stack([np.ravel(reward_of(counts)) for counts in by_class], axis=-1)
    rewards = np.stack([released[f"result/reward-{key}"] for key in LAST], axis=-1).ravel()
    weights = np.linalg.lstsq(coefficients, rewards, rcond=None)[0]
    # persons are 30 % of COCO's boxes, and the only class that is matched alone
    assert np.isclose(weights[0], 0.164912, rtol=1e-5)
    return weights


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-6), (np.float32, 2e-6)])
def test_counts_and_rewards_equal_big_visions(released, weight, dtype, bound):
    """Big_vision's results are float32 sums of at most four weights near 1, exact to some 2^-22."""
    with jax.enable_x64(dtype is np.float64):
        at_last = detections(released, dtype, tuple(LAST.values()), weight)
        at_all = detections(released, dtype, DETECTION_THRESHOLDS, weight)
        shares = jnp.array(RELEASED_SHARES)
        reward = reward_of(at_last)
        mean = {
            "result/reward": reward_of(at_all) @ shares,
            "result/num_matches": at_all.count @ shares,
            "result/nms_penalty": at_all.duplicate_weight @ shares,
        }
    assert reward.dtype == dtype
    for n, key in enumerate(LAST):
        np.testing.assert_array_equal(at_last.count[..., n], released[f"result/num_matches-{key}"])
        for values, name in ((reward, "reward"), (at_last.duplicate_weight, "nms_penalty")):
            expected = released[f"result/{name}-{key}"]
            np.testing.assert_allclose(values[..., n], expected, rtol=0, atol=bound)
    for key, value in mean.items():
        np.testing.assert_allclose(value, released[key], rtol=0, atol=bound, err_msg=key)
    np.testing.assert_array_equal(released["reward"], released["result/reward"])


def test_the_released_mean_is_not_the_mean(released, weight):
    counts = detections(released, np.float32, DETECTION_THRESHOLDS, weight)
    rewards = np.asarray(reward_of(counts))
    assert np.isclose(sum(RELEASED_SHARES), 1)
    assert np.abs(rewards.mean(axis=-1) - released["reward"]).max() > 0.2


def by_loop(
    iou: np.ndarray, may_match: np.ndarray, weight: np.ndarray, threshold: float
) -> tuple[int, float, float]:
    """Returns `Detections` at one threshold by the loop of the paper."""
    matches: dict[int, int] = {}
    for row in np.where(may_match & (iou > threshold), iou, 0):
        if row.max() > 0:
            matches[int(row.argmax())] = matches.get(int(row.argmax()), 0) + 1
    return (
        len(matches),
        sum(weight[k] for k in matches),
        sum(weight[k] * (n - 1) for k, n in matches.items()),
    )


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_detect_is_the_loop_and_does_not_see_the_order_of_predictions(seed):
    rng = np.random.default_rng(seed)
    iou, may_match, weight = rng.random((5, 4)), rng.random((5, 4)) < 0.7, rng.uniform(0.5, 2, 4)
    counts = detect(iou, may_match, weight, DETECTION_THRESHOLDS)
    expected = [
        by_loop(iou.astype(np.float32), may_match, weight, t)
        for t in np.float32(DETECTION_THRESHOLDS)
    ]
    for value, column in zip(counts, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(value, column, rtol=1e-6)
    order = rng.permutation(5)
    jax.tree.map(
        np.testing.assert_array_equal,
        counts,
        detect(iou[order], may_match[order], weight, DETECTION_THRESHOLDS),
    )


def test_an_iou_at_the_threshold_is_below_it():
    counts = detect(np.array([[0.5], [0.75]]), np.ones((2, 1), bool), np.ones(1), (0.5, 0.75, 0.95))
    assert counts.count.tolist() == [1, 0, 0] and counts.duplicate_weight.tolist() == [0, 0, 0]


RIGHT = f"{loc(*BOX)} cat ; {loc(*OTHER)} dog"


def test_each_duplicate_costs_three_tenths_and_each_box_its_share():
    texts = [
        RIGHT,
        f"{loc(*BOX)} cat",
        f"{RIGHT} ; {loc(*BOX)} cat",
        f"{RIGHT} ; {loc(0, 0, 9, 9)} cat",
        "",
    ]
    np.testing.assert_allclose(
        score_texts("detection", TWO, *texts), [1, 1 / 2, 1.7 / 3, 2 / 3, 0], rtol=1e-6
    )


def test_without_normalising_it_is_the_papers_sum():
    texts = [
        RIGHT,
        f"{loc(*BOX)} cat",
        f"{RIGHT} ; {loc(*BOX)} cat",
        f"{RIGHT} ; {loc(0, 0, 9, 9)} cat",
        "",
    ]
    counts = score_with_settings("detection", TWO, *texts, detection_normalise=False)
    np.testing.assert_allclose(counts, [2, 1, 1.7, 2, 0], rtol=1e-6)


def test_detection_is_the_share_of_thresholds_below_the_iou():
    one_box = TWO._replace(
        gold=TWO.gold._replace(
            boxes=TWO.gold.boxes._replace(valid=jnp.array([[True, False, False]]))
        )
    )
    texts = [
        f"{loc(BOX[0], BOX[1], BOX[2] - removed, BOX[3])} cat" for removed in (0, 22, 90, 130, 210)
    ]
    ious = np.array(score_texts("iou", one_box, *texts))
    reached = ious[:, None] > np.array(DETECTION_THRESHOLDS)
    np.testing.assert_allclose(
        score_texts("detection", one_box, *texts), reached.mean(axis=1), rtol=1e-6
    )
    counts = score_with_settings("detection", one_box, *texts, detection_as_released=True)
    np.testing.assert_allclose(counts, reached @ np.array(RELEASED_SHARES), rtol=1e-6)
    assert len(set(reached.sum(axis=1))) == 5
