"""Values of an image field: pixels, encoded bytes, text that holds an image, and names of files."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np

from pg_ground.data.records import BadRecord, check_usable, short

DATA_URI = re.compile(r"\s*data:", re.IGNORECASE)

FILE_URI = re.compile(r"file:/", re.IGNORECASE)

LONGEST_PATH = 4096
"""Characters. Linux opens no file with a longer name."""

_DIGITS = r"[A-Za-z0-9+/_=\s-]"

_SIGNATURES = (
    *("[/_]9j[/_]", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk[0-3]", "SUkq", "TU0AK"),
    *("AAAA..Z0eXB", "AAAADGpQ"),
)
"""The first bytes of JPEG, PNG, GIF, WebP, BMP, both TIFFs, AVIF and JPEG 2000, in base64.

JPEG's bytes are other signs in the alphabet for addresses.
"""

BASE64_IMAGE = re.compile(rf"\s*(?:{'|'.join(_SIGNATURES)}){_DIGITS}{{40,}}")
"""How the base64 text of an image begins."""

BASE64 = re.compile(rf"{_DIGITS}+")

URL_SAFE = str.maketrans("-_", "+/")
"""The alphabet of base64 for addresses → the usual alphabet."""


def plain_image(value: object) -> np.ndarray | bytes | str:
    """Returns the pixels, the encoded bytes, or the file name or url in an image field.

    `unwrap` and `holds_image` describe the forms of `value` besides these three. The result is
    pixels or bytes of any kind: they may be no image.

    Raises:
      BadRecord: missing_image, if there is no image or there are several; corrupt_image, if base64
        text or a data URI cannot be decoded.
    """
    value = unwrap(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _from_bytes(bytes(value))
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadRecord(
            "missing_image",
            f"the image is {short(value)}: it must be pixels, bytes, base64 text or a file name",
        )
    if DATA_URI.match(value):
        return _from_data_uri(value)
    return _from_base64(value) if holds_image(value) else _file_name(value)


def image_name(value: object) -> str | None:
    """Returns the file name or url in an image field.

    Returns None for pixels, for bytes without a name, and for text that holds the image itself.

    Raises:
      BadRecord: missing_image, if there are several images, or the name is on another machine.
    """
    while isinstance(value, list | tuple | Mapping):
        value = value.get("path") if isinstance(value, Mapping) else _only_item(value)
    if not isinstance(value, str) or not value or holds_image(value):
        return None
    return _file_name(value)


def holds_image(text: str) -> bool:
    """Returns whether a text is a data URI or base64 text, and so no name of a file.

    Base64 text begins like an image of a common format, or is too long for a file name.
    """
    if DATA_URI.match(text) or BASE64_IMAGE.match(text):
        return True
    return len(text) > LONGEST_PATH and BASE64.fullmatch(text) is not None


def text_kind(text: str | bytes) -> str:
    """Returns the form and the length of text that holds an image, for errors."""
    start = text[:100] if isinstance(text, str) else text[:100].decode("latin-1")
    form = "a data URI" if DATA_URI.match(start) else "base64 text"
    return f"{form} of {len(text)} characters"


def unwrap(value: object) -> Any:
    """Returns the item of a list of one image, and the bytes or else the path of {bytes, path}.

    Returns other values unchanged.

    Raises:
      BadRecord: missing_image, if there are several images or none; or the fault of a packed image.
    """
    while isinstance(value, list | tuple | Mapping):
        value = _inner_image(value) if isinstance(value, Mapping) else _only_item(value)
    return value


def _inner_image(fields: Mapping[str, object]) -> object:
    """Returns the bytes of {bytes, path}, or else the path."""
    check_usable(fields)
    if not {"bytes", "path"} & fields.keys():
        names = ", ".join(short(name, 20) for name in list(fields)[:5]) or "none"
        raise BadRecord(
            "missing_image",
            f"the image is an object without bytes and path; its fields are {names}: "
            "name one in the source's image path, as in image.url",
        )
    content = fields.get("bytes")
    is_empty = content is None or (isinstance(content, str | bytes) and not content)
    return fields.get("path") if is_empty else content


def _only_item(items: Sequence[object]) -> object:
    if not items:
        raise BadRecord("missing_image", "the image is an empty list")
    if len(items) > 1:
        raise BadRecord(
            "missing_image",
            f"the image is a list of {len(items)}: name one by its number, as in images.0",
        )
    return items[0]


def _from_bytes(content: bytes) -> bytes:
    """Returns bytes unchanged, or decoded if they are base64 text or a data URI."""
    start = content[:100].decode("latin-1")
    if DATA_URI.match(start):
        return _from_data_uri(content.decode("latin-1"))
    return _from_base64(content.decode("latin-1")) if BASE64_IMAGE.match(start) else content


def _from_data_uri(uri: str) -> bytes:
    """Returns the content of data:[type][;base64],content."""
    header, comma, content = uri.partition(",")
    if not comma:
        raise BadRecord(
            "corrupt_image", f"the image is a data URI of {len(uri)} characters without a comma"
        )
    if not header.rstrip().lower().endswith(";base64"):
        return unquote_to_bytes(content.encode("utf-8", "replace"))
    return _from_base64(unquote(content) if "%" in content else content)


def _from_base64(text: str) -> bytes:
    """Returns what base64 text of either alphabet says. It may have white space and no padding."""
    digits = "".join(text.split()).rstrip("=").translate(URL_SAFE)
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise BadRecord(
            "corrupt_image",
            f"the image is base64 text of {len(text)} characters that cannot be decoded",
        ) from None


def _file_name(name: str) -> str:
    """Returns the path of a file: URI. Returns other names unchanged."""
    if not FILE_URI.match(name):
        return name
    try:
        parts = urlsplit(name)
    except ValueError as error:
        raise BadRecord("missing_image", f"the image is {short(name)}: {error}") from None
    if parts.netloc not in ("", "localhost"):
        raise BadRecord(
            "missing_image",
            f"the image is {short(name)}, a file of the machine {short(parts.netloc)}: "
            "write file:///PATH for a file of this machine",
        )
    return url2pathname(parts.path)
