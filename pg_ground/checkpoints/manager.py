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
import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from pg_ground.checkpoints.run_directory import (
    BEST,
    CHECKPOINT_METADATA,
    COMMIT_FILE,
    RECORD_FILE,
    fault,
    is_complete,
    older_checkpoint,
    read_json,
)
from pg_ground.parallel.multiprocess import all_gather, barrier
from pg_ground.params import AbstractParams, flatten
from pg_ground.storage.paths import FilePath, absolute, children, is_bucket_error, remove_tree
from pg_ground.types import POLICY, JsonDict, JsonObject, Params, TrainState, UserError

ATOMICITY = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)

# A checkpoint is written after the trees beside it (`frozen`, `reference`). So they are complete if
# there is a checkpoint, also if an older orbax wrote them without commit file.
READING = dataclasses.replace(ATOMICITY, allow_legacy_atomic_rename=True)


NO_DAMAGE = (
    *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE"),
    *("DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "UNIMPLEMENTED"),
)
"""Codes of errors of a machine or a storage. The files can be whole."""

logger = logging.getLogger(__name__)


class Damaged(UserError):
    """A checkpoint has the parts of this run, and their files are missing or cannot be read."""


class Checkpoints:
    """The checkpoints in one directory.

    The end of the `with` block waits until everything is written.
    """

    def __init__(self, directory: FilePath, keep: int):
        self.directory = directory
        if jax.process_index() == 0:
            _write_commit_files(directory)
            _warn_of_incomplete(directory)
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

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: TrainState, record: JsonObject) -> None:
        """Starts to write a checkpoint. Returns when the state is copied to the host."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params[POLICY]),
            rest=ocp.args.StandardSave(_without_policy(state)),
            record=ocp.args.JsonSave(dict(record)),
        )
        self._manager.save(step, args=items)

    def record(self, step: int) -> JsonDict:
        """Returns the JSON record of a checkpoint.

        Raises:
          Damaged: the record is missing or cannot be read.
        """
        folder = self.directory / str(step)
        _check_parts(folder, ("record",))
        return read_json(folder / "record" / RECORD_FILE)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of a checkpoint with the shapes, dtypes and shardings of `abstract`.

        A process reads its own shards and waits for no other process. So a process that fails can
        tell the others.

        Raises:
          UserError: the checkpoint has other arrays. An earlier version of this package or other
            settings wrote it.
          Damaged: the checkpoint should have these arrays, but they cannot be read.
        """
        folder = self.directory / str(step)
        parts = {"params": abstract.params[POLICY], "rest": _without_policy(abstract)}
        _check_parts(folder, tuple(parts))
        try:
            with _QuietRestore():
                restored = {name: _restore_part(folder / name, parts[name]) for name in parts}
        except Exception as error:
            if _is_of_machine(error):
                raise
            raise _restore_error(folder, parts, error) from error
        fields = restored["rest"]
        params = {POLICY: restored["params"]} | fields.pop("other_params", {})
        return TrainState(params=params, **fields)

    def withdraw(self, steps: Sequence[int]) -> None:
        """Makes checkpoints incomplete, so that their steps can be written again.

        Their other files stay until then. No folder is renamed: most buckets rename none.
        """
        barrier("all processes know the damaged checkpoints")
        if jax.process_index() == 0:
            for step in steps:
                # Without its metadata, no older orbax can have written a complete checkpoint.
                for name in (COMMIT_FILE, CHECKPOINT_METADATA):
                    (self.directory / str(step) / name).unlink(missing_ok=True)
        barrier("damaged checkpoints are incomplete")
        self._manager.reload()


def _restore_part(folder: FilePath, abstract: PyTree) -> JsonDict:
    """Returns one tree of a checkpoint. The checkpoint manager of orbax would wait for all
    processes."""
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(epath.Path(absolute(folder)), args=ocp.args.StandardRestore(abstract))


def _check_parts(folder: FilePath, parts: Sequence[str]) -> None:
    """Raises Damaged if a part of a checkpoint is missing."""
    reason = fault(folder, parts)
    if reason:
        raise Damaged(f"{folder} is damaged ({reason})")


