"""Parameter trees by name: which parameters are matrices, and which are trained.

Names are big_vision's, joined by slashes.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from pg_ground.types import UserError

AbstractParams = dict[str, jax.ShapeDtypeStruct]
"""Shape, dtype and (if it is decided) sharding of parameters, by slash-joined name."""

MATRICES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    # (end of the name, axes that a product sums over, axes of its result). The axes before them
    # (layers, parts) are a batch of matrices.
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
"""The matrices among big_vision's parameters. muon orthogonalises them, and LoRA adapts them.

Embeddings, norms and biases are not matrices.
"""

DOWN, UP = "_lora_a", "_lora_b"
"""Added to the name of a matrix to name the two factors of its LoRA adapter."""


SCALE = "_scale"
"""Added to the name of a frozen int8 matrix to name its scales: see `models.quantization`."""


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts by their slash-joined names, sorted."""
    leaves: dict[str, Any] = {}

    def walk(node: PyTree, path: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for name in sorted(node):
                walk(node[name], (*path, name))
        else:
            leaves["/".join(path)] = node

    walk(tree, ())
    return leaves


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


def map_named(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Returns the tree of `f(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f("/".join(str(key.key) for key in path), leaf), tree
    )


def join(*trees: PyTree) -> dict[str, Any]:
    """Returns one tree with the leaves of all. A later tree replaces leaves of the same name."""
    return unflatten({name: leaf for tree in trees for name, leaf in flatten(tree).items()})


def pick(tree: PyTree, is_picked: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the tree of the leaves for whose names `is_picked` is True."""
    return unflatten({name: leaf for name, leaf in flatten(tree).items() if is_picked(name)})


def matrix_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the axes of a matrix that a product sums over, and the axes of the result.

    Axes are counted from the end. Returns None if the named parameter is not a matrix.
    """
    return next(((inner, outer) for end, inner, outer in MATRICES if name.endswith(end)), None)


def is_adapter(name: str) -> bool:
    """Returns whether the named parameter is a factor of a LoRA adapter."""
    return name.endswith((DOWN, UP))


def is_scale(name: str) -> bool:
    """Returns whether the named parameter holds the scales of an int8 matrix."""
    return name.endswith(SCALE)


def is_multiplied(name: str) -> bool:
    """Returns whether the named parameter is a matrix or a factor of a LoRA adapter."""
    return is_adapter(name) or matrix_axes(name) is not None


def lr_factors(names: Collection[str], table: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Returns the factor of each parameter's learning rate; 0 means that it is frozen.

    Args:
      table: pairs of a pattern for whole names and a factor. The first match counts, as in
        big_vision's `schedule`. An empty table trains all adapters, or everything without adapters.

    Raises:
      UserError: no pattern matches a parameter, a pattern is the first match of no parameter, or no
        parameter is trained.
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
            f"config.lr_factors: {error.pattern!r} is not a regular expression: {error}"
        ) from None
    first = {
        name: next((i for i, p in enumerate(patterns) if p.fullmatch(name)), None) for name in names
    }
    unmatched = [name for name, i in first.items() if i is None]
    if unmatched:
        raise UserError(
            f"config.lr_factors has no pattern for {', '.join(unmatched)}; "
            "a last ('.*', 0.0) freezes all other parameters"
        )
    unused = [table[i][0] for i in range(len(table)) if i not in first.values()]
    if unused:
        raise UserError(
            f"config.lr_factors: {', '.join(map(repr, unused))} is the first match of no "
            f"parameter, such as {names[0]}"
        )
    factors = {name: float(table[i][1]) for name, i in first.items() if i is not None}
    if not any(factors.values()):
        raise UserError("config.lr_factors freezes every parameter: no parameter is trained")
    return factors | scales
