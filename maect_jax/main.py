"""The entry point: python -m maect_jax.main --config=configs/NAME.py [--config.key=value ...]."""

import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from maect_jax import config as pages
from maect_jax import pipeline
from maect_jax.errors import RunFailedError, UserError

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "a config page (needed), or page:test for its tiny variant; --config.key=value overrides a key",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; runs/<config name> unless given")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and stop")

_OVERRIDE = "--config."


def _help() -> str:
    lines = [__doc__.strip(), "", "Flags:"]
    for flag in (_CONFIG, _WORKDIR, _DRY_RUN):
        lines.append(f"  --{flag.name}: {flags.FLAGS[flag.name].help}")
    lines += ["", "Config pages:"]
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        if path.stem != "common":
            lines.append(f"  {os.path.relpath(path):34}{summary}")
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; returns the config overrides, `key=value`."""
    if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in argv):
        print(_help())
        sys.exit(0)
    overrides = [arg.removeprefix(_OVERRIDE) for arg in argv if arg.startswith(_OVERRIDE)]
    try:
        rest = flags.FLAGS([arg for arg in argv if not arg.startswith(_OVERRIDE)])
    except flags.Error as error:
        _stop(error)
    if rest[1:]:
        _stop(f"unexpected argument {rest[1]!r}; all are --flag=value, see --help")
    return [argv[0], *overrides]


def _stop(error: Exception | str, status: int = 2) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def _join_hosts() -> None:
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        given = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
        jax.distributed.initialize(**given)  # on a pod JAX finds out by itself what is not given


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if not _CONFIG.value:
        _stop("--config=PAGE is needed, such as configs/quickstart.py; --help lists the pages")
    try:
        config = pages.load(_CONFIG.value, argv[1:])
        if config.log_level == "debug":
            logging.set_verbosity(logging.DEBUG)
        _join_hosts()
        if _DRY_RUN.value:
            pipeline.dry_run(config)
        else:
            pipeline.run(config, Path(_WORKDIR.value or f"runs/{config.name}"))
    except UserError as error:
        _stop(error)
    except RunFailedError as error:
        _stop(error, status=1)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last checkpoint", status=130)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
