"""Each row of `ALGORITHMS` has TRL's loss and gradient.

Other tests check rules of the policy loss and of the supervised target. Everything here runs in
float64, so the compared numbers alone set the bounds. TRL's numbers are printed to 8 decimals. Two
computations of ours differ by about 1e-12: each has a few hundred operations on values of order 1.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pg_ground.config import Grpo
from pg_ground.rl.algorithms import ALGORITHMS, CHOICES, Algorithm, make_algorithm
from pg_ground.rl.kl import k1, k2, k3
from pg_ground.rl.loss import completion_kl, policy_loss, target_logps
from pg_ground.rl.objectives import seq_mean_token_mean, seq_mean_token_sum_norm, token_mean
from pg_ground.rl.options import options_of
from pg_ground.rl.token_selection import TokenStatistics
from pg_ground.training.grpo import check_algorithm
from pg_ground.types import UserError
from pg_ground.vocab import LOC_TOKENS, vocab_of_size

PRINTED = 1e-8
"""Bound for a comparison with TRL's printed numbers."""
ROUNDING = 1e-12
"""Bound for a comparison of two computations of ours."""

ROWS = pytest.mark.parametrize("row", ALGORITHMS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def trl(golden):
    return json.loads((golden / "trl_losses.json").read_text())


def groups(rows, group_size: int) -> jax.Array:
    """Returns TRL's flat rows of completions as `[B, G, …]`."""
    rows = jnp.asarray(rows)
    return rows.reshape(-1, group_size, *rows.shape[1:])


def loss_and_gradient(trl_inputs: dict, row: Algorithm, group_size: int, budget: int = 0):
    """Returns the loss, its gradient by log-probability (flat rows) and the terms.

    `budget` is the number of slots of a completion. 0 means the slots of TRL's mask.
    """
    width = budget or len(trl_inputs["mask"][0])

    def padded(rows) -> jax.Array:
        return groups(
            np.pad(np.asarray(rows, float), ((0, 0), (0, width - len(rows[0])))), group_size
        )

    logps = padded(trl_inputs["logps"])
    ref = padded(trl_inputs["ref"])
    mask = padded(trl_inputs["mask"]) > 0
    old = logps if trl_inputs["old"] is None else padded(trl_inputs["old"])
    advantage = groups(trl_inputs["advantages"], group_size)[..., None]

    entropies = padded(trl_inputs["entropies"])
    selection = select(row, logps, entropies, advantage, mask)

    def loss(logps):
        terms = policy_loss(
            logps, old, ref if row.kl_coef else None, advantage, mask, row, selection
        )
        bonus = row.entropy_coef * jnp.sum(entropies * mask) / mask.sum()
        return jnp.sum(terms.loss * row.loss_agg_mode(mask)) - bonus, terms

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(logps)
    assert gradient.dtype == jnp.float64
    return value, gradient.reshape(-1, width)[:, : len(trl_inputs["mask"][0])], terms


def make_row(row: str, **changes) -> Algorithm:
    """Returns a row with `changes`. The row has no KL term, because TRL's default has none."""
    return ALGORITHMS[row].override(**{"kl_coef": 0.0, **changes})


def select(row: Algorithm, logps, entropies, advantage, mask):
    """Returns the token selection of a row; None if it has none."""
    if row.token_selection is None:
        return None
    tokens = TokenStatistics(logps, entropies, advantage, mask, jax.random.key(0))
    return row.token_selection(tokens, **row.options_for("token_selection"))


def algorithm_of(settings: Grpo) -> Algorithm:
    """Returns the algorithm of a config section, checked as the stage checks it."""
    row = make_algorithm(settings.algorithm, settings.algorithm_overrides)
    check_algorithm(row, settings)
    return row


GOLDEN = [
    ("grpo", make_row("grpo")),
    ("dr_grpo (L=8)", make_row("dr_grpo")),
    ("dapo (default)", make_row("dapo", clip_high=0.2)),
    ("dapo clip-higher eps_high=.28", make_row("dapo")),
    ("gspo = grpo + sequence IS, eps 3e-4/4e-4", make_row("gspo")),
    ("gspo = grpo + sequence IS, eps .2", make_row("gspo", clip_low=0.2, clip_high=0.2)),
    ("rloo_loss (advantages as given)", make_row("rloo")),
    ("grpo + k3 KL beta=.04, IS-weighted (TRL>=1.x default)", ALGORITHMS["grpo"]),
    (
        "grpo + k3 KL beta=.04, plain k3 (use_bias_correction_kl=False)",
        ALGORITHMS["grpo"]._replace(kl_estimator=k3),
    ),
    ("bnpo", make_row("dapo", clip_high=0.2)),
    ("dapo two-sided delta=4 (INTELLECT-2)", make_row("two_sided")),
    ("luspo = sequence IS", make_row("luspo")),
    ("gmpo eps=.4/.4", make_row("gmpo")),
    ("cispo eps_high=5 (ScaleRL)", make_row("cispo")),
    ("cispo eps_high=.2 (config default!)", make_row("cispo", clip_high=0.2)),
    ("sapo 1.05/1.0", make_row("sapo")),
    ("vespo", make_row("vespo")),
    (
        "dapo + top_entropy_quantile=.5",
        make_row("top_entropy", clip_high=0.2, token_selection_share=0.5),
    ),
    ("dapo + off_policy_mask_threshold=.1", make_row("dapo", clip_high=0.2, off_policy_kl=0.1)),
    ("dapo + entropy_coef=.01", make_row("dapo", clip_high=0.2, entropy_coef=0.01)),
]


@pytest.mark.parametrize("inputs", ["A", "B"])
@pytest.mark.parametrize(("name", "row"), GOLDEN, ids=[name for name, _ in GOLDEN])
def test_loss_and_gradient_equal_trl(trl, name, row, inputs):
    expected = (trl["loss"] | trl)[name][inputs]
    trl_inputs = trl["inputs"][inputs]
    group_size = {"A": 4, "B": 2}[inputs]
    value, gradient, terms = loss_and_gradient(
        trl_inputs, row, group_size, budget=8 if "L=8" in name else 0
    )
    # TRL keeps SAPO's temperatures in float32.
    bound = 1e-7 if name.startswith("sapo") else PRINTED
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=bound)
    np.testing.assert_allclose(gradient, expected["dloss_dlogps"], rtol=0, atol=bound)
    if (
        "clip_ratio/region_mean" in expected.get("metrics", {})
        and row.ratio is ALGORITHMS["grpo"].ratio
        and row.token_selection is None
    ):
        mask = groups(trl_inputs["mask"], group_size)
        share = jnp.sum(terms.clipped[..., : mask.shape[2]] * mask) / mask.sum()
        np.testing.assert_allclose(
            share, expected["metrics"]["clip_ratio/region_mean"], rtol=0, atol=PRINTED
        )


