"""What a compiled program sends between devices, read from the optimised HLO of one device
(`Compiled.as_text()`), whose shapes are those of that device's parts."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+,? ?)+)")
_NAME = re.compile(r"%([\w.\-]+)")

# What a device sends, by the devices in its group, in sizes of its operands; reductions use a ring.
_SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Collective(NamedTuple):
    """An exchange within groups of devices, such as XLA's "all-gather.3"."""

    name: str
    kind: str
    bytes: int  # of a device's operands
    group: int  # devices in a group
    times: int  # in a step

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time."""
        return self.bytes * _SENT[self.kind](self.group)


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: str
    rest: str

    def called(self) -> list[tuple[str, str]]:
        """The computations that it runs, each after the attribute that names it."""
        named = _CALLED.findall(self.rest)
        return [(attribute, name) for attribute, names in named for name in _NAME.findall(names)]


_Computations = dict[str, list[_Instruction]]


def _computations(text: str) -> tuple[_Computations, str]:
    """The instructions of each computation, and the name of the entry."""
    computations: _Computations = {}
    entry, current = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def size(shape: str) -> int:
    """Bytes of an HLO shape, such as `f32[8,4]{1,0}` or a tuple of such."""
    bits = 0
    for dtype, dims in _SHAPE.findall(shape):
        width = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])  # f32, bf16, f8e4m3fn
        bits += width * math.prod(int(n) for n in dims.split(",") if n)
    return bits // 8


def _trips(loop: _Instruction, computations: _Computations) -> int:
    """How often a loop runs; a loop of JAX counts from 0 to a constant of its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])

    def constants(name: str) -> Iterator[int]:
        for instruction in computations[name]:
            if instruction.opcode == "constant" and instruction.operands.isdigit():
                yield int(instruction.operands)
            for _, called in instruction.called():
                yield from constants(called)

    limits = list(constants(dict(loop.called())["condition"]))
    if len(limits) != 1:
        raise ValueError(f"{loop.name}: cannot tell how often this loop runs")
    return limits[0]


def _times(computations: _Computations, entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    callers = defaultdict(list)
    for name, instructions in computations.items():
        for instruction in instructions:
            trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for attribute, called in instruction.called():
                callers[called].append((name, trips if attribute == "body" else 1))

    @cache
    def times(name: str) -> int:
        return int(name == entry) or sum(times(caller) * n for caller, n in callers[name])

    return {name: times(name) for name in computations}


def _group(rest: str, devices: int) -> int:
    """Devices in each of the groups that exchange."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    return devices


def read(text: str, devices: int) -> list[Collective]:
    """Finds every collective of a program on `devices` devices. Raises `ValueError` if the text
    does not tell the size of one, or how often it happens."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    collectives: dict[str | tuple[str, str], Collective] = {}
    for name, instructions in computations.items():
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind not in _SENT:
                continue
            moved = sum(size(shapes[operand]) for operand in _NAME.findall(i.operands))
            if not moved or not times[name]:
                raise ValueError(f"{name}/{i.name}: cannot tell what it moves, or how often")
            if name.startswith("all-reduce-scatter"):  # how a TPU's reduce-scatter is written
                kind = "reduce-scatter"
            group, channel = _group(i.rest, devices), re.search(r"channel_id=(\d+)", i.rest)
            # An exchange that overlaps with other work is written once for each of its phases.
            key = channel[1] if channel else (name, i.name)
            if group > 1 and (key not in collectives or collectives[key].times < times[name]):
                collectives[key] = Collective(i.name, kind, moved, group, times[name])
    return list(collectives.values())


def by_kind(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """For each kind: how many a step, the bytes of their operands, and what a device sends."""
    return {
        kind: {
            "times": sum(c.times for c in same),
            "operand_bytes": sum(c.times * c.bytes for c in same),
            "sent_bytes": round(sum(c.times * c.sent for c in same)),
        }
        for kind in _SENT
        if (same := [collective for collective in found if collective.kind == kind])
    }
