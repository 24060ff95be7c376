"""The main saving of the package: G completions of a prompt cost one prefix, not G prefixes.

The model has PaliGemma 1's proportions at 1/16 of its widths: 256 image tokens, 16 prompt tokens,
and two layers in each tower. The vocabulary is as large beside two layers as PaliGemma's is beside
18. XLA's `cost_analysis` counts the body of a loop once. Therefore the layers are unrolled here and
T is one block of the vocabulary: the program has no loop. A count by hand agrees with XLA's count,
and gives the ratio at PaliGemma's real size.
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
    """The input sizes of one call of `completion_logps`."""

    images: int
    group_size: int
    prefix: int
    completion: int


SHARED = Sizes(B, G, 256 + L, T)
REPEATED = Sizes(B * G, 1, 256 + L, T)


def abstract_arguments(policy: PaliGemma, sizes: Sizes) -> tuple[Any, ...]:
    """Returns the abstract arguments of `completion_logps`."""
    params = jax.eval_shape(policy.init, jax.random.key(0))
    side = policy.config.image_size
    prompt_shape = (sizes.images, sizes.prefix - 256)
    completion_shape = (sizes.images, sizes.group_size, sizes.completion)
    return (
        params,
        jax.ShapeDtypeStruct((sizes.images, side, side, 3), jnp.float32),
        jax.ShapeDtypeStruct(prompt_shape, jnp.int32),
        jax.ShapeDtypeStruct(prompt_shape, jnp.bool_),
        jax.ShapeDtypeStruct(completion_shape, jnp.int32),
        jax.ShapeDtypeStruct(completion_shape, jnp.bool_),
    )


def flops_by_xla(sizes: Sizes, model: Model = SMALL) -> float:
    """Returns XLA's count of the operations of the compiled `completion_logps`."""
    policy = PaliGemma(model)
    program = jax.jit(policy.completion_logps).lower(*abstract_arguments(policy, sizes))
    return program.compile().cost_analysis()["flops"]


def flops_by_hand(sizes: Sizes, model: Model) -> float:
    """Returns two operations per multiplication of every matrix product.

    T - 1 tokens are inputs, T are scored.
    """
    v = model.vision
    t = model.text
    patches = (model.image_size // v.patch_size) ** 2
    completions = sizes.images * sizes.group_size

    embedding = patches * v.patch_size**2 * 3 * v.width
    block = patches * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + 2 * patches**2 * v.width
    tower = embedding + v.depth * block + patches * v.width * t.width

    heads = t.num_heads * t.head_dim
    matrices = t.width * (2 * heads + 2 * t.num_kv_heads * t.head_dim + 3 * t.mlp_dim)
    inputs = sizes.completion - 1
    prefix = sizes.prefix * matrices + 2 * sizes.prefix**2 * heads
    suffix = inputs * matrices + 2 * inputs * (sizes.prefix + inputs) * heads

    vocabulary = sizes.completion * t.vocab_size * t.width
    return 2.0 * (
        sizes.images * (tower + t.depth * prefix) + completions * (t.depth * suffix + vocabulary)
    )


@pytest.fixture(scope="module")
def xla_flops() -> dict[Sizes, float]:
    return {sizes: flops_by_xla(sizes) for sizes in (SHARED, REPEATED)}


@pytest.mark.slow
def test_a_shared_prefix_costs_at_most_a_fifth_of_repeated_prefixes(xla_flops):
    assert xla_flops[SHARED] <= 0.2 * xla_flops[REPEATED]


@pytest.mark.parametrize("sizes", [SHARED, REPEATED], ids=["shared", "repeated"])
def test_xla_counts_the_matrix_products(xla_flops, sizes):
    """The count by hand leaves out elementwise operations.

    They are about 20 per number; a matrix product needs at least 2 · 128.
    """
    by_hand = flops_by_hand(sizes, SMALL)
    assert by_hand <= xla_flops[sizes] <= (1 + 20 / 256) * by_hand


def test_xla_counts_every_layer(xla_flops):
    """A control: if XLA counted a layer once, as in a loop, a third layer would add nothing."""
    deeper = replace(
        SMALL,
        text=replace(SMALL.text, depth=3),
        vision=replace(SMALL.vision, depth=3),
        scan_unroll=3,
    )
    growth = flops_by_xla(SHARED, deeper) / xla_flops[SHARED]
    growth_by_hand = flops_by_hand(SHARED, deeper) / flops_by_hand(SHARED, SMALL)
    assert growth_by_hand > 1.3
    assert abs(growth / growth_by_hand - 1) < 0.05


def test_the_ratio_is_the_same_at_paligemmas_real_size():
    """PaliGemma 3B at 224 pixels: 16 prompt tokens, and 8 completions of 8 tokens per prompt."""
    ratio = flops_by_hand(SHARED, Model()) / flops_by_hand(REPEATED, Model())
    small_ratio = flops_by_hand(SHARED, SMALL) / flops_by_hand(REPEATED, SMALL)
    assert ratio <= 0.2
    assert abs(ratio - small_ratio) < 0.02


def jaxpr_of(function, *args) -> jax.extend.core.Jaxpr:
    return jax.make_jaxpr(function)(*args).jaxpr


@pytest.mark.parametrize("sizes", [SHARED, REPEATED], ids=["shared", "repeated"])
def test_the_count_of_a_jaxpr_equals_the_count_by_hand(sizes):
    """This program has loops over layers and over blocks of the vocabulary.

    Every iteration counts.
    """
    model = replace(SMALL, scan_unroll=1, logits_block=2)
    policy = PaliGemma(model)
    jaxpr = jaxpr_of(policy.completion_logps, *abstract_arguments(policy, sizes))
    assert flops.count(jaxpr, while_trip_count=1) == flops_by_hand(sizes, model)


def test_a_gradient_costs_two_more_passes_and_recomputation_at_most_a_third():
    """The logits are always recomputed. With remat the layers are recomputed too."""
    counts = {}
    for remat in ("none", "nothing_saveable"):
        policy = PaliGemma(replace(SMALL, remat=remat, scan_unroll=1))
        params, *inputs = abstract_arguments(policy, SHARED)

        def loss(params, *inputs, policy=policy):
            return policy.completion_logps(params, *inputs)[0].sum()

        counts[remat] = flops.count(jaxpr_of(jax.grad(loss), params, *inputs), while_trip_count=1)
    forward = flops_by_hand(SHARED, SMALL)
    vocabulary = 2.0 * B * G * T * SMALL.text.vocab_size * SMALL.text.width
    # No gradient of the pixels is needed.
    patches = 2.0 * 256 * SMALL.vision.patch_size**2 * 3 * SMALL.vision.width
    assert counts["none"] == pytest.approx(3 * forward + vocabulary - patches)
    assert counts["none"] < counts["nothing_saveable"] < counts["none"] + forward


def test_a_while_loop_counts_with_its_trip_count():
    def decode(x):
        return jax.lax.while_loop(
            lambda state: state[0] < x.sum(),
            lambda state: (state[0] + 1, state[1] @ state[1]),
            (0.0, x),
        )

    assert flops.count(jaxpr_of(decode, jnp.ones((4, 4))), while_trip_count=7) == 7 * 2 * 4**3


def test_only_one_variant_of_a_platform_counts():
    def choose(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x)

    assert flops.count(jaxpr_of(choose, jnp.ones((4, 4))), while_trip_count=1) == 2 * 4**3
