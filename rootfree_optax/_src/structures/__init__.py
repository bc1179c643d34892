"""Sets of structured matrices, for the factors of Kronecker preconditioners."""

from rootfree_optax._src.structures.base import Flops, Parts, Structure
from rootfree_optax._src.structures.block_diagonal import BlockDiagonal
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
from rootfree_optax._src.structures.toeplitz import TriangularToeplitz

__all__ = [
    "STRUCTURE_NAMES",
    "BlockDiagonal",
    "BlockPattern",
    "Flops",
    "Parts",
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
