"""Rewards of completions as text, on the host: for answers in words, numbers, JSON and mathematics.

A reward is a function `(completion, TextExample) -> float`, NaN at questions it does not apply to. Boxes and points are in pixels
of the original image, and sets of them are matched one to one for the largest total similarity, as in `rewards`: a missing, a
spurious and a duplicate answer all cost, and one that cannot be read counts as a prediction with similarity 0.
"""

import ast
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from math_verify import LatexExtractionConfig, parse, verify

from pg_ground import boxes
from pg_ground.rewards import parsers
from pg_ground.rewards.parsers import Places
from pg_ground.vocab import LOC_MAX

SIGMA_PX = 100.0
"""Of synthetic-grounding's reward, in pixels of the image scaled so that its longer side has `MAX_SIZE_PX`."""

MAX_SIZE_PX = 640.0

ALPHA = 0.5
"""Sigma of EasyDistill's Gaussians, as a fraction of a box's side."""

MATCH_IOU = 0.5
"""Boxes of open-vocabulary detection match above this IoU."""

COORDINATE_LIMIT_PX = 1e7
"""Coordinates are cut off here, so that the products of all of them are finite."""

WRONG = -0.5
"""What a wrong spatial answer earns in ReinforceSight."""

REASONING_WEIGHT = 0.3

REASONING_WORDS = (20, 150)
"""Bounds on the length of a chain of thought (ReinforceSight)."""

TOOL_BONUS = 0.2
"""Of what an answer is worth, added where a tool was used before it."""

MAX_MATH = 200
"""Characters of the longest mathematical answer that is looked at: nonsense costs math-verify time beyond its length."""


class TextExample(NamedTuple):
    """A question as a text reward sees it."""

    prompt: str
    gold: str
    """The gold suffix, decoded."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """x1 y1 x2 y2 in pixels of the original image."""
    points: tuple[tuple[float, float], ...]
    """x y in pixels of the original image."""
    labels: tuple[str, ...]
    """One for each box (or point), "" where there is none."""
    size: tuple[int, int]
    """Width and height of the original image in pixels."""
    target: str
    """"boxes", "points" or "text"."""
    source: str
    index: int
    length: int
    """Tokens of the completion, EOS included."""


TextReward = Callable[[str, TextExample], float]
Grammar = Callable[[str], Places]
Similarity = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]


def json_format(text: str, example: TextExample) -> float:
    """Returns 1 for JSON points or boxes, as asked, with a label for each, none only where there is none to find; else 0."""
    for target, read in (("points", parsers.json_points), ("boxes", parsers.json_boxes)):
        gold = _gold(example, read, target)
        if gold:
            found = read(text)
            return float(found.ok and bool(found.places) == bool(gold.places))
    return math.nan


def json_points(text: str, example: TextExample) -> float:
    """Returns the matched nearness of JSON points to gold points, in [0, 1]."""
    return _compare(text, example, parsers.json_points, _distance_gaussian, "points")


def json_points_in_boxes(text: str, example: TextExample) -> float:
    """Returns the matched share of JSON points that lie in gold boxes, one in each, in [0, 1].

    For questions about points, against the boxes of the objects they should lie on (NaN where the annotation has none).
    """
    if example.target != "points" or len(example.boxes) != len(example.points):
        return math.nan
    return _compare(
        text, example._replace(points=example.boxes), parsers.json_points, _inside, "points"
    )


def json_boxes(text: str, example: TextExample) -> float:
    """Returns the matched IoU of JSON boxes and gold boxes, in [0, 1]; labels count where the gold has several."""
    return _compare(text, example, parsers.json_boxes, _iou)


def json_boxes_squared(text: str, example: TextExample) -> float:
    """Returns the matched IoU² of JSON boxes and gold boxes, in [0, 1]."""
    return _compare(text, example, parsers.json_boxes, _iou_squared)


def dict_format(text: str, example: TextExample) -> float:
    """Returns 1 for a dict of lists of proper boxes (EasyDistill), else 0."""
    return _grammatical(text, example, parsers.dict_boxes)


def dict_point(text: str, example: TextExample) -> float:
    """Returns how near a dict's boxes are to the centres of gold boxes of the same key, in units of these, in [0, 1]."""
    return _compare(text, example, parsers.dict_boxes, _gaussian_point)


