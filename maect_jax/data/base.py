"""The base class of all sources of images."""

import abc
from functools import cached_property

import numpy as np


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

    def save_index(self) -> None:  # noqa: B027 - most sources have none
        """Saves what took long to find out, for the next run. Called by one process alone."""
