"""A policy's answers to held-out questions, greedy and sampled, as rows for `pg_ground.evals`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from tqdm import tqdm

from pg_ground.checkpoints import vqvae_file, weights
from pg_ground.config import Config, Source
from pg_ground.data import pipeline
from pg_ground.data.examples import field_at
from pg_ground.data.records import BadRecord
from pg_ground.evals import answers, benchmarks, cv_bench, segmentation
from pg_ground.evals.rows import GREEDY, SAMPLED
from pg_ground.evals.run_length import runs_of
from pg_ground.models import PaliGemma, vqvae
from pg_ground.parallel import multiprocess, sharding
from pg_ground.rewards import device_rewards
from pg_ground.rl.rollout import sample
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import Array, Batch, Rollout, UserError
from pg_ground.vocab import Vocab

MODES = GREEDY, SAMPLED


class Answered(NamedTuple):
    """G completions of each prompt."""

    rollout: Rollout
    malformed: Bool[Array, "B G"]
    """The completion is not an answer of the asked kind."""
    unfinished: Bool[Array, "B G"]
    """It does not end in EOS."""
    confidence: Float[Array, "B G K"]
    """Of its boxes, in the order they are written."""


class Programs(NamedTuple):
    """The compiled functions of a measurement."""

    answer: Any
    """(params, batch, temperature, key, group_size=1) to `Answered`; temperature 0 is greedy."""
    suffix_nll: Any
    """(params, batch) to minus the log-probability (nats) of each gold suffix, f32[B]."""
    reward: Any
    """(batch of one question, its rollout) to the weighted rewards of `config.grpo.rewards`, f32[1,G]."""
    masks: Any
    """Codes i32[N,16] of masks to what they stand for, f32[N,64,64]; None without `config.eval.vqvae`."""


def programs_of(config: Config, model: PaliGemma, vocab: Vocab) -> Programs:
    """Returns the programs, which compile on first use."""

    def answer(
        params: Any, batch: Batch, temperature: Float[Array, ""], key: Any, group_size: int = 1
    ) -> Answered:
        inputs = (batch.image, batch.prompt, batch.prompt_mask)
        rollout = sample(
            model, params, *inputs, key, group_size, config.eval.max_new_tokens, temperature
        )
        said = read(rollout, batch)
        sure = device_rewards.confidence(rollout.tokens, rollout.mask, rollout.logps, vocab)
        return Answered(rollout, ~said.grammatical, ~said.finished, sure)

    def read(rollout: Rollout, batch: Batch) -> Any:
        return device_rewards.read_answer(
            rollout.tokens, rollout.mask, batch.gold.target, batch.gold.names, vocab
        )

    def suffix_nll(params: Any, batch: Batch) -> Float[Array, " B"]:
        inputs = (
            batch.image,
            batch.prompt,
            batch.prompt_mask,
            batch.suffix[:, None],
            batch.suffix_mask[:, None],
        )
        return -model.completion_logps(params, *inputs)[0].sum(axis=(1, 2))

    def reward(batch: Batch, rollout: Rollout) -> Float[Array, "1 G"]:
        ends = {
            name: weight[1] if isinstance(weight, tuple) else weight
            for name, weight in config.grpo.rewards.items()
        }
        functions = {name: device_rewards.by_name(name) for name in ends}
        return device_rewards.score(
            read(rollout, batch), batch, ends, config.grpo.reward_settings, functions
        ).total

    masks = (
        jax.jit(partial(vqvae.decode, vqvae_file.load(Path(config.eval.vqvae))))
        if config.eval.vqvae
        else None
    )
    return Programs(
        jax.jit(answer, static_argnames="group_size"), jax.jit(suffix_nll), jax.jit(reward), masks
    )


class Evaluation(NamedTuple):
    """What a measurement found."""

    metrics: dict[str, float]
    """`eval/<source>/<measure>`: shares are fractions of 1."""
    predictions: list[dict[str, Any]]
    """Scored rows: one per question, mode and rollout."""


def held_out(config: Config) -> dict[str, pipeline.Examples]:
    """Returns the questions of every source of `config.eval`.

    Raises:
      UserError: one of them cannot be opened, or is to be measured as what does not exist.
    """
    for name, benchmark in config.eval.benchmarks.items():
        if name not in config.eval.sources:
            raise UserError(
                f"config.eval.benchmarks.{name}: there is no such source, but {', '.join(config.eval.sources)}"
            )
        kind = benchmarks.benchmark_of(benchmark, f"config.eval.benchmarks.{name}").kind
        if kind == "mask" and not (config.eval.vqvae and config.eval.sources[name].mask):
            wanted = f"config.eval.vqvae=vae-oid.npz and the path of masks, config.eval.sources.{name}.mask"
            raise UserError(f"config.eval.benchmarks.{name} is {benchmark!r}, which needs {wanted}")
    return {
        name: pipeline.open_examples(f"eval/{name}", source, config.data, config.model.image_size)
        for name, source in config.eval.sources.items()
    }


class Exam(NamedTuple):
    """One held-out source, and what it is measured as."""

    source: str
    """Its name as it is reported: `NAME@512` where only so many of its questions are asked."""
    opened: pipeline.Examples
    benchmark: str
    position: int
    """Among the sources."""
    limit: int
    """Questions asked at most."""

    @property
    def kind(self) -> str:
        return benchmarks.benchmark_of(self.benchmark, "benchmark").kind


def evaluate(
    programs: Programs,
    params: Any,
    questions: Mapping[str, pipeline.Examples],
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    bad: pipeline.BadRecords,
) -> Evaluation:
    """Returns the measures of `params` on the `held_out` questions, the same for the same parameters and seed.

    Each process answers its own rows, and all return the measures and rows of all.
    """
    found: list[dict[str, Any]] = []
    for position, (name, opened) in enumerate(questions.items()):
        limit = config.eval.examples or len(opened)
        chosen = config.eval.benchmarks.get(name, "") or measured_as(opened.source)
        exam = Exam(
            name if limit >= len(opened) else f"{name}@{limit}", opened, chosen, position, limit
        )
        own = list(answered_rows(exam, programs, params, config, tokenizer, mesh, bad))
        # of processes that share the `model` axis each has the same rows
        every = {tuple(place): row for part in multiprocess.all_gather(own) for place, row in part}
        rows = [every[place] for place in sorted(every)]
        found += benchmarks.scored(named(rows, given=name in config.eval.benchmarks))
    return Evaluation(benchmarks.metrics(found), found)


def measured_as(source: Source) -> str:
    """Returns the benchmark of a source for which `eval.benchmarks` names none: by what it asks for and how it is answered."""
    if source.suffix == "count":
        return "counting"
    return "text" if "{" in source.suffix else {"boxes": "rec", "points": "pointing"}[source.target]


def named(rows: Sequence[dict[str, Any]], given: bool) -> list[dict[str, Any]]:
    """Returns rows under the name they may have: `refcoco_val@512` where questions are lacking, `objects` for sets of boxes.

    Args:
      given: the benchmark was named, and not only inferred from what the source asks for.
    """
    if not rows:
        return []
    name = rows[0]["benchmark"]
    if not given and name == "rec" and any(len(row["gold"]["boxes"]) != 1 for row in rows):
        name = "objects"
    greedy = [row for row in rows if row["mode"] == GREEDY]
    try:
        benchmarks.check_count(greedy, name)
    except UserError:  # another number of questions is another benchmark
        name = f"{name.partition('@')[0]}@{len(greedy)}"
    return [{**row, "benchmark": name} for row in rows]


def answered_rows(
    exam: Exam,
    programs: Programs,
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    bad: pipeline.BadRecords,
) -> Iterator[tuple[tuple[int, int, int, int], dict[str, Any]]]:
    """Yields this process's rows, each with its place: batch, mode, row, rollout."""
    c = config.eval
    mine = sharding.local_rows(mesh, c.batch_size)
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1), exam.position
    )
    batches = pipeline.ordered_batches(
        [exam.opened],
        config.data,
        tokenizer,
        batch_size=c.batch_size,
        examples=exam.limit,
        bad=bad,
        rows=mine,
    )
    quiet = None if multiprocess.is_main_process() else True  # None: where stderr is no terminal
    with tqdm(
        total=exam.limit, desc=f"eval {exam.source}", unit="q", leave=False, disable=quiet
    ) as bar:
        for number, (batch, counts) in enumerate(batches):
            placed, own = sharding.put_batch(mesh, batch), np.flatnonzero(counts).tolist()
            asked = {row: question(exam, batch, row, tokenizer) for row in own}
            if c.perplexity:
                nll = sharding.fetch_local_rows(mesh, programs.suffix_nll(params, placed))
                told = {
                    row: {
                        "suffix_nll": float(nll[row]),
                        "suffix_tokens": int(batch.suffix_mask[row].sum()),
                    }
                    for row in own
                }
            else:
                told = {}
            draw = jax.random.fold_in(key, number)
            for mode, (temperature, group) in enumerate(((0.0, 1), (c.temperature, c.rollouts))):
                if not group:
                    continue
                answered = programs.answer(
                    params, placed, jnp.float32(temperature), draw, group_size=group
                )
                answered = sharding.fetch_local_rows(mesh, answered)
                texts = [
                    [tokenizer.decode(one.tolist()) for one in group_of]
                    for group_of in answered.rollout.tokens
                ]
                masks = masks_of(programs, texts) if exam.kind == "mask" else None
                for row in own:
                    rewarded = (
                        rewards_of(programs, batch, answered.rollout, row)
                        if exam.kind == "reward"
                        else [{}] * group
                    )
                    for i in range(group):
                        malformed = bool(answered.malformed[row, i])
                        if masks is None:
                            tokens = answered.rollout.tokens[row, i].tolist()
                            said = answer_of(exam, asked[row], texts[row][i], tokens, tokenizer)
                        else:
                            said = masks(row, i, batch.size[row])
                            malformed = said["mask"] is None
                        if exam.kind == "detection":
                            said = with_scores(said, answered.confidence[row, i])
                        found = {
                            "mode": MODES[mode],
                            "rollout": i,
                            "text": texts[row][i],
                            "prediction": said,
                        }
                        found |= {
                            "malformed": int(malformed),
                            "unfinished": int(answered.unfinished[row, i]),
                        }
                        rest = rewarded[i] | ({} if mode else told.get(row, {}))
                        yield (number, mode, int(mine[row]), i), asked[row] | found | rest
            bar.update(len(own))


