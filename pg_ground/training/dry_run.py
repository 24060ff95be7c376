"""A dry run: one batch is sampled and judged, every completion shown with all its rewards, and nothing is learned or written."""

import json
import math
from typing import Any

import jax
import numpy as np

from pg_ground.config import Config
from pg_ground.data.pipeline import Batches
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rl.scored_rollouts import ScoredRollouts, has_spread, weights_at
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.recorder import Stopwatch
from pg_ground.training.rollout_worker import RolloutWorker, make_reward_workers, question_of

TEXT_WIDTH = 60
"""Characters of a completion that the table shows."""


def examine(
    config: Config, model: PaliGemma, params: Any, batches: Batches, tokenizer: Tokenizer
) -> str:
    """Returns what a policy answers to the first batch, how each answer is rewarded, and whether it could learn from that.

    Args:
      params: all of them, adapters included.

    Raises:
      UserError: a reward fails on more completions than it may.
    """
    c = config.grpo
    mesh = sharding.make_mesh(config.mesh)
    weights = weights_at(c.all_rewards, 0)
    with make_reward_workers(c) as workers:
        sampler = RolloutWorker(config, model, mesh, {}, tokenizer, workers)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        batch = sharding.put_batch(mesh, next(batches))
        sampled = jax.device_get(sampler.once(params, batch, key, weights, Stopwatch()))
        errors = workers.errors()
    shown = min(config.log.samples, len(sampled.batch.prompt))
    parts = [question(sampled, row, tokenizer, weights) for row in range(shown)]
    return "\n\n".join([*parts, verdict(sampled, weights, errors)])


def question(
    sampled: ScoredRollouts, row: int, tokenizer: Tokenizer, weights: dict[str, float]
) -> str:
    """Returns the completions of one prompt with every reward, beside the prompt and the gold answer."""
    asked = question_of(sampled.batch, row, tokenizer)
    names = list(sampled.rewards.parts)
    rows = []
    for i, tokens in enumerate(sampled.rollout.tokens[row]):
        scores = [sampled.rewards.parts[name][row, i] for name in names]
        rows.append(
            [
                _short(tokenizer.decode(tokens.tolist())),
                *map(_number, (sampled.rewards.total[row, i], *scores)),
            ]
        )
    heads = ["completion", "total", *(f"{name} ({weights[name]:g})" for name in names)]
    title = (
        f"{asked.prompt!r}  gold {asked.gold!r}  (source {asked.source}, question {asked.index})"
    )
    return ascii_table(Table(title, heads, rows, ""))


def verdict(sampled: ScoredRollouts, weights: dict[str, float], errors: dict[str, int]) -> str:
    """Returns what the rewards of a batch are like, one by one, and in words what is wrong with them."""
    rewards = sampled.rewards
    rows, said = [], []
    for name, values in (*rewards.parts.items(), ("total", rewards.total)):
        judged = values[~np.isnan(values)]
        spread = has_spread(sampled._replace(rewards=rewards._replace(total=values)))
        numbers = (judged.mean(), judged.min(), judged.max()) if judged.size else (math.nan,) * 3
        share = f"{float(np.mean(spread)):.0%}"
        rows.append(
            [
                name,
                *map(_number, numbers),
                f"{judged.size}/{values.size}",
                share,
                str(errors.get(name, 0)),
            ]
        )
        if not judged.size:
            said.append(f"{name} applies to no completion")
        elif judged.min() == judged.max():
            said.append(f"{name} is {_number(judged.min())} for every completion: all are equal")
    useful = float(np.mean(has_spread(sampled)))
    said += [f"{name} failed on {count} completions" for name, count in errors.items() if count]
    said.append(
        "there is nothing to learn from this batch: within each group all totals are equal"
        if useful == 0
        else f"{useful:.0%} of the groups have totals that differ: these are learned from"
    )
    heads = ["reward", "mean", "least", "largest", "judged", "groups that differ", "errors"]
    return "\n".join([ascii_table(Table("rewards of the whole batch", heads, rows, "")), *said])


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)[1:-1]
    return shown if len(shown) <= TEXT_WIDTH else shown[: TEXT_WIDTH - 1] + "…"


def _number(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
