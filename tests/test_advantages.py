"""Advantages are compared with TRL's, and obey their laws.

Everything runs in float64. The rounding of our sums is about 1e-12 there.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pg_ground.rl import advantages as estimators
from pg_ground.rl.advantages import ADVANTAGES, Scores, group_mean, group_std
from pg_ground.rl.options import options_of

FLOAT32 = 1.5 * 2**-24
"""TRL holds rewards in float32. The largest advantage in the comparison is 1.5."""
ROUNDING = 1e-12
NAN = math.nan


def on_totals(estimator):
    """Returns an estimator as a function of the total rewards alone."""
    return lambda rewards: estimator(Scores(rewards))


centred, standardised, leave_one_out = map(
    on_totals, (estimators.centred, estimators.standardised, estimators.leave_one_out)
)

KINDS = pytest.mark.parametrize("compare", [centred, standardised, leave_one_out])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rewards():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(5, 8)))


GOLDEN = [
    ("E1 one group G=4 r=[1,0,.5,.25] scale=group", standardised, [[1, 0, 0.5, 0.25]]),
    ("E1 scale=none (Dr.GRPO)", centred, [[1, 0, 0.5, 0.25]]),
    (
        "E2 two groups G=4 r=[1,0,0,0 | .9,.8,.7,.2] scale=group",
        standardised,
        [[1, 0, 0, 0], [0.9, 0.8, 0.7, 0.2]],
    ),
    ("E2 scale=none", centred, [[1, 0, 0, 0], [0.9, 0.8, 0.7, 0.2]]),
    (
        "E3 zero-variance group [1,1,1,1 | 0,1,0,1] scale=group",
        standardised,
        [[1, 1, 1, 1], [0, 1, 0, 1]],
    ),
    ("E4 unscorable (None->NaN) [1,NaN,0,.5] scale=group", standardised, [[1, NAN, 0, 0.5]]),
    (
        "E5 two rewards iou=[.9,.5,.1,0] fmt=[1,1,0,1] w=[1,.5] sum_then_normalize",
        standardised,
        [[1.4, 1.0, 0.1, 0.5]],
    ),
    ("E2 scale=batch", on_totals(estimators.batch_scaled), [[1, 0, 0, 0], [0.9, 0.8, 0.7, 0.2]]),
    ("[1,0,.5,.25] G=4", leave_one_out, [[1, 0, 0.5, 0.25]]),
    (
        "same, normalize_advantages",
        on_totals(estimators.leave_one_out_normalised),
        [[1, 0, 0.5, 0.25]],
    ),
    ("[1,0|.3,.8] G=2", leave_one_out, [[1, 0], [0.3, 0.8]]),
]


@pytest.mark.parametrize(("name", "compare", "rewards"), GOLDEN, ids=[name for name, *_ in GOLDEN])
def test_advantages_equal_trls(golden, name, compare, rewards):
    trl = json.loads((golden / "trl_losses.json").read_text())
    expected = (
        trl["rloo_advantages"]
        | {key: value["advantages"] for key, value in trl["advantages"].items()}
    )[name]
    advantages = compare(jnp.asarray(rewards, jnp.float64))
    np.testing.assert_allclose(advantages.ravel(), expected, rtol=0, atol=FLOAT32)


@KINDS
def test_group_advantages_sum_to_zero(rewards, compare):
    advantages = compare(rewards)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, rtol=0, atol=ROUNDING)
    assert (jnp.abs(advantages).max(axis=1) > 0.1).all()


@KINDS
def test_a_shift_of_the_rewards_changes_no_advantage(rewards, compare):
    shift = jnp.arange(5.0)[:, None]
    np.testing.assert_allclose(compare(rewards + shift), compare(rewards), rtol=0, atol=ROUNDING)


@KINDS
def test_a_group_does_not_change_another(rewards, compare):
    np.testing.assert_array_equal(compare(rewards)[1:3], compare(rewards[1:3]))


@KINDS
def test_advantages_rank_as_the_rewards_do(rewards, compare):
    np.testing.assert_array_equal(
        jnp.argsort(compare(rewards), axis=1), jnp.argsort(rewards, axis=1)
    )


@KINDS
def test_equal_rewards_have_advantage_0(compare):
    for value in (0.0, 0.25, -3.0):  # the mean of four of these values is exact
        assert not compare(jnp.full((2, 4), value)).any()


def test_the_scale_of_rewards_changes_standardised_advantages_only_by_epsilon(rewards):
    """A = c / (s + 1e-4), so (s + 1e-4)·A equals c for every scale.

    Centred advantages grow with the rewards.
    """
    for scale in (1.0, 100.0):
        np.testing.assert_allclose(
            standardised(scale * rewards) * (group_std(scale * rewards) + 1e-4),
            scale * centred(rewards),
            rtol=0,
            atol=1e-10,
        )
    spread = jnp.std(standardised(rewards), axis=1, ddof=1)
    np.testing.assert_allclose(
        spread, 1 - 1e-4 / (group_std(rewards)[:, 0] + 1e-4), rtol=0, atol=ROUNDING
    )


def test_leave_one_out_is_reward_minus_the_mean_of_the_others(rewards):
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / 7
    np.testing.assert_allclose(leave_one_out(rewards), rewards - others, rtol=0, atol=ROUNDING)


@KINDS
def test_completions_without_a_reward_get_0_and_leave_the_statistics(rewards, compare):
    """The other completions behave as a smaller group."""
    partial = jnp.concatenate([rewards[:, :6], jnp.full((5, 2), NAN)], axis=1)
    advantages = compare(partial)
    assert not advantages[:, 6:].any()
    np.testing.assert_allclose(advantages[:, :6], compare(rewards[:, :6]), rtol=0, atol=ROUNDING)


@KINDS
def test_a_group_with_at_most_one_reward_has_advantage_0(compare):
    advantages = compare(jnp.asarray([[NAN] * 4, [NAN, 0.7, NAN, NAN], [0.0, 1.0, NAN, NAN]]))
    assert not advantages[:2].any() and advantages[2, :2].all() and np.isfinite(advantages).all()


def test_mean_and_spread_equal_numpys(rewards):
    partial = rewards.at[0, 3].set(NAN).at[2, :4].set(NAN)
    np.testing.assert_allclose(
        group_mean(partial)[:, 0], np.nanmean(partial, axis=1), rtol=ROUNDING
    )
    np.testing.assert_allclose(
        group_std(partial)[:, 0], np.nanstd(partial, axis=1, ddof=1), rtol=ROUNDING
    )
    assert group_mean(jnp.full((1, 3), NAN)) == 0 and group_std(jnp.full((1, 3), NAN)) == 0


def test_gdpo_equals_trls(golden):
    expected = json.loads((golden / "trl_losses.json").read_text())["advantages"][
        "E5 normalize_then_sum (GDPO)"
    ]["advantages"]
    parts = {
        "iou": jnp.asarray([[0.9, 0.5, 0.1, 0.0]]),
        "format": jnp.asarray([[1.0, 1.0, 0.0, 1.0]]),
    }
    weights = {"iou": 1.0, "format": 0.5}
    total = sum(weights[name] * part for name, part in parts.items())
    advantages = estimators.normalised_then_summed(Scores(total, parts, weights))
    np.testing.assert_allclose(advantages.ravel(), expected, rtol=0, atol=FLOAT32)


SEEDS = {
    "standardised": ([1.317462, 0.146385, -1.024693, -0.439154], [0, 0]),
    "centred": ([0.5625, 0.0625, -0.4375, -0.1875], [0, 0]),
    "leave_one_out": ([0.75, 0.083333, -0.583333, -0.25], [0, 0]),
    "length_weighted": ([0.575, 0.075, -0.425, -0.175], [0, 0]),
    "upweighted": ([0.675, 0.075, -0.525, -0.225], [0, 0]),
    "best_of_group": ([1.171077, 0, 0, 0], [0, 0]),
    "whitened": ([1.671814, 0.364250, -0.943314, -0.289532], [-0.420288, -0.420288]),
    "centred_and_whitened": ([1.554480, 0.194310, -1.165860, -0.485775], [0.024289, 0.024289]),
    "greedy_baseline": ([0.7, 0.2, -0.3, -0.05], [-0.1, -0.1]),
}
"""The results of RLLaVA's estimators.

