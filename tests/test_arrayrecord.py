import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from pg_ground.data.arrayrecord import (
    decode,
    decode_example,
    encode,
    open_array_record,
    text_or_bytes,
    write_array_record,
)
from pg_ground.data.records import BadRecord
from pg_ground.types import UserError

RECORD = {
    "image": b"\xff\xd8\xff\xe0\x00",
    "pixels": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "text": "a cat’s “bed”\n\0",
    "half": "\ud83d",
    "numbers": [0, -1, 2**63, -(2**63), 0.1, 1e300, float("inf"), True, False, None],
    "objects": [{"box": [1.5, 2.0], "refs": [{"raw": "é"}, {}]}, {}],
    "empty": ["", b"", [], {}],
    "by id": {3: "three"},
}


def varint(number: int) -> bytes:
    """Returns protobuf's varint of a signed 64-bit integer."""
    number %= 2**64
    out = bytearray()
    while number > 127:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


def field(number: int, payload: bytes) -> bytes:
    """Returns a length-delimited protobuf field."""
    return varint(number * 8 + 2) + varint(len(payload)) + payload


def example(**features: list) -> bytes:
    """Returns a tf.train.Example, written by hand after tensorflow/core/example/feature.proto."""
    entries = b""
    for name, values in features.items():
        if not values:
            feature = b""
        elif isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif isinstance(values[0], float):
            feature = field(2, field(1, np.array(values, "<f4").tobytes()))
        else:
            feature = field(3, field(1, b"".join(varint(value) for value in values)))
        entries += field(1, field(1, name.replace("__", "/").encode()) + field(2, feature))
    return field(1, entries)


