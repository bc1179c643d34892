"""One step of a stack: the momentum of gradients, and what is kept of a block's last step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kronecker_runs import compile_run, draw, run

import rootfree_optax as rf


@dataclasses.dataclass(frozen=True)
class Double(rf.BlockRule):
    """A rule that steps along twice the momentum, and keeps the gradient that it is given."""

    def init(self, structures, dtypes):
        return jnp.zeros([s.dim for s in structures])

    def precondition(self, state, momentum, *, gradient, structures, step):
        return 2 * momentum, gradient.astype(state.dtype)


def test_the_sizes_of_each_direction_and_gradient_are_kept():
    gradients = draw({"a": (4, 3), "b": (4, 3), "v": (5,)}, steps=3)
    gradients["b"][1] = 0
    tx = rf.scale_by_kronecker(Double(), momentum=0.5)
    for stack in tx.init({"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3))}).stacks:
        np.testing.assert_array_equal(stack.squared_norm, [0, 0])
        np.testing.assert_array_equal(stack.size, [12, 12])
    directions, states = run(tx, gradients)
    matrices, vector = states.stacks
    norms = np.stack([np.sum(np.square(directions[name]), axis=(1, 2)) for name in "ab"], axis=1)
    assert norms.min() > 0.1  # the momentum goes on where a gradient is zero
    np.testing.assert_allclose(matrices.squared_norm, norms, rtol=1e-5)
    np.testing.assert_allclose(vector.squared_norm[:, 0], np.sum(np.square(directions["v"]), axis=1), rtol=1e-5)
    largest = np.stack([np.max(np.abs(gradients[name]), axis=(1, 2)) for name in "ab"], axis=1)
    assert largest[1, 1] == 0
    np.testing.assert_array_equal(matrices.largest_gradient, largest)
    np.testing.assert_array_equal(matrices.size, np.full((3, 2), 12))
    np.testing.assert_array_equal(vector.size, np.full((3, 1), 5))


def test_the_squared_norm_of_half_precision_directions_is_of_single_precision():
    """10³ squared is beyond float16's range."""
    gradients = {"w": np.full((1, 40, 60), 500, np.float16)}
    _, states = run(rf.scale_by_kronecker(Double()), gradients)
    assert states.stacks[0].squared_norm.dtype == jnp.float32
    np.testing.assert_allclose(states.stacks[0].squared_norm, [[2400e6]], rtol=1e-4)


def test_without_momentum_the_rule_is_given_the_gradient_and_none_is_kept():
    gradients = draw({"w": (4, 3)})
    directions, states = run(rf.scale_by_kronecker(Double()), gradients)
    assert states.stacks[0].momentum is None
    np.testing.assert_array_equal(directions["w"], 2 * gradients["w"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_heavy_ball_of_the_gradients_with_weights_that_add_up_to_one(nesterov):
    gradients = draw({"w": (4, 3), "v": (5,)}, steps=5)
    directions, states = compile_run(lambda m: rf.scale_by_kronecker(Double(), momentum=m, nesterov=nesterov))(
        gradients, 0.8
    )
    velocity = total = 0.0
    for step, g in enumerate(np.float64(gradients["w"])):
        velocity, total = 0.8 * velocity + g, 0.8 * total + 1
        average, weight = (g + 0.8 * velocity, 1 + 0.8 * total) if nesterov else (velocity, total)
        np.testing.assert_allclose(directions["w"][step], 2 * average / weight, rtol=1e-5)
        np.testing.assert_allclose(states.stacks[1].momentum[step, 0], velocity, rtol=1e-5)
    np.testing.assert_array_equal(states.stacks[1].block[:, 0], gradients["w"])  # the gradient itself is given, too


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_an_entry_that_is_not_finite_shows_once_and_leaves_its_momentum(value):
    gradients = draw({"w": (4, 3)}, steps=4)
    gradients["w"][1, 2, 1] = value
    directions, states = run(rf.scale_by_kronecker(Double(), momentum=0.8), gradients)
    is_bad = ~np.isfinite(directions["w"])
    assert is_bad[1, 2, 1]
    assert is_bad.sum() == 1
    [stack] = states.stacks
    assert stack.momentum[1, 0, 2, 1] == stack.momentum[0, 0, 2, 1] == gradients["w"][0, 2, 1]
    assert not np.isfinite(stack.squared_norm[1, 0])
    assert not np.isfinite(stack.largest_gradient[1, 0])
    assert np.isfinite(stack.squared_norm[2, 0])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_momentum_has_its_own_dtype_or_the_widest_of_the_stacks_parameters(dtype):
    params = {"a": jnp.zeros((4, 3)), "b": jnp.zeros((4, 3), jnp.bfloat16), "h": jnp.zeros(3, jnp.float16)}
    tx = rf.scale_by_kronecker(Double(), momentum=0.9, mu_dtype=dtype)
    both, half = jax.eval_shape(tx.init, params).stacks
    assert (half.momentum.dtype, both.momentum.dtype) == (
        ("float16", "float32") if dtype is None else ("bfloat16", "bfloat16")
    )
