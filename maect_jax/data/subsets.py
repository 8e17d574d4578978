"""Parts of labelled images: a few of each class, a fraction of each, or those in a list."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from maect_jax.data.base import Source
from maect_jax.errors import UserError


class Subset(Source):
    """The images of a source with some record numbers, int `[N]`, in that order."""

    def __init__(self, source: Source, records: np.ndarray):
        self.source, self.records = source, np.asarray(records)
        self.shape, self.classes, self.labelled = source.shape, source.classes, source.labelled
        self.in_memory, self.reads_labels = source.in_memory, source.reads_labels
        self.no_labels = source.no_labels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[int(self.records[record])]

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.records]

    def name(self, record: int) -> str:
        return self.source.name(int(self.records[record]))


def _ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank of every image in a random order of its class, and the size of its class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, class_index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    ranks = np.empty(len(labels), int)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(first, counts)
    return ranks, counts[class_index]


def per_class(labels: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Record numbers, ascending, of `images` images of each class, or of all if it has fewer.

    Draws with one seed are nested: a smaller one is part of a larger one, and of `fraction_of`.
    """
    return np.flatnonzero(_ranks(labels, seed)[0] < images)


def fraction_of(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Record numbers, ascending, of this fraction of each class, at least one image; nested as in
    `per_class`."""
    ranks, counts = _ranks(labels, seed)
    return np.flatnonzero(ranks < np.maximum(np.round(fraction * counts), 1))


def _without_suffix(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    return path.parent / path.stem


def from_list(path: str, names: Sequence[str]) -> np.ndarray:
    """Record numbers of the images that the text file `path` lists, one name a line, in its order.

    A name may have folders before it, and any ending or none. `names` are those of all images, by
    record number.

    Raises:
      UserError: there is no such file, or no image with one of its names.
    """
    where = f"list {path!r}"
    try:
        if not os.path.isfile(path):  # a pipe or a device may have no end
            raise FileNotFoundError("there is no such file")
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    listed = [_without_suffix(line) for line in lines if line]
    if not listed:
        raise UserError(f"{where}: is empty; expected one image name a line")
    paths = [_without_suffix(name).parts for name in names]
    depths = {len(name.parts) for name in listed}
    records = {parts[-depth:]: i for depth in depths for i, parts in enumerate(paths)}
    if unknown := [str(name) for name in listed if name.parts not in records]:
        raise UserError(
            f"{where}: {len(unknown)} of its {len(listed)} names are not among the "
            f"{len(names)} training images, such as {unknown[0]!r}"
        )
    return np.array([records[name.parts] for name in listed])


@lru_cache(maxsize=1)  # a run asks several times, and names may take a pass over a prepared set
def select(source: Source, images: str, seed: int) -> Source:
    """The images of a source that `config.finetune.images` asks for: "all"; a percentage of each
    class, such as "1%", drawn by `seed`; or the path of a list (`from_list`).

    Raises:
      UserError: there is no such list, or no image with one of its names.
    """
    if images == "all":
        return source
    if images.endswith("%"):
        fraction = float(images.removesuffix("%")) / 100
        return Subset(source, fraction_of(source.labels, fraction, seed))
    names = [source.name(record) for record in range(len(source))]
    try:
        return Subset(source, from_list(images, names))
    except UserError as error:
        raise UserError(f"config.finetune.images={images!r}: {error}") from error


def is_percentage(text: str) -> bool:
    """Whether a text is a percentage above `0%` and at most `100%`."""
    try:
        return 0 < float(text.removesuffix("%")) <= 100
    except ValueError:
        return False
