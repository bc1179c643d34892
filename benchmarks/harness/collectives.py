"""What a compiled program sends between devices, read from its text."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(pred|bf16|[a-z]+(\d+))\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass
class Traffic:
    """What each device receives, by kind of collective.

    Attributes:
      count: how many there are, those of a loop once per turn.
      size: bytes of their results.
    """

    count: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    size: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def total_size(self) -> int:
        """Bytes of all kinds."""
        return sum(self.size.values())

    def add(self, other: "Traffic", times: int) -> None:
        """Adds another's traffic a number of times."""
        for kind in other.count:
            self.count[kind] += times * other.count[kind]
            self.size[kind] += times * other.size[kind]


def traffic(program: str) -> tuple[Traffic, Traffic]:
    """Returns the traffic of a compiled program's text, and what of it is within branches of conditions."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(1)
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            computations[name].append(line)
    return _of(entry, computations, {})


def _of(
    name: str, computations: dict[str, list[str]], known: dict[str, tuple[Traffic, Traffic]]
) -> tuple[Traffic, Traffic]:
    if name in known:
        return known[name]
    everything, conditional = Traffic(), Traffic()
    for line in computations.get(name, ()):
        if match := _INSTRUCTION.search(line):
            kind = match.group(2)
            everything.count[kind] += 1
            everything.size[kind] += _result_bytes(match.group(1), is_start=bool(match.group(3)))
        trips = int(found.group(1)) if (found := _TRIPS.search(line)) else 1
        for single, several in _CALLED.findall(line):
            for called in [single] if single else [part.strip().lstrip("%") for part in several.split(",")]:
                whole, within = _of(called, computations, known)
                everything.add(whole, trips)
                conditional.add(whole if " conditional(" in line else within, trips)
    known[name] = everything, conditional
    return known[name]


def _result_bytes(shape: str, *, is_start: bool) -> int:
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * (8 if kind == "pred" else int(bits or 16)) // 8
        for kind, bits, dims in _ARRAY.findall(shape)
    ]
    # What starts an asynchronous collective has its operands and its results, which are the larger if they differ.
    return max(sizes) if is_start else sum(sizes)
