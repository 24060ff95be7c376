"""Weights for sampling: in the dtype of activations, and gathered on every device if memory allows.

A decoder reads every weight for every token. Sharded weights would be gathered again for each
token, so they are gathered and cast once per step. Norms keep their dtype, because they are
computed in float32: sampler and trainer stay one function. int8 matrices stay int8, because a
decoder then reads the fewest bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pg_ground.parallel import memory_model, sharding
from pg_ground.parallel.memory_model import device_work
from pg_ground.params import map_named
from pg_ground.training.program import Program, jit_program
from pg_ground.training.setup import Setup, abstract_state, with_shardings
from pg_ground.types import Array, Params

SAFE_SHARE = 0.9
"""Share of a device's memory that an estimate can fill: estimates are right to about 10 %."""


class AbstractRolloutWeights(NamedTuple):
    """The abstract arrays of the weights that sampling reads."""

    trained: Params
    frozen: Params
    gathered: bool


def gather_program(setup: Setup, params: Params) -> Program:
    """Returns the program that gathers and casts parameters for sampling."""
    dtype = jnp.dtype(setup.config.model.dtype)

    def cast(name: str, leaf: Array) -> Array:
        return leaf if _is_norm(name) or leaf.dtype == jnp.int8 else leaf.astype(dtype)

    def gather(params: Params) -> Params:
        return map_named(cast, params)

    shardings = sharding.gathered_shardings(setup.mesh, params, setup.config.mesh.rules)
    return Program(gather, (params,), out_shardings=shardings)


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition("/")[0].rpartition("/")[2].lower()


def gathered_params(setup: Setup, params: Params) -> Params:
    """Returns the abstract arrays of the gathered parameters.

    Returns `params` itself if no cast or gather is needed.
    """
    program = gather_program(setup, params)
    shapes = jax.eval_shape(program.function, params)
    gathered = with_shardings(shapes, program.out_shardings)

    def is_same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)

    unchanged = all(jax.tree.leaves(jax.tree.map(is_same, params, gathered)))
    return params if unchanged else gathered


def uses_gathered(setup: Setup, group: int, keeps_reference: bool) -> bool:
    """Returns whether sampling reads gathered weights.

    `config.grpo.rollout_weights` decides. With "auto" the weights are gathered if they fit beside
    everything that stays in memory. If the memory of a device is unknown (a CPU), nothing is
    copied.

    Args:
      group: completions per prompt, a greedy one included.
      keeps_reference: whether the reference policy is in memory.
    """
    settings = setup.config.grpo
    if settings.rollout_weights != "auto":
        return settings.rollout_weights == "gathered"
    if setup.hbm_bytes is None:
        return False
    work = device_work(
        setup.mesh, settings.batch_size, group, settings.max_new_tokens, settings.rollout_parts
    )
    architecture = setup.architecture
    trained = setup.trained_tree
    frozen = setup.frozen_tree
    needed = memory_model.cache_bytes(architecture, setup.mesh, work)
    needed += memory_model.sampling_bytes(architecture, setup.mesh, work, gathered=True)
    needed += sharding.bytes_per_device((abstract_state(setup, settings), frozen))
    if keeps_reference:
        needed += sharding.bytes_per_device(trained)
    for tree in (trained, frozen):
        gathered = gathered_params(setup, tree)
        needed += 0.0 if gathered is tree else sharding.bytes_per_device(gathered)
    return needed <= SAFE_SHARE * setup.hbm_bytes


def abstract_rollout_weights(
    setup: Setup, group: int, keeps_reference: bool
) -> AbstractRolloutWeights:
    """Returns the abstract weights of sampling: gathered, or the parameters themselves."""
    trained = setup.trained_tree
    frozen = setup.frozen_tree
    if not uses_gathered(setup, group, keeps_reference):
        return AbstractRolloutWeights(trained, frozen, False)
    return AbstractRolloutWeights(
        gathered_params(setup, trained), gathered_params(setup, frozen), True
    )


def make_gather(
    setup: Setup, mesh: Mesh, params: Params, gathered: bool
) -> Callable[[Params], Params]:
    """Returns the function from parameters to the weights of sampling."""
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params
    )
    if not gathered or gathered_params(setup, abstract) is abstract:
        return lambda params: params
    gather = jit_program(gather_program(setup, abstract), setup.config.mesh, mesh)
    # The copy is as large as the model. During an update it would add to the update's own peak, so
    # it waits.
    return lambda params: gather(jax.block_until_ready(params))
