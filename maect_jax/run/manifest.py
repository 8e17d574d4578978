"""The seal of a saved folder: its files by SHA-256, so that damage is seen before anything is read.

The formats of checkpoints check some of their bytes and not others: a flipped bit may end in an
error, or in another number.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maect_jax import files

NAME = "manifest.json"
# What the parser and the look-ups below raise on a file with other content.
_OTHER_CONTENT = (ValueError, TypeError, KeyError, RecursionError)


def digests(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file of a folder but its manifest, by its path in the folder, in
    order. All of them are on the disk then."""
    return _digests(folder, flush=True)


def seal(folder: Path, entries: dict[str, dict], measured: dict[str, float]) -> None:
    """Writes the manifest of a folder, which must not change any more: its `digests`, and figures
    that were measured."""
    files.write_text(folder / NAME, _text({"measured": measured, "files": entries}))
    inside = [path for path in folder.rglob("*") if path.is_dir()]
    # The names must outlast a power cut too: up to those of the stage, its parent and the run.
    for path in (*inside, folder, *folder.parents[:3]):
        files.fsync_folder(path)


def measured(folder: Path) -> dict[str, float]:
    """The figures that a sealed folder keeps; none if its manifest is damaged."""
    try:
        values = dict(json.loads((folder / NAME).read_text(encoding="utf-8"))["measured"])
    except (OSError, *_OTHER_CONTENT):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def damage(folder: Path) -> str | None:
    """The first file of a sealed folder that is not what it was, and how; `None` if all are. Raises
    `OSError` if a file cannot be read, which says nothing about its bytes."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
        content = json.loads(text)
        entries = dict(content["files"])
    except FileNotFoundError:
        return f"{NAME}: is missing"
    except _OTHER_CONTENT as error:
        return f"{NAME}: cannot be read: {error!r}"
    if text != _text(content):
        return f"{NAME}: is not what was written"
    current = _digests(folder)
    for name in sorted({*entries, *current}):
        if name not in current:
            return f"{name}: is missing"
        if name not in entries:
            return f"{name}: is not in the manifest"
        if current[name] != entries[name]:
            return f"{name}: its bytes are not those written"
    return None


def _text(content: dict) -> str:
    """The manifest with a digest of itself, as every byte of it counts too."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    sha = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": sha}, indent=1) + "\n"


def _digests(folder: Path, flush: bool = False) -> dict[str, dict]:
    def digest(name):
        with (folder / name).open("rb") as file:
            if flush:
                files.fsync(file)
            sha = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": sha}

    paths = (path for path in folder.rglob("*") if path.is_file())  # not a link to nothing
    names = sorted({path.relative_to(folder).as_posix() for path in paths} - {NAME})
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        return dict(zip(names, pool.map(digest, names), strict=True))
