"""Checkpoints that lie elsewhere: on the Hugging Face Hub, on Kaggle, or in a bucket."""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: its HTTP client is private
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pg_ground.storage.files import copy_file
from pg_ground.storage.paths import FilePath, children, expand_path, remove_tree, to_path
from pg_ground.types import UserError

CANNOT_GET = (HTTPError, OSError, ValueError)
"""huggingface_hub raises these if a repository is missing or private, or if the Hub is down."""

CHECKPOINT_FILES = ("*.json", "*.safetensors", "tokenizer.model")
"""The files of a Hugging Face directory that this package reads or copies."""

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")

KAGGLE = "kaggle:"
KAGGLE_EXAMPLE = "kaggle:google/paligemma-2/jax/paligemma2-3b-pt-224"
KAGGLE_NAME = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+/[\w.-]+(/\d+)?")
"""OWNER/MODEL/FRAMEWORK/VARIATION, and a version."""

FILE_ENDINGS = (".npz", ".orbax", ".model", ".safetensors", ".json")

VERSION_FIELDS = (
    *("size", "etag", "ETag", "generation", "md5Hash", "updated", "mtime", "LastModified"),
    *("last_modified", "blob_id"),
)
"""Fields that the clients of buckets have for a file: gcsfs, s3fs, adlfs and huggingface_hub."""

LAST_FILES = ("config.json", "model.json", "commit_success.txt")

CACHE = "~/.cache/pg_ground/weights"
"""Holds Hugging Face directories of buckets. `XDG_CACHE_HOME` replaces ~/.cache."""


def checkpoint_path(name: str | FilePath, setting: str) -> FilePath:
    """Returns the path of a checkpoint: `name` itself, or its place in the cache of the Hub or of
    Kaggle.

    A file or a folder with this name comes first. Files that are not in the cache are downloaded.

    Args:
      name: a path, an address such as gs://bucket/a.npz, `ORG/NAME` or `ORG/NAME@REVISION` on the
        Hub, or `kaggle:OWNER/MODEL/FRAMEWORK/VARIATION`.
      setting: the flag or the setting, for errors.

    Raises:
      UserError: the Hub or Kaggle does not give the checkpoint, or the address cannot be read.
    """
    if str(name).startswith(KAGGLE):
        return _from_kaggle(str(name), setting)
    path = to_path(name, setting)
    match = HUB_NAME.fullmatch(str(name))
    if match is None or path.exists() or str(name).endswith(FILE_ENDINGS):
        return path
    repo, revision = match["repo"], match["revision"]
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(CHECKPOINT_FILES))
        )
    except CANNOT_GET as error:
        text = reason(repo, revision, error)
        raise UserError(f"{setting}={name}: no such file or folder, and {text}") from error


def tokenizer_file(name: str, setting: str = "config.data.tokenizer") -> str:
    """Returns the path of a sentencepiece model: a file, or the one of a checkpoint.

    Args:
      name: a file, a Hugging Face directory, or a name on the Hub. "" stays "".
    """
    if not name:
        return ""
    path = checkpoint_path(name, setting)
    return str(path / "tokenizer.model" if path.is_dir() else path)


def _from_kaggle(name: str, setting: str) -> Path:
    """Returns the `.npz` of a model on Kaggle, or its folder if it has no or several `.npz`."""
    handle = name.removeprefix(KAGGLE)
    if not KAGGLE_NAME.fullmatch(handle):
        raise UserError(f"{setting}={name}: a model of Kaggle is written as {KAGGLE_EXAMPLE}")
    try:
        kagglehub: Any = importlib.import_module("kagglehub")
    except ImportError:
        raise UserError(f"{setting}={name}: kagglehub is needed: pip install kagglehub") from None
    try:
        folder = Path(kagglehub.model_download(handle))
    # kagglehub raises exceptions of its own and of its HTTP client.
    except Exception as error:
        raise UserError(
            f"{setting}={name}: Kaggle does not give it ({' '.join(str(error).split()):.200}); "
            "accept the model's terms on kaggle.com, and log in (kagglehub.login() or "
            "~/.kaggle/kaggle.json)"
        ) from error
    files = list(folder.glob("*.npz"))
    return files[0] if len(files) == 1 else folder


def download_folder(folder: FilePath, patterns: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """Returns a local folder with the files of `folder` that match a pattern.

    A local folder is returned as it is. Files of a bucket are downloaded once. A file that has
    changed in the bucket is downloaded again.
    """
    if isinstance(folder, Path):
        return folder
    cache = Path(expand_path(CACHE))
    if os.environ.get("XDG_CACHE_HOME"):
        cache = Path(os.environ["XDG_CACHE_HOME"]) / "pg_ground" / "weights"
    target = cache / hashlib.sha256(str(folder).encode()).hexdigest()[:16] / folder.name
    target.mkdir(parents=True, exist_ok=True)
    sources = [
        child
        for child in children(folder)
        if any(fnmatch(child.name, pattern) for pattern in patterns)
    ]
    for stale in {path.name for path in target.iterdir()} - {path.name for path in sources}:
        if not stale.startswith("."):
            (target / stale).unlink()
    for source in sources:
        state = _version(source)
        file, note = target / source.name, target / f".{source.name}.state"
        if not file.is_file() or not note.is_file() or note.read_text() != state:
            note.unlink(missing_ok=True)
            copy_file(source, file)
            note.write_text(state)
    return target


def _version(path: FilePath) -> str:
    """Returns size and version of a file in a bucket as text. It differs if the file differs."""
    file_system, name = url_to_fs(str(path))
    info = file_system.info(name)
    return json.dumps({key: str(info[key]) for key in VERSION_FIELDS if key in info})


def upload(source: Path, target: FilePath) -> None:
    """Copies a file or a folder to a bucket. If that fails, nothing is left at `target`.

    The files by which a folder is known come last: a folder without them is not read.
    """
    files = [path for path in source.rglob("*") if path.is_file()] or [source]
    files.sort(key=lambda path: (path.name in LAST_FILES, path))
    try:
        for file in files:
            copy_file(file, target / file.relative_to(source) if file != source else target)
    except BaseException:
        remove_tree(target)
        raise


def reason(repo: str, revision: str | None, error: Exception, kind: str = "model") -> str:
    """Returns in words why the Hub does not give a repository, and what helps.

    Args:
      kind: "model" or "dataset".
    """
    match error:
        case GatedRepoError():
            folder = "datasets/" if kind == "dataset" else ""
            page = f"https://huggingface.co/{folder}{repo}"
            return f"accept its terms at {page}, and log in (hf auth login)"
        case RepositoryNotFoundError():
            return (
                f"the Hub has no {kind} {repo!r}, "
                "or it is private and you are not logged in (hf auth login)"
            )
        case RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}"
        case HFValidationError():
            return " ".join(str(error).split())
        case LocalEntryNotFoundError():
            return (
                f"{repo} at {revision or 'main'} is not in the cache, or not all of it, "
                "and nothing can be downloaded now"
            )
        case _:
            return f"the Hub does not give it ({' '.join(str(error).split()):.200})"
