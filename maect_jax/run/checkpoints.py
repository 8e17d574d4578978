"""Where checkpoints are, and reading them, with orbax; `saving` makes them. Nobody else sees orbax.

A stage's folder has a folder for each saved step. orbax writes it beside and renames it; then it is
sealed (`manifest`), and only then does it count.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maect_jax import sharding
from maect_jax.errors import UserError
from maect_jax.run import manifest
from maect_jax.stages.support_queue import Queue

FOLDER = "checkpoints"  # of a run


def stage_folder(run: Path, stage: str) -> Path:
    """Where a run keeps the checkpoints of one stage, a folder for each saved step."""
    return Path(run) / FOLDER / stage


def step_of(name: str) -> int | None:
    """The step whose folder has this name, as it is written; `None` for another name."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


def run_of(path: Path) -> tuple[Path, str | None, int | None]:
    """The run, the stage and the step that a path names: `RUN` or `RUN/checkpoints/STAGE/STEP`."""
    *_, folder, stage, step = (Path(), Path(), Path(), *path.absolute().parts)
    if folder == FOLDER and (found := step_of(step)) is not None:
        return path.parents[2], stage, found
    return path, None, None


def steps_of(folder: Path) -> list[int]:
    """The steps that are saved whole in a stage's folder, ascending."""
    if not folder.is_dir():
        return []
    steps = {path: step_of(path.name) for path in folder.iterdir()}
    return sorted(s for path, s in steps.items() if s is not None and manifest.is_sealed(path))


def last_step(folder: Path) -> int | None:
    """The last step saved whole in a stage's folder, or `None`."""
    return max(steps_of(folder), default=None)


def trained_stages(run: Path, stages: Sequence[str]) -> list[str]:
    """Those of `stages` that a run has a checkpoint of."""
    return [name for name in stages if last_step(stage_folder(run, name)) is not None]


def last_good(run: Path, stages: Sequence[str]) -> str:
    """The last checkpoint of a run, of the last of `stages`, for people."""
    try:
        trained = trained_stages(run, stages)
        if not trained:
            return "there is no checkpoint yet"
        folder = stage_folder(run, trained[-1])
        last = folder / str(last_step(folder))
    except OSError as error:
        return f"its checkpoints cannot be looked at now ({error.strerror})"
    return f"the last good checkpoint is {last}, from which the same command goes on"


def path_of(folder: Path, step: int) -> epath.Path:
    """A saved step, as orbax wants it."""
    return epath.Path(folder.absolute() / str(step))


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
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        state = ocp.args.PyTreeSave(jax.tree.map(np.asarray, parts))
        items = dict(state=state, position=ocp.args.JsonSave({"steps": 0}))
        writer.save(path_of(folder, 0), args=ocp.args.Composite(**items))
    manifest.seal(folder / "0", manifest.of(folder / "0"), {})


def _reader() -> ocp.Checkpointer:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def read_position(folder: Path, step: int) -> dict:
    """What was saved beside the state of a step (`Checkpoints.save`). Raises `UserError` where it
    is damaged."""
    items, path = ocp.args.Composite(position=ocp.args.JsonRestore()), path_of(folder, step)
    try:
        with _reader() as reader:
            position = reader.restore(path, args=items).position
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise _damaged(path, repr(error)) from error
    if not isinstance(position, dict) or "steps" not in position:
        raise _damaged(path, "its position is something else")
    return position


def _damaged(path: epath.Path, wrong: str) -> UserError:
    return UserError(
        f"{path}: is damaged ({wrong}); the command of that run goes on from the checkpoint "
        "before, and an import can be made again"
    )


def read_parts(folder: Path, parts: tuple[str, ...], mesh, step: int | None = None) -> dict:
    """Reads some fields of a saved state of a stage, each array placed by the mesh's rules.

    Args:
      folder: a stage's folder (`stage_folder`) with at least one saved step.
      parts: names of `TrainState` fields.
      mesh: the device mesh.
      step: which one, by default the last.

    Returns:
      The fields by name, as nested dicts of arrays; `queue` as a `Queue`.

    Raises:
      UserError: it is damaged, on all hosts.
    """
    step = last_step(folder) if step is None else step
    path = path_of(folder, step)
    try:
        wrong = manifest.damage(folder / str(step)) if jax.process_index() == 0 else None
    except OSError as error:
        wrong = f"it cannot be read: {error}"
    if not sharding.all_hosts(wrong is None):
        raise _damaged(path, wrong or "the first host names the file")
    with _reader() as reader:
        saved = reader.metadata(path).item_metadata.state.tree
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
        restored = reader.restore(path, args=ocp.args.Composite(state=restore)).state
    if restored.get("queue"):
        restored["queue"] = Queue(**restored["queue"])
    return restored
