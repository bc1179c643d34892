"""Optax gradient transformations for adaptive methods without the square root.

Root-free diagonal methods, root-free Shampoo and inverse-free structured Shampoo, after Lin et al., Can We Remove the
Square-Root in Adaptive Gradient Methods? A Second-Order Perspective (ICML 2024, https://arxiv.org/abs/2402.03496).
"""

from rootfree_optax._src.common.schedules import averaging_schedule, growing_interval
from rootfree_optax._src.layout import EMBEDDINGS, Group, Layout, Plan, as_matrix, flatten, weight_and_bias
from rootfree_optax._src.mesh.state_shardings import state_shardings
from rootfree_optax._src.optimizers.diagonal import rf_adamw, rf_rmsprop
from rootfree_optax._src.optimizers.kronecker import rf_shampoo, sirf_shampoo
from rootfree_optax._src.transforms.diagonal import (
    ScaleByRfAdamState,
    ScaleByRfRmsState,
    scale_by_rf_adam,
    scale_by_rf_rms,
)
from rootfree_optax._src.transforms.kronecker import ScaleBySirfShampooState, scale_by_sirf_shampoo
from rootfree_optax._src.transforms.kronecker_inverse import ScaleByRfShampooState, scale_by_rf_shampoo

__version__ = "0.1.0"

__all__ = [
    "EMBEDDINGS",
    "Group",
    "Layout",
    "Plan",
    "ScaleByRfAdamState",
    "ScaleByRfRmsState",
    "ScaleByRfShampooState",
    "ScaleBySirfShampooState",
    "as_matrix",
    "averaging_schedule",
    "flatten",
    "growing_interval",
    "rf_adamw",
    "rf_rmsprop",
    "rf_shampoo",
    "scale_by_rf_adam",
    "scale_by_rf_rms",
    "scale_by_rf_shampoo",
    "scale_by_sirf_shampoo",
    "sirf_shampoo",
    "state_shardings",
    "weight_and_bias",
]
