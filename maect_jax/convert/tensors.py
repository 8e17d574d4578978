"""Files of named tensors, read one tensor at a time and without running anything that they hold.

A safetensors file needs no PyTorch. A pickle is read by `torch.load(weights_only=True)` alone,
which builds tensors and plain containers, refuses all else, and maps the file.
"""

import argparse
import dataclasses
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import getitem
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maect_jax import files
from maect_jax.errors import UserError

SAFETENSORS, PICKLES = (".safetensors",), (".pth", ".pt", ".th", ".bin", ".ckpt")
_WRAPPERS = ("model", "state_dict")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "pytorch_model.bin")
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file: NumPy reads it when it is asked for its numbers.

    Attributes:
      names: what the file calls it; several where it is put together from several.
      shape: as PyTorch has it.
      read: its numbers.
      where: the file.
      floating: whether they are floating-point numbers of 16 bits or more.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    where: Path
    floating: bool = True

    def __array__(self, dtype=None, copy=None):
        del copy
        x = self.read()
        if x.dtype.kind not in "iub" and not np.isfinite(x).all():
            raise UserError(f"{self.where}: {self.names[0]!r} holds numbers that are not finite")
        # Parameters are float32, whatever the file keeps them in.
        own = x.dtype if x.dtype.kind in "iub" else np.float32
        return x.astype(own if dtype is None else dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file or a folder holds: its tensors by name, and what is written beside them.

    `config` is that of a HuggingFace folder, or of the header of a safetensors file; `config` and
    `preprocessor` may be empty.
    """

    path: Path
    container: str
    tensors: Mapping[str, Stored]
    config: Mapping
    preprocessor: Mapping


def read(path: Path) -> Content:
    """The tensors of a file, or of a HuggingFace folder.

    Raises:
      UserError: it does not exist, is damaged, or is something else.
    """
    file = weights_in(path) or path
    if file.is_dir():
        run = "; a run need not be imported" if (path / "checkpoints").is_dir() else ""
        raise UserError(f"{path}: the folder holds none of {', '.join(_WEIGHTS)}{run}")
    if not file.is_file():
        raise UserError(f"{path}: there is no such file")
    config: dict = {}
    preprocessor: dict = {}
    if file.name == _INDEX:
        container, tensors = "safetensors, in parts", _parts(file)
    elif file.suffix in SAFETENSORS:
        container, (tensors, config) = "safetensors", _safetensors(file)
    elif file.suffix in PICKLES:
        container, tensors = _pickle(file)
    else:
        allowed = ", ".join(SAFETENSORS + PICKLES)
        raise UserError(f"{path}: not a file of tensors by its name; must end in one of {allowed}")
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    if file.name in _WEIGHTS:  # what lies beside a file of another name may be of another model
        config |= files.read_json(file.with_name("config.json"))
        preprocessor = files.read_json(file.with_name("preprocessor_config.json"))
    return Content(path, container, tensors, config, preprocessor)


def weights_in(folder: Path) -> Path | None:
    """The file with a HuggingFace folder's weights, or with the list of those; else nothing."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def sha256(path: Path) -> str:
    """The hash of a file, or of the files with a folder's weights, one after the other."""
    found = weights_in(path) or path
    parts = {x.where for x in _parts(found).values()} if found.name == _INDEX else {found}
    digest = hashlib.sha256()
    for part in sorted(parts):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors, and what the header says besides."""

    def read(name):
        # Opened for each tensor, so that what was read is let go and never adds up.
        with safe_open(path, "numpy") as file:
            return file.get_tensor(name)

    tensors = {}
    try:
        with safe_open(path, "numpy") as file:
            names = file.keys()
            for name in names:
                x = file.get_slice(name)
                shape, floats = tuple(x.get_shape()), x.get_dtype() in _FLOATS
                tensors[name] = Stored((name,), shape, partial(read, name), path, floats)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


def _parts(index: Path) -> dict[str, Stored]:
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or any(type(name) is not str for name in places.values()):
        raise UserError(f"{index}: has no weight_map from names to files")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index}: its part {name!r} is not beside it")
        tensors |= _safetensors(index.parent / name)[0]
    if absent := set(places) - set(tensors):
        raise UserError(f"{index}: no part holds the tensor {min(absent)!r}")
    return tensors


def _torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: needs PyTorch, the extra [torch]: pip install torch") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise UserError(
            f"{path}: PyTorch {torch.__version__} is too old to read pickles without running them; "
            "2.6 or later does"
        )
    return torch


def _load(torch, path: Path, mapped: bool):
    """What `torch.save` wrote: tensors in plain containers."""
    # MAE's own checkpoints carry their command line, which is a bag of names and values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _pickle(path: Path) -> tuple[str, dict[str, Stored]]:
    torch = _torch(path)
    mapped = zipfile.is_zipfile(path)  # a file from before 2020 is no archive, and is read whole
    try:
        saved = _load(torch, path, mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it is damaged, no file of PyTorch's, or holds more than tensors and "
            "plain values; nothing in it was run"
        ) from error
    # PyTorch has one for each way in which a file can be wrong.
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole PyTorch file: {first}") from error
    keys = []
    for _ in _WRAPPERS:  # at most one in the other
        inner = next((k for k in _WRAPPERS if isinstance(saved, Mapping) and k in saved), None)
        if inner is None or not isinstance(saved[inner], Mapping):
            break
        keys.append(inner)
        saved = saved[inner]
    if not isinstance(saved, Mapping):
        raise UserError(f"{path}: holds {type(saved).__name__}, not tensors by name")
    if odd := [k for k, x in saved.items() if not (isinstance(k, str) and torch.is_tensor(x))]:
        raise UserError(f"{path}: {odd[0]!r} is not a tensor; is this a whole training state?")

    def read(name):
        # Mapped anew for each tensor, for the same reason as above.
        content = reduce(getitem, keys, _load(torch, path, mapped)) if mapped else saved
        x = content[name].detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy().copy()

    tensors = {}
    for name, x in saved.items():
        floats = x.layout == torch.strided and x.dtype.is_floating_point and x.dtype.itemsize > 1
        tensors[name] = Stored((name,), tuple(x.shape), partial(read, name), path, floats)
    inside = "".join(f"[{key!r}]" for key in keys)
    return f"PyTorch {inside}".strip(), tensors


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    wrapper: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors, or by the path's ending as a pickle of `{wrapper: tensors}`.

    `metadata` goes into the header of safetensors. The file is written whole or not at all.

    Raises:
      OSError: the file cannot be written.
      UserError: PyTorch is needed and not installed.
    """
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    draft = path.with_name(path.name + ".tmp")
    torch = None if path.suffix in SAFETENSORS else _torch(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()  # safetensors makes files that no one else may read
        mode = draft.stat().st_mode
        if torch is None:
            save_file(arrays, draft, metadata={"format": "pt", **(metadata or {})})
        else:
            content = {name: torch.tensor(x) for name, x in arrays.items()}
            torch.save({wrapper: content} if wrapper else content, draft)
        draft.chmod(mode)
        draft.replace(path)
    # A full disk is an error of the libraries' own.
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        draft.unlink(missing_ok=True)
