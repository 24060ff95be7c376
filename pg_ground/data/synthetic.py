"""Scenes that are drawn, without any files: the embedded task.

`synthetic:SPLIT?side=48&shapes=3&loose=0.5&seed=0&scenes=512` is a textured background with several
shapes of different colour, form, size and position. The phrase ("red circle") fits exactly one
shape. Another shape always shares its colour or its form. A scene depends on (split, seed, index)
only. Each split has 2^20 scenes unless `scenes` names another number, so a model that sees a few
thousand scenes cannot memorise them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pg_ground.types import JsonDict, UserError, nearest

SPLITS = {"train": 0, "heldout": 1}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
}
"""RGB values by name."""

PAINTS = np.array(list(COLOURS.values()), np.float32)

FORMS = ("circle", "square", "triangle", "cross")

LIMITS = {
    "side": (16, 1024),
    "shapes": (2, 6),
    "colours": (2, len(COLOURS)),
    "forms": (2, len(FORMS)),
    "loose": (0, 2),
    "scenes": (1, 2**20),
}
"""The smallest and the largest value of each option."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in fractions of the image."""


@dataclass(frozen=True)
class Scenes:
    """A split as a random-access sequence of records: `image`, `phrase`, `box`, `point`, `objects`.

    Boxes and points are in pixels. `objects` are the names and exact boxes of all shapes. The first
    object is the one that the phrase fits.
    """

    split: str = "train"
    side: int = 48  # pixels
    shapes: int = 3  # in every scene
    colours: int = 4  # how many of COLOURS are used, from the first on
    forms: int = 3  # how many of FORMS are used, from the first on
    loose: float = 0.0  # `box` is larger on each side by up to this share of the shape's extent
    seed: int = 0
    scenes: int = 2**20  # number of scenes in the split

    root: Path | None = None

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> JsonDict:
        rng = np.random.default_rng([SPLITS[self.split], self.seed, int(index)])
        kinds = _draw_kinds(rng, self.shapes, self.colours, self.forms)
        boxes = _draw_boxes(rng, self.shapes)
        image = _draw_background(rng, self.side)
        for (colour, form), shape_box in zip(kinds, boxes, strict=True):
            paint = PAINTS[colour] + rng.random(3, np.float32) * 50 - 25
            _paint_shape(image, FORMS[form], shape_box, paint)
        x1, y1, x2, y2 = boxes[0]
        width = x2 - x1
        height = y2 - y1
        left, top, right, bottom = rng.uniform(0, self.loose, 4) if self.loose else np.zeros(4)
        box = np.clip(
            [x1 - left * width, y1 - top * height, x2 + right * width, y2 + bottom * height], 0, 1
        )
        names = [f"{list(COLOURS)[colour]} {FORMS[form]}" for colour, form in kinds]
        return {
            "image": np.minimum(np.maximum(image, 0), 255).astype(np.uint8),
            "phrase": names[0],
            "box": (box * self.side).tolist(),
            "point": [(x1 + x2) / 2 * self.side, (y1 + y2) / 2 * self.side],
            "objects": [
                {"name": name, "box": (np.array(shape_box) * self.side).tolist()}
                for name, shape_box in zip(names, boxes, strict=True)
            ],
        }


def open_scenes(split: str, options: Mapping[str, str]) -> Scenes:
    """Returns the scenes of a `synthetic:` uri.

    Raises:
      UserError: the split or an option does not exist, or a value is no number or out of range.
    """
    uri = f"synthetic:{split}"
    if split not in SPLITS:
        raise UserError(f"{uri} does not exist: {nearest(split, SPLITS)}")
    types = {f.name: f.type for f in fields(Scenes) if f.name not in ("split", "root")}
    values: JsonDict = {}
    for name, text in options.items():
        if name not in types:
            raise UserError(f"{uri} has no option {name}: {nearest(name, types)}")
        try:
            values[name] = float(text) if types[name] in (float, "float") else int(text)
        except ValueError:
            raise UserError(f"{uri}?{name}={text}: the value must be a number") from None
    scenes = Scenes(split, **values)
    for name, (low, high) in LIMITS.items():
        value = getattr(scenes, name)
        if not low <= value <= high:
            raise UserError(f"{uri}?{name}={value}: it must be from {low} to {high}")
    if scenes.shapes > scenes.colours * scenes.forms:
        raise UserError(f"{uri}: {scenes.shapes} shapes need as many different colours x forms")
    if scenes.seed < 0:
        raise UserError(f"{uri}?seed={scenes.seed}: it must be 0 or more")
    return scenes


