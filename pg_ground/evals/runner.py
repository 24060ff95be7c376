"""Answers held-out questions with a policy, greedily and by sampling, and scores the answers."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from pg_ground import config
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import ordered_batches
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.evals import benchmarks, pointing, segmentation
from pg_ground.evals.programs import Completions, EvalPrograms
from pg_ground.evals.questions import EvalTask, question_row, read_prediction, with_scores
from pg_ground.evals.rows import GREEDY, SAMPLED
from pg_ground.parallel import multiprocess, sharding
from pg_ground.rewards.reward_functions import make_reward_workers, weighted_rewards
from pg_ground.rewards.text_questions import texts_of
from pg_ground.rewards.workers import RewardWorkers
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Batch, JsonDict, JsonObject, Params, Rollout, UserError


class EvalContext(NamedTuple):
    """What every task of an evaluation needs besides the programs and the parameters."""

    settings: config.Eval
    data: config.Data
    seed: int
    tokenizer: Tokenizer
    mesh: Mesh
    bad_records: BadRecords
    """Collects the records that cannot be used."""
    grpo: config.Grpo = config.Grpo()
    """The rewards of the benchmark `environment`."""


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    metrics: dict[str, float]
    """`eval/<source>/<metric>`. Shares are fractions of 1."""
    predictions: list[JsonDict]
    """Scored rows (`pg_ground.evals.rows`): one for each question, mode and rollout."""
    bad_records: dict[str, int]
    """Number of bad records of each kind in `EvalContext.bad_records`."""


class RowKey(NamedTuple):
    """Position of a row in an evaluation. Rows are sorted by it."""

    batch: int
    mode: int
    row: int
    rollout: int


class Decoding(NamedTuple):
    """One way to answer every question."""

    mode: str
    """GREEDY or SAMPLED."""
    temperature: float
    group_size: int


def open_eval_sources(
    settings: config.Eval, data: config.Data, image_size: int
) -> dict[str, Examples]:
    """Returns the questions of every source in `settings.sources`, by name.

    Raises:
      UserError: a source cannot be opened, or `settings.benchmarks` names an unknown source or
        benchmark, or a benchmark of masks lacks a setting.
    """
    for name, benchmark in settings.benchmarks.items():
        setting = f"config.eval.benchmarks.{name}"
        if name not in settings.sources:
            sources = ", ".join(settings.sources)
            raise UserError(f"{setting}: there is no source {name} in config.eval: {sources}")
        kind = benchmarks.find_benchmark(benchmark, setting).kind
        if kind == "mask" and not (settings.vqvae and settings.sources[name].mask):
            raise UserError(
                f"{setting} is {benchmark!r}, which needs config.eval.vqvae=vae-oid.npz and the "
                f"path of masks, config.eval.sources.{name}.mask"
            )
        if kind == "mask_points" and not settings.sources[name].mask:
            raise UserError(
                f"{setting} is {benchmark!r}, which needs the path of masks, "
                f"config.eval.sources.{name}.mask"
            )
    return {
        name: open_examples(
            f"eval/{name}", source, data, image_size, cut_answers=cuts_answers(settings, name)
        )
        for name, source in settings.sources.items()
    }


def cuts_answers(settings: config.Eval, name: str) -> bool:
    """Returns whether an evaluation may cut the gold answers of a source: only objects count.

    The text rewards of the benchmark `environment` read the gold answer.
    """
    benchmark = settings.benchmarks.get(name, "") or default_benchmark(settings.sources[name])
    return benchmarks.find_benchmark(benchmark, f"config.eval.benchmarks.{name}").kind != "reward"


def evaluate_sources(
    programs: EvalPrograms,
    params: Params,
    sources: Mapping[str, Examples],
    context: EvalContext,
    limits: Sequence[int] | None = None,
) -> Evaluation:
    """Returns the metrics and predictions of `params` on held-out questions.

    The result is the same for the same parameters and seed. Each process answers the rows on its
    own devices. Every process returns the metrics and rows of all processes.

    Args:
      sources: the result of `open_eval_sources`.
      limits: the metrics are those of the first so many questions of each source, for each of these
        numbers; 0 means all questions. The default is `eval.examples` alone.

    Raises:
      UserError: too many records of a source are bad, or a benchmark cannot use a record.
    """
    limits = (context.settings.examples,) if limits is None else limits
    most = 0 if 0 in limits else max(limits)
    predictions: list[JsonDict] = []
    metrics: dict[str, float] = {}
    for task in make_tasks(context.settings, sources, most):
        with reward_workers(task, context.grpo) as workers:
            local_rows = list(answered_rows(task, programs, params, context, workers))
        # Processes that share the mesh axis `model` hold the same rows. The dict drops repeats.
        rows_by_key = {
            tuple(key): row
            for process in multiprocess.all_gather(local_rows)
            for key, row in process
        }
        rows = [rows_by_key[key] for key in sorted(rows_by_key)]
        if task.kind == "reward":
            check_rewards(rows, task, context.grpo)
        for limit in sorted(set(limits) - {most}):
            metrics |= benchmarks.named_metrics(scored_rows(rows, task, limit))
        predictions += scored_rows(rows, task, task.limit)
    metrics |= benchmarks.named_metrics(predictions)
    return Evaluation(metrics, predictions, context.bad_records.counts())


@contextlib.contextmanager
def reward_workers(task: EvalTask, grpo: config.Grpo) -> Iterator[RewardWorkers | None]:
    """Runs the workers of the text rewards of a task; None if the task needs no text rewards.

    Raises:
      UserError: a reward cannot be loaded, or fails on too many completions.
    """
    workers = make_reward_workers(grpo) if task.kind == "reward" else None
    if workers is None or not workers.names:
        yield None
        return
    with workers:
        yield workers
        workers.check()


def check_rewards(rows: Sequence[JsonObject], task: EvalTask, grpo: config.Grpo) -> None:
    """Raises UserError if no reward with a weight applies to any question of a task."""
    if rows and all(row["reward"] is None for row in rows):
        names = ", ".join(sorted(weighted_rewards(grpo)))
        raise UserError(
            f"source {task.examples.name}: no reward with a weight applies to any question; "
            f"config.grpo has {names}"
        )


def make_tasks(
    settings: config.Eval, sources: Mapping[str, Examples], limit: int
) -> Iterator[EvalTask]:
    """Yields the task of each source.

    Args:
      limit: questions of each source; 0 is all.
    """
    for number, (name, examples) in enumerate(sources.items()):
        benchmark = settings.benchmarks.get(name, "") or default_benchmark(examples.source)
        count = limit or len(examples)
        is_configured = name in settings.benchmarks
        yield EvalTask(
            reported_name(name, examples, count), examples, benchmark, is_configured, number, count
        )


def reported_name(name: str, examples: Examples, limit: int) -> str:
    """Returns the name of a source in metrics: NAME@512 if only 512 questions are asked."""
    return name if limit >= len(examples) else f"{name}@{limit}"


def scored_rows(rows: Sequence[JsonDict], task: EvalTask, limit: int) -> list[JsonDict]:
    """Returns the scored rows of the first `limit` questions of a task.

    Args:
      rows: of all questions of the task, in order.
    """
    ids = list(dict.fromkeys(row["id"] for row in rows))
    first = set(ids[:limit])
    name = reported_name(task.source.partition("@")[0], task.examples, limit)
    kept = [row if name == task.source else {**row, "source": name} for row in rows]
    kept = [row for row in kept if row["id"] in first]
    return benchmarks.score_rows(with_benchmark_name(kept, task.is_configured))


def default_benchmark(source: config.Source) -> str:
    """Returns the benchmark of a source that `eval.benchmarks` does not name.

    The benchmark follows from the target of the source and from the form of its suffix.
    """
    if source.suffix == "count":
        return "counting"
    if "{" in source.suffix:
        return "text"
    return {"boxes": "rec", "points": "pointing", "text": "text"}[source.target]


def with_benchmark_name(rows: Sequence[JsonDict], is_configured: bool) -> list[JsonDict]:
    """Returns rows with the benchmark name that they may carry.

    The name becomes `refcoco_val@512` if only 512 questions of a fixed-size benchmark were
    answered. It becomes `objects` if a source without a configured benchmark has questions with a
    number of boxes other than one.

    Args:
      is_configured: `eval.benchmarks` names the benchmark of this source.
    """
    if not rows:
        return []
    name = rows[0]["benchmark"]
    if not is_configured and name == "rec" and any(len(row["gold"]["boxes"]) != 1 for row in rows):
        name = "objects"
    greedy_rows = [row for row in rows if row["mode"] == GREEDY]
    try:
        benchmarks.check_question_count(greedy_rows, name)
    except UserError:
        name = f"{name.partition('@')[0]}@{len(greedy_rows)}"
    return [{**row, "benchmark": name} for row in rows]


def answered_rows(
    task: EvalTask,
    programs: EvalPrograms,
    params: Params,
    context: EvalContext,
    workers: RewardWorkers | None = None,
) -> Iterator[tuple[RowKey, JsonDict]]:
    """Yields the rows of this process, each with its position.

    Args:
      workers: the result of `reward_workers`.
    """
    settings = context.settings
    batch_rows = sharding.local_rows(context.mesh, settings.batch_size)
    # 2**31 - 1 keeps these draws apart from the draws of training steps.
    seed_key = jax.random.fold_in(jax.random.key(context.seed), 2**31 - 1)
    task_key = jax.random.fold_in(seed_key, task.number)
    batches = ordered_batches(
        [task.examples],
        context.data,
        context.tokenizer,
        batch_size=settings.batch_size,
        examples=task.limit,
        bad_records=context.bad_records,
        rows=batch_rows,
    )
    with progress_bar(task) as bar:
        for number, (batch, is_question) in enumerate(batches):
            key = jax.random.fold_in(task_key, number)
            slots = np.flatnonzero(is_question).tolist()
            for mode, slot, rollout, row in answer_batch(
                task, programs, params, context, workers, batch, slots, key
            ):
                yield RowKey(number, mode, int(batch_rows[slot]), rollout), row
            bar.update(len(slots))


def progress_bar(task: EvalTask) -> tqdm:
    """Returns the progress bar of a task. Only process 0 shows it, and only on a terminal."""
    # tqdm reads `disable=None` as: disabled if stderr is not a terminal.
    disable = None if multiprocess.is_main_process() else True
    return tqdm(
        total=task.limit, desc=f"eval {task.source}", unit="q", leave=False, disable=disable
    )


def answer_batch(
    task: EvalTask,
    programs: EvalPrograms,
    params: Params,
    context: EvalContext,
    workers: RewardWorkers | None,
    batch: Batch,
    slots: Sequence[int],
    key: PRNGKeyArray,
) -> Iterator[tuple[int, int, int, JsonDict]]:
    """Yields (mode, slot, rollout, row) for every answer to the questions of a batch.

    Args:
      batch: the rows of this process.
      slots: the rows of `batch` that are questions. The other rows fill the batch up.
    """
    settings = context.settings
    device_batch = sharding.put_batch(context.mesh, batch)
    questions = {slot: question_row(task, batch, slot, context.tokenizer) for slot in slots}
    suffix_nll = None
    if settings.perplexity:
        suffix_nll = sharding.fetch_local_rows(
            context.mesh, programs.suffix_nll(params, device_batch)
        )
    for mode, decoding in enumerate(decodings(settings)):
        temperature = jnp.float32(decoding.temperature)
        completions = programs.answer(
            params, device_batch, temperature, key, group_size=decoding.group_size
        )
        completions = sharding.fetch_local_rows(context.mesh, completions)
        answers = read_completions(task, programs, batch, completions, questions, context.tokenizer)
        if task.kind == "reward":
            scored = rollout_rewards(
                programs.reward, workers, task, batch, completions.rollout, slots, context.tokenizer
            )
            answers = {key: answer | scored[key] for key, answer in answers.items()}
        for (slot, rollout), answer in answers.items():
            row = questions[slot] | {"mode": decoding.mode, "rollout": rollout} | answer
            if suffix_nll is not None and decoding.mode == GREEDY:
                row["suffix_nll"] = float(suffix_nll[slot])
                row["suffix_tokens"] = int(batch.suffix_mask[slot].sum())
            yield mode, slot, rollout, row


def decodings(settings: config.Eval) -> list[Decoding]:
    """Returns greedy decoding, and sampling if `settings.rollouts` is not 0."""
    greedy = Decoding(GREEDY, 0.0, 1)
    if not settings.rollouts:
        return [greedy]
    return [greedy, Decoding(SAMPLED, settings.temperature, settings.rollouts)]


def read_completions(
    task: EvalTask,
    programs: EvalPrograms,
    batch: Batch,
    completions: Completions,
    questions: Mapping[int, JsonObject],
    tokenizer: Tokenizer,
) -> dict[tuple[int, int], JsonDict]:
    """Returns the fields that completions add to the rows of questions, by (slot, rollout)."""
    tokens = completions.rollout.tokens
    texts = [[tokenizer.decode(ids.tolist()) for ids in group] for group in tokens]
    masks = {}
    if task.kind == "mask":
        sizes = {slot: question["size_px"] for slot, question in questions.items()}
        masks = mask_predictions(programs.decode_masks, texts, sizes)
    fields = {}
    for slot, question in questions.items():
        for rollout, text in enumerate(texts[slot]):
            malformed = bool(completions.malformed[slot, rollout])
            if task.kind == "mask":
                prediction = masks[slot, rollout]
                malformed = prediction["mask"] is None
            else:
                ids = tokens[slot, rollout].tolist()
                prediction = read_prediction(task, question, text, ids, tokenizer)
            if task.kind == "click" and task.examples.source.target == "boxes":
                # the ground truth is a box, but a point is an answer too
                malformed = pointing.click_of(prediction) is None
            if task.kind == "detection":
                prediction = with_scores(prediction, completions.confidence[slot, rollout])
            fields[slot, rollout] = {
                "text": text,
                "prediction": prediction,
                "malformed": int(malformed),
                "unfinished": int(completions.unfinished[slot, rollout]),
            }
    return fields


def mask_predictions(
    decode_masks: Wrapped | None,
    texts: Sequence[Sequence[str]],
    sizes: Mapping[int, Sequence[int]],
) -> dict[tuple[int, int], JsonDict]:
    """Returns the box and the mask that each text writes, by (slot, rollout).

    One call decodes the masks of all texts, so that the program has one shape.

    Args:
      decode_masks: `EvalPrograms.decode_masks`.
      texts: G texts of each slot.
      sizes: width and height of the image of each slot that is a question.
    """
    if decode_masks is None:
        raise ValueError("the benchmark decodes masks, but eval.vqvae is not set")
    segments = segmentation.read([text for group in texts for text in group])
    logits = np.asarray(decode_masks(segments.codes))
    predictions = {}
    for slot, (width, height) in sizes.items():
        for rollout in range(len(texts[slot])):
            i = slot * len(texts[slot]) + rollout
            predictions[slot, rollout] = segmentation.answer(
                segments.bins[i], segments.valid[i], logits[i], (width, height)
            )
    return predictions


def rollout_rewards(
    reward: Wrapped,
    workers: RewardWorkers | None,
    task: EvalTask,
    batch: Batch,
    rollout: Rollout,
    slots: Sequence[int],
    tokenizer: Tokenizer,
) -> dict[tuple[int, int], JsonDict]:
    """Returns the fields `reward`, `rewards` and `tokens` of rows, by (slot, rollout).

    A reward is None if it does not apply. The program sees one question at a time. So its shape and
    its rounding are the same on any number of devices.
    """
    questions = {
        slot: jax.tree.map(lambda x, slot=slot: np.asarray(x)[slot : slot + 1], (batch, rollout))
        for slot in slots
    }
    pending = {}
    if workers is not None:
        # all questions are submitted before the first score is awaited
        targets = [task.examples.source.target]
        pending = {
            slot: workers.submit(*texts_of(question, completions, tokenizer, targets))
            for slot, (question, completions) in questions.items()
        }
    fields: dict[tuple[int, int], JsonDict] = {}
    for slot, (question, completions) in questions.items():
        text_scores: dict[str, np.ndarray] = {}
        if slot in pending:
            scores = pending[slot].result().scores
            text_scores = {name: values[None] for name, values in scores.items()}
        rewards = jax.tree.map(
            lambda x: np.asarray(x, np.float64)[0].tolist(),
            reward(question, completions, text_scores),
        )
        lengths = np.asarray(completions.mask)[0].sum(axis=-1).tolist()
        for index, length in enumerate(lengths):
            fields[slot, index] = {
                "reward": _finite_or_none(rewards.total[index]),
                "rewards": {n: _finite_or_none(part[index]) for n, part in rewards.parts.items()},
                "tokens": length,
            }
    return fields


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