def with_scores(prediction: dict[str, Any], confidence: Float[np.ndarray, " K"]) -> dict[str, Any]:
    """Returns a prediction whose boxes have scores, to six digits: beyond them the number of devices shows."""
    scores = [float(f"{value:.6g}") for value in confidence[: len(prediction["boxes"])]]
    return prediction | {
        "boxes": [
            {**box, "score": score} for box, score in zip(prediction["boxes"], scores, strict=True)
        ]
    }


def masks_of(
    programs: Programs, texts: Sequence[Sequence[str]]
) -> Callable[[int, int, Any], dict[str, Any]]:
    """Returns (row, rollout, (width, height)) to the box and the mask that this text writes."""
    found = segmentation.read([text for group in texts for text in group])
    decoded = np.asarray(programs.masks(found.codes))

    def of(row: int, rollout: int, size: Any) -> dict[str, Any]:
        i = row * len(texts[0]) + rollout
        return segmentation.answer(
            found.bins[i], found.valid[i], decoded[i], (int(size[0]), int(size[1]))
        )

    return of


def rewards_of(
    programs: Programs, batch: Batch, rollout: Rollout, row: int
) -> list[dict[str, Any]]:
    """Returns the reward of each rollout of one question, null where it has none.

    One question at a time: the program's shape, and so its rounding, is the same on any number of devices.
    """
    one = [jax.tree.map(lambda x: np.asarray(x)[row : row + 1], tree) for tree in (batch, rollout)]
    found = np.asarray(programs.reward(*one), np.float64)[0]
    return [{"reward": float(value) if np.isfinite(value) else None} for value in found]


