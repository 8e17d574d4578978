"""PyTorch's tensors and this package's variables: the same numbers under other names.

*Variables* are nested dicts: kernels `[in, out]`, the blocks of a stack along a leading layer axis.
*Tensors* are flat dicts with the names and shapes of MAE's and MAE-CT's state dicts:
`blocks.3.mlp.fc1.weight`, Linear weights `[out, in]`, the patch embedding a convolution
`[D, C, P, P]`. *Files* may have other names for the same tensors: `names.txt` and `kinds.txt` are
the tables of all.

No number is changed on the way, so there and back is bit-equal, except for fixed position
embeddings, which the networks compute and the variables do not hold, and for what is folded into
other tensors: LayerScale and masks of biases, positions of class tokens.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maect_jax.convert.tensors import Stored
from maect_jax.errors import UserError
from maect_jax.models import positions
from maect_jax.stages import support_queue

Tensors = Mapping[str, np.ndarray | Stored]
Parts = dict[str, dict[str, Stored]]  # of a model: its tensors by name
ENCODER, DECODER, HEAD, CLASSIFIER = "encoder", "decoder", "head", "classifier"
_PARTS = (ENCODER, DECODER, HEAD, CLASSIFIER)


def _table(name: str) -> list[dict[str, str]]:
    """The rows of a table beside this module, by column."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    header, *lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return [dict(zip(header, line, strict=True)) for line in lines]


_ROWS, _KINDS = _table("names.txt"), _table("kinds.txt")
_TENSOR = {
    part: {r["variable"]: r["tensor"] for r in _ROWS if r["part"] == part} for part in _PARTS
}
_VARIABLE = {part: {name: path for path, name in _TENSOR[part].items()} for part in _PARTS}
_QUEUE = ("queue", "queue_id", "queue_y", "queue_ptr")
_ATTENTION = ("query", "key", "value")
_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
_LEAVES |= {"mean": ".running_mean", "var": ".running_var"}
_PAIRS = {".weight": ".bias", ".running_mean": ".running_var"}  # leaves of a module, side by side
_PAIRS |= {second: first for first, second in _PAIRS.items()}


def split(name: str) -> tuple[str, str, str]:
    """The module of a tensor, with {} for the number of its block; that number; the leaf."""
    module, dot, leaf = name.rpartition(".")
    if dot + leaf not in _LEAVES.values():
        module, dot, leaf = name, "", ""
    number = re.search(r"\.(\d+)\.", module)
    if number is None:
        return module, "", dot + leaf
    return module.replace(number[0], ".{}.", 1), number[1], dot + leaf


# Between tensors and variables


def depth(names: Iterable[str]) -> int:
    """The number of blocks in a state dict; 1 for none."""
    return max(1, len({block for name in names if (block := split(name)[1])}))


def variables_from_torch(tensors: Tensors, part: str) -> dict[str, dict]:
    """The variables of a part, by collection: "params" and "batch_stats". Raises `UserError` if a
    tensor is unexpected, or not there for every block."""
    layers = depth(tensors)
    stacks: dict[tuple[str, ...], dict[str, str]] = {}
    for name in tensors:
        module, block, leaf = split(name)
        variable = _VARIABLE[part].get(module, "-")
        if variable == "-":
            raise UserError(f"{part}: the tensor {name!r} is unexpected")
        leaves = {theirs: ours for ours, theirs in _LEAVES.items()}
        leaves[".weight"] = "scale" if re.search("norm|bn", variable) else "kernel"
        collection = "batch_stats" if leaf.startswith(".running") else "params"
        path = (collection, *variable.split("/"), *([leaves[leaf]] if leaf else []))
        stacks.setdefault(path, {})[block] = name

    def array(path, name):
        x = np.asarray(tensors[name])
        if path[-1] != "kernel":
            return x
        # A convolution's pixels come in the order of `vit.patchify`: row, column, channel.
        return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, len(x))

    flat = {}
    for path, stack in stacks.items():
        blocks = [""] if "" in stack else [str(i) for i in range(layers)]
        if missing := [block for block in blocks if block not in stack]:
            name = min(stack.values())
            raise UserError(f"{part}: {name!r} is missing in block {missing[0]}")
        arrays = (array(path, stack[block]) for block in blocks)
        flat[path] = first = next(arrays)
        if "" not in stack:  # `np.stack`, but no more than two layers are held beside it
            kind = np.dtype((first.dtype, first.shape))
            flat[path] = np.fromiter(itertools.chain([first], arrays), kind, layers)
    return unflatten_dict(flat)


