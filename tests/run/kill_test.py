"""kill -9 at seeded random moments: the same command resumes, and ends in the very same run."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from maect_jax.run import checkpoints, jsonl
from tests.helpers import SMALL
from tests.helpers.commands import run_main
from tests.helpers.common import assert_trees_equal, mesh_of

STAGES = ("mae", "head", "ct")
FLAGS = (
    "--config=configs/quickstart.py:test",
    *(f"--config.{setting}" for setting in (
        SMALL, "data.val_split=train[80%:]", "log_every=1", "eval.map=pca",
        "eval.protocols=('knn',)",
        *(f"{stage}.{key}" for stage in STAGES for key in ("batch_size=512", "epochs=4")),
        "head.queue_size=1024", "ct.queue_size=1024", "mae.warmup_epochs=1", "monitor.every=2",
        "checkpoint.keep=3",
    )),
)  # fmt: skip
STEPS, EVERY = 12, 3  # of each stage; between two checkpoints
# How long after its point a run is killed, at most: as long as what begins there takes.
SECONDS = {
    "step": 0.3, "save": 0.3, "seal": 0.05, "remove": 0.05, "restore": 0.3, "file": 0.02,
    "evaluate": 4.0,
}  # fmt: skip
TIMES = ("images_per_second", "input_wait", "seconds", "checkpoint_seconds", "checkpoint_waited")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one go."""
    folder = tmp_path_factory.mktemp("kill")
    done = run_main(*FLAGS, f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def cut_back(run, stage, step):
    """What a run had left when `stage` had come to `step`, its last checkpoint by then."""
    later = STAGES[STAGES.index(stage) + 1 :] if stage != "eval" else ()
    for name in (stage, *later):
        folder = checkpoints.stage_folder(run, name)
        for number in range(1, STEPS + 1):
            if name != stage or number > step:
                shutil.rmtree(folder / str(number), ignore_errors=True)
                (run / "watch" / name / f"{number}.npz").unlink(missing_ok=True)
    kept = [
        line for line in jsonl.read(run / "metrics.jsonl")
        if line["stage"] not in later and (line["stage"] != stage or line["step"] <= step)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for name in ("features", "pictures"):
        shutil.rmtree(run / name)
    for name in ("results.json", "results.md", "report.html", "clusters.csv"):
        (run / name).unlink(missing_ok=True)


def left_by(run):
    """All that a run leaves but times: states, metrics images, results, file names."""
    parts = (
        "step", "params", "frozen", "batch_stats", "opt_state", "ema", "target", "queue", "rng",
    )  # fmt: skip
    states = {}
    for stage in STAGES:
        folder = checkpoints.stage_folder(run, stage)
        for step in checkpoints.steps_of(folder):
            states[stage, step] = (
                jax.device_get(checkpoints.read_parts(folder, parts, mesh_of(1, 1), step)),
                checkpoints.read_position(folder, step),
            )
    metrics = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in jsonl.read(run / "metrics.jsonl")
    ]
    saved = [line for line in metrics if "checkpoint_bytes" in line]
    order = sorted(
        (line for line in metrics if "checkpoint_bytes" not in line),
        key=lambda line: (STAGES.index(line["stage"]), line["step"], len(line)),
    )
    snapshots = {}
    for path in sorted((run / "watch").rglob("*.npz")):
        with np.load(path) as arrays:
            snapshots[str(path.relative_to(run))] = dict(arrays)
    results = json.loads((run / "results.json").read_text())
    for row in results.values():
        del row["seconds"]
    names = sorted(
        str(path.relative_to(run)) for path in run.rglob("*")
        if path.is_file() and "state" not in path.parts
    )  # fmt: skip
    return {
        "states": states, "metrics": order, "snapshots": snapshots, "results": results,
        "names": names,
        "saved": [(line["stage"], line["step"]) for line in saved],
    }  # fmt: skip


def moment(seed):
    """A seeded random moment: point, stage, which time, seconds after it; and where it begins."""
    rng = np.random.default_rng(seed)
    point = tuple(SECONDS)[seed % len(SECONDS)]
    stage = "eval" if point == "evaluate" else STAGES[seed // len(SECONDS) % len(STAGES)]
    first = 2 if point == "restore" else 0  # the last three checkpoints are there
    begin = EVERY * int(rng.integers(first, STEPS // EVERY))
    begin = STEPS if stage == "eval" else begin
    most = dict(step=STEPS - begin, save=(STEPS - begin) // EVERY, file=2)
    most["seal"] = most["remove"] = most["save"]
    count = int(rng.integers(0, max(most.get(point, 1), 1))) + 1
    return point, stage, count, float(rng.uniform(0, SECONDS[point])), begin


def killed_and_taken_up(whole, tmp_path, seed):
    point, stage, count, seconds, begin = moment(seed)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    cut_back(run, stage, begin)
    trap = (point, stage, str(count), f"{seconds:.4f}")
    died = run_main(*FLAGS, f"--workdir={run}", python=("-m", "tests.helpers.victim", *trap))
    assert died.returncode == -signal.SIGKILL, (trap, begin, died.stderr)
    done = run_main(*FLAGS, f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    got, want = left_by(run), left_by(whole)
    assert got["states"].keys() == want["states"].keys()
    for where, (state, position) in want["states"].items():
        assert_trees_equal(got["states"][where][0], state)
        assert got["states"][where][1] == position
    jax.tree.map(np.testing.assert_array_equal, got.pop("snapshots"), want.pop("snapshots"))
    for what in ("metrics", "results", "names", "saved"):
        assert got[what] == want[what], what


def test_killed_before_the_seal_it_resumes(tmp_path):
    """A short run, killed when its second checkpoint is renamed and not yet sealed."""
    flags = [flag for flag in FLAGS if "stages" not in flag]
    flags += ["--config.stages=('mae',)", "--config.mae.epochs=3", "--config.monitor.every=0"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    trap = ("-m", "tests.helpers.victim", "seal", "mae", "2", "0")
    died = run_main(*flags, f"--workdir={run}", python=trap)
    assert died.returncode == -signal.SIGKILL, died.stderr
    folder = checkpoints.stage_folder(run, "mae")
    assert checkpoints.steps_of(folder) == [EVERY]
    for workdir in (run, whole):
        done = run_main(*flags, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        assert ("removing incomplete checkpoint" in done.stderr) == (workdir == run)
    want = checkpoints.stage_folder(whole, "mae")
    assert checkpoints.steps_of(folder) == checkpoints.steps_of(want) == [3, 6, 9]
    states = (
        checkpoints.read_parts(f, ("params", "opt_state"), mesh_of(1, 1)) for f in (folder, want)
    )
    assert_trees_equal(*map(jax.device_get, states))
    lines = [
        [(line["step"], line["loss"]) for line in jsonl.read(w / "metrics.jsonl") if "loss" in line]
        for w in (run, whole)
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(42))
def test_killed_at_any_moment_it_ends_bit_equal(whole, tmp_path, seed):
    killed_and_taken_up(whole, tmp_path, seed)
