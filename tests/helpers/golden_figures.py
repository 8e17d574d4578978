"""Reference figures of the authors' code, and the errors that are measured against them."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from configs import common
from maect_jax.stages import STAGES
from tests.helpers import ROOT

FOLDER = Path(os.environ.get("MAECT_GOLDEN") or ROOT / "tests" / "golden")

# The bounds of fp32, as relative errors: the norm of the difference over the norm of the tensor.
FORWARD = 1e-5
GRADIENT = 1e-4
OPTIMISER = 1e-6
ROUNDING = 2.0**-24  # of one fp32 operation
TINY = 1e-30  # in place of a norm that is zero

# Of each quantity the error nearest to its bound, and the bound; printed when the session ends.
nearest: dict[str, tuple[float, float]] = {}


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, by the rest of their name."""
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Case:
    """One `.npz` of the folder."""

    name: str

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(FOLDER / f"{self.name}.npz") as file:
            return dict(file)

    @cached_property
    def meta(self) -> dict:
        return json.loads(str(self.arrays["meta"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return under(self.arrays, prefix)

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.meta["image_size"]
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(size // self.meta["patch_size"] for size in self.image_size)

    def __str__(self) -> str:
        return self.name


CASES = [Case(path.stem) for path in sorted(FOLDER.glob("*.npz"))]


if not CASES:
    raise FileNotFoundError(f"{FOLDER}: no .npz with reference figures")


def cases(kind: str) -> list[Case]:
    return [case for case in CASES if case.meta["kind"] == kind]


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def assert_within(quantity: str, error: float, bound: float) -> None:
    """Asserts, and remembers the error that comes nearest to its bound."""
    before = nearest.get(quantity, (0.0, bound))
    nearest[quantity] = max(before, (error, bound), key=lambda pair: pair[0] / max(pair[1], TINY))
    assert error <= bound, f"{quantity}: error {error:.3g} above its bound {bound:.3g}"


def assert_close(quantity: str, got, want, bound: float) -> None:
    """Relative error of a tensor."""
    assert np.shape(got) == np.shape(want), quantity
    difference = norm(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    assert_within(quantity, difference / max(norm(want), TINY), bound)


def optimiser_bound(x, moved, updates: int) -> float:
    """How far `x` may be off after `updates` by the optimiser alone, as a norm: by `OPTIMISER` of
    how far it moved, and by two roundings an update; never by more than `OPTIMISER` of itself."""
    stored = 2 * updates * ROUNDING * norm(x)
    return min(OPTIMISER * norm(moved) + stored, OPTIMISER * norm(x))


def prefixed(**parts: dict) -> dict:
    """The parts' entries in one dict: `part/name`."""
    return {f"{part}/{name}": x for part, entries in parts.items() for name, x in entries.items()}


def stage_of(case: Case, dtype: str = "float32"):
    """The stage that a case describes, built from a config as `main` builds it."""
    meta = case.meta
    pool = {"class_token": "cls", "mean_patch": "mean"}[meta.get("pooling", "class_token")]
    config = common.base(case.name, "B", meta["patch_size"], pool)
    config.model.update(
        width=meta["width"],
        depth=meta["depth"],
        heads=meta["heads"],
        image_size=case.image_size,
        dtype=dtype,
    )
    batch = meta["batch"]
    if meta["kind"] == "mae":
        section = common.add_mae(config, batch)
        section.update(mask_ratio=meta["mask_ratio"], epochs=1, warmup_epochs=0)
        section.decoder.update(
            {key: meta[f"dec_{key}"] for key in ("width", "depth", "heads")},
        )
        return STAGES["mae"].from_config(config, batch)
    encoder, head = meta["encoder_groups"], meta["head_groups"]
    last_block = encoder.get(f"blocks.{meta['depth'] - 1}.norm1.bias", [1.0])
    section = common.add_ct(
        config,
        batch,
        meta["frozen_blocks"],
        epochs=1,
        base_lr=meta["encoder_lr"],
        weight_decay=max((decay for _, decay in encoder.values()), default=0.0),
        layer_decay=last_block[0],
        head_base_lr=meta["head_lr"],
        head_weight_decay=max(decay for _, decay in head.values()),
        top_k=1,
        temperature=meta["temperature"],
        target_factor=meta["target_factor"],
        warmup_fraction=meta["warmup_percent"] / 100,
        queue_size=meta["queue_size"],
        projector_hidden=meta["proj_hidden"],
        projector_out=meta["output_dim"],
        predictor_hidden=meta["pred_hidden"],
    )
    assert section.epochs == 1
    return STAGES["ct"].from_config(config, meta["total_steps"] * batch)
