"""Pictures of images with boxes, points and captions.

PIL draws them, and nothing is written to disk.
"""

import base64
import bisect
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from pg_ground.types import JsonObject

Color = tuple[int, int, int]

Extent = tuple[int, int, int, int]
"""Left, top, right and bottom pixel. Right and bottom are excluded."""

GOLD: Color = (255, 255, 255)
"""Colour of the ground truth."""

HALO: Color = (0, 0, 0)
"""Around every line, so that a line of any colour shows on an image of any colour."""

PAPER: Color = (250, 250, 248)
"""Background of captions."""

INK: Color = (28, 28, 30)
"""Text of captions."""

LABEL_COLORS: tuple[Color, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
"""Palette of Okabe and Ito (2008), the bright colours first."""

TEXT_PX = 13
LINE_PX = 17
PAD_PX = 8
CAPTION_LINES = 4
"""Lines of one paragraph of a caption. A longer paragraph is cut."""

DRAWING_PX = 128
"""A page stores an image of at most this many pixels a side as PNG, pixel by pixel."""

PHOTO_PX = 448
"""A page stores a larger image as JPEG of at most this many pixels a side."""

NEAREST_FROM = 2.5
"""An image that is enlarged by this factor or more is a drawing, and keeps its pixels as squares.
"""


class Shape(NamedTuple):
    """A box or a point to draw."""

    fractions: Sequence[float | int]
    """Fractions of the image: y1, x1, y2, x2 of a box, or y, x of a point."""
    color: Color
    label: str = ""
    width: int = 2
    """Width of the line in pixels of the picture. The halo adds one pixel on either side."""


def to_uint8(
    image: Float[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 3"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of a model's image in 0..255. A float image has values in [-1, 1].

    An image of bytes is returned as it is. A `Batch` holds images of either kind.
    """
    if image.dtype == np.uint8:
        return image
    return np.clip(np.round((image.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def panel(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    boxes: Sequence[Shape],
    points: Sequence[Shape],
    caption: str | Sequence[str] = (),
    size: tuple[int, int] | None = None,
    scale_to: int = 320,
) -> Image.Image:
    """Returns an enlarged image with shapes on it and a caption beneath.

    Args:
      caption: one paragraph or several. With a caption the panel is `scale_to` pixels wide, and the
        image stands in the middle.
      size: width and height of the original image. A model sees a square; `size` restores the
        aspect.
      scale_to: pixels of the longer side of the image in the panel.
    """
    picture = _enlarged(image, size or (image.shape[1], image.shape[0]), scale_to)
    _draw_shapes(picture, boxes, points, font_px=TEXT_PX)
    paragraphs = [caption] if isinstance(caption, str) else list(caption)
    return _with_caption(picture, paragraphs, scale_to) if any(paragraphs) else picture


def draw_answer(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    boxes_px: Sequence[JsonObject],
    points_px: Sequence[JsonObject],
) -> Image.Image:
    """Returns an image at its original size with an answer drawn on it. Each label has a colour.

    Args:
      size: width and height of the original image.
      boxes_px: `{"label", "xyxy_px"}` in pixels of the original image.
      points_px: `{"label", "xy_px"}` in pixels of the original image.
    """
    width, height = size
    picture = Image.fromarray(image)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    labels = list(dict.fromkeys(str(item["label"]) for item in [*boxes_px, *points_px]))
    color = {label: LABEL_COLORS[i % len(LABEL_COLORS)] for i, label in enumerate(labels)}
    line_px = max(2, round(min(size) / 160))

    def shape(item: JsonObject, xy: Sequence[float | int]) -> Shape:
        yx = _swapped(xy)
        fractions = [v / (height if i % 2 == 0 else width) for i, v in enumerate(yx)]
        label = str(item["label"])
        return Shape(fractions, color[label], label, line_px)

    boxes = [shape(item, item["xyxy_px"]) for item in boxes_px]
    points = [shape(item, item["xy_px"]) for item in points_px]
    _draw_shapes(picture, boxes, points, font_px=max(12, round(min(size) / 28)))
    return picture


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Returns the images below one another, aligned to the left."""
    width, height = max(image.width for image in images), sum(image.height for image in images)
    out = Image.new("RGB", (width, height), PAPER)
    top = 0
    for image in images:
        out.paste(image, (0, top))
        top += image.height
    return out


def png_bytes(image: Image.Image) -> bytes:
    """Returns the content of a PNG file."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def data_uri(image: Image.Image) -> str:
    """Returns a picture as a `data:image/png` address, for a page that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def photo_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Returns a model's image as a `data:` address: PNG for a drawing, JPEG for a photograph."""
    picture = Image.fromarray(image)
    if max(picture.size) <= DRAWING_PX:
        return data_uri(picture)
    picture.thumbnail((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def font_of(px: int) -> Any:
    """Returns PIL's own font, whose letters are `px` pixels high."""
    return ImageFont.load_default(size=px)


def _enlarged(image: np.ndarray, size: tuple[int, int], scale_to: int) -> Image.Image:
    scale = scale_to / max(size)
    new_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    is_drawing = scale_to >= NEAREST_FROM * max(image.shape[:2])
    resample = Image.Resampling.NEAREST if is_drawing else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(new_size, resample)


# shapes


def _draw_shapes(
    picture: Image.Image, boxes: Sequence[Shape], points: Sequence[Shape], font_px: int
) -> None:
    """Draws boxes, then points, then the labels of both."""
    draw = ImageDraw.Draw(picture)
    for shape in boxes:
        _draw_box(draw, picture.size, shape)
    for shape in points:
        _draw_point(draw, picture.size, shape)
    shapes = [*boxes, *points]
    extents = [_extent(shape, picture.size) for shape in shapes]
    occupied = list(extents)
    for shape, extent in zip(shapes, extents, strict=True):
        if shape.label:
            plate = _draw_label(draw, picture.size, shape, extent, occupied, font_of(font_px))
            occupied.append(plate)


def _extent(shape: Shape, size: tuple[int, int]) -> Extent:
    """Returns the pixels that a shape covers, halo included."""
    pixels = _pixels(shape.fractions, size)
    arm = 5 + 2 * shape.width if len(shape.fractions) == 2 else 1
    (y1, x1), (y2, x2) = pixels[:2], pixels[-2:]
    return min(x1, x2) - arm, min(y1, y2) - arm, max(x1, x2) + arm + 1, max(y1, y2) + arm + 1


def _draw_box(draw: ImageDraw.ImageDraw, size: tuple[int, int], shape: Shape) -> None:
    y1, x1, y2, x2 = _pixels(shape.fractions, size)
    left, right, top, bottom = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    w = shape.width
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=HALO, width=w + 2)
    if right - left > 2 * w and bottom - top > 2 * w:
        draw.rectangle((left, top, right, bottom), outline=shape.color, width=w)
    else:
        draw.rectangle((left, top, right, bottom), fill=shape.color)
    if y2 < y1 or x2 < x1:
        # The corners are in the wrong order. No outline shows that, so a line crosses the box.
        draw.line((left, bottom, right, top), fill=HALO, width=w + 2)
        draw.line((left, bottom, right, top), fill=shape.color, width=w)


def _draw_point(draw: ImageDraw.ImageDraw, size: tuple[int, int], shape: Shape) -> None:
    """Draws a cross."""
    y, x = _pixels(shape.fractions, size)
    arm = 4 + 2 * shape.width
    for grow, color in ((1, HALO), (0, shape.color)):
        low, high = shape.width // 2 + grow, (shape.width - 1) // 2 + grow
        draw.rectangle((x - arm - grow, y - low, x + arm + grow, y + high), fill=color)
        draw.rectangle((x - low, y - arm - grow, x + high, y + arm + grow), fill=color)
    # The halo of one bar crosses the other bar, so the first bar is drawn again.
    low, high = shape.width // 2, (shape.width - 1) // 2
    draw.rectangle((x - arm, y - low, x + arm, y + high), fill=shape.color)


def _pixels(fractions: Sequence[float | int], size: tuple[int, int]) -> list[int]:
    """Returns the pixel rows and columns of `y, x` fractions, inside the picture."""
    sides = (size[1], size[0])
    return [
        min(max(round(float(v) * sides[i % 2]), 0), sides[i % 2] - 1)
        for i, v in enumerate(fractions)
    ]


def _swapped(xy: Sequence[float | int]) -> list[float]:
    """Returns `y, x` pairs for `x, y` pairs."""
    return [float(v) for i in range(0, len(xy), 2) for v in (xy[i + 1], xy[i])]


# labels


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    shape: Shape,
    extent: Extent,
    occupied: Sequence[Extent],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Extent:
    """Draws the label of a shape on a plate, and returns the extent of the plate.

    The plate stands above a box or to the right of a point. It stands elsewhere if it hides less of
    the drawing there.

    Args:
      extent: of the shape.
      occupied: extents of all shapes and of the labels that are drawn already.
    """
    text = printable(shape.label)
    pad = 3
    width = round(font.getlength(text)) + 2 * pad
    is_scalable = isinstance(font, ImageFont.FreeTypeFont)
    height = round(sum(font.getmetrics())) + 2 if is_scalable else LINE_PX
    corners = [
        corner
        for around in _label_anchors(extent, occupied)
        for corner in _corners_around(around, width, height, len(shape.fractions) == 2)
    ]
    if len(shape.fractions) == 4:
        corners.append((extent[0] + 1 + shape.width, extent[1] + 1 + shape.width))
    inside = [
        (max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))) for x, y in corners
    ]
    left, top = min(
        inside, key=lambda xy: _hidden_share((*xy, xy[0] + width, xy[1] + height), occupied)
    )
    is_dark = 0.299 * shape.color[0] + 0.587 * shape.color[1] + 0.114 * shape.color[2] < 128
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=shape.color, outline=HALO)
    middle = (left + pad, top + height / 2)
    draw.text(middle, text, font=font, fill=PAPER if is_dark else HALO, anchor="lm")
    return left, top, left + width, top + height


def _label_anchors(extent: Extent, occupied: Sequence[Extent]) -> list[Extent]:
    """Returns the extent of a shape and the smallest extent around it.

    So the label of a point may stand beside the box that holds the point.
    """
    around = [
        e
        for e in occupied
        if e != extent
        and e[0] <= extent[0]
        and e[1] <= extent[1]
        and e[2] >= extent[2]
        and e[3] >= extent[3]
    ]
    return [extent, *sorted(around, key=_area)[:1]]


def _corners_around(
    extent: Extent, width: int, height: int, right_first: bool
) -> list[tuple[int, int]]:
    """Returns left and top of a plate above, below, right and left of an extent, the best first."""
    left, top, right, bottom = extent
    middle = (top + bottom - height) // 2
    above_below = [(left, top - height), (left, bottom)]
    right_left = [(right, middle), (left - width, middle)]
    return [*right_left, *above_below] if right_first else [*above_below, *right_left]


def _hidden_share(plate: Extent, occupied: Sequence[Extent]) -> float:
    """Returns the sum of the shares that a plate hides of each extent, in tenths.

    The rounding lets a plate cover the corner of a large box at no cost.
    """
    overlaps = [
        (max(e[0], plate[0]), max(e[1], plate[1]), min(e[2], plate[2]), min(e[3], plate[3]))
        for e in occupied
    ]
    return sum(
        round(_area(overlap) / _area(extent), 1)
        for overlap, extent in zip(overlaps, occupied, strict=True)
    )


def _area(extent: Extent) -> int:
    return max(0, extent[2] - extent[0]) * max(0, extent[3] - extent[1])


# captions


def _with_caption(picture: Image.Image, paragraphs: Sequence[str], width: int) -> Image.Image:
    font = font_of(TEXT_PX)
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
    """Returns `text` as lines of at most `width` pixels.

    A line breaks at a space, after `>`, or between any two letters if a word is too long.
    """
    lines = []
    line = ""
    # No letter is narrower than two pixels, so no text beyond this cut could be visible.
    for piece in re.findall(r"[^\s>]*>|[^\s>]+|\s+", printable(text)[: CAPTION_LINES * width]):
        if line and font.getlength(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line = line + piece if line else piece.lstrip()
        while font.getlength(line) > width:
            fitting = _fitting_letters(line, font, width)
            lines.append(line[:fitting])
            line = line[fitting:]
    lines.append(line.rstrip())
    if len(lines) <= CAPTION_LINES:
        return lines
    last_line = lines[CAPTION_LINES - 1]
    while font.getlength(last_line + " …") > width:
        last_line = last_line[:-1]
    return [*lines[: CAPTION_LINES - 1], last_line + " …"]


def _fitting_letters(line: str, font: Any, width: int) -> int:
    """Returns how many letters of a line fit into `width` pixels, at least 1."""
    lengths = range(len(line))
    return max(1, bisect.bisect_right(lengths, width, key=lambda n: font.getlength(line[: n + 1])))


def printable(text: str) -> str:
    """Returns the text with a space for each letter that cannot be printed."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
