"""Checkpoints on the Hugging Face Hub: `ORG/NAME` or `ORG/NAME@REVISION`, downloaded once."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: its HTTP client is private
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pg_ground.types import UserError, local_path

CANNOT_GET = (HTTPError, OSError, ValueError)
"""huggingface_hub raises these if a repository is missing or private, or if the Hub is down."""

CHECKPOINT_FILES = ("*.json", "*.safetensors", "tokenizer.model")
"""The files of a checkpoint that this package reads or copies."""

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")

FILE_ENDINGS = (".npz", ".orbax", ".model", ".safetensors", ".json")


def local_checkpoint(name: str | Path, setting: str) -> Path:
    """Returns the local path of a checkpoint: `name` itself, or its folder in the Hub's cache.

    A file or a folder with this name comes first. Files that are not in the cache are downloaded.

    Args:
      name: a path, or `ORG/NAME` or `ORG/NAME@REVISION` on the Hub.
      setting: the flag or the setting, for errors.

    Raises:
      UserError: the Hub does not give the checkpoint.
    """
    path = local_path(name, setting)
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
    path = local_checkpoint(name, setting)
    return str(path / "tokenizer.model" if path.is_dir() else path)


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
