"""Where a run starts: a trained stage of another run, or files from elsewhere."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files, sharding
from maect_jax.convert import importing
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.run import checkpoints
from maect_jax.stages import SAVED, STAGES
from maect_jax.stages.base import Stage
from maect_jax.stages.nnclr import check_same_head

RANDOM = "random"
SCRATCH = {"start": "random weights"}  # the end of a lineage
_FILE = "origin.json"


class Saved(NamedTuple):
    """A saved stage.

    Attributes:
      stage: its name.
      config: that it was made with; of files, what is known of it.
      read: its fields (`Stage.saved`), each array placed by the rules of the mesh that it is given.
    """

    stage: str
    config: ConfigDict
    read: Callable[..., dict]


def _saved(run: Path, stage: str, step: int | None = None) -> Saved:
    folder, parts = checkpoints.stage_folder(run, stage), SAVED[stage].saved
    config = configs.read(run / "config.json")
    return Saved(stage, config, lambda mesh: checkpoints.read_parts(folder, parts, mesh, step))


def encoders(run: Path) -> dict[str, Saved]:
    """The stages of a run whose encoder can be evaluated.

    A head's encoder is the MAE's; it counts only if the run has no MAE of its own.
    """
    trained = checkpoints.trained_stages(run, tuple(SAVED))
    return {name: _saved(run, name) for name in trained if name != "head" or "mae" not in trained}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a stage starts.

    Attributes:
      name: for messages.
      saved: the stage that is taken over.
      rows: all that an evaluation of it measures, by name.
      lineage: where its weights are from, the last first.
    """

    name: str
    saved: Saved
    rows: Callable[[], dict[str, Saved]]
    lineage: Callable[[], list[dict]]

    def start(self, model: ConfigDict, stage: type[Stage], mesh) -> dict:
        """What a stage takes over, fitted to the image size of its `model` section."""
        parts = SAVED[self.saved.stage].handover(self.saved.read(mesh))
        sections = self.saved.config.model, model
        grids = (positions.grid(each.image_size, each.patch_size) for each in sections)
        start = {part: parts[part] for part in stage.takes}
        return start | {"encoder": positions.fitted(start["encoder"], *grids)}

    def check_fits(self, config: ConfigDict, first: str) -> None:
        """Raises `UserError` if the first stage of a config cannot take over what is saved: the
        encoders or the heads differ, or there is no head for a stage that needs one."""
        where, old = f"config.init_from={config.init_from!r}", self.saved.config
        sizes = vit.size_of(old.model)._asdict(), vit.size_of(config.model)._asdict()
        pairs = {key: (sizes[0][key], sizes[1][key]) for key in sizes[0]}
        for key in ("patch_size", "channels", "ln_eps"):
            pairs[key] = old.model[key], config.model[key]
        for key in ("mean", "std"):
            pairs[key] = old.data.get(key, config.data[key]), config.data[key]
        for key, (before, value) in pairs.items():
            if before != value:
                raise UserError(f"{where}: its encoder has {key} {before!r}, config has {value!r}")
        if old.model.pool == "fc_norm" != config.model.pool:
            raise UserError(f"{where}: its final norm is that of fc_norm; set config.model.pool so")
        takes = set(STAGES[first].takes) if first in STAGES else set()
        if not takes <= set(SAVED[self.saved.stage].hands_on):
            raise UserError(f"{where}: has no head; stage {first} must start from a run with one")
        if "projector" in takes:
            check_same_head(old[self.saved.stage], config[first], f"{where}: that run")


def of_run(run: Path, stage: str, step: int | None = None) -> Origin:
    """A trained stage of a run, at its end unless a step is named."""
    saved = _saved(run, stage, step)
    name, entry = f"{run}, stage {stage}", {"run": str(run), "stage": stage}
    if step is not None:
        name, entry = f"{name}, step {step}", entry | {"step": step}
    rows = partial(encoders, run) if step is None else lambda: {stage: saved}
    return Origin(name, saved, rows, lambda: [entry, *read_lineage(run)])


def of_files(imported: importing.Imported) -> Origin:
    """Files from elsewhere."""

    def read(mesh):
        return sharding.place(imported.read(), mesh)

    saved = Saved(imported.kind, imported.config, read)
    name = ", ".join(map(str, imported.files))
    return Origin(name, saved, lambda: {imported.config.name: saved}, imported.origin)


