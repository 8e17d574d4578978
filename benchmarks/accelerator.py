"""Training steps on the accelerator at hand: images/s, MFU, memory; beside plain PyTorch's.

    python -m benchmarks.accelerator [--configs mae_vitl16 ct_vitl16] [--attention xla cudnn]
        [--batch_size=128] [--settings remat=none] [--largest] [--steps=20] [--limit=540]
        [--out=accelerator.json]

Runs the compiled step that `train` runs, on synthetic uint8 images that lie on the device, and,
where PyTorch sees the device too, the same work in PyTorch (`benchmarks/torch_training.py`: bf16
autocast, scaled-dot-product attention, fused AdamW, `torch.compile`). An image has two views on
both sides. Each case is a process of its own, so that none holds another's memory; what is measured
is written after each. Configs such as `ct_vitb16:test` try the script, on a CPU too.

FLOPs are those of the model's matrix products, and MFU is their share of what the device does in
bf16 products, measured just before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP = 3
# Also for the test variants, whose images are gray.
RGB = (
    "data.source=folder", "data.path=", "model.channels=3",
    "data.mean=(0.485,0.456,0.406)", "data.std=(0.229,0.224,0.225)",
)  # fmt: skip
PYTORCH = "PyTorch"
MATRIX = 8192  # rows and columns of the measured products; on a CPU 1024
PRODUCTS = 10  # in a row, so that starting them does not count


def seconds_of(step: Callable[[], object], wait: Callable[[object], object], steps: int) -> float:
    """The median time of a step, after the first ones."""
    times = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        wait(step())
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


class Case(NamedTuple):
    """What one process measures."""

    config: str
    side: str  # an attention of JAX's, or "PyTorch"
    batch_size: int
    steps: int
    settings: tuple[str, ...] = ()  # more overrides of the config

    def load(self):
        """The config with its overrides."""
        from maect_jax import config as configs

        stage = self.config.partition("_")[0]
        attention = "auto" if self.side == PYTORCH else self.side
        own = f"{stage}.batch_size={self.batch_size}", f"model.attention={attention}"
        return configs.load(self.config, [*RGB, *own, *self.settings])


class Program(NamedTuple):
    """The compiled step of a config, with what it runs on."""

    stage: Any
    step: Any  # compiled
    state: Any
    batch: dict
    mesh: Any
    compile_seconds: float

    def runner(self) -> Callable[[], object]:
        """A function that runs the next step and returns its metrics."""
        state = self.state

        def run():
            nonlocal state
            state, metrics = self.step(state, self.batch)
            return metrics

        return run


def program_of(case: Case) -> Program:
    """Compiles the step that `train` runs, with random images on the device."""
    import jax
    import numpy as np

    from maect_jax import pipeline, sharding
    from maect_jax.stages import STAGES
    from maect_jax.stages.state import create_state, state_shardings
    from maect_jax.stages.step import abstract_batch, jitted_step

    config = case.load()
    pipeline.check(config, jax.device_count())
    mesh, kind = sharding.make_mesh(**config.mesh), STAGES[config.stages[0]]
    images = pipeline.images_to_plan(config)[0]["train"]
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        stage = kind.for_images(config, images)
        batch = {}
        for key, x in abstract_batch(kind, config, images, mesh).items():
            if key == "index":
                rows = np.arange(case.batch_size, dtype=x.dtype)
            else:
                rows = rng.integers(0, 256, x.shape).astype(x.dtype)
            batch[key] = jax.device_put(rows, x.sharding)
        state = create_state(stage, jax.random.key(0), {}, mesh)
        start = time.perf_counter()
        step = jitted_step(stage, state_shardings(state)).lower(state, batch).compile()
    return Program(stage, step, state, batch, mesh, time.perf_counter() - start)


def matrix_product_flops(steps: int) -> float:
    """FLOP/s of the device in bf16 products, of random numbers: of equal ones they are faster."""
    import jax
    import jax.numpy as jnp

    side = MATRIX if jax.default_backend() != "cpu" else 1024
    x, y = jax.random.normal(jax.random.key(0), (2, side, side), jnp.bfloat16)
    y = y / side**0.5  # so that products stay of one size

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ y, x)

    seconds = seconds_of(lambda: multiply(x), jax.block_until_ready, steps)
    return PRODUCTS * 2 * side**3 / seconds


def jax_case(case: Case) -> dict:
    """One config in JAX."""
    import jax

    device, peak = jax.devices()[0], matrix_product_flops(case.steps)
    program = program_of(case)
    seconds = seconds_of(program.runner(), jax.block_until_ready, case.steps)
    flops_per_step = program.stage.flops_per_step(case.batch_size)
    flops = flops_per_step / seconds / program.mesh.size
    memory = device.memory_stats() or {}  # a CPU has none
    return {
        "device": device.device_kind,
        "version": f"JAX {jax.__version__}",
        "compile_seconds": program.compile_seconds,
        "seconds": seconds,
        "images_per_second": case.batch_size / seconds,
        "flops": flops,
        "matrix_product_flops": peak,
        "mfu": flops / peak,
        "peak_bytes": memory.get("peak_bytes_in_use")
        or program.step.memory_analysis().peak_memory_in_bytes,
        "flops_per_step": flops_per_step,
    }


def torch_case(case: Case) -> dict:
    """The same work in PyTorch."""
    import torch

    from benchmarks import torch_training
    from maect_jax import pipeline

    config = case.load()
    name, model = config.stages[0], config.model
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not case.config.endswith(":test"):
        raise RuntimeError("PyTorch sees no GPU")
    device = "cuda" if on_gpu else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32
    images = pipeline.images_to_plan(config)[0]["train"]
    trainer = torch_training.Trainer(config, len(images), device, fast=on_gpu)
    step = torch_training.STEPS[name](trainer)
    shape = (case.batch_size, 2, model.channels, *model.image_size)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    own = torch.arange(case.batch_size, device=device)
    mean, std = (
        torch.tensor(x, device=device).view(3, 1, 1) for x in (config.data.mean, config.data.std)
    )

    def run():
        step((views.float() / 255 - mean) / std, own)

    seconds = seconds_of(run, lambda _: torch.cuda.synchronize() if on_gpu else None, case.steps)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "version": f"PyTorch {torch.__version__}",
        "seconds": seconds,
        "images_per_second": case.batch_size / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def in_process(case: Case, limit: float) -> dict:
    """What a case in a process of its own measures; `{"error": ...}` if it fails."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--case", json.dumps(case)]
    # PyTorch's side loads configs by this package, whose JAX must not take the device's memory.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if case.side == PYTORCH else {})
    # Not pipes: what PyTorch's compiler starts may hold them when the process has been ended.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=err, env=environment, timeout=max(limit, 1)
            )
        except subprocess.TimeoutExpired:
            return {"error": "ran out of time"}
        out.seek(0)
        err.seek(0)
        lines, log = out.read().splitlines(), err.read()
    if done.returncode:  # not by an exception
        return {"error": f"exit status {done.returncode}", "log": log[-4000:]}
    result = json.loads(lines[-1])
    return result | ({"log": log[-4000:]} if "error" in result else {})


