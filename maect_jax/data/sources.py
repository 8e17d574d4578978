"""Where images come from: random access to images and labels.

A source has a length, gives `(image, label)` for a record number, and knows `shape`: the
(H, W, C) that all its images have, or `None` where they differ. An image is a file's content
(bytes) or pixels, uint8 `[H, W, C]`; `decode.pixels` takes either. A label is -1 where there is
none.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from maect_jax import config as configs
from maect_jax.config import Rule, Rules, at_most, between, one_of
from maect_jax.data import arrays
from maect_jax.data.folder import Folder
from maect_jax.errors import UserError

KINDS = ("fashion_mnist", "folder", "tfds")
SPLITS = ("train", "val")


class Source(Protocol):
    """Random access to images; `classes` are the names of the labels, in order, or none where the
    labels have no names; `labelled` says whether all have one, `name` what a record is called."""

    shape: tuple[int, int, int] | None
    classes: list[str]
    labelled: bool

    def __len__(self) -> int: ...

    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]: ...

    def name(self, record: int) -> str: ...


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label: none for -1, its number where the classes have no names."""
    if label < 0:
        return "unlabelled"
    return classes[label] if label < len(classes) else str(label)


def labels_digest(source: Source) -> str:
    """A name of the classes and labels of a source; nothing of those that would have to be read."""
    if isinstance(source, Tfds):
        return ""
    text = "\n".join(source.classes).encode() + np.asarray(source.labels).tobytes()
    return hashlib.sha256(text).hexdigest()[:16]


class Blank:
    """Stands for `records` images that are not at hand, all of one shape or of various.

    Nothing is known of their labels but how many `classes` there are.
    """

    def __init__(
        self,
        records: int,
        channels: int,
        shape: tuple[int, int, int] | None = None,
        classes: int = 0,
    ):
        self.records, self.channels, self.shape = records, channels, shape
        self.classes = [str(label) for label in range(classes)]
        self.labels = np.full(records, -1)
        self.labelled = False

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return np.zeros(self.shape or (8, 8, self.channels), np.uint8), -1

    def name(self, record: int) -> str:
        """What a record is called."""
        return f"image {record}"


class Tfds:
    """A TensorFlow Datasets set with `image` and `label`, prepared as array_record."""

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        self.labelled = True
        self._split = f"{name}, {split}"
        encoded = {"image": tfds.decode.SkipDecoding()}
        try:
            self.records = tfds.data_source(
                name, split=split, data_dir=data_dir or None, download=False, decoders=encoded
            )
        except Exception as error:  # a dozen kinds, all of which mean "it is not there"
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"config.data.name={name!r} (split {split!r}, path {data_dir!r}): {reason} "
                f"Prepare it once: tfds build {name} --file_format=array_record (extra [tfds])"
            ) from error
        features = self.records.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise UserError(
                f"config.data.name={name!r}: has {', '.join(features)}; image and label are needed"
            )
        try:
            self.classes = list(features["label"].names)
        except (AttributeError, TypeError):  # labels are numbers without names
            self.classes = []
        self._files = "file_name" in features
        height, width, _ = features["image"].shape
        self.shape = (height, width, channels) if height and width else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        example = self.records[record]
        return example["image"], int(example["label"])

    @cached_property
    def labels(self) -> np.ndarray:
        """Of all images, int32 `[N]`; to know them every record is read, once."""
        return np.array([int(record["label"]) for record in self.records], np.int32)

    def name(self, record: int) -> str:
        """The file that a record was made from, where the set knows it; else its number."""
        if self._files:
            return self.records[record]["file_name"].decode()
        return f"{self._split}, record {record}"


def make(
    data, split: str, channels: int, classes: Sequence[str] | None = None, run: Path | None = None
) -> Source:
    """The source that the `data` section of a config asks for.

    Args:
      data: has `source` (one of `KINDS`), `path`, `name`, `train_split`, `val_split`. A path that
        ends in `.npz` is a file of arrays, whatever the source.
      split: one of `SPLITS`.
      channels: 1 (gray) or 3 (RGB).
      classes: of folders, those of the training images, by which all splits number their labels.
      run: the run's folder, which may hold the index of a large folder of images.

    Raises:
      UserError: the images are not there, or cannot have that many channels.
    """
    name = data.train_split if split == "train" else data.val_split
    if data.source == "fashion_mnist":
        if channels != 1:
            raise UserError(f"config.model.channels={channels}: Fashion-MNIST has 1 channel")
        return arrays.fashion_mnist(name)
    if channels not in (1, 3):
        raise UserError(f"config.model.channels={channels}: an image file gives 1 (gray) or 3")
    if data.path.endswith(".npz"):
        return arrays.npz(data.path, split, channels)
    if data.source == "folder":
        kept = run / f"{split}.index.npz" if run else None
        return Folder(os.path.join(data.path, name), classes, kept)
    return Tfds(data.name, name, data.path, channels)


def keep(found: dict[str, Source]) -> None:
    """Writes indices of large folders into the run's folder, where they cannot stand elsewhere."""
    for source in found.values():
        if isinstance(source, Folder):
            source.keep()


def splits(data, needed: Sequence[str], channels: int, run: Path | None = None) -> dict:
    """The sources of the splits, with one numbering of the classes. Raises as `make` does."""
    found = {}
    for split in needed:
        classes = (found["train"].classes or None) if "train" in found else None
        found[split] = make(data, split, channels, classes, run)
    return found


# Rules of the `data` section

_MOST_WORKERS = 1024
_MOST_PIXELS = 2**14
RULES: Rules = {
    "source": one_of(KINDS),
    "short_side": at_most(_MOST_PIXELS),
    "workers": between(0, _MOST_WORKERS),
    "max_bad_fraction": between(0, 1),
    "mean": Rule("finite numbers", lambda v, _: all(map(math.isfinite, v))),
    "std": Rule("above 0", lambda v, _: all(0 < x < math.inf for x in v)),
}
_PACKAGED: Rules = {
    "path": Rule(
        "empty for the packaged images; set config.data.source=folder as well",
        lambda v, _: not v,
    ),
    "train_split": one_of(arrays.FASHION_MNIST),
    "val_split": one_of(arrays.FASHION_MNIST),
}


def check(config) -> None:
    """Checks the `data` section of a config. Raises `UserError`."""
    channels, side = config.model.channels, max(config.model.image_size)
    a_channel = Rule(f"as many numbers as channels, {channels}", lambda v, _: len(v) == channels)
    configs.check(config, "data", RULES)
    if config.data.source == "fashion_mnist":
        configs.check(config, "data", _PACKAGED)
    of_model = {
        "mean": a_channel,
        "std": a_channel,
        "short_side": Rule(
            f"at least the larger side of the image, {side}", lambda v, _: v >= side
        ),
    }
    configs.check(config, "data", of_model)
