"""A run's checkpoints, by orbax: asynchronous, atomic, sharded as the arrays are; all processes of a run write them together.

`DIR/<step>/` has three items: `params`; `rest`, the step within the stage and the optimizer's state; and `record`, which is JSON:
stage, data iterator, means not yet written. Of the best parameters by a measure there are `WORKDIR/best/<step>/params` alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pg_ground.checkpoints.run_directory import BEST
from pg_ground.params import flatten
from pg_ground.types import POLICY, TrainState, UserError


class Checkpoints:
    """The checkpoints in one directory. Leaving the context waits for what is still being written."""

    def __init__(self, directory: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (
            error is None or jax.process_count() == 1
        ):  # else another process may be gone, and with it what is waited for
            self._manager.close()

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background, once the state has been copied to the host."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params[POLICY]),
            rest=ocp.args.StandardSave(_rest(state)),
            record=ocp.args.JsonSave(dict(record)),
        )
        self._manager.save(step, args=items)

    def record(self, step: int) -> dict[str, Any]:
        """Returns the JSON record of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of a checkpoint; `like` has its shapes, dtypes and shardings.

        Raises:
          UserError: the checkpoint has other parts, of an earlier version of this package or of other settings.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params[POLICY]),
            rest=ocp.args.StandardRestore(_rest(like)),
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError) as error:  # orbax's own goes on for pages about trees
            path = self._manager.directory / str(step)
            raise UserError(
                f"{path} has other parts than this version's runs: {_first_line(error)}"
            ) from error
        rest = found["rest"]
        params = {POLICY: found["params"]} | rest.pop("other_params", {})
        return TrainState(params=params, **rest)


def _rest(state: TrainState) -> dict[str, Any]:
    """Returns the state without the policy's parameters, which have an item of their own."""
    rest = {name: leaf for name, leaf in state._asdict().items() if name != "params"}
    other_params = {name: tree for name, tree in state.params.items() if name != POLICY}
    return rest | ({"other_params": other_params} if other_params else {})


def save_tree(path: Path, tree: Any) -> None:
    """Writes a tree of arrays and waits until it is there; a partial write leaves nothing under `path`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


def restore_tree(path: Path, like: Any) -> Any:
    """Returns the tree at `path`; `like` has its shapes, dtypes and shardings.

    Raises:
      UserError: nothing there.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: a tree of arrays written by a run is wanted")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), like)
    except (
        Exception
    ) as error:  # orbax raises what its storage does, with pages of it, on a damaged file
        raise UserError(f"{path} cannot be restored: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]


def remove_tree(path: Path) -> None:
    """Removes the tree at `path`, if there is one."""
    if path.exists():
        shutil.rmtree(path)


def describe(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each array of the tree at `path`, by slash-joined name.

    Raises:
      UserError: nothing there, or something else than a tree of arrays.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: a tree of arrays written by a run is wanted")
    try:
        found = ocp.StandardCheckpointHandler().metadata(epath.Path(path.absolute()))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no tree of arrays written by a run: {error}") from None
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in flatten(found.tree).items()
    }


def save_best(workdir: Path, step: int, params: Any) -> Path:
    """Returns the folder of the best parameters so far, written whole before those of any other step are removed."""
    folder = workdir / BEST / str(step)
    if not (folder / "params").is_dir():  # a resumed run comes by here again, with the same
        save_tree(folder / "params", params)
    if jax.process_index() == 0:
        for other in folder.parent.iterdir():
            if other != folder:
                remove_tree(other)
    return folder