def test_every_loss_of_trl_has_a_row(trl):
    assert {name for name, _ in GOLDEN} >= trl["loss"].keys()


@pytest.mark.parametrize(
    "name",
    ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "token_mask cmin=.5"],
)
def test_importance_sampling_corrections_equal_trls(trl, name):
    expected = trl["tis"][name]
    old, sampling, mask = (groups(trl["tis"][key], 2) for key in ("old", "sampling", "mask"))
    mask = mask > 0
    row = make_row(
        "dapo",
        clip_high=0.2,
        importance_sampling_mode=CHOICES["importance_sampling_mode"][name.split()[0]],
        importance_sampling_floor=0.5 * ("cmin" in name),
    )
    batch = trl["inputs"]["B"]
    terms = policy_loss(
        groups(batch["logps"], 2),
        old,
        None,
        groups(batch["advantages"], 2)[..., None],
        mask,
        row,
        None,
        sampling,
    )
    ratio = jnp.broadcast_to(groups(expected["ratio"], 2), mask.shape)
    np.testing.assert_allclose(terms.weight * mask, ratio * mask, rtol=0, atol=PRINTED)
    if "dapo_loss" in expected:
        np.testing.assert_allclose(
            jnp.sum(terms.loss * token_mean(mask)), expected["dapo_loss"], rtol=0, atol=PRINTED
        )


RLLAVA_INPUTS = {
    "old": [[-1.0, -1.0, -1.0], [-0.5, -2.0, -1.0]],
    "logps": [[-0.7, -1.5, -1.0], [-0.4, -0.5, -1.0]],
    "mask": [[1, 1, 1], [1, 1, 0]],
    "advantages": [1.0, -1.0],
    "ref": [[0.0] * 3] * 2,
    "entropies": [[0.0] * 3] * 2,
}
RLLAVA_LOSSES = {
    "vanilla, token-mean": (make_row("dual_clip"), 0.259728),
    "vanilla, seq-mean-token-sum": (
        make_row("dual_clip", loss_agg_mode=CHOICES["loss_agg_mode"]["seq_mean_token_sum"]),
        0.649320,
    ),
    "vanilla, seq-mean-token-mean": (
        make_row("dual_clip", loss_agg_mode=seq_mean_token_mean),
        0.558538,
    ),
    "clip .2/.28, c 10": (make_row("dapo", ratio_cap=10.0), 0.540066),
    "gspo": (make_row("gspo"), 0.645017),
    "gpg": (make_row("gpg"), 0.46),
    "kl_cov": (make_row("kl_cov"), 0.532094),
}


