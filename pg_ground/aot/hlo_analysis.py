"""Counts the bytes that a compiled XLA program moves in memory and in collectives.

The input is the text of the optimised HLO. The body of a loop counts once per iteration. XLA's own
`cost_analysis` counts it once, and a model is a loop over layers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

DTYPE_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1},
    **{"s16": 2, "u16": 2, "bf16": 2, "f16": 2},
    **{"s32": 4, "u32": 4, "f32": 4},
    **{"s64": 8, "u64": 8, "f64": 8},
}

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


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str


Computation = list[Instruction]
HloProgram = Mapping[str, Computation]
"""Computations by name. The name of the entry begins with "ENTRY "."""


class Traffic(NamedTuple):
    """The bytes that one device moves in one run of a program."""

    hbm_bytes: int
    """Read and written, without the padding of tiles."""
    collectives: dict[str, tuple[int, int]]
    """By kind: the number of collectives, and the bytes that they bring to a device or take from
    it."""


class Call(NamedTuple):
    """One computation that runs."""

    computation: str
    runs: int
    fused: bool
    """Whether it is inside a fusion. Its intermediate values then stay out of HBM."""


def measure_traffic(text: str, default_trip_count: int) -> Traffic:
    """Returns the traffic of the program in `text`.

    Args:
      text: the optimised HLO of the program.
      default_trip_count: the iterations of a loop if its condition does not name a constant.
    """
    program = dict(_computations(text))
    entry = next(name for name in program if name.startswith("ENTRY "))
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    channels: set[str] = set()
    hbm_bytes = 0
    for call in _walk(program, Call(entry, 1, False), default_trip_count):
        computation = program[call.computation]
        shapes = {instruction.name: instruction.shape for instruction in computation}
        for instruction in computation:
            kind = _collective_kind(instruction.operation, call.computation)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            # A collective may be spread over several fusions; each of them then contains it, with
            # the same channel.
            if kind and not (channel and channel[1] in channels):
                channels |= {channel[1]} if channel else set()
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


def _collective_bytes(kind: str, instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """Returns the bytes of a collective: the gathered result, or else the operands.

    An all-reduce counts them twice.
    """
    operand_bytes = sum(shape_bytes(shapes.get(name, "")) for name in instruction.operands)
    if kind == "all-gather":
        # The result of an asynchronous start also contains the operands.
        is_start = instruction.operation.endswith("-start")
        return shape_bytes(instruction.shape) - (operand_bytes if is_start else 0)
    return 2 * operand_bytes if kind == "all-reduce" else operand_bytes


def shape_bytes(shape: str, only_hbm: bool = False) -> int:
    """Returns the bytes of a shape or of a tuple of shapes, such as "(bf16[8,128]{1,0}, s32[])".

    Args:
      shape: as HLO writes it.
      only_hbm: leaves out arrays in other memories, whose layout contains S(n).
    """
    total = 0
    for dtype, sizes, layout in re.findall(r"([a-z]+\d*)\[([\d,]*)\]((?:\{[^}]*\})?)", shape):
        if dtype in DTYPE_BYTES and not (only_hbm and "S(" in layout):
            total += DTYPE_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _hbm_bytes(instruction: Instruction, shapes: Mapping[str, str], program: HloProgram) -> int:
    """Returns the bytes that an instruction reads from HBM and writes to it."""
    shape = instruction.shape
    operands = instruction.operands
    if instruction.operation == "dynamic-slice":
        return 2 * shape_bytes(shape, True)
    if instruction.operation == "dynamic-update-slice":
        return 2 * shape_bytes(shapes.get(operands[1], ""), True)
    if instruction.operation == "copy-start":
        destination = shape.split("}, ")[0]
        source = shapes.get(operands[0], "")
        return shape_bytes(destination, True) + shape_bytes(source, True)
    if instruction.operation in ("fusion", "async-start"):
        return _fusion_bytes(instruction, shapes, program)
    operand_bytes = sum(shape_bytes(shapes.get(name, ""), True) for name in operands)
    return shape_bytes(shape, True) + operand_bytes


def _fusion_bytes(instruction: Instruction, shapes: Mapping[str, str], program: HloProgram) -> int:
    """Returns the bytes that a fusion reads and writes.

    Slices of operands and of results count only as slices.
    """
    computation = program.get(_callee(instruction.attributes, "calls"), [])
    parameters = _parameter_names(computation)
    read_bytes = 0
    for index, operand in enumerate(instruction.operands):
        operand_bytes = shape_bytes(shapes.get(operand, ""), True)
        read_bytes += _parameter_bytes(
            parameters.get(index, ""), computation, operand_bytes, program
        )
    is_start = instruction.operation == "async-start"
    # The shape of an asynchronous start is (operands), result, context.
    result = instruction.shape.partition("), ")[2] if is_start else instruction.shape
    result_bytes = shape_bytes(result, True)
    updates = [inner for inner in computation if inner.operation == "dynamic-update-slice"]
    if not updates:
        return read_bytes + result_bytes
    inner_shapes = {inner.name: inner.shape for inner in computation}
    written = sum(shape_bytes(inner_shapes.get(update.operands[1], "")) for update in updates)
    return read_bytes + min(written, result_bytes)


def _parameter_names(computation: Computation) -> dict[int, str]:
    """Returns the names of a computation's parameters by their positions."""
    return {
        int(instruction.attributes.partition(")")[0] or 0): instruction.name
        for instruction in computation
        if instruction.operation == "parameter"
    }


