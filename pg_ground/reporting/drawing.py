"""Pictures of questions and answers, drawn with PIL alone and never written to disk."""

import base64
import bisect
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from pg_ground.types import POINTS, TEXT, Answer, Batch, Boxes, Gold, Points, Rewards
from pg_ground.vocab import LOC_MAX

Color = tuple[int, int, int]
Extent = tuple[int, int, int, int]
"""Left, top, right and bottom pixel, the last two excluded."""
Scale = tuple[float, float]
"""The rewards of the first and the last colour."""

GOLD: Color = (255, 255, 255)
UNJUDGED: Color = (150, 150, 150)
"""Of a sample whose reward is NaN."""
HALO: Color = (0, 0, 0)
PAPER: Color = (250, 250, 248)
INK: Color = (28, 28, 30)
TABLE: Color = (222, 222, 218)

VIRIDIS: tuple[Color, ...] = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
)  # fmt: skip
"""Nine equidistant colours of viridis (van der Walt and Smith 2015), which colour-blind readers can order."""

LABEL_COLORS: tuple[Color, ...] = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178),
)  # fmt: skip
"""Okabe and Ito's palette (2008), the bright ones first."""

TEXT_PX = 13
LINE_PX = 17
PAD_PX = 8
LEGEND_PX = 22
CAPTION_LINES = 4
DRAWING_PX = 128
"""Images of at most so many pixels a side are kept as they are where they are written down …"""
PHOTO_PX = 448
"""… and larger ones are made to have at most so many."""
NEAREST_FROM = 2.5
"""Pictures enlarged by more than this keep their pixels as squares: they are drawings, not photographs."""


class Shape(NamedTuple):
    """A box or a point to be drawn."""

    at: Sequence[float | int]
    """Fractions of the image: y1, x1, y2, x2 of a box, or y, x of a point."""
    color: Color
    label: str = ""
    width: int = 2
    """Of the line, in pixels of the picture drawn on; a halo of one more on either side."""


