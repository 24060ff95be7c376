import importlib.util
import io
import json
import logging
import pickle
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pg_ground.data import tables
from pg_ground.data.coco import open_coco
from pg_ground.data.records import BadRecord, Records
from pg_ground.data.tables import open_json, open_json_lines, open_parquet, open_yaml
from pg_ground.types import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_samples = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real samples are not there: {SHARED}"
)

READERS = {
    "json": open_json,
    "jsonl": open_json_lines,
    "parquet": open_parquet,
    "yaml": open_yaml,
    "coco": open_coco,
}


def refusal(uri: str) -> str:
    """Returns the error of a uri without its beginning, which names the source."""
    scheme, _, location = uri.partition(":")
    with pytest.raises(UserError) as refused:
        READERS[scheme](location)
    text = str(refused.value)
    assert text.startswith(f"source {uri}: ") and "\n" not in text, text
    return text.removeprefix(f"source {uri}: ")


def all_of(records: Records) -> list[dict[str, Any]]:
    return [records[i] for i in range(len(records))]


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"n": n, "text": f"row {n}"} for n in range(start, stop)]


# Rows of published datasets in parquet, column by column.
REFCOCO_JXU124 = {
    "sent_ids": [0, 1],
    "bbox": [103.9, 299.99, 238.15, 477.4],
    "image_path": "coco/train2014/COCO_train2014_000000581857.jpg",
    "sentences": [
        {"raw": "THE LADY", "sent": "the lady", "sent_id": 0, "tokens": ["the", "lady"]},
        {"raw": "left one", "sent": "left one", "sent_id": 1, "tokens": ["left", "one"]},
    ],
    "split": "train",
}
REFCOCO_LMMS = {
    "question_id": "469306",
    "image": {"bytes": png(0), "path": None},
    "question": "Please carefully observe the area circled in the image "
    "and come up with a caption for the area.",
    "answer": ["guy", "the man"],
    "segmentation": [1.0, 2.0, 3.5, 4.0, 5.0, 6.0],
    "bbox": [93.95, 83.29, 504.61, 476.35],
    "iscrowd": 0,
    "file_name": "COCO_train2014_000000296747_0.jpg",
}
PIXMO_POINTS = {
    "image_url": "https://example.org/a.jpg",
    "image_sha256": "ab" * 32,
    "points": [{"x": 10.5, "y": 20.25}, {"x": 99.0, "y": 1.0}],
    "count": 2,
    "label": "eggs",
    "collection_method": "pointing",
}
PIXMO_COUNT = {
    "image_url": "https://example.org/b.jpg",
    "image_sha256": "cd" * 32,
    "count": 0,
    "points": [],
    "label": "people",
}


def test_json_is_a_list_of_objects_or_one_at_a_key(tmp_path):
    rows = [{"a": 1}, {"a": [2, {"b": None}]}]
    write(tmp_path / "list.json", rows)
    write(tmp_path / "inside.json", {"accuracy": 1.5, "results": {"val": rows, "test": rows[:1]}})
    for location, expected in (
        ("list.json", rows),
        ("inside.json#results.val", rows),
        ("inside.json#results.test", rows[:1]),
    ):
        records = open_json(f"{tmp_path}/{location}")
        assert (
            all_of(records) == expected
            and records.root == tmp_path
            and isinstance(records, Records)
        )


def test_file_names_may_have_spaces_and_hash_signs(tmp_path):
    folder = tmp_path / "a b#1 ?ü"
    folder.mkdir()
    write(folder / "no #1.json", [{"n": 1}])
    write(folder / "keyed.json", {"rows": [{"n": 2}]})
    assert open_json(f"{folder}/no #1.json")[0] == {"n": 1} and open_json(
        f"{folder}/keyed.json#rows"
    )[0] == {"n": 2}
    write_parquet(folder / "c d.parquet", numbered(0, 2))
    assert len(open_parquet(f"{folder}/c d.parquet")) == 2 == len(open_parquet(str(folder)))


def test_entry_that_is_no_object_is_bad_when_read(tmp_path):
    records = open_json(str(write(tmp_path / "a.json", [{"n": 0}, 5])))
    assert records[0] == {"n": 0}
    with pytest.raises(BadRecord, match=r"entry 1 of a.json: 5 is not") as bad:
        records[1]
    assert bad.value.kind == "bad_json"


