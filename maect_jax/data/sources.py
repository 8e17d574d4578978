"""Where images come from: random access to decoded images and labels.

A source has a length, gives `(image, label)` for a record number, and knows `shape`: the
(H, W, C) that all its images have, or `None` where they differ. Images are uint8 `[H, W, C]`;
a label is -1 where there is none.
"""

import gzip
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from maect_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
ON_DISK = ("folder", "tfds")
KINDS = ("fashion_mnist", *ON_DISK)
SPLITS = ("train", "val")

# The packaged images by split. The last two divide the training images: settings are chosen on
# them, so that nothing but a final result ever sees the held-out ones.
FASHION_MNIST = {
    "train": slice(2_000, None),
    "val": slice(2_000),
    "train[:80%]": slice(2_000, 8_400),
    "train[80%:]": slice(8_400, None),
}
_FASHION_CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot",
)  # fmt: skip
_SPLIT_SEED = 0  # the same split in every run: no stage trains on what another holds out


class Source(Protocol):
    """Random access to decoded images; `classes` are the names of the labels, in order, or none
    where the labels have no names."""

    shape: tuple[int, int, int] | None
    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]: ...


def _pixels(picture: Image.Image, channels: int) -> np.ndarray:
    """uint8 `[H, W, channels]`, gray for one channel, RGB for three."""
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


class Arrays:
    """Pixels in memory: uint8 `[N, H, W, C]`, labels `[N]`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]):
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return self.images[record], int(self.labels[record])


class Blank:
    """Stands for `records` images of various sizes that are not at hand."""

    shape = None

    def __init__(self, records: int, channels: int):
        self.records, self.channels, self.classes = records, channels, []

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return np.zeros((8, 8, self.channels), np.uint8), -1


class Folder:
    """Image files `<root>/<class>/...`; the classes are the folders in alphabetical order."""

    shape = None

    def __init__(self, root: str, channels: int):
        self.channels = channels
        if not Path(root).is_dir():
            raise UserError(
                f"config.data.path: there is no folder {root!r}; expected <path>/train/<class>/ "
                "and <path>/val/<class>/ with images"
            )
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(
                os.path.join(folder, file)
                for folder, _, files in os.walk(Path(root) / name)
                for file in files
                if file.lower().endswith(SUFFIXES)
            )
            self.files += found
            labels += [label] * len(found)
        if not self.files:
            raise UserError(
                f"config.data.path: no images below {root!r}; expected <class>/<image> with one "
                f"of the endings {' '.join(SUFFIXES)}"
            )
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        try:
            with Image.open(self.files[record]) as picture:
                return _pixels(picture, self.channels), int(self.labels[record])
        except OSError as error:
            raise UserError(f"{self.files[record]}: not a readable image: {error}") from error


class Tfds:
    """A TensorFlow Datasets set with `image` and `label`, prepared as array_record."""

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        self.channels = channels
        try:
            self.records = tfds.data_source(
                name, split=split, data_dir=data_dir or None, download=False
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
        height, width, _ = features["image"].shape
        self.shape = (height, width, channels) if height and width else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        example = self.records[record]
        picture = Image.fromarray(np.squeeze(example["image"]))
        return _pixels(picture, self.channels), int(example["label"])


def same_classes(path: str, train: Source, val: Source) -> None:
    """Checks that both splits number the same classes, where the folders' names tell.

    Raises:
      UserError: one has a class that the other lacks.
    """
    if isinstance(train, Folder) and isinstance(val, Folder):
        odd = sorted(set(train.classes) ^ set(val.classes))
        if odd:
            raise UserError(
                f"config.data.path={path!r}: train and val must have the same classes; only one "
                f"of them has {', '.join(odd[:5])}"
            )


def fashion_mnist(split: str) -> Arrays:
    """The packaged images (Xiao et al., 2017): 28 x 28 gray, 8,000 to train on and 2,000 held out.

    They are the 10,000 of the original test split, divided at random by a fixed seed. `split` is
    one of `FASHION_MNIST`.
    """
    folder = resources.files("maect_jax.data") / "fashion_mnist"

    def read(name: str, header: int) -> np.ndarray:
        pixels = gzip.decompress((folder / name).read_bytes())
        return np.frombuffer(pixels, np.uint8, offset=header)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    chosen = order[FASHION_MNIST[split]]
    return Arrays(images[chosen], labels[chosen], _FASHION_CLASSES)


def make(data, split: str, channels: int) -> Source:
    """The source that the `data` section of a config asks for.

    Args:
      data: has `source` (one of `KINDS`), `path`, `name`, `train_split`, `val_split`.
      split: one of `SPLITS`.
      channels: 1 (gray) or 3 (RGB).

    Raises:
      UserError: the images are not there, or cannot have that many channels.
    """
    name = data.train_split if split == "train" else data.val_split
    if data.source == "fashion_mnist":
        source = fashion_mnist(name)
        if channels != 1:
            raise UserError(f"config.model.channels={channels}: Fashion-MNIST has 1 channel")
        return source
    if channels not in (1, 3):
        raise UserError(f"config.model.channels={channels}: an image file gives 1 (gray) or 3")
    if data.source == "folder":
        return Folder(os.path.join(data.path, name), channels)
    return Tfds(data.name, name, data.path, channels)
