"""A run and its exports that version 0.1.0 has written are read, evaluated and resumed.

`fixtures/v0.1.0.tar.gz` holds a run of `configs/quickstart.py:test` on 1,600 images with a narrower
model (mae, head and ct; ct has the checkpoints of its two epochs), the exports of its average in
timm's and the authors' names, and the features that version 0.1.0 computed of four images.
"""

import json
import shutil
import tarfile

import jax
import numpy as np
import optax
import pytest

import maect_jax
from maect_jax import config
from maect_jax.convert import importing
from maect_jax.run import checkpoints
from maect_jax.stages import support_queue
from tests.helpers import ROOT
from tests.helpers.common import assert_trees_equal, mesh_of, run_on

CT = ("params", "frozen", "batch_stats", "ema", "target", "queue", "step")


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "fixtures" / "v0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def last(run):
    return checkpoints.read_parts(checkpoints.stage_folder(run, "ct"), CT, mesh_of(1, 1))


def distance(a, b):
    """The norm of the difference of two trees, over that of the second."""
    difference = optax.tree.sub(jax.device_get(a), jax.device_get(b))
    return optax.tree.norm(difference) / optax.tree.norm(b)


def test_features_of_a_run_and_of_an_export_are_the_same(old):
    with np.load(old / "features.npz") as saved:
        features = dict(saved)
    encoders = {
        "run": maect_jax.load_encoder(old / "run"),
        "exported": maect_jax.load_encoder(
            old / "encoder.safetensors", mean=(0.286,), std=(0.353,), heads=2, ln_eps=1e-6
        ),
    }
    for name, encoder in encoders.items():
        found = encoder(features["images"])
        np.testing.assert_allclose(found, features[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_authors_names_of_an_export_are_a_run_with_its_head(old):
    imported = importing.recognised([old / "maect.safetensors", old / "maect_head.safetensors"])
    assert imported.kind == "ct"
    parts, saved = imported.read(), last(old / "run")
    for theirs, ours in zip(
        support_queue.in_age_order(parts["queue"], 64),
        support_queue.in_age_order(saved["queue"], 64),
        strict=True,
    ):
        np.testing.assert_array_equal(theirs, ours)
    for part in ("projector", "predictor"):
        assert_trees_equal(parts["params"][part], jax.device_get(saved["params"][part]))
    assert_trees_equal(parts["target"], jax.device_get(saved["target"]))


def test_a_stopped_run_is_resumed_to_the_same_end(old, monkeypatch):
    """From the end of ct's first epoch; the evaluation follows, as its features are gone."""
    run, want = old / "run", last(old / "run")
    before = json.loads((run / "results.json").read_text())
    shutil.rmtree(checkpoints.stage_folder(run, "ct") / "16")
    start = last(run)
    run_on(monkeypatch, (1, 1), config.read(run / "config.json"), run, report=False)
    again, after = last(run), json.loads((run / "results.json").read_text())
    assert int(again["step"]) == 16
    for part in ("params", "ema", "target"):
        # Bit-equal on the machine that wrote it; unoptimised code rounds otherwise.
        assert distance(again[part], want[part]) < 0.1 * distance(again[part], start[part]), part
    np.testing.assert_array_equal(again["queue"].ids, want["queue"].ids)
    assert list(after) == list(before) == ["pixels", "mae", "ct"]
    for row in before:
        added = {"near"} if row == "ct" else set()
        assert after[row].keys() == before[row].keys() | added
        for mine, theirs in zip(after[row]["knn"], before[row]["knn"], strict=True):
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=5e-3)
