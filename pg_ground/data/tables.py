"""Records in files: lines of JSON, lists in JSON, parquet, COCO's instances, and lists of JSON files in YAML."""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Int

from pg_ground.config import nearest
from pg_ground.data.records import BadRecord, Records, to_path
from pg_ground.data.sampling import sample_indices
from pg_ground.types import FilePath, UserError, expand_path

CANNOT_OPEN = (OSError, ImportError)
"""What opening a path raises; ImportError is etils' word that the client of a remote file system is not installed."""

CANNOT_PARSE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on a file that is no parquet, is cut off, or has other bytes than its footer says."""

HELD_BYTES = 2**26
"""Lines of JSON up to which a file is held in memory: some 200,000 questions."""

KEPT_BYTES = 2**28
"""Row groups of one source that are kept decoded. A photograph takes some 100 KB, so that this is a few groups of 100 to 1000."""

TARGET_NAMES = ("image", "category", "list")


class JsonLines:
    """The lines of a file, each one JSON object; blank lines do not count. A long file is read again for each of them."""

    def __init__(self, path: FilePath, uri: str):
        try:
            with path.open("rb") as file:
                self._spans = _line_spans(file)
                file.seek(0)
                self._held = (
                    file.read() if self._spans and sum(self._spans[-1]) <= HELD_BYTES else b""
                )
        except CANNOT_OPEN as e:
            raise _unopened(uri, e) from e
        if not self._spans:
            raise UserError(
                f"source {uri}: the file has no lines; each record is one JSON object on a line"
            )
        self._path = path
        if self._line(0).lstrip().startswith(b"[") and self._line(-1).rstrip().endswith(b"]"):
            raise UserError(
                f"source {uri}: the file begins with [ and ends with ], as a JSON list does: use json:{path}"
            )

    @property
    def root(self) -> Any:
        return self._path.parent

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, _ = self._spans[index]
        try:
            record = json.loads(self._line(index))
        except (ValueError, RecursionError) as e:
            raise BadRecord("bad_json", f"byte {start} of {self._path.name}: {e}") from e
        if not isinstance(record, dict):
            raise BadRecord(
                "bad_json",
                f"byte {start} of {self._path.name}: {record!r:.60} is not a JSON object",
            )
        return record

    def _line(self, index: int) -> bytes:
        start, length = self._spans[index]
        if self._held:
            return self._held[start : start + length]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(length)


@dataclass(frozen=True)
class Listed:
    """Records that are in memory as they came out of one JSON file, `name`."""

    entries: Sequence[Any]
    name: str
    root: Any

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.entries[index]
        if not isinstance(record, dict):
            raise BadRecord(
                "bad_json", f"entry {index} of {self.name}: {record!r:.60} is not a JSON object"
            )
        return record


class Parquet:
    """The rows of parquet files, one file after the other, as plain Python: dicts, lists, bytes.

    Parquet has no single rows to read: the row group around a row is decoded and kept until others need its room. Rows in order
    cost their own bytes, then, and rows in a random order a group each. Nothing is held open, and a copy starts with none kept.
    """

    def __init__(
        self, paths: Sequence[FilePath], footers: Sequence[pq.FileMetaData], root: FilePath
    ):
        self.root: Any = root
        self._paths, self._footers = paths, footers
        self._groups = [
            (file, group)
            for file, footer in enumerate(footers)
            for group in range(footer.num_row_groups)
        ]
        groups = [footers[file].row_group(group) for file, group in self._groups]
        self._starts = np.cumsum([0] + [group.num_rows for group in groups])
        self._bytes = [group.total_byte_size for group in groups]
        self._kept: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Parquet, (self._paths, self._footers, self.root)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        try:
            return self._row_group(group).slice(row - int(self._starts[group]), 1).to_pylist()[0]
        except CANNOT_PARSE as e:
            file, number = self._groups[group]
            raise BadRecord(
                "bad_parquet", f"row group {number} of {self._paths[file].name}: {one_line(e)}"
            ) from e

    def _row_group(self, group: int) -> pa.Table:
        """Returns a row group; several threads that ask for the same one wait for one reading of it."""
        with self._lock:
            table = self._kept.pop(group, None)
            first = table is None
            table = table or Future()
            self._kept[group] = table  # the last is the one used last
            while (
                first
                and len(self._kept) > 1
                and sum(self._bytes[g] for g in self._kept) > KEPT_BYTES
            ):
                self._kept.popitem(last=False)
        if first:
            try:
                table.set_result(self._read(group))
            except BaseException as e:
                table.set_exception(e)
                with self._lock:
                    self._kept.pop(group, None)
        return table.result()

    def _read(self, group: int) -> pa.Table:
        file, number = self._groups[group]
        # A handle of its own for each reading: those of pyarrow are not safe to share between threads.
        with self._paths[file].open("rb") as handle:
            return pq.ParquetFile(
                handle, metadata=self._footers[file], pre_buffer=True
            ).read_row_group(number)


@dataclass(frozen=True)
class Joined:
    """Records picked from several sources: the i-th is record `index[i]` of source `source[i]`."""

    sources: Sequence[Records]
    source: Int[np.ndarray, " N"]
    index: Int[np.ndarray, " N"]
    root: Any

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sources[self.source[index]][int(self.index[index])]


def open_json_lines(rest: str) -> Records:
    """Returns the objects on the lines of a file.

    Raises:
      UserError: there is no such file, or it has no lines.
    """
    return JsonLines(to_path(rest), f"jsonl:{rest}")


def open_json(rest: str) -> Records:
    """Returns the objects of the JSON list in a file, or of the one at a dotted key there: `PATH#results.val`.

    Raises:
      UserError: there is no such file or key, or what is there is no JSON, or no list of objects.
    """
    uri = f"json:{rest}"
    path, key = _path_and_key(rest, uri)
    value = _load_json(path, uri)
    for part in key.split(".") if key else ():
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"source {uri}: no {part!r} in {_kind(value)}")
        value = value[part]
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        raise UserError(
            f"source {uri}: {_kind(value)}, where a list of objects is read, or one at a key (json:PATH#key)"
        )
    return Listed(value, path.name, path.parent)


def open_parquet(rest: str) -> Records:
    """Returns the rows of a parquet file, of all `*.parquet` in a folder, or of all files that a pattern fits, sorted by name.

    Raises:
      UserError: there is no such file, one of them is no parquet or has other columns than the rest, or there are no rows.
    """
    uri = f"parquet:{rest}"
    path = to_path(rest)
    fixed = next((i for i, part in enumerate(path.parts) if set(part) & set("*?[")), None)
    try:
        if path.is_dir():
            root, shards = path, path.glob("*.parquet")
        elif fixed is None or path.exists():
            root, shards = path.parent, [path]
        else:
            root = type(path)(*path.parts[:fixed])
            shards = root.glob("/".join(path.parts[fixed:]))
        paths = sorted(shards)
    except CANNOT_OPEN as e:
        raise _unopened(uri, e) from e
    if not paths:
        raise UserError(
            f"source {uri}: no files there; parquet:PATH is a file, a folder with *.parquet, or a pattern"
        )
    return parquet_of(paths, root, uri)


def parquet_of(paths: Sequence[FilePath], root: FilePath, uri: str) -> Parquet:
    """Returns the rows of parquet files; only their footers are read now.

    Args:
      uri: what errors call the source.

    Raises:
      UserError: one of the files is missing, no parquet, or has other columns than the first, or there are no rows.
    """

    def footer(path: FilePath) -> pq.FileMetaData:
        try:
            with path.open("rb") as file:
                return pq.read_metadata(file)
        except (FileNotFoundError, IsADirectoryError, ImportError) as e:
            raise _unopened(uri, e) from e
        except CANNOT_PARSE as e:
            raise UserError(
                f"source {uri}: {path.name} is no whole parquet file: {one_line(e)}"
            ) from e

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(footer, paths))
    columns = set(footers[0].schema.to_arrow_schema().names)
    for path, other in zip(paths, footers, strict=True):
        if odd := sorted(columns ^ set(other.schema.to_arrow_schema().names)):
            raise UserError(
                f"source {uri}: only one of {paths[0].name} and {path.name} has {', '.join(odd)}; all files need it"
            )
    rows = Parquet(paths, footers, root)
    if not len(rows):
        raise UserError(
            f"source {uri}: there are no rows in {listed([path.name for path in paths])}"
        )
    return rows


def open_yaml(rest: str) -> Records:
    """Returns the records that a list of JSON files names, each file sampled, one after the other: `FILE?seed=0`.

    EasyDistill's form, `datasets: [{json_path: a.json, sampling_strategy: "random:50%"}]`; what the strategies are, `sampling.py`
    says, and without one all are kept. File names, those in the records too, are relative to the YAML file.

    Raises:
      UserError: a file cannot be opened, is of another form, or names a strategy that does not exist; or no record is left.
    """
    name, options = with_options("yaml", rest, ("seed",))
    uri, path, seed = f"yaml:{rest}", to_path(name), options.get("seed", "0")
    if not seed.isdecimal():
        raise UserError(f"source {uri}: seed={seed} is no whole number from 0")
    sources, kept = [], []
    for position, entry in enumerate(_datasets(path, uri)):
        try:
            opened = _open_listed(entry["json_path"], path.parent)
            kept.append(
                sample_indices(len(opened), entry["sampling_strategy"], int(seed) + position)
            )
        except UserError as e:
            raise UserError(f"source {uri}: dataset {position}: {e}") from e
        sources.append(opened)
    if not sum(map(len, kept)):
        raise UserError(f"source {uri}: its sampling strategies leave no record")
    return Joined(
        sources,
        np.repeat(np.arange(len(kept)), [len(k) for k in kept]),
        np.concatenate(kept),
        path.parent,
    )


def open_coco(rest: str) -> Records:
    """Returns the objects of COCO's instances as records: `FILE?ask=image&images=DIR&crowd=0`.

    `ask=image`: one record for each image, with `image` (its file name), `width`, `height`, and of each object `categories`,
    `boxes` (x, y, w, h in pixels) and `iscrowd`. `ask=category`: one for each category that an image has objects of, with
    `category` instead of `categories`. `ask=list`: as `image`, and `classes`, the different categories in the order they come,
    "cat ; dog". An image without objects stays. Regions that stand for a crowd of objects are left out unless `crowd=1`.
    `images` is the folder of the images, without it that of FILE.

    Raises:
      UserError: there is no such file or option, the file is no JSON or not of COCO's form, or there are no records in it.
    """
    name, options = with_options("coco", rest, ("ask", "images", "crowd"))
    uri, path, ask, crowd = (
        f"coco:{rest}",
        to_path(name),
        options.get("ask", "image"),
        options.get("crowd", "0"),
    )
    if ask not in TARGET_NAMES or crowd not in ("0", "1"):
        raise UserError(f"source {uri}: ask is one of {', '.join(TARGET_NAMES)}, crowd is 0 or 1")
    images = _coco_images(_load_json(path, uri), crowd == "1", uri)
    if ask == "category":
        images = [part for image in images for part in _by_category(image)]
    elif ask == "list":
        images = [
            image | {"classes": " ; ".join(dict.fromkeys(image["categories"]))} for image in images
        ]
    if not images:
        raise UserError(
            f"source {uri}: there are no {'objects' if ask == 'category' else 'images'} in it"
        )
    return Listed(
        images, path.name, to_path(options["images"]) if "images" in options else path.parent
    )


def with_options(scheme: str, rest: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """Returns what stands before `?`, and the options `a=1&b=2` after it, as they are written (+ and % are themselves).

    Raises:
      UserError: an option is not among `known`, or has no value.
    """
    name, _, text = rest.partition("?")
    options = {}
    for option in text.split("&") if text else ():
        key, _, value = option.partition("=")
        if key not in known or not value:
            wrong = (
                f"no option {key!r}; {nearest(key, known)}"
                if key not in known
                else f"option {key} has no value"
            )
            raise UserError(f"source {scheme}:{rest}: {wrong}")
        options[key] = value
    return name, options


def _line_spans(file: Iterable[bytes]) -> list[tuple[int, int]]:
    """Returns (offset, length) in bytes of every line that is not blank."""
    spans = []
    start = 0
    for line in file:
        if not line.isspace():
            spans.append((start, len(line)))
        start += len(line)
    return spans


def _path_and_key(rest: str, uri: str) -> tuple[FilePath, str]:
    """Returns a path and what follows `#`, or nothing where the file has `#` in its name."""
    try:
        whole = "#" not in rest or to_path(rest).is_file()
    except CANNOT_OPEN as e:
        raise _unopened(uri, e) from e
    name, _, key = (rest, "", "") if whole else rest.rpartition("#")
    return to_path(name), key


def _load_json(path: FilePath, uri: str) -> Any:
    try:
        with path.open("rb") as file:
            return json.load(file)
    except CANNOT_OPEN as e:
        raise _unopened(uri, e) from e
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"source {uri}: not one JSON value: {e} (lines of JSON are jsonl:PATH)"
        ) from e


def _datasets(path: FilePath, uri: str) -> list[dict[str, str]]:
    """Returns the entries of `datasets`, each with a `json_path` and a `sampling_strategy`."""
    try:
        with path.open("rb") as file:
            value = yaml.safe_load(file)
    except CANNOT_OPEN as e:
        raise _unopened(uri, e) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"source {uri}: not YAML: {one_line(e)}") from e
    form = 'datasets: [{json_path: a.json, sampling_strategy: "random:50%"}]'
    datasets = (
        value.get("datasets") if isinstance(value, dict) and set(value) == {"datasets"} else None
    )
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"source {uri}: {_kind(value)}, where the form is {form}")
    for position, entry in enumerate(datasets):
        fields = {"sampling_strategy": "all"} | entry if isinstance(entry, dict) else {}
        if set(fields) != {"json_path", "sampling_strategy"} or not all(
            isinstance(value, str) for value in fields.values()
        ):
            raise UserError(
                f"source {uri}: dataset {position} is {entry!s:.120}, where the form is {form}"
            )
        datasets[position] = fields
    return datasets


def _open_listed(name: str, folder: FilePath) -> Records:
    full = name if "://" in name else str(folder / expand_path(name))
    return open_json_lines(full) if full.endswith(".jsonl") else open_json(full)


def _coco_images(value: Any, with_crowd: bool, uri: str) -> list[dict[str, Any]]:
    """Returns one record for each image of COCO's instances."""
    parts = ("images", "annotations", "categories")
    if not isinstance(value, dict) or not all(isinstance(value.get(part), list) for part in parts):
        raise UserError(
            f"source {uri}: {_kind(value)}, where COCO's instances have the lists {', '.join(parts)}"
        )
    part, entry = "", None
    try:
        names, records = {}, {}
        part = "categories"
        for entry in value[part]:
            names[entry["id"]] = entry["name"]
        part = "images"
        for entry in value[part]:
            size = {"width": entry["width"], "height": entry["height"]}
            records[entry["id"]] = {
                "image": entry["file_name"],
                **size,
                "categories": [],
                "boxes": [],
                "iscrowd": [],
            }
        part = "annotations"
        for entry in value[part]:
            record, name, box = (
                records[entry["image_id"]],
                names[entry["category_id"]],
                entry["bbox"],
            )
            crowd = entry.get("iscrowd", 0)  # not every file of this form has it
            if with_crowd or not crowd:
                record["categories"].append(name)
                record["boxes"].append(box)
                record["iscrowd"].append(crowd)
    except (KeyError, TypeError) as e:
        which = (
            f"with id {entry['id']}"
            if isinstance(entry, dict) and "id" in entry
            else f"{entry!s:.60}"
        )
        lack = (
            f"has no {e}, or it is in no other list"
            if isinstance(e, KeyError)
            else "is not of COCO's form"
        )
        raise UserError(f"source {uri}: the entry {which} of {part} {lack}") from e
    return list(records.values())


def _by_category(image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns an image's record in parts, one for each of its categories."""
    whole = {key: image[key] for key in ("image", "width", "height")}
    parts = {
        name: {**whole, "category": name, "boxes": [], "iscrowd": []}
        for name in image["categories"]
    }
    for name, box, crowd in zip(image["categories"], image["boxes"], image["iscrowd"], strict=True):
        parts[name]["boxes"].append(box)
        parts[name]["iscrowd"].append(crowd)
    return list(parts.values())


def _unopened(uri: str, e: OSError | ImportError) -> UserError:
    reason = e.strerror if isinstance(e, OSError) and e.strerror else one_line(e)
    return UserError(f"source {uri}: {reason}")


def one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def _kind(value: object) -> str:
    """Returns what a value read from JSON or YAML is, in a few words."""
    if isinstance(value, dict):
        return (
            f"an object with the keys {listed(list(map(str, value)))}"
            if value
            else "an empty object"
        )
    if isinstance(value, list):
        return f"a list of {len(value)} that are not all objects" if value else "an empty list"
    return f"{value!r:.60}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
