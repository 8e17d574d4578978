"""Features of every image of a split: computed once, kept on disk with what they were made of."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import files, sharding
from maect_jax.errors import UserError
from maect_jax.models import vit

_PART = 8192  # images whose features are copied to the devices at a time
_SAVE_EVERY = 20  # batches, after which what is on disk counts as done
_ARRAYS = {"x": (np.float32, 2), "labels": (np.int32, 1), "valid": (np.bool_, 1)}  # dtype, axes

Encode = Callable[[jax.Array], jax.Array]  # normalised images fp32 [B, H, W, C] -> fp32 [B, D]
Batches = Iterator[tuple[np.ndarray, ...]]  # x fp32 [B, D], labels int32 [B], valid bool [B]


class Features(NamedTuple):
    """Features `x` fp32 `[N, D]` of the readable images in the order of the source, on disk if all
    are readable; labels and record numbers int32 `[N]`."""

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
    """The baseline: the pixels themselves, in [0, 1], `[B, H*W*C]`."""

    @jax.jit
    def run(images):
        images = images * jnp.asarray(std) + jnp.asarray(mean)
        return images.reshape(len(images), -1)

    return run


@jax.jit
def _checksums(tree) -> jax.Array:
    def checksum(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        position = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        # Sums of integers are the same in any order, so on any mesh.
        return jnp.sum((bits ^ (bits >> 15)) * (2 * position + 1), dtype=jnp.uint32)

    return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def fingerprint(params: dict) -> str:
    """A digest of weights, equal on any mesh."""
    sums = sharding.to_host(_checksums(params)).tolist()
    return digest({"names": str(jax.tree.structure(params)), "sums": sums})


def digest(values: dict) -> str:
    """A digest of settings, plain JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def collected(batches: Batches) -> Features:
    """The features of the readable images, in memory."""
    return _readable(*map(np.concatenate, zip(*batches, strict=True)))


def _readable(x: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> Features:
    index = np.flatnonzero(valid).astype(np.int32)
    return Features(x if len(index) == len(x) else x[index], labels[index], index)


def stored(
    folder: Path, made_of: dict, images: int, batch_size: int, batches: Callable[[int], Batches]
) -> Features:
    """Reads the features in a folder; computes those that are not there yet.

    All processes call it and see the same folder; process 0 writes.

    Args:
      folder: holds `x.npy`, `labels.npy` and `valid.npy`, and in `settings.json` what they are made
        of and how many images are done.
      made_of: plain JSON. What is made of something else, or is damaged, is computed again.
      images: number of images.
      batch_size: images a batch.
      batches: the batches from a number on.
    """
    made_of = json.loads(json.dumps(made_of))
    saved = _saved(folder)
    done = saved["done"] if saved and saved["settings"] == made_of else 0
    sharding.all_hosts(True)  # all have read before one writes
    if done < images:
        first = done // batch_size
        state = {"settings": made_of, "images": images, "done": first * batch_size}
        _write(folder, state, batches(first))
    sharding.all_hosts(True)
    return load(folder)


def _write(folder: Path, state: dict, batches: Batches) -> None:
    """Writes the rows of the batches after those that are `done`; `state` is `settings.json`."""
    opened, is_writer, images = [], jax.process_index() == 0, state["images"]
    if is_writer and not state["done"]:
        shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as stack:
        for number, batch in enumerate(batches, start=1):
            rows = min(len(batch[0]), images - state["done"])
            if is_writer and not opened:
                shapes = [(images, *x.shape[1:]) for x in batch]
                new = (_open(folder, *x, state["done"]) for x in zip(_ARRAYS, shapes, strict=True))
                opened = [stack.enter_context(file) for file in new]
            for file, x, (dtype, _) in zip(opened, batch, _ARRAYS.values(), strict=False):
                file.write(np.ascontiguousarray(x[:rows], dtype))
            state["done"] += rows
            if is_writer and (number % _SAVE_EVERY == 0 or state["done"] == images):
                for file in opened:
                    files.fsync(file)
                files.write_json(folder / "settings.json", state)


def _open(folder: Path, name: str, shape: tuple[int, ...], done: int):
    """Opens an array's file to write the rows after those that are `done`; makes it if there are
    none, in its full size."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mode = folder / f"{name}.npy", "r+" if done else "w+"
    array = np.lib.format.open_memmap(path, mode, dtype=_ARRAYS[name][0], shape=shape)
    # Rows are written to the file: through the map a full disk would be a crash, not an error.
    file = path.open("r+b")
    file.seek(array.offset + done * array.strides[0])
    return file


def _saved(folder: Path) -> dict:
    """Reads `settings.json`: `settings`, the number of `images`, and how many are `done`; empty if
    it or an array is damaged."""
    try:
        saved = files.read_json(folder / "settings.json")
        done, images = saved.get("done"), saved.get("images")
        whole = type(done) is int and type(images) is int and 0 <= done <= images
        for name, (dtype, axes) in _ARRAYS.items():
            array = np.lib.format.open_memmap(folder / f"{name}.npy", "r")
            whole &= array.dtype == dtype and array.ndim == axes and len(array) == images
    except (UserError, OSError, ValueError, TypeError, OverflowError):
        return {}
    return saved if whole and "settings" in saved else {}


def is_whole(folder: Path) -> bool:
    """Whether a folder has the features of all images."""
    saved = _saved(folder)
    return bool(saved) and saved["done"] == saved["images"]


def load(folder: Path) -> Features:
    """Reads the features of the readable images from a folder that `is_whole`."""
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return _readable(*arrays)


def parts(
    features: Features, mesh, prepare: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields features, prepared row by row, and labels, split over the devices, some thousand
    images at a time; padding has the label -1."""
    for start in range(0, len(features.x), _PART):
        part = slice(start, start + _PART)
        x, labels = prepare(features.x[part]), features.labels[part]
        padding = -len(x) % mesh.size
        x = np.pad(x, ((0, padding), (0, 0)))
        labels = np.pad(labels, (0, padding), constant_values=-1)
        yield sharding.put_rows(x, mesh), sharding.put_rows(labels, mesh)
