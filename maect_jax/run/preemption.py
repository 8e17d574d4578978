"""Machines are taken away: SIGTERM, SIGINT and the end of a terminal (SIGHUP) end a run so that it
can be resumed."""

import enum
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from maect_jax.errors import STATUS, PreemptedError

_SIGINT_STATUS = 130  # as shells report a program that SIGINT has ended


class Action(enum.IntEnum):
    """What the loop does after a step, the same on all hosts.

    Each host proposes one with the step; the highest of all is computed on the devices, as a metric
    of the step, and read with the others one step late. So no host waits for another.
    """

    CONTINUE = 0
    SAVE = 1
    STOP = 2


def _say(text: str) -> None:  # a handler must not touch a stream that is being written
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"\n{text}\n".encode())


def _exit(status: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


# `signalled`: a signal has arrived; `deferred`: the first signal only sets `signalled`.
_state = SimpleNamespace(signalled=False, deferred=False)


def _handle(number, frame):
    """The first signal stops the run, a second SIGINT ends it at once; others are ignored."""
    if _state.signalled:
        if number == signal.SIGINT:
            _say("stopped at once; the last checkpoint is unchanged")
            _exit(_SIGINT_STATUS)
        return
    _state.signalled = True
    if not _state.deferred:
        raise KeyboardInterrupt
    _say(f"{signal.Signals(number).name}: saving; a second SIGINT stops at once")


@contextmanager
def handled():
    """Makes the signals raise `KeyboardInterrupt`, except in `deferred`. For the main thread."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup makes it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.signalled = False


@contextmanager
def deferred():
    """Within it the first signal interrupts nothing; yields a function that says whether one came.

    Raises:
      KeyboardInterrupt: at the end, if one came and the body ended without an error.
    """
    _state.deferred = True
    try:
        yield lambda: _state.signalled
    finally:
        _state.deferred = False
    if _state.signalled:
        raise KeyboardInterrupt


def leave() -> None:
    """Ends the program as preempted, without Python's own shutdown, which devices and threads at
    work would crash."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _exit(STATUS[PreemptedError])
