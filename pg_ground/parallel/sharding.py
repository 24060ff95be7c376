"""Decides how arrays are split over devices.

A mesh has three axes:

- `data` splits the prompts of a batch and the parameters. This is FSDP: the weights of a layer are
  gathered when the layer runs.
- `replica` splits only the prompts. Each replica holds all parameters, split over its own `data`
  axis. Use it if the mesh has more devices than the sizes of the parameters divide by.
- `model` splits the matrices of a layer over attention heads and hidden units (tensor parallelism).

The parameters have big_vision's names. The optimizer's averages of a parameter have the same name,
so one table of rules gives the shardings of both.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from pg_ground import config
from pg_ground.storage.paths import expand_path
from pg_ground.types import Array, ShardingHooks, UserError

BATCH_AXES = ("replica", "data")
"""The mesh axes that split the batch axis B."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or only the shape of a mesh if this machine does not have the devices."""

SMALL_BYTES = 4 * 2**20
"""Arrays up to this size are replicated, as in big_vision: gathering them costs more than holding
them."""

LARGE_BYTES = 16 * 2**20
"""An array above this size is never replicated. If no axis of it divides, that is an error."""

Rule = tuple[str, tuple[str, ...]]
"""A regular expression for the end of a name, and the mesh axis of each of the last dimensions:
"data", "model", "model+data" or "" (not split)."""

RULES: tuple[Rule, ...] = (
    # V D. Every device looks tokens up in its own columns. `activation_sharding` splits the rows
    # for the logits instead.
    ("llm/embedder/input_embedding", ("model", "data")),
    # `model` splits the heads if there are enough of them. PaliGemma 1 has one key-value head, so
    # every device holds it.
    ("attn/q_einsum/w", ("model", "data", "")),
    ("attn/kv_einsum/w", ("", "model", "data", "")),
    ("attn/attn_vec_einsum/w", ("model", "", "data")),
    ("mlp/gating_einsum", ("", "data", "model")),
    ("mlp/linear", ("model+data", "")),
    # SigLIP: 16 heads of 72, hidden width 4304 = 16 · 269, width 1152 = 128 · 9.
    ("MlpBlock_0/Dense_0/kernel", ("data", "model")),
    ("MlpBlock_0/Dense_1/kernel", ("model", "data")),
    ("(query|key|value)/kernel", ("data", "model", "")),
    ("MultiHeadDotProductAttention_0/out/kernel", ("model", "", "data")),
    ("img/pos_embedding", ("", "", "data")),
    ("img/head/kernel", ("", "data")),
)
"""The first rule that matches a name applies. A dimension that its mesh axis does not divide is not
split. If `data` then splits no dimension, it splits the largest dimension that it divides."""

TPU_COMPILER_OPTIONS: dict[str, str] = {
    # Turns windowed einsums off. They pass the shards of a weight round a ring while they multiply.
    # The weights here are gathered anyway, so windows only cost double buffers and small matrix
    # products. PaliGemma 1 3B on v5e-8: 8.05 -> 7.87 GiB (64 prompts), 13.1 -> 12.4 GiB (256).
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
"""XLA options for TPUs, each with its reason and its measured effect."""


def set_cpu_devices(c: config.Mesh) -> None:
    """Splits the CPU into `c.cpu_devices` devices; 0 changes nothing.

    Call it before this process first uses a device.
    """
    if c.cpu_devices:
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)


def enable_compilation_cache(c: config.Mesh) -> None:
    """Makes jax store compiled programs in the folder `c.compile_cache`.

    JAX_COMPILATION_CACHE_DIR takes precedence.
    """
    # jax adds this attribute at import.
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if c.compile_cache and folder is None:
        jax.config.update("jax_compilation_cache_dir", expand_path(c.compile_cache))