def dict_coverage(text: str, example: TextExample) -> float:
    """Returns the overlap of a dict's boxes with gold boxes of the same key, both as Gaussians, in [0, 1]."""
    return _compare(text, example, parsers.dict_boxes, _gaussian_coverage)


def dict_iou(text: str, example: TextExample) -> float:
    """Returns the matched IoU of a dict's boxes and gold boxes of the same key, in [0, 1]."""
    return _compare(text, example, parsers.dict_boxes, _iou)


def list_format(text: str, example: TextExample) -> float:
    """Returns 1 for one proper box as `[x1, y1, x2, y2]` in natural numbers (EasyDistill), else 0."""
    return _grammatical(text, example, parsers.list_boxes)


def list_point(text: str, example: TextExample) -> float:
    """Returns how near listed boxes are to the centres of gold boxes, in units of these, in [0, 1]."""
    return _compare(text, example, parsers.list_boxes, _gaussian_point)


def list_coverage(text: str, example: TextExample) -> float:
    """Returns the overlap of listed boxes with gold boxes, both as Gaussians, in [0, 1]."""
    return _compare(text, example, parsers.list_boxes, _gaussian_coverage)


def list_iou(text: str, example: TextExample) -> float:
    """Returns the matched IoU of listed boxes and gold boxes, in [0, 1]."""
    return _compare(text, example, parsers.list_boxes, _iou)


def list_iou_squared(text: str, example: TextExample) -> float:
    """Returns the matched IoU² of listed boxes and gold boxes, in [0, 1] (RLLaVA's grounding accuracy)."""
    return _compare(text, example, parsers.list_boxes, _iou_squared)


def box_tokens_format(text: str, example: TextExample) -> float:
    """Returns 1 for one proper box in Qwen2-VL's box tokens (RLLaVA's grounding format), else 0."""
    return _grammatical(text, example, parsers.box_tokens)


def ovd_format(text: str, example: TextExample) -> float:
    """Returns 1 for proper boxes with confidences in answer tags, else 0."""
    return _grammatical(text, example, parsers.ovd)


def ovd_f(text: str, example: TextExample) -> float:
    """Returns 2·Σ IoU / (n_predicted + n_gold) over detections, in [0, 1]; 1 where both are 0."""
    found = _detect(text, example)
    return _share(2 * found.overlap.sum(), len(found.overlap) + found.gold) if found else math.nan


def ovd_iou(text: str, example: TextExample) -> float:
    """Returns Σ IoU / max(n_predicted, n_gold) over detections, in [0, 1] (RLLaVA's); 1 where both are 0."""
    found = _detect(text, example)
    return _share(found.overlap.sum(), max(len(found.overlap), found.gold)) if found else math.nan


def ovd_confidence(text: str, example: TextExample) -> float:
    """Returns the mean of c over detections and of 1 − c over other predictions, in [0, 1] (RLLaVA's).

    Never more than the mean over the detections alone: other predictions can only lower it, and by themselves earn nothing. 1
    where nothing is predicted and there is nothing to find.
    """
    found = _detect(text, example)
    if not found:
        return math.nan
    hit = found.overlap > 0
    if not hit.any():
        return float(not found.gold and not hit.size)
    return float(
        min(
            np.where(hit, found.confidence, 1 - found.confidence).mean(),
            found.confidence[hit].mean(),
        )
    )


def ovd_calibration(text: str, example: TextExample) -> float:
    """Returns Σ (2·c·detected − c²) / max(n_predicted, n_gold), in [−1, 1]; 1 where both are 0.

    Brier's score less that of saying 0: over a box that is right with probability p its mean is largest, p², at c = p. A box with
    confidence 0 earns nothing. Not cut off at 0, for then a wrong box could as well be a confident one.
    """
    found = _detect(text, example)
    if not found:
        return math.nan
    earned = 2 * found.confidence * (found.overlap > 0) - np.square(found.confidence)
    return _share(earned.sum(), max(len(found.overlap), found.gold))


