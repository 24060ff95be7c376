"""Each row of `ALGORITHMS` against TRL's losses and gradients, and the laws of the policy loss and
of the supervised target.

Everything here runs in float64, so that a bound is that of the numbers compared with: TRL's are
printed to 8 decimals, and where both sides are ours a few hundred operations on values of order 1
leave 1e-12.
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
ROUNDING = 1e-12

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


def loss_and_gradient(given: dict, row: Algorithm, group_size: int, budget: int = 0):
    """Returns the loss, its gradient by log-probability (flat rows) and the terms; `budget` is
    the slots of a completion."""
    width = budget or len(given["mask"][0])

    def widened(rows) -> jax.Array:
        return groups(
            np.pad(np.asarray(rows, float), ((0, 0), (0, width - len(rows[0])))), group_size
        )

    logps, ref, mask = widened(given["logps"]), widened(given["ref"]), widened(given["mask"]) > 0
    old = logps if given["old"] is None else widened(given["old"])
    advantage = groups(given["advantages"], group_size)[..., None]

    entropies = widened(given["entropies"])
    selection = select(row, logps, entropies, advantage, mask)

    def loss(logps):
        terms = policy_loss(
            logps, old, ref if row.kl_coef else None, advantage, mask, row, selection
        )
        bonus = row.entropy_coef * jnp.sum(entropies * mask) / mask.sum()
        return jnp.sum(terms.loss * row.loss_agg_mode(mask)) - bonus, terms

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(logps)
    assert gradient.dtype == jnp.float64
    return value, gradient.reshape(-1, width)[:, : len(given["mask"][0])], terms


def made(row: str, **changes) -> Algorithm:
    """Returns a row without its KL term, as TRL's default has none, with `changes`."""
    return ALGORITHMS[row].override(**{"kl_coef": 0.0, **changes})


def select(row: Algorithm, logps, entropies, advantage, mask):
    """Returns the token selection of a row; None if it has none."""
    if row.token_selection is None:
        return None
    tokens = TokenStatistics(logps, entropies, advantage, mask, jax.random.key(0))
    return row.token_selection(tokens, **row.options_for("token_selection"))


def choose(c: Grpo) -> Algorithm:
    """Returns the algorithm of a config section, checked as the stage checks it."""
    row = make_algorithm(c.algorithm, c.algorithm_overrides)
    check_algorithm(row, c)
    return row


GOLDEN = [
    ("grpo", made("grpo")),
    ("dr_grpo (L=8)", made("dr_grpo")),
    ("dapo (default)", made("dapo", clip_high=0.2)),
    ("dapo clip-higher eps_high=.28", made("dapo")),
    ("gspo = grpo + sequence IS, eps 3e-4/4e-4", made("gspo")),
    ("gspo = grpo + sequence IS, eps .2", made("gspo", clip_low=0.2, clip_high=0.2)),
    ("rloo_loss (advantages as given)", made("rloo")),
    ("grpo + k3 KL beta=.04, IS-weighted (TRL>=1.x default)", ALGORITHMS["grpo"]),
    (
        "grpo + k3 KL beta=.04, plain k3 (use_bias_correction_kl=False)",
        ALGORITHMS["grpo"]._replace(kl_estimator=k3),
    ),
    ("bnpo", made("dapo", clip_high=0.2)),
    ("dapo two-sided delta=4 (INTELLECT-2)", made("two_sided")),
    ("luspo = sequence IS", made("luspo")),
    ("gmpo eps=.4/.4", made("gmpo")),
    ("cispo eps_high=5 (ScaleRL)", made("cispo")),
    ("cispo eps_high=.2 (config default!)", made("cispo", clip_high=0.2)),
    ("sapo 1.05/1.0", made("sapo")),
    ("vespo", made("vespo")),
    (
        "dapo + top_entropy_quantile=.5",
        made("top_entropy", clip_high=0.2, token_selection_share=0.5),
    ),
    ("dapo + off_policy_mask_threshold=.1", made("dapo", clip_high=0.2, off_policy_kl=0.1)),
    ("dapo + entropy_coef=.01", made("dapo", clip_high=0.2, entropy_coef=0.01)),
]


