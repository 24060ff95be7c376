"""Teaches a PaliGemma to ground phrases: supervised fine-tuning, then GRPO, in one working directory.

python -m pg_ground.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.grpo.steps=500 …]
python -m pg_ground.train --config=configs/quickstart.py --dry_run [--workdir=runs/quickstart]
python -m pg_ground.train --config=configs/quickstart.py --workdir=runs/quickstart --distributed=auto    (on every host of a pod)

Started again on the same directory, it goes on where its newest checkpoint is, bit for bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.aot.jobs import estimates
from pg_ground.checkpoints import manager, run_directory, weights
from pg_ground.config import Config
from pg_ground.data import pipeline
from pg_ground.evals.programs import make_eval_programs
from pg_ground.evals.runner import EvalContext, evaluate_sources, open_eval_sources
from pg_ground.models import PaliGemma
from pg_ground.parallel import multiprocess, sharding
from pg_ground.params import AbstractParams, flatten, join, pick, unflatten
from pg_ground.reporting import drawing, metric_writers
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rl import loss
from pg_ground.rl.scored_rollouts import ScoredRollouts, weights_at
from pg_ground.tokenizer import Tokenizer, check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training import optimizers, programs
from pg_ground.training.dry_run import examine
from pg_ground.training.recorder import Pictures, Recorder, Stopwatch, claim
from pg_ground.training.rollout_worker import (
    LOTS,
    RolloutWorker,
    load_device_rewards,
    make_reward_workers,
)
from pg_ground.types import TrainState, UserError


class Run(NamedTuple):
    """What the stages of a run share."""

    config: Config
    workdir: Path
    model: PaliGemma
    frozen: Any
    """The parameters that are not trained; those that are flow from stage to stage."""
    factors: dict[str, float]
    """What the learning rate of each trained parameter is multiplied by."""
    tokenizer: Tokenizer
    mesh: Mesh
    diary: Recorder
    bad: pipeline.BadRecords


def sft(run: Run, state: TrainState, batches: Any) -> TrainState:
    """Returns the state at the end of the supervised stage."""
    c = run.config.sft
    learn = programs.sft_update(
        run.config, run.model, run.mesh, run.factors, state, run.tokenizer.vocab
    )
    learn = programs.compiled(learn, run.config, run.mesh)
    key, rates, watch = (
        jax.random.key(run.config.seed),
        learning_rates(run.config, "sft"),
        Stopwatch(),
    )
    for step in range(int(state.step), c.steps):
        seconds = watch.step()
        batch = watch.lap("data", next(batches))
        dropout_key = jax.random.fold_in(key, step) if run.config.model.lora.dropout else None
        state, updated = learn(state, run.frozen, batch, dropout_key=dropout_key)
        found = watch.lap("update", updated) | {"optim/lr": rates[step]}
        batches.prepare()
        run.diary.keep(
            "sft", step + 1, state, batches, partial(measured, run, "sft", found, seconds)
        )
    return state


def grpo(run: Run, state: TrainState, batches: Any) -> TrainState:
    """Returns the state at the end of the reinforced stage."""
    c = run.config.grpo
    ref_params = reference(run, state) if programs.looks_at_reference(c) else None
    compare = programs.compiled(programs.grpo_compare(run.config, run.model), run.config, run.mesh)
    learn = programs.grpo_update(run.config, run.model, run.mesh, run.factors, state)
    learn = programs.compiled(learn, run.config, run.mesh)
    key, rates, watch = (
        jax.random.key(run.config.seed),
        learning_rates(run.config, "grpo"),
        Stopwatch(),
    )
    with make_reward_workers(c) as workers:
        workers.set_state(run.diary.resumed.get("judges", workers.get_state()))
        read, read_frozen = (
            programs.reader(run.config, run.mesh, tree) for tree in (state.params, run.frozen)
        )
        sampler = RolloutWorker(
            run.config, run.model, run.mesh, read_frozen(run.frozen), run.tokenizer, workers
        )
        for step in range(int(state.step), c.steps):
            seconds, own_key, failed = watch.step(), jax.random.fold_in(key, step), workers.errors()
            weights = weights_at(c.all_rewards, step)
            sampled, drawn = sampler(
                read(state.params), batches.__next__, own_key, weights, watch, batches.prepare
            )
            new = {
                f"reward/errors/{name}": count - failed[name]
                for name, count in workers.errors().items()
            }
            errors = multiprocess.sum_over_processes(
                new
            )  # here, where the host has read the texts, and not behind the update
            learned_from, seen = watch.lap(
                "score", compare(sampled, run.frozen, ref_params, weights, state.kl_coef)
            )
            state, updated = learn(
                state, run.frozen, learned_from, jax.random.fold_in(own_key, LOTS)
            )
            found = seen | watch.lap("update", updated) | drawn | errors | {"optim/lr": rates[step]}
            run.diary.keep(
                "grpo", step + 1, state, batches, partial(measured, run, "grpo", found, seconds),
                partial(rollout_pictures, run, sampled, learned_from.advantages), {"judges": workers.get_state()},
            )  # fmt: skip
    return state


STAGES: dict[str, Callable[[Run, TrainState, Any], TrainState]] = {"sft": sft, "grpo": grpo}


def train(config: Config, workdir: Path) -> Path:
    """Returns the path of the report of a run, having run (or finished) every stage.

    Raises:
      UserError: something in `config` does not fit the data, the devices, the checkpoint or the run already in `workdir`.
    """
    tokenizer, mesh, bad = (
        load_tokenizer(config.data.tokenizer),
        sharding.make_mesh(config.mesh),
        pipeline.BadRecords(),
    )
    check(config, mesh)
    model = PaliGemma(config.model, sharding.activation_sharding(mesh))
    check_vocab_size(tokenizer, model.config.text.vocab_size)
    trained, frozen = programs.layout(config, model, mesh)
    first = None if started(workdir) else begin(config, model, trained | frozen)
    eval_programs = make_eval_programs(
        model, tokenizer.vocab, config.eval, config.grpo.rewards, config.grpo.reward_settings
    )
    eval_context = EvalContext(config.eval, config.data, config.seed, tokenizer, mesh, bad)
    streams = {stage: open_stream(config, stage, tokenizer, mesh, bad) for stage in config.stages}
    questions = open_eval_sources(config.eval, config.data, config.model.image_size)
    counts = {stage: sum(map(len, stream.parts)) for stage, stream in streams.items()}
    measure_every = {
        stage: steps_between_measures(config, stage, count) for stage, count in counts.items()
    }
    parts = [part for stream in streams.values() for part in stream.parts]
    measure_texts(config, tokenizer, [*parts, *questions.values()])
    claim(workdir, config)
    kept = keep_frozen(workdir, frozen, first)
    params = None if first is None else pick(first, trained.__contains__)
    del first

    def measure(params: Any) -> dict[str, float]:
        return evaluate_sources(eval_programs, join(kept, params), questions, eval_context).metrics

    with manager.Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as saved:
        found = saved.latest()
        record = None if found is None else saved.record(found)
        with (
            open_writer(config, workdir, found)
            if multiprocess.is_main_process()
            else nullcontext() as writer
        ):
            diary = Recorder(config, workdir, writer, saved, measure, measure_every, bad, found)
            factors = programs.factors_of(config, trained | frozen)
            run = Run(config, workdir, model, kept, factors, tokenizer, mesh, diary, bad)
            multiprocess.print_once(size_line(run, trained, frozen))
            multiprocess.print_once(
                ascii_table(
                    estimates(
                        config, mesh, programs.names(config), sharding.hbm_bytes(mesh), "this run"
                    )
                )
            )
            for stage in config.stages[config.stages.index(record["stage"]) if record else 0 :]:
                if record and found is not None and stage == record["stage"]:
                    state = saved.restore(
                        found, programs.state_like(config, mesh, stage, factors, unflatten(trained))
                    )
                    diary.open_with(record)
                    streams[stage].set_state(diary.resumed["batches"])
                else:
                    state = fresh_state(run, stage, params)
                    if stage == config.stages[0] and config.eval.at_start:
                        diary.measure(0, stage, state.params)
                with pipeline.Ahead(streams[stage], partial(sharding.put_batch, mesh)) as batches:
                    params = STAGES[stage](run, state, batches).params
    return diary.close()


def open_writer(config: Config, workdir: Path, found: int | None) -> metric_writers.MetricsWriter:
    """Returns what the run's numbers go to, from the checkpoint of step `found` on."""
    return metric_writers.open_metrics(workdir, found, config.log.wandb, dataclasses.asdict(config))


