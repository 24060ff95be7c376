"""What an optimised program of XLA's moves, read from its text: bytes of HBM and of collectives, loops as often as they turn.

XLA's own `cost_analysis` counts the body of a loop once; a model is a loop over layers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
         "f64": 8}  # fmt: skip

FREE = frozenset(
    (
        *(
            "parameter",
            "constant",
            "get-tuple-element",
            "tuple",
            "bitcast",
            "while",
            "conditional",
            "call",
            "after-all",
        ),
        *("partition-id", "replica-id", "iota", "copy-done", "async-done", "optimization-barrier"),
    )
)
"""Operations that move nothing themselves."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str


class Moved(NamedTuple):
    """Bytes that one device moves in one run of a program."""

    hbm_bytes: int
    """Read and written, tiling padding not counted."""
    collectives: dict[str, tuple[int, int]]
    """By kind: how many, and the bytes that they bring to or take from a device."""


def read(text: str, turns: int) -> Moved:
    """Returns what the program in `text` moves; `turns` is for loops whose number of turns is not written in their condition."""
    program = dict(_computations(text))
    entry = next(name for name in program if name.startswith("ENTRY "))
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    hbm = 0
    for computation, times, fused in _walk(program, entry, 1, False, turns):
        shapes = {i.name: i.shape for i in program[computation]}
        for i in program[computation]:
            kind = _collective(i.operation)
            channel = re.search(r"channel_id=(\d+)", i.attributes)
            if kind and not (
                channel and channel[1] in seen
            ):  # one spread over several fusions stands in each of them
                seen |= {channel[1]} if channel else set()
                scattered = kind == "all-reduce" and "all-reduce-scatter" in computation
                kind = "reduce-scatter" if scattered else kind
                counts[kind] = counts.get(kind, 0) + times
                sizes[kind] = sizes.get(kind, 0) + times * _brought(kind, i, shapes)
            if not fused and i.operation not in FREE:
                hbm += times * _traffic(i, shapes, program)
    return Moved(hbm, {kind: (counts[kind], sizes[kind]) for kind in COLLECTIVES if kind in counts})


def _collective(operation: str) -> str | None:
    kind = operation.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _brought(kind: str, i: Instruction, shapes: Mapping[str, str]) -> int:
    """Returns a collective's bytes: of its result where that is whole, else of its operands; an all-reduce counts twice."""
    given = sum(size(shapes.get(name, "")) for name in i.operands)
    made = size(i.shape) - (given if i.operation.endswith("-start") else 0)
    return {"all-gather": made, "all-reduce": 2 * given}.get(kind, given)


def size(shape: str, only_hbm: bool = False) -> int:
    """Returns the bytes of a shape or a tuple of shapes; `only_hbm` leaves out what lies in other memories, written S(n)."""
    total = 0
    for kind, dims, layout in re.findall(r"([a-z]+\d*)\[([\d,]*)\]((?:\{[^}]*\})?)", shape):
        if kind in BYTES and not (only_hbm and "S(" in layout):
            total += BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _traffic(
    i: Instruction, shapes: Mapping[str, str], program: Mapping[str, list[Instruction]]
) -> int:
    if i.operation == "dynamic-slice":
        return 2 * size(i.shape, True)
    if i.operation == "dynamic-update-slice":
        return 2 * size(shapes.get(i.operands[1], ""), True)
    if i.operation == "copy-start":
        return sum(
            size(part, True) for part in (i.shape.split("}, ")[0], shapes.get(i.operands[0], ""))
        )
    if i.operation not in ("fusion", "async-start"):
        return size(i.shape, True) + sum(size(shapes.get(name, ""), True) for name in i.operands)
    inner = program.get(_called(i.attributes, "calls"), [])
    names, made = (
        _parameters(inner),
        size(i.shape.partition("), ")[2] if i.operation == "async-start" else i.shape, True),
    )
    read_bytes = 0
    for place, operand in enumerate(i.operands):
        read_bytes += _read_of(
            names.get(place, ""), inner, size(shapes.get(operand, ""), True), program
        )
    updates = [k for k in inner if k.operation == "dynamic-update-slice"]
    inside = {j.name: j.shape for j in inner}
    written = sum(size(inside.get(k.operands[1], "")) for k in updates) if updates else made
    return read_bytes + min(written, made)


def _parameters(computation: list[Instruction]) -> dict[int, str]:
    """Returns the names of a computation's parameters by their places."""
    return {
        int(i.attributes.partition(")")[0] or 0): i.name
        for i in computation
        if i.operation == "parameter"
    }


def _read_of(
    name: str, inner: list[Instruction], whole: int, program: Mapping[str, list[Instruction]]
) -> int:
    """Returns the bytes that a fusion reads of its parameter `name`, `whole` bytes; only slices, if nothing else is taken."""
    total = 0
    for k in inner:
        for place in [place for place, operand in enumerate(k.operands) if operand == name]:
            if k.operation in ("dynamic-slice", "slice", "gather"):
                total += size(k.shape) if place == 0 else 0
            elif k.operation == "bitcast":
                total += _read_of(k.name, inner, whole, program)
            elif k.operation == "fusion":
                nested = program.get(_called(k.attributes, "calls"), [])
                total += _read_of(_parameters(nested).get(place, ""), nested, whole, program)
            elif not (k.operation == "dynamic-update-slice" and place == 0):
                return whole
    return min(total, whole)


def _walk(
    program: Mapping[str, list[Instruction]], name: str, times: int, fused: bool, turns: int
) -> Iterator[tuple[str, int, bool]]:
    """Yields each computation that runs, how often, and whether it is inside a fusion."""
    yield name, times, fused
    for i in program[name]:
        if i.operation == "while":
            condition, body = (_called(i.attributes, key) for key in ("condition", "body"))
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
            count = int(known[1]) if known else _bound(program.get(condition, []), turns)
            if body in program:
                yield from _walk(program, body, times * count, fused, turns)
            continue
        for key in ("calls", "to_apply", "true_computation", "false_computation"):
            called = _called(i.attributes, key)
            if called in program and not (key == "to_apply" and i.operation != "call"):
                yield from _walk(program, called, times, fused or i.operation != "call", turns)


def _bound(condition: list[Instruction], turns: int) -> int:
    """Returns the constant that a loop's counter stays below, `turns` where its condition says more than that."""
    constants = {i.name: i for i in condition if i.operation == "constant"}
    compares = [i for i in condition if i.operation == "compare" and "direction=LT" in i.attributes]
    if len(compares) == 1 and not any(i.operation in ("and", "or", "fusion") for i in condition):
        for operand in compares[0].operands:
            if operand in constants:
                return int(constants[operand].attributes.partition(")")[0])
    return turns


def _called(attributes: str, key: str) -> str:
    found = re.search(rf"(?:^|[ ,]){key}=%?([\w.\-]+)", attributes)
    return found[1] if found else ""


def _computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    name, lines = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name, lines = (head[1] or "") + head[2], []
        elif line.startswith("}"):
            yield name, lines
        elif name and line.startswith(" "):
            found = _instruction(line)
            if found:
                lines.append(found)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    name, rest = found[1], found[2]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    operation, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    inside = rest[:close]
    attributes = (
        inside + ")" + rest[close + 1 :]
        if operation in ("parameter", "constant")
        else rest[close + 1 :]
    )
    return Instruction(
        name, shape, operation, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes
    )


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1
