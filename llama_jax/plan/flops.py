"""Floating-point operations that a traced program executes, loops unrolled.

Counted before the program is divided, so a device does its share of the sum. The compiler's own
`cost_analysis` counts the body of a loop once, which for a scanned model is a few percent of it.
"""

import math
from collections.abc import Iterator
from typing import Any


def executed_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a jaxpr: two for a multiply-add.

    A scan counts its length; a while loop, whose length is data, one pass; of the branches of a
    conditional the largest counts (they are also how one product is written for several platforms).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += _dot_flops(equation)
            case "scan":
                total += equation.params["length"] * executed_flops(equation.params["jaxpr"].jaxpr)
            case "cond":
                branches = equation.params["branches"]
                total += max(executed_flops(branch.jaxpr) for branch in branches)
            case _:
                total += sum(executed_flops(inner) for inner in _inner(equation))
    return total


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    a = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(a[i] for i in contracted)


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
