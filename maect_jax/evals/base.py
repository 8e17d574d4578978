"""What a protocol is: from the frozen features of an encoder to its entry in the results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from maect_jax import files
from maect_jax.config import Rules
from maect_jax.data.bad_images import BadImages
from maect_jax.data.sources import Source
from maect_jax.errors import UserError
from maect_jax.evals.features import Encode, Features
from maect_jax.run.folder import Run


@dataclass(frozen=True)
class Row:
    """An encoder, which is a row of the results, and what is needed to evaluate it."""

    run: Run  # config, folder and device mesh, which must be the current one
    name: str  # of the row
    images: Mapping[str, Source]  # by split
    bad_images: Mapping[str, BadImages]  # by split, the counters of those that cannot be read
    encode: Encode  # from normalised images to features
    # On the features, kernel fp32 [D, C] and bias [C], if the encoder has one.
    classifier: tuple[np.ndarray, np.ndarray] | None = None
    # By split, what the features are made of, plain JSON.
    made_of: dict[str, dict] = field(default_factory=dict)
    # By split, "train" and "val"; only "train" if no images are held out.
    features: dict[str, Features] = field(default_factory=dict)
    # Of features behind a block, the results of the row that they are inside.
    whole: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ConfigDict:
        return self.run.config

    @property
    def classes(self) -> int:
        """Number of classes; all images must have labels."""
        return 1 + int(max(part.labels.max() for part in self.features.values()))


class Result(NamedTuple):
    """Metrics for `results.json`, plain JSON; and arrays for a file beside the features."""

    metrics: dict | list[dict]
    arrays: Mapping[str, np.ndarray] = {}


class Protocol:
    """A measurement on frozen features."""

    name: ClassVar[str]  # in the results
    section: ClassVar[str] = ""  # of `config.eval`, with its settings, if it has any
    rules: ClassVar[Rules] = {}  # of that section, by the key within it
    needs_labels: ClassVar[bool] = True  # held-out ones, and of all images; or it is skipped
    of_blocks: ClassVar[bool] = False  # whether it also measures those behind `config.eval.blocks`
    of_main_row: ClassVar[bool] = False  # whether it measures the main row alone
    needs_classifier: ClassVar[bool] = False  # or it does not run
    arrays: ClassVar[tuple[str, ...]] = ()  # that every version has, of equal length

    def settings(self, config: ConfigDict) -> dict:
        """What the result depends on beside the features, plain JSON."""
        section = config.eval[self.section].to_dict() if self.section else {}
        # `texts`: the content of files that the settings name.
        return {"seed": config.seed, "texts": [], self.name: section}

    def check_training_images(self, config: ConfigDict, images: Source) -> None:
        """Raises `UserError` if there are too few for its settings."""

    def check_images(self, config: ConfigDict, images: Mapping[str, Source]) -> None:
        """Raises `UserError` if its settings do not fit the images, by split."""

    def skip_reason(self, row: Row) -> str:
        """Why it cannot run on these features; empty if it can."""
        unlabelled = [split for split, part in row.features.items() if not part.labelled]
        if self.needs_labels and unlabelled:
            return f"the images have {row.images[unlabelled[0]].no_labels}"
        return "no images are held out" if self.needs_labels and "val" not in row.features else ""

    def run(self, row: Row) -> Result:
        """Evaluates a row; all processes call it."""
        raise NotImplementedError

    def read_arrays(self, folder: Path, row: str) -> dict[str, np.ndarray]:
        """Reads the arrays of a row; empty if there are none. Raises `UserError` on damage."""
        path = folder_of(folder, row) / f"{self.name}.npz"
        arrays = files.read_saved_arrays(path, *self.arrays) if path.exists() else {}
        own = [arrays[name] for name in self.arrays] if arrays else []
        if len({array.shape[:1] for array in own}) > 1:
            raise UserError(f"{path}: is damaged (its arrays differ in length); remove it")
        if any(array.dtype.kind not in "biuf" for array in own):
            raise UserError(f"{path}: is damaged (its arrays are no numbers); remove it")
        return arrays

    def summarise(self, run: Run, rows: Sequence[str], images: Mapping[str, Source]) -> None:
        """Writes a file on all rows that it measures together, if it has one; process 0 calls it at
        the end."""


def folder_of(run: Path, row: str) -> Path:
    """Where the features of a row are, in a folder for each split, and its protocols' arrays."""
    return run / "features" / row
