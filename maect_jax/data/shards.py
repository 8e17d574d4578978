"""Images in shards: tars of WebDataset, and parquet files as HuggingFace hands them out.

The index of a shard is a folder in the user's cache. `rows.npy` says of each image where its bytes
are; a row is read when its image is. `about.json` has the labels that occur. The images of a tar
are read where they are; those of a parquet file, which compresses many together, are unpacked once,
into `images`. The folder's name is a digest of the shard's path, size, time and some of its bytes,
so that a shard that has changed is indexed again.
"""

import errno
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maect_jax import files
from maect_jax.data import decode, tars
from maect_jax.data.base import THREADS, Identity, Source, digest, path_error
from maect_jax.data.folder import counted
from maect_jax.data.shard_files import Shard, storage_of
from maect_jax.errors import RunFailedError, first_of, shown

_ROWS, _ABOUT, _IMAGES = "rows.npy", "about.json", "images"  # of an index
_VERSION = "1"  # of the index; another one is made anew
_WINDOW, _WINDOWS = 4096, 4  # bytes of a shard on a disk, and places, that tell whether it changed
_MAKERS = 8  # shards that are indexed at a time; of parquet each takes the memory of a row group
_READ_AHEAD = 2**23  # bytes of a request, while a shard on a bucket is indexed
_DRAFT, _DAY = ".tmp", 24 * 3600.0  # of a process that was killed
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MOST_CLASSES = 2**20  # more than any data set has
_FEW_CLASSES = 100  # each image may have its own among so many
_ADVICE = "Set XDG_CACHE_HOME to a folder on a larger disk, or write the images as tars"
_LOGGER = logging.getLogger(__name__)


class Shards(Source):
    """The images of shards, one shard after the other, in the order in each.

    Args:
      shards: those of a split (`shard_files.find`).
      label_key: of tars what holds the label in a member `.json`, of parquet files its column; None
        for images without labels.

    Raises:
      UserError: a shard is damaged, is not what a shard can be, or cannot be indexed; or only some
        images have labels, or some are named and some numbered.
    """

    def __init__(self, shards: Sequence[Shard], label_key: str | None):
        self._shards = list(shards)
        self._folders = _indexed(self._shards, label_key)
        # Of each index the type of its rows, and where in the file they start. None is mapped into
        # memory for good: a map holds a file open, and there may be more shards than may be open.
        self._rows: list[tuple[np.dtype, int]] = []
        about, codes, contents = [], [], []
        for folder in self._folders:
            try:
                rows = np.load(folder / _ROWS, mmap_mode="r")
                found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
                about.append([found[key] for key in ("texts", "classes", "others")])
            except Exception as problem:  # NumPy has a kind for each damage
                raise _lost(folder, problem) from problem
            self._rows.append((rows.dtype, rows.offset))
            codes.append(np.array(rows["label"]))
            contents.append(digest(*(rows[key] for key in ("name", "size", "label"))).encode())
        texts, classes, others = zip(*about, strict=True)
        self._starts = list(accumulate(map(len, codes), initial=0))
        self._times = digest("\n".join(shard.time for shard in shards).encode())
        self._content = digest(
            *(os.path.basename(shard.path).encode(errors="surrogateescape") for shard in shards),
            json.dumps([self._starts, texts, classes]).encode(),
            *contents,
        )
        self.classes, numbers = _numbered(texts, classes, len(self))
        # A row without a label has the code -1, of the last element.
        labels = [np.append(of, -1)[found] for of, found in zip(numbers, codes, strict=True)]
        self.labels = np.concatenate(labels).astype(np.int32)
        without = np.flatnonzero(self.labels < 0)
        if 0 < len(without) < len(self):
            raise path_error(
                f"{len(without)} of {len(self)} images have no label, such as "
                f"{shown(self.name(int(without[0])))}; label all or set config.data.labels=none"
            )
        if len(without):
            self.classes = []
        left_out: Counter[str] = sum(map(Counter, others), Counter())
        if left_out:
            where = os.path.dirname(shards[0].path)
            _LOGGER.warning("%s: left out %s", where, counted(left_out))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        shard, row = self._row(record)
        offset, size, check = (int(row[key]) for key in ("offset", "size", "check"))
        is_tar = self._shards[shard].is_tar
        path = self._shards[shard].path if is_tar else str(self._folders[shard] / _IMAGES)
        header = tars.HEADER if is_tar else 0
        content = _read(path, offset - header, header + size)
        if len(content) < header + size or zlib.crc32(content[:header]) != check:
            raise RunFailedError(f"{path}: was changed after it was indexed")
        return content[header:], int(self.labels[record])

    @property
    def paths(self) -> set[str]:
        """Those of the shards."""
        return {shard.path for shard in self._shards}

    def name(self, record: int) -> str:
        """The path of an image: its shard's, then its own there."""
        shard, row = self._row(record)
        return f"{self._shards[shard].path}/{os.fsdecode(bytes(row['name']))}"

    @cached_property
    def identity(self) -> Identity:
        """Of the names of the shards, of the names, sizes and labels of all images, and of what is
        in some of them."""
        return Identity(len(self), digest(self._content.encode(), *self.sampled()), self._times)

    def _row(self, record: int) -> tuple[int, np.void]:
        shard = bisect(self._starts, record) - 1
        folder, (kind, start) = self._folders[shard], self._rows[shard]
        start += (record - self._starts[shard]) * kind.itemsize
        try:
            content = _read(str(folder / _ROWS), start, kind.itemsize)
            return shard, np.frombuffer(content, kind, count=1)[0]
        except (OSError, ValueError) as problem:
            raise _lost(folder, problem) from problem


