"""Packed sources give the same questions in the same order, with the images inside the records."""

import datetime
import decimal
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pg_ground.config import Data, Fetch, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.packing import pack
from pg_ground.data.record_fields import field_at
from pg_ground.data.records import BadRecord
from pg_ground.types import UserError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / f"{i}.jpg")
        lines.append(
            {
                "meta": {"image": f"{i}.jpg"},
                "phrase": f"cat {i}",
                "box": [0, 0, 4 + i, 4],
                "n": None,
                "x": [1.5, "é"],
            }
        )
    (folder / "2.jpg").write_bytes(b"no image")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Source(uri=f"jsonl:{folder}/a.jsonl", image="meta.image", boxes="box")


def bad_record(examples: Examples, index: int) -> tuple[str, str]:
    with pytest.raises(BadRecord) as bad:
        examples[index]
    return bad.value.kind, str(bad.value)


def test_packed_sources_hold_the_same_questions(photos, tmp_path):
    before = open_examples("a", photos, Data(), 16)
    done = pack([{"a": photos}, {"a": photos}, {}], Fetch(), tmp_path / "out", 3)
    assert done["a"]["records"] == 6 and done["a"]["corrupt_image"] == 1
    after = open_examples("a", replace(photos, uri=done["a"]["uri"]), Data(), 16)
    assert len(after) == len(before) == 7
    for i in (0, 1, 3, 4, 5, 6):
        np.testing.assert_array_equal(after[i].image, before[i].image)
        for name in ("prompt", "suffix", "size", "index"):
            assert getattr(after[i], name) == getattr(before[i], name)
    bad = [bad_record(examples, 2) for examples in (before, after)]
    assert bad[0] == bad[1] and bad[0][0] == "corrupt_image"
    record = after.record(0)[0]
    assert record["n"] is None and record["x"] == [1.5, "é"]
    assert record["meta"]["image"]["path"] == "0.jpg"
    with Image.open(io.BytesIO(record["meta"]["image"]["bytes"])) as image:
        assert image.format == "JPEG"


def test_nothing_is_overwritten_and_a_name_is_one_source(photos, tmp_path):
    pack([{"a": photos}], Fetch(), tmp_path / "out", 1)
    with pytest.raises(UserError, match="exists already"):
        pack([{"a": photos}], Fetch(), tmp_path / "out", 1)
    scenes = Source(uri="synthetic:heldout", boxes="box")
    with pytest.raises(UserError, match="two sources are called a"):
        pack([{"a": photos}, {"a": scenes}], Fetch(), tmp_path / "other", 1)


@pytest.mark.parametrize(("path", "image_field"), [
    ("images.0", {"images": ["a.png", "b.png"]}),
    ("images.-1", {"images": ["b.png", "a.png"]}),
    ("images[1]", {"images": ["b.png", "a.png"]}),
    ("images", {"images": ["a.png"]}),
    ("images.file", {"images": [{"file": "a.png"}]}),
    ("images.1.file.0", {"images": [{}, {"file": ["a.png"]}]}),
    ("image.path", {"image.path": "a.png"}),
    ("image.path", {"image.path": "a.png", "image": {"size": 3}}),
    ("image.path", {"image.path": "b.png", "image": {"path": "a.png"}}),
    ("image.path", {"image": {"path": "a.png", "bytes": None}}),
    ("a.b.c", {"a.b": {"c": "a.png"}}),
    ("0", {"0": "a.png"}),
])  # fmt: skip
def test_the_image_is_packed_at_every_path_that_is_read(tmp_path, path, image_field):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"phrase": "cat", "box": [0, 0, 9, 9], **image_field}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", image=path, boxes="box")
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", 1)["a"]
    assert packed["records"] == 1
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").unlink()
    examples = open_examples("a", replace(source, uri=packed["uri"]), Data(), 16)
    assert examples[0].size == (30, 20)
    other_fields = examples.record(0)[0]
    assert field_at(other_fields, path) in (
        {"bytes": content, "path": "a.png"},
        [{"bytes": content, "path": "a.png"}],
    )
    assert json.loads((tmp_path / "a.jsonl").read_text()) == record
    assert other_fields["phrase"] == "cat" and other_fields.keys() == record.keys()