def make_mesh(c: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over the first `replica · data · model` devices.

    The axis types are Auto: the compiler propagates shardings from the arguments. (`jax.make_mesh`
    defaults to explicit types.)

    Args:
      c: the sizes of the axes.
      devices: the devices to choose from; None means the devices of all processes.

    Raises:
      UserError: the sizes do not match the number of devices, or a process would have no device in
        the mesh.
    """
    available = jax.devices() if devices is None else devices
    shape = _mesh_shape(c, len(available))
    chosen = available[: math.prod(shape)]
    idle_processes = {device.process_index for device in available} - {
        device.process_index for device in chosen
    }
    if devices is None and idle_processes:
        raise UserError(
            f"config.mesh takes {len(chosen)} of {len(available)} devices: "
            f"process {min(idle_processes)} would have no part in it"
        )
    axes = (*BATCH_AXES, "model")
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def _mesh_shape(c: config.Mesh, device_count: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes replica, data and model. `c.data` -1 means all devices left."""
    other_axes = c.replica * c.model
    data = device_count // other_axes if c.data == -1 else c.data
    settings = (
        f"config.mesh is replica {c.replica}, data {c.data}, model {c.model}, "
        f"and there are {device_count} devices"
    )
    if not 1 <= other_axes * data <= device_count:
        raise UserError(f"{settings}: the product must be from 1 to {device_count}")
    if c.data == -1 and other_axes * data != device_count:
        raise UserError(f"{settings}: replica * model must divide {device_count}")
    return c.replica, data, c.model


def abstract_mesh(c: config.Mesh, device_count: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` would make of `device_count` devices, without any device.

    Raises:
      UserError: the sizes do not match the number of devices.
    """
    axes = (*BATCH_AXES, "model")
    return AbstractMesh(_mesh_shape(c, device_count), axes, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def activation_sharding(mesh: AnyMesh) -> ShardingHooks:
    """Returns the sharding constraints of a model's activations and vocabulary on `mesh`.

    Without these constraints the compiler may keep the weights split and gather the activations of
    the whole batch instead.
    """

    def constrain(*spec: str | tuple[str, ...] | None) -> Callable[[Array], jax.Array]:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return lambda x: jax.lax.with_sharding_constraint(x, sharding)

    def lookup(table: Array, tokens: Array) -> jax.Array:
        rows = constrain("model", "data")(table)[tokens]
        return constrain("replica", *(None,) * (rows.ndim - 2), "data")(rows)

    return ShardingHooks(
        activations=constrain(BATCH_AXES),
        lookup=lookup,
        logits_table=constrain(("data", "model")),
    )


def check_batch_size(mesh: AnyMesh, batch_size: int, setting: str) -> None:
    """Raises UserError, naming `setting`, if the mesh does not split `batch_size` rows evenly."""
    shards = mesh.shape["replica"] * mesh.shape["data"]
    if batch_size % shards:
        lower = batch_size // shards * shards
        nearest = [str(size) for size in (lower, lower + shards) if size]
        raise UserError(
            f"config.{setting} is {batch_size}: it must be a multiple of {shards}, "
            f"replica * data of the mesh: {' or '.join(nearest)}"
        )


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raises UserError if a rule names an unknown axis, or is the first match of no name."""
    for pattern, axes in rules:
        axis_names = {axis for dimension in axes for axis in dimension.split("+")}
        unknown = sorted(axis_names - {"", "data", "model"})
        if unknown:
            raise UserError(
                f"config.mesh.rules: {pattern!r} names the axis {unknown[0]!r}: "
                f"there are data and model"
            )
    unused = set(rules) - {_first_match(name, rules) for name in names}
    if unused:
        raise UserError(
            f"config.mesh.rules: {min(unused)[0]!r} is the first match of no parameter, "
            f"such as {names[0]}"
        )


def infer_shardings(mesh: AnyMesh, tree: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """Returns a sharding for each leaf of `tree`: by the first rule that matches its name.

    The name of a leaf is its path of dict keys. An optimizer's average of a parameter therefore has
    the parameter's sharding.

    Args:
      mesh: the mesh, or its shape.
      tree: arrays, or their shapes and dtypes.
      rules: the user's rules; they come before `RULES`.

    Raises:
      UserError: an array above `LARGE_BYTES` has no axis that the mesh divides.
    """
    all_rules = (*rules, *RULES)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _leaf_sharding(mesh, _leaf_name(path), leaf, all_rules), tree
    )


def _leaf_name(path: tuple[Any, ...]) -> str:
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _first_match(name: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.search(f"(^|/)({rule[0]})$", name)), None)


def _leaf_sharding(mesh: AnyMesh, name: str, leaf: Any, rules: Sequence[Rule]) -> NamedSharding:
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size <= SMALL_BYTES or mesh.size == 1:
        return replicated(mesh)
    spec = _spec_by_rule(mesh, name, leaf.shape, rules)
    data_size = mesh.shape["data"]
    if data_size > 1 and not any("data" in (axes or ()) for axes in spec):
        free = [
            dimension
            for dimension, length in enumerate(leaf.shape)
            if spec[dimension] is None and length % data_size == 0
        ]
        if free:
            spec[max(free, key=lambda dimension: leaf.shape[dimension])] = ("data",)
        elif size > LARGE_BYTES:
            raise UserError(
                f"{name} has shape {tuple(leaf.shape)} ({size:,} bytes) and no axis that "
                f"{data_size} devices divide evenly: "
                f"set config.mesh.replica, so that the data axis is shorter"
            )
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def _spec_by_rule(
    mesh: AnyMesh, name: str, shape: tuple[int, ...], rules: Sequence[Rule]
) -> list[tuple[str, ...] | None]:
    """Returns the mesh axes of each dimension by the first rule that matches the name.

    An axis that does not divide its dimension is left out.
    """
    rule = _first_match(name, rules)
    rule_axes = rule[1] if rule else ()
    if len(rule_axes) > len(shape):
        raise UserError(
            f"config.mesh.rules: {rule} names {len(rule_axes)} dimensions, "
            f"and {name} has {len(shape)}"
        )
    spec: list[tuple[str, ...] | None] = [None] * len(shape)
    first = len(shape) - len(rule_axes)
    for dimension, names in enumerate(rule_axes, first):
        axes = tuple(axis for axis in names.split("+") if axis)
        while axes and shape[dimension] % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[1:]
        spec[dimension] = axes or None
    return spec


def gathered_shardings(mesh: AnyMesh, tree: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """Returns the shardings of `infer_shardings` without the `data` axis."""

    def without_data(sharding: NamedSharding) -> NamedSharding:
        spec = ["model" if "model" in (axes or ()) else None for axes in sharding.spec]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(without_data, infer_shardings(mesh, tree, rules))


def compiler_options(c: config.Mesh, mesh: Mesh) -> dict[str, str]:
    """Returns the XLA options for programs on `mesh`: our defaults and `c.compiler_options`."""
    defaults = TPU_COMPILER_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}
    return defaults | dict(option.split("=", 1) for option in c.compiler_options)


def bytes_per_device(tree: PyTree) -> float:
    """Returns the bytes per device of a tree of abstract arrays (shape, dtype, sharding)."""

    def shard_bytes(leaf: Any) -> float:
        return float(math.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(shard_bytes, jax.tree.leaves(tree)), 0.0)


def hbm_bytes(mesh: Mesh) -> float | None:
    """Returns the memory that a device of the mesh has for programs, in bytes.

    None means unknown, as for a CPU.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    return float(stats["bytes_limit"]) if "bytes_limit" in stats else None


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """Returns the indices of the rows of a global batch that this process's devices hold, in order.

    The rows need not be neighbours, because a mesh follows the wires of a pod. Processes that share
    a `model` axis have the same rows.
    """
    indices: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique([row for (part,) in indices.values() for row in range(batch_size)[part]])


def put_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """Returns global arrays `[B, …]`, made of the rows that each process passes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def fetch_local_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns this process's rows (`local_rows`) of global arrays `[B, …]` as NumPy arrays.

    The inverse of `put_batch`.

    All processes must call it at the same point, because arrays with other shardings are resharded
    first.
    """

    def shards_in_order(leaf: jax.Array) -> list[jax.Array]:
        shards = {
            shard.index[0].indices(len(leaf))[0]: shard.data for shard in leaf.addressable_shards
        }
        return [shards[start] for start in sorted(shards)]

    split = jax.device_put(tree, batch_sharding(mesh))
    shards = jax.device_get(jax.tree.map(shards_in_order, split))
    return jax.tree.map(lambda _, parts: np.concatenate(parts), split, shards)
