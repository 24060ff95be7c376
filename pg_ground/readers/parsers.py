"""Readers of answers in text: sections, numbers, options, relations and agents' turns.

`locations` has the readers of boxes and points.

Rewards and benchmarks use the same readers. A reader has an argument `strict` if the two differ on
purpose. A reward reads with `strict=True`: it pays only for the form that the prompt asks for, so
that hedging ("4 or 5", two answer tags) earns nothing. A benchmark reads with `strict=False`: it
measures what an answer says, and files of other systems have code fences, open tags and words
around a number. docs/rewards.md lists the differences, and a test holds the list.

Every reader takes any string. It never evaluates code, and its time is linear in the length of the
text.
"""

import math
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Sections(NamedTuple):
    """A text, cut at its think tags and answer tags."""

    thought: str
    answer: str
    """The whole text if there are no tags; "" if it is not clear which part is the answer."""
    form: str
    """"bare" (no tags), "answer" (one pair), "think_answer" (`<think>…</think> <answer>…</answer>`)
    or "broken".
    """


_TAG = re.compile(r"(</?(?:think|answer)>)")


def sections(text: str) -> Sections:
    """Returns the thoughts and the answer of a text.

    The form is "broken" if there is text outside the tags, a second tag of a kind, or an empty
    answer. The answer of a broken text is the content of its only pair of answer tags, else the
    text behind its thoughts. Several answers count as none.
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


def answer_text(text: str, strict: bool) -> str:
    """Returns the part of a text that is its answer.

    Args:
      strict: takes the answer of `sections`. Otherwise the last `<answer>` counts, even if it is
        not closed, else the text behind the last `</think>`; a code fence in it is removed, with
        all text around the fence.
    """
    if strict:
        return sections(text).answer
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    elif "<answer>" in text:  # sampling stopped at the closing tag, or the answer was cut off
        text = text[text.rfind("<answer>") + len("<answer>") :]
    elif "</think>" in text:
        text = text[text.rfind("</think>") + len("</think>") :]
    fence = text.find("```")
    if fence >= 0:
        inner = text[fence + 3 :]
        closing = inner.find("```")
        text = re.sub(r"^[a-z]+\s", "", inner[:closing] if closing >= 0 else inner)
    return text.strip()


# fmt: off
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)
# fmt: on
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?!\w)"
    rf"|(?<![\w-])(?:{'|'.join(_NUMBER_WORDS)})\b(?!-|\s+(?:hundred|thousand|million)\b)"
)


def number(value: object, strict: bool) -> float | None:
    """Returns the one number that an answer names, in digits or as a word up to twenty.

    The value is None for none or several.

    Args:
      value: a text, a JSON number, or a list with one of them.
      strict: the number must be the whole answer, except for a full stop. "8 cows" is 8 for a
        benchmark and None for a reward.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        return number(value[0], strict)
    if not isinstance(value, str):
        single = json_number(value, strict)
        return None if math.isnan(single) else single
    answer = answer_text(value, strict).strip().lower()
    if not strict:
        answer = _without_lists(answer)
    matches = list(_NUMBER.finditer(answer))
    whole = (0, len(answer.removesuffix(".")))
    if strict and [match.span() for match in matches] != [whole]:
        return None
    numbers = {_from_words_or_digits(match[0]) for match in matches}
    return numbers.pop() if len(numbers) == 1 and all(map(math.isfinite, numbers)) else None


_SQUARE_LIST = re.compile(r"\[[^\[\]]*\]")
_ROUND_PAIR = re.compile(r"\([-+0-9.\s]+,[-+0-9.,\s]+\)")


def _without_lists(text: str) -> str:
    """Returns a text in which a comma of a list or of a bare pair no longer groups thousands.

    "[421,198]" and "(421,198)" are two numbers each, but "about (1,024)" is one.
    """
    if _ROUND_PAIR.fullmatch(text.removesuffix(".")):
        return text.replace(",", ", ")
    return _SQUARE_LIST.sub(lambda match: match[0].replace(",", ", "), text)


def _from_words_or_digits(text: str) -> float:
    if text in _NUMBER_WORDS:
        return float(_NUMBER_WORDS.index(text))
    return float(text.replace(",", ""))


