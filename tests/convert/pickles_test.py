"""PyTorch's own files (extra `[peers]`): old and new, odd, cut short, and malicious."""

import argparse
import datetime
import json
import os
import pathlib
import pickle
import re
from functools import partial

import numpy as np
import pytest

from maect_jax import load_encoder
from maect_jax.convert import importing
from maect_jax.convert.importing import Overrides
from maect_jax.errors import UserError
from maect_jax.evals.classifier import fold_batch_norm
from maect_jax.models import vit
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


@pytest.mark.parametrize(
    "entries",
    ["state_dict_ema state_dict", "model_ema model", "model state_dict", "ema model",
     "model_ema state_dict_ema", "state_dict ema_model module"],
)  # fmt: skip
def test_of_several_models_that_is_taken_which_timm_loads(tmp_path, entries):
    path, tensors = tmp_path / "several.pth", timm_model(num_classes=0).state_dict()
    saved = {
        name: tensors | {"norm.bias": torch.full((24,), float(i))}
        for i, name in enumerate(entries.split())
    }
    torch.save(saved, path)
    found = importing.recognised([path], Overrides(heads=3, ln_eps=1e-6))
    want = timm.models.load_state_dict(path)["norm.bias"].numpy()
    np.testing.assert_array_equal(found.parts["encoder"]["norm.bias"], want)
    assert "also there" in found.notes[0]


class Config(dict):
    """As OmegaConf's nodes: a class that only its library can build."""


@pytest.mark.parametrize("zipped", [True, False], ids=["new", "old"])
def test_plain_values_of_other_classes_are_let_be_and_others_named(tmp_path, zipped):
    path, tensors = tmp_path / "state.pth.tar", timm_model(num_classes=0).state_dict()
    beside = {
        "best": np.float64(0.8),
        "rng": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(path=pathlib.Path("/data"), size=np.int64(3)),
    }
    save = partial(torch.save, f=path, _use_new_zipfile_serialization=zipped)
    save({"model": tensors, **beside})
    found = importing.recognised([path], Overrides(heads=3, ln_eps=1e-6)).read()
    weight = found["params"]["encoder"]["norm"]["scale"]
    np.testing.assert_array_equal(weight, tensors["norm.weight"].numpy())
    for value, name in (
        (Config(lr=1), f"{__name__}.Config"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (datetime.date(2020, 1, 1), "datetime.date"),
    ):
        save({"model": tensors, "extra": value})
        with pytest.raises(UserError, match=f"holds {re.escape(name)}, ") as error:
            importing.recognised([path])
        assert "weights_only=False)['model'], 'weights.pth')" in str(error.value)
    save({"model": tensors}, pickle_protocol=4)
    with pytest.raises(UserError, match="a pickle of protocol 4 or later"):
        importing.recognised([path])


def probe_of_authors(width, classes, pooling):
    """As their code writes it: the normalisation is registered under two names."""
    probe = torch.nn.Module()
    probe.norm = torch.nn.BatchNorm1d(width, affine=False)
    probe.layer = torch.nn.Sequential(
        torch.nn.Flatten(1), probe.norm, torch.nn.Linear(width, classes)
    )
    probe.norm.running_mean.normal_()
    probe.norm.running_var.uniform_(0.5, 2)
    kwargs = {"pooling": {"kind": pooling}, "nonaffine_batchnorm": True, "kind": "heads.linear"}
    return probe.eval(), {"state_dict": probe.state_dict(), "ctor_kwargs": kwargs}


ENCODER_KWARGS = {
    "patch_size": (4, 4), "embedding_dim": 24, "depth": 2, "attention_heads": 3,
    "drop_path_rate": 0.2, "kind": "vit.masked_encoder", "optim_ctor": {"lr": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize(("pooling", "pool"), [("class_token", "cls"), ("mean_patch", "mean")])
def test_an_authors_probe_classifies_as_in_pytorch(tmp_path, rng, pooling, pool):
    peer = timm_model(num_classes=0, no_embed_class=True)
    probe, saved = probe_of_authors(24, 5, pooling)
    paths = tmp_path / "encoder cp=last model.th", tmp_path / "probe.th"
    torch.save({"state_dict": peer.state_dict(), "ctor_kwargs": ENCODER_KWARGS}, paths[0])
    torch.save(saved, paths[1])
    found = importing.recognised(paths)  # asks for nothing
    model = found.config.model
    assert (found.kind, model.pool, model.ln_eps, vit.size_of(model).heads) == (
        "probe", pool, 1e-6, 3)  # fmt: skip
    images, parts = images_for(peer, rng), found.read()
    with torch.no_grad():
        tokens = peer.forward_features(pixels(images))
        want = probe.layer(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)).numpy()
    own = {key: parts[key]["classifier"] for key in ("params", "batch_stats")}
    kernel, bias = fold_batch_norm(own, found.config.probe.bn_eps)
    assert_close("an authors' probe", features(found, images) @ kernel + bias, want, FORWARD)


def test_what_an_authors_probe_contradicts_is_one_clear_line(tmp_path):
    peer = timm_model(num_classes=0, no_embed_class=True)
    encoder, path = tmp_path / "encoder.th", tmp_path / "probe.th"

    def refused(message, probe, kwargs=ENCODER_KWARGS, **given):
        torch.save({"state_dict": peer.state_dict(), "ctor_kwargs": kwargs}, encoder)
        torch.save(probe, path)
        with pytest.raises(UserError, match=message):
            importing.recognised([encoder, path], Overrides(**given))

    saved = probe_of_authors(24, 5, "mean_patch")[1]
    refused(r"probe\.th: ctor_kwargs\.pooling\.kind .*'mean'; --pool is 'cls'", saved, pool="cls")
    refused(
        "kind is 'mean_all', must be one of class_token", probe_of_authors(24, 5, "mean_all")[1]
    )
    stats = {name: x.clone() for name, x in saved["state_dict"].items()}
    stats["norm.running_var"] += 1
    refused(
        r"probe\.th: 'norm\.running_var' and 'layer\.1\.running_var' must be equal",
        saved | {"state_dict": stats},
    )
    for key, value in (("attention_heads", "many"), ("depth", 5), ("patch_size", [4, 8])):
        refused(
            rf"encoder\.th: ctor_kwargs\.{key} is .* must be", saved, ENCODER_KWARGS | {key: value}
        )


def test_weights_of_a_folder_in_parts_may_be_pickles(tmp_path):
    folder, own = tmp_path / "hf", timm_model(num_classes=0).state_dict()
    folder.mkdir()
    parts = [dict(list(own.items())[i::2]) for i in (0, 1)]
    places = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = importing.recognised([folder], Overrides(heads=3, ln_eps=1e-6))
    assert found.read()["params"]["encoder"]["norm"]["scale"].shape == (24,)
    assert "PyTorch, in parts" in found.described[0]
    before = found.origin()[0]["sha256"]
    torch.save({name: x + 1 for name, x in parts[1].items()}, folder / "pytorch_model-1.bin")
    assert found.origin()[0]["sha256"] != before


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
        (itself, "holds no tensors of PyTorch by name"),
        ({"model": [1, 2]}, "holds no tensors of PyTorch by name"),
        ({"model": {"norm.bias": np.zeros(24)}}, "holds no tensors of PyTorch by name"),
        (tensors | {"norm.bias": torch.zeros(24, device="meta")}, "'norm.bias' must hold floats"),
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
