import hashlib
import io
import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pg_ground.config import Data, Fetch, Source
from pg_ground.data import tables
from pg_ground.data.arrayrecord import write_array_record
from pg_ground.data.datasets import open_examples
from pg_ground.data.fetch import cached
from pg_ground.data.images import load_image, open_oriented
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records
from pg_ground.storage.paths import expand_path
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""The change of the stored rows that the EXIF standard demands, by orientation."""


def pixels(height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif)
    return out.getvalue()


def kind_of(value: object, root: Path | None = None) -> str:
    with pytest.raises(BadRecord) as bad:
        load_image(value, root)
    return bad.value.kind


def test_json_lines_are_read_in_any_order_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"n": 0}\n\n  \n{"n": 1, "t": "é"}\r\n{"n": 2}'.encode())
    records = open_records(f"jsonl:{path}")
    assert len(records) == 3 and records.root == tmp_path
    assert [records[i] for i in (2, 0, 1)] == [{"n": 2}, {"n": 0}, {"n": 1, "t": "é"}]


@pytest.mark.parametrize("line", [b'{"n": 1', b"[1, 2]", b'{"n": "\xff"}', b"nothing"])
def test_broken_line_is_bad_when_read_and_only_then(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n' + line + b'\n{"n": 2}\n')
    records = open_records(f"jsonl:{path}")
    assert records[0] == {"n": 0} and records[2] == {"n": 2}
    with pytest.raises(BadRecord, match="byte 9 of a.jsonl") as bad:
        records[1]
    assert bad.value.kind == "bad_json"


def test_records_that_cannot_be_opened_are_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for uri, message in (
        (f"jsonl:{tmp_path}/missing.jsonl", "missing.jsonl"),
        (f"jsonl:{tmp_path}/empty.jsonl", "empty.jsonl"),
        (f"jsonl:{tmp_path}", "directory"),
        ("jsonll:x", "did you mean jsonl"),
        ("some/path.jsonl", "jsonl:PATH"),
        ("", "jsonl:PATH"),
    ):
        with pytest.raises(UserError, match=message):
            open_records(uri)


@pytest.mark.parametrize(("uri", "reason"), [
    ("jsonl:./none.jsonl", "No such file or directory"),
    ("json:none.json#a", "No such file or directory"),
    ("jsonll:x", "no scheme 'jsonll'; did you mean jsonl?"),
    ("synthetic:trian", "synthetic:trian does not exist: did you mean train?"),
])  # fmt: skip
def test_an_entry_that_cannot_be_opened_names_the_setting_to_change(uri, reason):
    for entry, setting in (
        ("grpo/photos", "config.grpo.sources.photos.uri"),
        ("photos", "sources.photos.uri"),
    ):
        with pytest.raises(UserError) as refused:
            open_records(uri, entry)
        assert str(refused.value).startswith(f"{setting} ({uri}): {reason}")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_json_list_is_not_read_as_lines(tmp_path, monkeypatch, indent, in_memory):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"n": 0}, {"n": 1}], indent=indent) + "\n")
    if not in_memory:
        monkeypatch.setattr(tables, "MAX_BYTES_IN_MEMORY", 0)
    with pytest.raises(UserError, match=f"a JSON list does: use json:{path}$"):
        open_records(f"jsonl:{path}")
    assert len(open_records(f"json:{path}")) == 2


def test_synthetic_scenes_open_by_uri():
    records = open_records("synthetic:train?side=32")
    record = records[3]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    x1, y1, x2, y2 = record["box"]
    assert 0 <= x1 < x2 <= 32 and 0 <= y1 < y2 <= 32 and record["phrase"] and records.root is None
    assert json.dumps(records[3]["box"]) == json.dumps(record["box"])


def test_image_may_be_pixels_bytes_or_a_file_name(tmp_path):
    data = encoded(Image.fromarray(pixels()))
    (tmp_path / "a.png").write_bytes(data)
    for value, root in (
        (pixels(), None),
        (data, None),
        ("a.png", tmp_path),
        (str(tmp_path / "a.png"), None),
    ):
        np.testing.assert_array_equal(load_image(value, root), pixels())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_pixels_upright(orientation):
    stored = pixels()
    loaded = load_image(encoded(Image.fromarray(stored), orientation=orientation), None)
    np.testing.assert_array_equal(loaded, ORIENTED[orientation](stored))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_image_knows_the_frame_that_its_file_stores(kind, orientation):
    opened = open_oriented(encoded(Image.fromarray(pixels()), kind, orientation), None)
    assert (opened.orientation, opened.stored) == (orientation, (7, 5))
    assert opened.image.size == ((7, 5) if orientation < 5 else (5, 7))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_exif_does_not_define_turns_nothing(orientation):
    opened = open_oriented(encoded(Image.fromarray(pixels()), "JPEG", orientation), None)
    assert (opened.orientation, opened.stored, opened.image.size) == (1, (7, 5), (7, 5))
    assert open_oriented(pixels(), None)[1:3] == (1, (7, 5))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":
        image = Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800)
        expected = (np.asarray(image) >> 8)[..., None].repeat(3, 2)
    else:
        image = Image.fromarray(pixels()).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(
        load_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), None), expected
    )


def test_grey_and_alpha_arrays_become_rgb():
    grey = pixels()[..., 0]
    np.testing.assert_array_equal(load_image(grey, None), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(load_image(np.dstack([pixels(), grey]), None), pixels())


def test_missing_and_corrupt_images_are_distinguished(tmp_path):
    jpeg = encoded(Image.fromarray(pixels(64, 64)), "JPEG")
    png = encoded(Image.fromarray(pixels(64, 64)))
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    assert (
        kind_of("none.jpg", tmp_path)
        == kind_of("", tmp_path)
        == kind_of(None)
        == kind_of(3.0)
        == "missing_image"
    )
    assert kind_of(".", tmp_path) == "missing_image"
    assert kind_of("cut.jpg", tmp_path) == "corrupt_image"
    for data in (
        b"",
        b"text",
        jpeg[:200],
        png[: len(png) // 2],
        png[:8] + bytes(100),
        png[:60] + b"\xff" * 50 + png[110:],
    ):
        assert kind_of(data) == "corrupt_image"
    assert kind_of(pixels().astype(np.float32)) == kind_of(pixels()[:0]) == "corrupt_image"


def test_a_leading_tilde_is_the_home_directory_in_every_path_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels()).save(tmp_path / "images" / "a.png")
    row = {"image": "a.png", "phrase": "cat", "box": [0, 0, 5, 5]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "a.yaml").write_text("datasets: [{json_path: ~/a.json}]")
    (tmp_path / "prompt.jinja").write_text("find {{ phrase }}")
    write_array_record("~/a.array_record", [row])
    for uri in (
        "jsonl:~/a.jsonl",
        "json:~/a.json",
        "yaml:~/a.yaml",
        "arrayrecord:~/a.array_record",
        "arrayrecord:~/*.array_record",
        "arrayrecord:~",
    ):
        source = Source(
            uri=uri, boxes="box", image_root="~/images", prompt="~/prompt.jinja", name="{phrase}"
        )
        example = open_examples("toy", source, Data(), 14)[0]
        assert example.size == (7, 5) and example.prompt == "find cat"
    assert not (tmp_path / "~").exists()


def test_a_tilde_inside_a_path_is_part_of_a_name():
    assert expand_path("a/~b") == "a/~b" and expand_path("gs://a/~/b") == "gs://a/~/b"


def test_a_leading_tilde_is_the_home_directory_for_the_tokenizer_and_the_cache(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = resources.files("pg_ground.assets") / "tiny.model"
    (tmp_path / "my.model").write_bytes(model.read_bytes())
    assert load_tokenizer("~/my.model").vocab == load_tokenizer("").vocab
    url = "http://example.com/a.png"
    content = encoded(Image.fromarray(pixels()))
    digest = hashlib.sha256(content).hexdigest()
    blob = tmp_path / "cache" / "blobs" / digest[:2] / digest
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    assert cached(url, digest, Fetch(cache_dir="~/cache", offline=True)) == content
