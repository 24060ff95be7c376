"""How arrays lie on devices.

A mesh has three axes. `data` splits the prompts of a batch and the parameters (FSDP: weights are gathered layer by layer where
they are used). `replica` splits the prompts only: each replica holds all parameters, split over its `data` axis; it is for meshes
wider than the parameters divide. `model` splits the matrices of a layer over heads and hidden units (tensor parallel).

The parameters have big_vision's names, and so have the optimizer's copies and averages of them: one table says where all lie.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from pg_ground import config
from pg_ground.types import Array, Places, UserError

ROWS = ("replica", "data")
"""The axes that split B."""

AnyMesh = Mesh | AbstractMesh
"""A mesh, or the shape of one whose devices are not there."""

SMALL_BYTES = 4 * 2**20
"""Arrays up to this size are replicated, as big_vision does: gathering them costs more than holding them."""

LARGE_BYTES = 16 * 2**20
"""An array above this size is never replicated for want of an axis that divides: that is an error."""

Rule = tuple[str, tuple[str, ...]]
"""A pattern that a name ends in, and the mesh axis of each of the last dimensions: "data", "model", "model+data" or ""."""

RULES: tuple[Rule, ...] = (
    # V D: looked up by every device in its own columns; `Places.vocabulary` lays it by rows for the logits
    ("llm/embedder/input_embedding", ("model", "data")),
    # heads go to `model`, where there are enough: PaliGemma 1 has one key-value head, which every device then has
    ("attn/q_einsum/w", ("model", "data", "")),
    ("attn/kv_einsum/w", ("", "model", "data", "")),
    ("attn/attn_vec_einsum/w", ("model", "", "data")),
    ("mlp/gating_einsum", ("", "data", "model")),
    ("mlp/linear", ("model+data", "")),
    # SigLIP's 16 heads of 72 divide by 16 and its hidden width 4304 = 16 · 269 by 16; its width 1152 = 128 · 9 by 128
    ("MlpBlock_0/Dense_0/kernel", ("data", "model")),
    ("MlpBlock_0/Dense_1/kernel", ("model", "data")),
    ("(query|key|value)/kernel", ("data", "model", "")),
    ("MultiHeadDotProductAttention_0/out/kernel", ("model", "", "data")),
    ("img/pos_embedding", ("", "", "data")),
    ("img/head/kernel", ("", "data")),
)
"""First match wins. A dimension that its axis does not divide is left whole; then the largest that `data` divides is split."""

TPU_OPTIONS: dict[str, str] = {
    # No einsums in windows: they pass shards of a weight round the ring while multiplying, which for weights that are gathered
    # anyway costs double buffers and small matrix products. PG1 3B, v5e-8, 64 prompts: 8.05 -> 7.87 GiB; 256: 13.1 -> 12.4.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
"""Options of XLA that matter on TPUs, each with its reason and its measured effect."""


def split_cpu(c: config.Mesh) -> None:
    """Makes the CPU count as `c.cpu_devices` devices (0 leaves it as it is); only before this process first uses one."""
    if c.cpu_devices:
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)


def keep_programs(c: config.Mesh) -> None:
    """Makes jax keep compiled programs in the folder that `c` names; one that JAX_COMPILATION_CACHE_DIR names goes before it."""
    named = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]: jax makes it at import
    if c.compile_cache and named is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(c.compile_cache).expanduser()))


def make_mesh(c: config.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over the first `replica · data · model` of `devices`, those of all processes unless given.

    Axis types are Auto on purpose: the compiler propagates shardings from the arguments (`jax.make_mesh` would default to
    explicit ones).

    Raises:
      UserError: the settings do not multiply to a number of devices that is there.
    """
    present = jax.devices() if devices is None else devices
    shape = _shape(c, len(present))
    chosen = present[: int(np.prod(shape))]
    idle = {device.process_index for device in present} - {
        device.process_index for device in chosen
    }
    if devices is None and idle:
        taken = f"config.mesh takes {len(chosen)} of {len(present)} devices"
        raise UserError(f"{taken}: process {min(idle)} would have no part in it")
    return jax.make_mesh(shape, (*ROWS, "model"), axis_types=(AxisType.Auto,) * 3, devices=chosen)


def _shape(c: config.Mesh, count: int) -> tuple[int, int, int]:
    rest = c.replica * c.model
    data = count // rest if c.data == -1 else c.data
    found = f"config.mesh is replica {c.replica}, data {c.data}, model {c.model}, and there are {count} devices"
    if not 1 <= rest * data <= count:
        raise UserError(f"{found}: the product must be from 1 to {count}")
    if c.data == -1 and rest * data != count:
        raise UserError(f"{found}: replica * model must divide {count}")
    return c.replica, data, c.model


