"""Floating-point operations of a program, counted in its jaxpr, loops as often as they turn."""

import math
from typing import Any

from jax.extend import core


def count(jaxpr: core.Jaxpr, turns: int) -> int:
    """Returns two operations for each multiplication of a program's matrix products, over all devices, recomputation included.

    Args:
      turns: of loops that end by a condition (`while`), such as that over the tokens of a completion.
    """
    return sum(_of(equation, turns) for equation in jaxpr.eqns)


def _of(equation: Any, turns: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(left[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
    if name == "while":
        return turns * count(params["body_jaxpr"].jaxpr, turns)
    if name == "cond":  # of a platform's variants one is compiled
        return max(count(branch.jaxpr, turns) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(count(inner, turns) for inner in _inner(params))


def _inner(params: Any) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if isinstance(one, core.Jaxpr):
                found.append(one)
    return found
