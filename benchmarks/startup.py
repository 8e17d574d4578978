"""How long people wait for a command: its help, a mistake, the first step of a run.

    python -m benchmarks.startup

Medians of five; the first step of each stage from an empty cache of compiled programs, and again.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 5
QUICK = "--config=quickstart:test"
RUN = ("-m", "maect_jax.main")
COMMANDS = {
    "python -m maect_jax.main --help": (*RUN, "--help"),
    "an unknown key": (*RUN, QUICK, "--config.ct.epoch=3"),
    "a value that is not allowed": (*RUN, QUICK, "--config.ct.top_k=0"),
    "import maect_jax": ("-c", "import maect_jax"),
    "from maect_jax import load_encoder": ("-c", "from maect_jax import load_encoder"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return time.monotonic() - start


def first_steps(workdir: Path, env: dict[str, str]) -> dict[str, float]:
    """Seconds from the start of a stage (of the program, for the first one) to its first step."""
    start, found = time.monotonic(), {}
    command = [sys.executable, *RUN, QUICK, "--config.stages=('mae','head','ct')"]
    command += ["--config.monitor.every=0", f"--workdir={workdir}"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, env=env, **quiet) as process:
        while process.poll() is None:
            time.sleep(0.01)
            path = workdir / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            for line in (json.loads(line) for line in lines if line.endswith("\n")):
                if "loss" in line and line["stage"] not in found:
                    found[line["stage"]] = line["seconds"] if found else time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"{command} ended with status {process.returncode}")
    return found


def main() -> None:
    for name, arguments in COMMANDS.items():
        print(f"{name:40}{statistics.median(seconds(arguments) for _ in range(REPEATS)):6.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XDG_CACHE_HOME": folder}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        starts = [first_steps(Path(folder) / name, env) for name in ("first", "second")]
    for stage, first in starts[0].items():
        second = starts[1][stage]
        print(
            f"{stage}: first step {first:.1f} s; second start {second:.1f} s, {second / first:.2f}"
        )


if __name__ == "__main__":
    main()
