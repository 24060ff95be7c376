"""Images of 16 bits, 32 bits and floats, from a record in a file to the pixels of an example."""

import io
import json
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pg_ground.config import Data, Fetch, Source
from pg_ground.data.arrayrecord import write_array_record
from pg_ground.data.datasets import open_examples
from pg_ground.data.images import load_image, load_nonzero, open_oriented
from pg_ground.data.masks import whole_masks
from pg_ground.data.packing import encoded_image, pack
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import measure_budget
from pg_ground.evals.prediction import read_image
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
"""Every brightness from black to white."""

PERCENTILE = Data(deep_images="percentile")


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def big_endian_tiff(pixels: np.ndarray) -> bytes:
    """Returns a TIFF of 16 bits, high byte first. Pillow reads its pixels as I;16B."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.frombytes("I;16B", pixels.shape[::-1], pixels.astype(">u2").tobytes())
    file = io.BytesIO()
    image.save(file, "TIFF")
    return file.getvalue()


DEEP_FILES = {
    "PNG of 16 bits": encoded((RAMP * 65535).astype(np.uint16), "PNG"),
    "TIFF of 16 bits": encoded((RAMP * 65535).astype(np.uint16), "TIFF"),
    "TIFF of 16 bits, high byte first": big_endian_tiff(RAMP * 65535),
    "JPEG 2000 of 16 bits": encoded((RAMP * 65535).astype(np.uint16), "JPEG2000"),
    "PGM of 16 bits": b"P5 64 64 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
    "PGM of 12 bits": b"P5 64 64 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
    "TIFF of 32 bits with 16": encoded((RAMP * 65535).astype(np.int32), "TIFF"),
    "TIFF of 32 bits with 8": encoded((RAMP * 255).astype(np.int32), "TIFF"),
    "TIFF of 32 bits": encoded((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
    "TIFF of floats": encoded(RAMP.astype(np.float32), "TIFF"),
}


def source_of(folder, content: bytes) -> Source:
    (folder / "deep.img").write_bytes(content)
    record = {"image": "deep.img", "phrase": "cat", "box": [0, 0, 5, 5]}
    (folder / "a.jsonl").write_text(json.dumps(record))
    return Source(uri=f"jsonl:{folder}/a.jsonl", boxes="box")


@pytest.mark.parametrize("kind", DEEP_FILES)
def test_a_ramp_stays_a_ramp(tmp_path, kind):
    source = source_of(tmp_path, DEEP_FILES[kind])
    image = open_examples("a", source, Data(), 64)[0].image
    assert image.shape == (64, 64, 3)
    np.testing.assert_allclose(image[..., 0], RAMP * 255, atol=1.01)
    assert (image == 255).mean() < 0.02 and (image == 0).mean() < 0.02
    stretched = open_examples("a", source, PERCENTILE, 64)[0].image
    np.testing.assert_allclose(
        stretched[..., 0], np.clip((RAMP - 0.01) / 0.98, 0, 1) * 255, atol=1.5
    )
    method = "dtype"
    assert open_oriented("deep.img", tmp_path).note.endswith(f"pixels scaled by {method}")


DEEP_ARRAYS = {
    "uint16": (RAMP * 65535).astype(np.uint16),
    "uint16, one channel": (RAMP * 65535).astype(np.uint16)[..., None],
    "uint16, RGB": np.stack([(RAMP * 65535).astype(np.uint16)] * 3, -1),
    "uint32": (RAMP * (2**32 - 1)).astype(np.uint32),
    "int16": (RAMP * 32767).astype(np.int16),
    "int8": (RAMP * 127).astype(np.int8),
    "int64 of 0 to 255": (RAMP * 255).astype(np.int64),
    "float16": RAMP.astype(np.float16),
    "float64, RGBA": np.stack([RAMP] * 4, -1),
    "float32 after a filter that overshoots": (RAMP * 1.001 - 0.0005).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEEP_ARRAYS)
def test_arrays_of_every_type_are_read_by_the_same_rule(kind):
    pixels = load_image(DEEP_ARRAYS[kind], None)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[..., 0], RAMP * 255, atol=3.01)


def test_booleans_are_black_and_white():
    np.testing.assert_array_equal(
        load_image(RAMP > 0.5, None)[..., 1], (RAMP > 0.5) * np.uint8(255)
    )


def test_values_outside_of_the_range_of_a_type_need_the_percentiles(tmp_path):
    with_nan = RAMP.astype(np.float32) * 100
    with_nan[0, :3] = np.nan, np.inf, -np.inf
    for pixels, text in (
        ((RAMP * 815 - 3).astype(np.float32), "float32 from -3 to 812, but the range of floats is"),
        (with_nan, "to 100 with NaN or infinity, but the range of floats is 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "float32 with NaN or infinity"),
        ((RAMP * 4000 - 1000).astype(np.int32), "int32 from -1000 to 3000, but negative values"),
    ):
        source = source_of(tmp_path, encoded(pixels, "TIFF"))
        with pytest.raises(BadRecord) as bad:
            open_examples("a", source, Data(), 64)[0]
        assert bad.value.kind == "corrupt_image" and text in str(bad.value)
        assert "set data.deep_images to percentile" in str(bad.value)
        image = open_examples("a", source, PERCENTILE, pixels.shape[0])[0].image
        assert image[0, 0, 0] == 0 and (np.isnan(pixels).all() or image[-1, -1, 0] == 255)
        np.testing.assert_array_equal(load_image(pixels, None, "percentile"), image)
    with pytest.raises(BadRecord, match="pixels are <U1"):
        load_image(np.full((4, 4), "a"), None)


def test_percentiles_of_few_values_divide_by_no_zero():
    constant = np.full((8, 8), 7, np.uint16)
    assert not load_image(constant, None, "percentile").any()
    constant[0, 0] = 9  # the 99th percentile is still 7
    assert load_image(constant, None, "percentile")[..., 0].ravel().tolist() == [255] + [0] * 63
    eight_bits = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(load_image(eight_bits, None, "percentile")[..., 0], eight_bits)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_mask_of_object_numbers_covers_its_objects(tmp_path, dtype):
    numbers = np.zeros((6, 8), dtype)
    numbers[1:3, 2:5], numbers[4:, 6:] = 1, 5
    file = encoded(numbers, "TIFF")
    (tmp_path / "mask.tif").write_bytes(file)
    for value in (numbers, numbers[..., None], file, "mask.tif", {"bytes": file, "path": None}):
        np.testing.assert_array_equal(whole_masks(value, 1, (8, 6), tmp_path)[0], numbers != 0)
    np.testing.assert_array_equal(load_nonzero(numbers > 0, None), numbers > 0)
    with pytest.raises(BadRecord, match="covers no pixel"):
        whole_masks(np.zeros((6, 8), dtype), 1, (8, 6), tmp_path)


def test_undefined_values_of_a_mask_belong_to_no_object():
    mask = np.array([[np.nan, 0.0], [2.0, -1.0]], np.float32)
    assert load_nonzero(mask, None).tolist() == [[False, False], [True, True]]


def test_packed_sources_keep_the_depth_of_their_images(tmp_path):
    floats = (RAMP * 815 - 3).astype(np.float32)
    source = source_of(tmp_path, encoded(floats, "TIFF"))
    packed = pack([{"a": source}], Fetch(), tmp_path / "out", 1)["a"]
    assert packed["records"] == 1
    after = open_examples("a", replace(source, uri=packed["uri"]), PERCENTILE, 64)[0]
    before = open_examples("a", source, PERCENTILE, 64)[0]
    np.testing.assert_array_equal(after.image, before.image)
    keep_depth = {"uint16", "int32", "float16", "float32", "float64"}
    for number, pixels in enumerate((*DEEP_ARRAYS.values(), floats, floats.astype(np.float64))):
        record = {"image": encoded_image(pixels, None), "phrase": "cat", "box": [0, 0, 5, 5]}
        path = tmp_path / f"{number}.array_record"
        write_array_record(path, [record])
        has_range = pixels.min() >= -1
        methods = ["dtype"] if has_range else []
        methods += ["percentile"] if pixels.ndim == 2 and pixels.dtype.name in keep_depth else []
        for method in methods:
            copy = Source(uri=f"arrayrecord:{path}", boxes="box")
            image = open_examples("b", copy, Data(deep_images=method), 64)[0].image
            expected = load_image(pixels, None, method)
            np.testing.assert_array_equal(image, expected, err_msg=f"{pixels.dtype} {method}")


def test_predict_refuses_pixels_that_have_no_range():
    with pytest.raises(UserError, match="image: the pixels are float32 from -3"):
        read_image(Image.fromarray((RAMP * 815 - 3).astype(np.float32)))
    assert read_image(Image.fromarray(RAMP.astype(np.float32))).max() == 255


def scan(bits: int, dtype: type = np.uint16) -> np.ndarray:
    return (RAMP * (2**bits - 1)).astype(dtype)


PERCENTILE_HINT = "data.deep_images = 'percentile'"

DARK_FILES = {
    "PNG of 16 bits with 12": (encoded(scan(12), "PNG"), "4095 of 65535"),
    "PNG of 16 bits with 10": (encoded(scan(10), "PNG"), "1023 of 65535"),
    "TIFF of 16 bits with 14": (encoded(scan(14), "TIFF"), "16383 of 65535"),
    "TIFF of 16 bits with 11, high byte first": (big_endian_tiff(scan(11)), "4095 of 65535"),
    "TIFF of 32 bits with 12": (encoded(scan(12, np.int32), "TIFF"), "4095 of 65535"),
    "TIFF of 32 bits with 6": (encoded(scan(6, np.int32), "TIFF"), "63 of 255"),
    "TIFF of floats to 1/16": (encoded((RAMP / 16).astype(np.float32), "TIFF"), "0.0625 of 1"),
}


@pytest.mark.parametrize("kind", DARK_FILES)
def test_files_that_the_range_of_their_type_makes_dark_are_doubted(tmp_path, kind):
    content, largest = DARK_FILES[kind]
    source = source_of(tmp_path, content)
    (doubt,) = doubts_of(source, Data(suffix_length=32))
    assert (
        f"1 of 1 images look dark: they have no value above {largest}; {PERCENTILE_HINT}" in doubt
    )
    image = open_examples("a", source, PERCENTILE, 64)[0].image
    assert image.max() == 255 and image.mean() > 100
    assert not doubts_of(source, replace(PERCENTILE, suffix_length=32))


def doubts_of(source: Source, data: Data) -> list[str]:
    return measure_budget(open_examples("a", source, data, 64), load_tokenizer(), data).doubts


@pytest.mark.parametrize("kind", DEEP_FILES)
def test_files_that_use_their_range_are_not_doubted(tmp_path, kind):
    assert not doubts_of(source_of(tmp_path, DEEP_FILES[kind]), Data(suffix_length=32))
    black = encoded(np.zeros((8, 8), np.uint16), "PNG")
    assert not doubts_of(source_of(tmp_path, black), Data(suffix_length=32))


def colour_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG of 16 bits in each of three channels, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    height, width = pixels.shape
    rows = np.repeat(pixels[..., None], 3, 2).astype(">u2").reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colours_of_16_bits_say_that_their_upper_bytes_are_read(tmp_path):
    source = source_of(tmp_path, colour_png(scan(12)))
    (doubt,) = doubts_of(source, Data(suffix_length=32))
    assert doubt.endswith("no value above 4095 of 65535; write them with 8 bits in each channel")
    source = source_of(tmp_path, colour_png(scan(16)))
    assert not doubts_of(source, Data(suffix_length=32))
    (note,) = open_examples("a", source, Data(), 64)[0].notes
    assert note == "RGB pixels of 16 bits read by their upper bytes"


def test_a_few_dark_images_are_no_doubt_and_are_counted(tmp_path):
    names = ["dark.png", "wide.png", "wide.png", "eight.png"]
    for name, pixels in (("dark", scan(12)), ("wide", scan(16)), ("eight", scan(3, np.uint8))):
        (tmp_path / f"{name}.png").write_bytes(encoded(pixels, "PNG"))
    records = [{"image": name, "phrase": "cat", "box": [0, 0, 5, 5]} for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Source(uri=f"jsonl:{tmp_path}/a.jsonl", boxes="box")
    data = Data(suffix_length=32)
    budget = measure_budget(open_examples("a", source, data, 64), load_tokenizer(), data)
    assert not budget.doubts
    note = "I;16 pixels scaled by dtype"
    assert budget.notes == {f"{note}, dark: no value above 4095 of 65535": "1 of 4", note: "2 of 4"}
