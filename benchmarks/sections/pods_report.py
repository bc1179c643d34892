"""All recorded programs for TPU pods as one Markdown page."""

import json
import pathlib
from typing import Any

from decoders import DECODERS
from harness import report

from sections import pods

HEAD = """# Programs for TPU pods

Written by `python benchmarks/pods.py report` from the records beside it. Nothing here has run on a chip: the programs
are compiled ahead of time. Bytes and collectives are what the compiler says of them; operations are counted in what was
traced.

{caption}
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page `pods.md` from a folder's records, and returns its path."""
    found = [json.loads(path.read_text()) for path in folder.glob("pods_*.json")]
    runs = [run for run in found if run["settings"].get("tree") in DECODERS]
    order = lambda run: (run["settings"]["program"] != "The update", run["settings"]["parameters"], *_place(run))
    sections = [_section(run) for run in sorted(runs, key=order)]
    path = folder / "pods.md"
    path.write_text("\n".join([HEAD.format(caption=pods.CAPTION), *sections]))
    return path


def _place(run: dict[str, Any]) -> tuple[str, int]:
    return run["settings"]["topology"], len(run["settings"]["mesh"])


def _section(run: dict[str, Any]) -> str:
    settings, machine = run["settings"], run["machine"]
    compiled = [record for record in run["records"] if "error" not in record]
    refused = [record for record in run["records"] if "error" in record]
    lines = [
        f"## {pods.TITLE.format(**settings)}",
        "",
        f"Blocks of {settings['block_size']}; compiled on {machine['processor']}, {machine['cores']} cores, "
        f"jax {machine['jax']}, {machine['date']}.",
        "",
        report.markdown_table(pods.COLUMNS, compiled),
    ]
    return "\n".join([*lines, *(f"\n{r['method']} does not compile: {r['error']}" for r in refused), ""])
