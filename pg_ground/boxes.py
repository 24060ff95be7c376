"""Boxes and points: loc tokens to fractions and back, similarities in [0, 1], and matching of sets.

Everything is elementwise float arithmetic over leading axes and runs inside `jit` or on numpy arrays alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from pg_ground.types import Array
from pg_ground.vocab import LOC_MAX

ONE_BIN = 1 / LOC_MAX
"""Side that a gold box without extent is widened to, so that it has a scale."""


ROUNDING = 1e-6
"""What fractions of one bin may differ by: division by 1023 has a last digit of its own in every compiled program."""


def encode_loc(fraction: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns loc bins 0..1023 of fractions: clip(round_half_even(fraction · 1023)), as big_vision writes them."""
    return jnp.clip(jnp.round(jnp.asarray(fraction) * LOC_MAX), 0, LOC_MAX).astype(jnp.int32)


def decode_loc(bins: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns fractions in [0, 1] of loc bins: bin / 1023, as big_vision reads them (not / 1024)."""
    return bins.astype(jnp.float32) / LOC_MAX


def corners(order: str, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Returns x1, y1, x2, y2 of a box's four numbers, or arrays of them, in `order`: xyxy, yxyx, xywh or cxcywh."""
    return {
        "xyxy": (a, b, c, d),
        "yxyx": (b, a, d, c),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }[order]


def is_proper(yxyx: Float[Array, "... 4"]) -> Bool[Array, "..."]:
    """Returns whether each box has a height and a width."""
    return (yxyx[..., 2] > yxyx[..., 0]) & (yxyx[..., 3] > yxyx[..., 1])


def centre(yxyx: Float[Array, "... 4"]) -> Float[Array, "... 2"]:
    """Returns (y, x) of each box's centre."""
    return (yxyx[..., :2] + yxyx[..., 2:]) / 2


def sides(yxyx: Float[Array, "... 4"]) -> Float[Array, "... 2"]:
    """Returns (height, width) of each box."""
    return yxyx[..., 2:] - yxyx[..., :2]


def _areas(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> tuple[Array, Array]:
    """Returns the areas of intersection and union of proper boxes."""
    overlap = jnp.maximum(
        jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0
    ).prod(axis=-1)
    return overlap, sides(a).prod(axis=-1) + sides(b).prod(axis=-1) - overlap


def iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns intersection over union in [0, 1], elementwise; 0 where either box is not proper."""
    proper = is_proper(a) & is_proper(b)
    overlap, union = _areas(a, b)
    return jnp.where(proper, overlap, 0) / jnp.where(proper, union, 1)


def giou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns generalised IoU in [-1, 1] (arXiv 1902.09630), elementwise; -1 where either box is not proper."""
    proper = is_proper(a) & is_proper(b)
    overlap, union = _areas(a, b)
    hull = (jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])).prod(axis=-1)
    union, hull = jnp.where(proper, union, 1), jnp.where(proper, hull, 1)
    return jnp.where(proper, overlap / union - (hull - union) / hull, -1)


def gaussian_point(
    yx: Float[Array, "... 2"], gold: Float[Array, "... 4"], alpha: float
) -> Float[Array, "..."]:
    """Returns exp(-½ Σ (d / (alpha · side))²) in [0, 1] for points against gold boxes, d measured from the gold centre.

    EasyDistill's point reward; per-axis scaling leaves it unchanged, so fractions and pixels agree.
    """
    sigma = alpha * jnp.maximum(sides(gold), ONE_BIN)
    return jnp.exp(-0.5 * jnp.sum(jnp.square((yx - centre(gold)) / sigma), axis=-1))


def gaussian_coverage(
    yxyx: Float[Array, "... 4"], gold: Float[Array, "... 4"], alpha: float
) -> Float[Array, "..."]:
    """Returns the Bhattacharyya coefficient in [0, 1] of two Gaussians with sigma = alpha · sides; 0 for improper boxes.

    EasyDistill's plane reward as a sum of logarithms per axis, ¼·ln(4·Vp·Vg/(Vp+Vg)²) − d²/(4(Vp+Vg)): no absolute epsilon, so
    it holds in any frame.
    """
    proper = is_proper(yxyx)
    mine = jnp.where(proper[..., None], alpha * jnp.maximum(sides(yxyx), ONE_BIN / 2), 1)
    theirs = alpha * jnp.maximum(sides(gold), ONE_BIN)
    total = jnp.square(mine) + jnp.square(theirs)
    offset = jnp.square(centre(yxyx) - centre(gold))
    log_axis = 0.5 * (jnp.log(2.0) + jnp.log(mine) + jnp.log(theirs) - jnp.log(total)) - offset / (
        4 * total
    )
    return jnp.where(proper, jnp.exp(jnp.minimum(log_axis.sum(axis=-1), 0)), 0)


