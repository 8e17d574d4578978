"""Parts of labelled images: a few of each class, a share of each, or those that a file lists."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from maect_jax.data.sources import Source
from maect_jax.errors import UserError


class Subset:
    """The images of a source at some record numbers, int `[N]`, in that order."""

    def __init__(self, source: Source, records: np.ndarray):
        self.source, self.records = source, np.asarray(records)
        self.shape, self.classes, self.labelled = source.shape, source.classes, source.labelled

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[int(self.records[record])]

    def name(self, record: int) -> str:
        """What a record is called."""
        return self.source.name(int(self.records[record]))


def labels_of(source: Source) -> np.ndarray:
    """The labels of all images, int32 `[N]`; read one by one where a source has no list of them."""
    found = getattr(source, "labels", None)
    found = [source[i][1] for i in range(len(source))] if found is None else found
    return np.asarray(found, np.int32)


def _places(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of every image in a random order of its class, and the size of its class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    places = np.empty(len(labels), int)
    places[by_class] = np.arange(len(labels)) - np.repeat(first, counts)
    return places, counts[own]


def per_class(labels: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Record numbers, ascending, of so many images of each class; of all, where it has fewer.

    Those of one seed are nested: the fewer are among the more, and among those of `fraction_of`.
    """
    return np.flatnonzero(_places(labels, seed)[0] < images)


def fraction_of(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Record numbers, ascending, of this share of each class, at least one; nested as in `per_class`."""
    places, counts = _places(labels, seed)
    return np.flatnonzero(places < np.maximum(np.round(fraction * counts), 1))


def _bare(name: str) -> PurePosixPath:
    """A name without its ending, if it is one, and not a dot."""
    path = PurePosixPath(name)
    return path.with_suffix("") if path.name else path


def from_list(path: str, names: Sequence[str]) -> np.ndarray:
    """Record numbers of the images that a text file lists, one name a line, in its order.

    Args:
      path: of the file. A name may have folders before it, and any ending or none.
      names: of all images, by record number.

    Raises:
      UserError: there is no such file, or an image of it.
    """
    where = f"list {path!r}"
    try:
        if not os.path.isfile(path):  # a pipe or a device may have no end
            raise FileNotFoundError("there is no such file")
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    wanted = [_bare(line) for line in lines if line]
    if not wanted:
        raise UserError(f"{where}: is empty; expected a name of an image a line")
    paths = [_bare(name).parts for name in names]
    depths = {len(name.parts) for name in wanted}
    records = {parts[-depth:]: i for depth in depths for i, parts in enumerate(paths)}
    absent = [str(name) for name in wanted if name.parts not in records]
    if absent:
        raise UserError(
            f"{where}: {len(absent)} of its {len(wanted)} names are not among the "
            f"{len(names)} training images, such as {absent[0]!r}"
        )
    return np.array([records[name.parts] for name in wanted])


@lru_cache(maxsize=1)  # a run asks several times, and names may take a pass over a prepared set
def select(source: Source, images: str, seed: int) -> Source:
    """Those images of a source that `config.finetune.images` asks for.

    Args:
      source: labelled images.
      images: "all"; a share of each class, such as "1%"; or the path of a list (`from_list`).
      seed: of the draw of a share.

    Raises:
      UserError: there is no such list, or an image of it.
    """
    if images == "all":
        return source
    if images.endswith("%"):
        return Subset(source, fraction_of(labels_of(source), percentage(images) / 100, seed))
    try:
        return Subset(source, from_list(images, [source.name(i) for i in range(len(source))]))
    except UserError as error:
        raise UserError(f"config.finetune.images={images!r}: {error}") from error


def percentage(text: str) -> float:
    """The number before a percent sign. Raises `ValueError` where it is none."""
    return float(text.removesuffix("%"))


def is_percentage(text: str) -> bool:
    """Whether a text is a share from above `0%` to `100%`."""
    try:
        return 0 < percentage(text) <= 100
    except ValueError:
        return False


def classes_of(source: Source) -> int:
    """How many classes the images have: those that have a name, else up to the highest label."""
    return len(source.classes) or int(labels_of(source).max()) + 1
