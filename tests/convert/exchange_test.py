"""Real models of timm and HuggingFace's transformers (extra `[peers]`): what they write is read,
and what is written they read."""

import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from maect_jax import load_encoder
from maect_jax.convert import importing
from maect_jax.convert.importing import Overrides
from maect_jax.models import positions
from tests.helpers import CONFIGS, FAST_RUN, ROOT
from tests.helpers.common import save
from tests.helpers.foreign_files import assert_same, run_convert
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.hub import serving
from tests.helpers.peers import (
    arrays,
    features,
    images_for,
    loaded,
    of_timm,
    perturbed,
    pixels,
    timm,
    timm_model,
    torch,
    transformers,
)

# By name, the arguments of timm's Vision Transformer, and the feature that is its own.
TIMM = {
    "class token": (dict(num_classes=0), "cls"),
    "classifier": (dict(num_classes=7), "cls"),
    "mean": (dict(num_classes=0, global_pool="avg", fc_norm=False), "mean"),
    "fc_norm": (dict(num_classes=5, global_pool="avg"), "fc_norm"),
    "grey": (dict(num_classes=0, in_chans=1), "cls"),
    "no class position": (dict(num_classes=0, no_embed_class=True), "cls"),
    "not square": (dict(num_classes=0, img_size=(16, 24)), "cls"),
    "other eps": (dict(num_classes=0, norm_layer=partial(torch.nn.LayerNorm, eps=1e-3)), "cls"),
}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize(("own", "pool"), TIMM.values(), ids=list(TIMM))
def test_timm_there_and_back(tmp_path, monkeypatch, rng, own, pool, ending):
    peer = timm_model(**own)
    path, run, out = tmp_path / f"peer.{ending}", tmp_path / "run", tmp_path / "out.safetensors"
    if ending == "pth":
        torch.save({"state_dict": peer.state_dict()}, path)
    else:
        save_file(arrays(peer.state_dict().items()), path)
    images, size = images_for(peer, rng), peer.patch_embed.img_size
    want = of_timm(peer, pixels(images))
    eps = peer.norm.eps if pool != "fc_norm" else 1e-6
    given = Overrides(heads=3, ln_eps=eps, image_size=size, pool=pool)
    found = importing.recognised([path], given)
    assert_close("timm features", features(found, images), want, FORWARD)
    flags = [f"--heads={given.heads}", f"--ln_eps={given.ln_eps}", f"--pool={pool}"]
    run_convert(monkeypatch, "import", path, run, *flags, f"--image_size={size[0]},{size[1]}")
    run_convert(monkeypatch, "export", run, out, "--format=timm")
    again = loaded(out, "timm")
    assert_close("timm features, exported", of_timm(again, pixels(images)), want, FORWARD)
    before, after = arrays(peer.state_dict().items()), arrays(again.state_dict().items())
    token = before["cls_token"]
    if before["pos_embed"].shape == after["pos_embed"].shape:
        token = token + before["pos_embed"][:, :1]
    np.testing.assert_array_equal(after.pop("cls_token"), token)
    patches = -before["patch_embed.proj.weight"].shape[0] and after["pos_embed"].shape[1] - 1
    np.testing.assert_array_equal(after.pop("pos_embed")[:, 1:], before["pos_embed"][:, -patches:])
    assert_same(after, {n: x for n, x in before.items() if n not in ("cls_token", "pos_embed")})


def hf_config(kind, **own):
    return kind(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=16, patch_size=4, **own,
    )  # fmt: skip


DECODER = dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=64,
)  # fmt: skip
HF = {
    "ViTModel": (transformers.ViTModel, hf_config(transformers.ViTConfig)),
    "ViTForImageClassification": (
        transformers.ViTForImageClassification,
        hf_config(transformers.ViTConfig, num_labels=4),
    ),
    "ViTMAEModel": (
        transformers.ViTMAEModel,
        hf_config(transformers.ViTMAEConfig, mask_ratio=0.0, **DECODER),
    ),
    "ViTMAEForPreTraining": (
        transformers.ViTMAEForPreTraining,
        hf_config(transformers.ViTMAEConfig, mask_ratio=0.0, **DECODER),
    ),
}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("kind", "config"), HF.values(), ids=list(HF))
def test_transformers_there_and_back(tmp_path, monkeypatch, rng, kind, config, binary):
    peer = perturbed(kind(config))
    folder, run, out = tmp_path / "peer", tmp_path / "run", tmp_path / "out"
    peer.save_pretrained(folder)
    if binary:
        (folder / "model.safetensors").unlink()
        torch.save(peer.state_dict(), folder / "pytorch_model.bin")
    images = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    inner = getattr(peer, "vit", peer)
    with torch.no_grad():
        want = inner(pixel_values=pixels(images)).last_hidden_state[:, 0].numpy()
    found = importing.recognised([folder])
    assert_close("transformers features", features(found, images), want, FORWARD)
    run_convert(monkeypatch, "import", folder, run)
    run_convert(monkeypatch, "export", run, out, "--format=hf")
    classifies = kind is transformers.ViTForImageClassification
    loader = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    again = loaded(out, "hf", loader)
    with torch.no_grad():
        got = getattr(again, "vit", again)(pixel_values=pixels(images))
        if classifies:
            np.testing.assert_array_equal(again.classifier.weight, peer.classifier.weight)
        else:
            np.testing.assert_array_equal(got.pooler_output, got.last_hidden_state[:, 0])
    assert_close("transformers features, exported", got.last_hidden_state[:, 0], want, FORWARD)
    # Every tensor of the encoder, bit for bit, but the class token and its position.
    before = arrays(inner.state_dict().items())
    after = arrays(getattr(again, "vit", again).state_dict().items())
    token, position = "embeddings.cls_token", "embeddings.position_embeddings"
    np.testing.assert_array_equal(after[token], before[token] + before[position][:, :1])
    np.testing.assert_array_equal(after[position][:, 1:], before[position][:, 1:])
    assert not after[position][:, 0].any()
    rest = {n for n in before if n not in (token, position) and not n.startswith("pooler")}
    assert_same({n: after[n] for n in rest}, {n: before[n] for n in rest})


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((7, 5), (4, 9)), ((3, 3), (1, 2))])
def test_positions_are_resized_as_pytorch_does(rng, old, new, smooth):
    table = rng.normal(size=(old[0] * old[1], 8)).astype(np.float32)
    grid = torch.tensor(table.reshape(1, *old, 8).transpose(0, 3, 1, 2))
    want = torch.nn.functional.interpolate(
        grid, new, mode="bicubic", align_corners=False, antialias=smooth
    )
    want = want.numpy().transpose(0, 2, 3, 1).reshape(-1, 8)
    assert_close("resized positions", positions.resize(table, old, new, smooth), want, 1e-6)


