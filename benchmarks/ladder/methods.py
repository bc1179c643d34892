"""The methods of the ladder, by the short spelling of the command line.

    adamw    muon:rms=0.2/0.4    sirf_muon:power=0.125,damping=0.01    kl_shampoo:refresh_every=1,blocks=128

An option with several values, divided by slashes, is a traced number: all values train side by side, in one program,
as learning rates and seeds do. `lr` gives a method learning rates of its own.
"""

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

import rootfree_optax as rf
from ladder import references

B1, B2 = 0.9, 0.95

Builder = Callable[..., optax.GradientTransformation]
"""From a schedule of learning rates, a weight decay and options to an optimizer."""


def _adamw(schedule: optax.Schedule, weight_decay: float, *, b1: Any = B1, b2: Any = B2) -> Any:
    return optax.adamw(schedule, b1, b2, weight_decay=weight_decay)


def _with_adamw(matrices: Callable[..., optax.GradientTransformation]) -> Builder:
    """Returns a builder: `matrices` for hidden matrices and kernels, AdamW for all other parameters."""

    def label(path: Any, leaf: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "matrix" if leaf.ndim > 1 and not re.search(rf.EMBEDDINGS, name) else "rest"

    def build(schedule: optax.Schedule, weight_decay: float, **options: Any) -> optax.GradientTransformation:
        hidden = optax.chain(
            matrices(**options), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule)
        )
        rest = _adamw(schedule, weight_decay)
        labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
        return optax.partition({"matrix": hidden, "rest": rest}, labels)

    build.__signature__ = inspect.signature(matrices)  # type: ignore[attr-defined]
    return build


def _with_layout(optimizer: Callable[..., Any]) -> Builder:
    """Returns a builder for one of the library's Kronecker optimizers, at its defaults but for the layout.

    `blocks` and `merge` are `block_size` and `merge_dims` of its layout. Unless given, matrices are whole, and no axes
    are merged.
    """

    def build(
        schedule: optax.Schedule,
        weight_decay: float,
        *,
        blocks: int | None = None,
        merge: int | None = None,
        **options: Any,
    ) -> optax.GradientTransformation:
        layout = rf.Layout(block_size=blocks, merge_dims=merge)
        return optimizer(schedule, B1, B2, weight_decay=weight_decay, layout=layout, **options)

    own = inspect.signature(optimizer).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, keyword, default=None) for name in ("blocks", "merge")]
    build.__signature__ = inspect.Signature([p for p in own if p.kind is keyword] + extra)  # type: ignore[attr-defined]
    return build


def _diagonal(optimizer: Callable[..., Any], **defaults: Any) -> Builder:
    def build(schedule: optax.Schedule, weight_decay: float, **options: Any) -> optax.GradientTransformation:
        return optimizer(schedule, weight_decay=weight_decay, **{**defaults, **options})

    build.__signature__ = inspect.signature(optimizer)  # type: ignore[attr-defined]
    return build


BUILDERS: dict[str, Builder] = {
    "adamw": _adamw,
    "muon": _with_adamw(references.muon),
    "soap": _with_adamw(references.soap),
    "okls": _with_adamw(references.okls),
    "sirf_muon": _with_layout(rf.sirf_muon),
    "sirf_shampoo": _with_layout(rf.sirf_shampoo),
    "kl_shampoo": _with_layout(rf.kl_shampoo),
    "rf_adamw": _diagonal(rf.rf_adamw, b1=B1, b2=B2),
    "rf_rmsprop": _diagonal(rf.rf_rmsprop),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its options.

    Attributes:
      spelling: as on the command line, without learning rates.
      builder: a key of `BUILDERS`.
      options: with one value each.
      traced: with several values each.
      learning_rates: of its own; empty for the command's.
    """

    spelling: str
    builder: str
    options: Mapping[str, Any]
    traced: Mapping[str, tuple[float, ...]]
    learning_rates: tuple[float, ...] = ()

    def build(self, schedule: optax.Schedule, weight_decay: float, traced: Mapping[str, Any]) -> Any:
        """Returns the optimizer; `traced` has a number for each option of several values."""
        return BUILDERS[self.builder](schedule, weight_decay, **self.options, **traced)

    def grid(self, learning_rates: Sequence[float], seeds: int) -> dict[str, np.ndarray]:
        """Returns the runs as arrays of one length: learning rates, traced options and, changing fastest, seeds."""
        axes = {
            "learning_rate": self.learning_rates or tuple(learning_rates),
            **self.traced,
            "seed": tuple(range(seeds)),
        }
        points = list(itertools.product(*axes.values()))
        return {
            name: np.asarray(column, np.int32 if name == "seed" else np.float32)
            for name, column in zip(axes, zip(*points, strict=True), strict=True)
        }


def parse(spelling: str) -> Method:
    """Returns the method of a spelling.

    Raises:
      ValueError: for an unknown method or option.
    """
    name, _, rest = spelling.partition(":")
    if name not in BUILDERS:
        raise ValueError(f"a method must be one of {', '.join(BUILDERS)}, got {name!r}.")
    known = set(inspect.signature(BUILDERS[name]).parameters) - {"schedule", "learning_rate", "weight_decay"}
    options, traced, kept, learning_rates = {}, {}, [], ()
    for item in filter(None, rest.split(",")):
        option, _, text = item.partition("=")
        values = tuple(map(_value, text.split("/")))
        if option == "lr":
            learning_rates = values
            continue
        if option not in known:
            raise ValueError(f"{name} takes the options lr, {', '.join(sorted(known))}, got {option!r}.")
        kept.append(item)
        if len(values) == 1:
            options[option] = values[0]
        else:
            traced[option] = values
    return Method(":".join(filter(None, [name, ",".join(kept)])), name, options, traced, learning_rates)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
