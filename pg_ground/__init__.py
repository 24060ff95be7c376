"""PaliGemma learns to ground phrases in images by reinforcement."""

from pg_ground.model.weights import load
from pg_ground.rl.rollout import sample

__all__ = ["load", "sample"]