@pytest.mark.parametrize("inputs", ["A", "B"])
@pytest.mark.parametrize(("name", "row"), GOLDEN, ids=[name for name, _ in GOLDEN])
def test_loss_and_gradient_equal_trl(trl, name, row, inputs):
    expected = (trl["loss"] | trl)[name][inputs]
    given, group_size = trl["inputs"][inputs], {"A": 4, "B": 2}[inputs]
    value, gradient, terms = loss_and_gradient(
        given, row, group_size, budget=8 if "L=8" in name else 0
    )
    bound = 1e-7 if name.startswith("sapo") else PRINTED  # TRL keeps SAPO's temperatures in float32
    np.testing.assert_allclose(value, expected["loss"], rtol=0, atol=bound)
    np.testing.assert_allclose(gradient, expected["dloss_dlogps"], rtol=0, atol=bound)
    if (
        "clip_ratio/region_mean" in expected.get("metrics", {})
        and row.ratio is ALGORITHMS["grpo"].ratio
        and row.token_selection is None
    ):
        mask = groups(given["mask"], group_size)
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
def test_corrections_for_another_sampler_equal_trls(trl, name):
    given, expected = trl["tis"], trl["tis"][name]
    old, sampling, mask = (groups(given[key], 2) for key in ("old", "sampling", "mask"))
    mask = mask > 0
    row = made(
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


SEED = {
    "old": [[-1.0, -1.0, -1.0], [-0.5, -2.0, -1.0]],
    "logps": [[-0.7, -1.5, -1.0], [-0.4, -0.5, -1.0]],
    "mask": [[1, 1, 1], [1, 1, 0]],
    "advantages": [1.0, -1.0],
    "ref": [[0.0] * 3] * 2,
    "entropies": [[0.0] * 3] * 2,
}
SEED_ROWS = {
    "vanilla, token-mean": (made("dual_clip"), 0.259728),
    "vanilla, seq-mean-token-sum": (
        made("dual_clip", loss_agg_mode=CHOICES["loss_agg_mode"]["seq_mean_token_sum"]),
        0.649320,
    ),
    "vanilla, seq-mean-token-mean": (
        made("dual_clip", loss_agg_mode=seq_mean_token_mean),
        0.558538,
    ),
    "clip .2/.28, c 10": (made("dapo", ratio_cap=10.0), 0.540066),
    "gspo": (made("gspo"), 0.645017),
    "gpg": (made("gpg"), 0.46),
    "kl_cov": (made("kl_cov"), 0.532094),
}


@pytest.mark.parametrize("name", SEED_ROWS)
def test_losses_equal_rllavas(name):
    row, expected = SEED_ROWS[name]
    value, *_ = loss_and_gradient(SEED, row, 2)
    if (
        name == "kl_cov"
    ):  # there with a coefficient of 0.1 on |log-ratio|, 0.3 at the one token chosen, of 5
        value = value - 0.9 * 0.3 / 5
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["top_entropy", "clip_cov", "kl_cov"])
def test_a_focus_leaves_nothing_to_learn_where_there_is_no_advantage(random_batch, name):
    """The first update is at ratio 1, where |log-ratio| has a kink:

    its gradient there is 0, not the 1 of jnp.abs.
    """
    logps, _, _, advantage, mask = random_batch
    row = made(name, token_selection_share=1.0)
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


@pytest.mark.parametrize("said", CANCELLING)
def test_choices_that_cancel_each_other_are_refused(said):
    with pytest.raises(UserError, match=f"config.grpo.{said}"):
        choose(Grpo(**CANCELLING[said]))


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


@pytest.mark.parametrize("said", UNREAD)
def test_a_number_that_the_algorithm_does_not_look_at_is_refused(said):
    with pytest.raises(UserError, match=f"config.grpo.{said}"):
        choose(Grpo(**UNREAD[said]))


