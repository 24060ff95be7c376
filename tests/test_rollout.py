"""Laws of `sample` on a fake policy: a Markov chain with a table of next-token logits.

The tests compare frequencies with probabilities at fixed keys. For n draws of k categories
Pearson's X² has mean k − 1 and variance 2(k − 1). Fewer than one key in 500 exceeds the mean by six
standard deviations. A wrong probability makes X² grow with n.
"""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as npst

from pg_ground.rl.rollout import _first_beyond, categorical, nucleus, sample
from pg_ground.types import PrefixCache, Rollout, SuffixCache
from pg_ground.vocab import BOS, CONTROL, EOS, PAD, UNK

V = 10
WORDS = range(4, V)


class Chain(NamedTuple):
    """A policy whose logits depend on the last token alone.

    `params["table"]` is `[last token, next token]`. `SuffixCache.length` counts the tokens, as in
    every model.
    """

    def prefill(self, params, image, prompt, prompt_mask):
        b = prompt.shape[0]
        empty = jnp.zeros((1, b, 1, 1, 1))
        return PrefixCache(empty, empty, jnp.ones((b, 1), bool)), params["table"][prompt[:, -1]]

    def suffix_cache(self, prefix, group_size, length):
        empty = jnp.zeros((1, prefix.k.shape[1], group_size, length, 1, 1))
        return SuffixCache(empty, empty, jnp.zeros((1, 1), jnp.int32))

    def extend(self, params, prefix, suffix, tokens):
        return params["table"][tokens], suffix._replace(length=suffix.length + tokens.shape[2])


def draw(
    table, key: int = 0, b: int = 2, g: int = 4, t: int = 6, prompts=None, **settings
) -> Rollout:
    """Returns completions of `b` prompts, each a single token."""
    prompt = jnp.asarray(prompts if prompts is not None else np.full(b, WORDS[0]))[:, None]
    inputs = jnp.zeros((len(prompt), 1, 1, 3)), prompt, prompt > 0
    run = jax.jit(lambda params, key: sample(Chain(), params, *inputs, key, g, t, **settings))
    return run({"table": jnp.asarray(table, jnp.float32)}, jax.random.key(key))


@pytest.fixture
def table() -> np.ndarray:
    """Returns random logits of every pair of tokens. Control ids are as likely as others."""
    return np.random.default_rng(0).normal(size=(V, V))


def softmax(logits) -> np.ndarray:
    e = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assert_frequencies(drawn: np.ndarray, probabilities: np.ndarray) -> None:
    """Fails if the frequencies in `drawn` do not fit `probabilities`."""
    counts = np.bincount(np.ravel(drawn), minlength=len(probabilities))
    expected = probabilities * np.size(drawn)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert (expected[possible] > 5).all(), "Pearson's test needs 5 expected draws of every outcome"
    k = possible.sum() - 1
    distance = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    assert distance < k + 6 * np.sqrt(2 * k), f"X² is {distance:.1f} at {k} degrees of freedom"


def restrict(probabilities: np.ndarray, ids) -> np.ndarray:
    """Returns `probabilities` without all other ids, renormalised."""
    restricted = np.zeros_like(probabilities)
    restricted[list(ids)] = probabilities[list(ids)]
    return restricted / restricted.sum()


NOT_CONTROL = (EOS, *WORDS)


def test_equal_keys_draw_equal_tokens_and_other_keys_other_tokens(table):
    a, b, c = draw(table, key=1), draw(table, key=1), draw(table, key=2)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (np.asarray(a.tokens) != np.asarray(c.tokens)).any()


def test_all_completions_of_all_prompts_differ(table):
    table[:, EOS] = -30
    tokens = np.asarray(draw(table, b=3, g=5, t=12).tokens).reshape(15, 12)
    assert len({tuple(row) for row in tokens}) == 15


def test_frequencies_of_the_first_token_are_the_softmax_at_temperature(table):
    for temperature in (0.5, 1.0, 2.0):
        tokens = draw(table, b=1, g=20_000, t=1, temperature=temperature).tokens
        assert_frequencies(
            np.asarray(tokens), restrict(softmax(table[WORDS[0]] / temperature), NOT_CONTROL)
        )


def test_frequencies_of_later_tokens_follow_the_token_before(table):
    """A loop that loses a token or reuses its noise does not draw from the chain."""
    tokens = np.asarray(draw(table, b=1, g=20_000, t=3).tokens)[0]
    for last in WORDS:
        after = tokens[:, 2][tokens[:, 1] == last]
        assert_frequencies(after, restrict(softmax(table[last]), NOT_CONTROL))


