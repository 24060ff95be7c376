"""The question that a text reward gets together with a completion."""

from collections.abc import Callable
from typing import NamedTuple


class TextExample(NamedTuple):
    """A question and its ground truth, on the host."""

    prompt: str
    gold: str
    """The ground-truth suffix as text."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """x1 y1 x2 y2 in pixels of the original image."""
    points: tuple[tuple[float, float], ...]
    """x y in pixels of the original image."""
    labels: tuple[str, ...]
    """The label of each box (or point); "" if it has none."""
    size: tuple[int, int]
    """Width and height of the original image in pixels."""
    target: str
    """"boxes", "points" or "text"."""
    source: str
    """Position of the source among the config's entries, as text."""
    index: int
    """Record number within the source."""
    length: int
    """Tokens of the completion, EOS included."""
    objects: str = ""
    """"boxes" or "points": what the question asks for, also if its answer is text (JSON, a count).

    The value is "" for other questions, and if the caller does not say.
    """


TextReward = Callable[[str, TextExample], float]
"""(completion, example) to a score; NaN if the reward does not apply to the question."""


def gold_text(example: TextExample) -> str:
    """Returns the ground-truth answer to a question that asks for text.

    The value is "" for any other question.
    """
    return example.gold.strip() if example.target == "text" else ""