def test_clip_cov_drops_by_lot_among_the_tokens_of_high_covariance():
    rng = np.random.default_rng(0)
    logps, advantage = (
        jnp.asarray(rng.normal(size=(8, 8, 40))),
        jnp.asarray(rng.normal(size=(8, 8))),
    )
    mask = jnp.asarray(rng.uniform(size=logps.shape) < 0.8)
    key = jax.random.key(0)
    tokens = TokenStatistics(logps, jnp.zeros_like(logps), advantage[..., None], mask, key)
    clip_cov = CHOICES["token_selection"]["clip_cov"]
    dropped = clip_cov(tokens, token_selection_share=0.01).factor == 0
    a, b = (np.asarray(x) for x in (jnp.broadcast_to(advantage[..., None], logps.shape), logps))
    m = np.asarray(mask)
    covariance = (a - a[m].mean()) * (b - b[m].mean())
    assert (
        dropped.sum() == int(0.01 * m.sum())
        and covariance[dropped].min() > 1
        and covariance[dropped].max() < 5
    )
    assert m[dropped].all()
    other_tokens = tokens._replace(key=jax.random.key(1))
    other = clip_cov(other_tokens, token_selection_share=0.01).factor == 0
    assert (other != dropped).any() and other.sum() == dropped.sum()


@pytest.mark.parametrize("name", ["k1", "k2"])
def test_kl_estimates_equal_trls(trl, name):
    batch = trl["inputs"]["B"]
    gap = jnp.asarray(batch["logps"]) - jnp.asarray(batch["ref"])
    key = next(key for key in trl["kl_B"] if key.startswith(name))
    expected, mask = jnp.asarray(trl["kl_B"][key]), jnp.asarray(batch["mask"])
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
    both, plain = CHOICES["kl_estimator"][name], CHOICES["kl_estimator"][name[:-1]]
    np.testing.assert_allclose(
        both(gap, jnp.ones_like(gap)), plain(gap, jnp.ones_like(gap)), rtol=0, atol=ROUNDING
    )
    np.testing.assert_allclose(
        jax.grad(lambda g: both(g, jnp.ones_like(g)).sum())(gap), gap, rtol=0, atol=ROUNDING
    )


def test_a_penalty_in_the_reward_is_the_summed_gap(random_batch):
    logps, _, ref, _, mask = random_batch
    found = completion_kl(logps, ref, mask, ALGORITHMS["rloo"])
    np.testing.assert_allclose(found, jnp.sum((logps - ref) * mask, axis=-1), rtol=0, atol=ROUNDING)
    row = ALGORITHMS["rloo"]._replace(kl_coef=0.1)
    given = (logps, logps, ref, jnp.zeros((*mask.shape[:2], 1)), mask)
    assert (
        not policy_loss(*given, row).loss.any()
        and policy_loss(*given, row._replace(kl_in_reward=False)).loss.any()
    )


def test_kl_estimate_equals_trls_k3(trl):
    given = trl["inputs"]["B"]
    _, _, terms = loss_and_gradient(given, ALGORITHMS["grpo"], 2)
    mask = groups(given["mask"], 2)
    expected = groups(trl["kl_B"]["k3=exp(ref-lp)-(ref-lp)-1"], 2)
    np.testing.assert_allclose(terms.kl * mask, expected * mask, rtol=0, atol=ROUNDING)


@pytest.fixture
def random_batch():
    """Log-probabilities of three policies near one another, advantages and ragged masks:

    3 prompts × 4 × 5 tokens.
    """
    rng = np.random.default_rng(0)
    old = jnp.asarray(np.log(rng.uniform(0.05, 0.95, (3, 4, 5))))
    logps, ref = (old + 0.3 * jnp.asarray(rng.normal(size=old.shape)) for _ in range(2))
    advantage = jnp.asarray(rng.normal(size=(3, 4, 1)))
    mask = jnp.arange(5) < jnp.asarray(rng.integers(1, 6, (3, 4)))[..., None]
    return logps, old, ref, advantage, mask


