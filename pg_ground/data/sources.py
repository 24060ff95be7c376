"""Records by uri: `open_records("jsonl:PATH")`, `open_records("synthetic:SPLIT?side=48")`; and their images' pixels.

A record is a dict of whatever its dataset has; `examples.py` knows what a config entry calls its fields.
"""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import parse_qsl

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from pg_ground.config import nearest
from pg_ground.data import synthetic
from pg_ground.types import UserError

CANNOT_DECODE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises on a file that is no image, is cut off, or unpacks to more pixels than any photograph has."""


class BadRecord(Exception):
    """A record that cannot be used: `kind` is what it is counted under, the text says what is wrong with it."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@runtime_checkable
class Records(Protocol):
    """Random access to the records of one source. Indexing is safe from several threads."""

    @property
    def root(self) -> Path | None:
        """Folder that file names in the records are relative to; None where records have no files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Returns record `index`, or raises `BadRecord`."""
        ...


def open_records(uri: str) -> Records:
    """Returns the records that `uri` names.

    Raises:
      UserError: the scheme is unknown, the file is missing or holds no records.
    """
    scheme, separator, rest = uri.partition(":")
    if not separator or scheme not in SCHEMES:
        raise UserError(f"source uri {uri!r}: no scheme {scheme!r}; {nearest(scheme, SCHEMES)} (as in jsonl:PATH)")
    return SCHEMES[scheme](rest)


class JsonLines:
    """The lines of a file, each one JSON object; blank lines do not count. Lines are found once and read on demand."""

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                self._spans = _line_spans(file)
        except OSError as e:
            raise UserError(f"source jsonl:{path}: {e.strerror or e}") from e
        if not self._spans:
            raise UserError(f"source jsonl:{path}: the file has no lines; each record is one JSON object on a line")
        self._path = path

    @property
    def root(self) -> Path:
        return self._path.parent

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = self._spans[index]
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(length)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadRecord("bad_json", f"byte {start} of {self._path.name}: {e}") from e
        if not isinstance(record, dict):
            raise BadRecord("bad_json", f"byte {start} of {self._path.name}: {record!r:.60} is not a JSON object")
        return record


def load_image(value: object, root: Path | None) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image as RGB, upright by its EXIF orientation. An alpha channel is dropped, not blended.

    Args:
      value: pixels, an encoded image, or the name of an image file.
      root: folder that the name is relative to.

    Raises:
      BadRecord: missing_image or corrupt_image.
    """
    if isinstance(value, np.ndarray):
        return _rgb_of_array(value)
    if isinstance(value, bytes):
        return _decode(io.BytesIO(value), f"{len(value)} bytes")
    if isinstance(value, str) and value:
        path = (root or Path()) / value
        if not path.is_file():
            raise BadRecord("missing_image", f"there is no file {path}")
        return _decode(path, str(path))
    raise BadRecord("missing_image", f"the image is {value!r:.60}, neither pixels, nor bytes, nor a file name")


def _open_json_lines(rest: str) -> Records:
    return JsonLines(Path(rest))


def _open_synthetic(rest: str) -> Records:
    split, _, options = rest.partition("?")
    return synthetic.open_scenes(split, dict(parse_qsl(options, keep_blank_values=True)))


SCHEMES = {"jsonl": _open_json_lines, "synthetic": _open_synthetic}


def _line_spans(file: io.BufferedReader) -> list[tuple[int, int]]:
    """Returns (offset, length) in bytes of every line that is not blank."""
    spans = []
    start = 0
    for line in file:
        if not line.isspace():
            spans.append((start, len(line)))
        start += len(line)
    return spans


def _rgb_of_array(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or 0 in pixels.shape:
        raise BadRecord("corrupt_image", f"pixels are {pixels.dtype}{list(pixels.shape)}, not uint8[H, W, 3]")
    return np.repeat(pixels[..., None], 3, axis=2) if grey else pixels[..., :3]


def _decode(file: io.BytesIO | Path, name: str) -> UInt8[np.ndarray, "H W 3"]:
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(_eight_bits(upright).convert("RGB"))
    except UnidentifiedImageError as e:
        raise BadRecord("corrupt_image", f"{name}: no image format that Pillow knows") from e
    except CANNOT_DECODE as e:
        raise BadRecord("corrupt_image", f"{name}: {e}") from e


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a 16-bit grey image by its upper byte; Pillow's own conversion to RGB would saturate it."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
