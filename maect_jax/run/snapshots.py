"""Pictures of training: what each stage makes of a few images as it goes on.

A stage writes one `watch/<stage>/<step>.npz` at each regular checkpoint: `index`, the record
numbers of the images, ascending; `images`, what these numbers are of, `<split> <digest>`; and what
`Stage.snapshot` returns for them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from maect_jax import files, sharding
from maect_jax.data.base import Source
from maect_jax.data.loader import EvalRecord
from maect_jax.run.folder import Run
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState
from maect_jax.stages.step import jitted_snapshot

IMAGES = 8
_NO_RECORD = -2  # an id that no row of a queue has; -1 marks rows without an image


class Examples(NamedTuple):
    """Images by record number; `held_out` ones have no row in a queue. `images` has all by split,
    also those of the queue."""

    record: EvalRecord
    held_out: bool
    images: Mapping[str, Source]


def writer(stage: Stage, examples: Examples, run: Run) -> Callable[[int, TrainState], None]:
    """A function of (step, state) that writes a snapshot; every process must call it."""
    records, mesh = len(examples.record.source), run.mesh
    index = np.linspace(0, records - 1, IMAGES).astype(np.int32)
    # The number of rows must be divisible by the number of devices: some images come twice.
    rows = -(-IMAGES // mesh.size) * mesh.size
    local = np.resize(index, rows)[sharding.local_rows(rows, mesh)]
    images = np.stack([examples.record(int(i))["image"] for i in local])
    ids = np.full_like(local, _NO_RECORD) if examples.held_out else local
    batch = sharding.put_batch({"images": images, "ids": ids}, mesh)
    snapshot = jitted_snapshot(stage, mesh)
    contents = [f"{split} {x.identity.content}" for split, x in examples.images.items()]
    once, first = np.unique(index, return_index=True)  # there may be fewer images than rows

    def write(step: int, state: TrainState) -> None:
        arrays = snapshot(state, batch)
        if jax.process_index() == 0:
            arrays = {key: value[first] for key, value in jax.device_get(arrays).items()}
            path = run.folder / "watch" / stage.name / f"{step}.npz"
            files.write_arrays(path, index=once, images=np.array(contents), **arrays)

    return write


def saved(run: Path, stage: str) -> dict[int, Path]:
    """The snapshot files of a stage, by step, ascending."""
    paths = (run / "watch" / stage).glob("*.npz")
    return dict(sorted((int(path.stem), path) for path in paths if path.stem.isdecimal()))


def is_of(arrays: Mapping[str, np.ndarray], images: Mapping[str, Source]) -> bool:
    """Whether the arrays of a snapshot are of these images, by split. Version 0.1 did not note
    what they are of."""
    noted = dict(str(line).split() for line in arrays.get("images", ()))
    return all(
        noted.get(split, x.identity.content) == x.identity.content for split, x in images.items()
    )
