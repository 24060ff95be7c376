"""Boxes and points: loc bins, similarities in [0, 1], point tests and the matching of two sets.

All functions are elementwise over leading axes. They take numpy arrays on the host and JAX arrays
inside `jit`. The result has the precision of the arguments: float64 on the host stays float64. The
module imports JAX only if an argument is a JAX array, because the worker processes of text rewards
use this module and import no JAX.

A name that says `yxyx` means fractions of the image, y first. Functions that treat both axes alike
(`iou`, `contains`, …) also take (x1, y1, x2, y2), in any unit, if both arguments are in the same
order and unit.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from pg_ground.vocab import LOC_MAX

if TYPE_CHECKING:
    from pg_ground.types import Array
else:
    Array = Any  # pg_ground.types imports JAX

ONE_BIN = 1 / LOC_MAX
"""Side of one loc bin. A gold box with a smaller side counts as one bin wide, so that it has a
scale.
"""

ROUNDING = 1e-6
"""Slack of `contains`, in fractions. Compiled programs may round a division by 1023 differently in
its last digit.
"""


def encode_loc(fraction: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns loc bins 0..1023: clip(round_half_even(fraction · 1023)), like big_vision."""
    xp = _namespace(fraction)
    return xp.clip(xp.round(xp.asarray(fraction) * LOC_MAX), 0, LOC_MAX).astype(np.int32)


def whole_corners(
    fractions: Float[Array, "... 4"], extent: tuple[int, int] = (LOC_MAX, LOC_MAX)
) -> Int[Array, "... 4"]:
    """Returns boxes in whole units, each with a height and a width of at least one unit.

    Corners are rounded half to even. A side that rounds to nothing becomes the unit around its
    centre: 9.7 to 9.9 is 9 to 10. NumPy and compiled programs give the same corners.

    Args:
      fractions: corners in [0, 1], in order yxyx or xyxy.
      extent: units along the first and the second axis of the image: loc bins or pixels.
    """
    xp = _namespace(fractions)
    limits = _limits(extent, fractions.dtype)
    whole = xp.minimum(xp.maximum(xp.round(fractions * limits), 0), limits)
    low, high = whole[..., :2], whole[..., 2:]
    is_flat = low == high
    if xp is np and not is_flat.any():
        return whole.astype(np.int32)
    # The sum comes before the product: a compiled program could fuse a sum of products.
    middle = xp.floor(centre(fractions) * limits[:2])
    unit = xp.clip(middle, 0, limits[:2] - 1)
    corners = [xp.where(is_flat, unit, low), xp.where(is_flat, unit + 1, high)]
    return xp.concatenate(corners, axis=-1).astype(np.int32)


@functools.lru_cache(maxsize=256)
def _limits(extent: tuple[int, int], dtype: np.dtype) -> Float[np.ndarray, " 4"]:
    """Returns the extent of each coordinate of a box."""
    return np.array((*extent, *extent), dtype)


