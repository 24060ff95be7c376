"""Answers read from text: one parser per grammar.

Every parser takes any string and returns what it could read, tolerantly, and whether the whole text is of the grammar (`ok`). An
accuracy uses the values, a format reward `ok`. Nothing is evaluated, and reading takes time linear in the text's length.
"""

import ast
import json
import math
import re
import warnings
from typing import Any, NamedTuple

MAX_LITERAL = 20_000
"""Characters of the longest Python literal that is read: its parser takes half a kilobyte for each."""


class Sections(NamedTuple):
    """A text cut at its think and answer tags."""

    thought: str
    answer: str
    """The whole text where there are no tags; "" where it is not clear which part is the answer."""
    form: str
    """One of "bare" (no tags), "answer" (one pair), "think_answer" (`<think>…</think> <answer>…</answer>`) and "broken"."""


class Places(NamedTuple):
    """Boxes (x1 y1 x2 y2) or points (x y) as a text names them, in its units."""

    places: tuple[tuple[float, ...], ...]
    """NaN in each coordinate of one that cannot be read: it is still a prediction."""
    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    """In [0, 1]; 1 where none is given, 0 for what cannot be read."""
    ok: bool


class Choice(NamedTuple):
    """An answer out of a closed set."""

    kind: str
    """One of "relation", "option" and "yes/no"; "" where none, or more than one, is named."""
    value: str


_TAG = re.compile(r"(</?(?:think|answer)>)")


def sections(text: str) -> Sections:
    """Returns thoughts and answer.

    Text outside the tags, a second tag of a kind, or an empty answer makes the form "broken". A broken text's answer is inside
    its only pair of answer tags, or else behind its thoughts; several answers are none.
    """
    pieces = _TAG.split(text)
    between, tags = pieces[::2], pieces[1::2]
    match tags:
        case []:
            return Sections("", text, "bare")
        case ["<answer>", "</answer>"] if not (between[0] or between[2]) and between[1].strip():
            return Sections("", between[1], "answer")
        case ["<think>", "</think>", "<answer>", "</answer>"] if not (
            between[0] or between[2].strip() or between[4]
        ):
            if between[3].strip():
                return Sections(between[1], between[3], "think_answer")
    opened = [i for i, tag in enumerate(tags) if tag == "<answer>"]
    closed = [i for i, tag in enumerate(tags) if tag == "</answer>"]
    if len(opened) == len(closed) == 1 and closed[0] == opened[0] + 1:
        return Sections("".join(between[: closed[0]]), between[closed[0]], "broken")
    if not opened and not closed and tags[-1] == "</think>" and tags.count("</think>") == 1:
        return Sections("".join(between[:-1]), between[-1], "broken")
    return Sections(text, "", "broken")


def json_points(text: str) -> Places:
    """Returns points of `{"point_2d": [x, y], "label": "…"}` or a list of such objects (synthetic-grounding's grammar)."""
    return _records(text, "point_2d", 2)


def json_boxes(text: str) -> Places:
    """Returns boxes of `{"bbox_2d": [x1, y1, x2, y2], "label": "…"}` or a list of such objects (Qwen2.5-VL's grammar)."""
    return _records(text, "bbox_2d", 4)


def ovd(text: str) -> Places:
    """Returns boxes of `<answer>[{"Position": [x1, y1, x2, y2], "Confidence": c}, …]</answer>` (Visual-RFT's grammar).

    A "label" may stand beside them, and quotes may be Python's. A box whose confidence is outside [0, 1] cannot be read.
    """
    cut = sections(text)
    whole = _load(cut.answer)
    strict = cut.form in ("answer", "think_answer") and isinstance(whole, list)
    entries = whole if isinstance(whole, list) else _objects(cut.answer, "Position")
    places, labels, confidences = [], [], []
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {}
        place, confidence = _place(entry.get("Position"), 4), _number(entry.get("Confidence", 1))
        if math.isnan(place[0]) or not 0 <= confidence <= 1:
            place, confidence = (math.nan,) * 4, 0.0
        label = entry.get("label", "")
        places.append(place)
        labels.append(label if isinstance(label, str) else "")
        confidences.append(confidence)
        strict &= {"Position", "Confidence"} <= entry.keys() <= {
            "Position",
            "Confidence",
            "label",
        } and isinstance(label, str)
    return Places(
        tuple(places), tuple(labels), tuple(confidences), strict and all(map(is_proper, places))
    )


def dict_boxes(text: str) -> Places:
    """Returns boxes of `{"0": [[x1, y1, x2, y2], …], "1": [], …}`, each labelled with its key (EasyDistill's grammar).

    Keys may be Python's integers, as in EasyDistill's own supervised answers.
    """
    cut = sections(text)
    whole = _load(cut.answer)
    strict = cut.form != "broken" and isinstance(whole, dict)
    if not isinstance(whole, dict):
        whole = _load(cut.answer[cut.answer.find("{") : cut.answer.rfind("}") + 1])
    places, labels = [], []
    for key, entries in whole.items() if isinstance(whole, dict) else ():
        strict &= isinstance(key, str | int) and isinstance(entries, list)
        for entry in entries if isinstance(entries, list) else [entries]:
            places.append(_place(entry, 4))
            labels.append(key if isinstance(key, str) else f"{_number(key):.0f}")
    return Places(
        tuple(places), tuple(labels), (1.0,) * len(places), strict and all(map(is_proper, places))
    )


