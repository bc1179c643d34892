"""Agreement with the official PyTorch packages, where they are installed: `pip install torch sirfshampoo singd`.

Run with `pytest -m official`. The recorded trajectories in test_golden.py need no PyTorch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layouts import whole

import rootfree_optax as rf

# Where singd has no product of its own for a structure, it says so.
pytestmark = [pytest.mark.official, pytest.mark.filterwarnings("ignore:Calling naive implementation:UserWarning")]

STEPS = 12
# By the number of axes; vectors and matrices of the sizes at which a structure is more than dense.
SHAPES = ((7,), (6, 5), (3, 4, 2), (2, 3, 2, 3))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Hyperparameters of one run, named as ours."""

    seed: int
    shapes: tuple = SHAPES
    learning_rate: float = 0.01
    preconditioner_lr: float = 0.1
    damping: float = 1e-3
    momentum: float = 0.9
    riemannian_momentum: float = 0.5
    weight_decay: float = 1e-2
    batch_size: int = 8
    refresh_every: int = 1
    structure: object = "dense"
    dtype: str = "float32"


def random_setting(seed):
    rng = np.random.default_rng(seed)
    return Setting(
        seed,
        learning_rate=float(10 ** rng.uniform(-3, -1)),
        preconditioner_lr=float(10 ** rng.uniform(-2, -0.3)),
        damping=float(rng.choice([0.0, 1e-4, 1e-1])),
        momentum=float(rng.choice([0.0, 0.5, 0.95])),
        riemannian_momentum=float(rng.choice([0.0, 0.3, 0.9])),
        weight_decay=float(rng.choice([0.0, 1e-2])),
        batch_size=int(rng.integers(1, 65)),
        refresh_every=int(rng.integers(1, 5)),
    )


def gradients_of(setting):
    rng = np.random.default_rng(setting.seed)
    size = 10 ** rng.uniform(-2, 0.5)
    return [[np.float32(size * rng.standard_normal(shape)) for shape in setting.shapes] for _ in range(STEPS)]


CORNERS = {
    "trilbottomrightdiag": "TrilBottomRightDiagonalMatrix",
    "triltopleftdiag": "TrilTopLeftDiagonalMatrix",
    "triubottomrightdiag": "TriuBottomRightDiagonalMatrix",
    "triutopleftdiag": "TriuTopLeftDiagonalMatrix",
}


def corner(name):
    """Returns SINGD's class of a structure that its optimizer does not offer."""
    return getattr(pytest.importorskip(f"singd.structures.{name}"), CORNERS[name])


def official(setting):
    """Returns the parameters after each step, and the factors after the last, by the official code."""
    torch = pytest.importorskip("torch")
    optimizer_module = pytest.importorskip("sirfshampoo.optimizer")
    singd = pytest.importorskip("singd.optim.optimizer").SINGD

    class Official(optimizer_module.SIRFShampoo):
        SUPPORTED_STRUCTURES = singd.SUPPORTED_STRUCTURES | {name: corner(name) for name in CORNERS}

    model = torch.nn.Module()
    for i, shape in enumerate(setting.shapes):
        model.register_parameter(f"p{i}", torch.nn.Parameter(torch.ones(shape)))
    optimizer = Official(
        model,
        lr=setting.learning_rate,
        beta2=setting.preconditioner_lr,
        alpha1=setting.momentum,
        alpha2=setting.riemannian_momentum,
        lam=setting.damping,
        kappa=setting.weight_decay,
        batch_size=setting.batch_size,
        T=setting.refresh_every,
        structures=setting.structure,
        preconditioner_dtypes=getattr(torch, setting.dtype),
    )
    params = list(model.parameters())
    history = []
    for gradients in gradients_of(setting):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
        history.append([param.detach().numpy().copy() for param in params])
    return history, [[k.to_dense().float().numpy() for k in ks] for ks in optimizer.preconditioner]


def ours(setting):
    """Returns the same, by ours."""
    layout = whole(structure=setting.structure, factor_dtype=setting.dtype)
    tx = rf.published.sirf_shampoo(
        setting.learning_rate,
        preconditioner_lr=setting.preconditioner_lr,
        damping=setting.damping,
        momentum=setting.momentum,
        riemannian_momentum=setting.riemannian_momentum,
        weight_decay=setting.weight_decay,
        batch_size=setting.batch_size,
        refresh_every=setting.refresh_every,
        layout=layout,
    )
    params = {f"p{i}": jnp.ones(shape) for i, shape in enumerate(setting.shapes)}

    @jax.jit
    def update(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for gradients in gradients_of(setting):
        params, state = update(dict(zip(params, gradients, strict=True)), state, params)
        history.append(list(params.values()))
    factors = rf.factors(state, params, layout)
    return history, [factors[name] for name in params]


def assert_agreement(setting, tolerance=1e-5):
    expected = jax.tree.leaves(official(setting))
    found = jax.tree.leaves(ours(setting))
    assert len(found) == len(expected)
    for ours_, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float32(ours_), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(12))
def test_random_settings_of_dense_factors(seed):
    assert_agreement(random_setting(seed))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors(dtype):
    """The two round differently: equal to a few units in the last place."""
    assert_agreement(Setting(0, dtype=dtype), tolerance=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("structure", ["diagonal", "triltoeplitz", "triutoeplitz", "hierarchical15_15", *CORNERS])
def test_structures(structure):
    """On axes longer than 30 too, where the hierarchical ones have a diagonal."""
    setting = random_setting(100)
    assert_agreement(dataclasses.replace(setting, structure=structure))
    assert_agreement(dataclasses.replace(setting, structure=structure, shapes=((37,), (34, 3), (2, 33, 2))))


def test_mixed_structures():
    structure = {1: "diagonal", 2: ("triltoeplitz", "dense"), 3: ("dense", "diagonal", "dense"), 4: "triutoeplitz"}
    assert_agreement(dataclasses.replace(random_setting(200), structure=structure))


def test_block_diagonal_factors_agree_while_the_official_ones_are_symmetric():
    """After the first refresh all are; from then on the official ones multiply by K where Kᵀ is meant."""
    setting = Setting(1, shapes=((37,), (34, 3)), structure="block30diagonal", refresh_every=STEPS)
    assert_agreement(setting)
