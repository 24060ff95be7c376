"""Records of datasets on the Hugging Face Hub, downloaded once: `hf:ORG/NAME@SPLIT`."""

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
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pg_ground.data.class_names import names_of_card
from pg_ground.data.records import Records, list_names
from pg_ground.data.splits import Part, choose_rows, parse_split
from pg_ground.data.tables import Parquet, one_line, open_parquet_files, split_options
from pg_ground.storage.downloads import CANNOT_GET, reason
from pg_ground.types import UserError

Splits = dict[tuple[str, str], list[str]]
"""Files by (config, split).

The config "" is the default: the one that a uri without config means.
"""

DEFAULT = "default"

CONVERT_HINT = "; the Hub may have it converted, at revision=refs/convert/parquet"

PARQUET_NAME = re.compile(r"(?P<split>.*?[A-Za-z].*?)(-\d+(-of-\d+)?)?(-[0-9a-f]{16})?\.parquet")
"""A file name as `datasets` writes it, such as train-00000-of-00002.parquet.

Older files have a hash behind the numbers.
"""


def open_hub(location: str) -> Records:
    """Returns the rows of splits of datasets, one after the other.

    Files that are not in the cache of `huggingface_hub` are downloaded, unless `offline=1`. The
    split's files are those that the dataset's README declares, or those at the Hub's usual paths.
    Files that are not parquet cannot be read, but the Hub often has them converted:
    `revision=refs/convert/parquet`.

    Args:
      location: `ORG/NAME@SPLIT?config=NAME&revision=REV&offline=0`. SPLIT can be a slice or a sum,
        such as `train[:10%]+val` (`splits.py`). `A,B@SPLIT` are the splits of several datasets, and
        `A@SPLIT,B@OTHER` too. All files of a split are downloaded, also for a slice.

    Raises:
      UserError: the dataset, split, config or option does not exist, cannot be fetched, or cannot
        be read; or a slice reaches beyond its split, or holds no row.
    """
    uri = f"hf:{location}"
    name, options = split_options("hf", location, ("config", "revision", "offline"))
    if options.get("offline", "0") not in ("0", "1"):
        raise UserError(f"source {uri}: offline is {options['offline']}, but it must be 0 or 1")
    opened: dict[tuple[str, str], Parquet] = {}
    parts: list[tuple[Part, Parquet]] = []
    for repo, text in _splits_of_repos(name):
        for part in parse_split(text):
            key = (repo, part.split)
            if key not in opened:
                opened[key] = _open_split(repo, part.split, options, uri)
            parts.append((part, opened[key]))
    return choose_rows(parts, parts[0][1].root, uri)


def _splits_of_repos(name: str) -> list[tuple[str, str]]:
    """Returns each dataset of `A,B@SPLIT` with its splits.

    A dataset without @ has the splits of the next one.
    """
    pairs: list[tuple[str, str]] = []
    following = ""
    for item in reversed(name.split(",")):
        repo, at, split = item.strip().partition("@")
        following = split if at else following
        pairs.insert(0, (repo, following))
    return pairs


def _open_split(repo: str, split: str, options: Mapping[str, str], uri: str) -> Parquet:
    """Returns all rows of one split of a dataset. The options come from the uri."""
    revision = options.get("revision")
    is_offline = options.get("offline") == "1"
    try:
        folder, files = _list_files(repo, revision, is_offline)
        card = _card(folder / "README.md", uri)
        splits = _declared_splits(card, files, uri) or _usual_splits(files)
        chosen = _files_of_split(splits, options.get("config", ""), split, uri)
        folder = _snapshot(repo, revision, is_offline, chosen)
    except CANNOT_GET as error:
        raise UserError(f"source {uri}: {_reason(repo, revision, error)}") from error
    if missing := [file for file in chosen if not (folder / file).is_file()]:
        raise UserError(
            f"source {uri}: {missing[0]} is not in the cache; without offline=1 it is downloaded"
        )
    config = options.get("config") or _config_of(splits, split, chosen)
    names = names_of_card(card.get("dataset_info"), config)
    return open_parquet_files([folder / file for file in chosen], folder, uri, names)


def _list_files(repo: str, revision: str | None, is_offline: bool) -> tuple[Path, list[str]]:
    """Returns the folder in the cache with the dataset's README, and the names of all its files."""
    if not is_offline:
        files = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        return _snapshot(repo, revision, is_offline, ["README.md"]), sorted(files)
    folder = _snapshot(repo, revision, is_offline, [])
    try:
        tree = get_cached_repo_tree(repo, repo_type="dataset", revision=revision)
        return folder, sorted(file.path for file in tree)
    except CachedRepoTreeNotFoundError:  # other programs download files without a list of them
        paths = (path for path in folder.rglob("*") if path.is_file())
        return folder, _with_all_shards(path.relative_to(folder).as_posix() for path in paths)


def _with_all_shards(files: Iterable[str]) -> list[str]:
    """Returns file names, and the names of the other shards of their sets.

    For example, 00000-of-00002 implies that 00001-of-00002 exists.
    """
    names = set(files)
    for name in list(names):
        match = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.parquet)", name)
        if match:
            names |= {f"{match[1]}{shard:05d}{match[2]}" for shard in range(int(match[3]))}
    return sorted(names)


