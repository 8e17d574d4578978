"""Public PyTorch models as witnesses (extra `[peers]`): HuggingFace's ViTMAE and timm's ViT."""

from functools import partial

import jax
import numpy as np
import pytest

from maect_jax.convert import names as convert
from maect_jax.models import mae, positions, vit
from tests.helpers.golden_figures import FORWARD, GRADIENT, assert_close, under
from tests.helpers.gradient_bounds import assert_gradients
from tests.helpers.peers import arrays, perturbed, timm, torch, transformers
from tests.helpers.tiny_stages import mae_stage_of

# HuggingFace's names for the tensors of a block, and MAE's.
BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def to_mae(tensors, layers: str, outside: dict[str, str]):
    """HuggingFace's tensors under MAE's names; `outside` are those that are not in a block."""
    found = {ours: tensors[theirs] for theirs, ours in outside.items() if theirs in tensors}
    for name, x in under(tensors, layers).items():
        block, rest = name.split(".", 1)
        part, kind = rest.rsplit(".", 1)
        if part in BLOCK:
            found[f"blocks.{block}.{BLOCK[part]}.{kind}"] = x
        elif part == "attention.q_proj":
            thirds = [tensors[f"{layers}{block}.attention.{n}_proj.{kind}"] for n in "qkv"]
            found[f"blocks.{block}.attn.qkv.{kind}"] = np.concatenate(thirds)
    return found


def both_kinds(names: dict[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}


def split(tensors):
    """MAE's encoder and decoder in the tensors of a ViTMAE."""
    encoder = {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
    } | both_kinds(
        {"vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm"}
    )
    decoder = {"decoder.mask_token": "mask_token"} | both_kinds(
        {f"decoder.decoder_{name}": name for name in ("embed", "norm", "pred")}
    )
    return (
        to_mae(tensors, "vit.layers.", encoder),
        to_mae(tensors, "decoder.decoder_layers.", decoder),
    )


@pytest.mark.parametrize(
    ("side", "patch", "eps", "ratio"), [(16, 4, 1e-12, 0.75), (24, 8, 1e-6, 0.5)]
)
def test_vit_mae_of_transformers(rng, side, patch, eps, ratio):
    """Masking, encoder, decoder, loss and every gradient; its eps is 1e-12 by default."""
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
        image_size=side, patch_size=patch, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4, decoder_intermediate_size=64, norm_pix_loss=True,
        mask_ratio=ratio, **({} if eps == 1e-12 else {"layer_norm_eps": eps}),
    )  # fmt: skip
    assert config.layer_norm_eps == eps
    peer = perturbed(transformers.ViTMAEForPreTraining(config))
    with torch.no_grad():
        for p in peer.vit.embeddings.parameters():
            p *= 0.01  # so small that the first norm's eps is seen
    # A fresh decoder has no positions there; one that was trained has MAE's.
    position = positions.sincos((side // patch,) * 2, 16)
    peer.decoder.decoder_pos_embed[0, 1:] = torch.tensor(position)
    images = rng.normal(size=(3, side, side, 3)).astype(np.float32)
    grid = (side // patch,) * 2
    noise = rng.random((3, grid[0] * grid[1])).astype(np.float32)
    pixels, torch_noise = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(noise)
    want = peer(pixels, noise=torch_noise)
    want.loss.backward()

    networks = vit.ViT(24, 3, 2, patch, ln_eps=eps), mae.Decoder(16, 2, 4, patch, 3, ln_eps=eps)
    stage = mae_stage_of(*networks, (side, side, 3), ratio)
    encoder, decoder = split(arrays(peer.state_dict().items()))
    # A fresh encoder codes rows before columns; its class token has no position.
    encoder["pos_embed"] = encoder["pos_embed"][:, 1:]
    params = {
        "encoder": convert.encoder_from_torch(encoder, grid),
        "decoder": convert.decoder_from_torch(decoder, grid),
    }

    def loss(params):
        got = stage.forward(params, images, noise)
        return got["loss"], got

    (_, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(got["mask"], want.mask)
    np.testing.assert_array_equal(got["restore"], want.ids_restore)
    latent = peer.vit(pixels, noise=torch_noise).last_hidden_state.detach()
    assert_close("ViTMAE latent", got["latent"], latent, FORWARD)
    assert_close("ViTMAE prediction", got["prediction"], want.logits.detach(), FORWARD)
    assert_close("ViTMAE loss", got["loss"], want.loss.detach(), FORWARD)
    named = ((n, p.grad) for n, p in peer.named_parameters() if p.grad is not None)
    for theirs, ours in zip(
        split(arrays(named)),
        (
            convert.encoder_to_torch(grads["encoder"], patch),
            convert.decoder_to_torch(grads["decoder"]),
        ),
        strict=True,
    ):
        assert_gradients("ViTMAE", ours, theirs, GRADIENT, contrastive=False)


@pytest.mark.parametrize(("size", "patch", "eps"), [((12, 20), 4, 1e-6), ((28, 28), 14, 1e-5)])
def test_vit_of_timm(rng, size, patch, eps):
    """With its learned position embedding, whose first row belongs to the class token."""
    peer = perturbed(
        timm.models.vision_transformer.VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=24,
            depth=3,
            num_heads=3,
            num_classes=0,
            norm_layer=partial(torch.nn.LayerNorm, eps=eps),
        )
    )
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        want = peer.forward_features(torch.tensor(images.transpose(0, 3, 1, 2)))
    tensors = arrays(peer.state_dict().items())
    position = tensors.pop("pos_embed")
    tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
    tensors["pos_embed"] = position[:, 1:]
    params = convert.encoder_from_torch(tensors, (size[0] // patch, size[1] // patch))
    model = vit.ViT(24, 3, 3, patch, ln_eps=eps)
    assert_close("timm tokens", model.apply({"params": params}, images), want, FORWARD)