def abstract_mesh(c: config.Mesh, count: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` would make of `count` devices that are not there.

    Raises:
      UserError: as `make_mesh` does.
    """
    return AbstractMesh(_shape(c, count), (*ROWS, "model"), axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of everything whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def places(mesh: AnyMesh) -> Places:
    """Returns where a model's activations and vocabulary are to lie on `mesh`.

    Without it the compiler may keep the weights split and gather activations of the whole batch instead.
    """

    def held(*spec: Any) -> Callable[[Array], jax.Array]:
        return lambda x: jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec(*spec))
        )

    def lookup(table: Array, tokens: Array) -> jax.Array:
        found = held("model", "data")(table)[tokens]
        return held("replica", *(None,) * (found.ndim - 2), "data")(found)

    return Places(rows=held(ROWS), lookup=lookup, vocabulary=held(("data", "model")))


def check_rows(mesh: AnyMesh, rows: int, setting: str) -> None:
    """Raises UserError if `rows` questions at once cannot be split evenly over the mesh."""
    count = mesh.shape["replica"] * mesh.shape["data"]
    if rows % count:
        raise UserError(
            f"config.{setting} is {rows}: it must be a multiple of {count}, replica * data of the mesh"
        )


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raises UserError if a rule is the first match of no name, or is none."""
    for pattern, axes in rules:
        unknown = sorted(
            {axis for part in axes for axis in part.split("+")} - {"", "data", "model"}
        )
        if unknown:
            raise UserError(
                f"config.mesh.rules: {pattern!r} names the axis {unknown[0]!r}: there are data and model"
            )
    idle = set(rules) - {_rule(name, rules) for name in names}
    if idle:
        raise UserError(
            f"config.mesh.rules: {min(idle)[0]!r} is the first match of no parameter, such as {names[0]}"
        )


def fsdp(mesh: AnyMesh, tree: Any, rules: Sequence[Rule] = ()) -> Any:
    """Returns a sharding for each leaf (array or shape): by the first of `rules` and `RULES` that matches its name.

    A leaf's name is its path of dict keys, so that what an optimizer keeps of a parameter lies where the parameter does.

    Raises:
      UserError: an array above `LARGE_BYTES` has no axis that the mesh divides.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place(mesh, _name(path), leaf, (*rules, *RULES)), tree
    )


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _rule(name: str, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if re.search(f"(^|/)({rule[0]})$", name)), None)


def _place(mesh: AnyMesh, name: str, leaf: Any, rules: Sequence[Rule]) -> NamedSharding:
    size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    if size <= SMALL_BYTES or mesh.size == 1:
        return replicated(mesh)
    rule = _rule(name, rules)
    named = rule[1] if rule else ()
    if len(named) > leaf.ndim:
        raise UserError(
            f"config.mesh.rules: {rule} names {len(named)} dimensions, and {name} has {leaf.ndim}"
        )
    spec: list[Any] = [None] * leaf.ndim
    for dimension, axes in zip(range(leaf.ndim - len(named), leaf.ndim), named, strict=True):
        wanted = tuple(axis for axis in axes.split("+") if axis)
        while wanted and leaf.shape[dimension] % int(
            np.prod([mesh.shape[axis] for axis in wanted])
        ):
            wanted = wanted[1:]
        spec[dimension] = wanted or None
    count = mesh.shape["data"]
    if count > 1 and not any("data" in (axes or ()) for axes in spec):
        free = [
            axis
            for axis in range(leaf.ndim)
            if spec[axis] is None and leaf.shape[axis] % count == 0
        ]
        if free:
            spec[max(free, key=lambda axis: leaf.shape[axis])] = ("data",)
        elif size > LARGE_BYTES:
            raise UserError(
                f"{name} has shape {tuple(leaf.shape)} ({size:,} bytes) and no axis that {count} devices divide evenly: "
                f"set config.mesh.replica, so that the data axis is shorter"
            )
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def gathered(mesh: AnyMesh, tree: Any, rules: Sequence[Rule] = ()) -> Any:
    """Returns the shardings of `fsdp` without its `data` axis: whole on every device but for the split over `model`."""

    def whole(place: NamedSharding) -> NamedSharding:
        def kept(axes: Any) -> Any:
            return "model" if "model" in (axes or ()) else None

        return NamedSharding(mesh, PartitionSpec(*map(kept, place.spec)))

    return jax.tree.map(whole, fsdp(mesh, tree, rules))


def compiler_options(c: config.Mesh, mesh: Mesh) -> dict[str, str]:
    """Returns what programs for this mesh are compiled with; nothing but `c.compiler_options` where it is not of TPUs."""
    own = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}
    return own | dict(option.split("=", 1) for option in c.compiler_options)


def held(tree: Any) -> float:
    """Returns the bytes that one device holds of a tree of shapes with places."""

    def own(leaf: Any) -> float:
        return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)), 0.0)


def hbm_bytes(mesh: Mesh) -> float | None:
    """Returns how much memory a device of the mesh has for programs; None where that is not known, as of a CPU."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    return float(stats["bytes_limit"]) if "bytes_limit" in stats else None


def rows_here(mesh: Mesh, count: int) -> Int[np.ndarray, " rows"]:
    """Returns which of the `count` rows of a batch lie on devices of this process, in order.

    They need not be neighbours: a mesh follows the wires of a pod. Processes that share the `model` axis have the same ones.
    """
    places: Any = batch_sharding(mesh).addressable_devices_indices_map((count,))
    return np.unique([row for (part,) in places.values() for row in range(count)[part]])


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Returns this process's rows as global arrays, split over the mesh along B."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )


def take_rows(mesh: Mesh, tree: Any) -> Any:
    """Returns what this process has of global arrays `[B, …]`, on the host: the rows of `rows_here`. The inverse of `put_batch`.

    All processes call it: arrays that lie elsewhere are brought to their places.
    """

    def shards(leaf: jax.Array) -> list[jax.Array]:
        found = {
            shard.index[0].indices(len(leaf))[0]: shard.data for shard in leaf.addressable_shards
        }
        return [found[start] for start in sorted(found)]

    placed = jax.device_put(tree, batch_sharding(mesh))
    parts = jax.device_get(jax.tree.map(shards, placed))
    return jax.tree.map(lambda _, rows: np.concatenate(rows), placed, parts)
