"""PaliGemma learns to ground phrases in images by reinforcement."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pg_ground.checkpoints.weights import load
    from pg_ground.rl.rollout import sample

__all__ = ["load", "sample"]

_HOMES = {"load": "pg_ground.checkpoints.weights", "sample": "pg_ground.rl.rollout"}


def __getattr__(name: str) -> Any:
    """Imports on first use: a worker that judges text needs no part of the package that imports jax."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