def ovd_ap(text: str, example: TextExample) -> float:
    """Returns average precision, in [0, 1]: the area under the interpolated precision over recall.

    Predictions of one confidence enter together. 1 where nothing is predicted and there is nothing to find.
    """
    found = _detect(text, example)
    if not found:
        return math.nan
    cuts = np.unique(found.confidence)[::-1]
    entered = found.confidence >= cuts[:, None]
    hits = (entered & (found.overlap > 0)).sum(axis=-1)
    precision = np.maximum.accumulate((hits / entered.sum(axis=-1))[::-1])[::-1]
    area = (np.diff(hits, prepend=0) * precision).sum()
    return _share(area, found.gold) if found.gold else float(not len(found.overlap))


def ovd(text: str, example: TextExample) -> float:
    """Returns the mean of `ovd_f`, `ovd_calibration` and `ovd_ap`, in [−⅓, 1]; 1 for `[]` where there is nothing to find."""
    return (ovd_f(text, example) + ovd_calibration(text, example) + ovd_ap(text, example)) / 3


def think_answer_format(text: str, _: TextExample) -> float:
    """Returns 1 where the whole text is `<think>…</think> <answer>…</answer>`, each tag once, else 0 (DeepSeek-R1's format)."""
    return float(parsers.sections(text).form == "think_answer")


def think_boxed_format(text: str, _: TextExample) -> float:
    r"""Returns 1 where the whole text is `<think>…</think>` and words with one filled `\boxed{…}`, else 0 (RLLaVA's for math)."""
    return float(parsers.think_boxed(text))


def count_exact(text: str, example: TextExample) -> float:
    """Returns 1 for an answer that is the gold number and nothing else, else 0."""
    gold, found = parsers.number(_gold_text(example)), parsers.number(text)
    return math.nan if math.isnan(gold) else float(found == gold)


def count_graded(text: str, example: TextExample) -> float:
    """Returns 1 / (1 + |n − n_gold|), in [0, 1]; 0 where the answer is not one number."""
    gold, found = parsers.number(_gold_text(example)), parsers.number(text)
    return (
        math.nan if math.isnan(gold) else 0.0 if math.isnan(found) else 1 / (1 + abs(found - gold))
    )


def math_equal(text: str, example: TextExample) -> float:
    r"""Returns 1 where the last `\boxed{…}`, or else what the answer tags hold, equals the gold expression, else 0.

    Equality is math-verify's, which reads LaTeX with a grammar of its own. No timer is set: an expression may take any time to
    simplify, and that is the caller's to limit.
    """
    wanted = _gold_text(example)
    gold = _expression(parsers.last_boxed(wanted) or parsers.sections(wanted).answer)
    if not gold:
        return math.nan
    cut = parsers.sections(text)
    answer = parsers.last_boxed(text)
    found = _expression((cut.answer if cut.form != "bare" else "") if answer is None else answer)
    return float(verify(gold, found, timeout_seconds=None))


def token_f1(text: str, example: TextExample) -> float:
    """Returns the F1 of the answer's words against the gold's, in [0, 1], normalised as SQuAD's are (arXiv 1606.05250)."""
    if not _gold_text(example):
        return math.nan
    return _f1(_squad_words(text), _squad_words(example.gold))


def exact_match(text: str, example: TextExample) -> float:
    """Returns 1 where the answer has the gold's words in the gold's order, normalised as SQuAD's are, else 0."""
    return (
        float(_squad_words(text) == _squad_words(example.gold)) if _gold_text(example) else math.nan
    )


def spatial_answer(text: str, example: TextExample) -> float:
    """Returns 1 for the gold relation (by any of its names), option letter, or yes or no, else −0.5 (ReinforceSight's).

    An answer that names two, or none, is wrong. Any other gold, as an object's name, is compared as by `exact_match`.
    """
    if not _gold_text(example):
        return math.nan
    return 1.0 if _chosen(parsers.conclusion(text)[1], example.gold) else WRONG


