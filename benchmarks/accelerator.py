"""Training steps on the accelerator at hand: images/s, MFU, memory; beside plain PyTorch's.

    python -m benchmarks.accelerator [--configs mae_vitl16 ct_vitl16] [--attention xla cudnn]
        [--batch_size=256] [--largest] [--steps=20] [--out=accelerator.json] [--limit=540]

Runs the compiled step that `train` runs, on synthetic uint8 images that lie on the device, and,
where PyTorch sees the device too, the same work in PyTorch (`benchmarks/torch_training.py`: bf16
autocast, scaled-dot-product attention, fused AdamW, `torch.compile`). Each case is a process of its
own, so that none holds another's memory. Configs such as `ct_vitb16:test` try the script.

FLOPs are those of the model's matrix products, and MFU is their share of what the device does in a
bf16 matrix product, measured just before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP = 3
# Also for the test variants, whose images are gray.
RGB = (
    "data.source=folder", "data.path=", "model.channels=3",
    "data.mean=(0.485,0.456,0.406)", "data.std=(0.229,0.224,0.225)",
)  # fmt: skip
PYTORCH = "PyTorch"
MATRIX = 8192  # rows and columns of the measured product; on a CPU 1024


def seconds_of(step: Callable[[], object], wait: Callable[[object], object], steps: int) -> float:
    """The median time of a step, after the first ones."""
    times = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        wait(step())
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def case_of(config: str, side: str, batch_size: int, steps: int) -> dict:
    """What one process measures, plain JSON; `side` is an attention of JAX's, or "PyTorch"."""
    attention = "auto" if side == PYTORCH else side
    stage = config.partition("_")[0]
    return {
        "config": config,
        "attention": side,
        "batch_size": batch_size,
        "settings": [f"{stage}.batch_size={batch_size}", f"model.attention={attention}", *RGB],
        "steps": steps,
    }


