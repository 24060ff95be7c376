"""Reads, writes and scores masks that an answer writes as a box and 16 codes.

Answers are scored as in big_vision's evaluator of RefCOCO masks,
`evaluators/proj/paligemma/transfers/segmentation.py`. Its training answers come from
`pp/proj/paligemma/segmentation.py`. Ground-truth masks have the resolution of the original image.
`pg_ground.models.vqvae` turns codes into masks of 64 x 64, and masks into codes.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.boxes import host_boxes, iou, pairwise_mask_iou
from pg_ground.data import run_lengths
from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict, UserError
from pg_ground.vocab import LOC_MAX, SEG_TOKENS

CODES = 16
"""Number of codes of a mask. They follow the four loc tokens of its box."""

SIDE = 64
"""Side in pixels of a mask that codes stand for."""

BOX_THRESHOLDS = (0.5, 0.75)
"""Thresholds of box IoU for accuracy."""

_WRITTEN = re.compile("(?:<loc[0-9]{4}>){4}(?:<seg[0-9]{3}>){16}")


class Segments(NamedTuple):
    """The boxes and mask codes at the beginning of N texts. A text without them has zeros."""

    bins: Int[np.ndarray, "N 4"]
    """y1 x1 y2 x2 of the box as loc bins, 0 to 1023."""
    codes: Int[np.ndarray, "N 16"]
    valid: Bool[np.ndarray, " N"]
    """The text begins with the loc tokens of a box with area and with all seg tokens."""


def read(texts: Sequence[str]) -> Segments:
    """Returns the boxes and codes at the beginning of texts.

    Text behind the codes, for example a name, is ignored, as in big_vision's evaluator.
    """
    segments = Segments(
        np.zeros((len(texts), 4), int),
        np.zeros((len(texts), CODES), int),
        np.zeros(len(texts), bool),
    )
    for index, text in enumerate(texts):
        written = _WRITTEN.match(text)
        if written is None:
            continue
        y1, x1, y2, x2, *codes = map(int, re.findall("[0-9]+", written[0]))
        if y2 > y1 and x2 > x1 and max(y2, x2) <= LOC_MAX and max(codes) < SEG_TOKENS:
            segments.bins[index] = (y1, x1, y2, x2)
            segments.codes[index] = codes
            segments.valid[index] = True
    return segments


def write(yxyx: Float[np.ndarray, "4"], codes: Int[np.ndarray, "16"]) -> str:
    """Returns the answer for a box (fractions) and the codes of its mask, without name or space."""
    bins = np.clip(np.round(np.float32(yxyx) * LOC_MAX), 0, LOC_MAX).astype(int)
    locs = "".join(f"<loc{number:04d}>" for number in bins)
    return locs + "".join(f"<seg{code:03d}>" for code in codes)


def crop(mask: Bool[np.ndarray, "H W"], yxyx: Float[np.ndarray, "4"]) -> Float[np.ndarray, "64 64"]:
    """Returns the part of a mask inside a box, resized for `vqvae.encode`. Values are in [0, 1].

    Args:
      yxyx: the box as fractions. It is rounded to pixels and has at least one pixel.
    """
    height, width = mask.shape
    scale = np.array([height, width, height, width], np.float32)
    y1, x1, y2, x2 = np.round(scale * np.float32(yxyx)).astype(int)
    y1 = min(max(y1, 0), height - 1)
    x1 = min(max(x1, 0), width - 1)
    part = Image.fromarray(mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].astype(np.float32))
    return np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def answer(
    bins: Int[np.ndarray, "4"],
    valid: bool | np.bool_,
    decoded: Float[np.ndarray, "64 64"],
    size: tuple[int, int],
) -> JsonDict:
    """Returns the prediction of a row: the box in pixels of the image, and the mask as run lengths.

    The decoded mask is resized linearly into the box. The corners of the box are truncated to
    pixels. A pixel belongs to the object if its value is above 0. Without all codes there is no box
    either. A box without a pixel has no mask but remains a box, because big_vision's evaluator
    compares boxes before it looks for pixels.

    Args:
      bins: `Segments.bins` of one text.
      valid: `Segments.valid` of one text.
      decoded: `vqvae.decode` of the codes.
      size: width and height of the image.
    """
    if not valid:
        return {"boxes": [], "points": [], "mask": None}
    width, height = size
    edges = np.asarray(bins, np.float64) / LOC_MAX * [height, width, height, width]
    box = {"label": "", "xyxy_px": edges[[1, 0, 3, 2]].tolist()}
    y1, x1, y2, x2 = edges.astype(int)
    if y2 <= y1 or x2 <= x1:
        return {"boxes": [box], "points": [], "mask": None}
    part = Image.fromarray(np.float32(decoded))
    part = part.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = np.asarray(part) > 0
    return {"boxes": [box], "points": [], "mask": run_lengths.encode(mask)}


def score(row: Row) -> JsonDict:
    """Returns the IoU of the masks, the IoU of the boxes, and whether the answer has a mask."""
    prediction, gold = row["prediction"], row["gold"]
    mask_iou = 0.0
    if prediction["mask"] is not None:
        predicted, target = (run_lengths.decode(answer["mask"]) for answer in (prediction, gold))
        if predicted.shape != target.shape:
            raise UserError(
                f"row {row['id']}: the masks have sizes {predicted.shape} and {target.shape}"
            )
        mask_iou = float(pairwise_mask_iou(predicted[None], target[None])[0, 0])
    box = prediction["boxes"][0]["xyxy_px"] if prediction["boxes"] else None
    box_iou = iou(*host_boxes([box, gold["boxes"][0]["xyxy_px"]]))
    return {
        "mask_iou": mask_iou,
        "iou": float(box_iou),
        "valid": int(prediction["mask"] is not None),
    }


def means(rows: Sequence[Row]) -> Columns:
    """Returns mean IoU of masks, accuracy of boxes, and the share of answers without a mask."""
    box_iou = column(rows, "iou")
    columns = {"miou": column(rows, "mask_iou")}
    for threshold in BOX_THRESHOLDS:
        columns[f"boxacc{threshold * 100:.0f}"] = (box_iou >= threshold).astype(np.float64)
    return columns | {"invalid_fraction": 1 - column(rows, "valid")}
