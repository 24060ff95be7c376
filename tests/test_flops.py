"""The main speed of the package, counted by XLA: G completions of a prompt cost one prefix, not G.

The model has PaliGemma 1's proportions at 1/16 of its widths: 256 image tokens, 16 of prompt, two layers of each tower, and a
vocabulary as large beside two layers as PaliGemma's is beside 18. XLA counts the body of a loop once however often it turns, so
the layers are unrolled here and T is one block of the vocabulary: no loop is left, and the count is that of the whole program. A
count by hand agrees with it, and says what the ratio is at PaliGemma's real size.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from pg_ground.aot import flops
from pg_ground.config import Model, Text, Vision
from pg_ground.models import PaliGemma

B, G, L, T = 1, 8, 16, 8

SMALL = Model(
    image_size=224,
    vision=Vision(width=72, depth=2, mlp_dim=269, num_heads=4, patch_size=14),
    text=Text(
        width=128,
        depth=2,
        mlp_dim=1024,
        num_heads=8,
        num_kv_heads=1,
        head_dim=16,
        query_scale=16**-0.5,
        vocab_size=1792,
    ),
    remat="none",
    scan_unroll=2,
    logits_block=T,
)


class Sizes(NamedTuple):
    """What one call of `completion_logps` works on."""

    images: int
    group_size: int
    prefix: int
    completion: int


SHARED = Sizes(B, G, 256 + L, T)
REPEATED = Sizes(B * G, 1, 256 + L, T)


def arguments(policy: PaliGemma, sizes: Sizes) -> tuple[Any, ...]:
    """Returns shapes of what `completion_logps` takes."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    side, length = policy.config.image_size, sizes.prefix - 256

    def of(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = (sizes.images, sizes.group_size, sizes.completion)
    prompt = (sizes.images, length)
    args = (
        of((sizes.images, side, side, 3), jnp.float32),
        of(prompt, jnp.int32),
        of(prompt, jnp.bool_),
    )
    return params, *args, of(tokens, jnp.int32), of(tokens, jnp.bool_)


def flops_by_xla(sizes: Sizes, model: Model = SMALL) -> float:
    """Returns the floating-point operations of the compiled `completion_logps`."""
    policy = PaliGemma(model)
    program = jax.jit(policy.completion_logps).lower(*arguments(policy, sizes))
    return program.compile().cost_analysis()["flops"]


def flops_by_hand(sizes: Sizes, model: Model) -> float:
    """Returns two operations per multiplication of every matrix product; T − 1 tokens are fed, T are scored."""
    v, t = model.vision, model.text
    patches = (model.image_size // v.patch_size) ** 2
    completions = sizes.images * sizes.group_size

    embedding = patches * v.patch_size**2 * 3 * v.width
    block = patches * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + 2 * patches**2 * v.width
    tower = embedding + v.depth * block + patches * v.width * t.width

    heads = t.num_heads * t.head_dim
    matrices = t.width * (2 * heads + 2 * t.num_kv_heads * t.head_dim + 3 * t.mlp_dim)
    fed = sizes.completion - 1
    prefix = sizes.prefix * matrices + 2 * sizes.prefix**2 * heads
    suffix = fed * matrices + 2 * fed * (sizes.prefix + fed) * heads

    vocabulary = sizes.completion * t.vocab_size * t.width
    return 2.0 * (
        sizes.images * (tower + t.depth * prefix) + completions * (t.depth * suffix + vocabulary)
    )


@pytest.fixture(scope="module")
def counted() -> dict[Sizes, float]:
    return {sizes: flops_by_xla(sizes) for sizes in (SHARED, REPEATED)}


def test_a_shared_prefix_costs_at_most_a_fifth_of_repeated_ones(counted):
    assert counted[SHARED] <= 0.2 * counted[REPEATED]


@pytest.mark.parametrize("sizes", [SHARED, REPEATED], ids=["shared", "repeated"])
def test_the_count_is_that_of_the_matrix_products(counted, sizes):
    """What a count by hand leaves out is elementwise: some 20 operations per number against 2 · 128 and more of a product."""
    assert (
        flops_by_hand(sizes, SMALL)
        <= counted[sizes]
        <= (1 + 20 / 256) * flops_by_hand(sizes, SMALL)
    )


def test_the_count_sees_every_layer(counted):
    """The control: were a layer counted once, as loops are, a third one would be free."""
    deeper = replace(
        SMALL,
        text=replace(SMALL.text, depth=3),
        vision=replace(SMALL.vision, depth=3),
        scan_unroll=3,
    )
    more = flops_by_xla(SHARED, deeper) / counted[SHARED]
    by_hand = flops_by_hand(SHARED, deeper) / flops_by_hand(SHARED, SMALL)
    assert by_hand > 1.3 and abs(more / by_hand - 1) < 0.05


def test_at_paligemmas_own_size_the_ratio_is_the_same():
    """3B at 224 pixels; 16 prompt tokens and 8 of completion, 8 completions a prompt."""
    assert flops_by_hand(SHARED, Model()) <= 0.2 * flops_by_hand(REPEATED, Model())
    small = flops_by_hand(SHARED, SMALL) / flops_by_hand(REPEATED, SMALL)
    assert abs(flops_by_hand(SHARED, Model()) / flops_by_hand(REPEATED, Model()) - small) < 0.02


def jaxpr_of(function, *args) -> jax.extend.core.Jaxpr:
    return jax.make_jaxpr(function)(*args).jaxpr


@pytest.mark.parametrize("sizes", [SHARED, REPEATED], ids=["shared", "repeated"])
def test_a_jaxpr_has_the_operations_counted_by_hand(sizes):
    """Loops over layers and over blocks of the vocabulary turn here, and each turn counts."""
    model = replace(SMALL, scan_unroll=1, logits_block=2)
    policy = PaliGemma(model)
    found = flops.count(
        jaxpr_of(policy.completion_logps, *arguments(policy, sizes)), while_trip_count=1
    )
    assert found == flops_by_hand(sizes, model)


def test_a_gradient_costs_two_more_passes_and_recomputation_a_third():
    """The vocabulary is always recomputed; with remat so are the layers."""
    counts = {}
    for remat in ("none", "nothing_saveable"):
        policy = PaliGemma(replace(SMALL, remat=remat, scan_unroll=1))
        params, *rest = arguments(policy, SHARED)

        def loss(params, *rest, policy=policy):
            return policy.completion_logps(params, *rest)[0].sum()

        counts[remat] = flops.count(jaxpr_of(jax.grad(loss), params, *rest), while_trip_count=1)
    once = flops_by_hand(SHARED, SMALL)
    vocabulary = 2.0 * B * G * T * SMALL.text.vocab_size * SMALL.text.width
    patches = (
        2.0 * 256 * SMALL.vision.patch_size**2 * 3 * SMALL.vision.width
    )  # no gradient is asked of pixels
    assert counts["none"] == pytest.approx(3 * once + vocabulary - patches)
    assert counts["none"] < counts["nothing_saveable"] < counts["none"] + once


def test_a_loop_with_a_condition_turns_as_often_as_is_said():
    def decode(x):
        return jax.lax.while_loop(
            lambda s: s[0] < x.sum(), lambda s: (s[0] + 1, s[1] @ s[1]), (0.0, x)
        )

    assert flops.count(jaxpr_of(decode, jnp.ones((4, 4))), while_trip_count=7) == 7 * 2 * 4**3


def test_of_a_platforms_variants_one_is_counted():
    def choose(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x)

    assert flops.count(jaxpr_of(choose, jnp.ones((4, 4))), while_trip_count=1) == 2 * 4**3
