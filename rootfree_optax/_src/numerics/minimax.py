"""Polynomials that together stand for t^(−1/2) on a wide spectrum, each the best in the worst case.

A single polynomial needs a degree near √κ to be accurate on a spectrum of condition number κ. Several in a row, each
for what those before it have left, reach a degree that is the product of theirs at a cost that is the sum of theirs.
So do Newton–Schulz iterations, whose polynomials are best near one only. All of it is worked out once, in float64.
"""

import functools
from typing import NamedTuple

import numpy as np

# The most accurate choice for eight matrix products in all (see `inverse_root`).
DEGREES = (4, 4)
# What the polynomials cover, to 8%. A wider spectrum must be narrowed first.
LARGEST_CONDITION = 1024.0
_SMALLEST_CONDITION = 4.0
_ROWS_PER_OCTAVE = 4


class Table(NamedTuple):
    """Polynomials for ever wider spectra.

    The k-th polynomial qₖ is to be taken of tₖ, where t₀ = t and tₖ₊₁ = tₖ·qₖ(tₖ)²; the product of all qₖ(tₖ) then is
    near t^(−1/2). Each is held as lead·Π(t² + a·t + b), of positive factors: the terms of a sum would cancel.

    Attributes:
      conditions: [rows], κ. Row i is for spectra within [1/κᵢ, 1].
      leads: for each polynomial an array [rows].
      quadratics: for each polynomial an array [rows, degree / 2, 2] of a and b.
      errors: [rows], the largest |1 − √t·Πqₖ(tₖ)| on the row's spectra.
    """

    conditions: np.ndarray
    leads: tuple[np.ndarray, ...]
    quadratics: tuple[np.ndarray, ...]
    errors: np.ndarray


def inverse_root_polynomial(low: float, high: float, degree: int) -> tuple[np.ndarray, float]:
    """Returns the q of a given degree with the least largest |1 − √t·q(t)| on [low, high], by Remez' exchange.

    Args:
      low: positive.
      high: above `low`.
      degree: at least one.

    Returns:
      The coefficients by rising powers, and that largest error, which is attained degree + 2 times.

    Example:
      >>> coefficients, error = inverse_root_polynomial(0.5, 1.0, 1)
      >>> print(coefficients.round(3), f"{error:.3f}")
      [ 1.788 -0.81 ] 0.022
    """
    # Points in √t, where the extrema are, dense at both ends.
    middle, radius = (np.sqrt(high) + np.sqrt(low)) / 2, (np.sqrt(high) - np.sqrt(low)) / 2
    root = middle + radius * np.cos(np.linspace(np.pi, 0, 4000))
    basis = root[:, None] ** (2 * np.arange(degree + 1) + 1)
    signs = (-1.0) ** np.arange(degree + 2)
    chosen = np.linspace(0, len(root) - 1, degree + 2).round().astype(int)
    best, least = np.zeros(degree + 1), np.inf
    for _ in range(20):
        coefficients = np.linalg.solve(np.column_stack([basis[chosen], signs]), np.ones(degree + 2))[:-1]
        error = 1 - basis @ coefficients
        largest = np.abs(error).max()
        if largest >= least:
            break
        best, least = coefficients, largest
        runs = np.split(np.arange(len(root)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        if len(runs) != len(chosen):  # what is left is rounding
            break
        chosen = np.array([run[np.argmax(np.abs(error[run]))] for run in runs])
    return best, float(least)


def quadratic_factors(coefficients: np.ndarray) -> np.ndarray:
    """Returns a and b of the factors t² + a·t + b, [degree / 2, 2], of a polynomial without real roots."""
    roots = np.roots(coefficients[::-1])
    upper = roots[roots.imag > 0]
    if 2 * len(upper) != len(roots):
        raise ValueError(f"the polynomial must be without real roots, got roots {roots}.")
    return np.column_stack([-2 * upper.real, np.abs(upper) ** 2])


@functools.cache
def inverse_root_table() -> Table:
    """Returns the polynomials for spectra of condition numbers up to `LARGEST_CONDITION`."""
    octaves = np.log2(LARGEST_CONDITION / _SMALLEST_CONDITION)
    conditions = np.geomspace(_SMALLEST_CONDITION, LARGEST_CONDITION, round(octaves * _ROWS_PER_OCTAVE) + 1)
    rows, errors = [], []
    for condition in conditions:
        low, high = 1 / float(condition), 1.0
        row = []
        for degree in DEGREES:
            coefficients, error = inverse_root_polynomial(low, high, degree)
            low, high = (1 - error) ** 2, (1 + error) ** 2
            row.append(coefficients)
        rows.append(row)
        errors.append(error)
    polynomials = list(zip(*rows, strict=True))
    leads = tuple(np.array([coefficients[-1] for coefficients in column]) for column in polynomials)
    quadratics = tuple(np.stack([*map(quadratic_factors, column)]) for column in polynomials)
    return Table(conditions, leads, quadratics, np.asarray(errors))