def _lost(folder: Path, problem: Exception) -> RunFailedError:
    return RunFailedError(
        f"{folder}: the index of a shard cannot be read ({problem}). Remove this folder, and run "
        "the command again"
    )


def _read(path: str, start: int, size: int) -> bytes:
    if "://" in path:
        storage, inner = storage_of(path)
        return storage.cat_file(inner, start=start, end=start + size)
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, start)


def _opened(path: str) -> io.BufferedReader:
    """A file to be read from its start: of one on a bucket each request is for many headers."""
    if "://" not in path:
        return open(path, "rb")
    storage, inner = storage_of(path)
    return io.BufferedReader(storage.open(inner, "rb", cache_type="none"), _READ_AHEAD)


def _numbered(
    texts: Sequence[Sequence[str]], orders: Sequence[Sequence[str]], count: int
) -> tuple[list[str], list[list[int]]]:
    """The names of the classes, empty if they are numbers, and the numbers of the labels, `texts`,
    that occur in each shard. `orders` are the names that each shard gives, in the order of their
    numbers; `count` is that of all images."""
    found = {text for of_shard in texts for text in of_shard}
    names = sorted(text for text in found if not _INTEGER.fullmatch(text))
    if any(order != orders[0] for order in orders):
        raise path_error("the shards have different names of classes in their metadata")
    if orders[0]:
        classes = list(orders[0])
    elif not names:
        wrong = sorted(text for text in found if not -1 <= int(text) < _MOST_CLASSES)
        if wrong:
            raise path_error(
                f"labels must be from 0 to {_MOST_CLASSES:,}, or -1: {first_of(wrong)}"
            )
        return [], [list(map(int, of_shard)) for of_shard in texts]
    elif len(names) < len(found):
        numbers = first_of(sorted(found.difference(names)))
        raise path_error(f"some labels are names ({first_of(names)}), some are numbers ({numbers})")
    else:
        classes = names
        if len(names) > max(_FEW_CLASSES, count / 2):
            raise path_error(
                f"{len(names):,} different labels of {count:,} images, such as {first_of(names)}, "
                "are no classes. Set config.data.labels=none, or config.data.label_key"
            )
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, [[number_of[text] for text in of_shard] for of_shard in texts]


