"""Counts the bytes that a compiled XLA program moves in memory and in collectives.

The input is the optimised HLO. The body of a loop counts once per iteration. XLA's own
`cost_analysis` counts it once, and a model is a loop over layers.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pg_ground.aot.hlo_proto import Computation, Instruction, Program, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

HBM = 0
"""The memory space of HBM in a layout."""

NO_TRAFFIC = frozenset(
    {
        "after-all",
        "async-done",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "copy-done",
        "get-tuple-element",
        "iota",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    }
)
"""Operations that move nothing themselves."""

RUNS_INSIDE = ("fusion", "async-start", "call", "conditional")
"""Operations whose called computations run once. The reducer of a reduction is no such computation:
it works on registers."""

Shapes = Mapping[int, Shape]
"""Shapes of the instructions of a computation by id."""


class Traffic(NamedTuple):
    """The bytes that one device moves in one run of a program."""

    hbm_bytes: int
    """Read and written, without the padding of tiles."""
    collectives: dict[str, tuple[int, int]]
    """By kind: the number of collectives, and the bytes that they bring to a device or take from
    it."""


class Call(NamedTuple):
    """One computation that runs."""

    computation: int
    runs: int
    fused: bool
    """Whether it is inside a fusion. Its intermediate values then stay out of HBM."""


def measure_traffic(program: Program, default_trip_count: int) -> Traffic:
    """Returns the traffic of a program.

    Args:
      program: the optimised HLO.
      default_trip_count: the iterations of a loop if its condition does not name a constant.
    """
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    channels: set[int] = set()
    hbm_bytes = 0
    for call in _walk(program, Call(program.entry, 1, False), default_trip_count):
        computation = program.computations[call.computation]
        shapes = {instruction.id: instruction.shape for instruction in computation.instructions}
        for instruction in computation.instructions:
            kind = _collective_kind(instruction.operation, computation.name)
            # A collective may be spread over several fusions; each of them then contains it, with
            # the same channel.
            if kind and not (instruction.channel_id and instruction.channel_id in channels):
                channels.add(instruction.channel_id)
                size = _collective_bytes(kind, instruction, shapes)
                counts[kind] = counts.get(kind, 0) + call.runs
                sizes[kind] = sizes.get(kind, 0) + call.runs * size
            if not call.fused and instruction.operation not in NO_TRAFFIC:
                hbm_bytes += call.runs * _hbm_bytes(instruction, shapes, program)
    collectives = {kind: (counts[kind], sizes[kind]) for kind in COLLECTIVES if kind in counts}
    return Traffic(hbm_bytes, collectives)


def _collective_kind(operation: str, computation: str) -> str | None:
    """Returns the kind of collective that an operation is, None if it is none."""
    kind = operation.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # On a TPU an all-reduce inside this fusion is a reduce-scatter: each device keeps its part.
    scattered = kind == "all-reduce" and "all-reduce-scatter" in computation
    return "reduce-scatter" if scattered else kind


def _collective_bytes(kind: str, instruction: Instruction, shapes: Shapes) -> int:
    """Returns the bytes of a collective: the gathered result, or else the operands.

    An all-reduce counts them twice.
    """
    operand_bytes = sum(shape_bytes(shapes[operand]) for operand in instruction.operands)
    if kind == "all-gather":
        # The result of an asynchronous start also contains the operands.
        is_start = instruction.operation.endswith("-start")
        return shape_bytes(instruction.shape) - (operand_bytes if is_start else 0)
    return 2 * operand_bytes if kind == "all-reduce" else operand_bytes


def shape_bytes(shape: Shape, only_hbm: bool = False) -> int:
    """Returns the bytes of a shape and of all its parts.

    Args:
      only_hbm: leaves out arrays in other memories.
    """
    own_bytes = 0 if only_hbm and shape.memory_space != HBM else shape.bytes
    return own_bytes + sum(shape_bytes(part, only_hbm) for part in shape.parts)


def _hbm_bytes(instruction: Instruction, shapes: Shapes, program: Program) -> int:
    """Returns the bytes that an instruction reads from HBM and writes to it."""
    shape = instruction.shape
    operands = [shapes[operand] for operand in instruction.operands]
    if instruction.operation == "dynamic-slice":
        return 2 * shape_bytes(shape, True)
    if instruction.operation == "dynamic-update-slice":
        return 2 * shape_bytes(operands[1], True)
    if instruction.operation == "copy-start":  # its shape is (destination, source, context)
        return shape_bytes(shape.parts[0], True) + shape_bytes(operands[0], True)
    if instruction.operation in ("fusion", "async-start"):
        return _fusion_bytes(instruction, operands, program)
    return shape_bytes(shape, True) + sum(shape_bytes(operand, True) for operand in operands)


def _fusion_bytes(instruction: Instruction, operands: list[Shape], program: Program) -> int:
    """Returns the bytes that a fusion reads and writes.

    Slices of operands and of results count only as slices.
    """
    computation = program.computations[instruction.calls[0]]
    parameters = _parameters(computation)
    read_bytes = sum(
        _parameter_bytes(parameters[index], computation, shape_bytes(operand, True), program)
        for index, operand in enumerate(operands)
    )
    is_start = instruction.operation == "async-start"
    # The shape of an asynchronous start is (operands), result, context.
    result = instruction.shape.parts[1] if is_start else instruction.shape
    result_bytes = shape_bytes(result, True)
    updates = [
        inner for inner in computation.instructions if inner.operation == "dynamic-update-slice"
    ]
    if not updates:
        return read_bytes + result_bytes
    inner_shapes = {inner.id: inner.shape for inner in computation.instructions}
    written = sum(shape_bytes(inner_shapes[update.operands[1]]) for update in updates)
    return read_bytes + min(written, result_bytes)


def _parameters(computation: Computation) -> dict[int, int]:
    """Returns the ids of a computation's parameters by their positions."""
    return {
        instruction.parameter_number: instruction.id
        for instruction in computation.instructions
        if instruction.operation == "parameter"
    }