def gradient_of(row: Algorithm, logps, old, ref, advantage, mask) -> jax.Array:
    def loss(logps):
        return jnp.sum(
            policy_loss(logps, old, ref, advantage, mask, row).loss * row.loss_agg_mode(mask)
        )

    return jax.grad(loss)(logps)


@ROWS
def test_masked_tokens_have_no_gradient_and_no_say(random_batch, row):
    logps, old, ref, advantage, mask = random_batch
    row = ALGORITHMS[row]._replace(kl_coef=0.1)
    gradient = gradient_of(row, logps, old, ref, advantage, mask)
    assert not np.asarray(gradient)[~np.asarray(mask)].any()
    assert np.asarray(gradient)[np.asarray(mask)].any()
    other = jnp.where(mask, logps, -7.0)
    np.testing.assert_array_equal(gradient_of(row, other, old, ref, advantage, mask), gradient)


@ROWS
def test_on_policy_gradient_is_reinforce(random_batch, row):
    """−A·∇logp, averaged as the row averages:

    over a token's own weight, or over its whole completion's.
    """
    logps, _, _, advantage, mask = random_batch
    row = made(row)
    gradient = gradient_of(row, logps, logps, None, advantage, mask)
    weights = row.loss_agg_mode(mask)
    if (
        row.objective.__name__ == "ppo_clip" and row.ratio is ALGORITHMS["rloo"].ratio
    ):  # a completion is one action: each token moves all of its probability
        weights = mask * weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, -advantage * weights, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "row",
    [name for name, row in ALGORITHMS.items() if row.objective.__name__ in ("ppo_clip", "gmpo")],
)
def test_on_policy_loss_is_minus_the_averaged_advantage(random_batch, row):
    logps, _, _, advantage, mask = random_batch
    terms = policy_loss(logps, logps, None, advantage, mask, made(row))
    np.testing.assert_allclose(
        terms.loss, jnp.broadcast_to(-advantage, terms.loss.shape), rtol=0, atol=ROUNDING
    )
    assert not terms.clipped.any() and not terms.kl.any()


@pytest.mark.parametrize("row", ["grpo", "dr_grpo", "dapo"])
def test_clipped_tokens_are_those_without_gradient(random_batch, row):
    logps, old, _, advantage, mask = random_batch
    gradient = gradient_of(made(row), logps, old, None, advantage, mask)
    clipped = policy_loss(logps, old, None, advantage, mask, made(row)).clipped
    np.testing.assert_array_equal((gradient == 0) & mask, clipped & mask)
    assert 0 < int((clipped & mask).sum()) < int(mask.sum())


@pytest.mark.parametrize(("row", "shared"), [("gspo", True), ("rloo", True), ("grpo", False)])
def test_completion_ratios_clip_whole_completions(random_batch, row, shared):
    logps, old, _, advantage, mask = random_batch
    clipped = np.asarray(policy_loss(logps, old, None, advantage, mask, made(row)).clipped)
    assert (clipped == clipped[..., :1]).all() == shared and clipped.any()


def test_the_clip_binds_only_where_it_would_go_on(random_batch):
    """A ratio beyond the clip is held only if the advantage pushes it further out (PPO's
    pessimistic minimum)."""
    logps, old, _, advantage, mask = random_batch
    ratio, a = jnp.exp(logps - old), advantage
    clipped = policy_loss(logps, old, None, advantage, mask, made("grpo")).clipped
    np.testing.assert_array_equal(clipped, ((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0)))


def test_gspo_ratio_is_the_geometric_mean_and_rloo_the_product(random_batch):
    logps, old, _, _, mask = random_batch
    ratios = jnp.where(mask, jnp.exp(logps - old), 1.0)
    for row, expected in (
        ("gspo", jnp.prod(ratios, -1) ** (1 / mask.sum(-1))),
        ("rloo", jnp.prod(ratios, -1)),
    ):
        found = jnp.exp(ALGORITHMS[row].ratio(logps - old, mask))
        np.testing.assert_allclose(
            found, jnp.broadcast_to(expected[..., None], found.shape), rtol=ROUNDING
        )