@pytest.mark.parametrize("name", RLLAVA_LOSSES)
def test_losses_equal_rllavas(name):
    row, expected = RLLAVA_LOSSES[name]
    value, *_ = loss_and_gradient(RLLAVA_INPUTS, row, 2)
    if name == "kl_cov":
        # RLLaVA's coefficient of |log-ratio| is 0.1; ours is 1. The selection has one of 5 tokens.
        # The |log-ratio| of this token is 0.3.
        value = value - 0.9 * 0.3 / 5
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["top_entropy", "clip_cov", "kl_cov"])
def test_a_token_selection_has_no_gradient_without_advantage(random_batch, name):
    """The gradient is 0 at ratio 1, the ratio of the first update.

    |log-ratio| has a kink at ratio 1. jnp.abs has the gradient 1 at the kink.
    """
    logps, _, _, advantage, mask = random_batch
    row = make_row(name, token_selection_share=1.0)
    selection = select(row, logps, -logps, advantage, mask)

    def loss(logps):
        old = jax.lax.stop_gradient(logps)
        return jnp.sum(
            policy_loss(logps, old, None, 0 * advantage, mask, row, selection).loss
            * row.loss_agg_mode(mask)
        )

    assert not jax.grad(loss)(logps).any()


CANCELLING = {
    "kl_target steers kl_coef, which is 0": {"algorithm": "dapo", "kl_target": 0.01},
    "kl_estimator is k1, whose gradient": {"kl_estimator": "k1"},
    "kl_in_reward has no effect": {"algorithm": "gdpo", "kl_coef": 0.1, "kl_in_reward": True},
    "clip_high is 0.5: cispo needs a value at least 1": {"objective": "cispo", "clip_high": 0.5},
    "importance_sampling_mode multiplies": {
        "algorithm": "vespo",
        "importance_sampling_mode": "token_mask",
    },
    "importance_sampling_floor is above": {
        "importance_sampling_mode": "token_mask",
        "importance_sampling_floor": 5.0,
    },
    "ratio_cap is 0.5: ppo_clip needs a value at least 1": {"ratio_cap": 0.5},
    "dynamic_sampling looks at the spread": {"algorithm": "remax", "dynamic_sampling": 1},
    "kl_horizon is too short": {"kl_target": 0.1, "kl_horizon": 10},
}


@pytest.mark.parametrize("message", CANCELLING)
def test_choices_that_cancel_each_other_are_refused(message):
    with pytest.raises(UserError, match=f"config.grpo.{message}"):
        algorithm_of(Grpo(**CANCELLING[message]))


UNREAD = {
    "clip_high has no effect on sapo: it is read if objective is one of": {
        "algorithm": "sapo",
        "clip_high": 0.3,
    },
    "clip_low has no effect on cispo": {"algorithm": "cispo", "clip_low": 0.3},
    "ratio_cap has no effect on opo": {"algorithm": "opo", "ratio_cap": 3.0},
    "token_selection_share has no effect on grpo": {"token_selection_share": 0.5},
    "importance_sampling_cap has no effect on grpo": {"importance_sampling_cap": 2.0},
}


@pytest.mark.parametrize("message", UNREAD)
def test_an_option_that_the_algorithm_does_not_read_is_refused(message):
    with pytest.raises(UserError, match=f"config.grpo.{message}"):
        algorithm_of(Grpo(**UNREAD[message]))


def test_clip_cov_drops_random_tokens_of_high_covariance():
    rng = np.random.default_rng(0)
    logps = jnp.asarray(rng.normal(size=(8, 8, 40)))
    advantage = jnp.asarray(rng.normal(size=(8, 8)))
    mask = jnp.asarray(rng.uniform(size=logps.shape) < 0.8)
    key = jax.random.key(0)
    tokens = TokenStatistics(logps, jnp.zeros_like(logps), advantage[..., None], mask, key)
    clip_cov = CHOICES["token_selection"]["clip_cov"]
    dropped = clip_cov(tokens, token_selection_share=0.01).factor == 0
    token_advantages = np.asarray(jnp.broadcast_to(advantage[..., None], logps.shape))
    token_logps = np.asarray(logps)
    is_token = np.asarray(mask)
    covariance = (token_advantages - token_advantages[is_token].mean()) * (
        token_logps - token_logps[is_token].mean()
    )
    assert (
        dropped.sum() == int(0.01 * is_token.sum())
        and covariance[dropped].min() > 1
        and covariance[dropped].max() < 5
    )
    assert is_token[dropped].all()
    other_tokens = tokens._replace(key=jax.random.key(1))
    other = clip_cov(other_tokens, token_selection_share=0.01).factor == 0
    assert (other != dropped).any() and other.sum() == dropped.sum()


