"""The dtypes to compute in and to store."""

import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision

from rootfree_optax._src.numerics.arithmetic import (
    accumulation_dtype,
    dtype_like,
    has_smaller_range,
    is_low_precision,
    real_dtype,
    upcast,
)


@pytest.mark.parametrize(
    ("dtype", "real", "accumulated", "wide"),
    [
        ("float8_e4m3fn", "float8_e4m3fn", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32", "float32"),
        ("float16", "float16", "float32", "float32"),
        ("float32", "float32", "float32", "float32"),
        ("float64", "float64", "float64", "float64"),
        ("complex64", "float32", "float32", "complex64"),
        ("complex128", "float64", "float64", "complex128"),
    ],
)
def test_dtypes_to_compute_in(dtype, real, accumulated, wide):
    with double_precision():
        assert real_dtype(dtype) == real
        assert accumulation_dtype(dtype) == accumulated
        assert upcast(jnp.ones(2, dtype)).dtype == wide


def test_comparisons():
    assert [is_low_precision(dtype) for dtype in ("bfloat16", "float16", "float32", "float64")] == [1, 1, 0, 0]
    assert [has_smaller_range(dtype, "float32") for dtype in ("bfloat16", "float16", "float32", "float64")] == [
        0,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("own", "real", "expected"),
    [
        ("float32", None, "float32"),
        ("complex64", None, "complex64"),
        ("float32", "bfloat16", "bfloat16"),
        ("complex64", "bfloat16", "complex64"),
        ("complex128", "float32", "complex64"),
        ("complex64", "float64", "complex128"),
    ],
)
def test_dtype_of_state(own, real, expected):
    assert dtype_like(np.ones(2, own), real) == expected
