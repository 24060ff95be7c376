"""Errors of checkpoints. Other files test that a resumed run continues exactly."""

import json

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from pg_ground.checkpoints.manager import Checkpoints
from pg_ground.checkpoints.run_directory import COMMIT_FILE
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


def test_only_checkpoints_that_a_killed_run_has_begun_are_removed(tmp_path):
    state = TrainState(
        jnp.int32(0), {POLICY: {"w": jnp.ones(3)}}, {"mu": jnp.ones(3)}, jnp.ones(())
    )
    with Checkpoints(tmp_path, keep=9) as saved:
        for step in (3, 5):
            saved.save(step, state, {"step": step})
    (tmp_path / "3" / COMMIT_FILE).unlink()  # an older orbax writes none
    (tmp_path / "5" / COMMIT_FILE).unlink()
    metadata = tmp_path / "5" / "_CHECKPOINT_METADATA"
    metadata.write_text(
        json.dumps(json.loads(metadata.read_text()) | {"commit_timestamp_nsecs": None})
    )
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path, keep=9) as saved:
        assert saved.latest() == 3 and saved.record(3) == {"step": 3}
        saved.save(5, state, {"step": 50})
    with Checkpoints(tmp_path, keep=9) as saved:
        assert saved.record(saved.latest()) == {"step": 50}
    assert (tmp_path / "notes").is_dir()
