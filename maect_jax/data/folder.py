"""Image files in a folder or on a bucket."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from etils import epath

from maect_jax.data import decode
from maect_jax.data.base import (
    SHARDS,
    THREADS,
    AbsentError,
    Identity,
    Source,
    digest,
    listing_error,
    path_error,
)
from maect_jax.errors import UserError, first_of

_LOGGER = logging.getLogger(__name__)
# What buckets call the time or the hash of a file, each its own.
STAMPS = ("mtime", "LastModified", "last_modified", "md5Hash", "ETag", "blob_id")


class _File(NamedTuple):
    """An image: its path below the folder, its size, and when it last changed."""

    path: str
    size: int
    time: object


@dataclass
class _Listing:
    """What is in some folder and below, without hidden files and folders."""

    images: list[_File] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # other files, by their ending
    classes: list[str] = field(default_factory=list)  # names of the folders in it, sorted


class Folder(Source):
    """Image files `<root>/<class>/...`, the classes in alphabetical order; or files in `root`
    itself, which have no label. Files without the ending of an image are left out; a warning
    counts them.

    Args:
      root: the folder; with the extra [gcs] on a bucket, `gs://...`.
      labelled: whether folders are classes; else they mean something else.

    Raises:
      AbsentError: there is no such folder.
      UserError: it has no image, none in one of its classes, or a symbolic link that leads back
        into itself.
    """

    def __init__(self, root: str, labelled: bool = True):
        self._root = root if _is_remote(root) else os.path.abspath(root)
        try:
            if not (_is_remote(root) or os.path.isdir(root)):
                kind = UserError if os.path.lexists(root) else AbsentError
                raise path_error(f"there is no folder {root!r}{_beside(self._root)}", kind)
            found = _bucket(root) if _is_remote(root) else _tree(self._root)
        except OSError as error:
            raise listing_error(root, error) from error
        if not labelled:
            found.classes.clear()
        self.classes, groups = found.classes, _groups(found, root)
        files = [file for group in groups for file in sorted(group)]
        # Arrays are cheap to pass to worker processes.
        paths = b"\0".join(os.fsencode(file.path) for file in files)
        self._paths = np.frombuffer(paths, np.uint8)
        self._ends = np.append(np.flatnonzero(self._paths == 0), len(paths))
        sizes = np.array([file.size for file in files])
        times = "\n".join(str(file.time) for file in files).encode()
        self._digests = digest(paths, sizes), digest(times)
        # The images without a class have the label -1.
        numbers = np.arange(-1, len(self.classes), dtype=np.int32)
        self.labels = np.repeat(numbers, [len(group) for group in groups])
        if found.others:
            _LOGGER.warning("%s: left out %s", root, counted(found.others))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        return epath.Path(self.name(record)).read_bytes(), int(self.labels[record])

    @cached_property
    def identity(self) -> Identity:
        """Of the names, sizes and times of all files, and of what is in some of them."""
        names, times = self._digests
        return Identity(len(self), digest(names.encode(), *self.sampled()), times)

    def name(self, record: int) -> str:
        """The path of a file."""
        start = self._ends[record - 1] + 1 if record else 0
        path = self._paths[start : self._ends[record]].tobytes()
        return os.path.join(self._root, os.fsdecode(path))


class Files(Source):
    """Image files by their paths, without labels."""

    labelled = False

    def __init__(self, paths: Sequence[str]):
        self._paths, self.classes = list(paths), []
        self.labels = np.full(len(self), -1, np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, record: int) -> tuple[bytes, int]:
        return epath.Path(self._paths[record]).read_bytes(), -1

    def name(self, record: int) -> str:
        """The path of a file."""
        return self._paths[record]

    @cached_property
    def identity(self) -> Identity:
        """Of the paths of all files, and of what is in some of them."""
        return Identity(len(self), digest(*map(os.fsencode, self._paths), *self.sampled()))


def _beside(root: str) -> str:
    """What there is in place of a folder that does not exist, as part of a message."""
    parent = os.path.dirname(root)
    names = os.listdir(parent) if os.path.isdir(parent) else [parent]
    if any(name.endswith(SHARDS) for name in names):
        return "; shards need config.data.source=shards"
    if not os.path.isdir(parent):
        return "; set config.data.path"
    folders = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    return (
        f"; {parent!r} has {f'the folders {first_of(folders)}' if folders else 'no folder'}. "
        "config.data.train_split and val_split name that of each split; '.' is the folder itself"
    )


def _is_remote(path: str) -> bool:
    return "://" in path


def counted(others: Counter[str]) -> str:
    """Files by ending, as text: those that an extra reads, then the most frequent first."""
    needs_extra, names = {ending: ending in decode.HEIF_ENDINGS for ending in others}, []
    for ending in sorted(others, key=lambda x: (not needs_extra[x], -others[x], x)):
        hint = " (needs the extra [heif])" if needs_extra[ending] else ""
        names.append(f"{others[ending]} {ending or 'without an ending'}{hint}")
    count = others.total()
    return f"{count} file{'s' * (count != 1)}: {first_of(names)}"


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: also what macOS adds to an archive."""
    return name.startswith(".") or name == "__MACOSX"


