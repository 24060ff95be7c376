"""Masks that completions write as a box and 16 codes, judged as big_vision judges RefCOCO.

Its evaluator is `evaluators/proj/paligemma/transfers/segmentation.py`, and `pp/proj/paligemma/segmentation.py` writes the answers
it learns from. Gold masks are in the pixels of the original image; the frame that the model sees does not matter. Codes become
masks of 64 x 64, and masks codes, by `pg_ground.model.vqvae`.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.measure.boxes import iou_of
from pg_ground.measure.rows import Row, column
from pg_ground.measure.runs import mask_of
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


class Judged(NamedTuple):
    """One answer against its annotation."""

    mask_iou: float
    """Of pixels of the original image."""
    box_iou: float
    invalid: bool
    """There is no mask: the completion writes none, or its box has no pixel of the image (`box_iou` is judged even so)."""


def read(texts: Sequence[str]) -> Segments:
    """Returns what completions begin with; like the evaluator, it leaves unread what follows the codes, such as a name."""
    found = Segments(np.zeros((len(texts), 4), int), np.zeros((len(texts), CODES), int), np.zeros(len(texts), bool))
    for row, text in enumerate(texts):
        written = _WRITTEN.match(text)
        numbers = [int(number) for number in re.findall("[0-9]+", written[0])] if written else [0] * (4 + CODES)
        y1, x1, y2, x2, *codes = numbers
        if y2 > y1 and x2 > x1 and max(y2, x2) <= LOC_MAX and max(codes) < SEG_TOKENS:
            found.bins[row], found.codes[row], found.valid[row] = (y1, x1, y2, x2), codes, True
    return found


def write(yxyx: Float[np.ndarray, "4"], codes: Int[np.ndarray, "16"]) -> str:
    """Returns the answer that a box (fractions) and the codes of its mask are written as, with neither name nor space."""
    bins = np.clip(np.round(np.float32(yxyx) * LOC_MAX), 0, LOC_MAX).astype(int)
    return "".join(f"<loc{place:04d}>" for place in bins) + "".join(f"<seg{code:03d}>" for code in codes)


def crop(mask: Bool[np.ndarray, "H W"], yxyx: Float[np.ndarray, "4"]) -> Float[np.ndarray, "64 64"]:
    """Returns a mask's part in its box (fractions, rounded to pixels, at least one of them) for `vqvae.encode`, in [0, 1]."""
    height, width = mask.shape
    y1, x1, y2, x2 = np.round(np.array([height, width, height, width], np.float32) * np.float32(yxyx)).astype(int)
    y1, x1 = min(max(y1, 0), height - 1), min(max(x1, 0), width - 1)
    part = Image.fromarray(mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].astype(np.float32))
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def judge(
    bins: Int[np.ndarray, "4"],
    valid: bool | np.bool_,
    decoded: Float[np.ndarray, "64 64"],
    gold: Bool[np.ndarray, "H W"],
    gold_yxyx: Float[np.ndarray, "4"],
) -> Judged:
    """Returns how a box and its decoded mask (`vqvae.decode`) compare with a mask of the whole image and its box (fractions)."""
    box_iou = _box_iou(np.asarray(bins, np.int64) / LOC_MAX, np.asarray(gold_yxyx, np.float64)) if valid else 0.0
    mine = paste(bins, decoded, gold.shape) if valid else None
    return Judged(0.0, box_iou, True) if mine is None else Judged(_mask_iou(mine, gold), box_iou, False)


def paste(
    bins: Int[np.ndarray, "4"], decoded: Float[np.ndarray, "64 64"], shape: tuple[int, ...]
) -> Bool[np.ndarray, "H W"] | None:
    """Returns the mask of the whole image that a box and its decoded mask say; None where the box has no pixel of it.

    The mask is resized linearly into the box, whose corners are cut off to pixels, and is the object where it is above 0.
    """
    height, width = shape
    y1, x1, y2, x2 = (np.asarray(bins, np.int64) / LOC_MAX * [height, width, height, width]).astype(int)
    if y2 <= y1 or x2 <= x1:
        return None
    whole = np.zeros((height, width), bool)
    whole[y1:y2, x1:x2] = (
        np.asarray(Image.fromarray(np.float32(decoded)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) > 0
    )
    return whole


def _mask_iou(a: Bool[np.ndarray, "H W"], b: Bool[np.ndarray, "H W"]) -> float:
    both = np.sum(a & b)
    return float(both / max(a.sum() + b.sum() - both, 1))


def _box_iou(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> float:
    """Returns the IoU in double precision: at a threshold, `boxes.iou` may round to its other side."""
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return float(overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap))


def score(row: Row) -> dict[str, Any]:
    """Returns `mask_iou` and `iou` (of the boxes) of an answer, and whether it is `valid`: it writes a mask."""
    said, gold = row["prediction"], row["gold"]
    overlap = 0.0 if said["mask"] is None else _mask_iou(mask_of(said["mask"]), mask_of(gold["mask"]))
    box = said["boxes"][0]["xyxy_px"] if said["boxes"] else None
    return {"mask_iou": overlap, "iou": iou_of(box, gold["boxes"][0]["xyxy_px"]), "valid": int(said["mask"] is not None)}


def columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    overlap = column(rows, "iou")
    found = {f"boxacc{threshold * 100:.0f}": (overlap >= threshold).astype(np.float64) for threshold in BOX_THRESHOLDS}
    return {"miou": column(rows, "mask_iou"), **found, "invalid_fraction": 1 - column(rows, "valid")}


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """Returns `miou` and `boxacc50`, `boxacc75` as means over all answers (0 for an invalid one), `invalid` and `n` as counts.

    Raises:
      ValueError: there are none.
    """
    if not judged:
        raise ValueError("no answers to judge")
    overlaps = np.array([one.box_iou for one in judged])
    return {
        "miou": float(np.mean([one.mask_iou for one in judged])),
        **{f"boxacc{threshold * 100:.0f}": float(np.mean(overlaps >= threshold)) for threshold in BOX_THRESHOLDS},
        "invalid": float(sum(one.invalid for one in judged)),
        "n": float(len(judged)),
    }
