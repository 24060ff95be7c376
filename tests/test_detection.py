"""The counting behind the detection reward: big_vision's own results, a loop that spells the paper out, and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_rewards import BOX, OTHER, TWO, alone, judge, loc

from pg_ground import boxes
from pg_ground.rewards.device_rewards import DETECTION_THRESHOLDS, DUPLICATE_WEIGHT, RELEASED_SHARES

detect = jax.jit(boxes.detect, static_argnums=3)

COORDINATE, CLASS = 3, 1004
"""Where coordinates 0..1000 and class 0 begin in big_vision's sequences of y1 x1 y2 x2 class confidence."""

KEPT = {"0.5": 0.5, "0.6": 0.6, "0.7": 0.7, "0.8": 0.85, "0.9": 0.95}
"""The thresholds that are left of the golden results: two or three share a first decimal, and the last one is kept."""


def read(sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes as fractions, classes and what is no padding."""
    groups = sequence.reshape(*sequence.shape[:-1], -1, 6)
    return (
        np.clip(groups[..., :4] - COORDINATE, 0, 1000) / 1000,
        groups[..., 4] - CLASS,
        groups[..., 5] > 0,
    )


def detections(
    golden, dtype: type, thresholds: tuple[float, ...], weight: np.ndarray
) -> boxes.Detections:
    """Returns what our count makes of the golden sequences, [3 images, 4 samples, N], with a weight for each class."""
    mine, mine_class, mine_used = read(golden["pred"])
    gold, gold_class, gold_used = (x[:, None] for x in read(golden["gt"]))
    iou = boxes.iou(
        jnp.asarray(mine[..., None, :], dtype), jnp.asarray(gold[..., None, :, :], dtype)
    )
    may_match = (
        (mine_class[..., None] == gold_class[..., None, :])
        & mine_used[..., None]
        & gold_used[..., None, :]
    )
    return detect(iou, jnp.asarray(may_match), jnp.asarray(weight[gold_class], dtype), thresholds)


@pytest.fixture(scope="module")
def released(golden) -> dict[str, np.ndarray]:
    with np.load(golden / "detection_reward.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def weight(released) -> np.ndarray:
    """Returns the weight of each of 80 classes, 0 for those that do not occur.

    The file does not have them. Its 60 rewards are linear in the weights of the 12 classes that occur, with coefficients from our
    count, so they are solved for by least squares: any other count than big_vision's would leave a rest.
    """
    with jax.enable_x64(True):
        one_by_one = [
            detections(released, np.float64, tuple(KEPT.values()), one) for one in np.eye(80)
        ]
        coefficients = np.stack(
            [(d.weight - DUPLICATE_WEIGHT * d.duplicate_weight).ravel() for d in one_by_one],
            axis=-1,
        )
    rewards = np.stack([released[f"result/reward-{key}"] for key in KEPT], axis=-1).ravel()
    found = np.linalg.lstsq(coefficients, rewards, rcond=None)[0]
    assert np.isclose(
        found[0], 0.164912, rtol=1e-5
    )  # persons, 30 % of COCO's boxes; the one class that is matched alone
    return found


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-6), (np.float32, 2e-6)])
def test_counts_and_rewards_equal_big_visions(released, weight, dtype, bound):
    """Its results are float32 sums of at most four weights near 1, known to a few 2^-22."""
    with jax.enable_x64(dtype is np.float64):
        at_kept, at_all = (
            detections(released, dtype, at, weight)
            for at in (tuple(KEPT.values()), DETECTION_THRESHOLDS)
        )
        reward, rewards = (
            d.weight - DUPLICATE_WEIGHT * d.duplicate_weight for d in (at_kept, at_all)
        )
        mean = {
            "result/reward": rewards @ jnp.array(RELEASED_SHARES),
            "result/num_matches": at_all.count @ jnp.array(RELEASED_SHARES),
            "result/nms_penalty": at_all.duplicate_weight @ jnp.array(RELEASED_SHARES),
        }
    assert reward.dtype == dtype
    for n, key in enumerate(KEPT):
        np.testing.assert_array_equal(at_kept.count[..., n], released[f"result/num_matches-{key}"])
        np.testing.assert_allclose(
            reward[..., n], released[f"result/reward-{key}"], rtol=0, atol=bound
        )
        np.testing.assert_allclose(
            at_kept.duplicate_weight[..., n],
            released[f"result/nms_penalty-{key}"],
            rtol=0,
            atol=bound,
        )
    for key, found in mean.items():
        np.testing.assert_allclose(found, released[key], rtol=0, atol=bound, err_msg=key)
    np.testing.assert_array_equal(released["reward"], released["result/reward"])


def test_the_released_mean_is_not_the_mean(released, weight):
    found = detections(released, np.float32, DETECTION_THRESHOLDS, weight)
    rewards = np.asarray(found.weight - DUPLICATE_WEIGHT * found.duplicate_weight)
    assert np.isclose(sum(RELEASED_SHARES), 1)
    assert np.abs(rewards.mean(axis=-1) - released["reward"]).max() > 0.2


def by_loop(
    iou: np.ndarray, may_match: np.ndarray, weight: np.ndarray, threshold: float
) -> tuple[int, float, float]:
    """Returns number, found and duplicates, as the paper tells it."""
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
    found = detect(iou, may_match, weight, DETECTION_THRESHOLDS)
    expected = [
        by_loop(iou.astype(np.float32), may_match, weight, t)
        for t in np.float32(DETECTION_THRESHOLDS)
    ]
    for value, column in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(value, column, rtol=1e-6)
    order = rng.permutation(5)
    jax.tree.map(
        np.testing.assert_array_equal,
        found,
        detect(iou[order], may_match[order], weight, DETECTION_THRESHOLDS),
    )


def test_an_iou_at_the_threshold_is_below_it():
    found = detect(np.array([[0.5], [0.75]]), np.ones((2, 1), bool), np.ones(1), (0.5, 0.75, 0.95))
    assert found.count.tolist() == [1, 0, 0] and found.duplicate_weight.tolist() == [0, 0, 0]


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
        judge("detection", TWO, *texts), [1, 1 / 2, 1.7 / 3, 2 / 3, 0], rtol=1e-6
    )


def test_without_normalising_it_is_the_papers_sum():
    texts = [
        RIGHT,
        f"{loc(*BOX)} cat",
        f"{RIGHT} ; {loc(*BOX)} cat",
        f"{RIGHT} ; {loc(0, 0, 9, 9)} cat",
        "",
    ]
    found = alone("detection", TWO, *texts, detection_normalise=False)
    np.testing.assert_allclose(found, [2, 1, 1.7, 2, 0], rtol=1e-6)


def test_detection_is_the_share_of_thresholds_below_the_iou():
    one = TWO._replace(
        gold=TWO.gold._replace(
            boxes=TWO.gold.boxes._replace(valid=jnp.array([[True, False, False]]))
        )
    )
    texts = [f"{loc(BOX[0], BOX[1], BOX[2] - cut, BOX[3])} cat" for cut in (0, 22, 90, 130, 210)]
    ious = np.array(judge("iou", one, *texts))
    reached = ious[:, None] > np.array(DETECTION_THRESHOLDS)
    np.testing.assert_allclose(judge("detection", one, *texts), reached.mean(axis=1), rtol=1e-6)
    found = alone("detection", one, *texts, detection_as_released=True)
    np.testing.assert_allclose(found, reached @ np.array(RELEASED_SHARES), rtol=1e-6)
    assert len(set(reached.sum(axis=1))) == 5
