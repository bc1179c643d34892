"""What the exact refresh of inverse-free Shampoo costs beside the published one, on stacks of dense factors.

    python benchmarks/refresh.py

Every ratio is within one run. To compare on one core, run `taskset -c 0 python benchmarks/refresh.py`.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Sequence

from harness import machine, report
from rich.console import Console
from rich.progress import track
from sections import refresh


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds (%(default)s)")
    default_output = pathlib.Path(__file__).parent / "results" / "refresh.json"
    parser.add_argument("--output", type=pathlib.Path, default=default_output, help="(benchmarks/results/refresh.json)")
    options = parser.parse_args(arguments)
    description, records = machine.describe(), []
    for (blocks, dim), dtype in itertools.product(refresh.STACKS, refresh.DTYPES):
        watch = functools.partial(
            track, description=f"{blocks} × {dim}, {dtype}", console=Console(stderr=True), transient=True
        )
        records.append(refresh.measure(blocks, dim, dtype, options.repeats, watch=watch))
    settings = {"repeats": options.repeats}
    report.write_json(options.output, machine=description, settings=settings, records=records)
    caption = f"{refresh.CAPTION}\n{machine.summary(description)}"
    report.show(Console(), refresh.TITLE.format(**settings), caption, refresh.COLUMNS, records)


if __name__ == "__main__":
    main()
