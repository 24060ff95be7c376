"""Checks whether boxes were read in the right format, and suggests a format that fits better."""

from collections.abc import Sequence
from typing import NamedTuple

from pg_ground.boxes import host_boxes, iou, is_proper
from pg_ground.data.box_formats import BOX_ORDERS, UNITS, to_pixels
from pg_ground.types import UserError

SUSPECT_ACC50 = 0.25
"""A format is doubted if acc50 is below this value …"""

MIN_GAIN = 3
"""… and another format gives at least this many times the acc50 …"""

MIN_BOXES = 8
"""… and there are at least this many boxes."""

IMAGE_SIDES = (100, 10_000)
"""The usual range of an image's side, in pixels. It tells units apart if no image size is known."""

SAME_SCALE = 0.02
"""A scale differs by less from the ratio of two units if both units are shares of the image."""


MIN_COVERAGE = 0.5
"""Numbers are doubted to be in a unit if another unit is used by twice as large a part."""


class Fit(NamedTuple):
    """How well boxes fit the ground truth in one format."""

    acc50: float
    mean_iou: float


class Reading(NamedTuple):
    """Another way to read the boxes, in words, and its fit."""

    text: str
    fit: Fit


def check_box_format(
    predicted: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float] | None],
    format_name: str,
    gold_format: str,
) -> None:
    """Raises UserError if boxes fit the ground truth badly, and another format fits well.

    If an image size is not known, the scale of each axis is estimated: it is the median ratio of
    gold and predicted coordinates.

    Args:
      predicted: boxes with their numbers as the file writes them, to be read in `format_name`.
      gold: x1, y1, x2, y2 in pixels, if `gold_format` is right.
      sizes: width and height of each image in pixels, or None.
    """
    if len(predicted) < MIN_BOXES:
        return
    known_sizes = [size for size in sizes if size is not None]
    has_sizes = len(known_sizes) == len(predicted)
    scales = known_sizes if has_sizes else [(1.0, 1.0)] * len(predicted)
    acc50 = _fit(predicted, gold, scales, format_name).acc50
    if acc50 >= SUSPECT_ACC50:
        return
    readings: list[Reading] = []
    if has_sizes and gold_format.endswith("_px"):
        readings += _gold_readings(predicted, gold, scales, format_name, gold_format)
    for order in BOX_ORDERS:
        for unit in UNITS if has_sizes else ("px",):
            name = f"{order}_{unit}"
            readings.append(Reading(f"--box-format={name}", _fit(predicted, gold, scales, name)))
        readings.append(_scaled_reading(predicted, gold, order, has_sizes))
    best = max(readings, key=lambda reading: reading.fit.mean_iou)
    if best.fit.acc50 >= max(MIN_GAIN * acc50, SUSPECT_ACC50):
        raise UserError(
            f"{len(predicted)} boxes read as {format_name} give acc50 {acc50:.4f}, so they are "
            f"probably in another format than the gold boxes: {best.text} would give "
            f"{best.fit.acc50:.4f}"
        )


def _fit(
    predicted: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    format_name: str,
) -> Fit:
    """Returns the fit of boxes that are read in `format_name`."""
    boxes = host_boxes(
        to_pixels(box, format_name, size) for box, size in zip(predicted, sizes, strict=True)
    )
    ious = iou(boxes, host_boxes(gold))
    return Fit(float((ious >= 0.5).mean()), float(ious.mean()))


def _gold_readings(
    predicted: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    format_name: str,
    gold_format: str,
) -> list[Reading]:
    """Returns the fits if the gold boxes, which were read as pixels, are in another unit."""
    readings = []
    for unit in UNITS:
        scaled = [
            to_pixels(box, f"xyxy_{unit}", size) for box, size in zip(gold, sizes, strict=True)
        ]
        text = f"--gold-format={gold_format.removesuffix('px')}{unit}"
        readings.append(Reading(text, _fit(predicted, scaled, sizes, format_name)))
    return readings


