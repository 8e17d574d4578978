"""A run of two processes equals that of one; stopped on one host, it stops and resumes on both.

Marked slow: the updates of the head, which those of ct contain, and the evaluation.
"""

import json
import os
import signal
import subprocess

import jax
import numpy as np
import pytest

from maect_jax import config
from maect_jax.evals import features, runner
from maect_jax.run import checkpoints, jsonl
from tests.helpers import CONFIGS, SMALL
from tests.helpers.commands import metrics_of
from tests.helpers.common import mesh_of, run_on, wait_for_step
from tests.helpers.golden_figures import FORWARD, GRADIENT, assert_close
from tests.helpers.hosts import pod

# Twelve updates an epoch of the autoencoder, whose two epochs the first run does not finish; three
# of the other stages.
# Rates are low: where a gradient is zero by construction Adam makes full-size updates of its
# rounding, and those of the projector's last bias reach the look-up and all gradients that follow
# (golden/README.md): by 7e-4 at a rate of 1e-5. Of the gradients Adam's moments are compared, which
# have no rate in them. One neighbour, as rounding flips the order of some among twenty
# thousand.
SETTINGS = (
    SMALL, "log_every=1", "monitor.every=2", "mesh.fsdp=2", "mae.epochs=2",
    "mae.batch_size=128", "head.batch_size=512", "ct.batch_size=512",
    "head.queue_size=1024", "ct.queue_size=1024", "ct.top_k=1", "eval.batch_size=512",
    "eval.protocols=('knn','probe','probe_augmented','lowshot','cluster')",
    "eval.lowshot.images=(5,)", "eval.lowshot.shares=()", "eval.lowshot.splits=1",
    "eval.probe.epochs=1", "eval.cluster.runs=2", "eval.map=pca",
    "mae.base_lr=1e-5", "head.base_lr=1e-7", "ct.base_lr=1e-5", "ct.head_base_lr=1e-7",
    # The last bit of colours depends on how a program is compiled, which can change a neighbour.
    "head.photometric.jitter=0.,0.", "ct.photometric.jitter=0.,0.",
)  # fmt: skip
STAGES = ("mae", "head", "ct")
TRAINED = (*SETTINGS, f"stages={STAGES}")


@pytest.fixture(scope="module")
def pod_run(tmp_path_factory):
    """A run of two processes, stopped in the middle of mae and taken up again."""
    folder = tmp_path_factory.mktemp("pod")
    workdir = folder / "run"
    with pod(workdir, folder / "first", TRAINED) as process:
        wait_for_step(workdir, 4, process)
        # One of the two machines is about to be taken away.
        children = ["pgrep", "-P", str(process.pid)]
        pids = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(pids[-1]), signal.SIGTERM)
        stopped = process.wait(60), (folder / "first").read_text(), metrics_of(workdir)[-1]
    with pod(workdir, folder / "second", TRAINED) as process:
        assert process.wait(400) == 0, (folder / "second").read_text()
    return workdir, (folder / "second").read_text(), stopped


def alone(monkeypatch, workdir, *settings):
    """The same in this process, on four devices."""
    alike = config.load(str(CONFIGS / "quickstart.py:test"), [*SETTINGS, *settings])
    run_on(monkeypatch, (2, 2), alike, workdir, report=False)
    return workdir


# Tensors whose gradient is zero by construction, and the means that they shift.
ZERO = ("encoder/norm/bias", "projector/bn3/bias", "projector/bn1/mean", "predictor/bn1/mean")


def state_of(workdir, stage):
    """What a stage left: arrays by name, without `ZERO` and the keys' third of each qkv bias."""
    parts = ("params", "opt_state", "batch_stats", "ema", "target", "queue")
    folder = checkpoints.stage_folder(workdir, stage)
    saved = checkpoints.read_parts(folder, parts, mesh_of(1, 1))
    found = {}
    for path, x in jax.tree.leaves_with_path(saved):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("qkv/bias"):
            found[f"{name}[q]"], _, found[f"{name}[v]"] = np.split(np.asarray(x), 3, axis=-1)
        elif stage == "mae" or not name.endswith(ZERO):
            found[name] = np.asarray(x)
    return found


