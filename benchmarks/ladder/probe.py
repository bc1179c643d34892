"""What directions are worth, without training to the end: along one run, all methods are given the same gradients.

At some points of the run, over a window of the next steps k = 1 … n:

    gain       mean of ⟨D, G_k⟩ / (‖D‖ ‖G_k‖), D the direction of a method before the window, G_k the later gradients
    rank       effective rank of the gradients' Kronecker factors, exp(entropy of the eigenvalues) / d
    drift      ‖S' − S‖ / ‖S‖, S' the factors after the window
    signal     (squared mean gradient) / variance, by fifths of the factors' eigenvalues λ_a·λ_b, lowest first

all of hidden matrices. A method whose gain falls as the run goes on has a metric too strong for its noise. The factors
are Online KL-Shampoo's, of every gradient, with a memory of 20 steps.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import machine
from harness.report import Column, show, write_json
from rich.console import Console

from ladder.methods import parse
from ladder.references import MatricesState, okls
from ladder.train import Task

WINDOW = 16
POINTS = (0.05, 0.15, 0.3, 0.6, 0.9)
FIFTHS = 5


def hidden(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the matrices of the layers."""
    layers = {name: layer for name, layer in params.items() if isinstance(layer, dict)}
    return {name: {key: x for key, x in layer.items() if x.ndim == 2} for name, layer in layers.items()}


def measure(task: Task, spellings: list[str], learning_rate: float) -> list[dict[str, Any]]:
    """Returns one record for each point of the run; the first method trains."""
    if task.steps < 10 * WINDOW:
        raise ValueError(
            f"the probe needs at least {10 * WINDOW} steps, so that its windows lie apart, got {task.steps}."
        )
    methods = [parse(spelling) for spelling in spellings]
    if any(method.traced or method.learning_rates for method in methods):
        raise ValueError(
            f"the probe takes one value for each option, and its learning rate from --learning-rates, got {spellings}."
        )
    if task.weight_decay:
        raise ValueError(f"the probe has no weight decay, got {task.weight_decay}.")
    unit = [method.build(lambda count: jnp.float32(1), 0.0, {}) for method in methods]
    statistics = okls(rms=None)
    params = task.model.init(jax.random.key(0))
    if not jax.tree.leaves(hidden(params)):
        raise ValueError("the probe needs hidden matrices: choose a decoder.")
    states = ([tx.init(params) for tx in unit], statistics.init(hidden(params)))

    def step(carry: Any, count: jax.Array, *, keep: bool) -> tuple[Any, Any]:
        params, (states, factors) = carry
        batch = task.model.draw(task.train, jax.random.fold_in(jax.random.key(1), count), task.batch)
        gradients = jax.grad(lambda p: task.model.measure(p, batch)["loss"])(params)
        results = [tx.update(gradients, state, params) for tx, state in zip(unit, states, strict=True)]
        _, factors = statistics.update(hidden(gradients), factors)
        rate = learning_rate * task.rate(count)
        params = jax.tree.map(lambda p, u: p + rate * u, params, results[0][0])
        kept = (hidden(gradients), [hidden(updates) for updates, _ in results]) if keep else None
        return (params, ([state for _, state in results], factors)), kept

    skip = lambda carry, first, last: jax.lax.fori_loop(first, last, lambda t, c: step(c, t, keep=False)[0], carry)
    keep = lambda carry, first: jax.lax.scan(functools.partial(step, keep=True), carry, first + jnp.arange(WINDOW))
    skip, keep = jax.jit(skip), jax.jit(keep)  # once for all points
    carry, done, records = (params, states), 0, []
    for point in POINTS:
        first = round(point * task.steps)
        carry = skip(carry, jnp.int32(done), jnp.int32(first))
        before = carry[1][1]
        carry, (gradients, updates) = keep(carry, jnp.int32(first))
        done = first + WINDOW
        records.append(
            {"step": first, **_gains(methods, gradients, updates), **_factors(before, carry[1][1], gradients)}
        )
    return records


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)


def _gains(methods: list[Any], gradients: Any, updates: list[Any]) -> dict[str, float]:
    """Returns each method's gain on the window's later gradients: a direction knows the first gradient."""
    later = _flat(gradients)[1:]
    later /= np.linalg.norm(later, axis=1, keepdims=True)
    gains = {}
    for method, update in zip(methods, updates, strict=True):
        direction = -_flat(update)[0]
        gains[f"gain {method.spelling}"] = float(np.mean(later @ direction) / np.linalg.norm(direction))
    return gains


def _factors(before: MatricesState, after: MatricesState, gradients: Any) -> dict[str, Any]:
    """Returns effective ranks, drift and signal to noise, as means over all matrices."""
    by_shape: dict[str, list[np.ndarray]] = {}
    for leaf in jax.tree.leaves(gradients):
        by_shape.setdefault(f"{leaf.shape[1]}x{leaf.shape[2]}", []).append(np.asarray(leaf, np.float64))
    ranks, drifts, ratios = [], [], []
    for shape, of_shape in by_shape.items():
        for index, matrix in enumerate(of_shape):
            values, bases = [], []
            for side in ("rows", "columns"):
                old, new = (np.asarray(getattr(s.stacks[shape], side)[index], np.float64) for s in (before, after))
                eigenvalues, basis = np.linalg.eigh(old)
                part = np.maximum(eigenvalues, 0) / np.maximum(eigenvalues, 0).sum()
                ranks.append(np.exp(-np.sum(part * np.log(part + 1e-300))) / len(part))
                drifts.append(np.linalg.norm(new - old) / np.linalg.norm(old))
                values.append(np.maximum(eigenvalues, 0))
                bases.append(basis)
            rotated = bases[0].T @ matrix @ bases[1]
            variance = rotated.var(0, ddof=1)
            signal = np.square(rotated.mean(0)) - variance / len(rotated)  # without the mean's own noise
            order = np.argsort(np.outer(*values), axis=None)
            fifths = np.array_split(order, FIFTHS)
            ratios.append([signal.ravel()[fifth].sum() / variance.ravel()[fifth].sum() for fifth in fifths])
    return {
        "rank": float(np.mean(ranks)),
        "drift": float(np.mean(drifts)),
        **{f"signal {i + 1}/{FIFTHS}": float(x) for i, x in enumerate(np.mean(ratios, 0))},
    }


def run(task: Task, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the table and writes the record."""
    records = measure(task, list(options.methods), options.learning_rates[0])
    title = f"Probe of {settings['size']} along {options.methods[0]}, {settings['steps']} steps of {settings['batch']}"
    columns = [Column(key, key.replace(" ", "\n"), ".0f" if key == "step" else ".3g") for key in records[0]]
    show(Console(), title, machine.summary(description := machine.describe()), columns, records)
    name = options.name or f"probe_{options.size}_{task.batch}x{task.steps}"
    write_json(options.output / f"{name}.json", machine=description, settings=settings, records=records)
