"""Text rewards for answers in words: forms, numbers, mathematics and short texts."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from pg_ground.readers import parsers
from pg_ground.rewards.text_example import TextExample, gold_text

MAX_MATH = 200
"""Characters of the longest mathematical answer that is read. Math-verify needs more than linear
time for longer nonsense.
"""


def think_answer_format(text: str, _: TextExample) -> float:
    """Returns 1 if the whole text is `<think>…</think> <answer>…</answer>`, else 0.

    Each tag must occur once (DeepSeek-R1's format).
    """
    return float(parsers.sections(text).form == "think_answer")


def think_boxed_format(text: str, _: TextExample) -> float:
    r"""Returns 1 for `<think>…</think>` and words with one filled `\boxed{…}`, else 0.

    The whole text must have this form (RLLaVA's for maths).
    """
    return float(parsers.think_boxed(text))


def count_exact(text: str, example: TextExample) -> float:
    """Returns 1 if the answer is the gold number and nothing else, else 0."""
    gold = parsers.number(gold_text(example), strict=True)
    return math.nan if gold is None else float(parsers.number(text, strict=True) == gold)


def count_graded(text: str, example: TextExample) -> float:
    """Returns 1 / (1 + |n − n_gold|), in [0, 1]; 0 if the answer is not one number."""
    gold = parsers.number(gold_text(example), strict=True)
    if gold is None:
        return math.nan
    predicted = parsers.number(text, strict=True)
    return 0.0 if predicted is None else 1 / (1 + abs(predicted - gold))


def math_equal(text: str, example: TextExample) -> float:
    r"""Returns 1 if the answer equals the gold expression, else 0.

    The answer is the content of the last `\boxed{…}`, else of the answer tags. Math-verify compares
    the expressions; it reads LaTeX with its own grammar. No timer is set here. Simplifying an
    expression may take any time, so the caller must limit it.
    """
    gold = gold_text(example)
    gold_expression = _expression(parsers.last_boxed(gold) or parsers.sections(gold).answer)
    if not gold_expression:
        return math.nan
    answer = parsers.last_boxed(text)
    if answer is None:
        cut = parsers.sections(text)
        answer = "" if cut.form == "bare" else cut.answer
    return float(verify(gold_expression, _expression(answer), timeout_seconds=None))


_TWO_NUMBERS = re.compile(r"[0-9]\s+[0-9]")


def _expression(latex: str) -> list[Any]:
    """Returns math-verify's expressions of an answer.

    Several numbers in a row give none: math-verify would join them.
    """
    if len(latex) > MAX_MATH or _TWO_NUMBERS.search(latex):
        return []
    return parse(
        rf"\boxed{{{latex}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )


def token_f1(text: str, example: TextExample) -> float:
    """Returns the F1 of the answer's words against the gold words, in [0, 1].

    Words are normalised as in SQuAD (arXiv 1606.05250).
    """
    return f1(answer_words(text), answer_words(example.gold)) if gold_text(example) else math.nan


def exact_match(text: str, example: TextExample) -> float:
    """Returns 1 if the answer has the gold words in the same order, else 0.

    Words are normalised as in SQuAD.
    """
    if not gold_text(example):
        return math.nan
    return float(answer_words(text) == answer_words(example.gold))


def answer_words(text: str) -> list[str]:
    """Returns the `squad_words` of the answer of a text."""
    return parsers.squad_words(parsers.answer_text(text, strict=True))


def f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Returns the F1 of two lists of words as multisets, in [0, 1]; 1 if both are empty."""
    if not predicted or not gold:
        return float(predicted == gold)
    return 2 * (Counter(predicted) & Counter(gold)).total() / (len(predicted) + len(gold))
