"""Memory and speed of a step of ct with microbatches and rematerialisation.

    python -m benchmarks.memory_and_speed

ViT-S with 197 tokens in float32, 8 images x 2 views, on the CPU. All rows compute the same; their
steps take turns, and the times are medians, relative to the first row.
"""

import statistics
import time

import jax
import numpy as np

from maect_jax import config as configs
from maect_jax import sharding
from maect_jax.stages import STAGES, state
from maect_jax.stages.step import jitted_step

ROWS = [(1, "none"), (1, "dots"), (1, "blocks"), (2, "none"), (4, "none"), (8, "none"), (8, "dots")]
ROUNDS = 5
IMAGES = 8


def prepared(microbatches: int, remat: str):
    """The compiled step of a row, and its first state."""
    config = configs.load(str(configs.FOLDER / "ct_vitb16.py"))
    config.model.update(variant="S", dtype="float32")
    config.ct.update(batch_size=IMAGES, queue_size=1024, frozen_blocks=6)
    config.update(encoder_microbatches=microbatches, remat=remat)
    stage, mesh = STAGES["ct"].from_config(config, 10_000), sharding.make_mesh()
    with jax.set_mesh(mesh):
        first = state.create_state(stage, jax.random.key(0), {}, mesh)
        return jitted_step(stage, state.state_shardings(first)).lower(
            first, batch()
        ).compile(), first


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (IMAGES, 2, 224, 224, 3), dtype=np.uint8),
        "index": np.arange(IMAGES, dtype=np.int32),
        "label": np.zeros(IMAGES, np.int32),
        "seed": rng.integers(0, 2**32, (IMAGES, 2), dtype=np.uint32),
    }


def main() -> None:
    rows = {row: prepared(*row) for row in ROWS}
    seconds = {row: [] for row in ROWS}
    data = batch()
    for _ in range(ROUNDS + 1):  # the first round warms up
        for row, (step, now) in rows.items():
            start = time.perf_counter()
            now, metrics = step(now, data)
            jax.block_until_ready(metrics)
            seconds[row].append(time.perf_counter() - start)
            rows[row] = step, now
    medians = {row: statistics.median(times[1:]) for row, times in seconds.items()}
    print("| microbatches | remat | temporaries, MiB | time of a step |\n|---|---|---|---|")
    for (parts, remat), (step, _) in rows.items():
        mib = step.memory_analysis().temp_size_in_bytes / 2**20
        ratio = medians[parts, remat] / medians[ROWS[0]]
        print(f"| {parts} | {remat} | {mib:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
