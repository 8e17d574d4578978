"""What model the tensors of a file belong to, by their names and shapes."""

import math
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from maect_jax.convert import layouts, names, told
from maect_jax.convert.layouts import CLASSIFIER, ENCODER
from maect_jax.convert.tensors import Stored
from maect_jax.convert.told import Given
from maect_jax.errors import UserError
from maect_jax.models import mae, positions, vit

LN_EPS = 1e-6  # MAE's, MAE-CT's and timm's
_DECODER_HEADS = {512: 16}  # by width: MAE's
_MEAN_OF_PATCHES = "B"  # the variant of which the paper takes these, not the class token


def model(
    found: layouts.Sorted, config: Mapping, given: Given, where: str
) -> tuple[ConfigDict, tuple[int, int]]:
    """The `model` section of a config for an encoder's tensors, and the grid of their positions.

    Args:
      found: the sorted tensors of the encoder's file.
      config: what stands beside the tensors; it may be empty.
      given: what the user says.
      where: the file, for errors.

    Raises:
      UserError: the tensors are no plain ViT's, or do not tell all and `given` neither.
    """
    tensors = found.parts[ENCODER]
    weight = need(tensors, "patch_embed.proj.weight", where)
    width, channels, *patch = weight.shape if len(weight.shape) == 4 else (0, 0, 0, 0)
    if len(set(patch)) != 1 or not min(patch):
        raise UserError(
            f"{where}: {weight.names[0]!r} has shape {weight.shape}, must be [width, channels, "
            "patch, patch] with square patches"
        )
    known = next((name for name, size in vit.VARIANTS.items() if size.width == width), None)
    heads = told.number(given.heads, config, "num_attention_heads", int, where)
    ln_eps = told.number(given.ln_eps, config, "layer_norm_eps", float, where)
    if known:
        heads, ln_eps = heads or vit.VARIANTS[known].heads, ln_eps or LN_EPS
    asked = [f"--{key}" for key, x in (("heads", heads), ("ln_eps", ln_eps)) if x is None]
    if asked:
        raise UserError(
            f"{where}: an encoder of width {width} is none of the known ones "
            f"({', '.join(str(size.width) for size in vit.VARIANTS.values())}), and the file does "
            f"not tell all of it: import it with {' and '.join(asked)}"
        )
    if width % heads or width % 4:
        raise UserError(f"{where}: its width {width} must be a multiple of 4 and of {heads} heads")
    size = vit.Size(width, names.depth(tensors), heads)
    told.activation(config, where)
    for key, value in (
        ("hidden_size", width),
        ("num_hidden_layers", size.depth),
        ("patch_size", patch[0]),
        ("num_channels", channels),
    ):
        told.agrees(config, key, value, where)
    variant = known or "B"
    grid = _grid(tensors, config, given, patch[0], where)
    own = {
        key: None if value == getattr(vit.VARIANTS[variant], key) else value
        for key, value in size._asdict().items()
    }
    section = {
        "variant": variant,
        **own,
        "patch_size": patch[0],
        "image_size": given.image_size or (grid[0] * patch[0], grid[1] * patch[0]),
        "channels": channels,
        "pool": given.pool or _pool(found, config, grid, size, where),
        "ln_eps": ln_eps,
        "dtype": given.dtype or "bfloat16",
    }
    return ConfigDict(section), grid


def _pool(
    found: layouts.Sorted, config: Mapping, grid: tuple[int, int], size: vit.Size, where: str
) -> str:
    """The feature of a model, where the user does not name one: for an MAE the paper's."""
    if found.fc_norm:
        return "fc_norm"
    pool = told.timm_pool(config, where)
    if pool or CLASSIFIER in found.parts:
        return pool or "cls"
    an_mae = size.width == vit.VARIANTS[_MEAN_OF_PATCHES].width and is_fixed(
        found.parts[ENCODER], grid
    )
    return "mean" if an_mae else "cls"


def is_fixed(tensors: Mapping[str, Stored], grid: tuple[int, int]) -> bool:
    """Whether an encoder's positions are MAE's fixed ones of a grid, bit by bit."""
    stored = tensors["pos_embed"]
    if not stored.floating or stored.shape[2] % 4:
        return False
    own = np.asarray(stored)[0, -math.prod(grid) :]
    return np.array_equal(own, positions.sincos(grid, stored.shape[2]))


def _grid(
    tensors: Mapping, config: Mapping, given: Given, patch: int, where: str
) -> tuple[int, int]:
    """The patch grid (rows, columns) of the position embedding in the file."""
    asked = given.image_size
    if asked and any(side < patch or side % patch for side in asked):
        raise UserError(
            f"{where}: the image size {asked} must be a multiple of the patch size, {patch}, which "
            "cannot be changed"
        )
    stored = need(tensors, "pos_embed", where)
    rows = stored.shape[1] if len(stored.shape) == 3 else 0
    counts = (rows - 1, rows)  # the class token may have a row
    squares = [(math.isqrt(max(count, 0)),) * 2 for count in counts]
    own = asked and (asked[0] // patch, asked[1] // patch)
    # Several may be possible: MAE's own embedding tells; else most have a row for the class token.
    possible = (told.grid(config, patch, where), squares[0], own, squares[1])
    possible = [grid for grid in possible if grid and math.prod(grid) in counts and min(grid)]
    if possible:
        return next((grid for grid in possible if is_fixed(tensors, grid)), possible[0])
    raise UserError(
        f"{where}: {stored.names[0]!r} has shape {stored.shape}, which is not that of a square "
        "image; import it with the --image_size=HEIGHT,WIDTH that it was made for"
    )


def decoder(tensors, config: Mapping, section: ConfigDict, given: Given, where: str) -> mae.Decoder:
    """The decoder that some tensors are of, for an encoder's `model` section.

    Raises:
      UserError: its number of heads is not told.
    """
    width = need(tensors, "embed.weight", where).shape[0]
    heads = told.number(given.decoder_heads, config, "decoder_num_attention_heads", int, where)
    heads = heads or _DECODER_HEADS.get(width)
    if heads is None:
        raise UserError(
            f"{where}: a decoder of width {width} is not MAE's; import it with --decoder_heads"
        )
    if width % heads or width % 4:
        raise UserError(
            f"{where}: its decoder's width {width} must be a multiple of 4 and of {heads} heads"
        )
    return mae.Decoder(
        width, names.depth(tensors), heads, section.patch_size, section.channels, section.ln_eps
    )


def head(tensors, where: str) -> dict[str, int]:
    """The sizes of a contrastive head, by the keys of a config section."""
    sizes = {
        "projector_hidden": "projector.0.weight",
        "projector_out": "projector.6.weight",
        "predictor_hidden": "predictor.0.weight",
        "queue_size": "queue",
    }
    found = {key: need(tensors, name, where) for key, name in sizes.items()}
    for x in found.values():
        if len(x.shape) != 2:
            raise UserError(f"{where}: {x.names[0]!r} has shape {x.shape}, must be a matrix")
    return {key: x.shape[0] for key, x in found.items()}


def need(tensors, name: str, where: str):
    """A tensor that must be there. Raises `UserError` where it is not."""
    if name not in tensors:
        raise UserError(f"{where}: the tensor {name!r} is missing")
    return tensors[name]