def test_json_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "cut.json").write_text('[{"a": 1}, {"a"')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    write(tmp_path / "object.json", {"info": {}, "results": [{"a": 1}], "by_id": {"1": {"a": 1}}})
    for name, message in (
        ("missing.json", "No such file"),
        ("missing.json#a", "No such file"),
        ("", "directory"),
        ("empty.json", "not one JSON value: Expecting value: line 1"),
        ("cut.json", "not one JSON value"),
        ("lines.json", "jsonl:PATH"),
        ("binary.json", "not one JSON value"),
        ("deep.json", "not one JSON value"),
        (
            "object.json",
            "this is an object with the keys info, results, by_id, "
            "but it must be a list of objects, or have one at a key",
        ),
        ("object.json#result", "no 'result' in an object with the keys info, results, by_id"),
        ("object.json#by_id", "an object with the keys 1"),
        ("object.json#by_id.2", "no '2' in an object with the keys 1"),
        ("object.json#results.0", "no '0' in a list"),
        ("object.json#info", "an empty object"),
    ):
        assert message in refusal(f"json:{tmp_path}/{name}")
    for value, message in (
        ([], "an empty list"),
        ([1, 2], "a list of 2"),
        ("x", "'x'"),
        (None, "None"),
    ):
        write(tmp_path / "other.json", value)
        assert message in refusal(f"json:{tmp_path}/other.json")


def test_no_error_quotes_much_of_a_file(tmp_path):
    long = "x" * 20_000
    write(tmp_path / "a.json", {long: 1})
    assert len(refusal(f"json:{tmp_path}/a.json")) < 300
    write(tmp_path / "a.json", [long])
    assert len(refusal(f"json:{tmp_path}/a.json")) < 300
    write(tmp_path / "a.json", [{"a": 1}, long])
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(long)}\n{long}\n")
    for records in (open_json(f"{tmp_path}/a.json"), open_json_lines(f"{tmp_path}/a.jsonl")):
        with pytest.raises(BadRecord) as bad:
            records[1]
        assert len(str(bad.value)) < 300
    for value in (long, {"datasets": [long]}, {"datasets": [{"json_path": long, "b": long}]}):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(value))
        assert len(refusal(f"yaml:{tmp_path}/a.yaml")) < 400
    (tmp_path / "a.yaml").write_text(f"{long}: {{")
    assert len(refusal(f"yaml:{tmp_path}/a.yaml")) < 400
    write_parquet(tmp_path / "p" / "a.parquet", [{"n": 1}])
    write_parquet(tmp_path / "p" / "b.parquet", [{f"{long}{i}": 1 for i in range(9)}])
    assert len(refusal(f"parquet:{tmp_path}/p")) < 600
    value = {"images": [{"id": 1, "file_name": long}] * 2, "annotations": [], "categories": []}
    assert len(refusal(f"coco:{write(tmp_path / 'c.json', value)}")) < 300
    value["images"] = [{"id": long, "file_name": name} for name in "ab"]
    assert len(refusal(f"coco:{write(tmp_path / 'c.json', value)}")) < 300


def test_an_object_with_many_keys_gives_one_short_line(tmp_path):
    write(tmp_path / "a.json", {f"key{i}": i for i in range(1000)})
    assert "key9 and 990 more" in (text := refusal(f"json:{tmp_path}/a.json")) and len(text) < 200


@pytest.mark.parametrize("row", [REFCOCO_JXU124, REFCOCO_LMMS, PIXMO_POINTS, PIXMO_COUNT])
def test_parquet_rows_are_plain_python(tmp_path, row):
    path = write_parquet(tmp_path / "a.parquet", [row] * 7)
    if not row.get("points", [0]):  # a list that is always empty has no type
        point = pa.struct([("x", pa.float64()), ("y", pa.float64())])
        table = pq.read_table(path)
        table = table.set_column(
            table.column_names.index("points"), "points", pa.array([[]] * 7, pa.list_(point))
        )
        pq.write_table(table, path)
    records = open_parquet(str(path))
    assert len(records) == 7 and records.root == tmp_path and isinstance(records, Records)
    assert all_of(records) == [row] * 7


