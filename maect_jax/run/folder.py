"""A run's folder: one run at a time, and what may change when a run resumes."""

import dataclasses
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import __version__, files
from maect_jax import config as configs
from maect_jax.data import labels
from maect_jax.data.base import Identity
from maect_jax.errors import UserError, first_of
from maect_jax.run import checkpoints, lineage, lock
from maect_jax.run.writers import NO_WRITERS, Writers

_LOGGER = logging.getLogger(__name__)
_SHOWN = 5  # differing keys in an error
# Config keys that may differ when a run resumes: they change how it runs and what it writes, not
# what is computed; `data.max_pixels` changes which images are bad, as repairing files does. The
# mesh, the parts of a batch and what is computed twice change the rounding.
_HOW_IT_RUNS = (
    "log_level", "log_every", "loggers", "profile", "debug_nans", "nan_policy", "nan_limit",
    "checkpoint.", "monitor.", "mesh.", "encoder_microbatches", "remat", "data.workers",
    "data.max_bad_fraction", "data.max_pixels",
)  # fmt: skip
_MAY_CHANGE = (*_HOW_IT_RUNS, "eval.")  # which is computed again

# Keys that say where images are. What they are is in this file of a run.
_WHERE_IMAGES_ARE = (
    "data.source:", "data.path:", "data.name:", "data.train_split:", "data.val_split:",
    "finetune.images:",
)  # fmt: skip
_IMAGES = "images.json"
# What a new run may find in its folder: what a start that was cut off has left (`_claim`), what a
# disk has, and logs.
_STARTED = ("origin", "environment", "images", "config")
_MAY_BE_THERE = {f"{name}{x}" for name in _STARTED for x in (".json", ".tmp")}
_MAY_BE_THERE |= {lock.NAME, "lost+found"}
_LOGS = {".txt", ".log", ".out", ".err"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that holds its folder."""

    config: ConfigDict
    folder: Path  # where all its files are
    mesh: Mesh  # of devices; the current one
    # Raises `RunFailedError` if another process has taken the folder.
    check_lock: Callable[[], None] = lambda: None
    writers: Writers = NO_WRITERS  # its loggers


@contextmanager
def opened(run: Run, origin: lineage.Saved | None, images: Mapping[str, Identity]) -> Iterator[Run]:
    """Makes a new folder the run's, or checks that it was before; process 0 holds its lock.

    Writes the config, what the run runs on, where its weights are from (`origin`, of the first
    stage), and, until a stage begins, what its images are, by split and by stage. Yields the run
    with its `check_lock`. Raises `UserError` if the folder holds another run, is in use, or cannot
    be written."""
    with ExitStack() as stack:
        if jax.process_index() == 0:
            if run.folder.parts[:1] and run.folder.parts[0].endswith(":"):  # gs://, s3://
                raise UserError(
                    f"--workdir={run.folder}: must be a folder. Mount a bucket as one (gcsfuse)."
                )
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                check = stack.enter_context(lock.held(run.folder))
                _claim(run, origin, images)
            except OSError as error:
                raise UserError(f"--workdir={run.folder}: cannot write there: {error}") from error
            run = dataclasses.replace(run, check_lock=check)
        yield run


def _claim(run: Run, origin: lineage.Saved | None, images: Mapping[str, Identity]) -> None:
    folder, config = run.folder, run.config
    path, environment = folder / "config.json", _environment()
    if path.exists():
        noted, before = files.read_json(folder / _IMAGES), configs.read(path)
        changes = _changes(noted, images)
        same = _same_places(before, config)
        if noted and not changes:
            same += _WHERE_IMAGES_ARE
            if labels.is_file(before.data.labels) and labels.is_file(config.data.labels):
                same += ("data.labels:",)
        differing = [x for x in configs.differences(before, config) if not x.startswith(same)]
        if other := [line for line in differing if not line.startswith(_MAY_CHANGE)]:
            more = len(other) - _SHOWN
            listed = [*other[:_SHOWN], *[f"and {more} more keys"] * (more > 0), *changes]
            raise UserError(
                f"--workdir={folder}: holds another run ({'; '.join(listed)}). Use another "
                "--workdir or remove that run."
            )
        ran_on = ConfigDict(files.read_json(folder / "environment.json"))
        if changed := differing + configs.differences(ran_on, ConfigDict(environment)):
            _LOGGER.warning("%s: resuming with changes: %s", folder, "; ".join(changed))
    elif (folder / checkpoints.FOLDER).exists():
        raise UserError(
            f"--workdir={folder}: contains checkpoints but no config.json. Restore it or use "
            "another --workdir."
        )
    elif others := sorted(
        path.name
        for path in folder.glob("[!.]*")
        if path.name not in _MAY_BE_THERE and path.suffix not in _LOGS
    ):
        raise UserError(
            f"--workdir={folder}: holds no run but other files, such as {others[0]}. Use another "
            "--workdir."
        )
    # The first may be refused, before anything is written.
    lineage.write_lineage(folder, origin.lineage() if origin else [lineage.SCRATCH])
    files.write_json(folder / "environment.json", environment)
    if not (folder / checkpoints.FOLDER).exists():  # else each stage has noted its own
        note_images(folder, images)
    files.write_json(path, config.to_dict())


def recipe(folder: Path) -> dict[str, Any]:
    """What the results of a run follow from, but for its seed: its config without what only says
    how it runs; what its images are, rather than where; and what its first weights are: the recipe
    of the run that they are from, as far as it is there, or else its path."""
    origin: list = lineage.read_lineage(folder)
    for entry in origin[:1]:
        start = Path(entry.get("run", ""))
        if "run" in entry and (start / "config.json").exists():
            origin = [{**entry, "run": recipe(start)}]
    noted = files.read_json(folder / _IMAGES)  # by 0.1, the numbers of images alone
    images = [(n, x["images"], x["content"]) for n, x in noted.items() if isinstance(x, Mapping)]
    known = bool(images) and len(images) == len(noted) and all(content for *_, content in images)
    left_out = ("seed:", *_HOW_IT_RUNS, *_WHERE_IMAGES_ARE * known, *["init_from:"] * bool(origin))
    values = configs.flat(configs.read(folder / "config.json"))
    kept = {key: x for key, x in values.items() if not f"{key}:".startswith(left_out)}
    return {"config": kept, "images": images, "origin": origin}


def note_images(folder: Path, images: Mapping[str, Identity]) -> None:
    """Notes in a run's folder what the images are, by split and by stage, with which it or one of
    its stages begins."""
    noted = files.read_json(folder / _IMAGES)
    noted |= {name: identity._asdict() for name, identity in images.items()}
    files.write_json(folder / _IMAGES, noted)


def note_classes(run: Run, stage: str, classes: Sequence[str]) -> None:
    """Notes in a run's folder the names of the classes that a stage learns, empty where they have
    none. Raises `UserError` if it has learned others."""
    trained, before = checkpoints.stage_folder(run.folder, stage), lineage.classes(run.folder)
    if checkpoints.steps_of(trained) and before not in ([], classes):
        raise UserError(
            f"--workdir={run.folder}: its stage {stage} knows the classes {first_of(before)}; the "
            f"images now have {first_of(classes)}. Restore the labels or use another --workdir."
        )
    lineage.write_classes(run.folder, classes)


def _same_places(before: ConfigDict, config: ConfigDict) -> tuple[str, ...]:
    """The keys that name the same file or folder in two configs, however it is spelled."""
    old, new = configs.flat(before), configs.flat(config)

    def place(path) -> str:
        is_path = isinstance(path, str) and path not in ("", lineage.RANDOM)
        return os.path.realpath(path) if is_path else f"no path: {path}"

    places = {"data.path", "data.labels", "init_from"} & old.keys() & new.keys()
    return tuple(f"{key}:" for key in places if place(old[key]) == place(new[key]))


def _changes(noted: Mapping, images: Mapping[str, Identity]) -> list[str]:
    """What has changed since a run noted its images, but for times. Images that were not opened on
    both occasions do not count."""
    differences = {name: images[name].difference(noted[name]) for name in images if name in noted}
    return [f"{name}: {x.text}" for name, x in differences.items() if x and x.content]


def _environment() -> dict:
    """What the run runs on."""
    return {
        "maect_jax": __version__, "jax": jax.__version__, "python": platform.python_version(),
        "devices": jax.device_count(), "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(), "cpu_cores": os.cpu_count(),
    }  # fmt: skip
