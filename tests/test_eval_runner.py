"""The evaluation of a policy on held-out sources, from questions to metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PG1

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.evals import benchmarks, runner, scoring
from pg_ground.evals.file_answers import Formats
from pg_ground.evals.programs import Completions, EvalPrograms, make_eval_programs
from pg_ground.evals.runner import EvalContext, Evaluation
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import results_table
from pg_ground.rewards import answer_reader
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import Batch, Rollout, UserError

SCENES = "synthetic:heldout?side=32&shapes=2&scenes=10"
BOXES = Source(uri=SCENES, boxes="box")
SOURCES = {
    "boxes": BOXES,
    "points": Source(uri=SCENES, target="points", boxes="box", points="point"),
    "count": dataclasses.replace(BOXES, suffix="count"),
    "json": dataclasses.replace(BOXES, suffix="json"),
    "text": Source(uri=SCENES, target="text", suffix="{phrase}"),
    "detected": BOXES,
    "environment": BOXES,
}
BENCHMARKS = {"detected": "detection", "environment": "environment"}
DATA = config.Data(prompt_length=12, suffix_length=48)
SETTINGS = config.Eval(
    sources=SOURCES, benchmarks=BENCHMARKS, examples=6, batch_size=4, rollouts=2, perplexity=True
)
PERFECT = {
    "boxes@6/acc95": 1,
    "points@6/f1": 1,
    "count@6/accuracy": 1,
    "json@6/acc75": 1,
    "text@6/accuracy": 1,
    "detected@6/ap75": 1,
    "environment@6/pass@1": 1,
}
"""Metrics of a policy that writes the ground truth."""


IOU = config.Grpo(rewards={"iou": 1.0})


def copying_programs(
    tokenizer: Tokenizer, settings: config.Eval, grpo: config.Grpo = IOU
) -> EvalPrograms:
    """Returns the programs of a policy that writes the ground-truth suffix of every question."""
    sizes = dataclasses.replace(PG1.text, vocab_size=tokenizer.vocab.size)
    model = PaliGemma(dataclasses.replace(PG1, text=sizes))
    programs = make_eval_programs(model, tokenizer.vocab, settings, grpo)

    def answer(_: Any, batch: Batch, temperature: Any, key: Any, group_size: int) -> Completions:
        def repeat(x: Any) -> Any:
            return jnp.repeat(jnp.asarray(x)[:, None], group_size, axis=1)

        tokens, mask = repeat(batch.suffix), repeat(batch.suffix_mask)
        parsed = answer_reader.read_answer(
            tokens, mask, batch.gold.target, batch.gold.names, tokenizer.vocab
        )
        logps = jnp.where(mask, -1.0, 0.0)
        confidence = answer_reader.confidence(tokens, mask, logps, tokenizer.vocab)
        rollout = Rollout(tokens, mask, logps, loss_mask=mask)
        return Completions(rollout, ~parsed.grammatical, ~parsed.finished, confidence)

    def suffix_nll(_: Any, batch: Batch) -> Any:
        return jnp.asarray(batch.suffix_mask).sum(axis=-1).astype(jnp.float32)

    return programs._replace(
        answer=jax.jit(answer, static_argnames="group_size"), suffix_nll=jax.jit(suffix_nll)
    )


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    tokenizer = load_tokenizer()
    mesh = sharding.make_mesh(config.Mesh(data=2))
    context = EvalContext(SETTINGS, DATA, 0, tokenizer, mesh, BadRecords(), IOU)
    sources = runner.open_eval_sources(SETTINGS, DATA, PG1.image_size)
    return runner.evaluate_sources(copying_programs(tokenizer, SETTINGS), {}, sources, context)


def test_metrics_of_the_first_questions_are_those_of_an_evaluation_of_fewer(evaluation):
    """The last evaluation of a stage asks all questions, and goes on with the interim curve."""
    tokenizer = load_tokenizer()
    mesh = sharding.make_mesh(config.Mesh(data=2))
    context = EvalContext(SETTINGS, DATA, 0, tokenizer, mesh, BadRecords(), IOU)
    sources = runner.open_eval_sources(SETTINGS, DATA, PG1.image_size)
    programs = copying_programs(tokenizer, SETTINGS)
    fewer = runner.evaluate_sources(programs, {}, sources, context, (4,))
    both = runner.evaluate_sources(programs, {}, sources, context, (4, SETTINGS.examples))
    assert (
        all("@4/" in name for name in fewer.metrics)
        and fewer.metrics["eval/boxes@4/questions"] == 4
    )
    assert both.metrics == fewer.metrics | evaluation.metrics
    assert both.predictions == evaluation.predictions


@pytest.mark.parametrize("name", PERFECT)
def test_a_policy_that_writes_the_ground_truth_is_perfect(evaluation, name):
    source, metric = name.split("/")
    for prefix in ("", "sampled_"):
        assert evaluation.metrics[f"eval/{source}/{prefix}{metric}"] == PERFECT[name]


def environment_of(source: Source, grpo: config.Grpo) -> Evaluation:
    """Returns the evaluation of the environment of a source, with two sampled answers."""
    settings = config.Eval(
        sources={"env": source},
        benchmarks={"env": "environment"},
        examples=2,
        batch_size=2,
        rollouts=2,
    )
    tokenizer = load_tokenizer()
    programs = copying_programs(tokenizer, settings, grpo)
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, DATA, 0, tokenizer, mesh, BadRecords(), grpo)
    sources = runner.open_eval_sources(settings, DATA, PG1.image_size)
    return runner.evaluate_sources(programs, {}, sources, context)


def test_the_environment_takes_a_reward_of_a_users_file(tmp_path):
    """A user's reward that training accepts is a reward of the benchmark too."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def half(answer, batch, settings):\n    return 0.5 * answer.finished\n"
        "def words(completion, example):\n    return 0.25 * bool(completion)\n"
    )
    names = [f"{file}:half", f"{file}:words"]
    evaluation = environment_of(BOXES, config.Grpo(rewards=dict.fromkeys(names, 1.0)))
    assert [row["reward"] for row in evaluation.predictions] == 6 * [0.75]
    assert evaluation.predictions[0]["rewards"] == dict(zip(names, (0.5, 0.25), strict=True))
    metrics = evaluation.metrics
    assert metrics["eval/env@2/reward_mine.py:half"] == 0.5
    assert metrics["eval/env@2/sampled_reward_mine.py:words"] == 0.25