def _scaled_reading(
    predicted: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    order: str,
    has_sizes: bool,
) -> Reading:
    """Returns the fit of boxes whose axes are scaled so that the median box fits.

    Args:
      has_sizes: the image sizes are known, and they do not explain the scale.
    """
    edges = [to_pixels(box, f"{order}_px", (1.0, 1.0)) for box in predicted]
    proper = is_proper(host_boxes(edges))
    pairs = [
        (box, other) for box, other, is_usable in zip(edges, gold, proper, strict=True) if is_usable
    ]
    ratios = [
        sorted(
            (other[axis] + other[axis + 2]) / (box[axis] + box[axis + 2])
            for box, other in pairs
            if box[axis] + box[axis + 2] > 0
        )
        for axis in (0, 1)
    ]
    if not all(ratios):
        return Reading("", Fit(0.0, 0.0))
    x_scale, y_scale = (ratio[len(ratio) // 2] for ratio in ratios)
    text = f"{order} with x scaled by {x_scale:.4g} and y by {y_scale:.4g}"
    largest = (max(max(box) for box in predicted), max(max(box) for box in gold))
    text += _explanation(order, (x_scale, y_scale), largest, has_sizes)
    scales = [(x_scale, y_scale)] * len(predicted)
    return Reading(text, _fit(predicted, gold, scales, f"{order}_frac"))


def _explanation(
    order: str, scales: tuple[float, float], largest: tuple[float, float], has_sizes: bool
) -> str:
    """Returns the flags that would scale predicted boxes like this, or a question; "" without any.

    Args:
      scales: of x and y.
      largest: the largest numbers of the predicted boxes and of the gold boxes.
      has_sizes: the image sizes are known, and they do not explain the scale.
    """
    extents = {unit: extent for unit, extent in UNITS.items() if extent is not None}
    for unit, extent in extents.items():
        for gold_unit, gold_extent in extents.items():
            expected = gold_extent / extent
            is_ratio = all(abs(s / expected - 1) < SAME_SCALE for s in scales)
            if is_ratio and unit != gold_unit:
                return f" ({_flags(order, unit, gold_unit)})"
    if all(1 / IMAGE_SIDES[1] <= scale <= 1 / IMAGE_SIDES[0] for scale in scales):
        text = f" ({_flags(order, 'px', 'frac')}, if the gold boxes are in fractions"
        return text + (")" if has_sizes else " and --fields also names width and height)")
    if has_sizes:
        return " (are these boxes of a resized image?)"
    predicted_units = _possible_units(largest[0], scales)
    gold_units = _possible_units(largest[1], tuple(1 / scale for scale in scales))
    coverages = (*predicted_units.values(), *gold_units.values())
    best = max(coverages, default=0.0)
    if best in gold_units.values():
        flags = " or ".join(
            _flags(order, "px", unit)
            for unit, coverage in gold_units.items()
            if coverage >= MIN_COVERAGE * best
        )
        return f", as {flags} does if --fields also names width and height,"
    names = " or ".join(
        f"{order}_{unit}"
        for unit, coverage in predicted_units.items()
        if coverage >= MIN_COVERAGE * best
    )
    return (
        f", as --box-format={names} does if --fields also names width and height," if names else ""
    )


def _possible_units(largest: float, scales: Sequence[float]) -> dict[str, float]:
    """Returns units of numbers that become pixels by `scales` → the part of the unit in use.

    Args:
      largest: the largest number. A larger number than the extent of a unit is not in this unit.
      scales: of x and y, the same in all images.
    """
    low, high = IMAGE_SIDES
    return {
        unit: largest / extent
        for unit, extent in UNITS.items()
        if extent is not None
        and largest <= (1 + SAME_SCALE) * extent
        and all(low <= scale * extent <= high for scale in scales)
    }


def _flags(order: str, unit: str, gold_unit: str) -> str:
    return f"--box-format={order}_{unit} --gold-format=xyxy_{gold_unit}"
