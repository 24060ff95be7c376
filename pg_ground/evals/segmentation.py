"""Masks that completions write as a box and 16 codes, judged as big_vision judges RefCOCO.

Its evaluator is `evaluators/proj/paligemma/transfers/segmentation.py`, and `pp/proj/paligemma/segmentation.py` writes the answers
it learns from. Gold masks are in the pixels of the original image; the frame that the model sees does not matter. Codes become
masks of 64 x 64, and masks codes, by `pg_ground.models.vqvae`.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.boxes import host_boxes, iou
from pg_ground.data import run_lengths
from pg_ground.evals.rows import Row, column
from pg_ground.vocab import LOC_MAX, SEG_TOKENS

CODES = 16
"""Of a mask, behind the four loc tokens of its box."""

SIDE = 64
"""Of a mask that codes stand for, in pixels."""

BOX_THRESHOLDS = (0.5, 0.75)

_WRITTEN = re.compile("(?:<loc[0-9]{4}>){4}(?:<seg[0-9]{3}>){16}")


class Segments(NamedTuple):
    """What completions begin with; zeros where that is no box with a mask."""

    bins: Int[np.ndarray, "N 4"]
    """y1 x1 y2 x2 of the box, loc bins of 0..1023."""
    codes: Int[np.ndarray, "N 16"]
    valid: Bool[np.ndarray, " N"]
    """There are the loc tokens of a proper box, and all seg tokens behind them."""


def read(texts: Sequence[str]) -> Segments:
    """Returns what completions begin with; like the evaluator, it leaves unread what follows the codes, such as a name."""
    found = Segments(
        np.zeros((len(texts), 4), int),
        np.zeros((len(texts), CODES), int),
        np.zeros(len(texts), bool),
    )
    for row, text in enumerate(texts):
        written = _WRITTEN.match(text)
        numbers = (
            [int(number) for number in re.findall("[0-9]+", written[0])]
            if written
            else [0] * (4 + CODES)
        )
        y1, x1, y2, x2, *codes = numbers
        if y2 > y1 and x2 > x1 and max(y2, x2) <= LOC_MAX and max(codes) < SEG_TOKENS:
            found.bins[row], found.codes[row], found.valid[row] = (y1, x1, y2, x2), codes, True
    return found


def write(yxyx: Float[np.ndarray, "4"], codes: Int[np.ndarray, "16"]) -> str:
    """Returns the answer that a box (fractions) and the codes of its mask are written as, with neither name nor space."""
    bins = np.clip(np.round(np.float32(yxyx) * LOC_MAX), 0, LOC_MAX).astype(int)
    return "".join(f"<loc{place:04d}>" for place in bins) + "".join(
        f"<seg{code:03d}>" for code in codes
    )


def crop(mask: Bool[np.ndarray, "H W"], yxyx: Float[np.ndarray, "4"]) -> Float[np.ndarray, "64 64"]:
    """Returns a mask's part in its box (fractions, rounded to pixels, at least one of them) for `vqvae.encode`, in [0, 1]."""
    height, width = mask.shape
    y1, x1, y2, x2 = np.round(
        np.array([height, width, height, width], np.float32) * np.float32(yxyx)
    ).astype(int)
    y1, x1 = min(max(y1, 0), height - 1), min(max(x1, 0), width - 1)
    part = Image.fromarray(mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].astype(np.float32))
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def answer(
    bins: Int[np.ndarray, "4"],
    valid: bool | np.bool_,
    decoded: Float[np.ndarray, "64 64"],
    size: tuple[int, int],
) -> dict[str, Any]:
    """Returns the prediction of a row: the box in pixels of an image of `size` (width, height), and the mask as run lengths.

    The decoded mask is resized linearly into the box, whose corners are cut off to pixels, and is the object where it is above 0.
    Without all its codes there is no box either. A box without a pixel of the image is a box, but has no mask: the evaluator
    compares boxes before it looks for pixels.

    Args:
      decoded: what `vqvae.decode` makes of the codes.
    """
    if not valid:
        return {"boxes": [], "points": [], "mask": None}
    width, height = size
    edges = np.asarray(bins, np.float64) / LOC_MAX * [height, width, height, width]
    y1, x1, y2, x2 = edges.astype(int)
    mask = np.zeros((height, width), bool)
    if y2 > y1 and x2 > x1:
        part = Image.fromarray(np.float32(decoded)).resize(
            (x2 - x1, y2 - y1), Image.Resampling.BILINEAR
        )
        mask[y1:y2, x1:x2] = np.asarray(part) > 0
    box = {"label": "", "xyxy_px": edges[[1, 0, 3, 2]].tolist()}
    return {
        "boxes": [box],
        "points": [],
        "mask": run_lengths.encode(mask) if y2 > y1 and x2 > x1 else None,
    }


def _mask_iou(a: Bool[np.ndarray, "H W"], b: Bool[np.ndarray, "H W"]) -> float:
    both = np.sum(a & b)
    return float(both / max(a.sum() + b.sum() - both, 1))


def score(row: Row) -> dict[str, Any]:
    """Returns `mask_iou` and `iou` (of the boxes) of an answer, and whether it is `valid`: it writes a mask."""
    said, gold = row["prediction"], row["gold"]
    overlap = (
        0.0
        if said["mask"] is None
        else _mask_iou(run_lengths.decode(said["mask"]), run_lengths.decode(gold["mask"]))
    )
    box = said["boxes"][0]["xyxy_px"] if said["boxes"] else None
    box_iou = iou(*host_boxes([box, gold["boxes"][0]["xyxy_px"]]))
    return {
        "mask_iou": overlap,
        "iou": float(box_iou),
        "valid": int(said["mask"] is not None),
    }


def columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    overlap = column(rows, "iou")
    found = {
        f"boxacc{threshold * 100:.0f}": (overlap >= threshold).astype(np.float64)
        for threshold in BOX_THRESHOLDS
    }
    return {
        "miou": column(rows, "mask_iou"),
        **found,
        "invalid_fraction": 1 - column(rows, "valid"),
    }
