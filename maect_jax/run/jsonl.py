"""Files with a JSON object a line, each with `stage` and `step`, that lines are added to."""

import json
import math
import os
from pathlib import Path

from maect_jax import files
from maect_jax.errors import UserError


def read(path: Path) -> list[dict]:
    """The lines of a file; none if there is no file. A last line that was cut off is left out.
    Raises `UserError` if a line is damaged."""
    try:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            if (type(entry["stage"]), type(entry["step"])) != (str, int):
                raise TypeError
            entries.append(entry)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if line.endswith("\n"):
                raise UserError(
                    f"{path}: line {number} is damaged. Remove that line, then run the same "
                    "command to resume."
                ) from error
    return entries


def truncate(path: Path, stage: str, step: int) -> list[dict]:
    """Drops the lines of `stage` after `step`, which will be written again; returns those left."""
    entries = [e for e in read(path) if e["stage"] != stage or e["step"] <= step]
    if path.exists():
        files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
    return [entry for entry in entries if entry["stage"] == stage]


class Writer:
    """A file of lines, open for adding."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def add(self, entry: dict) -> None:
        """Writes a whole line, or nothing: floats with the seven digits of a float32, and null if
        they are not finite."""
        rounded = dict(entry)
        for key, value in entry.items():
            if isinstance(value, float):
                rounded[key] = float(f"{value:.7g}") if math.isfinite(value) else None
        data, end = f"{json.dumps(rounded)}\n".encode(), self._file.seek(0, os.SEEK_END)

        def write():
            written = 0
            try:
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError:
                self._file.truncate(end)
                raise

        files.retry_io(self._path, write)

    def sync(self) -> None:
        """Makes the lines outlast a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
