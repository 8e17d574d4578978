"""Files, written whole or not at all: a reader finds the old content or the new, never a half."""

import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from maect_jax.errors import UserError


def read_json(path: Path) -> dict:
    """The content of a JSON file, nothing where there is none.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file; its folder must be there."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file; its folder must be there."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def to_disk(file) -> None:
    """Has what was written to an open file outlast a power cut."""
    file.flush()
    os.fsync(file.fileno())


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`.

    Raises:
      ValueError: there is no such file, or it is damaged or something else.
    """
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            return dict(saved)
    # numpy and zipfile have one for each way in which a file can be wrong.
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes a compressed `.npz`; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        np.savez_compressed(file, **arrays)
    draft.replace(path)
