"""What a run writes down between its steps; that its files are those of an unbroken run is in test_story."""

import math
import runpy
from dataclasses import replace

import pytest
from programs import ROOT

from pg_ground import config, diary
from pg_ground.train import steps_between_measures
from pg_ground.types import UserError


def test_the_measure_of_the_best_is_named_with_or_without_its_number_of_questions():
    metrics = {"eval/boxes@512/acc50": 0.5, "eval/boxes@512/mae": math.nan}
    for name in ("eval/boxes/acc50", "eval/boxes@512/acc50"):
        assert (diary.goodness(name, metrics), diary.goodness("-" + name, metrics)) == (0.5, -0.5)
    assert diary.goodness("-eval/boxes/mae", metrics) == -math.inf
    with pytest.raises(UserError, match="did you mean eval/boxes/acc50"):
        diary.goodness("eval/boxes/acc5", metrics)


def test_an_epoch_is_as_many_steps_as_all_questions_of_a_stage_take():
    c = config.parse(runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]())
    assert steps_between_measures(replace(c, eval=replace(c.eval, every_epochs=0.5)), "grpo", 160) == 10  # 8 questions a step
    assert steps_between_measures(replace(c, eval=replace(c.eval, every_epochs=0.001)), "sft", 160) == 1
    assert steps_between_measures(replace(c, eval=replace(c.eval, every=7)), "sft", 160) == 7
