"""Checks before training that the rewards of a stage apply to its questions and can teach them.

A few questions of each source are answered by their gold text and by answers that should earn less.
The rewards score these answers as in a step. No model is needed.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pg_ground.config import Data, Grpo
from pg_ground.data.batch_rows import stack_rows
from pg_ground.data.datasets import Examples
from pg_ground.data.mixture import UnusableRow, prepare_row
from pg_ground.data.text_budgets import spread
from pg_ground.readers import locations, parsers
from pg_ground.reporting.tables import Table
from pg_ground.rewards.answer_reader import CODES
from pg_ground.rewards.device_rewards import REWARDS
from pg_ground.rewards.reward_functions import make_reward_workers, weighted_rewards
from pg_ground.rewards.text_example import TextExample
from pg_ground.rewards.text_questions import text_question, texts_of
from pg_ground.rewards.text_rewards import TEXT_REWARDS
from pg_ground.rewards.workers import RewardWorkers
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.rollout_worker import make_score
from pg_ground.types import Array, Batch, Rollout, UserError
from pg_ground.vocab import LOC_MAX, PAD

logger = logging.getLogger(__name__)

QUESTIONS = 16
"""Questions of a source that are answered. Each answer is one call of each text reward."""

SHAPING = frozenset({"length", "repetition", "overlong"})
"""Rewards that see no ground truth. A question needs another reward that applies."""

GOLD_FORMS = 4
"""The first answers are the gold text, and the gold text in forms that a policy must add."""

KINDS = (
    "",
    "",
    "",
    "",
    "nothing",
    "noise",
    "stray locs",
    "another answer",
    "a shift",
    "a copy",
    "a long answer",
)
"""The other answers in words, in the order of `answers_to`."""

SLACK = 0.02
"""An answer beats the gold text by more than this. The gold text of small boxes is rounded to the
grid, and a box beside it may earn a little more.
"""

SAME = 1e-6
"""Totals of float32 rewards that differ by less are equal."""

NEED_A_LIMIT = ("math",)
"""Text rewards of the package whose calls may take any time."""

SUGGESTIONS = 4
"""Rewards that an error names."""


class Uncovered(NamedTuple):
    """The first question to which no reward with a weight applies."""

    count: int
    """How many questions have no reward."""
    index: int
    gold: str
    suggestions: tuple[str, ...]
    """Rewards that would apply, as `text_rewards.count_exact`."""


class Coverage(NamedTuple):
    """The scores of the rewards of a stage on some questions of a source."""

    source: str
    target: str
    questions: int
    """How many questions were answered."""
    applies: dict[str, float]
    """Share of the questions to which each reward applies."""
    gold: dict[str, float]
    """Mean score of the gold text in its best form; NaN if the reward applies to no question."""
    others: dict[str, float]
    """Mean score of the best other answer."""
    better: str
    """The answers that earn more in total than the gold text, in words; "" for none."""
    constant: float | None
    """The total of every answer to every question, if they are equal."""
    uncovered: Uncovered | None
    """None if a reward with a weight applies to every question."""
    too_long: int
    """How many gold texts are longer than a completion."""


def measure(
    parts: Sequence[Examples],
    settings: Grpo,
    tokenizer: Tokenizer,
    data: Data,
    reads_masks: bool = False,
) -> list[Coverage]:
    """Returns the coverage of each source. A source whose probed questions are all bad is left out.

    Args:
      parts: the questions of each source of the stage, in the config's order.
      settings: the section of the stage.
      reads_masks: whether the stage decodes codes of masks.

    Raises:
      UserError: a reward does not exist, cannot be loaded, or fails on every answer.
    """
    targets = [dataset.source.target for dataset in parts]
    prober = _Prober(settings, targets, tokenizer, data, reads_masks)
    coverages = []
    # An error on a strange answer is no fault of the reward: it scores 0, as in a step.
    with make_reward_workers(settings, log_errors=False) as workers:
        for position, dataset in enumerate(parts):
            rows = _probed_rows(dataset, position, tokenizer, data)
            if rows:
                coverages.append(_coverage(dataset, rows, prober, workers))
        workers.check_any_success()
    return coverages


def check(coverages: Sequence[Coverage], settings: Grpo) -> None:
    """Logs what is doubtful about the rewards of each source.

    Raises:
      UserError: no reward with a weight applies to a question, except rewards in `SHAPING`, or all
        answers to the questions of a source have the same total.
    """
    names = sorted(_counting(settings))
    for coverage in coverages:
        if coverage.uncovered:
            raise UserError(_uncovered_message(coverage, settings))
        if coverage.constant is not None:
            raise UserError(
                f"source {coverage.source}: the rewards ({', '.join(names)}) are "
                f"{coverage.constant:.3g} in total for every answer that was tried (the gold "
                "answer, none, noise and others), so nothing can be learned; "
                "data.check_records=0 does not check"
            )
        for doubt in _doubts(coverage, names, settings):
            logger.warning("source %s: %s", coverage.source, doubt)
    # A reward for another source is usual, so only a reward without any question is a doubt.
    unused = [name for name in names if not any(part.applies[name] for part in coverages)]
    for name in unused if coverages else ():
        logger.warning("the reward %s applies to no question of any source", name)


def table(coverages: Sequence[Coverage], settings: Grpo) -> Table:
    """Returns the table of the rewards of each source."""
    rows = []
    for coverage in coverages:
        for name, share in coverage.applies.items():
            scores = [coverage.gold[name], coverage.others[name]]
            cells = [f"{score:.3f}" if np.isfinite(score) else None for score in scores]
            reward = f"{name} ({_largest_weight(settings, name):g})"
            rows.append([coverage.source, reward, f"{share:.0%}", *cells])
    columns = ["source", "reward (weight)", "applies", "gold answer", "best other"]
    note = f"mean scores of {QUESTIONS} questions of a source or fewer"
    return Table("rewards of each source", columns, rows, note)


def answers_to(gold: str, other_gold: str) -> list[str]:
    """Returns answers to a question: the gold text in `GOLD_FORMS` forms, then other answers.

    The forms are the gold text, in answer tags, in a box, and with box tokens or mask codes.

    Args:
      other_gold: the gold text of another question.
    """
    bare = parsers.sections(gold).answer or gold
    expression = parsers.last_boxed(gold) or bare
    return [
        gold,
        f"<think>so</think> <answer>{bare}</answer>",
        f"<think>so</think> \\boxed{{{expression}}}",
        _with_tokens(gold),
        "",
        "zq 7 of [[ ;",
        "<loc0001><loc0002><loc0003>",
        other_gold,
        _shifted(gold),
        f"{gold} ; {gold}",
        "it is here and not there " * 20,
    ]


def _with_tokens(gold: str) -> str:
    """Returns a list of four numbers as box tokens, and boxes in loc tokens with mask codes."""
    reading = locations.list_boxes(gold)
    if reading.ok and reading.locations[0].numbers:
        x1, y1, x2, y2 = map(int, reading.locations[0].numbers)
        return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    return re.sub(r"(?:<loc\d{4}>){4}", lambda match: match[0] + "<seg000>" * CODES, gold)


def _shifted(gold: str) -> str:
    """Returns a text with other numbers: loc bins move by 10 % of the image, numbers by 10 %."""
    by = (LOC_MAX + 1) // 10

    def shift(match: re.Match[str]) -> str:
        if match[1]:
            code = int(match[1])
            return f"<loc{code + by if code + by <= LOC_MAX else code - by:04d}>"
        number = int(match[0][:9])
        return str(number + max(1, number // 10))

    return re.sub(r"<loc(\d{4})>|(?<![<a-z])\d+", shift, gold)


def _counting(settings: Grpo) -> frozenset[str]:
    """Returns the rewards with a weight of which one must apply to every question."""
    return weighted_rewards(settings) - SHAPING


def _largest_weight(settings: Grpo, name: str) -> float:
    weight = settings.all_rewards[name]
    return max(weight[:2], key=abs) if isinstance(weight, tuple) else weight


class _Question(NamedTuple):
    row: Batch
    gold: str


def _probed_rows(
    dataset: Examples, position: int, tokenizer: Tokenizer, data: Data
) -> list[_Question]:
    """Returns usable questions of a source, evenly spread."""
    questions = []
    for index in spread(len(dataset), QUESTIONS):
        row = prepare_row(dataset, index, tokenizer, data, position, 0)
        if not isinstance(row, UnusableRow):
            gold = tokenizer.decode(row.suffix[row.suffix_mask].tolist())
            questions.append(_Question(row, gold))
    return questions


class _Prober:
    """Scores answers to questions as a step does. Its program is compiled once."""

    def __init__(
        self,
        settings: Grpo,
        targets: Sequence[str],
        tokenizer: Tokenizer,
        data: Data,
        reads_masks: bool,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self._targets = targets
        self._data = data
        self._reads_masks = reads_masks
        self._length = min(settings.max_new_tokens, 2 * data.suffix_length + 32)
        self._weights = {
            name: jnp.float32(_largest_weight(settings, name)) for name in settings.all_rewards
        }
        decode = _full_masks if reads_masks else None
        self._score = jax.jit(make_score(settings, tokenizer, False, decode))

    def with_settings(self, settings: Grpo) -> "_Prober":
        """Returns a prober of other rewards."""
        return _Prober(settings, self._targets, self.tokenizer, self._data, self._reads_masks)

    def scores(
        self,
        questions: Sequence[_Question],
        answers: Sequence[Sequence[str]],
        workers: RewardWorkers,
    ) -> dict[str, Float[np.ndarray, "Q P"]]:
        """Returns the scores of P answers to each of Q questions by each reward."""
        batch = stack_rows([question.row for question in questions])
        rollout = self._rollout(answers)
        completions, examples = texts_of(batch, rollout, self.tokenizer, self._targets)
        shape = rollout.tokens.shape[:2]
        text_scores = {
            name: np.asarray(scores, np.float32).reshape(shape)
            for name, scores in workers.submit(completions, examples).result().scores.items()
        }
        # Every source has the same shapes, so that the program is compiled once.
        rows = np.arange(QUESTIONS) % len(questions)
        arguments = jax.tree.map(lambda leaf: leaf[rows], (rollout, batch, text_scores))
        rewards = jax.device_get(self._score(*arguments, self._weights).rewards)
        return {name: rewards.parts[name][: len(questions)] for name in self._weights}

    def text_question(self, question: _Question) -> TextExample:
        """Returns a question as a text reward sees it."""
        return text_question(stack_rows([question.row]), 0, self.tokenizer, self._targets)

    def is_too_long(self, gold: str) -> bool:
        """Returns whether a text and its EOS are longer than a completion."""
        return len(self.tokenizer.suffix(gold)) > self.settings.max_new_tokens

    def _rollout(self, answers: Sequence[Sequence[str]]) -> Rollout:
        tokens = np.full((len(answers), len(answers[0]), self._length), PAD, np.int32)
        for row, texts in enumerate(answers):
            for column, text in enumerate(texts):
                ids = self.tokenizer.suffix(text)[: self._length]
                tokens[row, column, : len(ids)] = ids
        mask = tokens != PAD
        return Rollout(tokens, mask, np.zeros(tokens.shape, np.float32), mask)


def _full_masks(codes: Int[Array, "... 16"]) -> Float[Array, "... 16 16"]:
    """Returns a mask that fills its box, for any codes."""
    return jnp.ones((*codes.shape[:-1], 16, 16))


def _coverage(
    dataset: Examples, questions: Sequence[_Question], prober: _Prober, workers: RewardWorkers
) -> Coverage:
    golds = [question.gold for question in questions]
    answers = [
        answers_to(gold, next((other for other in golds if other != gold), "")) for gold in golds
    ]
    parts = prober.scores(questions, answers, workers)
    # An "other" answer can be the gold text: the gold text of a question about nothing is empty.
    is_gold = np.array([[text == texts[0] for text in texts] for texts in answers])
    is_gold[:, :GOLD_FORMS] = True
    counting = _counting(prober.settings)
    total = np.zeros((len(questions), len(KINDS)))
    is_scored = np.zeros(total.shape, bool)
    for name in sorted(counting):
        total += _largest_weight(prober.settings, name) * np.nan_to_num(parts[name])
        is_scored |= ~np.isnan(parts[name])
    total = np.where(is_scored, total, np.nan)
    gold_total = _largest(np.where(is_gold, total, np.nan))
    uncovered = np.flatnonzero(~is_scored.any(axis=1))
    has_spread = _largest(total) + _largest(-total) > SAME
    first = None
    if uncovered.size:
        row = int(uncovered[0])
        first = _uncovered(questions[row], answers[row], prober, uncovered.size)
    return Coverage(
        source=dataset.name,
        target=dataset.source.target,
        questions=len(questions),
        applies={name: float(np.mean(~np.isnan(part).all(axis=1))) for name, part in parts.items()},
        gold={
            name: _mean(_largest(np.where(is_gold, part, np.nan))) for name, part in parts.items()
        },
        others={
            name: _mean(_largest(np.where(is_gold, np.nan, part))) for name, part in parts.items()
        },
        better=_better(np.where(is_gold, np.nan, total), gold_total),
        constant=None if has_spread.any() or uncovered.size else float(gold_total[0]),
        uncovered=first,
        too_long=sum(map(prober.is_too_long, golds)),
    )


def _largest(scores: Float[np.ndarray, "Q P"]) -> Float[np.ndarray, " Q"]:
    """Returns the largest score of each row; NaN for a row of NaN."""
    largest = np.where(np.isnan(scores), -np.inf, scores).max(axis=1)
    return np.where(np.isfinite(largest), largest, np.nan)


def _mean(values: Float[np.ndarray, " Q"]) -> float:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _better(others: Float[np.ndarray, "Q P"], gold: Float[np.ndarray, " Q"]) -> str:
    """Returns in words which answers earn more than the gold text."""
    excess = np.where(np.isnan(others), -np.inf, others) - np.nan_to_num(gold)[:, None]
    row, column = np.unravel_index(int(excess.argmax()), excess.shape)
    if excess[row, column] <= SLACK:
        return ""
    rows = int((excess.max(axis=1) > SLACK).sum())
    return (
        f"the gold answers of {rows} of {len(gold)} questions earn less than other answers: one "
        f"earns {gold[row]:.3g}, but {KINDS[column]!r} earns {others[row, column]:.3g}"
    )


def _uncovered(
    question: _Question, answers: Sequence[str], prober: _Prober, count: int
) -> Uncovered:
    """Returns a question with the names of the package's rewards that would apply to it.

    These are the rewards that pay more for the gold text than for every other answer.
    """
    names = {name: 1.0 for name in REWARDS if name not in SHAPING}
    settings = replace(prober.settings, rewards=names, text_rewards={})
    with make_reward_workers(settings) as no_workers:
        parts = prober.with_settings(settings).scores([question], [answers], no_workers)
    scores = {f"rewards.{name}": parts[name][0] for name in names}
    example = prober.text_question(question)
    for name, reward in TEXT_REWARDS.items():
        if name not in NEED_A_LIMIT:
            values = [reward(text, example) for text in answers]
            scores[f"text_rewards.{name}"] = np.array(values)
    differs = [text != answers[0] for text in answers[GOLD_FORMS:]]
    suggestions = [
        name
        for name, values in scores.items()
        if np.all(values[0] > values[GOLD_FORMS:][differs] + SAME)
    ]
    index, best = int(question.row.index), tuple(suggestions[:SUGGESTIONS])
    return Uncovered(count, index, question.gold, best)


def _uncovered_message(coverage: Coverage, settings: Grpo) -> str:
    names, shaping = sorted(_counting(settings)), sorted(weighted_rewards(settings) & SHAPING)
    start = f"no reward with a weight ({', '.join(names)}) applies"
    if not names:
        start = f"the rewards ({', '.join(shaping)}) see no ground truth, and no other applies"
    elif shaping:
        start += f", except {', '.join(shaping)}, which see no ground truth,"
    question = coverage.uncovered
    assert question is not None
    suggested = ", ".join(f"grpo.{name}" for name in question.suggestions)
    hint = f"{suggested} would apply" if suggested else "no reward of the package would apply"
    if not names:
        hint += "; data.check_records=0 does not check"
    if coverage.target == "text" and "<loc" in question.gold:
        hint += "; for rewards of boxes, name the field of the text in boxes, with target boxes"
    return (
        f"source {coverage.source}: {start} to "
        f"{question.count} of {coverage.questions} questions that were tried, first question "
        f"{question.index}, whose answer is {question.gold[:80]!r} (target {coverage.target}): "
        f"{hint}"
    )


def _doubts(coverage: Coverage, names: Sequence[str], settings: Grpo) -> list[str]:
    """Returns what is doubtful about the rewards of a source."""
    doubts = [coverage.better] if coverage.better else []
    for name in names:
        if coverage.gold[name] == coverage.others[name] == 0:
            doubts.append(f"the gold answer and all others earn 0 from {name}")
    if coverage.too_long:
        doubts.append(
            f"{coverage.too_long} of {coverage.questions} gold answers have more tokens than "
            f"grpo.max_new_tokens={settings.max_new_tokens}"
        )
    return doubts
