"""Records in array_record files, which grain reads in random order: `arrayrecord:PATH`.

A record is the bytes of `encode` below, or a `tf.train.Example` proto. Its first byte tells which.
"""

import functools
import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from pg_ground.data.records import BadRecord, Records, check_usable
from pg_ground.storage.files import copy_file
from pg_ground.storage.paths import FilePath, expand_path, to_path
from pg_ground.types import JsonDict, UserError

EXAMPLE_PROTO = """
name: "example.proto" package: "pg_ground" syntax: "proto3"
message_type {
  name: "Bytes"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "Floats"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT }
}
message_type {
  name: "Ints"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Feature"
  oneof_decl { name: "kind" }
  field {
    name: "bytes" number: 1 type: TYPE_MESSAGE type_name: ".pg_ground.Bytes" oneof_index: 0
  }
  field {
    name: "floats" number: 2 type: TYPE_MESSAGE type_name: ".pg_ground.Floats" oneof_index: 0
  }
  field {
    name: "ints" number: 3 type: TYPE_MESSAGE type_name: ".pg_ground.Ints" oneof_index: 0
  }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".pg_ground.Feature" }
}
message_type {
  name: "Features"
  field {
    name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".pg_ground.Entry"
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".pg_ground.Features" }
}
"""
"""The wire format of `tf.train.Example` (tensorflow/core/example/{example,feature}.proto).

It is repeated here so that no TensorFlow is needed.
"""

EXAMPLE_TAG = b"\n"
"""The first byte of an Example: the tag of its only field.

The msgpack of a dict starts with 0x80 to 0x8f, 0xde or 0xdf.
"""

FILE_NAME = r"\.array_?record(-\d+-of-\d+)?$|-\d+-of-\d+\.array_?record$"
"""The end of an array_record file's name: a single file, and both ways to name a shard."""

ARRAY_TYPE = 1
"""The msgpack extension type of a numpy array: [dtype, shape, bytes in C order]."""

NUMERIC_KINDS = "biuf"
"""The kinds of dtype that `encode` takes: bool, signed and unsigned integers, floats."""


DTYPE_NAME = re.compile(rf"[<>|][{NUMERIC_KINDS}]\d{{1,2}}")
"""The name of such a dtype, such as <f4."""


class ArrayRecords:
    """The records of array_record files, each decoded when it is read."""

    def __init__(
        self,
        source: ArrayRecordDataSource,
        decode: Callable[[bytes], JsonDict],
        root: FilePath | None,
    ):
        self._source = source
        self._decode = decode
        self._root = root

    @property
    def root(self) -> FilePath | None:
        return self._root

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> JsonDict:
        try:
            data = self._source[range(len(self))[index]]
        except RuntimeError as error:  # array_record raises nothing else
            raise BadRecord("corrupt_record", str(error)) from error
        record = self._decode(data)
        check_usable(record)
        return record


def open_array_record(location: str) -> Records:
    """Returns the records of array_record files, file by file in the order of their names.

    Args:
      location: a file, a folder with array_record files, a glob, or a sharded name.
        `train.array_record@8` is `train.array_record-00000-of-00008` and so on. `@*` stands for
        any number of shards. File names in the records are relative to the first file's folder.

    Raises:
      UserError: a file or a shard is missing, a file is no array_record file, or there are no
        records.
    """
    uri = f"arrayrecord:{location}"
    try:
        files = _find_files(expand_path(location))
    except (OSError, ImportError) as error:
        raise UserError(f"source {uri}: {error}") from error
    counts = count_records(files, f"source {uri}")
    if not sum(counts):
        names = f"{files[0]} and the other files have" if files[1:] else f"{files[0]} has"
        raise UserError(f"source {uri}: {names} no records")
    spans = [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
    return ArrayRecords(
        ArrayRecordDataSource(spans), decode_any, to_path(files[0], f"source {uri}").parent
    )


def write_array_record(path: str | os.PathLike[str], records: Iterable[JsonDict]) -> int:
    """Writes records to `path`, and returns their number.

    Until the last record is written, the file has the name `path`.partial. A file of a bucket is
    written on this machine first.

    Raises:
      TypeError: a record holds a value that `encode` does not take.
      UserError: the file cannot be written.
    """
    target = to_path(path, "write_array_record")
    if not isinstance(target, Path):
        with tempfile.TemporaryDirectory() as folder:
            count = write_array_record(Path(folder) / target.name, records)
            copy_file(Path(folder) / target.name, target)
        return count
    partial = target.with_name(target.name + ".partial")
    writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")  # grain reads single records
    if not writer.ok():
        raise UserError(
            f"{path} cannot be written: check that {target.parent} is a folder and writable"
        )
    count = 0
    try:
        for record in records:
            writer.write(encode(record))
            count += 1
        writer.close()
    except BaseException:
        partial.unlink()
        raise
    partial.replace(target)
    return count


def encode(record: JsonDict) -> bytes:
    """Returns a record as bytes that `decode` reads.

    A record is made of dicts, lists, None, numbers, texts, bytes and numeric numpy arrays.

    Raises:
      TypeError: the record holds something else. A tuple, for example, would come back as a list.
    """
    # JSON may hold half a surrogate pair, which strict UTF-8 cannot encode.
    data: Any = msgpack.packb(
        record, default=_pack_array, strict_types=True, unicode_errors="surrogatepass"
    )
    return data


def decode(data: bytes) -> JsonDict:
    """Returns the record that `encode` turned into `data`.

    Its arrays share the memory of `data` and are read-only.

    Raises:
      BadRecord: bad_record, if `encode` does not return such bytes.
    """
    try:
        record = msgpack.unpackb(
            data, ext_hook=_unpack_array, strict_map_key=False, unicode_errors="surrogatepass"
        )
    except (ValueError, TypeError) as error:
        raise BadRecord(
            "bad_record", f"{data[:20]!r}… is no msgpack of a record: {error}"
        ) from error
    if not isinstance(record, dict):
        raise BadRecord(
            "bad_record", f"{data[:20]!r}… is the msgpack of {record!r:.60}, not of a dict"
        )
    return record


def decode_any(data: bytes) -> JsonDict:
    """Returns the record of a `tf.train.Example`, or of the bytes of `encode`.

    Raises:
      BadRecord: bad_record, if `data` is neither.
    """
    return decode_example(data) if data.startswith(EXAMPLE_TAG) else decode(data)


def decode_example(data: bytes) -> JsonDict:
    """Returns the features of a `tf.train.Example` by their own names, such as `objects/bbox`.

    A feature with one value is that value; other features are lists. Bytes that are text become
    str. An Example does not say which lists are lists of lists; `tfds:` takes that from the
    dataset's description.

    Raises:
      BadRecord: bad_record, if `data` is no Example.
    """
    try:
        example = _example_class().FromString(data)
    except DecodeError as error:
        raise BadRecord("bad_record", f"{data[:20]!r}… is no tf.train.Example: {error}") from error
    return {entry.key: _feature_value(entry.value) for entry in example.features.feature}


def text_or_bytes(value: bytes) -> str | bytes:
    """Returns `value` as text if it is UTF-8 without NUL. No encoded image is."""
    try:
        return value if b"\0" in value else value.decode()
    except UnicodeDecodeError:
        return value


def count_records(files: Sequence[str], source: str) -> list[int]:
    """Returns the number of records of each file. The files are read side by side.

    Args:
      files: names of array_record files.
      source: the beginning of the error's text.

    Raises:
      UserError: a file is missing, or is not a whole array_record file.
    """

    def count(file: str) -> int:
        reader = ArrayRecordReader(file)
        if not reader.ok():
            try:
                reader.read([0])  # raises the reason
            except RuntimeError as error:
                raise UserError(
                    f"{source}: {file} is no array_record file, or not all of one: {error}"
                ) from error
        return reader.num_records()

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(count, files))


