"""Images as people bring them: text that holds an image, and names in another spelling."""

import base64
import io
import json
import logging
import os
import unicodedata
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pg_ground.config import Data, Fetch, Source
from pg_ground.data.datasets import open_examples
from pg_ground.data.image_values import image_name
from pg_ground.data.images import load_image, open_oriented
from pg_ground.data.packing import pack
from pg_ground.data.prefetching import image_urls
from pg_ground.data.records import BadRecord
from pg_ground.evals.prediction import read_image

SHARED = Path(__file__).parents[2] / "shared"

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()


def source_of(folder: Path, *images: object, **settings) -> Source:
    """Returns a source of one record for each image value, in a JSON file."""
    records = [{"image": image, "phrase": "cat", "box": [0, 0, 5, 5]} for image in images]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return Source(uri=f"jsonl:{folder}/a.jsonl", boxes="box", **settings)


def fault(value: object, root: Path | None = None) -> tuple[str, str]:
    with pytest.raises(BadRecord) as bad:
        load_image(value, root)
    return bad.value.kind, str(bad.value)


FORMS = {
    "base64": TEXT,
    "lines": base64.encodebytes(PNG).decode(),
    "url-safe": base64.urlsafe_b64encode(PNG).decode(),
    "no padding": TEXT.rstrip("="),
    "spaces around": f" \n{TEXT}\n",
    "data URI": f"data:image/png;base64,{TEXT}",
    "charset": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "capitals": f"DATA:image/png;BASE64,{TEXT}",
    "wrong type": f"data:image/jpeg;base64,{TEXT}",
    "percent-coded base64": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "percent-coded bytes": f"data:image/png,{quote(PNG)}",
    "bytes": {"bytes": TEXT, "path": None},
    "bytes with a path": {"bytes": TEXT, "path": "nowhere.png"},
    "other fields": {"bytes": TEXT, "width": 9, "height": 6},
    "list": [TEXT],
    "list of objects": [{"bytes": f"data:image/png;base64,{TEXT}"}],
    "list of lists": [[TEXT]],
}


