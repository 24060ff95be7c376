"""COCO's run lengths of masks: `{"size": [height, width], "counts": […]}`.

The runs go down the columns of the mask, and they alternate. The first run is background.
"""

import numpy as np
from jaxtyping import Bool

from pg_ground.data.records import BadRecord
from pg_ground.types import JsonDict, Record

MAX_PIXELS = 2**28
"""The largest mask that is decoded. A few numbers in a record can claim any size."""


def encode(mask: Bool[np.ndarray, "H W"]) -> JsonDict:
    """Returns the run lengths of a mask, uncompressed."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def decode(run_lengths: Record) -> Bool[np.ndarray, "H W"]:
    """Returns the mask of run lengths, whose counts are a list or COCO's compressed string.

    pycocotools does not decode them: if the counts end too early, it returns arbitrary memory.

    Raises:
      BadRecord: bad_mask if the counts do not add up to the size, or if a field is missing.
    """
    counts = run_lengths["counts"]
    try:
        height, width = map(int, run_lengths["size"])
        runs = np.array(
            _decompressed(counts) if isinstance(counts, str | bytes) else counts, np.int64
        )
        area = height * width
        is_valid = (
            runs.ndim == 1
            and 0 < area <= MAX_PIXELS
            and runs.min() >= 0
            and runs.max() <= area
            and runs.sum() == area
        )
        if not is_valid:
            raise ValueError(f"runs of {runs.sum()} pixels for {height} x {width}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadRecord(
            "bad_mask", f"{dict(run_lengths)!r:.60} is not COCO's run lengths: {error}"
        ) from None
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decompressed(text: str | bytes) -> list[int]:
    """Returns the run lengths of COCO's compressed string.

    Each character holds five bits of a number, and the lowest bits come first. The sixth bit says
    that the number continues in the next character. From the third number on, a number is the
    difference from the run two positions before.
    """
    runs: list[int] = []
    value = 0
    shift = 0
    for code in (byte - 48 for byte in (text.encode() if isinstance(text, str) else text)):
        value |= (code & 31) << shift
        shift += 5
        if code & 32 and shift < 60:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = 0
        shift = 0
    return runs
