"""PyTorch's tensors and this package's variables: the same numbers under other names.

*Variables* are nested dicts: kernels `[in, out]`, the blocks of a stack along a leading layer axis.
*Tensors* are flat dicts with the names and shapes of MAE's and MAE-CT's state dicts:
`blocks.3.mlp.fc1.weight`, Linear weights `[out, in]`, the patch embedding a convolution
`[D, C, P, P]`. A `Table` relates the two. *Files* of MAE, timm, HuggingFace and the authors may
have other names for the same tensors: `_LAYOUTS`.

No number is changed on the way, so there and back is bit-equal, except for fixed position
embeddings, which the networks compute and the variables do not hold.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maect_jax.convert.tensors import Stored
from maect_jax.errors import UserError
from maect_jax.models import positions
from maect_jax.stages import support_queue

Tensors = Mapping[str, np.ndarray]
Table = dict[str, str]  # path of a variable: name of a tensor, {} for the number of the block


def _parameters(modules: Mapping[str, str], bias: bool = True) -> Table:
    """The table of the parameters of some modules: linear layers, and norms."""
    table = {}
    for ours, theirs in modules.items():
        norm = re.search("norm|bn", ours)
        table[f"{ours}/{'scale' if norm else 'kernel'}"] = f"{theirs}.weight"
        if norm or bias:
            table[f"{ours}/bias"] = f"{theirs}.bias"
    return table


_BLOCKS = {
    "blocks/norm1": "blocks.{}.norm1",
    "blocks/attn/qkv": "blocks.{}.attn.qkv",
    "blocks/attn/proj": "blocks.{}.attn.proj",
    "blocks/norm2": "blocks.{}.norm2",
    "blocks/fc1": "blocks.{}.mlp.fc1",
    "blocks/fc2": "blocks.{}.mlp.fc2",
    "norm": "norm",
}
_ENCODER = {"cls_token": "cls_token"} | _parameters({"patch_embed": "patch_embed.proj"} | _BLOCKS)
_DECODER = {"mask_token": "mask_token"} | _parameters({"embed": "embed", "pred": "pred"} | _BLOCKS)
_CLASSIFIER = {
    "params/classifier/kernel": "weight",
    "params/classifier/bias": "bias",
    "batch_stats/classifier/mean": "running_mean",
    "batch_stats/classifier/var": "running_var",
}
# The authors number the layers of a Sequential; between them are the activations.
_PROJECTOR = {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6, "bn3": 7}
_PREDICTOR = {"fc1": 0, "bn1": 1, "fc2": 3}


def _sequential(theirs: str, layers: Mapping[str, int], params: str, batch_stats: str) -> Table:
    """The table of a projector or predictor, whose variables have these paths."""
    table = {}
    for layer, number in layers.items():
        name = f"{theirs}.{number}"
        table |= _parameters({f"{params}/{layer}": name}, bias=False)
        if layer.startswith("bn"):
            table |= {f"{batch_stats}/{layer}/{s}": f"{name}.running_{s}" for s in ("mean", "var")}
    return table


_HEAD = _sequential(
    "projector", _PROJECTOR, "params/projector", "batch_stats/projector"
) | _sequential("predictor", _PREDICTOR, "params/predictor", "batch_stats/predictor")
# In the authors' code the target's running statistics are a copy of the projector's.
_TARGET = _sequential("target_projector", _PROJECTOR, "target/projector", "target_stats/projector")
_QUEUE = ("queue", "queue_id", "queue_y", "queue_ptr")


# Between tensors and variables


def depth(names: Iterable[str]) -> int:
    """The number of blocks in a state dict; 1 for none."""
    return max(1, len({m[1] for name in names if (m := re.match(r"blocks\.(\d+)\.", name))}))


def _variable(path: str, tensor) -> np.ndarray:
    x = np.asarray(tensor)
    if not path.endswith("kernel"):
        return x
    # A convolution's pixels come in the order of `vit.patchify`: row, column, channel.
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, len(x))


def _stacked(layers: Iterator[np.ndarray], count: int) -> np.ndarray:
    """`np.stack` that holds no more than one of the layers beside its result."""
    first = next(layers)
    stack = np.empty((count, *first.shape), first.dtype)
    stack[0] = first
    for i, layer in enumerate(layers, 1):
        stack[i] = layer
    return stack


def _from_torch(tensors: Tensors, table: Table, what: str) -> dict:
    """The variables that `table` names. Raises `UserError` where tensors are missing or left."""
    layers = depth(tensors)
    names = {
        path: [name.format(i) for i in range(layers)] if "{}" in name else [name]
        for path, name in table.items()
    }
    expected = {name for stack in names.values() for name in stack}
    if expected != set(tensors):
        missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise UserError(f"{what}: tensors {missing} are missing, {unexpected} are unexpected")
    flat = {}
    for path, stack in names.items():
        arrays = (_variable(path, tensors[name]) for name in stack)
        flat[path] = _stacked(arrays, layers) if "{}" in table[path] else next(arrays)
    return unflatten_dict(flat, sep="/")


def _to_torch(variables: Mapping, table: Table, first_block: int = 0) -> dict[str, np.ndarray]:
    """The inverse of `_from_torch`, for any part of the variables."""
    tensors = {}
    for path, x in flatten_dict(variables, sep="/").items():
        name, x = table[path], np.asarray(x)
        layers = enumerate(x, first_block) if "{}" in name else [(None, x)]
        for i, layer in layers:
            tensors[name.format(i)] = layer.T if path.endswith("kernel") else layer
    return tensors


def _network_from_torch(tensors: Tensors, table: Table, grid: tuple[int, int], what: str) -> dict:
    """`_from_torch`, and `pos_embed` where it differs from the fixed position embedding.

    A row of `pos_embed` for the class token is added to that token. A decoder has no class token of
    its own, so there the row must be zero.
    """
    tensors = dict(tensors)
    position = tensors.pop("pos_embed", None)
    params = _from_torch(tensors, table, what)
    if position is None:
        return params
    position, rows = np.asarray(position)[0], math.prod(grid)
    class_row, position = position[:-rows], position[-rows:]
    if len(position) != rows or len(class_row) > 1:
        raise UserError(f"{what}: pos_embed has {len(class_row) + len(position)} rows, not {rows}")
    if class_row.any() and "cls_token" not in params:
        raise UserError(f"{what}: pos_embed has a row for the class token that is not zero")
    if len(class_row) and "cls_token" in params:
        params["cls_token"] = params["cls_token"] + class_row
    fixed = np.array_equal(position, positions.sincos(grid, position.shape[1]))
    return params if fixed else params | {"pos_embed": position}


def _network_to_torch(params: Mapping, table: Table, grid: tuple[int, int] | None, first_block=0):
    """The inverse of `_network_from_torch`, with `pos_embed` where `grid` is given."""
    params = dict(params)
    position = params.pop("pos_embed", None)
    tensors = _to_torch(params, table, first_block)
    if grid is None:
        return tensors
    token = params["cls_token"] if "cls_token" in params else params["mask_token"]
    position = positions.sincos(grid, token.shape[-1]) if position is None else position
    return tensors | {"pos_embed": np.asarray(position)[None]}


def encoder_from_torch(tensors: Tensors, grid: tuple[int, int]) -> dict:
    """Whole encoder parameters, with one stack of blocks, from a state dict.

    Args:
      tensors: `cls_token`, `patch_embed.proj.*`, `blocks.<i>.*`, `norm.*`, and optionally
        `pos_embed [1, N, D]`, which is kept only where it differs from the fixed sine-cosine
        embedding.
      grid: patches in (rows, columns).

    Raises:
      UserError: a tensor is missing or unexpected.
    """
    return _network_from_torch(tensors, _ENCODER, grid, "encoder")


def encoder_to_torch(
    params: Mapping, patch_size: int, grid: tuple[int, int] | None = None, first_block: int = 0
) -> dict[str, np.ndarray]:
    """The inverse of `encoder_from_torch`; a part of the parameters is converted as well.

    Args:
      params: parameters, or any tree of their structure, such as gradients.
      patch_size: side of a patch in pixels.
      grid: patches in (rows, columns). With it `params` must be whole, and `pos_embed` is written.
      first_block: index in the whole encoder of the first block of `params["blocks"]`.
    """
    tensors = _network_to_torch(params, _ENCODER, grid, first_block=first_block)
    if "patch_embed" in params:
        weight = tensors["patch_embed.proj.weight"]
        pixels = weight.reshape(len(weight), patch_size, patch_size, -1)
        tensors["patch_embed.proj.weight"] = pixels.transpose(0, 3, 1, 2)
    return tensors


def decoder_from_torch(tensors: Tensors, grid: tuple[int, int]) -> dict:
    """Decoder parameters from a state dict: `mask_token`, `embed.*`, `blocks.<i>.*`, `norm.*`,
    `pred.*` and optionally `pos_embed`, treated as in `encoder_from_torch`."""
    return _network_from_torch(tensors, _DECODER, grid, "decoder")


def decoder_to_torch(params: Mapping, grid: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `decoder_from_torch`, with `pos_embed` where `grid` is given."""
    return _network_to_torch(params, _DECODER, grid)


