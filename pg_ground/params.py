"""Trees of parameters by name: big_vision's names joined by slashes, which of them are matrices, and which are trained."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from pg_ground.types import UserError

AbstractParams = dict[str, jax.ShapeDtypeStruct]
"""Shape, dtype and (if it is decided) sharding of parameters, by slash-joined name."""

MATRICES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    # name ends in, axes that are summed over, axes that come out; what stands before them (layers, parts) is a batch of matrices
    ("q_einsum/w", (-2,), (-3, -1)),
    ("kv_einsum/w", (-2,), (-3, -1)),
    ("attn_vec_einsum/w", (-3, -2), (-1,)),
    ("mlp/gating_einsum", (-2,), (-1,)),
    ("mlp/linear", (-2,), (-1,)),
    ("Dense_0/kernel", (-2,), (-1,)),
    ("Dense_1/kernel", (-2,), (-1,)),
    ("query/kernel", (-3,), (-2, -1)),
    ("key/kernel", (-3,), (-2, -1)),
    ("value/kernel", (-3,), (-2, -1)),
    ("out/kernel", (-3, -2), (-1,)),
    ("head/kernel", (-2,), (-1,)),
)
"""The matrices among big_vision's parameters: muon orthogonalises them, LoRA adapts them; embeddings, norms, biases are none."""

DOWN, UP = "_lora_a", "_lora_b"
"""What the names of a LoRA adapter's two factors add to the name of the matrix they adapt."""


SCALE = "_scale"
"""Added to the name of a frozen int8 matrix to name its scales: see `pg_ground.models.quantization`."""


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts by their slash-joined names, sorted."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for name in sorted(node):
                walk(node[name], (*path, name))
        else:
            found["/".join(path)] = node

    walk(tree, ())
    return found


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of dicts whose leaves have these slash-joined names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns the tree of `f(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f("/".join(str(key.key) for key in path), leaf), tree
    )


def join(*trees: Any) -> dict[str, Any]:
    """Returns one tree with the leaves of all; where a name occurs twice the later tree's leaf stands."""
    return unflatten({name: leaf for tree in trees for name, leaf in flatten(tree).items()})


def pick(tree: Any, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the tree with those leaves whose names are wanted."""
    return unflatten({name: leaf for name, leaf in flatten(tree).items() if wanted(name)})


def matrix_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the axes that the named parameter sums over and the axes that come out, counted from the end; None: no matrix."""
    return next(((inner, outer) for end, inner, outer in MATRICES if name.endswith(end)), None)


def is_adapter(name: str) -> bool:
    """Returns whether the name is that of a LoRA factor."""
    return name.endswith((DOWN, UP))


def is_scale(name: str) -> bool:
    """Returns whether the named parameter holds the scales of an int8 matrix."""
    return name.endswith(SCALE)


def is_multiplied(name: str) -> bool:
    """Returns whether the named parameter is a matrix, or a factor of one."""
    return is_adapter(name) or matrix_axes(name) is not None


def lr_factors(names: Collection[str], table: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Returns what each named parameter's learning rate is multiplied by; 0 is frozen.

    `table` pairs patterns (of whole names) with factors, and the first that matches counts, as in big_vision's `schedule`.
    An empty table trains everything; where there are LoRA adapters it trains these and nothing else.

    Raises:
      UserError: a parameter that no pattern matches, a pattern that no parameter is left for, or nothing to train.
    """
    scales = {name: 0.0 for name in names if is_scale(name)}
    names = [name for name in names if not is_scale(name)]
    if not table:
        adapters = any(map(is_adapter, names))
        return {name: float(is_adapter(name) or not adapters) for name in names} | scales
    try:
        patterns = [re.compile(pattern) for pattern, _ in table]
    except re.error as error:
        raise UserError(
            f"config.lr_factors: {error.pattern!r} is no regular expression: {error}"
        ) from None
    first = {
        name: next((i for i, p in enumerate(patterns) if p.fullmatch(name)), None) for name in names
    }
    lost = [name for name, i in first.items() if i is None]
    if lost:
        raise UserError(
            f"config.lr_factors says nothing of {', '.join(lost)}; a last ('.*', 0.0) would freeze the rest"
        )
    idle = [table[i][0] for i in range(len(table)) if i not in first.values()]
    if idle:
        raise UserError(
            f"config.lr_factors: {', '.join(map(repr, idle))} is the first match of no parameter, such as {names[0]}"
        )
    factors = {name: float(table[i][1]) for name, i in first.items() if i is not None}
    if not any(factors.values()):
        raise UserError("config.lr_factors freezes every parameter: nothing is left to train")
    return factors | scales