def question(exam: Exam, batch: Batch, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a row as it is before it is answered: the question and its gold."""
    index, size = int(batch.index[row]), (int(batch.size[row][0]), int(batch.size[row][1]))
    record, element = exam.opened.record(index)
    return {
        "source": exam.source,
        "benchmark": exam.benchmark,
        "id": index,
        "index": index,
        "image": image_name(field_at(record, exam.opened.source.image, element)),
        "size_px": list(size),
        "mode": GREEDY,
        "rollout": 0,
        "prompt": tokenizer.decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip(),
        "text": "",
        "prediction": {},
        "gold": gold_of(exam, batch, row, record, size, tokenizer),
    }


def image_name(value: Any) -> str | None:
    """Returns the file name or address of what a record has for an image; None for pixels and bytes without one."""
    value = value.get("path") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def gold_of(
    exam: Exam,
    batch: Batch,
    row: int,
    record: Mapping[str, Any],
    size: tuple[int, int],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Returns the gold answer of a question, as its benchmark reads it."""
    suffix = tokenizer.decode(np.asarray(batch.suffix[row]).tolist())
    if exam.kind == "choice":
        return cv_bench.gold(record, f"source {exam.opened.name}: record {int(batch.index[row])}")
    if exam.kind == "count":
        return {"number": answers.number(suffix)}
    if exam.kind == "text":
        return {"text": answers.words(suffix)}
    gold = batch.gold
    names = [tokenizer.decode(np.asarray(name).tolist()).strip() for name in gold.names[row]]
    found: dict[str, Any] = {}
    for field, key, slots in (("boxes", "xyxy_px", gold.boxes), ("points", "xy_px", gold.points)):
        used = np.flatnonzero(slots.valid[row]).tolist()
        edges = (
            np.asarray(slots[0][row], np.float64).reshape(len(slots.valid[row]), -1, 2)[..., ::-1]
            * size
        )
        found[field] = [
            {
                "label": names[int(slots.label[row][i])],
                key: [round(v, answers.DIGITS) for v in edges[i].ravel().tolist()],
            }
            for i in used
        ]
    masks = (
        [np.asarray(gold.masks[row][i]) for i in range(len(found["points"]))]
        if gold.masks.shape[-1]
        else []
    )
    if exam.kind == "mask":
        index = int(batch.index[row])
        try:
            return found | {"mask": runs_of(exam.opened.mask(index, size))}
        except BadRecord as bad:
            raise UserError(f"source {exam.opened.name}: question {index}: {bad}") from None
    return found | (
        {"masks": [runs_of(mask) for mask in masks]}
        if masks and all(m.any() for m in masks)
        else {}
    )


def answer_of(
    exam: Exam, asked: Mapping[str, Any], text: str, tokens: list[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns what a completion says, as its benchmark reads it."""
    size = asked["size_px"][0], asked["size_px"][1]
    if exam.kind == "choice":
        read: dict[str, Any] = {"choice": answers.choice(text, asked["gold"]["choices"])}
    elif exam.kind == "count":
        read = {"number": answers.number(text)}
    elif exam.kind == "text":
        read = {"text": answers.words(text)}
    elif exam.opened.source.suffix == "json":
        found = {key: answers.places(text, width) for key, width in (("xyxy_px", 4), ("xy_px", 2))}
        placed = {
            key: [{"label": one.label, key: one.numbers and list(one.numbers)} for one in of]
            for key, of in found.items()
        }
        read = {"boxes": placed["xyxy_px"], "points": placed["xy_px"]}
    else:
        read = answers.loc_answers(tokens, tokenizer, size)
    return read


def measure_checkpoint(
    config: Config, place: Path, group: multiprocess.ProcessGroup, told: Any
) -> tuple[Evaluation, dict[str, int]]:
    """Returns what is found of a checkpoint or a run, and the number of bad records of each kind.

    Raises:
      UserError: something in `config` does not fit the checkpoint, the data or the devices.
    """
    sharding.set_cpu_devices(config.mesh)
    sharding.enable_compilation_cache(config.mesh)
    group.start(told)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config.eval.batch_size, "eval.batch_size")
    tokenizer = load_tokenizer(config.data.tokenizer)
    model, params = weights.load(
        place, config.model, mesh=mesh, resample_positions=config.resample_positions
    )
    model = PaliGemma(model.config, sharding.activation_sharding(mesh))
    check_vocabulary(tokenizer, model)
    bad = pipeline.BadRecords()
    found = evaluate(
        programs_of(config, model, tokenizer.vocab),
        params,
        held_out(config),
        config,
        tokenizer,
        mesh,
        bad,
    )
    return found, bad.counts()


def check_vocabulary(tokenizer: Tokenizer, model: PaliGemma) -> None:
    """Raises UserError if the tokenizer and the model count different numbers of tokens."""
    mine, its = tokenizer.vocab.size, model.config.text.vocab_size
    if mine != its:
        where = "config.data.tokenizer, or --tokenizer of predict"
        raise UserError(
            f"the tokenizer ({where}) has {mine} tokens, but the model (model.text.vocab_size) {its}"
        )