@pytest.mark.parametrize("name", ["k1", "k2"])
def test_kl_estimates_equal_trls(trl, name):
    batch = trl["inputs"]["B"]
    gap = jnp.asarray(batch["logps"]) - jnp.asarray(batch["ref"])
    key = next(key for key in trl["kl_B"] if key.startswith(name))
    expected = jnp.asarray(trl["kl_B"][key])
    mask = jnp.asarray(batch["mask"])
    np.testing.assert_allclose(
        {"k1": k1, "k2": k2}[name](gap, jnp.ones_like(gap)) * mask,
        expected * mask,
        rtol=0,
        atol=ROUNDING,
    )


def test_kl_estimates_equal_rllavas():
    gap = jnp.asarray([0.3, -0.5, 0.1, 1.5])
    np.testing.assert_allclose(
        k3(gap, jnp.ones_like(gap)), [0.040818, 0.148721, 0.004837, 0.72313], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        k2(gap, jnp.ones_like(gap)), [0.045, 0.125, 0.005, 1.125], rtol=0, atol=ROUNDING
    )


@pytest.mark.parametrize("name", ["k1+", "k3+", "absolute+"])
def test_straight_through_has_the_value_of_one_estimate_and_the_gradient_of_k2(name):
    gap = jnp.asarray([0.3, -0.5, 0.1, 1.5])
    straight_through = CHOICES["kl_estimator"][name]
    estimator = CHOICES["kl_estimator"][name[:-1]]
    np.testing.assert_allclose(
        straight_through(gap, jnp.ones_like(gap)),
        estimator(gap, jnp.ones_like(gap)),
        rtol=0,
        atol=ROUNDING,
    )
    np.testing.assert_allclose(
        jax.grad(lambda g: straight_through(g, jnp.ones_like(g)).sum())(gap),
        gap,
        rtol=0,
        atol=ROUNDING,
    )


def test_a_penalty_in_the_reward_is_the_summed_gap(random_batch):
    logps, _, ref, _, mask = random_batch
    penalty = completion_kl(logps, ref, mask, ALGORITHMS["rloo"])
    np.testing.assert_allclose(
        penalty, jnp.sum((logps - ref) * mask, axis=-1), rtol=0, atol=ROUNDING
    )
    row = ALGORITHMS["rloo"]._replace(kl_coef=0.1)
    arguments = (logps, logps, ref, jnp.zeros((*mask.shape[:2], 1)), mask)
    assert (
        not policy_loss(*arguments, row).loss.any()
        and policy_loss(*arguments, row._replace(kl_in_reward=False)).loss.any()
    )


def test_kl_estimate_equals_trls_k3(trl):
    trl_inputs = trl["inputs"]["B"]
    _, _, terms = loss_and_gradient(trl_inputs, ALGORITHMS["grpo"], 2)
    mask = groups(trl_inputs["mask"], 2)
    expected = groups(trl["kl_B"]["k3=exp(ref-lp)-(ref-lp)-1"], 2)
    np.testing.assert_allclose(terms.kl * mask, expected * mask, rtol=0, atol=ROUNDING)


@pytest.fixture
def random_batch():
    """Returns log-probabilities of three similar policies, advantages and a mask.

    There are 3 prompts × 4 completions × 5 tokens. Completions have 1 to 5 tokens in the mask.
    """
    rng = np.random.default_rng(0)
    old = jnp.asarray(np.log(rng.uniform(0.05, 0.95, (3, 4, 5))))
    logps, ref = (old + 0.3 * jnp.asarray(rng.normal(size=old.shape)) for _ in range(2))
    advantage = jnp.asarray(rng.normal(size=(3, 4, 1)))
    mask = jnp.arange(5) < jnp.asarray(rng.integers(1, 6, (3, 4)))[..., None]
    return logps, old, ref, advantage, mask


def gradient_of(row: Algorithm, logps, old, ref, advantage, mask) -> jax.Array:
    """Returns the gradient of the whole loss by each log-probability."""

    def loss(logps):
        return jnp.sum(
            policy_loss(logps, old, ref, advantage, mask, row).loss * row.loss_agg_mode(mask)
        )

    return jax.grad(loss)(logps)


@ROWS
def test_masked_tokens_have_no_gradient_and_do_not_change_the_others(random_batch, row):
    logps, old, ref, advantage, mask = random_batch
    row = ALGORITHMS[row]._replace(kl_coef=0.1)
    gradient = gradient_of(row, logps, old, ref, advantage, mask)
    assert not np.asarray(gradient)[~np.asarray(mask)].any()
    assert np.asarray(gradient)[np.asarray(mask)].any()
    other = jnp.where(mask, logps, -7.0)
    np.testing.assert_array_equal(gradient_of(row, other, old, ref, advantage, mask), gradient)


