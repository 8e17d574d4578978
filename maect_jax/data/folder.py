"""Image files in a folder, listed once: the index of a large folder is saved."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from maect_jax import files
from maect_jax.data.base import Source
from maect_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_LARGE = 10_000  # images from which on an index is worth its file


class Index(NamedTuple):
    """The files below a folder, as arrays, which are cheap to pass to worker processes."""

    classes: np.ndarray  # names of the class folders, empty where there are none
    names: np.ndarray  # the files' paths below the folder, uint8, joined by NUL
    labels: np.ndarray  # int32, -1 for all files where there are no classes
    folders: np.ndarray  # paths of all folders that were listed
    changed: np.ndarray  # when each of these last gained or lost a file (ns); 0 on a bucket

    @property
    def ends(self) -> np.ndarray:
        """Where each path ends in `names`."""
        return np.append(np.flatnonzero(self.names == 0), len(self.names))

    def is_valid(self) -> bool:
        """Whether the arrays have the types and sizes of an index."""
        kinds = "".join(array.dtype.kind for array in self if array.ndim == 1)
        return (
            kinds == "UuiUi"
            and self.names.dtype == np.uint8
            and len(self.ends) == len(self.labels)
            and np.diff(self.ends, prepend=-1).min() > 1
            and -1 <= self.labels.min() <= self.labels.max() < len(self.classes)
        )


class Folder(Source):
    """Image files `<root>/<class>/...`, the classes in alphabetical order; or files in `root`
    itself, which have no label.

    Args:
      root: the folder; with the extra [gcs] on a bucket, `gs://...`.
      classes: to number the labels by, in place of `root`'s classes.
      index_file: may hold the index where `root`'s parent is read-only or on a bucket.

    Raises:
      UserError: there is no such folder, no image in it or in one of its classes, a class that
        is not among `classes`, or a symbolic link that leads back into itself.
    """

    def __init__(
        self, root: str, classes: Sequence[str] | None = None, index_file: Path | None = None
    ):
        self._root, self._index_files = root, [index_file] if index_file else []
        if not _is_remote(root):
            self._root = os.path.abspath(root)
            path = Path(self._root)
            self._index_files.insert(0, path.parent / f".{path.name}.index.npz")
        saved = self._saved_index()
        self._is_new = saved is None
        self._index = saved or _make_index(epath.Path(self._root), root)
        self._ends = self._index.ends
        self.classes, self.labels = self._index.classes.tolist(), self._index.labels
        if classes is not None and self.classes:
            if unknown := sorted(set(self.classes) - set(classes)):
                names = first_names(unknown)
                raise _error(f"{root!r} has classes that the training images lack: {names}")
            numbers = [classes.index(name) for name in self.classes]
            self.labels = np.array(numbers, np.int32)[self.labels]
            self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        return epath.Path(self.name(record)).read_bytes(), int(self.labels[record])

    def name(self, record: int) -> str:
        """The path of a file."""
        start = self._ends[record - 1] + 1 if record else 0
        path = self._index.names[start : self._ends[record]].tobytes()
        return os.path.join(self._root, os.fsdecode(path))

    def _saved_index(self) -> Index | None:
        """The index from its file, unless a folder has changed since."""
        for path in self._index_files:
            with contextlib.suppress(ValueError, TypeError):  # TypeError: arrays of other names
                index = Index(**files.read_arrays(path))
                folders = (os.path.join(self._root, name) for name in index.folders)
                if index.is_valid() and [*map(_changed, folders)] == index.changed.tolist():
                    return index
        return None

    def save_index(self) -> None:
        """Saves the index of a large folder beside it or, where that fails, in `index_file`."""
        for path in self._index_files if self._is_new and len(self) >= _LARGE else ():
            with contextlib.suppress(OSError):  # a read-only folder
                files.write_arrays(path, **self._index._asdict())
                return


def _is_remote(path: str) -> bool:
    return "://" in path


def _changed(folder: str) -> int:
    try:
        return 0 if _is_remote(folder) else os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def _error(text: str) -> UserError:
    return UserError(f"config.data.path: {text}")


def first_names(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _make_index(root: epath.Path, given: str) -> Index:
    """Lists all folders below `root`, which the user called `given`."""
    try:
        exists = root.is_dir()
    except Exception as error:  # each kind of bucket has its own
        raise _error(f"cannot list {given!r}: {' '.join(str(error).split())}") from error
    if not exists:
        raise _error(f"there is no folder {given!r}")
    # A folder's time is read before its files: a file that comes meanwhile makes a new index.
    changed, real_root = {root: _changed(os.fspath(root))}, os.path.realpath(root)
    class_folders, images = _listed(root)
    if images and class_folders:
        example = f"{given!r} has images beside its class folders, such as {images[0].name}"
        raise _error(f"{example}; expected <class>/<image>, or images alone, without labels")
    classes = [folder.name for folder in class_folders]
    # The images without a class, which have the label -1, then those of each class.
    walked = [images, *(_walk(folder, changed, (real_root,)) for folder in class_folders)]
    groups = [sorted(map(os.fspath, group)) for group in walked]
    if not any(groups):
        raise _error(
            f"no images below {given!r}; expected <class>/<image>, or images alone, with one of "
            f"the endings {' '.join(SUFFIXES)}"
        )
    if empty := [name for name, group in zip(classes, groups[1:], strict=True) if not group]:
        raise _error(f"no images in these classes of {given!r}: {first_names(empty)}")
    start = len(os.fspath(root).rstrip("/")) + 1
    names = [os.fsencode(path[start:]) for group in groups for path in group]
    return Index(
        classes=np.array(classes, dtype=str),
        names=np.frombuffer(b"\0".join(names), np.uint8),
        labels=np.repeat(np.arange(-1, len(classes), dtype=np.int32), list(map(len, groups))),
        folders=np.array([os.fspath(folder)[start:] for folder in changed], dtype=str),
        changed=np.array(list(changed.values())),
    )


def _listed(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """The folders and the images in a folder, in alphabetical order, without hidden ones."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise _error(f"cannot list {str(folder)!r}: {error}") from error
    # What has the ending of an image is taken for one: on a bucket each question takes time.
    images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    others = (entry for entry in entries if entry.suffix.lower() not in SUFFIXES)
    return [entry for entry in others if entry.is_dir()], images


def _walk(folder: epath.Path, changed: dict[epath.Path, int], above: tuple[str, ...]) -> Iterator:
    """Yields the images below a folder, whose parents are `above` (real paths); notes in `changed`
    when each folder changed."""
    path = os.fspath(folder)
    real = path if _is_remote(path) else os.path.realpath(path)
    if real in above:
        raise _error(f"{path!r} is a symbolic link that leads back into itself")
    changed[folder] = _changed(path)
    folders, images = _listed(folder)
    yield from images
    for inner in folders:
        yield from _walk(inner, changed, (*above, real))
