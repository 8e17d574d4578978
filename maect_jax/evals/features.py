"""Features of every image of a split: computed once, kept on disk with what they were made of."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import files, sharding
from maect_jax.errors import UserError
from maect_jax.models import vit

_PART = 4096  # images whose features are read, or copied to the devices, at a time
_SAVE_EVERY = 20  # batches, after which what is on disk counts as done
_ARRAYS = {"x": (np.float32, 2), "labels": (np.int32, 1), "valid": (np.bool_, 1)}  # dtype, axes

EXPORTS = ("npz", "parquet")
_ROW_GROUP = 8192  # rows
Encode = Callable[[jax.Array], jax.Array]  # normalised images fp32 [B, H, W, C] -> fp32 [B, D]
Batches = Iterator[tuple[np.ndarray, ...]]  # x fp32 [B, D], labels int32 [B], valid bool [B]


class Features(NamedTuple):
    """Features `x` fp32 `[N, D]` of the readable images in the order of the source, on disk if all
    are readable; labels and record numbers int32 `[N]`."""

    x: np.ndarray
    labels: np.ndarray
    records: np.ndarray

    @property
    def labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels >= 0).all())


@dataclass(frozen=True)
class Prepared:
    """Features `[N, D]` that are prepared, to `width` numbers a row, where they are read
    (`x[rows]`): of a million images there is no second copy."""

    x: np.ndarray
    prepare: Callable[[np.ndarray], np.ndarray]  # [n, D] -> [n, width], each row by itself
    width: int

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), self.width

    def __getitem__(self, rows) -> np.ndarray:
        return self.prepare(self.x[rows])


Rows = np.ndarray | Prepared  # [N, D]


def in_parts(x: Rows) -> Iterator[np.ndarray]:
    """Yields rows, some thousand at a time."""
    return (x[start : start + _PART] for start in range(0, len(x), _PART))


def mean(x: Rows) -> np.ndarray:
    """The mean `[D]` of rows `[N, D]`, float64."""
    total = sum((part.sum(0, dtype=np.float64) for part in in_parts(x)), np.zeros(x.shape[1]))
    return total / len(x)


def moments(x: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance (over N, not N - 1) of each dimension `[D]` of rows `[N, D]`,
    float64."""
    middle, zero = mean(x), np.zeros(x.shape[1])
    return middle, sum((np.square(part - middle).sum(0) for part in in_parts(x)), zero) / len(x)


