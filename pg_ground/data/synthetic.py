"""The embedded task: scenes drawn from (split, seed, index) alone, with no files.

`synthetic:SPLIT?side=48&shapes=3&loose=0.5&seed=0&scenes=512`: a textured background and several shapes of different colour,
form, size and place; the phrase ("red circle") fits exactly one of them, and another one always shares its colour or its form.
There are 2^20 scenes in each split unless `scenes` says how many, so a model that sees a few thousand cannot memorise them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pg_ground.config import nearest
from pg_ground.types import UserError

SPLITS = {"train": 0, "heldout": 1}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 50, 200),
    "white": (245, 245, 245),
}

PAINTS = np.array(list(COLOURS.values()), np.float32)

FORMS = ("circle", "square", "triangle", "cross")


@dataclass(frozen=True)
class Scenes:
    """A split as a random-access sequence of records: `image`, `phrase`, `box` and `point` in pixels.

    `objects` are the names and exact boxes of all shapes, the first of them the one that the phrase fits.
    """

    split: str = "train"
    side: int = 48  # pixels
    shapes: int = 3  # in every scene
    colours: int = 4  # the first so many of COLOURS
    forms: int = 3  # the first so many of FORMS
    loose: float = 0.0  # each side of the box is drawn outside the shape by up to this share of the shape's extent
    seed: int = 0
    scenes: int = 2**20  # in the split: the first so many

    root: Path | None = None

    def __len__(self) -> int:
        return self.scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([SPLITS[self.split], self.seed, int(index)])
        kinds = _kinds(rng, self.shapes, self.colours, self.forms)
        places = _places(rng, self.shapes)
        image = _background(rng, self.side)
        for (colour, form), place in zip(kinds, places, strict=True):
            paint = PAINTS[colour] + rng.random(3, np.float32) * 50 - 25
            _paint(image, FORMS[form], place, paint)
        x1, y1, x2, y2 = places[0]
        width, height = x2 - x1, y2 - y1
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
                {"name": name, "box": (np.array(place) * self.side).tolist()}
                for name, place in zip(names, places, strict=True)
            ],
        }


def open_scenes(split: str, options: Mapping[str, str]) -> Scenes:
    """Returns the scenes that a `synthetic:` uri names.

    Raises:
      UserError: no such split or option, or a value that is no number or out of range.
    """
    kinds = {f.name: f.type for f in fields(Scenes) if f.name not in ("split", "root")}
    if split not in SPLITS:
        raise UserError(f"synthetic:{split} does not exist: {nearest(split, SPLITS)}")
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in kinds:
            raise UserError(f"synthetic:{split} has no option {name}: {nearest(name, kinds)}")
        try:
            values[name] = float(text) if kinds[name] in (float, "float") else int(text)
        except ValueError:
            raise UserError(f"synthetic:{split}?{name}={text}: a number is wanted") from None
    scenes = Scenes(split, **values)
    limits = {
        "side": (16, 1024),
        "shapes": (2, 6),
        "colours": (2, len(COLOURS)),
        "forms": (2, len(FORMS)),
        "loose": (0, 2),
        "scenes": (1, 2**20),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(scenes, name) <= high:
            raise UserError(
                f"synthetic:{split}?{name}={getattr(scenes, name)}: it must be from {low} to {high}"
            )
    if scenes.shapes > scenes.colours * scenes.forms:
        raise UserError(
            f"synthetic:{split}: {scenes.shapes} shapes need as many different colours x forms"
        )
    if scenes.seed < 0:
        raise UserError(f"synthetic:{split}?seed={scenes.seed}: it must be 0 or more")
    return scenes


def _kinds(
    rng: np.random.Generator, shapes: int, colours: int, forms: int
) -> list[tuple[int, int]]:
    """Returns distinct (colour, form) pairs: the target, one that shares its colour or its form, and others."""
    pairs = [(c, f) for c in range(colours) for f in range(forms)]
    rng.shuffle(pairs)
    target = pairs[0]
    alike = next(p for p in pairs[1:] if p[0] == target[0] or p[1] == target[1])
    others = [p for p in pairs[1:] if p != alike]
    return [target, alike, *others[: shapes - 2]]


def _places(rng: np.random.Generator, shapes: int) -> list[tuple[float, float, float, float]]:
    """Returns boxes (x1, y1, x2, y2) as fractions, of different sizes, that overlap little."""
    smallest, largest = (0.24, 0.48) if shapes <= 3 else (0.18, 0.32)
    while True:
        places: list[tuple[float, float, float, float]] = []
        for _ in range(40):
            width, height = rng.uniform(smallest, largest) * rng.uniform(0.85, 1.15, 2)
            x1, y1 = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            place = (x1, y1, x1 + width, y1 + height)
            if all(_overlap(place, other) < 0.02 for other in places):
                places.append(place)
            if len(places) == shapes:
                return places


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Returns the shared area as a share of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0) * max(height, 0) / smaller


def _background(rng: np.random.Generator, side: int) -> Float[np.ndarray, "side side 3"]:
    """Returns a muted colour under coarse and fine coloured noise, in about 0..255."""
    base = 70 + 100 * rng.random(3, np.float32)
    coarse = base + 50 * (rng.random((6, 6, 3), np.float32) - 0.5)
    cell = np.arange(side) * 6 // side
    return coarse[cell[:, None], cell] + 35 * (rng.random((side, side, 3), np.float32) - 0.5)


def _paint(
    image: Float[np.ndarray, "side side 3"],
    form: str,
    place: tuple[float, float, float, float],
    paint: Float[np.ndarray, " 3"],
) -> None:
    """Paints a shape onto `image`, edges antialiased; the shape touches all four sides of its box."""
    side = len(image)
    x1, y1, x2, y2 = place
    left, top, right, bottom = (
        int(x1 * side),
        int(y1 * side),
        int(x2 * side) + 1,
        int(y2 * side) + 1,
    )
    u = np.abs((2 * np.arange(left, min(right, side)) + 1) / side - x1 - x2)[None, :] / (x2 - x1)
    v = ((2 * np.arange(top, min(bottom, side)) + 1) / side - y1 - y2)[:, None] / (y2 - y1)
    if form == "circle":
        reach = np.sqrt(u * u + v * v)
    elif form == "square":
        reach = np.maximum(u, np.abs(v))
    elif form == "triangle":
        reach = np.maximum(v, 2 * u - v)
    else:
        reach = np.minimum(np.maximum(u, 3 * np.abs(v)), np.maximum(3 * u, np.abs(v)))
    softness = min(x2 - x1, y2 - y1) * side / 2
    alpha = np.minimum(np.maximum(0.5 + (1 - reach) * softness, 0), 1)[..., None]
    region = image[top:bottom, left:right]
    region += alpha * (paint - region)
