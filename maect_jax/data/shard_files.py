"""The shards of a split: from a pattern with braces or a glob to files on disk or on a bucket."""

import glob
import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from maect_jax.data.base import SHARDS, THREADS, AbsentError, listing_error, path_error
from maect_jax.data.folder import STAMPS
from maect_jax.errors import first_of, shown

_OF_NAME = "{,-*,/*}.{tar,parquet}"  # follows the name of a split: train-00000-of-00004.parquet
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_NUMBER = re.compile(r"(\d+)(-of-(\d+))?(\.\w+)$")
_GLOB = re.compile(r"[*?[]")
_MOST = 10**6  # shards of a range
_DECOMPRESS = "Decompress them once, such as by gunzip *.tar.gz: images become hardly any larger"
_LOGGER = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A file that holds images: its path or URL, its size, and when it last changed."""

    path: str
    size: int
    time: str

    @property
    def is_tar(self) -> bool:
        return self.path.endswith(".tar")


def storage_of(path: str) -> tuple[Any, str]:
    """The file system (of fsspec) of a path or URL, and its path there."""
    import fsspec  # slow to import, and not needed to read from a disk

    return fsspec.core.url_to_fs(path)


def expanded(pattern: str) -> list[str]:
    """A pattern without its braces: `{000..255}` stands for these numbers, with as many digits,
    `{a,b}` for either. Raises `UserError` for a range that is too long."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if not 0 <= high - low < _MOST:
            raise path_error(
                f"{found[0]} in {pattern!r}: must be a range upwards, of at most {_MOST:,}"
            )
        is_padded = any(text.startswith("0") and len(text) > 1 for text in (first, last))
        width = max(len(first), len(last)) if is_padded else 0
        parts = [f"{number:0{width}}" for number in range(low, high + 1)]
    else:
        parts = words.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(dict.fromkeys(x for part in parts for x in expanded(before + part + after)))


def is_pattern(path: str) -> bool:
    """Whether a path names shards, and not the folder that they are in."""
    return path.endswith((*SHARDS, "}")) and all(x.endswith(SHARDS) for x in expanded(path))


def find(path: str, name: str, split: str) -> list[Shard]:
    """The shards of a split, in the order of the pattern, those of a glob by their names.

    Args:
      path: a pattern of the training shards, or the folder of all shards; on a disk or a bucket.
      name: of the split: a pattern in that folder, or what the names of its shards start with.
      split: "train" or "val".

    Raises:
      AbsentError: there are none.
      UserError: some are missing, are compressed as a whole, or cannot be listed.
    """
    path = path if "://" in path else os.path.abspath(path)
    is_whole = is_pattern(path)
    folder = os.path.dirname(path) if is_whole else glob.escape(path)
    pattern = path if is_whole and split == "train" else os.path.join(folder, name)
    pattern = name if "://" in name else pattern
    if _COMPRESSED.search(pattern) or _COMPRESSED.search(path):
        raise path_error(f"{pattern!r}: compressed tars cannot be read at random. {_DECOMPRESS}")
    is_exact = is_pattern(pattern)
    patterns = expanded(pattern if is_exact else pattern + _OF_NAME)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = dict(zip(patterns, pool.map(_matching, patterns), strict=True))
    except Exception as problem:  # each kind of bucket has its own
        raise listing_error(pattern, problem) from problem
    absent = [x for x, shards in found.items() if not shards]
    if len(absent) == len(found):
        what = "" if is_exact else " (its name, then - or / and more, .tar or .parquet)"
        text = f"no shard matches {pattern!r}{what}{_beside(os.path.dirname(pattern))}"
        raise path_error(text, AbsentError)
    if is_exact and absent:
        raise path_error(f"no shard matches {first_of(absent)}; others are there")
    if not is_exact and len(found) - len(absent) > 1:
        several = first_of([x for x, shards in found.items() if shards])
        raise path_error(f"{pattern!r} may be any of {several}; name a pattern with its ending")
    unique = list(dict.fromkeys(shard for shards in found.values() for shard in shards))
    if _GLOB.search("".join(patterns)):
        _check_numbers([shard.path for shard in unique])
    return unique


def _matching(pattern: str) -> list[Shard]:
    """The files that match a pattern without braces."""
    storage, inner = storage_of(pattern)
    names = [inner]
    if _GLOB.search(inner) and not storage.isfile(inner):
        names = [x for x in sorted(storage.glob(inner)) if not os.path.basename(x).startswith(".")]
    scheme = pattern.partition("://")[0] + "://" if "://" in pattern else ""
    found = []
    for name in names:
        try:
            about = storage.info(name)
        except FileNotFoundError:
            if name != inner:  # a link that leads nowhere
                raise
            return []
        path = scheme + name.lstrip("/") if scheme and "://" not in name else name
        if about["type"] != "directory":
            found.append(Shard(path, about["size"], _time(about)))
    return found


def _time(about: dict) -> str:
    return " ".join(str(about[key]) for key in STAMPS if key in about)


def _beside(folder: str) -> str:
    """What there is in place of shards, as part of a message."""
    try:
        storage, inner = storage_of(folder)
        names = [os.path.basename(x.rstrip("/")) for x in sorted(storage.ls(inner, detail=False))]
    except Exception:  # each kind of bucket has its own
        return f"; there is no folder {shown(folder)!r}"
    has = f"has {first_of(names)}" if names else "is empty"
    advice = f". {_DECOMPRESS}" if any(map(_COMPRESSED.search, names)) else ""
    return f"; {shown(folder)!r} {has}{advice}"


def _check_numbers(paths: Sequence[str]) -> None:
    """Looks for gaps in the numbers of shards: of those that say how many they are, a missing one
    is a `UserError`; of others it is said."""
    numbers: dict[tuple[str, str, str], dict[int, int]] = defaultdict(dict)
    for path in paths:
        if found := _NUMBER.search(path):
            key = (path[: found.start()], found[3] or "", found[4])
            numbers[key][int(found[1])] = len(found[1])
    for (start, of, ending), there in numbers.items():
        low, high = (0, int(of) - 1) if of else (min(there), max(there))
        if high - low + 1 == len(there) or high - low > _MOST:
            continue
        end = (f"-of-{of}" if of else "") + ending
        absent = [
            os.path.basename(f"{start}{number:0{min(there.values())}}{end}")
            for number in range(low, high + 1)
            if number not in there
        ]
        text = f"{len(absent)} of {high - low + 1} shards are absent: {first_of(absent)}"
        if of:
            raise path_error(f"{text}. To read a part of them, name a range, {{000..002}}")
        _LOGGER.warning("%s: by their numbers %s", start + "*" + ending, text)
