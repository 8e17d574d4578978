"""Files of named tensors, read one tensor at a time and without running anything that they hold.

What a file is follows from its first bytes, never from its name. A safetensors file needs no
PyTorch. A pickle is read by `torch.load(weights_only=True)` alone, which builds tensors and plain
containers, refuses all else, and maps the file.
"""

import dataclasses
import hashlib
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maect_jax import files
from maect_jax.errors import UserError

# Of a HuggingFace folder: lists of parts; weights, the preferred ones first; what is read beside.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
BESIDE = ("config.json", "preprocessor_config.json")
_PICKLE_LOAD, _TORCH_LOAD = "pickle.load({})", "torch.load({}, weights_only=False)"
_FLOATS = ("F16", "BF16", "F32", "F64")
_DEPTH = 8  # of dicts and lists in each other
_TORCH_OLD = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # what PyTorch wrote first until 2020
# What files with other first bytes are, and what to do with them.
_OTHERS = {
    b"version https://git-lfs": "is the pointer of Git LFS to the file; fetch it with git lfs pull",
    b"<": "is a web page, not the file; download it again",
    b"{": "is JSON, and holds no weights",
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"\x93NUMPY": "is an array of NumPy",
    b"\x89HDF": "is HDF5",
}
# Classes by name that checkpoints keep beside their tensors: none is imported or built, `_Unread`
# stands for it.
_UNREAD = [
    f"{module}.{name}"
    for modules, names in (
        ("argparse", "Namespace"),
        ("numpy", "dtype ndarray"),
        ("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
        ("pathlib pathlib._local", "PosixPath WindowsPath PurePosixPath PureWindowsPath"),
    )
    for module in modules.split()
    for name in names.split()
]


class DamagedError(UserError):
    """A file that is not whole; `file` is its name."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"{path}: {why}")
        self.file = path.name


class _Unread:
    """A value of a pickle that is not read."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


class _Array(_Unread):
    """An array of NumPy in a pickle."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file: NumPy reads it when it is asked for its numbers."""

    # What the file calls it, in its innermost dict; several where it is put together from several,
    # none of a tensor in a list.
    names: tuple[str, ...]
    shape: tuple[int, ...]  # as PyTorch has it
    read: Callable[[], np.ndarray]  # its numbers
    where: Path  # the file
    floating: bool = True  # whether they are floating-point numbers of 16 bits or more

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

    A tensor in nested dicts and lists has the names of all, and its numbers in the lists, joined by
    dots. `config` is that of a HuggingFace folder, of the header of a safetensors file, or the
    `ctor_kwargs` of a file of MAE-CT's authors, under that key; `config` and `preprocessor` may be
    empty.
    """

    path: Path
    container: str
    tensors: Mapping[str, Stored]
    config: Mapping
    preprocessor: Mapping


def read(path: Path) -> Content:
    """The tensors of a file, or of a HuggingFace folder. Raises `UserError` if it does not exist,
    is damaged, or is something else."""
    file = weights_in(path) or path
    if file.is_dir():
        run = "; a run need not be imported" if (path / "checkpoints").is_dir() else ""
        inside = ", ".join(sorted(x.name for x in path.iterdir() if x.is_file())[:3]) or "no file"
        raise UserError(
            f"{path}: the folder holds none of {', '.join(WEIGHTS)}; it has {inside}{run}"
        )
    if not file.is_file():
        raise UserError(f"{path}: there is no such file; on HuggingFace's hub: hf://ORG/NAME")
    preprocessor: dict = {}
    if file.name in INDEXES:
        container, tensors, config = _parts(file)
    else:
        container, tensors, config = _read_file(file)
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    if file.name in WEIGHTS:  # what lies beside a file of another name may be of another model
        own, preprocessor = (files.read_json(file.with_name(name)) for name in BESIDE)
        config |= own
        beside = [x for x in WEIGHTS if file.with_name(x).is_file() and x != file.name]
        container += f" ({file.name}, not {' or '.join(beside)} beside it)" if beside else ""
    return Content(path, container, tensors, config, preprocessor)


def weights_in(folder: Path) -> Path | None:
    """The file with a HuggingFace folder's weights, or with the list of those; else nothing."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def sha256(path: Path) -> str:
    """The hash of a file, or of the files with a folder's weights, one after the other."""
    found = weights_in(path) or path
    parts = {found}
    if found.name in INDEXES:
        parts = {x.where for x in _parts(found)[1].values()}
    digest = hashlib.sha256()
    for part in sorted(parts):
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


# The name of the format, the tensors by name, and what is written beside them.
_Read = tuple[str, dict[str, Stored], dict]


def _read_file(path: Path) -> _Read:
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head[4:9] == b"\0\0\0\0{":  # the length of the header, and the header, which is JSON
            return _safetensors(path)
        if head.startswith(b"\x80"):
            if _TORCH_OLD not in head[:32]:  # a tensor in another pickle has it, too
                why = "it is damaged, or a pickle that torch.save has not written"
                raise UserError(f"{path}: refused: {why}; {_untrusted(path, _PICKLE_LOAD)}")
            return _pickle(path, mapped=False)  # PyTorch's from before 2020, which is read whole
        if head.startswith(b"PK\3\4"):
            return _archive(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    text = head.lstrip(b"\xef\xbb\xbf\r\n ")
    what = next((_OTHERS[x] for x in _OTHERS if text.startswith(x)), f"starts with {head[:8]!r}")
    if not head:
        what = "is empty; download it again"
    elif head[257:262] == b"ustar":
        what = "is a tar archive; unpack it first"
    raise UserError(f"{path}: no file of PyTorch or safetensors: it {what}")


def _archive(path: Path) -> _Read:
    """The tensors of a zip archive, which PyTorch's files are, and others, too."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
    except zipfile.BadZipFile as error:
        why = "not a whole PyTorch file: it is cut short or damaged"
        raise DamagedError(path, why) from error
    kinds = {
        "/constants.pkl": "TorchScript's archive",
        "/data.pkl": "",
        ".npy": "NumPy's archive",
        "": "a zip archive of something else; unpack it first",
    }
    kind = next(x for x in kinds if not x or any(name.endswith(x) for name in inside))
    if kind == "/data.pkl":
        # A path with this ending `torch.load` takes for safetensors, and it maps no open file.
        return _pickle(path, mapped=not path.name.endswith(".safetensors"))
    raise UserError(f"{path}: no file of PyTorch or safetensors: it is {kinds[kind]}")


def _safetensors(path: Path) -> _Read:

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
            return "safetensors", tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DamagedError(path, f"not a whole safetensors file: {error}") from error


def parts_of(index: Path) -> dict[str, str]:
    """The names of the files with the tensors of a list of parts, by tensor. Raises `UserError` if
    it is damaged."""
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or any(type(name) is not str for name in places.values()):
        raise UserError(f"{index}: has no weight_map from names to files")
    if elsewhere := [name for name in places.values() if not name or Path(name).name != name]:
        raise UserError(f"{index}: its part {elsewhere[0]!r} is not beside it")
    return places


def _parts(index: Path) -> _Read:
    places = parts_of(index)
    container, tensors = "", dict[str, Stored]()
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: its part {name!r} is not beside it")
        container, part, _ = _read_file(index.parent / name)
        tensors |= part
    if absent := set(places) - set(tensors):
        raise UserError(f"{index}: no part holds the tensor {min(absent)!r}")
    return f"{container}, in parts", tensors, {}


def import_torch(named: object):
    """PyTorch. Raises `UserError` about what needs it where it is not installed, or too old."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{named}: needs PyTorch, the extra [torch]: pip install torch") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise UserError(
            f"{named}: PyTorch {torch.__version__} is too old to read pickles without running "
            "them; 2.6 or later does"
        )
    return torch


def _load(torch, path: Path, mapped: bool):
    """What `torch.save` wrote: tensors in plain containers."""
    known = [(_Array if "_reconstruct" in name else _Unread, name) for name in _UNREAD]
    own_warnings = warnings.catch_warnings()
    with path.open("rb") as file, torch.serialization.safe_globals(known), own_warnings:
        warnings.simplefilter("ignore")  # what it cannot read it refuses
        source = path if mapped else file
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _leaves(kind: type, value, keys: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value of a kind in dicts and lists, after the keys and numbers that lead to it."""
    inner: dict = {}
    if isinstance(value, kind):
        yield keys, value
    elif isinstance(value, Mapping):  # an optimizer's state has numbers for keys
        inner = {key: x for key, x in value.items() if isinstance(key, str)}
    elif isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    if len(keys) < _DEPTH:
        for key, x in inner.items():
            yield from _leaves(kind, x, (*keys, key))


def _pickle(path: Path, mapped: bool) -> _Read:
    torch = import_torch(path)
    try:
        saved = _load(torch, path, mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: {_refusal(path, str(error))}") from error
    # PyTorch has one for each way in which a file can be wrong.
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(path, f"not a whole PyTorch file: {first}") from error
    if not isinstance(saved, Mapping):
        raise UserError(f"{path}: holds {type(saved).__name__}, not tensors by name")

    def read(keys):
        # Mapped anew for each tensor, for the same reason as above.
        x = reduce(getitem, keys, _load(torch, path, mapped) if mapped else saved).detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).contiguous().numpy().copy()

    tensors: dict[str, Stored] = {}
    for keys, x in _leaves(torch.Tensor, saved):
        name = ".".join(map(str, keys))
        if name in tensors:
            raise UserError(f"{path}: holds {name!r} twice")
        floats = x.layout == torch.strided and x.dtype.is_floating_point and x.dtype.itemsize > 1
        floats = floats and not x.is_meta
        own = keys[-1:] if isinstance(keys[-1], str) else ()
        tensors[name] = Stored(own, tuple(x.shape), partial(read, keys), path, floats)
    named = [x for x in tensors.values() if x.names]
    arrays = Counter(k[:-1] for k, _ in _leaves(_Array, saved) if isinstance(k[-1], str))
    if arrays and not any(x.shape[1:] for x in named):
        how = _untrusted(path, _TORCH_LOAD, arrays.most_common(1)[0][0])
        raise UserError(f"{path}: holds its weights as NumPy arrays, not as tensors; {how}")
    if not named:
        what = "tensors in lists" if tensors else "no tensors"
        raise UserError(f"{path}: holds {what}, and none by name; save a state_dict()")
    authors = saved.get("ctor_kwargs")
    return "PyTorch", tensors, {"ctor_kwargs": authors} if isinstance(authors, Mapping) else {}


def _refusal(path: Path, message: str) -> str:
    """Why PyTorch refuses a pickle, by its message, and what to do."""
    if name := re.search(r"GLOBAL ([\w.]+)", message):
        why = f"it holds {name[1]}, which is neither a tensor nor a plain value"
    elif "Unsupported operand" in message:
        why = (
            "it is damaged, or a pickle of protocol 4 or later, which PyTorch does not read safely"
        )
    else:
        return "it is damaged, or no file of PyTorch's; nothing in it was run"
    return f"{why}; {_untrusted(path, _TORCH_LOAD)}"


def _untrusted(path: Path, load: str, keys: Sequence[str] | None = None) -> str:
    """What to do with a pickle that must be run to be read.

    `load` is the code that runs it, with {} for the file; `keys` lead to its weights, where known.
    """
    weights = load.format(f"open({str(path)!r}, 'rb')")
    weights += "".join(f"[{key!r}]" for key in (["model"] if keys is None else keys))
    tensors = f"{{k: torch.as_tensor(x) for k, x in {weights}.items()}}"  # of arrays, too
    unknown = (
        ", with the key that they have in place of 'model' (of a whole module .state_dict())"
        if keys is None
        else ""
    )
    return (
        "nothing in it was run. If you trust the file, save its weights alone: "
        f"python -c \"import pickle, torch; torch.save({tensors}, 'weights.pth')\"{unknown}"
    )


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
    torch = None if path.suffix == ".safetensors" else import_torch(path)
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
