"""Features of every image of a split: computed once, kept on disk with what they were made of."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import files, sharding
from maect_jax.data import augment
from maect_jax.errors import UserError
from maect_jax.models import vit

_PART = 8192  # images whose features come to the devices at a time
_KEEP_EVERY = 20  # batches, after which what is on disk counts as done

Encode = Callable[[jax.Array], jax.Array]  # normalised images fp32 [B, H, W, C] -> fp32 [B, D]


class Features(NamedTuple):
    """fp32 `[N, D]` in the order of the source, on disk where all images could be read; labels and
    record numbers int32 `[N]`."""

    x: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    @property
    def labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels >= 0).all())


def encoder(model: vit.ViT, params: dict, pool: str) -> Encode:
    """The pooled features of a ViT (`vit.pool`), jitted."""

    return lambda images: _encode(params, images, model=model, pool=pool)


@partial(jax.jit, static_argnames=("model", "pool"))
def _encode(params, images, *, model: vit.ViT, pool: str) -> jax.Array:
    return vit.features(model, params, images, pool)


def pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """The floor: the pixels themselves, in [0, 1], `[B, H*W*C]`."""

    @jax.jit
    def run(images):
        images = images * jnp.asarray(std) + jnp.asarray(mean)
        return images.reshape(len(images), -1)

    return run


@jax.jit
def _checksum(tree) -> jax.Array:
    def one(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        # Whole numbers add up to the same in any order, so on any mesh.
        return jnp.sum((bits ^ (bits >> 15)) * (2 * place + 1), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(tree)])


def fingerprint(params: dict) -> str:
    """A name of these very weights, equal on any mesh."""
    return digest(
        {
            "names": str(jax.tree.structure(params)),
            "sums": sharding.to_host(_checksum(params)).tolist(),
        }
    )


def digest(values: dict) -> str:
    """A name of some settings, plain JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def extract(
    encode: Encode,
    batches: Iterator[dict[str, np.ndarray]],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Runs an encoder over evaluation batches (`loader.eval_batches`).

    Yields:
      For each batch, on every process: features fp32 `[B, D]`, labels int32 `[B]`, and `valid`
      bool `[B]`, false where an image is padding or could not be read.
    """
    pending = None
    for local in batches:
        batch = sharding.put_batch(local, mesh)
        images = _normalise(batch["image"], mean, std)
        found = encode(images), batch["label"], batch["valid"]
        if pending is not None:  # one batch late, so that the device never waits
            yield sharding.to_host(pending)
        pending = found
    if pending is not None:
        yield sharding.to_host(pending)


def collected(batches: Iterator[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """What `extract` yields, together: features and labels of the images that could be read."""
    x, labels, valid = (np.concatenate(part) for part in zip(*batches, strict=True))
    return x[valid], labels[valid]


_normalise = jax.jit(augment.normalise_pixels, static_argnums=(1, 2))


class _Growing:
    """A `.npy` file of known shape, written row by row; goes on after the rows that count."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...], done: int):
        self._file = path.open("r+b" if done else "wb")
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._dtype, row = dtype, np.dtype(dtype).itemsize * int(np.prod(shape[1:]))
        self._file.truncate(self._file.tell() + done * row)
        self._file.seek(0, 2)

    def add(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def keep(self) -> None:
        files.fsync(self._file)

    def close(self) -> None:
        self._file.close()


_PARTS = {"x": np.float32, "labels": np.int32, "valid": np.bool_}


def stored(
    folder: Path,
    settings: dict,
    images: int,
    batch_size: int,
    batches: Callable[[int], Iterator[tuple[np.ndarray, ...]]],
) -> Features:
    """The features in a folder; made there, or made to their end, where they are not yet.

    Every process must call it, and sees the same folder; process 0 writes.

    Args:
      folder: holds `x.npy`, `labels.npy`, `valid.npy`, and in `settings.json` what they were made
        of and how many images are done.
      settings: what they are to be made of, plain JSON; what was made of something else, or is
        damaged, is made anew.
      images: how many there are.
      batch_size: images a batch.
      batches: gives from batch number b on what `extract` yields.
    """
    settings = json.loads(json.dumps(settings))
    kept = _kept(folder)
    done = kept["done"] if kept and kept["settings"] == settings else 0
    sharding.all_hosts(True)  # all have read before one writes
    if done < images:
        first = done // batch_size
        _write(folder, settings, images, first * batch_size, batches(first))
    sharding.all_hosts(True)
    return load(folder)


def _write(folder: Path, settings: dict, images: int, done: int, batches) -> None:
    parts, shown = {}, jax.process_index() == 0
    if shown and not done:  # it tells of other features
        shutil.rmtree(folder, ignore_errors=True)

    kept = {"settings": settings, "images": images}

    def note():
        for part in parts.values():
            part.keep()
        files.write_json(folder / "settings.json", {**kept, "done": done})

    try:
        for number, found in enumerate(batches, start=1):
            rows = min(len(found[0]), images - done)
            if shown:
                if not parts:
                    folder.mkdir(parents=True, exist_ok=True)
                    shapes = [(images, *array.shape[1:]) for array in found]
                    parts = {
                        name: _Growing(folder / f"{name}.npy", kind, shape, done)
                        for (name, kind), shape in zip(_PARTS.items(), shapes, strict=True)
                    }
                for part, array in zip(parts.values(), found, strict=True):
                    part.add(array[:rows])
            done += rows
            if shown and (number % _KEEP_EVERY == 0 or done == images):
                note()
    finally:
        for part in parts.values():
            part.close()


def _kept(folder: Path) -> dict:
    """What `settings.json` tells: `settings`, how many `images`, how many are `done`; nothing where
    it is damaged, or the arrays do not hold so many."""
    try:
        kept = files.read_json(folder / "settings.json")
    except UserError:
        return {}
    done, images = kept.get("done"), kept.get("images")
    if type(done) is not int or type(images) is not int or not 0 <= done <= images:
        return {}
    held = (_holds(folder / f"{name}.npy", kind, images, done) for name, kind in _PARTS.items())
    return kept if "settings" in kept and all(held) else {}


def _holds(path: Path, kind: type, images: int, done: int) -> bool:
    """Whether an `.npy` is one of so many images, and has the rows of those that are done."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
            row = dtype.itemsize * math.prod(shape[1:])
            whole = file.tell() + done * row <= file.seek(0, os.SEEK_END)
    except (OSError, ValueError):
        return False
    known = shape[:1] == (images,) and len(shape) == (2 if path.stem == "x" else 1)
    return whole and known and dtype == kind and not columns_first


def is_whole(folder: Path) -> bool:
    """Whether `stored` has come to its end in a folder."""
    kept = _kept(folder)
    return bool(kept) and kept["done"] == kept["images"]


def load(folder: Path) -> Features:
    """The features that `stored` has left in a folder, whole; of the images that could be read."""
    x, labels, valid = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _PARTS)
    index = np.flatnonzero(valid).astype(np.int32)
    return Features(x if len(index) == len(x) else x[index], labels[index], index)


def parts(
    found: Features, mesh, prepare: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Features, prepared row by row, and labels, split over the devices, some thousand images at a
    time; rows that fill up have the label -1."""
    for start in range(0, len(found.x), _PART):
        x, labels = prepare(found.x[start : start + _PART]), found.labels[start : start + _PART]
        more = -len(x) % mesh.size
        x, labels = np.pad(x, ((0, more), (0, 0))), np.pad(labels, (0, more), constant_values=-1)
        yield sharding.put_rows(x, mesh), sharding.put_rows(labels, mesh)
