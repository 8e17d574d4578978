"""The exceptions that become one line on stderr, and an exit status, in every command."""

import argparse
import errno
import io
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

OTHER_HOST = "another host failed; see its log"
RESUME = "Run the same command to resume."
_SHOWN = 200  # characters
_LISTED = 5  # names


class UserError(Exception):
    """Bad input: what is wrong, with its value; what is allowed; what to do. Exit status 2.

    Nothing is left half written.
    """


class RunFailedError(Exception):
    """A run that cannot go on: what happened, and what is left. Exit status 1."""


class PreemptedError(Exception):
    """A run that a signal has ended, and that has saved where it is. Exit status 75."""


class BadImageError(Exception):
    """An image that cannot be read, and why; the loader takes another in its place."""


STATUS = {UserError: 2, RunFailedError: 1, BadImageError: 1, PreemptedError: 75}


def shown(text: str, most: int = _SHOWN) -> str:
    """A text as part of a message: on one line, and the start of one of more than `most`
    characters."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= most else f"{line[:most]}..."


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are, as part of a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(shown, names[:_LISTED])) + more


def say(error: Exception | str) -> None:
    """Writes one line on stderr."""
    sys.stderr.write(f"error: {error}\n")  # in one call, as other hosts write too


class _Output(io.FileIO):
    """Where a command writes its text. What nobody takes any more is dropped."""

    has_lost = False  # some of stdout, and not because its reader has enough

    def write(self, text) -> int:
        try:
            return super().write(text)
        except OSError as error:  # `| head` has ended, the disk is full, or the terminal is gone
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for what libraries write, too
            os.close(null)
            if error.errno != errno.EPIPE and self.fileno() == 1:
                _Output.has_lost = True
                say(f"stdout: {error.strerror}; what follows is not shown")
            return len(text)


def settle_streams() -> None:
    """Makes sure that no write to stdout or stderr can end the program: neither one that nobody
    reads nor a character that the terminal lacks, which is written as its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, f"__{name}__") is None:  # it was closed: a file would get its number
            number = os.open(os.devnull, os.O_RDWR)
            stream = os.fdopen(number, "r" if name == "stdin" else "w", closefd=False)
            setattr(sys, f"__{name}__", stream)
            setattr(sys, name, stream)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a notebook's, a test's, or settled before
        with suppress(OSError):
            stream.flush()
        output: Any = _Output(stream.fileno(), "w", closefd=False)
        if not stream.write_through:  # as `python -u` asks for
            output = io.BufferedWriter(output)
        settings = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
        encoding = dict(encoding=stream.encoding, errors="backslashreplace")
        setattr(sys, name, io.TextIOWrapper(output, **encoding, **settings))


def run_command(main: Callable[[], None]) -> int:
    """Runs a command and returns its exit status. An error is one line on stderr; an unforeseen one
    is a traceback before it."""
    settle_streams()
    # Figures are drawn without a backend; that of a notebook may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    try:
        main()
        sys.stdout.flush()
        return 1 if _Output.has_lost else 0
    except tuple(STATUS) as error:
        say(error)
        return next(status for kind, status in STATUS.items() if isinstance(error, kind))
    except Exception as error:
        traceback.print_exc()
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, FloatingPointError):  # what --config.debug_nans asks for
            say(f"debug_nans: {reason}")
        else:
            say(
                f"unexpected {type(error).__name__}: {reason}. If the machine is not to blame, "
                "please report the lines above."
            )
        return 1


def positive(kind: type):
    """A type for argparse: a number above 0."""

    def parse(text: str):
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise ValueError
        return value

    parse.__name__ = "number above 0"  # for argparse's messages
    return parse


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, as all others are, whose description keeps its
    lines, and which names a module as it is called, `python -m maect_jax.report`."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        module = getattr(sys.modules["__main__"], "__spec__", None)
        called = sys.argv[0].endswith(".py")  # and not by the command `maect`
        if called and module and module.name != "__main__" and "prog" not in settings:
            self.prog = f"python -m {module.name.removesuffix('.__main__')}"

    def error(self, message: str):
        say(f"{message}; see --help")
        sys.exit(2)