COUNTS = Source(uri=SCENES, boxes="box", suffix="count")
JSON_BOXES = Source(uri=SCENES, boxes="box", suffix="json")
ENVIRONMENTS: dict[str, tuple[Source, dict[str, Any], dict[str, float]]] = {
    "text rewards alone": (
        COUNTS,
        {"text_rewards": {"count_exact": 1.0}},
        {"mean_reward": 1, "pass@1": 1, "reward_count_exact": 1},
    ),
    "both kinds": (
        COUNTS,
        {"rewards": {"length": 0.25}, "text_rewards": {"count_exact": 0.5}},
        {"reward_count_exact": 1},
    ),
    "a reward that does not apply": (
        JSON_BOXES,
        {"rewards": {"iou": 0.5}, "text_rewards": {"json_format": 0.5}},
        {"mean_reward": 0.5, "reward_json_format": 1},
    ),
    "a reward that is only measured": (
        BOXES,
        {"rewards": {"format": 1.0, "label": 0.0}, "text_rewards": {"json_format": 0.0}},
        {"mean_reward": 1, "reward_format": 1, "reward_label": 1},
    ),
    "the weight after a schedule": (
        COUNTS,
        {"text_rewards": {"count_exact": (0.0, 0.5, 10)}},
        {"mean_reward": 0.5, "reward_count_exact": 1},
    ),
}
"""A source, the rewards of `grpo`, and metrics of a policy that writes the ground truth."""


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_environment_reports_rewards_of_both_kinds(name, tmp_path):
    source, rewards, metrics = ENVIRONMENTS[name]
    blank: dict[str, Any] = {"rewards": {}, "text_rewards": {}}
    evaluation = environment_of(source, config.Grpo(**{**blank, **rewards}))
    values = evaluation.metrics
    for prefix in ("", "sampled_"):
        for metric, value in metrics.items():
            assert values[f"eval/env@2/{prefix}{metric}"] == pytest.approx(value, abs=1e-6), metric
    rows = evaluation.predictions
    weights = blank["rewards"] | rewards.get("rewards", {}) | rewards.get("text_rewards", {})
    for row in rows:
        assert set(row["rewards"]) == set(weights)
        parts = [
            (weight[1] if isinstance(weight, tuple) else weight) * (row["rewards"][part] or 0)
            for part, weight in weights.items()
        ]
        assert row["reward"] == pytest.approx(sum(parts), abs=1e-6)
    table = results_table("", {"run": values})
    names = {row[0] for row in table.rows}
    assert names >= {"env@2/mean_reward", "env@2/pass@1", "env@2/sampled_completion_length"}
    assert names >= {f"env@2/{metric}" for metric in metrics}
    lengths = [len(load_tokenizer().suffix(row["text"])) for row in rows if row["rollout"] == 0]
    assert values["eval/env@2/completion_length"] == np.mean(lengths)
    scoring.write_results(tmp_path, {}, rows)
    report, rescored = scoring.rescore(tmp_path / "predictions.jsonl", "", {}, Formats())
    assert rescored == rows and report.items() >= values.items()


