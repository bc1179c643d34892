"""SIRF-Shampoo as published, which is what the official package does: this library does otherwise by default."""

TRANSFORMATION = {"preconditioner_lr": 0.2, "riemannian_momentum": 0.5, "refresh": "published", "initial_scale": 1.0}
OPTIMIZER = {**TRANSFORMATION, "momentum": 0.9, "momentum_of": "directions", "nesterov": False}
