"""What a run will cost on a slice: hours by stage, chip-hours and disk."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from pg_ground.aot import jobs
from pg_ground.config import Config
from pg_ground.parallel import sharding
from pg_ground.reporting.tables import Table
from pg_ground.training.setup import abstract_state, make_setup
from pg_ground.training.stages import make_stages
from pg_ground.types import JsonObject

GB = 1e9


class Costs(NamedTuple):
    """The time of a run at best: each program at the roofline, nothing between the programs."""

    hours: dict[str, float]
    """By stage, and for the evaluations."""
    chips: int

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    def table(self) -> Table:
        """Returns the hours and chip-hours of each part of the run."""
        rows = [
            [name, f"{hours:.2f}", f"{hours * self.chips:.1f}"]
            for name, hours in {**self.hours, "total": self.total_hours}.items()
        ]
        title = "Cost at best: no waiting for data, no compilation, no checkpoints"
        return Table(title, ["", "hours", "chip-hours"], rows, "")


def run_costs(
    config: Config, devices: int, document: JsonObject, questions: Mapping[str, int]
) -> Costs:
    """Returns the time of all steps and evaluations of a run.

    Args:
      devices: number of devices, which jax counts.
      document: the programs by `aot.compilation.compile_run` or `aot.estimates.estimate_run`.
      questions: held-out questions by source, where they are known.
    """
    mesh = sharding.abstract_mesh(config.mesh, devices)
    seconds = dict.fromkeys(config.stages, 0.0)
    for name, program in document["programs"].items():
        if name == "evaluation":
            continue
        stage = jobs.stage_name(config, mesh, name)
        # The program `update` does all updates of a step.
        seconds[stage] += config.stage_settings(stage).steps * program["step_s"]
    if "evaluation" in document["programs"]:
        batches = evaluation_batches(config, questions)
        seconds["evaluations"] = batches * document["programs"]["evaluation"]["step_s"]
    hours = {name: value / 3600 for name, value in seconds.items()}
    return Costs(hours, devices)


def evaluation_batches(config: Config, questions: Mapping[str, int]) -> int:
    """Returns the number of batches that all evaluations of a run answer.

    A source whose number of questions is unknown counts as one batch.
    """
    settings = config.eval
    answers = 2 if settings.rollouts else 1  # greedy, and sampled

    def batches(limit: int) -> int:
        counts = [questions.get(name, 1) for name in settings.sources]
        asked = [min(limit or count, count) for count in counts]
        return answers * sum(math.ceil(count / settings.batch_size) for count in asked)

    interim = batches(settings.interim_examples or settings.examples)
    total = interim if settings.at_start else 0
    for stage in config.stages:
        steps = config.stage_settings(stage).steps
        evaluations = (steps - 1) // settings.every if settings.every else 0
        total += evaluations * interim + batches(settings.examples)
    return total


def checkpoint_bytes(config: Config, devices: int) -> int:
    """Returns the bytes of all checkpoints that a run keeps at a time, with one being written."""
    mesh = sharding.abstract_mesh(config.mesh, devices)
    setup = make_setup(config, mesh, None)
    state = max(_bytes(abstract_state(setup, stage.settings)) for stage in make_stages(setup))
    best = _bytes(setup.trained_tree) if config.checkpoint.best else 0
    return state * (config.checkpoint.keep + 1) + best + _bytes(setup.frozen_tree)


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
