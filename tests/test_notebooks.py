"""Every notebook runs from a clean kernel, and is stored as it should be read: executed, small, free of local paths."""

import pathlib
import re

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def _words(text: str) -> list[str]:
    return re.sub(r"\d[\d.e+-]*", "", text).split()


@pytest.mark.notebooks
def test_runs_and_prints_and_draws_what_is_stored(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In a folder of its own, so that the figures that a notebook saves do not replace the committed ones."""
    stored, notebook = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    assert _words(_printed(notebook)) == _words(_printed(stored))
    for figure in (path.parent / "figures").glob("*.png"):
        if figure.name in path.read_text():
            assert (tmp_path / "figures" / figure.name).exists()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


def test_is_stored_executed_small_and_without_local_paths(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 1
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"/(home|root|tmp|usr|Users)/|site-packages", path.read_text())
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


def test_introduction_shows_that_units_do_not_matter_without_the_root(path: pathlib.Path) -> None:
    if path.stem != "introduction":
        pytest.skip("only the introduction draws the two paths")
    printed = _printed(nbformat.read(path, as_version=4))
    distances = dict(re.findall(r"(with(?:out)? the root) +largest distance between the paths: (\S+)", printed))
    assert float(distances["without the root"]) < 1e-5
    assert float(distances["with the root"]) > 0.5
