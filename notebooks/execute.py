"""Executes notebooks in place, each from a clean kernel, and stores them small: figures get a palette of 64 colours.

`python notebooks/execute.py` executes all of them, `python notebooks/execute.py notebooks/scale.ipynb` one.
"""

import argparse
import base64
import io
import pathlib
import tempfile

import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).parent


def compress(png: str) -> str:
    """Returns a figure, a PNG in base64, with at most 64 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def execute(path: pathlib.Path) -> None:
    """Runs a notebook and writes it back, without times and other metadata of the machine."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = compress(output.data["image/png"])
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, default=sorted(FOLDER.glob("*.ipynb")))
    for notebook_path in parser.parse_args().paths:
        execute(notebook_path)
        print(f"{notebook_path.name}: {notebook_path.stat().st_size / 1000:.0f} kB")