@ROWS
def test_on_policy_gradient_is_reinforce(random_batch, row):
    """The gradient is −A·∇logp, with the weights of the row's loss aggregation.

    A token has its own weight, or the summed weight of its completion.
    """
    logps, _, _, advantage, mask = random_batch
    row = make_row(row)
    gradient = gradient_of(row, logps, logps, None, advantage, mask)
    weights = row.loss_agg_mode(mask)
    if row.objective.__name__ == "ppo_clip" and row.ratio is ALGORITHMS["rloo"].ratio:
        # A completion is one action: each token moves all of its probability.
        weights = mask * weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, -advantage * weights, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "row",
    [name for name, row in ALGORITHMS.items() if row.objective.__name__ in ("ppo_clip", "gmpo")],
)
def test_on_policy_loss_is_minus_the_averaged_advantage(random_batch, row):
    logps, _, _, advantage, mask = random_batch
    terms = policy_loss(logps, logps, None, advantage, mask, make_row(row))
    np.testing.assert_allclose(
        terms.loss, jnp.broadcast_to(-advantage, terms.loss.shape), rtol=0, atol=ROUNDING
    )
    assert not terms.clipped.any() and not terms.kl.any()


@pytest.mark.parametrize("row", ["grpo", "dr_grpo", "dapo"])
def test_clipped_tokens_are_the_tokens_without_gradient(random_batch, row):
    logps, old, _, advantage, mask = random_batch
    gradient = gradient_of(make_row(row), logps, old, None, advantage, mask)
    clipped = policy_loss(logps, old, None, advantage, mask, make_row(row)).clipped
    np.testing.assert_array_equal((gradient == 0) & mask, clipped & mask)
    assert 0 < int((clipped & mask).sum()) < int(mask.sum())


@pytest.mark.parametrize(("row", "shared"), [("gspo", True), ("rloo", True), ("grpo", False)])
def test_completion_ratios_clip_whole_completions(random_batch, row, shared):
    logps, old, _, advantage, mask = random_batch
    clipped = np.asarray(policy_loss(logps, old, None, advantage, mask, make_row(row)).clipped)
    assert (clipped == clipped[..., :1]).all() == shared and clipped.any()


def test_the_clip_stops_only_ratios_that_move_away_from_1(random_batch):
    """A ratio outside the range is clipped only if its advantage pushes it further out.

    This rule is PPO's pessimistic minimum.
    """
    logps, old, _, advantage, mask = random_batch
    ratio = jnp.exp(logps - old)
    clipped = policy_loss(logps, old, None, advantage, mask, make_row("grpo")).clipped
    too_high = (ratio > 1.2) & (advantage > 0)
    too_low = (ratio < 0.8) & (advantage < 0)
    np.testing.assert_array_equal(clipped, too_high | too_low)


def test_gspo_ratio_is_the_geometric_mean_and_rloo_the_product(random_batch):
    logps, old, _, _, mask = random_batch
    ratios = jnp.where(mask, jnp.exp(logps - old), 1.0)
    for row, expected in (
        ("gspo", jnp.prod(ratios, -1) ** (1 / mask.sum(-1))),
        ("rloo", jnp.prod(ratios, -1)),
    ):
        ratio = jnp.exp(ALGORITHMS[row].ratio(logps - old, mask))
        np.testing.assert_allclose(
            ratio, jnp.broadcast_to(expected[..., None], ratio.shape), rtol=ROUNDING
        )


@ROWS
def test_completions_without_advantage_have_no_gradient(random_batch, row):
    logps, old, _, advantage, mask = random_batch
    gradient = gradient_of(make_row(row), logps, old, None, advantage.at[1].set(0), mask)
    assert not gradient[1].any() and gradient[0].any()


@ROWS
def test_the_loss_of_an_enormous_ratio_is_finite(random_batch, row):
    """An exp in float32 overflows at 89. The summed log-ratio of a long completion reaches 89."""
    logps, _, ref, advantage, mask = (
        x.astype(jnp.float32) if x.dtype == jnp.float64 else x for x in random_batch
    )
    for shift in (-200.0, 200.0):
        terms = policy_loss(
            logps + shift, logps, ref, advantage, mask, ALGORITHMS[row]._replace(kl_coef=0.1)
        )
        assert (
            terms.loss.dtype == jnp.float32
            and np.isfinite(terms.loss).all()
            and np.isfinite(terms.kl).all()
        )


def test_k3_is_positive_and_0_only_at_the_reference(random_batch):
    logps, old, ref, advantage, mask = random_batch
    kl = policy_loss(logps, old, ref, advantage, mask, ALGORITHMS["grpo"]).kl
    assert (kl > 0).all()
    assert not policy_loss(logps, old, logps, advantage, mask, ALGORITHMS["grpo"]).kl.any()


