"""Kinds of Vision Transformers, made at random by their own code (extra `[peers]`): what they write
is read with the same features, and what is written they read."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from maect_jax.convert import exporting, importing
from maect_jax.convert.importing import Overrides
from maect_jax.stages import SAVED
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.peers import (
    SMALL,
    arrays,
    features,
    perturbed,
    pixels,
    timm,
    torch,
    transformers,
)

SIDE, PATCH, WIDTH = 16, 4, SMALL["embed_dim"]
HF = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)


def hf(name, **own):
    """A model of transformers, whose config has its width of the MLP or a ratio of 4."""
    config = getattr(transformers, f"{name}Config")
    ratio = "mlp_ratio" in config().to_dict()
    sizes = HF | ({} if ratio else {"intermediate_size": 4 * WIDTH})
    return perturbed(getattr(transformers, f"{name}Model")(config(**sizes, **own)))


def timm_kind(kind=timm.models.vision_transformer.VisionTransformer, **own):
    sizes = SMALL | dict(img_size=SIDE, patch_size=PATCH, num_classes=0)
    return perturbed(kind(**sizes | own))


def write_hf(peer, folder):
    peer.save_pretrained(folder)
    return folder


def write_timm(peer, folder, rename=dict, wrap=None):
    """A state dict, as another library names it, as safetensors, or in dicts as a pickle."""
    found = rename(arrays(peer.state_dict().items()))
    if wrap is None:
        path = folder / "peer.safetensors"
        save_file({name: np.ascontiguousarray(x) for name, x in found.items()}, path)
    else:
        path = folder / "peer.pth"
        torch.save(wrap({name: torch.tensor(x) for name, x in found.items()}), path)
    return path


def of_timm(peer, x):
    return peer.forward_head(peer.forward_features(x), pre_logits=True)


def first(peer, x):
    return peer(x).last_hidden_state[:, 0]


def pooled(peer, x):
    return peer(x).pooler_output


def mean(peer, x):
    return peer(x).last_hidden_state.mean(1)


def with_rows(tensors, count):
    """The position embedding with rows for tokens, which lose what these add to them."""
    rows = np.random.default_rng(1).normal(size=(1, count, WIDTH)).astype(np.float32)
    position = np.concatenate([rows, tensors["pos_embed"]], axis=1)
    return tensors | {"cls_token": tensors["cls_token"] - rows, "pos_embed": position}


def as_dinov2(tensors):
    """Meta's file: blocks in chunks, a class row of positions, a token for masked patches."""
    tensors = with_rows(tensors, 1) | {"mask_token": np.ones((1, WIDTH), np.float32)}
    tensors["register_tokens"] = tensors.pop("reg_token")
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): x for name, x in tensors.items()}


def as_refiner(tensors):
    position = tensors.pop("pos_embed").reshape(1, SIDE // PATCH, SIDE // PATCH, WIDTH)
    return tensors | {"cls_tokens.tokens": tensors.pop("cls_token"), "pos_embed.embed": position}


def as_pixio(tensors):
    """Pixio's own names, of those in transformers' code."""
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "layers": "blocks",
        "layernorm": "norm",
    }  # fmt: skip
    found = {}
    for name, x in tensors.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "q_proj" in name:
            three = [tensors[n] for n in tensors if re.sub("[qkv]_proj", "q_proj", n) == name]
            found[name] = three
        found[name] = x
    for name in [name for name in found if "q_proj" in name]:
        three = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(three)
    return found


def as_ijepa(tensors):
    """Meta's file: the trained encoder, its average and the predictor."""

    def under(scale):
        return {f"module.{name}": scale * x for name, x in tensors.items()}

    predictor = {"module.predictor_embed.weight": torch.ones(3, 3)}
    return {"encoder": under(2), "target_encoder": under(1), "predictor": predictor, "epoch": 3}


class Kind(NamedTuple):
    peer: Callable  # makes it
    write: Callable  # writes its file: (peer, folder) -> path
    feature: Callable  # (peer, images) -> [B, D]
    tokens: tuple[int, int] = (1, 0)  # class tokens, registers
    format: str = "timm"  # in which it is written again
    pool: str = "cls"
    key: str | None = None


