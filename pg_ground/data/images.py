"""Images: from bytes, files and arrays to RGB pixels, and to the square that the model sees."""

import codecs
import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from pg_ground.data.image_files import find_spelling, missing_file
from pg_ground.data.image_values import plain_image, text_kind, unwrap
from pg_ground.data.pixel_depth import (
    DEEP_MODES,
    SPARE_BITS,
    dark_note,
    depth_note,
    to_eight_bits,
)
from pg_ground.data.records import BadRecord, short, short_path
from pg_ground.storage.paths import ADDRESS, PACKAGES, FilePath, join

CANNOT_DECODE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Pillow raises these if a file is no image, is cut off, or unpacks to too many pixels."""

BOM_AND_BLANKS = codecs.BOM_UTF8 + b" \t\r\n"

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was turned."""


class Opened(NamedTuple):
    """A decoded image and the frame in which its file stores it."""

    image: Image.Image | UInt8[np.ndarray, "H W 3"]
    """RGB, turned upright."""
    orientation: int
    """The EXIF orientation of the stored pixels, 1 to 8. 1 is upright."""
    stored: tuple[int, int]
    """Width and height of the stored pixels. 5 to 8 exchange the sides of the upright image."""
    note: str = ""
    """How the value was read, in words; "" if it was read as it is written."""


