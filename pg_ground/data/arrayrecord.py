"""Records in array_record files, which grain reads at random: `arrayrecord:PATH`.

A file holds records of our own form, `encode` and `decode` below, or `tf.train.Example` protos. The first byte tells them apart.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from pg_ground.data.records import BadRecord, Records, to_path
from pg_ground.types import FilePath, UserError, expand_path

EXAMPLE_PROTO = """
name: "example.proto" package: "pg_ground" syntax: "proto3"
message_type { name: "Bytes" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Floats" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Ints" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes" number: 1 type: TYPE_MESSAGE type_name: ".pg_ground.Bytes" oneof_index: 0 }
  field { name: "floats" number: 2 type: TYPE_MESSAGE type_name: ".pg_ground.Floats" oneof_index: 0 }
  field { name: "ints" number: 3 type: TYPE_MESSAGE type_name: ".pg_ground.Ints" oneof_index: 0 }
}
message_type {
  name: "Entry" field { name: "key" number: 1 type: TYPE_STRING }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".pg_ground.Feature" }
}
message_type {
  name: "Features" field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".pg_ground.Entry" }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: ".pg_ground.Features" } }
"""
"""`tf.train.Example` as it is on the wire (tensorflow/core/example/{example,feature}.proto), so that no TensorFlow is needed."""

EXAMPLE_STARTS = b"\n"
"""The tag of an Example's only field. A msgpack of a dict starts with 0x80 to 0x8f, 0xde or 0xdf."""

FILE_NAME = r"\.array_?record(-\d+-of-\d+)?$|-\d+-of-\d+\.array_?record$"
"""What a folder's array_record files are called: one by itself, and both ways to name a shard."""

ARRAY = 1
"""msgpack extension type of a numpy array: [dtype, shape, bytes in C order]."""

PLAIN_NUMBERS = "biuf"
"""Kinds of dtype that `encode` takes: bool, signed and unsigned integers, floats."""