@pytest.mark.slow
def test_the_documents_commands_go_all_the_way(tmp_path):
    """From an MAE to timm, by the commands of docs/exchange.md; then the README's features, of the
    tiny run that these have made."""
    commands, example = (
        re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)[1]
        for file, name in (("docs/exchange.md", "exchange commands"), ("README.md", "features"))
    )
    example = example.replace("runs/quickstart", "runs/quickstart_test")
    (tmp_path / "configs").symlink_to(CONFIGS)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for script in (["bash", "-euo", "pipefail", "-c", commands], [sys.executable, "-c", example]):
        done = subprocess.run(
            script, cwd=tmp_path, capture_output=True, text=True, timeout=900,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_RUN},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(8, 32) (28, 28) (0.286,) (0.353,)")
    assert "Trained from random weights" in (tmp_path / "mae.safetensors.md").read_text()
    card = (tmp_path / "tuned.safetensors.md").read_text()
    for text in (
        "the moving average of its weights",
        "`mae.safetensors`",
        "k-means ACC",
        "img_size",
    ):
        assert text in card


# A stage of a config in a moment.
SHORT = (
    "epochs=1", "batch_size=32", "queue_size=64", "projector_hidden=64", "projector_out=32",
    "predictor_hidden=64",
)  # fmt: skip


@pytest.mark.slow
def test_the_documents_commands_go_from_an_id_of_the_hub_to_timm(tmp_path):
    """With a tiny model under the name of the public one, on a server of its own."""
    text = (ROOT / "docs/exchange.md").read_text()
    commands = re.search(r"<!-- hub commands -->\n```bash\n(.*?)```", text, re.DOTALL)[1]
    named = re.search(r"hf://(\S+)", commands)[1]
    public, tiny = "'vit_base_patch16_224', ", dict(img_size=32, patch_size=8, depth=2)
    sizes = ", ".join(f"{key}={value}" for key, value in tiny.items())
    assert public in commands
    commands = commands.replace(public, f"'vit_tiny_patch16_224', {sizes}, ")
    settings = [f"{stage}.{key}" for stage in ("head", "ct") for key in SHORT]
    settings += ["eval.protocols=('knn',)", "eval.knn.k=(1,)", "eval.map=pca", "monitor.every=0"]
    flags = shlex.join(f"--config.{setting}" for setting in settings)
    commands = commands.replace("maect run ", f"maect run {flags} ")
    for i in range(160):
        split = "val" if i % 2 else "train"
        save(tmp_path / f"my_images/{split}/{i // 2 % 2}/{i}.png", (40, 36), i)
    imagenet = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # as MAE's have it
    peer = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **tiny, pretrained_cfg_overlay=imagenet
    )
    timm.models.save_for_hf(peer, tmp_path / "peer", safe_serialization="both")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "configs").symlink_to(CONFIGS)
    with serving() as hub:
        commit = hub.commit(named, {x.name: x.read_bytes() for x in (tmp_path / "peer").iterdir()})
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, capture_output=True,
            text=True, timeout=900, env=os.environ | own | {"PATH": path, "XLA_FLAGS": FAST_RUN},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert sorted(hub.sent) == ["config.json", "model.safetensors"]  # and no pickle
    card = (tmp_path / "tuned.safetensors.md").read_text()
    assert f"`hf://{named}@{commit}/model.safetensors`" in card
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        **tiny,
        checkpoint_path=tmp_path / "tuned.safetensors",
    ).eval()  # as the documents do
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    encoder = load_encoder(tmp_path / "runs/tune_my_images")
    normal = (images - np.float32(encoder.mean)) / np.float32(encoder.std)
    with torch.no_grad():
        assert_close("timm features, tuned", encoder(images), model(pixels(normal)).numpy(), 1e-5)
