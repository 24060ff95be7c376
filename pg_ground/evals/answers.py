"""What answers say: boxes, points, numbers and options, out of tokens, text or JSON. Nothing is evaluated; time is linear.

Of an answer in prose counts what the last `<answer>` tag holds, closed or not, else what is behind `</think>`; of that, what a
code fence holds.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.tokenizer import Tokenizer
from pg_ground.vocab import EOS, LOC_MAX, LOC_TOKENS

DIGITS = 4
"""Of pixels, behind the point."""


class Place(NamedTuple):
    """A box (four numbers) or a point (two), in the units of whoever wrote it."""

    numbers: tuple[float, ...] | None
    """None where it cannot be read."""
    label: str = ""
    score: float | None = None
    is_loc: bool = False
    """Written in loc tokens: bins, y before x."""


def loc_answers(
    tokens: Sequence[int], tokenizer: Tokenizer, size: tuple[int, int]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the boxes and points that a completion writes, in pixels of an image of `size` (width, height), with labels.

    The grammar is that of `pg_ground.rewards.device_rewards.read_answer`: segments between ";", four loc tokens a box, two a point.
    """
    vocab = tokenizer.vocab
    segments: list[list[int]] = [[]]
    for token in tokens:
        if token in vocab.separators:
            segments.append([])
        elif token != EOS:
            segments[-1].append(token)
    found: dict[str, list[dict[str, Any]]] = {"boxes": [], "points": []}
    for segment in segments:
        bins = [token - vocab.loc0 for token in segment if 0 <= token - vocab.loc0 < LOC_TOKENS]
        label = tokenizer.decode(
            [token for token in segment if not 0 <= token - vocab.loc0 < LOC_TOKENS]
        ).strip()
        place = [
            round(fraction / LOC_MAX * size[1 - axis % 2], DIGITS)
            for axis, fraction in enumerate(bins)
        ]
        if len(place) == 4:
            found["boxes"].append(
                {"label": label, "xyxy_px": [place[1], place[0], place[3], place[2]]}
            )
        elif len(place) == 2:
            found["points"].append({"label": label, "xy_px": place[::-1]})
    return found


_LOC = re.compile(r"<loc(\d{4})>")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_XY = re.compile(rf"""\bx(\d*)=["']?({_NUMBER})["']?,?\s?y\1=["']?({_NUMBER})""")
"""`<points x1="10.5" y1="20.5" …>`, as Molmo writes, and `click(x=10, y=20)`."""
_FILLER = re.compile(r"[\s,;()\[\]{}<>]*")
_PLACES = (
    "bbox_2d",
    "bbox",
    "box_2d",
    "box",
    "Position",
    "xyxy_px",
    "point_2d",
    "point",
    "xy_px",
    "coordinates",
    "coordinate",
)
_LISTS = ("boxes", "points", "objects", "predictions", "answer")
_LABELS = ("label", "name", "category")
_SCORES = ("score", "confidence", "Confidence")


def places(value: Any, width: int) -> list[Place]:
    """Returns the boxes (`width` 4) or points (2) of a value: lists, objects, `{label: boxes}`, or text with any of these.

    What should be one and cannot be read is a place all the same, without numbers.
    """
    if isinstance(value, str):
        return _in_text(value, width)
    if isinstance(value, Mapping):
        return _in_object(value, width)
    if not isinstance(value, list | tuple) or not value:
        return []
    if not any(isinstance(part, list | tuple | Mapping | str) for part in value):
        return [Place(_numbers(value, width))]
    if (
        all(isinstance(part, str) for part in value)
        and len(value) == width
        and _numbers(value, width)
    ):
        return [Place(_numbers(value, width))]
    if (
        width == 4
        and len(value) == 2
        and all(isinstance(part, list | tuple) and len(part) == 2 for part in value)
    ):
        return [Place(_numbers([*value[0], *value[1]], 4))]
    return [place for part in value for place in (places(part, width) or [Place(None)])]


def _in_object(value: Mapping[str, Any], width: int) -> list[Place]:
    label = next((value[key] for key in _LABELS if isinstance(value.get(key), str)), "")
    score = next((_number(value[key]) for key in _SCORES if key in value), None)
    corners = ("x1", "y1", "x2", "y2") if width == 4 else ("x", "y")
    if all(key in value for key in corners):
        return [Place(_numbers([value[key] for key in corners], width), label, score)]
    for key in _PLACES:
        if key in value:
            return [
                place._replace(label=place.label or label, score=score)
                for place in places(value[key], width)
            ]
    for key in _LISTS:
        if key in value:
            return places(value[key], width)
    named = [(str(key), part) for key, part in value.items() if isinstance(part, list)]
    return [
        place._replace(label=place.label or key)
        for key, part in named
        for place in places(part, width)
    ]