@ROWS
def test_completions_without_advantage_have_no_gradient(random_batch, row):
    logps, old, _, advantage, mask = random_batch
    gradient = gradient_of(made(row), logps, old, None, advantage.at[1].set(0), mask)
    assert not gradient[1].any() and gradient[0].any()


@ROWS
def test_enormous_ratios_stay_finite(random_batch, row):
    """A float32 exp overflows at 89; a long completion's summed log-ratio reaches that."""
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
    """In expectation over tokens drawn on-policy, computed over a whole vocabulary of 7; plain
    k3 has another gradient."""
    rng = np.random.default_rng(1)
    z, q = jnp.asarray(rng.normal(size=7)), jax.nn.log_softmax(jnp.asarray(rng.normal(size=7)))
    row = made("grpo", kl_coef=1.0, **({} if corrected else {"kl_estimator": k3}))
    drawn = jnp.exp(jax.nn.log_softmax(z))

    def expected_penalty(z):
        logps = jax.nn.log_softmax(z)[None, None]
        old = jax.lax.stop_gradient(logps)
        terms = policy_loss(
            logps, old, q[None, None], jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 7), bool), row
        )
        return jnp.sum(drawn * terms.loss[0, 0])

    def kl(z):
        p = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(p) * (p - q))

    np.testing.assert_allclose(expected_penalty(z), kl(z), rtol=0, atol=ROUNDING)
    off = np.abs(jax.grad(expected_penalty)(z) - jax.grad(kl)(z)).max()
    assert off < ROUNDING if corrected else off > 0.01


def test_averages_weigh_as_they_say(random_batch):
    *_, mask = random_batch
    mask = mask.at[2, 3].set(False)  # a completion may be all padding
    assert (mask.sum(axis=-1) == 0).sum() == 1
    per_completion = seq_mean_token_mean(mask).sum(axis=-1)
    np.testing.assert_allclose(
        per_completion, jnp.where(mask.any(axis=-1), 1 / 12, 0), rtol=ROUNDING
    )
    np.testing.assert_allclose(token_mean(mask), mask / mask.sum(), rtol=ROUNDING)
    np.testing.assert_allclose(seq_mean_token_sum_norm(mask), mask / (3 * 4 * 5), rtol=ROUNDING)
    for average in (seq_mean_token_mean, token_mean, seq_mean_token_sum_norm):
        assert not average(jnp.zeros_like(mask)).any()


def test_choose_puts_the_users_numbers_over_the_rows():
    assert choose(Grpo(algorithm="dapo")) == ALGORITHMS["dapo"]
    changed = choose(Grpo(algorithm="dapo", clip_high=0.5, kl_coef=0.0))
    assert changed == ALGORITHMS["dapo"].override(clip_high=0.5, kl_coef=0.0)
    assert (
        choose(Grpo(algorithm="grpo", kl_coef=0.0)).kl_coef == 0.0
    )  # 0 is a value, not an absent one
    assert choose(Grpo(algorithm="grpo", clip_low=0.1)).option("clip_low") == 0.1


def test_an_unknown_algorithm_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"config\.grpo\.algorithm 'dr_grop' does not exist: did you mean dr_grpo\?"
    ):
        choose(Grpo(algorithm="dr_grop"))


@ROWS
def test_defect_13_every_token_of_the_policy_is_learned_from_and_none_of_its_surroundings(row):
    """A transcript's mask has holes where a tool's answer stands.

    RLLaVA trains its last turn alone.
    """
    row = made(row, token_selection=None)
    key, _ = jax.random.split(jax.random.key(0))
    logps = -jax.random.uniform(key, (2, 2, 8), jnp.float64, 0.1, 3.0)
    advantage = jnp.array([[[1.0], [-1.0]], [[0.5], [-0.5]]], jnp.float64)
    of_policy = jnp.broadcast_to(jnp.array([1, 1, 0, 0, 1, 1, 0, 1]) > 0, logps.shape)

    def loss(logps, noise):
        shown = jnp.where(of_policy, logps, noise)
        old = jax.lax.stop_gradient(shown)
        return jnp.sum(
            policy_loss(shown, old, None, advantage, of_policy, row, None).loss
            * row.loss_agg_mode(of_policy)
        )

    value, gradient = jax.value_and_grad(loss)(logps, -1.0)
    np.testing.assert_array_equal(gradient != 0, of_policy)
    assert loss(logps, -2.5) == value


