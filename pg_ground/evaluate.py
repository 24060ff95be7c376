"""A policy, measured on held-out sources with greedy and with sampled answers.

python -m pg_ground.evaluate --config=configs/quickstart.py (--workdir=D | --params=P) [--out=D] [--distributed=auto]
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray

from pg_ground import boxes, cli, processes, sharding
from pg_ground.config import Config
from pg_ground.data import pipeline
from pg_ground.model import PaliGemma, weights
from pg_ground.report import Table, ascii_table, write_whole
from pg_ground.rl.rewards import read_answer
from pg_ground.rl.rollout import sample
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import POINTS, Array, Batch, Rollout, UserError
from pg_ground.vocab import Vocab

MODES = GREEDY, SAMPLED = "greedy", "sampled"


class Judged(NamedTuple):
    """One completion of each prompt, judged against the first gold answer; NaN where a measure does not apply."""

    iou: Float[Array, " B"]
    """Of the first predicted box with the gold box; 0 without a box."""
    in_box: Float[Array, " B"]
    """1 where the first predicted point lies in the gold box of a question about points."""
    malformed: Float[Array, " B"]
    """1 where the completion is not an answer of the asked kind."""
    unfinished: Float[Array, " B"]
    """1 where the completion does not end in EOS."""


def judge(rollout: Rollout, batch: Batch, vocab: Vocab) -> Judged:
    """Returns how the first completion of each prompt compares with the annotation."""
    answer = read_answer(rollout.tokens[:, :1], rollout.mask[:, :1], batch.gold.asks, batch.gold.names, vocab)
    gold = batch.gold.boxes.yxyx[:, 0]
    about_points = batch.gold.asks == POINTS
    overlap = jnp.where(answer.boxes.valid[:, 0, 0], boxes.iou(answer.boxes.yxyx[:, 0, 0], gold), 0)
    point = answer.points.yx[:, 0, 0]
    inside = ((point >= gold[:, :2]) & (point <= gold[:, 2:])).all(axis=-1) & answer.points.valid[:, 0, 0]
    located = about_points & batch.gold.boxes.valid[:, 0]
    return Judged(
        iou=jnp.where(about_points, jnp.nan, overlap),
        in_box=jnp.where(located, inside, jnp.nan).astype(jnp.float32),
        malformed=1.0 - answer.grammatical[:, 0],
        unfinished=1.0 - answer.finished[:, 0],
    )


Answerer = Callable[[Any, Batch, Float[Array, ""], PRNGKeyArray], tuple[Rollout, Judged]]
"""(params, batch, temperature, key) to one completion of each prompt and its judgement; temperature 0 is greedy."""


def answerer(model: PaliGemma, vocab: Vocab, max_new_tokens: int) -> Answerer:
    """Returns the compiled program that answers and judges a batch."""

    def answer(params: Any, batch: Batch, temperature: Float[Array, ""], key: PRNGKeyArray) -> tuple[Rollout, Judged]:
        inputs = (batch.image, batch.prompt, batch.prompt_mask)
        rollout = sample(model, params, *inputs, key, 1, max_new_tokens, temperature)
        return rollout, judge(rollout, batch, vocab)

    return jax.jit(answer)


class Answered(NamedTuple):
    """One completion on the host; JSON, so that processes can hand it to one another."""

    batch: int
    mode: int
    """Position in `MODES`."""
    row: int
    index: int
    prompt: str
    text: str
    judged: list[float]
    """The fields of `Judged`, in order."""


class Evaluation(NamedTuple):
    """What a measurement found."""

    metrics: dict[str, float]
    """`eval/<source>/<measure>`, fractions of 1."""
    predictions: list[dict[str, Any]]
    """One per question and mode (greedy, sampled)."""


def held_out(config: Config) -> dict[str, pipeline.Examples]:
    """Returns the questions of every source of `config.eval`.

    Raises:
      UserError: one of them cannot be opened.
    """
    return {
        name: pipeline.open_examples(f"eval/{name}", source, config.data, config.model.image_size)
        for name, source in config.eval.sources.items()
    }


def evaluate(
    answer: Answerer,
    params: Any,
    questions: Mapping[str, pipeline.Examples],
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    bad: pipeline.BadRecords,
) -> Evaluation:
    """Returns the measures of `params` on the `held_out` questions, the same for the same parameters and seed.

    Each process answers its own rows, and all return the measures and predictions of all rows.
    """
    metrics: dict[str, float] = {}
    predictions: list[dict[str, Any]] = []
    mine = sharding.rows_here(mesh, config.eval.batch_size)
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    for position, (name, opened) in enumerate(questions.items()):
        own: list[Answered] = []
        batches = pipeline.ordered_batches(
            [opened],
            config.data,
            tokenizer,
            batch_size=config.eval.batch_size,
            examples=config.eval.examples,
            bad=bad,
            rows=mine,
        )
        for number, (batch, counts) in enumerate(batches):
            placed = sharding.put_batch(mesh, batch)
            draw = jax.random.fold_in(jax.random.fold_in(key, position), number)
            for mode, temperature in enumerate((0.0, config.eval.temperature)):
                rollout, judged = sharding.take_rows(mesh, answer(params, placed, jnp.float32(temperature), draw))
                for row in np.flatnonzero(counts):
                    prompt = tokenizer.decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip()
                    text = tokenizer.decode(rollout.tokens[row, 0].tolist())
                    measures = [float(measure[row]) for measure in judged]
                    own.append(Answered(number, mode, int(mine[row]), int(batch.index[row]), prompt, text, measures))
        # of processes that share the `model` axis each has the same rows
        every = {one[:3]: one for part in processes.gather(own) for one in (Answered(*values) for values in part)}
        answered = [every[place] for place in sorted(every)]
        predictions += [_prediction(name, one) for one in answered]
        for mode, label in enumerate(MODES):
            rows = [one.judged for one in answered if one.mode == mode]
            if not rows:
                continue
            columns = Judged(*np.array(rows, np.float32).T)
            prefix = f"eval/{name}/" if label == GREEDY else f"eval/{name}/sampled_"
            metrics |= {prefix + measure: value for measure, value in summary(columns).items()}
            metrics[f"eval/{name}/questions"] = float(len(rows))
    return Evaluation(metrics, predictions)


def summary(judged: Judged) -> dict[str, float]:
    """Returns means over questions: acc50, acc75, acc95, mean_iou for boxes; point_in_box for points; invalid shares."""
    measures: dict[str, float] = {}
    iou, in_box = judged.iou[~np.isnan(judged.iou)], judged.in_box[~np.isnan(judged.in_box)]
    if len(iou):
        measures |= {f"acc{percent}": float(np.mean(iou >= percent / 100)) for percent in (50, 75, 95)}
        measures["mean_iou"] = float(np.mean(iou, dtype=np.float64))
    if len(in_box):
        measures["point_in_box"] = float(np.mean(in_box))
    measures["malformed_fraction"] = float(np.mean(judged.malformed))
    measures["unfinished_fraction"] = float(np.mean(judged.unfinished))
    return measures


def results_table(title: str, columns: dict[str, dict[str, float]], note: str = "") -> Table:
    """Returns one row per measure, one column per moment (or run)."""
    names = sorted({name for metrics in columns.values() for name in metrics if not name.endswith("/questions")})
    rows = [
        [name.removeprefix("eval/"), *(f"{metrics[name]:.3f}" if name in metrics else "" for metrics in columns.values())]
        for name in names
    ]
    return Table(title, ["measure", *columns], rows, note)


def check_vocabulary(tokenizer: Tokenizer, model: PaliGemma) -> None:
    """Raises UserError if the tokenizer and the model count different numbers of tokens."""
    mine, its = tokenizer.vocab.size, model.config.text.vocab_size
    if mine != its:
        where = "config.data.tokenizer, or --tokenizer of predict"
        raise UserError(f"the tokenizer ({where}) has {mine} tokens, but the model (model.text.vocab_size) {its}")


def _prediction(source: str, answered: Answered) -> dict[str, Any]:
    """Returns a line of `predictions.jsonl`."""
    judged = dict(zip(Judged._fields, answered.judged, strict=True))
    numbers = {name: judged[name] for name in ("iou", "in_box", "malformed") if not np.isnan(judged[name])}
    said = {"mode": MODES[answered.mode], "prompt": answered.prompt, "text": answered.text}
    return {"source": source, "index": answered.index, **said, **numbers}


def main(argv: Sequence[str], group: processes.Group) -> None:
    config, own = cli.parse(argv, {"workdir": "", "params": "", "out": "", cli.DISTRIBUTED: ""})
    if bool(own["workdir"]) == bool(own["params"]):
        raise UserError("one of --workdir=RUN and --params=CHECKPOINT is needed")
    if not config.eval.sources:
        raise UserError("config.eval.sources is empty: there is nothing to measure on")
    place = Path(own["workdir"] or own["params"])
    out = Path(own["out"] or (place if place.is_dir() else place.parent))
    sharding.split_cpu(config.mesh)
    sharding.keep_programs(config.mesh)
    group.open(processes.leaves({"config": dataclasses.asdict(config), "--params": own["params"], "--workdir": own["workdir"]}))
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_rows(mesh, config.eval.batch_size, "eval.batch_size")
    tokenizer = load_tokenizer(config.data.tokenizer)
    model, params = weights.load(place, config.model, mesh=mesh, resample_positions=config.resample_positions)
    model = PaliGemma(model.config, sharding.places(mesh))
    check_vocabulary(tokenizer, model)
    answer = answerer(model, tokenizer.vocab, config.eval.max_new_tokens)
    bad = pipeline.BadRecords()
    found = evaluate(answer, params, held_out(config), config, tokenizer, mesh, bad)
    if processes.is_writer():  # each process has read every record, and so has found all that are bad
        result = {"params": str(place), "bad_records": bad.counts(), **found.metrics}
        write_whole(out / "eval.json", json.dumps(result, indent=1) + "\n")
        write_whole(out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in found.predictions))
    processes.say(ascii_table(results_table("held out", {str(place): found.metrics})))
    processes.say(str(out / "eval.json"))


if __name__ == "__main__":
    cli.run_together(main)
