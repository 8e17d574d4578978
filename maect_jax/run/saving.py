"""Saving the states of a stage with orbax while it is trained, and finding the last good one."""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from maect_jax import sharding
from maect_jax.errors import RunFailedError
from maect_jax.run import manifest
from maect_jax.run.checkpoints import path_of, step_of, steps_of
from maect_jax.stages.state import TrainState

_LOGGER = logging.getLogger(__name__)
_PAUSES = (10.0, 30.0, 90.0)  # seconds before a save that has failed is tried again
# While it was being written, sealed or removed a save was cut off.
_TORN = ("*.orbax-checkpoint-tmp*", "*.removed")  # and a step without its seal
Told = Callable[[int, dict[str, float]], None]


def _reason(error: Exception) -> str:
    """A storage's error in a few words: of the paths that it goes through none is the user's."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), repr(error))


def _remove(path: Path) -> None:
    """Removes a folder with all that is in it, a file or a link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Checkpoints:
    """The saved states of one stage of a run.

    Saving is asynchronous (the step waits for the copy off the devices, and for the save before)
    and atomic. What fails is tried again with the state of a later step, three times in a row.

    Args:
      folder: of the stage.
      keep: how many of the last ones stay.
      best: the measured value whose highest stays as well, "" for none.
      told: is called, on one process and from another thread, with each step that is about to
        count, and of it `checkpoint_bytes`, `checkpoint_seconds` (all that saving took) and
        `checkpoint_waited` (those in which training stood still).
    """

    def __init__(
        self, folder: Path, keep: int = 2, best: str = "", told: Told = lambda step, values: None
    ):
        self._folder, self._keep, self._best, self._told = folder, keep, best, told
        self._last = self._open() if jax.process_index() == 0 else None
        # Process 0 has looked, and tells the others.
        found = sharding.gather_set(set() if self._last is None else {self._last})
        self._last = max(found, default=None)
        handlers = dict(state=ocp.StandardCheckpointHandler(), position=ocp.JsonCheckpointHandler())
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = ThreadPoolExecutor(1, "seal")
        self._saving: Future | None = None
        self._failures: list[str] = []
        self._due = 0.0
        self._size = 0  # bytes of the last one that was written
        self._told_of: int | None = None

    def _open(self) -> int | None:
        """Clears away what is not whole, sets aside what is damaged; the last good step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._torn():
            _LOGGER.warning(
                "%s: is removed; its saving or removal was cut off, or its manifest is gone", path
            )
            _remove(path)
        whole = steps_of(self._folder)
        while whole:
            path = self._folder / str(whole[-1])
            try:
                wrong = manifest.damage(path)
            except OSError as error:
                raise RunFailedError(
                    f"{path}: cannot be read ({error}); the same command tries again. Where this "
                    "lasts, move that folder away, and the checkpoint before is taken"
                ) from error
            if not wrong:
                return whole[-1]
            aside = path.with_name(f"{path.name}.damaged")
            _LOGGER.warning(
                "%s is damaged (%s): it is set aside as %s, %s", path, wrong, aside.name,
                f"and step {whole[-2]} is taken" if whole[1:] else "and the stage starts anew",
            )  # fmt: skip
            _remove(aside)
            path.replace(aside)
            del whole[-1]
        return None

    def _torn(self) -> set[Path]:
        """What is not a whole checkpoint, and was to be one."""
        torn = {path for pattern in _TORN for path in self._folder.glob(pattern)}
        torn |= {path for path in self._folder.iterdir() if step_of(path.name) is not None}
        return torn - {self._folder / str(step) for step in steps_of(self._folder)}

    def latest(self) -> int | None:
        """The last good step, or `None`."""
        return self._last

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """A state, placed as `abstract` (shapes with shardings) says, and the position."""
        items = dict(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        path = path_of(self._folder, step)
        restored = self._writer.restore(path, args=ocp.args.Composite(**items))
        return restored.state, restored.position

    def save(
        self, step: int, state: TrainState, position: dict, measured: dict | None = None
    ) -> None:
        """Begins to save a state, the position in the run (plain JSON), and what was measured.

        Raises:
          RunFailedError: on all hosts, one could save nothing, time and again.
        """
        start = time.monotonic()
        ready = self._settle() or start >= self._due
        go_on = sharding.all_hosts(len(self._failures) <= len(_PAUSES))
        self._tidy()
        if not go_on:
            reason = self._failures[-1] if self._failures else "on another host"
            raise RunFailedError(f"{self._folder}: a checkpoint cannot be written ({reason})")
        if not sharding.all_hosts(ready):
            return  # the next try comes later
        wrong = self._no_room()
        if not sharding.all_hosts(wrong is None):
            self._failed(wrong or RuntimeError("another host says so"))
            return
        items = dict(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        items, path = ocp.args.Composite(**items), path_of(self._folder, step)
        try:
            self._writer.save(path, args=items, force=True)
        except Exception as error:  # each kind of storage has its own
            self._failed(error)
            return
        waited = time.monotonic() - start
        self._saving = self._thread.submit(self._seal, step, start, waited, measured or {})

    def _no_room(self) -> OSError | None:
        """Why another save would fail: what is known not to fit need not fail halfway."""
        try:
            room = shutil.disk_usage(self._folder)
        except OSError as error:
            return error
        # A mounted bucket may have no size.
        full = room.total and room.free <= self._size
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else None

    def _seal(self, step: int, start: float, waited: float, measured: dict) -> int:
        """Ends a save, in its thread."""
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            path = self._folder / str(step)
            listed = manifest.of(path)
            size = self._size = sum(entry["bytes"] for entry in listed.values())
            told = {"bytes": size, "seconds": time.monotonic() - start, "waited": waited}
            if step != self._told_of:  # or it was told before its seal failed
                self._told_of = step
                self._told(step, {f"checkpoint_{key}": value for key, value in told.items()})
            manifest.seal(path, listed, measured)
            _LOGGER.debug(
                "%s: saved, %.1f MiB in %.2f s, of which training waited %.2f s",
                path, size / 2**20, told["seconds"], waited,
            )  # fmt: skip
            try:
                self._remove_old()
            except OSError as error:  # it is saved nevertheless
                _LOGGER.warning("%s: an old checkpoint cannot be removed: %s", path.parent, error)
        return step

    def _remove_old(self) -> None:
        steps = steps_of(self._folder)
        kept = set(steps[-self._keep :])
        values = {s: manifest.measured(self._folder / str(s)).get(self._best) for s in steps}
        rated = [step for step in steps if values[step] is not None]
        if rated:
            kept.add(max(rated, key=lambda step: (values[step], step)))
        for step in set(steps) - kept:
            torn = self._folder / f"{step}.removed"
            (self._folder / str(step)).replace(torn)
            shutil.rmtree(torn)

    def _settle(self) -> bool:
        """Waits for the save under way; whether it went well."""
        if self._saving is None:
            return not self._failures
        saving, self._saving = self._saving, None
        try:
            self._last = saving.result()
        except Exception as error:
            self._failed(error)
            return False
        self._failures = []
        return True

    def _failed(self, error: Exception) -> None:
        reason = _reason(error)
        self._failures.append(reason)
        good = f"step {self._last} is" if self._last is not None else "nothing is"
        # Past the last pause `save` gives up, on all hosts together.
        pause = (*_PAUSES, 0.0)[min(len(self._failures) - 1, len(_PAUSES))]
        self._due = time.monotonic() + pause
        then = f"next try in {pause:.0f} s" if pause else "the run ends"
        where = f"{self._folder}: a checkpoint cannot be written ({reason})"
        _LOGGER.warning("%s; %s saved; %s", where, good, then)

    def _tidy(self) -> None:
        """Removes what failed saves have left, which takes room; nobody is writing."""
        if self._failures and jax.process_index() == 0:
            try:
                for path in self._torn():
                    _remove(path)
            except OSError:  # the storage is away
                return

    def due(self) -> bool:
        """Whether a save has failed and it is time to try again; never waits."""
        if self._saving is not None:
            if not self._saving.done():
                return False
            self._settle()
        return bool(self._failures) and time.monotonic() >= self._due

    def finish(self, *again) -> None:
        """Waits until the last save is done, on all hosts; what fails is tried again.

        Args:
          *again: the arguments of that `save`.

        Raises:
          RunFailedError: it could not be saved, time and again.
        """
        self._due = 0.0  # at once, for the first time
        while not sharding.all_hosts(self._settle()):
            time.sleep(max(self._due - time.monotonic(), 0.0))
            self.save(*again)

    def close(self) -> None:
        """Ends the threads; a save under way is brought to its end, if it can be."""
        self._thread.shutdown()
        self._writer.close()
