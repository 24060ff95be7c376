"""Rewards of several rollouts for each question, as evaluations of environments report them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pg_ground.evals.rows import Columns, Row, column
from pg_ground.types import JsonDict, UserError

PASS_REWARD = 0.5
"""A rollout passes if its reward is at least this."""


def score(row: Row) -> JsonDict:
    """Returns whether a rollout passes.

    Raises:
      UserError: the row has no reward.
    """
    if "reward" not in row:
        raise UserError(f"row {row['id']} has no reward")
    reward = row["reward"]
    return {"correct": int(reward is not None and reward >= PASS_REWARD)}


def means(rows: Sequence[Row]) -> Columns:
    """Returns the rewards, each reward by its name, the passes and the lengths of completions.

    A question to which no reward applies has no reward and counts in `unscored_fraction`. The name
    of a user's reward is the part of `path/to/file.py:name` behind the last "/".
    """
    total = column(rows, "reward")
    columns = {
        "mean_reward": total,
        "pass_rate": column(rows, "correct"),
        "unscored_fraction": np.isnan(total).astype(np.float64),
        "completion_length": column(rows, "tokens"),
    }
    for name in dict.fromkeys(name for row in rows for name in row.get("rewards", {})):
        parts = [row.get("rewards", {}) for row in rows]
        columns[f"reward_{name.rpartition('/')[2]}"] = column(parts, name)
    return columns


def aggregates(rows: Sequence[Row]) -> dict[str, float]:
    """Returns standard deviations of rewards, pass@1 and pass@r.

    `std_reward` is over all rollouts. `group_std_reward` is the mean over questions of the standard
    deviation within a question. r (`rollouts`) is the smallest number of rollouts of a question.
    """
    rewards = column(rows, "reward")
    passed = column(rows, "correct")
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["source"], str(row["id"])), []).append(index)
    smallest = min(map(len, groups.values()))
    group_rewards = [rewards[rollouts] for rollouts in groups.values()]
    deviations = [
        float(values[~np.isnan(values)].std())
        for values in group_rewards
        if not np.isnan(values).all()
    ]
    metrics = {
        "std_reward": float(np.nanstd(rewards)),
        "group_std_reward": float(np.mean(deviations)) if deviations else 0.0,
        "rollouts": float(smallest),
    }
    for k in sorted({1, smallest}):
        estimates = [
            pass_at(k, len(rollouts), int(passed[rollouts].sum())) for rollouts in groups.values()
        ]
        metrics[f"pass@{k}"] = float(np.mean(estimates))
    return metrics


def pass_at(k: int, rollouts: int, passed: int) -> float:
    """Returns the unbiased estimate of the probability that at least one of k rollouts passes.

    It is 1 - C(n - c, k) / C(n, k) for n rollouts if c of them pass (arXiv 2107.03374).
    """
    return 1.0 - math.comb(rollouts - passed, k) / math.comb(rollouts, k)