def _groups(found: _Listing, root: str) -> list[list[_File]]:
    """The images without a class, then those of each class. Raises `UserError` if that is not what
    a folder, which the user called `root`, can mean."""
    classes = found.classes
    groups: dict[str, list[_File]] = {name: [] for name in ("", *classes)}
    for file in found.images:
        name, slash, _ = file.path.partition("/")
        groups[name if slash and classes else ""].append(file)
    if groups[""] and classes:
        example = f"{root!r} has images beside its class folders, such as {min(groups[''])[0]}"
        raise path_error(
            f"{example}; expected <class>/<image>, or images alone, without labels. Where folders "
            "are no classes, set config.data.labels=none"
        )
    left_out = f" (left out {counted(found.others)})" if found.others else ""
    if not found.images:
        raise path_error(
            f"no images below {root!r}{left_out}; expected <class>/<image>, or images alone, with "
            "an ending of one of Pillow's formats, such as .jpg or .png"
        )
    if empty := [name for name in classes if not groups[name]]:
        raise path_error(f"no images in these classes of {root!r}: {first_of(empty)}{left_out}")
    return list(groups.values())


def _bucket(root: str) -> _Listing:
    """Lists a folder of a bucket. Sizes and times come with the names."""
    import fsspec  # slow to import, and only buckets need it

    try:
        storage, top = fsspec.core.url_to_fs(root)
        entries = list(storage.ls(top, detail=True))
        folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
        with ThreadPoolExecutor(THREADS) as pool:
            for below in pool.map(lambda name: storage.find(name, detail=True), folders):
                entries += below.values()
    except FileNotFoundError:
        raise path_error(f"there is no folder {root!r}", AbsentError) from None
    except Exception as error:  # each kind of bucket has its own
        raise listing_error(root, error) from error
    found, start = _Listing(), len(top.rstrip("/")) + 1
    for entry in entries:
        path = entry["name"][start:].rstrip("/")
        if not path or any(map(_is_hidden, path.split("/"))):  # or the folder itself
            continue
        if entry["type"] == "directory":
            found.classes.append(path)
        elif (ending := decode.ending(path)) in decode.endings():
            stamps = [str(entry[key]) for key in STAMPS if key in entry]
            found.images.append(_File(path, entry["size"], stamps))
        else:
            found.others[ending] += 1
    found.classes.sort()
    return found


def _tree(root: str) -> _Listing:
    """Lists a folder on disk."""
    found = _Listing()
    # Folders to list: their paths below `root`, and the real ones from `root` to them.
    level = [("", (os.path.realpath(root),))]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            listed = list(pool.map(lambda folder: _scan(root, *folder), level))
            level = [inner for _, folders in listed for inner in folders]
            for part, _ in listed:
                found.images += part.images
                found.others += part.others
            found.classes = found.classes or sorted(path for path, _ in level if "/" not in path)
    return found


def _scan(root: str, path: str, above: tuple[str, ...]) -> tuple[_Listing, list]:
    """Lists one folder below `root`; returns it and the folders in it, as `_tree` takes them."""
    found, folders, endings = _Listing(), [], decode.endings()
    with os.scandir(os.path.join(root, path)) as entries:
        for entry in entries:
            name = f"{path}/{entry.name}" if path else entry.name
            ending = decode.ending(entry.name)
            if _is_hidden(entry.name):
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                real = os.path.join(above[-1], entry.name)
                if entry.is_symlink() and (real := os.path.realpath(entry)) in above:
                    raise path_error(
                        f"{entry.path!r} is a symbolic link that leads back into itself"
                    )
                folders.append((name, (*above, real)))
            elif ending in endings:
                try:
                    about = entry.stat()
                except OSError:  # a broken link, which is named when it is read
                    found.images.append(_File(name, -1, 0))
                    continue
                if stat.S_ISREG(about.st_mode):
                    found.images.append(_File(name, about.st_size, about.st_mtime_ns))
                else:  # a pipe, which might never end
                    found.others[f"{ending} that is no file"] += 1
            else:
                found.others[ending] += 1
    return found, folders
