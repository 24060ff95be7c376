"""Evaluates a checkpoint or a run on the held-out sources of a config."""

import logging

from pg_ground.checkpoints import weights
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.evals.programs import make_eval_programs
from pg_ground.evals.runner import EvalContext, Evaluation, evaluate_sources, open_eval_sources
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.storage.downloads import checkpoint_path, tokenizer_file
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.tokenizer import check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

logger = logging.getLogger(__name__)


def evaluate(
    config: Config, *, workdir: str | FilePath | None = None, params: str | FilePath | None = None
) -> Evaluation:
    """Returns the metrics and predictions of a run or a checkpoint on the sources of `config.eval`.

    Nothing is written. `scoring.write_results` writes `eval.json` and `predictions.jsonl`.

    Args:
      config: `config.eval`, `data`, `mesh`, `model`, `seed` and the rewards of `grpo` are read.
      workdir: working directory of a run. Its newest checkpoint is evaluated.
      params: a checkpoint: a big_vision `.npz`, a Hugging Face directory, or RUN/best. Exactly one
        of `workdir` and `params` must be set.

    Raises:
      UserError: a setting does not fit the checkpoint, the data or the devices.
    """
    path = _checkpoint_path(workdir, params)
    if not config.eval.sources:
        raise UserError("config.eval.sources is empty: add a source to evaluate on")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")
    tokenizer = load_tokenizer(tokenizer_file(config.data.tokenizer))
    model, loaded_params = weights.load(
        path, config.model, mesh=mesh, resample_positions=config.resample_positions
    )
    model = PaliGemma(model.config, sharding.activation_sharding(mesh))
    check_vocab_size(tokenizer, model.config.text.vocab_size)
    programs = make_eval_programs(model, tokenizer.vocab, config.eval, config.grpo)
    sources = open_eval_sources(config.eval, config.data, config.model.image_size)
    for examples in sources.values():
        if examples.filter_note:
            logger.info("source %s: %s", examples.name, examples.filter_note)
    context = EvalContext(
        config.eval, config.data, config.seed, tokenizer, mesh, BadRecords(), config.grpo
    )
    return evaluate_sources(programs, loaded_params, sources, context)


def _checkpoint_path(workdir: str | FilePath | None, params: str | FilePath | None) -> FilePath:
    """Returns the one path of the two that is set."""
    paths: list[FilePath] = [to_path(workdir, "workdir")] if workdir else []
    paths += [checkpoint_path(params, "params")] if params else []
    if len(paths) != 1:
        raise UserError("evaluate needs workdir=RUN or params=CHECKPOINT, and not both")
    return paths[0]
