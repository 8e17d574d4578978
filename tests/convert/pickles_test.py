"""PyTorch's own files (extra `[peers]`): old and new, odd, cut short, and malicious."""

import argparse
import os
import pickle

import pytest

from maect_jax import load_encoder
from maect_jax.convert import importing
from maect_jax.convert.importing import Overrides
from maect_jax.errors import UserError
from tests.helpers.foreign_files import assert_peak_of_import_below, run_convert
from tests.helpers.golden_figures import FORWARD, assert_close
from tests.helpers.peers import features, images_for, pixels, timm, timm_model, torch


def test_half_precision_and_old_pickles_are_read(tmp_path, rng):
    peer = timm_model(num_classes=0).half()
    images = images_for(peer, rng)
    given = Overrides(heads=3, ln_eps=1e-6)
    found = {}
    for name, saved in (
        ("new.pth", dict(_use_new_zipfile_serialization=True)),
        ("old.pth", dict(_use_new_zipfile_serialization=False)),
    ):
        # As MAE's own training writes it: with its command line beside the weights.
        content = {"model": peer.state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 3}
        torch.save(content, tmp_path / name, **saved)
        found[name] = features(importing.recognised([tmp_path / name], given), images)
    with torch.no_grad():
        want = peer.float().forward_head(peer.forward_features(pixels(images)), pre_logits=True)
    for got in found.values():
        assert_close("half precision", got, want.numpy(), FORWARD)


class Malicious:
    """Runs a command where a careless reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, how):
    trap, path = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"model": {"cls_token": torch.zeros(1)}, "extra": Malicious(trap)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    for _ in range(2):
        with pytest.raises(UserError) as error:
            run_convert(monkeypatch, "import", path, tmp_path / "run")
        assert str(error.value).startswith(f"{path}: refused")
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="refused"):
            load_encoder(path)
    assert not trap.exists()
    assert not (tmp_path / "run").exists()
    # The trap works where it is sprung.
    if how == "pickle":
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_a_pickle_cut_short_is_one_clear_line(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": timm_model().state_dict()}, path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            importing.recognised([path], Overrides(heads=3, ln_eps=1e-6)).read()
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def test_odd_pickles_are_one_clear_line(tmp_path):
    path, tensors = tmp_path / "odd.pth", timm_model().state_dict()
    itself = {}
    itself["model"] = itself
    eighth = tensors | {"norm.bias": torch.zeros(24, dtype=torch.float8_e4m3fn)}
    for content, message in (
        (itself, "holds no tensors by name"),
        ({"model": [1, 2]}, "holds no tensors by name"),
        ([1, 2], "holds list, not tensors by name"),
        (eighth, "'norm.bias' must hold floats of 16, 32 or 64 bits"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            importing.recognised([path], Overrides(heads=3, ln_eps=1e-6))
    # Parameters, not only tensors: what named_parameters() gives.
    torch.save(dict(timm_model(num_classes=0).named_parameters()), path)
    importing.recognised([path], Overrides(heads=3, ln_eps=1e-6)).read()


@pytest.mark.slow
def test_an_import_of_a_pickle_takes_less_memory_than_twice_the_file(tmp_path):
    path, width = tmp_path / "large.pth", 640
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, embed_dim=width, depth=11, num_heads=10, num_classes=0
    )
    torch.save(model.state_dict(), path)
    size = path.stat().st_size / 1024
    assert size > 200_000
    assert_peak_of_import_below(2 * size, path, tmp_path / "run")
