"""Paths of a run that do not exist. If the user typed one as a flag, it is a mistake of typing."""

import difflib
from pathlib import Path

from pg_ground.storage.downloads import checkpoint_path
from pg_ground.storage.paths import FilePath, children, to_path
from pg_ground.types import UserError, first_problems

SHOWN = 5
"""Names of files that an error lists."""


def absence(path: FilePath) -> str:
    """Returns "does not exist" or "is empty" if nothing can be read at `path`, otherwise ""."""
    if not path.exists():
        return "does not exist"
    return "is empty" if path.is_dir() and not children(path) else ""


def nearest_path(path: FilePath) -> str:
    """Returns in words which existing path is nearest to `path`, which does not exist.

    If its folder does not exist either, the nearest path to this folder counts.
    """
    folder = path.parent
    if folder == path:
        return ""
    if not folder.is_dir():
        return nearest_path(folder)
    names = [child.name for child in children(folder) if not child.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {folder / close[0]}?"
    listed = first_problems(names, ", ", SHOWN)
    where = "this folder" if folder == Path() else folder
    return f"{where} has {listed:.150}" if names else f"{where} is empty"


def missing(setting: str, path: FilePath) -> str:
    """Returns the error of a path that the user typed as the flag of `setting`."""
    fault = absence(path)
    more = nearest_path(path) if fault == "does not exist" else ""
    return f"{setting}={path} {fault}" + (f": {more}" if more else "")


def existing_path(name: str, setting: str) -> FilePath:
    """Returns the path of a checkpoint or a file, which may be on the Hub.

    Raises:
      UserError: it does not exist. The error names the nearest existing path.
    """
    try:
        path = checkpoint_path(name, setting)
    except UserError as error:
        path = to_path(name, setting)
        # The Hub has no such name. It is the name of a folder here if its parent is here.
        if not path.parent.is_dir():
            raise
        raise UserError(missing(setting, path)) from error
    if not path.exists():
        raise UserError(missing(setting, path))
    return path
