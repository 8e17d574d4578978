"""One run at a time in a folder.

The lock is a file that names its holder, who touches it every few seconds. It is stale where the
holder, a process of this machine, has gone, or where a holder elsewhere has not touched it for a
minute: machines are taken away without a word.
"""

import json
import os
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from maect_jax.errors import RunFailedError, UserError

_NAME = "lock"
_BEAT = 10.0  # seconds between two touches
_STALE = 60.0  # seconds without a touch, of a holder on another machine


def _started(pid: int) -> str | None:
    """When a process of this machine was started, so that a number that is given again tells
    nothing wrong; "" where the system does not tell, `None` for no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # Behind the name of the program, which may have spaces and brackets in it.
        state, *fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _machine() -> str:
    """Where a process's number means something: containers may share a host's name, and machines
    too. "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _me() -> dict:
    pid, host = os.getpid(), socket.gethostname()
    return {"host": host, "machine": _machine(), "pid": pid, "started": _started(pid)}


def _holder(path: Path) -> dict | None:
    """Who holds a lock, `None` for nobody."""
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("host", "machine", "pid", "started")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):  # it is being written, or was torn
        return {"host": "unknown", "machine": "", "pid": 0, "started": ""}


def _is_stale(path: Path, holder: dict) -> bool:
    if (holder["host"], holder["machine"]) == (socket.gethostname(), _machine()):
        return _started(holder["pid"]) != holder["started"]
    # The storage's clock for both: those of two machines may differ.
    probe = path.with_name(f".{_NAME}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > _STALE
    except FileNotFoundError:  # it was released in this moment
        return True
    finally:
        probe.unlink(missing_ok=True)


def _write(file, path: Path) -> None:
    try:
        file.write(json.dumps(_me()) + "\n")
        file.flush()
    except OSError:  # a full disk: an empty lock would hold the folder for a minute
        path.unlink()
        raise


def _take(path: Path) -> None:
    for _ in range(3):
        try:
            with path.open("x") as file:
                _write(file, path)
            return
        except FileExistsError:
            holder = _holder(path)
        if holder is None:  # it was released in this moment
            continue
        if not _is_stale(path, holder):
            raise UserError(
                f"--workdir={path.parent}: process {holder['pid']} on {holder['host']} runs in it; "
                "wait for its end, or name another folder (a holder that is gone is forgotten "
                f"within {_STALE:.0f} seconds)"
            )
        # Of two who find it stale one gets hold of it.
        aside = path.with_name(f".{_NAME}.{socket.gethostname()}.{os.getpid()}")
        try:
            path.replace(aside)
        except FileNotFoundError:
            continue
        taken = _holder(aside)
        if taken not in (holder, None):
            aside.replace(path)
            raise UserError(f"--workdir={path.parent}: another process has just taken it")
        aside.unlink()
    raise UserError(f"--workdir={path.parent}: another process has just taken it")


@contextmanager
def held(folder: Path):
    """Holds the lock of a folder; yields a function that raises where it was lost.

    Raises:
      UserError: another process holds it.
      RunFailedError: (from the function) another process has taken it since, as one does where
        this one was suspended or its storage away for a minute.
    """
    path, me = folder / _NAME, _me()
    _take(path)
    ended = threading.Event()

    def ours():
        try:
            return _holder(path) == me
        except OSError:  # an outage of the storage tells nothing
            return True

    def beat():
        while not ended.wait(_BEAT):
            if ours():
                with suppress(OSError):
                    os.utime(path)

    def check():
        if not ours():
            raise RunFailedError(
                f"{path}: is no longer this run's; another process has taken the folder"
            )

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        if ours():
            with suppress(OSError):  # which must not hide why the run ends
                path.unlink(missing_ok=True)
