"""Names of parameters: flatten and unflatten, join, and factors of learning rates."""

import pytest

from pg_ground.params import MATRICES, flatten, join, lr_factors, matrix_axes, pick, unflatten
from pg_ground.types import UserError

TREE = {"llm": {"layers": {"w": 1, "w_lora_a": 2}, "embedder": {"table": 3}}, "img": {"head": 4}}
NAMES = ["img/head", "llm/embedder/table", "llm/layers/w", "llm/layers/w_lora_a"]


def test_flatten_and_unflatten_are_inverses():
    assert list(flatten(TREE)) == NAMES
    assert unflatten(flatten(TREE)) == TREE


def test_join_puts_together_what_pick_takes_apart():
    parts = [
        pick(TREE, lambda name: name.startswith("llm/layers")),
        pick(TREE, lambda name: not name.startswith("llm/layers")),
    ]
    assert join(*parts) == join(*parts[::-1]) == TREE
    assert join(TREE, {"img": {"head": 5}})["img"]["head"] == 5


def test_axes_of_a_matrix_are_counted_from_its_end_and_differ():
    assert matrix_axes("llm/layers/attn/q_einsum/w") == ((-2,), (-3, -1))
    assert (
        matrix_axes("llm/embedder/input_embedding") is None
        and matrix_axes("img/embedding/kernel") is None
    )
    for _, inner, outer in MATRICES:
        axes = [*inner, *outer]
        assert sorted(axes) == list(range(-len(axes), 0))


def test_without_a_table_everything_is_trained_or_just_the_adapters():
    assert lr_factors(NAMES[:3], ()) == dict.fromkeys(NAMES[:3], 1.0)
    assert lr_factors(NAMES, ()) == dict(zip(NAMES, (0.0, 0.0, 0.0, 1.0), strict=True))


def test_scales_of_int8_matrices_are_never_trained_and_need_no_pattern():
    names = [*NAMES, "llm/layers/w_scale"]
    assert lr_factors(names, ())["llm/layers/w_scale"] == 0
    table = (("img/.*", 0.0), (".*/table", 0.1), ("llm/layers/w(_lora_a)?", 1.0))
    assert lr_factors(names, table) == lr_factors(NAMES, table) | {"llm/layers/w_scale": 0.0}


def test_the_first_pattern_that_matches_the_whole_name_counts():
    table = (("img/.*", 0.0), (".*/table", 0.1), ("llm/.*", 1.0))
    assert lr_factors(NAMES, table) == dict(zip(NAMES, (0.0, 0.1, 1.0, 1.0), strict=True))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ((("llm/.*", 1.0),), "has no pattern for img/head"),
        (
            (("llm", 1.0), ("img/.*", 1.0)),
            "has no pattern for llm/embedder/table, llm/layers/w, llm/layers/w_lora_a",
        ),
        (((".*", 1.0), ("img/.*", 0.0)), "'img/.*' is the first match of no parameter"),
        ((("vit/.*", 0.0), (".*", 1.0)), "'vit/.*' is the first match of no parameter"),
        (((".*", 0.0),), "freezes every parameter"),
        ((("(", 0.0), (".*", 1.0)), "'\\(' is not a regular expression"),
    ],
)
def test_a_table_that_does_not_mean_what_it_says_is_refused(table, said):
    with pytest.raises(UserError, match=said):
        lr_factors(NAMES, table)
