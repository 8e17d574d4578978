"""Trains and evaluates by a config.

    maect run --config=NAME [--config.KEY=VALUE ...]

Every key, with its default, is in configs/common.py.
"""

import ctypes
import faulthandler
import gc
import hashlib
import importlib
import logging
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

from maect_jax import __version__, errors, files
from maect_jax import config as configs
from maect_jax.errors import UserError
from maect_jax.run import preemption

_LOGGER = logging.getLogger(__name__)
# New objects between two searches for garbage. Importing and tracing make many that stay; searched
# through as often as by default, they take an eighth of the time to the first step.
GARBAGE = 100_000
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_PATIENCE = 20.0  # seconds in which all hosts end together


def _parser() -> errors.OneLineParser:
    parser = configs.parser(__doc__)
    parser.add_argument(
        "--workdir",
        type=files.user_path,
        help="the run's folder; runs/<config name> unless given",
    )
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
    Raises `UserError` if it is not known how many they are, or which this one is."""
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
        numbers: dict[str, Any] = {key: int(value) for key, value in given.items()}
        jax.distributed.initialize(**numbers, initialization_timeout=seconds + 60)
    except (ValueError, RuntimeError) as error:
        wrong = ", ".join(f"{name}={os.environ.get(name)}" for name in names.values())
        raise UserError(f"{_ADDRESS} is set, with {wrong}: {error}") from error
    finally:
        timer.cancel()


def _keep_programs() -> None:
    """Keeps compiled programs in the user's cache folder: the next start need not compile them.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false switches this
    off. A program runs only on processors that have all features of the one that compiled it, and a
    home may be shared, so each kind of processor has a folder of its own.
    """
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    if folder is None:
        try:
            cache = files.user_cache()
            folder = cache / f"jax-{jax.__version__}-{_processor()}"
            folder.mkdir(exist_ok=True)
            for program in cache.glob("*/*-cache"):
                if time.time() - program.stat().st_mtime > files.KEPT:
                    program.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
            _LOGGER.debug("compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # all of them
    _LOGGER.debug("compiled programs are kept in %s", folder)


def _processor() -> str:
    """A digest of what this machine's processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    text = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def keep_memory() -> None:
    """Keeps the memory of large arrays from step to step, where JAX runs on CPUs.

    Otherwise the C library returns it after each step, and the kernel clears as much for the next,
    which takes a quarter of the time (docs/performance.md). It keeps only what the thread asks for
    that has started the program: JAX must run its programs there. To be called before JAX is used.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _run() -> None:
    config, arguments = configs.from_command_line(_parser())
    from maect_jax import pipeline  # with JAX, which takes a second: help and mistakes do not wait

    workdir = arguments.workdir or Path(f"runs/{config.name}")
    _keep_programs()
    if _ADDRESS in os.environ and not arguments.dry_run:
        pipeline.fetch(config, workdir)
    _join_hosts(arguments.host_timeout)
    if arguments.dry_run:
        pipeline.dry_run(config)
        return
    keep_memory()
    with preemption.handled():
        pipeline.run(config, workdir)


def main() -> None:
    """Runs the command and ends the program."""
    gc.set_threshold(GARBAGE)
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


# The commands of `maect`: the module of each, which is a command as well, and what it does.
_COMMANDS = {
    "run": ("maect_jax.main", "train and evaluate by a config"),
    "import": ("maect_jax.convert.__main__", "make a run of weights in PyTorch's formats"),
    "export": ("maect_jax.convert.__main__", "write a run's encoder for timm, HuggingFace or MAE"),
    "assign": ("maect_jax.clusters", "tell the clusters of new images, by those of a run"),
    "report": ("maect_jax.report.__main__", "make reports of runs again, and compare them"),
    "views": ("maect_jax.report.views", "draw the images and views that a config trains on"),
    "compile": ("maect_jax.compile.__main__", "compile a config's steps for a TPU slice"),
}


def maect() -> None:
    """The command `maect`, with a subcommand."""
    errors.settle_streams()
    epilog = "\n".join(f"  {name:10}{what}" for name, (_, what) in _COMMANDS.items())
    parser = errors.OneLineParser(
        prog="maect",
        description="Masked autoencoders, tuned by nearest-neighbour contrastive learning.",
        epilog=f"commands, each with its own --help:\n{epilog}",
    )
    parser.add_argument("--version", action="version", version=f"maect_jax {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    module, modules = _COMMANDS[command][0], [module for module, _ in _COMMANDS.values()]
    # A module of several commands, `import` and `export`, reads the name of the command as well.
    sys.argv[:2] = ["maect", command] if modules.count(module) > 1 else [f"maect {command}"]
    sys.modules["__main__"] = sys.modules[__name__]  # what worker processes import
    if command == "run":
        faulthandler.enable()  # a crash of a library shows where Python was
        main()
    sys.exit(errors.run_command(lambda: importlib.import_module(module).main()))


if __name__ == "__mp_main__":  # a worker process of the loader imports what was run
    # Where there is no JAX, which takes a second and 130 MB, grain does without; and says so.
    sys.modules["jax"] = None  # type: ignore[assignment]
    absl_logging.set_verbosity(absl_logging.ERROR)

if __name__ == "__main__":
    errors.settle_streams()
    faulthandler.enable()
    main()
