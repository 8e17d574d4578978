"""Where a run starts: a trained stage of another run, or files from elsewhere."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files, sharding
from maect_jax.convert import hub, importing
from maect_jax.errors import UserError
from maect_jax.models import positions, vit
from maect_jax.run import checkpoints
from maect_jax.stages import SAVED, STAGES
from maect_jax.stages.base import Stage

_LOGGER = logging.getLogger(__name__)
RANDOM = "random"
SCRATCH = {"start": "random weights"}  # the end of a lineage
_FILE, _CLASSES = "origin.json", "classes.json"


class SavedStage:
    """A trained stage of a run, at its end unless a step is named.

    Attributes:
      stage: its name.
      config: that it was made with.
    """

    def __init__(self, run: Path, stage: str, step: int | None = None):
        self.stage, self.config = stage, configs.read(run / "config.json")
        self.run, self.step = run, step

    def __str__(self):
        name = f"{self.run}, stage {self.stage}"
        return name if self.step is None else f"{name}, step {self.step}"

    def read(self, mesh) -> dict:
        """Its fields (`Stage.saved`), each array placed by the rules of the mesh."""
        folder = checkpoints.stage_folder(self.run, self.stage)
        return checkpoints.read_parts(folder, SAVED[self.stage].saved, mesh, self.step)

    @property
    def classes(self) -> list[str]:
        """The names of the classes that its run knows; none if they have no names, and in runs of
        earlier versions."""
        return classes(self.run)

    def rows(self) -> dict[str, "SavedStage"]:
        """What an evaluation of it measures, by name: of a run, all stages with an encoder.

        A head's encoder is the MAE's; it counts only if the run has no MAE of its own.
        """
        if self.step is not None:
            return {self.stage: self}
        trained = checkpoints.trained_stages(self.run, tuple(SAVED))
        names = [name for name in trained if SAVED[name].encoder_of not in trained]
        return {name: SavedStage(self.run, name) for name in names}

    def lineage(self) -> list[dict]:
        """Where its weights are from, the last first."""
        entry: dict[str, str | int] = {"run": str(self.run), "stage": self.stage}
        if self.step is not None:
            entry["step"] = self.step
        return [entry, *read_lineage(self.run)]


class SavedFiles:
    """Files from elsewhere, with what `SavedStage` has; `config` is what is known of it. `fetch`
    gets what an id of the hub names."""

    def __init__(
        self,
        path: str,
        overrides: importing.Overrides | None = None,
        fetch: Callable[[str], hub.Fetched] = hub.fetch,
    ):
        self._imported = imported = importing.recognised(importing.paths_of(path), overrides, fetch)
        self.stage, self.config = imported.kind, imported.config
        self.classes: list[str] = []
        self.lineage = cache(imported.origin)  # which reads all of the files
        for note in imported.notes:
            _LOGGER.warning("%s", note)

    def __str__(self):
        files = self._imported.files.items()
        return ", ".join(about["file"] if "named" in about else str(x) for x, about in files)

    def read(self, mesh) -> dict:
        return sharding.place(self._imported.read(), mesh)

    def rows(self) -> dict[str, "SavedFiles"]:
        return {self.config.name: self}


Saved = SavedStage | SavedFiles


def start(saved: Saved, model: ConfigDict, stage: type[Stage], mesh) -> dict:
    """What a stage takes over, fitted to the image size of its `model` section."""
    parts = SAVED[saved.stage].handover(saved.read(mesh))
    grids = (positions.grid(m.image_size, m.patch_size) for m in (saved.config.model, model))
    taken = {part: parts[part] for part in stage.takes}
    rotary = model.rope_theta is not None
    return taken | {"encoder": positions.fitted(taken["encoder"], *grids, rotary=rotary)}


def check_fits(saved: Saved, config: ConfigDict) -> None:
    """Raises `UserError` if the first stage of a config cannot take over what is saved: the
    encoders or the heads differ, or there is no head for a stage that needs one."""
    where, old, first = f"config.init_from={config.init_from!r}", saved.config, config.stages[0]

    def encoder_of(model):
        keys = ("patch_size", "channels", "ln_eps", *vit.KIND)
        return vit.size_of(model)._asdict() | {key: model[key] for key in keys}

    before, now = encoder_of(old.model), encoder_of(config.model)
    for key in ("mean", "std"):
        before[key], now[key] = old.data.get(key, config.data[key]), config.data[key]
    others = [
        f"config.{'data' if key in ('mean', 'std') else 'model'}.{key}={value} (it is {now[key]})"
        for key, value in before.items()
        if value != now[key]
    ]
    if others:
        raise UserError(f"{where}: its encoder needs {', '.join(others)}")
    if old.model.pool == "fc_norm" != config.model.pool:
        raise UserError(f"{where}: was trained with pool='fc_norm'; set config.model.pool=fc_norm")
    takes = set(STAGES[first].takes) if first in STAGES else set()
    if not takes <= set(SAVED[saved.stage].hands_on):
        able = " or ".join(name for name, s in STAGES.items() if takes <= set(s.hands_on))
        raise UserError(
            f"{where}: its stage {saved.stage} has no head for stage {first}, which must start "
            f"from a run of {able}"
        )
    if takes > {"encoder"}:
        before, now = old[saved.stage], config[first]
        STAGES[first].check_taken(before, now, f"the run that {where} names")


def find(
    init_from: str,
    stage: str,
    needs_run: bool = True,
    fetch: Callable[[str], hub.Fetched] = hub.fetch,
) -> Saved:
    """What a training stage or the evaluation, which takes the last stage, starts from: a run, for
    one of its trained stages; one of its checkpoints; or files, which `fetch` gets from the hub.
    With `needs_run` it cannot start from random weights. Raises `UserError` if there is no such
    thing, it cannot be read, or it is a run that is not finished."""
    where = f"config.init_from={init_from!r}"
    allowed = "the folder of a run, a file of weights, or hf://ORG/NAME"
    if not needs_run:
        allowed = f"{allowed}; or {RANDOM!r} weights"
    if not init_from:
        raise UserError(f"{where}: stage {stage} must start from something: {allowed}")
    try:
        is_file = importing.is_file(init_from)
    except OSError as error:  # a name that no file can have, or a folder without permission
        raise UserError(f"{where}: cannot be read: {error.strerror}; must be {allowed}") from error
    if is_file:
        return SavedFiles(init_from, fetch=fetch)
    wanted: tuple[str, ...] = ()
    if stage in STAGES:  # an imported run has a stage of its own kind
        wanted = (*STAGES[stage].starts_from, *(name for name in SAVED if name not in STAGES))
    return trained_stage(Path(init_from), wanted, where=where, allowed=allowed)


def trained_stage(path: Path, wanted: Sequence[str], where: str, allowed: str) -> SavedStage:
    """The stage that `RUN` or `RUN/checkpoints/STAGE/STEP` names.

    Args:
      path: of the run, or of one of its checkpoints.
      wanted: stages of a run, the preferred one first; if empty, all from the last one on.
      where: names the path in an error.
      allowed: says there what it must be.

    Raises:
      UserError: there is no such run, stage or step, or the stage is not finished.
    """
    run, stage, step = checkpoints.run_of(path)
    if not os.path.exists(run):
        raise UserError(f"{where}: there is no such file or folder; must be {allowed}")
    if not os.path.isfile(run / "config.json"):
        raise UserError(f"{where}: there is no run (no config.json); must be {allowed}")
    trained = checkpoints.trained_stages(run, tuple(SAVED))
    if not trained:
        raise UserError(f"{where}: the run has no checkpoint yet; must be {allowed}")
    if step is None:
        stage = next((name for name in wanted or trained[::-1] if name in trained), None)
    if stage is None:
        has = ", ".join(trained)
        raise UserError(f"{where}: the run has no stage {' or '.join(wanted)}; it has {has}")
    folder = checkpoints.stage_folder(run, stage)
    steps = checkpoints.steps_of(folder)
    if step is None:
        end = checkpoints.read_position(folder, steps[-1])["steps"]
        if steps[-1] != end:
            raise UserError(
                f"{where}: its stage {stage} is at step {steps[-1]} of {end}; finish that run first"
            )
    elif stage not in SAVED or step not in steps:
        exist = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"{where}: there is no such checkpoint of stage {stage!r}; saved steps: {exist}"
        )
    return SavedStage(run, stage, step)


def read_lineage(run: Path) -> list[dict]:
    """Where the weights that a run started from are from, the last first; empty if it is not noted.
    Raises `UserError` if the file is damaged."""
    path = run / _FILE
    entries = files.read_json(path).get("from", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: is not a lineage. Remove it to do without.")
    return entries


def classes(run: Path) -> list[str]:
    """The names of the classes that a run knows; empty if none are noted. Raises `UserError` if the
    file is damaged."""
    path = run / _CLASSES
    names = files.read_json(path).get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: does not hold names. Remove it to do without.")
    return names


def write_classes(run: Path, names: Sequence[str]) -> None:
    """Notes in a run's folder the names of the classes that it knows."""
    files.write_json(run / _CLASSES, {"classes": list(names)})


def hub_ids(run: Path) -> dict[str, str]:
    """The ids of the hub that a run started from, as they were given, with what they were then."""
    return {entry["named"]: entry["file"] for entry in read_lineage(run) if "named" in entry}


def write_lineage(run: Path, lineage: list[dict]) -> None:
    """Notes in a run's folder where its weights are from. Raises `UserError` if that is noted
    already, and a file is no longer what it was."""
    before = {entry["file"]: entry for entry in read_lineage(run) if "file" in entry}
    for entry in lineage:
        noted = before.get(entry.get("file"), entry)
        if noted.get("sha256") != entry.get("sha256"):
            name = entry["file"]
            raise UserError(f"{name}: is another file than {run} started from (by its SHA-256)")
        if noted.get("key") != entry.get("key"):
            raise UserError(
                f"{entry['file']}: {run} started from {noted.get('key') or 'one'} of its models, "
                f"now it would be {entry.get('key')}. Import that one by maect import's --key, and "
                "start another run from it."
            )
    files.write_json(run / _FILE, {"from": lineage})
