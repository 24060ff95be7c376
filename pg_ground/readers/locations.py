"""Readers of boxes and points in text, in JSON values and in loc tokens.

A grammar reader (`json_boxes`, `ovd`, …) is strict: it reads the one grammar that a reward pays
for. `read_any` is for benchmarks: it reads the same locations and also those that are written in
any other form. Both cut the text, load values and convert numbers with the same functions. No
reader evaluates code, and the time is linear in the length of the text.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from pg_ground.readers.parsers import answer_text, json_number, sections
from pg_ground.vocab import EOS, LOC_TOKENS, SEG_TOKENS, Vocab

MAX_LITERAL = 20_000
"""Characters of the longest Python literal that is read. Python's parser takes half a kilobyte for
each character.
"""


class Location(NamedTuple):
    """A box (x1 y1 x2 y2) or a point (x y), in the unit of the text."""

    numbers: tuple[float, ...] | None
    """None if the location cannot be read. It is still a prediction."""
    label: str = ""
    score: float | None = None
    """Confidence, if the text has one."""
    written: str = ""
    """The order, or the order and the unit, that the text itself states: "yxyx_bin" for loc tokens,
    "xyxy" for an object with corners as keys. "" means that the text states neither."""

    @property
    def is_loc(self) -> bool:
        """The numbers are loc bins, y before x."""
        return self.written.endswith("_bin")


class Reading(NamedTuple):
    """Locations that a grammar reader reads."""

    locations: tuple[Location, ...]
    ok: bool
    """The whole text follows the grammar, and all boxes are proper.

    Rewards for accuracy use `locations`. Rewards for the format use `ok`.
    """
    ok_unlabelled: bool = False
    """The whole text follows the grammar, but that no object has a "label"."""


def json_points(text: str) -> Reading:
    """Returns the points of `{"point_2d": [x, y], "label": "…"}` or a list of these.

    This is synthetic-grounding's grammar.
    """
    return _read_records(text, "point_2d", 2)


def json_boxes(text: str) -> Reading:
    """Returns the boxes of `{"bbox_2d": [x1, y1, x2, y2], "label": "…"}` or a list of these.

    This is Qwen2.5-VL's grammar.
    """
    return _read_records(text, "bbox_2d", 4)


def _read_records(text: str, key: str, width: int) -> Reading:
    """Returns the locations of objects with `key` and "label".

    The objects are the whole answer, or they stand in prose, in a code fence or in a list that
    breaks off.
    """
    cut = sections(text)
    whole = _load_json(cut.answer)
    entries = [whole] if isinstance(whole, dict) else whole if isinstance(whole, list) else None
    ok = cut.form != "broken" and entries is not None
    ok_unlabelled = ok and bool(entries)
    locations = []
    for entry in _split(_objects_in_prose(cut.answer, key) if entries is None else entries):
        fields = entry if isinstance(entry, dict) else {}
        label = fields.get("label")
        locations.append(Location(_numbers(fields.get(key), width, strict=True), _text(label)))
        ok &= fields.keys() == {key, "label"} and isinstance(label, str)
        ok_unlabelled &= fields.keys() == {key}
    return _reading(locations, ok)._replace(ok_unlabelled=_reading(locations, ok_unlabelled).ok)


def ovd(text: str) -> Reading:
    """Returns the boxes with confidences of Visual-RFT's grammar.

    The grammar is `<answer>[{"Position": [x1, y1, x2, y2], "Confidence": c}, …]</answer>`. An
    object may also have a "label", and quotes may be Python's. A box whose confidence is outside
    [0, 1] cannot be read.
    """
    cut = sections(text)
    whole = load_literal(cut.answer)
    is_list = isinstance(whole, list) and not isinstance(whole, Several)
    ok = cut.form in ("answer", "think_answer") and is_list
    entries = whole if isinstance(whole, list) else _objects_in_prose(cut.answer, "Position")
    locations = []
    for entry in _split(entries):
        fields = entry if isinstance(entry, dict) else {}
        numbers = _numbers(fields.get("Position"), 4, strict=True)
        confidence = json_number(fields.get("Confidence", 1), strict=True)
        label = fields.get("label", "")
        if numbers is None or not 0 <= confidence <= 1:
            numbers, confidence = None, 0.0
        locations.append(Location(numbers, _text(label), confidence))
        allowed = {"Position", "Confidence", "label"}
        ok &= {"Position", "Confidence"} <= fields.keys() <= allowed and isinstance(label, str)
    return _reading(locations, ok)


def dict_boxes(text: str) -> Reading:
    """Returns the boxes of `{"0": [[x1, y1, x2, y2], …], "1": [], …}`, labelled with their keys.

    This is EasyDistill's grammar. Keys may be Python's integers, as in EasyDistill's own supervised
    answers.
    """
    cut = sections(text)
    whole = load_literal(cut.answer)
    ok = cut.form != "broken" and isinstance(whole, dict | Several)
    if not isinstance(whole, dict | Several):
        whole = _outer_dict(cut.answer)
    parts = whole if isinstance(whole, Several) else [whole] if isinstance(whole, dict) else ()
    locations = []
    for key, entries in (item for part in parts for item in part.items()):
        label = key if isinstance(key, str) else f"{json_number(key, strict=True):.0f}"
        ok &= isinstance(key, str | int) and isinstance(entries, list)
        for entry in entries if isinstance(entries, list) else [entries]:
            locations.append(Location(_numbers(entry, 4, strict=True), label))
    return _reading(locations, ok)


_DECIMAL = r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*"
_LIST = re.compile(
    rf"\[{_DECIMAL},{_DECIMAL},{_DECIMAL},{_DECIMAL}\]"
    rf"|\({_DECIMAL},{_DECIMAL},{_DECIMAL},{_DECIMAL}\)"
    rf"|\({_DECIMAL},{_DECIMAL}\)\s*,\s*\({_DECIMAL},{_DECIMAL}\)"
)
_NATURAL_LIST = re.compile(r"\[[0-9]+(?:,\s*[0-9]+){3}\]")


def list_boxes(text: str) -> Reading:
    """Returns the boxes of `[x1, y1, x2, y2]`, `(x1, y1, x2, y2)` or `(x1, y1), (x2, y2)`.

    `ok` means that the text is one list of natural numbers in square brackets, as EasyDistill asks
    for.
    """
    cut = sections(text)
    locations = []
    for match in _LIST.finditer(cut.answer):
        digits = [float(number) for number in match.groups() if number]
        locations.append(Location(_numbers(digits, 4, strict=True)))
    whole = _NATURAL_LIST.fullmatch(cut.answer.strip())
    return _reading(locations, cut.form != "broken" and whole is not None)


_BOX_TOKENS = re.compile(
    r"(?:<\|object_ref_start\|>[^<>]*<\|object_ref_end\|>)?"
    r"<\|box_start\|>\([0-9]+,[0-9]+\),\([0-9]+,[0-9]+\)<\|box_end\|>(?:<\|im_end\|>)?"
)


def box_tokens(text: str) -> Reading:
    """Returns the boxes of `list_boxes`; `ok` means that the text follows Qwen2-VL's grammar.

    The grammar is `<|object_ref_start|>…<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`.
    """
    return _reading(list_boxes(text).locations, bool(_BOX_TOKENS.fullmatch(text)))


def is_proper(location: Location) -> bool:
    """Returns whether a location can be read and, if it is a box, has a width and a height."""
    numbers = location.numbers
    if numbers is None:
        return False
    return len(numbers) == 2 or (numbers[2] > numbers[0] and numbers[3] > numbers[1])


def _reading(locations: Sequence[Location], ok: bool) -> Reading:
    return Reading(tuple(locations), ok and all(map(is_proper, locations)))


_LOC = re.compile(r"<loc([0-9]{4})>")
_SPECIAL = re.compile(r"<loc[0-9]{4}>|<seg[0-9]{3}>|<(?:bos|eos|pad|unk|s)>|</s>")


def loc_segments(text: str) -> list[Location]:
    """Returns the segments between the ";" of a text.

    The numbers of a segment are its bins, and the label is its other text. A segment with four bins
    is a box, one with two is a point, as in `pg_ground.rewards.answer_reader.read_answer`.
    """
    return [_loc_segment(_LOC.findall(part), _SPECIAL.sub("", part)) for part in text.split(";")]


def loc_token_segments(
    tokens: Iterable[int], vocab: Vocab, decode: Callable[[Sequence[int]], str]
) -> list[Location]:
    """Returns the segments of a completion like `loc_segments`, from its token ids.

    Args:
      decode: returns the text of token ids.
    """
    segments: list[list[int]] = [[]]
    for token in tokens:
        if token in vocab.separators:
            segments.append([])
        elif token != EOS:
            segments[-1].append(token)
    return [_token_segment(segment, vocab, decode) for segment in segments]


def _token_segment(
    tokens: Sequence[int], vocab: Vocab, decode: Callable[[Sequence[int]], str]
) -> Location:
    bins = [token - vocab.loc0 for token in tokens if 0 <= token - vocab.loc0 < LOC_TOKENS]
    special = range(vocab.loc0, vocab.seg0 + SEG_TOKENS)
    return _loc_segment(bins, decode([token for token in tokens if token not in special]))


def _loc_segment(bins: Iterable[int | str], label: str) -> Location:
    numbers = tuple(float(number) for number in bins)
    return Location(numbers, label.strip(), written="yx_bin" if len(numbers) == 2 else "yxyx_bin")


_KEYS = (
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
_LIST_KEYS = ("boxes", "bboxes", "points", "objects", "detections", "predictions", "answer")
_LABEL_KEYS = ("label", "name", "category")
_SCORE_KEYS = ("score", "confidence", "Confidence")


def read_any(value: object, width: int) -> list[Location]:
    """Returns the boxes (`width` 4) or points (`width` 2) of an answer in any form.

    The value may be a list, an object, `{label: boxes}`, or a text with any of these, with loc
    tokens or with bare numbers. A value that should be a location and cannot be read gives a
    location without numbers.
    """
    if isinstance(value, str):
        return _read_text(value, width)
    if isinstance(value, Mapping):
        return _read_object(value, width)
    if not isinstance(value, list | tuple) or not value:
        return []
    numbers = _numbers(value, width, strict=False)
    nested = any(isinstance(part, list | tuple | Mapping) for part in value)
    only_texts = all(isinstance(part, str) for part in value)
    if not nested and (numbers is not None or not only_texts):
        return [Location(numbers)]
    if width == 4 and _is_pair_of_points(value):
        return [Location(_numbers([*value[0], *value[1]], 4, strict=False))]
    return [location for part in value for location in read_any(part, width) or [Location(None)]]


def _is_pair_of_points(value: Sequence[Any]) -> bool:
    return len(value) == 2 and all(isinstance(p, list | tuple) and len(p) == 2 for p in value)


def _read_object(value: Mapping[Any, Any], width: int) -> list[Location]:
    label = next((value[key] for key in _LABEL_KEYS if isinstance(value.get(key), str)), "")
    scores = [json_number(value[key], strict=False) for key in _SCORE_KEYS if key in value]
    score = scores[0] if scores else None
    if width == 4 and (names := corner_names(map(plain_key, value))):
        return [Location(_corner_box(value, names), label, score, "xyxy")]
    named = _named_numbers(value, width)
    if named:
        order, numbers = named
        return [Location(_numbers(numbers, width, strict=False), label, score, order)]
    for key in _KEYS:
        if key in value:
            return [
                location._replace(label=location.label or label, score=score)
                for location in read_any(value[key], width)
            ]
    for key in _LIST_KEYS:
        if key in value:
            return _with_labels(read_any(value[key], width), value)
    return [
        location._replace(label=location.label or str(key))
        for key, part in value.items()
        if isinstance(part, list | Mapping)
        for location in read_any(part, width)
    ]


_NAMED_NUMBERS: dict[int, tuple[tuple[str, tuple[str, ...]], ...]] = {
    4: (
        ("xyxy", ("x1", "y1", "x2", "y2")),
        ("xyxy", ("x0", "y0", "x1", "y1")),
        ("xyxy", ("xmin", "ymin", "xmax", "ymax")),
        ("xyxy", ("left", "top", "right", "bottom")),
        ("xywh", ("x", "y", "width", "height")),
        ("xywh", ("x", "y", "w", "h")),
        ("xywh", ("left", "top", "width", "height")),
    ),
    2: (("xy", ("x", "y")),),
}
"""The orders and keys of an object whose numbers have names, by their number. Case and "_" do not
count: `x_min`, `xMin` and `xmin` are one name.
"""


_CORNER_KEY = re.compile(r"[xy]([0-9]|tl|tr|br|bl)")


def plain_key(key: object) -> str:
    """Returns the name of a key for comparisons: in lower case and without "_"."""
    return str(key).lower().replace("_", "")


def corner_names(keys: Iterable[str]) -> list[str]:
    """Returns the corners that the keys of a box name, if these are three or more; else nothing.

    `x1 y1 x2 y2 x3 y3 x4 y4` are the corners 1, 2, 3 and 4. Two of them alone are another box.

    Args:
      keys: as `plain_key` returns them.
    """
    matches = filter(None, map(_CORNER_KEY.fullmatch, keys))
    names = sorted({match[1] for match in matches})
    return next((part for part in _by_kind(names) if len(part) > 2), [])


def _by_kind(names: Sequence[str]) -> tuple[list[str], list[str]]:
    numbers = [name for name in names if name.isdigit()]
    return numbers, [name for name in names if not name.isdigit()]


def _corner_box(value: Mapping[Any, Any], names: Sequence[str]) -> tuple[float, ...] | None:
    """Returns the upright box with four corners that have names; None if there is no such box."""
    plain = {plain_key(key): part for key, part in value.items()}
    corners = [_numbers([plain.get(f"x{n}"), plain.get(f"y{n}")], 2, strict=False) for n in names]
    points = {corner for corner in corners if corner is not None}
    (low_x, high_x), (low_y, high_y) = (
        (min((p[i] for p in points), default=0.0), max((p[i] for p in points), default=0.0))
        for i in (0, 1)
    )
    is_upright = points == {(x, y) for x in (low_x, high_x) for y in (low_y, high_y)}
    return (low_x, low_y, high_x, high_y) if len(points) == 4 and is_upright else None


def _named_numbers(value: Mapping[Any, Any], width: int) -> tuple[str, list[Any]] | None:
    """Returns the order and the numbers of an object whose numbers have names. None if it has none.

    An object with a width or a height is a box, not a point.
    """
    plain = {plain_key(key): part for key, part in value.items()}
    for order, keys in _NAMED_NUMBERS[width]:
        if all(key in plain for key in keys):
            is_point_of_box = width == 2 and _named_numbers(value, 4) is not None
            return None if is_point_of_box else (order, [plain[key] for key in keys])
    return None


def _with_labels(read: list[Location], value: Mapping[Any, Any]) -> list[Location]:
    """Returns locations with the labels and scores of lists beside them, which have their length.

    `{"boxes": [[…], …], "labels": ["cat", …], "scores": […]}` is the form of detectors.
    """
    labels, scores = value.get("labels"), value.get("scores")
    if isinstance(labels, list) and len(labels) == len(read):
        read = [
            r._replace(label=r.label or str(label)) for r, label in zip(read, labels, strict=True)
        ]
    if isinstance(scores, list) and len(scores) == len(read):
        numbers = [json_number(score, strict=False) for score in scores]
        read = [
            location._replace(score=number) for location, number in zip(read, numbers, strict=True)
        ]
    return read


def _read_text(text: str, width: int) -> list[Location]:
    """Returns the locations of loc tokens, else of a JSON value or literal, else of prose."""
    answer = answer_text(text, strict=False)
    if _LOC.search(answer):
        return [segment for segment in loc_segments(answer) if len(segment.numbers or ()) == width]
    value = load_literal(answer)
    if isinstance(value, list | dict):
        try:
            return read_any(value, width)
        except RecursionError:
            return []
    return _read_prose(answer, width)


_OBJECT = re.compile(r"\{[^{}]*\}")


def _read_prose(text: str, width: int) -> list[Location]:
    """Returns the locations of objects and of bare numbers between them, in the order of the text.

    An object reaches from the first "{" to the last "}", or a list of objects from the first "[" to
    the last "]". Else it is each `{…}` with keys of a location.
    """
    for opening, closing in (("{", "}"), ("[", "]")):
        start, end = text.find(opening), text.rfind(closing) + 1
        outer = load_literal(text[start:end]) if 0 <= start < end else None
        is_list = isinstance(outer, list) and all(isinstance(part, dict) for part in outer)
        try:
            named = read_any(outer, width) if is_list or isinstance(outer, dict) else []
        except RecursionError:
            named = []
        if named:
            return [*_read_bare(text[:start], width), *named, *_read_bare(text[end:], width)]
    locations: list[Location] = []
    end = 0
    for match in _OBJECT.finditer(text):
        value = load_literal(match[0])
        if isinstance(value, dict) and _is_location(value, width):
            locations += _read_bare(text[end : match.start()], width) + read_any(value, width)
            end = match.end()
    return locations + _read_bare(text[end:], width)


def _is_location(value: Mapping[Any, Any], width: int) -> bool:
    return any(key in value for key in _KEYS) or _named_numbers(value, width) is not None


NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_EQUALS = r"""["']?(?:\s*[:=]\s*|\s+is\s+|\s+)["']?"""
_XY = re.compile(
    rf"""\bx([0-9]*){_EQUALS}({NUMBER})(?:\s?px\b)?["']?[,;]?\s*(?:and\s+)?"""
    rf"""\by\1{_EQUALS}({NUMBER})""",
    re.IGNORECASE,
)
"""`<points x1="10.5" y1="20.5" …>`, as Molmo writes, `click(x=10, y=20)` and `X: 10, Y: 20`."""
_FILLER = re.compile(r"(?:\s?px\b)?[\s,;()\[\]{}<>]*")


def _read_bare(text: str, width: int) -> list[Location]:
    """Returns the locations of `x=…, y=…` or `xmin: …, ymin: …, xmax: …, ymax: …`, else of bare
    numbers.

    Only commas, blanks and brackets may be between the numbers of a location.
    """
    attributes = [(x, y) for _, x, y in _XY.findall(text)] if width == 2 else []
    named = _named_in_text(text) if width == 4 else []
    if named:
        return named
    return [
        Location(_numbers(numbers, width, strict=False))
        for numbers in attributes or number_runs(text, width)
    ]


_NAME_AND_NUMBER = re.compile(
    rf"""\b(x_?min|y_?min|x_?max|y_?max|[xy][0-9]|left|top|right|bottom|width|height|[xywh])\b"""
    rf"""["']?\s*[:=>]\s*["']?({NUMBER})""",
    re.IGNORECASE,
)


def _named_in_text(text: str) -> list[Location]:
    """Returns the boxes whose numbers have names: `xmin=1, ymin=2, xmax=3, ymax=4`.

    `_NAMED_NUMBERS` has the names. They may be in any order, also as tags of XML. Three or four
    corners (`x3=5`) in prose cannot be read.
    """
    boxes: list[Location] = []
    fields: dict[str, str] = {}
    found = _NAME_AND_NUMBER.findall(text)
    if corner_names(plain_key(name) for name, _ in found):
        return [Location(None)]
    for name, number in found:
        if name in fields:
            fields = {}
        fields[name] = number
        named = _named_numbers(fields, 4)
        if named:
            boxes.append(Location(_numbers(named[1], 4, strict=False), written=named[0]))
            fields = {}
    return boxes


def number_runs(text: str, width: int) -> list[list[str]]:
    """Returns the runs of `width` numbers.

    A run ends at other text, at a bracket that closes after `width` numbers, and at a bracket that
    opens after `width` numbers or within a pair, as in `1. (301, 1284)`. Points without brackets
    are pairs if their separators say so: `20,20 50,50`.
    """
    runs: list[list[str]] = [[]]
    gaps: list[list[str]] = [[]]
    end = 0
    text = _plain_punctuation(text)
    for match in re.finditer(NUMBER, text):
        between = text[end : match.start()]
        count = len(runs[-1])
        closes = "]" in between or ")" in between
        opens = not closes and ("[" in between or "(" in between)
        closed = (count == width and (closes or opens)) or (count % 2 and opens)
        if runs[-1] and (closed or not _FILLER.fullmatch(between) or not between):
            runs.append([])
            gaps.append([])
        elif runs[-1]:
            gaps[-1].append(between)
        runs[-1].append(match[0])
        end = match.end()
    if width == 2:
        runs = _split_pairs(runs, gaps)
    return [run for run in runs if len(run) == width]


_LIST_MARKER = re.compile(rf"^[ \t]*[0-9]{{1,2}}[.)][ \t]+(?={NUMBER}\s*[,;])", re.MULTILINE)


def _plain_punctuation(text: str) -> str:
    """Returns a text with plain commas and brackets, and without the numbers of a list's lines.

    `1. 301, 1284` is the first line of a numbered list.
    """
    return _LIST_MARKER.sub("", text.translate(_FULL_WIDTH))


_FULL_WIDTH = str.maketrans("\uff0c\uff1b\uff08\uff09\uff1a", ",;():")
"""Commas, semicolons, brackets and colons of Chinese text."""


def _split_pairs(runs: Sequence[list[str]], gaps: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns runs of numbers, cut into pairs if other separators stand between than within pairs.

    `20,20 50,50` and `20 20; 50 50` are pairs. `20, 20, 50, 50` stays one run.

    Args:
      gaps: the texts between the numbers of each run.
    """
    parts: list[list[str]] = []
    for run, texts in zip(runs, gaps, strict=True):
        within, between = set(map(_separator, texts[::2])), set(map(_separator, texts[1::2]))
        are_pairs = len(run) >= 4 and len(run) % 2 == 0 and len(within) == 1
        step = 2 if are_pairs and not within & between else max(1, len(run))
        parts += [run[start : start + step] for start in range(0, len(run), step)]
    return parts


def _separator(gap: str) -> str:
    """Returns the strongest mark between two numbers; a blank if there is none."""
    return next((mark for mark in (";", ",", "\n") if mark in gap), " ")


def first_width(value: object) -> int:
    """Returns 2 if the first location of an answer is a point, 4 if it is a box, 0 without one.

    An object states it by its keys. A list or a bracket in a text states it by the number of its
    numbers: `[301, 1284], [915, 1284]` are points, also if they stand in one list. Without
    brackets, the separators state it: `20,20 50,50` are points, and `20, 20, 50, 50` is a box.
    """
    if isinstance(value, str):
        return _first_width_of_text(value)
    if isinstance(value, Mapping):
        return _first_width_of_object(value)
    if not isinstance(value, list | tuple):
        return 0
    if len(value) in (2, 4) and _numbers(value, len(value), strict=False):
        return len(value)
    return next(filter(None, map(first_width, value)), 0)


def _first_width_of_text(text: str) -> int:
    answer = answer_text(text, strict=False)
    if _LOC.search(answer):
        widths = [len(segment.numbers or ()) for segment in loc_segments(answer)]
        return next((width for width in widths if width in (2, 4)), 0)
    value = load_literal(answer)
    if isinstance(value, list | dict):
        try:
            return first_width(value)
        except RecursionError:
            return 0
    objects = (load_literal(match[0]) for match in _OBJECT.finditer(answer))
    widths = [first_width(value) for value in objects if isinstance(value, dict)]
    if any(widths):
        return next(filter(None, widths))
    if _named_in_text(answer):
        return 4
    if _XY.search(answer):
        return 2
    return next((len(run) for run in _bracketed_runs(answer) if len(run) in (2, 4)), 0)


def _first_width_of_object(value: Mapping[Any, Any]) -> int:
    for width in (4, 2):
        if _named_numbers(value, width):
            return width
    for key in (*_KEYS, *_LIST_KEYS):
        if key in value:
            return first_width(value[key])
    return next(filter(None, map(first_width, value.values())), 0)


_BETWEEN = re.compile(r"(?:\s?px\b)?[\s,;]+|><")


def _bracketed_runs(text: str) -> list[list[str]]:
    """Returns the numbers of a text. A run ends at other text and at a bracket.

    Pairs with other separators between them than within them are runs of their own.
    """
    runs: list[list[str]] = [[]]
    gaps: list[list[str]] = [[]]
    end = 0
    text = _plain_punctuation(text)
    for match in re.finditer(NUMBER, text):
        between = text[end : match.start()]
        if runs[-1] and not _BETWEEN.fullmatch(between):
            runs.append([])
            gaps.append([])
        elif runs[-1]:
            gaps[-1].append(between)
        runs[-1].append(match[0])
        end = match.end()
    return _split_pairs(runs, gaps)


def _objects_in_prose(text: str, key: str) -> list[Any]:
    """Returns each `{…}` of a text that contains `key`.

    It may be in prose, in a code fence, or in a list that breaks off.
    """
    return [load_literal(part) for part in _OBJECT.findall(text) if key in part]


def _outer_dict(text: str) -> Any:
    """Returns the value from the first "{" of a text to its last "}"; None if it cannot be read."""
    return load_literal(text[text.find("{") : text.rfind("}") + 1])


def load_value(text: str) -> Any:
    """Returns the JSON value or Python literal that a text holds; None if it holds none.

    It may stand in answer tags, in a code fence, or in prose, if it is an object.
    """
    answer = answer_text(text, strict=False)
    value = load_literal(answer)
    return value if isinstance(value, list | dict) else _outer_dict(answer)


class Several(list[dict[Any, Any]]):
    """The objects of a text that writes them as one object with a name twice or more often."""


def _keep_all(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any] | Several:
    """Returns the object with these names and values. No value of a repeated name is lost.

    Lists of lists or of objects with one name are one list: `{"cat": [[…]], "cat": [[…]]}` is
    `{"cat": [[…], […]]}`. If a name has other values, each is in an object of its own. All objects
    have the label and the score, if it is there once: `{"label": "cat", "bbox": […], "bbox": […]}`
    is two cats.
    """
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    values: dict[Any, list[Any]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    repeated = {name: parts for name, parts in values.items() if len(parts) > 1}
    if all(_is_list_of_parts(value) for parts in repeated.values() for value in parts):
        return fields | {name: list(chain(*parts)) for name, parts in repeated.items()}
    once = {name: parts[0] for name, parts in values.items() if len(parts) == 1}
    objects = [dict(once)]
    shared = {name: once[name] for name in (*_LABEL_KEYS, *_SCORE_KEYS) if name in once}
    for name, parts in repeated.items():
        while len(objects) < len(parts):
            objects.append(dict(shared))
        for fields, value in zip(objects, parts, strict=False):
            fields[name] = value
    return Several(objects)


def _is_list_of_parts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(part, list | tuple | dict) for part in value
    )


def _split(entries: Iterable[Any]) -> list[Any]:
    """Returns a list with the objects of each `Several` in its place."""
    return [
        part for entry in entries for part in (entry if isinstance(entry, Several) else [entry])
    ]


# A decoder that is made once: `json.loads(object_pairs_hook=…)` makes one for each text.
_DECODER = json.JSONDecoder(object_pairs_hook=_keep_all)


def _load_json(text: str) -> Any:
    """Returns a JSON value; None for any other text. `_keep_all` says what a repeated name is."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def load_literal(text: str) -> Any:
    """Returns a JSON value or a Python literal; None for any other text.

    `_keep_all` says what an object is in which a name is there twice.
    """
    value = _load_json(text)
    if value is None and len(text) <= MAX_LITERAL:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of unknown escapes
                return _literal(ast.parse(text.strip(), mode="eval").body)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return value


def _literal(node: ast.expr) -> Any:
    """Returns the value of a literal, as `ast.literal_eval` does, with all values of each name."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Dict) and None not in node.keys:
        names = [_literal(name) for name in node.keys if name]
        return _keep_all(list(zip(names, map(_literal, node.values), strict=True)))
    if isinstance(node, ast.List):
        return list(map(_literal, node.elts))
    if isinstance(node, ast.Tuple):
        return tuple(map(_literal, node.elts))
    return ast.literal_eval(node)


def _numbers(values: object, width: int, strict: bool) -> tuple[float, ...] | None:
    """Returns `width` finite numbers; None if there are others.

    A number in quotes is a number unless `strict`.
    """
    if not isinstance(values, list | tuple) or len(values) != width:
        return None
    numbers = tuple(json_number(value, strict) for value in values)
    return numbers if all(map(math.isfinite, numbers)) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