def json_number(value: object, strict: bool) -> float:
    """Returns a JSON number as a float.

    The value is NaN for any other value, and for a number that is not finite or too large.

    Args:
      strict: the value must be a number. Otherwise a text such as "10.5" is a number too.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    if strict and isinstance(value, str):
        return math.nan
    try:
        as_float = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return as_float if math.isfinite(as_float) else math.nan


def words(value: object) -> str:
    """Returns an answer as text to compare: lower case, single blanks, without a last full stop.

    The answer is what a text states behind "answer is" or "answer:", else the whole text.
    """
    return " ".join(stated(str(value)).lower().split()).removesuffix(".")


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without articles and punctuation.

    SQuAD's evaluator compares these words (arXiv 1606.05250).
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


_ROUND_BRACKETS = re.compile(r"(?<=\()[A-Fa-f](?=\))")
_ANY_BRACKETS = re.compile(r"(?<=\()[A-Fa-f](?=\))|(?<=\[)[A-F](?=\])|(?<=\{)[A-F](?=\})")
_NAMED_LETTER = re.compile(
    r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\"?\s*(?:is\b)?\s*:?\s*\"?([A-F])\b"
)
_LETTER = re.compile(r"([A-Fa-f])(?:[.:)](?:\s.*)?)?", re.DOTALL)


def option(value: object, choices: Sequence[str] = (), *, strict: bool) -> str | None:
    """Returns the letter of the one option that an answer names: `(B)`, `B` or `B. left`.

    The result is None if the answer names no option, several options, or an option that is not
    among `choices`.

    Args:
      choices: words of the options, if they are known.
      strict: takes no other form, because a lower-case "a" may be an article. Otherwise `[B]`,
        `{B}`, `b`, `the answer is B`, the words of an option and a relation that only one option
        names are an option too. Only the `answer_text` counts. If it states an answer ("the answer
        is: left"), the stated answer counts first.
    """
    if not isinstance(value, str):
        return None
    if strict:
        letters = _letters(value.strip(), strict)
    else:
        answer = answer_text(value, strict=False).replace("**", "")
        conclusion_text = stated(answer)
        letters = (
            _letters(conclusion_text, strict)
            or _letters(answer, strict)
            or _named_choices(conclusion_text, choices)
        )
    if len(letters) != 1 or (choices and ord(min(letters)) - ord("A") >= len(choices)):
        return None
    return letters.pop()


def _named_choices(answer: str, choices: Sequence[str]) -> set[str]:
    """Returns the letters of the choices that an answer names by words.

    The words are equal, or equal without articles, or they name the same relation, yes or no. In
    the last line of an answer a relation counts as for a reward: negated, or beside another
    relation, it is none.
    """
    texts = list(map(str, choices))
    plain = _plain(answer)
    equal = _letters_of(texts, lambda choice_text: _plain(choice_text) == plain)
    if equal:
        return equal
    answer_words = squad_words(answer)
    if any(map(str.isalpha, "".join(answer_words))):
        equal = _letters_of(texts, lambda choice_text: squad_words(choice_text) == answer_words)
    named = choice(conclusion(answer)[1])
    if equal or named.kind not in ("relation", "yes/no"):
        return equal
    return _letters_of(texts, lambda choice_text: choice(choice_text) == named)


def _letters_of(choices: Sequence[str], is_named: Callable[[str], bool]) -> set[str]:
    return {chr(ord("A") + i) for i, text in enumerate(choices) if is_named(text)}


def _letters(answer: str, strict: bool) -> set[str]:
    """Returns the option letters that an answer names."""
    brackets = _ROUND_BRACKETS if strict else _ANY_BRACKETS
    letters = {letter.upper() for letter in brackets.findall(answer)}
    if not letters and not strict:
        letters = set(_NAMED_LETTER.findall(answer))
    bare = _LETTER.fullmatch(answer)
    if not letters and bare and not (strict and bare[1].islower()):
        letters = {bare[1].upper()}
    return letters


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")


_NEAR = ("closer", "nearer")
_FAR = ("farther", "further")
_VIEWERS = ("camera", "viewer")

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left", "leftward", "leftwards"),
    "right": ("right", "rightward", "rightwards"),
    "above": ("above", "over", "on top of", "higher than", "up from"),
    "below": ("below", "under", "underneath", "beneath", "lower than", "down from"),
    "in front of": (
        "in front",
        "before",
        "ahead of",
        *(f"{near} to {viewer}" for near in _NEAR for viewer in _VIEWERS),
    ),
    "behind": (
        "behind",
        "after",
        "in back of",
        *(f"{far} from {viewer}" for far in _FAR for viewer in _VIEWERS),
    ),
    "closer": (*_NEAR, "more proximate", "less distant"),
    "farther": (*_FAR, "more distant", "less proximate"),
}
"""Phrases, without articles, for each of ReinforceSight's eight spatial relations. The longest
phrase that fits counts.
"""

_RELATION_OF = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_RELATION = re.compile(rf"\b(?:{'|'.join(sorted(_RELATION_OF, key=len, reverse=True))})\b")
_THE = re.compile(r"\bthe\s+")
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n't\b")
_YES_NO = re.compile(r"\b(?:yes|no)\b")


def relations(text: str) -> set[str]:
    """Returns the spatial relations that a text names."""
    return {_RELATION_OF[phrase] for phrase in _RELATION.findall(_THE.sub("", text.lower()))}


def yes_or_no(text: str) -> set[str]:
    """Returns the words among "yes" and "no" that a text contains."""
    return set(_YES_NO.findall(text.lower()))


class Choice(NamedTuple):
    """An answer out of a closed set."""

    kind: str
    """"relation", "option" or "yes/no"; "" if the answer names nothing, or two values of a kind."""
    value: str


def choice(text: str) -> Choice:
    """Returns the one option, else spatial relation, else yes or no, that an answer names.

    Two values of a kind count as none, and so does a negation of a relation. This is the strict
    reader of the spatial rewards.
    """
    answer = text.strip()
    relation = set() if _NEGATION.search(answer.lower()) else relations(answer)
    for kind, values in (
        ("option", _letters(answer, strict=True)),
        ("relation", relation),
        ("yes/no", yes_or_no(answer)),
    ):
        if values:
            return Choice(kind, values.pop()) if len(values) == 1 else Choice("", "")
    return Choice("", "")


def same_choice(answer: str, gold: str) -> bool:
    """Returns whether an answer names the relation, the option, or the yes or no of the gold text.

    It is False if the gold text names something else too: "left lamp" is no relation.
    """
    named = choice(gold)
    if not named.kind:
        return False
    rest_of_gold = _RELATION.sub(" ", _THE.sub("", gold.lower()))
    if named.kind == "yes/no":
        rest_of_gold = _YES_NO.sub(" ", gold.lower())
    elif named.kind == "option":
        rest_of_gold = ""
    return set(squad_words(rest_of_gold)) <= _FILLERS and choice(answer) == named


_FILLERS = {"to", "of", "on", "in", "at", "is", "side", "it", "its", "that", "than", "from"}
"""Words beside a relation that name nothing."""

_CONCLUDES = re.compile(r"\b(?:answer|response|object)(?: is\b:?|:)", re.IGNORECASE)


def stated(text: str) -> str:
    """Returns the answer that a text states: the text behind the last "answer is" or "answer:".

    It ends with the line, unless the line has no more words. Without such words it is the whole
    `answer_text`.
    """
    answer = answer_text(text, strict=False)
    matches = list(_CONCLUDES.finditer(answer))
    if not matches:
        return answer
    tail = answer[matches[-1].end() :].strip()
    return tail.split("\n", 1)[0].strip() or answer


def conclusion(text: str) -> tuple[str, str]:
    """Returns the reasoning of a text and the answer at its end.

    The answer is the content of the tags. Without tags it follows "answer is" or "answer:" in the
    last line that has one of these, else it is the last line.
    """
    cut = sections(text)
    if cut.form != "bare":
        return cut.thought, cut.answer.strip()
    lines = cut.answer.strip().splitlines() or [""]
    for i in range(len(lines) - 1, -1, -1):
        matches = list(_CONCLUDES.finditer(lines[i]))
        if matches:
            reasoning = "\n".join([*lines[:i], lines[i][: matches[-1].start()]])
            return reasoning, lines[i][matches[-1].end() :].strip()
    return "\n".join(lines[:-1]), lines[-1].strip()


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{…}`; None if there is no closed one."""
    _, boxed, content = text.rpartition(r"\boxed{")
    depth = 1
    for i, character in enumerate(content if boxed else ""):
        depth += (character == "{") - (character == "}")
        if not depth:
            return content[:i]
    return None


def think_boxed(text: str) -> bool:
    r"""Returns whether the text is `<think>…</think>` and words with one filled `\boxed{…}`."""
    pieces = _TAG.split(text)
    if pieces[1::2] != ["<think>", "</think>"] or pieces[0]:
        return False
    return text.count(r"\boxed{") == 1 and bool((last_boxed(pieces[-1]) or "").strip())


ACTS = ("answer", "search", "code", "problem")
"""Acts of an agent's turn (RLLaVA's tags)."""

_ACT_TAG = re.compile(rf"(</?(?:think|{'|'.join(ACTS)})>)")


class Turns(NamedTuple):
    """Acts of an agent, in order."""

    acts: tuple[tuple[str, str], ...]
    """(a name in `ACTS`, the content of its tags). Empty if tags are nested, left open, or empty.
    """
    ok: bool
    """Each act follows its own `<think>…</think>`, and no text is outside the tags."""


def turns(text: str) -> Turns:
    """Returns the acts of one turn, or of a transcript of several turns.

    Text outside the tags is no act.
    """
    pieces = _ACT_TAG.split(text)
    between, tags = pieces[::2], pieces[1::2]
    pairs = list(zip(tags[::2], tags[1::2], between[1::2], strict=False))
    matching = all(closing == f"</{opening[1:]}" for opening, closing, _ in pairs)
    if len(tags) % 2 or not matching or not all(content.strip() for *_, content in pairs):
        return Turns((), False)
    names = [opening[1:-1] for opening, *_ in pairs]
    acts = tuple(
        (name, content.strip())
        for name, (*_, content) in zip(names, pairs, strict=True)
        if name != "think"
    )
    alternate = len(names) == 2 * len(acts) > 0 and all(name == "think" for name in names[::2])
    return Turns(
        acts,
        alternate
        and "think" not in names[1::2]
        and not any(outside.strip() for outside in between[::2]),
    )