@pytest.mark.parametrize("corrected", [True, False])
def test_corrected_k3_has_the_gradient_of_the_kl(corrected):
    """The expected gradient of corrected k3 over on-policy tokens is the gradient of the KL.

    The expectation is computed over a whole vocabulary of 7. Plain k3 has another gradient.
    """
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=7))
    ref_logps = jax.nn.log_softmax(jnp.asarray(rng.normal(size=7)))
    row = make_row("grpo", kl_coef=1.0, **({} if corrected else {"kl_estimator": k3}))
    probabilities = jnp.exp(jax.nn.log_softmax(logits))

    def expected_penalty(logits):
        logps = jax.nn.log_softmax(logits)[None, None]
        old = jax.lax.stop_gradient(logps)
        ref = ref_logps[None, None]
        terms = policy_loss(logps, old, ref, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 7), bool), row)
        return jnp.sum(probabilities * terms.loss[0, 0])

    def kl(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - ref_logps))

    np.testing.assert_allclose(expected_penalty(logits), kl(logits), rtol=0, atol=ROUNDING)
    error = np.abs(jax.grad(expected_penalty)(logits) - jax.grad(kl)(logits)).max()
    assert error < ROUNDING if corrected else error > 0.01


def test_each_loss_aggregation_has_the_weights_of_its_name(random_batch):
    *_, mask = random_batch
    mask = mask.at[2, 3].set(False)  # a completion may have no token
    assert (mask.sum(axis=-1) == 0).sum() == 1
    per_completion = seq_mean_token_mean(mask).sum(axis=-1)
    np.testing.assert_allclose(
        per_completion, jnp.where(mask.any(axis=-1), 1 / 12, 0), rtol=ROUNDING
    )
    np.testing.assert_allclose(token_mean(mask), mask / mask.sum(), rtol=ROUNDING)
    np.testing.assert_allclose(seq_mean_token_sum_norm(mask), mask / (3 * 4 * 5), rtol=ROUNDING)
    for aggregation in (seq_mean_token_mean, token_mean, seq_mean_token_sum_norm):
        assert not aggregation(jnp.zeros_like(mask)).any()


def test_a_users_setting_replaces_the_number_of_the_row():
    assert algorithm_of(Grpo(algorithm="dapo")) == ALGORITHMS["dapo"]
    changed = algorithm_of(Grpo(algorithm="dapo", clip_high=0.5, kl_coef=0.0))
    assert changed == ALGORITHMS["dapo"].override(clip_high=0.5, kl_coef=0.0)
    # 0 is a value. None means absent.
    assert algorithm_of(Grpo(algorithm="grpo", kl_coef=0.0)).kl_coef == 0.0
    assert algorithm_of(Grpo(algorithm="grpo", clip_low=0.1)).option("clip_low") == 0.1


def test_the_error_for_an_unknown_algorithm_names_the_nearest():
    with pytest.raises(
        UserError, match=r"config\.grpo\.algorithm 'dr_grop' does not exist: did you mean dr_grpo\?"
    ):
        algorithm_of(Grpo(algorithm="dr_grop"))


@ROWS
def test_defect_13_every_token_of_the_policy_has_a_gradient_and_no_other_token(row):
    """The mask of a transcript is False at the answers of tools. All other tokens are trained.

    RLLaVA trains the last turn alone.
    """
    row = make_row(row, token_selection=None)
    key, _ = jax.random.split(jax.random.key(0))
    logps = -jax.random.uniform(key, (2, 2, 8), jnp.float64, 0.1, 3.0)
    advantage = jnp.array([[[1.0], [-1.0]], [[0.5], [-0.5]]], jnp.float64)
    is_policy_token = jnp.broadcast_to(jnp.array([1, 1, 0, 0, 1, 1, 0, 1]) > 0, logps.shape)

    def loss(logps, tool_logp):
        all_logps = jnp.where(is_policy_token, logps, tool_logp)
        old = jax.lax.stop_gradient(all_logps)
        return jnp.sum(
            policy_loss(all_logps, old, None, advantage, is_policy_token, row, None).loss
            * row.loss_agg_mode(is_policy_token)
        )

    value, gradient = jax.value_and_grad(loss)(logps, -1.0)
    np.testing.assert_array_equal(gradient != 0, is_policy_token)
    assert loss(logps, -2.5) == value


