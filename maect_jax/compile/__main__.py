"""Compiles the steps of a page for a TPU slice, on a machine without one (needs the extra [tpu]).

    python -m maect_jax.compile --config=configs/ct_vith16.py --topology=v5e:4x4

Tells whether a step fits into the memory of a chip, what it sends between chips, and how fast it
can be at best. The program is the one that `train` runs; no image is read and no weight is made.
"""

import math
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import errors, files, pipeline, sharding
from maect_jax.compile import chips, collectives
from maect_jax.errors import RunFailedError, UserError
from maect_jax.stages.base import Stage
from maect_jax.stages.state import abstract_state, state_shardings
from maect_jax.stages.step import abstract_batch, jitted_step

# Without these libtpu looks for a TPU, and lets one process in at a time.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}


def devices_of(topology: str) -> list[jax.Device]:
    """One device for each chip of a slice, to compile for and not to run on.

    Raises:
      UserError: there is no such slice, or no libtpu.
    """
    options = chips.find(topology).options
    os.environ.update({key: os.environ.get(key, value) for key, value in _LIBTPU.items()})
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (RuntimeError, ImportError) as error:
        if "libtpu" not in str(error).lower():
            raise
        raise UserError("compiling for a TPU needs libtpu: pip install -e '.[tpu]'") from error


class Lowered(NamedTuple):
    """A stage and its step as `train` jits it, lowered for the devices of a mesh; the bytes of its
    arguments on each device."""

    stage: Stage
    step: jax.stages.Lowered
    arguments: int


def lower(config: ConfigDict, stage_type: type[Stage], mesh) -> Lowered:
    """The step of a stage for a mesh, whose devices need not be there."""
    images, _ = pipeline.images_to_plan(config)
    images = stage_type.training_images(config, images)
    stage = stage_type.for_images(config, images)
    start = abstract_state(stage, jax.random.key(config.seed), {}, mesh)
    batch = abstract_batch(stage_type, config, images, mesh)
    arguments = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((start, batch))
    )
    with jax.set_mesh(mesh):
        step = jitted_step(stage, state_shardings(start)).lower(start, batch)
    return Lowered(stage, step, arguments)


def memory_of(lowered: Lowered, capacity: int) -> tuple[dict, jax.stages.Compiled | None]:
    """Bytes on each device, and the compiled step; `None` in its place where it does not fit.

    `capacity` is the published one; the compiler keeps some of it for itself, and says how much
    there is where a step does not fit.
    """
    memory = {"arguments": lowered.arguments}
    try:
        program = lowered.step.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler tells of the temporaries alone, or of all that it has to place.
        message = " ".join(str(error).split())
        alone = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message)
        whole = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
        if not alone and not whole:
            raise RunFailedError(f"the compiler failed: {message}") from error
        needed, usable = (float(x) * chips.GIB for x in (alone or whole).groups())
        peak = needed + (lowered.arguments if alone else 0)
        return memory | {"peak": round(peak), "capacity": round(usable), "fits": False}, None
    found = program.memory_analysis()
    # The peak is less than the sum: what is donated is free again before the step ends.
    memory |= {"temporaries": found.temp_size_in_bytes, "peak": found.peak_memory_in_bytes}
    return memory | {"capacity": capacity, "fits": True}, program


def bound_of(chip: chips.Chip, devices: int, cost: float, memory: dict, sent: float) -> dict:
    """Lower bounds on the seconds of a compiled step, and so an upper bound on its MFU.

    Each takes what this program cannot save: the model's matrix products at the chip's peak, its
    arguments read once, the bytes that are sent over all links of a chip at once.
    """
    seconds = {
        "compute": cost / devices / chip.flops,
        "memory": memory["arguments"] / chip.hbm_bandwidth,
        "interconnect": sent / chip.link_bandwidth,
    }
    step = max(seconds.values())
    return {**seconds, "step": step, "mfu": seconds["compute"] / step}


def _advice(config: ConfigDict, stage: type[Stage], mesh) -> list[str]:
    """Settings that save memory and that this config and mesh allow."""
    tries = {f"mesh.{axis}": size for axis, size in sharding.larger_fsdp(mesh).items()}
    if stage.tuned_blocks(config):  # without, the encoder has no backward pass
        tries |= {"remat": "blocks", "encoder_microbatches": 2 * config.encoder_microbatches}
    allowed = []
    for key, value in tries.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        try:
            pipeline.check(changed, mesh.size)
        except UserError:
            continue
        if configs.differences(config, changed):
            allowed.append(f"--config.{key}={value}")
    return allowed


