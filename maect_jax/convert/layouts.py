"""What foreign files call their tensors, in the names of `names`: MAE's, timm's, HuggingFace's, and
those of MAE-CT's authors."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from maect_jax.convert.tensors import Stored
from maect_jax.errors import UserError

ENCODER, DECODER, HEAD, CLASSIFIER = "encoder", "decoder", "head", "classifier"
Parts = dict[str, dict[str, Stored]]


class Sorted(NamedTuple):
    """The tensors of a file in their places.

    Attributes:
      layout: whose names they are.
      parts: by part of a model, tensors under the names that `names` has for them.
      left: the tensors that have no place, and why.
      fc_norm: the final norm is that of the pooled feature, not of each token.
      bn_eps: of a linear probe's batch normalisation.
    """

    layout: str
    parts: Parts
    left: dict[str, str]
    fc_norm: bool = False
    bn_eps: float = 1e-5


_LINEAR = r"\.(weight|bias)"
_COUNTER = "counts batches, which nothing reads"
_POOLER = "is HuggingFace's pooler, which comes after the features"

# (what a name must match, part, name in `names`): the first that matches is used.
_BLOCK = r"\.(\d+)\.((?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))"
_PLAIN = (
    (r"(cls_token|pos_embed)", ENCODER, r"\1"),
    (rf"patch_embed\.proj{_LINEAR}", ENCODER, r"patch_embed.proj.\1"),
    (rf"blocks{_BLOCK}", ENCODER, r"blocks.\1.\2"),
    (rf"(?:fc_)?norm{_LINEAR}", ENCODER, r"norm.\1"),
    (r"mask_token", DECODER, "mask_token"),
    (r"decoder_pos_embed", DECODER, "pos_embed"),
    (rf"decoder_(embed|norm|pred){_LINEAR}", DECODER, r"\1.\2"),
    (rf"decoder_blocks{_BLOCK}", DECODER, r"blocks.\1.\2"),
    (rf"head(?:\.1)?{_LINEAR}", CLASSIFIER, r"\1"),
    (r"head\.0\.(running_mean|running_var)", CLASSIFIER, r"\1"),
)
_HEAD = (
    (r"((?:target_)?projector|predictor)(\..+)", HEAD, r"\1\2"),
    (r"(queue|queue_id|queue_y|queue_ptr)", HEAD, r"\1"),
)
# The pooling was once the first module of the probe, so that all places moved by one.
_PROBE = (
    (rf"layer\.[23]{_LINEAR}", CLASSIFIER, r"\1"),
    (r"layer\.[12]\.(running_mean|running_var)", CLASSIFIER, r"\1"),
)
# Within a block: the names of HuggingFace's files, and those of its modules today.
_HF_FILES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    **{f"attention.attention.{name}": name for name in ("query", "key", "value")},
}
_HF_BLOCK = _HF_FILES | {
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    **{f"attention.{name[0]}_proj": name for name in ("query", "key", "value")},
}
_HF = (
    (r"(?:vit\.)?embeddings\.cls_token", ENCODER, "cls_token"),
    (r"(?:vit\.)?embeddings\.position_embeddings", ENCODER, "pos_embed"),
    (
        rf"(?:vit\.)?embeddings\.patch_embeddings\.projection{_LINEAR}",
        ENCODER,
        r"patch_embed.proj.\1",
    ),
    (rf"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+){_LINEAR}", ENCODER, None),
    (rf"(?:vit\.)?layernorm{_LINEAR}", ENCODER, r"norm.\1"),
    (r"decoder\.mask_token", DECODER, "mask_token"),
    (r"decoder\.decoder_pos_embed", DECODER, "pos_embed"),
    (rf"decoder\.decoder_(embed|norm|pred){_LINEAR}", DECODER, r"\1.\2"),
    (
        rf"decoder\.decoder_(?:encoder\.layer|layers)\.(\d+)\.(.+){_LINEAR}",
        DECODER,
        None,
    ),
    (rf"classifier{_LINEAR}", CLASSIFIER, r"\1"),
)
_LEFT = (
    (r".*\.num_batches_tracked", _COUNTER),
    (r"(?:vit\.)?pooler\..*", _POOLER),
    (r"(?:vit\.)?embeddings\.mask_token", "hides patches in SimMIM, which is not used here"),
)
# What tells whose names they are, and the rules for them. The first that is there is used.
_LAYOUTS = (
    (r"(vit\.)?embeddings\.patch_embeddings\..*", "HuggingFace's", _HF),
    (r"projector\.0\.weight", "a contrastive head of MAE-CT's authors", _HEAD),
    (r"layer\.[23]\.weight", "a linear probe of MAE-CT's authors", _PROBE),
    (r"decoder_embed\.weight", "MAE's (with decoder)", _PLAIN),
    (r"patch_embed\.proj\.weight", "MAE's, timm's or MAE-CT's", _PLAIN),
)


def sort(tensors: Mapping[str, Stored], where: str) -> Sorted:
    """Finds the place of every tensor.

    Raises:
      UserError: it is no such file, or a tensor has no place.
    """
    layout = next(
        (
            (title, rules)
            for pattern, title, rules in _LAYOUTS
            if any(re.fullmatch(pattern, name) for name in tensors)
        ),
        None,
    )
    if layout is None:
        raise UserError(
            f"{where}: none of the kinds that can be read (MAE, MAE-CT's encoder, head or probe, "
            f"HuggingFace's ViTMAE or ViT, timm's ViT); its first tensor is {min(tensors)!r}"
        )
    title, rules = layout
    parts: Parts = {}
    left, thirds = {}, {}
    for name, x in tensors.items():
        reason = next((why for pattern, why in _LEFT if re.fullmatch(pattern, name)), None)
        if reason:
            left[name] = reason
            continue
        part, own = _place(name, rules, where)
        third = re.fullmatch(r"blocks\.(\d+)\.(query|key|value)\.(.+)", own)
        if third:
            key = (part, f"blocks.{third[1]}.attn.qkv.{third[3]}")
            thirds.setdefault(key, {})[third[2]] = x
            continue
        taken = parts.setdefault(part, {})
        if own in taken:
            raise UserError(f"{where}: {name!r} and {taken[own].names[0]!r} have one place")
        taken[own] = x
    for (part, own), found in thirds.items():
        parts.setdefault(part, {})[own] = _joined(found, where)
    fc_norm = "fc_norm.weight" in tensors
    # MAE's linear probe has an epsilon of its own.
    return Sorted(title, parts, left, fc_norm, 1e-6 if "head.0.running_var" in tensors else 1e-5)


def _place(name: str, rules, where: str) -> tuple[str, str]:
    for pattern, part, own in rules:
        found = re.fullmatch(pattern, name)
        if found and own is None:
            block, inner, kind = found.groups()
            if inner in _HF_BLOCK:
                inner = _HF_BLOCK[inner]
                return part, f"blocks.{block}.{inner}.{kind}"
        elif found:
            return part, found.expand(own)
    raise UserError(
        f"{where}: there is no place for the tensor {name!r} in a plain Vision Transformer; such a "
        "model cannot be read"
    )


def _joined(found: dict[str, Stored], where: str) -> Stored:
    """The one projection of queries, keys and values that is three in HuggingFace's files."""
    absent = {"query", "key", "value"} - set(found)
    if absent:
        there = next(iter(found.values())).names[0]
        raise UserError(f"{where}: {there!r} has no {min(absent)} beside it")
    three = [found[which] for which in ("query", "key", "value")]
    shapes = {x.shape for x in three}
    if len(shapes) > 1:
        raise UserError(f"{where}: {three[0].names[0]!r} and its key and value differ in shape")
    names = tuple(name for x in three for name in x.names)
    (shape,) = shapes
    return Stored(
        names,
        (3 * shape[0], *shape[1:]) if shape else shape,
        lambda: np.concatenate([np.asarray(x) for x in three]),
        three[0].where,
        all(x.floating for x in three),
    )


def mae_decoder_name(name: str) -> str:
    """MAE's name for a tensor of the decoder."""
    return name if name == "mask_token" else f"decoder_{name}"


def probe(classifier: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' names for a classifier with MAE's."""
    places = {"head.0": "layer.1", "head.1": "layer.2", "head": "layer.2"}
    found = {}
    for name, x in classifier.items():
        place, leaf = name.rsplit(".", 1)
        found[f"{places[place]}.{leaf}"] = x
    return found


def to_hf(encoder: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """HuggingFace's names for an encoder's tensors."""
    outside = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    inside = {ours: theirs for theirs, ours in _HF_FILES.items()}
    found = {}
    for name, x in encoder.items():
        if name in outside:
            found[prefix + outside[name]] = x
            continue
        stem, leaf = name.rsplit(".", 1)
        if stem in outside:
            found[f"{prefix}{outside[stem]}.{leaf}"] = x
            continue
        _, block, own = stem.split(".", 2)
        thirds = ("query", "key", "value") if own == "attn.qkv" else (own,)
        for inner, part in zip(thirds, np.split(x, len(thirds)), strict=True):
            found[f"{prefix}encoder.layer.{block}.{inside[inner]}.{leaf}"] = part
    return found
