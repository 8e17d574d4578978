"""Some images that a run is watched by: what each stage makes of them as training goes on.

A stage writes one `watch/<stage>/<step>.npz` at each of its checkpoints: `index`, the record
numbers of the images in rising order, and what `stage.watch` returns for them.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from maect_jax import files, sharding
from maect_jax.data.loader import EvalRecord
from maect_jax.run.folder import Run
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState
from maect_jax.stages.step import jitted_snapshot

IMAGES = 8
_STEP = re.compile("[0-9]+")
_NO_RECORD = -2  # an id that no row of a queue has, not even one that belongs to no image


class Examples(NamedTuple):
    """Images by record number; `held_out` ones have no row in a queue."""

    record: EvalRecord
    held_out: bool


def _folder(run: Path, stage: str) -> Path:
    return run / "watch" / stage


def writer(stage: Stage, watch: Examples, run: Run) -> Callable[[int, TrainState], None]:
    """A function of (step, state) that writes down what the stage makes of the images.

    Every process must call it; process 0 writes.
    """
    records, mesh = len(watch.record.source), run.mesh
    index = np.linspace(0, records - 1, IMAGES).astype(np.int32)
    # The devices must divide the rows: some images come twice.
    rows = -(-IMAGES // mesh.size) * mesh.size
    here = np.resize(index, rows)[sharding.local_rows(rows, mesh)]
    images = np.stack([watch.record(int(i))["image"] for i in here])
    ids = np.full_like(here, _NO_RECORD) if watch.held_out else here
    batch = sharding.put_batch({"images": images, "ids": ids}, mesh)
    look = jitted_snapshot(stage, mesh)
    once, first = np.unique(index, return_index=True)  # there may be fewer images than that

    def write(step: int, state: TrainState) -> None:
        seen = look(state, batch)
        if jax.process_index() == 0:
            seen = {key: value[first] for key, value in jax.device_get(seen).items()}
            files.write_arrays(_folder(run.folder, stage.name) / f"{step}.npz", index=once, **seen)

    return write


def saved(run: Path, stage: str) -> dict[int, Path]:
    """The files that were written of a stage, by step, in order; none if nothing was."""
    found = _folder(run, stage).glob("*.npz")
    paths = {int(path.stem): path for path in found if _STEP.fullmatch(path.stem)}
    return dict(sorted(paths.items()))


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one of the `saved` files. Raises `UserError` where it is damaged."""
    return files.read_saved_arrays(path)
