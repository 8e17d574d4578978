"""Trains and evaluates by a config.

python -m maect_jax.main --config=configs/NAME.py [--config.key=value ...]
"""

import faulthandler
import os
import sys
import threading
from pathlib import Path

from maect_jax import config as configs
from maect_jax import errors
from maect_jax.errors import UserError
from maect_jax.run import preemption

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_PATIENCE = 20.0  # seconds in which all hosts end together


def _parser() -> errors.OneLineParser:
    parser = configs.parser(__doc__)
    parser.add_argument("--workdir", help="the run's folder; runs/<config name> unless given")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "--host_timeout",
        type=errors.positive(int),
        default=300,
        help="seconds that the hosts of a pod wait for each other at the start (%(default)s)",
    )
    return parser


def _join_hosts(seconds: int) -> None:
    """Makes one program of all hosts that have the same JAX_COORDINATOR_ADDRESS, if it is set.

    Raises:
      UserError: it is not known how many they are, or which this one is.
    """
    import jax

    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    address = os.environ.get(_ADDRESS)
    if address is None and given:
        alone = " and ".join(names[key] for key in given)
        raise UserError(f"{alone} set without {_ADDRESS}=HOST:PORT of the first host")
    if address is None:
        return

    def give_up():
        # JAX's own timeout aborts the process with a stack trace, and cannot be caught.
        errors.say(f"not all hosts have met at {address} within --host_timeout={seconds} seconds")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        # On a TPU slice and under SLURM JAX finds out by itself what is not given.
        given = {key: int(value) for key, value in given.items()}
        jax.distributed.initialize(**given, initialization_timeout=seconds + 60)
    except (ValueError, RuntimeError) as error:
        wrong = ", ".join(f"{name}={os.environ.get(name)}" for name in names.values())
        raise UserError(f"{_ADDRESS} is set, with {wrong}: {error}") from error
    finally:
        timer.cancel()


def _run() -> None:
    config, arguments = configs.from_command_line(_parser())
    from maect_jax import pipeline  # with JAX, which takes a second: help and mistakes do not wait

    _join_hosts(arguments.host_timeout)
    if arguments.dry_run:
        pipeline.dry_run(config)
        return
    with preemption.handled():
        pipeline.run(config, Path(arguments.workdir or f"runs/{config.name}"))


def main() -> None:
    try:
        status = errors.run_command(_run)
    except KeyboardInterrupt:
        errors.say(f"preempted, resumable. {errors.RESUME}")
        preemption.leave()
    if status and _ADDRESS in os.environ:
        # At its end JAX waits for all hosts, and those that do not fail may wait for this one.
        timer = threading.Timer(_PATIENCE, os._exit, [status])
        timer.daemon = True
        timer.start()
    sys.exit(status)


if __name__ == "__main__":
    faulthandler.enable()  # a crash of a library shows where Python was
    main()