def losses_of(workdir, stage):
    own = [e for e in metrics_of(workdir) if e["stage"] == stage]
    return [(e["step"], e["loss"]) for e in own if "loss" in e]


def test_two_processes_go_on_after_a_stop_and_tell_everything_once(pod_run):
    workdir, output, stopped = pod_run
    status, told, last = stopped
    assert status == 75
    assert last["stage"] == "mae"
    assert 4 <= last["step"] < 24
    saved = f"preempted, resumable: stage mae is saved at step {last['step']} of 24"
    assert told.count(saved) == 2  # both, at the same step
    assert told.count("SIGTERM: saving") == 1
    for stage, steps in (("mae", 24), ("head", 3), ("ct", 3)):
        assert [step for step, _ in losses_of(workdir, stage)] == list(range(1, steps + 1))
    assert [e["step"] for e in jsonl.read(workdir / "metrics.jsonl") if "knn_accuracy" in e] == [24]
    # Only the first process speaks.
    lines = output.splitlines()
    assert lines.count(str(workdir / "report.html")) == 1
    assert {"report.html", "pictures"} <= {p.name for p in workdir.iterdir()}
    environment = json.loads((workdir / "environment.json").read_text())
    assert (environment["hosts"], environment["devices"]) == (2, 4)


@pytest.mark.parametrize("stage", ["mae", pytest.param("head", marks=pytest.mark.slow), "ct"])
def test_their_updates_equal_those_of_one_process(pod_run, tmp_path, monkeypatch, stage):
    """From the same state: mae from its seed, the others from what the two processes left."""
    start = () if stage == "mae" else (f"init_from={pod_run[0]}",)
    one = alone(monkeypatch, tmp_path / stage, f"stages=('{stage}',)", *start)
    ours, theirs = losses_of(pod_run[0], stage), losses_of(one, stage)
    for (_, got), (_, want) in zip(ours, theirs, strict=True):
        assert_close("hosts, loss", got, want, FORWARD)
    got, want = state_of(pod_run[0], stage), state_of(one, stage)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if np.issubdtype(x.dtype, np.integer):
            np.testing.assert_array_equal(got[name], x, err_msg=name)
        else:
            # The queue's rows have the drift of the projector's last bias in them.
            kind = "parameters" if name.startswith(("params", "ema", "target")) else "the rest"
            assert_close(
                f"hosts, {kind}", got[name], x, FORWARD if kind == "parameters" else GRADIENT
            )


@pytest.mark.slow
def test_their_evaluation_equals_that_of_one_process(pod_run, tmp_path, monkeypatch):
    """Of the same weights."""
    settings, both = ("stages=('eval',)", f"init_from={pod_run[0]}"), tmp_path / "both"
    one = alone(monkeypatch, tmp_path / "eval", *settings)
    with pod(both, tmp_path / "output", (*SETTINGS, *settings)) as process:
        assert process.wait(400) == 0, (tmp_path / "output").read_text()
    lines = (tmp_path / "output").read_text().splitlines()
    assert sum(line.startswith("percent") for line in lines) == 1
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (both, one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name]["features"] == theirs[name]["features"]
        assert ours[name]["knn"] == theirs[name]["knn"]
        for protocol in ("probe", "probe_augmented"):
            best = [r[name][protocol]["best_last_epoch"]["top1"] for r in (ours, theirs)]
            assert best[0] == pytest.approx(best[1], abs=0.002)
        shots = [r[name]["lowshot"][0]["accuracies"] for r in (ours, theirs)]
        assert shots[0] == pytest.approx(shots[1], abs=0.002)
        a, b = (runner.read_clusters(run, name) for run in (both, one))
        assert (a["clusters"] == b["clusters"]).mean() > 0.99
        a, b = (features.load(runner.folder_of(run, name) / "val") for run in (both, one))
        np.testing.assert_allclose(a.x, b.x, atol=1e-4)
