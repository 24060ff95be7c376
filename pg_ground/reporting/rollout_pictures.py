"""Pictures and records of rollouts: ground truth in white, sampled boxes in the colour of the
reward.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from pg_ground.reporting import drawing
from pg_ground.reporting.drawing import GOLD, HALO, INK, PAD_PX, PAPER, TEXT_PX, Color, Shape
from pg_ground.types import POINTS, TEXT, Answer, Batch, Boxes, Gold, JsonDict, Points, Rewards
from pg_ground.vocab import LOC_MAX

Scale = tuple[float, float]
"""The rewards of the first and of the last colour."""

UNSCORED: Color = (150, 150, 150)
"""Colour of a completion whose reward is NaN."""

SHEET: Color = (222, 222, 218)
"""Background between the panels of a sheet."""

VIRIDIS: tuple[Color, ...] = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)
"""Nine equidistant colours of viridis (van der Walt and Smith 2015), for colour-blind readers too.
"""

LEGEND_PX = 22


def reward_scale(total: Float[np.ndarray, "..."]) -> Scale:
    """Returns the rewards at the two ends of the colours: 0 and 1, or halves beyond all rewards.

    The scale depends on the smallest and the largest reward alone, so equal rewards have one
    colour. It is never narrower than [0, 1]. So rewards that hardly differ look alike, and most
    pictures of different steps can be compared.
    """
    finite = total[np.isfinite(total)].astype(np.float64)
    low, high = finite.min(initial=0.0), finite.max(initial=1.0)
    # Rounding first: 1.0000001, a sum of float32 rewards, must give 1 and not 1.5.
    return math.floor(round(low * 2, 3)) / 2, math.ceil(round(high * 2, 3)) / 2


def reward_color(reward: float, scale: Scale = (0.0, 1.0)) -> Color:
    """Returns the colour of a reward: viridis along `scale`, its ends beyond, grey for NaN."""
    if math.isnan(reward):
        return UNSCORED
    low, high = scale
    position = min(max((reward - low) / (high - low), 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(position), len(VIRIDIS) - 2)
    start, end = np.array(VIRIDIS[i]), np.array(VIRIDIS[i + 1])
    red, green, blue = np.round(start + (end - start) * (position - i)).astype(int).tolist()
    return red, green, blue


def reward_legend(width: int, scale: Scale = (0.0, 1.0)) -> Image.Image:
    """Returns a strip, `width` pixels wide, that explains the colours of `draw_rollout`."""
    strip = Image.new("RGB", (width, LEGEND_PX), PAPER)
    draw, font, middle = ImageDraw.Draw(strip), drawing.font_of(TEXT_PX - 1), LEGEND_PX // 2 - 2

    def text(left: int, words: str) -> int:
        draw.text((left, middle), words, font=font, fill=INK, anchor="lm")
        return left + round(font.getlength(words))

    def swatch(left: int, color: Color) -> int:
        draw.rectangle((left, middle - 4, left + 13, middle + 4), fill=color, outline=HALO)
        return left + 18

    low, high = scale
    left = text(PAD_PX, f"reward  {low:g} ") + 4
    bar = max(40, width // 4)
    for i in range(bar):
        color = reward_color(i / (bar - 1))
        draw.line((left + i, middle - 4, left + i, middle + 4), fill=color)
    left = text(left + bar + 5, f"{high:g}") + 14
    left = text(swatch(left, GOLD), "gold") + 14
    text(swatch(left, UNSCORED), "not scored")
    return strip


def sheet(panels: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Returns the panels in a grid in reading order, with at most `columns` panels in a row."""
    columns = max(1, min(columns, len(panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    width = max((panel.width for panel in panels), default=1)
    heights = [max(panel.height for panel in row) for row in rows]
    gap = PAD_PX
    size = (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1))
    out = Image.new("RGB", size, SHEET)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            left = gap + column * (width + gap)
            out.paste(Image.new("RGB", (width, height), PAPER), (left, top))
            out.paste(panel, (left + (width - panel.width) // 2, top))
        top += height + gap
    return out


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
    """Returns the panel of one prompt: ground truth in white, G completions in reward colours.

    The arrays are numpy arrays. A completion whose reward is NaN is grey. All other completions of
    the batch share one scale of colours.

    Args:
      row: index of the prompt in the batch.
      completions: the G texts of the prompt.
      gold: the right answer as text. If it is None, the caption has the loc tokens of the ground
        truth without names, and nothing for an answer that is text.
    """
    total = np.asarray(rewards.total[row], np.float32)
    scale = reward_scale(np.asarray(rewards.total, np.float32))
    gold_boxes = _used_boxes(batch.gold.boxes, row)
    gold_points = _used_points(batch.gold.points, row)
    target = int(batch.gold.target[row])
    if gold is None and target != TEXT:
        gold = _loc_text(gold_points if target == POINTS else gold_boxes)
    boxes = [Shape(box, GOLD, width=2 if target == POINTS else 4) for box in gold_boxes]
    points = [Shape(point, GOLD, width=4) for point in gold_points]
    # The completion with the largest reward is drawn last, and so on top.
    for g in np.argsort(np.nan_to_num(total, nan=-np.inf), kind="stable"):
        color = reward_color(float(total[g]), scale)
        boxes += [Shape(box, color) for box in _used_boxes(answer.boxes, (row, g))]
        points += [Shape(point, color) for point in _used_points(answer.points, (row, g))]
    gold_line = [] if gold is None else [f"gold  {gold or 'nothing'}"]
    width, height = np.asarray(batch.size[row]).tolist()
    panel = drawing.panel(
        drawing.to_uint8(np.asarray(batch.image[row])),
        boxes=boxes,
        points=points,
        caption=[prompt, *gold_line, *_group_lines(total, completions)],
        size=(width, height),
        scale_to=scale_to,
    )
    return drawing.stacked([panel, reward_legend(scale_to, scale)])


def _group_lines(total: np.ndarray, completions: Sequence[str]) -> list[str]:
    """Returns the mean reward, the best and the worst completion of a group, a line each."""
    finite = total[~np.isnan(total)]
    if finite.size == 0:
        return [f"none of {len(total)} completions scored", f"first  {completions[0]}"]
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    distinct = len(set(completions))
    return [
        f"mean {finite.mean():.2f}  of {finite.size} completions, {distinct} different",
        f"best {total[best]:.2f}  {completions[best]}",
        f"worst {total[worst]:.2f}  {completions[worst]}",
    ]


def _loc_text(shapes: Sequence[Sequence[float | int]]) -> str:
    """Returns the loc tokens of boxes or points, as a completion writes them."""
    bins = [
        np.clip(np.round(np.array(shape) * LOC_MAX), 0, LOC_MAX).astype(int).tolist()
        for shape in shapes
    ]
    return " ; ".join("".join(f"<loc{b:04d}>" for b in shape_bins) for shape_bins in bins)


def _used_boxes(boxes: Boxes, index: Any) -> list[list[float]]:
    return np.asarray(boxes.yxyx[index])[np.asarray(boxes.valid[index])].tolist()


def _used_points(points: Points, index: Any) -> list[list[float]]:
    return np.asarray(points.yx[index])[np.asarray(points.valid[index])].tolist()


# records


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
) -> JsonDict:
    """Returns one prompt and its completions as JSON, for a page that draws them. NaN is null.

    Shapes are fractions: `[y1, x1, y2, x2]` and `[y, x]`. `image` is a square. `size`, the width
    and the height of the original image, gives its aspect.

    Args:
      row: index of the prompt in the batch.
      names: the names of the question, as texts. The labels are indices of `names`.
    """
    total = np.asarray(rewards.total[row], np.float32)
    parts = {name: np.asarray(part[row], np.float32) for name, part in rewards.parts.items()}
    return {
        "prompt": prompt,
        "image": drawing.photo_uri(drawing.to_uint8(np.asarray(batch.image[row]))),
        "size": np.asarray(batch.size[row]).tolist(),
        "gold": {"text": gold, **_shape_records(batch.gold, row, names)},
        "completions": [
            {
                "text": text,
                **_shape_records(answer, (row, g), names),
                "reward": _number(total[g]),
                "parts": {name: _number(part[g]) for name, part in parts.items()},
                "advantage": _number(advantages[row][g]),
            }
            for g, text in enumerate(completions)
        ],
    }


def _shape_records(annotation: Gold | Answer, index: Any, names: Sequence[str]) -> JsonDict:
    """Returns the boxes and the points at an index as JSON."""

    def records(coordinates: Any, slots: Boxes | Points) -> list[JsonDict]:
        used = np.asarray(slots.valid[index])
        labels = np.asarray(slots.label[index])[used]
        return [
            {
                "at": [round(float(v), 4) for v in shape],
                "label": names[label] if 0 <= label < len(names) else "",
            }
            for shape, label in zip(np.asarray(coordinates[index])[used], labels, strict=True)
        ]

    return {
        "boxes": records(annotation.boxes.yxyx, annotation.boxes),
        "points": records(annotation.points.yx, annotation.points),
    }


def _number(value: Any) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
