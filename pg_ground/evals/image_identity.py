"""What tells the image of a question from other images: its name, or a hash of its content."""

import hashlib
from collections.abc import Mapping

import numpy as np

from pg_ground.data.image_values import holds_image, image_name, plain_image
from pg_ground.data.records import BadRecord


def image_identity(value: object, number: int) -> str:
    """Returns the identity of the image of a record.

    It is the file name or URL, else a hash of the bytes or pixels, else the number of the record.

    Args:
      value: the image field of the record.
      number: number of the record in its source.
    """
    try:
        name = image_name(value)
        return _content_hash(plain_image(value)) if name is None else name
    except BadRecord:
        return f"record {number}"


def stated_image(value: object) -> str | int | None:
    """Returns the identity of an image that a file of predictions states; None if it states none.

    Text that holds the image itself is replaced by its hash.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, str):
        return _content_hash(value) if holds_image(value) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _content_hash(image: np.ndarray | bytes | str) -> str:
    if isinstance(image, np.ndarray):
        image = f"{image.shape} {image.dtype} ".encode() + np.ascontiguousarray(image).tobytes()
    content = image.encode() if isinstance(image, str) else image
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"