def test_an_environment_without_a_reward_that_applies_is_an_error():
    grpo = config.Grpo(rewards={"distance_gaussian": 1.0})
    with pytest.raises(UserError, match="source eval/env: no reward with a weight applies to any"):
        environment_of(BOXES, grpo)


def test_a_text_target_is_measured_as_text():
    source = Source(uri=SCENES, target="text", suffix="answer.jinja")
    assert runner.default_benchmark(source) == "text"


def test_every_question_has_one_row_for_each_answer(evaluation):
    assert len(evaluation.predictions) == len(SOURCES) * 6 * (1 + SETTINGS.rollouts)
    keys = {
        (row["source"], row["id"], row["mode"], row["rollout"]) for row in evaluation.predictions
    }
    assert len(keys) == len(evaluation.predictions)
    modes = [row["mode"] for row in evaluation.predictions]
    assert modes.count("greedy") == len(SOURCES) * 6
    assert evaluation.bad_records == {}


def test_questions_about_one_drawn_image_share_its_identity(evaluation):
    images: dict[int, set[str]] = {}
    for row in evaluation.predictions:
        images.setdefault(row["id"], set()).add(row["image"])
    assert len(images) == 6 and all(len(names) == 1 for names in images.values())
    assert len(set.union(*images.values())) == 6
    assert benchmarks.make_report(evaluation.predictions)["sources"]["boxes@6"]["images"] == 6


def test_optional_fields_of_rows(evaluation):
    for row in evaluation.predictions:
        assert ("reward" in row) == (row["benchmark"] == "environment")
        assert ("suffix_nll" in row) == (row["mode"] == "greedy")
        for box in row["prediction"].get("boxes", []):
            assert ("score" in box) == (row["benchmark"] == "detection")
    # one nat for each token
    assert evaluation.metrics["eval/boxes@6/suffix_perplexity"] == pytest.approx(np.e)


def test_metrics_follow_from_the_written_rows(evaluation, tmp_path):
    scoring.write_results(tmp_path, {}, evaluation.predictions)
    report, scored = scoring.rescore(tmp_path / "predictions.jsonl", "", {}, Formats())
    assert scored == evaluation.predictions
    assert report.items() >= evaluation.metrics.items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": {"box": "rec"}}, "there is no source box in config.eval: boxes, points"),
        ({"benchmarks": {"boxes": "recc"}}, "eval.benchmarks.boxes 'recc' does not exist"),
        ({"benchmarks": {"boxes": "segmentation"}}, "needs config.eval.vqvae=vae-oid.npz"),
    ],
)
def test_a_wrong_benchmark_is_refused(settings: Mapping[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        runner.open_eval_sources(dataclasses.replace(SETTINGS, **settings), DATA, PG1.image_size)


def test_the_default_benchmark_follows_from_the_source():
    for source, name in (
        (Source(), "rec"),
        (Source(target="points"), "pointing"),
        (Source(suffix="count"), "counting"),
        (Source(target="text", suffix="{answer}"), "text"),
        (Source(suffix="json"), "rec"),
    ):
        assert runner.default_benchmark(source) == name


def test_rows_carry_the_name_of_a_whole_benchmark_only():
    row = {"benchmark": "refcoco_val", "mode": "greedy", "id": 0, "gold": {"boxes": [0]}}
    renamed = runner.with_benchmark_name([row], is_configured=True)
    assert renamed[0]["benchmark"] == "refcoco_val@1"
    row |= {"benchmark": "rec", "gold": {"boxes": []}}
    renamed = runner.with_benchmark_name([row], is_configured=False)
    assert renamed[0]["benchmark"] == "objects"