def started(workdir: Path) -> bool:
    """Returns whether there is a checkpoint to go on from.

    Raises:
      UserError: not all processes see the same ones.
    """
    seen = multiprocess.all_gather(sorted(run_directory.steps(workdir)))
    for index, steps in enumerate(seen):
        if steps != seen[0]:
            raise UserError(
                f"process 0 finds the checkpoints {seen[0]} in {workdir}, process {index} {steps}: --workdir must be on a file "
                f"system that all processes share"
            )
    return bool(seen[0])


def begin(config: Config, model: PaliGemma, like: AbstractParams) -> Any:
    """Returns the first parameters, in their places: those of `config.init` with adapters that do nothing yet, or random ones."""
    loaded: dict[str, Any] = {}
    if config.init:
        found = weights.open_checkpoint(config.init, config.model, config.resample_positions)
        loaded = found.read({name: leaf for name, leaf in like.items() if name in found.like})
    rest = {name: leaf for name, leaf in like.items() if name not in loaded}

    def make() -> dict[str, Any]:
        made = flatten(model.init(jax.random.key(config.seed)))
        return {name: made[name].astype(leaf.dtype) for name, leaf in rest.items()}

    made = (
        jax.jit(make, out_shardings={name: leaf.sharding for name, leaf in rest.items()})()
        if rest
        else {}
    )
    return unflatten(loaded | made)


