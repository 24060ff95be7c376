"""Errors of checkpoints. Other files test that a resumed run continues exactly."""

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.types import POLICY, TrainState, UserError


def test_a_checkpoint_without_a_part_of_the_state_is_refused_by_its_path(tmp_path):
    params = {"w": jnp.ones((2, 3))}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        rest=ocp.args.StandardSave({"step": jnp.int32(3), "opt_state": {}}),
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=items)
    with (
        Checkpoints(tmp_path, keep=1) as saved,
        pytest.raises(UserError, match=f"{tmp_path}/3 has other parts than this version"),
    ):
        saved.restore(3, TrainState(jnp.int32(0), {POLICY: params}, {"mu": params}, jnp.float32(0)))