def _to_torch(variables: Mapping[str, Mapping], part: str) -> dict:
    """The inverse of `variables_from_torch`, for any of the variables."""
    tensors = {}
    for (_, *path), x in flatten_dict(variables).items():
        last = path.pop() if path[-1] in _LEAVES else ""
        name = _TENSOR[part]["/".join(path)] + _LEAVES.get(last, "")
        for i, layer in enumerate(np.asarray(x) if "{}" in name else [np.asarray(x)]):
            tensors[name.format(i)] = layer.T if last == "kernel" else layer
    return tensors


def _network_from_torch(part: str, tensors: Tensors, grid: tuple[int, int]) -> dict:
    """The parameters of a whole encoder (or decoder), with one stack of blocks.

    Args:
      part: `ENCODER` or `DECODER`.
      tensors: of an encoder `patch_embed.proj.*`, `blocks.<i>.*`, `norm.*` and, if it has any,
        `cls_token` and `register_tokens`, of a decoder `mask_token`, `embed.*`, `blocks.<i>.*`,
        `norm.*` and `pred.*`; optionally `pos_embed [1, N, D]`, which is kept only where it differs
        from the fixed sine-cosine embedding. First rows for class tokens, and then for registers,
        are added to these; in a decoder, which has no such tokens of its own, they are zero.
      grid: patches in (rows, columns).

    Raises:
      UserError: a tensor is missing or unexpected.
    """
    params = variables_from_torch(tensors, part)["params"]
    if "pos_embed" not in params:
        return params
    position, rows = params.pop("pos_embed")[0], math.prod(grid)
    extra, position = position[:-rows], position[-rows:]
    if len(position) != rows:
        raise UserError(f"{part}: pos_embed has {len(position)} rows, not {rows}")
    for name in ("cls_token", "register_token"):
        if name in params and len(extra):
            count = params[name].shape[1]
            params[name], extra = params[name] + extra[:count], extra[count:]
    if len(extra) and part == ENCODER:
        raise UserError(f"{part}: pos_embed has {len(extra)} rows that belong to no token")
    fixed = np.array_equal(position, positions.sincos(grid, position.shape[1]))
    return params if fixed else params | {"pos_embed": position}


