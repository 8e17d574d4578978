"""Saving and restoring states with orbax. Nobody else sees orbax."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maect_jax import sharding
from maect_jax.state import TrainState
from maect_jax.support_queue import Queue


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run keeps the checkpoints of one stage, a folder for each saved step."""
    return Path(run) / "checkpoints" / stage


class Checkpoints:
    """The saved states of one stage of a run; saving is asynchronous and atomic."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(epath.Path(folder.absolute()), options=options)

    def latest(self) -> int | None:
        """The last step that was saved whole, or `None`."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict) -> None:
        """Saves a state and the position in the run (plain JSON)."""
        items = dict(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """A state, placed as `abstract` (shapes with shardings) says, and the position."""
        items = dict(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored.state, restored.position

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def write(folder: Path, parts: dict) -> None:
    """Makes the folder of a stage that is at its end, of some fields of a state, NumPy arrays.

    They are written as they lie in memory: a copy, which orbax makes lest they change, or their
    compression would each take as much again.
    """
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    known = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=known, use_compression=False),
        "position": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(create=True)
    path = epath.Path(folder.absolute())
    with ocp.CheckpointManager(path, item_handlers=handlers, options=options) as manager:
        state = ocp.args.PyTreeSave(jax.tree.map(np.asarray, parts))
        items = dict(state=state, position=ocp.args.JsonSave({"steps": 0}))
        manager.save(0, args=ocp.args.Composite(**items))


def last_step(folder: Path) -> int | None:
    """The last step saved whole in a stage's folder, or `None`."""
    if not folder.is_dir():
        return None
    return max(ocp.utils.checkpoint_steps(epath.Path(folder.absolute())), default=None)


def trained_stages(run: Path, stages: tuple[str, ...]) -> list[str]:
    """Those of `stages` that a run has a checkpoint of."""
    return [name for name in stages if last_step(stage_folder(run, name)) is not None]


def _reader(folder: Path) -> ocp.CheckpointManager:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    path = epath.Path(folder.absolute())
    return ocp.CheckpointManager(path, item_handlers=handlers, options=options)


def read_position(folder: Path) -> dict:
    """What was saved beside the last state of a stage (`Checkpoints.save`)."""
    with _reader(folder) as reader:
        return reader.restore(
            reader.latest_step(), args=ocp.args.Composite(position=ocp.args.JsonRestore())
        ).position


def read_parts(folder: Path, parts: tuple[str, ...], mesh) -> dict:
    """Reads some fields of the last state of a stage, each array placed by the mesh's rules.

    Args:
      folder: a stage's folder (`stage_folder`) with at least one saved step.
      parts: names of `TrainState` fields.
      mesh: the device mesh.

    Returns:
      The fields by name, as nested dicts of arrays; `queue` as a `Queue`.
    """
    with _reader(folder) as reader:
        step = reader.latest_step()
        saved = reader.item_metadata(step).state.tree
        wanted = {part: saved[part] for part in parts}
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            wanted,
            sharding.tree_shardings(wanted, mesh),
        )
        restore = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        restored = reader.restore(step, args=ocp.args.Composite(state=restore)).state
    if restored.get("queue"):
        restored["queue"] = Queue(**restored["queue"])
    return restored
