"""Memory and speed of a step of ct with microbatches and rematerialisation.

    python -m benchmarks.memory_and_speed

ViT-S with 197 tokens in float32, 8 images x 2 views, on the CPU. All rows compute the same; their
steps take turns, and the times are medians, relative to the first row.
"""

import statistics
import time
from collections.abc import Hashable, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import sharding
from maect_jax.data.transforms import FIELDS
from maect_jax.stages import STAGES, state
from maect_jax.stages.step import jitted_step

ROWS = [(1, "none"), (1, "dots"), (1, "blocks"), (2, "none"), (4, "none"), (8, "none"), (8, "dots")]
ROUNDS = 5
IMAGES = 8


def config_of(name: str, **changes) -> ConfigDict:
    """One of the package's configs of a single stage, of ViT-S in float32 on few images."""
    config = configs.load(str(configs.FOLDER / f"{name}.py"))
    config.model.update(variant="S", dtype="float32")
    config[config.stages[0]].update(batch_size=IMAGES, queue_size=1024)
    config.update(changes)
    return config


def prepared(config: ConfigDict):
    """The stage of a config, its compiled step, its first state and a batch."""
    kind, mesh = STAGES[config.stages[0]], sharding.make_mesh()
    stage, data = kind.from_config(config, 10_000), batch(config)
    with jax.set_mesh(mesh):
        first = state.create_state(stage, jax.random.key(0), {}, mesh)
        step = jitted_step(stage, state.state_shardings(first)).lower(first, data).compile()
        return stage, step, first, data


def batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Random images, cut into views."""
    rng = np.random.default_rng(0)
    numbers = {
        "index": np.arange(IMAGES, dtype=np.int32),
        "label": np.zeros(IMAGES, np.int32),
        "seed": rng.integers(0, 2**32, (IMAGES, 2), dtype=np.uint32),
    }
    sets = STAGES[config.stages[0]].view_sets(config)
    shapes = {
        field: (IMAGES, x.count, *x.size, 3) for field, (x, _) in zip(FIELDS, sets, strict=False)
    }
    return numbers | {
        field: rng.integers(0, 256, shape, dtype=np.uint8) for field, shape in shapes.items()
    }


def medians(rows: Mapping[Hashable, tuple]) -> dict[Hashable, float]:
    """The median seconds of a step of each row, `(step, state, batch)`; the rows take turns."""
    seconds = {row: [] for row in rows}
    states = {row: now for row, (_, now, _) in rows.items()}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for row, (step, _, data) in rows.items():
            start = time.perf_counter()
            states[row], metrics = step(states[row], data)
            jax.block_until_ready(metrics)
            seconds[row].append(time.perf_counter() - start)
    return {row: statistics.median(times[1:]) for row, times in seconds.items()}


def main() -> None:
    rows = {}
    for parts, remat in ROWS:
        config = config_of("ct_vitb16", encoder_microbatches=parts, remat=remat)
        _, *rows[parts, remat] = prepared(config)
    times = medians(rows)
    print("| microbatches | remat | temporaries, MiB | time of a step |\n|---|---|---|---|")
    for (parts, remat), (step, *_) in rows.items():
        mib = step.memory_analysis().temp_size_in_bytes / 2**20
        ratio = times[parts, remat] / times[ROWS[0]]
        print(f"| {parts} | {remat} | {mib:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
