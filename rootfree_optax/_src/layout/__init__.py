"""From parameters to stacks of blocks, and back."""

from rootfree_optax._src.layout.group import Group, as_matrix, flatten, weight_and_bias
from rootfree_optax._src.layout.layout import Layout
from rootfree_optax._src.layout.paths import EMBEDDINGS
from rootfree_optax._src.layout.plan import Plan
from rootfree_optax._src.layout.stack import Stack

__all__ = ["EMBEDDINGS", "Group", "Layout", "Plan", "Stack", "as_matrix", "flatten", "weight_and_bias"]