_DECIMAL = r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*"
_LIST = re.compile(
    rf"\[{_DECIMAL},{_DECIMAL},{_DECIMAL},{_DECIMAL}\]"
    rf"|\({_DECIMAL},{_DECIMAL},{_DECIMAL},{_DECIMAL}\)"
    rf"|\({_DECIMAL},{_DECIMAL}\)\s*,\s*\({_DECIMAL},{_DECIMAL}\)"
)
_INTEGERS = re.compile(r"\[[0-9]+(?:,\s*[0-9]+){3}\]")


def list_boxes(text: str) -> Places:
    """Returns boxes of `[x1, y1, x2, y2]`, `(x1, y1, x2, y2)` or `(x1, y1), (x2, y2)`.

    `ok` where the text is one such list of natural numbers in brackets, as EasyDistill asks for.
    """
    cut = sections(text)
    places = tuple(
        _place([float(n) for n in found.groups() if n], 4) for found in _LIST.finditer(cut.answer)
    )
    strict = (
        cut.form != "broken"
        and bool(_INTEGERS.fullmatch(cut.answer.strip()))
        and is_proper(places[0])
    )
    return Places(places, ("",) * len(places), (1.0,) * len(places), strict)


_BOX_TOKENS = re.compile(
    r"(?:<\|object_ref_start\|>[^<>]*<\|object_ref_end\|>)?"
    r"<\|box_start\|>\([0-9]+,[0-9]+\),\([0-9]+,[0-9]+\)<\|box_end\|>(?:<\|im_end\|>)?"
)


def box_tokens(text: str) -> Places:
    """Returns boxes of `<|object_ref_start|>…<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>` (Qwen2-VL's grammar)."""
    found = list_boxes(text)
    return found._replace(
        ok=bool(_BOX_TOKENS.fullmatch(text)) and all(map(is_proper, found.places))
    )


def is_proper(place: tuple[float, ...]) -> bool:
    """Returns whether a box has a width and a height, and a point finite coordinates."""
    corners = len(place) // 2
    return all(map(math.isfinite, place)) and (
        corners == 1 or (place[2] > place[0] and place[3] > place[1])
    )


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
_NUMBER = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")


def number(text: str) -> float:
    """Returns the number that an answer consists of, in digits or as a word up to twenty; NaN where it is not one number."""
    answer = sections(text).answer.strip().removesuffix(".").lower()
    if answer in _WORDS:
        return float(_WORDS.index(answer))
    value = float(answer.replace(",", "")) if _NUMBER.fullmatch(answer) else math.nan
    return value if math.isfinite(value) else math.nan


