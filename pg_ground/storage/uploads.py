"""Checkpoints that are written to the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi

from pg_ground.storage.downloads import CANNOT_GET
from pg_ground.types import UserError

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def create_repository(repo: str, private: bool) -> None:
    """Makes the repository of a model on the Hub. A repository that exists stays as it is.

    Raises:
      UserError: `repo` is not ORG/NAME, or the Hub refuses.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"--push={repo}: a model of the Hub is written as ORG/NAME")
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
    except CANNOT_GET as error:
        raise _refused(repo, error) from error


def push(folder: Path, repo: str, message: str) -> str:
    """Uploads the files of a folder in one commit, and returns the address of the model's page.

    Raises:
      UserError: the Hub refuses.
    """
    try:
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except CANNOT_GET as error:
        error_line = f"{_refused(repo, error)}. {folder} is complete: hf upload {repo} {folder}"
        raise UserError(error_line) from error
    return f"{HfApi().endpoint}/{repo}"


def _refused(repo: str, error: Exception) -> UserError:
    words = " ".join(str(error).split())[:200]
    return UserError(
        f"--push={repo}: the Hub refuses ({words}); a token that may write is needed "
        "(hf auth login), and the right to write to this organisation"
    )
