"""What CONTRIBUTING.md asks of the package's files, read from the files themselves."""

import ast
import inspect
import pathlib
import re
from typing import Any

import pytest

import rootfree_optax as rf

PACKAGE = pathlib.Path(rf.__file__).parent
CONTRIBUTING = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = re.findall(r"^\| `([a-z]+)` \| [A-Z].*\. \|$", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
PUBLIC = [(module, name) for module in (rf, rf.published) for name in module.__all__ if name != "published"]

of_files = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def imported_by(path: pathlib.Path) -> list[str]:
    """Returns the dotted names that a file imports, `from a import b` as a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def dotted(node: ast.AST) -> str:
    """Returns an expression such as jax.lax.scan as text, and nothing for any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@of_files
def test_no_private_name_of_another_package_is_used(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = imported_by(path) + [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in used if re.match(r"(jax|jnp|optax|numpy|np)\b.*\._(?!_)", name)] == []


@of_files
def test_no_private_name_of_another_file_is_imported(path: pathlib.Path) -> None:
    assert [name for name in imported_by(path) if re.search(r"\._(?!_|src\.)", name)] == []


def test_nine_rooms_and_nothing_beside_them() -> None:
    assert len(ROOMS) == 9
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "published.py"}
    assert {path.name for path in (PACKAGE / "_src").glob("*.py")} == {"__init__.py"}
    assert {path.parent.name for path in (PACKAGE / "_src").glob("*/*.py")} == set(ROOMS)
    assert not list((PACKAGE / "_src").glob("*/*/*.py"))


@of_files
def test_a_file_imports_from_its_own_room_and_rooms_below_it(path: pathlib.Path) -> None:
    is_in_a_room = path.parent.parent.name == "_src"
    highest = ROOMS.index(path.parent.name) if is_in_a_room else 0
    above = {
        name
        for name in imported_by(path)
        if name.startswith("rootfree_optax")
        and not any(name.startswith(f"rootfree_optax._src.{room}") for room in ROOMS[highest:])
    }
    assert above <= ({"rootfree_optax.published"} if path == PACKAGE / "__init__.py" else set())


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: value if isinstance(value, str) else "")
def test_a_public_name_says_what_it_takes_and_returns_and_shows_an_example(module: Any, name: str) -> None:
    """A tuple that is only read, such as a state, says what it holds."""
    value = getattr(module, name)
    if isinstance(value, str):
        return
    is_tuple = inspect.isclass(value) and issubclass(value, tuple)
    parameters = [] if is_tuple or inspect.isabstract(value) else list(inspect.signature(value).parameters)
    sections = ["Attributes"] if is_tuple else ["Example"]
    sections += ["Args"] if parameters else []
    sections += [] if inspect.isclass(value) else ["Returns"]
    text = inspect.getdoc(value) or ""
    assert [section for section in sections if not re.search(rf"^{section}:", text, re.MULTILINE)] == []
    assert [each for each in parameters if not re.search(rf"^  \*{{0,2}}{each}:", text, re.MULTILINE)] == []


@of_files
def test_the_library_prints_nothing(path: pathlib.Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if dotted(node.func) in ("print", "jax.debug.print")]
