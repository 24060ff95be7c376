"""Writing files so that a reader never sees half of one, and so that an error names the file."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pg_ground.storage.paths import FilePath, is_bucket_error
from pg_ground.types import UserError

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
        with _naming_address(path):
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
        try:
            with (
                _naming_address(target),
                source.open("rb") as stream,
                target.open("wb") as output,
            ):
                shutil.copyfileobj(stream, output, CHUNK)
        except BaseException:
            # The end of the `with` block has completed the object with the part so far.
            with contextlib.suppress(Exception):
                target.unlink(missing_ok=True)
            raise
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    with source.open("rb") as stream, partial.open("wb") as output:
        shutil.copyfileobj(stream, output, CHUNK)
    partial.replace(target)


@contextlib.contextmanager
def _naming_address(path: FilePath) -> Iterator[None]:
    """Turns the error of a bucket's client into one that names the address."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, FileNotFoundError) and not is_bucket_error(error):
            raise
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be written ({type(error).__name__} {words})") from error


@contextlib.contextmanager
def naming(path: FilePath) -> Iterator[None]:
    """Adds the name of a file to an OSError without one, for example of `write` on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
