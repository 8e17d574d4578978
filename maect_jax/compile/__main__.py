"""Compiles the steps of a config for a TPU slice, on a machine without one (needs the extra [tpu]).

    maect compile --config=ct_vith16 --topology=v5e:4x4

Reports whether a step fits into the memory of a device, what it sends to others, and lower bounds
on its time. The program is the one that `train` runs; no image is read and no weight is created.
"""

import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.stages import Lowered
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import errors, files, pipeline, sharding
from maect_jax.compile import chips, collectives
from maect_jax.data import cache
from maect_jax.errors import RunFailedError, UserError
from maect_jax.stages.base import Stage
from maect_jax.stages.state import abstract_state, state_shardings
from maect_jax.stages.step import abstract_batch, jitted_step

# Without these libtpu searches for a TPU, and admits one process at a time.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
}  # fmt: skip
# The compiler's message if a step does not fit has the size of temporaries alone, or of everything.
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
_EVERYTHING = re.compile(r"Used ([\d.]+)G of ([\d.]+)G hbm")


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a slice, to compile for but not to run on. Raises `UserError` if the slice is
    unknown or libtpu is not installed."""
    chip = chips.find(topology)
    os.environ.update(_LIBTPU | os.environ)
    if not importlib.util.find_spec("libtpu"):
        raise UserError("compiling for a TPU needs libtpu: pip install -e '.[tpu]'")
    return topologies.get_topology_desc(topology, "tpu", **chip.options).devices


def compiled(step: Lowered, arguments: int, capacity: int) -> tuple[str | None, dict]:
    """Compiles a step for devices of so many bytes, of which its arguments take so many.

    Returns:
      The program as text, None if it does not fit; and the bytes that it needs on each device.

    Raises:
      RunFailedError: the compiler failed for another reason.
    """
    memory = {"arguments": arguments}
    try:
        program = step.compile()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        temporaries = _TEMPORARIES.search(message)
        found = temporaries or _EVERYTHING.search(message)
        if not found:
            raise RunFailedError(f"the compiler failed: {message}") from error
        # What the compiler leaves of the published capacity is known only here.
        needed, usable = (float(x) * chips.GIB for x in found.groups())
        peak = round(needed + (arguments if temporaries else 0))
        return None, memory | {"peak": peak, "capacity": round(usable), "fits": False}
    sizes, text = program.memory_analysis(), program.as_text()
    if sizes is None or text is None:
        raise RunFailedError("the compiler does not describe the program that it made")
    # The peak is less than the sum, because donated arguments are freed before the step ends.
    memory |= {"temporaries": sizes.temp_size_in_bytes, "peak": sizes.peak_memory_in_bytes}
    return text, memory | {"capacity": capacity, "fits": True}


def lower_bounds(chip: chips.Chip, flops: float, arguments: int, sent: float) -> dict[str, float]:
    """Lower bounds on the seconds of a step, and so an upper bound on its MFU: a chip, or a
    device's share of one, computes its FLOPs of matrix products, reads the bytes of its arguments,
    and sends bytes over all links."""
    seconds = {
        "compute": flops / chip.flops,
        "memory": arguments / chip.hbm_bandwidth,
        "interconnect": sent / chip.link_bandwidth,
    }
    step = max(seconds.values())
    return {**seconds, "step": step, "mfu": seconds["compute"] / step}


def _memory_savers(config: ConfigDict, stage: type[Stage], mesh) -> list[str]:
    """Settings that save memory and that the config and the mesh allow."""
    larger = [n for n in range(mesh.devices.shape[1] + 1, mesh.size + 1) if mesh.size % n == 0]
    settings: dict[str, str | int] = {"mesh.fsdp": larger[0]} if larger else {}
    if stage.tuned_blocks(config):  # otherwise the encoder has no backward pass
        settings |= {"remat": "blocks", "encoder_microbatches": 2 * config.encoder_microbatches}
    allowed = []
    for key, value in settings.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        try:
            pipeline.check(changed, mesh.size)
        except UserError:
            continue
        if configs.differences(config, changed):
            allowed.append(f"--config.{key}={value}")
    return allowed


def report(config: ConfigDict, stage_type: type[Stage], topology: str, mesh) -> dict:
    """Compiles the step that `train` runs, for a mesh of a slice's devices; what is known of it.
    Raises `RunFailedError` if the compiler failed, and not because of the memory."""
    share, start = chips.find(topology).device(), time.monotonic()
    splits = pipeline.images_to_plan(config, mesh.size)[0]
    images = cache.reduced(config, stage_type.own_images(config, splits)["train"])
    stage = stage_type.for_images(config, images)
    state = abstract_state(stage, jax.random.key(config.seed), {}, mesh)
    batch = abstract_batch(stage_type, config, images, mesh)
    leaves = jax.tree.leaves((state, batch))
    arguments = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    with jax.set_mesh(mesh):
        step = jitted_step(stage, state_shardings(state)).lower(state, batch)
    program, memory = compiled(step, arguments, share.hbm)
    batch_size = config[stage.name].batch_size
    values = {
        "config": config.name,
        "stage": stage.name,
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "encoder_microbatches": config.encoder_microbatches,
        "remat": config.remat,
        "jax": jax.__version__,
        "compile_seconds": round(time.monotonic() - start, 1),
        "flops": stage.flops_per_step(batch_size),
        "memory": memory,
    }
    if program is None:
        return values | {"to_save_memory": _memory_savers(config, stage_type, mesh)}
    exchanged = collectives.by_kind(collectives.read(program, mesh.size))
    sent = sum(kind["sent_bytes"] for kind in exchanged.values())
    bound = lower_bounds(share, values["flops"] / mesh.size, arguments, sent)
    return values | {"collectives": exchanged, "bound": bound}


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def text(values: dict) -> str:
    """What `report` returns, for people."""
    memory, batch, count = values["memory"], values["batch_size"], values["devices"]
    peak, mesh = _size(memory["peak"]), sharding.mesh_text(values["mesh"])
    rows = [
        ("devices", f"{count} ({mesh}), {batch // count} images each"),
        ("compiled in", f"{values['compile_seconds']:.0f} s"),
        ("FLOPs per step", f"{values['flops']:.3g}"),
        ("memory per device", f"{peak} of {_size(memory['capacity'])}"),
        *((f"  {p}", _size(memory[p])) for p in ("arguments", "temporaries") if p in memory),
    ]
    if not memory["fits"]:
        rows.append(("to save memory", ", ".join(values["to_save_memory"]) or "a larger slice"))
    for kind, total in values.get("collectives", {}).items():
        operands, sent = _size(total["operand_bytes"]), _size(total["sent_bytes"])
        rows.append((kind, f"{total['times']:,}, operands {operands}, a device sends {sent}"))
    if bound := values.get("bound"):
        rows += [
            ("step", f"at least {_time(bound['step'])}"),
            *((f"  {p}", _time(bound[p])) for p in ("compute", "memory", "interconnect")),
            ("images/s", f"at most {batch / bound['step']:,.0f}"),
            ("MFU", f"at most {bound['mfu']:.0%}"),
        ]
    verdict = "fits" if memory["fits"] else f"does not fit: needs {peak}"
    title = f"{values['config']}, stage {values['stage']}, on {values['topology']}: {verdict}"
    return "\n".join([title, *(f"  {name:20}{value}" for name, value in rows)])


def main() -> None:
    """Ends with exit status 1 if a step does not fit."""
    jax.config.update("jax_platforms", "cpu")  # a slice is compiled for, never searched for
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read these programs
    parser = configs.parser(__doc__)
    slice_help = "the slice, such as v5e:4x4; an unknown one lists all"
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help=slice_help)
    parser.add_argument(
        "--out", type=files.user_path, help="default: runs/compile/<config>.<topology>.json"
    )
    config, arguments = configs.from_command_line(parser)
    stages, topology = pipeline.stages_to_show(config), arguments.topology
    devices = devices_of(topology)
    pipeline.check(config, len(devices))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    name = f"{config.name}.{topology.replace(':', '-')}.json"
    out = arguments.out or Path(f"runs/compile/{name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error}") from error
    reports = {}
    for stage in stages:
        reports[stage.name] = report(config, stage, topology, mesh)
        print(text(reports[stage.name]), flush=True)
    files.write_json(out, reports)
    print(out)
    if not all(stage["memory"]["fits"] for stage in reports.values()):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
