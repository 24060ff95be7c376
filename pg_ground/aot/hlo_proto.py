"""Reads XLA's HLO protos: instructions, their shapes, and the assignment of buffers.

XLA writes a compiled program as a proto (`--xla_dump_hlo_as_proto`). The numbers of its fields do
not change between releases, unlike its text. The definitions are those of `xla/service/hlo.proto`
and `xla/xla_data.proto`, with only the fields that are read here.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

HLO_PROTO = """
name: "hlo.proto" package: "pg_ground.hlo" syntax: "proto3"
message_type {
  name: "Layout"
  field { name: "element_size_in_bits" number: 7 type: TYPE_INT64 }
  field { name: "memory_space" number: 8 type: TYPE_INT64 }
}
message_type {
  name: "Shape"
  field { name: "element_type" number: 2 type: TYPE_INT32 }
  field { name: "dimensions" number: 3 label: LABEL_REPEATED type: TYPE_INT64 }
  field {
    name: "tuple_shapes" number: 4 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.Shape"
  }
  field { name: "layout" number: 5 type: TYPE_MESSAGE type_name: ".pg_ground.hlo.Layout" }
}
message_type {
  name: "Literal"
  field { name: "s32s" number: 4 label: LABEL_REPEATED type: TYPE_INT32 }
  field { name: "s64s" number: 5 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "u32s" number: 6 label: LABEL_REPEATED type: TYPE_UINT32 }
  field { name: "u64s" number: 7 label: LABEL_REPEATED type: TYPE_UINT64 }
}
message_type {
  name: "Instruction"
  field { name: "name" number: 1 type: TYPE_STRING }
  field { name: "opcode" number: 2 type: TYPE_STRING }
  field { name: "shape" number: 3 type: TYPE_MESSAGE type_name: ".pg_ground.hlo.Shape" }
  field { name: "literal" number: 8 type: TYPE_MESSAGE type_name: ".pg_ground.hlo.Literal" }
  field { name: "parameter_number" number: 9 type: TYPE_INT64 }
  field { name: "channel_id" number: 26 type: TYPE_INT64 }
  field { name: "id" number: 35 type: TYPE_INT64 }
  field { name: "operand_ids" number: 36 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "called_computation_ids" number: 38 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "backend_config" number: 43 type: TYPE_BYTES }
  field { name: "comparison_direction" number: 63 type: TYPE_STRING }
}
message_type {
  name: "Computation"
  field { name: "name" number: 1 type: TYPE_STRING }
  field {
    name: "instructions" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.Instruction"
  }
  field { name: "id" number: 5 type: TYPE_INT64 }
}
message_type {
  name: "Module"
  field {
    name: "computations" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.Computation"
  }
  field { name: "entry_computation_id" number: 6 type: TYPE_INT64 }
}
message_type {
  name: "BufferPosition"
  field { name: "shape_index" number: 3 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "instruction_id" number: 4 type: TYPE_INT64 }
}
message_type {
  name: "LogicalBuffer"
  field { name: "id" number: 1 type: TYPE_INT64 }
  field {
    name: "defined_at" number: 3 type: TYPE_MESSAGE type_name: ".pg_ground.hlo.BufferPosition"
  }
}
message_type {
  name: "Assigned"
  field { name: "logical_buffer_id" number: 1 type: TYPE_INT64 }
}
message_type {
  name: "Allocation"
  field { name: "size" number: 2 type: TYPE_INT64 }
  field { name: "color" number: 8 type: TYPE_INT64 }
  field {
    name: "assigned" number: 9 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.Assigned"
  }
}
message_type {
  name: "BufferAssignment"
  field {
    name: "logical_buffers" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.LogicalBuffer"
  }
  field {
    name: "allocations" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.Allocation"
  }
}
message_type {
  name: "Hlo"
  field { name: "module" number: 1 type: TYPE_MESSAGE type_name: ".pg_ground.hlo.Module" }
  field {
    name: "buffer_assignment" number: 3 type: TYPE_MESSAGE
    type_name: ".pg_ground.hlo.BufferAssignment"
  }
}
"""
"""`HloProto` and the messages inside it, with the field numbers of XLA."""

DTYPES: Mapping[int, tuple[str, int]] = {
    **{1: ("pred", 8), 2: ("s8", 8), 3: ("s16", 16), 4: ("s32", 32), 5: ("s64", 64)},
    **{6: ("u8", 8), 7: ("u16", 16), 8: ("u32", 32), 9: ("u64", 64)},
    **{10: ("f16", 16), 11: ("f32", 32), 12: ("f64", 64), 16: ("bf16", 16)},
    **{15: ("c64", 64), 18: ("c128", 128), 21: ("s4", 4), 22: ("u4", 4), 26: ("s2", 2)},
    **{27: ("u2", 2), 30: ("s1", 1), 31: ("u1", 1), 32: ("f4e2m1fn", 4)},
    **{number: ("f8", 8) for number in (19, 20, 23, 24, 25, 28, 29, 33)},
}
"""Name and bits of each `xla.PrimitiveType` that is an array's element."""


