"""Traffic of compiled programs: loops count per iteration, slices count as slices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxlib import _hlo  # the parser of HLO text has no public name

from pg_ground import config
from pg_ground.aot import hlo_analysis
from pg_ground.aot.hlo_proto import Program, Shape, read_hlo, read_module
from pg_ground.parallel import sharding

LAYERS, ROWS, WIDTH = 5, 16, 64


def compile_here(function: Callable[..., jax.Array], *args: Any) -> Program:
    """Returns the program that XLA makes of a function for this machine's CPU."""
    (module,) = jax.jit(function).lower(*args).compile().runtime_executable().hlo_modules()
    return read_module(module.as_serialized_hlo_module_proto())


def over_layers(x: jax.Array, stack: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def test_a_loop_over_layers_reads_each_layer_once():
    """The whole stack is an operand of every iteration, but an iteration reads only one slice."""
    x = jnp.ones((ROWS, WIDTH))
    stack = jnp.ones((LAYERS, WIDTH, WIDTH))
    program = compile_here(over_layers, x, stack)
    traffic = hlo_analysis.measure_traffic(program, default_trip_count=1000)
    minimum = stack.nbytes + x.nbytes
    assert minimum <= traffic.hbm_bytes <= 4 * minimum + LAYERS * 6 * x.nbytes
    assert not traffic.collectives


def test_traffic_grows_with_the_number_of_layers():
    x = jnp.ones((ROWS, WIDTH))
    programs = [
        compile_here(over_layers, x, jnp.ones((depth, WIDTH, WIDTH)))
        for depth in (LAYERS, 2 * LAYERS)
    ]
    once, twice = (hlo_analysis.measure_traffic(program, 1).hbm_bytes for program in programs)
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

    traffic = hlo_analysis.measure_traffic(compile_here(function, x, stack), 1)
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

    program = compile_here(function, jnp.ones((WIDTH, WIDTH)))
    once, ten_times = (hlo_analysis.measure_traffic(program, count).hbm_bytes for count in (1, 10))
    assert ten_times > 5 * once


TPU_HLO = """HloModule m, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[8,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %c = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[8,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %c, %c), dynamic_slice_sizes={8,128}
}

%step (input.2: bf16[8,128]) -> bf16[64,128] {
  %input.2 = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,128]{1,0} all-gather(%input.2), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, dimensions={0}
}

%step.2 (input.3: bf16[8,128]) -> bf16[64,128] {
  %input.3 = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[64,128]{1,0} all-gather(%input.3), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, dimensions={0}
}

%condition (state: (u32[], bf16[8,128])) -> pred[] {
  %state = (u32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=0
  %n = u32[]{:T(128)} constant(18)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (state.1: (u32[], bf16[8,128])) -> (u32[], bf16[8,128]) {
  %state.1 = (u32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  %w = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state.1), index=1
  %fusion.7 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%step
  %fusion.8 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%step.2
  %fusion.9 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%fusion.7), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (u32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%j, %fusion.9)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:128]}
  %slice-done = bf16[2,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %zero = u32[]{:T(128)} constant(0)
  %tuple.2 = (u32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%zero, %x)
  %while.1 = (u32[]{:T(128)}, bf16[8,128]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501
"""Patterns of TPU programs: an all-gather spread over two fusions, an all-reduce of which a device
keeps its part, arrays in VMEM (S(1)), and a slice that is copied to VMEM ahead of time."""


def test_traffic_of_a_tpu_program():
    module = _hlo.hlo_module_from_text(TPU_HLO)
    program = read_module(module.as_serialized_hlo_module_proto())
    traffic = hlo_analysis.measure_traffic(program, 1)
    assert traffic.collectives == {
        "all-gather": (18, 18 * 64 * 128 * 2),
        "reduce-scatter": (18, 18 * 64 * 128 * 2),
    }
    # The result of fusion.9 in each iteration, one slice of two rows, and the source of one copy.
    # All other arrays are in VMEM.
    assert traffic.hbm_bytes == (18 * 8 + 2 + 8) * 128 * 2


@pytest.mark.parametrize(
    ("text", "size", "hbm_size", "name"),
    [
        ("f32[2,3]{1,0}", 24, 24, "f32[2,3]"),
        ("(bf16[4]{0}, s32[])", 12, 12, "(bf16[4], s32[])"),
        ("pred[]", 1, 1, "pred[]"),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, 0, "bf16[8,128]"),
        ("s4[3,3]{1,0:E(4)}", 5, 5, "s4[3,3]"),
        ("token[]", 0, 0, "()"),
    ],
)
def test_shape_bytes(text, size, hbm_size, name):
    hlo = (
        f"HloModule m\n\nENTRY %main (x: {text}) -> {text} {{\n  ROOT %x = {text} parameter(0)\n}}"
    )
    program = read_module(_hlo.hlo_module_from_text(hlo).as_serialized_hlo_module_proto())
    shape: Shape = program.computations[program.entry].instructions[0].shape
    assert hlo_analysis.shape_bytes(shape) == size
    assert hlo_analysis.shape_bytes(shape, only_hbm=True) == hbm_size
    assert str(shape) == name


@pytest.mark.parametrize("data", [b"", b"no proto", b"\x0a\x02\x08\x01"])
def test_bytes_that_hold_no_program_are_refused(data):
    with pytest.raises(ValueError, match="proto"):
        read_hlo(data)
