"""Writing files so that a reader never sees half of one, and so that an error names the file."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pg_ground.storage.paths import FilePath

CHUNK = 2**24
"""Bytes of a file that are copied at a time."""


def write_atomically(path: FilePath, content: str | bytes) -> None:
    """Writes `content` to `path` in one step: a reader sees the old file or the new file.

    Missing folders are made. An object of a bucket is always written in one step.

    Raises:
      OSError: the file cannot be written; the error names it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not isinstance(path, Path):
        path.write_bytes(data)
        return
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)


def copy_file(source: FilePath, target: FilePath) -> None:
    """Copies a file from or to a bucket. A reader of `target` never sees a part of it."""
    if not isinstance(target, Path):
        with source.open("rb") as stream, target.open("wb") as output:
            shutil.copyfileobj(stream, output, CHUNK)
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with source.open("rb") as stream, partial.open("wb") as output:
        shutil.copyfileobj(stream, output, CHUNK)
    partial.replace(target)


@contextlib.contextmanager
def naming(path: FilePath) -> Iterator[None]:
    """Adds the name of a file to an OSError without one, for example of `write` on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
