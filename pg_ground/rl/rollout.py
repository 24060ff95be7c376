"""Sampling G completions of each prompt, as token ids, inside one compiled loop."""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8

from pg_ground.types import Array, PrefixCache, Rollout, SuffixCache
from pg_ground.vocab import CONTROL, EOS, PAD


@runtime_checkable
class Policy(Protocol):
    """What this room needs of a model: see `pg_ground.models.paligemma.PaliGemma`, which is one."""

    def prefill(
        self, params: Any, image: Array, prompt: Array, prompt_mask: Array
    ) -> tuple[PrefixCache, Array]: ...

    def suffix_cache(self, prefix: PrefixCache, group_size: int, length: int) -> SuffixCache: ...

    def extend(
        self, params: Any, prefix: PrefixCache, suffix: SuffixCache, tokens: Array
    ) -> tuple[Array, SuffixCache]: ...


class _Loop(NamedTuple):
    t: Int[jax.Array, ""]
    cache: SuffixCache
    tokens: Int[jax.Array, "B G T"]
    mask: Bool[jax.Array, "B G T"]
    logps: Float[jax.Array, "B G T"]
    alive: Bool[jax.Array, "B G"]


def sample(
    model: Policy,
    params: Any,
    image: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"],
    prompt: Int[Array, "B L"],
    prompt_mask: Bool[Array, "B L"],
    key: PRNGKeyArray,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float | Float[Array, ""] | Float[Array, " G"] = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    suppress_tokens: tuple[int, ...] = CONTROL,
) -> Rollout:
    """Returns `group_size` completions of each prompt, the same for the same key; the prefix is computed once per prompt.

    `temperature` 0 is greedy; it may be one for each completion of a group. `top_k` keeps that many of the likeliest tokens (0 is
    all), `top_p` of these the smallest set with at least that share of their probability (arXiv 1904.09751). `suppress_tokens` lists ids
    that are never drawn. A completion ends with EOS and its row stays PAD from there; the loop ends when every row has.
    `logps` are those of the whole softmax at `temperature` (at 1 when greedy), before `top_k`, `top_p` and `suppress_tokens`: what
    `completion_logps` gives for the same tokens.
    """
    cache, first = model.prefill(params, image, prompt, prompt_mask)
    shape = (prompt.shape[0], group_size, max_new_tokens)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (group_size,))
    scale = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    banned = jnp.zeros(first.shape[-1], bool).at[jnp.array(suppress_tokens, int)].set(True)

    def draw(
        logits: Float[Array, "B G V"], t: Int[Array, ""]
    ) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
        logps = jax.nn.log_softmax(logits / scale)
        allowed = jnp.where(banned, -jnp.inf, logps)
        if top_k:
            allowed = jnp.where(
                allowed >= jax.lax.top_k(allowed, top_k)[0][..., -1:], allowed, -jnp.inf
            )
        if top_p < 1:
            allowed = nucleus(allowed, top_p)
        own_key = jax.random.fold_in(key, t)
        drawn = jax.lax.platform_dependent(
            own_key, allowed, tpu=jax.random.categorical, default=categorical
        )
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(allowed, axis=-1))
        return chosen, jnp.take_along_axis(logps, chosen[..., None], axis=-1)[..., 0]

    def write(s: _Loop, logits: Float[Array, "B G V"]) -> _Loop:
        chosen, logp = draw(logits, s.t)
        return s._replace(
            t=s.t + 1,
            tokens=s.tokens.at[:, :, s.t].set(jnp.where(s.alive, chosen, PAD)),
            mask=s.mask.at[:, :, s.t].set(s.alive),
            logps=s.logps.at[:, :, s.t].set(jnp.where(s.alive, logp, 0)),
            alive=s.alive & (chosen != EOS),
        )

    def step(s: _Loop) -> _Loop:
        last = jax.lax.dynamic_slice_in_dim(s.tokens, s.t - 1, 1, axis=2)
        logits, suffix = model.extend(params, cache, s.cache, last)
        return write(s._replace(cache=suffix), jnp.asarray(logits)[:, :, 0])

    empty = _Loop(
        t=jnp.int32(0),
        cache=model.suffix_cache(cache, group_size, max_new_tokens),
        tokens=jnp.full(shape, PAD, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logps=jnp.zeros(shape, jnp.float32),
        alive=jnp.ones(shape[:2], bool),
    )
    start = write(empty, jnp.broadcast_to(first[:, None], (*shape[:2], first.shape[-1])))
    end = jax.lax.while_loop(lambda s: (s.t < max_new_tokens) & s.alive.any(), step, start)
    return Rollout(end.tokens, end.mask, end.logps)


def categorical(key: PRNGKeyArray, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Returns ids drawn with the probabilities softmax(logits); one of probability 0 never is.

    By inverting the cumulative distribution, over blocks of ids and then within one: two random numbers a row, where
    `jax.random.categorical` takes one for each id (and a third of a small model's rollout on a CPU). A TPU makes these where it
    looks for the largest, and would copy logits to cut them into blocks. The number of blocks divides the vocabulary: one that
    is split over up to 64 devices stays so.
    """
    blocks = logits.reshape(*logits.shape[:-1], math.gcd(logits.shape[-1], 64), -1)
    highest = logits.max(axis=-1)[..., None, None]
    # 0 itself would draw the first id of all, however unlikely
    first, second = jax.random.uniform(key, (2, *logits.shape[:-1], 1), minval=2.0**-24)
    block = _first_beyond(first, jnp.exp(blocks - highest).sum(axis=-1))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)
    return block * blocks.shape[-1] + _first_beyond(second, jnp.exp(inside - highest)[..., 0, :])


def _first_beyond(
    share: Float[Array, "... 1"], weights: Float[Array, "... n"]
) -> Int[Array, "..."]:
    """Returns the first place with a weight where the running sum is above `share`, in (0, 1), of the whole."""
    reached = jnp.where(
        weights > 0, jnp.cumsum(weights, axis=-1), 0
    )  # its largest, not its last: rounding may differ by place
    return jnp.argmax(reached > share * reached.max(axis=-1, keepdims=True), axis=-1)


def nucleus(logps: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Returns `logps` with -inf outside the smallest set of likeliest tokens whose probabilities reach `top_p`."""
    ordered = jnp.sort(logps, axis=-1, descending=True)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    kept = jnp.sum(
        before < top_p * jnp.exp(ordered).sum(axis=-1, keepdims=True), axis=-1, keepdims=True
    )
    threshold = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logps >= threshold, logps, -jnp.inf)