def measured(case: Case) -> dict:
    """What the process of a case prints, plain JSON; an exception becomes `{"error": ...}`."""
    try:
        return (torch_case if case.side == PYTORCH else jax_case)(case)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def largest(case: Case, deadline: float) -> tuple[Case, dict]:
    """The largest batch that fits, found by doubling the case's, and its result, which says under
    `next` why the one after it was not measured."""
    best: tuple[Case, dict] | None = None
    while True:
        result = in_process(case, deadline - time.monotonic())
        if "error" in result:
            if best:
                best[1]["next"] = f"{case.batch_size}: {result['error']}"
            return best or (case, result)
        best = case, result
        case = case._replace(batch_size=2 * case.batch_size)


def table(results: list[dict]) -> str:
    lines = [
        "| config | side | batch | ms a step | images/s | TFLOP/s | MFU | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        name = " ".join((r["config"], *r["settings"]))
        start = f"| {name} | {r['side']} | {r['batch_size']} "
        if "error" in r:
            lines.append(f"{start}| {r['error']} | | | | |")
            continue
        flops = f"{r['flops'] / 1e12:.1f} | {r['mfu']:.0%}" if "mfu" in r else " | "
        memory = f"{r['peak_bytes'] / 2**30:.1f} GiB" if r.get("peak_bytes") else ""
        speed = f"{1000 * r['seconds']:.1f} | {r['images_per_second']:,.0f}"
        lines.append(f"{start}| {speed} | {flops} | {memory} |")
    measured_on = {(r["device"], r["version"]) for r in results if "device" in r}
    return "\n".join([*lines, *(f"{device}, {version}" for device, version in measured_on)])


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that `profile_step` has, too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--settings", nargs="+", default=[], help="of the config: KEY=VALUE")
    return parser


def main() -> None:
    parser = arguments_of(__doc__)
    names = [f"{stage}_vit{size}16" for size in "lhb" for stage in ("mae", "ct")]
    parser.add_argument("--configs", nargs="+", default=names)
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"])
    parser.add_argument("--largest", action="store_true", help="double the batch until it fails")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no_peer", action="store_true", help="leave PyTorch out")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--limit", type=float, default=540, help="seconds for all cases")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(Case(*arguments.case))))
        return
    deadline, results = time.monotonic() + arguments.limit, []
    sides = [*arguments.attention, *([] if arguments.no_peer else [PYTORCH])]
    for config in arguments.configs:
        for side in sides:
            case = Case(config, side, arguments.batch_size, arguments.steps, arguments.settings)
            if time.monotonic() > deadline:
                result = {"error": "not started: out of time"}
            elif arguments.largest:
                case, result = largest(case, deadline)
            else:
                result = in_process(case, deadline - time.monotonic())
            results.append(case._asdict() | result)
            arguments.out.write_text(json.dumps(results, indent=1))  # what there is, is kept
            print(table(results[-1:]).splitlines()[2], flush=True)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
