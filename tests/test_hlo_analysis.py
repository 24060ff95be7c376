"""What a compiled program moves, read from its text: loops counted, slices not taken for the whole."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pg_ground import config
from pg_ground.aot import hlo_analysis
from pg_ground.parallel import sharding

LAYERS, ROWS, WIDTH = 5, 16, 64


def text_of(function, *args) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def over_layers(x: jax.Array, stack: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_a_loop_over_layers_reads_each_layer_once():
    """A stack of matrices is an operand of every turn, and a slice of it is what is read."""
    x, stack = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    found = hlo_analysis.measure_traffic(text_of(over_layers, x, stack), default_trip_count=1000)
    least = stack.nbytes + x.nbytes
    assert least <= found.hbm_bytes <= 4 * least + LAYERS * 6 * x.nbytes
    assert not found.collectives


def test_a_deeper_stack_moves_as_much_more():
    x = jnp.ones((ROWS, WIDTH))
    one, two = (
        hlo_analysis.measure_traffic(
            text_of(over_layers, x, jnp.ones((n, WIDTH, WIDTH))), 1
        ).hbm_bytes
        for n in (LAYERS, 2 * LAYERS)
    )
    assert 1.8 <= two / one <= 2.2


def test_weights_that_are_gathered_in_a_loop_are_counted_at_every_turn():
    mesh = sharding.make_mesh(config.Mesh())
    rows = sharding.activation_sharding(mesh).rows
    x = jax.device_put(jnp.ones((ROWS, WIDTH)), sharding.batch_sharding(mesh))
    stack = jax.device_put(
        jnp.ones((LAYERS, WIDTH, WIDTH)), NamedSharding(mesh, PartitionSpec(None, "data"))
    )

    def function(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (rows(jnp.tanh(rows(x) @ w)), None), x, stack)[0]

    found = hlo_analysis.measure_traffic(text_of(function, x, stack), 1)
    assert set(found.collectives) == {"all-gather"}
    count, size = found.collectives["all-gather"]
    assert size == stack.nbytes and count in (1, LAYERS)  # XLA may gather the stack before the loop


def test_a_loop_without_a_written_end_turns_as_often_as_is_said():
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda s: (s[0] < 7) & (s[1].sum() < 1e9),
            lambda s: (s[0] + 1, jnp.sin(s[1]) @ s[1]),
            (0, x),
        )[1]

    text = text_of(function, jnp.ones((WIDTH, WIDTH)))
    one, ten = (hlo_analysis.measure_traffic(text, turns).hbm_bytes for turns in (1, 10))
    assert ten > 5 * one


TPU = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[8,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %c, %c), dynamic_slice_sizes={8,128}
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
  %fusion.9 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%fusion.7), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%i, %fusion.9)
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) async-start(%a), calls=%part
  %slice-done = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} async-done(%slice-start)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""
"""What a TPU's program looks like: a gather spread over two fusions, a sum of which a device keeps its part, numbers in VMEM, and
a slice brought there ahead of time."""


def test_a_tpus_program():
    found = hlo_analysis.measure_traffic(TPU, 1)
    assert found.collectives == {
        "all-gather": (18, 18 * 64 * 128 * 2),
        "reduce-scatter": (18, 18 * 64 * 128 * 2),
    }
    assert (
        found.hbm_bytes == (18 * 8 + 2) * 128 * 2
    )  # the result of fusion.9, and a slice read; the rest lies in VMEM


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
def test_size(shape, size):
    assert hlo_analysis.shape_bytes(shape) == size
    assert hlo_analysis.shape_bytes(shape, only_hbm=True) == (0 if "S(1)" in shape else size)
