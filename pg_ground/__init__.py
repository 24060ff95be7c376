"""Trains PaliGemma to ground phrases in images by reinforcement learning.

The functions for notebooks and scripts:

    load      Returns the model and the parameters of a checkpoint or a run.
    sample    Returns sampled completions of every prompt.
    predict   Returns the boxes and points that the model writes for one image and one prompt.
    train     Trains every stage of a config in a working directory.
    evaluate  Returns the metrics and the predictions of a run or a checkpoint.
    Config    All settings of a run.

`pg_ground` imports nothing until one of these names is used. A worker process for text rewards
imports modules of this package and must not import jax.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pg_ground.api import evaluate, train
    from pg_ground.checkpoints.weights import load
    from pg_ground.config import Config
    from pg_ground.evals.prediction import predict
    from pg_ground.rl.rollout import sample

__all__ = ["Config", "evaluate", "load", "predict", "sample", "train"]

_DEFINED_IN = {
    "Config": "pg_ground.config",
    "evaluate": "pg_ground.api",
    "load": "pg_ground.checkpoints.weights",
    "predict": "pg_ground.evals.prediction",
    "sample": "pg_ground.rl.rollout",
    "train": "pg_ground.api",
}


class _Package(ModuleType):
    """Keeps `pg_ground.train` a function although a module `pg_ground.train` exists.

    `train`, `evaluate` and `predict` are both functions and command modules. Importing a command
    module would set it as the attribute of the package, in place of the function. This class
    drops that assignment. `sys.modules` still holds the module, so `python -m pg_ground.train`,
    `from pg_ground.train import main` and `importlib.import_module` work.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _DEFINED_IN and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, and nothing that they are made of."""
    return [*__all__, "__doc__", "__version__"]
