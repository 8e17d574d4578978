"""PyTorch's tensors and this package's variables: the same numbers under two sets of names.

PyTorch's side is a flat dict of NumPy arrays with the names and layouts of MAE's and MAE-CT's
state dicts: `blocks.3.mlp.fc1.weight`, Linear weights `[out, in]`, the patch embedding a
convolution `[D, C, P, P]`. This side is a nested dict: kernels `[in, out]`, the blocks of a stack
along a leading layer axis. No number is changed on the way, so there and back is bit-equal, but
for what this side does not keep: the decoder's position embedding, which is computed, and the
target's running statistics, which are the projector's.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maect_jax import support_queue
from maect_jax.errors import UserError
from maect_jax.models import vit

Tensors = Mapping[str, np.ndarray]

_LINEAR = {"kernel": "weight", "bias": "bias"}
_NO_BIAS = {"kernel": "weight"}
_NORM = {"scale": "weight", "bias": "bias"}
_RUNNING = {"mean": "running_mean", "var": "running_var"}


def _names(ours: str, theirs: str, leaves: dict[str, str]) -> dict[str, str]:
    return {f"{ours}/{leaf}": f"{theirs}.{their_leaf}" for leaf, their_leaf in leaves.items()}


_BLOCKS = (
    _names("blocks/norm1", "blocks.{}.norm1", _NORM)
    | _names("blocks/attn/qkv", "blocks.{}.attn.qkv", _LINEAR)
    | _names("blocks/attn/proj", "blocks.{}.attn.proj", _LINEAR)
    | _names("blocks/norm2", "blocks.{}.norm2", _NORM)
    | _names("blocks/fc1", "blocks.{}.mlp.fc1", _LINEAR)
    | _names("blocks/fc2", "blocks.{}.mlp.fc2", _LINEAR)
)
_ENCODER = (
    {"cls_token": "cls_token"}
    | _names("patch_embed", "patch_embed.proj", _LINEAR)
    | _BLOCKS
    | _names("norm", "norm", _NORM)
)
_DECODER = (
    {"mask_token": "mask_token"}
    | _names("embed", "embed", _LINEAR)
    | _BLOCKS
    | _names("norm", "norm", _NORM)
    | _names("pred", "pred", _LINEAR)
)


# Places in the authors' Sequential; between them are the activations.
_PLACES = {
    "projector": {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4, "fc3": 6, "bn3": 7},
    "predictor": {"fc1": 0, "bn1": 1, "fc2": 3},
}


def _params(ours: str, theirs: str) -> dict[str, str]:
    names = {}
    for layer, place in _PLACES[ours.split("/")[1]].items():
        leaves = _NO_BIAS if layer.startswith("fc") else _NORM
        names |= _names(f"{ours}/{layer}", f"{theirs}.{place}", leaves)
    return names


def _stats(ours: str, theirs: str) -> dict[str, str]:
    names = {}
    for layer, place in _PLACES[ours.split("/")[1]].items():
        if layer.startswith("bn"):
            names |= _names(f"{ours}/{layer}", f"{theirs}.{place}", _RUNNING)
    return names


_HEAD = (
    _params("params/projector", "projector")
    | _params("params/predictor", "predictor")
    | _stats("batch_stats/projector", "projector")
    | _stats("batch_stats/predictor", "predictor")
)
_TARGET = _params("target/projector", "target_projector")
# In the authors' code the target's running statistics are a copy of the online projector's.
_TARGET_STATS = _stats("batch_stats/projector", "target_projector")
_QUEUE = ("queue", "queue_id", "queue_y", "queue_ptr")


def _to_ours(path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith("kernel"):
        # A convolution's pixels come in the order of `vit.patchify`: row, column, channel.
        return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, len(x))
    return x


def _from_torch(tensors: Tensors, table: dict[str, str], what: str) -> dict:
    """A tree of all that `table` names; what is missing or left over is an error."""
    left = dict(tensors)

    def take(path, name):
        if name not in left:
            raise UserError(f"{what}: the tensor {name!r} is missing")
        return _to_ours(path, np.asarray(left.pop(name)))

    numbers = [int(found[1]) for name in left if (found := re.match(r"blocks\.(\d+)\.", name))]
    depth = 1 + max(numbers, default=0)
    flat = {}
    for path, name in table.items():
        if "{}" in name:
            flat[path] = np.stack([take(path, name.format(i)) for i in range(depth)])
        else:
            flat[path] = take(path, name)
    if left:
        raise UserError(f"{what}: no place for the tensor {min(left)!r}")
    return unflatten_dict(flat, sep="/")


def _to_torch(tree: Mapping, table: dict[str, str], first_block: int = 0) -> dict[str, np.ndarray]:
    tensors = {}
    for path, x in flatten_dict(tree, sep="/").items():
        name, x = table[path], np.asarray(x)
        layers = enumerate(x, first_block) if "{}" in name else [(None, x)]
        for i, layer in layers:
            tensors[name.format(i)] = layer.T if path.endswith("kernel") else layer
    return tensors


def _position(tensors: dict, grid: tuple[int, int], what: str) -> np.ndarray | None:
    """Takes the position embedding `[N, D]` out of `tensors`, if it is there."""
    position = np.asarray(tensors.pop("pos_embed"))[0] if "pos_embed" in tensors else None
    if position is None:
        return None
    if len(position) != grid[0] * grid[1]:
        raise UserError(
            f"{what}: pos_embed has {len(position)} rows, the grid of {grid[0]} x {grid[1]} "
            f"patches needs {grid[0] * grid[1]}"
        )
    return position


def encoder_from_torch(tensors: Tensors, grid: tuple[int, int]) -> dict:
    """Whole encoder parameters (one stack of blocks) of a state dict.

    Args:
      tensors: `cls_token`, `patch_embed.proj.*`, `blocks.<i>.*`, `norm.*`, and `pos_embed`
        `[1, N, D]`, which is kept only where it differs from the fixed sine-cosine embedding.
      grid: patches in (rows, columns).

    Raises:
      UserError: a tensor is missing or has no place.
    """
    tensors = dict(tensors)
    position = _position(tensors, grid, "encoder")
    params = _from_torch(tensors, _ENCODER, "encoder")
    fixed = vit.sincos_position(grid, params["cls_token"].shape[-1])
    if position is None or np.array_equal(position, fixed):
        return params
    return {**params, "pos_embed": position}


def encoder_to_torch(
    params: Mapping, patch_size: int, grid: tuple[int, int] | None = None, first_block: int = 0
) -> dict[str, np.ndarray]:
    """The inverse of `encoder_from_torch`; a part of the parameters is converted as well.

    Args:
      params: parameters, or any tree of their structure, such as gradients.
      patch_size: side of a patch in pixels.
      grid: patches in (rows, columns), for which `pos_embed` is written, if `params` are whole;
        without it, it is not.
      first_block: index in the whole encoder of the first block of `params["blocks"]`.
    """
    params = dict(params)
    position = params.pop("pos_embed", None)
    tensors = _to_torch(params, _ENCODER, first_block)
    if "patch_embed" in params:
        weight = tensors["patch_embed.proj.weight"]
        pixels = weight.reshape(len(weight), patch_size, patch_size, -1)
        tensors["patch_embed.proj.weight"] = pixels.transpose(0, 3, 1, 2)
    if grid is not None:
        width = params["cls_token"].shape[-1]
        fixed = vit.sincos_position(grid, width) if position is None else np.asarray(position)
        tensors["pos_embed"] = fixed[None]
    return tensors


def decoder_from_torch(tensors: Tensors, grid: tuple[int, int]) -> dict:
    """Decoder parameters of a state dict with the names `mask_token`, `embed.*`, `blocks.<i>.*`,
    `norm.*`, `pred.*` and, optionally, the fixed `pos_embed [1, N, D]` of a patch `grid`.

    Raises:
      UserError: a tensor is missing or has no place, or the position embedding is learned.
    """
    tensors = dict(tensors)
    position = _position(tensors, grid, "decoder")
    params = _from_torch(tensors, _DECODER, "decoder")
    fixed = vit.sincos_position(grid, params["mask_token"].shape[-1])
    # Sines computed in fp32 are off by some 1e-6.
    if position is not None and not np.allclose(position, fixed, rtol=0, atol=1e-5):
        raise UserError("decoder: pos_embed is not the fixed sine-cosine embedding")
    return params


def decoder_to_torch(params: Mapping, grid: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `decoder_from_torch`, with `pos_embed` where `grid` is given."""
    tensors = _to_torch(params, _DECODER)
    if grid is not None:
        tensors["pos_embed"] = vit.sincos_position(grid, params["mask_token"].shape[-1])[None]
    return tensors


