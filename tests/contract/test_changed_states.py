"""States that a user changes by hand, unusual gradients, curvature and containers, on the main optimizers."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import in_contract, make_gradients, make_params

import rootfree_optax as rf

OPTIMIZERS = {
    "sirf_muon": rf.sirf_muon,
    "sirf_shampoo": rf.sirf_shampoo,
    "kl_shampoo": rf.kl_shampoo,
    "rf_adamw": rf.rf_adamw,
    "rf_rmsprop": rf.rf_rmsprop,
}
over_all = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
over_two = pytest.mark.parametrize("make", [rf.sirf_shampoo, rf.rf_adamw])
over_matrix_methods = pytest.mark.parametrize(
    "make", [rf.sirf_shampoo, *map(in_contract, (rf.sirf_muon, rf.kl_shampoo))]
)

PARAMS = make_params()


def rms(tree: Any) -> list[float]:
    return [float(jnp.sqrt(jnp.mean(jnp.square(leaf)))) for leaf in jax.tree.leaves(tree)]


@over_two
def test_a_whole_equinox_model_may_be_given_to_update(make: Any) -> None:
    """With its activation, a function, and a bias, which has no factors."""
    model = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    loss = lambda model: jnp.mean(jnp.square(jax.vmap(model)(jnp.ones((5, 4)))))
    gradients, arrays = eqx.filter_grad(loss)(model), eqx.filter(model, eqx.is_inexact_array)
    tx = make(1e-2)
    found, _ = eqx.filter_jit(tx.update)(gradients, tx.init(arrays), model)
    expected, _ = jax.jit(tx.update)(gradients, tx.init(arrays), arrays)
    for update, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-9)


@over_all
def test_optax_sets_a_number_in_a_state(make: Any) -> None:
    tx = optax.inject_hyperparams(make)(learning_rate=1e-2)
    state = optax.tree.set(tx.init(PARAMS), learning_rate=jnp.float32(1e-3))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    assert optax.tree.get(state, "learning_rate") == jnp.float32(1e-3)
    rf.check(state, tx, PARAMS)


@over_two
def test_a_state_whose_numbers_are_set_to_zero_starts_anew(make: Any) -> None:
    tx, (gradient,) = make(1e-2, weight_decay=0.0), make_gradients(PARAMS, 1)
    update, start = jax.jit(tx.update), tx.init(PARAMS)
    _, state = update(gradient, start, PARAMS)
    is_number = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if is_number(leaf) else leaf, state)
    expected, _ = update(gradient, start, PARAMS)
    np.testing.assert_allclose(rms(update(gradient, zeros, PARAMS)[0]), rms(expected), rtol=0.6)


@over_two
def test_an_average_of_states_serves_or_is_refused_by_name(make: Any) -> None:
    tx, (gradient,) = make(1e-2, weight_decay=0.0), make_gradients(PARAMS, 1)
    update = jax.jit(tx.update)
    updates, state = update(gradient, tx.init(PARAMS), PARAMS)
    average = jax.tree.map(lambda a, b: (a + b) / 2, state, state)  # which turns integers into floats
    if make is rf.rf_adamw:
        np.testing.assert_allclose(rms(update(gradient, average, PARAMS)[0]), rms(updates), rtol=0.1)
    else:
        with pytest.raises(TypeError, match=r"integers for `exponent` .* got float32 and float32\. Cast"):
            update(gradient, average, PARAMS)


def test_complex_gradients_of_real_parameters_with_factors_are_refused_by_path() -> None:
    tx = rf.sirf_shampoo(1e-2)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.complex64), PARAMS)
    with pytest.raises(TypeError, match=r"gradients must be real floating point .* got complex64 at 'layer/bias'"):
        tx.update(gradient, tx.init(PARAMS), PARAMS)


@over_two
def test_narrow_gradients_do_not_lose_a_small_decay(make: Any) -> None:
    """Of float32 parameters that are cast before they are differentiated, at the start of a warm-up."""
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.02), PARAMS)
    gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float16), params)
    tx = make(1e-6, weight_decay=0.1)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    for update in jax.tree.leaves(updates):
        assert update.dtype == jnp.float32
        np.testing.assert_allclose(update, -2e-9, rtol=1e-5)


@over_two
@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
def test_gradients_that_are_not_floating_point_are_refused_by_path(make: Any, dtype: str) -> None:
    gradient = jax.tree.map(lambda leaf: leaf > 0, PARAMS)
    gradient["layer"]["bias"] = gradient["layer"]["bias"].astype(dtype)
    tx = make(1e-2)
    with pytest.raises(TypeError, match=rf"gradients must be .* got {dtype} at 'layer/bias'. Cast them"):
        tx.update(
            jax.tree.map(lambda g: g if g.ndim == 1 else g.astype(jnp.float32), gradient), tx.init(PARAMS), PARAMS
        )


@pytest.mark.parametrize("shape", [(64, 48), in_contract((3, 3, 8, 16))])
@over_matrix_methods
def test_where_few_entries_have_gradients_none_moves_far(make: Any, shape: tuple[int, ...]) -> None:
    """The rows of a table whose name no pattern knows, or one-hot inputs. One entry moved by 102 learning rates."""
    tx = make(1.0, weight_decay=0.0, layout=rf.Layout(diagonal=None))
    params = jnp.zeros(shape)
    update = jax.jit(tx.update)
    for chosen in ((3,) if len(shape) == 2 else (0, 2), tuple(length // 2 for length in shape)):
        state = tx.init(params)
        for _ in range(3):
            updates, state = update(params.at[chosen].set(0.5), state, params)
            assert 0.3 < jnp.abs(updates).max() <= 2.5 + 1e-5


@over_matrix_methods
def test_an_entry_among_many_tiny_ones_does_not_move_far(make: Any) -> None:
    """One of 256×256 moved by up to 124 learning rates."""
    tx = make(1.0, weight_decay=0.0)
    params = jnp.zeros((256, 256))
    update, state = jax.jit(tx.update), tx.init(params)
    tiny = 1e-7 * jax.random.normal(jax.random.key(0), (5, *params.shape))
    for gradient in tiny:
        updates, state = update(gradient.at[3, 5].multiply(1e7), state, params)
        assert jnp.abs(updates).max() < 25.01
    assert rf.info(state)["shortened"] > 0


@over_matrix_methods
def test_the_size_of_another_curvature_changes_no_length(make: Any) -> None:
    """Of a mean, where the gradients are of a sum: steps were shorter in proportion."""
    params = jnp.zeros((16, 16))
    gradients = jax.random.normal(jax.random.key(0), (12, 16, 16))

    def last(scale: float) -> jax.Array:
        tx = make(1.0, weight_decay=0.0)
        update, state = jax.jit(tx.update), tx.init(params)
        for gradient in gradients:
            updates, state = update(gradient, state, params, curvature=scale * gradient)
        return updates

    np.testing.assert_allclose(last(1e-3), last(1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("silence", [in_contract("zeros"), "none"])
@over_matrix_methods
def test_a_matrix_that_fell_silent_does_not_hold_up_the_others(make: Any, silence: str) -> None:
    """Its gradients were ten orders of magnitude larger: beside them the others' might have been rounding noise."""
    noise = jax.random.normal(jax.random.key(0), (12, 8, 8))
    params = {"loud": jnp.zeros((8, 8)), "quiet": jnp.zeros((8, 8))}
    tx = make(1.0, weight_decay=0.0)
    update, state = jax.jit(tx.update), tx.init(params)
    for step, gradient in enumerate(noise):
        loud = 1e10 * gradient if step < 4 else jnp.zeros((8, 8)) if silence == "zeros" else None
        updates, state = update({"loud": loud, "quiet": gradient}, state, params)
        if 1 <= step < 4:
            assert rms(updates["quiet"])[0] < 1e-3
        elif step > 4:
            assert rms(updates["quiet"])[0] > 0.3


