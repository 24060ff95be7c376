"""Pixels of 16 bits, 32 bits and floats → pixels of 8 bits."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from pg_ground.data.records import BadRecord

METHODS = ("dtype", "percentile", "nonzero")
"""The values of `data.deep_images`, and `nonzero`: every value but 0 is white, as in masks."""

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""The modes of Pillow with more than eight bits. Its conversion to RGB clips them to white."""

FLOAT_TOLERANCE = 1e-3
"""Resizing filters overshoot. Values this far outside of [0, 1] are clipped."""


DARK = "dark: no value above"
"""How a note on an image begins that the range of its type makes dark."""

SPARE_BITS = (6, 4, 2)
"""The upper bits that an image must leave unused to be dark: 10, 12 and 14 of 16 bits are used."""


def depth_note(pixels: np.ndarray, name: str, method: str) -> str:
    """Returns in words how pixels become 8 bits, and that they become dark if they do.

    Cameras and scanners write 10, 12 or 14 bits as numbers of 16 bits. Dark images of 16 bits look
    the same, so this is no reason for another rule.

    Args:
      pixels: numbers of more than 8 bits.
      name: their type or mode.
      method: as in `to_eight_bits`.
    """
    note = f"{name} pixels scaled by {method}"
    if method != "dtype" or pixels.dtype.kind not in "uif" or not pixels.size:
        return note
    if pixels.dtype.kind == "f":
        largest = float(np.nan_to_num(pixels).max())
        bounds = {2.0**-spare: "1" for spare in SPARE_BITS}
    else:
        largest = int(pixels.max())
        bits = _range_bits(pixels, largest)
        bounds = {2 ** (bits - spare) - 1: f"{2**bits - 1}" for spare in SPARE_BITS}
    return f"{note}{dark_note(largest, bounds)}"


def dark_note(largest: float, bounds: Mapping[float, str]) -> str:
    """Returns `, dark: no value above 4095 of 65535` for the first bound that no value exceeds.

    Returns "" if there is none, or if all is black. `bounds` has the end of the range as text.
    """
    bound = next((bound for bound in bounds if 0 < largest <= bound), None)
    return "" if bound is None else f", {DARK} {bound:.6g} of {bounds[bound]}"


def to_eight_bits(pixels: np.ndarray, method: str) -> UInt8[np.ndarray, "..."]:
    """Returns pixels as 8 bits. Returns uint8 unchanged, but for `nonzero`.

    Args:
      pixels: numbers of any type.
      method: "dtype" scales the range of the type: the upper byte of 16 bits; of 32 and 64 bits, 8
        or 16 bits if all values of the image fit; 0 to 1 of floats. "percentile" stretches the 1st
        to the 99th percentile of the image. NaN becomes 0. "nonzero" gives 255 to every number but
        0.

    Raises:
      BadRecord: corrupt_image, if the values are no numbers, or are outside of the range of the
        type.
    """
    kind = pixels.dtype.kind
    if kind not in "buif":
        raise BadRecord("corrupt_image", f"pixels are {pixels.dtype}: they must be numbers")
    if method == "nonzero" or kind == "b":
        return np.where((pixels != 0) & (pixels == pixels), np.uint8(255), np.uint8(0))
    if pixels.dtype == np.uint8 or not pixels.size:
        return pixels.astype(np.uint8)
    if method == "percentile":
        return _stretch(_single_precision(pixels) if kind == "f" else pixels)
    return _scale_floats(pixels) if kind == "f" else _scale_integers(pixels)


def _scale_integers(pixels: np.ndarray) -> UInt8[np.ndarray, "..."]:
    largest = int(pixels.max())
    if pixels.dtype.kind == "i" and pixels.min() < 0:
        raise _outside(pixels, "negative values have no range")
    bits = _range_bits(pixels, largest)
    shifted = pixels >> (bits - 8) if bits >= 8 else pixels << (8 - bits)
    return shifted.astype(np.uint8)


def _range_bits(pixels: np.ndarray, largest: int) -> int:
    """Returns the number of bits of the range that integers are scaled from."""
    bits = pixels.dtype.itemsize * 8 - (pixels.dtype.kind == "i")
    if bits > 16:  # such types often carry fewer bits
        bits = next(fewer for fewer in (8, 16, bits) if largest < 2**fewer)
    return bits


def _scale_floats(pixels: np.ndarray) -> UInt8[np.ndarray, "..."]:
    is_in_range = (pixels >= -FLOAT_TOLERANCE) & (pixels <= 1 + FLOAT_TOLERANCE)
    if not is_in_range.all():
        raise _outside(pixels, "the range of floats is 0 to 1")
    return np.rint(np.clip(_single_precision(pixels), 0, 1) * 255).astype(np.uint8)


def _single_precision(pixels: np.ndarray) -> np.ndarray:
    """Returns floats as files of images have them, so that packed arrays give the same pixels."""
    with np.errstate(over="ignore"):
        return pixels.astype(np.float32)


def _stretch(pixels: np.ndarray) -> UInt8[np.ndarray, "..."]:
    values = pixels.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(pixels.shape, np.uint8)
    low, high = np.percentile(finite, (1, 99))
    if low == high:  # few pixels differ from the others
        low, high = finite.min(), finite.max()
    if low == high:
        return np.zeros(pixels.shape, np.uint8)
    shares = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low), 0, 1)
    return np.rint(shares * 255).astype(np.uint8)


def _outside(pixels: np.ndarray, reason: str) -> BadRecord:
    finite = pixels[np.isfinite(pixels)]
    extent = f" from {finite.min():g} to {finite.max():g}" if finite.size else ""
    extent += " with NaN or infinity" if finite.size < pixels.size else ""
    return BadRecord(
        "corrupt_image",
        f"the pixels are {pixels.dtype}{extent}, but {reason}: "
        "set data.deep_images to percentile, which stretches the values of each image",
    )
