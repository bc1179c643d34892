"""The published optimizers have the defaults that their documentation gives, which golden trajectories do not show."""

import inspect

import pytest

import rootfree_optax as rf

DEFAULTS = {
    "rf_rmsprop": {"decay": 0.8, "damping": 5e-4, "momentum": 0.9, "initial_scale": 1.0},
    "rf_adamw": {"b1": 0.4, "b2": 0.9, "damping": 1e-6, "weight_decay": 1e-4, "initial_scale": 1.0},
    "rf_shampoo": {"preconditioner_lr": 0.2, "damping": 2e-4, "momentum": 0.6, "refresh_every": 1},
    "sirf_shampoo": {
        "preconditioner_lr": 0.2,
        "damping": 2e-4,
        "momentum": 0.9,
        "riemannian_momentum": 0.5,
        "initial_scale": 1.0,
        "refresh_every": 1,
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(rf.published, name)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]
