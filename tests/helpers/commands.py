"""The commands, as people run them."""

import os
import subprocess
import sys

from maect_jax.run import jsonl
from tests.helpers import FAST_RUN, ROOT


def run_main(*arguments, devices=1, python=("-m", "maect_jax.main")):
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_RUN}"
    return subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def metrics_of(workdir):
    """The lines that tell of steps."""
    return [entry for entry in jsonl.read(workdir / "metrics.jsonl") if "loss" in entry]
