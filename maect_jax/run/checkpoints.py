"""Saving a stage's states with orbax, finding the last good one, and reading it. Only here is orbax
imported.

A run keeps, for each stage and saved step:

    checkpoints/<stage>/<step>/state/               the `TrainState`, as orbax writes it
    checkpoints/<stage>/<step>/position/metadata    JSON: steps and images of the stage
    checkpoints/<stage>/<step>/manifest.json        size and SHA-256 of each file (`manifest`)

orbax writes a step beside and renames it; it counts only once it is sealed by its manifest. Before
anything is read, the files are compared with the manifest.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from etils import epy

from maect_jax import files, sharding
from maect_jax.errors import OTHER_HOST, RESUME, RunFailedError, UserError
from maect_jax.run import manifest
from maect_jax.stages.state import TrainState
from maect_jax.stages.support_queue import Queue

with epy.lazy_imports():  # when it is first used
    import orbax.checkpoint as ocp

FOLDER = "checkpoints"  # of a run
_LOGGER = logging.getLogger(__name__)
_MEND = "Run that run's command to resume from the checkpoint before, or repeat the import."
_PAUSES = (10.0, 30.0, 90.0)  # seconds before a failed save is tried again


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run keeps the checkpoints of one stage, a folder for each saved step."""
    return Path(run) / FOLDER / stage


