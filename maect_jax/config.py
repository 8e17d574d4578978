"""Config pages: load one, apply overrides, write it down. Every mistake is one clear line."""

import ast
import difflib
import importlib.util
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

from ml_collections import ConfigDict

from maect_jax import files
from maect_jax.errors import UserError, shown

_LONGEST = 1000  # characters of a text: no name or path that people give has more
# What every run's config has, also that of an imported encoder.
_MODEL = (
    "variant", "width", "depth", "heads", "patch_size", "image_size", "channels", "ln_eps", "pool",
)  # fmt: skip
_LARGEST = 2**63 - 1  # what an integer of 64 bits can be


def load(page: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Builds the locked config of a page.

    Args:
      page: `path/to/page.py`, or `path/to/page.py:argument`, which the page's
        `get_config(argument)` understands.
      overrides: `key=value` with dotted keys, such as `ct.epochs=3`.

    Raises:
      UserError: no such page or key, a page that does not run, or a value of another type.
    """
    file, _, argument = page.partition(":")
    path = Path(file).resolve()
    if not path.is_file():
        pages = sorted(str(p) for p in Path(file).parent.glob("*.py"))
        near = difflib.get_close_matches(file, pages, 1, 0)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the pages"
        raise UserError(f"--config={page}: there is no such file{hint}")
    # Pages import each other as `configs.<name>`, from wherever the command is run.
    sys.path.insert(0, str(path.parent.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(argument).lock()
    except ValueError as error:  # what a page raises for an argument it does not know
        raise UserError(f"--config={page}: {error}") from error
    except Exception as error:  # a page is a program: anything may go wrong in it
        reason = " ".join(str(error).split())
        raise UserError(f"--config={page}: not a config page: {reason}") from error
    finally:
        sys.path.remove(str(path.parent.parent))
    for override in overrides:
        _override(config, override)
    return config


def flat(config: ConfigDict) -> dict[str, object]:
    """All values of a config by their dotted key, in order."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            values |= {f"{key}.{below}": leaf for below, leaf in flat(value).items()}
        else:
            values[key] = value
    return values


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    values = flat(config)
    if key not in values:
        below = [name for name in values if name.startswith(f"{key}.")]
        if below:
            raise UserError(f"--config.{key} is a section; its keys are {', '.join(below)}")
        near = difflib.get_close_matches(shown(key), values, 1, 0)[0]
        raise UserError(
            f"--config.{shown(override)}: there is no key {shown(key)!r}; did you mean {near!r}?"
        )
    if not equals:
        raise UserError(f"--config.{key}: write --config.{key}=VALUE")
    *sections, leaf = key.split(".")
    holder = reduce(ConfigDict.__getitem__, sections, config)
    kind = holder.get_type(leaf)
    try:
        holder[leaf] = _parse(text, kind, values[key])
    # MemoryError and RecursionError: the parser's, of what is nested too deep.
    except (
        ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        what = f"str of at most {_LONGEST:,} characters" if kind is str else kind.__name__
        raise UserError(
            f"--config.{shown(override)}: expected {what}, such as {values[key]!r}"
        ) from error


def _parse(text: str, kind: type, before):
    if kind is str:
        if len(text) > _LONGEST:
            raise ValueError("too long")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise ValueError("control characters, or bytes that are no text")
        return text
    value = ast.literal_eval(text.capitalize() if kind is bool else text)
    if kind is tuple and isinstance(value, tuple) and before:
        return tuple(_typed(element, type(before[0])) for element in value)
    return value if value is None and before is None else _typed(value, kind)


def _typed(value, kind: type):
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of {kind}")
    if kind is int and abs(value) > _LARGEST:
        raise OverflowError("more than 64 bits")
    return value


def read(path: Path) -> ConfigDict:
    """The config that a run wrote (`config.json`); JSON's lists are tuples again.

    Raises:
      UserError: there is none, or the file holds something else.
    """

    def tuples(value):
        if isinstance(value, list):
            return tuple(map(tuples, value))
        if isinstance(value, dict):
            return {key: tuples(below) for key, below in value.items()}
        return value

    content = files.read_json(path)
    needs(path, content, "model", _MODEL)
    needs(path, content, "data")
    return ConfigDict(tuples(content))


def needs(path: Path, content: Mapping, section: str, keys: Sequence[str] = ()) -> None:
    """Raises `UserError` where a run's config, the content of `path`, lacks some keys."""
    found = content.get(section)
    known = isinstance(found, Mapping | ConfigDict)
    absent = [f"{section}.{key}" for key in keys if key not in found] if known else [section]
    if absent:
        raise UserError(f"{path}: not the config of a run: has no {', '.join(absent)}")


def differing(old: ConfigDict, new: ConfigDict) -> list[str]:
    """A line `key: old -> new` for every key whose values differ."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]