def decode_loc(bins: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 fractions in [0, 1] of loc bins: bin / 1023, like big_vision.

    The divisor is not 1024.
    """
    return bins.astype(np.float32) / LOC_MAX


def corners(order: str, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Returns (x1, y1, x2, y2) of a box, or of arrays of boxes.

    Args:
      order: meaning of the four numbers a, b, c, d: "xyxy", "yxyx", "xywh" or "cxcywh".
    """
    match order:
        case "xyxy":
            return a, b, c, d
        case "yxyx":
            return b, a, d, c
        case "xywh":
            return a, b, a + c, b + d
        case "cxcywh":
            return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    raise KeyError(order)


def host_boxes(rows: Iterable[Sequence[float | int] | None]) -> Float[np.ndarray, "N 4"]:
    """Returns boxes as a float64 array.

    None means an unreadable box: its row is NaN, so it is not proper.
    """
    filled = [(np.nan,) * 4 if row is None else row for row in rows]
    return np.array(filled, np.float64).reshape(len(filled), 4)


def is_proper(yxyx: Float[Array, "... 4"]) -> Bool[Array, "..."]:
    """Returns whether each box has a height and a width.

    A box with NaN is not proper. On the host, a box whose area underflows to 0 is not either.
    """
    proper = (yxyx[..., 2] > yxyx[..., 0]) & (yxyx[..., 3] > yxyx[..., 1])
    if _namespace(yxyx) is np:  # JAX boxes are loc bins, whose areas are at least 1e-6
        proper = proper & (area(yxyx) > 0)
    return proper


def centre(yxyx: Float[Array, "... 4"]) -> Float[Array, "... 2"]:
    """Returns (y, x) of each box's centre."""
    return (yxyx[..., :2] + yxyx[..., 2:]) / 2


def sides(yxyx: Float[Array, "... 4"]) -> Float[Array, "... 2"]:
    """Returns (height, width) of each box."""
    return yxyx[..., 2:] - yxyx[..., :2]


def area(yxyx: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns the area of each proper box."""
    return sides(yxyx).prod(axis=-1)


def _overlap_and_union(
    a: Float[Array, "... 4"], b: Float[Array, "... 4"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the areas of intersection and union of proper boxes."""
    xp = _namespace(a, b)
    lower = xp.maximum(a[..., :2], b[..., :2])
    upper = xp.minimum(a[..., 2:], b[..., 2:])
    overlap = xp.maximum(upper - lower, 0).prod(axis=-1)
    return overlap, area(a) + area(b) - overlap


def iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns intersection over union in [0, 1], elementwise.

    The value is 0 if either box is not proper.

    This is plain IoU: no pixel is added to widths and heights.
    """
    xp = _namespace(a, b)
    proper = is_proper(a) & is_proper(b)
    overlap, union = _overlap_and_union(a, b)
    return xp.where(proper, overlap, 0) / xp.where(proper, union, 1)


def pairwise_iou(a: Float[Array, "... P 4"], b: Float[Array, "... K 4"]) -> Float[Array, "... P K"]:
    """Returns the IoU of each box of `a` with each box of `b`."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Returns generalised IoU in [-1, 1] (arXiv 1902.09630), elementwise.

    The value is -1 if either box is not proper.
    """
    xp = _namespace(a, b)
    proper = is_proper(a) & is_proper(b)
    overlap, union = _overlap_and_union(a, b)
    hull = (xp.maximum(a[..., 2:], b[..., 2:]) - xp.minimum(a[..., :2], b[..., :2])).prod(axis=-1)
    union, hull = xp.where(proper, union, 1), xp.where(proper, hull, 1)
    return xp.where(proper, overlap / union - (hull - union) / hull, -1)


def gaussian(
    distance: Float[Array, "..."], sigma: float | Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns exp(-½ (distance / sigma)²) in [0, 1]."""
    xp = _namespace(distance, sigma)
    return xp.exp(-0.5 * xp.square(distance / sigma))


def gaussian_point(
    yx: Float[Array, "... 2"],
    gold: Float[Array, "... 4"],
    alpha: float,
    min_side: float | Float[np.ndarray, "2"] = ONE_BIN,
) -> Float[Array, "..."]:
    """Returns exp(-½ Σ (d / (alpha · side))²) in [0, 1].

    d is the distance to the gold box's centre along each axis. This is EasyDistill's point reward.
    Scaling an axis does not change it, so fractions and pixels give the same value.

    Args:
      min_side: sides of gold boxes are at least this long; one loc bin in the unit of the boxes.
    """
    xp = _namespace(yx, gold)
    sigma = alpha * xp.maximum(sides(gold), min_side)
    return xp.exp(-0.5 * xp.sum(xp.square((yx - centre(gold)) / sigma), axis=-1))


def gaussian_coverage(
    yxyx: Float[Array, "... 4"],
    gold: Float[Array, "... 4"],
    alpha: float,
    min_side: float | Float[np.ndarray, "2"] = ONE_BIN,
) -> Float[Array, "..."]:
    """Returns the Bhattacharyya coefficient in [0, 1] of two Gaussians with sigma = alpha · sides.

    The value is 0 if `yxyx` is not proper.

    This is EasyDistill's plane reward. It is computed as a sum of logarithms per axis, ½·ln(2·σp·σg
    / (σp² + σg²)) − d² / (4·(σp² + σg²)), which needs no absolute epsilon and so holds in any unit.

    Args:
      min_side: sides of both boxes are at least this long; one loc bin in the unit of the boxes.
        Both, so that the gold box itself has the value 1.
    """
    xp = _namespace(yxyx, gold)
    proper = is_proper(yxyx)
    sigma = xp.where(proper[..., None], alpha * xp.maximum(sides(yxyx), min_side), 1)
    gold_sigma = alpha * xp.maximum(sides(gold), min_side)
    total = xp.square(sigma) + xp.square(gold_sigma)
    offset = xp.square(centre(yxyx) - centre(gold))
    log_ratio = math.log(2) + xp.log(sigma) + xp.log(gold_sigma) - xp.log(total)
    log_axis = 0.5 * log_ratio - offset / (4 * total)
    return xp.where(proper, xp.exp(xp.minimum(log_axis.sum(axis=-1), 0)), 0)


def distance_px(
    yx: Float[Array, "... 2"], size: Int[Array, "... 2"], max_size_px: float
) -> Float[Array, "..."]:
    """Returns the length of (y, x) offsets in pixels of the scaled image.

    The longer side of the scaled image has `max_size_px` pixels.

    Args:
      yx: offsets in fractions of the image.
      size: (width, height) of the original image.
    """
    xp = _namespace(yx, size)
    height_width = size[..., ::-1].astype(np.float32)
    scale = max_size_px * height_width / height_width.max(axis=-1, keepdims=True)
    return xp.sqrt(xp.sum(xp.square(yx * scale), axis=-1))


def distance_gaussian(
    yx: Float[Array, "... 2"],
    gold: Float[Array, "... 2"],
    size: Int[Array, "... 2"],
    sigma_px: float | Float[Array, "..."],
    max_size_px: float,
) -> Float[Array, "..."]:
    """Returns exp(-d² / 2·sigma²) in [0, 1].

    d and sigma are in pixels of the scaled image of `distance_px`. This is synthetic-grounding's
    reward: sigma is 100 px in an image of 640 px.
    """
    return gaussian(distance_px(yx - gold, size, max_size_px), sigma_px)


def contains(
    yxyx: Float[Array, "... 4"],
    yx: Float[Array, "... 2"],
    slack: float | Float[np.ndarray, "... 1"] = ROUNDING,
) -> Bool[Array, "..."]:
    """Returns whether each point lies in its box or on its edge.

    Args:
      slack: distance by which a point may lie outside, in the unit of the boxes.
    """
    inside = (yx >= yxyx[..., :2] - slack) & (yx <= yxyx[..., 2:] + slack)
    return _namespace(yxyx, yx).all(inside, axis=-1)


def covers(mask: Bool[Array, "... M M"], yx: Float[Array, "... P 2"]) -> Bool[Array, "... P"]:
    """Returns whether the mask cell of each point is set.

    The cells are an even grid over the whole image.
    """
    xp = _namespace(mask, yx)
    side = mask.shape[-1]
    cell = xp.clip(xp.floor(yx * side), 0, side - 1).astype(np.int32)
    flat = mask.reshape(*mask.shape[:-2], side * side)
    return xp.take_along_axis(flat, cell[..., 0] * side + cell[..., 1], axis=-1)


def paste_masks(
    decoded: Float[Array, "... h w"], yxyx: Float[Array, "... 4"], mask_size: int
) -> Bool[Array, "... M M"]:
    """Returns masks over the whole image from masks inside their boxes. It runs inside `jit` only.

    A decoded mask is resized linearly into its box. A cell is set if its centre lies in the box and
    the value there is above 0. Boxes that are not proper give empty masks.

    Args:
      decoded: values inside each box; above 0 is the object.
      mask_size: cells along each side of the result.
    """
    import jax
    import jax.numpy as jnp

    side = jnp.array(decoded.shape[-2:])

    def paste(values: Array, box: Array) -> Array:
        proper = is_proper(box)
        scale = jnp.where(proper, sides(box), 1) * mask_size / side
        # The result is 0 outside the box.
        resized = jax.image.scale_and_translate(
            values, (mask_size, mask_size), (0, 1), scale, box[:2] * mask_size, "linear"
        )
        return proper & (resized > 0)

    flat = jax.vmap(paste)(decoded.reshape(-1, *decoded.shape[-2:]), yxyx.reshape(-1, 4))
    return flat.reshape(*yxyx.shape[:-1], mask_size, mask_size)


def pairwise_mask_iou(
    a: Bool[Array, "... P H W"], b: Bool[Array, "... K H W"]
) -> Float[Array, "... P K"]:
    """Returns the IoU in [0, 1] of each mask of `a` with each mask of `b`; 0 if both are empty."""
    xp = _namespace(a, b)
    # Counts of cells must be exact. float32 holds every integer up to 2^24. Masks on a device have
    # 64 x 64 cells or so, but a photograph on the host can have more than 2^24 pixels.
    dtype = np.float64 if xp is np else np.float32
    cells = a.shape[-1] * a.shape[-2]
    a = a.reshape(*a.shape[:-2], cells).astype(dtype)
    b = b.reshape(*b.shape[:-2], cells).astype(dtype)
    overlap = a @ xp.swapaxes(b, -1, -2)
    union = a.sum(axis=-1)[..., :, None] + b.sum(axis=-1)[..., None, :] - overlap
    return overlap / xp.maximum(union, 1)


def match(similarity: Float[Array, "P K"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Returns the one-to-one matching with the largest total similarity.

    The result is the rows and the columns of the n = min(P, K) pairs.
    """
    if _namespace(similarity) is not np:
        from optax.assignment import hungarian_algorithm

        return hungarian_algorithm(-similarity)
    if 0 in similarity.shape:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # scipy takes 0.3 s to import: programs that match nothing do not wait for it
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(similarity, maximize=True)


def matched_total(similarity: Float[Array, "P K"]) -> Float[Array, ""]:
    """Returns the largest total similarity of a one-to-one matching.

    P predictions are matched with K gold answers.

    Args:
      similarity: 0 or more, and 0 in unused slots.
    """
    if min(similarity.shape) == 1:
        return similarity.max()
    return similarity[match(similarity)].sum()


def f_measure(
    total: float | Num[Array, "..."],
    predicted: int | Int[Array, "..."],
    gold: int | Int[Array, "..."],
) -> Float[Array, "..."]:
    """Returns 2·total / (predicted + gold), in [0, 1] for a total of matched similarities.

    The value is 1 if both sets are empty.

    Args:
      predicted: number of predictions. Duplicates and spurious predictions count, and so lower the
        value.
      gold: number of gold answers.
    """
    xp = _namespace(total, predicted, gold)
    count = predicted + gold
    return xp.where(count == 0, 1.0, 2 * total / xp.maximum(count, 1))


def set_similarity(
    similarity: Float[Array, "... P K"], predicted: Bool[Array, "... P"], gold: Bool[Array, "... K"]
) -> Float[Array, "..."]:
    """Returns the `f_measure` of the best matching's total similarity, in [0, 1].

    It runs inside `jit` only.

    Args:
      predicted: which slots hold a prediction.
      gold: which slots hold a gold answer.
    """
    import jax
    import jax.numpy as jnp

    used = predicted[..., :, None] & gold[..., None, :]
    shape = jnp.broadcast_shapes(similarity.shape, used.shape)
    flat = jnp.broadcast_to(jnp.where(used, similarity, 0), shape).reshape(-1, *shape[-2:])
    total = jax.vmap(matched_total)(flat).reshape(shape[:-2])
    return f_measure(total, predicted.sum(axis=-1), gold.sum(axis=-1))


class Detections(NamedTuple):
    """Gold boxes that predictions detect, at N thresholds of IoU."""

    count: Int[Array, "... N"]
    """Number of gold boxes with at least one match."""
    weight: Float[Array, "... N"]
    """Total weight of these gold boxes."""
    duplicate_weight: Float[Array, "... N"]
    """Total weight of all matches after the first one of each gold box."""


def detect(
    iou: Float[Array, "... P K"],
    may_match: Bool[Array, "... P K"],
    weight: Float[Array, "... K"],
    thresholds: Sequence[float],
) -> Detections:
    """Returns the detections of predicted boxes.

    Every prediction matches the gold box of its largest IoU, if that IoU is above the threshold.
    This is the count of "Tuning computer vision models with task rewards" (arXiv 2302.08242). It
    ignores a prediction that matches nothing.

    Args:
      may_match: False if the labels differ or a slot is unused.
      weight: weight of each gold box.
    """
    xp = _namespace(iou, may_match, weight)
    iou = xp.where(may_match, iou, 0)
    is_best = xp.argmax(iou, axis=-1)[..., None] == xp.arange(iou.shape[-1])
    best_iou = xp.where(is_best, iou, 0)
    matches = xp.sum(best_iou[..., None] > xp.asarray(thresholds), axis=-3)  # [..., K, N]
    hit = matches > 0
    return Detections(
        count=xp.sum(hit, axis=-2),
        weight=xp.sum(weight[..., None] * hit, axis=-2),
        duplicate_weight=xp.sum(weight[..., None] * (matches - hit), axis=-2),
    )


def _namespace(*arrays: object) -> Any:
    """Returns numpy if all arguments are numpy arrays or Python numbers, else jax.numpy."""
    if all(isinstance(array, np.ndarray | np.generic | float | int) for array in arrays):
        return np
    import jax.numpy as jnp

    return jnp
