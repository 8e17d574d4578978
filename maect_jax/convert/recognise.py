"""What model the tensors of a file belong to, by their shapes; and whether all are there."""

import dataclasses
import json
import math
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax.convert import head_names, layouts, names
from maect_jax.convert.layouts import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit
from maect_jax.stages import build

LN_EPS = 1e-6  # MAE's, MAE-CT's and timm's
_DECODER_HEADS = {512: 16}  # by width: MAE's
_MEANS = ("B",)  # the variants that the paper takes the patches' mean of, not the class token


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user says of a file, which comes before what the file says. `None`: nothing."""

    heads: int | None = None
    decoder_heads: int | None = None
    ln_eps: float | None = None
    image_size: tuple[int, int] | None = None
    pool: str | None = None
    dtype: str | None = None


def model(found: layouts.Sorted, config: Mapping, given: Given, where: str) -> ConfigDict:
    """The `model` section of a config for an encoder's tensors.

    Args:
      found: the sorted tensors, an encoder's among them.
      config: what stands beside the tensors, a HuggingFace config or nothing.
      given: what the user says.
      where: the file, for errors.

    Raises:
      UserError: the tensors are no plain ViT's, or do not tell all and `given` neither.
    """
    tensors = found.parts[ENCODER]
    weight = _need(tensors, "patch_embed.proj.weight", where)
    width, channels, *patch = weight.shape if len(weight.shape) == 4 else (0, 0, 0, 0)
    if len(set(patch)) != 1 or not min(patch):
        raise UserError(
            f"{where}: {weight.names[0]!r} has shape {weight.shape}, must be [width, channels, "
            "patch, patch] with square patches"
        )
    known = next((name for name, size in vit.VARIANTS.items() if size.width == width), None)
    heads = given.heads or _told(config, "num_attention_heads", int, where)
    if heads is None and known:
        heads = vit.VARIANTS[known].heads
    ln_eps = (
        given.ln_eps or _told(config, "layer_norm_eps", float, where) or (LN_EPS if known else None)
    )
    asked = [f"--{key}" for key, x in (("heads", heads), ("ln_eps", ln_eps)) if x is None]
    if asked:
        raise UserError(
            f"{where}: an encoder of width {width} is none of the known ones "
            f"({', '.join(str(size.width) for size in vit.VARIANTS.values())}), and the file does "
            f"not tell all of it: import it with {' and '.join(asked)}"
        )
    if width % heads or width % 4:
        raise UserError(f"{where}: its width {width} must be a multiple of 4 and of {heads} heads")
    variant = known or "B"
    size = vit.Size(width, names.depth(tensors), heads)
    own = {
        key: None if value == getattr(vit.VARIANTS[variant], key) else value
        for key, value in size._asdict().items()
    }
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{where}: its hidden_act is {config['hidden_act']!r}, must be 'gelu'")
    grid = stored_grid(found, config, given, patch[0], where)
    pool = "fc_norm" if found.fc_norm else "mean" if known in _MEANS else "cls"
    return ConfigDict(
        {
            "variant": variant,
            **own,
            "patch_size": patch[0],
            "image_size": given.image_size or tuple(side * patch[0] for side in grid),
            "channels": channels,
            "pool": given.pool or pool,
            "ln_eps": ln_eps,
            "dtype": given.dtype or "bfloat16",
        }
    )


def stored_grid(
    found: layouts.Sorted, config: Mapping, given: Given, patch: int, where: str
) -> tuple[int, int]:
    """The patch grid (rows, columns) of the position embedding in the file.

    Raises:
      UserError: it tells no grid, or the image size is no multiple of the patch.
    """
    asked = None
    if given.image_size:
        asked = tuple(side // patch for side in given.image_size)
        if tuple(side * patch for side in asked) != given.image_size or min(asked) < 1:
            raise UserError(
                f"{where}: --image_size={given.image_size}: both sides must be multiples of the "
                f"patch size, {patch}, which cannot be changed"
            )
    stored = found.parts[ENCODER].get("pos_embed")
    if stored is None:
        if asked is None:
            raise UserError(
                f"{where}: holds no position embedding, by which the image size is known; import "
                "it with --image_size=HEIGHT,WIDTH"
            )
        return asked
    rows = stored.shape[1] if len(stored.shape) == 3 else 0
    # The class token may have a row of its own.
    for named in (asked, _told_grid(config, patch)):
        if named and math.prod(named) in (rows, rows - 1):
            return named
    for count in (rows, rows - 1):
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return side, side
    raise UserError(
        f"{where}: {stored.names[0]!r} has shape {stored.shape}, which is not that of a square "
        "image; import it with the --image_size=HEIGHT,WIDTH that it was made for"
    )


def _told_grid(config: Mapping, patch: int) -> tuple[int, int] | None:
    """The grid of the image size that stands beside the tensors: one number, or (height, width)."""
    told = config.get("image_size")
    try:
        sides = json.loads(told) if isinstance(told, str) else told
        height, width = sides if isinstance(sides, list) else (sides, sides)
        return int(height) // patch, int(width) // patch
    except (TypeError, ValueError):
        return None


def decoder(tensors, config: Mapping, section: ConfigDict, given: Given, where: str) -> mae.Decoder:
    """The decoder that some tensors are of, for an encoder's `model` section."""
    width = _need(tensors, "embed.weight", where).shape[0]
    heads = (
        given.decoder_heads
        or _told(config, "decoder_num_attention_heads", int, where)
        or _DECODER_HEADS.get(width)
    )
    if heads is None:
        raise UserError(
            f"{where}: a decoder of width {width} is not MAE's; import it with --decoder_heads"
        )
    return mae.Decoder(
        width, names.depth(tensors), heads, section.patch_size, section.channels,
        section.ln_eps,
    )  # fmt: skip