def test_the_sample_starts_from_the_prompt(table):
    a, b = 4, 7
    tokens = np.asarray(draw(table, g=20_000, t=1, prompts=[a, b]).tokens)
    for row, last in enumerate((a, b)):
        assert_frequencies(tokens[row], restrict(softmax(table[last]), NOT_CONTROL))


def test_logps_belong_to_the_whole_softmax_at_temperature(table):
    """Suppressed ids and the nucleus do not change the log-probabilities of the policy."""
    for settings in (
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.6},
        {"suppress_tokens": (EOS, *CONTROL, 5, 6)},
    ):
        rollout = draw(table, **settings)
        tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
        last = np.concatenate([np.full_like(tokens[..., :1], WORDS[0]), tokens[..., :-1]], axis=-1)
        logps = np.log(softmax(table / settings.get("temperature", 1.0)))[last, tokens]
        # The logits are below 8, and log_softmax runs in float32.
        logps = np.where(mask, logps, 0)
        np.testing.assert_allclose(rollout.logps, logps, rtol=0, atol=8 * 2**-22)


def test_a_row_is_frozen_from_its_eos_on(table):
    table[:, EOS] += 2
    rollout = draw(table, b=4, g=64, t=8)
    tokens, mask, logps, loss_mask = map(np.asarray, rollout)
    np.testing.assert_array_equal(loss_mask, mask)
    ended = np.cumsum(tokens == EOS, axis=-1) > 0
    after = ended & ~((tokens == EOS) & (np.cumsum(tokens == EOS, axis=-1) == 1))
    assert after.any() and (~ended[..., -1]).any() and ended[..., 0].any()
    assert (tokens[after] == PAD).all() and (logps[after] == 0).all()
    np.testing.assert_array_equal(mask, ~after)
    assert (logps[mask] < 0).all() and ((tokens == EOS).sum(axis=-1) <= 1).all()


def test_after_the_last_eos_all_is_pad():
    """All rows end at once. After PAD the policy would write a word."""
    table = np.full((V, V), -30.0)
    table[WORDS[0], 5] = table[5, EOS] = table[EOS, 6] = table[PAD, 7] = 30
    rollout = draw(table, t=6)
    assert (np.asarray(rollout.tokens) == [5, EOS, PAD, PAD, PAD, PAD]).all()
    assert (np.asarray(rollout.mask) == [True, True, False, False, False, False]).all()


def test_a_completion_may_fill_all_its_slots(table):
    table[:, EOS] = -30
    rollout = draw(table)
    assert rollout.mask.all() and not (np.asarray(rollout.tokens) == EOS).any()


def test_suppressed_ids_are_never_drawn_however_likely(table):
    table[:, list(CONTROL)] = 20
    assert set(CONTROL) == {PAD, BOS, UNK}
    for temperature in (0.0, 1.0):
        rollout = draw(table, g=500, temperature=temperature)
        tokens = np.asarray(rollout.tokens)[np.asarray(rollout.mask)]
        assert not np.isin(tokens, CONTROL).any()
    everything = draw(table, g=500, suppress_tokens=())
    assert np.isin(np.asarray(everything.tokens)[np.asarray(everything.mask)], CONTROL).all()
    table[:, list(CONTROL)] = 0
    rollout = draw(table, b=1, g=20_000, t=1, suppress_tokens=(*CONTROL, 5))
    assert_frequencies(
        np.asarray(rollout.tokens), restrict(softmax(table[WORDS[0]]), set(NOT_CONTROL) - {5})
    )


@pytest.mark.slow
def test_large_vocabularies_are_drawn_from_their_softmax():
    """1,024 ids in 64 blocks. Most ids are so rare that the test counts them together."""
    logits = np.log(np.random.default_rng(0).dirichlet(np.full(1024, 0.1)) + 1e-12)
    drawn = categorical(jax.random.key(0), jnp.broadcast_to(jnp.asarray(logits), (60_000, 1024)))
    likely = np.argsort(-logits)[:99]
    ranks = np.full(1024, 99)
    ranks[likely] = np.arange(99)
    p = softmax(logits)
    assert_frequencies(ranks[np.asarray(drawn)], np.append(p[likely], 1 - p[likely].sum()))


@hypothesis.settings(deadline=None)  # each length is compiled
@hypothesis.given(
    npst.arrays(
        np.float32,
        st.sampled_from([1, 2, 7, 40]),
        elements=st.sampled_from([0, 1e-30, 1e-7, 1 / 3, 1]),
    ),
    st.sampled_from([2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23]),
)
def test_an_id_of_weight_0_is_never_drawn(weights, share):
    """At both ends of the range of random numbers, and behind the last weight."""
    hypothesis.assume(weights.any())
    index = int(_first_beyond(jnp.float32([share]), jnp.asarray(weights)))
    assert weights[index] > 0
    assert weights[:index].sum() <= (share + 1e-5) * weights.sum()


