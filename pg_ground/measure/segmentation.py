"""Masks that completions write as a box and 16 codes, judged as big_vision judges RefCOCO.

Its evaluator is `evaluators/proj/paligemma/transfers/segmentation.py`, and `pp/proj/paligemma/segmentation.py` writes the answers
it learns from. Gold masks are in the pixels of the original image; the frame that the model sees does not matter. Codes become
masks of 64 x 64, and masks codes, by `pg_ground.model.vqvae`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from pg_ground.types import Array
from pg_ground.vocab import LOC_MAX, SEG_TOKENS, Vocab

CODES = 16
"""Of a mask, behind the four loc tokens of its box."""

SIDE = 64
"""Of a mask that codes stand for, in pixels."""

BOX_THRESHOLDS = (0.5, 0.75)

_WRITTEN = re.compile(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>){16})")


class Segments(NamedTuple):
    """What completions begin with; zeros where that is no box with a mask."""

    bins: Int[Array, "... 4"]
    """y1 x1 y2 x2 of the box, loc bins of 0..1023."""
    codes: Int[Array, "... 16"]
    valid: Bool[Array, "..."]
    """There are the loc tokens of a proper box, and all seg tokens behind them."""


class Judged(NamedTuple):
    """One answer against its annotation."""

    mask_iou: float
    """Of pixels of the original image."""
    box_iou: float
    invalid: bool
    """There is no mask: the completion writes none, or its box has no pixel of the image (`box_iou` is judged even so)."""


def read(tokens: Int[Array, "... T"], vocab: Vocab) -> Segments:
    """Returns what the first twenty tokens of completions say; a name behind them is left unread."""
    missing = max(4 + CODES - tokens.shape[-1], 0)
    tokens = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, missing)])
    return _checked(tokens[..., :4] - vocab.loc0, tokens[..., 4 : 4 + CODES] - vocab.seg0)


def read_text(texts: Sequence[str]) -> Segments:
    """Returns what `read` finds in the tokens of these texts."""
    numbers = np.full((len(texts), 4 + CODES), -1, np.int32)
    for row, text in zip(numbers, texts, strict=True):
        if found := _WRITTEN.match(text):
            row[:] = [int(number) for number in re.findall(r"\d+", found[0])]
    return Segments(*map(np.asarray, _checked(numbers[:, :4], numbers[:, 4:])))


def _checked(bins: Int[Array, "... 4"], codes: Int[Array, "... 16"]) -> Segments:
    placed = jnp.all((bins >= 0) & (bins <= LOC_MAX), axis=-1) & jnp.all(bins[..., 2:] > bins[..., :2], axis=-1)
    valid = placed & jnp.all((codes >= 0) & (codes < SEG_TOKENS), axis=-1)
    return Segments(jnp.where(valid[..., None], bins, 0), jnp.where(valid[..., None], codes, 0), valid)


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
    """Returns how a box and its decoded mask (`vqvae.decode`) compare with a mask of the whole image and its box (fractions).

    The mask is resized linearly into the box, whose corners are cut off to pixels, and is the object where it is above 0.
    """
    height, width = gold.shape
    yxyx = np.asarray(bins, np.int64) / LOC_MAX
    box_iou = _box_iou(yxyx, np.asarray(gold_yxyx, np.float64)) if valid else 0.0
    y1, x1, y2, x2 = (yxyx * [height, width, height, width]).astype(int)
    if not valid or y2 <= y1 or x2 <= x1:
        return Judged(0.0, box_iou, True)
    mine = np.asarray(Image.fromarray(np.float32(decoded)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) > 0
    both = np.sum(gold[y1:y2, x1:x2] & mine)
    return Judged(float(both / max(gold.sum() + mine.sum() - both, 1)), box_iou, False)


def _box_iou(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> float:
    """Returns the IoU in double precision: at a threshold, `boxes.iou` may round to its other side."""
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return float(overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap))


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
