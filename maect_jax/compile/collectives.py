"""What a compiled program sends between devices, read from its text.

The text is the optimised HLO of one device (`Compiled.as_text()`), whose shapes are those of a
device's part. The body of a loop counts as often as it runs.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+,? ?)+)")


class Collective(NamedTuple):
    """One exchange between groups of `group` devices, which happens `times` times a step.

    `bytes` is the size of a device's operands. XLA's name, such as "all-gather.3", is `name`.
    """

    name: str
    kind: str
    bytes: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes of its own that a device sends each time; reductions go around a ring."""
        others = (self.group - 1) / self.group
        share = {
            "all-gather": self.group - 1,
            "all-reduce": 2 * others,
            "reduce-scatter": others,
            "all-to-all": others,
            "collective-permute": 1,
        }
        return self.bytes * share[self.kind]


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: str
    rest: str

    def called(self):
        """The computations it runs, each with the attribute that names it."""
        for attribute, names in _CALLED.findall(self.rest):
            yield from ((attribute, name) for name in re.findall(r"%([\w.\-]+)", names))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of every computation, and the name of the entry."""
    found, entry, current = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return found, entry


def size(shape: str) -> int:
    """Bytes of an HLO shape, such as `f32[8,4]{1,0}` or a tuple of such."""
    total = 0
    for kind, dims in _SHAPE.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # f32, bf16, f8e4m3fn
        total += bits * math.prod(int(n) for n in dims.split(",") if n)
    return total // 8


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop runs; a loop of JAX counts from 0 to a constant of its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])

    def constants(name):
        for i in computations[name]:
            if i.opcode == "constant" and i.operands.isdigit():
                yield int(i.operands)
            for _, below in i.called():
                yield from constants(below)

    limits = list(constants(dict(loop.called())["condition"]))
    if len(limits) != 1:
        raise ValueError(f"{loop.name}: cannot tell how often this loop runs")
    return limits[0]


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in a step."""
    callers = defaultdict(list)
    for name, instructions in computations.items():
        for instruction in instructions:
            trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for how, target in instruction.called():
                callers[target].append((name, trips if how == "body" else 1))
    found = {entry: 1}

    def times(name):
        if name not in found:
            found[name] = sum(times(caller) * trips for caller, trips in callers[name])
        return found[name]

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
    """Every collective of a program on `devices` devices.

    Raises:
      ValueError: the text does not tell the size of one, or how often it happens.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found = {}
    for computation, instructions in computations.items():
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            group = _group(i.rest, devices)
            operands = re.findall(r"%([\w.\-]+)", i.operands)
            moved = sum(size(shapes[operand]) for operand in operands)
            if not moved or not times[computation]:
                raise ValueError(f"{computation}/{i.name}: cannot tell what it moves, or how often")
            # A TPU's reduce-scatter is written as an all-reduce of which each keeps its part.
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            # One that overlaps with other work is written once for each of its phases.
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = channel[1] if channel else (computation, i.name)
            if group > 1 and (key not in found or found[key].times < times[computation]):
                found[key] = Collective(i.name, kind, moved, group, times[computation])
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """For each kind: how many a step, the bytes of their operands, and what a device sends."""
    totals = {}
    for kind in KINDS:
        own = [c for c in found if c.kind == kind]
        if own:
            totals[kind] = {
                "times": sum(c.times for c in own),
                "operand_bytes": sum(c.times * c.bytes for c in own),
                "sent_bytes": round(sum(c.times * c.sent for c in own)),
            }
    return totals