class Shape(NamedTuple):
    """The shape of an array, or of a tuple of shapes."""

    dtype: str
    """"" for a tuple or a token."""
    dimensions: tuple[int, ...]
    bytes: int
    """Bytes of the array without the padding of tiles; 0 for a tuple or a token."""
    memory_space: int
    """0 is HBM. Other numbers are memories on the chip, or the host's memory."""
    parts: tuple["Shape", ...]
    """The shapes of a tuple's elements."""

    def __str__(self) -> str:
        """Returns the shape as HLO text has it, for example bf16[8,128]."""
        if self.dtype:
            return f"{self.dtype}[{','.join(map(str, self.dimensions))}]"
        return f"({', '.join(map(str, self.parts))})"


class Instruction(NamedTuple):
    """One operation of a computation."""

    id: int
    name: str
    operation: str
    shape: Shape
    operands: tuple[int, ...]
    """Ids of instructions of the same computation."""
    calls: tuple[int, ...]
    """Ids of the computations that it calls. A while has its body first, then its condition."""
    parameter_number: int
    channel_id: int
    """0 for none."""
    backend_config: bytes
    literal: int | None
    """The value of an integer constant that is a scalar; None for every other instruction."""
    comparison: str
    """LT, GE, … for a compare."""


class Computation(NamedTuple):
    """A function of a program. Its instructions are in a valid order of execution."""

    name: str
    instructions: tuple[Instruction, ...]


class Buffer(NamedTuple):
    """Memory that XLA has assigned."""

    bytes: int
    memory_space: int
    contents: tuple[Shape, ...]
    """The arrays that the buffer holds, at the same time or in turn."""


class Program(NamedTuple):
    """A compiled program."""

    computations: Mapping[int, Computation]
    entry: int
    """The id of the computation that runs first."""
    buffers: tuple[Buffer, ...]
    """Empty if the proto has no assignment of buffers."""


def read_hlo(data: bytes) -> Program:
    """Returns the program of a serialised `HloProto`.

    Raises:
      ValueError: `data` is no `HloProto` with a program.
    """
    proto = _parse("Hlo", data)
    return _program(proto.module, proto.buffer_assignment)


def read_module(data: bytes) -> Program:
    """Returns the program of a serialised `HloModuleProto`, which has no buffers.

    Raises:
      ValueError: `data` is no `HloModuleProto` with a program.
    """
    return _program(_parse("Module", data), None)


def _parse(message: str, data: bytes) -> Any:
    proto = _message_class(message)()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # the class of the error depends on protobuf's implementation
        raise ValueError(f"these {len(data)} bytes are no {message} proto of XLA") from error
    return proto


@functools.cache
def _message_class(name: str) -> Any:
    file = text_format.Parse(HLO_PROTO, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()  # a separate pool does not clash with XLA's own protos
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"pg_ground.hlo.{name}"))


def _program(module: Any, assignment: Any) -> Program:
    computations = {
        computation.id: Computation(
            computation.name, tuple(map(_instruction, computation.instructions))
        )
        for computation in module.computations
    }
    entry = module.entry_computation_id
    if entry not in computations or not computations[entry].instructions:
        raise ValueError("the proto of XLA has no program")
    return Program(computations, entry, _buffers(computations, assignment) if assignment else ())


def _instruction(proto: Any) -> Instruction:
    literal = proto.literal
    integers = [*literal.s32s, *literal.s64s, *literal.u32s, *literal.u64s]
    return Instruction(
        id=proto.id,
        name=proto.name,
        operation=proto.opcode,
        shape=_shape(proto.shape),
        operands=tuple(proto.operand_ids),
        calls=tuple(proto.called_computation_ids),
        parameter_number=proto.parameter_number,
        channel_id=proto.channel_id,
        backend_config=proto.backend_config,
        literal=integers[0] if proto.opcode == "constant" and len(integers) == 1 else None,
        comparison=proto.comparison_direction,
    )


def _shape(proto: Any) -> Shape:
    if proto.tuple_shapes or proto.element_type not in DTYPES:
        return Shape("", (), 0, 0, tuple(map(_shape, proto.tuple_shapes)))
    dtype, bits = DTYPES[proto.element_type]
    dimensions = tuple(proto.dimensions)
    bits = proto.layout.element_size_in_bits or bits
    size = math.ceil(math.prod(dimensions) * bits / 8)
    return Shape(dtype, dimensions, size, proto.layout.memory_space, ())


def _buffers(computations: Mapping[int, Computation], assignment: Any) -> tuple[Buffer, ...]:
    instructions = {
        instruction.id: instruction
        for computation in computations.values()
        for instruction in computation.instructions
    }
    positions = {buffer.id: buffer.defined_at for buffer in assignment.logical_buffers}

    def contents(logical_buffer: int) -> Shape:
        position = positions[logical_buffer]
        shape = instructions[position.instruction_id].shape
        for index in position.shape_index:
            shape = shape.parts[index]
        return shape

    return tuple(
        Buffer(
            allocation.size,
            allocation.color,
            tuple(contents(part.logical_buffer_id) for part in allocation.assigned),
        )
        for allocation in assignment.allocations
    )
