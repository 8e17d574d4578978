"""Reference figures of the authors' code, and the errors that are measured against them."""

import json
import os
import re
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


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows `[Q, D]` of length 1, fp32."""
    return np.float32(x / np.linalg.norm(np.float64(x), axis=1, keepdims=True))


def pair(size) -> tuple[int, int]:
    """(height, width) of a number or a list."""
    return (size, size) if isinstance(size, int) else tuple(size)


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, by the rest of their name."""
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}


# What MIM-Refiner's code calls otherwise than MAE-CT's.
_REFINER = {
    r"cls_tokens\.tokens$": "cls_token",
    r"pos_embed\.embed$": "pos_embed",
    r"queue\.x$": "queue",
    r"queue\.idx$": "queue_id",
    r"queue\.cls$": "queue_y",
    r"queue\.ptr$": "queue_ptr",
    r"(project|predict)or\.(\d)\.(\d)\.": lambda m: f"{m[1]}or.{3 * int(m[2]) + int(m[3])}.",
}


def _plain(name: str) -> str:
    """A name of MIM-Refiner's code as MAE-CT's code has it."""
    for theirs, plain in _REFINER.items():
        name = re.sub(theirs, plain, name)
    return name


def _plain_array(name: str, x: np.ndarray) -> np.ndarray:
    """Also rows of unit length where MAE-CT's are: what matters of them are cosines."""
    if name.endswith(("queue.x", "/projected", "/neighbours")):
        return unit_rows(x)
    return x.reshape(1, -1, x.shape[-1]) if name.endswith("pos_embed.embed") else x


@dataclass(frozen=True)
class Case:
    """One `.npz` of the folder. MIM-Refiner's has the names of MAE-CT's, and unit rows likewise."""

    name: str

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(FOLDER / f"{self.name}.npz") as file:
            arrays = {name: file[name] for name in file if not name.endswith("queue.age")}
        if json.loads(str(arrays["meta"]))["kind"] != "refine":
            return arrays
        return {_plain(name): _plain_array(name, x) for name, x in arrays.items()}

    @cached_property
    def meta(self) -> dict:
        return json.loads(str(self.arrays["meta"]))

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return under(self.arrays, prefix)

    @property
    def image_size(self) -> tuple[int, int]:
        return pair(self.meta["image_size"])

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(size // self.meta["patch_size"] for size in self.image_size)

    def __str__(self) -> str:
        return self.name

    # Of contrastive steps

    @property
    def heads(self) -> tuple[str, ...]:
        """What stands before the names of each head's tensors, in the order of our stack."""
        if self.kind == "ct":
            return ("head",)
        return tuple(f"heads/{head}" for head in (*self.meta["blocks"], "main"))

    @cached_property
    def groups(self) -> dict[str, tuple[float, float]]:
        """Name -> (factor of the learning rate, weight decay) of what is trained."""
        meta = self.meta
        if self.kind == "refine":
            return {_plain(name): tuple(group) for name, group in meta["groups"].items()}
        return prefixed(encoder=meta["encoder_groups"], head=meta["head_groups"])

    @property
    def tunes_encoder(self) -> bool:
        return any(name.startswith("encoder/") for name in self.groups)

    def learning_rate(self, s: int, name: str) -> float:
        """Of a tensor at step `s`."""
        part = name.rpartition("/")[0]
        if self.kind == "refine":
            rate = self.meta["lr_per_step"][s][part]
        else:
            rate = self.meta["base_lr_per_step"][s][("encoder", "head").index(part)]
        return rate * self.groups[name][0]

    def by_view(self, s: int, name: str) -> dict[str, np.ndarray]:
        """Head -> what step `s` has by this name, `[V, B, ...]`."""
        if self.kind == "ct":
            return {"head": np.stack([self[f"step{s}/{name}{view}"] for view in (0, 1)])}
        found = ((head, self[f"step{s}/{head[6:]}/{name}"]) for head in self.heads)
        return {head: x.reshape(-1, self.meta["batch"], x.shape[-1]) for head, x in found}

    def neighbours(self, s: int) -> dict[str, np.ndarray]:
        """Head -> the chosen rows of its flat queue, `[2, B]`."""
        if self.kind == "ct":
            return self.by_view(s, "nn")
        chosen, batch = {}, self.meta["batch"]
        for head, rows in self.by_view(s, "neighbours").items():
            queue = self[f"init/{head}/queue"].copy()
            for t in range(s):
                place = int(self[f"init/{head}/queue_ptr"].item()) + t * batch + np.arange(batch)
                queue[place % len(queue)] = self.by_view(t, "projected")[head][0]
            is_it = (rows[:, :, None] == queue).all(-1)
            assert is_it.any(-1).all()
            chosen[head] = is_it.argmax(-1)
        return chosen


CASES = [Case(path.stem) for path in sorted(FOLDER.glob("*.npz"))]


if not CASES:
    raise FileNotFoundError(f"{FOLDER}: no .npz with reference figures")


def cases(kind: str) -> list[Case]:
    return [case for case in CASES if case.meta["kind"] == kind]


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
    decays = {
        part: max((x for name, (_, x) in case.groups.items() if name.startswith(part)), default=0.0)
        for part in ("encoder", "head")
    }
    head = dict(base_lr=meta["head_lr"], weight_decay=decays["head"])
    tuning = dict(
        base_lr=meta["encoder_lr"],
        weight_decay=decays["encoder"],
        layer_decay=case.groups.get(f"encoder/blocks.{meta['depth'] - 1}.norm1.bias", [1.0])[0],
        **{f"head_{key}": x for key, x in head.items()},
    )
    if case.kind == "ct":
        section = common.add_ct(config, batch, meta["frozen_blocks"])
        section.update(target_factor=meta["target_factor"], epochs=1)
        section.warmup_fraction = meta["warmup_percent"] / 100
        updates = meta["total_steps"]
    else:
        add = common.add_refine if case.tunes_encoder else common.add_refine_head
        section = add(config, batch, blocks=tuple(meta["blocks"]))
        section.update(epochs=meta["epochs"], warmup_epochs=meta["warmup_epochs"])
        section.local.views, updates = meta["local_views"], meta["updates_per_epoch"]
        if section.local.views:
            section.local.size = pair(meta["local_size"])
    section.update(
        top_k=1,
        temperature=meta["temperature"],
        queue_size=meta["queue_size"],
        projector_hidden=meta["proj_hidden"],
        projector_out=meta["output_dim"],
        predictor_hidden=meta["pred_hidden"],
        **(tuning if "head_base_lr" in section else head),
    )
    return STAGES[config.stages[0]].from_config(config, updates * batch)