def load_image(
    value: object, root: FilePath | None, deep_images: str = "dtype"
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of `open_image`."""
    return np.asarray(open_image(value, root, deep_images))


def load_nonzero(value: object, root: FilePath | None) -> Bool[np.ndarray, "H W"]:
    """Returns which pixels of an image are not black. `value` is as in `open_oriented`.

    Numbers of objects in 16 bits are small: as brightness they would be black.
    """
    return np.asarray(load_image(value, root, "nonzero").any(axis=-1))


def open_image(
    value: object, root: FilePath | None, deep_images: str = "dtype"
) -> Image.Image | UInt8[np.ndarray, "H W 3"]:
    """Returns the image of `open_oriented`."""
    return open_oriented(value, root, deep_images).image


def open_oriented(value: object, root: FilePath | None, deep_images: str = "dtype") -> Opened:
    """Returns a decoded RGB image, turned upright by its EXIF orientation, and the stored frame.

    An alpha channel is dropped. It is not blended.

    Args:
      value: pixels, an encoded image, its base64 text or data URI, the name or the file: URI of an
        image file, Hugging Face's {bytes, path}, or a list of one of these.
      root: the folder that the file name is relative to.
      deep_images: how 16-bit, 32-bit and float pixels become 8 bits: a method of `to_eight_bits`.

    Raises:
      BadRecord: missing_image or corrupt_image.
    """
    inner: Any = unwrap(value)
    image = plain_image(inner)
    if isinstance(image, np.ndarray):
        pixels = _rgb_from_array(image, deep_images)
        is_deep = image.dtype != np.uint8
        note = depth_note(image, str(image.dtype), deep_images) if is_deep else ""
        return Opened(pixels, 1, (pixels.shape[1], pixels.shape[0]), note)
    if isinstance(image, bytes):
        name = f"{len(image)} bytes" if image is inner else f"the image is {text_kind(inner)}"
        return _decode(io.BytesIO(image), name, deep_images)
    return _open_file(root or Path(), image, deep_images)


def _open_file(root: FilePath, name: str, deep_images: str) -> Opened:
    address = ADDRESS.match(name)
    if address and address["scheme"] not in PACKAGES:
        raise BadRecord("missing_image", f"the image {short(name)} is an address that is not read")
    path = join(root, name)
    try:
        return _read_file(path, deep_images)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        spelling = find_spelling(root, name)
        if spelling is None:
            raise missing_file(root, name) from None
        opened = _read_file(spelling.path, deep_images)
        notes = [f"name read {spelling.note}", opened.note]
        return opened._replace(note="; ".join(filter(None, notes)))


def _read_file(path: FilePath, deep_images: str) -> Opened:
    try:
        with path.open("rb") as file:
            return _decode(file, short_path(path), deep_images)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except UnicodeEncodeError:
        raise BadRecord("missing_image", f"{short(str(path))} is no name of a file") from None
    except OSError as error:
        if not isinstance(path, Path):
            raise  # a bucket that gives no answer now may give one later
        reason = error.strerror or error
        raise BadRecord("missing_image", f"{short_path(path)} cannot be read: {reason}") from None


def _rgb_from_array(pixels: np.ndarray, deep_images: str) -> UInt8[np.ndarray, "H W 3"]:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise BadRecord(
            "corrupt_image",
            f"pixels are {pixels.dtype}{list(pixels.shape)}, but they must be [H, W] or [H, W, 3]",
        )
    pixels = to_eight_bits(pixels[..., :3], deep_images)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _decode(file: Any, name: str, deep_images: str) -> Opened:
    try:
        with Image.open(file) as image:
            # Pillow forgets how the file stores the pixels if it loads them, also for EXIF.
            is_cut = image.mode not in DEEP_MODES and ";16" in str(image.tile)
            orientation = _orientation(image)
            if orientation != 1:
                ImageOps.exif_transpose(image, in_place=True)
            image.load()  # now, while the file is open
            # Pillow's size of a TIFF is upright already before it turns the pixels.
            width, height = image.size[::-1] if orientation >= 5 else image.size
            note = _upper_bytes_note(image) if is_cut else ""
            if image.mode in DEEP_MODES:
                note = depth_note(np.asarray(image), image.mode, deep_images)
            return Opened(to_rgb(image, deep_images), orientation, (width, height), note)
    except UnidentifiedImageError as error:
        text = "an HTML page" if _is_page(file) else "no image format that Pillow knows"
        raise BadRecord("corrupt_image", f"{name}: {text}") from error
    except BadRecord as bad:
        raise BadRecord(bad.kind, f"{name}: {bad}") from None
    except CANNOT_DECODE as error:
        raise BadRecord("corrupt_image", f"{name}: {error}") from error


def _is_page(file: Any) -> bool:
    """Returns whether a file is an HTML page, which servers send for images that are gone."""
    file.seek(0)
    return file.read(200).lstrip(BOM_AND_BLANKS).lower().startswith((b"<!doctype html", b"<html"))


def _upper_bytes_note(image: Image.Image) -> str:
    """Returns how an image of several channels of 16 bits is read: Pillow drops the lower bytes."""
    largest = 256 * int(np.asarray(image.convert("RGB")).max()) + 255
    bounds = {2.0 ** (16 - spare) - 1: "65535" for spare in SPARE_BITS}
    text = f"{image.mode} pixels of 16 bits read by their upper bytes"
    return text + (dark_note(largest, bounds) if largest > 255 else "")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image. A value that EXIF does not define counts as 1."""
    value = image.getexif().get(ORIENTATION, 1)
    return int(value) if value in range(1, 9) else 1


def to_rgb(image: Image.Image, deep_images: str = "dtype") -> Image.Image:
    """Returns the image as RGB. An image that is RGB already is not copied.

    Raises:
      BadRecord: corrupt_image, by `to_eight_bits`.
    """
    if image.mode == "RGB":
        return image
    if image.mode in DEEP_MODES:
        image = Image.fromarray(to_eight_bits(np.asarray(image), deep_images))
    return image.convert("RGB")


def resize(
    image: Image.Image | UInt8[np.ndarray, "H W 3"], side: int, method: str = "antialias"
) -> UInt8[np.ndarray, "side side 3"]:
    """Returns `image` as a square of `side` pixels. The aspect ratio changes.

    Args:
      image: RGB pixels.
      side: pixels.
      method: "antialias" is Pillow's bilinear filter. "hugging_face" is Pillow's bicubic filter,
        as in the SigLIP processor. "big_vision" is bilinear without antialiasing and rounded down,
        as in its RefCOCO recipe (tf.image.resize with half-pixel centres).
    """
    is_pillow = isinstance(image, Image.Image)
    if (image.size if is_pillow else image.shape[:2]) == (side, side):
        return np.asarray(image)
    if method == "big_vision":
        return _resize_without_antialias(np.asarray(image), side)
    kernel = Image.Resampling.BICUBIC if method == "hugging_face" else Image.Resampling.BILINEAR
    return np.asarray((image if is_pillow else Image.fromarray(image)).resize((side, side), kernel))


class _Neighbours(NamedTuple):
    """For each new pixel along an axis: the two old pixels beside its centre."""

    first: Int[np.ndarray, " side"]
    second: Int[np.ndarray, " side"]
    weight: Float[np.ndarray, " side"]
    """The weight of `second`, in [0, 1)."""


def _resize_without_antialias(
    image: UInt8[np.ndarray, "H W 3"], side: int
) -> UInt8[np.ndarray, "side side 3"]:
    rows, columns = (_neighbours(length, side) for length in image.shape[:2])
    shrunk = _interpolate(image.astype(np.float32), rows, 0)
    return np.clip(_interpolate(shrunk, columns, 1), 0, 255).astype(np.uint8)


def _neighbours(length: int, side: int) -> _Neighbours:
    centres = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(length / side) - 0.5
    low = np.floor(centres)
    first, second = (np.clip(i, 0, length - 1).astype(np.int64) for i in (low, low + 1))
    return _Neighbours(first, second, (centres - low).astype(np.float32))


def _interpolate(
    image: Float[np.ndarray, "H W 3"], neighbours: _Neighbours, axis: int
) -> Float[np.ndarray, "h w 3"]:
    low = image.take(neighbours.first, axis)
    high = image.take(neighbours.second, axis)
    weight = neighbours.weight
    return low + (high - low) * (weight[:, None, None] if axis == 0 else weight[None, :, None])