def _parameter_bytes(
    name: str, computation: Computation, parameter_bytes: int, program: HloProgram
) -> int:
    """Returns the bytes that a fusion reads of its parameter `name`.

    Only the slices count if the fusion reads nothing but slices; else all `parameter_bytes` count.
    """
    total = 0
    for instruction in computation:
        for index, operand in enumerate(instruction.operands):
            if operand != name:
                continue
            if instruction.operation in ("dynamic-slice", "slice", "gather"):
                total += shape_bytes(instruction.shape) if index == 0 else 0
            elif instruction.operation == "bitcast":
                total += _parameter_bytes(instruction.name, computation, parameter_bytes, program)
            elif instruction.operation == "fusion":
                nested = program.get(_callee(instruction.attributes, "calls"), [])
                nested_name = _parameter_names(nested).get(index, "")
                total += _parameter_bytes(nested_name, nested, parameter_bytes, program)
            elif not (instruction.operation == "dynamic-update-slice" and index == 0):
                return parameter_bytes
    return min(total, parameter_bytes)


def _walk(program: HloProgram, call: Call, default_trip_count: int) -> Iterator[Call]:
    """Yields `call` and every call inside it."""
    yield call
    for instruction in program[call.computation]:
        attributes = instruction.attributes
        is_call = instruction.operation == "call"
        if instruction.operation == "while":
            trip_count = _trip_count(program, attributes, default_trip_count)
            body = Call(_callee(attributes, "body"), call.runs * trip_count, call.fused)
            if body.computation in program:
                yield from _walk(program, body, default_trip_count)
            continue
        for key in ("calls", "to_apply", "true_computation", "false_computation"):
            callee = _callee(attributes, key)
            if callee in program and not (key == "to_apply" and not is_call):
                inner = Call(callee, call.runs, call.fused or not is_call)
                yield from _walk(program, inner, default_trip_count)


def _trip_count(program: HloProgram, attributes: str, default: int) -> int:
    """Returns the iterations of a `while`.

    This is XLA's own count, or the constant that the counter stays below, or `default`.
    """
    annotation = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    if annotation:
        return int(annotation[1])
    condition = program.get(_callee(attributes, "condition"), [])
    constants = {i.name: i for i in condition if i.operation == "constant"}
    compares = [i for i in condition if i.operation == "compare" and "direction=LT" in i.attributes]
    # A condition that also tests something else may end the loop earlier.
    if len(compares) == 1 and not any(i.operation in ("and", "or", "fusion") for i in condition):
        for operand in compares[0].operands:
            if operand in constants:
                return int(constants[operand].attributes.partition(")")[0])
    return default


def _callee(attributes: str, key: str) -> str:
    """Returns the computation that an attribute such as calls=%name refers to, or ""."""
    match = re.search(rf"(?:^|[ ,]){key}=%?([\w.\-]+)", attributes)
    return match[1] if match else ""


def _computations(text: str) -> Iterator[tuple[str, Computation]]:
    """Yields the name and the instructions of each computation of an HLO module."""
    name = ""
    instructions: Computation = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = (head[1] or "") + head[2]
            instructions = []
        elif line.startswith("}"):
            yield name, instructions
        elif name and line.startswith(" "):
            instruction = _parse_instruction(line)
            if instruction:
                instructions.append(instruction)


def _parse_instruction(line: str) -> Instruction | None:
    """Returns the instruction of a line such as "%name = shape operation(%a), attributes"."""
    match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    name, text = match[1], match[2]
    shape_end = _closing_parenthesis(text) + 1 if text.startswith("(") else text.index(" ")
    shape, call = text[:shape_end], text[shape_end:].lstrip()
    operation, _, arguments = call.partition("(")
    end = _closing_parenthesis("(" + arguments) - 1
    operands, attributes = arguments[:end], arguments[end + 1 :]
    if operation in ("parameter", "constant"):  # the number in the parentheses is no operand
        attributes = f"{operands}){attributes}"
    return Instruction(
        name, shape, operation, tuple(re.findall(r"%([\w.\-]+)", operands)), attributes
    )


def _closing_parenthesis(text: str) -> int:
    """Returns the index of the parenthesis that closes the first character of `text`."""
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text) - 1
