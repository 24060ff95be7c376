"""The rewards that `config.grpo` names: functions on token ids, and the worker processes of text
rewards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pg_ground.config import Grpo, RewardSettings
from pg_ground.rewards import device_rewards
from pg_ground.rewards.text_rewards import TEXT_REWARDS
from pg_ground.rewards.workers import RewardWorkers, load_reward
from pg_ground.types import Answer, Batch, UserError


def make_reward_workers(settings: Grpo, log_errors: bool = True) -> RewardWorkers:
    """Returns the workers of all text rewards in `settings`. No process is started yet.

    Args:
      log_errors: logs the first error of each reward.

    Raises:
      UserError: a reward does not exist or cannot be loaded.
    """
    from_files = [
        name for name in settings.rewards if ".py:" in name and load_reward(name).kind == "text"
    ]
    names = (*settings.text_rewards, *from_files)
    rewards = {name: name for name in names}
    return RewardWorkers(rewards, TEXT_REWARDS, settings.reward_workers, log_errors)


def load_device_rewards(settings: Grpo) -> dict[str, device_rewards.Reward]:
    """Returns the rewards on token ids in `settings`: the package's own, and rewards of a user's
    files.

    Raises:
      UserError: a reward does not exist, cannot be loaded or is named twice, or no reward has a
        weight.
    """
    twice = sorted(set(settings.rewards) & set(settings.text_rewards))
    if twice:
        raise UserError(
            f"{twice[0]} is in config.grpo.rewards and in text_rewards: name it in one of them"
        )
    rewards = {}
    for name in settings.rewards:
        if ".py:" not in name:
            rewards[name] = device_rewards.get_reward(name)
            continue
        from_file = load_reward(name)
        if from_file.kind == "device":
            rewards[name] = _checked(name, from_file.function)
    if not weighted_rewards(settings):
        raise UserError(
            f"config.grpo.rewards and text_rewards are {settings.all_rewards}: at least one needs "
            "a weight other than 0"
        )
    return rewards


def weighted_rewards(settings: Grpo) -> frozenset[str]:
    """Returns the names of the rewards that have a weight other than 0 at some step."""
    return frozenset(
        name
        for name, weight in settings.all_rewards.items()
        if (any(weight[:2]) if isinstance(weight, tuple) else weight)
    )


def _checked(name: str, function: Callable[..., Any]) -> device_rewards.Reward:
    """Returns a user's reward with errors that name its file.

    Values that are not finite become NaN: not applicable.
    """

    def reward(answer: Answer, batch: Batch, settings: RewardSettings) -> jax.Array:
        try:
            scores = jnp.asarray(function(answer, batch, settings), jnp.float32)
        except Exception as error:  # a user's program can raise anything
            raise UserError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
        if scores.shape != answer.finished.shape:
            raise UserError(
                f"the reward {name} has shape {list(scores.shape)}: it must be [B, G], "
                f"{list(answer.finished.shape)}"
            )
        return jnp.where(jnp.isfinite(scores), scores, jnp.nan)

    return reward
