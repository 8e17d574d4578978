"""Machines are taken away: SIGTERM and SIGINT end a run so that it can go on."""

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import contextmanager

STATUS = 75  # sysexits' EX_TEMPFAIL: not done, and to be tried again
_AT_ONCE = 130  # the shells' status of a program that SIGINT has ended
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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


def in_worker(*_) -> None:
    """Has a worker process leave both signals to the main one, whom a terminal or a scheduler sends
    them as well, and which still wants batches; and end with it, however that ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def follow(main):
        main.join()
        os._exit(1)

    if main := multiprocessing.parent_process():
        threading.Thread(target=follow, args=[main], daemon=True).start()