def spatial(text: str, example: TextExample) -> float:
    """Returns `spatial_answer`, and for a right answer up to 0.3 more for its reasoning, in [−0.5, 1.3].

    Reasoning of 20 to 150 words earns if its last sentence that names a relation (or says yes or no, or names an object of the
    question, as the answer does) names the answer's alone. Half is for using neither digits nor units, but in the objects' names,
    half for naming the objects that the question names.
    """
    earned = spatial_answer(text, example)
    return (
        earned + REASONING_WEIGHT * _reasoning(*parsers.conclusion(text), example.prompt)
        if earned > 0
        else earned
    )


def agent_format(text: str, _: TextExample) -> float:
    """Returns 1 where the whole text is `<think>…</think>` and one act (`<answer>`, `<search>`, `<code>` or `<problem>`), else 0.

    Of a transcript, where that is so of every turn.
    """
    return float(parsers.turns(text).ok)


def agent_step(text: str, example: TextExample) -> float:
    """Returns how near one turn is to the gold turn, in [0, 1] (RLLaVA's code and search agents).

    A turn with another act than the gold's, or with two, is 0. Answers and searches are compared by F1 of their words, problems
    as sets of labels, code by its syntax tree: it is never run, and spaces, comments and quotes do not count.
    """
    gold = parsers.turns(_gold_text(example)).acts
    if len(gold) != 1:
        return math.nan
    (kind, wanted), acts = gold[0], parsers.turns(text).acts
    if [name for name, _ in acts] != [kind]:
        return 0.0
    found = acts[0][1]
    if kind == "problem":
        return float(set(_LABEL.findall(found)) == set(_LABEL.findall(wanted)))
    return (
        float(_syntax(found) == _syntax(wanted))
        if kind == "code"
        else _f1(_plain_words(found), _plain_words(wanted))
    )


def agent(text: str, example: TextExample) -> float:
    """Returns the F1 of a transcript's last answer, and for having acted before it 0.2 of that more, in [0, 1.2].

    A transcript that does not end in an answer is 0, whatever was done: acts are worth nothing by themselves.
    """
    gold = _gold_text(example)
    if not gold:
        return math.nan
    acts = parsers.turns(text).acts
    if not acts or acts[-1][0] != "answer":
        return 0.0
    right = _f1(_plain_words(acts[-1][1]), _squad_words(gold))
    return right * (1 + TOOL_BONUS * any(kind != "answer" for kind, _ in acts[:-1]))


TEXT_REWARDS: dict[str, TextReward] = {
    "json_format": json_format,
    "json_points": json_points,
    "json_points_in_boxes": json_points_in_boxes,
    "json_boxes": json_boxes,
    "json_boxes_squared": json_boxes_squared,
    "dict_format": dict_format,
    "dict_point": dict_point,
    "dict_coverage": dict_coverage,
    "dict_iou": dict_iou,
    "list_format": list_format,
    "list_point": list_point,
    "list_coverage": list_coverage,
    "list_iou": list_iou,
    "list_iou_squared": list_iou_squared,
    "box_tokens_format": box_tokens_format,
    "ovd_format": ovd_format,
    "ovd_f": ovd_f,
    "ovd_iou": ovd_iou,
    "ovd_confidence": ovd_confidence,
    "ovd_calibration": ovd_calibration,
    "ovd_ap": ovd_ap,
    "ovd": ovd,
    "think_answer_format": think_answer_format,
    "think_boxed_format": think_boxed_format,
    "count_exact": count_exact,
    "count_graded": count_graded,
    "math": math_equal,
    "token_f1": token_f1,
    "exact_match": exact_match,
    "spatial_answer": spatial_answer,
    "spatial": spatial,
    "agent_format": agent_format,
    "agent_step": agent_step,
    "agent": agent,
}


