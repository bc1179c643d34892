"""How many operations the matrix products of a traced program take on one device."""

import math
from typing import Any

import jax


def product_flops(closed: Any) -> float:
    """Returns the operations of all products within `jax.shard_map`, for one device.

    A compiler's own count has the body of a loop once. Here it has it as often as it runs, and of a conditional the
    branch with the most.

    Args:
      closed: what `jax.make_jaxpr` returns.
    """
    return _of(closed.jaxpr, inside=False)


def _of(jaxpr: Any, *, inside: bool) -> float:
    return sum(_of_equation(equation, inside=inside) for equation in jaxpr.eqns)


def _of_equation(equation: Any, *, inside: bool) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        left, right = (variable.aval.shape for variable in equation.invars)
        shared = math.prod(left[axis] for axis in (*contracted, *batch))
        return inside * 2.0 * math.prod(left) * math.prod(right) / shared
    inside = inside or name == "shard_map"
    bodies = [getattr(body, "jaxpr", body) for body in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)]
    counts = [_of(body, inside=inside) for body in bodies if hasattr(body, "eqns")]
    if name == "cond":
        return max(counts)
    return params.get("length", 1) * sum(counts) if name == "scan" else sum(counts)


def _is_jaxpr(node: Any) -> bool:
    return hasattr(node, "jaxpr") or hasattr(node, "eqns")
