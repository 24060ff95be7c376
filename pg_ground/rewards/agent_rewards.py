"""Text rewards for agents that think, search and write code (RLLaVA's agents)."""

import ast
import math
import re
import warnings

from pg_ground.readers import parsers
from pg_ground.readers.locations import MAX_LITERAL
from pg_ground.rewards.text_example import TextExample, gold_text
from pg_ground.rewards.word_rewards import answer_words, f1

TOOL_BONUS = 0.2
"""Share of the answer's score that is added if a tool was used before the answer."""


def agent_format(text: str, _: TextExample) -> float:
    """Returns 1 if the whole text is `<think>…</think>` and one act, or several such turns; else 0.

    An act is `<answer>`, `<search>`, `<code>` or `<problem>`.
    """
    return float(parsers.turns(text).ok)


def agent_step(text: str, example: TextExample) -> float:
    """Returns the similarity of one turn to the gold turn, in [0, 1].

    RLLaVA's code and search agents use it. A turn scores 0 if its act is not the gold act, or if it
    has two acts. Answers and searches are compared by the F1 of their words, problems as sets of
    labels, and code by its syntax tree. Code never runs, so spaces, comments and quotes do not
    count.
    """
    gold_acts = parsers.turns(gold_text(example)).acts
    if len(gold_acts) != 1:
        return math.nan
    (kind, gold), acts = gold_acts[0], parsers.turns(text).acts
    if [name for name, _ in acts] != [kind]:
        return 0.0
    content = acts[0][1]
    if kind == "problem":
        return float(set(_LABEL.findall(content)) == set(_LABEL.findall(gold)))
    if kind == "code":
        return float(_syntax(content) == _syntax(gold))
    return f1(parsers.squad_words(content), parsers.squad_words(gold))


def agent(text: str, example: TextExample) -> float:
    """Returns the F1 of a transcript's last answer, in [0, 1.2].

    The score is 0.2 of it higher if an act precedes the answer. A transcript that does not end in
    an answer scores 0. So acts alone earn nothing. The value is NaN if the gold turn is no answer.
    """
    gold = gold_text(example)
    gold_acts = parsers.turns(gold).acts
    if not gold or (gold_acts and gold_acts[-1][0] != "answer"):
        return math.nan
    acts = parsers.turns(text).acts
    if not acts or acts[-1][0] != "answer":
        return 0.0
    score = f1(parsers.squad_words(acts[-1][1]), answer_words(gold))
    used_tool = any(kind != "answer" for kind, _ in acts[:-1])
    return score * (1 + TOOL_BONUS * used_tool)


_LABEL = re.compile(r"[\w-]+")
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*)```\s*", re.DOTALL)


def _syntax(code: str) -> str:
    """Returns the syntax tree of code, with or without a fence.

    The value is the code itself if it is no valid Python.
    """
    fenced = _FENCE.fullmatch(code)
    code = fenced[1] if fenced else code
    if len(code) > MAX_LITERAL:
        return code
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
