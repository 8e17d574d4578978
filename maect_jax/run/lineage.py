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
_LINEAGE = "origin.json"
# Two stages must agree on the encoder; the image size may differ.
_ENCODER_KEYS = ("patch_size", "channels", "ln_eps")

_ALONE = ("encoder", "probe")  # what an imported run may have, and nothing else


class Saved(NamedTuple):
    """A stage that something has saved.

    Attributes:
      stage: its name.
      config: that it was made with; of files, what is known of it.
      read: `Saved.saved` of it, each array placed by the rules of the mesh that it is given.
    """

    stage: str
    config: ConfigDict
    read: Callable[..., dict]


def saved(run: Path, stage: str, step: int | None = None) -> Saved:
    """A stage of a run, at its end unless a step is named."""
    folder = checkpoints.stage_folder(run, stage)
    parts = SAVED[stage].saved
    config = configs.read(run / "config.json")
    return Saved(stage, config, lambda mesh: checkpoints.read_parts(folder, parts, mesh, step))


def encoders(run: Path) -> dict[str, Saved]:
    """The stages of a run whose encoder can be evaluated.

    A head's encoder is the MAE's; it counts only where the run has no MAE of its own.
    """
    found = checkpoints.trained_stages(run, tuple(SAVED))
    return {name: saved(run, name) for name in found if name != "head" or "mae" not in found}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a stage starts.

    Attributes:
      name: what people call it.
      saved: the stage that is taken over.
      rows: by name, all that an evaluation of it measures.
      lineage: where its weights are from, the last first.
    """

    name: str
    saved: Saved
    rows: Callable[[], dict[str, Saved]]
    lineage: Callable[[], list[dict]]

    def start(self, model: ConfigDict, stage: type[Stage], mesh) -> dict:
        """What a stage takes over, fitted to the image size of its `model` section."""
        found = SAVED[self.saved.stage].handover(self.saved.read(mesh))
        start = {part: found[part] for part in stage.takes}
        both = (self.saved.config.model, model)
        old, new = (positions.grid(m.image_size, m.patch_size) for m in both)
        return start | {"encoder": positions.fitted(start["encoder"], old, new)}

    def check_fits(self, config: ConfigDict, first: str) -> None:
        """Checks that the first stage of a config can take over what is saved.

        Raises:
          UserError: the encoders or the heads differ, or there is no head for a stage that needs
            one.
        """
        where, old = f"config.init_from={config.init_from!r}", self.saved.config
        sizes = vit.size_of(old.model)._asdict(), vit.size_of(config.model)._asdict()
        for key, value in sizes[0].items():
            if value != sizes[1][key]:
                raise UserError(
                    f"{where}: its encoder has {key} {value}, config.model has {sizes[1][key]}"
                )
        for key in _ENCODER_KEYS:
            if old.model[key] != config.model[key]:
                raise UserError(
                    f"{where}: its config.model.{key} is {old.model[key]!r}, not "
                    f"{config.model[key]!r}"
                )
        if old.model.pool == "fc_norm" != config.model.pool:
            raise UserError(
                f"{where}: its final norm is that of the pooled feature; set "
                "config.model.pool=fc_norm"
            )
        for key in ("mean", "std"):
            value = config.data[key]
            if (before := old.data.get(key, value)) != value:  # files do not always tell
                raise UserError(f"{where}: its config.data.{key} is {before!r}, not {value!r}")
        takes = set(STAGES[first].takes) if first in STAGES else set()
        if not takes <= set(SAVED[self.saved.stage].hands_on):
            raise UserError(
                f"{where}: stage {first} starts from a run with a head, this one has none"
            )
        if "projector" in takes:
            check_same_head(old[self.saved.stage], config[first], f"{where}: that run")


def of_run(run: Path, stage: str, step: int | None = None) -> Origin:
    """A trained stage of a run, at its end unless a step is named."""
    one, at = saved(run, stage, step), {} if step is None else {"step": step}

    def lineage():
        return [{"run": str(run), "stage": stage, **at}, *read_lineage(run)]

    name = ", ".join([str(run), f"stage {stage}", *(f"step {s}" for s in at.values())])
    return Origin(name, one, (lambda: {stage: one}) if at else partial(encoders, run), lineage)


def of_files(imported: importing.Imported) -> Origin:
    """Files from elsewhere."""

    def read(mesh):
        return sharding.place(imported.read(), mesh)

    one = Saved(imported.kind, imported.config, read)
    name = ", ".join(map(str, imported.files))
    return Origin(name, one, lambda: {imported.config.name: one}, imported.origin)


def find(init_from: str, stage: str, needs_run: bool = True) -> Origin:
    """What `stage` starts from: the trained stage of run `init_from`, one of its checkpoints, or
    files.

    `needs_run` says that it cannot start from random weights.

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
        foreign = importing.is_file(init_from)
    except OSError as error:  # a name that no file can have, or a folder of somebody else's
        raise UserError(f"{where}cannot be read: {error.strerror}; must be {allowed}") from error
    if foreign:
        return of_files(importing.recognised(importing.paths_of(init_from)))
    run, at, step = checkpoints.run_of(Path(init_from))
    if not os.path.isfile(run / "config.json"):
        raise UserError(f"{where}there is no run; must be {allowed}")
    trained = checkpoints.trained_stages(run, tuple(SAVED))
    if not trained:
        raise UserError(f"{where}the run has no checkpoint yet; must be {allowed}")
    if step is not None:
        has_step(run, at, step, where)
        return of_run(run, at, step)
    preferred = reversed(trained)  # for an evaluation the last one
    if stage in STAGES:
        preferred = (*STAGES[stage].starts_from, *_ALONE)
    name = next(name for name in preferred if name in trained)
    finished(run, name, where)
    return of_run(run, name)


def has_step(run: Path, stage: str, step: int, where: str) -> None:
    """Raises `UserError` where a run has no such checkpoint."""
    there = checkpoints.steps_of(checkpoints.stage_folder(run, stage))
    if stage not in SAVED or step not in there:
        saved = f"steps {', '.join(map(str, there))} are saved" if there else "no step is saved"
        raise UserError(f"{where}there is no such checkpoint; of stage {stage!r} {saved}")


def finished(run: Path, stage: str, where: str) -> None:
    """Raises `UserError` where a stage of a run is not at its end."""
    folder = checkpoints.stage_folder(run, stage)
    step = checkpoints.last_step(folder)
    steps = checkpoints.read_position(folder, step)["steps"]
    if step != steps:
        raise UserError(
            f"{where}its stage {stage} is at step {step} of {steps}; finish that run first"
        )


def read_lineage(run: Path) -> list[dict]:
    """Where the weights that a run started from are from, the last first; empty where it does not
    tell. Raises `UserError` where the file is damaged."""
    path = run / _LINEAGE
    found = files.read_json(path).get("from", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: holds something else than a lineage; remove it, to do without")
    return found


def write_lineage(run: Path, lineage: list[dict]) -> None:
    """Notes in a run's folder where its weights are from.

    Raises:
      UserError: it is noted already, and a file is no longer what it was.
    """
    before = {e["file"]: e.get("sha256") for e in read_lineage(run) if "file" in e}
    for entry in lineage:
        if before.get(entry.get("file"), entry.get("sha256")) != entry.get("sha256"):
            raise UserError(
                f"{entry['file']}: is another file than {run} started from (by its SHA-256)"
            )
    files.write_json(run / _LINEAGE, {"from": lineage})


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
    if step is None:
        finished(run, stage, f"{run}: ")
    else:
        has_step(run, stage, step, f"{run}: ")
    return run, stage, step
