"""A state belongs to its options and parameters: others are refused by name, eagerly, when traced, after a restore."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import refuses

import rootfree_optax as rf
from rootfree_optax._src.transforms.origin import Origin, describe_origin, make_origin, require_origin

PARAMS = {"embedding": jnp.ones((6, 4)), "a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((8, 6))}
B = {"batch_size": 8}
MAKERS = {
    "sirf_muon": rf.sirf_muon,
    "sirf_shampoo": rf.sirf_shampoo,
    "rf_rmsprop": rf.rf_rmsprop,
    "rf_adamw": rf.rf_adamw,
    "published.sirf_shampoo": rf.published.sirf_shampoo,
    "published.rf_adamw": rf.published.rf_adamw,
    "published.rf_rmsprop": rf.published.rf_rmsprop,
}


def make(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return MAKERS[name](1e-3, **{**(B if name.startswith("published") else {}), **options})


def traced(state_of: optax.GradientTransformation, tx: optax.GradientTransformation, params: Any = PARAMS) -> None:
    """Traces an update of one optimizer with another's state."""
    state = jax.eval_shape(lambda: state_of.init(PARAMS))
    jax.eval_shape(tx.update, params, state, params)


def restored(saved: Any, template: Any) -> Any:
    """Returns what a checkpoint makes of a template: the arrays of the one, all static data of the other."""
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(saved))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("sirf_muon", {"power": 0.25}, {"power": 0.125}, "power was 0.25 and is 0.125"),
        ("sirf_muon", {"momentum": None}, {}, "momentum was None and is 'a number'"),
        ("sirf_muon", {}, {"mu_dtype": jnp.bfloat16}, "mu_dtype was None and is 'bfloat16'"),
        ("rf_rmsprop", {}, {"momentum": None}, "momentum was 'a number' and is None"),
        ("rf_rmsprop", {"mu_dtype": jnp.bfloat16}, {}, "mu_dtype was 'bfloat16' and is None"),
        ("rf_rmsprop", {}, {"nu_dtype": jnp.float16}, "nu_dtype was None and is 'float16'"),
        ("rf_adamw", {"nu_dtype": jnp.float16}, {}, "nu_dtype was 'float16' and is None"),
        ("rf_adamw", {}, {"mu_dtype": jnp.float16}, "mu_dtype was None and is 'float16'"),
        ("published.sirf_shampoo", {}, {"riemannian_momentum": None}, "riemannian_momentum was 'a number' and is None"),
        ("published.sirf_shampoo", {}, {"cache_preconditioner": True}, "cache_preconditioner was False and is True"),
        ("published.sirf_shampoo", {"momentum": None}, {}, "momentum was None and is 'a number'"),
        ("published.rf_rmsprop", {"momentum": None}, {}, "momentum was None and is 'a number'"),
        ("published.rf_adamw", {}, {"bias_correction": True}, "bias_correction was False and is True"),
    ],
    ids=str,
)
def test_another_option_is_refused_by_name(name: str, old: Any, new: Any, message: str) -> None:
    with refuses(ValueError, "the state must come from init", message, "rf.migrate"):
        traced(make(name, **old), make(name, **new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"block_size": 4}, "block_size of 'c' was [[1, [8, 6]]] and is [[4, [4, 3]]]"),
        ({}, {"diagonal": None}, "diagonal (no factors) of 'embedding' was True and is False"),
        ({}, {"structure": "diagonal"}, "structure (or max_dense_dim) of 'a' was [['dense', 'dense']]"),
        ({}, {"max_dense_dim": 6}, "structure (or max_dense_dim) of 'c'"),
        ({}, {"factor_dtype": jnp.bfloat16}, "factor_dtype of 'a' was [None, None] and is ['bfloat16', 'bfloat16']"),
        ({}, {"layer_axes": {"c": 0}}, "of 'c' was"),
        ({}, {"group": (rf.flatten("c"),)}, "of 'c' was"),
    ],
)
def test_another_layout_is_refused_by_option_and_parameter(old: Any, new: Any, message: str) -> None:
    with refuses(ValueError, message):
        traced(make("sirf_muon", layout=rf.Layout(**old)), make("sirf_muon", layout=rf.Layout(**new)))


def test_structures_of_equal_parts_are_not_taken_for_each_other() -> None:
    lower, upper = (
        rf.published.scale_by_sirf_shampoo(layout=rf.Layout(structure=name, diagonal=None), **B)
        for name in ("triltoeplitz", "triutoeplitz")
    )
    with refuses(ValueError, "'triltoeplitz'", "'triutoeplitz'", "'a'"):
        traced(lower, upper)


def test_the_state_of_another_optimizer_is_refused_by_name() -> None:
    """Although the arrays are the same: the published s has another scale, and KL-Shampoo's factors are symmetric."""
    with refuses(ValueError, "published.scale_by_rf_adam", "'scale_by_rf_adam'"):
        traced(make("published.rf_adamw"), make("rf_adamw"))
    with refuses(ValueError, "rule was 'RootFree' and is 'Whitening'"):
        traced(rf.scale_by_sirf_shampoo(), rf.scale_by_kl_shampoo())


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sirf_muon", {}, {"damping": 0.5, "weight_decay": None, "refresh_every": rf.staggered(3), "nesterov": False}),
        ("sirf_muon", {"weight_decay": None}, {"mask": lambda p: jax.tree.map(lambda _: True, p), "momentum": 0.5}),
        ("sirf_muon", {}, {"statistics_every": 2}),
        ("sirf_muon", {}, {"layout": rf.Layout(block_size=1024, max_dense_dim=4096), "statistics_decay": 0.9}),
        ("rf_adamw", {}, {"step_size": "newton", "batch_size": 8, "b1": 0.5, "b2": 0.5}),
        ("published.rf_rmsprop", {}, {"weight_decay": None, "decay": 0.5, "initial_scale": 0.0}),
    ],
)
def test_what_may_change_in_training_changes(name: str, old: Any, new: Any) -> None:
    traced(make(name, **old), make(name, **new))