def write_raw(path: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def number(i: int) -> dict:
    return {"n": i}


def numbers(location: str) -> list[int]:
    records = open_array_record(location)
    return [records[i]["n"] for i in range(len(records))]


def assert_same(actual: object, expected: object) -> None:
    """Fails unless both are equal, with equal types at every level."""
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_same(actual[name], expected[name])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    else:
        assert actual == expected


def anything(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return rng.choice(
            [None, True, False, rng.getrandbits(64), -rng.getrandbits(63), rng.uniform(-9, 9)]
        )
    if kind in (1, 2):
        return "".join(
            chr(rng.choice([65, 233, 0x4E00, 0x1F600, 0])) for _ in range(rng.randrange(40))
        )
    if kind == 3:
        return rng.randbytes(rng.randrange(300))
    if kind in (4, 5):
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        return np.frombuffer(rng.randbytes(8 * int(np.prod(shape))), np.uint8)[
            : int(np.prod(shape))
        ].reshape(shape)
    if kind == 6:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.random()): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_decode_undoes_encode():
    assert_same(decode(encode(RECORD)), RECORD)
    rng = random.Random(0)
    for _ in range(300):
        record = {"it": anything(rng)}
        assert_same(decode(encode(record)), record)


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "<u4", ">i8", "f2", "f4", "f8"])
def test_arrays_of_any_number_come_back(dtype):
    for shape in ((), (0,), (3, 0, 2), (2, 3)):
        array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        assert_same(decode(encode({"a": array})), {"a": array})
    turned = (
        np.arange(6, dtype=dtype).reshape(2, 3).T[:, ::-1]
        if dtype != "?"
        else np.array([[True, False]]).T
    )
    assert_same(decode(encode({"a": turned})), {"a": turned})


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        {1},
        np.float32(1),
        np.float64(1),
        np.array(["a"]),
        np.array([None]),
        1j,
        Path("a"),
        object,
    ],
)
def test_a_value_that_would_come_back_as_another_type_is_refused(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        encode({"a": [value]})


def test_bytes_that_are_no_record_are_a_bad_record():
    whole = encode(RECORD)
    noise = [
        b"",
        b"[1, 2]",
        b'{"a": 1}',
        b"\xc1",
        whole + b"\0",
        encode({})[:0],
        b"\x93\1\2\3",
        b"\x81\xa1a\xc7\x01\x02x",
        b"\xff" * 9,
    ]
    noise += [whole[:end] for end in range(0, len(whole), 7)] + [
        b"\x81\xa1a\xc7\x03\x01\x93\xa1O\x90",
        b"\x81\xa1a\xc4\xff",
    ]
    for data in noise:
        with pytest.raises(BadRecord) as bad:
            decode(data)
        assert bad.value.kind == "bad_record" and len(str(bad.value)) < 300


def test_written_records_are_read_back(tmp_path):
    path = tmp_path / "a.array_record"
    assert write_array_record(path, ({"i": i, "record": RECORD} for i in range(20))) == 20
    records = open_array_record(str(path))
    assert (
        len(records) == 20
        and records.root == tmp_path
        and os.listdir(tmp_path) == ["a.array_record"]
    )
    for i in (7, 0, 19, -1):
        assert_same(records[i], {"i": i % 20, "record": RECORD})
    with pytest.raises(IndexError):
        records[20]


def test_a_record_that_cannot_be_written_leaves_no_file(tmp_path):
    (tmp_path / "a").write_text("what was there")
    with pytest.raises(TypeError):
        write_array_record(tmp_path / "a", [{"a": 1}, {"a": (1,)}])
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "what was there"
    with pytest.raises(UserError, match="none/a cannot be written"):
        write_array_record(tmp_path / "none" / "a", [{"a": 1}])


def test_many_threads_and_other_processes_read_the_same(tmp_path):
    for shard in range(3):
        write_array_record(
            tmp_path / f"a.array_record-{shard:05d}-of-00003",
            map(number, range(shard * 100, shard * 100 + 100)),
        )
    records = open_array_record(f"{tmp_path}/a.array_record@3")
    order = np.random.default_rng(0).integers(0, 300, 3000).tolist()
    with ThreadPoolExecutor(16) as pool:
        assert [record["n"] for record in pool.map(records.__getitem__, order)] == order
    again = pickle.loads(pickle.dumps(records))
    assert len(again) == 300 and again[123] == {"n": 123} and again.root == tmp_path


def test_files_are_named_singly_by_folder_by_glob_or_as_a_set(tmp_path):
    single_files, shard_files = tmp_path / "single_files", tmp_path / "t[w]o"
    single_files.mkdir()
    shard_files.mkdir()
    for shard in range(2):
        write_array_record(single_files / f"b.array_record-{shard:05d}-of-00002", [number(shard)])
        write_array_record(
            shard_files / f"c-{shard:05d}-of-00002.arrayrecord", [number(10 + shard)]
        )
    write_array_record(single_files / "a.array_record", [number(5), number(6)])
    write_array_record(single_files / "c.array_record.partial", [number(99)])
    (single_files / "notes.txt").write_text("of no array_record")
    assert numbers(f"{single_files}/a.array_record") == [5, 6]
    assert numbers(f"{single_files}") == numbers(f"{single_files}/") == [5, 6, 0, 1]
    assert (
        numbers(f"{single_files}/b*")
        == numbers(f"{single_files}/b.array_record@2")
        == numbers(f"{single_files}/b.array_record@*")
        == [0, 1]
    )
    assert numbers(f"{tmp_path}/*/*-00001-of-*") == [1, 11]
    assert (
        numbers(f"{shard_files}")
        == numbers(f"{shard_files}/c@2.arrayrecord")
        == numbers(f"{shard_files}/c@*.arrayrecord")
        == [10, 11]
    )


def test_files_that_cannot_be_opened_are_refused_by_name(tmp_path):
    write_array_record(tmp_path / "empty.array_record", [])
    whole = write_raw(
        tmp_path / "whole.array_record", [os.urandom(3000) for _ in range(50)]
    ).read_bytes()
    (tmp_path / "cut.array_record").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.array_record").write_text("text")
    write_array_record(tmp_path / "s-00001-of-00002", [number(1)])
    write_array_record(tmp_path / "s-00001-of-00003", [number(1)])
    (tmp_path / "none").mkdir()
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset_info.json").write_text("{}")
    for name, message in (
        ("missing.array_record", "missing.array_record is no array_record file.*No such file"),
        ("empty.array_record", "empty.array_record has no records"),
        ("cut.array_record", "cut.array_record is no array_record file, or not all of one"),
        ("text.array_record", "text.array_record is no array_record file"),
        ("*.array_record", "(cut|text).array_record is no array_record file"),
        ("*.arrayrecord", "no file matches"),
        ("none", "no file matches"),
        ("s@2", "s-00000-of-00002 is no array_record file"),
        ("s@*", "files of 2 sets"),
        ("t@*", "files of 0 sets"),
        ("prepared", "tfds:NAME"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            open_array_record(f"{tmp_path}/{name}")
        assert "\n" not in str(refused.value)


def test_one_corrupt_record_is_bad_and_others_are_not(tmp_path):
    records = [encode({"n": i, "noise": os.urandom(3000)}) for i in range(50)]
    path = write_raw(tmp_path / "a.array_record", records)
    data = bytearray(path.read_bytes())
    at = data.index(records[20][-1000:-900])
    data[at : at + 50] = b"\xff" * 50
    path.write_bytes(data)
    opened = open_array_record(str(path))
    kinds = []
    for i in range(50):
        try:
            assert opened[i]["n"] == i
        except BadRecord as bad:
            kinds.append((i, bad.kind))
    assert kinds == [(20, "corrupt_record")]


def test_examples_are_read_without_tensorflow(tmp_path):
    jpeg = bytes.fromhex("ffd8ffe000104a464946")
    data = example(
        image=[jpeg],
        objects__bbox=[0.0, 0.25, 0.5, 1.0],
        id=[-7],
        many=[0, 2**62, -(2**63)],
        text=["“é”".encode()],
        none=[],
        x=[0.1],
    )
    expected = {
        "image": jpeg,
        "objects/bbox": [0.0, 0.25, 0.5, 1.0],
        "id": -7,
        "many": [0, 2**62, -(2**63)],
        "text": "“é”",
        "none": [],
        "x": float(np.float32(0.1)),
    }
    assert decode_example(data) == expected
    write_raw(tmp_path / "a", [data, encode(RECORD), example(words=[b"a", b"b\0", b""]), b"\n\0"])
    records = open_array_record(f"{tmp_path}/a")
    assert (
        records[0] == expected and records[2] == {"words": ["a", b"b\0", ""]} and records[3] == {}
    )
    assert_same(records[1], RECORD)


@pytest.mark.needs("tensorflow_datasets")
def test_examples_equal_those_of_the_protobuf_definition():
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature["a/b"].float_list.value.extend([1.5, -2.0])
    message.features.feature["c"].int64_list.value.append(-3)
    message.features.feature["d"].bytes_list.value.append(b"text")
    message.features.feature["e"].bytes_list.SetInParent()
    assert decode_example(message.SerializeToString()) == {
        "a/b": [1.5, -2.0],
        "c": -3,
        "d": "text",
        "e": [],
    }


def test_an_example_that_is_cut_off_is_bad():
    data = example(image=[bytes(50)], box=[0.0, 1.0], id=[5])
    for end in range(1, len(data)):
        with pytest.raises(BadRecord) as bad:
            decode_example(data[:end])
        assert bad.value.kind == "bad_record"


def test_text_is_distinguished_from_images():
    assert text_or_bytes("kitten, né".encode()) == "kitten, né" and text_or_bytes(b"") == ""
    for start in (
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a\x01\x00",
        b"RIFF\x24\x00\x00\x00WEBP",
        b"BM\x9a\x00",
        bytes(9),
    ):
        assert text_or_bytes(start) == start