def _gold(example: TextExample, read: Grammar, target: str) -> Places | None:
    """Returns the annotation, or what the gold text says in the grammar; None where the question asks for something else."""
    annotated = example.points if target == "points" else example.boxes
    if example.target == target or (example.target == "text" and annotated):
        return Places(annotated, example.labels, (), True)
    found = read(example.gold)
    legible = not any(map(math.isnan, np.ravel(found.places)))
    return found if example.target == "text" and legible and (found.ok or found.places) else None


def _gold_text(example: TextExample) -> str:
    """Returns the gold answer to a question that asks for text, "" for any other."""
    return example.gold.strip() if example.target == "text" else ""


def _grammatical(text: str, example: TextExample, read: Grammar) -> float:
    return float(read(text).ok) if _gold(example, read, "boxes") else math.nan


def _compare(
    text: str, example: TextExample, read: Grammar, alike: Similarity, target: str = "boxes"
) -> float:
    gold = _gold(example, read, target)
    if not gold:
        return math.nan
    found = read(text)
    return _matched(_similarity(found, gold, alike, example.size) * _same_label(found, gold, read))


def _similarity(
    found: Places, gold: Places, alike: Similarity, size: tuple[int, int]
) -> Float[np.ndarray, "P K"]:
    """Returns the similarity of each prediction with each gold answer; 0 for a prediction that is not proper."""
    if not (found.places and gold.places):
        return np.zeros((len(found.places), len(gold.places)))
    proper = np.array([parsers.is_proper(place) for place in found.places])
    a, b = np.array(found.places)[:, None], np.array(gold.places, float)[None]
    a = np.clip(np.where(proper[:, None, None], a, 0), -COORDINATE_LIMIT_PX, COORDINATE_LIMIT_PX)
    return np.where(proper[:, None], alike(a, b, size), 0)


def _same_label(found: Places, gold: Places, read: Grammar) -> Bool[np.ndarray, "P K"]:
    """Returns which predictions may answer to which gold.

    Those of its name; all where the grammar has no names, or, but for a dict's keys, where the gold has at most one.
    """
    given, wanted = (
        [label.strip().casefold() for label in places.labels] for places in (found, gold)
    )
    same = np.array([mine == name for mine in given for name in wanted], bool).reshape(
        len(given), len(wanted)
    )
    named = read is parsers.dict_boxes or (read is not parsers.list_boxes and len(set(wanted)) > 1)
    return same if named else np.ones_like(same)


def _matched(similarity: Float[np.ndarray, "P K"]) -> float:
    """Returns 2·Σ / (P + K) in [0, 1], Σ the best one-to-one matching's total similarity; 1 where both sets are empty."""
    return float(boxes.f_measure(boxes.matched_total(similarity), *similarity.shape))


def _share(part: float, whole: int) -> float:
    return float(part / whole) if whole else 1.0


