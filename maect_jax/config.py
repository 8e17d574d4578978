"""Configs: load one with its overrides, check it by rules, write it down. A mistake is one line."""

import argparse
import ast
import difflib
import importlib.util
import logging
import math
import re
import sys
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from maect_jax import files
from maect_jax.errors import OneLineParser, UserError, shown

_IN_WHEEL = Path(__file__).parent / "configs"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"  # a clone's
_OVERRIDE = "--config."
_LONGEST = 1000  # characters of a string: no name or path that people give has more
_WORDS = {str: f"str of at most {_LONGEST:,} characters", object: "a number or a word"}
# What the config of every run has, also that of an imported encoder.
_MODEL_KEYS = (
    "variant", "width", "depth", "heads", "patch_size", "image_size", "channels", "ln_eps", "pool",
)  # fmt: skip
# Keys that runs of earlier versions lack, by section, with the values by which they ran.
_ADDED: dict[str, dict[str, Any]] = {
    "data": {
        "labels": "auto",
        "range": (),
        "max_pixels": 178_956_970,
        "cache": 0,
        "label_key": "label",
    },
    "model": {
        "attention": "auto",
        "cls_tokens": 1,
        "registers": 0,
        "rope_theta": None,
        "post_norm": False,
    },
    "eval": {"blocks": ()},
    "eval.cluster": {"duplicates": 0.99, "groups": 0},
}
_REPLACED = {"tensorboard": "loggers=tensorboard"}  # keys of earlier versions
# What names files, or may.
_PATHS = ("init_from", "data.path", "data.labels", "finetune.images", "eval.lowshot.lists")
_INT64 = 2**63 - 1
_INT32 = 2**31  # steps, record numbers and sizes of arrays stay below it


