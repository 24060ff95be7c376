"""Configured rewards become functions on the device, or worker processes that read text.

Other tests here check weights, dynamic sampling, the baseline, and the examples of text rewards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import unlabelled

from pg_ground.config import Data, Grpo, Source
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.examples import to_example
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.rewards.reward_functions import (
    load_device_rewards,
    make_reward_workers,
    weighted_rewards,
)
from pg_ground.rewards.text_questions import text_question, texts_of
from pg_ground.rl.algorithms import ALGORITHMS
from pg_ground.rl.scored_rollouts import (
    ScoredRollouts,
    compute_advantages,
    has_spread,
    refill,
    split_off_greedy,
    weights_at,
)
from pg_ground.rl.update import split, unsplit
from pg_ground.tokenizer import load
from pg_ground.types import Rewards, Rollout, UserError


@pytest.mark.parametrize("weights", [{}, {"iou": 0.0}, {"iou": (0.0, 0.0, 5), "format": 0.0}])
def test_rewards_without_a_weight_are_refused(weights):
    with pytest.raises(UserError, match="at least one needs a weight other than 0"):
        load_device_rewards(Grpo(rewards=weights))
    assert weighted_rewards(Grpo(rewards=weights, text_rewards={"count_exact": -1.0})) == {
        "count_exact"
    }


def test_a_weight_may_move_linearly_from_one_value_to_another():
    weights = {"iou": 1.0, "format": (1.0, 0.2, 4)}
    assert [weights_at(weights, step)["format"] for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.2, 0.2]
    )
    assert weights_at(weights, 7)["iou"] == 1.0


def test_the_parameters_of_a_users_reward_decide_whether_it_runs_on_the_device(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def wide(answer, batch, settings):\n    return jnp.ones(answer.finished.shape)\n"
        "def short(completion, example):\n    return -len(completion)\n"
    )
    c = Grpo(rewards={f"{file}:wide": 1.0, f"{file}:short": 0.5, "iou": 1.0})
    assert set(load_device_rewards(c)) == {f"{file}:wide", "iou"}
    assert make_reward_workers(c).names == (f"{file}:short",)


def test_a_users_device_reward_with_a_fault_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def raises(answer, batch, settings):\n    raise KeyError('x')\n"
        "def flat(answer, batch, settings):\n    return jnp.ones(3)\n"
        "def infinite(answer, batch, settings):\n    return jnp.full(answer.finished.shape, "
        "jnp.inf)\n"
    )
    groups = scored_groups([[0.0, 1.0]])
    rewards = load_device_rewards(
        Grpo(rewards={f"{file}:{name}": 1.0 for name in ("raises", "flat", "infinite")})
    )
    arguments = (groups.answer, groups.batch, Grpo().reward_settings)
    with pytest.raises(UserError, match=r"mine.py:raises failed: KeyError: 'x'"):
        rewards[f"{file}:raises"](*arguments)
    with pytest.raises(
        UserError, match=r"mine.py:flat has shape \[3\]: it must be \[B, G\], \[1, 2\]"
    ):
        rewards[f"{file}:flat"](*arguments)
    assert np.isnan(rewards[f"{file}:infinite"](*arguments)).all()


def scored_groups(totals: list[list[float]], first: int = 0) -> ScoredRollouts:
    """Returns groups with these rewards. The index and the tokens of row i are `first` + i."""
    total = jnp.asarray(totals, jnp.float32)
    b, g = total.shape
    batch = unlabelled(
        jnp.zeros((b, 2, 2, 3)),
        jnp.zeros((b, 3), int),
        jnp.ones((b, 3), bool),
        jnp.zeros((b, 3), int),
        jnp.ones((b, 3), bool),
    )
    batch = batch._replace(index=first + jnp.arange(b))
    tokens = jnp.broadcast_to((first + jnp.arange(b))[:, None, None], (b, g, 3))
    mask = jnp.ones(tokens.shape, bool)
    rollout = Rollout(tokens, mask, jnp.zeros(tokens.shape), mask)
    answer = read_answer(tokens, rollout.mask, batch.gold.target, batch.gold.names, load().vocab)
    return ScoredRollouts(batch, rollout, answer, Rewards(total, {"iou": total}), None)


def test_groups_without_spread_are_replaced_in_order_and_the_others_stay():
    groups = scored_groups([[1, 1], [0, 1], [0.1, 0.1], [np.nan, 0.3]])
    fresh = scored_groups([[0, 0], [0, 2], [5, 5], [3, 0]], first=10)
    refilled = jax.jit(refill)(groups, fresh)
    assert refilled.batch.index.tolist() == [11, 1, 13, 3]
    assert refilled.rollout.tokens[:, 0, 0].tolist() == [11, 1, 13, 3]
    np.testing.assert_allclose(refilled.rewards.total, [[0, 2], [0, 1], [3, 0], [np.nan, 0.3]])
    assert has_spread(refilled).tolist() == [True, True, True, False]
    unchanged = jax.jit(refill)(refilled, scored_groups([[1, 1]] * 4, first=20))
    np.testing.assert_array_equal(unchanged.rewards.total, refilled.rewards.total)


def test_defect_16_the_spread_of_a_group_decides_and_not_its_mean():
    """RLLaVA keeps the groups whose mean is inside (.01, .99).

    If rewards are no probabilities, it keeps groups that teach nothing.
    """
    groups = scored_groups([[0.5, 0.5], [1.2, 1.2], [0.0, 0.005], [1.0, 1.4]])
    assert has_spread(groups).tolist() == [False, False, True, True]


def test_a_reward_is_named_once():
    with pytest.raises(
        UserError,
        match="count_graded is in config.grpo.rewards and in text_rewards: name it in one of them",
    ):
        load_device_rewards(Grpo(rewards={"count_graded": 1.0}, text_rewards={"count_graded": 1.0}))


@pytest.mark.slow
def test_the_greedy_completion_becomes_the_baseline():
    groups = scored_groups([[1, 0, 0.5], [0, 0, 0.25]])
    scored = split_off_greedy(groups.rollout, groups.answer, groups.rewards, groups.batch)
    assert scored.rollout.tokens.shape == (2, 2, 3)
    assert scored.baseline.tolist() == [0.5, 0.25]
    remax = ALGORITHMS["remax"]
    advantages = compute_advantages(scored, None, {"iou": 1.0}, 0.0, remax).advantages[..., 0]
    np.testing.assert_allclose(advantages, [[0.5, -0.5], [-0.25, -0.25]])


@pytest.mark.slow
def test_a_penalty_in_the_reward_moves_advantages():
    groups = scored_groups([[1.0, 0.0], [0.0, 1.0]])
    # The policy gives the first completion 3 nats more than the reference does.
    ref_logps = jnp.zeros(groups.rollout.logps.shape).at[0, 0].set(-1.0)
    rloo = ALGORITHMS["rloo"]
    advantages = compute_advantages(groups, ref_logps, {"iou": 1.0}, 0.1, rloo).advantages[..., 0]
    np.testing.assert_allclose(advantages, [[0.7, -0.7], [-1, 1]], rtol=1e-6)


def test_a_text_reward_sees_the_question_in_pixels_and_words():
    tokens = load()
    pixels = np.zeros((50, 100, 3), np.uint8)
    record = {"image": pixels, "phrase": "a cat", "box": [10, 20, 60, 45]}
    source = Source(uri="jsonl:x", boxes="box", label="phrase")
    data = Data(prompt_length=32, suffix_length=32, max_boxes=2)
    row = to_batch_row(to_example(record, source, "s", 7, 28, None), tokens, data, 3)
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], row)
    question = text_question(batch, 0, tokens)
    assert question.prompt == "detect a cat"
    assert question.target == "boxes"
    assert question.labels == ("a cat",)
    np.testing.assert_allclose(question.boxes, [[10, 20, 60, 45]], atol=1e-4)
    assert question.size == (100, 50)
    assert question.source == "3"
    assert question.index == 7
    assert question.points == ()
    assert question.gold == tokens.decode(
        tokens.suffix("<loc0409><loc0102><loc0921><loc0614> a cat")
    )
    ids = np.zeros((1, 2, 9), np.int32)
    ids[0, 0, :4] = [*tokens.text("<loc0001> x")[:3], 1]
    completions, examples = texts_of(
        batch, Rollout(ids, ids > 0, np.zeros(ids.shape), ids > 0), tokens
    )
    assert completions[0].startswith("<loc0001>")
    assert completions[1] == ""
    assert [example.length for example in examples] == [4, 0]


def test_unsplit_is_the_inverse_of_split():
    x = jnp.arange(12)
    np.testing.assert_array_equal(unsplit(split(x, 3)), x)
