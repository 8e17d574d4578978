"""Image files in a folder, found once."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from maect_jax import files
from maect_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_LARGE = 10_000  # images from which on an index is worth its file


class Index(NamedTuple):
    """What is below a folder, as arrays, which worker processes are given cheaply.

    `names` are the files' paths below the folder, joined; file i has those from `ends[i - 1]` to
    `ends[i]`. `labels` int32, -1 for all where there are no classes. `folders` are all that were
    listed, and `changed` when each last gained or lost a file (ns; 0 on a bucket, where that is
    not known).
    """

    classes: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    folders: np.ndarray
    changed: np.ndarray


# By NumPy's letters.
_KINDS = dict(classes="U", names="u", ends="i", labels="i", folders="U", changed="i")


class Folder:
    """Image files `<root>/<class>/...`, the classes in alphabetical order; or files in `root`
    itself, which have no label.

    Args:
      root: the folder; with the extra [gcs] on a bucket, `gs://...`.
      classes: those to number the labels by, where others than `root`'s own.
      kept: a file that may hold the index, and into which `keep` puts it.

    Raises:
      UserError: there is no such folder, no image in it or in one of its classes, a class that
        is not among `classes`, or a symbolic link that leads back into itself.
    """

    shape = None

    def __init__(self, root: str, classes: Sequence[str] | None = None, kept: Path | None = None):
        self._root = root if _remote(root) else os.path.abspath(root)
        self._kept = kept
        saved = self._read()
        self._new = saved is None
        self._index = saved or _index_of(epath.Path(self._root), root)
        self.classes = self._index.classes.tolist()
        self.labels = self._index.labels
        if classes is not None and self.classes:
            strange = sorted(set(self.classes) - set(classes))
            if strange:
                raise UserError(
                    f"config.data.path: {root!r} has classes that the training images lack: "
                    f"{_some(strange)}"
                )
            self.labels = np.int32([list(classes).index(c) for c in self.classes])[self.labels]
            self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        return epath.Path(self.name(record)).read_bytes(), int(self.labels[record])

    def name(self, record: int) -> str:
        """The path of a file."""
        names, ends = self._index.names, self._index.ends
        start = ends[record - 1] if record else 0
        return os.path.join(self._root, os.fsdecode(names[start : ends[record]].tobytes()))

    @property
    def labelled(self) -> bool:
        """Whether the images have labels: all have, or none."""
        return bool(self.classes)

    @property
    def _places(self) -> list[Path]:
        """The files that may hold the index: one beside the folder, and the run's."""
        root = Path(self._root)
        beside = [] if _remote(self._root) else [root.parent / f".{root.name}.index.npz"]
        return beside + ([self._kept] if self._kept else [])

    def _read(self) -> Index | None:
        """The index from its file, if it still holds."""
        for path in self._places:
            try:
                index = Index(**files.read_arrays(path))
            except (ValueError, TypeError):  # TypeError: arrays of other names
                continue
            if not _fits(index):
                continue
            now = [_changed(os.path.join(self._root, name)) for name in index.folders]
            if np.array_equal(now, index.changed):
                return index
        return None

    def keep(self) -> None:
        """Writes the index of a large folder beside it, or into the run's where that cannot be.

        One process alone may call it.
        """
        for path in self._places if self._new and len(self) >= _LARGE else ():
            try:
                files.write_arrays(path, **self._index._asdict())
                return
            except OSError:  # a folder to read from only
                continue


def _fits(index: Index) -> bool:
    """Whether the arrays of an index are of one another."""
    kinds = {key: (array.ndim, array.dtype.kind) for key, array in index._asdict().items()}
    if kinds != {key: (1, kind) for key, kind in _KINDS.items()} or not len(index.ends):
        return False
    sizes = np.diff(index.ends, prepend=0)
    return (
        index.names.dtype == np.uint8
        and bool((sizes > 0).all())
        and index.ends[-1] == len(index.names)
        and index.labels.shape == index.ends.shape
        and bool(((index.labels >= -1) & (index.labels < len(index.classes))).all())
        and index.changed.shape == index.folders.shape
    )


def _remote(root: str) -> bool:
    return "://" in root


def _changed(folder: str) -> int:
    try:
        return 0 if _remote(folder) else os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _index_of(root: epath.Path, given: str) -> Index:
    """Looks through all folders below `root`, which the user called `given`."""
    try:
        there = root.is_dir()
    except Exception as error:  # each kind of bucket has its own
        reason = " ".join(str(error).split())
        raise UserError(f"config.data.path: cannot look into {given!r}: {reason}") from error
    if not there:
        raise UserError(f"config.data.path: there is no folder {given!r}")
    # When a folder changed is asked before it is listed: what comes meanwhile makes a new index.
    folders, found, labels = {root: _changed(os.fspath(root))}, [], []
    below, own = _listed(root)
    classes = [folder.name for folder in below]
    if own and below:
        raise UserError(
            f"config.data.path: {given!r} has images beside its class folders, such as "
            f"{own[0].name}; expected <class>/<image>, or images alone, which have no labels"
        )
    for label, folder in enumerate(below):
        mine = sorted(os.fspath(file) for file in _walk(folder, folders, (_real(root),)))
        found += mine
        labels += [label] * len(mine)
    found += sorted(os.fspath(file) for file in own)
    labels += [-1] * len(own)
    if not found:
        raise UserError(
            f"config.data.path: no images below {given!r}; expected <class>/<image>, or images "
            f"alone, with one of the endings {' '.join(SUFFIXES)}"
        )
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        names = _some([classes[label] for label in empty])
        raise UserError(f"config.data.path: no images in these classes of {given!r}: {names}")
    start = len(os.fspath(root).rstrip("/")) + 1
    names = [os.fsencode(file[start:]) for file in found]
    return Index(
        classes=np.array(classes, dtype=str),
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names]),
        labels=np.asarray(labels, np.int32),
        folders=np.array([os.fspath(folder)[start:] for folder in folders], dtype=str),
        changed=np.array(list(folders.values())),
    )


def _listed(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """The folders and the images in a folder, in alphabetical order; what is hidden is not seen.

    What is called like an image is not asked what it is: on a bucket each question takes time.
    """
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"config.data.path: cannot look into {str(folder)!r}: {error}") from error
    images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    others = [entry for entry in entries if entry.suffix.lower() not in SUFFIXES]
    return [entry for entry in others if entry.is_dir()], images


def _real(folder: epath.Path) -> str:
    path = os.fspath(folder)
    return path if _remote(path) else os.path.realpath(path)


def _walk(folder: epath.Path, seen: dict[epath.Path, int], above: tuple[str, ...]) -> Iterator:
    """The images below a folder; notes in `seen` when each folder changed."""
    real = _real(folder)
    if real in above:
        raise UserError(
            f"config.data.path: {str(folder)!r} is a symbolic link that leads back into itself"
        )
    seen[folder] = _changed(os.fspath(folder))
    below, images = _listed(folder)
    yield from images
    for inner in below:
        yield from _walk(inner, seen, (*above, real))
