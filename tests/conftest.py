"""Session-wide settings: strict promotion, eight host devices for the sharding tests, and one cache of programs."""

import atexit
import collections.abc
import os
import shutil
import tempfile

# Before jax is imported: the number of host devices is fixed when the backend starts.
# Programs of a few steps take longer to compile than to run: they are compiled without most optimizations.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# Most of the suite's time is compiling, and many tests compile the same program. For this session alone, but for all of
# its processes, which find the folder in their environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="rootfree_optax_programs_")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

EXPENSIVE_EXAMPLES = {"optimizers", "transforms", "published.py"}  # folders and files of the package

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the examples in docstrings that compile whole updates to `pytest -m contract`."""
    for item in items:
        if isinstance(item, pytest.DoctestItem) and {item.path.parent.name, item.path.name} & EXPENSIVE_EXAMPLES:
            item.add_marker("contract")


@pytest.fixture(scope="module", autouse=True)
def _drop_programs() -> collections.abc.Iterator[None]:
    """Drops the programs of a file behind it: a process may not map the code of all files at once, and would abort."""
    yield
    jax.clear_caches()


@pytest.fixture
def standard_promotion() -> collections.abc.Iterator[None]:
    """JAX's own promotion of dtypes, which Optax's schedules and flax count on: integers become floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
