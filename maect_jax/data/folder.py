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
        self.root = root
        self._kept = kept
        self._index = self._read() or self._find()
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
        return os.path.join(self.root, os.fsdecode(names[start : ends[record]].tobytes()))

    @property
    def _beside(self) -> Path:
        root = Path(self.root)
        return root.parent / f".{root.name}.index.npz"

    def _read(self) -> Index | None:
        """The index from its file, if it still holds."""
        for path in filter(None, (None if _remote(self.root) else self._beside, self._kept)):
            try:
                with np.load(path) as saved:
                    index = Index(**saved)
            except (OSError, ValueError, TypeError, EOFError, KeyError):
                continue
            now = [_changed(os.path.join(self.root, name)) for name in index.folders]
            if np.array_equal(now, index.changed):
                return index
        return None

    def _find(self) -> Index:
        root = epath.Path(self.root)
        if not root.is_dir():
            raise UserError(f"config.data.path: there is no folder {self.root!r}")
        index = _index_of(root)
        if len(index.labels) >= _LARGE and not _remote(self.root):
            _write(self._beside, index)
        return index

    def keep(self) -> None:
        """Writes the index of a large folder into the run's, where it could not stand beside it."""
        large = len(self) >= _LARGE
        if large and self._kept and (_remote(self.root) or not self._beside.exists()):
            _write(self._kept, self._index)


def _write(path: Path, index: Index) -> None:
    try:
        files.write_arrays(path, **index._asdict())
    except OSError:  # a folder to read from only; the next run looks again
        path.with_suffix(".tmp").unlink(missing_ok=True)


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


def _index_of(root: epath.Path) -> Index:
    """Looks through all folders below `root`."""
    folders, found, labels = [root], [], []
    below, own = _listed(root)
    classes = [folder.name for folder in below]
    if own and below:
        raise UserError(
            f"config.data.path: {str(root)!r} has images beside its class folders, such as "
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
            f"config.data.path: no images below {str(root)!r}; expected <class>/<image>, or images "
            f"alone, with one of the endings {' '.join(SUFFIXES)}"
        )
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        names = _some([classes[label] for label in empty])
        raise UserError(f"config.data.path: no images in these classes of {str(root)!r}: {names}")
    start = len(os.fspath(root)) + 1
    names = [os.fsencode(file[start:]) for file in found]
    return Index(
        classes=np.array(classes, dtype=str),
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names]),
        labels=np.asarray(labels, np.int32),
        folders=np.array([os.fspath(folder)[start:] for folder in folders], dtype=str),
        changed=np.array([_changed(os.fspath(folder)) for folder in folders]),
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


def _walk(folder: epath.Path, seen: list[epath.Path], above: tuple[str, ...]) -> Iterator:
    """The images below a folder; appends each folder to `seen`."""
    real = _real(folder)
    if real in above:
        raise UserError(
            f"config.data.path: {str(folder)!r} is a symbolic link that leads back into itself"
        )
    seen.append(folder)
    below, images = _listed(folder)
    yield from images
    for inner in below:
        yield from _walk(inner, seen, (*above, real))