@pytest.mark.parametrize("name", ["sirf_muon", "rf_adamw", "published.sirf_shampoo"])
def test_parameters_of_another_dtype_go_on_with_the_states_own(name: str) -> None:
    """As they do with AdamW: nothing is lost."""
    traced(make(name), make(name), jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_renamed_an_added_and_a_removed_parameter_are_refused_by_name(jitted: bool) -> None:
    tx = rf.scale_by_sirf_shampoo()
    state = tx.init(PARAMS)
    update = jax.jit(tx.update) if jitted else tx.update
    renamed = {"z" if name == "a" else name: leaf for name, leaf in PARAMS.items()}
    with refuses(ValueError, "'a' is no longer a parameter", "'z' is new"):
        update(renamed, state, renamed)
    fewer = {name: PARAMS[name] for name in ("a", "b")}
    with refuses(ValueError, "'c' is no longer a parameter"):
        update(fewer, state)
    with refuses(ValueError, "'d' is new"):
        update({**PARAMS, "d": PARAMS["a"]}, state)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("sirf_muon", {"power": 0.125}, "power was 0.125 and is 0.25"),
        ("rf_adamw", {"nu_dtype": jnp.float16}, "nu_dtype was 'float16' and is None"),
    ],
    ids=["sirf_muon", "rf_adamw"],
)
def test_a_state_restored_into_another_template_is_refused_where_it_is_read(
    name: str, other: Any, message: str
) -> None:
    tx = make(name)
    state = restored(make(name, **other).init(PARAMS), tx.init(PARAMS))
    for read in (lambda: rf.check(state, tx, PARAMS), lambda: tx.update(PARAMS, state, PARAMS), lambda: rf.info(state)):
        with refuses(ValueError, message):
            read()


@pytest.mark.parametrize("name", ["sirf_shampoo", "rf_adamw", "rf_rmsprop", "published.rf_adamw"])
def test_a_state_restored_into_another_template_gives_nan_where_it_is_traced(name: str) -> None:
    tx = make(name)
    renamed = {"aa" if key == "a" else key: leaf for key, leaf in PARAMS.items()}
    template = tx.init(renamed)
    update = jax.jit(tx.update)
    updates, _ = update(renamed, template, renamed)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    updates, _ = update(renamed, restored(tx.init(PARAMS), template), renamed)
    assert all(np.all(np.isnan(updates[key])) for key in ("aa", "b", "c"))


def test_one_more_layer_that_a_checkpoint_had_not_is_refused_by_name() -> None:
    """Restored without strictness, missing blocks are zeros: factors that would never move."""
    tx = rf.scale_by_sirf_shampoo()
    more = {**PARAMS, "d": PARAMS["a"]}
    template = tx.init(more)
    pad = lambda leaf, like: jnp.zeros_like(like).at[tuple(map(slice, leaf.shape))].set(leaf)
    leaves = map(pad, jax.tree.leaves(tx.init(PARAMS)), jax.tree.leaves(template))
    state = jax.tree.unflatten(jax.tree.structure(template), leaves)
    with refuses(ValueError, "'d' is new"):
        rf.check(state, tx, more)


def test_a_later_format_is_refused_by_number() -> None:
    text = describe_origin({"power": 0.5}, '{"w": {}}')
    later = text.replace('"format": 1', '"format": 2')
    for origin in (make_origin(later, PARAMS), Origin(make_origin(later, PARAMS).code, text)):
        with refuses(ValueError, "format 2", "reads format 1", "the version that saved it"):
            require_origin(origin, text)


@pytest.mark.parametrize("place", [0, 12])
def test_a_damaged_origin_is_an_error(place: int) -> None:
    text = describe_origin({"power": 0.5}, '{"w": {}}')
    code = np.array(make_origin(text, PARAMS).code)
    code[place] ^= 16
    code[0] ^= 1  # else nothing would be read but the digest
    with refuses(ValueError, "unreadable", "damaged"):
        require_origin(Origin(jnp.asarray(code), text), text)


def test_its_representation_does_not_grow_with_the_model() -> None:
    text = describe_origin({}, str([f"layers/{i}" for i in range(1000)]))
    origin = make_origin(text, PARAMS)
    assert len(repr(origin)) < 40
    assert len(str(jax.tree.structure(origin))) < 100
    assert len(hash(jax.tree.structure(origin)).to_bytes(8, signed=True)) == 8


def test_a_state_is_made_on_the_device_of_its_parameters() -> None:
    device = jax.devices()[1]
    params = jax.device_put({"w": jnp.ones((4, 4))}, device)
    state = rf.scale_by_sirf_muon().init(params)
    assert {array.device for array in jax.tree.leaves((state.stacks, state.origin))} == {device}