def keep_frozen(workdir: Path, frozen: AbstractParams, first: Any) -> Any:
    """Returns the frozen parameters, written down once beside the checkpoints so that a run is whole without `config.init`."""
    path = workdir / "frozen"
    if frozen and first is None:
        return manager.restore_tree(path, unflatten(frozen))
    if multiprocess.is_main_process():
        manager.remove_tree(
            path
        )  # of a run with other settings that ended before its first checkpoint
    multiprocess.barrier("frozen")
    if not frozen:
        return {}
    kept = pick(first, frozen.__contains__)
    manager.save_tree(path, kept)
    return kept


def size_line(run: Run, trained: AbstractParams, frozen: AbstractParams) -> str:
    """Returns in words how many parameters there are, how many are trained, and what they and the optimizer take."""

    def size(leaves: Any) -> tuple[int, int]:
        counts = [
            (int(np.prod(leaf.shape)), leaf.dtype.itemsize) for leaf in jax.tree.leaves(leaves)
        ]
        return sum(n for n, _ in counts), sum(n * width for n, width in counts)

    optimizer = size(
        jax.eval_shape(
            programs.optimizer_of(run.config, run.config.stages[0], run.factors).init,
            unflatten(trained),
        )
    )[1]
    (mine, mine_bytes), (kept, kept_bytes) = size(trained), size(frozen)
    return (
        f"{mine + kept:,} parameters ({mine_bytes + kept_bytes:,} bytes), "
        f"{mine:,} of them trained ({mine_bytes:,} bytes); optimizer {optimizer:,} bytes"
    )


def check(config: Config, mesh: Mesh) -> None:
    """Raises UserError for settings that do not fit the devices, the rewards or the algorithms there are."""
    metric_writers.check_mirror(config.log.wandb)
    loss.choose(config.grpo)
    load_device_rewards(config.grpo)
    make_reward_workers(config.grpo)
    for stage, c in (("sft", config.sft), ("grpo", config.grpo)):
        if stage in config.stages:
            sharding.check_batch_size(
                mesh, c.batch_size // c.grad_accum_steps, f"{stage}.batch_size / grad_accum_steps"
            )
    if "grpo" in config.stages:
        c = config.grpo
        parts = c.batch_size // (c.grad_accum_steps * c.minibatches)
        sharding.check_batch_size(mesh, parts, "grpo.batch_size / grad_accum_steps / minibatches")
        sharding.check_batch_size(
            mesh, c.batch_size // c.rollout_parts, "grpo.batch_size / rollout_parts"
        )
    if config.eval.sources:
        sharding.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")


def measure_texts(config: Config, tokenizer: Tokenizer, parts: Sequence[pipeline.Examples]) -> None:
    """Prints what the texts of every source need, and raises UserError if that is more than the configured lengths."""
    if not config.data.check_records:
        return
    budgets = [pipeline.budget(part, tokenizer, config.data) for part in parts]
    rows = [[str(value) for value in budget[:-1]] for budget in budgets]
    heads = ["source", "questions", "measured", "prompt tokens", "suffix tokens", "objects"]
    room = f"room for {config.data.prompt_length}, {config.data.suffix_length} and {config.data.max_boxes}"
    multiprocess.print_once(ascii_table(Table("longest texts", heads, rows, room)))
    pipeline.check_budgets(budgets, config.data)


def open_stream(
    config: Config, stage: str, tokenizer: Tokenizer, mesh: Mesh, bad: pipeline.BadRecords
) -> Any:
    """Returns the endless batches of a stage, as far as they lie on this process's devices."""
    c = config.sft if stage == "sft" else config.grpo
    return pipeline.training_batches(
        {f"{stage}/{name}": source for name, source in c.sources.items()},
        config.data,
        tokenizer,
        image_size=config.model.image_size,
        batch_size=c.batch_size,
        seed=config.seed
        + (
            1_000_003 if stage == "grpo" else 0
        ),  # a stage does not see the scenes of the other again
        bad=bad,
        rows=sharding.local_rows(mesh, c.batch_size),
    )


