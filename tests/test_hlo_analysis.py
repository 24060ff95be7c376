"""Traffic of compiled programs: loops count per iteration, slices count as slices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pg_ground import config
from pg_ground.aot import hlo_analysis
from pg_ground.parallel import sharding

LAYERS, ROWS, WIDTH = 5, 16, 64


def hlo_text(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def over_layers(x: jax.Array, stack: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_a_loop_over_layers_reads_each_layer_once():
    """The whole stack is an operand of every iteration, but an iteration reads only one slice."""
    x = jnp.ones((ROWS, WIDTH))
    stack = jnp.ones((LAYERS, WIDTH, WIDTH))
    text = hlo_text(over_layers, x, stack)
    traffic = hlo_analysis.measure_traffic(text, default_trip_count=1000)
    minimum = stack.nbytes + x.nbytes
    assert minimum <= traffic.hbm_bytes <= 4 * minimum + LAYERS * 6 * x.nbytes
    assert not traffic.collectives


def test_traffic_grows_with_the_number_of_layers():
    x = jnp.ones((ROWS, WIDTH))
    texts = [
        hlo_text(over_layers, x, jnp.ones((depth, WIDTH, WIDTH))) for depth in (LAYERS, 2 * LAYERS)
    ]
    once, twice = (hlo_analysis.measure_traffic(text, 1).hbm_bytes for text in texts)
    assert 1.8 <= twice / once <= 2.2


def test_weights_that_are_gathered_in_a_loop_count_in_every_iteration():
    mesh = sharding.make_mesh(config.Mesh())
    shard_rows = sharding.activation_sharding(mesh).activations
    x = jax.device_put(jnp.ones((ROWS, WIDTH)), sharding.batch_sharding(mesh))
    stack = jax.device_put(
        jnp.ones((LAYERS, WIDTH, WIDTH)), NamedSharding(mesh, PartitionSpec(None, "data"))
    )

    def function(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (shard_rows(jnp.tanh(shard_rows(x) @ w)), None), x, stack)[
            0
        ]

    traffic = hlo_analysis.measure_traffic(hlo_text(function, x, stack), 1)
    assert set(traffic.collectives) == {"all-gather"}
    count, size = traffic.collectives["all-gather"]
    assert size == stack.nbytes
    assert count in (1, LAYERS)  # XLA may gather the whole stack before the loop


def test_the_default_trip_count_applies_if_a_condition_tests_more_than_a_counter():
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda state: (state[0] < 7) & (state[1].sum() < 1e9),
            lambda state: (state[0] + 1, jnp.sin(state[1]) @ state[1]),
            (0, x),
        )[1]

    text = hlo_text(function, jnp.ones((WIDTH, WIDTH)))
    once, ten_times = (hlo_analysis.measure_traffic(text, count).hbm_bytes for count in (1, 10))
    assert ten_times > 5 * once


TPU_HLO = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[8,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %c, %c)
}

%step (input.2: bf16[8,128]) -> bf16[64,128] {
  %input.2 = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,128]{1,0} all-gather(%input.2), channel_id=7, dimensions={0}
}

%part (whole: bf16[8,128]) -> bf16[2,128] {
  %whole = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} slice(%whole), slice={[0:2], [0:128]}
}

%condition (state: (s32[], bf16[8,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} constant(18)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (state.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %w = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state.1), index=1
  %fusion.7 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%step
  %fusion.8 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%step
  %fusion.9 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%fusion.7), calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%i, %fusion.9)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = ((bf16[8,128]), bf16[2,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%part
  %slice-done = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} async-done(%slice-start)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""
"""Patterns of TPU programs: an all-gather spread over two fusions, an all-reduce of which a device
keeps its part, arrays in VMEM (S(1)), and a slice that is copied to VMEM ahead of time."""


def test_traffic_of_a_tpu_program():
    traffic = hlo_analysis.measure_traffic(TPU_HLO, 1)
    assert traffic.collectives == {
        "all-gather": (18, 18 * 64 * 128 * 2),
        "reduce-scatter": (18, 18 * 64 * 128 * 2),
    }
    # The result of fusion.9 in each iteration, and one slice of two rows; the rest is in VMEM.
    assert traffic.hbm_bytes == (18 * 8 + 2) * 128 * 2


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4]{0}, s32[])", 12),
        ("pred[]", 1),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("token[]", 0),
    ],
)
def test_shape_bytes(shape, size):
    assert hlo_analysis.shape_bytes(shape) == size
    assert hlo_analysis.shape_bytes(shape, only_hbm=True) == (0 if "S(1)" in shape else size)
