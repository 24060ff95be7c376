"""Trains and evaluates from Python, for notebooks and scripts.

The functions take a `Config`, or the `ConfigDict` that a recipe's `get_config` returns:

    from configs import tiny  # `from pg_ground.configs import tiny` in an installed package
    import pg_ground

    report = pg_ground.train(tiny.get_config(), "runs/tiny")
    evaluation = pg_ground.evaluate(tiny.get_config(), workdir="runs/tiny")
    model, params = pg_ground.load("runs/tiny")
    prediction = pg_ground.predict(model, params, "photo.jpg", "detect red circle")
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ml_collections import ConfigDict

from pg_ground import config as settings
from pg_ground.config import Config
from pg_ground.evals import evaluation
from pg_ground.evals.runner import Evaluation
from pg_ground.parallel import sharding
from pg_ground.reporting import progress
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.training import loop

logger = logging.getLogger(__name__)


def train(
    config: Config | ConfigDict, workdir: str | FilePath, *, accept: Sequence[str] = ()
) -> FilePath:
    """Trains every stage of a config and returns the path of `report.html`.

    The same call on the same directory continues from the newest checkpoint, bit for bit. In one
    process the command `train` does the same.

    Args:
      config: a `Config`, or the `ConfigDict` of a recipe.
      workdir: the directory of the run. It gets `config.json`, `metrics.jsonl`, `checkpoints/`,
        `samples/`, `tb/` and `report.html`.
      accept: names of settings that may differ from the run that is already in `workdir`. Steps can
        be added without it if the learning rate is constant.

    Raises:
      UserError: a setting does not fit the data, the devices, the checkpoint, or the run that is
        already in `workdir`.
    """
    parsed = parse(config)
    prepare_devices(parsed)
    # A script or a notebook that has set up no logging still sees the progress.
    has_logs = logging.getLogger("pg_ground").hasHandlers()
    with nullcontext() if has_logs else progress.logs_to_stderr():
        return loop.train(parsed, to_path(workdir, "workdir"), accept)


def evaluate(
    config: Config | ConfigDict,
    *,
    workdir: str | FilePath | None = None,
    params: str | Path | None = None,
) -> Evaluation:
    """Returns the metrics and the predictions of a policy on the sources of `config.eval`.

    Nothing is written. `Evaluation.metrics` has the names of the report, for example
    `eval/boxes/acc50`.

    Args:
      config: a `Config`, or the `ConfigDict` of a recipe.
      workdir: the directory of a run. Its newest checkpoint is evaluated.
      params: a checkpoint: a big_vision `.npz`, a Hugging Face directory, or RUN/best. Give
        exactly one of `workdir` and `params`.

    Raises:
      UserError: a setting does not fit the checkpoint, the data or the devices.
    """
    parsed = parse(config)
    prepare_devices(parsed)
    return evaluation.evaluate(parsed, workdir=workdir, params=params)


def parse(config: Config | ConfigDict) -> Config:
    """Returns the checked `Config`. A `Config` is returned as it is.

    Raises:
      UserError: a setting does not exist or has a wrong value.
    """
    return config if isinstance(config, Config) else settings.parse(config)


def prepare_devices(config: Config) -> None:
    """Sets up the CPU devices and the compilation cache as the commands do.

    jax cannot change the number of CPU devices once it has run. The devices that exist are used
    then, with a warning.
    """
    sharding.enable_compilation_cache(config.mesh)
    try:
        sharding.set_cpu_devices(config.mesh)
    except RuntimeError:
        logger.warning(
            "config.mesh.cpu_devices=%d has no effect: jax has already started",
            config.mesh.cpu_devices,
        )