def test_defect_14_an_estimator_that_is_not_there_is_refused():
    """RLLaVA lists gae and srft, of which one cannot run and the other silently is another loss."""
    for name in ("gae", "srft", "ppo"):
        with pytest.raises(UserError, match=f"config.grpo.algorithm {name!r} does not exist"):
            choose(Grpo(algorithm=name))
        with pytest.raises(UserError, match=f"config.grpo.advantage {name!r} does not exist"):
            choose(Grpo(advantage=name))


def test_a_peers_defect_cispo_does_not_hold_every_ratio_below_a_clip_of_an_interval(random_batch):
    """TRL's default cap of 0.2 is that of an interval around 1:

    it scales every on-policy loss by a fifth. Ours caps at 5.
    """
    logps, _, _, advantage, mask = random_batch
    terms = policy_loss(logps, logps, None, advantage, mask, ALGORITHMS["cispo"])
    np.testing.assert_allclose(terms.loss, -advantage * logps, rtol=ROUNDING)


def test_a_peers_defect_no_row_with_a_penalty_in_the_loss_uses_k1():
    """Tunix's k1 in the loss has an expected gradient of 0 on-policy; here it is in rewards
    only."""
    for name, row in ALGORITHMS.items():
        assert row.kl_estimator is not k1 or row.kl_in_reward, name


@ROWS
def test_advantages_of_tokens_equal_advantages_of_completions_if_all_are_equal(random_batch, row):
    """[B, G, T] advantages with one value per completion give the loss and the gradient of [B,
    G, 1]."""
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
    gradient = gradient_of(made("grpo"), logps, logps, None, per_token, mask)
    weights = seq_mean_token_mean(mask)
    np.testing.assert_allclose(gradient, -per_token * weights, rtol=0, atol=ROUNDING)


USERS_ALGORITHM = """
import jax.numpy as jnp
from pg_ground.rl.algorithms import ALGORITHMS
from pg_ground.rl.objectives import token_mean

def squared(log_ratio, logps, advantages, mask, *, pull: float = 2.0):
    return pull * jnp.square(log_ratio) - advantages * logps, jnp.zeros_like(mask)

mine = ALGORITHMS["grpo"]._replace(objective=squared, loss_agg_mode=token_mean)
mine = mine._replace(kl_coef=0.0, options={"pull": 3.0})
short = ALGORITHMS["grpo"]._replace(objective=lambda log_ratio, logps: log_ratio)
number = 3
"""


@pytest.fixture
def users_file(tmp_path):
    (tmp_path / "mine.py").write_text(USERS_ALGORITHM)
    return tmp_path / "mine.py"


def test_a_row_of_a_users_file_is_an_algorithm(users_file, random_batch):
    logps, old, _, advantage, mask = random_batch
    row = choose(Grpo(algorithm=f"{users_file}:mine"))
    terms = policy_loss(logps, old, None, advantage, mask, row)
    expected = 3.0 * jnp.square(logps - old) - advantage * logps
    np.testing.assert_allclose(terms.loss, expected, rtol=0, atol=ROUNDING)
    changed = choose(Grpo(algorithm=f"{users_file}:mine", loss_agg_mode="seq_mean_token_mean"))
    assert changed.loss_agg_mode is seq_mean_token_mean and changed.options == {"pull": 3.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:minne", "has no minne: did you mean mine"),
        ("mine.py:number", "is a int: it must be a pg_ground.rl.algorithms.Algorithm"),
        ("mine.py:short", "objective takes 2 positional arguments, but the loss passes 4"),
        ("other.py:mine", "there is no file"),
    ],
)
def test_a_users_row_that_cannot_be_used_is_refused(users_file, name, message):
    with pytest.raises(UserError, match=message):
        choose(Grpo(algorithm=f"{users_file.parent}/{name}"))