def to_uint8(
    image: Float[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 3"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns pixels in 0..255 of an image in [-1, 1], and bytes as they are: a `Batch` holds either."""
    if image.dtype == np.uint8:
        return image
    return np.clip(np.round((image.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def reward_scale(total: Float[np.ndarray, "..."]) -> Scale:
    """Returns the rewards that the colours of a picture begin and end at: 0 and 1, or as far beyond as any goes, in halves.

    It depends on the least and the largest alone, so that equal rewards have one colour; and it is never narrower than [0, 1], so
    that rewards which hardly differ look it, and pictures of different steps can mostly be compared.
    """
    judged = total[np.isfinite(total)].astype(np.float64)
    low, high = judged.min(initial=0.0), judged.max(initial=1.0)
    return math.floor(round(low * 2, 3)) / 2, math.ceil(
        round(high * 2, 3)
    ) / 2  # 1 and what rounding adds to it is 1


def reward_color(reward: float, scale: Scale = (0.0, 1.0)) -> Color:
    """Returns the colour of a reward: viridis from one end of `scale` to the other, its ends beyond, grey for NaN."""
    if math.isnan(reward):
        return UNJUDGED
    low, high = scale
    place = min(max((reward - low) / (high - low), 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(place), len(VIRIDIS) - 2)
    a, b = np.array(VIRIDIS[i]), np.array(VIRIDIS[i + 1])
    r, g, b = np.round(a + (b - a) * (place - i)).astype(int).tolist()
    return r, g, b


def panel(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    boxes: Sequence[Shape],
    points: Sequence[Shape],
    caption: str | Sequence[str] = (),
    size: tuple[int, int] | None = None,
    scale_to: int = 320,
) -> Image.Image:
    """Returns the picture with `scale_to` pixels on its long side, shapes drawn on it and the caption beneath.

    Models see images squashed to a square: `size`, width and height of the original, gives back the aspect.
    With a caption the panel is `scale_to` pixels wide and the picture is centred on it; without, it is the picture.
    """
    picture = _enlarged(image, size or (image.shape[1], image.shape[0]), scale_to)
    _draw_shapes(picture, boxes, points, font_px=TEXT_PX)
    paragraphs = [caption] if isinstance(caption, str) else list(caption)
    return _with_caption(picture, paragraphs, scale_to) if any(paragraphs) else picture


def rollout_sheet(panels: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Returns the panels in a grid, in reading order, at most `columns` side by side."""
    columns = max(1, min(columns, len(panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max((p.width for p in panels), default=1)
    heights = [max(p.height for p in row) for row in rows]
    gap = PAD_PX
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), TABLE
    )
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, one in enumerate(row):
            sheet.paste(
                Image.new("RGB", (width, height), PAPER), (gap + column * (width + gap), top)
            )
            sheet.paste(one, (gap + column * (width + gap) + (width - one.width) // 2, top))
        top += height + gap
    return sheet


def draw_rollout(
    batch: Batch,
    answer: Answer,
    rewards: Rewards,
    row: int,
    prompt: str,
    completions: Sequence[str],
    scale_to: int = 384,
    gold: str | None = None,
) -> Image.Image:
    """Returns one prompt's panel: gold in white, its G sampled boxes and points in the colour of their total reward.

    The arrays are numpy. A reward that is NaN is drawn in grey; the others share one scale with the whole batch.

    Args:
      completions: the G texts of the same prompt.
      gold: the right answer as text. Without it the caption has the loc tokens of gold boxes or points, without their names, and
        nothing of a gold answer that is text.
    """
    total, scale = (
        np.asarray(rewards.total[row], np.float32),
        reward_scale(np.asarray(rewards.total, np.float32)),
    )
    gold_boxes, gold_points = _row_of(batch.gold.boxes, row), _points_row_of(batch.gold.points, row)
    target = int(batch.gold.target[row])
    if gold is None and target != TEXT:
        gold = _loc_text(gold_points if target == POINTS else gold_boxes)
    boxes = [Shape(at, GOLD, width=2 if target == POINTS else 4) for at in gold_boxes]
    points = [Shape(at, GOLD, width=4) for at in gold_points]
    for g in np.argsort(np.nan_to_num(total, nan=-np.inf), kind="stable"):
        color = reward_color(float(total[g]), scale)
        boxes += [Shape(at, color) for at in _row_of(answer.boxes, (row, g))]
        points += [Shape(at, color) for at in _points_row_of(answer.points, (row, g))]
    caption = [
        prompt,
        *([] if gold is None else [f"gold  {gold or 'nothing'}"]),
        *_spread(total, completions),
    ]
    width, height = np.asarray(batch.size[row]).tolist()
    image = to_uint8(np.asarray(batch.image[row]))
    drawn = panel(
        image, boxes=boxes, points=points, caption=caption, size=(width, height), scale_to=scale_to
    )
    return _stacked([drawn, reward_legend(scale_to, scale)])


def rollout_record(
    batch: Batch,
    answer: Answer,
    rewards: Rewards,
    advantages: Float[np.ndarray, "B G"],
    row: int,
    prompt: str,
    completions: Sequence[str],
    gold: str,
    names: Sequence[str],
) -> dict[str, Any]:
    """Returns as JSON what `draw_rollout` draws of one prompt, for a page that draws it itself; NaN is null.

    Shapes are fractions, `[y1, x1, y2, x2]` and `[y, x]`; `image` is a square that `size`, width and height, gives its aspect.

    Args:
      names: the texts of the question's names, which labels are indices of.
    """
    total = np.asarray(rewards.total[row], np.float32)
    parts = {name: np.asarray(part[row], np.float32) for name, part in rewards.parts.items()}

    def shapes(at: Any, slots: Boxes | Points, where: Any) -> list[dict[str, Any]]:
        used, labels = np.asarray(slots.valid[where]), np.asarray(slots.label[where])
        return [
            {
                "at": [round(float(v), 4) for v in one],
                "label": names[label] if 0 <= label < len(names) else "",
            }
            for one, label in zip(np.asarray(at[where])[used], labels[used], strict=True)
        ]

    def marks(of: Gold | Answer, where: Any) -> dict[str, Any]:
        return {
            "boxes": shapes(of.boxes.yxyx, of.boxes, where),
            "points": shapes(of.points.yx, of.points, where),
        }

    return {
        "prompt": prompt,
        "image": photo_uri(to_uint8(np.asarray(batch.image[row]))),
        "size": np.asarray(batch.size[row]).tolist(),
        "gold": {"text": gold, **marks(batch.gold, row)},
        "completions": [
            {
                "text": text,
                **marks(answer, (row, g)),
                "reward": _number(total[g]),
                "parts": {name: _number(part[g]) for name, part in parts.items()},
                "advantage": _number(advantages[row][g]),
            }
            for g, text in enumerate(completions)
        ],
    }


def _number(value: Any) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def photo_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Returns a model's image as a `data:` address: a drawing as PNG, a photograph as JPEG of at most `PHOTO_PX` a side."""
    picture = Image.fromarray(image)
    if max(picture.size) <= DRAWING_PX:
        return data_uri(picture)
    picture.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def reward_legend(width: int, scale: Scale = (0.0, 1.0)) -> Image.Image:
    """Returns a strip `width` pixels wide that says what the colours of `draw_rollout` mean."""
    strip = Image.new("RGB", (width, LEGEND_PX), PAPER)
    draw, font, middle = ImageDraw.Draw(strip), _font(TEXT_PX - 1), LEGEND_PX // 2 - 2
    x = PAD_PX

    def text(at: int, words: str) -> int:
        draw.text((at, middle), words, font=font, fill=INK, anchor="lm")
        return at + round(font.getlength(words))

    def swatch(at: int, color: Color) -> int:
        draw.rectangle((at, middle - 4, at + 13, middle + 4), fill=color, outline=HALO)
        return at + 18

    low, high = scale
    x = text(x, f"reward  {low:g} ") + 4
    bar = max(40, width // 4)
    for i in range(bar):
        draw.line((x + i, middle - 4, x + i, middle + 4), fill=reward_color(i / (bar - 1)))
    x = text(x + bar + 5, f"{high:g}") + 14
    x = text(swatch(x, GOLD), "gold") + 14
    text(swatch(x, UNJUDGED), "not judged")
    return strip


def draw_answer(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    boxes_px: Sequence[Mapping[str, Any]],
    points_px: Sequence[Mapping[str, Any]],
) -> Image.Image:
    """Returns the picture at its original `size` (width, height) with an answer on it, one colour a label.

    Boxes are `{"label", "xyxy_px"}` and points `{"label", "xy_px"}`, in pixels of the original.
    """
    width, height = size
    picture = Image.fromarray(image)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    labels = list(dict.fromkeys(str(one["label"]) for one in [*boxes_px, *points_px]))
    color = {label: LABEL_COLORS[i % len(LABEL_COLORS)] for i, label in enumerate(labels)}
    line = max(2, round(min(size) / 160))

    def shape(one: Mapping[str, Any], xy: Sequence[float | int]) -> Shape:
        at = [v / (height if i % 2 == 0 else width) for i, v in enumerate(_swapped(xy))]
        return Shape(at, color[str(one["label"])], str(one["label"]), line)

    boxes = [shape(one, one["xyxy_px"]) for one in boxes_px]
    points = [shape(one, one["xy_px"]) for one in points_px]
    _draw_shapes(picture, boxes, points, font_px=max(12, round(min(size) / 28)))
    return picture


def png_bytes(image: Image.Image) -> bytes:
    """Returns the picture as a PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def data_uri(image: Image.Image) -> str:
    """Returns the picture as a `data:image/png` address, for a page that stands alone."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def _enlarged(image: np.ndarray, size: tuple[int, int], scale_to: int) -> Image.Image:
    scale = scale_to / max(size)
    target = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    drawing = scale_to >= NEAREST_FROM * max(image.shape[:2])
    resample = Image.Resampling.NEAREST if drawing else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(target, resample)


def _draw_shapes(
    picture: Image.Image, boxes: Sequence[Shape], points: Sequence[Shape], font_px: int
) -> None:
    draw = ImageDraw.Draw(picture)
    for shape in boxes:
        _draw_box(draw, picture.size, shape)
    for shape in points:
        _draw_point(draw, picture.size, shape)
    taken = [_extent(shape, picture.size) for shape in [*boxes, *points]]
    for shape, own in list(zip([*boxes, *points], taken, strict=True)):
        if shape.label:
            taken.append(_draw_label(draw, picture.size, shape, own, taken, _font(font_px)))


def _extent(shape: Shape, size: tuple[int, int]) -> Extent:
    """Returns the pixels that a shape takes, halo included."""
    at, arm = _pixels(shape.at, size), 5 + 2 * shape.width if len(shape.at) == 2 else 1
    (y1, x1), (y2, x2) = at[:2], at[-2:]
    return min(x1, x2) - arm, min(y1, y2) - arm, max(x1, x2) + arm + 1, max(y1, y2) + arm + 1


def _draw_box(draw: ImageDraw.ImageDraw, size: tuple[int, int], shape: Shape) -> None:
    y1, x1, y2, x2 = _pixels(shape.at, size)
    left, right, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    w = shape.width
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=HALO, width=w + 2)
    if right - left > 2 * w and bottom - top > 2 * w:
        draw.rectangle((left, top, right, bottom), outline=shape.color, width=w)
    else:
        draw.rectangle((left, top, right, bottom), fill=shape.color)
    if y2 < y1 or x2 < x1:
        # Its corners are in the wrong order, which no outline could show: struck through.
        draw.line((left, bottom, right, top), fill=HALO, width=w + 2)
        draw.line((left, bottom, right, top), fill=shape.color, width=w)


def _draw_point(draw: ImageDraw.ImageDraw, size: tuple[int, int], shape: Shape) -> None:
    y, x = _pixels(shape.at, size)
    arm = 4 + 2 * shape.width
    for grow, color in ((1, HALO), (0, shape.color)):
        low, high = shape.width // 2 + grow, (shape.width - 1) // 2 + grow
        draw.rectangle((x - arm - grow, y - low, x + arm + grow, y + high), fill=color)
        draw.rectangle((x - low, y - arm - grow, x + high, y + arm + grow), fill=color)
    # A bar's halo crosses the other bar: the colour goes over both at the end.
    low, high = shape.width // 2, (shape.width - 1) // 2
    draw.rectangle((x - arm, y - low, x + arm, y + high), fill=shape.color)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    shape: Shape,
    own: Extent,
    taken: Sequence[Extent],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Extent:
    """Returns where it draws the label: above its box or right of its point, or where it hides less of what is drawn."""
    text = _one_line(shape.label)
    pad = 3
    width = round(font.getlength(text)) + 2 * pad
    height = (
        round(sum(font.getmetrics())) + 2 if isinstance(font, ImageFont.FreeTypeFont) else LINE_PX
    )
    beside = [
        place
        for around in _around(own, taken)
        for place in _places(around, width, height, right_first=len(shape.at) == 2)
    ]
    inside = [(own[0] + 1 + shape.width, own[1] + 1 + shape.width)] if len(shape.at) == 4 else []
    fitted = [
        (max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height)))
        for x, y in [*beside, *inside]
    ]
    left, top = min(fitted, key=lambda at: _hidden((*at, at[0] + width, at[1] + height), taken))
    dark = 0.299 * shape.color[0] + 0.587 * shape.color[1] + 0.114 * shape.color[2] < 128
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=shape.color, outline=HALO)
    draw.text(
        (left + pad, top + height / 2), text, font=font, fill=PAPER if dark else HALO, anchor="lm"
    )
    return left, top, left + width, top + height


def _around(own: Extent, taken: Sequence[Extent]) -> list[Extent]:
    """Returns a shape's extent, and the smallest that holds it: a point's label may stand beside the box that it lies in."""
    holding = [
        e
        for e in taken
        if e != own and e[0] <= own[0] and e[1] <= own[1] and e[2] >= own[2] and e[3] >= own[3]
    ]
    return [own, *sorted(holding, key=_area)[:1]]


def _places(around: Extent, width: int, height: int, right_first: bool) -> list[tuple[int, int]]:
    """Returns left and top of a plate above, below, right and left of something, best first."""
    left, top, right, bottom = around
    middle = (top + bottom - height) // 2
    upright, level = (
        [(left, top - height), (left, bottom)],
        [(right, middle), (left - width, middle)],
    )
    return [*level, *upright] if right_first else [*upright, *level]


def _hidden(plate: Extent, taken: Sequence[Extent]) -> float:
    """Returns how much a plate hides: the share of each shape, in tenths, so that a corner of a large box is nothing."""
    both = [
        (max(a[0], plate[0]), max(a[1], plate[1]), min(a[2], plate[2]), min(a[3], plate[3]))
        for a in taken
    ]
    return sum(
        round(_area(common) / _area(one), 1) for common, one in zip(both, taken, strict=True)
    )


def _area(extent: Extent) -> int:
    return max(0, extent[2] - extent[0]) * max(0, extent[3] - extent[1])


def _with_caption(picture: Image.Image, paragraphs: Sequence[str], width: int) -> Image.Image:
    font = _font(TEXT_PX)
    lines = [
        line for paragraph in paragraphs for line in _wrapped(paragraph, font, width - 2 * PAD_PX)
    ]
    out = Image.new("RGB", (width, picture.height + LINE_PX * len(lines) + 2 * PAD_PX), PAPER)
    out.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        middle = picture.height + PAD_PX + LINE_PX * i + LINE_PX // 2
        draw.text((PAD_PX, middle), line, font=font, fill=INK, anchor="lm")
    return out


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Returns `text` as lines of at most `width` pixels, broken at spaces, after `>` or anywhere if need be."""
    lines, line = [], ""
    # No letter is narrower than two pixels, so that nothing beyond the cut could have been shown.
    for piece in re.findall(r"[^\s>]*>|[^\s>]+|\s+", _one_line(text)[: CAPTION_LINES * width]):
        if line and font.getlength(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line = line + piece if line else piece.lstrip()
        while font.getlength(line) > width:
            fits = max(
                1,
                bisect.bisect_right(
                    range(len(line)), width, key=lambda n: font.getlength(line[: n + 1])
                ),
            )
            lines.append(line[:fits])
            line = line[fits:]
    lines.append(line.rstrip())
    if len(lines) <= CAPTION_LINES:
        return lines
    last = lines[CAPTION_LINES - 1]
    while font.getlength(last + " …") > width:
        last = last[:-1]
    return [*lines[: CAPTION_LINES - 1], last + " …"]


def _spread(total: np.ndarray, completions: Sequence[str]) -> list[str]:
    """Returns the lines on a group: its mean reward, its best and its worst completion."""
    judged = total[~np.isnan(total)]
    if judged.size == 0:
        return [f"none of {len(total)} completions judged", f"first  {completions[0]}"]
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    kinds = len(set(completions))
    return [
        f"mean {judged.mean():.2f}  of {judged.size} completions, {kinds} different",
        f"best {total[best]:.2f}  {completions[best]}",
        f"worst {total[worst]:.2f}  {completions[worst]}",
    ]


def _stacked(images: Sequence[Image.Image]) -> Image.Image:
    out = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), PAPER)
    top = 0
    for image in images:
        out.paste(image, (0, top))
        top += image.height
    return out


def _row_of(boxes: Boxes, row: Any) -> list[list[float]]:
    return np.asarray(boxes.yxyx[row])[np.asarray(boxes.valid[row])].tolist()


def _points_row_of(points: Points, row: Any) -> list[list[float]]:
    return np.asarray(points.yx[row])[np.asarray(points.valid[row])].tolist()


def _loc_text(shapes: Sequence[Sequence[float | int]]) -> str:
    """Returns the shapes as the tokens a completion would spell them with."""
    bins = [
        np.clip(np.round(np.array(at) * LOC_MAX), 0, LOC_MAX).astype(int).tolist() for at in shapes
    ]
    return " ; ".join("".join(f"<loc{b:04d}>" for b in one) for one in bins)


def _pixels(at: Sequence[float | int], size: tuple[int, int]) -> list[int]:
    """Returns the pixel rows and columns of `y, x` fractions, inside the picture."""
    sides = (size[1], size[0])
    return [min(max(round(float(v) * sides[i % 2]), 0), sides[i % 2] - 1) for i, v in enumerate(at)]


def _swapped(xy: Sequence[float | int]) -> list[float]:
    return [float(v) for i in range(0, len(xy), 2) for v in (xy[i + 1], xy[i])]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _font(px: int) -> Any:
    return ImageFont.load_default(size=px)
