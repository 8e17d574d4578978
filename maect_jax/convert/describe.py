"""What was recognised in foreign files, for people."""

import re
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from maect_jax.convert import recognise
from maect_jax.convert.layouts import ENCODER, Parts, Sorted
from maect_jax.convert.tensors import Content, Stored
from maect_jax.models import positions, vit


def lines(
    contents: Sequence[Content],
    found: Sequence[Sorted],
    config: ConfigDict,
    grid: tuple[int, int],
    parts: Parts,
) -> Iterator[str]:
    """The files, the model, how every tensor is used, which are left and why.

    Args:
      contents: of the files.
      found: their tensors, sorted.
      config: what was made of them (`importing.Imported`).
      grid: of the position embedding in the file.
      parts: the tensors of all files by part, whose names are those of `names`.
    """
    for content, one in zip(contents, found, strict=True):
        yield f"{content.path}: {one.layout} names, {content.container}"
    main = next(one for one in found if ENCODER in one.parts)
    model, size = config.model, vit.size_of(config.model)
    height, width = model.image_size
    yield f"kind       {config.stages[0]}: {' + '.join(sorted(parts, key=ENCODER.__ne__))}"
    yield (
        f"encoder    width {size.width}, depth {size.depth}, heads {size.heads}, patch "
        f"{model.patch_size}, LayerNorm eps {model.ln_eps:g}, feature {model.pool}"
    )
    yield f"images     {height} x {width} x {model.channels}"
    yield f"positions  {_positions(config, grid, main)}"
    told = "told by the folder" if config.data else "not told; config.data.mean and .std count"
    yield f"mean, std  {told}"
    total = sum(len(one.left) for one in found) + len({n for x in _all(parts) for n in x.names})
    yield f"tensors    {total}, used as"
    for part, own in parts.items():
        yield from _uses(part, own)
    for one in found:
        for name, reason in one.left.items():
            yield f"  {name}: left, it {reason}"


def _all(parts: Parts) -> Iterator[Stored]:
    for own in parts.values():
        yield from own.values()


def _positions(config: ConfigDict, grid: tuple[int, int], found: Sorted) -> str:
    fixed = recognise.is_fixed(found.parts[ENCODER], grid)
    text = "the fixed sine-cosine ones" if fixed else "learned, kept as such"
    if positions.grid(config.model.image_size, config.model.patch_size) != grid:
        text += f", resized (bicubic) from {grid[0]} x {grid[1]} patches"
    return text


def _uses(part: str, own: Mapping[str, Stored]) -> Iterator[str]:
    """How the tensors of a part are used; weight and bias, and those of all blocks, in one line."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, x in own.items():
        ours, theirs = (re.sub(r"\.\d+\.", ".*.", text) for text in (name, " + ".join(x.names)))
        stem, dot, kind = ours.rpartition(".")
        if dot and all(n.endswith(f".{kind}") for n in x.names):
            theirs, ours = theirs.replace(f".{kind}", ""), stem
        else:
            kind = ""
        kinds = rows.setdefault((theirs, ours), [])
        if kind not in kinds:
            kinds.append(kind)
    for (theirs, ours), kinds in rows.items():
        which = f" ({', '.join(kinds)})" if any(kinds) else ""
        yield f"  {theirs} -> {part} {ours}{which}"