beit = partial(
    timm.models.beit.Beit, use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=0.1,
    qkv_bias=True,
)  # fmt: skip
gap = partial(timm_kind, class_token=False, global_pool="avg", fc_norm=False)
registers = partial(timm_kind, reg_tokens=4, no_embed_class=True, init_values=0.1)
distilled = partial(timm_kind, timm.models.deit.VisionTransformerDistilled)
absolute = dict(use_absolute_position_embeddings=True)
KINDS = {
    "MIM-Refiner": Kind(
        partial(timm_kind, no_embed_class=True), partial(write_timm, rename=as_refiner), of_timm
    ),
    "Pixio": Kind(partial(hf, "Pixio"), write_hf, pooled, (8, 0), "hf"),
    "Pixio's .pth": Kind(
        partial(hf, "Pixio", n_cls_tokens=3), partial(write_timm, rename=as_pixio, wrap=dict),
        pooled, (3, 0), "hf",
    ),
    "DINOv2, HuggingFace": Kind(partial(hf, "Dinov2"), write_hf, pooled, format="hf"),
    "DINOv2, timm": Kind(partial(timm_kind, init_values=0.1), write_timm, of_timm),
    "DINOv2 with registers, HuggingFace": Kind(
        partial(hf, "Dinov2WithRegisters"), write_hf, pooled, (1, 4), "hf"
    ),
    "DINOv2 with registers, timm": Kind(registers, write_timm, of_timm, (1, 4)),
    "DINOv2 with registers, Meta's .pth": Kind(
        registers, partial(write_timm, rename=as_dinov2, wrap=dict), of_timm, (1, 4)
    ),
    "registers with positions, timm": Kind(
        partial(timm_kind, reg_tokens=3), write_timm, of_timm, (1, 3)
    ),
    "I-JEPA, HuggingFace": Kind(partial(hf, "IJepa"), write_hf, mean, (0, 0), "hf", "mean"),
    "I-JEPA, timm": Kind(gap, write_timm, of_timm, (0, 0), "timm", "mean"),
    "I-JEPA, Meta's .pth": Kind(
        gap, partial(write_timm, wrap=as_ijepa), of_timm, (0, 0), "timm", "mean", "target_encoder"
    ),
    "ViT-MSN": Kind(partial(hf, "ViTMSN"), write_hf, first, format="hf"),
    "DeiT distilled, HuggingFace": Kind(partial(hf, "DeiT"), write_hf, first, (1, 1), "hf"),
    "DeiT distilled, timm": Kind(distilled, write_timm, of_timm, (2, 0)),
    "BEiT without relative positions, HuggingFace": Kind(
        partial(hf, "Beit", **absolute), write_hf, pooled, pool="fc_norm"
    ),
    "BEiT without relative positions, timm": Kind(
        partial(timm_kind, beit, global_pool="token"), write_timm, of_timm
    ),
}  # fmt: skip


def recognised(kind, peer, folder):
    eps = next(m.eps for m in peer.modules() if isinstance(m, torch.nn.LayerNorm))
    given = Overrides(heads=3, ln_eps=eps, key=kind.key)
    return importing.recognised([kind.write(peer, folder)], given)


def model_of(found):
    parts = found.read()
    encoder = SAVED[found.kind].encoder_params(parts)
    return exporting.Model(stage=found.kind, config=found.config, encoder=encoder, parts=parts)


def exported_peer(found, path, format):
    """The peer of what is written again, and its feature."""
    exporting.export(model_of(found), path, format)
    if format == "hf":
        again, given = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
        assert not any(given[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return again.eval()
    card = path.with_name(f"{path.name}.md").read_text()
    call = re.search(r"^model = (.*)$", card, re.MULTILINE)[1]
    names = {"timm": timm, "torch": torch, "partial": partial}
    return eval(call.replace(repr(path.name), repr(str(path))), names)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_kind_there_and_back(tmp_path, rng, kind):
    peer = kind.peer()
    found = recognised(kind, peer, tmp_path)
    model = found.config.model
    assert (model.cls_tokens, model.registers, model.pool) == (*kind.tokens, kind.pool)
    images = rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        want = kind.feature(peer, pixels(images)).numpy()
        assert_close("kinds", features(found, images), want, FORWARD)
        again = exported_peer(found, tmp_path / "again.safetensors", kind.format)
        feature = kind.feature if kind.format == "hf" else of_timm
        got = feature(again, pixels(images)).numpy()
    assert_close("kinds, exported", got, want, FORWARD)
