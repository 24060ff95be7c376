"""The optax chain of a stage."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from pg_ground.config import Optimizer

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
"""The matrices among big_vision's parameters, which muon orthogonalises; embeddings, norms and biases are not among them."""


def schedule(c: Optimizer, steps: int) -> optax.Schedule:
    """Returns learning rate by update: a linear warm-up from 0, then `c.schedule`, reaching 0 after `steps` unless constant."""
    rest = max(steps - c.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(c.lr),
        "linear": optax.linear_schedule(c.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(c.lr, rest),
    }[c.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, c.lr, max(c.warmup_steps, 1)), after], [c.warmup_steps])


def optimizer(c: Optimizer, steps: int) -> optax.GradientTransformation:
    """Returns the chain for a stage of `steps` updates: clip by global norm, then adamw (arXiv 1711.05101) or muon."""
    lr = schedule(c, steps)
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    if c.name == "adamw":
        return optax.chain(clip, optax.adamw(lr, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay))
    orthogonal = muon(
        lr,
        weight_decay=c.weight_decay,
        adam_b1=c.b1,
        adam_b2=c.b2,
        adam_weight_decay=c.weight_decay,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(clip, orthogonal)


def matrices(params: Any) -> Any:
    """Returns the tree of `params` with the matrix axes of each leaf that is a matrix, None elsewhere."""

    def axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        name = "/".join(str(key.key) for key in path)
        found = [(i, o) for end, i, o in MATRICES if name.endswith(end)]
        if not found:
            return None
        (inner, outer), rank = found[0], leaf.ndim
        return MuonDimensionNumbers(tuple(rank + a for a in inner), tuple(rank + a for a in outer))

    return jax.tree_util.tree_map_with_path(axes, params)
