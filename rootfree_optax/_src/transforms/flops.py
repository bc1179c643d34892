"""How many operations the products of a block rule take: counted in its traced functions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rootfree_optax._src.blocks.rule import BlockFlops, BlockRule, Step, Structures


def count_flops(rule: BlockRule, structures: Structures) -> BlockFlops:
    """Returns the operations of a rule's products for one block."""
    step = Step(*[jnp.float32(1)] * len(Step._fields))._replace(count=jnp.int32(0))
    gradient = jax.ShapeDtypeStruct(tuple([structure.dim for structure in structures]), jnp.float32)
    state = jax.eval_shape(lambda: rule.init(structures, [jnp.dtype(jnp.float32)] * len(structures)))

    def count(function: Callable[..., Any], **others: Any) -> int:
        traced = lambda state, g: function(state, g, structures=structures, step=step, **dict.fromkeys(others, g))
        return count_products(jax.make_jaxpr(traced)(state, gradient))

    return BlockFlops(count(rule.observe), count(rule.refresh), count(rule.precondition, gradient=None))


def count_products(program: Any) -> int:
    """Returns the operations of all matrix products, triangular solves and Cholesky factors of a traced program.

    A compiler's own count has the body of a loop once. Here it has it as often as it runs, and of a conditional the
    branch with the most.

    Args:
      program: what `jax.make_jaxpr` returns, or a part of it.
    """
    return sum(map(_count_in_equation, program.eqns))


def _count_in_equation(equation: Any) -> int:
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            return 2 * math.prod([*result, *[left[axis] for axis in contracted]])
        case "triangular_solve":
            matrix, right = [variable.aval.shape for variable in equation.invars]
            return math.prod(right) * matrix[-1]
        case "cholesky":
            *_, d = shape = equation.invars[0].aval.shape
            return math.prod(shape) * d // 3
        case name:
            parts = [part for part in jax.tree.leaves(equation.params) if hasattr(part, "eqns")]
            counts = [count_products(getattr(part, "jaxpr", part)) for part in parts] or [0]
            return max(counts) if name == "cond" else equation.params.get("length", 1) * sum(counts)
