"""Box and point formats ⇄ pixels of the original image, and what to say where boxes are in another frame than was said."""

from collections.abc import Sequence

from pg_ground.boxes import corners, host_boxes, iou, is_proper
from pg_ground.config import nearest
from pg_ground.types import UserError
from pg_ground.vocab import LOC_MAX

WHOLE = {"px": 0.0, "frac": 1.0, "percent": 100.0, "permille": 1000.0, "bin": float(LOC_MAX)}
"""What the whole side of an image is in each unit; in pixels it is the side itself. Thousandths are Qwen-VL's and InternVL's."""

BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh")
POINT_ORDERS = ("xy", "yx")

SUSPECT, BETTER, SEEN = 0.25, 3, 8
"""A file is suspected where acc50 is lower, another reading of its boxes gives so many times as much, and it has so many rows."""

LIKELY = (100, 10_000)
"""Pixels of an image's side, to tell units apart where no size is given."""


def check_format(value: str, flag: str, orders: Sequence[str]) -> None:
    """Raises UserError if there is no such format."""
    formats = [f"{order}_{unit}" for order in orders for unit in WHOLE]
    if value not in formats:
        raise UserError(f"--{flag}={value} does not exist: {nearest(value, formats)}")


def to_px(numbers: Sequence[float], form: str, size: Sequence[float]) -> list[float]:
    """Returns a box as x1 y1 x2 y2, or a point as x y, in pixels of an image of `size` (width, height)."""
    order, unit = form.rsplit("_", 1)
    x, y = (side / WHOLE[unit] if WHOLE[unit] else 1.0 for side in size)
    if order == "xy":
        return [numbers[0] * x, numbers[1] * y]
    if order == "yx":
        return [numbers[1] * x, numbers[0] * y]
    edges = corners(order, *numbers)
    return [edges[0] * x, edges[1] * y, edges[2] * x, edges[3] * y]


def check_frame(
    given: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float] | None],
    form: str,
    gold_form: str,
) -> None:
    """Raises UserError where boxes fit the gold ones badly as `form` says to read them, and well in another reading.

    Without sizes the frame is measured: the median ratio of gold and given coordinates along each axis.

    Args:
      given: numbers as the file has them.
      gold: x1 y1 x2 y2 in pixels, if `gold_form` is right.
    """
    if len(given) < SEEN:
        return
    ones = [(1.0, 1.0)] * len(given)
    known = [size for size in sizes if size is not None]
    told = len(known) == len(given)
    now, _ = _fit(given, gold, known if told else ones, form)
    if now >= SUSPECT:
        return
    readings: list[tuple[str, tuple[float, float]]] = []
    for unit in WHOLE if told and gold_form.endswith("_px") else ():
        scaled = [to_px(box, f"xyxy_{unit}", size) for box, size in zip(gold, known, strict=True)]
        readings.append(
            (
                f"--gold-format={gold_form.removesuffix('px')}{unit}",
                _fit(given, scaled, known, form),
            )
        )
    for order in BOX_ORDERS:
        forms = [f"{order}_{unit}" for unit in WHOLE] if told else [f"{order}_px"]
        readings += [
            (f"--box-format={name}", _fit(given, gold, known if told else ones, name))
            for name in forms
        ]
        readings.append(_scaled(given, gold, order, told))
    reading, (best, _) = max(readings, key=lambda one: one[1][1])
    if best >= max(BETTER * now, SUSPECT):
        raise UserError(
            f"{len(given)} boxes read as {form} give acc50 {now:.4f}, so they are in another frame than the gold boxes: "
            f"{reading} would give {best:.4f}"
        )


def _fit(
    given: Sequence[tuple[float, ...]],
    gold: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[float]],
    form: str,
) -> tuple[float, float]:
    """Returns acc50 and mean IoU."""
    in_px = host_boxes(to_px(box, form, size) for box, size in zip(given, sizes, strict=True))
    overlaps = iou(in_px, host_boxes(gold))
    return float((overlaps >= 0.5).mean()), float(overlaps.mean())


def _scaled(
    given: Sequence[tuple[float, ...]], gold: Sequence[Sequence[float]], order: str, told: bool
) -> tuple[str, tuple[float, float]]:
    """Returns a reading with a scale for each axis in words, and its fit; the scale is that of the median box.

    Args:
      told: the images' sizes are known, and do not explain the scale.
    """
    edges = [to_px(box, f"{order}_px", (1.0, 1.0)) for box in given]
    proper = is_proper(host_boxes(edges))
    pairs = [(a, b) for a, b, ok in zip(edges, gold, proper, strict=True) if ok]
    ratios = [
        sorted((b[i] + b[i + 2]) / (a[i] + a[i + 2]) for a, b in pairs if a[i] + a[i + 2] > 0)
        for i in (0, 1)
    ]
    if not all(ratios):
        return "", (0.0, 0.0)
    x, y = (ratio[len(ratio) // 2] for ratio in ratios)
    fitting = [
        unit for unit, whole in WHOLE.items() if whole and LIKELY[0] <= x * whole <= LIKELY[1]
    ]
    fit = _fit(given, gold, [(x, y)] * len(given), f"{order}_frac")
    words = f"{order} with x scaled by {x:.4g} and y by {y:.4g}"
    if told:
        words += " (boxes of a resized image?)"
    elif max(x, y) < 0.02:
        words += " (is it the gold that is in fractions? see --gold-format)"
    elif fitting:
        names = " or ".join(f"{order}_{unit}" for unit in fitting)
        words += f", as --box-format={names} does where --fields also names width and height,"
    return words, fit
