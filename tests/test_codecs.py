"""Files of JSON that are compressed or in another encoding: the same records, or a clear error."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.datasets import open_examples
from pg_ground.data.mixture import UnusableRow, prepare_row
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records
from pg_ground.storage import codecs as file_codecs
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

ROWS = [
    {"image": "0.png", "phrase": "red square", "bbox": [10, 10, 30, 30]},
    {"image": "1.png", "phrase": "червоний квадрат", "bbox": [1, 2, 3, 4]},
    {"image": "2.png", "phrase": "赤い四角 🟥", "bbox": []},
]


def by_arrow(name: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, name) as stream:
            stream.write(data)
        return out.getvalue().to_pybytes()

    return compress


def in_two(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Compresses both halves of a file, as `cat a.gz b.gz` does."""
    return lambda data: compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])


def encoded(name: str, mark: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda data: mark + data.decode().encode(name)


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "utf-8 with mark": encoded("utf-8-sig"),
    "utf-16 as PowerShell writes it": encoded("utf-16-le", codecs.BOM_UTF16_LE),
    "utf-16 big": encoded("utf-16-be", codecs.BOM_UTF16_BE),
    "utf-16 little without mark": encoded("utf-16-le"),
    "utf-16 big without mark": encoded("utf-16-be"),
    "utf-32": encoded("utf-32"),
    "utf-32 big without mark": encoded("utf-32-be"),
    "gzip": gzip.compress,
    "gzip of two members": in_two(gzip.compress),
    "zstd": by_arrow("zstd"),
    "zstd of two frames": in_two(by_arrow("zstd")),
    "bzip2": bz2.compress,
    "bzip2 of two streams": in_two(bz2.compress),
    "xz": lzma.compress,
    "lz4": by_arrow("lz4"),
    "gzip of utf-16": lambda data: gzip.compress(encoded("utf-16")(data)),
    "zstd of gzip": lambda data: by_arrow("zstd")(gzip.compress(data)),
}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()


def values(uri: str) -> list[Any]:
    records = open_records(uri)
    return [records[i] for i in range(len(records))]