def test_shards_are_one_table_in_the_order_of_their_names(tmp_path):
    write_parquet(tmp_path / "d" / "x-00001.parquet", numbered(4, 9))
    write_parquet(tmp_path / "d" / "x-00000.parquet", numbered(0, 4))
    pq.write_table(
        pa.Table.from_pylist(numbered(0, 0), pa.schema([("n", pa.int64()), ("text", pa.string())])),
        tmp_path / "d/x-2.parquet",
    )
    write_parquet(tmp_path / "d" / "y.parquet", numbered(9, 10))
    (tmp_path / "d" / "README.md").write_text("not a table")
    for location, rows, root in (
        ("d", 10, tmp_path / "d"),
        ("d/", 10, tmp_path / "d"),
        ("d/x-*.parquet", 9, tmp_path / "d"),
        ("*/x-0000[01].parquet", 9, tmp_path),
        ("d/y.parquet", 10, tmp_path / "d"),
    ):
        records = open_parquet(f"{tmp_path}/{location}")
        assert (
            all_of(records) == numbered(9 if location == "d/y.parquet" else 0, rows)
            and records.root == root
        )
    records = open_parquet(f"{tmp_path}/d")
    assert records[3] == records[-7] == {"n": 3, "text": "row 3"}
    for index in (10, -11):
        with pytest.raises(IndexError):
            records[index]


def test_row_groups_are_read_on_demand_and_few_stay_decoded(tmp_path, monkeypatch):
    records = open_parquet(str(write_parquet(tmp_path / "a.parquet", numbered(0, 100), 10)))
    read, original = [], tables.Parquet._read

    def counting(self, group):
        read.append(group)
        return original(self, group)

    monkeypatch.setattr(tables.Parquet, "_read", counting)
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 3 * max(records._bytes))
    assert read == [] and records[55]["n"] == 55 and records[59]["n"] == 59 and read == [5]
    assert [records[n]["n"] for n in (0, 15, 50, 25, 3)] == [0, 15, 50, 25, 3]
    # Groups 5, 0, 1, then 5 again. So group 2 replaces group 0, which is read again.
    assert read == [5, 0, 1, 2, 0] and len(records._decoded) == 3
    monkeypatch.setattr(tables, "MAX_DECODED_BYTES", 1)
    assert records[99]["n"] == 99 and list(records._decoded) == [9]


def test_threads_read_the_same_as_one_and_each_group_once(tmp_path, monkeypatch):
    records = open_parquet(str(write_parquet(tmp_path / "a.parquet", numbered(0, 400), 40)))
    read, original, lock = [], tables.Parquet._read, threading.Lock()

    def slowly(self, group):
        with lock:
            read.append(group)
        time.sleep(0.01)
        return original(self, group)

    monkeypatch.setattr(tables.Parquet, "_read", slowly)
    order = np.random.default_rng(0).permutation(400).tolist()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(records.__getitem__, order)) == [numbered(n, n + 1)[0] for n in order]
    assert sorted(read) == list(range(10))


def test_parquet_that_cannot_be_opened_is_refused(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", numbered(0, 100)).read_bytes()
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.parquet").write_text('{"n": 1}\n' * 10)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    (tmp_path / "footer.parquet").write_bytes(
        whole[:footer] + b"\xff" * (len(whole) - 8 - footer) + whole[-8:]
    )
    write_parquet(tmp_path / "odd" / "a.parquet", numbered(0, 3))
    write_parquet(tmp_path / "odd" / "b.parquet", [{"n": 1, "label": "x"}])
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "rows.parquet")
    for location, message in (
        ("missing.parquet", "No such file"),
        ("missing/*.parquet", "no file matches"),
        ("none", "no file matches"),
        ("odd/*.pq", "no file matches"),
        ("empty.parquet", "empty.parquet is no whole parquet file"),
        ("cut.parquet", "cut.parquet is no whole parquet file"),
        ("text.parquet", "text.parquet is no whole parquet file"),
        ("footer.parquet", "footer.parquet is no whole parquet file"),
        ("odd", "only one of a.parquet and b.parquet has label, text"),
        ("rows.parquet", "there are no rows in rows.parquet"),
        ("*.parquet", "is no whole parquet file"),
    ):
        assert message in refusal(f"parquet:{tmp_path}/{location}")


