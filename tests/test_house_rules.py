"""What CONTRIBUTING.md asks of the package's files, read from the files themselves."""

import ast
import pathlib
import re

import pytest

import rootfree_optax as rf

PACKAGE = pathlib.Path(rf.__file__).parent
ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def of_files(function: object) -> object:
    return pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))(function)


def imported_by(path: pathlib.Path) -> list[str]:
    """Returns the dotted names that a file imports, `from a import b` as a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@of_files
def test_a_file_is_short(path: pathlib.Path) -> None:
    assert len(path.read_text().splitlines()) <= 250


@of_files
def test_no_private_module_or_name_is_imported(path: pathlib.Path) -> None:
    assert [name for name in imported_by(path) if re.search(r"(^|\.)_(?!_)", name)] == []


def test_every_file_imports_from_below_it_in_the_table() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    first_cells = [line.split("|")[1] for line in lines if re.match(r"\| `[a-z_]+(\.py|/)`", line)]
    rows = [re.findall(r"`([a-z_]+)(?:\.py|/)`", cell) for cell in first_cells]
    row_of = {name: index for index, row in enumerate(rows) for name in row}

    part_of = lambda path: path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert {part_of(path) for path in FILES} == set(row_of)
    for path in FILES:
        imports = {name.split(".")[1] for name in imported_by(path) if name.startswith("rootfree_optax.")}
        above = {name for name in imports - {part_of(path)} if row_of[name] <= row_of[part_of(path)]}
        assert above == set(), f"{path.name} imports from above it"
