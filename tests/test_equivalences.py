"""Laws of the real model, on tiny ones with Gemma 1's and Gemma 2's structure: ways of computing
the same number agree.

Where one program runs twice on the same numbers, results are equal bit for bit; where two programs
compute the same numbers, they are within `CLOSE`, which `conftest` derives.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLOSE, B, G, Inputs, L, T, assert_close_trees, inputs

from pg_ground import config
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.rl.rollout import sample
from pg_ground.types import Rollout
from pg_ground.vocab import CONTROL


@pytest.fixture(scope="module")
def completion_logps_in_parts() -> Callable[..., jax.Array]:
    """(model, params, inputs) → log-probabilities. A model is compiled once per shape."""
    compiled: dict[PaliGemma, Any] = {}

    def logps(model: PaliGemma, params: Any, x: Inputs) -> jax.Array:
        program = compiled.setdefault(
            model, jax.jit(lambda params, x: model.completion_logps(params, *x)[0])
        )
        return program(params, x)

    return logps


@pytest.fixture(scope="module")
def gradient_of() -> Callable[..., tuple[jax.Array, Any]]:
    """(model, params, inputs) to log-probabilities, and to the gradient of their sum with fixed
    random weights.
    """
    compiled: dict[PaliGemma, Any] = {}

    def program(model: PaliGemma) -> Any:
        def value(params: Any, x: Inputs, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            logps, entropy = model.completion_logps(params, *x)
            return jnp.sum(weights * (logps + 0.1 * entropy)), logps

        return jax.jit(jax.grad(value, has_aux=True))

    def gradient(model: PaliGemma, params: Any, x: Inputs) -> tuple[jax.Array, Any]:
        weights = jnp.asarray(
            np.random.default_rng(1).normal(size=x.mask.size).reshape(x.mask.shape), jnp.float32
        )
        grads, logps = compiled.setdefault(model, program(model))(params, x, weights)
        return logps, grads

    return gradient


def changed(tiny: Any, **settings: Any) -> PaliGemma:
    return PaliGemma(replace(tiny.model.config, **settings))


# who sees whom


def test_log_probabilities_before_a_token_do_not_move_by_one_bit(tiny, completion_logps_in_parts):
    x = inputs(tiny.model)._replace(mask=jnp.ones((B, G, T), bool))
    before = np.asarray(completion_logps_in_parts(*tiny, x))
    for t in range(T):
        other = jnp.where(x.tokens[..., t] == 500, 501, 500)
        after = np.asarray(
            completion_logps_in_parts(*tiny, x._replace(tokens=x.tokens.at[..., t].set(other)))
        )
        np.testing.assert_array_equal(after[..., :t], before[..., :t])
        assert (after[..., t:] != before[..., t:]).all()


def test_completions_of_a_group_do_not_see_one_another(tiny, completion_logps_in_parts):
    x = inputs(tiny.model)
    before, after = (
        np.asarray(completion_logps_in_parts(*tiny, y))
        for y in (x, x._replace(tokens=x.tokens.at[:, 1].set(700)))
    )
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1] != before[:, 1]).any()


def test_prompts_of_a_batch_do_not_see_one_another(tiny, completion_logps_in_parts):
    x, others = inputs(tiny.model), inputs(tiny.model, seed=1)
    mixed = Inputs(*(jnp.concatenate([a[:2], b[2:]]) for a, b in zip(x, others, strict=True)))
    before, after = (
        np.asarray(completion_logps_in_parts(*tiny, x)),
        np.asarray(completion_logps_in_parts(*tiny, mixed)),
    )
    np.testing.assert_array_equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).any(axis=(1, 2)).all()


def test_every_prompt_token_sees_every_other_in_both_directions(tiny, completion_logps_in_parts):
    """Prefix-LM: the last prompt token reaches the keys of the first, so both move the first
    completion token.
    """
    x = inputs(tiny.model)
    before = np.asarray(completion_logps_in_parts(*tiny, x))
    for position in range(3):  # the shortest prompt has 3 tokens
        after = np.asarray(
            completion_logps_in_parts(*tiny, x._replace(prompt=x.prompt.at[:, position].set(101)))
        )
        assert (np.abs(after - before)[..., 0].max(axis=1) > 100 * CLOSE).all()


def test_another_image_changes_the_log_probabilities(tiny, completion_logps_in_parts):
    """A model blind to its images would pass every other test here."""
    x = inputs(tiny.model)
    before, after = (
        np.asarray(completion_logps_in_parts(*tiny, y))
        for y in (x, x._replace(image=jnp.roll(x.image, 1, axis=0)))
    )
    assert (np.abs(after - before)[..., 0].max(axis=1) > 1000 * CLOSE).all()


def test_padding_of_the_prompt_changes_nothing_whatever_its_amount_and_side(
    tiny, completion_logps_in_parts
):
    x = inputs(tiny.model)
    before = completion_logps_in_parts(*tiny, x)
    lengths = np.asarray(x.prompt_mask.sum(axis=1))
    for slots, left in ((L + 4, False), (L + 4, True)):
        mask = np.arange(slots) < lengths[:, None]
        mask = mask[:, ::-1] if left else mask
        prompt = np.full(mask.shape, 77, np.int32)  # what stands at padding must not matter either
        prompt[mask] = np.asarray(x.prompt)[np.asarray(x.prompt_mask)]
        after = completion_logps_in_parts(
            *tiny, x._replace(prompt=jnp.asarray(prompt), prompt_mask=jnp.asarray(mask))
        )
        np.testing.assert_allclose(after, before, rtol=0, atol=CLOSE)


def test_masked_completion_tokens_say_0_and_change_nothing_before_them(
    tiny, completion_logps_in_parts
):
    x = inputs(tiny.model)
    before, after = (
        np.asarray(completion_logps_in_parts(*tiny, y))
        for y in (x, x._replace(tokens=jnp.where(x.mask, x.tokens, 900)))
    )
    np.testing.assert_array_equal(before, after)
    assert (before[~np.asarray(x.mask)] == 0).all() and (before[np.asarray(x.mask)] < 0).all()


# sampler and trainer


def test_cached_decode_equals_full_forward(tiny):
    """One token at a time, seven at once, and five then two."""
    model, params = tiny
    x = inputs(model)
    prefix, _ = jax.jit(model.prefill)(params, x.image, x.prompt, x.prompt_mask)
    extend = jax.jit(model.extend)

    def decode(*parts: int) -> np.ndarray:
        cache, found, start = model.suffix_cache(prefix, G, T), [], 0
        for t in parts:
            logits, cache = extend(params, prefix, cache, x.tokens[..., start : start + t])
            found.append(logits)
            start += t
        assert cache.length.shape == (1, 1) and cache.length[0, 0] == T
        return np.concatenate(found, axis=2)

    whole = decode(T)
    assert whole.shape == (B, G, T, model.config.text.vocab_size) and np.abs(whole).max() < 10
    for parts in ((1,) * T, (5, 2)):
        np.testing.assert_allclose(decode(*parts), whole, rtol=0, atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiny", ["pg2", pytest.param("pg1", marks=pytest.mark.slow)], indirect=True
)
def test_turns_of_different_lengths_equal_the_full_forward(tiny):
    """Each row reads a first turn, decodes some tokens, and reads a second turn; every row has its
    own lengths.

    Rows are packed to the left for the full forward pass: it knows nothing of turns.
    """
    model, params = tiny
    x = inputs(model)
    rng = np.random.default_rng(5)
    slots, first_slots, decoded, second_slots = 14, 5, 3, 6
    first, second = (rng.integers(0, n + 1, (B, G)) for n in (first_slots, second_slots))
    assert len(set(zip(first.flat, second.flat, strict=True))) > 10
    tokens = rng.integers(109, model.config.text.vocab_size, (B, G, slots))
    whole = np.asarray(jax.jit(model.completion_logps)(
        params, *x[:3], jnp.asarray(tokens), jnp.ones(tokens.shape, bool)
    )[0])  # fmt: skip

    prefix, start = jax.jit(model.prefill)(params, x.image, x.prompt, x.prompt_mask)
    extend = jax.jit(model.extend)
    cache = model.suffix_cache(prefix, G, slots)
    predicted = np.broadcast_to(np.asarray(start)[:, None], (B, G, start.shape[-1]))
    length = np.zeros((B, G), int)
    compared = 0

    def read(lengths: np.ndarray, t: int, left_padded: bool = False) -> None:
        """Reads the next `lengths` tokens of each row, and compares the probabilities that the
        cache gave them.
        """
        nonlocal cache, predicted, length, compared
        mask = np.arange(t) < lengths[..., None]
        mask = mask[..., ::-1] if left_padded else mask
        turn = np.full((B, G, t), 77)  # tokens outside the mask must not matter
        turn[mask] = tokens[
            (np.arange(slots) >= length[..., None])
            & (np.arange(slots) < (length + lengths)[..., None])
        ]
        every_row_is_full = bool(mask.all())
        logits, cache = extend(
            params,
            prefix,
            cache,
            jnp.asarray(turn),
            None if every_row_is_full else jnp.asarray(mask),
        )
        logps = np.asarray(jax.nn.log_softmax(logits))
        for b, g in np.ndindex(B, G):
            of_row = logps[b, g][mask[b, g]]
            before = np.concatenate([jax.nn.log_softmax(predicted[b, g])[None], of_row])
            ids = tokens[b, g, length[b, g] : length[b, g] + lengths[b, g]]
            expected = whole[b, g, length[b, g] : length[b, g] + lengths[b, g]]
            np.testing.assert_allclose(
                before[np.arange(len(ids)), ids], expected, rtol=0, atol=CLOSE
            )
            compared += len(ids)
            if len(ids):
                predicted = predicted.copy()
                predicted[b, g] = np.asarray(logits)[b, g][mask[b, g]][-1]
        length = length + lengths
        np.testing.assert_array_equal(cache.length, np.broadcast_to(length, cache.length.shape))

    read(first, first_slots)
    for _ in range(decoded):
        read(np.ones((B, G), int), 1)
    read(second, second_slots, left_padded=True)
    assert compared == first.sum() + decoded * B * G + second.sum()
    assert cache.length.shape == (B, G)


@pytest.fixture(scope="module")
def rollout_of() -> Callable[..., Rollout]:
    compiled: dict[tuple[PaliGemma, float], Any] = {}

    def rollout(tiny: Any, params: Any, temperature: float = 0.8) -> Rollout:
        x = inputs(tiny.model)[:3]
        make = jax.jit(lambda params, key: sample(tiny.model, params, *x, key, G, T, temperature))
        return compiled.setdefault((tiny.model, temperature), make)(params, jax.random.key(0))

    return rollout


def test_sampler_and_trainer_give_the_same_log_probabilities(tiny, rollout_of):
    rollout = rollout_of(tiny, tiny.params)
    x = inputs(tiny.model)
    program = jax.jit(lambda params, *x: tiny.model.completion_logps(params, *x, temperature=0.8))
    logps, _ = program(tiny.params, *x[:3], rollout.tokens, rollout.mask)
    assert np.asarray(rollout.logps)[np.asarray(rollout.mask)].max() < 0
    np.testing.assert_allclose(logps, rollout.logps, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(config.Mesh(), id="data", marks=pytest.mark.slow),
        pytest.param(config.Mesh(replica=2, model=2), id="all axes"),
    ],
)
def test_tokens_are_the_same_on_one_device_and_on_eight(pg1, monkeypatch, shape):
    """Arrays up to 4 MiB are not split in earnest; here all are, and activations have sharding
    constraints.
    """
    monkeypatch.setattr(sharding, "SMALL_BYTES", 0)
    mesh = sharding.make_mesh(shape)
    assert mesh.size == 8
    sharded_model = PaliGemma(pg1.model.config, sharding.activation_sharding(mesh))
    x = jax.tree.map(lambda a: jnp.concatenate([a] * (8 // B)), tuple(inputs(pg1.model)[:3]))
    one = jax.jit(lambda params, x, key: sample(pg1.model, params, *x, key, G, T))(
        pg1.params, x, jax.random.key(3)
    )
    draw = jax.jit(lambda params, x, key: sample(sharded_model, params, *x, key, G, T))
    split = jax.device_put(pg1.params, sharding.infer_shardings(mesh, pg1.params))
    assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split)) > 10
    eight = draw(split, sharding.put_batch(mesh, x), jax.random.key(3))
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_allclose(one.logps, eight.logps, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_the_gradient_of_the_vocabulary_adds_up_in_float32(pg1):
    """With activations in bfloat16 the table's own dtype takes up what each block of completion
    tokens has for it.
    """
    model = PaliGemma(replace(pg1.model.config, dtype="bfloat16", logits_block=2))
    x = inputs(model)
    gradient = jax.jit(jax.grad(lambda params: model.completion_logps(params, *x)[0].sum()))(
        pg1.params
    )
    table = gradient["llm"]["embedder"]["input_embedding"]
    exact = np.asarray(table == table.astype(jnp.bfloat16).astype(jnp.float32))[
        np.asarray(table) != 0
    ]
    assert exact.mean() < 0.5  # all of them, were they rounded


@pytest.mark.parametrize(
    "tiny", ["pg1", pytest.param("pg2", marks=pytest.mark.slow)], indirect=True
)
def test_control_ids_are_never_sampled_even_by_a_model_that_wants_nothing_else(tiny, rollout_of):
    """An embedding of 30s and one of −30s: whatever the hidden state, one of the two ids has a
    logit above all others.
    """
    table = tiny.params["llm"]["embedder"]["input_embedding"]
    rows = 30 * jnp.array([[1.0], [-1.0]]) * jnp.ones(table.shape[1])

    def wanting(*ids: int) -> Rollout:
        embedder = {"input_embedding": table.at[jnp.array(ids)].set(rows)}
        return rollout_of(
            tiny, {**tiny.params, "llm": {**tiny.params["llm"], "embedder": embedder}}
        )

    assert np.isin(np.asarray(wanting(5, 6).tokens), [5, 6]).mean() > 0.9
    for first, second in itertools.combinations(CONTROL, 2):
        found = wanting(first, second)
        tokens = np.asarray(found.tokens)[np.asarray(found.mask)]
        assert (
            not np.isin(tokens, CONTROL).any()
            and (tokens < tiny.model.config.text.vocab_size).all()
        )


# a score that reads hidden states


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiny", ["pg1", pytest.param("pg2", marks=pytest.mark.slow)], indirect=True
)
def test_a_value_head_sees_the_hidden_states_of_a_plain_forward_pass(tiny):
    """A dense vector on the hidden states, as a critic has it: equal values, and equal gradients in
    the head and the policy.
    """
    x = inputs(tiny.model)
    model = changed(tiny, logits_block=3)  # the 7 tokens are scored in blocks
    rng = np.random.default_rng(2)
    head = jnp.asarray(rng.normal(size=model.config.text.width), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(B, G, T)), jnp.float32)

    def scored(params: Any, head: jax.Array) -> jax.Array:
        def value(hidden: jax.Array, logits: jax.Array, tokens: jax.Array) -> jax.Array:
            assert hidden.shape[:-1] == logits.shape[:-1] == tokens.shape
            return hidden @ head

        return model.completion_scores(params, *x[:4], value)

    def plain(params: Any, head: jax.Array) -> jax.Array:
        cache, first = model.network.apply({"params": params}, *x[:3], method="prefix")
        later, _ = model.network.apply({"params": params}, cache, None, x.tokens, method="suffix")
        first = jnp.broadcast_to(first[:, None, None], (B, G, 1, first.shape[-1]))
        return jnp.concatenate([first, later[:, :, :-1]], axis=2) @ head

    def loss_and_values(values_of: Callable[..., jax.Array], params: Any, head: jax.Array) -> Any:
        values = values_of(params, head)
        return jnp.sum(weights * values), values

    (grads, values), (expected_grads, expected) = (
        jax.jit(jax.grad(partial(loss_and_values, f), (0, 1), has_aux=True))(tiny.params, head)
        for f in (scored, plain)
    )
    np.testing.assert_allclose(values, expected, rtol=0, atol=CLOSE)
    assert_close_trees(grads, expected_grads)
    assert np.abs(np.asarray(grads[1])).min() > 0


# one prefix per prompt


def repeated(x: Inputs) -> Inputs:
    """Returns every completion as a prompt of its own."""
    image, prompt, prompt_mask = (jnp.repeat(a, G, axis=0) for a in x[:3])
    return Inputs(
        image, prompt, prompt_mask, x.tokens.reshape(B * G, 1, T), x.mask.reshape(B * G, 1, T)
    )


@pytest.mark.parametrize(
    "tiny", ["pg2", pytest.param("pg1", marks=pytest.mark.slow)], indirect=True
)
def test_a_shared_prefix_equals_a_repeated_one(tiny, gradient_of):
    x = inputs(tiny.model)
    shared, shared_grads = gradient_of(*tiny, x)
    apart, apart_grads = gradient_of(*tiny, repeated(x))
    np.testing.assert_allclose(shared, apart.reshape(B, G, T), rtol=0, atol=CLOSE)
    assert_close_trees(shared_grads, apart_grads)


# ways to save memory


@pytest.mark.slow
def test_vocabulary_in_blocks_equals_the_whole(pg1, gradient_of):
    x = inputs(pg1.model)
    assert pg1.model.config.logits_block >= T
    whole, whole_grads = gradient_of(*pg1, x)
    blocked, blocked_grads = gradient_of(changed(pg1, logits_block=3), pg1.params, x)
    np.testing.assert_allclose(blocked, whole, rtol=0, atol=CLOSE)
    assert_close_trees(blocked_grads, whole_grads)


@pytest.mark.parametrize(
    "tiny", ["pg2", pytest.param("pg1", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize(
    "block",
    [1, pytest.param(5, marks=pytest.mark.slow), pytest.param(3 * G, marks=pytest.mark.slow)],
)
def test_attention_in_blocks_of_queries_equals_the_whole(tiny, gradient_of, block):
    """Of patches (9), of a prefix (15) and of the completions of a group together: one at a time,
    uneven, three of each.
    """
    x = inputs(tiny.model)
    assert not tiny.model.config.attention_block
    whole, whole_grads = gradient_of(*tiny, x)
    blocked, blocked_grads = gradient_of(changed(tiny, attention_block=block), tiny.params, x)
    np.testing.assert_allclose(blocked, whole, rtol=0, atol=CLOSE)
    assert_close_trees(blocked_grads, whole_grads)


def test_rematerialised_layers_equal_kept_ones(pg2, gradient_of):
    x = inputs(pg2.model)
    assert pg2.model.config.remat == "none"
    kept, kept_grads = gradient_of(*pg2, x)
    again, again_grads = gradient_of(changed(pg2, remat="nothing_saveable"), pg2.params, x)
    np.testing.assert_allclose(again, kept, rtol=0, atol=CLOSE)
    assert_close_trees(again_grads, kept_grads)


def test_unrolled_layers_equal_looped_ones(pg2, completion_logps_in_parts):
    x = inputs(pg2.model)
    assert pg2.model.config.scan_unroll == 1
    np.testing.assert_allclose(
        completion_logps_in_parts(changed(pg2, scan_unroll=2), pg2.params, x),
        completion_logps_in_parts(*pg2, x),
        rtol=0,
        atol=CLOSE,
    )


@pytest.mark.parametrize(
    "tiny", ["pg2", pytest.param("pg1", marks=pytest.mark.slow)], indirect=True
)
def test_bfloat16_activations_stay_near_float32(tiny, completion_logps_in_parts):
    """bfloat16 knows a number to 2^-9. Logits of a few units, each the end of some ten roundings,
    are off by a few hundredths.
    """
    x = inputs(tiny.model)
    off = np.abs(
        np.asarray(completion_logps_in_parts(changed(tiny, dtype="bfloat16"), tiny.params, x))
        - np.asarray(completion_logps_in_parts(*tiny, x))
    )
    off = off[np.asarray(x.mask)]
    assert 2**-12 < np.median(off) < 10 * 2**-9 and off.max() < 100 * 2**-9
