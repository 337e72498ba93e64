"""The text of a compiled program -> what its devices send each other, loops counted as often as they run."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

FETCHED = "S(1)"  # how a layout says so
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^=]*)?.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[([^\]]*)\] \{([^}]*)\})")


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # element type and sizes of each array of the result
    text: str
    is_fetched: bool = False  # its (first) result lies in a TPU's vector memory, beside the unit that computes with it
    runs: int = 0  # in a run of the program
    in_loop: bool = False
    fusions: int = 0  # that it is within


class Collective(NamedTuple):
    """All of one kind. `result_bytes`: of the arrays made, per device; `sent_bytes`: that leave a device."""

    kind: str
    calls: int
    result_bytes: int
    sent_bytes: int


def instructions(text: str, *, unknown_trips: int = 1) -> Iterator[Instruction]:
    """Every instruction that runs. `unknown_trips`: of loops whose number of runs is not in the program."""
    bodies, entry = _computations(text)
    for name, where in _places(bodies, entry, unknown_trips).items():
        for instruction in bodies[name]:
            yield instruction._replace(runs=where.runs, in_loop=where.in_loop, fusions=where.fusions)


def collectives(text: str, *, unknown_trips: int = 1) -> list[Collective]:
    """By kind, the largest first."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for one in instructions(text, unknown_trips=unknown_trips):
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        size = result_bytes(one)
        total = totals[kind]
        total[0] += one.runs
        total[1] += one.runs * size
        total[2] += one.runs * _sent(kind, size, _group_size(one.text))
    found = [Collective(kind, *numbers) for kind, numbers in totals.items()]
    return sorted(found, key=lambda one: -one.sent_bytes)


def result_bytes(one: Instruction) -> int:
    """Of what it makes; an asynchronous start also returns its operands, which are not counted."""
    sizes = [num_bytes(*shape) for shape in one.shapes]
    if not one.opcode.endswith("-start") or one.opcode.startswith("all-reduce"):
        return sum(sizes)
    data = [size for size in sizes if size > 4]  # a permute's context words
    return sum(data[len(data) // 2 :])


def num_bytes(element: str, sizes: tuple[int, ...]) -> int:
    """Example: ("bf16", (2, 3)) -> 12."""
    bits = 8 if element == "pred" else int(re.search(r"\d+", element).group())
    return math.prod(sizes) * bits // 8


def _sent(kind: str, size: int, devices: int) -> int:
    """Bytes that leave each of the `devices` that share in it, by the bandwidth-optimal algorithm."""
    share = (devices - 1) / max(devices, 1)
    factor = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": devices - 1, "all-to-all": share}
    return int(size * factor.get(kind, 1))


def _group_size(text: str) -> int:
    found = _GROUPS.search(text)
    if found is None:
        return 2 if "source_target_pairs" in text else 1
    if found[1]:  # [groups,size]<=[...]
        return int(found[1])
    if found[2]:  # {{0,1},{2,3}}
        return len(found[2].split(","))
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", found[3])}  # mesh['a'=8,'b'=1] {'a'}
    return math.prod(sizes[name] for name in re.findall(r"'\w+'", found[4]))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions of each computation, and the name of the one that is run."""
    bodies: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            found = _COMPUTATION.match(line)
            if found:
                current = found[2]
                bodies[current] = []
                entry = current if found[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            shapes = [(kind, _sizes(sizes)) for kind, sizes in _SHAPE.findall(found[2])]
            first = found[2].partition("}")[0]  # bf16[8,16]{1,0:T(8,128)(2,1)S(1)
            bodies[current].append(Instruction(found[1], found[3], shapes, found[4], FETCHED in first))
    return bodies, entry


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


class _Place(NamedTuple):
    runs: int = 0
    in_loop: bool = False
    fusions: int = 0


def _places(bodies: Mapping[str, list[Instruction]], entry: str, unknown_trips: int) -> dict[str, _Place]:
    """The computations that run; of a conditional's branches each counts as taken."""
    places: dict[str, _Place] = {}

    def visit(name: str, times: int, is_looped: bool, fusions: int) -> None:
        known = places.get(name, _Place(fusions=fusions))
        places[name] = _Place(known.runs + times, known.in_loop or is_looped, min(known.fusions, fusions))
        for one in bodies[name]:
            is_loop = one.opcode == "while"
            trips = _trips(one, bodies, unknown_trips) if is_loop else 1
            for names in _CALLED.findall(one.text):
                for called in re.findall(r"[\w.\-]+", " ".join(names)):
                    if called in bodies:
                        visit(called, times * trips, is_looped or is_loop, fusions + (one.opcode == "fusion"))

    visit(entry, 1, False, 0)
    return places


def _trips(loop: Instruction, bodies: Mapping[str, list[Instruction]], unknown: int) -> int:
    """From the compiler's note, or from a condition that compares a counter with one constant."""
    known = _TRIPS.search(loop.text)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = [one for one in lines if one.opcode == "constant" and one.shapes and one.shapes[0] == ("s32", ())]
    if len(bounds) == 1 and any(one.opcode == "compare" and "direction=LT" in one.text for one in lines):
        return int(bounds[0].text.partition(")")[0])
    return unknown


# ---- what must not be in a program ----


def gathered_outside_loops(text: str) -> int:
    """Bytes of weights that are whole on a device at once because no loop goes through them layer by layer."""
    found = (one for one in instructions(text) if one.opcode.removesuffix("-start") == "all-gather")
    return sum(result_bytes(one) for one in found if not one.in_loop)


def most_logits(text: str, *, vocab: int, dims: set[int]) -> int:
    """The most slots that have logits at a time. `dims`: sizes that stand beside the vocabulary in weights."""
    found = [0]
    for one in instructions(text):
        for _, sizes in one.shapes:
            rest = [size for size in sizes if size > 1]
            if vocab in rest:
                rest.remove(vocab)
                if not dims & set(rest):
                    found.append(math.prod(rest))
    return max(found)


def copied_in_loops(text: str, *, at_least: int, vocab: int) -> int:
    """Bytes of arrays of at least so many bytes that a loop copies or transposes each time it runs; logits are none.

    No copies are what a TPU fetches into the memory where it computes, and what a fusion within a fusion gives: it is
    read so, and never lies in memory.
    """
    moved = (one for one in instructions(text) if one.in_loop and one.opcode in ("copy", "copy-start", "transpose"))
    stored = (one for one in moved if not one.is_fetched and one.fusions < 2)
    others = (one for one in stored if not any(vocab in sizes for _, sizes in one.shapes))
    return sum(size for one in others if (size := result_bytes(one)) >= at_least)