def principal(x: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean `[D]` of rows `[N, D]`, the variances `[D]` along their principal axes, the largest
    first, and these axes `[D, D]`, one a row, whose largest number is positive; float64."""
    middle, products = mean(x), np.zeros((x.shape[1], x.shape[1]))
    for part in in_parts(x):
        centred = part - middle
        products += centred.T @ centred
    variance, axes = np.linalg.eigh(products / len(x))
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    axes *= np.sign(largest)  # their signs are arbitrary
    return middle, variance[::-1], axes.T[::-1]


@partial(jax.jit, static_argnums=(0, 3, 4))
def _vit_features(model, params, images, pool, blocks):
    return vit.block_features(model, params, images, pool, blocks=blocks).reshape(len(images), -1)


def encoder(model: vit.ViT, params: dict, pool: str, blocks: tuple[int, ...] = ()) -> Encode:
    """The pooled features of a ViT, jitted; before them, side by side, those behind some of its
    blocks (`vit.block_features`)."""
    return lambda images: _vit_features(model, params, images, pool, blocks)


def pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """The baseline: the pixels themselves, in [0, 1], `[B, H*W*C]`."""

    @jax.jit
    def flattened(images):
        images = images * jnp.asarray(std) + jnp.asarray(mean)
        return images.reshape(len(images), -1)

    return flattened


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


def store(
    made_of: Mapping[Path, dict], images: int, batch_size: int, batches: Callable[[int], Batches]
) -> None:
    """Computes the features that are not yet in their folders, of all folders in one pass.

    All processes call it and see the same folders; process 0 writes.

    Args:
      made_of: by folder, plain JSON. A folder holds `x.npy`, `labels.npy` and `valid.npy`, and in
        `settings.json` what they are made of and how many images are done. What is made of
        something else, or is damaged, is computed again.
      images: number of images.
      batch_size: images a batch.
      batches: the batches from a number on; in `x` the features of the folders are side by side.
    """
    done = {}
    for folder, settings in made_of.items():
        saved = _saved(folder)
        done[folder] = saved["done"] if saved and saved["settings"] == as_json(settings) else 0
    sharding.all_hosts(True)  # all have read before one writes
    if min(done.values()) < images:
        start = min(done.values()) // batch_size * batch_size
        states = {
            folder: {"settings": as_json(made_of[folder]), "images": images, "done": start}
            for folder in made_of
            if done[folder] < images
        }
        _write(list(made_of), states, batches(start // batch_size))
    sharding.all_hosts(True)


def _write(folders: Sequence[Path], states: Mapping[Path, dict], batches: Batches) -> None:
    """Writes the rows of the batches, with the features of `folders` side by side, into those that
    have a state, `settings.json`: after those that are `done`. Raises `UserError` if one is not
    finite."""
    opened, is_writer = {}, jax.process_index() == 0
    for folder, state in states.items() if is_writer else ():
        if not state["done"]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for number, (x, *others) in enumerate(batches, start=1):
            if not np.isfinite(x).all():
                raise UserError(
                    f"{folders[-1]}: features are NaN or infinite, of which nothing can be "
                    "measured. Use an earlier checkpoint, or config.eval.dtype='float32'."
                )
            parts = dict(zip(folders, np.split(x, len(folders), axis=1), strict=True))
            for folder, state in states.items() if is_writer else ():
                rows = min(len(x), state["images"] - state["done"])
                for name, array in zip(_ARRAYS, (parts[folder], *others), strict=True):
                    path = folder / f"{name}.npy"
                    array = np.ascontiguousarray(array, _ARRAYS[name][0])
                    if path not in opened:
                        file = _open(path, array, state["images"], done=state["done"])
                        opened[path] = stack.enter_context(file)
                    opened[path].write(array[:rows])
                state["done"] += rows
            whole = all(state["done"] == state["images"] for state in states.values())
            if is_writer and (number % _SAVE_EVERY == 0 or whole):
                for file in opened.values():
                    files.fsync(file)
                for folder, state in states.items():
                    files.write_json(folder / "settings.json", state)


def _open(path: Path, rows: np.ndarray, images: int, done: int):
    """Opens an array's file, made in its full size, to write such rows after those `done`."""
    mode, shape = "r+" if done else "w+", (images, *rows.shape[1:])
    array = np.lib.format.open_memmap(path, mode, dtype=rows.dtype, shape=shape)
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
    except Exception:  # NumPy and its parser have a kind for each way in which a file can be wrong
        return {}
    return saved if whole and "settings" in saved else {}


def as_json(made_of: dict) -> dict:
    """Plain JSON as it is read again: tuples are lists."""
    return json.loads(json.dumps(made_of))


def saved_made_of(folder: Path) -> dict:
    """What the features in a folder are made of (`stored`); empty if there are none."""
    settings = _saved(folder).get("settings")
    return settings if isinstance(settings, dict) else {}


def is_whole(folder: Path) -> bool:
    """Whether a folder has the features of all images."""
    saved = _saved(folder)
    return bool(saved) and saved["done"] == saved["images"]


def load(folder: Path) -> Features:
    """Reads the features of the readable images from a folder that `is_whole`."""
    return _readable(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))


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


def export(path: Path, features: Features, names: Sequence[str]) -> None:
    """Writes a `.npz` (`features` fp32 `[N, D]`, `label`, `index`, `name`) or a `.parquet` (the
    same as columns, a list of D numbers a row), as the suffix says. `names` are of these images.

    Bytes of a name that are no UTF-8 are those of `os.fsdecode` in a `.npz`, and written as their
    numbers in a `.parquet`, which cannot hold them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, (x, labels, index) = path.with_suffix(".tmp"), features
    if path.suffix == ".npz":
        with draft.open("wb") as file:
            np.savez(file, features=x, name=np.array(names, str), label=labels, index=index)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(x).ravel())  # no copy of what lies on disk
        utf8 = [name.encode(errors="backslashreplace") for name in names]
        name = pa.array(utf8, pa.binary()).cast(pa.string())
        columns = {"name": name, "label": labels, "index": index}
        columns["features"] = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        pq.write_table(pa.table(columns), draft, row_group_size=_ROW_GROUP)
    draft.replace(path)
