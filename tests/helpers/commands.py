"""The commands, as people run them."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from maect_jax.run import jsonl
from tests.helpers import CONFIGS, FAST_RUN, ROOT, SMALL

# `finished_run` is a run of this config with these changes.
QUICK = str(CONFIGS / "quickstart.py:test")
QUICK_SETTINGS = (SMALL, "eval.map=pca")  # t-SNE, which `maps_test` tests, takes seconds

# `python -m maect_jax.main` in a process where importing TensorFlow fails.
_WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules["tensorflow"] = sys.modules["keras"] = None
sys.argv[0] = "maect_jax.main"
runpy.run_module("maect_jax.main", run_name="__main__")
"""


def run_main(*arguments, devices=1, python=("-m", "maect_jax.main")):
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_RUN}"
    return subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


class FinishedRun(NamedTuple):
    """A run's folder, and what the command printed."""

    workdir: Path
    stdout: str
    stderr: str


def finished_run(folder: Path) -> FinishedRun:
    """A finished run of the quickstart's tiny variant below `folder`, for several processes.

    The first process makes it, by the command in a process without TensorFlow; the others wait.
    """
    folder.mkdir(exist_ok=True)
    workdir, stdout, stderr = (folder / name for name in ("quickstart_test", "stdout", "stderr"))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stderr.exists():
            shutil.rmtree(workdir, ignore_errors=True)
            settings = (f"--config.{setting}" for setting in QUICK_SETTINGS)
            done = run_main(
                f"--config={QUICK}", f"--workdir={workdir}", *settings,
                python=("-c", _WITHOUT_TENSORFLOW),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            stdout.write_text(done.stdout)
            stderr.write_text(done.stderr)
    return FinishedRun(workdir, stdout.read_text(), stderr.read_text())


def metrics_of(workdir):
    """The lines that tell of steps."""
    return [entry for entry in jsonl.read(workdir / "metrics.jsonl") if "loss" in entry]
