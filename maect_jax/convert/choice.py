"""Which model of a file is taken, and what of the file is not.

A model is what stands behind one *prefix*, dots and all: `teacher.module.backbone.`. Its start is
the keys of dicts in dicts, the rest belongs to the names of the tensors (`Content.tensors`).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from maect_jax.convert import names
from maect_jax.convert.tensors import Content, Stored
from maect_jax.errors import UserError, first_of

# Where timm's loader looks, in this order.
_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")
_HOW = "maect import's --key=NAME, or load_encoder's key=NAME"
# What PyTorch puts into the names of a module that it wraps.
_WRAPPED = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class Chosen(NamedTuple):
    """A model of a file."""

    tensors: Mapping[str, Stored]  # without the prefix in their names
    entry: str  # keys of the dicts that it stands in, joined by dots
    key: str | None  # names it, where the file has several models, else None
    notes: tuple[str, ...]  # what was passed over or stripped, for people


def choose(contents: Sequence[Content], key: str | None) -> list[Chosen]:
    """Chooses a model of each file: the only one, that whose prefix, or some words of it, `key`
    names, or timm's choice. Raises `UserError` if `key` names none in any file, or a file has
    several models and nothing says which."""
    models = [names.prefixes(content.tensors) for content in contents]
    if key is not None and not any(_named(prefixes, key) for prefixes in models):
        has = "; ".join(f"{c.path} has {_listed(m)}" for c, m in zip(contents, models, strict=True))
        raise UserError(f"key {key!r} names no model: {has}")
    return [_choose(*pair, key) for pair in zip(contents, models, strict=True)]


def _choose(content: Content, prefixes: list[str], key: str | None) -> Chosen:
    if not prefixes:  # the names are of no known kind, and are refused
        return Chosen(content.tensors, "", None, ())
    prefix = _prefix(content, prefixes, key)
    others = [x for x in prefixes if x != prefix]
    inner = tuple(x for x in others if x.startswith(prefix))
    own = {
        name: x
        for name, x in content.tensors.items()
        if x.names and name.startswith(prefix) and not (inner and name.startswith(inner))
    }
    tensors = {_WRAPPED.sub("", name.removeprefix(prefix)): x for name, x in own.items()}
    wrapped = own.keys() - {f"{prefix}{name}" for name in tensors}
    words = {match[0] for name in wrapped for match in _WRAPPED.finditer(name, len(prefix))}
    first = next(iter(own))
    entry = first.removesuffix(own[first].names[0])
    stripped = prefix.removeprefix(entry)
    left = {name: x for name, x in content.tensors.items() if name not in own}
    rest = _rest({name for name, x in left.items() if x.names}, prefix, others)
    # Not the states of random generators, nor numbers such as an optimizer's betas.
    listed = [n for n, x in left.items() if not x.names and x.floating and x.shape]
    lists = Counter(name.rpartition(".")[0] for name in listed)
    notes = []
    if others:
        also = f"also there: {_listed(others)}. Choose another by {_HOW}"
        notes.append(f"takes {_listed([prefix])}; {also}")
    if stripped:
        notes.append(f"strips the prefix {stripped!r} of {len(own)} tensors")
    if words:
        inside = f"inside the names of {len(wrapped)} tensors"
        notes.append(f"strips {_listed(sorted(words))} {inside}")
    if rest:
        notes.append(f"leaves out what is beside the model: {rest}")
    if lists:
        found = first_of([f"{name} ({count})" for name, count in lists.items()])
        notes.append(
            f"leaves out lists of tensors, which have no names: {found}. If they are averaged "
            "weights, and you want those, copy them into the model where it was trained (of "
            "torch_ema: ema.copy_to(model.parameters())) and save it again"
        )
    notes = [f"{content.path}: {note}" for note in notes]
    key = prefix.rstrip(".") if others else None
    return Chosen(tensors, entry.rstrip("."), key, tuple(notes))


def _prefix(content: Content, prefixes: list[str], key: str | None) -> str:
    """The prefix of the model that is taken."""
    by_key = [] if key is None else _named(prefixes, key)
    by_timm = ([x for x in prefixes if x.split(".")[0] == first] for first in _TIMM)
    fitting = by_key or next(filter(None, by_timm), prefixes)
    if len(fitting) > 1:
        raise UserError(
            f"{content.path}: holds {len(fitting)} models: {_listed(fitting)}; choose by {_HOW}"
        )
    return fitting[0]


def _named(prefixes: Sequence[str], key: str) -> list[str]:
    """The prefix that is a key, or those that have it among their words."""
    same = [x for x in prefixes if x.rstrip(".") == key]
    return same or [x for x in prefixes if f".{key}." in f".{x}"]


def _listed(prefixes: Sequence[str]) -> str:
    return ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes) or "none"


def _rest(left: set[str], prefix: str, others: Sequence[str]) -> str:
    """Names of tensors, by the first word in which they differ from the prefix."""
    words = prefix.split(".")[:-1]
    counts: dict[str, int] = {}
    for name in sorted(left):
        own = name.split(".")
        same = sum(1 for i in range(len(words)) if own[: i + 1] == words[: i + 1])
        group = ".".join(own[: same + 1])
        if not any(f"{group}.".startswith(x) or x.startswith(f"{group}.") for x in others if x):
            counts[group] = counts.get(group, 0) + 1
    return first_of([f"{group} ({count})" for group, count in counts.items()])
