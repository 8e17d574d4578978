"""Where images come from: the kinds of sources, and the `data` section of a config.

A new kind of source is a subclass of `Source` in a file of its own and a line in `KINDS`.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np
from etils import epath

from maect_jax import config as configs
from maect_jax.config import Rule, Rules, between, one_of, positive
from maect_jax.data import arrays, labels, shard_files
from maect_jax.data.base import AbsentError, Identity, Source, digest, path_error
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.data.shards import Shards
from maect_jax.errors import UserError, first_of

SPLITS = ("train", "val")
IMAGENET_TRAIN = 1_281_167  # training images of ImageNet-1k
_LARGEST = 2**14  # pixels of a side that images are resized to
_LOGGER = logging.getLogger(__name__)


class Blank(Source):
    """Stands for images that are not available, of one shape or of various, without labels."""

    def __init__(self, records: int, channels: int, shape=None, classes: int = 0):
        self.channels, self.shape = channels, shape
        self.classes = [str(label) for label in range(classes)]
        self.labels = np.full(records, -1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> tuple[np.ndarray, int]:
        return np.zeros(self.shape or (8, 8, self.channels), np.uint8), -1

    @cached_property
    def identity(self) -> Identity:
        return Identity(len(self), digest(f"{self.channels} {self.shape}".encode()))


class Tfds(Source):
    """A TensorFlow Datasets set with `image` and `label`, prepared as array_record."""

    reads_labels = True
    labelled = True

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        self._split = f"{name}, {split}"
        encoded = {"image": tfds.decode.SkipDecoding()}
        try:
            self.records = tfds.data_source(
                name, split=split, data_dir=data_dir or None, download=False, decoders=encoded
            )
        except Exception as error:  # of a dozen kinds, all of which mean that it is not prepared
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            kind = AbsentError if reason.startswith("Unknown split") else UserError
            raise kind(
                f"config.data.name={name!r} (split {split!r}, path {data_dir!r}): {reason} "
                f"Prepare it once: tfds build {name} --file_format=array_record (extra [tfds])"
            ) from error
        features = self.records.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise UserError(
                f"config.data.name={name!r}: has {', '.join(features)}; must have image and label"
            )
        self.classes = getattr(features["label"], "names", None) or []  # or numbers without names
        self._has_names = "file_name" in features
        height, width, _ = features["image"].shape
        self.shape = (height, width, channels) if height and width else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        example = self.records[record]
        return example["image"], int(example["label"]) if self.labelled else -1

    def name(self, record: int) -> str:
        """The file that a record was made from, where the set has it; else its number."""
        if self._has_names:
            return self.records[record]["file_name"].decode()
        return f"{self._split}, record {record}"

    @cached_property
    def identity(self) -> Identity:
        """Of the set's name and version, and of the names, sizes and times of the files that hold
        the split, with the part that each has of it."""
        info = self.records.dataset_info
        parts = [info.full_name, str(len(self))]
        times = []
        for part in info.splits[self.records.split].file_instructions:
            path = epath.Path(part.filename)
            try:
                stat = path.stat()
            except OSError as error:
                raise UserError(f"config.data.name={info.name!r}: {error}") from error
            parts.append(f"{path.name} {part.skip} {part.take} {stat.length}")
            times.append(str(stat.mtime))
        return Identity(len(self), *(digest("\n".join(x).encode()) for x in (parts, times)))


# Called with the `data` section, the split's name in it, `split` and `channels`.
KINDS: dict[str, Callable[..., Source]] = {
    "fashion_mnist": lambda data, name, **_: arrays.fashion_mnist(name),
    "folder": lambda data, name, **_: Folder(
        os.path.join(data.path, name), labelled=data.labels == labels.AUTO
    ),
    "shards": lambda data, name, split, **_: Shards(
        shard_files.find(data.path, name, split),
        label_key=data.label_key if data.labels == labels.AUTO else None,
    ),
    "tfds": lambda data, name, channels, **_: Tfds(data.name, name, data.path, channels),
}
_CHANNELS = {"fashion_mnist": (1,)}  # others decode image files, to gray or RGB


def make(data, split: str, channels: int) -> Source:
    """The source that the `data` section of a config asks for, without the labels of a file.

    Args:
      data: the section. A path that ends in `.npz` is a file of arrays, whatever the source.
      split: one of `SPLITS`.
      channels: 1 (gray) or 3 (RGB); of arrays of pixels, as many as they have.

    Without labels, by `data.labels` or as training images that are all of one class: such a folder
    is how people keep images without labels, and every result on one class is perfect.

    Raises:
      AbsentError: there is no such folder or split.
      UserError: the images are not what a source can be, or cannot have that many channels.
    """
    source = _opened(data, split, channels)
    if data.labels != labels.AUTO:
        source.drop_labels(f"no labels (config.data.labels={data.labels!r})")
    elif split == "train" and (name := _only_class(source)):
        source.drop_labels(f"no labels (train has one class, {name!r})")
        _LOGGER.warning("the images have %s", source.no_labels)
    return source


def _opened(data, split: str, channels: int) -> Source:
    if data.path.endswith(".npz"):
        return arrays.npz(data.path, split, _decoding(data, channels))
    allowed = _CHANNELS.get(data.source, (1, 3))
    if channels not in allowed:
        either = " or ".join(map(str, allowed))
        source = f"config.data.source={data.source!r}"
        raise UserError(f"config.model.channels={channels}: must be {either} for {source}")
    return KINDS[data.source](data, data[f"{split}_split"], split=split, channels=channels)


def title(data) -> str:
    """What a `data` section calls its images: the name of a TFDS set, else the path, if any."""
    if data.source == "tfds" and not data.path.endswith(".npz"):
        return data.name
    return data.path or data.source


def _only_class(source: Source) -> str | None:
    """The name of the class of all images, if they are of one."""
    if source.reads_labels:  # to read them all takes as long as an epoch
        return source.classes[0] if len(source.classes) == 1 else None
    first = int(source.labels[0])
    only = first >= 0 and bool((source.labels == first).all())
    return class_name(source.classes, first) if only else None


def splits(
    data, needed: Sequence[str], channels: int, opened: Mapping[str, Source] | None = None
) -> dict[str, Source]:
    """The sources of splits, by name, with one numbering of the classes: that of the training
    images, without whose labels all are without. Some may be `opened` already.

    Where a file has the labels, these are all splits that there are: it may list images of any.

    Raises:
      AbsentError, UserError: as `make` and `labels.from_file` do.
    """
    images = dict(opened or {})
    if labels.is_file(data.labels) and not images:
        images["train"] = make(data, "train", channels)
        with suppress(AbsentError):
            images["val"] = make(data, "val", channels)
            _check_apart("val", images["val"], images["train"])
        return labels.from_file(data.labels, images)
    for split in needed:
        if split in images:
            continue
        train = images.get("train")
        images[split] = source = make(data, split, channels)
        _check_apart(split, source, train)
        if train and train.no_labels != Source.no_labels:
            source.drop_labels(train.no_labels)
        elif train:
            _number_alike(split, source, train)
            _compare_classes(split, source, train)
    return images


def decoding(config) -> Decoding:
    """How the images of a config become pixels."""
    return _decoding(config.data, config.model.channels)


def _decoding(data, channels: int) -> Decoding:
    return Decoding(channels, data.range, data.max_pixels)


def _check_apart(split: str, source: Source, train: Source | None) -> None:
    """Raises `UserError` where shards of a split are among those to train on, as a glob takes all
    that it matches."""
    if not (isinstance(source, Shards) and isinstance(train, Shards)):
        return
    if both := sorted(source.paths & train.paths):
        raise path_error(
            f"shards of {split} are trained on as well: {first_of(both)}. Name those to train on "
            "alone, or others in config.data.val_split"
        )


def _number_alike(split: str, source: Source, train: Source) -> None:
    """Numbers the labels of a split by the classes of the training images. Raises `UserError` where
    these lack one, or only one of the two has names."""
    if source.classes == train.classes or not (source.labelled and train.labelled):
        return
    if not (source.classes and train.classes):
        named, numbered = (split, "train") if source.classes else ("train", split)
        raise path_error(
            f"the labels of {named} are names, those of {numbered} numbers; "
            "both must be the same, or set config.data.labels=none"
        )
    numbers = {name: number for number, name in enumerate(train.classes)}
    names = [source.classes[label] for label in np.unique(source.labels)]
    if unknown := sorted(set(names) - numbers.keys()):
        raise path_error(
            f"{split} has classes that the training images lack: {first_of(unknown)}. Where "
            "folders are no classes, set config.data.labels=none"
        )
    renumbered = [numbers.get(name, -1) for name in source.classes]
    source.labels = np.array(renumbered, np.int32)[source.labels]
    source.classes = list(train.classes)


def _compare_classes(split: str, source: Source, train: Source) -> None:
    """Says which classes only one of two splits has."""
    if any(images.reads_labels or not images.labelled for images in (source, train)):
        return
    mine, theirs = np.unique(source.labels), np.unique(train.labels)
    for who, other, absent in (
        (split, "train", np.setdiff1d(theirs, mine)),
        ("train", split, np.setdiff1d(mine, theirs)),
    ):
        if len(absent):
            names = [class_name(train.classes, label) for label in absent.tolist()]
            _LOGGER.warning(
                "%s has no image of %d of the %d classes of %s: %s",
                who, len(absent), len(mine if other == split else theirs), other,
                first_of(names),
            )  # fmt: skip


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label: "unlabelled" for -1, its number where the classes have no names."""
    if label < 0:
        return "unlabelled"
    return classes[label] if label < len(classes) else str(label)