def test_defect_14_an_unknown_estimator_is_refused():
    """RLLaVA lists gae and srft. One cannot run. The other computes another loss, without an
    error."""
    for name in ("gae", "srft", "ppo"):
        with pytest.raises(UserError, match=f"config.grpo.algorithm {name!r} does not exist"):
            algorithm_of(Grpo(algorithm=name))
        with pytest.raises(UserError, match=f"config.grpo.advantage {name!r} does not exist"):
            algorithm_of(Grpo(advantage=name))


def test_a_peers_defect_the_cap_of_cispo_is_not_the_width_of_an_interval(random_batch):
    """TRL's default cap is 0.2, the width of a clip interval around 1. Our cap is 5.

    As a cap, 0.2 multiplies every on-policy loss by a fifth.
    """
    logps, _, _, advantage, mask = random_batch
    terms = policy_loss(logps, logps, None, advantage, mask, ALGORITHMS["cispo"])
    np.testing.assert_allclose(terms.loss, -advantage * logps, rtol=ROUNDING)


def test_a_peers_defect_no_row_with_a_penalty_in_the_loss_uses_k1():
    """Tunix has k1 in the loss. The expected on-policy gradient of k1 is 0.

    Our rows have k1 in rewards only.
    """
    for name, row in ALGORITHMS.items():
        assert row.kl_estimator is not k1 or row.kl_in_reward, name


@ROWS
def test_advantages_of_tokens_equal_advantages_of_completions_if_all_are_equal(random_batch, row):
    """[B, G, T] advantages with one value per completion give the same gradient as [B, G, 1]."""
    logps, old, ref, advantage, mask = random_batch
    per_token = jnp.broadcast_to(advantage, logps.shape)
    row = ALGORITHMS[row]
    np.testing.assert_allclose(
        gradient_of(row, logps, old, ref, per_token, mask),
        gradient_of(row, logps, old, ref, advantage, mask),
        rtol=0,
        atol=ROUNDING,
    )


def test_each_token_learns_from_its_own_advantage(random_batch):
    logps, _, _, _, mask = random_batch
    per_token = jnp.asarray(np.random.default_rng(1).normal(size=logps.shape))
    gradient = gradient_of(make_row("grpo"), logps, logps, None, per_token, mask)
    weights = seq_mean_token_mean(mask)
    np.testing.assert_allclose(gradient, -per_token * weights, rtol=0, atol=ROUNDING)


USERS_ALGORITHM = """
import jax.numpy as jnp
from pg_ground.rl.algorithms import ALGORITHMS
from pg_ground.rl.objectives import token_mean

def squared(log_ratio, logps, advantages, mask, *, pull: float = 2.0):
    return pull * jnp.square(log_ratio) - advantages * logps, jnp.zeros_like(mask)

my_row = ALGORITHMS["grpo"]._replace(objective=squared, loss_agg_mode=token_mean)
my_row = my_row._replace(kl_coef=0.0, options={"pull": 3.0})
short = ALGORITHMS["grpo"]._replace(objective=lambda log_ratio, logps: log_ratio)
number = 3
misspelt = my_row._replace(options={"pul": 3.0})

def named(log_ratio, logps, advantages, mask, *, form: str = "square", pull):
    return pull * log_ratio, jnp.zeros_like(mask)

with_text = my_row._replace(objective=named, options={"form": "cube", "pull": 1.0})
without_value = my_row._replace(objective=named, options={})
"""


@pytest.fixture
def users_file(tmp_path):
    (tmp_path / "mine.py").write_text(USERS_ALGORITHM)
    return tmp_path / "mine.py"


def test_a_row_of_a_users_file_is_an_algorithm(users_file, random_batch):
    logps, old, _, advantage, mask = random_batch
    row = algorithm_of(Grpo(algorithm=f"{users_file}:my_row"))
    terms = policy_loss(logps, old, None, advantage, mask, row)
    expected = 3.0 * jnp.square(logps - old) - advantage * logps
    np.testing.assert_allclose(terms.loss, expected, rtol=0, atol=ROUNDING)
    changed = algorithm_of(
        Grpo(algorithm=f"{users_file}:my_row", loss_agg_mode="seq_mean_token_mean")
    )
    assert changed.loss_agg_mode is seq_mean_token_mean and changed.options == {"pull": 3.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:my_rwo", "has no my_rwo: did you mean my_row"),
        ("mine.py:number", "is a int: it must be a pg_ground.rl.algorithms.Algorithm"),
        ("mine.py:short", "objective takes 2 positional arguments, but the loss passes 4"),
        ("other.py:my_row", "there is no file"),
        ("mine.py:misspelt", "no component of the row reads the option pul: did you mean pull"),
        ("mine.py:without_value", "the option pull has no default: set it in options"),
    ],
)
def test_a_users_row_that_cannot_be_used_is_refused(users_file, name, message):
    with pytest.raises(UserError, match=message):
        algorithm_of(Grpo(algorithm=f"{users_file.parent}/{name}"))


