"""From parameters to stacks of blocks, and back: what a preconditioner's factors belong to."""

from rootfree_optax.layout.group import Group
from rootfree_optax.layout.layout import Layout
from rootfree_optax.layout.plan import Block, Plan
from rootfree_optax.layout.ready_groups import as_matrix, flatten, weight_and_bias
from rootfree_optax.layout.stack import Stack

__all__ = ["Block", "Group", "Layout", "Plan", "Stack", "as_matrix", "flatten", "weight_and_bias"]