def _snapshot(repo: str, revision: str | None, is_offline: bool, files: Iterable[str]) -> Path:
    """Downloads files of a dataset if they are not in the cache, and returns their folder."""
    folder = snapshot_download(
        repo,
        repo_type="dataset",
        revision=revision,
        allow_patterns=[escape(file) for file in files],
        local_files_only=is_offline,
    )
    return Path(folder)


def _reason(repo: str, revision: str | None, error: Exception) -> str:
    text = reason(repo, revision, error, "dataset")
    if isinstance(error, HFValidationError):
        return f"{text}; the form is hf:ORG/NAME@SPLIT"
    explained = (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError)
    return text if isinstance(error, explained) else f"{text}; offline=1 reads what is in the cache"


def _card(readme: Path, uri: str) -> dict[str, Any]:
    """Returns the metadata in a dataset's README."""
    try:
        return (metadata_load(readme) if readme.is_file() else None) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise _bad_card(uri, error) from error


def _bad_card(uri: str, error: Exception) -> UserError:
    return UserError(
        f"source {uri}: the dataset's README.md has no valid configs: {one_line(error)}"
    )


def _config_of(splits: Splits, split: str, files: list[str]) -> str:
    """Returns the name of the config that has these files as its split."""
    configs = [config for (config, name), of in splits.items() if (name, of) == (split, files)]
    return next(filter(None, configs), DEFAULT)


def _declared_splits(card: Mapping[str, Any], files: Iterable[str], uri: str) -> Splits:
    """Returns the splits that a README declares.

    See https://huggingface.co/docs/hub/datasets-manual-configuration.
    """
    splits: Splits = {}
    try:
        for config in card.get("configs", ()):
            name = config.get("config_name", DEFAULT)
            for split, patterns in _split_patterns(config.get("data_files", ())):
                matched = _matching_files(files, config.get("data_dir", ""), patterns)
                if matched:
                    splits[name, split] = matched
                    if name == DEFAULT or config.get("default"):
                        splits["", split] = matched
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad_card(uri, error) from error
    return splits


def _matching_files(files: Iterable[str], folder: str, patterns: Iterable[str]) -> list[str]:
    """Returns the files that match one of the glob patterns, which are relative to `folder`."""
    expressions = [
        re.compile(glob_translate(str(PurePosixPath(folder, pattern)))) for pattern in patterns
    ]
    return [file for file in files if any(expression.fullmatch(file) for expression in expressions)]


def _split_patterns(data_files: Any) -> Iterable[tuple[str, list[str]]]:
    """Yields each split and its patterns, from all forms that `data_files` may have.

    Files without the name of a split are the split train.
    """
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    elif isinstance(data_files, str):
        data_files = [data_files]
    if data_files and all(isinstance(entry, str) for entry in data_files):
        data_files = [{"split": "train", "path": data_files}]
    for entry in data_files:
        paths = entry["path"]
        yield entry["split"], [paths] if isinstance(paths, str) else paths


def _usual_splits(files: Iterable[str]) -> Splits:
    """Returns the splits of parquet files at the Hub's usual paths.

    These are [data/]SPLIT-*, [data/]SPLIT/*, CONFIG/SPLIT-* and CONFIG/SPLIT/*.
    """
    splits: Splits = {}
    for file in files:
        *folders, name = file.removeprefix("data/").split("/")
        match = PARQUET_NAME.fullmatch(name)
        keys = []
        if not folders and match:
            keys = [("", match["split"])]
        elif len(folders) == 1 and name.endswith(".parquet"):
            # The folder may be a split or a config: only the uri's names tell.
            keys = [("", folders[0])]
            if match:
                keys.append((folders[0], match["split"]))
        elif len(folders) == 2 and name.endswith(".parquet"):
            keys = [(folders[0], folders[1])]
        for config, split in keys:
            splits.setdefault(("" if config == DEFAULT else config, split), []).append(file)
    return splits


def _files_of_split(splits: Splits, config: str, split: str, uri: str) -> list[str]:
    """Returns the files of a split.

    The uri must name the config only if several configs have the split and none is the default.
    """
    configs = [name for name, other in splits if other == split]
    key = ("" if config == DEFAULT and DEFAULT not in configs else config, split)
    if key not in splits and not config and len(configs) == 1:
        key = (configs[0], split)
    if key not in splits:
        forms = sorted({f"@{s}?config={c}" if c else f"@{s}" for c, s in splits if c != DEFAULT})
        existing = f"there are {list_names(forms)}" if forms else f"it has no parquet{CONVERT_HINT}"
        of_config = f" of config {config!r}" if config else ""
        raise UserError(f"source {uri}: no split {split!r}{of_config}; {existing}")
    if others := [file for file in splits[key] if not file.endswith(".parquet")]:
        raise UserError(f"source {uri}: {others[0]} is no parquet{CONVERT_HINT}")
    return splits[key]
