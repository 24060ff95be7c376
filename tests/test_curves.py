"""Laws of the curves and of the files of a report: extremes stay, budgets hold, names differ."""

import math

import numpy as np
import pytest

from pg_ground.reporting import curves, run_files
from pg_ground.types import UserError


def test_a_stage_starts_after_the_last_step_of_the_stage_before():
    lines = [{"step": step, "stage": "sft" if step <= 3 else "grpo"} for step in range(1, 6)]
    assert curves.stage_starts(lines) == [("sft", 0), ("grpo", 3)]


def test_the_running_mean_of_a_constant_is_the_constant_and_gaps_do_not_count():
    values = np.full(50, 3.0)
    values[[0, 7, 8]] = math.nan
    np.testing.assert_allclose(curves.running_mean(values, 4), 3.0, rtol=1e-15)
    assert np.isnan(curves.running_mean(np.array([math.nan]), 5)).all()
    np.testing.assert_allclose(curves.running_mean(np.array([1.0, 2.0, 6.0]), 1), [1.5, 3.0, 4.0])


def test_thinning_keeps_the_ends_and_every_extreme():
    values = np.random.default_rng(0).normal(size=20_000)
    values[[77, 12_345]] = (-99.0, 99.0)
    values[500:600] = math.nan
    indices = curves.thinned(values)
    assert indices == sorted(set(indices))
    assert len(indices) <= curves.MAX_POINTS + 2
    assert {0, 77, 12_345, 19_999} <= set(indices)
    assert curves.thinned(values[:300]) == list(range(300))


def test_items_within_a_budget_are_evenly_spaced_with_the_first_and_the_last():
    assert run_files.evenly_chosen(range(9), [1] * 9, 9) == list(range(9))
    assert run_files.evenly_chosen(range(9), [1] * 9, 5) == [0, 2, 4, 6, 8]
    assert run_files.evenly_chosen(range(9), [100] * 9, 5) == [0, 8]
    assert run_files.evenly_chosen([], [], 5) == []
    assert run_files.evenly_chosen([3], [100], 5) == [3]


def test_names_of_directories_are_their_shortest_distinct_ends(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert run_files.distinct_names(paths) == ["a/run", "b/run"]
    assert run_files.distinct_names(paths[:1]) == ["run"]
    with pytest.raises(UserError, match="twice"):
        run_files.distinct_names([paths[0], paths[0]])