def test_each_state_of_a_population_is_checked() -> None:
    population = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), PARAMS)
    tx = rf.rf_adamw(1e-2)
    states = jax.vmap(tx.init)(population)
    rf.check(states, tx, PARAMS)
    other = tx.init({"layer": {"kernel": PARAMS["layer"]["kernel"]}})
    codes = jnp.stack([optax.tree.get(tx.init(PARAMS), "code"), optax.tree.get(other, "code")])
    with pytest.raises(ValueError, match="'layer/bias' is new"):
        rf.check(optax.tree.set(states, code=codes), tx, PARAMS)


def test_checksums_take_random_keys_and_integers_of_four_bits() -> None:
    of = lambda seed, number: rf.checksum({"key": jax.random.key(seed), "codes": jnp.full(3, number, jnp.int4)})
    assert len({int(of(0, 1)), int(of(1, 1)), int(of(0, 2))}) == 3


def test_an_interval_beyond_its_counter_or_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="refresh_every must be a whole number of at least 1 and below 2³¹, got 1099"):
        rf.sirf_muon(1e-3, refresh_every=2**40)
    for answer in (None, jnp.array([True])):
        tx = rf.sirf_muon(1e-3, refresh_every=lambda count, answer=answer: answer)
        with pytest.raises(TypeError, match="a Boolean scalar, got"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Arrays:
    """Parameters whose class holds nothing but arrays, as those of jaxtyping or beartype."""

    kernel: jax.Array
    bias: jax.Array

    def __post_init__(self) -> None:
        if not all(isinstance(leaf, jax.Array) for leaf in (self.kernel, self.bias)):
            raise TypeError(f"arrays are needed, got {self.kernel!r} and {self.bias!r}")


@over_two
def test_a_class_that_holds_nothing_but_arrays_may_hold_the_parameters(make: Any) -> None:
    params, tx = Arrays(jnp.ones((4, 3)), jnp.ones(3)), make(1e-2)
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(params, state, params)
        assert isinstance(updates, Arrays)
    rf.check(state, tx, params)
    assert rf.describe(tx, params, compile=True).compiled.flops > 0


@over_all
def test_eager_updates_make_no_infinity(make: Any) -> None:
    tx = make(1e-2)
    with jax.debug_infs(True):
        state = tx.init(PARAMS)
        for _ in range(2):
            _, state = tx.update(PARAMS, state, PARAMS)


def test_to_ascend_gradients_are_negated() -> None:
    with pytest.raises(ValueError, match=r"learning_rate must be .* \(to ascend, negate the gradients\), got -0.001"):
        rf.sirf_muon(-1e-3)


def test_what_updates_the_rest_is_given_the_batch_size_and_the_curvature() -> None:
    rest = rf.scale_by_rf_adam(step_size="newton", damping=0.0)
    tx = rf.scale_by_sirf_shampoo(step_size="newton", layout=rf.Layout(), rest=rest)
    samples = jax.tree.map(lambda leaf: jnp.stack([2 * leaf, 4 * leaf]), PARAMS)
    found, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch_size=8, curvature=samples)
    np.testing.assert_allclose(found["layer"]["bias"], 1 / (8 * 10 * PARAMS["layer"]["bias"]), rtol=1e-5)


def test_a_description_compiles_with_the_arguments_that_a_chain_needs() -> None:
    value_fn = lambda params: optax.tree.sum(jax.tree.map(jnp.sum, params))
    tx = optax.chain(rf.sirf_muon(1.0), optax.scale_by_backtracking_linesearch(3))
    given = {"value": 1.0, "grad": PARAMS, "value_fn": value_fn}
    assert rf.describe(tx, PARAMS, compile=True, **given).compiled.flops > 0
