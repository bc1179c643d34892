"""Optax gradient transformations for adaptive methods without the square root.

Root-free diagonal methods after Lin et al., Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order
Perspective (ICML 2024, https://arxiv.org/abs/2402.03496).
"""

from rootfree_optax.alias import rf_adamw, rf_rmsprop
from rootfree_optax.diagonal import ScaleByRfAdamState, ScaleByRfRmsState, scale_by_rf_adam, scale_by_rf_rms

__version__ = "0.1.0"

__all__ = [
    "ScaleByRfAdamState",
    "ScaleByRfRmsState",
    "rf_adamw",
    "rf_rmsprop",
    "scale_by_rf_adam",
    "scale_by_rf_rms",
]
