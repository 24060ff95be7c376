"""A program: a pure function with what `jax.jit` needs, and with what compilation and the memory
model need to know.

`train` runs programs, `compile` compiles the same programs ahead of time, and `bench` times them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from pg_ground import config
from pg_ground.parallel import memory_model, sharding


class Memory(NamedTuple):
    """Bytes per device by kind (`memory_model.KINDS`) while a program runs."""

    inside: Mapping[str, float]
    """Arguments of the program, and the caches that it makes."""
    beside: Mapping[str, float]
    """Arrays that the program does not use, but that stay in memory."""
    activations: float
    """Expected size of the buffers that the compiler adds."""

    @property
    def by_kind(self) -> dict[str, float]:
        """All bytes by kind."""
        kinds = {
            kind: self.inside.get(kind, 0.0) + self.beside.get(kind, 0.0)
            for kind in memory_model.KINDS
        }
        return kinds | {"activations": self.activations}


class Program(NamedTuple):
    """A function of a stage and how it is compiled."""

    function: Callable[..., PyTree]
    arguments: tuple[PyTree, ...]
    """Abstract arguments: shapes, dtypes and shardings."""
    donate_argnums: tuple[int, ...] = ()
    out_shardings: PyTree = None
    """Shardings of the results; None leaves them to the compiler."""
    memory: Memory = Memory({}, {}, 0.0)
    decode_steps: int = 0
    """Number of tokens that are decoded one after the other."""
    gradient_tokens: int = 0
    """Number of tokens whose logits are computed with a gradient, and so computed again in the
    backward pass."""
    is_jitted: bool = False
    """True if `function` is already the result of `jax.jit`."""


def jit_program(program: Program, mesh_settings: config.Mesh, mesh: Mesh) -> Callable[..., PyTree]:
    """Returns the jitted function of a program, with the compiler options of this mesh."""
    if program.is_jitted:
        return program.function
    shardings = {} if program.out_shardings is None else {"out_shardings": program.out_shardings}
    return jax.jit(
        program.function,
        donate_argnums=program.donate_argnums,
        compiler_options=sharding.compiler_options(mesh_settings, mesh) or None,
        **shardings,
    )
