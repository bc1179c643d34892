"""The description of an optimizer: its numbers, and how they print."""

import dataclasses
import html
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from rootfree_optax._src.blocks.rule import BlockFlops

_COLUMNS = ("parameter", "shape", "blocks", "structure", "dtype", "state")
_GAP = "  "


@dataclasses.dataclass(frozen=True)
class Row:
    """Blocks of one shape, of one parameter or of several that are alike; or a parameter without blocks.

    Attributes:
      parameters: the key paths. A group that `Layout(group=…)` joins has one, as in 'dense/kernel+bias'.
      name: one key path for all, as patterns see it, with an asterisk for each number in which they differ.
      shape: of one parameter, as text, behind their number if there are several: '2 of 256×600'.
      blocks: the number and the shape of the blocks, as text; empty for a parameter without blocks.
      structure: of the factors, for each axis if they differ; or why there are none.
      dtype: of the factors, for each axis if they differ, as in 'f32' or 'bf16'; empty without factors.
      state_bytes: bytes of what is kept for these blocks, factors and momentum among it. A parameter's first row has
        what other transformations of the chain keep for it, too.
    """

    parameters: tuple[str, ...]
    name: str
    shape: str
    blocks: str
    structure: str
    dtype: str
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one update, on each device; None for what it does not tell.

    Attributes:
      temporary_bytes: memory beside arguments and results.
      flops: floating-point operations. The compiler counts every branch, but one turn of a loop alone, in which large
        stacks are refreshed.
    """

    temporary_bytes: int | None
    flops: int | None


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What an optimizer keeps and computes for some parameters. Prints as a table, in plain text and in notebooks.

    Attributes:
      rows: of the table.
      parameters: the number of entries of all parameters.
      blocks: the number of blocks.
      state_bytes: bytes of the whole state: those of the rows, of step counts, and of padding on a mesh.
      adam_bytes: bytes of Adam's state for the same parameters, two numbers of its own dtype for each entry.
      flops: of the products for all blocks: `precondition` at every step, and beside it `refresh` and `observe` when
        they are due. None if a rule does not tell.
      refresh_every: in words, when refreshes are due; of each Kronecker transformation, without repetition.
      statistics_every: in words, when statistics take in a gradient, likewise.
      mesh_axes: the axes of the mesh that blocks are divided over.
      received_bytes: of gradients and directions that a device receives in an update, where the parameters' shardings
        are known, see `Layout.specs`; None where the compiler decides what is sent.
      compiled: what the compiler says of one update; None unless that was asked for.
    """

    rows: tuple[Row, ...]
    parameters: int
    blocks: int
    state_bytes: int
    adam_bytes: int
    flops: BlockFlops | None
    refresh_every: tuple[str, ...]
    statistics_every: tuple[str, ...]
    mesh_axes: tuple[str, ...]
    received_bytes: int | None
    compiled: Compiled | None

    @property
    def adam_ratio(self) -> float:
        """The bytes of the state over those of Adam's."""
        return self.state_bytes / max(self.adam_bytes, 1)

    def __str__(self) -> str:
        """Returns the table in plain text, as wide as the terminal at most."""
        width = shutil.get_terminal_size().columns
        header, *lines, total = _align([_COLUMNS, *self._cells(), self._totals()], width)
        rule = "─" * max(map(len, (header, *lines, total)))
        notes = [part for note in self._notes() for part in textwrap.wrap(note, width, subsequent_indent="  ")]
        return "\n".join([header, rule, *lines, rule, total, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns the table for notebooks."""

        def line(tag: str, cells: tuple[str, ...]) -> str:
            sides = ["left"] * (len(cells) - 1) + ["right"]
            pairs = zip(sides, map(html.escape, cells), strict=True)
            return (
                "<tr>" + "".join(f'<{tag} style="text-align: {side}">{cell}</{tag}>' for side, cell in pairs) + "</tr>"
            )

        body = "\n".join(line("td", cells) for cells in self._cells())
        return (
            f"<table>\n<thead>{line('th', _COLUMNS)}</thead>\n<tbody>\n{body}\n</tbody>\n"
            f"<tfoot>{line('th', self._totals())}</tfoot>\n</table>\n"
            f"<p>{'<br>'.join(map(html.escape, self._notes()))}</p>"
        )

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Yields the rows as text; name and shape stand once for all blocks of a parameter."""
        last: tuple[str, ...] = ()
        for row in self.rows:
            labels = ("", "") if row.parameters == last else (row.name, row.shape)
            yield (*labels, row.blocks, row.structure, row.dtype, _metric(row.state_bytes, "B"))
            last = row.parameters

    def _totals(self) -> tuple[str, ...]:
        return ("total", _metric(self.parameters, ""), str(self.blocks), "", "", _metric(self.state_bytes, "B"))

    def _notes(self) -> list[str]:
        """Returns the lines below the table."""
        adam = _metric(self.adam_bytes, "B")
        notes = [f"State: {self.adam_ratio:.2f} times Adam's {adam} of two numbers for each entry of the parameters."]
        if self.blocks:
            observe, refresh, precondition = [_metric(number, " FLOPs") for number in self.flops or (None, None, None)]
            notes.append(f"Step: {precondition} of products, without refresh and statistics.")
            notes.append(f"Refresh: {refresh}, {' or '.join(self.refresh_every)}.")
            if self.statistics_every:
                notes.append(f"Statistics: {observe}, {' or '.join(self.statistics_every)}.")
        if self.mesh_axes:
            notes.append(f"Blocks are divided over the mesh axes {', '.join(self.mesh_axes)}.")
            if self.received_bytes is None:
                notes.append(
                    "Traffic: up to the compiler, at worst every update gathers all gradients and all directions. With "
                    "Layout(specs=...) a device receives as much as its shards of them."
                )
            else:
                notes.append(f"Traffic: an update's exchange is {_metric(self.received_bytes, 'B')} on each device.")
        if self.compiled is not None:
            temporaries, flops = _metric(self.compiled.temporary_bytes, "B"), _metric(self.compiled.flops, " FLOPs")
            notes.append(f"Compiled update, on each device: {temporaries} of temporaries, {flops}.")
        return notes


def _align(rows: Sequence[tuple[str, ...]], width: int) -> Iterator[str]:
    """Yields lines of aligned columns, the last one to the right, that keep to a width as far as their words do.

    A key path in the first column has a line to itself where it has no room; then the cells of other columns break.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    least[0] = len(rows[0][0])
    excess = lambda: sum(widths) + len(_GAP) * (len(widths) - 1) - width
    widths[0] = max(widths[0] - max(excess(), 0), least[0])
    while excess() > 0 and (slack := [i for i, size in enumerate(widths) if size > least[i]]):
        widths[max(slack, key=lambda i: widths[i])] -= 1
    widths[0] = max(len(path) for path in columns[0] if len(path) <= widths[0])
    for path, *cells in rows:
        if len(path) > widths[0]:
            yield from (path[start : start + width] for start in range(0, len(path), width))
            path = ""
        broken = [textwrap.wrap(cell, size) for cell, size in zip(cells, widths[1:], strict=True)]
        for line in itertools.zip_longest([path], *broken, fillvalue=""):
            *texts, number = line
            yield _GAP.join([*map(str.ljust, texts, widths), number.rjust(widths[-1])]).rstrip()


def _metric(number: int | None, unit: str) -> str:
    """Returns a number in three digits with a metric prefix, as in '29.9MB'."""
    if number is None:
        return f"unknown {unit.strip()}"
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g}{prefix}{unit}"
