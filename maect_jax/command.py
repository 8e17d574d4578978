"""What the commands share: a config page with its overrides, help, and errors of one line."""

import ast
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from logging import CRITICAL, getLogger
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from maect_jax import config as pages

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "a config page (needed), or page:test for its tiny variant; --config.key=value overrides a key",
)
_OVERRIDE = "--config."
_PATIENCE = 20.0  # seconds in which all hosts end together


def _help(doc: str, own: Sequence[flags.FlagHolder]) -> str:
    lines = [doc.strip(), "", "Flags:"]
    for flag in (_CONFIG, *own):
        lines.append(f"  --{flag.name}: {flags.FLAGS[flag.name].help}")
    lines += ["", "Config pages:"]
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        if path.stem != "common":
            lines.append(f"  {os.path.relpath(path):34}{summary}")
    return "\n".join(lines)


def _parse(doc: str, own: Sequence[flags.FlagHolder], argv: Sequence[str]) -> list[str]:
    """Parses the flags; returns the program's name and the config overrides, `key=value`."""
    if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in argv):
        print(_help(doc, own))
        sys.exit(0)
    overrides = [arg.removeprefix(_OVERRIDE) for arg in argv if arg.startswith(_OVERRIDE)]
    try:
        rest = flags.FLAGS([arg for arg in argv if not arg.startswith(_OVERRIDE)])
    except flags.Error as error:
        stop(error)
    if rest[1:]:
        stop(f"unexpected argument {rest[1]!r}; all are --flag=value, see --help")
    if not _CONFIG.value:
        stop("--config=PAGE is needed, such as configs/quickstart.py; --help lists the pages")
    return [argv[0], *overrides]


def run(main: Callable[[list[str]], None], doc: str, *own: flags.FlagHolder) -> None:
    """Parses the command line and calls `main` with the program's name and the overrides.

    Args:
      main: takes what `load_config` wants.
      doc: the text of --help.
      *own: the flags that `main` has of its own.
    """
    app.run(partial(_told, main), flags_parser=partial(_parse, doc, own))


def _told(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls `main`; what nobody foresaw is a traceback, and last a line that says what it is."""
    try:
        main(argv)
    except FloatingPointError as error:  # what --config.debug_nans asks for
        traceback.print_exc()
        stop(f"debug_nans: {_first_line(error)}", status=1)
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__
        stop(
            f"unexpected {kind}: {_first_line(error)}; if it is not the machine's, please report "
            "the lines above",
            status=1,
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def load_config(argv: list[str]) -> ConfigDict:
    """The config of the page that --config names, with the overrides of `argv`.

    From here on the libraries say as much as its `log_level` lets them.

    Raises:
      UserError: there is no such page or key, or a value is not of its type.
    """
    config = pages.load(_CONFIG.value, argv[1:])
    debug = config.log_level == "debug"
    logging.set_verbosity(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        _quieten_saving()
    return config


def _quieten_saving() -> None:
    """Of a save that fails each of orbax's threads has a stack to show; `saving` has one line."""
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    getLogger("asyncio").setLevel(CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    told = sys.unraisablehook

    def hook(found):
        if str(found.exc_value) != "Event loop is closed":
            told(found)

    sys.unraisablehook = hook


def stop(error: Exception | str, status: int = 2) -> None:
    """Ends the program with one line on stderr."""
    tell(error)
    if jax.distributed.is_initialized():
        # At its end JAX waits for all hosts, and those that do not fail may wait for this one.
        watch = threading.Timer(_PATIENCE, os._exit, [status])
        watch.daemon = True
        watch.start()
    sys.exit(status)


def tell(error: Exception | str) -> None:
    """Writes one line on stderr."""
    sys.stderr.write(f"error: {error}\n")  # at once, lest another host's line come between