def _distance_gaussian(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns exp(−d² / 2σ²) of points in the scaled image (synthetic-grounding's reward)."""
    return boxes.gaussian(np.linalg.norm(a - b, axis=-1) * (MAX_SIZE_PX / max(size)), SIGMA_PX)


def _inside(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return boxes.contains(b, a, slack=0.0).astype(float)


def _iou(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return boxes.iou(a, b)


def _iou_squared(a: np.ndarray, b: np.ndarray, _: tuple[int, int]) -> np.ndarray:
    return np.square(boxes.iou(a, b))


def _gaussian_point(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return boxes.gaussian_point(boxes.centre(a), b, ALPHA, np.array(size) / LOC_MAX)


def _gaussian_coverage(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return boxes.gaussian_coverage(a, b, ALPHA, np.array(size) / LOC_MAX)


class _Detections(NamedTuple):
    overlap: Float[np.ndarray, " P"]
    """IoU with the gold box that a prediction found; 0 where it found none."""
    confidence: Float[np.ndarray, " P"]
    gold: int


def _detect(text: str, example: TextExample) -> _Detections | None:
    """Returns what predictions find: by falling confidence, each takes the free gold box of its label with the largest IoU."""
    gold = _gold(example, parsers.ovd, "boxes")
    if not gold:
        return None
    found = parsers.ovd(text)
    free = _similarity(found, gold, _iou, example.size) * _same_label(found, gold, parsers.ovd)
    confidence, overlap = np.array(found.confidences, float), np.zeros(len(found.places))
    for row in sorted(range(len(overlap)), key=lambda row: (-confidence[row], *found.places[row])):
        if gold.places and free[row].max() > MATCH_IOU:
            column = free[row].argmax()
            overlap[row] = free[row, column]
            free[:, column] = 0
    return _Detections(overlap, confidence, len(gold.places))


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad_words(text: str) -> list[str]:
    return _plain_words(parsers.sections(text).answer)


def _plain_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(found: list[str], gold: list[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    return 2 * (Counter(found) & Counter(gold)).total() / (len(found) + len(gold))


_LABEL = re.compile(r"[\w-]+")
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*)```\s*", re.DOTALL)


def _syntax(code: str) -> str:
    """Returns the syntax tree of code, in a fence or not; the code itself where it has none."""
    fenced = _FENCE.fullmatch(code)
    code = fenced[1] if fenced else code
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.dump(ast.parse(code)) if len(code) <= parsers.MAX_LITERAL else code
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code


_TWO_NUMBERS = re.compile(r"[0-9]\s+[0-9]")


def _expression(latex: str | None) -> list:
    """Returns what math-verify makes of an answer; nothing of several numbers in a row, which it would take for one."""
    if latex is None or len(latex) > MAX_MATH or _TWO_NUMBERS.search(latex):
        return []
    return parse(
        rf"\boxed{{{latex}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )


def _chosen(answer: str, gold: str) -> bool:
    gold = parsers.conclusion(gold)[1]
    right, given = parsers.choice(gold), parsers.choice(answer)
    return (
        given == right
        if right.kind
        else bool(_squad_words(gold)) and _squad_words(answer) == _squad_words(gold)
    )


_SENTENCE = re.compile(r"[.!?\n]")
_OPTION_TEXT = re.compile(r"\(([A-F])\)([^()\n]*)")
_MEASURED = re.compile(
    r"\d|[%°]|\b(?:[cmk]?m|(?:centi|milli|kilo)?met(?:er|re)s?|feet|ft|inch(?:es)?|yards?|miles?|pixels?|px|degrees?|percent)\b"
)
_OBJECT = re.compile(
    r"\bthe ((?:(?!(?:the|and|or|to|of|in|is|on|at|as|be|relative|located|with|from|than|appears?|left|right|above|below|over"
    r"|under|beneath|before|behind|after|closer|nearer|farther|further|camera|viewer|image|picture|photo|scene|spatial"
    r"|relation(?:ship)?|positions?|following|answer|object|one)\b)[a-z'-]+ ?){1,3})"
)


def _reasoning(reasoning: str, answer: str, prompt: str) -> float:
    """Returns the quality of a chain of thought that led to the right answer, in {0, ½, 1}: see `spatial`."""
    prompt, thought = prompt.lower(), reasoning.lower()
    options, chosen = dict(_OPTION_TEXT.findall(prompt.upper())), parsers.choice(answer)
    answer = options.get(chosen.value, answer).lower()
    objects = {name.strip() for name in _OBJECT.findall(prompt)}
    names = sorted({*objects, " ".join(_squad_words(answer))} - {""}, key=len, reverse=True)
    name = re.compile(rf"\b(?:{'|'.join(map(re.escape, names)) or '(?!)'})\b")

    def named(text: str) -> set[str]:
        """Returns what a text names of the kind that the answer is of."""
        if parsers.relations(answer):
            return parsers.relations(text)
        return parsers.yes_or_no(text) if chosen.kind == "yes/no" else set(name.findall(text))

    last = [found for sentence in _SENTENCE.split(thought) if (found := named(sentence))][-1:]
    shortest, longest = REASONING_WORDS
    if last != [named(answer)] or not shortest <= len(thought.split()) <= longest:
        return 0.0
    return (
        all(one in thought for one in objects) + (not _MEASURED.search(name.sub(" ", thought)))
    ) / 2