One group has four completions of 3, 2, 4 and 1 tokens. The other has two completions of 2 tokens.
The baseline of ReMax is 0.3.
"""


@pytest.mark.parametrize("name", SEEDS)
def test_estimators_equal_rllavas(name):
    total = jnp.asarray([[1.0, 0.5, 0.0, 0.25], [0.2, 0.2, NAN, NAN]])
    lengths = jnp.asarray([[3, 2, 4, 1], [2, 2, 7, 9]])
    reads_epsilon = "advantage_epsilon" in options_of(ADVANTAGES[name])
    options = {"advantage_epsilon": 1e-6} if reads_epsilon else {}
    advantages = ADVANTAGES[name](
        Scores(total, lengths=lengths, baseline=jnp.full(2, 0.3)), **options
    )
    np.testing.assert_allclose(advantages[0], SEEDS[name][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(advantages[1, :2], SEEDS[name][1], rtol=0, atol=1e-6)
    assert not advantages[1, 2:].any()


GROUP_ESTIMATORS = (
    "centred",
    "standardised",
    "batch_scaled",
    "leave_one_out",
    "best_of_group",
    "length_weighted",
    "upweighted",
)


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_equal_rewards_have_advantage_0_also_if_their_mean_is_rounded(name, dtype):
    rewards = (
        jnp.full((6, 7), 0.1, dtype).at[1:].set(jnp.linspace(0.11, 3.3, 5, dtype=dtype)[:, None])
    )
    rewards = rewards.at[5].set(jnp.arange(7, dtype=dtype))
    advantages = ADVANTAGES[name](Scores(rewards, lengths=jnp.arange(1, 8)))
    assert not advantages[:5].any() and advantages[5].any()


def test_remax_needs_the_greedy_completion():
    with pytest.raises(ValueError, match="greedy"):
        estimators.greedy_baseline(Scores(jnp.zeros((1, 2))))


def test_the_epsilon_is_a_setting():
    rewards = jnp.asarray([[0.0, 1e-4]])
    small, large = (
        estimators.standardised(Scores(rewards), advantage_epsilon=epsilon)
        for epsilon in (1e-8, 1.0)
    )
    assert small[0, 1] > 0.7 and large[0, 1] < 1e-4


def test_defect_17_a_single_reward_has_no_advantage():
    """RLLaVA gives a group of one its raw score.

    Here a group of one is a config error. If NaN leaves one reward, its advantage is 0.
    """
    rewards = jnp.asarray([[NAN, 0.7, NAN], [0.1, 0.5, 0.9]])
    for name in GROUP_ESTIMATORS:
        assert not ADVANTAGES[name](Scores(rewards)).any(axis=1)[0], name


def test_a_peers_defect_the_spread_is_the_sample_standard_deviation():
    """MaxText divides by the population's standard deviation.

    Its golden test has four equal completions, whose advantages are 0 in both cases.
    """
    rewards = jnp.asarray([[0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(standardised(rewards)[0, 3], 0.75 / (0.5 + 1e-4), rtol=ROUNDING)
