"""What a folder holds, by SHA-256, so that damage is seen before anything is read.

The storage formats of checkpoints check some of their bytes and not others: a flipped bit may end
in an error, or in another number.
"""

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maect_jax import files

NAME = "manifest.json"


def of(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of each file of a folder, by its path in it; all of it is on disk then."""
    names = _names(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        found = list(pool.map(lambda name: _digest(folder / name, keep=True), names))
    told = ({"bytes": size, "sha256": sha} for size, sha in found)
    return dict(zip(names, told, strict=True))


def seal(folder: Path, listed: dict[str, dict], measured: dict[str, float]) -> None:
    """Writes the manifest of a folder, which is not to change any more.

    Args:
      folder: what is sealed.
      listed: what `of` says of it.
      measured: figures that the manifest keeps as well.
    """
    files.write_text(folder / NAME, _text({"measured": measured, "files": listed}))
    inside = [path for path in folder.rglob("*") if path.is_dir()]
    for place in (*inside, folder, *folder.parents[:3]):  # of the stage, of all, of the run
        files.fsync_folder(place)


def measured(folder: Path) -> dict[str, float]:
    """The figures that a sealed folder keeps; none where its manifest is damaged."""
    try:
        found = dict(json.loads((folder / NAME).read_text())["measured"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest; what it says is another question (`damage`)."""
    try:
        return stat.S_ISREG((folder / NAME).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):  # of which an outage is neither
        return False


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is not what it was, and how; `None`
    where all is as it was.

    Raises:
      OSError: a file cannot be read, which says nothing of its bytes.
    """
    try:
        text = (folder / NAME).read_text()
        content = json.loads(text)
        listed = dict(content["files"])
    except FileNotFoundError:
        return f"{NAME}: is missing"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return f"{NAME}: cannot be read: {error!r}"
    # Every byte of the manifest counts, too.
    if text != _text(content):
        return f"{NAME}: is not what was written"
    there = _names(folder)
    for name in sorted({*listed, *there}):
        if name not in there:
            return f"{name}: is missing"
        if name not in listed:
            return f"{name}: is not in the manifest"

    def changed(name):
        try:
            size, sha = _digest(folder / name)
        except FileNotFoundError:  # a link to nothing
            return f"{name}: is missing"
        wanted = listed[name]
        if size != wanted["bytes"]:
            return f"{name}: has {size:,} bytes, not {wanted['bytes']:,}"
        return None if sha == wanted["sha256"] else f"{name}: its bytes are not those written"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(changed, there)), None)


def _text(content: dict) -> str:
    """The manifest with a digest of itself."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def _names(folder: Path) -> list[str]:
    """All files but the manifest, by their path in the folder."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != NAME)


def _digest(path: Path, keep: bool = False) -> tuple[int, str]:
    """Size and SHA-256 of a file; with `keep` it is on the disk then."""
    with path.open("rb") as file:
        if keep:
            files.fsync(file)
        sha = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha
