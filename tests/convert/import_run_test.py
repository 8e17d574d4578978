"""Runs that start from files, evaluations of files, and features of files. Without PyTorch."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maect_jax
from maect_jax import config as configs
from maect_jax.convert import importing, names, tensors
from maect_jax.convert.__main__ import read_run
from maect_jax.errors import UserError
from maect_jax.evals.classifier import Classifier, fold_batch_norm
from maect_jax.evals.features import Features
from maect_jax.models import positions, vit
from tests.helpers import CONFIGS, SMALL
from tests.helpers import golden_figures as figures
from tests.helpers.common import assert_trees_equal, run_on
from tests.helpers.foreign_files import CT, assert_peak_of_import_below, stated
from tests.helpers.rows import row_of


def test_a_file_is_evaluated_under_its_name_with_its_classifier(tmp_path, monkeypatch, rng):
    """`init_from=FILE` of the evaluation: an encoder and a probe of the packaged images."""
    width, model = 32, dict(width=32, depth=2, heads=2, patch_size=7)
    params = vit.ViT(**model).init(jax.random.key(0), np.zeros((1, 28, 28, 1)))["params"]
    encoder = names.encoder_to_torch(jax.device_get(params), 7, (4, 4))
    probe = {
        "layer.1.running_mean": rng.normal(size=width).astype(np.float32),
        "layer.1.running_var": rng.uniform(0.5, 2, width).astype(np.float32),
        "layer.1.num_batches_tracked": np.int64(5)[None],
        "layer.2.weight": rng.normal(size=(10, width)).astype(np.float32),
        "layer.2.bias": rng.normal(size=10).astype(np.float32),
    }
    tensors.write(tmp_path / "vit7.safetensors", encoder, metadata={
        "num_attention_heads": "2", "layer_norm_eps": "1e-6"})  # fmt: skip
    tensors.write(tmp_path / "probe.safetensors", probe)
    both = f"{tmp_path / 'vit7.safetensors'},{tmp_path / 'probe.safetensors'}"
    settings = (f"init_from={both}", "eval.protocols=('knn',)", "data.train_split=train[80%:]",
                "monitor.every=0", "eval.dtype=float32")  # fmt: skip
    workdir = tmp_path / "eval"
    run_on(monkeypatch, (1, 2), configs.load(str(CONFIGS / "eval.py:test"), settings), workdir)
    results = json.loads((workdir / "results.json").read_text())
    assert list(results) == ["vit7"]
    x, labels = (np.load(workdir / f"features/vit7/val/{n}.npy") for n in ("x", "labels"))
    normal = (x - probe["layer.1.running_mean"]) / np.sqrt(probe["layer.1.running_var"] + 1e-5)
    scores = normal @ probe["layer.2.weight"].T + probe["layer.2.bias"]
    imported = importing.recognised(importing.paths_of(both))
    parts = imported.read()
    own = {key: parts[key]["classifier"] for key in ("params", "batch_stats")}
    kernel, bias = fold_batch_norm(own, imported.config.probe.bn_eps)
    np.testing.assert_allclose(x @ kernel + bias, scores, rtol=1e-3, atol=1e-3)
    found = results["vit7"]["classifier"]
    assert found["top1"] == pytest.approx((scores.argmax(1) == labels).mean(), abs=1e-3)
    assert (found["classes"], found["images"]) == (10, len(labels))
    origins = json.loads((workdir / "origin.json").read_text())["from"]
    assert [entry["file"] for entry in origins] == ["vit7.safetensors", "probe.safetensors"]
    assert len(origins[0]["sha256"]) == 64
    # The same command with another file under the name is refused, and notes nothing.
    tensors.write(
        tmp_path / "probe.safetensors", probe | {"layer.2.bias": probe["layer.2.bias"] + 1}
    )
    before, settings = (workdir / "config.json").read_text(), [*settings, "log_every=7"]
    with pytest.raises(UserError, match=r"probe\.safetensors: is another file than"):
        run_on(monkeypatch, (1, 2), configs.load(str(CONFIGS / "eval.py:test"), settings), workdir)
    assert (workdir / "config.json").read_text() == before
    assert json.loads((workdir / "origin.json").read_text())["from"] == origins


def test_a_classifier_of_other_classes_is_skipped(rng):
    features = {"val": Features(rng.normal(size=(6, 4)), np.arange(6) % 3, np.arange(6))}
    kernel, bias = rng.normal(size=(4, 1000)), np.zeros(1000)
    row = row_of(features, None, classifier=(kernel, bias))
    assert re.search(r"\b1000 .*\b3\b", Classifier().skip_reason(row))


def test_load_encoder_takes_pixels_as_they_come(tmp_path, rng):
    path = tmp_path / "encoder.safetensors"
    about = {"num_attention_heads": str(CT.meta["heads"]), "layer_norm_eps": "1e-6"}
    tensors.write(path, CT.under("init/encoder/"), metadata=about)
    encoder = maect_jax.load_encoder(path, image_size=CT.image_size, pool="mean")
    pixels = rng.integers(0, 256, (3, *CT.image_size, 3), dtype=np.uint8)
    got = encoder(pixels)
    assert got.shape == (3, encoder.width) == (3, CT.meta["width"])
    np.testing.assert_allclose(encoder(pixels / np.float32(255)), got, rtol=1e-5, atol=1e-5)
    params = importing.recognised([path], stated(CT)).read()["params"]["encoder"]
    module = vit.ViT(CT.meta["width"], CT.meta["depth"], CT.meta["heads"], CT.meta["patch_size"])
    x = (pixels / 255 - np.array(encoder.mean)) / np.array(encoder.std)
    want = vit.pool(module, module.apply({"params": params}, x.astype(np.float32)), "mean")
    figures.assert_close("load_encoder", got, want, figures.FORWARD)
    with pytest.raises(ValueError, match=r"images of shape \(3, 5, 5, 3\): must be \(B, "):
        encoder(np.zeros((3, 5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="images of int64: must be uint8"):
        encoder(np.zeros((3, *CT.image_size, 3), int))
    with pytest.raises(ValueError, match="floats from 0 to 1"):
        encoder(200 * np.ones((3, *CT.image_size, 3), np.float32))
    with pytest.raises(ValueError, match=r"from 0 to 200: .* floats from 0 to 1"):
        encoder(jnp.zeros((3, *CT.image_size, 3)).at[0, 0].set(200))
    with pytest.raises(ValueError, match="images of uint16: must be uint8"):
        encoder(np.zeros((3, *CT.image_size, 3), np.uint16))
    for settings, message in (
        (dict(pool="max"), "pool='max': must be one of cls, mean, fc_norm"),
        (dict(dtype="int8"), "dtype='int8': must be one of float32, bfloat16"),
        (dict(image_size=7), r"image_size=\(7,\): must be \(height, width\)"),
        (dict(heads=-2), "heads is -2, must be a number above 0"),
        (dict(mean=(0.5,)), "give the mean and std of its 3 channels"),
    ):
        with pytest.raises(UserError, match=message):
            maect_jax.load_encoder(path, **settings)


def test_an_import_takes_less_memory_than_twice_the_file(tmp_path, rng):
    """An encoder of 225 MB, random and of no known width."""
    path, model = tmp_path / "large.safetensors", dict(width=640, depth=11, heads=10, patch_size=16)
    shapes = jax.eval_shape(vit.ViT(**model).init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    params = jax.tree.map(lambda s: rng.random(s.shape, np.float32), shapes["params"])
    tensors.write(path, names.encoder_to_torch(params, 16, (4, 4)))
    size = path.stat().st_size / 1024
    assert size > 200_000
    assert_peak_of_import_below(2 * size, path, tmp_path / "run")
    assert_trees_equal(read_run(tmp_path / "run").encoder, params)


def test_a_stage_starts_from_a_file_at_another_image_size(tmp_path, monkeypatch):
    """`init_from=FILE` of a stage; the encoder is the file's, its positions resized."""
    module = vit.ViT(width=32, depth=4, heads=2, patch_size=7)
    params = jax.jit(module.init)(jax.random.key(1), np.zeros((1, 14, 14, 1)))["params"]
    about = {"num_attention_heads": "2", "layer_norm_eps": "1e-6"}
    path = tmp_path / "small.safetensors"
    tensors.write(path, names.encoder_to_torch(jax.device_get(params), 7, (2, 2)), metadata=about)
    name, workdir = str(CONFIGS / "head_vith14.py:test"), tmp_path / "head"
    run_on(monkeypatch, (1, 2), configs.load(name, [f"init_from={path}", SMALL]), workdir)
    found = read_run(workdir)
    assert found.stage == "head"
    want = positions.resize(positions.sincos((2, 2), 32), (2, 2), (4, 4))
    np.testing.assert_array_equal(found.encoder.pop("pos_embed"), want)
    assert_trees_equal(found.encoder, jax.device_get(params))
    # What the config says of its model must be the file's.
    for override, message in (("model.heads=4", "heads=2"), ("model.patch_size=14", "patch_size")):
        config = configs.load(name, [f"init_from={path}", override])
        with pytest.raises(UserError, match=message):
            run_on(monkeypatch, (1, 2), config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