def _draw_kinds(
    rng: np.random.Generator, shapes: int, colours: int, forms: int
) -> list[tuple[int, int]]:
    """Returns distinct (colour, form) pairs.

    The first is the target. The second shares its colour or its form with the target.
    """
    pairs = [(colour, form) for colour in range(colours) for form in range(forms)]
    rng.shuffle(pairs)
    target = pairs[0]
    similar = next(p for p in pairs[1:] if p[0] == target[0] or p[1] == target[1])
    others = [pair for pair in pairs[1:] if pair != similar]
    return [target, similar, *others[: shapes - 2]]


def _draw_boxes(rng: np.random.Generator, shapes: int) -> list[Box]:
    """Returns boxes of different sizes that overlap little."""
    smallest, largest = (0.24, 0.48) if shapes <= 3 else (0.18, 0.32)
    while True:
        boxes: list[Box] = []
        for _ in range(40):
            width, height = rng.uniform(smallest, largest) * rng.uniform(0.85, 1.15, 2)
            x1, y1 = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            box = (x1, y1, x1 + width, y1 + height)
            if all(_overlap(box, other) < 0.02 for other in boxes):
                boxes.append(box)
            if len(boxes) == shapes:
                return boxes


def _overlap(a: Box, b: Box) -> float:
    """Returns the shared area of two boxes as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / smaller


def _draw_background(rng: np.random.Generator, side: int) -> Float[np.ndarray, "side side 3"]:
    """Returns a muted colour under coarse and fine coloured noise, with values in about 0..255."""
    base = 70 + 100 * rng.random(3, np.float32)
    coarse = base + 50 * (rng.random((6, 6, 3), np.float32) - 0.5)
    cell = np.arange(side) * 6 // side
    return coarse[cell[:, None], cell] + 35 * (rng.random((side, side, 3), np.float32) - 0.5)


def _paint_shape(
    image: Float[np.ndarray, "side side 3"],
    form: str,
    box: Box,
    paint: Float[np.ndarray, " 3"],
) -> None:
    """Paints a shape onto `image`, with antialiased edges. It touches all four sides of its box."""
    side = len(image)
    x1, y1, x2, y2 = box
    left = int(x1 * side)
    top = int(y1 * side)
    right = int(x2 * side) + 1
    bottom = int(y2 * side) + 1
    # u and v are the coordinates of pixel centres in the box: -1..1 along each axis. All forms are
    # symmetric to the vertical axis, so u is absolute.
    u = np.abs((2 * np.arange(left, min(right, side)) + 1) / side - x1 - x2)[None, :] / (x2 - x1)
    v = ((2 * np.arange(top, min(bottom, side)) + 1) / side - y1 - y2)[:, None] / (y2 - y1)
    # The distance is 1 on the outline and smaller inside.
    if form == "circle":
        distance = np.sqrt(u * u + v * v)
    elif form == "square":
        distance = np.maximum(u, np.abs(v))
    elif form == "triangle":
        distance = np.maximum(v, 2 * u - v)
    else:
        distance = np.minimum(np.maximum(u, 3 * np.abs(v)), np.maximum(3 * u, np.abs(v)))
    pixels_per_unit = min(x2 - x1, y2 - y1) * side / 2
    alpha = np.minimum(np.maximum(0.5 + (1 - distance) * pixels_per_unit, 0), 1)[..., None]
    region = image[top:bottom, left:right]
    region += alpha * (paint - region)
