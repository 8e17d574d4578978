"""Where the time of a training step goes, by kind of work and by operation.

    python -m benchmarks.profile_step [--config=ct_vitl16] [--attention=xla] [--batch_size=128]
        [--settings remat=none] [--steps=3] [--out=profile_step.json]

Traces some of the compiled steps that `train` runs (as `benchmarks/accelerator.py` makes them) by
`jax.profiler`, and finds each event's operation in the text of the compiled program, which says
what it computes and which line of the source asked for it. Where events overlap or lie within each
other, the time is that of the one that began last, so that no time counts twice. What is left of
the time of a step is the device's waiting: for the host, for the next kernel.
"""

import collections
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import accelerator

IDLE = "idle, or starting kernels"
# In the order in which they are tried.
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip
SCOPES = {"views": "views", "queue": "queue search", "optimizer": "optimiser"}
MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "fusion", "gather", "get-tuple-element", "pad",
    "parameter", "reshape", "reverse", "slice", "transpose", "tuple",
}  # fmt: skip
PRODUCTS = {"convolution", "dot"}
UNLIKE_ELEMENTWISE = {
    "async-done", "async-start", "call", "conditional", "custom-call", "rng-bit-generator",
    "rng-get-and-update-state", "scatter", "sort", "topk", "while",
}  # fmt: skip
# For kernels of libraries that name no operation.
KERNELS = (
    (r"fmha|flash|sdpa", "attention"),
    (r"nccl", "collectives"),
    (r"gemm|nvjet|cutlass|xmma|cublas", "matrix products"),
    (r"memcpy|memset", "copies and casts"),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of a compiled program that runs by itself."""

    name: str
    opcodes: frozenset[str]  # its own, and those that are fused into it
    target: str  # of a custom call
    scope: str  # such as `jit(step)/jvp(ViT)/blocks/attn/qkv/dot_general`
    source: str  # `file:line`

    @property
    def kind(self) -> str:
        """What it is counted as."""
        within = set(re.split(r"[/()]", self.scope))
        if any(code.startswith(COLLECTIVES) for code in self.opcodes):
            return "collectives"
        for scope, kind in SCOPES.items():
            if scope in within:
                return kind
        if self.opcodes <= MOVES:
            return "copies and casts"
        # The layers before and after it are products, which have scopes of their own.
        if "fmha" in self.target or ("attn" in within and not within & {"qkv", "proj"}):
            return "attention"
        if self.opcodes & PRODUCTS or re.search(r"gemm|matmul", self.target):
            return "matrix products"
        if self.opcodes & UNLIKE_ELEMENTWISE:
            return "other"
        return "normalisation and elementwise"


# A type may be a tuple, and hold layouts such as {1,0:T(8,128)}.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _tables(text: str) -> dict[str, dict[str, str]]:
    """The numbered lines under each heading, such as `StackFrames`, before the computations."""
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    heading = ""
    for line in text.splitlines()[1:]:
        if line.startswith(("%", "ENTRY")):
            break
        number, _, value = line.partition(" ")
        if number.isdigit():
            tables[heading][number] = value.strip('"')
        else:
            heading = line
    return tables


def _sources(text: str) -> dict[str, str]:
    """`file:line` of each stack frame of a program: the innermost line of this project, if any."""
    tables = _tables(text)
    # XLA prints the parent's number plus one, so that the outermost frame seems to be its own.
    too_high = int("parent_frame_id=1}" in tables["StackFrames"].get("1", ""))

    def frames(number: str) -> Iterator[str]:
        while frame := tables["StackFrames"].get(number):
            location = tables["FileLocations"].get(_found(r"file_location_id=(\d+)", frame), "")
            file = tables["FileNames"].get(_found(r"file_name_id=(\d+)", location), "")
            yield f"{file}:{_found(r' line=([0-9]+)', location)}"
            number = str(int(_found(r"parent_frame_id=(\d+)", frame) or 0) - too_high)

    def source(number: str) -> str:
        lines = list(frames(number))
        own = (line for line in lines if "maect_jax/" in line)
        line = next(own, lines[0] if lines else "")
        return re.sub(r".*(maect_jax|site-packages)/", "", line)

    return {number: source(number) for number in tables["StackFrames"]}


def operations(text: str) -> dict[str, Operation]:
    """The instructions of a compiled program (`compiled.as_text()`) by name."""
    sources, computations = _sources(text), collections.defaultdict(list)
    current: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[1]]
        elif instruction := _INSTRUCTION.match(line):
            current.append((instruction[1], instruction[2], line))

    def inside(opcode: str, line: str) -> Iterator[tuple[str, str]]:
        """The opcodes and lines of what is fused into an instruction."""
        called = _CALLS.search(line) if opcode in ("call", "fusion") else None
        for _, code, fused in computations[called[1]] if called else ():
            yield code, fused
            yield from inside(code, fused)

    def operation(name: str, opcode: str, line: str) -> Operation:
        fused = list(inside(opcode, line))
        scopes = collections.Counter(s for _, x in fused if (s := _found(r'op_name="([^"]*)', x)))
        common = scopes.most_common(1)[0][0] if scopes else ""
        frame = next((f for x in (line, *(x for _, x in fused))
                      if (f := _found(r"stack_frame_id=(\d+)", x))), "")  # fmt: skip
        # Calls are how a CPU runs what is inside of them in parallel.
        own = {opcode} if opcode != "call" or not fused else set()
        return Operation(
            name,
            frozenset(own | {code for code, _ in fused}),
            _found(r'custom_call_target="([^"]*)', line),
            _found(r'op_name="([^"]*)', line) or common,
            sources.get(frame, ""),
        )

    every = (entry for entries in computations.values() for entry in entries)
    return {name: operation(name, opcode, line) for name, opcode, line in every}


class Event(NamedTuple):
    """One run of an operation, in nanoseconds."""

    name: str
    start: float
    end: float


def exclusive(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """`(name, nanoseconds)`: all time in which an event runs, each instant once, as that of the
    event that began last (of two at once, the one that ends first)."""
    running: list[Event] = []  # by beginning; the last one counts
    now = 0.0

    def until(end: float) -> Iterator[tuple[str, float]]:
        nonlocal now
        while running and now < end:
            last = running[-1]
            if last.end > now:
                yield last.name, min(last.end, end) - now
                now = min(last.end, end)
            if last.end <= now:
                running.pop()
        now = max(now, end)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        yield from until(event.start)
        running.append(event)
    yield from until(float("inf"))


def events_of(trace: Any, module: str) -> list[Event]:
    """The events of a program in a trace (`jax.profiler.ProfileData`), of the first device."""

    def name_of(event: Any, stats: dict) -> str:
        # A TPU has the text of the instruction in place of its name.
        return str(stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%"))

    devices = sorted(p.name for p in trace.planes if re.match(r"/device:(GPU|TPU):\d+$", p.name))
    events = []
    for plane in trace.planes:
        if plane.name != (devices[0] if devices else "/host:CPU"):
            continue
        for line in plane.lines:
            if devices and not line.name.startswith(("Stream", "XLA Ops")):
                continue  # such as the steps, which hold all others
            for event in line.events:
                stats = dict(event.stats)
                # On a CPU there is much else; on a GPU, kernels that do not say whose they are.
                of = str(stats.get("hlo_module", module if devices else ""))
                if of.partition("(")[0] == module:  # without the program's number
                    end = event.start_ns + event.duration_ns
                    events.append(Event(name_of(event, stats), event.start_ns, end))
    return events


def kind_of(program: dict[str, Operation], name: str) -> str:
    """The kind of an event's operation; that of the kernel's name where the program has none."""
    if name in program:
        return program[name].kind
    kinds = (kind for pattern, kind in KERNELS if re.search(pattern, name, re.IGNORECASE))
    return next(kinds, "other")


def summary(program: dict[str, Operation], events: list[Event], steps: int, wall: float) -> dict:
    """Seconds of a step by kind and by operation, plain JSON.

    Args:
      program: the operations of the step (`operations`).
      events: of so many steps.
      wall: seconds that a step took.
    """
    seconds: dict[str, float] = collections.Counter()
    for name, nanoseconds in exclusive(events):
        seconds[name] += nanoseconds / 1e9 / steps
    kinds: dict[str, float] = collections.Counter()
    for name, took in seconds.items():
        kinds[kind_of(program, name)] += took
    runs = collections.Counter(event.name for event in events)
    nothing = Operation("", frozenset(), "", "", "")

    def described(name: str) -> dict:
        operation = program.get(name, nothing)
        return {
            "operation": name,
            "kind": kind_of(program, name),
            "seconds": seconds[name],
            "runs": runs[name] / steps,
            "source": operation.source,
            "scope": operation.scope,
        }

    ordered = sorted(seconds, key=lambda name: -seconds[name])
    return {
        "seconds": wall,
        "kinds": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "idle": wall - sum(seconds.values()),
        "unknown": sum(took for name, took in seconds.items() if name not in program),
        "operations": [described(name) for name in ordered],
    }


def table(result: dict) -> str:
    """The kinds, and the ten largest operations, as Markdown."""
    wall = result["seconds"]

    def share(seconds: float) -> str:
        return f"{1000 * seconds:,.2f} | {seconds / wall:.1%}"

    lines = ["| kind | ms a step | |", "|---|---|---|"]
    lines += [f"| {kind} | {share(seconds)} |" for kind, seconds in result["kinds"].items()]
    lines += [f"| {IDLE} | {share(result['idle'])} |", f"| **a step** | {share(wall)} |", ""]
    lines += ["| operation | kind | runs | ms a step | | source |", "|---|---|---|---|---|---|"]
    for row in result["operations"][:10]:
        name = f"| {row['operation']} | {row['kind']} | {row['runs']:g} "
        lines.append(f"{name}| {share(row['seconds'])} | {row['source']} |")
    return "\n".join(lines)


def program_of(case: accelerator.Case) -> accelerator.Program:
    """The compiled step of a case, whose text says what the source is today: a program from the
    compile cache may be that of older lines and scopes."""
    import jax

    key = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, key)
    jax.config.update(key, True)
    try:
        return accelerator.program_of(case)
    finally:
        jax.config.update(key, before)


def profile(program: accelerator.Program, steps: int) -> dict:
    """Traces so many steps of a program; what `summary` says of them."""
    import jax

    run = program.runner()
    plain = accelerator.seconds_of(run, jax.block_until_ready, steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            for _ in range(steps):  # as in `train`, the host does not wait for each
                metrics = run()
            jax.block_until_ready(metrics)
            wall = (time.perf_counter() - start) / steps
        (path,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(path))
    text = program.step.as_text()
    module = _found(r"HloModule ([\w.-]+)", text)
    events = events_of(trace, module)
    if not events:
        lines = [f"{p.name}: {', '.join(line.name for line in p.lines)}" for p in trace.planes]
        raise SystemExit(f"the trace has no events of {module}; it has {'; '.join(lines)}")
    device = jax.devices()[0].device_kind
    about = {"device": device, "version": f"JAX {jax.__version__}", "without_profiler": plain}
    return about | summary(operations(text), events, steps, wall)


def main() -> None:
    parser = accelerator.arguments_of(__doc__)
    parser.add_argument("--config", default="ct_vitl16")
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("profile_step.json"))
    arguments = parser.parse_args()
    # The kernels of a CUDA graph do not say which operation they are of.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    sizes = arguments.attention, arguments.batch_size, arguments.steps, arguments.settings
    case = accelerator.Case(arguments.config, *sizes)
    result = case._asdict() | profile(program_of(case), arguments.steps)
    arguments.out.write_text(json.dumps(result, indent=1))
    print(
        f"{case.config}, attention {case.side}, batch {case.batch_size}"
        f"{''.join(f', {setting}' for setting in case.settings)}; {result['device']}, "
        f"{result['version']}; {1000 * result['without_profiler']:,.1f} ms a step without the "
        f"profiler\n\n{table(result)}"
    )
    if result["unknown"] > 0.02 * result["seconds"]:
        part = result["unknown"] / result["seconds"]
        print(f"{part:.0%} of the time is of kernels that name no operation", file=sys.stderr)


if __name__ == "__main__":
    main()
