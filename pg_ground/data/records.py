"""What a reader gives (records by index) and what they hold that is no plain value: images, and the reasons to skip one."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from pg_ground.config import Source
from pg_ground.types import FilePath, expand_path

CANNOT_DECODE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
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
    def root(self) -> FilePath | None:
        """Folder that file names in the records are relative to; None where records have no files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Returns record `index`, or raises `BadRecord`."""
        ...


def to_path(name: str) -> FilePath:
    """Returns the path of a file or folder. A leading `~` is the home directory; `gs://` and the like are remote."""
    return epath.Path(name) if "://" in name else Path(expand_path(name))


def image_folder(records: Records, source: Source) -> FilePath | None:
    """Returns the folder that file names of images are relative to. Returns None if the records have no files."""
    return records.root / expand_path(source.image_root) if records.root else None


def load_image(value: object, root: FilePath | None) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of `open_image`."""
    return np.asarray(open_image(value, root))


def open_image(value: object, root: FilePath | None) -> Image.Image | UInt8[np.ndarray, "H W 3"]:
    """Returns an image as RGB, upright by its EXIF orientation, decoded. An alpha channel is dropped, not blended.

    Args:
      value: pixels, an encoded image, the name of an image file, or Hugging Face's {bytes, path} of the two.
      root: folder that the name is relative to.

    Raises:
      BadRecord: missing_image or corrupt_image.
    """
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if isinstance(value, np.ndarray):
        return _rgb_of_array(value)
    if isinstance(value, bytes):
        return _decode(io.BytesIO(value), f"{len(value)} bytes")
    if isinstance(value, str) and value and "\0" not in value:
        path = (root or Path()) / value
        try:
            with path.open("rb") as file:
                return _decode(file, str(path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadRecord("missing_image", f"there is no file {path}") from None
        except OSError as error:
            raise BadRecord(
                "missing_image", f"{path} cannot be read: {error.strerror or error}"
            ) from None
    raise BadRecord(
        "missing_image", f"the image is {value!r:.60}, neither pixels, nor bytes, nor a file name"
    )


def _rgb_of_array(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    grey = pixels.ndim == 2
    if (
        pixels.dtype != np.uint8
        or not (grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
        or 0 in pixels.shape
    ):
        raise BadRecord(
            "corrupt_image", f"pixels are {pixels.dtype}{list(pixels.shape)}, not uint8[H, W, 3]"
        )
    return np.repeat(pixels[..., None], 3, axis=2) if grey else pixels[..., :3]


def _decode(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            image.load()  # now, while the file is open; what is RGB already is not copied again
            return image if image.mode == "RGB" else _eight_bits(image).convert("RGB")
    except UnidentifiedImageError as e:
        raise BadRecord("corrupt_image", f"{name}: no image format that Pillow knows") from e
    except CANNOT_DECODE as e:
        raise BadRecord("corrupt_image", f"{name}: {e}") from e


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a 16-bit grey image by its upper byte; Pillow's own conversion to RGB would saturate it."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