@pytest.mark.parametrize(("path", "images"), [
    ("images[]", ["a.png", "a.png"]),
    ("images[].file", [{"file": "a.png"}, {"file": "a.png"}]),
])  # fmt: skip
def test_a_source_with_one_image_per_element_is_not_packed(tmp_path, path, images):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    record = {"images": images, "phrase": "cat", "box": [0, 0, 9, 9]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", image=path, boxes="box")
    with pytest.raises(UserError, match="a source with one image per element cannot be packed"):
        pack([{"a": source}], Fetch(), tmp_path / "out", 1)


BROKEN = {
    "cut": '{"image": "a.png", "phrase": "cat", "box": [0, 0, 9',
    "list": "[1, 2]",
    "no image": '{"phrase": "cat", "box": [0, 0, 9, 9]}',
    "null": '{"image": null, "phrase": "cat", "box": [0, 0, 9, 9]}',
    "several": '{"image": ["a.png", "a.png"], "phrase": "cat", "box": [0, 0, 9, 9]}',
    "missing": '{"image": "b.png", "phrase": "cat", "box": [0, 0, 9, 9]}',
    "corrupt": '{"image": "c.png", "phrase": "cat", "box": [0, 0, 9, 9]}',
    "address": '{"image": "http://127.0.0.1:9/a.png", "phrase": "cat", "box": [0, 0, 9, 9]}',
    "flat": '{"image": "a.png", "phrase": "cat", "box": [9, 9, 9, 9]}',
    "no phrase": '{"image": "a.png", "box": [0, 0, 9, 9]}',
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("shards", [1, 2, 9])
def test_a_bad_record_keeps_its_place_and_its_kind(tmp_path, name, shards):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    good = [json.dumps({"image": "a.png", "phrase": f"cat {i}", "box": [0, 0, 9, 9]}) for i in "01"]
    (tmp_path / "a.jsonl").write_text("\n".join((good[0], BROKEN[name], good[1])))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", boxes="box")
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", shards)["a"]
    before = open_examples("a", source, Data(), 16)
    after = open_examples("a", replace(source, uri=packed["uri"]), Data(), 16)
    assert len(after) == 3
    assert [after[i].prompt for i in (0, 2)] == ["detect cat 0", "detect cat 1"]
    kinds = [bad_record(examples, 1)[0] for examples in (before, after)]
    assert kinds[1] == kinds[0]


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_record_of_several_questions_keeps_all_of_them(tmp_path, fault):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    (tmp_path / "corrupt.png").write_bytes(b"no image")
    texts = [["a", "b", "c"], ["d", "e"], ["f"]]
    files = ["a.png", f"{fault}.png", "a.png"]
    rows = [
        {"image": file, "box": [0, 0, 9, 9], "texts": [{"raw": text} for text in row]}
        for file, row in zip(files, texts, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", phrase="texts[].raw", boxes="box")
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", 2)["a"]
    after = open_examples("a", replace(source, uri=packed["uri"]), Data(), 16)
    assert len(after) == 6
    assert [after[i].prompt[-1] for i in (0, 1, 2, 5)] == ["a", "b", "c", "f"]
    assert {bad_record(after, i)[0] for i in (3, 4)} == {f"{fault}_image"}


def test_values_that_are_no_json_are_packed_as_text(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (20, 30)).save(file, "PNG")
    row = {
        "image": {"bytes": file.getvalue(), "path": "a.png"},
        "phrase": "cat",
        "box": [0, 0, 9, 9],
        "day": datetime.date(2026, 11, 28),
        "time": datetime.datetime(2026, 11, 28, 12, 30),
        "price": decimal.Decimal("3.50"),
        "pieces": decimal.Decimal("3.00"),
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    source = Source(uri=f"parquet:{tmp_path}/a.parquet", boxes="box", name="{price} {pieces}")
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", 1)["a"]
    after = open_examples("a", replace(source, uri=packed["uri"]), Data(), 16)
    assert after[0].suffix == open_examples("a", source, Data(), 16)[0].suffix
    assert after[0].suffix.endswith(" 3.50 3")
    assert after.record(0)[0]["day"] == "2026-11-28"
