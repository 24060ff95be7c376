"""Files of JSON as they come: compressed, or in another encoding than UTF-8."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable

import pyarrow as pa

from pg_ground.types import UserError

HEAD_BYTES = 512
"""As many bytes from the beginning of a file tell what the file is."""

MAX_DECODED_BYTES = 2**30
"""A compressed file may unpack to this many bytes. They are held in memory."""

COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
"""The first bytes of the compressed files that are unpacked."""

COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")

FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: unpack it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it",
    b"\x1f\x9d": "a file of compress: unpack it",
    b"\xff\x06\x00\x00sNaPpY": "a file of snappy: unpack it",
    b"PAR1": "a parquet file: use parquet:PATH",
    b"ARROW1": "an Arrow file: use arrow:PATH",
    b"SQLite format 3\x00": "a SQLite database",
    b"\xd0\xcf\x11\xe0": "an Excel sheet",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
"""The first bytes of other files, with the name of the format and what to do."""

CANNOT_UNPACK = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""Unpacking a damaged file raises one of these."""


def codec(head: bytes) -> str:
    """Returns the compression, or the encoding, of a file of JSON that begins with `head`.

    RFC 4627 defines the encodings: utf-8, utf-8-sig, utf-16, utf-16-le, utf-16-be, utf-32,
    utf-32-le, utf-32-be. The zeros in the first four bytes or the byte order mark tell which it is.
    A file without any zero is UTF-8: the quotes and colons of JSON have zeros in the other
    encodings. A byte order mark without zeros is a damaged line.
    """
    for magic, name in COMPRESSIONS.items():
        if head.startswith(magic):
            return name
    encoding = json.detect_encoding(head)
    return encoding if encoding == "utf-8-sig" or b"\0" in head else "utf-8"


def unpack(data: bytes, name: str, form: str = "JSON") -> bytes:
    """Returns the content of a file, which is unpacked if it is compressed (twice at most).

    Args:
      data: all bytes of the file.
      name: the beginning of the error's text.
      form: what the file should be, for the error.

    Raises:
      UserError: the file breaks off, is damaged, unpacks to more than `MAX_DECODED_BYTES`, or has
        another format, which the error names.
    """
    for _ in range(2):
        if codec(data[:HEAD_BYTES]) not in COMPRESSIONS.values():
            break
        data = _unpack_once(data, name)
    for magic, text in FOREIGN.items():
        if data.startswith(magic):
            raise UserError(f"{name} is not {form}, but {text}")
    if data[257:262] == b"ustar":
        raise UserError(f"{name} is not {form}, but a tar archive: unpack it")
    return data


def to_utf8(data: bytes, name: str, form: str = "JSON") -> bytes:
    """Returns the content of a file of JSON in UTF-8, without a byte order mark.

    A surrogate without its partner stays, so that only its line is no UTF-8.

    Args:
      data: all bytes of the file.
      name: the beginning of the error's text.
      form: what the file should be, for the error.

    Raises:
      UserError: see `unpack`; or the file breaks off inside a character.
    """
    data = unpack(data, name, form)
    encoding = codec(data[:HEAD_BYTES])
    if encoding == "utf-8":
        return data
    if encoding == "utf-8-sig":
        return data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is {encoding.upper()}, but not from byte {error.start} of {len(data)}: "
            f"save it as UTF-8"
        ) from error


def without_compression(name: str) -> str:
    """Returns a file name without the suffix of a compression: a.jsonl.gz is a.jsonl."""
    suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def is_plain(head: bytes) -> bool:
    """Returns whether a file that begins with `head` may be UTF-8 text, and is not compressed."""
    is_foreign = head.startswith(tuple(FOREIGN)) or head[257:262] == b"ustar"
    return codec(head) in ("utf-8", "utf-8-sig") and not is_foreign


def not_utf8(error: UnicodeDecodeError) -> str:
    """Returns the byte of a text that is no UTF-8, and what to do."""
    byte = error.object[error.start]
    encoding = error.encoding.upper()
    return f"not {encoding} (byte 0x{byte:02X} at {error.start}); save the file as UTF-8"


def _unpack_once(data: bytes, name: str) -> bytes:
    compression = codec(data[:HEAD_BYTES])
    openers: dict[str, Callable[[io.BytesIO], io.BufferedIOBase]] = {
        "gzip": lambda file: gzip.GzipFile(fileobj=file),
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
    }
    try:
        if compression in openers:
            content = openers[compression](io.BytesIO(data)).read(MAX_DECODED_BYTES + 1)
        else:
            stream = pa.CompressedInputStream(pa.BufferReader(data), compression)
            content = stream.read(MAX_DECODED_BYTES + 1)
    except CANNOT_UNPACK as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{name} is {compression} that breaks off or is damaged: {reason}"
        ) from error
    if len(content) > MAX_DECODED_BYTES:
        gibibytes = MAX_DECODED_BYTES / 2**30
        raise UserError(
            f"{name} is {compression} that unpacks to more than {gibibytes:g} GiB: unpack it first"
        )
    return content
