"""The base class of all sources of images."""

import abc
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np


def digest(*parts: bytes | np.ndarray) -> str:
    """A digest of bytes and arrays, 16 characters."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()[:16]


class Identity(NamedTuple):
    """What tells the images of a source from others, whatever their path is.

    Attributes:
      images: their number.
      content: a digest of the names and sizes of files, or of what is in memory.
      times: a digest of when the files last changed; empty where that is not known.
    """

    images: int
    content: str
    times: str = ""

    def difference(self, before: Any) -> str:
        """What has changed since an identity was written down (`_asdict`), in words; empty if
        nothing has. Version 0.1 wrote down the number of images alone."""
        if not isinstance(before, Mapping):
            before = {"images": before}
        if before.get("images") != self.images:
            return f"{before.get('images')} images before, {self.images} now"
        if before.get("content", self.content) != self.content:
            return f"{self.images} images as before, but not the same"
        if before.get("times", self.times) != self.times:
            return NEW_TIMES
        return ""


NEW_TIMES = "the files have their names and sizes, but were written or copied since"


class Source(abc.ABC):
    """Random access to images and labels: `source[record]` is `(image, label)`.

    An image is a file's content (bytes) or pixels, uint8 `[H, W, C]`; `decode.pixels` takes either.
    A label is -1 where an image has none.
    """

    in_memory: bool = False  # pixels, which each worker process would copy
    reads_labels: bool = False  # whether every record is read for `labels`
    shape: tuple[int, int, int] | None = None  # (H, W, C) of all images; None where they differ
    classes: list[str]  # names of the labels, in order; empty where they have none
    no_labels: str = "no labels"  # for messages; with the reason where they are not used

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, record: int) -> tuple[bytes | np.ndarray, int]: ...

    def name(self, record: int) -> str:
        """The name of a record: its file's, if it has one."""
        return f"image {record}"

    @cached_property
    def identity(self) -> Identity:
        """What tells these images from others."""
        raise NotImplementedError

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all images, integers `[N]`."""
        return np.array([self[record][1] for record in range(len(self))], np.int32)

    @cached_property
    def labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.labels >= 0).all())

    @property
    def num_classes(self) -> int:
        """Number of classes: of those that have a name, else up to the highest label."""
        return len(self.classes) or int(self.labels.max()) + 1

    def drop_labels(self, no_labels: str) -> None:
        """Makes all images have no label, and no classes."""
        self.labels = np.full(len(self), -1, np.int32)
        self.classes, self.labelled, self.reads_labels = [], False, False
        self.no_labels = no_labels
