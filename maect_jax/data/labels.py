"""Labels in a file of their own (`config.data.labels`): names that a person gave to images, or to
clusters of them. And the part of images that have a label."""

import csv
import io
import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache

import numpy as np

from maect_jax.data import base, subsets
from maect_jax.data.base import Identity, Source, digest
from maect_jax.errors import UserError, first_of, shown

AUTO, NONE = "auto", "none"  # the labels that images come with; no labels
_COLUMNS = ("image", "label")
_HELD_OUT = 0.1  # fraction of each class that is held out where no held-out image has a label
_LOGGER = logging.getLogger(__name__)


def is_file(labels: str) -> bool:
    """Whether `config.data.labels` names a file."""
    return labels.lower().endswith(".csv")


class Labelled(Source):
    """The images of a source with the labels of a file, int32 `[N]`, -1 for none."""

    def __init__(self, source: Source, path: str, labels: np.ndarray, classes: list[str]):
        self.source, self.labels, self.classes = source, labels, classes
        self.shape, self.in_memory = source.shape, source.in_memory
        missing = int((labels < 0).sum())
        self.no_labels = f"no labels for {missing:,} of {len(labels):,} ({path})"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[record][0], int(self.labels[record])

    def name(self, record: int) -> str:
        return self.source.name(record)

    @cached_property
    def identity(self) -> Identity:
        """Of the images, and of their labels."""
        images, names = self.source.identity, "\n".join(self.classes)
        labels = digest(names.encode(errors="surrogateescape"), self.labels)
        return images._replace(content=f"{images.content}-{labels}")


def from_file(path: str, images: Mapping[str, Source]) -> dict[str, Source]:
    """Images, by split, with the labels of a file: CSV with a column `image`, names as
    `subsets.find` takes them, and a column `label`. Classes are the labels that occur, sorted.

    An image that the file does not list has no label. Images of one class have none, as every
    result on them would be perfect. Raises `UserError` if it cannot be read, is no such file, or
    labels no image; a name is that of no image or of several, or an image is listed twice; or only
    held-out images are of some class."""
    where = f"config.data.labels={path!r}"
    try:
        listed, empty = _read(path)
        names, exact = [], []
        for split, source in images.items():
            own = [source.name(record) for record in range(len(source))]
            # Of images that have no path, the split tells those with one name apart.
            names += [name if "/" in name else f"{split}/{name}" for name in own]
            exact += base.below_shared_folder(own)
        records = subsets.find([*listed], names, exact)
    except (OSError, ValueError, csv.Error, UserError) as error:
        raise UserError(f"{where}: {error}") from error
    classes = sorted(set(listed.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.full(len(names), -1, np.int32)
    labels[records] = [numbers[name] for name in listed.values()]
    ends = np.cumsum([len(source) for source in images.values()])[:-1]
    found = {
        split: Labelled(source, path, own, classes)
        for (split, source), own in zip(images.items(), np.split(labels, ends), strict=True)
    }
    known = {split: np.unique(x.labels[x.labels >= 0]) for split, x in found.items()}
    unseen = np.setdiff1d(known.get("val", []), known["train"]).astype(int)
    if len(known["train"]) and len(unseen):
        raise UserError(
            f"{where}: no training image is of {first_of([classes[i] for i in unseen])}, as "
            "held-out images are"
        )
    counts = [f"{int((x.labels >= 0).sum()):,} of {len(x):,} {split}" for split, x in found.items()]
    _LOGGER.warning(
        "%s labels %s images, as %d classes: %s%s. Other labels, such as folders, are not used",
        path, " and ".join(counts), len(classes), first_of(classes),
        f"; left out {empty} lines without a label" if empty else "",
    )  # fmt: skip
    if len(classes) == 1:
        for source in found.values():
            source.drop_labels(f"no labels ({path} has one class, {classes[0]!r})")
    elif not len(known["train"]):
        found["train"].no_labels = (
            f"no labels ({path} has those of val images alone: cluster and name the others, or "
            "swap config.data.train_split and val_split)"
        )
    return dict(found)


def _read(path: str) -> tuple[dict[str, str], int]:
    """The labels of a file by the name of the image, and how many lines have none.

    Raises:
      OSError, ValueError, csv.Error: it cannot be read, or is no such file.
    """
    text = io.StringIO(subsets.read_text(path), newline="")
    first = text.readline()
    # As spreadsheets write it, in many countries, and as "Unicode text".
    delimiter = next((x for x in ";\t" if x in first and "," not in first), ",")
    text.seek(0)
    lines = csv.reader(text, strict=True, skipinitialspace=True, delimiter=delimiter)
    header = [name.strip() for name in next(lines, [])]
    if any(header.count(name) != 1 for name in _COLUMNS):
        has = shown(", ".join(header)) or "nothing"
        raise ValueError(f"its first line is {has}; must have the columns {','.join(_COLUMNS)}")
    image, label = map(header.index, _COLUMNS)
    listed: dict[str, str] = {}
    for line in lines:
        if not any(line):
            continue
        if len(line) != len(header):
            raise ValueError(
                f"line {lines.line_num} has {len(line)} columns, the first line {len(header)}; a "
                f"text with {delimiter!r} must be in quotes"
            )
        name = line[image].removeprefix("./")
        if name in listed:
            raise ValueError(f"line {lines.line_num}: {shown(name)} is listed twice")
        listed[name] = of = line[label].strip()
        if of != of.encode(errors="replace").decode():
            raise ValueError(
                f"line {lines.line_num}: the label {shown(of)} is not UTF-8; save the file as UTF-8"
            )
    labelled = {name: text for name, text in listed.items() if text}
    if not labelled:
        raise ValueError("has no label; expected a line for each image that has one")
    return labelled, len(listed) - len(labelled)


class HeldOut(subsets.Subset):
    """Images that are held out of those to train on, as there are no others with a label."""


@lru_cache(maxsize=2)  # as `subsets.select` is, which is asked for parts of these
def _parts(train: Source, val: Source | None, seed: int) -> tuple[Source, Source]:
    known = np.flatnonzero(train.labels >= 0)
    tested = np.flatnonzero(val.labels >= 0) if val else known[:0]
    if val and len(tested):
        return subsets.Subset(train, known), subsets.Subset(val, tested)
    held_out = subsets.held_out(train.labels[known], _HELD_OUT, seed)
    if not len(held_out):
        raise UserError(
            f"config.data.path: the {len(known)} images with a label are each of another class, so "
            "that none can be held out; label more of them"
        )
    rest = np.delete(known, held_out)
    return subsets.Subset(train, rest), HeldOut(train, known[held_out])


def known(images: Mapping[str, Source], seed: int) -> dict[str, Source]:
    """The images of each split, "train" and "val", that have a label, if some training images have
    one and others have none, or none is held out.

    Where no held-out image has a label, "val" is a tenth of each class of those to train on, drawn
    by `seed`, which are then not trained on; of a class at least one image, and not its last one.
    Raises `UserError` if there is no class with a second image."""
    if all(source.labelled for source in images.values()) and "val" in images:
        return dict(images)
    if not (images["train"].labels >= 0).any():
        return dict(images)
    train, val = _parts(images["train"], images.get("val"), seed)
    return {"train": train, "val": val}
