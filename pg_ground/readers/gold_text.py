"""Boxes and points of a ground truth that is written as text.

A training file can hold the answer instead of numbers: PaliGemma's own `suffix`, or the answer of a
chat. The readers of `locations` read the answers of models, and take what can be read. A ground
truth is read as a whole: every number of the text must belong to a box or a point.
"""

import re
from typing import Any, NamedTuple

from pg_ground.readers import answer_formats
from pg_ground.readers.locations import NUMBER, load_literal, number_runs
from pg_ground.readers.parsers import sections


class GoldObject(NamedTuple):
    """A box (4 numbers) or a point (2 numbers), in the order of the text."""

    numbers: tuple[float, ...]
    label: str = ""
    codes: str = ""
    """`<segNNN>` tokens of a mask, 16 or none."""


class GoldText(NamedTuple):
    """The objects of a text.

    If the text is a JSON value or a literal, `value` is this value, and `objects` is empty.
    """

    objects: tuple[GoldObject, ...]
    format: str | None
    """The format of the numbers if the text states it, such as yxyx_bin."""
    reading: str
    """How the text was read, in words."""
    value: Any = None


_SEGMENT = re.compile(r"\s*((?:<loc\d{4}>\s*)+)((?:<seg\d{3}>\s*)*)([^<]*(?:<(?!loc|seg)[^<]*)*)")
_LOC = re.compile(r"<loc(\d{4})>")
_SPECIAL_TOKENS = re.compile(r"<(?:bos|eos|pad)>|</?s>")
_NAME_TAG = re.compile(
    r"<\|object_ref_start\|>(?P<qwen>[^<]*)<\|object_ref_end\|>"
    r"|<ref>(?P<ref>[^<]*)</ref>"
    r"|<\|ref\|>(?P<det>[^<]*)<\|/ref\|>"
)
_PLACE_TAG = re.compile(
    r"<\|(?:box|point)_start\|>([^<]*)<\|(?:box|point)_end\|>"
    r"|<(?:box|point)>([^<]*)</(?:box|point)>"
    r"|<\|det\|>([^<]*)<\|/det\|>"
)
_TAG = re.compile(f"{_NAME_TAG.pattern}|{_PLACE_TAG.pattern}")
STATED_FORMATS = ("florence", "kosmos", "minigpt", "molmo", "molmo2")
"""Formats of `answer_formats` whose signs state the unit of the numbers."""

SEG_CODES = 16
"""The `<segNNN>` tokens of one mask."""


def read_gold_text(text: str, width: int) -> GoldText:
    """Returns the boxes (`width` 4) or points (`width` 2) of a text.

    The first form of this list that the text has decides:

    - loc tokens: `<loc0085><loc0064><loc0426><loc0320> red square ; …`;
    - the signs of `STATED_FORMATS`, which state their unit;
    - tags: `<|box_start|>(1,2),(3,4)<|box_end|>`, `<ref>cat</ref><box>[[1,2,3,4]]</box>`;
    - one JSON value or Python literal, also in a code fence;
    - numbers in prose: `The cat is at (10, 20), (30, 40).`

    Raises:
      ValueError: the text has none of these forms, or numbers that belong to no object.
    """
    cut = sections(text)
    if cut.form in ("answer", "think_answer"):  # a draft in the thoughts is no ground truth
        text = cut.answer
    if _LOC.search(text):
        return _loc_text(_SPECIAL_TOKENS.sub("", text), width)
    form = answer_formats.detect(text)
    if form.name in STATED_FORMATS:
        return _stated_text(text, width, form)
    if _PLACE_TAG.search(text):
        return _tagged_text(text, width)
    value = load_literal(_without_fence(text))
    if isinstance(value, list | dict | tuple):
        return GoldText((), None, "JSON", value)
    return _prose(text, width)


def _loc_text(text: str, width: int) -> GoldText:
    objects = []
    segments = text.split(";")
    while segments and not segments[-1].strip():
        segments.pop()
    for segment in segments:
        match = _SEGMENT.fullmatch(segment)
        bins = _LOC.findall(match[1]) if match else ()
        if match is None or len(bins) != width:
            count = len(_LOC.findall(segment))
            raise ValueError(
                f"a part with {count} loc tokens: between ';' must be {width} loc tokens, "
                "then a name"
            )
        codes = "".join(match[2].split())
        if codes.count("<seg") not in (0, SEG_CODES):
            raise ValueError(f"a mask has {SEG_CODES} seg tokens, not {codes.count('<seg')}")
        objects.append(GoldObject(tuple(map(float, bins)), " ".join(match[3].split()), codes))
    name = "yxyx_bin" if width == 4 else "yx_bin"
    return GoldText(tuple(objects), name, f"loc tokens ({name})")


def _stated_text(text: str, width: int, form: answer_formats.AnswerFormat) -> GoldText:
    located = answer_formats.read(text, width, form)
    formats = {location.written for location in located}
    if not located or len(formats) > 1 or any(location.numbers is None for location in located):
        raise ValueError(f"the signs of {form.name}, but no objects of {width} numbers")
    objects = tuple(
        GoldObject(location.numbers, " ".join(location.label.split()))
        for location in located
        if location.numbers
    )
    (name,) = formats
    return GoldText(objects, name, f"answer of {form.name} ({name})")


def _tagged_text(text: str, width: int) -> GoldText:
    objects: list[GoldObject] = []
    label = ""
    for match in _TAG.finditer(text):
        content = next((group for group in match.groups() if group is not None), "")
        if _NAME_TAG.fullmatch(match[0]):
            label = " ".join(content.split())
            continue
        numbers = re.findall(NUMBER, content)
        if not numbers or len(numbers) % width:
            raise ValueError(f"a tag holds {len(numbers)} numbers, which are no rows of {width}")
        objects += [
            GoldObject(tuple(map(float, numbers[i : i + width])), label)
            for i in range(0, len(numbers), width)
        ]
    return GoldText(tuple(objects), None, "tags")


def _prose(text: str, width: int) -> GoldText:
    numbers = re.findall(NUMBER, text)
    runs = number_runs(text, width)
    if not runs or len(runs) * width != len(numbers):
        raise ValueError(f"{len(numbers)} numbers, which are no rows of {width}")
    return GoldText(tuple(GoldObject(tuple(map(float, run))) for run in runs), None, "text")


def _without_fence(text: str) -> str:
    match = re.fullmatch(r"\s*```[a-z]*\n(.*?)\n?```\s*", text, re.DOTALL)
    return match[1] if match else text