def _find_files(name: str) -> list[str]:
    """Returns the names of the files that `name` stands for, in order."""
    sharded = re.fullmatch(r"(.+)@([1-9]\d{0,4}|\*)(\.\w+)?", name)
    if sharded:
        return _shard_names(name, *sharded.groups(default=""))
    path = to_path(name, f"source arrayrecord:{name}")
    if path.is_dir():
        if (path / "dataset_info.json").exists():
            raise UserError(
                f"source arrayrecord:{name}: this is a dataset of tfds, with all splits together; "
                f"tfds:NAME?split=SPLIT&data_dir=DIR reads one split"
            )
        files = _glob(f"{glob.escape(name.rstrip('/'))}/*")
        files = [file for file in files if re.search(FILE_NAME, file)]
    elif glob.has_magic(name) and not path.exists():
        files = _glob(name)
    else:
        files = [name]
    if not files:
        raise UserError(
            f"source arrayrecord:{name}: no file matches; "
            f"the files in a folder must be called NAME.array_record"
        )
    return files


def _shard_names(name: str, stem: str, count: str, suffix: str) -> list[str]:
    """Returns the names of all shards of a set."""
    if count == "*":
        files = _glob(f"{glob.escape(stem)}-[0-9]*-of-[0-9]*{suffix}")
        counts = {file.removesuffix(suffix).rpartition("-of-")[2] for file in files}
        if len(counts) != 1:
            raise UserError(
                f"source arrayrecord:{name}: it must match the files of one set of shards, "
                f"but it matches files of {len(counts)} sets"
            )
        count = counts.pop()
    return [f"{stem}-{shard:05d}-of-{int(count):05d}{suffix}" for shard in range(int(count))]


def _glob(pattern: str) -> list[str]:
    """Returns the names of the files that match `pattern`, sorted."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = to_path(
        "/".join(parts[:fixed]) + "/" if fixed else ".", f"source arrayrecord:{pattern}"
    )
    files = folder.glob("/".join(parts[fixed:]))
    return sorted(os.fspath(file) for file in files if file.is_file())


def _pack_array(value: object) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in NUMERIC_KINDS:
        raise TypeError(f"a record cannot hold {type(value).__name__} {value!r:.60}")
    packed = msgpack.packb([value.dtype.str, value.shape, value.tobytes()])
    return msgpack.ExtType(ARRAY_TYPE, packed)


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY_TYPE:
        raise ValueError(f"extension type {code} is unknown")
    dtype, shape, values = msgpack.unpackb(data)
    # numpy would parse any text, also as a dtype that no array of a record has.
    if not isinstance(dtype, str) or not DTYPE_NAME.fullmatch(dtype):
        raise ValueError(f"{dtype!r:.30} is no dtype of numbers")
    return np.frombuffer(values, dtype).reshape(shape)


@functools.cache
def _example_class() -> Any:
    """Returns the class of the messages that `EXAMPLE_PROTO` describes."""
    file = text_format.Parse(EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto())
    # A separate pool does not clash with the protos of TensorFlow, if that is loaded.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pg_ground.Example"))


def _feature_value(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    values = [text_or_bytes(value) for value in values] if kind == "bytes" else values
    return values[0] if len(values) == 1 else values