def _restore_error(folder: FilePath, parts: JsonObject, error: Exception) -> UserError:
    """Returns the error for a checkpoint that orbax does not restore.

    Orbax raises the same exceptions, with pages about trees, for damaged files and for the
    checkpoint of other settings.
    """
    try:
        stored = {name: _shapes(_metadata(folder / name)) for name in parts}
    except Exception as metadata_error:
        return Damaged(f"{folder} is damaged ({_first_line(metadata_error)})")
    if stored != {name: _shapes(part) for name, part in parts.items()}:
        return UserError(f"{folder} has other parts than this version's runs: {_first_line(error)}")
    return Damaged(f"{folder} is damaged ({_first_line(error)})")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a tree of dicts, lists and named tuples, by name."""
    return {
        "/".join(map(_key_name, path)): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _key_name(key: Any) -> str:
    """Returns the name or the index in a key of jax, which has one class for each container."""
    names = (getattr(key, field, None) for field in ("key", "name", "idx"))
    return str(next(name for name in names if name is not None))


def _is_of_machine(error: BaseException | None) -> bool:
    """Returns whether an error says nothing about the files: memory, rights, the network."""
    while error is not None:
        kinds = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
        if isinstance(error, kinds) or is_bucket_error(error):
            return True
        if str(error).lstrip("'\" ").startswith(NO_DAMAGE):
            return True
        error = error.__cause__ or error.__context__
    return False


class _QuietRestore:
    """Hides what the tasks that orbax leaves after an error print.

    They end after their event loop. Each would print a traceback of several lines. After an error
    they stay hidden.
    """

    def __enter__(self) -> None:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._report
        logging.getLogger("asyncio").addFilter(_is_not_leftover)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            sys.unraisablehook = self._hook
            logging.getLogger("asyncio").removeFilter(_is_not_leftover)

    def _report(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)


def _is_not_leftover(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _write_commit_files(directory: FilePath) -> None:
    """Writes the commit files of complete checkpoints that an older orbax wrote without them."""
    for folder in children(directory):
        has_none = folder.name.isdigit() and not (folder / COMMIT_FILE).is_file()
        if has_none and is_complete(folder):
            for part in (*(path for path in children(folder) if path.is_dir()), folder):
                (part / COMMIT_FILE).write_bytes(b"")


def _warn_of_incomplete(directory: FilePath) -> None:
    """Warns of checkpoints that a run has begun after its newest complete one."""
    folders = [folder for folder in children(directory) if folder.name.isdigit()]
    complete = [int(folder.name) for folder in folders if is_complete(folder)]
    for folder in folders:
        if complete and int(folder.name) > max(complete) and not is_complete(folder):
            logger.warning(
                "%s is not complete: the run ended before it was written whole, and continues from "
                "checkpoint %d",
                folder, max(complete),
            )  # fmt: skip


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
        with (
            ocp.StandardCheckpointer(atomicity_options=READING) as checkpointer,
            _QuietRestore(),
        ):
            return checkpointer.restore(absolute(path), abstract)
    # For a damaged file, orbax raises the exception of its storage, with a message of pages.
    except Exception as error:
        raise UserError(
            f"{path} cannot be restored: {_first_line(error)}{_name_older(path)}"
        ) from error


def describe(path: FilePath) -> AbstractParams:
    """Returns shape and dtype of each array of the tree at `path`, by slash-joined name.

    Raises:
      UserError: the path does not exist, or does not hold a tree of arrays.
    """
    _check_exists(path)
    try:
        tree = _metadata(path)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a tree of arrays that a run wrote: {_first_line(error)}"
            f"{_name_older(path)}"
        ) from None
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(tree).items()
    }


def _name_older(path: FilePath) -> str:
    """Returns the end of an error about the parameters of a checkpoint: the newest older one."""
    older = older_checkpoint(path.parent, ("params",)) if path.name == "params" else None
    return f"; {older} is an older checkpoint" if older else ""


def _metadata(path: FilePath) -> PyTree:
    """Returns the tree of shapes and dtypes that orbax wrote beside a tree of arrays."""
    return ocp.StandardCheckpointHandler().metadata(epath.Path(absolute(path))).tree


def _check_exists(path: FilePath) -> None:
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected a tree of arrays that a run wrote")


def _first_line(error: BaseException) -> str:
    """Returns the beginning of the message of the error that caused `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
