"""Parts of labelled images: a few of each class, a fraction of each, or those in a list."""

import codecs
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from maect_jax.data import base, decode
from maect_jax.data.base import Identity, Source, digest
from maect_jax.errors import UserError, first_of


class Subset(Source):
    """The images of a source with some record numbers, int `[N]`, in that order."""

    def __init__(self, source: Source, records: np.ndarray):
        self.source, self.records = source, np.asarray(records)
        self.shape, self.classes = source.shape, source.classes
        self.in_memory, self.reads_labels = source.in_memory, source.reads_labels
        self.no_labels = source.no_labels

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def labelled(self) -> bool:
        return self.source.labelled or bool((self.labels >= 0).all())

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[int(self.records[record])]

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.records]

    def name(self, record: int) -> str:
        return self.source.name(int(self.records[record]))

    @cached_property
    def identity(self) -> Identity:
        whole = self.source.identity
        images, dash, labels = whole.content.partition("-")
        content = digest(images.encode(), self.records.astype(np.int64))
        return Identity(len(self), f"{content}{dash}{labels}", whole.times)


def ranks(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each of N things in its group by ascending keys, from 0, int32 `[N]`; equals in
    their order."""
    order = np.lexsort((keys, groups))
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    found = np.empty(len(order), np.int32)
    found[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return found


def _ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank of every image in a random order of its class, and the size of its class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, class_index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return ranks(labels, np.argsort(shuffled)), counts[class_index]


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


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Record numbers, ascending, of this fraction of each class, at least one image; of a class
    with a single image none."""
    ranks, counts = _ranks(labels, seed)
    most = np.minimum(np.maximum(np.round(fraction * counts), 1), counts - 1)
    return np.flatnonzero(ranks < most)


def _without_ending(path: str) -> str:
    ending = decode.ending(path)
    is_known = ending in decode.endings() or ending in decode.HEIF_ENDINGS
    return path[: -len(ending)] if is_known else path


def read_text(path: str) -> str:
    """The content of a text file. Names in it need not be UTF-8.

    Raises:
      OSError, ValueError: there is no such file, or it cannot be read.
    """
    if not os.path.isfile(path):  # a pipe or a device may have no end
        raise FileNotFoundError("there is no such file")
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", "surrogateescape")


def _records_by_tail(listed: set[str], paths: Sequence[str]) -> dict[str, list[int]]:
    """The records of the paths that end in each of the listed ones, whole names of folders."""
    depths = {name.count("/") + 1 for name in listed}
    found: dict[str, list[int]] = {}
    for record, path in enumerate(paths):
        parts = path.split("/")
        for depth in depths:
            if (tail := "/".join(parts[-depth:])) in listed and depth <= len(parts):
                found.setdefault(tail, []).append(record)
    return found


def from_list(path: str, names: Sequence[str]) -> np.ndarray:
    """Record numbers of the images that the text file `path` lists, one name a line, in its order
    (`find`). `names` are those of all images, by record number. Raises `UserError` if there is no
    such file, or it is empty; or as `find` does."""
    where = f"list {path!r}"
    try:
        lines = (line.strip().removeprefix("./") for line in read_text(path).split("\n"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    if not (listed := [line for line in lines if line]):
        raise UserError(f"{where}: is empty; expected one image name a line")
    try:
        return find(listed, names, base.below_shared_folder(names), kind="training images")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def find(
    listed: Sequence[str], names: Sequence[str], exact: Sequence[str], *, kind: str = "images"
) -> np.ndarray:
    """Record numbers of the images that are listed by name, in that order.

    A listed name is that of the image with this `exact` name; else of the one whose path ends in
    it, with as many folders as it has. If there is none, its ending does not matter, and it may
    have none.

    `names` are the paths of all images, by record number, `exact` their names below the folder of
    all; `kind` is what they are, for errors. Raises `UserError` if one is the name of no image, or
    of several; or two are those of one image."""
    wanted = set(listed)
    found: dict[str, list[int]] = {}
    for record, name in enumerate(exact):  # `a/0.jpg` is not `b/a/0.jpg`, where there is the first
        if name in wanted:
            found.setdefault(name, []).append(record)
    found = _records_by_tail(wanted - found.keys(), names) | found
    if rest := {line: _without_ending(line) for line in listed if line not in found}:
        stems = _records_by_tail(set(rest.values()), [_without_ending(name) for name in names])
        found |= {line: stems[stem] for line, stem in rest.items() if stem in stems}
    problems = []
    if absent := [line for line in listed if line not in found]:
        problems.append(
            f"{len(absent)} of its {len(listed)} names are not among the {len(names)} {kind}: "
            f"{first_of(absent)}"
        )
    if several := [line for line in listed if len(found.get(line, ())) > 1]:
        candidates = first_of([names[record] for record in found[several[0]]])
        problems.append(
            f"{len(several)} of its {len(listed)} names are each of several images: "
            f"{first_of(several)} (the first is {candidates}); write more of their paths"
        )
    if problems:
        raise UserError("; ".join(problems))
    records = [found[line][0] for line in listed]
    if twice := [names[record] for record, lines in Counter(records).items() if lines > 1]:
        raise UserError(f"images that are listed twice: {first_of(twice)}")
    return np.array(records, int)


@lru_cache(maxsize=1)  # a run asks several times, and names may take a pass over a prepared set
def select(source: Source, images: str, seed: int) -> Source:
    """The images of a source that `config.finetune.images` asks for: "all"; a percentage of each
    class, such as "1%", drawn by `seed`; or the path of a list (`from_list`). Raises `UserError` if
    there is no such list, or no image with one of its names."""
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
