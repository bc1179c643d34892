"""Bytes of the optimizer's state, for each structure of the factors, beside Adam's."""

from typing import Any

import jax
import jax.numpy as jnp
import trees
from harness import program, published, report

import rootfree_optax as rf
from rootfree_optax._src.layout.factors import find_factors
from rootfree_optax._src.structures import STRUCTURE_NAMES

STRUCTURES = (None, *STRUCTURE_NAMES)

TITLE = "State on {tree}, {parameters:.2f} million parameters, axes cut into blocks of {block_size}"
CAPTION = (
    "factors: K and its Riemannian momentum, as the plan's table says and as they are. state: with heavy-ball momentum "
    "in float32 and step counts. /Adam: over two float32 numbers per parameter."
)
COLUMNS = (
    report.Column("structure", "structure"),
    report.Column("dtype", "factors'\ndtype"),
    report.Column("factor_bytes", "factors\nMB", ".2f", 1e-6),
    report.Column("state_bytes", "state\nMB", ".2f", 1e-6),
    report.Column("state_ratio", "state\n/Adam", ".3f"),
)


def measure(shapes: trees.Shapes, block_size: int) -> list[dict[str, Any]]:
    """Returns one record per structure and dtype. Nothing is allocated.

    Raises:
      AssertionError: if the plan's table tells other bytes than a state has.
    """
    return [
        _record(shapes, structure, dtype, block_size) for structure in STRUCTURES for dtype in ("bfloat16", "float32")
    ]


def _record(shapes: trees.Shapes, structure: str | None, dtype: str, block_size: int) -> dict[str, Any]:
    params = trees.abstract(shapes)
    layout = rf.Layout(structure=structure, block_size=block_size, factor_dtype=jnp.dtype(dtype))
    tx = rf.sirf_shampoo(1e-3, batch_size=256, layout=layout, preconditioner_dtype=dtype, **published.OPTIMIZER)
    state = jax.eval_shape(tx.init, params)
    plan = layout.plan(params)
    kept = program.tree_bytes(_factors_and_momenta(plan, state))
    told = plan.state_bytes(riemannian_momentum=True)
    assert kept == told, f"the state has {kept} bytes of factors, the plan tells {told}"
    state_bytes = program.tree_bytes(state)
    return {
        "structure": structure or "the default",
        "dtype": dtype,
        "factor_bytes": told,
        "state_bytes": state_bytes,
        "state_ratio": state_bytes / (8 * trees.size(shapes)),
    }


def _factors_and_momenta(plan: rf.Plan, state: Any) -> Any:
    has_factors = lambda node: hasattr(node, "factors")
    [node] = [node for node in jax.tree.leaves(state, is_leaf=has_factors) if has_factors(node)]
    return find_factors(state, plan.stacks), node.momenta
