"""data2vec 2 as MIM-Refiner refines and publishes it: a ViT with the norms behind the branches.

No installed library has that network: the peer below is written from its description (norms with
eps 1e-6 behind the embedding and behind each sum, none at the end), under the names of its files.
"""

import numpy as np
import pytest

from maect_jax.convert import importing
from maect_jax.convert.importing import Overrides
from maect_jax.errors import UserError
from maect_jax.models import positions
from tests.helpers.foreign_files import run_convert
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.peers import features, perturbed, pixels, torch

nn = torch.nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        parts = {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        self.attn = nn.ModuleDict(parts)
        parts = {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.ModuleDict(parts)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.attn["qkv"](x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(b, n, d)
        x = self.norm1(x + self.attn["proj"](y))
        return self.norm2(x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](x))))


class PostNormViT(nn.Module):
    def __init__(self, size=(16, 16), patch=4, width=24, depth=2, heads=3):
        super().__init__()
        grid = size[0] // patch, size[1] // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_tokens = nn.ParameterDict({"tokens": torch.randn(1, 1, width)})
        self.pos_embed = nn.Module()
        table = torch.tensor(positions.sincos(grid, width)).view(1, *grid, width)
        self.pos_embed.register_buffer("embed", table)
        self.embed_norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))

    def forward(self, images):
        x = self.patch_embed["proj"](images).permute(0, 2, 3, 1) + self.pos_embed.embed
        x = torch.cat([self.cls_tokens["tokens"].expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        return self.blocks(self.embed_norm(x))


def peer_of(**own):
    torch.manual_seed(0)
    return perturbed(PostNormViT(**own))


@pytest.mark.parametrize(("size", "pool"), [((16, 16), "cls"), ((16, 24), "mean")])
def test_a_post_norm_file(tmp_path, monkeypatch, rng, size, pool):
    peer, path, run = peer_of(size=size), tmp_path / "d2v2.th", tmp_path / "run"
    torch.save({"state_dict": peer.state_dict()}, path)
    images = rng.normal(size=(3, *size, 3)).astype(np.float32)
    with torch.no_grad():
        tokens = peer(pixels(images)).numpy()
    want = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    found = importing.recognised([path], Overrides(heads=3, ln_eps=1e-6, pool=pool))
    assert found.config.model.post_norm
    assert_close("post-norm features", features(found, images), want, FORWARD)
    run_convert(monkeypatch, "import", path, run, "--heads=3", "--ln_eps=1e-6", f"--pool={pool}")
    out = tmp_path / "again.th"
    run_convert(monkeypatch, "export", run, out, "--format=maect")
    given = Overrides(heads=3, ln_eps=1e-6, pool=pool)
    again = features(importing.recognised([out], given), images)
    assert_close("post-norm features, exported", again, want, FORWARD)
    written = torch.load(out, weights_only=True)["state_dict"]
    for name, x in peer.state_dict().items():
        np.testing.assert_array_equal(written.pop(name), x, err_msg=name)
    assert not written
    for format, name in (("timm", "x.safetensors"), ("hf", "x"), ("mae", "y.safetensors")):
        with pytest.raises(UserError, match=f"{format}: has no post-norm blocks; use maect"):
            run_convert(monkeypatch, "export", run, tmp_path / name, f"--format={format}")
    with pytest.raises(UserError, match="fc_norm"):
        importing.recognised([path], Overrides(heads=3, ln_eps=1e-6, pool="fc_norm"))
