"""Arrow files, folders of `save_to_disk` and CSV files, from the files to the questions."""

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.records import ColumnRecords, Records
from pg_ground.data.sources import open_records
from pg_ground.types import UserError

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "n": {"dtype": "int64", "_type": "Value"},
    "bbox": {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"},
}
"""As `datasets` 5.2.0 writes them."""


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


def table(start: int, stop: int, with_features: bool = True) -> pa.Table:
    rows = [
        {"image": {"bytes": png(), "path": None}, "label": n % 2, "n": n, "bbox": [1, 2, 9, 9]}
        for n in range(start, stop)
    ]
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    made = pa.Table.from_pylist(rows)
    return made.replace_schema_metadata(metadata if with_features else None)


def write_arrow(path: Path, rows: pa.Table, kind: str = "stream", batch: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with make(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)
    return path


def save_to_disk(folder: Path, split: str, *shards: pa.Table) -> Path:
    """Writes a folder as `Dataset.save_to_disk` of `datasets` 5.2.0 does."""
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(folder / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    state |= {"_fingerprint": "aebd", "_format_type": None, "_format_columns": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def numbers(records: Records) -> list[int]:
    return [records[i]["n"] for i in range(len(records))]


def questions(uri: str, **changes: Any) -> Examples:
    source = Source(uri=uri, boxes="bbox", phrase="label", **changes)
    return open_examples("grpo/rows", source, Data(), 16)


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as refused:
        open_records(uri)
    text = str(refused.value)
    assert text.startswith(f"source {uri}: ") and "\n" not in text, text
    return text.removeprefix(f"source {uri}: ")


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_rows_of_an_arrow_file_become_questions(tmp_path, kind):
    path = write_arrow(tmp_path / "a.arrow", table(0, 7), kind)
    examples = questions(f"arrow:{path}")
    assert [examples[i].prompt for i in range(4)] == ["detect cat", "detect dog"] * 2
    assert len(examples) == 7 and examples[6].size == (20, 20)
    assert examples.notes == ("label: 2 class names from the file",)
    chosen = questions(f"arrow:{path}", where="label == 'dog' and n > 1")
    assert len(chosen) == 2 and chosen.notes[0] == "where keeps 2 of 7 records"


def test_several_files_are_one_source(tmp_path):
    write_arrow(tmp_path / "b.arrow", table(4, 6))
    write_arrow(tmp_path / "a.arrow", table(0, 4), "file")
    for uri in (f"arrow:{tmp_path}", f"arrow:{tmp_path}/*.arrow"):
        records = open_records(uri)
        assert numbers(records) == list(range(6)) and records.root == tmp_path
    write_arrow(tmp_path / "c.arrow", table(0, 1).drop_columns(["label"]))
    text = refusal(f"arrow:{tmp_path}")
    assert text == "only one of a.arrow and c.arrow has label; all files need the same columns"


def test_a_folder_of_save_to_disk_is_read_in_the_order_of_its_state(tmp_path):
    folder = save_to_disk(tmp_path / "ds", "train", table(0, 5, False), table(5, 8, False))
    write_arrow(folder / "cache-1234.arrow", table(90, 99))  # `map` of datasets leaves such files
    records = open_records(f"arrow:{folder}")
    assert numbers(records) == list(range(8)) and isinstance(records, ColumnRecords)
    assert records[1]["label"] == "dog"  # by dataset_info.json
    assert numbers(open_records(f"arrow:{folder}?split=train[-25%:]")) == [6, 7]
    assert refusal(f"arrow:{folder}?split=test") == "no split 'test'; the folder holds train"


def test_a_split_of_a_dataset_dict_is_chosen(tmp_path):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    save_to_disk(tmp_path / "train", "train", table(0, 10))
    save_to_disk(tmp_path / "test", "test", table(20, 23))
    uri = f"arrow:{tmp_path}"
    assert numbers(open_records(f"{uri}?split=test")) == [20, 21, 22]
    records = open_records(f"{uri}?split=train[:25%]+test[1:]+train[7:9]")
    assert numbers(records) == [0, 1, 21, 22, 7, 8]
    examples = questions(f"{uri}?split=train[:50%]+test", where="n > 3", sampling="first:3")
    assert [examples.record(i)[0]["n"] for i in range(3)] == [4, 20, 21]
    assert "the rows are 5 of train[:50%], 3 of test" in examples.notes
    assert "choose one, as in arrow:" in refusal(uri)
    assert refusal(f"{uri}?split=val") == "no split 'val'; there are train, test"
    for split, reason in {
        "train[:11]": "the slice train[:11] reaches beyond the split, which has 10 rows",
        "train[:101%]": "the slice train[:101%] reaches beyond the split, which has 100 percent",
        "train[5:5]": "the slice train[5:5] holds none of the 10 rows of the split",
        "train[8:-4]": "the slice train[8:-4] holds none of the 10 rows of the split",
        "train[1]": "no split 'train[1]'; there are train, test",
        "train+": "no split ''; there are train, test",
    }.items():
        assert refusal(f"{uri}?split={split}").startswith(reason)


def test_a_file_that_is_no_arrow_file_is_refused(tmp_path):
    (tmp_path / "no.arrow").write_text("This is a text, which is no Arrow file at all.")
    assert refusal(f"arrow:{tmp_path}/no.arrow").startswith("no.arrow is no whole Arrow file: ")
    whole = write_arrow(tmp_path / "a.arrow", table(0, 5)).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[: len(whole) // 2])
    assert refusal(f"arrow:{tmp_path}/cut.arrow").startswith("cut.arrow is no whole Arrow file: ")
    pq.write_table(table(0, 2), tmp_path / "a.parquet")
    text = refusal(f"arrow:{tmp_path}/a.parquet")
    assert text == "a.parquet is a parquet file: use parquet:PATH"
    write_arrow(tmp_path / "empty.arrow", table(0, 1).slice(0, 0))
    assert refusal(f"arrow:{tmp_path}/empty.arrow") == "there are no rows in empty.arrow"
    assert refusal(f"arrow:{tmp_path}/nowhere.arrow") == "No such file or directory"
    assert "use arrow:PATH" in refusal(f"jsonl:{write_arrow(tmp_path / 'f', table(0, 1), 'file')}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.json").write_text('{"_indices_files": [{"filename": "a"}]}')
    assert "saved the order of the rows apart" in refusal(f"arrow:{tmp_path}/old")


# csv

CSV = """image,phrase,x1,y1,x2,y2,code,score,note
a.png,"red, round",1,2,9.5,9,007,0.5,
a.png,"two
lines",0,0,4,4,12,-2.5e3,"1"
a.png,3,1,1,5,5,x,,NaN
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip", "zstd"])
def test_rows_of_a_csv_file_become_questions(tmp_path, encoding):
    (tmp_path / "a.png").write_bytes(png())
    data = CSV.encode("utf-8" if encoding in ("gzip", "zstd") else encoding)
    if encoding == "gzip":
        data = gzip.compress(data)
    elif encoding == "zstd":
        data = pa.compress(data, "zstd", asbytes=True)
    (tmp_path / "a.csv").write_bytes(data)
    source = Source(uri=f"csv:{tmp_path}/a.csv", boxes="x1,y1,x2,y2")
    examples = open_examples("a", source, Data(), 20)
    prompts = [examples[i].prompt for i in range(len(examples))]
    assert prompts == ["detect red, round", "detect two lines", "detect 3"]
    assert examples[0].boxes.yxyx.tolist()[0] == pytest.approx([0.1, 0.05, 0.45, 0.475])
    records = open_records(source.uri)
    first, second, third = (records[i] for i in range(3))
    assert first["x1"] == 1 and type(first["x1"]) is int and first["x2"] == 9.5
    assert first["code"] == "007" and second["code"] == "12"  # one cell is no number of JSON
    assert [first["score"], second["score"], third["score"]] == [0.5, -2500.0, None]
    assert [first["note"], second["note"], third["note"]] == [None, "1", "NaN"]
    assert third["phrase"] == "3"


def test_a_csv_file_may_have_another_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("a;b\n1;x\n")
    assert refusal(f"csv:{tmp_path}/a.csv").endswith(
        "the first line of a.csv has no ',', but ';': add ?delimiter=semicolon"
    )
    assert open_records(f"csv:{tmp_path}/a.csv?delimiter=semicolon")[0] == {"a": 1, "b": "x"}
    (tmp_path / "a.tsv").write_text("a\tb\n1\tx, y\n")
    assert open_records(f"csv:{tmp_path}/a.tsv?delimiter=tab")[0] == {"a": 1, "b": "x, y"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b\n1,2\n3\n", r"a.csv is no CSV: CSV parse error: .*Expected 2 columns, got 1"),
        (b"a,b\n", r"there are no rows in a.csv"),
        (b"", r"a.csv is no CSV: "),
        (b"a,a\n1,2\n", r"a.csv has several columns called a"),
        (b"a,b\n1,caf\xe9\n", r"a.csv is not UTF-8 \(byte 0xE9 at 9\); save the file as UTF-8"),
        (b"PK\x03\x04abc", r"a.csv is not CSV, but a zip archive: unpack it"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_refused(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    assert re.match(reason, refusal(f"csv:{tmp_path}/a.csv"))


def test_a_cell_with_an_image_may_be_long(tmp_path):
    text = "x" * 3_000_000
    (tmp_path / "a.csv").write_text(f"image,n\n{text},1\n{text},2\n")
    records = open_records(f"csv:{tmp_path}/a.csv")
    assert len(records) == 2 and records[1] == {"image": text, "n": 2}
