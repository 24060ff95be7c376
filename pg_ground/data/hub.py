"""Records of data sets on the Hugging Face Hub, downloaded once: `hf:ORG/NAME@SPLIT`."""

import re
from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate
from huggingface_hub import HfApi, get_cached_repo_tree, metadata_load, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever HTTP client huggingface_hub uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pg_ground.data.records import Records
from pg_ground.data.tables import listed, one_line, parquet_of, with_options
from pg_ground.types import UserError

CANNOT_GET = (HTTPError, OSError, ValueError)
"""What huggingface_hub raises where a data set does not exist, is not ours to read, or the Hub does not answer."""

Splits = dict[tuple[str, str], list[str]]
"""Files by (config, split). The config "" is the one that is meant where none is named."""

DEFAULT = "default"

CONVERTED = "; the Hub may have it converted, at revision=refs/convert/parquet"

NUMBERED = re.compile(r"(?P<split>.*?[A-Za-z].*?)(-\d+(-of-\d+)?)?(-[0-9a-f]{16})?\.parquet")
"""A file's name as `datasets` writes it: train-00000-of-00002.parquet; older ones have a hash behind the numbers."""


def open_hub(rest: str) -> Records:
    """Returns the rows of one split of a data set: `ORG/NAME@SPLIT?config=NAME&revision=REV&offline=0`.

    Its files are those that the data set's README declares, or else those that lie where the Hub looks for them. What is not yet
    in the cache of `huggingface_hub` is downloaded, unless `offline=1`. Where the files are no parquet, the Hub often has them
    converted: `revision=refs/convert/parquet`.

    Raises:
      UserError: there is no such data set, split, config or option, it cannot be had, or its files cannot be read.
    """
    uri = f"hf:{rest}"
    name, options = with_options("hf", rest, ("config", "revision", "offline"))
    repo, _, split = name.partition("@")
    if options.get("offline", "0") not in ("0", "1"):
        raise UserError(f"source {uri}: offline is 0 or 1")
    revision, offline = options.get("revision"), options.get("offline") == "1"
    try:
        folder, files = _listing(repo, revision, offline)
        chosen = _choose(
            _declared(folder / "README.md", files, uri) or _inferred(files),
            options.get("config", ""),
            split,
            uri,
        )
        folder = _snapshot(repo, revision, offline, chosen)
    except CANNOT_GET as e:
        raise UserError(f"source {uri}: {_reason(repo, revision, e)}") from e
    if missing := [file for file in chosen if not (folder / file).is_file()]:
        raise UserError(
            f"source {uri}: {missing[0]} is not in the cache; without offline=1 it is downloaded"
        )
    return parquet_of([folder / file for file in chosen], folder, uri)


def _listing(repo: str, revision: str | None, offline: bool) -> tuple[Path, list[str]]:
    """Returns the folder in the cache where a data set's README is, if it has one, and the names of all its files."""
    if not offline:
        files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        return _snapshot(repo, revision, offline, ["README.md"]), sorted(files)
    folder = _snapshot(repo, revision, offline, [])
    try:
        return folder, sorted(
            file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=revision)
        )
    except CachedRepoTreeNotFoundError:  # other programs download files without a list of them
        return folder, _with_siblings(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )


def _with_siblings(files: Iterable[str]) -> list[str]:
    """Returns names of files and of the shards that must exist beside them: 00000-of-00002 has a 00001-of-00002."""
    names = set(files)
    for match in [re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.parquet)", name) for name in names]:
        names |= (
            {f"{match[1]}{number:05d}{match[2]}" for number in range(int(match[3]))}
            if match
            else set()
        )
    return sorted(names)


def _snapshot(repo: str, revision: str | None, offline: bool, files: Iterable[str]) -> Path:
    """Returns the folder in the cache with a data set's files, after those asked for are downloaded."""
    patterns = [escape(file) for file in files]
    folder = snapshot_download(
        repo,
        repo_type="dataset",
        revision=revision,
        allow_patterns=patterns,
        local_files_only=offline,
    )
    return Path(folder)


