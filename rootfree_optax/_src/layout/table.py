"""A plan as a table of plain text."""

import math
import re
from collections.abc import Callable, Sequence

from rootfree_optax._src.common.trees import Shape
from rootfree_optax._src.layout.stack import Stack
from rootfree_optax._src.layout.unit import Unit

_HEADER = ("parameter", "shape", "blocks", "structure", "state", "refresh", "apply")
_GAP = "  "
_SHORTEST_PATH = 12


def render(units: Sequence[Unit], stacks: Sequence[Stack], *, state_bytes: Callable[[Stack], int], width: int) -> str:
    """Returns the table: a line for each parameter and block shape, the totals, and a comparison with Adam.

    Args:
      units: the parameters and groups, in order.
      stacks: what their blocks make together.
      state_bytes: the bytes of a stack's factors.
      width: of the page, in characters. Key paths are shortened to keep to it, as far as the other columns leave room.
    """
    parameters = sum(math.prod(shape) for unit in units for shape in unit.shapes)
    blocks = sum(stack.count for stack in stacks)
    rows = [row for alike in _alike(units) for row in _rows(alike, state_bytes)]
    total = ("total", _metric(parameters), str(blocks), "", *_costs(stacks, 1, state_bytes))
    header, *lines, last = _aligned([_HEADER, *rows, total], width)
    line = "─" * max(map(len, (header, *lines, last)))
    state, adam = sum(map(state_bytes, stacks)), 8 * parameters
    notes = [
        f"{blocks} blocks in {len(stacks)} stacks. State: {state / max(adam, 1):.2f} times Adam's {_metric(adam)}B "
        "(float32).",
        "Beside it, momentum of gradients or directions is as large as the parameters.",
        "Refresh, apply: floating-point operations, of all factors and all gradients.",
        "The exact refresh takes seven products of a dense factor more than the published one.",
    ]
    return "\n".join([header, line, *lines, line, last, *notes])


def _alike(units: Sequence[Unit]) -> list[list[Unit]]:
    """Returns the units in order, those together that differ only by numbers in their key paths."""
    groups: dict[tuple, list[Unit]] = {}
    for unit in units:
        groups.setdefault((re.sub(r"\d+", "*", unit.name), unit.shapes, unit.stacks), []).append(unit)
    return list(groups.values())


def _rows(units: Sequence[Unit], state_bytes: Callable[[Stack], int]) -> list[tuple[str, ...]]:
    """Returns the lines of units that are alike: one for each of their block shapes, the first with the key path."""
    labels = (
        _common_path([unit.name for unit in units]),
        _of(len(units), " + ".join(_times(shape) for shape in units[0].shapes)),
    )
    rows: list[tuple[str, ...]] = []
    for stack in units[0].stacks:
        # All structures are the same for an axis of length one.
        names = [structure.name for structure in stack.structures if structure.dim > 1] or ["diagonal"]
        structure = names[0] if len(set(names)) == 1 else ", ".join(names)
        blocks = _of(len(units) * stack.count, _times(stack.shape))
        rows.append((*labels, blocks, structure, *_costs([stack], len(units), state_bytes)))
        labels = ("", "")
    return rows


def _costs(stacks: Sequence[Stack], repeats: int, state_bytes: Callable[[Stack], int]) -> tuple[str, str, str]:
    return (
        _metric(repeats * sum(map(state_bytes, stacks))) + "B",
        _metric(repeats * sum(stack.refresh_flops for stack in stacks)),
        _metric(repeats * sum(stack.apply_flops for stack in stacks)),
    )


def _common_path(names: Sequence[str]) -> str:
    """Returns a key path with an asterisk for each number in which the given ones differ."""
    tokens = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(token[0] if len(set(token)) == 1 else "*" for token in tokens)


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _of(count: int, what: str) -> str:
    return what if count == 1 else f"{count} of {what}"


def _metric(number: int) -> str:
    """Returns a number in three digits with a metric prefix, as in '29.9M'."""
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g}{prefix}"


def _aligned(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Returns lines with aligned columns, text to the left and numbers to the right, the key paths shortened to fit."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths[1:]) - len(_GAP) * (len(widths) - 1)
    paths = [_shortened(path, max(room, _SHORTEST_PATH)) for path, *_ in rows]
    widths[0] = max(map(len, paths))
    lines = []
    for path, (_, *cells) in zip(paths, rows, strict=True):
        text = [cell.ljust(size) for cell, size in zip((path, *cells[:3]), widths[:4], strict=True)]
        numbers = [cell.rjust(size) for cell, size in zip(cells[3:], widths[4:], strict=True)]
        lines.append(_GAP.join(text + numbers))
    return lines


def _shortened(path: str, width: int) -> str:
    """Returns a key path of at most `width` characters: without keys from its middle if that is enough."""
    if len(path) <= width:
        return path
    first, *rest = path.split("/")
    for i in range(1, len(rest)):
        if len(shorter := "/".join([first, "…", *rest[i:]])) <= width:
            return shorter
    tail = 2 * width // 3
    return f"{path[: width - tail - 1]}…{path[-tail:]}"
