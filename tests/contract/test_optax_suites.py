"""Optax's own test files, as the installed wheel ships them, run on the optimizers under contract.

Each file is read, its tables of optimizers are replaced by one of ours, and what remains is executed as a module:
the test classes then are Optax's, word for word. Tests that do not use the tables are left out, for they are not
about us. By default one of them runs, on one optimizer; with `pytest -m contract` all, on all. A file in which a table
is no longer found is an error, never an empty suite.
"""

import ast
import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import types
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import DIAGONAL_REPRESENTATIVE, OPTIMIZERS, Case


class Suite:
    """One of Optax's test files.

    Args:
      path: where it stands below the package `optax`.
      tables: the module-level names of its tables of optimizers, to be replaced.
      derived: further tables that the file builds from those, and that its tests are parametrised over.
    """

    def __init__(self, path: str, tables: set[str], derived: frozenset[str] = frozenset()) -> None:
        self.path, self.tables, self.derived = path, tables, derived
        spec = importlib.util.find_spec("optax")
        assert spec is not None
        assert spec.origin is not None
        self.file = pathlib.Path(spec.origin).parent / path

    @property
    def name(self) -> str:
        return pathlib.Path(self.path).stem.strip("_")

    def parse(self) -> ast.Module:
        """Returns the file's syntax tree with empty tables and without the tests that use none."""
        tree = ast.parse(self.file.read_text(encoding="utf-8"), str(self.file))
        replaced: list[str] = []
        kept: list[ast.stmt] = []
        for node in tree.body:
            targets = {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
            if isinstance(node, ast.AugAssign) and getattr(node.target, "id", None) in self.tables:
                continue  # Optax's wrappers of its own optimizers
            if isinstance(node, ast.Assign) and targets & self.tables and not set(replaced) & targets:
                node.value = ast.Name(f"_ours{next(iter(targets))}", ast.Load(), **_position(node.value))
                replaced.extend(targets)
            if isinstance(node, ast.ClassDef):
                node.body = [statement for statement in node.body if self._is_ours(statement)]
                if not node.body:
                    continue
            kept.append(node)
        if set(replaced) != self.tables:
            raise LookupError(f"{self.file} has no table {sorted(self.tables - set(replaced))}; adapt {__file__}.")
        tree.body = kept
        return tree

    def _is_ours(self, statement: ast.stmt) -> bool:
        """Returns whether a statement in a class is a test over one of the tables, or no test at all."""
        if not isinstance(statement, ast.FunctionDef) or not statement.name.startswith("test"):
            return True
        names = {n.id for decorator in statement.decorator_list for n in ast.walk(decorator) if isinstance(n, ast.Name)}
        return bool(names & (self.tables | self.derived))

    def test_classes(self, code: types.CodeType, tables: Mapping[str, Any], case: Case) -> Iterator[type]:
        """Executes the module with the given tables and yields its test classes, named after the case."""
        module = types.ModuleType(f"{__name__}.{self.name}")
        module.__dict__.update({f"_ours{name}": table for name, table in tables.items()}, __file__=str(self.file))
        with _unchanged_environment():
            exec(code, module.__dict__)
        added = {case.name: factory_of(case)}
        version = {"__version__": _Version(jax.__version__)}
        for name, extra in (("alias", added), ("contrib", added), ("jax", version)):
            if hasattr(module, name):
                setattr(module, name, _Namespace(getattr(module, name), extra))
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == module.__name__:
                value.__name__ = value.__qualname__ = f"Test_{case.name}_{name}"
                value.__module__ = __name__
                if case.name != DIAGONAL_REPRESENTATIVE or "alias" not in self.name:
                    value.pytestmark = [pytest.mark.contract]
                yield value


class _Version(str):
    """A version that sorts by number: the tests skip themselves by comparing text, and "0.10" < "0.7" as text."""

    def __lt__(self, other: str) -> bool:
        return _numbers(self) < _numbers(other)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


class _Namespace:
    """A module with names added to it, such as our constructors, which the tests look up by name in Optax's modules."""

    def __init__(self, module: types.ModuleType, added: Mapping[str, Any]) -> None:
        self._module, self._added = module, added

    def __getattr__(self, name: str) -> Any:
        return self._added[name] if name in self._added else getattr(self._module, name)


def _position(node: ast.expr) -> dict[str, Any]:
    return {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}


@contextlib.contextmanager
def _unchanged_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def factory_of(case: Case) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Returns the case's constructor; if it refuses complex parameters, its `init` skips the test that has some."""

    @functools.wraps(case.make)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        tx = case.make(*args, **kwargs)

        def init(params: Any) -> Any:
            if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in jax.tree.leaves(params)):
                raise unittest.SkipTest(f"{case.name} refuses complex parameters.")
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return case.make if case.diagonal else make


def tables_of(case: Case) -> dict[str, Any]:
    """Returns every table's contents for one optimizer."""
    entry = {"opt_name": case.name, "opt_kwargs": dict(case.settings)}
    free = {"opt_name": case.name, "opt_kwargs": {**case.settings, **case.mechanized}}
    return {
        "_MAIN_OPTIMIZERS_UNDER_TEST": [entry],
        "_BASE_OPTIMIZERS": [free],
        "_OPTIMIZERS_UNDER_TEST": (entry,),
        "OPTIMIZERS": {case.name: case()},
    }


SUITES = (
    Suite(
        "contrib/_common_test.py",
        {"_MAIN_OPTIMIZERS_UNDER_TEST", "_BASE_OPTIMIZERS"},
        frozenset({"_ALL_OPTIMIZERS_UNDER_TEST"}),
    ),
    Suite("_src/alias_test.py", {"_OPTIMIZERS_UNDER_TEST"}),
    Suite("_src/sharding_test.py", {"OPTIMIZERS"}),
)
COLLECTED: dict[str, list[type]] = {suite.path: [] for suite in SUITES}
for suite in SUITES:
    if suite.file.exists():
        code = compile(suite.parse(), str(suite.file), "exec")
        for case in OPTIMIZERS:
            COLLECTED[suite.path].extend(suite.test_classes(code, tables_of(case), case))
globals().update({cls.__name__: cls for classes in COLLECTED.values() for cls in classes})


pytestmark = pytest.mark.usefixtures("standard_promotion")  # which these tests are written for


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_shipped_suite_runs_on_every_optimizer(suite: Suite) -> None:
    if not suite.file.exists():
        pytest.skip(f"optax {optax.__version__} ships no {suite.path}")
    classes = COLLECTED[suite.path]
    assert len(classes) == len(OPTIMIZERS)
    for cls in classes:
        assert len(unittest.defaultTestLoader.getTestCaseNames(cls)) >= 3


def test_a_table_that_is_gone_is_an_error(tmp_path: pathlib.Path) -> None:
    suite = Suite("contrib/_common_test.py", {"_MAIN_OPTIMIZERS_UNDER_TEST", "_NO_SUCH_TABLE"})
    with pytest.raises(LookupError, match="_NO_SUCH_TABLE"):
        suite.parse()
