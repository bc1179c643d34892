"""Optax optimizers that know the curvature, made of matrix products.

SIRF-Muon, SIRF-Shampoo, KL-Shampoo and the root-free diagonal methods. `published` is the paper to the letter: Lin et
al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective (ICML 2024,
https://arxiv.org/abs/2402.03496).
"""

from rootfree_optax import published
from rootfree_optax._src.blocks.rule import BlockFlops, BlockRule, Step
from rootfree_optax._src.common.schedules import growing, staggered
from rootfree_optax._src.layout import EMBEDDINGS, Group, Layout, Plan, as_matrix, flatten, weight_and_bias
from rootfree_optax._src.mesh.state_shardings import state_shardings
from rootfree_optax._src.optimizers.diagonal import rf_adamw, rf_rmsprop
from rootfree_optax._src.optimizers.kronecker import kl_shampoo, sirf_muon, sirf_shampoo
from rootfree_optax._src.structures.base import Structure
from rootfree_optax._src.transforms.check import check
from rootfree_optax._src.transforms.checksum import checksum
from rootfree_optax._src.transforms.curvature import scale_by_kl_shampoo, scale_by_sirf_muon, scale_by_sirf_shampoo
from rootfree_optax._src.transforms.describe import describe
from rootfree_optax._src.transforms.diagonal import ScaleByRfState, scale_by_rf_adam, scale_by_rf_rms
from rootfree_optax._src.transforms.factors import factors
from rootfree_optax._src.transforms.info import info
from rootfree_optax._src.transforms.kronecker import ScaleByKroneckerState, scale_by_kronecker
from rootfree_optax._src.transforms.migrate import migrate
from rootfree_optax._src.transforms.move_state import move_state

__version__ = "0.1.0"

__all__ = [
    "EMBEDDINGS",
    "BlockFlops",
    "BlockRule",
    "Group",
    "Layout",
    "Plan",
    "ScaleByKroneckerState",
    "ScaleByRfState",
    "Step",
    "Structure",
    "as_matrix",
    "check",
    "checksum",
    "describe",
    "factors",
    "flatten",
    "growing",
    "info",
    "kl_shampoo",
    "migrate",
    "move_state",
    "published",
    "rf_adamw",
    "rf_rmsprop",
    "scale_by_kl_shampoo",
    "scale_by_kronecker",
    "scale_by_rf_adam",
    "scale_by_rf_rms",
    "scale_by_sirf_muon",
    "scale_by_sirf_shampoo",
    "sirf_muon",
    "sirf_shampoo",
    "staggered",
    "state_shardings",
    "weight_and_bias",
]