def test_a_date_that_python_cannot_hold_is_a_bad_record(tmp_path):
    dates = pa.array([1, 2**62, 3], pa.timestamp("ms"))
    pq.write_table(pa.table({"n": [0, 1, 2], "date": dates}), tmp_path / "a.parquet")
    records = open_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(BadRecord, match="row group 0 of a.parquet: ") as bad:
        records[1]
    assert bad.value.kind == "bad_parquet"
    assert (records[0]["n"], records[2]["n"]) == (0, 2)


def test_broken_row_group_is_bad_when_read_and_only_then(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", numbered(0, 300), 100)
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    records = open_parquet(str(path))
    for _ in range(2):
        with pytest.raises(BadRecord, match="row group 1 of a.parquet: ") as bad:
            records[150]
        assert bad.value.kind == "bad_parquet" and "\n" not in str(bad.value)
    assert records[99]["n"] == 99 and records[200]["n"] == 200
    path.unlink()
    assert records[0]["n"] == 0  # still decoded
    with pytest.raises(BadRecord, match="row group 1"):
        records[100]


def test_text_that_is_no_utf8_is_bad(tmp_path):
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"t": text}), tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match="utf-8"):
        open_parquet(f"{tmp_path}/a.parquet")[0]


def easy_distill(folder: Path, datasets: object) -> Path:
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"datasets": datasets}))
    return path


def test_yaml_joins_sampled_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.json", [{"a": i} for i in range(7)])
    (tmp_path / "sub" / "b.jsonl").write_text("".join(f'{{"b": {i}}}\n' for i in range(10)))
    path = easy_distill(
        tmp_path,
        [
            {"json_path": "a.json", "sampling_strategy": "first:50%"},
            {"json_path": "sub/b.jsonl", "sampling_strategy": "end:3"},
            {"json_path": "a.json", "sampling_strategy": "end:0"},
            {"json_path": str(tmp_path / "a.json"), "sampling_strategy": "first:12.5%"},
            {"json_path": "sub/b.jsonl"},
        ],
    )
    records = open_yaml(str(path))
    expected = (
        [{"a": i} for i in range(4)]
        + [{"b": i} for i in (7, 8, 9)]
        + [{"a": 0}]
        + [{"b": i} for i in range(10)]
    )
    assert all_of(records) == expected and records.root == tmp_path and isinstance(records, Records)


def test_a_json_path_is_relative_to_the_working_directory_as_in_easydistill(
    tmp_path, monkeypatch, caplog
):
    recipe = tmp_path / "recipe"
    for folder, value in ((tmp_path / "data", "here"), (recipe / "data", "beside the YAML file")):
        folder.mkdir(parents=True)
        write(folder / "a.json", [{"n": value}])
        (folder / "b.jsonl").write_text(json.dumps({"n": value}))
    write(recipe / "data" / "only.json", [{"n": "only"}])
    names = ("data/a.json", "data/b.jsonl", "data/only.json", "../data/a.json")
    path = easy_distill(recipe, [{"json_path": name} for name in names])
    for folder, expected in (
        (tmp_path, ["here", "here", "only", "here"]),
        (recipe, ["beside the YAML file", "beside the YAML file", "only", "here"]),
        (tmp_path / "data", ["beside the YAML file", "beside the YAML file", "only", "here"]),
    ):
        monkeypatch.chdir(folder)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            records = open_yaml(str(path))
        assert [record["n"] for record in all_of(records)] == expected
        # Images are beside the YAML file in any case.
        assert records.root == recipe
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == (2 if folder == tmp_path else 0)
        assert all("is read in the working directory, not" in text for text in texts)


def test_yaml_samples_by_seed_and_each_file_by_itself(tmp_path):
    write(tmp_path / "a.json", [{"n": i} for i in range(1000)])
    path = easy_distill(tmp_path, [{"json_path": "a.json", "sampling_strategy": "random:50%"}] * 2)
    rows = [row["n"] for row in all_of(open_yaml(str(path)))]
    assert len(rows) == 1000 and rows[:500] == sorted(set(rows[:500])) and rows[:500] != rows[500:]
    assert rows == [row["n"] for row in all_of(open_yaml(f"{path}?seed=0"))]
    assert rows != [row["n"] for row in all_of(open_yaml(f"{path}?seed=7"))]


