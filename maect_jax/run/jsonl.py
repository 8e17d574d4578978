"""Files with a JSON object a line, each of which has `stage` and `step`: they only grow."""

import json
import math
import os
from pathlib import Path

from maect_jax import files
from maect_jax.errors import UserError


def read(path: Path) -> list[dict]:
    """The lines of such a file; nothing where there is none.

    Raises:
      UserError: a line is damaged.
    """
    try:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            if isinstance(entry["stage"], str) and type(entry["step"]) is int:
                found.append(entry)
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            if not line.endswith("\n"):  # the last one, torn by a power cut
                break
        raise UserError(f"{path}: line {number} is damaged; remove it, and the run goes on")
    return found


def truncate(path: Path, stage: str, step: int) -> list[dict]:
    """Drops the lines of `stage` past `step`: what is done again must not be told twice.

    Returns what is left of the stage.
    """
    kept = [entry for entry in read(path) if entry["stage"] != stage or entry["step"] <= step]
    files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return [entry for entry in kept if entry["stage"] == stage]


def _text(entry: dict) -> str:
    """As JSON: numbers have the seven digits that a float32 has, what is not finite is null."""

    def short(value):
        if not isinstance(value, float):
            return value
        return float(f"{value:.7g}") if math.isfinite(value) else None

    return json.dumps({key: short(value) for key, value in entry.items()})


class Writer:
    """Such a file, open."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def add(self, entry: dict) -> None:
        """Writes a line, to its end or not at all."""
        text, end = f"{_text(entry)}\n".encode(), self._file.seek(0, os.SEEK_END)

        def whole():
            rest = memoryview(text)
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(end)
                raise

        files.retry_io(self._path, whole)

    def sync(self) -> None:
        """Has the lines outlast a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
