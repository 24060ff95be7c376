"""What a run writes down between its steps; that its files are those of an unbroken run is in test_story."""

import math

import pytest

from pg_ground import diary
from pg_ground.types import UserError


def test_the_measure_of_the_best_is_named_with_or_without_its_number_of_questions():
    metrics = {"eval/boxes@512/acc50": 0.5, "eval/boxes@512/mae": math.nan}
    for name in ("eval/boxes/acc50", "eval/boxes@512/acc50"):
        assert (diary.goodness(name, metrics), diary.goodness("-" + name, metrics)) == (0.5, -0.5)
    assert diary.goodness("-eval/boxes/mae", metrics) == -math.inf
    with pytest.raises(UserError, match="did you mean eval/boxes/acc50"):
        diary.goodness("eval/boxes/acc5", metrics)
