"""Optimizers of other packages, as Optax transformations, each refreshing its preconditioner every tenth step.

    pip install -e .[peers]
    pip install git+https://github.com/haydn-jones/SOAP_JAX

psgd-jax imports modules of Optax that newer releases have moved or dropped (`optax._src.clipping`,
`safe_int32_increment`). They are put in place for the time of that import; the package itself is run as it is.
precondition-opt calls `jax.tree_map` and its like, which its module gets back. SOAP_JAX has a known defect: when its
basis turns, the second moment stays in the basis of before. "soap, block rule" is SOAP as a rule of this library's
tests, in blocks of the default length, without that defect. "online kl-shampoo" is the ladder's, of hidden matrices in
blocks of 256, with new roots at every step; AdamW is for the rest.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import optax.contrib

import rootfree_optax as rf

PERIOD = 10
SOAP_RULE = pathlib.Path(__file__).parents[2] / "tests" / "soap.py"


@contextlib.contextmanager
def _older_optax() -> Iterator[None]:
    """Puts in place, for the time of an import, what older releases of Optax had."""
    numerics = importlib.import_module("optax._src.numerics")
    clipping = types.ModuleType("optax._src.clipping")
    for name in ("clip", "clip_by_block_rms", "clip_by_global_norm"):
        setattr(clipping, name, getattr(optax, name, None))
    package = importlib.import_module("optax._src")
    missing = {"optax._src.clipping": clipping} if not hasattr(package, "clipping") else {}
    sys.modules.update(missing)
    for name, module in missing.items():
        setattr(package, name.rpartition(".")[2], module)
    added = not hasattr(numerics, "safe_int32_increment")
    if added:
        numerics.safe_int32_increment = optax.safe_increment
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
            delattr(package, name.rpartition(".")[2])
        if added:
            del numerics.safe_int32_increment


def _psgd(probability: float) -> optax.GradientTransformation:
    with _older_optax():
        kron = importlib.import_module("psgd_jax.kron")
    return kron.kron(1e-3, preconditioner_update_probability=probability)


def _soap() -> optax.GradientTransformation:
    return importlib.import_module("soap_jax").soap(1e-3, precondition_frequency=PERIOD)


def _soap_rule() -> optax.GradientTransformation:
    specification = importlib.util.spec_from_file_location("soap_rule", SOAP_RULE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    soap = module.scale_by_soap(refresh_every=PERIOD, layout=rf.Layout(diagonal=None))
    return optax.chain(soap, optax.scale_by_learning_rate(1e-3))


def _online_kl_shampoo() -> optax.GradientTransformation:
    build = importlib.import_module("ladder.methods").BUILDERS["okls"]
    return build(optax.constant_schedule(1e-3), 0.0, blocks=256)


class _OlderJax:
    """The module jax, with the functions of trees where older releases had them."""

    def __getattr__(self, name: str) -> Any:
        return (
            getattr(jax.tree, name[5:]) if name.startswith("tree_") and not hasattr(jax, name) else getattr(jax, name)
        )


def _distributed_shampoo() -> optax.GradientTransformation:
    module = importlib.import_module("precondition.distributed_shampoo")
    module.jax = _OlderJax()
    made = module.distributed_shampoo(
        1e-3, block_size=256, preconditioning_compute_steps=PERIOD, statistics_compute_steps=PERIOD
    )
    return optax.GradientTransformation(made.init, made.update)


PEERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
    "psgd, p=0.1": lambda: _psgd(1 / PERIOD),
    "psgd, p=1": lambda: _psgd(1.0),
    "soap, T=10": _soap,
    "soap, block rule": _soap_rule,
    "distributed shampoo, T=10": _distributed_shampoo,
    "online kl-shampoo": _online_kl_shampoo,
}


def load(name: str) -> tuple[optax.GradientTransformation | None, str]:
    """Returns a peer, or None and why there is none: it is not installed, or its import or construction fails."""
    try:
        return PEERS[name](), ""
    except ModuleNotFoundError as error:
        return None, f"absent: {error}"
    except Exception as error:  # whatever another package does when it meets versions that it was not made for
        return None, f"broken: {type(error).__name__}: {error}"


def first_error(run: Callable[[], Any]) -> tuple[Any, str]:
    """Returns what a step of a peer makes, or None and the first line of what it raised."""
    try:
        return run(), ""
    except Exception as error:  # as in `load`
        return None, f"broken: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
