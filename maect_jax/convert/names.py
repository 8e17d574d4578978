"""PyTorch's tensors and this package's variables: the same numbers under two sets of names.

PyTorch's side is a flat dict of NumPy arrays with the names and layouts of MAE's and MAE-CT's
state dicts: `blocks.3.mlp.fc1.weight`, Linear weights `[out, in]`, the patch embedding a
convolution `[D, C, P, P]`. This side is a nested dict: kernels `[in, out]`, the blocks of a stack
along a leading layer axis. No number is changed on the way, so there and back is bit-equal, but
for fixed position embeddings, which this side computes and does not keep.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from maect_jax.errors import UserError
from maect_jax.models import positions

Tensors = Mapping[str, np.ndarray]

LINEAR = {"kernel": "weight", "bias": "bias"}
NORM = {"scale": "weight", "bias": "bias"}


def named(ours: str, theirs: str, leaves: dict[str, str]) -> dict[str, str]:
    """A table of the leaves of a module, this side's paths to PyTorch's names."""
    return {f"{ours}/{leaf}": f"{theirs}.{their_leaf}" for leaf, their_leaf in leaves.items()}


_BLOCKS = (
    named("blocks/norm1", "blocks.{}.norm1", NORM)
    | named("blocks/attn/qkv", "blocks.{}.attn.qkv", LINEAR)
    | named("blocks/attn/proj", "blocks.{}.attn.proj", LINEAR)
    | named("blocks/norm2", "blocks.{}.norm2", NORM)
    | named("blocks/fc1", "blocks.{}.mlp.fc1", LINEAR)
    | named("blocks/fc2", "blocks.{}.mlp.fc2", LINEAR)
)
_ENCODER = (
    {"cls_token": "cls_token"}
    | named("patch_embed", "patch_embed.proj", LINEAR)
    | _BLOCKS
    | named("norm", "norm", NORM)
)
_DECODER = (
    {"mask_token": "mask_token"}
    | named("embed", "embed", LINEAR)
    | _BLOCKS
    | named("norm", "norm", NORM)
    | named("pred", "pred", LINEAR)
)


def _to_ours(path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith("kernel"):
        # A convolution's pixels come in the order of `vit.patchify`: row, column, channel.
        return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0).reshape(-1, len(x))
    return x


def depth(tensors: Iterable[str]) -> int:
    """How many blocks the names of a state dict have; 1 for none."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    return 1 + max(numbers, default=0)


def _stacked(layers: Iterator[np.ndarray], count: int) -> np.ndarray:
    """`np.stack`, but that no more than one of the layers is held beside what it makes."""
    first = next(layers)
    stack = np.empty((count, *first.shape), first.dtype)
    stack[0] = first
    for i, layer in enumerate(layers, 1):
        stack[i] = layer
    return stack


def from_torch(tensors: Tensors, table: dict[str, str], what: str) -> dict:
    """A tree of all that `table` names; what is missing or left over is an error."""
    left = dict(tensors)

    def take(path, name):
        if name not in left:
            raise UserError(f"{what}: the tensor {name!r} is missing")
        return _to_ours(path, np.asarray(left.pop(name)))

    layers = depth(tensors)
    flat = {}
    for path, name in table.items():
        if "{}" in name:
            flat[path] = _stacked((take(path, name.format(i)) for i in range(layers)), layers)
        else:
            flat[path] = take(path, name)
    if left:
        raise UserError(f"{what}: no place for the tensor {min(left)!r}")
    return unflatten_dict(flat, sep="/")


def to_torch(tree: Mapping, table: dict[str, str], first_block: int = 0) -> dict[str, np.ndarray]:
    """Every leaf of `tree` under the name that `table` has for it."""
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


def _with_position(params: dict, position, grid: tuple[int, int], width: int) -> dict:
    """`params` with a position embedding, unless it is the fixed one."""
    if position is None or np.array_equal(position, positions.sincos(grid, width)):
        return params
    return {**params, "pos_embed": position}


def _position_of(position, grid: tuple[int, int], width: int) -> np.ndarray:
    """The learned or, for `None`, the fixed position embedding, `[1, N, D]`."""
    return (positions.sincos(grid, width) if position is None else np.asarray(position))[None]


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
    params = from_torch(tensors, _ENCODER, "encoder")
    return _with_position(params, position, grid, params["cls_token"].shape[-1])


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
    tensors = to_torch(params, _ENCODER, first_block)
    if "patch_embed" in params:
        weight = tensors["patch_embed.proj.weight"]
        pixels = weight.reshape(len(weight), patch_size, patch_size, -1)
        tensors["patch_embed.proj.weight"] = pixels.transpose(0, 3, 1, 2)
    if grid is not None:
        tensors["pos_embed"] = _position_of(position, grid, params["cls_token"].shape[-1])
    return tensors


def decoder_from_torch(tensors: Tensors, grid: tuple[int, int]) -> dict:
    """Decoder parameters of a state dict with the names `mask_token`, `embed.*`, `blocks.<i>.*`,
    `norm.*`, `pred.*` and, optionally, `pos_embed [1, N, D]` of a patch `grid`, which is kept only
    where it differs from the fixed sine-cosine embedding.

    Raises:
      UserError: a tensor is missing or has no place.
    """
    tensors = dict(tensors)
    position = _position(tensors, grid, "decoder")
    params = from_torch(tensors, _DECODER, "decoder")
    return _with_position(params, position, grid, params["mask_token"].shape[-1])


def decoder_to_torch(params: Mapping, grid: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `decoder_from_torch`, with `pos_embed` where `grid` is given."""
    params = dict(params)
    position = params.pop("pos_embed", None)
    tensors = to_torch(params, _DECODER)
    if grid is not None:
        tensors["pos_embed"] = _position_of(position, grid, params["mask_token"].shape[-1])
    return tensors
