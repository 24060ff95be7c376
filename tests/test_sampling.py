import numpy as np
import pytest

from pg_ground.data.sampling import sample_indices
from pg_ground.types import UserError


@pytest.mark.parametrize(
    ("count", "strategy", "expected"),
    [
        (10, "all", range(10)),
        (10, "first:3", [0, 1, 2]),
        (10, "end:3", [7, 8, 9]),
        (7, "first:50%", [0, 1, 2, 3]),
        (7, "end:10%", [6]),
        (10, "first:100", range(10)),
        (10, "end:100", range(10)),
        (10, "first:100%", range(10)),
        (10, "end:250%", range(10)),
        (10, "end:0", []),
        (10, "end:0%", []),
        (10, "first:0", []),
        (8, "first:12.5%", [0]),
        (9, "first:12.5%", [0, 1]),
        (3000, "first:0.1%", [0, 1, 2]),
        (0, "all", []),
        (0, "first:3", []),
        (0, "end:50%", []),
    ],
)
def test_ends_and_shares(count, strategy, expected):
    np.testing.assert_array_equal(sample_indices(count, strategy, 0), list(expected))


@pytest.mark.parametrize(
    ("count", "strategy", "expected"),
    [(10, "50%", 5), (7, "50%", 4), (10, "4", 4), (9, "99", 9), (10, "0", 0)],
)
def test_random_records_are_distinct_and_in_order(count, strategy, expected):
    indices = sample_indices(count, f"random:{strategy}", 3)
    assert (
        len(indices) == expected
        and (np.diff(indices) > 0).all()
        and set(indices) <= set(range(count))
    )


def test_a_random_choice_depends_on_the_seed_and_larger_choices_contain_it():
    choice = sample_indices(1000, "random:100", 1)
    np.testing.assert_array_equal(choice, sample_indices(1000, "random:10%", 1))
    assert set(choice) < set(sample_indices(1000, "random:200", 1)) and set(choice) != set(
        sample_indices(1000, "random:100", 2)
    )
    drawn = np.zeros(10)
    for seed in range(1000):
        drawn[sample_indices(10, "random:3", seed)] += 1
    assert abs(drawn - 300).max() < 5 * np.sqrt(
        1000 * 0.3 * 0.7
    )  # five standard deviations of a uniform draw


def test_defect_07_end_0_is_empty_a_seed_repeats_and_an_unknown_strategy_is_refused():
    """In EasyDistill, end:0 and unknown names choose all records, and random has no seed."""
    assert not len(sample_indices(10, "end:0", 0))
    np.testing.assert_array_equal(
        sample_indices(10, "random:5", 3), sample_indices(10, "random:5", 3)
    )
    with pytest.raises(UserError, match="last:3"):
        sample_indices(10, "last:3", 0)


@pytest.mark.parametrize(
    "strategy",
    [
        *(
            "",
            "foo:3",
            "first",
            "first:",
            "first:-2",
            "first:2.5",
            "first:+2",
            "first: 2",
            "First:2",
            "first:1e3",
            "first:٣",
        ),
        *(
            "random:1:2",
            "random:%",
            "random:5.%",
            "random:.5%",
            "random:-5%",
            "random:nan%",
            "all:3",
            "all ",
            "end:3\n",
            "50%",
        ),
    ],
)
def test_unknown_strategies_are_refused_by_name(strategy):
    with pytest.raises(UserError, match="first:N, end:N or random:N") as refused:
        sample_indices(10, strategy, 0)
    assert repr(strategy) in str(refused.value) and "\n" not in str(refused.value)
