"""The base class of all sources of images."""

import abc
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from maect_jax.errors import UserError

_SAMPLED = 64  # images that are read to identify all
THREADS = 8  # that list and read: on storage in a network each question takes time


SHARDS = (".tar", ".parquet")  # endings of files that hold many images


class AbsentError(UserError):
    """There is no such folder or split of images."""


def path_error(text: str, kind: type[UserError] = UserError) -> UserError:
    """An error about what is in `config.data.path`."""
    return kind(f"config.data.path: {text}")


def listing_error(path: str, error: Exception) -> UserError:
    """An error about a path that cannot be listed. Each kind of bucket has its own reasons."""
    gcs = isinstance(error, ImportError) and path.startswith("gs://")
    reason = "needs gcsfs, the extra [gcs]: pip install gcsfs" if gcs else f"{error}"
    return path_error(f"cannot list {path!r}: {' '.join(reason.split())}")


def digest(*parts: bytes | np.ndarray) -> str:
    """A digest of bytes and arrays, 16 characters."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()[:16]


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


class Difference(NamedTuple):
    """What has changed of the images of a source."""

    content: bool  # whether the images are others; else only the times of their files are
    text: str  # what has changed, for messages


class Identity(NamedTuple):
    """What tells the images of a source from others, whatever their path is."""

    images: int  # their number
    # A digest of the names and sizes of files and of what is in some of them, or of what is in
    # memory; where a file has the labels, with a digest of these behind a dash.
    content: str
    times: str = ""  # a digest of when the files last changed; empty where that is not known

    def difference(self, before: Any) -> Difference | None:
        """What has changed since an identity was written down (`_asdict`); `None` if nothing has,
        or nothing was. Version 0.1 wrote down the number of images alone."""
        if not isinstance(before, Mapping):
            return None
        if before.get("images", self.images) != self.images:
            text = f"{before['images']} images before, {self.images} now"
            if "content" not in before and before["images"] < self.images:
                text += "; since version 0.2 files with more endings count as images"
            return Difference(content=True, text=text)
        content = before.get("content", self.content)
        if content != self.content:
            same_labels = content.partition("-")[2] == self.content.partition("-")[2]
            other = "not the same" if same_labels else "with other labels"
            return Difference(content=True, text=f"{self.images} images as before, but {other}")
        if before.get("times", self.times) != self.times:
            text = "the files have their names and sizes, but were written or copied since"
            return Difference(content=False, text=text)
        return None


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

    @abc.abstractmethod
    @cached_property
    def identity(self) -> Identity:
        """What tells these images from others."""

    def digest_of(self, record: int) -> str:
        """A digest of the content of an image; empty if it cannot be read."""
        try:
            return digest(self[record][0])
        except Exception:  # each kind of bucket has its own
            return ""

    def sampled(self) -> list[bytes]:
        """Digests of the content of some images, empty for those that cannot be read: without
        compression other images have the same size."""
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(self.digest_of, evenly_spaced(len(self), _SAMPLED))
            return [one.encode() for one in found]

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


def relative_names(source: Source) -> list[str]:
    """The names of all images below the folder that they share, by which files outside a run call
    them, wherever the images are."""
    return below_shared_folder([source.name(record) for record in range(len(source))])


def below_shared_folder(names: Sequence[str]) -> list[str]:
    """Names without the longest folder that all of them share."""
    # `commonpath` would make one slash of the two in `gs://`.
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071
    return [name[start:] for name in names]