def head(tensors, where: str) -> dict[str, int]:
    """The sizes of a contrastive head, by the keys of a config section."""
    sizes = {
        "projector_hidden": "projector.0.weight",
        "projector_out": "projector.6.weight",
        "predictor_hidden": "predictor.0.weight",
        "queue_size": "queue",
    }
    return {key: _need(tensors, name, where).shape[0] for key, name in sizes.items()}


def _told(config: Mapping, key: str, kind: type, where: str):
    """A positive number that stands beside the tensors, or `None`."""
    if key not in config:
        return None
    try:
        value = kind(config[key])
    except (TypeError, ValueError):
        value = 0
    if value <= 0:
        raise UserError(f"{where}: its {key} is {config[key]!r}, must be a number above 0")
    return value


def _need(tensors, name: str, where: str):
    if name not in tensors:
        raise UserError(f"{where}: the tensor {name!r} is missing")
    return tensors[name]


def _zeros(tree):
    """Arrays of the shapes of abstract ones, that take no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree)


def _shapes(tensors: Mapping) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in tensors.items()}


def expected(
    parts: Parts, section: ConfigDict, sizes: Mapping[str, int], decoding: mae.Decoder | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """By part, the shapes that the tensors of a model must have; position embeddings are not among
    them."""
    key, width = jax.random.key(0), build.encoder_size(section).width
    image = jax.ShapeDtypeStruct((1, *build.image_shape(section)), np.float32)
    encoder = jax.eval_shape(build.encoder(section).init, key, image)["params"]
    shapes = {ENCODER: _shapes(names.encoder_to_torch(_zeros(encoder), section.patch_size))}
    if DECODER in parts:
        grid = positions.grid(section.image_size, section.patch_size)
        latent = jax.ShapeDtypeStruct((1, 1, width), np.float32)
        restore = jax.ShapeDtypeStruct((1, math.prod(grid)), np.int32)
        tree = jax.eval_shape(lambda *x: decoding.init(key, *x, grid), latent, restore)["params"]
        shapes[DECODER] = _shapes(names.decoder_to_torch(_zeros(tree)))
    if HEAD in parts:
        out, queue = sizes["projector_out"], sizes["queue_size"]
        modules = {
            "projector": (nnclr.Projector(sizes["projector_hidden"], out), width),
            "predictor": (nnclr.Predictor(sizes["predictor_hidden"], out), out),
        }
        made = {
            name: jax.eval_shape(lambda m=m, w=w: m.init(key, np.zeros((2, w)), train=True))
            for name, (m, w) in modules.items()
        }
        trees = {
            kind: {name: _zeros(tree[kind]) for name, tree in made.items()}
            for kind in ("params", "batch_stats")
        }
        if any(name.startswith("target_projector.") for name in parts[HEAD]):
            trees["target"] = {"projector": trees["params"]["projector"]}
        shapes[HEAD] = _shapes(head_names.head_to_torch(trees)) | {
            "queue": (queue, out), "queue_id": (queue,), "queue_y": (queue,), "queue_ptr": (1,),
        }  # fmt: skip
    if CLASSIFIER in parts:
        classes = next(iter(parts[CLASSIFIER].get("weight", np.zeros((0,))).shape), 0)
        shapes[CLASSIFIER] = {"weight": (classes, width), "bias": (classes,)}
        if {"running_mean", "running_var"} & set(parts[CLASSIFIER]):
            shapes[CLASSIFIER] |= {"running_mean": (width,), "running_var": (width,)}
    return shapes


def check(parts: Parts, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], where: str) -> None:
    """Raises `UserError` where a tensor is missing, has no place or another shape."""
    for part, wanted in shapes.items():
        have = {name: x for name, x in parts[part].items() if name != "pos_embed"}
        absent = sorted(set(wanted) - set(have))
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"{where}: the {part}'s tensor {absent[0]!r} is missing{more}")
        for name, x in have.items():
            if name not in wanted:
                raise UserError(f"{where}: no place in the {part} for {x.names[0]!r}")
            if tuple(x.shape) != tuple(wanted[name]):
                raise UserError(
                    f"{where}: {' + '.join(x.names)!r} has shape {tuple(x.shape)}, must be "
                    f"{tuple(wanted[name])}"
                )