def head_from_torch(tensors: Tensors) -> dict:
    """The contrastive head of a state dict, by fields of a `TrainState`.

    Args:
      tensors: `projector.<i>.*` and `predictor.<i>.*`; optionally `target_projector.*` (stage 3);
        optionally `queue [Q, D]`, `queue_id [Q]`, `queue_y [Q]`, `queue_ptr [1]`.

    Returns:
      `params` and `batch_stats` of `projector` and `predictor`; `target` of `projector` and
      `queue` (a `support_queue.Queue`) where the state dict has them.

    Raises:
      UserError: a tensor is missing or unexpected.
    """
    tensors = {name: x for name, x in tensors.items() if not name.endswith("batches_tracked")}
    queue = {name: tensors.pop(name) for name in _QUEUE if name in tensors}
    has_target = any(name in tensors for name in _TARGET.values())
    head = _from_torch(tensors, _HEAD | _TARGET if has_target else _HEAD, "head")
    head.pop("target_stats", None)
    if not queue:
        return head
    if missing := [name for name in _QUEUE if name not in queue]:
        raise UserError(f"head: tensors {missing} are missing")
    rows, ids, labels, pointer = map(np.asarray, queue.values())
    oldest = int(pointer.item())
    # Slots of the largest size whose borders the pointer respects; a stage makes batches of them.
    slot = math.gcd(len(rows), oldest)
    return head | {
        "queue": support_queue.Queue(
            rows=rows.reshape(-1, slot, rows.shape[1]),
            ids=ids.reshape(-1, slot).astype(np.int32),
            labels=labels.reshape(-1, slot).astype(np.int32),
            slot=np.int32(oldest // slot % (len(rows) // slot)),
        )
    }


def head_to_torch(state: Mapping, queue_size: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `head_from_torch`.

    Args:
      state: any of `params`, `batch_stats`, `target` and `queue`, as in a `TrainState`. Parameters
        of the encoder are ignored.
      queue_size: rows of the queue, by default all of its ring; the surplus is left out.
    """
    head = {
        field: {name: x for name, x in state[field].items() if name != "encoder"}
        for field in ("params", "batch_stats", "target")
        if state.get(field)
    }
    if {"target", "batch_stats"} <= head.keys():
        head["target_stats"] = {"projector": head["batch_stats"]["projector"]}
    tensors = _to_torch(head, _HEAD | _TARGET)
    queue = state.get("queue")
    if queue is None:
        return tensors
    queue_size = queue_size or queue.ids.size
    oldest = int(queue.slot) * queue.ids.shape[1] % queue_size
    by_age = support_queue.in_age_order(queue, queue_size)
    rows, ids, labels = (np.roll(np.asarray(x), oldest, axis=0) for x in by_age)
    values = rows, ids.astype(np.int64), labels.astype(np.int64), np.array([oldest])
    return tensors | dict(zip(_QUEUE, values, strict=True))


def classifier_from_torch(tensors: Tensors) -> dict:
    """A linear classifier by fields of a `TrainState`, from `weight [C, D]` and `bias [C]`, and for
    a linear probe `running_mean [D]` and `running_var [D]` of its batch normalisation."""
    table = {path: name for path, name in _CLASSIFIER.items() if name in tensors}
    return _from_torch(tensors, table, "classifier")


# Between files and tensors

ENCODER, DECODER, HEAD, CLASSIFIER = "encoder", "decoder", "head", "classifier"
Parts = dict[str, dict[str, Stored]]  # of a model: its tensors by name


class Sorted(NamedTuple):
    """The tensors of a file.

    Attributes:
      layout: whose names the file has, for people.
      parts: the tensors by part of a model, under the names of this module.
      ignored: the tensors that are not used, and why.
    """

    layout: str
    parts: Parts
    ignored: dict[str, str]


def _modules(*names: str) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def mae_decoder_name(name: str) -> str:
    """MAE's name for a tensor of the decoder."""
    return name if name == "mask_token" else f"decoder_{name}"


_ATTENTION = ("query", "key", "value")
# By this module's names: HuggingFace's.
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    **{f"attn.{which}": f"attention.attention.{which}" for which in _ATTENTION},
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HF_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    **{f"blocks.{{}}.{ours}": f"encoder.layer.{{}}.{x}" for ours, x in _HF_BLOCK.items()},
}
_HF_DECODER = {
    "mask_token": "decoder.mask_token",
    **{name: f"decoder.decoder_{name}" for name in ("pos_embed", "embed", "norm", "pred")},
    **{f"blocks.{{}}.{ours}": f"decoder.decoder_layers.{{}}.{x}" for ours, x in _HF_BLOCK.items()},
}
# What HuggingFace's code says today (in this order) where its files say something else.
_HF_TODAY = {
    r"^layers\.": "encoder.layer.",
    **{rf"attention\.{which[0]}_proj": f"attention.attention.{which}" for which in _ATTENTION},
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}
# By the names of modules and tensors in files: the part, and the name in this module.
_HF_MODULES = {theirs: (ENCODER, ours) for ours, theirs in _HF_ENCODER.items()}
_HF_MODULES |= {theirs: (DECODER, ours) for ours, theirs in _HF_DECODER.items()}
_HF_MODULES["classifier"] = (CLASSIFIER, "")
_MAE_MODULES = {name: (ENCODER, name) for name in _modules("pos_embed", *_ENCODER.values())}
_MAE_MODULES |= {
    mae_decoder_name(name): (DECODER, name) for name in _modules("pos_embed", *_DECODER.values())
}
_MAE_MODULES |= {"fc_norm": (ENCODER, "norm")}
_MAE_MODULES |= dict.fromkeys(("head", "head.0", "head.1"), (CLASSIFIER, ""))
_HEAD_MODULES = {n: (HEAD, n) for n in _modules(*_HEAD.values(), *_TARGET.values(), *_QUEUE)}
# The pooling was once the first module of the probe, so that all numbers were larger by one.
_PROBE_MODULES = dict.fromkeys(("layer.1", "layer.2", "layer.3"), (CLASSIFIER, ""))
# (a name that only such files have, whose names they are, modules); the first that fits is used
_LAYOUTS = (
    (r"(vit\.)?embeddings\.patch_embeddings\..*", "HuggingFace's", _HF_MODULES),
    (r"projector\.0\.weight", "a contrastive head of MAE-CT's authors", _HEAD_MODULES),
    (r"layer\.[23]\.weight", "a linear probe of MAE-CT's authors", _PROBE_MODULES),
    (r"decoder_embed\.weight", "MAE's (with decoder)", _MAE_MODULES),
    (r"patch_embed\.proj\.weight", "MAE's, timm's or MAE-CT's", _MAE_MODULES),
)
_IGNORED = {
    r".*\.num_batches_tracked": "counts batches, which nothing reads",
    r"(vit\.)?pooler\..*": "is HuggingFace's pooler, which comes after the features",
    r"(vit\.)?embeddings\.mask_token": "hides patches in SimMIM, which is not used here",
}
_LEAF = r"(.*?)(\.(?:weight|bias|running_mean|running_var))?"


def _template(name: str) -> tuple[str, str]:
    """A name with {} for the number of its block, and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return name, ""
    return f"{name[: number.start()]}{{}}{name[number.end() :]}", number[0]


def sort(tensors: Mapping[str, Stored], where: str) -> Sorted:
    """Sorts the tensors of a file by part, and gives them the names of this module.

    Raises:
      UserError: the file is of no known kind, or a tensor has no place in a Vision Transformer.
    """
    layout = next((x for x in _LAYOUTS if any(re.fullmatch(x[0], n) for n in tensors)), None)
    if layout is None:
        raise UserError(
            f"{where}: none of the kinds that can be read (MAE, MAE-CT's encoder, head or probe, "
            f"HuggingFace's ViTMAE or ViT, timm's ViT); its first tensor is {min(tensors)!r}"
        )
    _, title, modules = layout
    parts: Parts = {}
    ignored = {}
    for name, x in tensors.items():
        reason = next((why for what, why in _IGNORED.items() if re.fullmatch(what, name)), None)
        if reason:
            ignored[name] = reason
            continue
        module, leaf = re.fullmatch(_LEAF, name.removeprefix("vit."), re.DOTALL).groups("")
        if modules is _HF_MODULES:
            for today, saved in _HF_TODAY.items():
                module = re.sub(today, saved, module)
        template, block = _template(module)
        part, ours = modules.get(module) or modules.get(template) or ("", "")
        if not part:
            raise UserError(
                f"{where}: a plain Vision Transformer has no tensor like {name!r}; such a model "
                "cannot be read"
            )
        ours = f"{ours.format(block)}{leaf}".removeprefix(".")
        same = parts.setdefault(part, {}).setdefault(ours, x)
        if same is not x:
            raise UserError(f"{where}: {name!r} and {same.names[0]!r} are the same tensor")
    for one in parts.values():
        _join_attention(one, where)
    return Sorted(title, parts, ignored)


def _join_attention(tensors: dict[str, Stored], where: str) -> None:
    """Joins the projections of queries, keys and values, which HuggingFace's files keep apart.

    Where one of the three is missing, the comparison with the network names it.
    """
    for query in [name for name in tensors if ".attn.query." in name]:
        names = [query.replace("query", which) for which in _ATTENTION]
        if not set(names) <= set(tensors):
            continue
        three = [tensors.pop(name) for name in names]
        if len({x.shape for x in three}) > 1:
            raise UserError(f"{where}: {three[0].names[0]!r} and its key and value differ in shape")
        rows, *rest = three[0].shape or (0,)
        tensors[query.replace("query", "qkv")] = Stored(
            tuple(name for x in three for name in x.names),
            (3 * rows, *rest),
            lambda three=three: np.concatenate([np.asarray(x) for x in three]),
            three[0].where,
            all(x.floating for x in three),
        )


def to_hf(encoder: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """HuggingFace's names for an encoder's tensors."""
    files = {}
    for name, x in encoder.items():
        module, leaf = re.fullmatch(_LEAF, name).groups("")
        template, block = _template(module)
        thirds = _ATTENTION if "qkv" in name else ("qkv",)
        for which, part in zip(thirds, np.split(x, len(thirds)), strict=True):
            theirs = _HF_ENCODER[template.replace("qkv", which)].format(block)
            files[f"{prefix}{theirs}{leaf}"] = part
    return files
