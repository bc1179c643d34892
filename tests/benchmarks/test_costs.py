"""What the library promises of state, traffic and program size, by the compiler's own count on small trees."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import trees
from harness import program

import rootfree_optax as rf
from rootfree_optax._src.stacks import step as step_module

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adamw needs it

GPT = trees.gpt(1, 64, 128, 64)
BFLOAT16 = jnp.dtype("bfloat16")
# State over parameters, in bytes, and the most bytes that a step moves over AdamW's.
PUBLISHED = {
    "rf_rmsprop": (rf.published.rf_rmsprop(1e-3, momentum=None, batch_size=32), 1.0, 0.8),
    "rf_rmsprop, momentum": (rf.published.rf_rmsprop(1e-3, batch_size=32), 2.0, 1.31),
    "rf_adamw": (rf.published.rf_adamw(1e-3, batch_size=32), 2.0, 1.11),
    "rf_rmsprop, bf16": (rf.published.rf_rmsprop(1e-3, momentum=None, batch_size=32, nu_dtype=BFLOAT16), 0.5, 0.6),
    "rf_adamw, bf16": (rf.published.rf_adamw(1e-3, batch_size=32, mu_dtype=BFLOAT16, nu_dtype=BFLOAT16), 1.0, 0.91),
}
# Likewise; the length of AdamW's steps takes means over each parameter, which are passes of their own.
SCALE_FREE = {
    "rf_rmsprop": (rf.rf_rmsprop(1e-3, momentum=None), 1.0, 1.85),
    "rf_rmsprop, momentum": (rf.rf_rmsprop(1e-3), 2.0, 2.25),
    "rf_adamw": (rf.rf_adamw(1e-3), 2.0, 2.21),
}
DIAGONAL = {f"published {name}": case for name, case in PUBLISHED.items()} | SCALE_FREE


def traffic(tx: optax.GradientTransformation, shapes: trees.Shapes) -> int:
    params = trees.abstract(shapes)
    carry = params, jax.eval_shape(tx.init, params)
    return program.compile_step(functools.partial(program.optimizer_step, tx), carry, params).bytes_accessed


def program_lines(tx: optax.GradientTransformation, shapes: trees.Shapes) -> int:
    params = trees.abstract(shapes)
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text().count("\n")


def program_growth(tx: optax.GradientTransformation) -> int:
    """Returns how many lines one more layer takes."""
    shallow, deep = (program_lines(tx, trees.gpt(depth, 16, 32, 16)) for depth in (1, 2))
    return deep - shallow


def state_bytes(tx: optax.GradientTransformation, shapes: trees.Shapes) -> int:
    """Returns the bytes of all arrays in a state; counts, and what it says it belongs to, are left out."""
    state = jax.eval_shape(tx.init, trees.abstract(shapes))
    return program.tree_bytes([leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape != (1024,)])


@functools.cache
def adamw_traffic() -> int:
    return traffic(optax.adamw(1e-3), GPT)


@pytest.mark.parametrize("method", DIAGONAL)
def test_a_diagonal_method_keeps_its_accumulators_alone(method: str) -> None:
    tx, state_over_parameters, _ = DIAGONAL[method]
    assert state_bytes(tx, GPT) == state_over_parameters * 4 * trees.size(GPT)


@pytest.mark.contract
@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="older compilers fuse half-precision passes otherwise")
@pytest.mark.parametrize("method", DIAGONAL)
def test_a_diagonal_step_moves_no_more_than_promised(method: str) -> None:
    tx, _, traffic_over_adamws = DIAGONAL[method]
    assert traffic(tx, GPT) <= traffic_over_adamws * adamw_traffic()


@pytest.mark.parametrize("method", [name for name in DIAGONAL if "bf16" not in name])
def test_a_diagonal_step_overwrites_its_donated_accumulators(method: str) -> None:
    """A donated array that still has a reader after it is overwritten would be copied first."""
    tx, _, _ = DIAGONAL[method]
    params = trees.abstract({"kernel": (64, 48)})
    carry = params, jax.eval_shape(tx.init, params)
    step = jax.jit(functools.partial(program.optimizer_step, tx), donate_argnums=0)
    text = step.lower(carry, params).compile().as_text()
    assert "f32[64,48]" in text
    assert "copy(" not in text


@pytest.mark.contract
@pytest.mark.parametrize(
    ("diagonal", "growth_over_adamws"), [(rf.EMBEDDINGS, 1.0), (None, 0.3)], ids=["matrices", "everything"]
)
def test_the_program_of_a_kronecker_method_grows_slower_with_depth_than_adamws(
    diagonal: str | None, growth_over_adamws: float
) -> None:
    """What has no factors grows as AdamW, each array by itself."""
    layout = rf.Layout(structure="dense", block_size=16, diagonal=diagonal)
    growth = program_growth(rf.sirf_shampoo(1e-3, layout=layout))
    assert 0 < growth <= growth_over_adamws * program_growth(optax.adamw(1e-3))


@pytest.mark.parametrize("shapes", [trees.gpt(4), trees.resnet(18)], ids=["gpt4", "resnet18"])
def test_half_precision_factors_keep_at_most_half_more_than_adam(shapes: trees.Shapes) -> None:
    layout = rf.Layout(diagonal=None, block_size=256, factor_dtype=BFLOAT16)
    tx = rf.published.sirf_shampoo(1e-3, batch_size=32, layout=layout)  # with a momentum for every factor
    assert 0.5 < state_bytes(tx, shapes) / (8 * trees.size(shapes)) <= 1.5


def temporaries(tx: optax.GradientTransformation, shapes: trees.Shapes) -> float:
    """Returns an update's temporaries over the parameters, with gradients and state donated."""
    params = trees.abstract(shapes)
    update = lambda carry, params: tx.update(*carry, params)
    cost = program.compile_step(update, (params, jax.eval_shape(tx.init, params)), params)
    return cost.temporary_bytes / program.tree_bytes(params)


def test_parameters_without_factors_need_no_copy() -> None:
    assert temporaries(rf.sirf_shampoo(1e-3), {"embedding": (512, 64)}) < 0.01


@pytest.mark.contract
def test_a_large_stack_is_in_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its gradients, in whose place the directions come; what is on the way is of one portion."""
    monkeypatch.setattr(step_module, "_MIN_ENTRIES_AT_ONCE", 1)
    tx = rf.sirf_shampoo(1e-3, layout=rf.Layout(layer_axes={"layers": 0}))
    assert temporaries(tx, {"layers": (64, 32, 48)}) < 1.6


def test_a_refresh_is_one_program_for_all_axes_of_about_one_length() -> None:
    """So one more shape has products for its statistics and direction alone: twice two, four, and one for its norm."""

    def products(*shapes: tuple[int, int]) -> int:
        params = trees.abstract(dict(zip("abc", shapes, strict=False)))
        tx = rf.sirf_shampoo(1e-3)
        lowered = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
        return lowered.as_text().count("dot_general ")

    assert products((24, 32), (32, 32), (24, 24)) - products((24, 32)) == 2 * 9