def head_from_torch(tensors: Tensors) -> dict:
    """The contrastive head of a state dict.

    Args:
      tensors: `projector.<i>.*`, `predictor.<i>.*`, and, where there are, `target_projector.*`
        (stage 3), `queue [Q, D]`, `queue_id [Q]`, `queue_y [Q]`, `queue_ptr [1]`. The target's
        running statistics are the projector's, and are left out.

    Returns:
      `params` and `batch_stats` of `projector` and `predictor`; `target` of `projector` and
      `queue` (a `support_queue.Queue`) where the state dict has them.

    Raises:
      UserError: a tensor is missing or has no place.
    """
    copies = set(_TARGET_STATS.values()) | set(_QUEUE)
    rest = {
        name: x
        for name, x in tensors.items()
        if name not in copies and not name.endswith("num_batches_tracked")
    }
    has_target = any(name.startswith("target_projector.") for name in rest)
    head = _from_torch(rest, _HEAD | (_TARGET if has_target else {}), "head")
    if "queue" in tensors:
        head["queue"] = _queue_from_torch(tensors)
    return head


def _queue_from_torch(tensors: Tensors) -> support_queue.Queue:
    for name in _QUEUE:
        if name not in tensors:
            raise UserError(f"head: the tensor {name!r} is missing")
    rows, ids, labels, pointer = (np.asarray(tensors[name]) for name in _QUEUE)
    oldest = int(pointer.item())
    # Slots of the largest size whose borders the pointer respects; a stage makes batches of them.
    slot = math.gcd(len(rows), oldest)
    return support_queue.Queue(
        rows=rows.reshape(-1, slot, rows.shape[1]),
        ids=ids.reshape(-1, slot).astype(np.int32),
        labels=labels.reshape(-1, slot).astype(np.int32),
        slot=np.int32(oldest // slot % (len(rows) // slot)),
    )


def head_to_torch(parts: Mapping, queue_size: int | None = None) -> dict[str, np.ndarray]:
    """The inverse of `head_from_torch`.

    Args:
      parts: any of `params`, `batch_stats`, `target` and `queue`, as in a `TrainState`. Parts
        of the encoder are left out.
      queue_size: rows of the queue, by default all of its ring; the surplus is left out.
    """
    trees = {
        field: {m: tree for m, tree in parts[field].items() if m != "encoder"}
        for field in ("params", "batch_stats", "target")
        if parts.get(field)
    }
    tensors = _to_torch(trees, _HEAD | _TARGET)
    if {"target", "batch_stats"} <= trees.keys():
        copies = {"batch_stats": {"projector": trees["batch_stats"]["projector"]}}
        tensors |= _to_torch(copies, _TARGET_STATS)
    queue = parts.get("queue")
    if queue is not None:
        queue_size = queue_size or queue.ids.size
        oldest = int(queue.slot) * queue.ids.shape[1] % queue_size
        flat = support_queue.in_age_order(queue, queue_size)
        rows, ids, labels = (np.roll(np.asarray(x), oldest, axis=0) for x in flat)
        tensors |= {
            "queue": rows,
            "queue_id": ids.astype(np.int64),
            "queue_y": labels.astype(np.int64),
            "queue_ptr": np.array([oldest]),
        }
    return tensors
