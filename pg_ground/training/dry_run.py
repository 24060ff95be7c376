"""A dry run samples and scores one batch, and shows each completion with all its rewards.

It learns nothing and writes nothing.
"""

import json
import math
from typing import Any

import jax
import numpy as np

from pg_ground.checkpoints import weights
from pg_ground.config import Config
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import TrainingBatches
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rewards.text_questions import text_question
from pg_ground.rl.scored_rollouts import ScoredRollouts, has_spread, weights_at
from pg_ground.storage.paths import FilePath
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.grpo import GrpoStage
from pg_ground.training.loop import Inputs, check_stage, open_batches, prepare
from pg_ground.training.setup import init_params
from pg_ground.training.stage import Runtime
from pg_ground.training.timing import StepTimer
from pg_ground.types import Params, UserError

TEXT_WIDTH = 60
"""Characters of a completion that the table shows."""


def dry_run(config: Config, workdir: FilePath | None) -> str:
    """Returns the completions of the first batch with their rewards, and whether the policy could
    learn from them.

    Args:
      workdir: a run whose policy answers; None uses the first parameters of a new run.

    Raises:
      UserError: no stage samples completions, the rewards can teach nothing, a reward fails too
        often, or an error that `train` raises.
    """
    inputs = prepare(config)
    stages = [stage for stage in inputs.stages if isinstance(stage, GrpoStage)]
    if not stages:
        raise UserError(
            f"config.stages is {config.stages}: a dry run shows the rewards of grpo, which is not "
            "in it"
        )
    stage = stages[0]
    if workdir is None:
        abstract = inputs.setup.trained | inputs.setup.frozen
        params = init_params(config, inputs.setup.model, abstract)
    else:
        inputs, stage, params = _with_checkpoint(inputs, workdir)
    bad_records = BadRecords()
    batches = open_batches(inputs, stage, bad_records)
    check_stage(inputs, stage, batches)
    scored, errors = first_rollouts(inputs, stage, params, batches)
    reward_weights = weights_at(config.grpo.all_rewards, 0)
    count = min(config.log.samples, len(scored.batch.prompt))
    tables = [question_table(scored, row, inputs.tokenizer, reward_weights) for row in range(count)]
    return "\n\n".join([*tables, verdict(scored, errors)])


def _with_checkpoint(inputs: Inputs, workdir: FilePath) -> tuple[Inputs, GrpoStage, Params]:
    """Returns inputs and stage for the model of a run, and the parameters of its newest checkpoint.

    Adapters are merged, so the model has none.
    """
    config = inputs.setup.config
    model, params = weights.load(workdir, config.model, mesh=inputs.mesh)
    model = PaliGemma(model.config, sharding.activation_sharding(inputs.mesh))
    inputs = inputs._replace(setup=inputs.setup._replace(model=model))
    return inputs, GrpoStage(inputs.setup), params


def first_rollouts(
    inputs: Inputs, stage: GrpoStage, params: Params, batches: TrainingBatches
) -> tuple[ScoredRollouts, dict[str, int]]:
    """Returns the scored rollouts of the first batch on the host, and the number of errors of
    each text reward."""
    runtime = Runtime(inputs.mesh, {}, inputs.tokenizer, None)
    key = jax.random.fold_in(jax.random.key(inputs.setup.config.seed), 0)
    batch = sharding.put_batch(inputs.mesh, next(batches))
    weights_of_rewards = weights_at(stage.settings.all_rewards, 0)
    with stage.open_worker(runtime, {}) as worker:
        timer = StepTimer()
        generated = worker.generate(params, batch, key, timer)
        scored = jax.device_get(worker.score(generated, weights_of_rewards, timer))
        return scored, worker.reward_errors()


def question_table(
    scored: ScoredRollouts, row: int, tokenizer: Tokenizer, weights: dict[str, float]
) -> str:
    """Returns the completions of one prompt with all rewards, and the prompt and the gold answer
    in the title."""
    question = text_question(scored.batch, row, tokenizer)
    names = list(scored.rewards.parts)
    rows = []
    for i, tokens in enumerate(scored.rollout.tokens[row]):
        scores = [scored.rewards.parts[name][row, i] for name in names]
        text = _shortened(tokenizer.decode(tokens.tolist()))
        rows.append([text, *map(_number, (scored.rewards.total[row, i], *scores))])
    heads = ["completion", "total", *(f"{name} ({weights[name]:g})" for name in names)]
    number = f"source {question.source}, question {question.index}"
    title = f"{question.prompt!r}  gold {question.gold!r}  ({number})"
    return ascii_table(Table(title, heads, rows, ""))


def verdict(scored: ScoredRollouts, errors: dict[str, int]) -> str:
    """Returns the statistics of each reward over the batch, and in words each fault of them."""
    rewards = scored.rewards
    rows = []
    remarks = []
    for name, values in (*rewards.parts.items(), ("total", rewards.total)):
        valid = values[~np.isnan(values)]
        spread = has_spread(scored._replace(rewards=rewards._replace(total=values)))
        statistics = (valid.mean(), valid.min(), valid.max()) if valid.size else (math.nan,) * 3
        share = f"{float(np.mean(spread)):.0%}"
        count = f"{valid.size}/{values.size}"
        rows.append([name, *map(_number, statistics), count, share, str(errors.get(name, 0))])
        if not valid.size:
            remarks.append(f"{name} applies to no completion")
        elif valid.min() == valid.max():
            remarks.append(f"{name} is {_number(valid.min())} for every completion: all are equal")
    remarks += [f"{name} failed on {count} completions" for name, count in errors.items() if count]
    useful = float(np.mean(has_spread(scored)))
    if useful == 0:
        remarks.append(
            "there is nothing to learn from this batch: within each group all totals are equal"
        )
    else:
        remarks.append(
            f"{useful:.0%} of the groups have totals that differ: the policy learns from these"
        )
    heads = ["reward", "mean", "least", "largest", "scored", "groups that differ", "errors"]
    return "\n".join([ascii_table(Table("rewards of the whole batch", heads, rows, "")), *remarks])


def _shortened(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    return quoted if len(quoted) <= TEXT_WIDTH else quoted[: TEXT_WIDTH - 1] + "…"


def _number(value: Any) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