def _reason(repo: str, revision: str | None, e: Exception) -> str:
    match e:
        case GatedRepoError():
            return f"accept its terms at https://huggingface.co/datasets/{repo}, and log in (hf auth login)"
        case RepositoryNotFoundError():
            return f"the Hub has no data set {repo!r}, or it is private and you are not logged in (hf auth login)"
        case RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}"
        case HFValidationError():
            return f"{one_line(e)}; the form is hf:ORG/NAME@SPLIT"
        case LocalEntryNotFoundError():
            return f"{repo} at {revision or 'main'} is not in the cache, or not all of it, and nothing is downloaded now"
        case _:
            return f"the Hub does not give it ({one_line(e):.200}); what is in the cache is read with offline=1"


def _declared(readme: Path, files: Iterable[str], uri: str) -> Splits:
    """Returns the splits that a README declares; see https://huggingface.co/docs/hub/datasets-manual-configuration."""
    splits = {}
    try:
        card = metadata_load(readme) if readme.is_file() else None
        for config in (card or {}).get("configs", ()):
            name = config.get("config_name", DEFAULT)
            for split, patterns in _patterns(config.get("data_files", ())):
                fits = [
                    re.compile(glob_translate(str(PurePosixPath(config.get("data_dir", ""), p))))
                    for p in patterns
                ]
                if chosen := [
                    file for file in files if any(pattern.fullmatch(file) for pattern in fits)
                ]:
                    splits[name, split] = chosen
                    if name == DEFAULT or config.get("default"):
                        splits["", split] = chosen
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"source {uri}: the data set's README.md has no valid configs: {one_line(e)}"
        ) from e
    return splits


def _patterns(data_files: Any) -> Iterable[tuple[str, list[str]]]:
    """Yields each split and its patterns, of the forms that `data_files` may have; files of no named split are train."""
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    elif isinstance(data_files, str):
        data_files = [data_files]
    if data_files and all(isinstance(entry, str) for entry in data_files):
        data_files = [{"split": "train", "path": data_files}]
    for entry in data_files:
        paths = entry["path"]
        yield entry["split"], [paths] if isinstance(paths, str) else paths


def _inferred(files: Iterable[str]) -> Splits:
    """Returns the splits that the places of parquet files say: [data/]SPLIT-*, [data/]SPLIT/*, CONFIG/SPLIT-*, CONFIG/SPLIT/*."""
    splits: Splits = {}
    for file in files:
        *folders, name = file.removeprefix("data/").split("/")
        numbered = NUMBERED.fullmatch(name)
        keys = []
        if not folders and numbered:
            keys = [("", numbered["split"])]
        elif len(folders) == 1 and name.endswith(".parquet"):
            # A folder may be a split or a config. Only asking for one of them tells.
            keys = [("", folders[0])] + ([(folders[0], numbered["split"])] if numbered else [])
        elif len(folders) == 2 and name.endswith(".parquet"):
            keys = [(folders[0], folders[1])]
        for config, split in keys:
            splits.setdefault(("" if config == DEFAULT else config, split), []).append(file)
    return splits


def _choose(splits: Splits, config: str, split: str, uri: str) -> list[str]:
    """Returns the files of a split. Its config has to be named only where several have that split and none is the default."""
    having = [c for c, s in splits if s == split]
    key = ("" if config == DEFAULT and DEFAULT not in having else config, split)
    if key not in splits and not config and len(having) == 1:
        key = (having[0], split)
    if key not in splits:
        forms = sorted({f"@{s}?config={c}" if c else f"@{s}" for c, s in splits if c != DEFAULT})
        there = f"there are {listed(forms)}" if forms else f"there is no parquet{CONVERTED}"
        raise UserError(
            f"source {uri}: no split {split!r}{f' of config {config!r}' if config else ''}; {there}"
        )
    if odd := [file for file in splits[key] if not file.endswith(".parquet")]:
        raise UserError(f"source {uri}: {odd[0]} is no parquet{CONVERTED}")
    return splits[key]