def _indexed(shards: Sequence[Shard], label_key: str | None) -> list[Path]:
    """The folders of the indexes of shards, which are made where there are none."""
    try:
        cache = files.user_cache() / "shards"
        cache.mkdir(exist_ok=True)
    except (OSError, RuntimeError) as problem:
        raise path_error(
            f"the index of the shards cannot be kept: {problem}. Set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from problem
    with ThreadPoolExecutor(THREADS) as pool:
        folders = [cache / key for key in pool.map(lambda x: _key(x, label_key), shards)]
    todo = [pair for pair in zip(shards, folders, strict=True) if not pair[1].is_dir()]
    if todo:
        _check_room(cache, todo)
        print(f"{len(todo)} of {len(shards)} shards are indexed once, in {cache}", flush=True)
        random.SystemRandom().shuffle(todo)  # hosts that share the cache share the work
        with ThreadPoolExecutor(_MAKERS) as pool:
            made = pool.map(lambda pair: _make(pair[0], pair[1], label_key), todo)
            bar = dict(desc="indexing", unit="shard", leave=False)
            for _ in tqdm(made, total=len(todo), **bar, disable=not sys.stderr.isatty()):
                pass
    for folder in folders:
        with suppress(OSError):  # another user's, who shares the cache
            os.utime(folder)
    for folder in cache.iterdir():
        with suppress(OSError):  # another process removes it
            kept = _DAY if folder.suffix == _DRAFT else files.KEPT
            if time.time() - folder.stat().st_mtime > kept:
                shutil.rmtree(folder)
    return folders


def _key(shard: Shard, label_key: str | None) -> str:
    """The name of the index of a shard."""
    made_of = [_VERSION, *shard, sorted(decode.endings())]
    windows = []
    if "://" not in shard.path:  # a bucket gives a hash of the content
        starts = np.linspace(0, max(shard.size - _WINDOW, 0), _WINDOWS).astype(int).tolist()
        try:
            windows = [_read(shard.path, start, _WINDOW) for start in starts]
        except OSError as problem:
            raise path_error(f"{shard.path}: cannot be read: {problem.strerror}") from problem
    labels = digest(json.dumps(label_key).encode())
    return f"{digest(json.dumps(made_of).encode(), *windows)}-{labels}"


def _unpacked(folder: Path) -> Path | None:
    """The images of a parquet file, where they were unpacked for an index of other labels."""
    return next(folder.parent.glob(f"{folder.name.partition('-')[0]}-*/{_IMAGES}"), None)


def _check_room(cache: Path, todo: Sequence[tuple[Shard, Path]]) -> None:
    parquet = [(shard, folder) for shard, folder in todo if not shard.is_tar]
    needed = sum(shard.size for shard, folder in parquet if not _unpacked(folder))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise path_error(
            f"{cache}: the images of parquet files are unpacked there, about "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free. {_ADVICE}"
        )


def _make(shard: Shard, folder: Path, label_key: str | None) -> None:
    """Makes the index of a shard, which appears as a whole."""
    if folder.is_dir():  # by another host
        return
    draft = Path(tempfile.mkdtemp(_DRAFT, dir=folder.parent))
    try:
        if not shard.is_tar and (images := _unpacked(folder)):
            with suppress(OSError):  # some file systems have no links
                os.link(images, draft / _IMAGES)
        _write(shard, draft, label_key)
        with suppress(FileExistsError):  # as above, since
            draft.rename(folder)
    except OSError as problem:
        if problem.errno == errno.ENOSPC:
            raise path_error(f"{folder.parent}: the disk is full. {_ADVICE}") from problem
        if problem.errno != errno.ENOTEMPTY:
            raise path_error(f"{shard.path}: {problem}") from problem
    except Exception as problem:  # each kind of bucket has its own
        raise path_error(f"{shard.path}: {' '.join(str(problem).split())}") from problem
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(shard: Shard, draft: Path, label_key: str | None) -> None:
    """Writes the index of a shard into a folder, which may have its images. Raises `ValueError` if
    that is no such shard."""
    with _opened(shard.path) as file:
        if shard.is_tar:
            images, classes, others = tars.listing(file, shard.size, label_key)
        else:
            from maect_jax.data import parquet  # slow to import, and workers do without

            is_there = (draft / _IMAGES).exists()
            with open(os.devnull if is_there else draft / _IMAGES, "wb") as into:
                images, classes, others = parquet.unpack(file, into, label_key)
                if not is_there:
                    files.fsync(into)
    if not images:
        raise ValueError(f"has no images{f'; has {counted(Counter(others))}' if others else ''}")
    texts = sorted({image.label for image in images if image.label})
    codes = {"": -1, **{text: code for code, text in enumerate(texts)}}
    names = [os.fsencode(image.name) for image in images]
    kinds = [("offset", "<i8"), ("size", "<i8"), ("check", "<u4"), ("label", "<i4")]
    rows = np.empty(len(images), [*kinds, ("name", f"S{max(map(len, names))}")])
    rows["name"], rows["label"] = names, [codes[image.label] for image in images]
    for key in ("offset", "size", "check"):
        rows[key] = [getattr(image, key) for image in images]
    with (draft / _ABOUT).open("w", encoding="utf-8") as text:
        json.dump({"texts": texts, "classes": classes, "others": others}, text)
        files.fsync(text)
    with (draft / _ROWS).open("wb") as binary:
        np.save(binary, rows)
        files.fsync(binary)
