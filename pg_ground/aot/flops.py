"""Counts the floating-point operations of a program in its jaxpr.

The body of a loop counts once per iteration.
"""

import math
from typing import Any

from jax.extend import core


def count(jaxpr: core.Jaxpr, while_trip_count: int) -> int:
    """Returns the operations of a program's matrix products, over all devices.

    A multiplication counts as two operations. Recomputation (remat) counts too.

    Args:
      jaxpr: the program.
      while_trip_count: the iterations of each `while` loop, for example the loop over the tokens of
        a completion. The jaxpr does not say how often a `while` loop runs.
    """
    return sum(_equation_flops(equation, while_trip_count) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, while_trip_count: int) -> int:
    name = equation.primitive.name
    params = equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        multiplications = math.prod(left[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * multiplications
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
    if name == "while":
        return while_trip_count * count(params["body_jaxpr"].jaxpr, while_trip_count)
    if name == "cond":  # for example the variants of a platform: one variant is compiled
        return max(count(branch.jaxpr, while_trip_count) for branch in params["branches"])
    repeats = params["length"] if name == "scan" else 1
    return repeats * sum(count(inner, while_trip_count) for inner in _inner_jaxprs(params))


def _inner_jaxprs(params: Any) -> list[core.Jaxpr]:
    """Returns the jaxprs among the parameters of an equation."""
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if isinstance(jaxpr, core.Jaxpr):
                jaxprs.append(jaxpr)
    return jaxprs