def labels_digest(source: Source) -> str:
    """A digest of the classes and labels of a source; empty where every record must be read."""
    if source.reads_labels:
        return ""
    text = "\n".join(source.classes).encode(errors="surrogateescape")
    return digest(text, np.asarray(source.labels))


# Rules of the `data` section

RULES: Rules = {
    "source": one_of(KINDS),
    "labels": Rule(
        "'auto', 'none', or the path of a .csv file",
        lambda v, _: v in (labels.AUTO, labels.NONE) or labels.is_file(v),
    ),
    "short_side": Rule("above 0, and at most 16,384", lambda v, _: v is None or 0 < v <= _LARGEST),
    "workers": between(-1, 1024),
    "max_bad_fraction": between(0, 1),
    "max_pixels": positive,
    "range": Rule(
        "(), or (BLACK, WHITE), the second number above the first",
        lambda v, _: v == () or (len(v) == 2 and -math.inf < v[0] < v[1] < math.inf),
    ),
    "mean": Rule("finite numbers", lambda v, _: all(map(math.isfinite, v))),
    "std": Rule("above 0", lambda v, _: all(0 < x < math.inf for x in v)),
}
_SHARDS: Rules = {
    "label_key": Rule("a name", lambda v, _: bool(v)),
    "train_split": Rule(
        "'train', as config.data.path names the shards to train on",
        lambda v, data: v == "train" or not shard_files.is_pattern(data.path),
    ),
}
_PACKAGED: Rules = {
    "path": Rule("empty, or set config.data.source=folder as well", lambda v, _: not v),
    **dict.fromkeys(("train_split", "val_split"), one_of(arrays.FASHION_MNIST)),
}


def check(config) -> None:
    """Checks the `data` section of a config. Raises `UserError`."""
    channels, side = config.model.channels, min(config.model.image_size)
    per_channel = Rule(
        f"of length {channels}, as config.model.channels={channels}",
        lambda v, _: len(v) == channels,
    )
    large_enough = Rule(
        f"at least the shorter side of the image, {side}, or None", lambda v, _: not v or v >= side
    )
    of_model = {"mean": per_channel, "std": per_channel, "short_side": large_enough}
    packaged = _PACKAGED if config.data.source == "fashion_mnist" else {}
    shards = _SHARDS if config.data.source == "shards" else {}
    if packaged or config.data.path.endswith(".npz"):
        of_model["cache"] = Rule("0, as images in memory need none", lambda v, _: not v)
    else:
        # An evaluation cuts from images that cover a box, whose longer side that is.
        least = math.ceil((config.data.short_side or side) * max(config.model.image_size) / side)
        of_model["cache"] = Rule(
            f"0, or from {least}, the side of what an evaluation cuts, to {_LARGEST:,}",
            lambda v, _: v == 0 or least <= v <= _LARGEST,
        )
    for rules in (RULES, packaged, shards, of_model):
        configs.check(config, "data", rules)
