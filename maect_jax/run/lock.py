"""One run at a time in a folder.

The lock is a file that names its holder, who touches it every few seconds. It is stale if its
holder, a process of this machine, is gone, or if a holder elsewhere has not touched it for a
minute: machines are taken away without notice. `filelock.SoftFileLease` does not serve: it
cannot distinguish machines of one name, and goes by its own clock and not by the storage's.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maect_jax.errors import RunFailedError, UserError

NAME = "lock"
_HEARTBEAT = 10.0  # seconds between two touches
_STALE = 60.0  # seconds without a touch, of a holder on another machine


def _started(pid: int) -> str | None:
    """When a process of this machine was started, as numbers are given again; "" if the system
    does not say, `None` if there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        # Behind the program's name, which may contain spaces and brackets.
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return None if state == "Z" else fields[18]


def _this_process() -> dict:
    """What a lock says about its holder. `machine` is where a process number means something:
    containers may share a host's name, and machines too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        machine = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        machine = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine, "pid": pid, "started": _started(pid)}


def _holder(path: Path) -> dict | None:
    """Who holds a lock; `None` if there is no lock."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("host", "machine", "pid", "started")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):  # it is being written, or was cut off
        return {"host": "unknown", "machine": "", "pid": 0, "started": ""}


def _is_stale(path: Path, holder: dict, me: dict) -> bool:
    if all(holder[key] == me[key] for key in ("host", "machine")):
        return _started(holder["pid"]) not in ("", holder["started"])
    # Both times by the storage's clock, as those of two machines may differ.
    probe = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime > _STALE
    except FileNotFoundError:  # just released
        return True
    finally:
        probe.unlink(missing_ok=True)


def _take(path: Path, me: dict) -> None:
    for _ in range(3):  # a lock may be released or taken at any moment
        try:
            with path.open("x", encoding="utf-8") as file:
                try:
                    file.write(json.dumps(me) + "\n")
                    file.flush()
                except OSError:  # a full disk: an empty lock would hold the folder for a minute
                    path.unlink()
                    raise
            return
        except FileExistsError:
            holder = _holder(path)
        if holder is None:  # just released
            continue
        if not _is_stale(path, holder, me):
            raise UserError(
                f"--workdir={path.parent}: in use by process {holder['pid']} on {holder['host']}. "
                "Wait for its end or use another --workdir. The lock of a holder that is gone "
                f"expires within {_STALE:.0f} seconds."
            )
        # Of two processes that find it stale one moves it away; a lock taken since is put back.
        aside = path.with_name(f".{NAME}.{me['host']}.{me['pid']}")
        with suppress(FileNotFoundError):
            path.replace(aside)
            if _holder(aside) != holder:
                aside.replace(path)
                break
            aside.unlink()
    raise UserError(f"--workdir={path.parent}: another process has just taken it")


@contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of a folder. Raises `UserError` if another process does.

    Yields:
      A function that raises `RunFailedError` if another process has taken the lock since, which
      happens if this one was suspended, or its storage away, for a minute.
    """
    path, me = folder / NAME, _this_process()
    _take(path, me)
    ended = threading.Event()

    def is_mine():
        try:
            return _holder(path) == me
        except OSError:  # an outage of the storage
            return True

    def refresh():
        while not ended.wait(_HEARTBEAT):
            if is_mine():
                with suppress(OSError):
                    os.utime(path)

    def check():
        if not is_mine():
            raise RunFailedError(f"{path}: another process has taken the folder")

    thread = threading.Thread(target=refresh, name="lock", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # must not hide why the run ends
            if is_mine():
                path.unlink(missing_ok=True)