def test_an_option_of_a_users_component_need_not_be_a_number(users_file):
    row = algorithm_of(Grpo(algorithm=f"{users_file}:with_text"))
    assert row.options == {"form": "cube", "pull": 1.0}


def test_an_option_is_a_setting_with_the_range_of_its_component():
    """A keyword-only parameter of a component is a setting of config.grpo.

    No other list has the options.
    """
    fields = {f.name: f for f in dataclasses.fields(Grpo)}
    for components in CHOICES.values():
        for component in components.values():
            for name, declared in options_of(component).items():
                assert fields[name].type == declared.type | None
                assert declared.option.help in fields[name].metadata["help"]


def test_an_old_name_of_a_component_names_the_new_one():
    with pytest.raises(UserError, match="config.grpo.objective 'clipped' is now 'ppo_clip'"):
        algorithm_of(Grpo(objective="clipped"))


VOCAB = vocab_of_size(1200)


@pytest.fixture
def targets():
    """Returns random logits and target tokens.

    One token is text. The others are loc tokens, two of them at the ends of the grid.
    """
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 3, VOCAB.size)))
    tokens = VOCAB.loc0 + jnp.asarray([[[0, 500, LOC_TOKENS - 1], [7, -3, 300]]])
    return logits, tokens


def plain_logps(logits, tokens):
    """Returns the log-probability of each token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


def test_without_smoothing_the_target_is_the_token(targets):
    np.testing.assert_array_equal(target_logps(*targets, VOCAB, 0.0, 0.0), plain_logps(*targets))


def test_a_narrow_spread_is_the_plain_target(targets):
    # The nearest other bin gets exp(−½/0.1²) = 2e-22 of the weight.
    np.testing.assert_allclose(
        target_logps(*targets, VOCAB, 0.0, 0.1), plain_logps(*targets), rtol=ROUNDING
    )


@pytest.mark.parametrize("sigma", [0.5, 2.0, 30.0])
def test_the_spread_is_a_gaussian_over_bins_and_does_not_change_text(targets, sigma):
    logits, tokens = targets
    smoothed = target_logps(logits, tokens, VOCAB, 0.0, sigma)
    logps = np.asarray(jax.nn.log_softmax(logits))
    bins = np.arange(LOC_TOKENS)
    for index in np.ndindex(1, 2, 3):
        target_bin = int(tokens[index]) - VOCAB.loc0
        if target_bin < 0:
            np.testing.assert_array_equal(smoothed[index], plain_logps(logits, tokens)[index])
            continue
        weights = np.exp(-((bins - target_bin) ** 2) / (2 * sigma**2))
        expected = np.sum(weights / weights.sum() * logps[index][VOCAB.loc0 : VOCAB.seg0])
        np.testing.assert_allclose(smoothed[index], expected, rtol=ROUNDING)


def test_label_smoothing_spreads_its_share_over_all_other_tokens(targets):
    logits, tokens = targets
    logps = jax.nn.log_softmax(logits)
    target = jnp.full(logits.shape, 0.3 / (VOCAB.size - 1))
    target = jnp.where(jnp.arange(VOCAB.size) == tokens[..., None], 0.7, target)
    smoothed = target_logps(logits, tokens, VOCAB, 0.3, 0.0)
    np.testing.assert_allclose(smoothed, jnp.sum(target * logps, -1), rtol=ROUNDING)


@pytest.mark.parametrize(("smoothing", "sigma"), [(0.0, 0.0), (0.3, 0.0), (0.0, 5.0), (0.3, 5.0)])
def test_every_target_is_a_distribution(targets, smoothing, sigma):
    """No entry of a target is negative, the entries sum to 1, and the largest is at the token.

    If the target sums to 1, the gradient of Σ target·log_softmax by the logits is target − softmax.
    This gradient sums to 0 over the vocabulary, because each softmax sums to 1 too.
    """
    logits, tokens = targets
    shift = 3.0
    logps = target_logps(logits, tokens, VOCAB, smoothing, sigma)
    shifted_logps = target_logps(logits + shift, tokens, VOCAB, smoothing, sigma)
    np.testing.assert_allclose(logps, shifted_logps, rtol=0, atol=ROUNDING * 10)
    gradient = jax.grad(lambda x: target_logps(x, tokens, VOCAB, smoothing, sigma).sum())(logits)
    target = gradient + jax.nn.softmax(logits)
    np.testing.assert_allclose(target.sum(axis=-1), 1, rtol=0, atol=ROUNDING)
    assert (target > -ROUNDING).all()
    top = jnp.argmax(target, axis=-1)
    np.testing.assert_array_equal(top, tokens)
