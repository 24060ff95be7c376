"""Where arrays lie."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pg_ground import config, sharding
from pg_ground.types import UserError


def placed(*shape: int) -> PartitionSpec:
    mesh = sharding.make_mesh(config.Mesh())
    return sharding.fsdp(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec


def test_large_arrays_are_split_along_their_largest_axis_that_divides():
    assert placed(18, 2048, 16384) == PartitionSpec(None, None, "data")
    assert placed(257_152, 2048) == PartitionSpec("data")
    assert placed(27, 1152, 4303) == PartitionSpec(None, "data")


def test_small_arrays_are_whole_on_every_device():
    assert placed(2048) == placed() == placed(8, 8) == PartitionSpec()


def test_a_large_array_is_never_replicated_silently():
    with pytest.raises(UserError, match="no axis that 8 devices divide"):
        placed(2049, 16383)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match="from 1 to 8"):
        sharding.make_mesh(config.Mesh(data=9))


def test_rows_that_do_not_split_evenly_are_refused():
    with pytest.raises(UserError, match="a multiple of 8"):
        sharding.check_rows(sharding.make_mesh(config.Mesh()), 12, "grpo.batch_size")