def _step_of(name: str) -> int | None:
    """The step whose folder has this name; `None` for another name."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


def run_of(path: Path) -> tuple[Path, str | None, int | None]:
    """Run, stage and step that a path names: `RUN` or `RUN/checkpoints/STAGE/STEP`."""
    *_, folder, stage, name = ("", "", "", *path.absolute().parts)
    if folder == FOLDER and (step := _step_of(name)) is not None:
        return path.parents[2], stage, step
    return path, None, None


def steps_of(folder: Path) -> list[int]:
    """The sealed steps of a stage's folder, ascending."""
    steps = {path: _step_of(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    # `is_file` raises in an outage of the storage: a sealed step is never taken for another.
    return sorted(s for p, s in steps.items() if s is not None and (p / manifest.NAME).is_file())


def trained_stages(run: Path, stages: Sequence[str]) -> list[str]:
    """Those of `stages` that a run has a checkpoint of."""
    return [name for name in stages if steps_of(stage_folder(run, name))]


def last_good(run: Path, stages: Sequence[str]) -> str:
    """A sentence about the last checkpoint of a run, of the last of `stages`."""
    try:
        trained = trained_stages(run, stages)
        if not trained:
            return "There is no checkpoint yet."
        folder = stage_folder(run, trained[-1])
        last = folder / str(steps_of(folder)[-1])
    except OSError as error:
        return f"The checkpoints cannot be read now ({error.strerror})."
    return f"The last good checkpoint is {last}. {RESUME}"


def _handler(state):
    return ocp.CompositeCheckpointHandler(state=state, position=ocp.JsonCheckpointHandler())


def read_position(folder: Path, step: int) -> dict:
    """What was saved beside the state of a step (`Checkpoints.save`). Raises `UserError` if it is
    damaged."""
    path = folder / str(step) / "position" / "metadata"
    position = files.read_json(path)
    if "steps" not in position:
        raise UserError(f"{path}: is damaged: has no number of steps. {_MEND}")
    return position


def read_parts(folder: Path, parts: tuple[str, ...], mesh, step: int | None = None) -> dict:
    """Reads some fields of a saved state of a stage (`stage_folder`), by default of the last step:
    by name, as nested dicts of arrays, `queue` as a `Queue`; each array placed by the mesh's rules.
    Raises `UserError` on all hosts if it is damaged."""
    path = (folder / str(steps_of(folder)[-1] if step is None else step)).absolute()
    try:
        damage = manifest.damage(path) if jax.process_index() == 0 else None
    except OSError as error:
        damage = f"it cannot be read: {error}"
    if not sharding.all_hosts(damage is None):
        raise UserError(f"{path}: is damaged ({damage or OTHER_HOST}). {_MEND}")
    with ocp.Checkpointer(_handler(ocp.PyTreeCheckpointHandler())) as reader:
        saved = reader.metadata(path).item_metadata.state.tree
        wanted = sharding.abstract({part: saved[part] for part in parts}, mesh)
        restore = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        state = reader.restore(path, args=ocp.args.Composite(state=restore)).state
    return state | {"queue": Queue(**state["queue"])} if state.get("queue") else state


def write(folder: Path, parts: dict) -> None:
    """Makes the folder of an imported stage: one step, with some fields of a state.

    Arrays are written as they lie in memory: a copy, which orbax makes in case they change, and
    compression would each take as much memory again.
    """
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    state = ocp.args.PyTreeSave(jax.tree.map(np.asarray, parts))
    position = ocp.args.JsonSave({"steps": 0})
    path = (folder / "0").absolute()
    with ocp.Checkpointer(_handler(handler)) as writer:
        writer.save(path, args=ocp.args.Composite(state=state, position=position))
    manifest.seal(path, manifest.digests(path), {})


class Checkpoints:
    """The saved states of one stage of a run.

    Saving is asynchronous (the step waits for the copy off the devices, and for the save before)
    and atomic. A failed save is tried again with the state of a later step, three times in a row.

    Args:
      folder: of the stage.
      keep: how many of the last ones stay.
      best: the measured value whose highest stays as well, "" for none.
      on_saved: is called, on one process and from another thread, with each step just before it is
        sealed, and with `checkpoint_bytes`, `checkpoint_seconds` (all that saving took) and
        `checkpoint_waited` (of those, what training waited).

    Attributes:
      latest: the last good step, or `None`.
    """

    def __init__(
        self, folder: Path, keep: int = 2, best: str = "", on_saved: Callable = lambda *_: None
    ):
        self._folder, self._keep, self._best, self._on_saved = folder, keep, best, on_saved
        found = self._open() if jax.process_index() == 0 else None
        self.latest = max(sharding.gather_set(set() if found is None else {found}), default=None)
        self._writer = ocp.AsyncCheckpointer(_handler(ocp.StandardCheckpointHandler()))
        self._thread = ThreadPoolExecutor(1, "seal")
        self._saving: Future | None = None
        self._failures: list[str] = []  # in a row
        self._retry_at = 0.0
        self._size = 0  # bytes of the last one that was written
        self._announced: int | None = None

    def _open(self) -> int | None:
        """Removes what is incomplete, sets aside what is damaged; returns the last good step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_incomplete()
        steps = steps_of(self._folder)
        while steps:
            path = self._folder / str(steps.pop())
            try:
                damage = manifest.damage(path)
            except OSError as error:
                raise RunFailedError(
                    f"{path}: cannot be read ({error}). Run the same command to try again; if this "
                    "lasts, move that folder away to resume from the checkpoint before"
                ) from error
            if not damage:
                return int(path.name)
            aside = path.with_name(f"{path.name}.damaged")
            _LOGGER.warning(
                "%s is damaged (%s): moved to %s; %s", path, damage, aside.name,
                f"resuming from step {steps[-1]}" if steps else "the stage starts again",
            )  # fmt: skip
            _remove(aside)
            path.replace(aside)
        return None

    def _remove_incomplete(self, level: int = logging.WARNING) -> None:
        """Removes what a save or a removal that failed or was cut off has left."""
        paths = {path for path in self._folder.iterdir() if _step_of(path.name) is not None}
        for pattern in ("*.orbax-checkpoint-tmp*", "*.removed"):
            paths.update(self._folder.glob(pattern))
        for path in paths - {self._folder / str(step) for step in steps_of(self._folder)}:
            _LOGGER.log(level, "%s: removing incomplete checkpoint", path)
            _remove(path)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """A state, placed as `abstract` (shapes with shardings) says, and the position. Of all
        steps only `latest` has been checked for damage."""
        items = dict(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        path = (self._folder / str(step)).absolute()
        restored = self._writer.restore(path, args=ocp.args.Composite(**items))
        return restored.state, restored.position

    def save(
        self, step: int, state: TrainState, position: dict, measured: dict | None = None
    ) -> None:
        """Begins to save a state, the position in the run (plain JSON), and what was measured.
        Raises `RunFailedError` on all hosts if one has failed too often in a row."""
        start = time.monotonic()
        ready = self._settle() or start >= self._retry_at
        may_retry = sharding.all_hosts(len(self._failures) <= len(_PAUSES))
        if self._failures and jax.process_index() == 0:
            with suppress(OSError):  # the storage is away
                self._remove_incomplete(logging.DEBUG)  # its failure was said
        if not may_retry:
            reason = self._failures[-1] if self._failures else OTHER_HOST
            raise RunFailedError(f"{self._folder}: a checkpoint cannot be written ({reason})")
        if not sharding.all_hosts(ready):
            return
        lacking = self._no_room()
        if not sharding.all_hosts(lacking is None):
            self._failed(lacking or OTHER_HOST)
            return
        items = dict(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        path = (self._folder / str(step)).absolute()
        try:
            self._writer.save(path, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # each kind of storage has its own
            self._failed(_reason(error))
            return
        waited = time.monotonic() - start
        self._saving = self._thread.submit(self._seal, step, start, waited, measured or {})

    def _no_room(self) -> str | None:
        """Why a save would fail halfway; a mounted bucket may have no size."""
        try:
            disk = shutil.disk_usage(self._folder)
        except OSError as error:
            return _reason(error)
        is_full = disk.total and disk.free <= self._size
        return os.strerror(errno.ENOSPC) if is_full else None

    def _seal(self, step: int, start: float, waited: float, measured: dict) -> int:
        """Ends a save, in its thread."""
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return step
        path = self._folder / str(step)
        entries = manifest.digests(path)
        self._size = sum(entry["bytes"] for entry in entries.values())
        times = {"checkpoint_seconds": time.monotonic() - start, "checkpoint_waited": waited}
        if step != self._announced:  # it may be saved again because its seal failed
            self._announced = step
            self._on_saved(step, {"checkpoint_bytes": self._size, **times})
        manifest.seal(path, entries, measured)
        _LOGGER.debug("%s: saved, %.1f MiB, %s", path, self._size / 2**20, times)
        try:
            self._remove_old()
        except OSError as error:  # the new one is saved all the same
            _LOGGER.warning("%s: an old checkpoint cannot be removed: %s", path.parent, error)
        return step

    def _remove_old(self) -> None:
        steps = steps_of(self._folder)
        keep = set(steps[-self._keep :])
        values = {s: manifest.measured(self._folder / str(s)).get(self._best) for s in steps}
        if rated := [step for step in steps if values[step] is not None]:
            keep.add(max(rated, key=lambda step: (values[step], step)))
        for step in set(steps) - keep:
            # Renamed first, so that nothing half removed keeps its seal.
            removed = self._folder / f"{step}.removed"
            (self._folder / str(step)).replace(removed)
            shutil.rmtree(removed)

    def _settle(self) -> bool:
        """Waits for the save under way; whether the last one went well."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            try:
                self.latest = saving.result()
                self._failures = []
            except Exception as error:
                self._failed(_reason(error))
        return not self._failures

    def _failed(self, reason: str) -> None:
        """Notes why a save failed and when to try again; after the last pause `save` gives up."""
        self._failures.append(reason)
        pause = (*_PAUSES, 0.0)[min(len(self._failures) - 1, len(_PAUSES))]
        self._retry_at = time.monotonic() + pause
        _LOGGER.warning(
            "%s: a checkpoint cannot be written (%s); last saved step: %s; %s", self._folder,
            reason, self.latest, f"next try in {pause:.0f} s" if pause else "stopping",
        )  # fmt: skip

    def retry_due(self) -> bool:
        """Whether a save has failed and it is time to try again; never waits."""
        if self._saving is not None and not self._saving.done():
            return False
        return not self._settle() and time.monotonic() >= self._retry_at

    def finish(self, *arguments) -> None:
        """Waits on all hosts until the last save is done; what fails is tried again with these
        arguments of `save`."""
        self._retry_at = 0.0  # the first time at once
        while not sharding.all_hosts(self._settle()):
            time.sleep(max(self._retry_at - time.monotonic(), 0.0))
            self.save(*arguments)

    def close(self) -> None:
        """Ends the threads, after the save under way."""
        self._thread.shutdown()
        self._writer.close()


def _reason(error: Exception) -> str:
    """A storage's error in a few words, without the paths inside a checkpoint."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), repr(error))


def _remove(path: Path) -> None:
    """Removes a folder with its content, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
