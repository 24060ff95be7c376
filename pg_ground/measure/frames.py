"""Box and point formats ⇄ pixels of the original image, and what to say where boxes are in another frame than was said."""

from collections.abc import Sequence

from pg_ground.config import nearest
from pg_ground.measure.boxes import iou_of, is_proper
from pg_ground.types import UserError
from pg_ground.vocab import LOC_MAX

WHOLE = {"px": 0.0, "frac": 1.0, "percent": 100.0, "permille": 1000.0, "bin": float(LOC_MAX)}
"""What the whole side of an image is in each unit; in pixels it is the side itself. Thousandths are Qwen-VL's and InternVL's."""

BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh")
POINT_ORDERS = ("xy", "yx")

SUSPECT, BETTER, SEEN = 0.25, 3, 8
"""A file is suspected where acc50 is lower, another reading of its boxes gives so many times as much, and it has so many rows."""


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
    a, b, c, d = numbers
    if order == "xyxy":
        edges = (a, b, c, d)
    elif order == "yxyx":
        edges = (b, a, d, c)
    elif order == "xywh":
        edges = (a, b, a + c, b + d)
    else:
        edges = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    return [edges[0] * x, edges[1] * y, edges[2] * x, edges[3] * y]


def check_frame(
    given: Sequence[tuple[float, ...]], gold: Sequence[Sequence[float]], sizes: Sequence[Sequence[float] | None], form: str
) -> None:
    """Raises UserError where boxes fit the gold ones badly as `form` says to read them, and well in another reading.

    Without sizes the frame is measured: the median ratio of gold and given coordinates along each axis.

    Args:
      given: numbers as the file has them.
      gold: x1 y1 x2 y2 in pixels.
    """
    if len(given) < SEEN:
        return
    known = [size for size in sizes if size is not None]
    ones = [(1.0, 1.0)] * len(given)
    now = _accuracy(given, gold, known if len(known) == len(given) else ones, form)
    if now >= SUSPECT:
        return
    best, reading = 0.0, ""
    for order in BOX_ORDERS:
        if len(known) == len(given):
            tried = [(f"{order}_{unit}", _accuracy(given, gold, known, f"{order}_{unit}")) for unit in WHOLE]
            tried = [(f"--box-format={name}", accuracy) for name, accuracy in tried]
        else:
            accuracy = _accuracy(given, gold, ones, f"{order}_px")
            tried = [(f"--box-format={order}_px", accuracy), _scaled(given, gold, order)]
        for name, accuracy in tried:
            if accuracy > best + 1e-9:
                best, reading = accuracy, name
    if best >= max(BETTER * now, SUSPECT):
        raise UserError(
            f"{len(given)} boxes read as {form} give acc50 {now:.4f}, so they are in another frame than the gold boxes: "
            f"{reading} would give {best:.4f}"
        )


def _accuracy(
    given: Sequence[tuple[float, ...]], gold: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], form: str
) -> float:
    hits = [iou_of(to_px(a, form, size), b) >= 0.5 for a, b, size in zip(given, gold, sizes, strict=True)]
    return sum(hits) / len(hits)


def _scaled(given: Sequence[tuple[float, ...]], gold: Sequence[Sequence[float]], order: str) -> tuple[str, float]:
    """Returns a reading with a scale for each axis in words, and its acc50; the scale is that of the median box."""
    edges = [to_px(box, f"{order}_px", (1.0, 1.0)) for box in given]
    pairs = [(a, b) for a, b in zip(edges, gold, strict=True) if is_proper(a)]
    ratios = [sorted((b[i] + b[i + 2]) / (a[i] + a[i + 2]) for a, b in pairs if a[i] + a[i + 2] > 0) for i in (0, 1)]
    if not all(ratios):
        return "", 0.0
    x, y = (ratio[len(ratio) // 2] for ratio in ratios)
    largest = max(max(box) for box in given)
    fitting = [unit for unit, whole in WHOLE.items() if whole and largest <= 1.02 * whole]
    unit = fitting[0] if fitting else "px"
    accuracy = _accuracy(given, gold, [(x, y)] * len(given), f"{order}_px")
    words = f"{order} with x scaled by {x:.4g} and y by {y:.4g}"
    if min(x, y) > 1 or unit in ("permille", "bin"):
        words += f", as --box-format={order}_{unit} does where --fields also names width and height,"
    elif max(x, y) < 0.02:
        words += " (is it the gold that is in fractions? see --gold-format)"
    return words, accuracy