def test_yaml_that_cannot_be_opened_is_refused(tmp_path):
    write(tmp_path / "a.json", [{"a": 1}])
    good = {"json_path": "a.json"}
    for datasets, message in (
        (
            [{"json_path": "none.json"}],
            f"dataset 0: source json:{tmp_path}/none.json: No such file",
        ),
        (
            [good, {"json_path": "none.jsonl"}],
            f"dataset 1: source jsonl:{tmp_path}/none.jsonl: No such file",
        ),
        (
            [good | {"sampling_strategy": "foo:3"}],
            "dataset 0: sampling 'foo:3' does not exist: write all, first:N",
        ),
        ([good | {"sampling_strategy": "first:-2"}], "dataset 0: sampling 'first:-2'"),
        ([good | {"sampling_strategy": 3}], "the form is datasets: [{json_path"),
        (
            [good | {"sampling_stategy": "all"}],
            "dataset 0 is {'json_path': 'a.json', 'sampling_stategy': 'all'}, but the form is",
        ),
        ([{"sampling_strategy": "all"}], "but the form is"),
        (["a.json"], "dataset 0 is a.json, but the form is"),
        ([], "but the form is"),
        ("a.json", "but the form is"),
        ([good | {"sampling_strategy": "end:0"}], "leave no record"),
    ):
        assert message in refusal(f"yaml:{easy_distill(tmp_path, datasets)}")
    for text, message in (
        ("", "None, but the form is"),
        ("- a\n- b\n", "a list of 2"),
        ("datasets: [\n", "not YAML: "),
        ("datasets: {a: b: c}\n", "not YAML: "),
        ("\0", "not YAML: "),
        ("data: []\n", "an object with the keys data, but the form is"),
        ("datasets: [a]\nsampling: all\n", "an object with the keys datasets, sampling, but"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML: "),
    ):
        (tmp_path / "data.yaml").write_text(text)
        assert message in refusal(f"yaml:{tmp_path}/data.yaml")
    assert "No such file" in refusal(f"yaml:{tmp_path}/none.yaml")
    assert "no option 'sed'; did you mean seed?" in refusal(f"yaml:{tmp_path}/data.yaml?sed=1")
    assert "seed=-1 must be a whole number" in refusal(f"yaml:{tmp_path}/data.yaml?seed=-1")


def instances() -> dict[str, Any]:
    def thing(number, image, category, box, **more):
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "segmentation": [],
            **more,
        }

    return {
        "info": {},
        "categories": [
            {"id": 18, "name": "dog"},
            {"id": 1, "name": "person"},
            {"id": 7, "name": "cat"},
        ],
        "images": [
            {"id": 5, "file_name": "b.jpg", "width": 640, "height": 480},
            {"id": 2, "file_name": "a.jpg", "width": 100, "height": 200},
            {"id": 9, "file_name": "none.jpg", "width": 3, "height": 4},
        ],
        "annotations": [
            thing(1, 5, 1, [1.5, 2, 3, 4], iscrowd=0),
            thing(2, 2, 7, [0, 0, 10, 10]),
            thing(3, 5, 18, [5, 6, 7, 8], iscrowd=0),
            thing(4, 5, 1, [9, 9, 9, 9], iscrowd=0),
            thing(5, 5, 1, [0, 0, 640, 480], iscrowd=1),
        ],
    }


