"""SIGTERM and SIGINT: a run saves, says that it can go on, and does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from maect_jax.errors import STATUS, PreemptedError
from maect_jax.run import checkpoints, jsonl, preemption
from tests.helpers import FAST_RUN, ROOT, SMALL
from tests.helpers.common import save, wait_for_step

FLAGS = tuple(
    f"--config{setting}" for setting in (
        "=configs/quickstart.py:test", f".{SMALL}", ".stages=('mae',)", ".mae.batch_size=100",
        ".mae.epochs=200", ".log_every=1", ".checkpoint.every=50", ".monitor.every=0",
    )
)  # fmt: skip


@pytest.fixture
def running(tmp_path):
    """Starts a run; ends what a test leaves."""
    started = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, "-m", "maect_jax.main", f"--workdir={tmp_path / 'run'}", *flags],
            cwd=ROOT, env=os.environ | {"XLA_FLAGS": FAST_RUN}, stderr=subprocess.PIPE, text=True,
            process_group=0,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


def errors(text):
    """The last lines, but for the bar."""
    return [line for line in text.splitlines() if line and "img/s" not in line]


def test_a_signal_that_nobody_has_asked_for_any_more_is_not_lost():
    def busy():
        with preemption.deferred():
            signal.raise_signal(signal.SIGTERM)

    with preemption.handled(), pytest.raises(KeyboardInterrupt):
        busy()


def test_a_signal_saves_and_a_second_sigint_stops_at_once(tmp_path, running):
    run = tmp_path / "run"
    process = running(*FLAGS)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == STATUS[PreemptedError] == 75
    (step,) = checkpoints.steps_of(checkpoints.stage_folder(run, "mae"))
    assert step == max(line["step"] for line in jsonl.read(run / "metrics.jsonl"))
    assert errors(stderr) == [
        "SIGTERM: saving; a second SIGINT stops at once",
        f"error: preempted, resumable: stage mae is saved at step {step} of 3200. Run the same "
        "command to resume.",
    ]
    assert not (run / "lock").exists()
    # A stop leaves no snapshot.
    assert not (run / "watch").exists()
    # It resumes; then a second SIGINT ends it at once, also while a save is tried for minutes, as
    # the folder of the checkpoints is a file.
    process = running(*FLAGS)
    wait_for_step(run, step + 3, process)
    folder = checkpoints.stage_folder(run, "mae")
    folder.rename(run / "moved")
    folder.write_text("")
    process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, stderr = process.communicate(timeout=10)
    assert time.monotonic() - start < 2
    assert process.returncode == 130
    assert errors(stderr)[-1] == "stopped at once; the last checkpoint is unchanged"
    steps = [line["step"] for line in jsonl.read(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def wait_for_end(group):
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-r", "R,S,D", "-g", str(group)], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_worker_processes_end_with_the_main_one(tmp_path, running, number):
    """A terminal's Ctrl-C or end, or a scheduler, signals the whole group: worker processes still
    bring batches until the run has saved."""
    for i in range(64):
        save(tmp_path / "images" / "train" / f"{i:02}.png", (30, 30), i)
    more = (
        ".data.source=folder", f".data.path={tmp_path / 'images'}", ".data.train_split=train",
        ".data.val_split=train", ".data.workers=2", ".mae.batch_size=8", ".model.channels=3",
        ".data.mean=(0.5,0.5,0.5)", ".data.std=(0.2,0.2,0.2)",
    )  # fmt: skip
    process = running(*FLAGS, *(f"--config{setting}" for setting in more))
    wait_for_step(tmp_path / "run", 3, process)
    group = os.getpgid(process.pid)
    workers = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True)
    assert len(workers.stdout.split()) >= 3
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(group, number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == STATUS[PreemptedError], stderr
        assert "Traceback" not in stderr  # of the process that frees shared memory
        saved = "error: preempted, resumable: stage mae is saved "
        assert any(line.startswith(saved) for line in errors(stderr))
    wait_for_end(group)
