"""Several processes as one program, through the launch script and the unchanged `main`."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import FAST_COMPILE, ROOT

CONFIG = "configs/quickstart.py:test"


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def pod(workdir, output, settings):
    """Two processes of two devices each, which write into the file `output`."""
    flags = f"--xla_force_host_platform_device_count=2 {FAST_COMPILE}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["launch/local_pod.sh", "2", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{setting}" for setting in settings]
    with (
        output.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "PATH": path},
            stdout=file, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