def load(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a locked config.

    `ml_collections.config_flags` is not used: it leaves the elements of a tuple untyped, cannot set
    a placeholder to None, and shows a traceback where a config refuses its argument.

    Args:
      name: of one in `FOLDER`, or `path/to/file.py`; with `:argument` for `get_config(argument)`.
      overrides: `key=value` with dotted keys, such as `ct.epochs=3`.

    Raises:
      UserError: no such config or key, a file that does not run, or a value of another type.
    """
    file, _, argument = name.partition(":")
    path = _find(file, name)
    try:
        spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
        if not (spec and spec.loader):
            raise ImportError("its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        with _configs_of(path.parent, FOLDER):
            spec.loader.exec_module(module)
            config = module.get_config(argument).lock()
    except ValueError as error:  # what a config raises for an argument that it does not know
        raise UserError(f"--config={name}: {error}") from error
    except Exception as error:  # a config is a program: anything may go wrong in it
        reason = " ".join(str(error).split())
        raise UserError(f"--config={name}: not a config: {reason}") from error
    for override in overrides:
        _override(config, override)
    _expand_homes(config)
    return config


def _expand_homes(config: ConfigDict) -> None:
    """Puts the home in place of `~` in what names files."""
    values = flat(config)
    for key in _PATHS:
        if key not in values:
            continue
        try:
            config.update_from_flattened_dict({key: _at_home(values[key])})
        except UserError as error:
            raise UserError(f"config.{key}={error}") from error


def _at_home(value):
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if not isinstance(value, str) or "~" not in value:
        return value
    return ",".join(map(files.expanded, value.split(",")))  # `init_from` may name two files


def _find(file: str, name: str) -> Path:
    """The file of a config: one of the package's by its name, or a path. `name` is for errors."""
    by_name, names = file == Path(file).stem, _names()
    path = FOLDER / f"{file}.py" if by_name else files.user_path(file).resolve()
    try:
        if path.is_file() and (file in names or not by_name):
            return path
        beside = [] if by_name else [str(p) for p in Path(file).parent.glob("*.py")]
    except OSError as error:  # a name that no file can have, or a folder without permission
        raise UserError(f"--config={shown(name)}: cannot be read: {error.strerror}") from error
    near = [
        *difflib.get_close_matches(file, beside, 1),
        *difflib.get_close_matches(Path(file).stem, names, 1),
    ]
    hint = f"did you mean {near[0]}?" if near else "--help lists the configs"
    raise UserError(f"--config={name}: there is no such {'config' if by_name else 'file'}; {hint}")


@contextmanager
def _configs_of(*folders: Path) -> Iterator[None]:
    """Within it the package `configs`, as which configs import each other, has these folders,
    whatever other package of that name there is."""

    def taken_out() -> dict[str, types.ModuleType]:
        ours = [name for name in sys.modules if name.partition(".")[0] == "configs"]
        return {name: sys.modules.pop(name) for name in ours}

    others = taken_out()
    package = sys.modules["configs"] = types.ModuleType("configs")
    package.__path__ = list(map(str, folders))
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(others)


def _override(config: ConfigDict, override: str) -> None:
    key, equals, text = override.partition("=")
    values = flat(config)
    if key in _REPLACED:
        raise UserError(f"--config.{key} is now --config.{_REPLACED[key]}")
    if key not in values:
        below = [name for name in values if name.startswith(f"{key}.")]
        if below:
            raise UserError(f"--config.{key} is a section; its keys are {', '.join(below)}")
        if key.startswith("model.") and "model" not in config:
            raise UserError(
                f"--config.{shown(override)}: the model of this config is that of "
                "config.init_from; `maect import` has flags that change it"
            )
        near = difflib.get_close_matches(shown(key), values, 1, 0)[0]
        raise UserError(
            f"--config.{shown(override)}: there is no key {shown(key)!r}; did you mean {near!r}?"
        )
    if not equals:
        raise UserError(f"--config.{key}: write --config.{key}=VALUE")
    *sections, leaf = key.split(".")
    section = reduce(ConfigDict.__getitem__, sections, config)
    kind = section.get_type(leaf)
    try:
        section[leaf] = _parse(text, kind, values[key])
    except Exception as error:  # the parser has one for each kind of text
        what = _WORDS.get(kind, kind.__name__)
        raise UserError(
            f"--config.{shown(override)}: expected {what}, such as {values[key]!r}"
        ) from error


def _parse(text: str, kind: type, before):
    if kind is object and re.fullmatch(r"-?\d{1,18}", text):  # of a key that may have a word, too
        return int(text)
    if kind in _WORDS:
        if len(text) > _LONGEST or any(unicodedata.category(c) == "Cc" for c in text):
            raise ValueError("too long, or control characters")
        return text
    if kind is tuple and re.fullmatch(r"([A-Za-z]\w*(,[A-Za-z]\w*)*)?", text):
        text = repr(tuple(filter(None, text.split(","))))  # names need no quotes
    value = ast.literal_eval(text.capitalize() if kind is bool else text)
    if kind is tuple and not before and type(value) is int:  # nor does one number need a comma
        value = (value,)
    if kind is tuple and isinstance(value, tuple) and before:
        return tuple(_typed(element, type(before[0])) for element in value)
    return value if value is None and before is None else _typed(value, kind)


def _typed(value, kind: type):
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of {kind}")
    if isinstance(value, int) and abs(value) > _INT64:
        raise OverflowError("more than 64 bits")
    return value


def _names() -> list[str]:
    """The configs that come with the package, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def parser(doc: str) -> OneLineParser:
    """A parser with `--config`, whose help lists all configs; `from_command_line` reads it."""
    epilog = "configs:"
    for name in _names():
        text = (
            ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
        )
        epilog += f"\n  {name:20}" + text.partition("\n")[0]
    described = OneLineParser(description=doc, epilog=epilog, allow_abbrev=False)
    described.add_argument(
        "--config",
        required=True,
        metavar="NAME[:ARGUMENT]",
        help="""one of the configs below, or a file of your own, by its path; NAME:test is its tiny
        variant; --config.KEY=VALUE overrides a key""",
    )
    return described


def from_command_line(described: OneLineParser) -> tuple[ConfigDict, argparse.Namespace]:
    """The config with its overrides, and the other arguments.

    From here on the libraries say as much as `config.log_level` lets them.
    """
    overrides = [arg.removeprefix(_OVERRIDE) for arg in sys.argv if arg.startswith(_OVERRIDE)]
    others = [arg for arg in sys.argv[1:] if not arg.startswith(_OVERRIDE)]
    paths = {override for override in overrides if override.startswith("data.path=")}
    if len(paths) > 1:
        raise UserError(
            f"--config.data.path is given {len(paths)} times, as a shell does with {{...}} that "
            "is not in quotes; put the pattern in quotes"
        )
    arguments = described.parse_args(others)
    config = load(arguments.config, overrides)
    # absl's logging and grain's worker processes read absl's flags.
    flags.FLAGS.mark_as_parsed()
    absl_logging.use_absl_handler()
    debug = config.log_level == "debug"
    absl_logging.set_verbosity(absl_logging.DEBUG if debug else absl_logging.WARNING)
    if not debug:
        _silence_failed_saves()
    return config, arguments


def _silence_failed_saves() -> None:
    """Each of orbax's threads shows a stack trace of a save that fails; `run.checkpoints` has one
    line for it."""
    absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    default = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            default(unraisable)

    sys.unraisablehook = hook


# Rules: what the values must be. Each section's owner has a table of them.


class Rule(NamedTuple):
    """What a value must be."""

    allowed: str  # in words, for the error; `{key}` is filled in from the section
    holds: Callable[[Any, ConfigDict], bool]  # of value and section; a TypeError is a no


Rules = dict[str, Rule]  # by the key within the section
positive = Rule("above 0, and below 2^31", lambda v, _: 0 < v < _INT32)
not_negative = Rule("0 or more, and below 2^31", lambda v, _: 0 <= v < _INT32)
fraction = Rule("from 0 to below 1", lambda v, _: 0 <= v < 1)
numbers_above_0 = Rule(
    "numbers above 0, at least one", lambda v, _: v and all(0 < x < math.inf for x in v)
)


def between(low: float, high: float) -> Rule:
    """From `low` to `high`, both allowed."""
    return Rule(f"from {low} to {high}", lambda v, _: low <= v <= high)


def at_most(most: int) -> Rule:
    """Above 0 and at most `most`."""
    return Rule(f"above 0, and at most {most:,}", lambda v, _: 0 < v <= most)


def one_of(options: Iterable) -> Rule:
    """One of some values."""
    options = tuple(options)
    return Rule("one of " + ", ".join(map(repr, options)), lambda v, _: v in options)


def some_of(options: Iterable) -> Rule:
    """A tuple of some of these values."""
    options = tuple(options)
    return Rule(f"some of {options}", lambda v, _: set(v) <= set(options))


def or_none(rule: Rule) -> Rule:
    """The rule, or None."""
    return Rule(f"{rule.allowed}, or None", lambda v, part: v is None or rule.holds(v, part))


def check(config: ConfigDict, section: str, rules: Rules) -> None:
    """Checks a section ("" for the top level) by the rules of its owner.

    Raises:
      UserError: a value is not allowed.
    """
    part = config[section] if section else config
    values = flat(part)
    for key, rule in rules.items():
        value = values.get(key)  # a config.json that was edited may lack it, or have another type
        try:
            allowed = rule.holds(value, part)
        except TypeError:
            allowed = False
        if not allowed:
            name = f"{section}.{key}" if section else key
            wanted = rule.allowed.format_map(values) if "{" in rule.allowed else rule.allowed
            raise UserError(f"config.{name}={shown(repr(value))}: must be {wanted}")


def flat(config: ConfigDict) -> dict[str, Any]:
    """All values of a config by their dotted key, in order."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            values |= {f"{key}.{below}": leaf for below, leaf in flat(value).items()}
        else:
            values[key] = value
    return values


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """A line `key: old -> new` for every key whose values differ."""
    before, after = flat(old), flat(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]


def read(path: Path) -> ConfigDict:
    """Reads the config that a run has written (`config.json`); JSON's lists are tuples again.

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
    require(path, content, "model", _MODEL_KEYS)
    require(path, content, "data")
    for section, values in _ADDED.items():
        part: Any = content
        for key in section.split("."):
            part = part.get(key) if isinstance(part, dict) else None
        for key, value in values.items() if isinstance(part, dict) else ():  # not all have `eval`
            part.setdefault(key, value)
    had_events = content.pop("tensorboard", False)  # what runs of earlier versions have
    content.setdefault("loggers", ["tensorboard"] if had_events else [])
    return ConfigDict(tuples(content))


def require(path: Path, content: Mapping, section: str, keys: Sequence[str] = ()) -> None:
    """Raises `UserError` where the config of a run, the content of `path`, lacks some keys."""
    values = content.get(section)
    absent = [section]
    if isinstance(values, Mapping | ConfigDict):
        absent = [f"{section}.{key}" for key in keys if key not in values]
    if absent:
        raise UserError(f"{path}: not the config of a run: has no {', '.join(absent)}")