def test_an_option_is_a_setting_with_the_range_of_its_component():
    """A keyword-only parameter of a component is a setting of config.grpo:

    nothing else lists it.
    """
    fields = {f.name: f for f in dataclasses.fields(Grpo)}
    for components in CHOICES.values():
        for component in components.values():
            for name, declared in options_of(component).items():
                assert fields[name].type == declared.type | None
                assert declared.option.help in fields[name].metadata["help"]


def test_an_old_name_of_a_component_names_the_new_one():
    with pytest.raises(UserError, match="config.grpo.objective 'clipped' is now 'ppo_clip'"):
        choose(Grpo(objective="clipped"))


VOCAB = vocab_of_size(1200)


@pytest.fixture
def targets():
    """Random logits, and tokens of which one is text and the others loc tokens, two of them at
    the ends of the grid."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, 3, VOCAB.size)))
    tokens = VOCAB.loc0 + jnp.asarray([[[0, 500, LOC_TOKENS - 1], [7, -3, 300]]])
    return logits, tokens


def plain(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


def test_without_smoothing_the_target_is_the_token(targets):
    np.testing.assert_array_equal(target_logps(*targets, VOCAB, 0.0, 0.0), plain(*targets))


def test_a_narrow_spread_is_the_plain_target(targets):
    # the nearest other bin gets exp(−½/0.1²) = 2e-22 of the weight
    np.testing.assert_allclose(
        target_logps(*targets, VOCAB, 0.0, 0.1), plain(*targets), rtol=ROUNDING
    )


@pytest.mark.parametrize("sigma", [0.5, 2.0, 30.0])
def test_spread_is_a_gaussian_over_bins_and_leaves_text_alone(targets, sigma):
    logits, tokens = targets
    found = target_logps(logits, tokens, VOCAB, 0.0, sigma)
    logps, k = np.asarray(jax.nn.log_softmax(logits)), np.arange(LOC_TOKENS)
    for place in np.ndindex(1, 2, 3):
        bin = int(tokens[place]) - VOCAB.loc0
        if bin < 0:
            np.testing.assert_array_equal(found[place], plain(logits, tokens)[place])
            continue
        weights = np.exp(-((k - bin) ** 2) / (2 * sigma**2))
        expected = np.sum(weights / weights.sum() * logps[place][VOCAB.loc0 : VOCAB.seg0])
        np.testing.assert_allclose(found[place], expected, rtol=ROUNDING)


def test_label_smoothing_takes_its_share_for_all_other_tokens(targets):
    logits, tokens = targets
    logps = jax.nn.log_softmax(logits)
    target = jnp.full(logits.shape, 0.3 / (VOCAB.size - 1))
    target = jnp.where(jnp.arange(VOCAB.size) == tokens[..., None], 0.7, target)
    found = target_logps(logits, tokens, VOCAB, 0.3, 0.0)
    np.testing.assert_allclose(found, jnp.sum(target * logps, -1), rtol=ROUNDING)


@pytest.mark.parametrize(("smoothing", "sigma"), [(0.0, 0.0), (0.3, 0.0), (0.0, 5.0), (0.3, 5.0)])
def test_every_target_is_a_distribution(targets, smoothing, sigma):
    """d/dlogits of Σ target·log_softmax sums to 0 over the vocabulary if the target sums to 1,
    as does each softmax."""
    logits, tokens = targets
    shift = 3.0
    a, b = (target_logps(logits + s, tokens, VOCAB, smoothing, sigma) for s in (0.0, shift))
    np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * 10)
    gradient = jax.grad(lambda x: target_logps(x, tokens, VOCAB, smoothing, sigma).sum())(logits)
    target = gradient + jax.nn.softmax(logits)
    np.testing.assert_allclose(target.sum(axis=-1), 1, rtol=0, atol=ROUNDING)
    assert (target > -ROUNDING).all()
    top = jnp.argmax(target, axis=-1)
    np.testing.assert_array_equal(top, tokens)