def report(config: ConfigDict, stage: type[Stage], topology: str, mesh) -> dict:
    """All that is known of a stage's step on a slice, as plain JSON; `mesh` is of its devices.

    Raises:
      RunFailedError: the compiler failed, and not for want of memory.
    """
    chip = chips.find(topology)
    start = time.monotonic()
    name, lowered = stage.name, lower(config, stage, mesh)
    memory, program = memory_of(lowered, chip.hbm)
    seconds = time.monotonic() - start
    cost = lowered.stage.flops_per_step(config[name].batch_size)
    found = {
        "config": config.name,
        "stage": name,
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config[name].batch_size,
        "encoder_microbatches": config.encoder_microbatches,
        "remat": config.remat,
        "jax": jax.__version__,
        "compile_seconds": round(seconds, 1),
        "flops": cost,
        "memory": memory,
    }
    if program is None:
        return found | {"to_save_memory": _advice(config, stage, mesh)}
    exchanged = collectives.by_kind(collectives.read(program.as_text(), mesh.size))
    sent = sum(kind["sent_bytes"] for kind in exchanged.values())
    bound = bound_of(chip, mesh.size, cost, memory, sent)
    return found | {"collectives": exchanged, "bound": bound}


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def text(found: dict) -> str:
    """A report for people."""
    memory, batch, count = found["memory"], found["batch_size"], found["devices"]
    peak, capacity = _size(memory["peak"]), _size(memory["capacity"])
    parts = {part: _size(memory[part]) for part in ("arguments", "temporaries") if part in memory}
    rows = [
        ("devices", f"{count} ({sharding.mesh_text(found['mesh'])}), {batch // count} images each"),
        ("compiled in", f"{found['compile_seconds']:.0f} s"),
        ("FLOPs a step", f"{found['flops']:.3g}"),
        ("memory a chip", f"{peak} of {capacity}"),
        ("", ", ".join(f"{part} {size}" for part, size in parts.items())),
    ]
    if not memory["fits"]:
        rows.append(("to save memory", ", ".join(found["to_save_memory"]) or "a larger slice"))
    for kind, of in found.get("collectives", {}).items():
        operands, sent = _size(of["operand_bytes"]), _size(of["sent_bytes"])
        rows.append((kind, f"{of['times']:,}, operands {operands}, a chip sends {sent}"))
    if bound := found.get("bound"):
        seconds = {part: _time(bound[part]) for part in ("compute", "memory", "interconnect")}
        rows += [
            ("step", f"at least {_time(bound['step'])}"),
            ("", ", ".join(f"{part} {least}" for part, least in seconds.items())),
            ("images/s", f"at most {batch / bound['step']:,.0f}"),
            ("MFU", f"at most {bound['mfu']:.0%}"),
        ]
    verdict = "fits" if memory["fits"] else f"does not fit: needs {peak}"
    title = f"{found['config']}, stage {found['stage']}, on {found['topology']}: {verdict}"
    return "\n".join([title, *(f"  {name:20}{value}" for name, value in rows)])


def main() -> None:
    """Raises `SystemExit` with status 1 where a step does not fit."""
    parser = configs.parser(__doc__)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="the slice, such as v5e:4x4; an unknown one lists all",
    )
    parser.add_argument(
        "--out", type=Path, help="runs/compile/<config name>.<topology>.json unless given"
    )
    config, arguments = configs.from_command_line(parser)
    pipeline.check_stages(config)
    stages = pipeline.training_stages(config)
    if not stages:
        raise UserError(f"config.stages={config.stages!r}: no training stage to compile")
    pipeline.require_model(config)
    topology = arguments.topology
    devices = devices_of(topology)
    pipeline.check(config, len(devices))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    slug = topology.replace(":", "-")
    out = arguments.out or Path("runs/compile") / f"{config.name}.{slug}.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot write there: {error}") from error
    reports = {}
    for stage in stages:
        reports[stage.name] = report(config, stage, topology, mesh)
        print(text(reports[stage.name]), flush=True)
    files.write_json(out, reports)
    print(out)
    if not all(stage["memory"]["fits"] for stage in reports.values()):
        sys.exit(1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # a slice is compiled for, never looked for
    sys.exit(errors.run_command(main))