@pytest.mark.parametrize("form", FORMS)
def test_text_that_holds_an_image_is_that_image(tmp_path, form):
    example = open_examples("a", source_of(tmp_path, FORMS[form]), Data(), 16)[0]
    assert example.size == (9, 6)
    np.testing.assert_array_equal(load_image(FORMS[form], None), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_base64_text_of_every_format_is_no_file_name(kind):
    if kind == "AVIF" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow has no AVIF")
    text = base64.b64encode(encoded(kind)).decode()
    assert load_image(text, None).shape == (6, 9, 3) and image_name(text) is None
    assert load_image(text.encode(), None).shape == (6, 9, 3)
    safe = base64.urlsafe_b64encode(encoded(kind)).decode()
    assert load_image(safe, None).shape == (6, 9, 3) and image_name(safe) is None


def test_an_example_says_how_its_image_was_read(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    source = source_of(tmp_path, "a b.png", "A%20B.png", TEXT)
    examples = open_examples("a", source, Data(), 16)
    notes = [examples[index].notes for index in range(3)]
    assert notes == [(), ("name read with %XX decoded and in other case",), ()]


def test_text_that_cannot_be_an_image_is_one_short_line():
    long = base64.b64encode(bytes(range(256)) * 400).decode()
    for value, kind, text in (
        (TEXT[: len(TEXT) // 2], "corrupt_image", f"base64 text of {len(TEXT) // 2} characters"),
        (TEXT[:61] + "*" + TEXT[61:], "corrupt_image", "that cannot be decoded"),
        (f"data:image/png;base64,{TEXT[:80]}", "corrupt_image", "a data URI of 102 characters"),
        ("data:image/png;base64,A", "corrupt_image", "base64 text of 1 characters that cannot"),
        ("data:image/png;base64", "corrupt_image", "a data URI of 21 characters without a comma"),
        (f"data:image/svg+xml,{quote('<svg/>')}", "corrupt_image", "no image format"),
        (long, "corrupt_image", f"base64 text of {len(long)} characters"),
        ({"bytes": long}, "corrupt_image", f"base64 text of {len(long)} characters"),
        (long + "?", "missing_image", "File name too long"),
        ({"bytes": None, "path": None}, "missing_image", "None"),
        ({"url": long, long: 1}, "missing_image", "its fields are 'url', "),
        ([], "missing_image", "an empty list"),
        (
            ["a.png", "b.png"],
            "missing_image",
            "list of 2: name one by its number, as in images.0",
        ),
        (["a.png"] * 5000, "missing_image", "a list of 5000"),
        ("foo://" + long, "missing_image", "an address that is not read"),
        ("a\nb.png", "missing_image", r"a\nb.png"),
        ("a\x1b[31m\ud800.png", "missing_image", r"a\x1b[31m\ud800.png"),
    ):
        kind_of_fault, message = fault(value)
        assert kind_of_fault == kind and text in message
        assert len(message) < 400 and message.isprintable()


def test_a_list_of_one_image_is_that_image(tmp_path):
    (tmp_path / "0.png").write_bytes(PNG)
    source = source_of(tmp_path, ["0.png"], [{"path": "0.png"}], ["0.png", "0.png"])
    examples = open_examples("a", source, Data(), 16)
    assert [examples[i].size for i in (0, 1)] == [(9, 6)] * 2
    with pytest.raises(BadRecord, match=r"images.0"):
        examples[2]


SPELLINGS = {
    # file name: (name in the record, note)
    "sub/a.png": (r"sub\a.png", "name read with / for \\"),
    "a b.png": ("a%20b.png", "name read with %XX decoded"),
    "sub/ü c.png": (r"sub\%C3%BC%20c.png", "name read with / for \\ and with %XX decoded"),
    "B.PNG": ("b.png", "name read in other case"),
    "Sub2/c.jpeg": ("sub2/C.JPEG", "name read in other case"),
    "Sub3/d.png": (r"SUB3\D.png", "name read with / for \\ and in other case"),
    unicodedata.normalize("NFD", "é.png"): (
        unicodedata.normalize("NFC", "é.png"),
        "name read in the Unicode form NFD",
    ),
    unicodedata.normalize("NFC", "ñ.png"): (
        unicodedata.normalize("NFD", "ñ.png"),
        "name read in the Unicode form NFC",
    ),
    # Exact names win.
    "100%25.png": ("100%25.png", ""),
    r"e\f.png": (r"e\f.png", ""),
}


@pytest.mark.parametrize("file", SPELLINGS)
def test_a_name_in_another_spelling_is_that_file(tmp_path, file):
    name, note = SPELLINGS[file]
    path = tmp_path / "images" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(PNG)
    source = source_of(tmp_path, name, image_root="images")
    assert open_examples("a", source, Data(), 16)[0].size == (9, 6)
    assert open_oriented(name, tmp_path / "images").note == note


def test_a_file_uri_is_a_file_of_this_machine(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    path = quote(str(tmp_path / "a b.png"))
    for uri in (f"file://{path}", f"file://localhost{path}", f"FILE:{path}"):
        source = source_of(tmp_path, uri, {"path": uri}, [uri])
        examples = open_examples("a", source, Data(), 16)
        assert [examples[i].size for i in range(3)] == [(9, 6)] * 3
        assert image_name(uri) == str(tmp_path / "a b.png")
    kind, message = fault(f"file://server{path}")
    assert kind == "missing_image" and "a file of the machine 'server'" in message
    kind, message = fault(f"file://{path}2")
    assert kind == "missing_image" and "the nearest names are a b.png" in message


def test_files_that_differ_in_case_only_are_not_chosen_between(tmp_path):
    for name in ("a.png", "A.png"):
        (tmp_path / name).write_bytes(PNG)
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("names of this file system have no case")
    assert fault("a.PNG", tmp_path)[0] == "missing_image"
    assert fault("a.PNG", tmp_path)[1].endswith("a.PNG, but A.png and a.png")
    # Another Unicode form is nearer than another case.
    (tmp_path / unicodedata.normalize("NFD", "É.png")).write_bytes(PNG)
    (tmp_path / unicodedata.normalize("NFD", "é.png")).write_bytes(PNG)
    assert open_oriented("é.png", tmp_path).note == "name read in the Unicode form NFD"


def test_a_missing_file_has_the_three_nearest_names(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in (2, 7, 10, 11):
        (images / f"photo{number}.jpg").write_bytes(PNG)
    (images / "list.txt").write_text("")
    kind, message = fault("photo1.jpg", images)
    assert kind == "missing_image" and "photo1.jpg; the nearest names are photo" in message
    nearest = message.partition("are ")[2].split(", ")
    assert len(nearest) == 3 and {"photo10.jpg", "photo11.jpg"} < set(nearest)
    text = fault("imagse/photo2.jpg", tmp_path)[1]
    assert "imagse/photo2.jpg: the folder imagse is not there; the nearest names are images" in text
    text = fault(r"C:\data\images\photo2.jpg", images)[1]
    assert "the folder C: is not there; the nearest names are photo2.jpg" in text
    assert fault("train/photo2.jpg", images)[1].count("photo2.jpg") == 2
    assert fault(".", images)[1].endswith("images is a folder, no file")
    (tmp_path / "empty").mkdir()
    assert fault("a.png", tmp_path / "empty")[1].endswith("empty/a.png")


def test_a_missing_name_is_compared_with_names_of_the_same_end_in_a_large_folder(tmp_path):
    for number in range(1000):
        (tmp_path / f"COCO_{number:06d}.jpg").touch()
    assert fault("train2014_000777.jpg", tmp_path)[1].partition("are ")[2].startswith("COCO_000777")
    assert fault("COCO_000777.png", tmp_path)[1].partition("are ")[2].startswith("COCO_000777")
    (tmp_path / "COCO_x.jpg").touch()
    assert fault("COCO_xy.jpg", tmp_path)[1].partition("are ")[2].startswith("COCO_x.jpg")


def test_an_error_quotes_at_most_200_characters_of_a_name(tmp_path):
    for name in ("x" * 200 + ".png", "a." * 2500, "d/" * 1000 + "a.png", "ü" * 120):
        kind, message = fault(name, tmp_path)
        assert kind == "missing_image" and len(message) < 400


def test_urls_in_lists_and_objects_are_fetched(tmp_path):
    url = "http://example.com/a.png"
    source = source_of(tmp_path, url, [url], {"bytes": None, "path": url}, TEXT, "b.png")
    data = Data(fetch=Fetch(cache_dir=str(tmp_path / "cache"), offline=True))
    assert [pair[0] for pair in image_urls([{"a": source}], data, 0)] == [url] * 3
    examples = open_examples("a", source, data, 16)
    for index in range(3):
        with pytest.raises(BadRecord) as bad:
            examples[index]
        assert bad.value.kind == "not_fetched"


def test_packed_records_keep_the_names_of_their_images(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    names = ("a b.png", "a%20b.png", f"data:image/png;base64,{TEXT}", ["a b.png"], "none.png")
    source = source_of(tmp_path, *names)
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", 1)["a"]
    assert (packed["records"], packed["missing_image"]) == (4, 1)
    (tmp_path / "a b.png").unlink()
    examples = open_examples("a", Source(uri=packed["uri"], boxes="box"), Data(), 16)
    values = [examples.record(index)[0]["image"] for index in range(4)]
    assert values == [
        {"bytes": PNG, "path": "a b.png"},
        {"bytes": PNG, "path": "a%20b.png"},
        PNG,
        {"bytes": PNG, "path": "a b.png"},
    ]
    assert [examples[index].size for index in range(4)] == [(9, 6)] * 4


def test_predict_says_that_it_reads_a_name_in_another_spelling(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(PNG)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_image(tmp_path / "A.png"), PIXELS)
    assert "name read in other case" in caplog.text


ODD_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.floats(),
        st.text(st.characters(codec=None), max_size=20),
        st.text("ab/\\.%2~:[]", max_size=12),
        st.binary(max_size=20),
        st.sampled_from([TEXT, PNG, "0.png", "data:,", "file://", "/9j/" + "A" * 41, "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["bytes", "path", "url"]), inner, max_size=2),
        inner.map(lambda value: f"data:image/png;base64,{value}"),
        inner.map(lambda value: f"data:,{value}"),
        inner.map(lambda value: f"file://{value}"),
    ),
    max_leaves=4,
)


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=ODD_VALUES)
def test_every_other_value_is_one_bad_record(tmp_path, value):
    (tmp_path / "0.png").write_bytes(PNG)
    try:
        pixels = load_image(value, tmp_path)
    except BadRecord as bad:
        assert bad.kind in ("missing_image", "corrupt_image")
        assert len(str(bad)) <= 401 and str(bad).isprintable()
    else:
        np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="shared/cases is not here")
@pytest.mark.parametrize("name", ["datauri", "plain", "struct"])
def test_images_in_base64_have_their_size(name):
    path = SHARED / "cases" / "11-images-in-base64" / f"{name}.jsonl"
    examples = open_examples("a", Source(uri=f"jsonl:{path}", boxes="bbox"), Data(), 16)
    assert {examples[i].size for i in range(len(examples))} == {(200, 150)}


@pytest.mark.skipif(not (SHARED / "cases").exists(), reason="shared/cases is not here")
@pytest.mark.parametrize("path", ["images", "images.0", "images[0]", "images.-1", "images[]"])
def test_a_list_of_one_image_of_ms_swift_is_that_image(path):
    file = SHARED / "cases" / "10-chat-messages-with-images-list" / "swift.jsonl"
    source = Source(uri=f"jsonl:{file}", image=path, boxes="objects.bbox", label="objects.ref")
    examples = open_examples("a", source, Data(), 16)
    assert len(examples) == 8 and {examples[i].size for i in range(8)} == {(80, 60)}
    assert examples[0].suffix == "<loc0085><loc0064><loc0426><loc0320> red square"