@pytest.mark.parametrize("name", WRITERS)
def test_every_reader_of_json_reads_the_same_records(tmp_path, name):
    write = WRITERS[name]
    (tmp_path / "a.jsonl").write_bytes(write(lines(ROWS)))
    (tmp_path / "a.json").write_bytes(write(json.dumps(ROWS, ensure_ascii=False).encode()))
    (tmp_path / "a.jsonl.gz").write_bytes(write(lines(ROWS)))
    (tmp_path / "a.json.xz").write_bytes(write(json.dumps({"rows": ROWS}).encode()))
    files = ("a.jsonl", "a.json", "a.jsonl.gz", "a.json.xz#rows")
    datasets = [{"json_path": file} for file in files]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    assert values(f"jsonl:{tmp_path}/a.jsonl") == ROWS == values(f"json:{tmp_path}/a.json")
    assert values(f"yaml:{tmp_path}/a.yaml") == ROWS * 4
    coco = {
        "images": [{"id": 1, "file_name": "à.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "червоний квадрат"}],
    }
    (tmp_path / "coco.json").write_bytes(write(json.dumps(coco, ensure_ascii=False).encode()))
    record = values(f"coco:{tmp_path}/coco.json?ask=category")[0]
    assert (record["image"], record["category"]) == ("à.png", "червоний квадрат")


def test_records_of_a_decoded_file_survive_pickling_and_the_end_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS).decode().encode("utf-16"))
    records = pickle.loads(pickle.dumps(open_records(f"jsonl:{path}")))
    path.unlink()
    assert [records[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert records.root == tmp_path


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as refused:
        open_records(uri)
    text = str(refused.value)
    assert text.startswith(f"source {uri}: ") and "\n" not in text
    assert len(text.removeprefix(f"source {uri}: ")) < 250
    return text.removeprefix(f"source {uri}: ")


def in_zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", data)
    return out.getvalue()


def in_tar(data: bytes, mode: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def in_parquet(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue().to_pybytes()


def cut(write: Callable[[bytes], bytes], count: int) -> Callable[[bytes], bytes]:
    return lambda data: write(data)[:-count]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (in_zip, "is not JSON, but a zip archive: unpack it"),
        (lambda data: in_tar(data, "w"), "is not JSON, but a tar archive: unpack it"),
        (lambda data: in_tar(data, "w:gz"), "is not JSON, but a tar archive: unpack it"),
        (in_parquet, "is not JSON, but a parquet file: use parquet:PATH"),
        (lambda data: b"7z\xbc\xaf\x27\x1c" + data, "7-Zip"),
        (lambda data: pickle.dumps(data), "a pickle"),
        (cut(gzip.compress, 9), "is gzip that breaks off or is damaged"),
        (cut(gzip.compress, 1), "is gzip that breaks off"),
        (cut(by_arrow("zstd"), 5), "is zstd that breaks off"),
        (cut(bz2.compress, 5), "is bzip2 that breaks off"),
        (cut(lzma.compress, 5), "is xz that breaks off"),
        (cut(by_arrow("lz4"), 5), "is lz4 that breaks off"),
        (lambda data: gzip.compress(data)[:12] + b"\xff" * 40, "is gzip that breaks off or is"),
        (lambda data: cut(gzip.compress, 8)(encoded("utf-16")(data)), "is gzip that breaks off"),
    ],
)
@pytest.mark.parametrize("scheme", ["json", "jsonl", "coco"])
def test_a_file_that_cannot_be_read_is_named_by_its_format(tmp_path, write, message, scheme):
    path = tmp_path / "train.data"
    path.write_bytes(write(lines(ROWS)))
    assert f"train.data {message}" in refusal(f"{scheme}:{path}") or message in "7-Zip a pickle"
    assert message in refusal(f"{scheme}:{path}")


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_codecs, "MAX_DECODED_BYTES", 2**20)
    for name, write in (("a.gz", gzip.compress), ("a.zst", by_arrow("zstd"))):
        (tmp_path / name).write_bytes(write(b" " * 2**20 + b"[]"))
        for scheme in ("json", "jsonl"):
            text = refusal(f"{scheme}:{tmp_path}/{name}")
            assert "that unpacks to more than 0.000976562 GiB: unpack it first" in text
        (tmp_path / name).write_bytes(write(b'[{"a": 1}]'.rjust(2**20)))
        assert values(f"json:{tmp_path}/{name}") == [{"a": 1}]


def test_utf_16_that_breaks_off_is_refused_and_a_lone_surrogate_is_one_bad_record(tmp_path):
    path = tmp_path / "a.jsonl"
    data = lines(ROWS).decode().encode("utf-16")
    path.write_bytes(data[:-1])
    assert "a.jsonl is UTF-16, but not from byte" in refusal(f"jsonl:{path}")
    text = lines(ROWS).decode().replace("квадрат", "\ud83d")
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le", "surrogatepass"))
    records = open_records(f"jsonl:{path}")
    assert [records[i] for i in (0, 2)] == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize(
    "fault", [{"phrase": "cat \ud83d"}, {"label": "\udc00"}, {"boxes": {"a\ud800": [[1, 1, 9, 9]]}}]
)
def test_half_a_character_is_one_bad_record(tmp_path, fault):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    row = {"image": "a.png", "phrase": "cat", "label": "cat", "boxes": [1, 1, 9, 9]}
    label = "" if "boxes" in fault else "label"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (row, row | fault))))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", boxes="boxes", label=label)
    examples = open_examples("a", source, Data(), 14)
    good, bad = (prepare_row(examples, i, load_tokenizer(), Data(), 0, 0) for i in (0, 1))
    assert not isinstance(good, UnusableRow) and isinstance(bad, UnusableRow)
    assert bad.kind == "bad_text" and "has half a character: '\\ud" in bad.message
    bad.message.encode()


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-u", "shift_jis", "latin-1"])
def test_a_line_in_another_encoding_is_a_bad_record_that_says_so(tmp_path, encoding):
    phrase = {"shift_jis": "赤い四角", "latin-1": "carré doré"}.get(encoding, "червоний квадрат")
    line = json.dumps({"phrase": phrase}, ensure_ascii=False).encode(encoding) + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"phrase": "red square"}\n' + line)
    records = open_records(f"jsonl:{path}")
    assert records[0] == {"phrase": "red square"}
    with pytest.raises(BadRecord) as bad:
        records[1]
    at = next(i for i, byte in enumerate(line) if byte > 127)
    assert bad.value.kind == "bad_json"
    byte = f"byte 0x{line[at]:02X} at {at}"
    assert str(bad.value) == f"byte 25 of a.jsonl: not UTF-8 ({byte}); save the file as UTF-8"
    path.write_bytes(line)
    text = refusal(f"json:{path}")
    assert text == f"not one JSON value: not UTF-8 ({byte}); save the file as UTF-8"


def test_a_list_in_a_decoded_file_of_lines_is_named(tmp_path):
    for name in ("utf-8 with mark", "utf-16 big", "gzip", "gzip of utf-16"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(WRITERS[name](json.dumps(ROWS, indent=1).encode()))
        assert f"use json:{path}" in refusal(f"jsonl:{path}")
    path.write_bytes(WRITERS["gzip"](b" \n\n"))
    assert "the file has no lines" in refusal(f"jsonl:{path}")


def test_a_damaged_first_line_is_one_bad_record_and_no_encoding(tmp_path):
    """The line begins like UTF-16. The rest of the file is UTF-8."""
    good = json.dumps({"image": "a.png", "phrase": "a"}).encode()
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe not text\n" + good + b"\n")
    records = open_records(f"jsonl:{tmp_path}/f.jsonl")
    assert len(records) == 2 and records[1]["phrase"] == "a"
    with pytest.raises(BadRecord, match="byte 0 of f.jsonl"):
        records[0]
