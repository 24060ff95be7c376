"""How arrays lie on devices: one mesh axis, `data`, that splits both the prompts of a batch and the parameters (FSDP)."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pg_ground import config
from pg_ground.types import UserError

SMALL_BYTES = 4 * 2**20
"""Arrays up to this size are replicated, as big_vision does: gathering them costs more than holding them."""

LARGE_BYTES = 64 * 2**20
"""An array above this size is never replicated for want of an axis that divides: that is an error."""


def split_cpu(c: config.Mesh) -> None:
    """Makes the CPU count as `c.cpu_devices` devices (0 leaves it as it is); only before this process first uses one."""
    if c.cpu_devices:
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)


def make_mesh(c: config.Mesh) -> Mesh:
    """Returns the mesh over the first `c.data` devices of all processes (all devices for -1).

    Its axis type is Auto on purpose: the compiler propagates shardings from the arguments (`jax.make_mesh` would default to
    explicit ones).
    """
    devices = jax.devices()
    count = len(devices) if c.data == -1 else c.data
    if not 1 <= count <= len(devices):
        raise UserError(f"config.mesh.data is {c.data}: it must be -1 or from 1 to {len(devices)}, the devices there are")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of everything whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(mesh: Mesh, rows: int, setting: str) -> None:
    """Raises UserError if `rows` questions at once cannot be split evenly over the mesh."""
    devices = mesh.shape["data"]
    if rows % devices:
        raise UserError(f"config.{setting} is {rows}: it must be a multiple of {devices}, the devices of the mesh")


def fsdp(mesh: Mesh, tree: Any) -> Any:
    """Returns a sharding for each leaf (array or shape): its largest axis that the devices divide, if it is large enough.

    Raises:
      UserError: an array above `LARGE_BYTES` has no such axis.
    """
    count = mesh.shape["data"]

    def place(leaf: Any) -> NamedSharding:
        size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % count == 0]
        if not axes and size > LARGE_BYTES:
            raise UserError(f"an array of shape {leaf.shape} ({size} bytes) has no axis that {count} devices divide evenly")
        if size <= SMALL_BYTES or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "data"))

    return jax.tree.map(place, tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Returns this process's rows as global arrays, split over the mesh along B."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)
