"""Rewards of several rollouts an example, as an environment's evaluation reports them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pg_ground.evals.rows import Row, column
from pg_ground.types import UserError

PASSES = 0.5
"""The reward from which a rollout passes."""


def score(row: Row) -> dict[str, Any]:
    """Returns whether a rollout passes.

    Raises:
      UserError: the row has no reward.
    """
    if "reward" not in row:
        raise UserError(f"row {row['id']} has no reward")
    reward = row["reward"]
    return {"correct": int(reward is not None and reward >= PASSES)}


def columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {"mean_reward": column(rows, "reward"), "pass_rate": column(rows, "correct")}


def others(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the standard deviation of rewards, over all rollouts and within an example, and pass@1 and pass@r of r rollouts."""
    rewards, passed = column(rows, "reward"), column(rows, "correct")
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row["source"], str(row["id"])), []).append(index)
    fewest = min(map(len, groups.values()))
    judged = [rewards[of][~np.isnan(rewards[of])] for of in groups.values()]
    within = [float(of.std()) for of in judged if len(of)]
    found = {
        "std_reward": float(np.nanstd(rewards)),
        "group_std_reward": float(np.mean(within)) if within else 0.0,
        "rollouts": float(fewest),
    }
    for k in sorted({1, fewest}):
        found[f"pass@{k}"] = float(
            np.mean([pass_at(k, len(of), int(passed[of].sum())) for of in groups.values()])
        )
    return found


def pass_at(k: int, rollouts: int, passed: int) -> float:
    """Returns the unbiased estimate of the chance that one of k rollouts passes: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374)."""
    return 1.0 - math.comb(rollouts - passed, k) / math.comb(rollouts, k)
