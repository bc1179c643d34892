"""Structured matrices for the factors of Kronecker preconditioners."""

from rootfree_optax._src.structures.base import Flops, Parts, Structure
from rootfree_optax._src.structures.block_pattern import BlockPattern
from rootfree_optax._src.structures.names import (
    STRUCTURE_NAMES,
    StructureFactory,
    block_diagonal,
    corner_diagonal,
    dense,
    diagonal,
    hierarchical,
    structure_factory,
    triangular_toeplitz,
)
from rootfree_optax._src.structures.segment import Segment
from rootfree_optax._src.structures.toeplitz import TriangularToeplitz

__all__ = [
    "STRUCTURE_NAMES",
    "BlockPattern",
    "Flops",
    "Parts",
    "Segment",
    "Structure",
    "StructureFactory",
    "TriangularToeplitz",
    "block_diagonal",
    "corner_diagonal",
    "dense",
    "diagonal",
    "hierarchical",
    "structure_factory",
    "triangular_toeplitz",
]
