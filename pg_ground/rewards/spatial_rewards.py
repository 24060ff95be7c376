"""Text rewards for spatial relations and their reasoning (ReinforceSight)."""

import math
import re
from collections.abc import Callable

from pg_ground.readers import parsers
from pg_ground.rewards.text_example import TextExample, gold_text
from pg_ground.rewards.word_rewards import answer_words

WRONG = -0.5
"""Score of a wrong answer in ReinforceSight."""

REASONING_WEIGHT = 0.3

REASONING_WORDS = (20, 150)
"""Least and largest number of words of a chain of thought that earns (ReinforceSight)."""


def spatial_answer(text: str, example: TextExample) -> float:
    """Returns 1 for the right answer, else −0.5 (ReinforceSight's).

    The answer is a relation (by any of its phrases), an option letter, or yes or no. An answer that
    names none or two of these is wrong. Any other gold, such as an object's name, is compared as by
    `exact_match`. A gold without words, such as `[]`, has no right answer: the value is NaN.
    """
    if not gold_text(example):
        return math.nan
    answer = parsers.conclusion(text)[1]
    gold = parsers.conclusion(example.gold)[1]
    gold_choice = parsers.choice(gold)
    if gold_choice.kind:
        return 1.0 if parsers.choice(answer) == gold_choice else WRONG
    gold_words = answer_words(gold)
    if not gold_words:
        return math.nan
    return 1.0 if answer_words(answer) == gold_words else WRONG


def spatial(text: str, example: TextExample) -> float:
    """Returns `spatial_answer`, and up to 0.3 more for the reasoning, in [−0.5, 1.3].

    Only the reasoning of a right answer earns. Reasoning of 20 to 150 words can earn. Its last
    sentence with a relation must name the answer's relation and no other. If the answer is yes or
    no, or an object of the question, the sentence must name that instead. Half of the 0.3 is for
    reasoning without digits and units outside the objects' names. The other half is for naming all
    objects of the question.
    """
    score = spatial_answer(text, example)
    if not score > 0:
        return score
    reasoning, answer = parsers.conclusion(text)
    return score + REASONING_WEIGHT * _reasoning_quality(reasoning, answer, example.prompt)


_SENTENCE = re.compile(r"[.!?\n]")
_OPTION_TEXT = re.compile(r"\(([A-F])\)([^()\n]*)")
_UNITS = (
    "(?:[cmk]?m|(?:centi|milli|kilo)?met(?:er|re)s?|feet|ft|inch(?:es)?|yards?|miles?|pixels?|px"
    "|degrees?|percent)"
)
_MEASURED = re.compile(rf"\d|[%°]|\b{_UNITS}\b")
# fmt: off
_NO_OBJECT = (
    "the", "and", "or", "to", "of", "in", "is", "on", "at", "as", "be", "relative", "located",
    "with", "from", "than", "appears?", "left", "right", "above", "below", "over", "under",
    "beneath", "before", "behind", "after", "closer", "nearer", "farther", "further", "camera",
    "viewer", "image", "picture", "photo", "scene", "spatial", "relation(?:ship)?", "positions?",
    "following", "answer", "object", "one",
)
# fmt: on
_OBJECT = re.compile(rf"\bthe ((?:(?!(?:{'|'.join(_NO_OBJECT)})\b)[a-z'-]+ ?){{1,3}})")
"""Up to three words behind "the", none of which is in `_NO_OBJECT`."""


def _reasoning_quality(reasoning: str, answer: str, prompt: str) -> float:
    """Returns the quality of a chain of thought that led to the right answer: 0, ½ or 1.

    `spatial` states the conditions.
    """
    thought = reasoning.lower()
    options = dict(_OPTION_TEXT.findall(prompt.upper()))
    choice = parsers.choice(answer)
    answer = options.get(choice.value, answer).lower()
    objects = {name.strip() for name in _OBJECT.findall(prompt.lower())}
    names = sorted({*objects, " ".join(answer_words(answer))} - {""}, key=len, reverse=True)
    name = re.compile(rf"\b(?:{'|'.join(map(re.escape, names)) or '(?!)'})\b")
    named = _reader_of_kind(choice.kind, answer, name)
    claims = [claim for sentence in _SENTENCE.split(thought) if (claim := named(sentence))]
    shortest, longest = REASONING_WORDS
    if claims[-1:] != [named(answer)] or not shortest <= len(thought.split()) <= longest:
        return 0.0
    names_objects = all(name_of in thought for name_of in objects)
    return (names_objects + (not _MEASURED.search(name.sub(" ", thought)))) / 2


def _reader_of_kind(kind: str, answer: str, name: re.Pattern[str]) -> Callable[[str], set[str]]:
    """Returns the function that reads the claim of a sentence.

    The kind of claim is the kind of the answer: relation, yes or no, or name.
    """
    if parsers.relations(answer):
        return parsers.relations
    if kind == "yes/no":
        return parsers.yes_or_no
    return lambda sentence: set(name.findall(sentence))