def last_boxed(text: str) -> str | None:
    r"""Returns what the last `\boxed{…}` holds, or None where there is none or it is not closed."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[:place]
    return None


def think_boxed(text: str) -> bool:
    r"""Returns whether the whole text is `<think>…</think>` and words with one `\boxed{…}` that holds something."""
    pieces = _TAG.split(text)
    if pieces[1::2] != ["<think>", "</think>"] or pieces[0]:
        return False
    return text.count(r"\boxed{") == 1 and bool((last_boxed(pieces[-1]) or "").strip())


ACTS = ("answer", "search", "code", "problem")
"""What an agent's turn can do (RLLaVA's tags)."""

_ACT_TAG = re.compile(rf"(</?(?:think|{'|'.join(ACTS)})>)")


class Turns(NamedTuple):
    """What an agent did, in order."""

    acts: tuple[tuple[str, str], ...]
    """One of `ACTS`, and what its tags hold; none where tags are nested, left open, or empty."""
    ok: bool
    """Each act is preceded by its own `<think>…</think>`, and nothing else is said."""


def turns(text: str) -> Turns:
    """Returns the acts of one turn, or of a transcript of several; what stands between the tags outside of them is said aloud."""
    pieces = _ACT_TAG.split(text)
    between, tags = pieces[::2], pieces[1::2]
    pairs = list(zip(tags[::2], tags[1::2], between[1::2], strict=False))
    if len(tags) % 2 or any(
        closing != f"</{opening[1:]}" or not held.strip() for opening, closing, held in pairs
    ):
        return Turns((), False)
    names = [opening[1:-1] for opening, _, _ in pairs]
    acts = tuple(
        (name, held.strip())
        for name, (_, _, held) in zip(names, pairs, strict=True)
        if name != "think"
    )
    alternate = len(names) == 2 * len(acts) > 0 and all(name == "think" for name in names[::2])
    return Turns(
        acts,
        alternate
        and names[1::2].count("think") == 0
        and not any(said.strip() for said in between[::2]),
    )


_NEAR, _FAR, _EYES = ("closer", "nearer"), ("farther", "further"), ("camera", "viewer")

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left", "leftward", "leftwards"),
    "right": ("right", "rightward", "rightwards"),
    "above": ("above", "over", "on top of", "higher than", "up from"),
    "below": ("below", "under", "underneath", "beneath", "lower than", "down from"),
    "in front of": (
        "in front",
        "before",
        "ahead of",
        *(f"{near} to {eye}" for near in _NEAR for eye in _EYES),
    ),
    "behind": (
        "behind",
        "after",
        "in back of",
        *(f"{far} from {eye}" for far in _FAR for eye in _EYES),
    ),
    "closer": (*_NEAR, "more proximate", "less distant"),
    "farther": (*_FAR, "more distant", "less proximate"),
}
"""Ways to say each spatial relation (ReinforceSight's eight), articles left out; the longest that fits counts."""

_RELATION_OF = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_RELATION = re.compile(rf"\b(?:{'|'.join(sorted(_RELATION_OF, key=len, reverse=True))})\b")
_THE = re.compile(r"\bthe\s+")
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n't\b")
_OPTION = re.compile(r"\(([A-Fa-f])\)")
_LETTER = re.compile(r"([A-F])(?:[.:)]\s.*|[.:)]?)", re.DOTALL)
_YES_NO = re.compile(r"\b(?:yes|no)\b")


def relations(text: str) -> set[str]:
    """Returns the spatial relations that a text names."""
    return {_RELATION_OF[phrase] for phrase in _RELATION.findall(_THE.sub("", text.lower()))}


def yes_or_no(text: str) -> set[str]:
    """Returns which of "yes" and "no" a text says."""
    return set(_YES_NO.findall(text.lower()))


def choice(text: str) -> Choice:
    """Returns the one option letter, spatial relation, or yes or no, that an answer names.

    Two of a kind are none, and so is a negation. An option letter goes before the words that stand with it.
    """
    answer = text.strip()
    letters = {letter.upper() for letter in _OPTION.findall(answer)}
    bare = _LETTER.fullmatch(answer)
    for kind, found in (
        ("option", letters or {bare[1]} if bare else letters),
        ("relation", set() if _NEGATION.search(answer.lower()) else relations(answer)),
        ("yes/no", yes_or_no(answer)),
    ):
        if found:
            return Choice(kind, found.pop()) if len(found) == 1 else Choice("", "")
    return Choice("", "")


_CONCLUDES = re.compile(r"\b(?:answer|response|object)(?: is\b:?|:)", re.IGNORECASE)


def conclusion(text: str) -> tuple[str, str]:
    """Returns the reasoning and the answer it ends with.

    The answer is what the tags hold; without them, the rest of the last line that says "answer is" or "answer:"; else the last
    line.
    """
    cut = sections(text)
    if cut.form != "bare":
        return cut.thought, cut.answer.strip()
    lines = cut.answer.strip().splitlines() or [""]
    for place in range(len(lines) - 1, -1, -1):
        *_, last = [None, *_CONCLUDES.finditer(lines[place])]
        if last:
            return "\n".join([*lines[:place], lines[place][: last.start()]]), lines[place][
                last.end() :
            ].strip()
    return "\n".join(lines[:-1]), lines[-1].strip()


def _records(text: str, key: str, width: int) -> Places:
    cut = sections(text)
    whole = _json(cut.answer)
    entries = [whole] if isinstance(whole, dict) else whole if isinstance(whole, list) else None
    strict = cut.form != "broken" and entries is not None
    places, labels = [], []
    for entry in _objects(cut.answer, key) if entries is None else entries:
        entry = entry if isinstance(entry, dict) else {}
        label = entry.get("label")
        places.append(_place(entry.get(key), width))
        labels.append(label if isinstance(label, str) else "")
        strict &= entry.keys() == {key, "label"} and isinstance(label, str)
    return Places(
        tuple(places), tuple(labels), (1.0,) * len(places), strict and all(map(is_proper, places))
    )


def _objects(text: str, key: str) -> list[Any]:
    """Returns each `{…}` in a text that speaks of `key`, wherever it stands (prose, a code fence, a list that breaks off)."""
    return [_load(found) for found in re.findall(r"\{[^{}]*\}", text) if key in found]


def _json(text: str) -> Any:
    """Returns a JSON value; None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _load(text: str) -> Any:
    """Returns a JSON value or a Python literal; None for any other text."""
    value = _json(text)
    if value is None and len(text) <= MAX_LITERAL:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python will not know some day
                return ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return value


def _place(value: Any, width: int) -> tuple[float, ...]:
    numbers = (
        tuple(map(_number, value))
        if isinstance(value, list | tuple) and len(value) == width
        else (math.nan,)
    )
    return numbers if all(map(math.isfinite, numbers)) else (math.nan,) * width


def _number(value: Any) -> float:
    """Returns a JSON number as a float, NaN for what is none or is too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
