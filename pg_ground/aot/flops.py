"""Counts the operations of a program, and the bytes of its matrix products, in its jaxpr.

The body of a loop counts once per iteration.
"""

import math
from collections.abc import Callable
from functools import partial
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
    return int(_total(jaxpr, while_trip_count, _product_flops))


def product_bytes(jaxpr: core.Jaxpr, while_trip_count: int, batch_devices: int) -> float:
    """Returns an upper bound on the bytes of operands and results of a program's matrix products on
    one device.

    The batch is split over the devices, and so are the results. The jaxpr does not say which of the
    two operands is a weight, which a device may read whole. The larger sum counts.

    Args:
      batch_devices: the number of devices that split the batch.
    """
    return _total(jaxpr, while_trip_count, partial(_product_bytes, batch_devices=batch_devices))


def _total(
    jaxpr: core.Jaxpr, while_trip_count: int, measure: Callable[[Any], float | None]
) -> float:
    """Returns the sum of `measure` over all equations of a program, as often as each of them runs.

    `measure` returns None for an equation that is no matrix product.
    """

    def total(jaxpr: core.Jaxpr) -> float:
        return sum(map(of_equation, jaxpr.eqns))

    def of_equation(equation: Any) -> float:
        measured = measure(equation)
        if measured is not None:
            return measured
        name = equation.primitive.name
        params = equation.params
        if name == "while":
            return while_trip_count * total(params["body_jaxpr"].jaxpr)
        if name == "cond":  # for example the variants of a platform: one variant is compiled
            return max(total(branch.jaxpr) for branch in params["branches"])
        repeats = params["length"] if name == "scan" else 1
        return repeats * sum(map(total, _inner_jaxprs(params)))

    return total(jaxpr)


def _product_flops(equation: Any) -> float | None:
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
    return None


def _product_bytes(equation: Any, batch_devices: int) -> float | None:
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    left, right, result = (
        math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
        for variable in (*equation.invars[:2], equation.outvars[0])
    )
    operands = max(left / batch_devices + right, left + right / batch_devices)
    return operands + result / batch_devices


def _inner_jaxprs(params: Any) -> list[core.Jaxpr]:
    """Returns the jaxprs among the parameters of an equation."""
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if isinstance(jaxpr, core.Jaxpr):
                jaxprs.append(jaxpr)
    return jaxprs