def _parameter_bytes(
    parameter: int, computation: Computation, parameter_bytes: int, program: Program
) -> int:
    """Returns the bytes that a fusion reads of the parameter with this id.

    Only the slices count if the fusion reads nothing but slices; else all `parameter_bytes` count.
    """
    total = 0
    for instruction in computation.instructions:
        for index, operand in enumerate(instruction.operands):
            if operand != parameter:
                continue
            if instruction.operation in ("dynamic-slice", "slice", "gather"):
                total += shape_bytes(instruction.shape) if index == 0 else 0
            elif instruction.operation == "bitcast":
                total += _parameter_bytes(instruction.id, computation, parameter_bytes, program)
            elif instruction.operation == "fusion":
                nested = program.computations[instruction.calls[0]]
                nested_parameter = _parameters(nested)[index]
                total += _parameter_bytes(nested_parameter, nested, parameter_bytes, program)
            elif not (instruction.operation == "dynamic-update-slice" and index == 0):
                return parameter_bytes
    return min(total, parameter_bytes)


def _walk(program: Program, call: Call, default_trip_count: int) -> Iterator[Call]:
    """Yields `call` and every call inside it."""
    yield call
    for instruction in program.computations[call.computation].instructions:
        if instruction.operation == "while":
            body, condition = instruction.calls
            trip_count = _trip_count(program, instruction, condition, default_trip_count)
            inner = Call(body, call.runs * trip_count, call.fused)
            yield from _walk(program, inner, default_trip_count)
        elif instruction.operation in RUNS_INSIDE:
            fused = call.fused or instruction.operation != "call"
            for computation in instruction.calls:
                yield from _walk(program, Call(computation, call.runs, fused), default_trip_count)


def _trip_count(program: Program, loop: Instruction, condition: int, default: int) -> int:
    """Returns the iterations of a `while`.

    This is XLA's own count, or the constant that the counter stays below, or `default`.
    """
    noted_count = _known_trip_count(loop.backend_config)
    if noted_count is not None:
        return noted_count
    instructions = program.computations[condition].instructions
    constants = {i.id: i.literal for i in instructions if i.literal is not None}
    compares = [i for i in instructions if i.comparison == "LT"]
    # A condition that also tests something else may end the loop earlier.
    if len(compares) == 1 and not any(i.operation in ("and", "or", "fusion") for i in instructions):
        for operand in compares[0].operands:
            if operand in constants:
                return constants[operand]
    return default


def _known_trip_count(backend_config: bytes) -> int | None:
    """Returns the number of iterations that XLA has noted for a loop, None if it has noted none."""
    try:
        config = json.loads(backend_config)
        return int(config["known_trip_count"]["n"])
    except (ValueError, KeyError, TypeError):
        return None
