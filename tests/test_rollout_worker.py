"""What a configured set of rewards becomes:

functions on the device, workers for text, and what has a say.
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
from pg_ground.training.reward_functions import (
    load_device_rewards,
    make_reward_workers,
    weighted_rewards,
)
from pg_ground.training.rollout_worker import text_question, texts_of
from pg_ground.types import Rewards, Rollout, UserError


@pytest.mark.parametrize("weights", [{}, {"iou": 0.0}, {"iou": (0.0, 0.0, 5), "format": 0.0}])
def test_rewards_without_a_weight_are_refused(weights):
    with pytest.raises(UserError, match="at least one needs a weight other than 0"):
        load_device_rewards(Grpo(rewards=weights))
    assert weighted_rewards(Grpo(rewards=weights, text_rewards={"count_exact": -1.0})) == {
        "count_exact"
    }


def test_a_weight_may_move_evenly_from_one_value_to_another():
    weights = {"iou": 1.0, "format": (1.0, 0.2, 4)}
    assert [weights_at(weights, step)["format"] for step in (0, 1, 2, 4, 9)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.2, 0.2]
    )
    assert weights_at(weights, 7)["iou"] == 1.0


def test_rewards_of_a_users_file_are_told_apart_by_their_parameters(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def wide(answer, batch, settings):\n    return jnp.ones(answer.finished.shape)\n"
        "def short(completion, example):\n    return -len(completion)\n"
    )
    c = Grpo(rewards={f"{file}:wide": 1.0, f"{file}:short": 0.5, "iou": 1.0})
    assert set(load_device_rewards(c)) == {f"{file}:wide", "iou"} and make_reward_workers(
        c
    ).names == (f"{file}:short",)


def test_a_users_device_reward_with_a_fault_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "def raises(answer, batch, settings):\n    raise KeyError('x')\n"
        "def flat(answer, batch, settings):\n    return jnp.ones(3)\n"
        "def infinite(answer, batch, settings):\n    return jnp.full(answer.finished.shape, "
        "jnp.inf)\n"
    )
    given = sampled([[0.0, 1.0]])
    rewards = load_device_rewards(
        Grpo(rewards={f"{file}:{name}": 1.0 for name in ("raises", "flat", "infinite")})
    )
    arguments = (given.answer, given.batch, Grpo().reward_settings)
    with pytest.raises(UserError, match=r"mine.py:raises failed: KeyError: 'x'"):
        rewards[f"{file}:raises"](*arguments)
    with pytest.raises(
        UserError, match=r"mine.py:flat has shape \[3\]: it must be \[B, G\], \[1, 2\]"
    ):
        rewards[f"{file}:flat"](*arguments)
    assert np.isnan(rewards[f"{file}:infinite"](*arguments)).all()


def sampled(totals: list[list[float]], first: int = 0) -> ScoredRollouts:
    """Returns groups with these rewards, numbered from `first` on in `index` and in their
    tokens."""
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
    kept = sampled([[1, 1], [0, 1], [0.1, 0.1], [np.nan, 0.3]])
    fresh = sampled([[0, 0], [0, 2], [5, 5], [3, 0]], first=10)
    found = jax.jit(refill)(kept, fresh)
    assert found.batch.index.tolist() == [11, 1, 13, 3]
    assert found.rollout.tokens[:, 0, 0].tolist() == [11, 1, 13, 3]
    np.testing.assert_allclose(found.rewards.total, [[0, 2], [0, 1], [3, 0], [np.nan, 0.3]])
    assert has_spread(found).tolist() == [True, True, True, False]
    again = jax.jit(refill)(found, sampled([[1, 1]] * 4, first=20))
    np.testing.assert_array_equal(again.rewards.total, found.rewards.total)


def test_defect_16_groups_are_kept_by_their_spread_and_not_by_their_mean():
    """RLLaVA keeps groups whose mean is inside (.01, .99):

    of rewards that are no probabilities it keeps what teaches nothing.
    """
    assert has_spread(sampled([[0.5, 0.5], [1.2, 1.2], [0.0, 0.005], [1.0, 1.4]])).tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_a_reward_is_named_once():
    with pytest.raises(
        UserError,
        match="count_graded is in config.grpo.rewards and in text_rewards: name it in one of them",
    ):
        load_device_rewards(Grpo(rewards={"count_graded": 1.0}, text_rewards={"count_graded": 1.0}))


def test_the_greedy_completion_is_taken_out_and_compared_with():
    given = sampled([[1, 0, 0.5], [0, 0, 0.25]])
    found = split_off_greedy(given.rollout, given.answer, given.rewards, given.batch)
    assert found.rollout.tokens.shape == (2, 2, 3) and found.baseline.tolist() == [0.5, 0.25]
    advantages = compute_advantages(found, None, {"iou": 1.0}, 0.0, ALGORITHMS["remax"]).advantages[
        ..., 0
    ]
    np.testing.assert_allclose(advantages, [[0.5, -0.5], [-0.25, -0.25]])


def test_a_penalty_in_the_reward_moves_advantages():
    given = sampled([[1.0, 0.0], [0.0, 1.0]])
    ref = (
        jnp.zeros(given.rollout.logps.shape).at[0, 0].set(-1.0)
    )  # the policy likes this one more than the reference: 3 nats
    row = ALGORITHMS["rloo"]
    found = compute_advantages(given, ref, {"iou": 1.0}, 0.1, row).advantages[..., 0]
    np.testing.assert_allclose(found, [[0.7, -0.7], [-1, 1]], rtol=1e-6)


def test_a_text_reward_sees_the_question_in_pixels_and_words():
    tokens = load()
    pixels = np.zeros((50, 100, 3), np.uint8)
    record = {"image": pixels, "phrase": "a cat", "box": [10, 20, 60, 45]}
    source = Source(uri="jsonl:x", boxes="box", label="phrase")
    data = Data(prompt_length=32, suffix_length=32, max_boxes=2)
    row = to_batch_row(to_example(record, source, "s", 7, 28, None), tokens, data, 3)
    batch = jax.tree.map(lambda leaf: np.asarray(leaf)[None], row)
    question = text_question(batch, 0, tokens)
    assert (
        question.prompt == "detect a cat"
        and question.target == "boxes"
        and question.labels == ("a cat",)
    )
    np.testing.assert_allclose(question.boxes, [[10, 20, 60, 45]], atol=1e-4)
    assert (
        question.size == (100, 50)
        and question.source == "3"
        and question.index == 7
        and question.points == ()
    )
    assert question.gold == tokens.decode(
        tokens.suffix("<loc0409><loc0102><loc0921><loc0614> a cat")
    )
    ids = np.zeros((1, 2, 9), np.int32)
    ids[0, 0, :4] = [*tokens.text("<loc0001> x")[:3], 1]
    completions, examples = texts_of(
        batch, Rollout(ids, ids > 0, np.zeros(ids.shape), ids > 0), tokens
    )
    assert (
        completions[0].startswith("<loc0001>")
        and completions[1] == ""
        and [e.length for e in examples] == [4, 0]
    )


def test_parts_of_a_batch_are_put_together_again_in_order():
    x = jnp.arange(12)
    np.testing.assert_array_equal(unsplit(split(x, 3)), x)