def distance_px(
    yx: Float[Array, "... 2"], size: Int[Array, "... 2"], max_size_px: float
) -> Float[Array, "..."]:
    """Returns the length of (y, x) offsets in pixels of an image whose longer side has `max_size_px` of them.

    `size` is (width, height) of the original image.
    """
    height_width = size[..., ::-1].astype(jnp.float32)
    scale = max_size_px * height_width / height_width.max(axis=-1, keepdims=True)
    return jnp.sqrt(jnp.sum(jnp.square(yx * scale), axis=-1))


def distance_gaussian(
    yx: Float[Array, "... 2"],
    gold: Float[Array, "... 2"],
    size: Int[Array, "... 2"],
    sigma_px: float | Float[Array, "..."],
    max_size_px: float,
) -> Float[Array, "..."]:
    """Returns exp(-d² / 2·sigma²) in [0, 1], d and sigma in pixels of the image that `distance_px` measures in.

    synthetic-grounding's reward: sigma 100 px at 640 px.
    """
    return jnp.exp(-0.5 * jnp.square(distance_px(yx - gold, size, max_size_px) / sigma_px))


def contains(yxyx: Float[Array, "... 4"], yx: Float[Array, "... 2"]) -> Bool[Array, "..."]:
    """Returns whether each point lies in its box or on an edge of it, give or take `ROUNDING`."""
    return jnp.all((yx >= yxyx[..., :2] - ROUNDING) & (yx <= yxyx[..., 2:] + ROUNDING), axis=-1)


def covers(mask: Bool[Array, "... M M"], yx: Float[Array, "... P 2"]) -> Bool[Array, "... P"]:
    """Returns whether the cell that each point lies in is set, the cells being an even grid over the whole image."""
    side = mask.shape[-1]
    y, x = jnp.moveaxis(jnp.clip(jnp.floor(yx * side), 0, side - 1).astype(jnp.int32), -1, 0)
    return jnp.take_along_axis(mask.reshape(*mask.shape[:-2], side * side), y * side + x, axis=-1)


def matched_total(similarity: Float[Array, "P K"]) -> Float[Array, ""]:
    """Returns the largest total similarity of a one-to-one matching of P predictions with K gold answers.

    `similarity` is 0 or more, and 0 wherever a slot is unused.
    """
    if min(similarity.shape) == 1:
        return similarity.max()
    rows, columns = optax.assignment.hungarian_algorithm(-similarity)
    return similarity[rows, columns].sum()


def set_similarity(
    similarity: Float[Array, "... P K"], predicted: Bool[Array, "... P"], gold: Bool[Array, "... K"]
) -> Float[Array, "..."]:
    """Returns 2·Σ / (n_predicted + n_gold) in [0, 1], Σ the best matching's total similarity; 1 where both sets are empty.

    `predicted` and `gold` say which slots are used. Duplicates and spurious answers count in n_predicted and so cost.
    """
    used = predicted[..., :, None] & gold[..., None, :]
    lead = jnp.broadcast_shapes(similarity.shape, used.shape)
    flat = jnp.broadcast_to(jnp.where(used, similarity, 0), lead).reshape(-1, *lead[-2:])
    total = jax.vmap(matched_total)(flat).reshape(lead[:-2])
    count = predicted.sum(axis=-1) + gold.sum(axis=-1)
    return jnp.where(count == 0, 1.0, 2 * total / jnp.maximum(count, 1))


class Detections(NamedTuple):
    """What predicted boxes found, at N thresholds of IoU."""

    number: Int[Array, "... N"]
    """Gold boxes that have a match."""
    found: Float[Array, "... N"]
    """The weight of these."""
    duplicates: Float[Array, "... N"]
    """The weight of the matches beyond the first of each of them."""


def detect(
    iou: Float[Array, "... P K"],
    may_match: Bool[Array, "... P K"],
    weight: Float[Array, "... K"],
    thresholds: Sequence[float],
) -> Detections:
    """Returns what is found when every prediction matches the gold box of largest IoU, if that is above the threshold.

    Counted as in "Tuning computer vision models with task rewards" (arXiv 2302.08242): a prediction that matches nothing is not.
    `may_match` is False where labels differ or a slot is unused; `weight` is that of each gold box.
    """
    iou = jnp.where(may_match, iou, 0)
    first = jax.nn.one_hot(jnp.argmax(iou, axis=-1), iou.shape[-1], dtype=bool)
    matches = jnp.sum(
        jnp.where(first, iou, 0)[..., None] > jnp.asarray(thresholds), axis=-3
    )  # [..., K, N]
    hit = matches > 0
    return Detections(
        number=jnp.sum(hit, axis=-2),
        found=jnp.sum(weight[..., None] * hit, axis=-2),
        duplicates=jnp.sum(weight[..., None] * (matches - hit), axis=-2),
    )
