"""How long training waits for a checkpoint, and how long saving and restoring take.

    python -m benchmarks.saving [CONFIG]

Saves and restores the first state of the last training stage of a config, five times; prints
medians.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from maect_jax import config, sharding
from maect_jax.run import manifest
from maect_jax.run.checkpoints import Checkpoints
from maect_jax.stages import STAGES, state


def main(name: str) -> None:
    loaded = config.load(name)
    stage = STAGES[loaded.stages[-1]].from_config(loaded, 1_281_167)
    mesh, key = sharding.make_mesh(), jax.random.key(0)
    rows = []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        made = jax.block_until_ready(state.create_state(stage, key, {}, mesh))
        abstract = state.abstract_state(stage, key, {}, mesh)
        metadata = {}
        for turn in range(5):
            folder = Path(scratch) / str(turn)
            checkpoints = Checkpoints(folder, on_saved=metadata.__setitem__)
            start = time.monotonic()
            jax.block_until_ready(jax.tree.map(lambda x: np.array(x, copy=True), no_keys(made)))
            copied = time.monotonic() - start
            checkpoints.save(turn, made, {})
            checkpoints.finish()
            start = time.monotonic()
            assert manifest.damage(folder / str(turn)) is None
            checked = time.monotonic() - start
            start = time.monotonic()
            jax.block_until_ready(checkpoints.restore(turn, abstract))
            restored = time.monotonic() - start
            checkpoints.close()
            waited, seconds = (metadata[turn][f"checkpoint_{key}"] for key in ("waited", "seconds"))
            rows.append((copied, waited, seconds, checked, restored))
        size = metadata[0]["checkpoint_bytes"]
    copied, waited, seconds, checked, restored = map(statistics.median, zip(*rows, strict=True))
    print(f"{name}, stage {loaded.stages[-1]}: {size / 2**20:,.0f} MiB on disk")
    print(f"a copy of the state in memory {copied:8.2f} s")
    print(f"training waits                {waited:8.2f} s, {waited / seconds:.2f} of saving")
    print(f"saving, with the manifest     {seconds:8.2f} s")
    print(f"checking the manifest         {checked:8.2f} s, {checked / restored:.2f} of reading")
    print(f"reading                       {restored:8.2f} s")


def no_keys(made):
    return made.replace(rng=jax.random.key_data(made.rng))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["configs/ct_vitb16.py"]))