def find(init_from: str, stage: str, needs_run: bool = True) -> Origin:
    """What `stage` starts from.

    Args:
      init_from: a run, for one of its trained stages; one of its checkpoints; or files.
      stage: the name of a training stage, or of the evaluation, which takes the last one.
      needs_run: that it cannot start from random weights.

    Raises:
      UserError: there is no such thing, it cannot be read, or it is a run that is not finished.
    """
    where = f"config.init_from={init_from!r}: "
    allowed = "the folder of a run or a file of weights"
    if not needs_run:
        allowed = f"the folder of a run, a file of weights, or {RANDOM!r} weights"
    if not init_from:
        raise UserError(f"{where}stage {stage} must start from something: {allowed}")
    try:
        is_file = importing.is_file(init_from)
    except OSError as error:  # a name that no file can have, or a folder without permission
        raise UserError(f"{where}cannot be read: {error.strerror}; must be {allowed}") from error
    if is_file:
        return of_files(importing.recognised(importing.paths_of(init_from)))
    run, name, step = checkpoints.run_of(Path(init_from))
    if not os.path.isfile(run / "config.json"):
        raise UserError(f"{where}there is no run; must be {allowed}")
    trained = checkpoints.trained_stages(run, tuple(SAVED))
    if not trained:
        raise UserError(f"{where}the run has no checkpoint yet; must be {allowed}")
    if step is None:
        order = reversed(trained)
        if stage in STAGES:  # an imported run has a stage of its own kind
            order = (*STAGES[stage].starts_from, "encoder", "probe")
        name = next(name for name in order if name in trained)
    check_saved(run, name, step, where)
    return of_run(run, name, step)


def check_saved(run: Path, stage: str, step: int | None, where: str) -> None:
    """Raises `UserError` if a run has no such checkpoint, or if no step is named and the stage is
    not at its end."""
    folder = checkpoints.stage_folder(run, stage)
    steps = checkpoints.steps_of(folder)
    if step is not None:
        if stage not in SAVED or step not in steps:
            saved = f"saved steps: {', '.join(map(str, steps)) or 'none'}"
            raise UserError(f"{where}there is no such checkpoint of stage {stage!r}; {saved}")
    elif steps[-1] != (end := checkpoints.read_position(folder, steps[-1])["steps"]):
        raise UserError(
            f"{where}its stage {stage} is at step {steps[-1]} of {end}; finish that run first"
        )


def read_lineage(run: Path) -> list[dict]:
    """Where the weights that a run started from are from, the last first; empty if it is not noted.
    Raises `UserError` if the file is damaged."""
    path = run / _FILE
    entries = files.read_json(path).get("from", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: is not a lineage. Remove it to do without.")
    return entries


def write_lineage(run: Path, lineage: list[dict]) -> None:
    """Notes in a run's folder where its weights are from. Raises `UserError` if that is noted
    already, and a file is no longer what it was."""
    before = {e["file"]: e.get("sha256") for e in read_lineage(run) if "file" in e}
    for entry in lineage:
        file, sha = entry.get("file"), entry.get("sha256")
        if before.get(file, sha) != sha:
            raise UserError(f"{file}: is another file than {run} started from (by its SHA-256)")
    files.write_json(run / _FILE, {"from": lineage})


def trained_stage(path: Path, stage: str | None = None) -> tuple[Path, str, int | None]:
    """The run, the stage and the step that `RUN` or `RUN/checkpoints/STAGE/STEP` names.

    Without `stage` it is the checkpoint's or the run's last one; the step is `None` for the end.

    Raises:
      UserError: there is no such run, stage or step, or the stage is not finished.
    """
    run, checkpoint_stage, step = checkpoints.run_of(path)
    if not (run / "config.json").is_file():
        file = "; a file must be imported first" if run.is_file() else ""
        raise UserError(f"{run}: there is no run (no config.json); name the folder of a run{file}")
    if stage not in (None, checkpoint_stage or stage):
        raise UserError(f"--stage={stage}: the checkpoint is one of stage {checkpoint_stage}")
    stage = stage or checkpoint_stage
    trained = checkpoints.trained_stages(run, tuple(SAVED))
    if not trained or stage not in (None, *trained):
        has = f"it has {', '.join(trained)}" if trained else "it has no checkpoint yet"
        raise UserError(f"{run}: no stage {stage or 'to export'}; {has}")
    stage = stage or trained[-1]
    check_saved(run, stage, step, f"{run}: ")
    return run, stage, step
