"""Machines are taken away: SIGTERM and SIGINT end a run so that it can go on."""

import enum
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager

from maect_jax.errors import STATUS as STATUS_OF
from maect_jax.errors import PreemptedError

STATUS = STATUS_OF[PreemptedError]  # sysexits' EX_TEMPFAIL: not done, and to be tried again
_AT_ONCE = 130  # the shells' status of a program that SIGINT has ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Action(enum.IntEnum):
    """What the loop does after a step; of several hosts' votes the highest counts."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


def vote(signalled: bool, save_due: bool) -> Action:
    """What this host wants after the current step."""
    if signalled:
        return Action.STOP
    return Action.SAVE if save_due else Action.CONTINUE


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # a handler must not touch a stream that is being written


def _exit(status: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


class _Handler:
    """The first signal asks, a second SIGINT ends at once; further SIGTERMs say nothing new."""

    def __init__(self):
        self.asked = self.deferred = False

    def __call__(self, number, frame):
        if self.asked:
            if number == signal.SIGINT:
                _say("ended at once; the last checkpoint is as it was")
                _exit(_AT_ONCE)
            return
        self.asked = True
        if not self.deferred:
            raise KeyboardInterrupt
        _say(f"{signal.Signals(number).name}: saving; a second SIGINT ends at once")


_handler: _Handler | None = None


@contextmanager
def handled():
    """Has both signals raise `KeyboardInterrupt`, but within `deferred`. Of the main thread."""
    global _handler
    _handler = _Handler()
    before = {number: signal.signal(number, _handler) for number in _SIGNALS}
    try:
        yield
    finally:
        _handler = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred():
    """Within it the first signal ends nothing; yields a function that tells whether it came.

    Raises:
      KeyboardInterrupt: one came that nobody has asked for, at the end.
    """
    handler = _handler or _Handler()
    handler.deferred = True
    try:
        yield lambda: handler.asked
    finally:
        handler.deferred = False
    if handler.asked:
        raise KeyboardInterrupt


def leave() -> None:
    """Ends the program with `STATUS`, though devices and threads are at work, which would bring
    Python's own end down."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _exit(STATUS)
