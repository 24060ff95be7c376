"""Boxes and points of a completion in loc tokens, as the fields of a row's `prediction`."""

from collections.abc import Sequence

from pg_ground.readers.locations import loc_token_segments
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import JsonDict
from pg_ground.vocab import LOC_MAX

DIGITS = 4
"""Decimal places of pixel coordinates in rows."""


def loc_answers(
    tokens: Sequence[int], tokenizer: Tokenizer, size: tuple[int, int]
) -> dict[str, list[JsonDict]]:
    """Returns the labelled boxes and points of a completion, in pixels of the image.

    Args:
      size: width and height of the image.
    """
    width, height = size
    boxes, points = [], []
    for segment in loc_token_segments(tokens, tokenizer.vocab, tokenizer.decode):
        edges = [
            round(number / LOC_MAX * (width if axis % 2 else height), DIGITS)
            for axis, number in enumerate(segment.numbers or ())
        ]
        if len(edges) == 4:
            xyxy = [edges[1], edges[0], edges[3], edges[2]]
            boxes.append({"label": segment.label, "xyxy_px": xyxy})
        elif len(edges) == 2:
            points.append({"label": segment.label, "xy_px": edges[::-1]})
    return {"boxes": boxes, "points": points}
