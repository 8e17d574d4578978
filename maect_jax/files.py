"""Atomic writing: a reader finds the old content of a file or the new one, never half of it."""

import csv
import errno
import json
import logging
import os
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from maect_jax.errors import UserError, shown

KEPT = 90 * 24 * 3600.0  # seconds that what is in the user's cache is kept
_LOGGER = logging.getLogger(__name__)
_PAUSES = (1.0, 4.0, 15.0, 60.0)  # seconds before a write is tried again
# What does not pass by itself.
_PERMANENT = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENAMETOOLONG, errno.EBADF, errno.EINVAL,
}  # fmt: skip


def retry_io(path: Path, write: Callable[[], None]) -> None:
    """Calls `write` until it succeeds, for at most 80 seconds: storage may fail for a while.

    Raises:
      OSError: a permanent error, such as a full disk, at once; an outage that takes longer.
    """
    for pause in (*_PAUSES, None):
        try:
            write()
            return
        except OSError as error:
            if pause is None or error.errno in _PERMANENT:
                raise
            _LOGGER.warning("%s: cannot be written (%s); next try in %g s", path, error, pause)
            time.sleep(pause)


def expanded(text: str) -> str:
    """A path that a user gave, with the home in place of `~` or `~user`. Raises `UserError` if
    there is no such user."""
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.lexists(path):
        user = path.partition("/")[0]
        raise UserError(f"{shown(text)!r}: there is no user {user[1:]!r}; a file may be ./{user}")
    return path


def user_cache() -> Path:
    """The private folder of what this package keeps for a user from run to run.

    Raises:
      OSError: it cannot be made, or is another user's.
      RuntimeError: there is no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maect_jax"
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o700)  # what is in it is run
    if cache.stat().st_uid != os.getuid():
        raise PermissionError(f"{cache} is another user's")
    return cache


def user_path(text: str) -> Path:
    """A type for argparse: `expanded` as a path."""
    if not text:  # of an unset variable; as a path it would be the working folder
        raise ArgumentTypeError("is empty")
    return Path(expanded(text))


def read_json(path: Path) -> dict:
    """The content of a JSON file, an object; empty if there is no such file. Raises `UserError` if
    it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    draft = path.with_suffix(".tmp")

    def attempt():
        write(draft)
        with draft.open("rb") as file:
            fsync(file)  # or a power cut might leave the name without its content
        draft.replace(path)

    try:
        retry_io(path, attempt)
    except BaseException:  # a KeyboardInterrupt is one
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file into an existing folder, as UTF-8 whatever the locale is. The bytes of
    names that are no UTF-8 are written as they are (`os.fsdecode`)."""
    content = text.encode(errors="surrogateescape")
    _write_atomically(path, lambda draft: draft.write_bytes(content))


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file into an existing folder."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], lines: Callable[[], Iterable[Sequence]]) -> None:
    """Writes a CSV file into an existing folder, line by line, encoded as by `write_text`. `lines`
    is called again if the writing is tried again."""

    def write(draft):
        settings = dict(encoding="utf-8", errors="surrogateescape", newline="")
        with draft.open("w", **settings) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(lines())

    _write_atomically(path, write)


def fsync(file) -> None:
    """Forces what was written to an open file to the disk, so that it survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`. Raises `ValueError` if there is no such file, or it is damaged or
    something else."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return dict(arrays)
    # NumPy, its parser and zipfile have a kind of error for each way in which a file can be wrong.
    except Exception as error:
        raise ValueError(shown(str(error) or repr(error))) from error


def read_saved_arrays(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` that a run has written, which must have `keys`. Raises `UserError` if
    it is damaged."""
    try:
        arrays = read_arrays(path)
        if absent := ", ".join(key for key in keys if key not in arrays):
            raise ValueError(f"has no {absent}")
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}). Remove it to do without.") from error
    return arrays


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a compressed `.npz`; makes its folder."""

    def write(draft):
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez_compressed(file, **arrays)

    _write_atomically(path, write)