class ArrayRecords:
    """The records of array_record files, each decoded when it is read."""

    def __init__(
        self,
        source: ArrayRecordDataSource,
        decode: Callable[[bytes], dict[str, Any]],
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            data = self._source[range(len(self))[index]]
        except RuntimeError as e:  # all that array_record raises
            raise BadRecord("corrupt_record", str(e)) from e
        return self._decode(data)


def open_array_record(rest: str) -> Records:
    """Returns the records of a file, of all array_record files in a folder, of a glob, or of a sharded name, by file name.

    `train.array_record@8` is the shards `train.array_record-00000-of-00008` and so on, `@*` however many there are. File
    names are relative to the folder of the first.

    Raises:
      UserError: there is no such file, or one is no array_record file, or they hold no records, or a shard is missing.
    """
    try:
        files = _files(expand_path(rest))
    except (OSError, ImportError) as e:
        raise UserError(f"source arrayrecord:{rest}: {e}") from e
    counts = count_records(files, f"source arrayrecord:{rest}")
    if not sum(counts):
        raise UserError(
            f"source arrayrecord:{rest}: {files[0]}{' and the rest hold' if files[1:] else ' holds'} no records"
        )
    spans = [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
    return ArrayRecords(ArrayRecordDataSource(spans), decode_either, to_path(files[0]).parent)


def write_array_record(path: str | os.PathLike[str], records: Iterable[dict[str, Any]]) -> int:
    """Returns the number of records written to `path`. Until the last one is, the file is called `path`.partial.

    Raises:
      TypeError: a record holds what `encode` does not take.
      UserError: the file cannot be written.
    """
    target = to_path(os.fspath(path))
    partial = target.with_name(target.name + ".partial")
    writer = ArrayRecordWriter(
        os.fspath(partial), "group_size:1"
    )  # grain reads one record at a time
    if not writer.ok():
        raise UserError(
            f"{path} cannot be written: is {target.parent} a folder, and may one write there?"
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


def encode(record: dict[str, Any]) -> bytes:
    """Returns nested dicts and lists of None, numbers, text, bytes and numeric numpy arrays as bytes that `decode` reads.

    Raises:
      TypeError: there is something else in it, such as a tuple, which would not come back as one.
    """
    # JSON may hold half a surrogate pair, which strict UTF-8 has no bytes for
    data: Any = msgpack.packb(
        record, default=_pack_array, strict_types=True, unicode_errors="surrogatepass"
    )
    return data


def decode(data: bytes) -> dict[str, Any]:
    """Returns the record that `encode` was given. Arrays share the memory of `data` and are read-only.

    Raises:
      BadRecord: bad_record if `data` is nothing that `encode` returns.
    """
    try:
        record = msgpack.unpackb(
            data, ext_hook=_unpack_array, strict_map_key=False, unicode_errors="surrogatepass"
        )
    except (ValueError, TypeError) as e:
        raise BadRecord("bad_record", f"{data[:20]!r}… is no msgpack of a record: {e}") from e
    if not isinstance(record, dict):
        raise BadRecord(
            "bad_record", f"{data[:20]!r}… is the msgpack of {record!r:.60}, not of a dict"
        )
    return record


def decode_either(data: bytes) -> dict[str, Any]:
    """Returns the record of a `tf.train.Example` or of `encode`'s bytes.

    Raises:
      BadRecord: bad_record if `data` is neither.
    """
    return decode_example(data) if data.startswith(EXAMPLE_STARTS) else decode(data)


def decode_example(data: bytes) -> dict[str, Any]:
    """Returns the features of a `tf.train.Example` under their own names (`objects/bbox`): one value as itself, others as a list.

    Bytes that are text come as str. An Example does not say which lists are lists of lists; `tfds:` reads that from the dataset.

    Raises:
      BadRecord: bad_record if `data` is no Example.
    """
    try:
        example = _example_class().FromString(data)
    except DecodeError as e:
        raise BadRecord("bad_record", f"{data[:20]!r}… is no tf.train.Example: {e}") from e
    return {entry.key: _feature(entry.value) for entry in example.features.feature}


def text_or_bytes(value: bytes) -> str | bytes:
    """Returns `value` as text if it is UTF-8 without NUL, as every text is and no encoded image."""
    try:
        return value if b"\0" in value else value.decode()
    except UnicodeDecodeError:
        return value


def count_records(files: Sequence[str], source: str) -> list[int]:
    """Returns the number of records in each of the array_record `files`, looked up side by side.

    Raises:
      UserError: one is missing or no whole array_record file; its text begins with `source`.
    """

    def count(file: str) -> int:
        reader = ArrayRecordReader(file)
        if not reader.ok():
            try:
                reader.read([0])  # says why
            except RuntimeError as e:
                raise UserError(
                    f"{source}: {file} is no array_record file, or not all of one: {e}"
                ) from e
        return reader.num_records()

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(count, files))


def _files(path: str) -> list[str]:
    """Returns the names of the files that `path` stands for, in order."""
    sharded = re.fullmatch(r"(.+)@([1-9]\d{0,4}|\*)(\.\w+)?", path)
    if sharded:
        return _shards(path, *sharded.groups(default=""))
    place = to_path(path)
    if place.is_dir():
        if (place / "dataset_info.json").exists():
            raise UserError(
                f"source arrayrecord:{path}: a dataset of tfds, all splits together: tfds:NAME?split=SPLIT&data_dir=DIR reads one"
            )
        found = [
            file
            for file in _matching(f"{glob.escape(path.rstrip('/'))}/*")
            if re.search(FILE_NAME, file)
        ]
    elif glob.has_magic(path) and not place.exists():
        found = _matching(path)
    else:
        found = [path]
    if not found:
        raise UserError(
            f"source arrayrecord:{path}: no file fits; a folder's files are called NAME.array_record"
        )
    return found


def _shards(path: str, stem: str, count: str, suffix: str) -> list[str]:
    """Returns the names of all shards of a set."""
    if count == "*":
        found = _matching(f"{glob.escape(stem)}-[0-9]*-of-[0-9]*{suffix}")
        counts = {name.removesuffix(suffix).rpartition("-of-")[2] for name in found}
        if len(counts) != 1:
            raise UserError(
                f"source arrayrecord:{path}: files of {len(counts)} sets fit, where those of one are wanted"
            )
        count = counts.pop()
    return [f"{stem}-{shard:05d}-of-{int(count):05d}{suffix}" for shard in range(int(count))]


def _matching(pattern: str) -> list[str]:
    """Returns the names of the files that fit `pattern`, sorted."""
    names = pattern.split("/")
    fixed = next(i for i, name in enumerate(names) if glob.has_magic(name))
    folder = to_path("/".join(names[:fixed]) + "/" if fixed else ".")
    return sorted(
        os.fspath(file) for file in folder.glob("/".join(names[fixed:])) if file.is_file()
    )


def _pack_array(value: object) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in PLAIN_NUMBERS:
        raise TypeError(f"a record cannot hold {type(value).__name__} {value!r:.60}")
    return msgpack.ExtType(ARRAY, msgpack.packb([value.dtype.str, value.shape, value.tobytes()]))


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ValueError(f"extension type {code} is unknown")
    dtype, shape, values = msgpack.unpackb(data)
    return np.frombuffer(values, dtype).reshape(shape)


@functools.cache
def _example_class() -> Any:
    """Returns the class of messages that `EXAMPLE_PROTO` describes."""
    file = text_format.Parse(EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto())
    pool = (
        descriptor_pool.DescriptorPool()
    )  # of its own: TensorFlow's, where it is loaded, stays out of the way
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pg_ground.Example"))


def _feature(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = list(getattr(feature, kind).value) if kind else []
    values = [text_or_bytes(value) for value in values] if kind == "bytes" else values
    return values[0] if len(values) == 1 else values
