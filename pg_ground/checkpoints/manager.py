"""Checkpoints of a run, written by orbax: asynchronous, atomic, and sharded as the arrays are.

The last file of a checkpoint is `commit_success.txt`. No folder is renamed, so a checkpoint can lie
on a disk, in a bucket (gs://) or in a mounted bucket. All processes of a run write a checkpoint
together. `DIR/<step>/` has three items:

    params   the policy's trained parameters
    rest     everything else of the train state: step, optimizer state, other trained trees
    record   JSON: stage, data iterator, means that are not written yet

`WORKDIR/best/<step>/params` holds only the parameters with the best value of a metric.
"""

import dataclasses
from types import TracebackType

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from pg_ground.checkpoints.run_directory import BEST, COMMIT_FILE, is_complete
from pg_ground.parallel.multiprocess import all_gather, barrier
from pg_ground.params import AbstractParams, flatten
from pg_ground.storage.paths import FilePath, absolute, children, remove_tree
from pg_ground.types import POLICY, JsonDict, JsonObject, Params, TrainState, UserError

ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)

# A checkpoint is written after the trees beside it (`frozen`, `reference`). So they are complete if
# there is a checkpoint, also if an older orbax wrote them without commit file.
READING = dataclasses.replace(ATOMICITY, allow_legacy_atomic_rename=True)


class Checkpoints:
    """The checkpoints in one directory.

    The end of the `with` block waits until everything is written.
    """

    def __init__(self, directory: FilePath, keep: int):
        if jax.process_index() == 0:
            _write_commit_files(directory)
        barrier("commit files are written")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            atomicity_options=ATOMICITY,
        )
        self._manager = ocp.CheckpointManager(absolute(directory), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error of several processes, another one may have ended. Waiting for it would
        # never end.
        if error is None or jax.process_count() == 1:
            self._manager.close()

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: JsonObject) -> None:
        """Starts to write a checkpoint. Returns when the state is copied to the host."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params[POLICY]),
            rest=ocp.args.StandardSave(_without_policy(state)),
            record=ocp.args.JsonSave(dict(record)),
        )
        self._manager.save(step, args=items)

    def record(self, step: int) -> JsonDict:
        """Returns the JSON record of a checkpoint."""
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["record"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a checkpoint with the shapes, dtypes and shardings of `abstract`.

        Raises:
          UserError: the checkpoint has other arrays. An earlier version of this package or other
            settings wrote it.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params[POLICY]),
            rest=ocp.args.StandardRestore(_without_policy(abstract)),
        )
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError) as error:  # orbax's message has pages about trees
            path = self._manager.directory / str(step)
            raise UserError(
                f"{path} has other parts than this version's runs: {_first_line(error)}"
            ) from error
        fields = restored["rest"]
        params = {POLICY: restored["params"]} | fields.pop("other_params", {})
        return TrainState(params=params, **fields)


def _write_commit_files(directory: FilePath) -> None:
    """Writes the commit files of complete checkpoints that an older orbax wrote without them."""
    for folder in children(directory):
        has_none = folder.name.isdigit() and not (folder / COMMIT_FILE).is_file()
        if has_none and is_complete(folder):
            for part in (*(path for path in children(folder) if path.is_dir()), folder):
                (part / COMMIT_FILE).write_bytes(b"")


def _without_policy(state: TrainState) -> JsonDict:
    """Returns the state without the policy's parameters, which have an item of their own."""
    fields = {name: leaf for name, leaf in state._asdict().items() if name != "params"}
    other_params = {name: tree for name, tree in state.params.items() if name != POLICY}
    return fields | ({"other_params": other_params} if other_params else {})


def save_tree(path: FilePath, tree: Params) -> None:
    """Writes a tree of arrays over an earlier one, and waits until it is complete."""
    with ocp.StandardCheckpointer(atomicity_options=ATOMICITY) as checkpointer:
        checkpointer.save(absolute(path), tree, force=True)


def restore_tree(path: FilePath, abstract: Params) -> PyTree:
    """Returns the tree at `path` with the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: the path does not exist, or its content is damaged.
    """
    _check_exists(path)
    try:
        with ocp.StandardCheckpointer(atomicity_options=READING) as checkpointer:
            return checkpointer.restore(absolute(path), abstract)
    # For a damaged file, orbax raises the exception of its storage, with a message of pages.
    except Exception as error:
        raise UserError(f"{path} cannot be restored: {_first_line(error)}") from error


def describe(path: FilePath) -> AbstractParams:
    """Returns shape and dtype of each array of the tree at `path`, by slash-joined name.

    Raises:
      UserError: the path does not exist, or does not hold a tree of arrays.
    """
    _check_exists(path)
    try:
        metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(absolute(path)))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a tree of arrays that a run wrote: {error}") from None
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in flatten(metadata.tree).items()
    }


def _check_exists(path: FilePath) -> None:
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected a tree of arrays that a run wrote")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def save_best(workdir: FilePath, step: int, params: Params) -> FilePath:
    """Writes the best parameters so far and removes older ones. Returns the new folder."""
    folder = workdir / BEST / str(step)
    # A resumed run reaches the same step again. All processes write, or none.
    if not all_gather(is_complete(folder / "params"))[0]:
        save_tree(folder / "params", params)
    if jax.process_index() == 0:
        for other in children(folder.parent):
            if other.name.isdigit() and other.name != folder.name:
                remove_tree(other)
    return folder
