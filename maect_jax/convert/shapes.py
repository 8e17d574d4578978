"""Whether all tensors of a model are there, and of the right shapes."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax.convert import head_names, names
from maect_jax.convert.layouts import CLASSIFIER, DECODER, ENCODER, HEAD, Parts
from maect_jax.errors import UserError
from maect_jax.models import mae, nnclr, positions, vit

Shapes = dict[str, tuple[int, ...]]
_WHOLE_NUMBERS = ("queue_id", "queue_y", "queue_ptr")


def _zeros(tree):
    """Arrays of the shapes of abstract ones, that take no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree)


def _shapes(tensors: Mapping) -> Shapes:
    return {name: x.shape for name, x in tensors.items()}


def _head(sizes: Mapping[str, int], width: int, has_target: bool) -> Shapes:
    out, queue = sizes["projector_out"], sizes["queue_size"]
    modules = {
        "projector": (nnclr.Projector(sizes["projector_hidden"], out), width),
        "predictor": (nnclr.Predictor(sizes["predictor_hidden"], out), out),
    }
    made = {
        name: jax.eval_shape(lambda m=m, w=w: m.init(jax.random.key(0), np.zeros((2, w)), True))
        for name, (m, w) in modules.items()
    }
    trees = {
        kind: {name: _zeros(tree[kind]) for name, tree in made.items()}
        for kind in ("params", "batch_stats")
    }
    if has_target:
        trees["target"] = {"projector": trees["params"]["projector"]}
    shapes = _shapes(head_names.head_to_torch(trees))
    return shapes | {
        "queue": (queue, out),
        "queue_id": (queue,),
        "queue_y": (queue,),
        "queue_ptr": (1,),
    }


def expected(
    parts: Parts,
    section: ConfigDict,
    sizes: Mapping[str, int],
    decoding: mae.Decoder | None,
    stored_grid: tuple[int, int],
) -> dict[str, Shapes]:
    """By part, the shapes that the tensors of a model must have.

    Args:
      parts: its tensors, by part.
      section: `model` of a config.
      sizes: of a contrastive head, by the keys of a config section.
      decoding: the decoder, if there is one.
      stored_grid: of the position embeddings.
    """
    key, width = jax.random.key(0), vit.size_of(section).width
    image = jax.ShapeDtypeStruct((1, *section.image_size, section.channels), np.float32)
    patches = math.prod(stored_grid)
    tree = jax.eval_shape(vit.from_config(section).init, key, image)["params"]
    encoder = names.encoder_to_torch(_zeros(tree), section.patch_size)
    shapes = {ENCODER: _shapes(encoder) | {"pos_embed": (1, patches, width)}}
    if DECODER in parts:
        grid = positions.grid(section.image_size, section.patch_size)
        latent = jax.ShapeDtypeStruct((1, 1, width), np.float32)
        restore = jax.ShapeDtypeStruct((1, math.prod(grid)), np.int32)
        tree = jax.eval_shape(lambda *x: decoding.init(key, *x, grid), latent, restore)["params"]
        shapes[DECODER] = _shapes(names.decoder_to_torch(_zeros(tree)))
        shapes[DECODER]["pos_embed"] = (1, patches, decoding.width)
    if HEAD in parts:
        shapes[HEAD] = _head(sizes, width, "target_projector.0.weight" in parts[HEAD])
    if CLASSIFIER in parts:
        weight = parts[CLASSIFIER].get("weight")
        classes = weight.shape[0] if weight is not None and weight.shape else 0
        shapes[CLASSIFIER] = {"weight": (classes, width), "bias": (classes,)}
        if {"running_mean", "running_var"} & set(parts[CLASSIFIER]):
            shapes[CLASSIFIER] |= {"running_mean": (width,), "running_var": (width,)}
    return shapes


def check(parts: Parts, shapes: Mapping[str, Shapes], where: str) -> None:
    """Raises `UserError` where a tensor is missing, has no place, another shape or no numbers."""
    for part, wanted in shapes.items():
        absent = sorted(set(wanted) - set(parts[part]))
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise UserError(f"{where}: the {part}'s tensor {absent[0]!r} is missing{more}")
        for name, x in parts[part].items():
            called = " + ".join(x.names)
            if name not in wanted:
                raise UserError(f"{where}: no place in the {part} for {called!r}")
            if tuple(x.shape) != tuple(wanted[name]):
                raise UserError(
                    f"{where}: {called!r} has shape {tuple(x.shape)}, must be {tuple(wanted[name])}"
                )
            if not x.floating and name not in _WHOLE_NUMBERS:
                raise UserError(f"{where}: {called!r} must hold floats of 16, 32 or 64 bits")
