"""Images that are decoded once: reduced to `config.data.cache` pixels, and kept in a file.

The file of a split, `<split>_<digest>.images`, holds the pixels of all images one after the other,
then int32 `[N, 3]`: their heights, widths and labels. The digest is of what the images are and of
what makes their pixels.
"""

import dataclasses
import errno
import json
import shutil
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
from etils import epy
from tqdm import tqdm

from maect_jax import __version__, files
from maect_jax.data import decode, loader, sources, transforms
from maect_jax.data.base import Identity, Source, digest
from maect_jax.data.decode import Decoding
from maect_jax.errors import BadImageError, UserError

with epy.lazy_imports():  # in `keep`: worker processes do without JAX
    import jax

    from maect_jax import sharding

_IN_MEMORY = 2**30  # bytes of a split's pixels; of larger ones each image is read when it is used
_PART = 256  # images between two questions whether all processes go on


def reduced(config, source: Source) -> Source:
    """The images of a source as a config sees them: reduced, if it has them kept (`Reduced`)."""
    if not config.data.cache:
        return source
    return Reduced(source, sources.decoding(config), config.data.cache)


class Reduced(Source):
    """The pixels of a source's images, whose shorter side is at most `side`.

    An image is read, decoded and resized each time, unless `keep` was called, and it could be read
    then.
    """

    def __init__(self, source: Source, decoding: Decoding, side: int):
        self.source, self.decoding, self.side = source, decoding, side
        self.classes, self.labelled = source.classes, source.labelled
        self.reads_labels, self.no_labels = source.reads_labels, source.no_labels
        if source.shape:
            *shape, channels = source.shape
            self.shape = (*transforms.reduced_shape(shape, side), channels)
        self._path = Path()  # of the file, which has no images yet
        self._index = np.zeros((len(source), 3), np.int32)
        self._starts = np.zeros(len(source) + 1, np.int64)
        self._pixels: np.ndarray | None = None  # those in the file, if they are few

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        height, width, label = self._index[record].tolist()
        if not height:
            content, label = self.source[record]
            pixels = decode.pixels(content, self.decoding)
            return transforms.reduced(pixels, self.side), label
        start, end = self._starts[record : record + 2].tolist()
        if self._pixels is None:
            pixels = np.fromfile(self._path, np.uint8, end - start, offset=start)
        else:
            pixels = self._pixels[start:end]
        return pixels.reshape(height, width, self.decoding.channels), label

    @property
    def labels(self) -> np.ndarray:
        is_kept = self.reads_labels and self._starts[-1]
        return self._index[:, 2] if is_kept else self.source.labels

    def name(self, record: int) -> str:
        return self.source.name(record)

    @property
    def identity(self) -> Identity:
        return self.source.identity

    @property
    def where(self) -> str:
        """How much is kept, and where, for messages."""
        memory = "memory and " if self.in_memory else ""
        return f"{self._starts[-1] / 2**20:,.0f} MiB in {memory}{self._path}"

    def keep(self, folder: Path, split: str) -> None:
        """Writes the images into a file, unless it is there; if they are few, reads it into memory.

        All processes call it and see the same folder; process 0 writes. Raises `UserError` if the
        file does not fit on the disk, cannot be written or is damaged."""
        made_of = dict(version=__version__, images=self.identity, side=self.side)
        made_of["decoding"] = dataclasses.asdict(self.decoding)
        path = folder / f"{split}_{digest(json.dumps(made_of).encode())}.images"
        is_writer = jax.process_index() == 0
        # Storage in a network may go on saying that there is no file to who has asked before.
        if not sharding.all_hosts(not is_writer or path.exists()):
            with closing(self._write(path, split)) as parts:
                for _ in range(0, len(self) + _PART, _PART):  # one more, to complete it
                    with sharding.together():
                        if is_writer:
                            next(parts, None)
        with sharding.together():
            self._open(path)

    def _write(self, path: Path, split: str) -> Generator[None, None, None]:
        """Writes the file, a part of the images at each step."""
        draft, count, index = path.with_suffix(".tmp"), len(self), []
        progress = dict(desc=f"decoding {split}", total=count, unit="image", leave=False)
        try:
            path.parent.mkdir(exist_ok=True)
            for cut_off in path.parent.glob(f"{split}_*.tmp"):
                cut_off.unlink()
            with (
                draft.open("wb") as file,
                ThreadPoolExecutor(loader.cores()) as pool,
                tqdm(**progress, disable=not sys.stderr.isatty()) as bar,
            ):
                print(f"{split}: each of {count:,} images is decoded once", flush=True)
                for start in range(0, count, _PART):
                    records = range(start, min(start + _PART, count))
                    for pixels, label in pool.map(self._read, records):
                        file.write(np.ascontiguousarray(pixels).data)
                        index.append((*pixels.shape[:2], label))
                        bar.update()
                    if not start:
                        left = file.tell() / len(records) * (count - len(records))
                        self._check_room(path, split, left)
                    yield
                file.write(np.array(index, np.int32).data)
                files.fsync(file)
            draft.replace(path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise UserError(f"{path}: cannot be written: {error}") from error
            raise UserError(f"{path}: the disk is full. {self._advice}") from error
        finally:
            with suppress(OSError):  # it was renamed; or this must not hide why it was not
                draft.unlink()

    def _read(self, record: int) -> tuple[np.ndarray, int]:
        """An image and its label; no pixels if it cannot be read, for `__getitem__` to say why."""
        label = -1
        try:
            content, label = self.source[record]
            return transforms.reduced(decode.pixels(content, self.decoding), self.side), label
        except (BadImageError, OSError):
            return np.zeros((0, 0, self.decoding.channels), np.uint8), label

    @property
    def _advice(self) -> str:
        return (
            f"Make room, or use another --workdir, with fewer than the {self.side} pixels of "
            "config.data.cache, or 0 for none."
        )

    def _check_room(self, path: Path, split: str, needed: float) -> None:
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise UserError(
                f"{path}: the other {split} images take about {needed / 2**20:,.0f} MiB, and "
                f"{free / 2**20:,.0f} MiB are free. {self._advice}"
            )

    def _open(self, path: Path) -> None:
        shape = self._index.shape
        try:
            size = path.stat().st_size - self._index.nbytes
            self._index = np.fromfile(path, np.int32, offset=size).reshape(shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        self._starts[1:] = np.cumsum(np.prod(self._index[:, :2], axis=1, dtype=np.int64))
        self._starts *= self.decoding.channels
        if self._starts[-1] != size:
            raise UserError(f"{path}: is damaged. Remove it, and run the same command.")
        if not self.reads_labels:  # numbered by the classes of the training images, now others
            self._index[:, 2] = self.source.labels
        self._path, self.in_memory = path, size <= _IN_MEMORY
        if self.in_memory:
            self._pixels = np.fromfile(path, np.uint8, size)