def steps_between_measures(config: Config, stage: str, questions: int) -> int:
    """Returns the steps of a stage between measurements, 0 for none but at its end; an epoch is what all `questions` take."""
    if not config.eval.every_epochs:
        return config.eval.every
    batch_size = config.sft.batch_size if stage == "sft" else config.grpo.batch_size
    return max(1, round(config.eval.every_epochs * questions / batch_size))


def fresh_state(run: Run, stage: str, params: Any) -> TrainState:
    """Returns the state a stage starts from, spread over the mesh as `params` are."""
    init = programs.optimizer_of(run.config, stage, run.factors).init
    opt = jax.jit(
        init,
        out_shardings=sharding.infer_shardings(
            run.mesh, jax.eval_shape(init, params), run.config.mesh.rules
        ),
    )(params)
    kl_coef = loss.choose(run.config.grpo).kl_coef if stage == "grpo" else 0.0
    step, kl_coef = jax.device_put(
        (np.int32(0), np.float32(kl_coef)), sharding.replicated(run.mesh)
    )
    return TrainState(step, params, opt, kl_coef)


def reference(run: Run, state: TrainState) -> Any:
    """Returns what is trained of the policy at the start of this stage; what is frozen is the policy's own, not a copy of it."""
    path = run.workdir / "reference"
    if int(state.step) == 0:
        manager.save_tree(path, state.params)
        return jax.tree.map(jnp.copy, state.params)
    return manager.restore_tree(path, state.params)


def learning_rates(config: Config, stage: str) -> np.ndarray:
    """Returns the learning rate of each step's last update."""
    c, mu = config.sft if stage == "sft" else config.grpo, programs.updates_a_step(config, stage)
    return np.asarray(
        optimizers.schedule(c.optimizer, c.steps * mu)(np.arange(mu - 1, c.steps * mu, mu))
    )


def measured(
    run: Run, stage: str, found: dict[str, Any], seconds: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Returns the numbers of one step on the host, once devices are through with it: what it found, its times and rates."""
    c = run.config.sft if stage == "sft" else run.config.grpo
    group = run.config.grpo.group_size if stage == "grpo" else 1
    values, times = {name: float(value) for name, value in jax.device_get(found).items()}, seconds()
    whole = sum(times.values())
    rates = {"perf/images_per_s": c.batch_size / whole}
    if stage == "grpo":
        rates["perf/completions_per_s"] = c.batch_size * group / whole
        rates["perf/tokens_per_s"] = values["completion/length"] * c.batch_size * group / whole
    return values | times | {"time/step_s": whole} | rates


def rollout_pictures(run: Run, sampled: ScoredRollouts, advantages: Any) -> Pictures:
    """Returns the first prompts (of those on this process) of a step with gold and sampled answers drawn on their images."""
    (batch, rollout, answer, judged, _), advantages = sharding.fetch_local_rows(
        run.mesh, (sampled, advantages)
    )
    decode, sources, panels, records = run.tokenizer.decode, list(run.config.grpo.sources), [], []
    for row in range(min(run.config.log.samples, len(batch.prompt))):
        prompt = decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip()
        texts = [decode(tokens.tolist()) for tokens in rollout.tokens[row]]
        gold = decode(batch.suffix[row].tolist())
        names = [decode(tokens.tolist()).strip() for tokens in batch.gold.names[row]]
        panels.append(drawing.draw_rollout(batch, answer, judged, row, prompt, texts, gold=gold))
        place = {"source": sources[int(batch.source[row])], "index": int(batch.index[row])}
        records.append(
            place
            | drawing.rollout_record(
                batch, answer, judged, advantages, row, prompt, texts, gold, names
            )
        )
    return Pictures(drawing.rollout_sheet(panels), records)


def dry_run(config: Config, workdir: Path | None) -> str:
    """Returns what the policy in `workdir` (else the first one) answers to a batch, and how that is rewarded.

    Raises:
      UserError: there is no reinforced stage, or what `train` raises.
    """
    if "grpo" not in config.stages:
        raise UserError(
            f"config.stages is {config.stages}: a dry run shows the rewards of grpo, which is not in it"
        )
    tokenizer, mesh, bad = (
        load_tokenizer(config.data.tokenizer),
        sharding.make_mesh(config.mesh),
        pipeline.BadRecords(),
    )
    check(config, mesh)
    if workdir is not None:
        model, params = weights.load(workdir, config.model, mesh=mesh)
        model = PaliGemma(model.config, sharding.activation_sharding(mesh))
    else:
        model = PaliGemma(config.model, sharding.activation_sharding(mesh))
        trained, frozen = programs.layout(config, model, mesh)
        params = begin(config, model, trained | frozen)
    check_vocab_size(tokenizer, model.config.text.vocab_size)
    return examine(
        config, model, params, open_stream(config, "grpo", tokenizer, mesh, bad), tokenizer
    )