def _in_text(text: str, width: int) -> list[Place]:
    answer = cut(text)
    if _LOC.search(answer):
        found = []
        for segment in answer.split(";"):
            bins = tuple(float(number) for number in _LOC.findall(segment))
            if len(bins) == width:
                found.append(Place(bins, _LOC.sub("", segment).strip(), is_loc=True))
        return found
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list | dict):
        return places(value, width)
    attributes = [(x, y) for _, x, y in _XY.findall(answer)] if width == 2 else []
    return [Place(tuple(map(float, numbers))) for numbers in attributes or _groups(answer, width)]


def _groups(text: str, width: int) -> list[list[str]]:
    """Returns the runs of `width` numbers with nothing but commas, blanks and brackets between them that a text holds."""
    runs: list[list[str]] = [[]]
    end = 0
    for match in re.finditer(_NUMBER, text):
        between = text[end : match.start()]
        closed = len(runs[-1]) == width and ("]" in between or ")" in between)
        if runs[-1] and (closed or not _FILLER.fullmatch(between) or not between):
            runs.append([])
        runs[-1].append(match[0])
        end = match.end()
    return [run for run in runs if len(run) == width]


def _numbers(values: Iterable[Any], width: int) -> tuple[float, ...] | None:
    numbers = tuple(map(_number, values))
    return numbers if len(numbers) == width and all(map(math.isfinite, numbers)) else None


def _number(value: Any) -> float:
    """Returns a JSON number, or a text that is one, as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def cut(text: str) -> str:
    """Returns the part of a text that is its answer."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    elif "<answer>" in text:  # the tag was where sampling stopped, or the answer was cut off
        text = text[text.rfind("<answer>") + len("<answer>") :]
    elif "</think>" in text:
        text = text[text.rfind("</think>") + len("</think>") :]
    fence = text.find("```")
    if fence >= 0:
        inner = text[fence + 3 :]
        closing = inner.find("```")
        text = re.sub(r"^[a-z]+\s", "", inner[:closing] if closing >= 0 else inner)
    return text.strip()


_WORDS = (
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
    ),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_COUNT = re.compile(
    r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])|(?<![\w-])(?:"
    + "|".join(_WORDS)
    + r")\b(?!-|\s+(?:hundred|thousand|million)\b)"
)


def number(value: Any) -> float | None:
    """Returns the one number that an answer names, in digits or as a word up to twenty; None for none or several."""
    if isinstance(value, str):
        found = {word.replace(",", "") for word in _COUNT.findall(cut(value).lower())}
        values = {float(_WORDS.index(word)) if word in _WORDS else float(word) for word in found}
        return values.pop() if len(values) == 1 and all(map(math.isfinite, values)) else None
    if isinstance(value, list | tuple) and len(value) == 1:
        return number(value[0])
    single = _number(value)
    return single if math.isfinite(single) else None


_OPTION = re.compile(r"(?<=\()[A-Fa-f](?=\))|(?<=\[)[A-F](?=\])|(?<=\{)[A-F](?=\})")
_SAID = re.compile(r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\"?\s*(?:is\b)?\s*:?\s*\"?([A-F])\b")
_BARE = re.compile(r"([A-Fa-f])(?:[.:)](?:\s.*)?)?", re.DOTALL)


def choice(value: Any, choices: Sequence[str] = ()) -> str | None:
    """Returns the letter of the one option that an answer names: `(B)`, `B`, `B. left`, `the answer is B`, or the option's words.

    None where it names none, several, or one that is not among `choices`. Nothing is in everything: an empty answer names none.
    """
    if not isinstance(value, str):
        return None
    answer = cut(value).replace("**", "")
    letters = {letter.upper() for letter in _OPTION.findall(answer)} or set(_SAID.findall(answer))
    bare = _BARE.fullmatch(answer)
    if not letters and bare:
        letters = {bare[1].upper()}
    if not letters:
        said = " ".join(answer.lower().split()).strip(" .")
        letters = {
            chr(ord("A") + i)
            for i, words in enumerate(choices)
            if said == " ".join(str(words).lower().split()).strip(" .")
        }
    if len(letters) != 1 or (choices and ord(min(letters)) - ord("A") >= len(choices)):
        return None
    return letters.pop()


def words(value: Any) -> str:
    """Returns an answer as text to compare: its words in lower case with single blanks, without a last full stop."""
    return " ".join(cut(str(value)).lower().split()).removesuffix(".")