def test_coco_asks_about_an_image(tmp_path):
    path = write(tmp_path / "instances.json", instances())
    b = {"image": "b.jpg", "width": 640, "height": 480}
    a = {
        "image": "a.jpg",
        "width": 100,
        "height": 200,
        "categories": ["cat"],
        "boxes": [[0, 0, 10, 10]],
        "iscrowd": [0],
    }
    none = {
        "image": "none.jpg",
        "width": 3,
        "height": 4,
        "categories": [],
        "boxes": [],
        "iscrowd": [],
    }
    names, boxes = ["person", "dog", "person"], [[1.5, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    expected = [b | {"categories": names, "boxes": boxes, "iscrowd": [0, 0, 0]}, a, none]
    for location in (f"{path}", f"{path}?ask=image", f"{path}?crowd=0&ask=image"):
        records = open_coco(location)
        assert (
            all_of(records) == expected
            and records.root == tmp_path
            and isinstance(records, Records)
        )
    crowd = open_coco(f"{path}?crowd=1")[0]
    assert crowd == b | {
        "categories": [*names, "person"],
        "boxes": [*boxes, [0, 0, 640, 480]],
        "iscrowd": [0, 0, 0, 1],
    }


def test_coco_asks_about_a_category_or_the_list_of_them(tmp_path):
    path = write(tmp_path / "instances.json", instances())
    records = open_coco(f"{path}?ask=category&images={tmp_path}/refcoco+ and %20")
    assert records.root == tmp_path / "refcoco+ and %20"
    assert [(r["image"], r["category"], r["boxes"], r["iscrowd"]) for r in all_of(records)] == [
        ("b.jpg", "person", [[1.5, 2, 3, 4], [9, 9, 9, 9]], [0, 0]),
        ("b.jpg", "dog", [[5, 6, 7, 8]], [0]),
        ("a.jpg", "cat", [[0, 0, 10, 10]], [0]),
    ]
    assert records[1] == {
        "image": "b.jpg",
        "width": 640,
        "height": 480,
        "category": "dog",
        "boxes": [[5, 6, 7, 8]],
        "iscrowd": [0],
    }
    images, lists = open_coco(str(path)), open_coco(f"{path}?ask=list")
    assert [r["classes"] for r in all_of(lists)] == ["person ; dog", "cat", ""]
    assert [{k: v for k, v in r.items() if k != "classes"} for r in all_of(lists)] == all_of(images)


def test_coco_that_cannot_be_opened_is_refused(tmp_path):
    path = tmp_path / "instances.json"
    for change, ask, message in (
        (
            {"images": None},
            "image",
            "an object with the keys info, categories, images, annotations, "
            "but COCO's instances have the lists",
        ),
        ({"categories": None}, "list", "COCO's instances have the lists"),
        (
            {"annotations": {"1": {}}},
            "image",
            "annotations is an object with the keys 1, but COCO's",
        ),
        ({"images": []}, "image", "no entry can be used: annotation 0 (id 1) of instances.json: "),
        ({"images": []}, "image", "there is no image with the id 5"),
        ({"images": [], "annotations": []}, "image", "there are no images in it"),
        (
            {"images": [{"id": 3, "width": 5, "height": 5}], "annotations": []},
            "image",
            "no entry can be used: image 0 (id 3) of instances.json: there is no file_name",
        ),
        (
            {"categories": [{"name": "dog"}]},
            "category",
            "category 0 of instances.json: there is no id",
        ),
    ):
        write(path, instances() | change)
        assert message in refusal(f"coco:{path}?ask={ask}")
    write(path, instances() | {"annotations": []})
    assert "there are no objects in it" in refusal(f"coco:{path}?ask=category")
    assert "ask must be one of image, category, list" in refusal(f"coco:{path}?ask=boxes")
    assert "crowd 0 or 1" in refusal(f"coco:{path}?crowd=yes")
    assert "no option 'image'; did you mean images?" in refusal(f"coco:{path}?image=x")
    assert "option images has no value" in refusal(f"coco:{path}?images=")
    assert "an empty list, but COCO's" in refusal(f"coco:{write(path, [])}")
    path.write_text("{")
    assert "not one JSON value" in refusal(f"coco:{path}")
    path.write_text("")
    assert "not one JSON value" in refusal(f"coco:{path}")
    assert "No such file" in refusal(f"coco:{tmp_path}/none.json?ask=list")


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is not None,
    reason="the client is installed, and would be used",
)
@pytest.mark.parametrize(
    "uri",
    [
        "json:gs://b/a",
        "json:gs://b/a#k",
        "jsonl:gs://b/a",
        "parquet:gs://b/*",
        "yaml:gs://b/a",
        "coco:gs://b/a",
    ],
)
def test_remote_file_system_without_its_client_is_refused(uri):
    assert "gcsfs" in refusal(uri)


def every_reader(folder: Path) -> list[Records]:
    write(folder / "a.json", [{"n": i} for i in range(20)])
    (folder / "b.jsonl").write_text("".join(f'{{"n": {i}}}\n' for i in range(20)))
    write_parquet(folder / "c.parquet", numbered(0, 20))
    write(folder / "d.json", instances())
    listed = easy_distill(folder, [{"json_path": "a.json"}, {"json_path": "b.jsonl"}])
    return [
        open_json(f"{folder}/a.json"),
        open_json_lines(f"{folder}/b.jsonl"),
        open_parquet(f"{folder}/c.parquet"),
        open_coco(f"{folder}/d.json?ask=list"),
        open_yaml(str(listed)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_reader_survives_pickling_and_threads(tmp_path, number):
    records = every_reader(tmp_path)[number]
    rows = all_of(records)  # also with decoded row groups
    copy = pickle.loads(pickle.dumps(records))
    order = np.random.default_rng(0).integers(0, len(records), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, order)) == [rows[i] for i in order]
    assert all_of(copy) == rows and len(copy) == len(records) and copy.root == records.root
    with pytest.raises(IndexError):
        records[len(records)]
    assert len(pickle.dumps(records)) < 20_000


@pytest.mark.slow
def test_hundred_thousand_records_do_not_take_quadratic_time(tmp_path):
    rows = [
        {
            "image_path": f"{i}.jpg",
            "height": 720,
            "width": 1280,
            "instruction": "find it",
            "abs_box": {"0": [[1, 2, 3, 4]]},
        }
        for i in range(100_000)
    ]
    write(tmp_path / "a.json", rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(tmp_path / "a.parquet", rows, 10_000)
    for opener, name in (
        (open_json, "a.json"),
        (open_json_lines, "a.jsonl"),
        (open_parquet, "a.parquet"),
    ):
        start = time.process_time()
        records = opener(f"{tmp_path}/{name}")
        assert len(records) == 100_000 and records[99_999] == rows[-1]
        # 0.02 to 0.5 on a quiet core, 4.6 on a busy one in a large process. Quadratic: minutes.
        assert time.process_time() - start < 30


@needs_samples
def test_real_lists_in_json():
    records = open_json(f"{SHARED}/multi_box/multi_box_grounding_RL_sample.json")
    assert len(records) == 3 and set(records[0]) == {
        "image_path",
        "height",
        "width",
        "instruction",
        "abs_box",
    }
    assert records[0]["abs_box"]["0"] == [[456, 337, 725, 557]]
    for name, accuracy in (
        ("baseline_rec_results_refcoco_val", 89.75),
        ("original_cot_rec_results_refcoco_val", 32.65),
    ):
        records = open_json(f"{SHARED}/predictions/{name}.json#results")
        assert len(records) == 2000 and np.mean(
            [row["correct"] for row in all_of(records)]
        ) * 100 == pytest.approx(accuracy)
        assert "keys accuracy, results" in refusal(f"json:{SHARED}/predictions/{name}.json")


@needs_samples
def test_real_multi_box_lists_in_yaml(tmp_path):
    sample = SHARED / "multi_box" / "multi_box_grounding_RL_sample.json"
    path = easy_distill(
        tmp_path,
        [{"json_path": str(sample), "sampling_strategy": "random:50%"}, {"json_path": str(sample)}],
    )
    assert len(open_yaml(str(path))) == 2 + 3


@needs_samples
def test_real_coco_instances():
    path = SHARED / "refcoco" / "annotations" / "emma_refcocog" / "instances.json"
    value = json.loads(path.read_text())
    images = all_of(open_coco(f"{path}?crowd=1&images={SHARED}/refcoco/images"))
    assert (
        len(images) == len(value["images"]) == 15
        and sum(len(r["boxes"]) for r in images) == len(value["annotations"]) == 108
    )
    crowds = sum(a["iscrowd"] for a in value["annotations"])
    parts = all_of(open_coco(f"{path}?ask=category"))
    assert sum(len(r["boxes"]) for r in parts) == 108 - crowds
    assert len(parts) == sum(len(set(r["categories"])) for r in all_of(open_coco(str(path))))


@needs_samples
def test_real_rows_pass_through_parquet_unchanged(tmp_path):
    for name, rows in (
        ("pixmo/pixmo_points", 4),
        ("counting/pixmo_count_val540", None),
        ("refcoco/triples", 644),
        ("gui/test", None),
    ):
        lines = all_of(open_json_lines(f"{SHARED}/{name}.jsonl"))
        assert rows is None or len(lines) == rows
        records = all_of(open_parquet(str(write_parquet(tmp_path / "a.parquet", lines, 50))))
        assert len(records) == len(lines)
        for record, line in zip(records, lines, strict=True):  # a missing field is null in a table
            assert {k: v for k, v in record.items() if v is not None} == {
                k: v for k, v in line.items() if v is not None
            }


def test_json_of_several_files_is_read_in_the_order_of_their_names(tmp_path):
    for name, count in (("b_v2", 2), ("a_v2", 1), ("c", 3)):
        entries = [{"name": name, "number": number} for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": entries}))
    records = open_json(f"{tmp_path}/*_v2.json#rows")
    assert records.root == tmp_path
    assert [(r["name"], r["number"]) for r in map(records.__getitem__, range(3))] == [
        ("a_v2", 0),
        ("b_v2", 0),
        ("b_v2", 1),
    ]
    (tmp_path / "*_v2.json").write_text("[{}]")
    assert len(open_json(f"{tmp_path}/*_v2.json")) == 1  # a file with this very name
    assert "no file matches" in refusal(f"json:{tmp_path}/*.jsonl")
    (tmp_path / "d_v2.json").write_text("{")
    assert "not one JSON value" in refusal(f"json:{tmp_path}/[d]_v2.json")


WHOLE = {"info": {"n": 1}, "items": [{"image": "a.jpg", "box": [1, 2, 3, 4]}, {"image": "b.jpg"}]}
COCO_FORM = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": []}

ONE_OBJECT = {
    "indented": (json.dumps(WHOLE, indent=2), "with a list of records: use json:{}#items"),
    "indented by tabs": (json.dumps(WHOLE, indent="\t"), "use json:{}#items"),
    "two lists": (json.dumps(WHOLE | {"val": [{}]}, indent=1), "json:{}#items or json:{}#val"),
    "behind a byte order mark": ("\ufeff" + json.dumps(WHOLE, indent=2), "use json:{}#items"),
    "one field on each line": (
        '{"info": 1,\n"items": [{"image": "a.jpg"},\n{"image": "b.jpg"}]}\n',
        "use json:{}#items",
    ),
    "without a list": (json.dumps({"a": {"b": 1}}, indent=2), "an object with the keys a, not one"),
    "COCO, indented": (json.dumps(COCO_FORM, indent=2), "has COCO's form: use coco:{}"),
    "COCO on one line": (json.dumps(COCO_FORM), "has COCO's form: use coco:{}"),
    "records on several lines each": (
        "\n".join(json.dumps(record, indent=2) for record in WHOLE["items"]),
        "write each record on one line, or all as one list, which is json:PATH",
    ),
    "a list, indented": (json.dumps(WHOLE["items"], indent=2), "use json:{}"),
}


@pytest.mark.parametrize("form", ONE_OBJECT)
def test_json_over_several_lines_is_no_file_of_lines(tmp_path, form):
    text, hint = ONE_OBJECT[form]
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    message = refusal(f"jsonl:{path}")
    assert hint.replace("{}", str(path)) in message and len(message) < 400
    if "json:{}#items" in hint:
        assert len(open_json(f"{path}#items")) == 2


def test_a_large_object_over_several_lines_is_not_parsed_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_BYTES_IN_MEMORY", 20)
    (tmp_path / "a.jsonl").write_text(json.dumps(WHOLE, indent=2))
    assert "the first line is only a part" in refusal(f"jsonl:{tmp_path}/a.jsonl")


DAMAGED = {
    "the first line": ['{"image": "a.jpg", "box": [', '{"image": "b.jpg"}'],
    "the first and the last line": ['{"image": "a.jpg",', '{"image": "b.jpg"}', '{"ima'],
    "many lines": ['{"image":'] * 9 + ['{"image": "b.jpg"}'] + ['{"image":'] * 9,
    "the only line": ['{"image": "a.jpg",'],
    "commas behind the records": ['{"image": "a.jpg"},', '{"image": "b.jpg"},'],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_lines_stay_bad_records(tmp_path, kind):
    lines = DAMAGED[kind]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    records = open_json_lines(f"{tmp_path}/a.jsonl")
    assert len(records) == len(lines)
    with pytest.raises(BadRecord, match="byte 0 of a.jsonl"):
        records[0]