def _network_to_torch(
    part: str, params: Mapping, grid: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `_network_from_torch`, with `pos_embed` where `grid` is given."""
    params = dict(params)
    position = params.pop("pos_embed", None)
    tensors = _to_torch({"params": params}, part)
    if grid is None:
        return tensors
    width = params["blocks"]["norm1"]["scale"].shape[-1]
    position = positions.sincos(grid, width) if position is None else position
    return tensors | {"pos_embed": np.asarray(position)[None]}


# `(tensors, grid)` to parameters, and `(params, grid)` to tensors.
encoder_from_torch = partial(_network_from_torch, ENCODER)
decoder_from_torch = partial(_network_from_torch, DECODER)
decoder_to_torch = partial(_network_to_torch, DECODER)


def encoder_to_torch(
    params: Mapping, patch_size: int, grid: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `encoder_from_torch`; a part of the parameters is converted as well.

    Args:
      params: parameters, or any tree of their structure, such as gradients.
      patch_size: side of a patch in pixels.
      grid: patches in (rows, columns). With it `params` must be whole, and `pos_embed` is written.
    """
    tensors = _network_to_torch(ENCODER, params, grid)
    if "patch_embed" in params:
        weight = tensors["patch_embed.proj.weight"]
        pixels = weight.reshape(len(weight), patch_size, patch_size, -1)
        tensors["patch_embed.proj.weight"] = pixels.transpose(0, 3, 1, 2)
    return tensors


def head_from_torch(tensors: Tensors) -> dict:
    """The contrastive head of a state dict, by fields of a `TrainState`.

    Args:
      tensors: `projector.<i>.*` and `predictor.<i>.*`; optionally `target_projector.*` (stage 3),
        whose running statistics are copies of the projector's, and are ignored; optionally
        `queue [Q, D]`, `queue_id [Q]`, `queue_y [Q]`, `queue_ptr [1]`.

    Returns:
      `params`, `batch_stats`, and where the state dict has them `target` and `queue`.

    Raises:
      UserError: a tensor is unexpected.
    """
    tensors = {name: x for name, x in tensors.items() if not name.endswith("batches_tracked")}
    queue = {name: tensors.pop(name) for name in _QUEUE if name in tensors}
    head: dict[str, Any] = variables_from_torch(tensors, HEAD)
    head.get("batch_stats", {}).pop("target_projector", None)
    if target := head["params"].pop("target_projector", None):
        head["target"] = {"projector": target}
    if not queue:
        return head
    if missing := [name for name in _QUEUE if name not in queue]:
        raise UserError(f"head: tensors {missing} are missing")
    rows, ids, labels, pointer = map(np.asarray, queue.values())
    oldest = int(pointer.item())
    # Slots of the largest size whose borders the pointer respects; a stage makes batches of them.
    slot = math.gcd(len(rows), oldest)
    head["queue"] = support_queue.Queue(
        rows=rows.reshape(-1, slot, rows.shape[1]),
        ids=ids.reshape(-1, slot).astype(np.int32),
        labels=labels.reshape(-1, slot).astype(np.int32),
        slot=np.int32(oldest // slot % (len(rows) // slot)),
    )
    return head


def head_to_torch(state: Mapping, queue_size: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `head_from_torch`, for any of `params` (but those of the encoder),
    `batch_stats`, `target` and `queue`: of its ring all rows, or the newest `queue_size`."""
    params, stats = ({**state.get(field, {})} for field in ("params", "batch_stats"))
    params.pop("encoder", None)
    tensors = _to_torch({"params": params, "batch_stats": stats}, HEAD)
    if state.get("target"):
        target = {"params": {"target_projector": state["target"]["projector"]}}
        if stats:
            target["batch_stats"] = {"target_projector": stats["projector"]}
        tensors |= _to_torch(target, HEAD)
    if (queue := state.get("queue")) is None:
        return tensors
    queue_size = queue_size or queue.ids.size
    oldest = int(queue.slot) * queue.ids.shape[1] % queue_size
    by_age = support_queue.in_age_order(queue, queue_size)
    rows, ids, labels = (np.roll(np.asarray(x), oldest, axis=0) for x in by_age)
    values = rows, ids.astype(np.int64), labels.astype(np.int64), np.array([oldest])
    return tensors | dict(zip(_QUEUE, values, strict=True))


# Between files and tensors

# By the names of modules in all kinds of files: the part, and the name of the tensor.
_FILES = {
    name: (row["part"], row["tensor"])
    for row in _ROWS
    for name in (*row["pytorch"].split("|"), row["hf"])
    if name != "-"
} | {row["name"]: (row["part"], row["tensor"]) for row in _KINDS}
# The model in HuggingFace's names, where a classifier on its feature is beside it.
_MODEL = r"(?:vit|deit|ijepa|beit)\."
# Parts of names that say nothing, and what stands in their place: this model, a name of
# transformers 5 that its code has never had, one that only its code has (DINOv3), and chunks of
# blocks in DINOv2.
_RESPELLED = {
    f"^{_MODEL}": "",
    r"^decoder\.decoder_encoder\.layer\.": "decoder.decoder_layers.",
    r"^model\.layer\.": "layer.",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",
}
# A name that only such files have, and whose names they are; the first that fits is used.
_HF = rf"(?:{_MODEL})?embeddings\.patch_embeddings\..*"
_PYTORCH = r"patch_embed\.proj\.weight"
_PROBE = r"layer\.[23]\.weight"
_LAYOUTS = {
    _HF: "HuggingFace's",
    r"projector\.0\.weight": "a contrastive head of MAE-CT's authors",
    _PROBE: "a linear probe of MAE-CT's authors",
    r"decoder_embed\.weight": "MAE's (with decoder)",
    r"cls_tokens\.tokens": "MIM-Refiner's",
    r"storage_tokens": "DINOv3's",
    _PYTORCH: "MAE's, DINOv2's, timm's or MAE-CT's",
}
_ENCODERS = {_HF, _PYTORCH}
_TWO = "is of two classifiers, of the class token and of the distillation token; neither is used"
# The probe's batch normalisation once more, as the authors' code registers it.
_PROBE_NORM = {"norm.running_mean", "norm.running_var"}
_SELF = r"((?:.*?\.)??)"  # what comes before a model's own names
_IGNORED = {
    r".*\.num_batches_tracked": "counts batches, which nothing reads",
    r"(\w+\.)?pooler\.dense\..*": "is HuggingFace's pooler, which comes after the features",
    r"(\w+\.)?embeddings\.mask_token": "hides patches in pre-training, which is not used here",
    r"(cls|distillation)_classifier\..*": _TWO,
    r"local_cls_norm\..*": "is for small crops in pre-training, which is not used here",
}
# Where a file has such a tensor, its head is no classifier of the feature (DINO, MoCo; DeiT).
_NO_CLASSIFIER = {
    r"head\.([3-9]|mlp\.\d+|last_layer)\..*": (
        "is of a projection head, which only pre-training uses"
    ),
    r"head_dist\..*": _TWO,
}
# What no module here computes, by a tensor of it.
_REFUSED = {
    r"relative_position|rel_pos": "relative position biases",
    r"\brope\b|\bfreqs": "rotary positions of another kind than DINOv3's",
    r"\bmlp\.(w\d|weights_|gate_proj|fc\d_)": "a SwiGLU MLP",
    r"\b[qk]_norm\b": "norms of queries and keys",
    r"\bnorm_pre\b": "a norm before the blocks",
    r"\battn_pool\b": "pooling by attention",
}
_NO_DECODER = {"mask_token", "pos_embed"}  # what is left of a decoder that was taken out


class Sorted(NamedTuple):
    """A file's tensors by part of a model."""

    layout: str  # whose names they had, for people
    parts: Parts  # under the names of this module
    ignored: dict[str, str]  # those that are not used, by name, with the reason
    # (rows, columns) of patches, where the position embedding has these as axes.
    grid: tuple[int, int] | None = None
    periods: Stored | None = None  # of rotary positions, in DINOv3's files

    def in_file(self, part: str, tensor: str) -> str:
        """What the file would call a tensor that it lacks, by the names of its others."""
        module, block, leaf = split(tensor)
        pair = _PAIRS.get(leaf, "")
        beside = self.parts[part].get(tensor.removesuffix(leaf) + pair)
        if beside and beside.names and beside.names[0].endswith(pair):
            return beside.names[0].removesuffix(pair) + leaf
        columns = ("hf", "name", "pytorch") if self.layout == _LAYOUTS[_HF] else ("pytorch", "name")
        present = [name for x in self.parts[part].values() for name in x.names]

        def spellings(*modules):
            rows = [r for r in (*_ROWS, *_KINDS) if r["part"] == part]
            rows = [r for r in rows if not modules or r["tensor"] in modules]
            listed = (x for c in columns for r in rows for x in r.get(c, "-").split("|"))
            return [x for x in listed if x != "-"]

        def before(spelling):
            """What stands in the file before such a name, if it has one."""
            same = re.escape(spelling).replace(r"\{\}", r"\d+") + r"(\.\w+)?"
            return next((m[1] for name in present if (m := re.fullmatch(_SELF + same, name))), None)

        # HuggingFace has three projections for the one; some names have no leaf of their own.
        whole = spellings(f"{module}{leaf}") if leaf else []
        options = [*whole, *spellings(module, module.replace("qkv", "query"))]
        option = next((x for x in options if before(x) is not None), options[len(whole)])
        starts = (before(x) for x in (option, *spellings()))
        start = next((x for x in starts if x is not None), "")
        return f"{start}{option.format(block)}{'' if option in whole else leaf}"


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands in a file before the names of each model that it holds, dot and all: those of
    encoders; if there are none, of what is trained on one."""
    names = list(names)
    for layouts in (_ENCODERS, _LAYOUTS.keys() - _ENCODERS):
        marks = [re.compile(_SELF + layout) for layout in layouts]
        matches = (mark.fullmatch(name) for mark in marks for name in names)
        if found := {match[1] for match in matches if match}:
            return sorted(found)
    return []


def sort(tensors: Mapping[str, Stored], where: str) -> Sorted:
    """Sorts the tensors of a model by part, and gives them the names of this module. Raises
    `UserError` if the model is of no known kind, or a tensor has no place in a Vision
    Transformer."""
    layouts = [_LAYOUTS[x] for x in _LAYOUTS if any(re.fullmatch(x, name) for name in tensors)]
    if not layouts:
        raise UserError(
            f"{where}: none of the kinds that can be read (Vision Transformers of MAE, timm, "
            "HuggingFace, DINOv2, DINOv3, I-JEPA, Pixio or MIM-Refiner; MAE-CT's encoder, head or "
            f"probe); its first tensor is {min(tensors)!r}"
        )
    parts: Parts = {}
    unused = dict(_IGNORED)
    for mark, why in _NO_CLASSIFIER.items():
        if any(re.fullmatch(mark, name) for name in tensors):
            unused |= {r"head\..*": why, mark: why}
    pairs = itertools.product(tensors, unused.items())
    ignored = {name: why for name, (what, why) in pairs if re.fullmatch(what, name)}
    probe = _PROBE_NORM if layouts[0] == _LAYOUTS[_PROBE] else set()
    for name, x in sorted(tensors.items(), key=lambda item: item[0] in probe):
        if name in ignored:
            continue
        plain = name
        for text, ours in _RESPELLED.items():
            plain = re.sub(text, ours, plain)
        module, block, leaf = split(plain)
        part, tensor = _FILES.get(module, ("", ""))
        if name in probe:
            part, tensor = CLASSIFIER, "classifier"
        if not part:
            what = next((what for mark, what in _REFUSED.items() if re.search(mark, name)), "")
            wrong = f"has no tensor like {x.names[0]!r}{what and f', of {what}'}"
            raise UserError(
                f"{where}: the Vision Transformer here {wrong}; such a model cannot be read"
            )
        same = parts.setdefault(part, {}).setdefault(f"{tensor.format(block)}{leaf}", x)
        if same is x:
            continue
        if name not in probe:
            raise UserError(
                f"{where}: {x.names[0]!r} and {same.names[0]!r} stand for the same tensor"
            )
        if not np.array_equal(x, same):
            raise UserError(f"{where}: {x.names[0]!r} and {same.names[0]!r} must be equal")
        ignored[name] = f"is the same as {same.names[0]}"
    if parts.get(DECODER) and parts[DECODER].keys() <= _NO_DECODER:
        for x in parts.pop(DECODER).values():
            ignored[x.names[0]] = "is of pre-training, whose decoder is not in the file"
    grid = None
    if periods := parts.get(ENCODER, {}).pop("rope_periods", None):
        ignored[periods.names[0]] = "is computed from the base of the rotary positions"
    position = parts.get(ENCODER, {}).get("pos_embed")
    if position is not None and len(position.shape) == 4:
        _, rows, columns, width = position.shape
        grid = rows, columns
        flat = partial(np.reshape, position, (1, -1, width))
        shape = (1, rows * columns, width)
        parts[ENCODER]["pos_embed"] = dataclasses.replace(position, shape=shape, read=flat)
    sorted_file = Sorted(layouts[0], parts, ignored, grid, periods)
    for part, own in parts.items():
        _join_attention(own, part, sorted_file, where)
        if {"cls_token", "dist_token"} <= own.keys():
            two = [own.pop("cls_token"), own.pop("dist_token")]
            own["cls_token"] = _joined(two, where, axis=1)
        _fold(own, part, sorted_file, where)
    return sorted_file


def _join_attention(tensors: dict[str, Stored], part: str, file: Sorted, where: str) -> None:
    """Joins the projections of queries, keys and values, which some files keep apart. A bias of the
    keys may be missing in all blocks, and so may all biases: then it is zero."""
    found = [name for name in tensors if re.search(r"\.attn\.(query|key|value)\.", name)]
    key_biases = [name for name in found if name.endswith(".key.bias")]
    for joined in dict.fromkeys(re.sub(r"\.(query|key|value)\.", ".qkv.", x) for x in found):
        names = [joined.replace("qkv", which) for which in _ATTENTION]
        if joined.endswith(".bias") and not key_biases:
            other = next(tensors[name] for name in names if name in tensors)
            zeros = partial(np.zeros, other.shape, np.float32)
            tensors[names[1]] = dataclasses.replace(other, names=(), read=zeros)
        _require([name for name in names if name not in tensors], part, file, where)
        tensors[joined] = _joined([tensors.pop(name) for name in names], where)
    if not any(name.endswith(".attn.qkv.bias") for name in tensors):
        for name in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
            zeros = partial(np.zeros, shape := tensors[name].shape[:1], np.float32)
            tensors[name.replace("weight", "bias")] = dataclasses.replace(
                tensors[name], names=(), shape=shape, read=zeros
            )


def _require(missing: Sequence[str], part: str, file: Sorted, where: str) -> None:
    if missing:
        absent = file.in_file(part, missing[0])
        raise UserError(f"{where}: the {part}'s tensor {absent!r} is missing")


def _joined(parts: Sequence[Stored], where: str, axis: int = 0) -> Stored:
    """Tensors of the same shape as one, along an axis."""
    first = parts[0]
    if len({x.shape for x in parts}) > 1:
        raise UserError(f"{where}: {first.names[0]!r} and {parts[-1].names[0]!r} differ in shape")
    length = first.shape[axis : axis + 1] or (0,)
    return dataclasses.replace(
        first,
        names=tuple(name for x in parts for name in x.names),
        shape=(*first.shape[:axis], len(parts) * length[0], *first.shape[axis + 1 :]),
        read=partial(np.concatenate, parts, axis),
        floating=all(x.floating for x in parts),
    )


# Factors of other tensors, in groups that a block has together: LayerScale (Touvron et al., 2021),
# of the last layer of a branch, and DINOv3's mask of the keys' bias.
_FACTORS = (
    {
        ".ls1": (".attn.proj.weight", ".attn.proj.bias"),
        ".ls2": (".mlp.fc2.weight", ".mlp.fc2.bias"),
    },
    {".attn.mask": (".attn.qkv.bias",)},
)


def _fold(tensors: dict[str, Stored], part: str, file: Sorted, where: str) -> None:
    """Multiplies tensors by their factors, which all blocks have or none."""
    for group in _FACTORS:
        pairs = itertools.product(range(depth(tensors)), group.items())
        factors = {f"blocks.{i}{name}": [f"blocks.{i}{x}" for x in of] for i, (name, of) in pairs}
        if tensors.keys().isdisjoint(factors):
            continue
        _require([name for name in factors if name not in tensors], part, file, where)
        for name, layers in factors.items():
            scale = tensors.pop(name)
            for layer in layers:
                if (x := tensors.get(layer)) is None:
                    continue  # is reported as missing
                if scale.shape != x.shape[:1]:
                    wrong = f"{scale.names[0]!r} has shape {scale.shape}, must be {x.shape[:1]}"
                    raise UserError(f"{where}: {wrong}")
                tensors[layer] = dataclasses.replace(
                    x,
                    names=(*x.names, *scale.names),
                    read=partial(_scaled, x, scale),
                    floating=x.floating and scale.floating,
                )


def _scaled(x: Stored, scale: Stored) -> np.ndarray:
    """Each row of `x [D, ...]` times its number in `scale [D]`, fp32."""
    return np.asarray(x) * np.asarray(scale).reshape(-1, *[1] * (len(x.shape) - 1))


def to_files(
    tensors: Mapping[str, np.ndarray], part: str, column: str, kind: str = ""
) -> dict[str, np.ndarray]:
    """The tensors of a part under their names in files: a column of `names.txt`, and what a kind of
    `kinds.txt` calls otherwise."""
    names = {row["tensor"]: row[column].split("|")[0] for row in _ROWS if row["part"] == part}
    own = [row for row in _KINDS if (row["part"], row["kind"]) == (part, kind)]
    names |= {row["tensor"]: row["name"] for row in own}
    renamed = {}
    for name, x in tensors.items():
        module, block, leaf = split(name)
        thirds = _ATTENTION if names[module] == "-" else ("qkv",)
        for which, third in zip(thirds, np.split(x, len(thirds)), strict=True):
            renamed[names[module.replace("qkv", which)].format(block) + leaf] = third
    return renamed