def jax_case(case: dict) -> dict:
    """One config in JAX."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maect_jax import config as configs
    from maect_jax import pipeline, sharding
    from maect_jax.stages import STAGES
    from maect_jax.stages.state import create_state, state_shardings
    from maect_jax.stages.step import abstract_batch, jitted_step

    config = configs.load(case["config"], case["settings"])
    pipeline.check(config, jax.device_count())
    mesh, device = sharding.make_mesh(**config.mesh), jax.devices()[0]
    side = MATRIX if device.platform != "cpu" else 1024
    a = jnp.ones((side, side), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    peak = 2 * side**3 / seconds_of(lambda: multiply(a), jax.block_until_ready, case["steps"])
    kind = STAGES[config.stages[0]]
    images = pipeline.images_to_plan(config)[0]
    batch_size = config[kind.name].batch_size
    with jax.set_mesh(mesh):
        stage = kind.for_images(config, images)
        rng = np.random.default_rng(0)
        abstract = abstract_batch(kind, config, images, mesh)
        batch = {}
        for key, x in abstract.items():
            if key == "index":
                rows = np.arange(batch_size, dtype=x.dtype)
            else:
                rows = rng.integers(0, 256, x.shape).astype(x.dtype)
            batch[key] = jax.device_put(rows, x.sharding)
        state = create_state(stage, jax.random.key(0), {}, mesh)
        start = time.perf_counter()
        step = jitted_step(stage, state_shardings(state)).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        memory = step.memory_analysis()

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        seconds = seconds_of(run, jax.block_until_ready, case["steps"])
    flops = stage.flops_per_step(batch_size) / seconds / mesh.size
    return {
        "side": "maect_jax",
        "device": device.device_kind,
        "jax": jax.__version__,
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "images_per_second": batch_size / seconds,
        "flops": flops,
        "matrix_product_flops": peak,
        "mfu": flops / peak,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")
        or memory.peak_memory_in_bytes,
        "flops_per_step": stage.flops_per_step(batch_size),
    }


def torch_case(case: dict) -> dict:
    """The same work in PyTorch; its FLOPs are counted as JAX's."""
    import torch

    from benchmarks import torch_training
    from maect_jax import config as configs
    from maect_jax.models import vit

    config = configs.load(case["config"], case["settings"])
    name, model = config.stages[0], config.model
    section, size = config[name], vit.size_of(model)
    decoder = config.mae.decoder if name == "mae" else None
    head = section if name != "mae" else None
    sizes = torch_training.Sizes(
        batch=section.batch_size,
        image=model.image_size[0],
        patch=model.patch_size,
        **size._asdict(),
        decoder=(decoder.width, decoder.depth, decoder.heads) if decoder else (0, 0, 0),
        projector=head.projector_hidden if head else 0,
        out=head.projector_out if head else 0,
        predictor=head.predictor_hidden if head else 0,
        queue=head.queue_size if head else 0,
        top_k=head.top_k if name == "ct" else 1,
    )
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    trainer = torch_training.Trainer(sizes, device, fast=on_gpu)
    step = torch_training.STEPS[name](trainer)
    shape = (sizes.batch, 2, 3, sizes.image, sizes.image)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    own = torch.arange(sizes.batch, device=device)
    mean, std = (
        torch.tensor(x, device=device).view(3, 1, 1) for x in (config.data.mean, config.data.std)
    )

    def run():
        step((images.float() / 255 - mean) / std, own)

    seconds = seconds_of(run, lambda _: torch.cuda.synchronize() if on_gpu else None, case["steps"])
    return {
        "side": PYTORCH,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "seconds": seconds,
        "images_per_second": sizes.batch / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def in_process(case: dict, limit: float) -> dict:
    """Runs a case in a process of its own; `{"error": ...}` if it fails."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        return {"error": "ran out of time"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def largest(case: dict, deadline: float) -> dict:
    """The result of the largest batch that fits, found by doubling the case's."""
    best: dict = {}
    while time.monotonic() < deadline:
        result = in_process(case, deadline - time.monotonic())
        if "error" in result:
            return best or result
        best = case | result
        batch_size = 2 * case["batch_size"]
        case = case_of(case["config"], case["attention"], batch_size, case["steps"])
    return best


def table(results: list[dict]) -> str:
    lines = [
        "| config | side | attention | batch | ms a step | images/s | TFLOP/s | MFU | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        start = f"| {r['config']} | {r.get('side', '')} | {r['attention']} | {r['batch_size']} "
        if "error" in r:
            lines.append(f"{start}| {r['error']} | | | | |")
            continue
        flops = f"{r['flops'] / 1e12:.1f} | {r['mfu']:.0%}" if "mfu" in r else " | "
        memory = f"{r['peak_bytes'] / 2**30:.1f} GiB" if r.get("peak_bytes") else ""
        speed = f"{1000 * r['seconds']:.1f} | {r['images_per_second']:,.0f}"
        lines.append(f"{start}| {speed} | {flops} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [f"{stage}_vit{size}16" for size in "lhb" for stage in ("mae", "ct")]
    parser.add_argument("--configs", nargs="+", default=names)
    parser.add_argument("--attention", nargs="+", default=["xla", "cudnn"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--largest", action="store_true", help="double the batch until it fails")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no_peer", action="store_true", help="leave PyTorch out")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--limit", type=float, default=540, help="seconds, no case starts later")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run = torch_case if arguments.case["attention"] == PYTORCH else jax_case
        print(json.dumps(arguments.case | run(arguments.case)))
        return
    deadline, results = time.monotonic() + arguments.limit, []
    sides = [*arguments.attention, *([] if arguments.no_peer else [PYTORCH])]
    for config in arguments.configs:
        for side in sides:
            case = case_of(config, side, arguments.batch_size, arguments.steps)
            if time.monotonic() > deadline:
                result = {"error": "not started: out of time"}
            elif arguments.largest:
                result = largest(case, deadline)
            else:
                result = in_process(case, deadline - time.monotonic())
            results.append(case | result)
            arguments.out.write_text(json.dumps(results, indent=1))  # what there is, is kept
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
