"""Every notebook runs from a clean kernel, and is stored as it should be read: executed, small, free of local paths."""

import base64
import pathlib
import re
from typing import Any

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

of_each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _outputs(notebook: nbformat.NotebookNode) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in _outputs(notebook) if o.output_type == "stream" and o.name == "stdout")


def _figures(notebook: nbformat.NotebookNode) -> list[bytes]:
    stored = [output.get("data", {}).get("image/png") for output in _outputs(notebook)]
    return [base64.b64decode(png) for png in stored if png is not None]


def _words(text: str) -> list[str]:
    return re.sub(r"\d[\d.e+-]*", "", text).split()


def _require_claims(name: str, printed: str) -> None:
    """Checks the numbers behind what a notebook's text says."""
    if name == "introduction":
        distances = dict(re.findall(r"(with(?:out)? the root) +largest distance between the paths: (\S+)", printed))
        assert float(distances["without the root"]) < 1e-5
        assert float(distances["with the root"]) > 0.5
        errors = dict(re.findall(r"(\S+) +test error (\S+) ±", printed))
        assert float(errors["rf.rf_adamw"]) < float(errors["optax.adamw"]) + 1
    else:
        assert name == "scale", f"say here what {name} claims"
        share, cosine, change = map(float, re.findall(r": +(\S+)\n", printed)[:3])
        assert share > 0.99
        assert cosine > 0.999
        assert change < 2e-3
        longest = dict(re.findall(r"(\S+) +longest step after the pause: (\S+) times", printed))
        assert float(longest["rf.published.sirf_shampoo"]) > 50
        assert float(longest["rf.sirf_muon"]) < 2
        rows = re.findall(r"^(\S+) +((?:\d\S+ *){4})$", printed, re.MULTILINE)
        losses = {method: [float(loss) for loss in row.split()] for method, row in rows}
        adamw = losses.pop("optax.adamw")
        assert len(losses) == 5
        for of_method in losses.values():
            assert of_method[2] < adamw[2]
            assert of_method[3] < adamw[3]
        for method in ("rf.kl_shampoo", "rf.sirf_shampoo"):
            assert all(ours < theirs for ours, theirs in zip(losses[method], adamw, strict=True))


@of_each_notebook
@pytest.mark.notebooks
def test_runs_and_prints_what_is_stored(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stored, notebook = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    printed = _printed(notebook)
    assert _words(printed) == _words(_printed(stored))
    assert len(_figures(notebook)) == len(_figures(stored))
    assert not list(tmp_path.iterdir())
    for output in _outputs(notebook):
        assert output.get("name") != "stderr", output.text
    _require_claims(path.stem, printed)


@of_each_notebook
def test_is_stored_executed_and_without_local_paths(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not re.search(r"/(home|root|tmp|usr|Users)/|site-packages", path.read_text())
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    _require_claims(path.stem, _printed(notebook))


def test_are_stored_small() -> None:
    """`python notebooks/execute.py` stores them so."""
    for path in NOTEBOOKS:
        figures = _figures(nbformat.read(path, as_version=4))
        assert figures, path
        assert max(map(len, figures)) <= 60_000, path
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= 400_000
    assert {path.name for path in FOLDER.iterdir()} - {"execute.py", "__pycache__"} == {path.name for path in NOTEBOOKS}