def test_temperature_0_is_the_likeliest_token_for_every_key(table):
    allowed = table.copy()
    allowed[:, list(CONTROL)] = -np.inf
    expected, last = [], WORDS[0]
    while len(expected) < 6 and EOS not in expected:
        last = int(np.argmax(allowed[last]))
        expected.append(last)
    expected += [PAD] * (6 - len(expected))
    for key in (0, 1):
        rollout = draw(table, key=key, temperature=0.0)
        assert (np.asarray(rollout.tokens) == expected).all()
    logps = np.log(softmax(table))[WORDS[0], expected[0]]
    np.testing.assert_allclose(rollout.logps[..., 0], logps, rtol=0, atol=8 * 2**-22)


def test_temperature_may_be_an_array(table):
    """The evaluator compiles one program for greedy and sampled answers."""
    for temperature in (0.0, 0.8):
        static = draw(table, temperature=temperature)
        traced = draw(table, temperature=jnp.float32(temperature))
        jax.tree.map(np.testing.assert_array_equal, static, traced)


def test_each_completion_of_a_group_may_have_its_temperature(table):
    """ReMax's last completion is greedy. It does not change the other completions."""
    rollout = draw(table, g=4, temperature=jnp.asarray([1.0, 1.0, 1.0, 0.0]))
    greedy = draw(table, g=4, temperature=0.0)
    np.testing.assert_array_equal(rollout.tokens[:, 3], greedy.tokens[:, 3])
    np.testing.assert_array_equal(rollout.tokens[:, :3, 0], draw(table, g=4).tokens[:, :3, 0])


@pytest.mark.parametrize("top_k", [1, 3])
def test_draws_with_top_k_are_the_likeliest_renormalised(table, top_k):
    allowed = restrict(softmax(table[WORDS[0]]), NOT_CONTROL)
    likeliest = set(np.argsort(-allowed)[:top_k].tolist())
    tokens = np.asarray(draw(table, b=1, g=20_000, t=1, top_k=top_k).tokens)
    assert set(np.unique(tokens)) == likeliest
    if top_k > 1:
        assert_frequencies(tokens, restrict(softmax(table[WORDS[0]]), likeliest))


def nucleus_of(probabilities: np.ndarray, top_p: float) -> set[int]:
    """Returns the smallest set of likeliest ids whose probabilities reach `top_p`."""
    ids: set[int] = set()
    for i in np.argsort(-probabilities):
        if sum(probabilities[list(ids)]) >= top_p:
            break
        ids.add(int(i))
    return ids


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    rng = np.random.default_rng(0)
    for top_p in (0.05, 0.3, 0.5, 0.9, 0.999):
        logps = np.log(rng.dirichlet(np.full(V, 0.7), size=50))
        finite = np.isfinite(np.asarray(nucleus(jnp.asarray(logps, jnp.float32), top_p)))
        for row, is_inside in zip(np.exp(logps), finite, strict=True):
            assert set(np.flatnonzero(is_inside)) == nucleus_of(row, top_p)


def test_the_nucleus_leaves_suppressed_ids_out():
    """`top_p` is a share of the probability of all other ids."""
    p = np.array([0.5, 0.25, 0.15, 0.1])
    logps = np.where([True, False, False, False], -np.inf, np.log(p))
    is_inside = np.isfinite(np.asarray(nucleus(jnp.asarray(logps, jnp.float32), 0.6)))
    assert is_inside.tolist() == [False, True, True, False]


@pytest.mark.parametrize("top_p", [0.4, 0.8])
def test_draws_with_top_p_are_the_renormalised_nucleus(table, top_p):
    probabilities = restrict(softmax(table[WORDS[0]]), NOT_CONTROL)
    ids = nucleus_of(probabilities, top_p)
    assert 0 < len(ids) < len(NOT_CONTROL)
    tokens = np.asarray(draw(table, b=1, g=20_000, t=1, top_p=top_p).tokens)
    assert set(np.unique(tokens)) == ids
    assert_frequencies(tokens, restrict(probabilities, ids))


def test_the_frequency_check_sees_a_wrong_temperature(table):
    """The control of the frequency tests above."""
    tokens = np.asarray(draw(table, b=1, g=20_000, t=1, temperature=1.1).tokens)
    with pytest.raises(AssertionError, match="X² is"):
        assert_frequencies(tokens, restrict(softmax(table[WORDS[0]]), NOT_CONTROL))
