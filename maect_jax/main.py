"""The entry point: python -m maect_jax.main --config=configs/NAME.py [--config.key=value ...]."""

import os
import sys
import threading
from pathlib import Path

import jax
from absl import flags

from maect_jax import command, pipeline
from maect_jax.errors import PreemptedError, RunFailedError, UserError
from maect_jax.run import preemption

_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; runs/<config name> unless given")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and stop")
_HOST_TIMEOUT = flags.DEFINE_integer(
    "host_timeout",
    300,
    "seconds that the hosts of a pod wait for each other at the start",
    lower_bound=1,
)


def _join_hosts() -> None:
    """Makes one program of all hosts that have the same JAX_COORDINATOR_ADDRESS, if it is set.

    Raises:
      UserError: it is not known how many they are, or which this one is.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        if given:
            alone = " and ".join(names[key] for key in given)
            raise UserError(
                f"{alone} set without JAX_COORDINATOR_ADDRESS=HOST:PORT of the first host"
            )
        return
    seconds = _HOST_TIMEOUT.value

    def give_up():
        # JAX's own timeout aborts the process with a stack trace, and cannot be caught.
        address = os.environ["JAX_COORDINATOR_ADDRESS"]
        message = f"not all hosts have met at {address} within --host_timeout={seconds} seconds"
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    try:
        # On a TPU slice and under SLURM JAX finds out by itself what is not given.
        given = {key: int(value) for key, value in given.items()}
        jax.distributed.initialize(**given, initialization_timeout=seconds + 60)
    except (ValueError, RuntimeError) as error:
        wrong = ", ".join(f"{name}={os.environ.get(name)}" for name in names.values())
        raise UserError(f"JAX_COORDINATOR_ADDRESS is set, with {wrong}: {error}") from error
    finally:
        watch.cancel()


def main(argv: list[str]) -> None:
    try:
        config = command.load_config(argv)
        _join_hosts()
        if _DRY_RUN.value:
            pipeline.dry_run(config)
        else:
            with preemption.handled():
                pipeline.run(config, Path(_WORKDIR.value or f"runs/{config.name}"))
    except UserError as error:
        command.stop(error)
    except RunFailedError as error:
        command.stop(error, status=1)
    except PreemptedError as error:
        command.stop(f"preempted, resumable: {error}", preemption.STATUS)
    except KeyboardInterrupt:
        command.tell("preempted, resumable: the same command goes on where it was")
        preemption.leave()


if __name__ == "__main__":
    command.run(main, __doc__, _WORKDIR, _DRY_RUN, _HOST_TIMEOUT)
