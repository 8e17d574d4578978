"""A run that is killed, by SIGKILL, some time after it has come to a given point:

python -m tests.helpers.victim POINT STAGE COUNT SECONDS [flags of maect_jax.main]

POINT is one of `POINTS`; the clock starts when stage STAGE comes to it for the COUNT-th time.
"""

import os
import runpy
import signal
import sys
import threading
import time

from maect_jax import files, train
from maect_jax.evals import runner
from maect_jax.run import checkpoints, logger, manifest

# What is entered at each point.
POINTS = {
    "step": (logger.Logger, "add"),
    "save": (checkpoints.Checkpoints, "save"),
    "seal": (manifest, "digests"),  # written and renamed, but not sealed
    "remove": (checkpoints.Checkpoints, "_remove_old"),
    "restore": (checkpoints.Checkpoints, "restore"),
    "file": (files, "_write_atomically"),
    "evaluate": (runner, "run"),
}


def arm(point: str, stage: str, count: int, seconds: float) -> None:
    """Lays the trap."""
    holder, name = POINTS[point]
    entered, run = getattr(holder, name), train.run
    stages, times = ["eval"], [0]

    def enter_stage(training):
        stages.append(training.stage.name)
        try:
            return run(training)
        finally:
            stages.append("eval")

    def strike():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def enter(*arguments, **settings):
        times[0] += stages[-1] == stage
        if stages[-1] == stage and times[0] == count:
            threading.Thread(target=strike, daemon=True).start()
        return entered(*arguments, **settings)

    train.run = enter_stage
    setattr(holder, name, enter)


if __name__ == "__main__":
    _, point, stage, count, seconds, *flags = sys.argv
    arm(point, stage, int(count), float(seconds))
    sys.argv = ["maect_jax.main", *flags]
    runpy.run_module("maect_jax.main", run_name="__main__")
