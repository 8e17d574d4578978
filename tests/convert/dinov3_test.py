"""DINOv3: the real models of transformers and timm (extra `[peers]`), and Meta's own names."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maect_jax
from maect_jax import sharding
from maect_jax.convert import importing
from maect_jax.convert.importing import Overrides
from maect_jax.errors import UserError
from maect_jax.run import lineage
from maect_jax.stages import STAGES
from tests.helpers.foreign_files import run_convert
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.peers import (
    SMALL,
    arrays,
    features,
    loaded,
    of_timm,
    perturbed,
    pixels,
    timm,
    torch,
    transformers,
)

SIZES = [(16, 16), (16, 24)]
by_size = pytest.mark.parametrize("size", SIZES, ids=["square", "not square"])


def hf_peer(**own):
    config = transformers.DINOv3ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=16, patch_size=4, num_register_tokens=2, **own,
    )  # fmt: skip
    return perturbed(transformers.DINOv3ViTModel(config))


def timm_peer(name, **own):
    small = SMALL | dict(img_size=16, patch_size=4, num_reg_tokens=2, num_classes=0)
    return perturbed(timm.create_model(name, **small | own))


def images_of(size, rng):
    return rng.normal(size=(3, *size, 3)).astype(np.float32)


def hf_tokens(peer, images):
    with torch.no_grad():
        return peer(pixel_values=pixels(images)).last_hidden_state.numpy()


def meta_names(peer, rng):
    """The tensors of transformers' model under Meta's names, as its code keeps them: one product
    for queries, keys and values, whose keys' bias is masked, and the periods of the positions."""
    theirs = arrays(peer.state_dict().items())
    found = {"cls_token": theirs["embeddings.cls_token"]}
    found["storage_tokens"] = theirs["embeddings.register_tokens"]
    found["mask_token"] = theirs["embeddings.mask_token"][0]
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = theirs[f"embeddings.patch_embeddings.{kind}"]
        found[f"norm.{kind}"] = theirs[f"norm.{kind}"]
        found[f"local_cls_norm.{kind}"] = rng.normal(size=24).astype(np.float32)
    inside = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj"}
    inside |= {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    for i in range(2):
        before, after = f"model.layer.{i}", f"blocks.{i}"
        for old, new in inside.items():
            for kind in ("weight", "bias"):
                found[f"{after}.{new}.{kind}"] = theirs[f"{before}.{old}.{kind}"]
        for which in "12":
            found[f"{after}.ls{which}.gamma"] = theirs[f"{before}.layer_scale{which}.lambda1"]
        thirds = [f"{before}.attention.{which}_proj" for which in "qkv"]
        weights = [theirs[f"{name}.weight"] for name in thirds]
        noise = rng.normal(size=24).astype(np.float32)
        biases = [theirs[f"{thirds[0]}.bias"], noise, theirs[f"{thirds[2]}.bias"]]
        found[f"{after}.attn.qkv.weight"] = np.concatenate(weights)
        found[f"{after}.attn.qkv.bias"] = np.concatenate(biases)
        mask = np.repeat(np.float32([1, 0, 1]), 24)
        found[f"{after}.attn.qkv.bias_mask"] = mask
    periods = torch.tensor(100.0 ** (np.arange(2) / 2)).bfloat16().float()
    return found | {"rope_embed.periods": periods.numpy()}


@by_size
def test_transformers_there_and_back(tmp_path, monkeypatch, rng, size):
    peer, folder, run, out = hf_peer(), tmp_path / "peer", tmp_path / "run", tmp_path / "out"
    peer.save_pretrained(folder)
    images = images_of(size, rng)
    want = hf_tokens(peer, images)[:, 0]
    found = importing.recognised([folder], Overrides(image_size=size))
    model = found.config.model
    assert (model.rope_theta, model.ln_eps, model.registers, model.pool) == (100, 1e-5, 2, "cls")
    assert_close("transformers features", features(found, images), want, FORWARD)
    run_convert(monkeypatch, "import", folder, run, f"--image_size={size[0]},{size[1]}")
    run_convert(monkeypatch, "export", run, out, "--format=hf")
    again = loaded(out, "hf")
    assert isinstance(again, transformers.DINOv3ViTModel)
    got = hf_tokens(again, images)[:, 0]
    assert_close("transformers features, exported", got, want, FORWARD)


def test_positions_of_a_run_are_those_of_any_size_and_base(tmp_path, monkeypatch, rng):
    """What starts from a run at another size computes them anew."""
    peer, run, size = hf_peer(rope_theta=30.0), tmp_path / "run", (16, 24)
    peer.save_pretrained(tmp_path / "peer")
    run_convert(monkeypatch, "import", tmp_path / "peer", run)
    plain = dict(mean=(0, 0, 0), std=(1, 1, 1), dtype="float32")
    encoder = maect_jax.load_encoder(run, image_size=size, **plain)
    images = rng.uniform(size=(3, *size, 3)).astype(np.float32)
    want = hf_tokens(peer, images)[:, 0]
    assert_close("transformers features", encoder(images), want, FORWARD)
    found, mesh = lineage.find(str(run), "head"), sharding.make_mesh(devices=jax.devices()[:1])
    model = found.config.model.copy_and_resolve_references()
    model.image_size = size
    start = lineage.start(found, model, stage=STAGES["head"], mesh=mesh)
    assert "pos_embed" not in start["encoder"]


# By name, timm's model, its arguments and the feature that is its own.
TIMM = {
    "no biases": ("vit_small_patch16_dinov3", {}, "mean"),
    "q and v biases": ("vit_small_patch16_dinov3_qkvb", dict(global_pool="token"), "cls"),
    "classifier": ("vit_small_patch16_dinov3_qkvb", dict(num_classes=5), "mean"),
    "fc_norm": (
        "vit_base_patch16_dinov3",
        dict(use_fc_norm=True, use_post_transformer_norm=False, num_classes=5),
        "fc_norm",
    ),
}


@pytest.mark.parametrize(("name", "own", "pool"), TIMM.values(), ids=list(TIMM))
def test_timm_there_and_back(tmp_path, monkeypatch, rng, name, own, pool):
    size = (24, 16)
    peer = timm_peer(name, img_size=size, **own)
    path, run, out = tmp_path / "p.safetensors", tmp_path / "run", tmp_path / "out.safetensors"
    save_file(arrays(peer.state_dict().items()), path)
    images = images_of(size, rng)
    want = of_timm(peer, pixels(images))
    found = importing.recognised([path], Overrides(heads=3, image_size=size, pool=pool))
    assert found.config.model.ln_eps == 1e-5
    assert_close("timm features", features(found, images), want, FORWARD)
    flags = ["--heads=3", f"--pool={pool}", "--image_size=24,16"]
    run_convert(monkeypatch, "import", path, run, *flags)
    run_convert(monkeypatch, "export", run, out, "--format=timm")
    got = of_timm(loaded(out, "timm"), pixels(images))
    assert_close("timm features, exported", got, want, FORWARD)


def test_timm_s_folder_states_the_images_and_the_feature(tmp_path):
    """As its models lie on the hub."""
    tensors = arrays(timm_peer("vit_small_patch16_dinov3").state_dict().items())
    save_file(tensors, tmp_path / "model.safetensors")
    stated = {"global_pool": "avg", "pretrained_cfg": {"input_size": [3, 32, 24]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    model = importing.recognised([tmp_path], Overrides(heads=3)).config.model
    assert (model.image_size, model.pool) == ((32, 24), "mean")


def test_meta_s_own_file(tmp_path, rng):
    peer, path = hf_peer(), tmp_path / "dinov3.pth"
    own = meta_names(peer, rng)
    torch.save({name: torch.tensor(x) for name, x in own.items()}, path)
    images = images_of((16, 24), rng)
    found = importing.recognised([path], Overrides(image_size=(16, 24)))
    want = hf_tokens(peer, images)[:, 0]
    assert_close("Meta's file", features(found, images), want, FORWARD)
    said = "\n".join(found.described)
    for name in ("mask_token", "rope_embed.periods", "local_cls_norm.weight"):
        assert re.search(rf"{re.escape(name)}: ignored", said), name
    for part in ("ls1.gamma", "attn.qkv.bias_mask"):  # of all blocks, or none
        lacking = {name: x for name, x in own.items() if name != f"blocks.1.{part}"}
        save_file(lacking, tmp_path / "lacking.safetensors")
        with pytest.raises(UserError, match=rf"'blocks\.1\.{re.escape(part)}' is missing"):
            importing.recognised([tmp_path / "lacking.safetensors"])
    lacking = {name: x for name, x in own.items() if name != "storage_tokens"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(UserError, match="'register_tokens' is missing"):
        importing.recognised([tmp_path / "lacking.safetensors"])
    save_file(own | {"rope_embed.periods": np.float32([1, 9])}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"rope_embed\.periods.*100"):
        importing.recognised([tmp_path / "other.safetensors"])


GATED = {
    "transformers": lambda: hf_peer(use_gated_mlp=True),
    "timm": lambda: timm_peer("vit_small_plus_patch16_dinov3"),
}


@pytest.mark.parametrize("peer", GATED.values(), ids=list(GATED))
def test_gated_mlps_are_refused(tmp_path, peer):
    save_file(arrays(peer().state_dict().items()), tmp_path / "plus.safetensors")
    with pytest.raises(UserError, match="a SwiGLU MLP"):
        importing.recognised([tmp_path / "plus.safetensors"], Overrides(heads=3))


@pytest.mark.parametrize("kind", ["rope", "rope_ape", "rope_mixed"])
def test_rotary_positions_of_another_kind_are_refused(tmp_path, kind):
    """They turn other pairs of channels, by other angles: no tensor says so."""
    peer = timm_peer(f"vit_small_patch16_{kind}_224", num_reg_tokens=0)
    save_file(arrays(peer.state_dict().items()), tmp_path / "rope.safetensors")
    with pytest.raises(UserError, match="rotary positions"):
        importing.recognised([tmp_path / "rope.safetensors"], Overrides(heads=3))


def test_the_exported_file_goes_back_in(tmp_path, monkeypatch, rng):
    peer, run = hf_peer(), tmp_path / "run"
    peer.save_pretrained(tmp_path / "peer")
    run_convert(monkeypatch, "import", tmp_path / "peer", run)
    images = images_of((16, 16), rng)
    want = hf_tokens(peer, images)[:, 0]
    for format, name in (("hf", "folder"), ("timm", "file.safetensors")):
        run_convert(monkeypatch, "export", run, tmp_path / name, f"--format={format}")
        found = importing.recognised([tmp_path / name])
        assert_close(f"{format}, again", features(found, images), want, FORWARD)
    assert "key_bias" in (tmp_path / "folder/config.json").read_text()
    assert load_file(tmp_path / "folder/model.safetensors")["layer.0.layer_scale1.lambda1"].all()
