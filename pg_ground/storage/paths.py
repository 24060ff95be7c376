"""Paths of files and folders: on this machine, or at an address such as gs://bucket/run.

Every path that is read or written goes through `to_path` or `local_path`. A Python `Path` of
gs://bucket would be a local folder `gs:`, and what is written there would be lost.
"""

import importlib.util
import logging
import os
import re
import shutil
import traceback
from pathlib import Path

from etils import epath
from fsspec.config import conf as fsspec_settings

from pg_ground.types import UserError

FilePath = Path | epath.Path
"""A local path, or a path of etils for an address such as gs://bucket/run.

Both have the same methods. Use `file_size` and `remove_tree` for sizes and for whole folders.
"""

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
"""The schemes of addresses → the package that reads and writes there."""

INSTALL_GCS = "pip --python .venv/bin/python install -e '.[gcs]' in the checkout"
"""How the packages of buckets are installed, in an environment as README.md makes it."""

BUCKET_CLIENTS = (
    *("gcsfs", "google.auth", "google.api_core", "google.cloud"),
    *("s3fs", "botocore", "adlfs", "azure", "aiohttp", "requests"),
)
"""Modules whose exceptions say that a bucket cannot be used."""

ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
"""The beginning of an address. Names such as gs:/bucket, which lost a slash, are found too."""

# Otherwise etils reads buckets with TensorFlow if that is installed. Its errors are of other kinds.
os.environ.setdefault("EPATH_USE_TF", "false")

# The reader of gcsfs raises each error, and logs it too, with its traceback. When a program ends, a
# thread can still be reading an image of the next batch, and the end would look like a crash.
logging.getLogger("fsspec.prefetcher").setLevel(logging.CRITICAL)

# Another process can have written a file since the last listing of its folder.
for _scheme in ("gs", "gcs", "s3", "az"):
    fsspec_settings.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


def to_path(path: str | os.PathLike[str], name: str) -> FilePath:
    """Returns the path of a file or a folder, on this machine or at an address.

    A leading `~` is the home directory.

    Args:
      name: the flag, the setting, the argument or the source, for the error.

    Raises:
      UserError: the scheme of the address is not among `PACKAGES`, or its package is not installed.
    """
    text = os.fspath(path)
    match = ADDRESS.match(text)
    if match is None:
        return Path(expand_path(text))
    scheme = match["scheme"]
    if scheme not in PACKAGES or not text.startswith(f"{scheme}://"):
        known = ", ".join(f"{known}://" for known in PACKAGES)
        raise UserError(f"{name}: {text} is an address, but only {known} can be read and written")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        install = INSTALL_GCS if scheme == "gs" else f"pip install {PACKAGES[scheme]}"
        raise UserError(f"{name}: {text} needs {PACKAGES[scheme]}: {install}")
    return epath.Path(text)


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns a path of this machine. A leading `~` is the home directory.

    Args:
      name: the flag, the setting or the argument, for the error.

    Raises:
      UserError: `path` is an address.
    """
    text = os.fspath(path)
    if is_address(text):
        raise UserError(
            f"{name}: {text} is an address, but it must be a path of this machine: copy the files, "
            "or mount the bucket"
        )
    return Path(expand_path(text))


def expand_path(path: str) -> str:
    """Returns `path` with a leading `~` or `~user` replaced by the home directory.

    Other paths stay as they are.

    A shell does not expand `~` inside `--workdir=~/run` or inside a uri, so every opener calls this
    function.
    """
    return os.path.expanduser(path)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has a scheme, such as gs://."""
    return ADDRESS.match(os.fspath(path)) is not None


def is_bucket_error(error: BaseException) -> bool:
    """Returns whether the client of a bucket, its transport or its login raised `error`.

    gcsfs raises a plain OSError without a number for a bucket that may not be read.
    """
    modules = [type(error).__module__]
    if type(error) is OSError and error.errno is None:
        frames = traceback.walk_tb(error.__traceback__)
        modules += [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    starts = tuple(f"{name}." for name in BUCKET_CLIENTS)
    return any(f"{module}.".startswith(starts) for module in modules)


def join(folder: FilePath, name: str) -> FilePath:
    """Returns the path of `name` in `folder`. A `name` that is an address or begins with ~ or /
    stays as it is."""
    return to_path(name, str(folder)) if is_address(name) else folder / expand_path(name)


def children(folder: FilePath) -> list[FilePath]:
    """Returns what is in a folder, sorted; nothing if there is no such folder.

    `glob` would read the signs [ and * in the name of the folder as a pattern.
    """
    return sorted(folder.iterdir()) if folder.is_dir() else []


def absolute(path: FilePath) -> FilePath:
    """Returns the path from the root of its file system. An address stays as it is."""
    return path.resolve() if isinstance(path, Path) else path


def file_size(path: FilePath) -> int:
    """Returns the number of bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def modified_time(path: FilePath) -> float:
    """Returns the Unix time at which a file was written."""
    return path.stat().st_mtime if isinstance(path, Path) else float(path.stat().mtime)


def remove_tree(path: FilePath) -> None:
    """Removes a folder with all that is in it, if there is one."""
    if not path.exists():
        return
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree(missing_ok=True)
        path.rmtree(missing_ok=True)  # objects behind an object that stands for a folder
