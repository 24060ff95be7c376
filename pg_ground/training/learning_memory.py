"""Memory of the programs that learn: the update of every stage."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from pg_ground.parallel import memory_model, sharding
from pg_ground.params import is_multiplied, map_named
from pg_ground.training.program import Memory
from pg_ground.training.setup import Setup
from pg_ground.types import TrainState


def learning_memory(
    setup: Setup,
    state: TrainState,
    *,
    inputs: PyTree,
    questions: int,
    group: int,
    tokens: int,
    parts: int,
    beside: Mapping[str, float] | None = None,
) -> Memory:
    """Returns the memory of a gradient and its update.

    Args:
      inputs: abstract arrays of the batch that the program reads.
      questions: questions of one optimizer step.
      tokens: tokens of a completion.
      parts: gradient accumulation steps.
      beside: bytes by kind of arrays that the program does not use.
    """
    parameters = (state.params, setup.frozen_tree)
    dtype = jnp.dtype(setup.config.model.dtype)
    # int8 matrices are cast layer by layer, not all at once
    not_cast = (dtype, jnp.int8)
    cast = [leaf for leaf in jax.tree.leaves(parameters) if leaf.dtype not in not_cast]
    # Gradients of matrices have the dtype of activations until they are accumulated or applied.
    gradients = map_named(
        lambda name, leaf: leaf.update(dtype=dtype) if is_multiplied(name) else leaf, state.params
    )
    gradient_bytes = sharding.bytes_per_device(gradients)
    if parts > 1:
        gradient_bytes += sharding.bytes_per_device(state.params)
    activations = memory_model.learning_bytes(
        setup.architecture,
        setup.mesh,
        memory_model.device_work(setup.mesh, questions, group, tokens, parts),
        gradient_bytes,
        sharding.bytes_per_device(cast),
    )
    inside = {
        "parameters": sharding.bytes_per_device(parameters),
        "optimizer": sharding.bytes_per_device(state.opt_state),
        "batch": sharding.bytes_per_device(inputs),
    }
    return Memory(inside, beside or {}, activations)
