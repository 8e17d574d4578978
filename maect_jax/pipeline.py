"""Runs the stages of a config in order, each starting from the one before."""

import dataclasses
import os
import platform
from contextlib import contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from maect_jax import (
    __version__,
    checkpoint,
    evaluate,
    files,
    inputs,
    monitor,
    plan,
    sharding,
    table,
    train,
    validate,
    watch,
)
from maect_jax import config as pages
from maect_jax.data import damage, sources
from maect_jax.errors import UserError
from maect_jax.evals import finetuned
from maect_jax.report import page
from maect_jax.stages import build

RANDOM = "random"
_FREE_KEYS = ("log_level", "eval.")  # of the config, which may differ when a run goes on

# Of a run with several stages, where each stage starts.
_PREFERRED = {
    "head": ("mae", "head", "ct", "finetune"),
    "ct": ("head", "ct", "mae", "finetune"),
    "finetune": ("ct", "head", "mae", "finetune"),
    "eval": ("ct", "head", "mae", "finetune"),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """A trained stage of a run: where a later stage starts."""

    run: Path
    stage: str

    @property
    def folder(self) -> Path:
        return checkpoint.stage_folder(self.run, self.stage)

    def config(self) -> ConfigDict:
        """The config that the run was made with."""
        return pages.read(self.run / "config.json")


def prepare(config: ConfigDict) -> Origin | None:
    """Checks a config against the machine and the run that it starts from.

    A page without a model of its own gets that of the run.

    Returns:
      Where the first stage starts, `None` for nowhere.

    Raises:
      UserError: a value is not allowed, or there is no such run.
    """
    validate.stages(config)
    origin, first = None, config.stages[0]
    needs_run = first == "eval" or "model" not in config
    if first != "mae" and (config.init_from != RANDOM or needs_run):
        origin = find(config.init_from, first, needs_run)
        before = origin.config()
        if "model" not in config:
            with config.unlocked():
                config.model = before.model
    validate.settings(config, jax.device_count())
    if origin:
        validate.succession(before, origin.stage, config, first)
        _finished(origin)
    return origin


def find(init_from: str, stage: str, needs_run: bool = True) -> Origin:
    """The trained stage of run `init_from` that `stage` starts from.

    `needs_run` says that it cannot start from random weights.

    Raises:
      UserError: there is no such run, or nothing in it yet.
    """
    where = f"config.init_from={init_from!r}: "
    allowed = "the folder of a run" + ("" if needs_run else f", or {RANDOM!r} weights")
    if not init_from:
        raise UserError(f"{where}stage {stage} must start from something: {allowed}")
    run = Path(init_from)
    if not (run / "config.json").is_file():
        raise UserError(f"{where}there is no run; must be {allowed}")
    trained = checkpoint.trained_stages(run, build.TRAINING)
    if not trained:
        raise UserError(f"{where}the run has no checkpoint yet; must be {allowed}")
    return Origin(run, next(name for name in _PREFERRED[stage] if name in trained))


def _finished(origin: Origin) -> None:
    step = checkpoint.last_step(origin.folder)
    steps = checkpoint.read_position(origin.folder)["steps"]
    if step != steps:
        raise UserError(
            f"config.init_from={str(origin.run)!r}: its stage {origin.stage} is at step {step} of "
            f"{steps}; finish that run first"
        )


@contextmanager
def _together():
    """A user's error on one host ends all of them, each with a line: none waits for another."""
    failed = None
    try:
        yield
    except UserError as error:
        failed = error
    if not sharding.on_all_hosts(failed is None):
        raise failed or UserError("another host has stopped, and says why")


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Writes the config into the run's folder, which must be this run's or new."""
    path = workdir / "config.json"
    if path.exists():
        differing = pages.differing(pages.read(path), config)
        differing = [line for line in differing if not line.startswith(_FREE_KEYS)]
        if differing:
            raise UserError(
                f"--workdir={workdir}: holds another run ({'; '.join(differing)}); name another "
                "folder, or remove that one"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            files.write_json(workdir / "environment.json", _environment())
            files.write_json(path, config.to_dict())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there: {error}") from error


def _environment() -> dict:
    """What the run runs on."""
    return {
        "maect_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }


def dry_run(config: ConfigDict) -> None:
    """Prints what `run` would do. The images and the run to start from need not be there."""
    validate.stages(config)
    if "model" not in config:
        done = {"finetune": ("fine-tuning",), "eval": config.get("eval", {}).get("protocols", ())}
        what = ", ".join(part for name in config.stages for part in done[name])
        print(f"{config.name}: {what} of {config.init_from}")
        return
    validate.settings(config, jax.device_count())
    mesh = sharding.make_mesh(**config.mesh)
    images, whose = plan.training_images(config)
    inputs.enough(config, images)
    print(f"{config.name}: {' -> '.join(config.stages)}; {len(images):,} training images ({whose})")
    print(f"on {mesh.size} {mesh.devices.flat[0].device_kind} ({sharding.sizes(mesh.shape)})")
    if config.stages[0] != "mae":
        print(f"from {_start(config)}")
    print("\n".join(plan.describe(config, images)))


def _start(config: ConfigDict) -> str:
    """Where the first stage starts, and whether it could."""
    if config.init_from == RANDOM:
        return "random weights"
    try:
        origin = find(config.init_from, config.stages[0], config.stages[0] == "eval")
        _finished(origin)
    except UserError as error:
        return f"nothing yet: {error}"
    return f"{origin.run}, stage {origin.stage}"


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs all stages; goes on where an earlier call was stopped.

    Args:
      config: a locked config from `config.load`.
      workdir: the run's folder; made if need be.

    Raises:
      UserError: bad input, before anything is written.
      RunFailedError: training cannot go on.
    """
    with _together():
        origin = prepare(config)
        mesh = sharding.make_mesh(**config.mesh)
        images = inputs.open_sources(config, workdir)
        _claim(workdir, config)
    with _together():
        if not (workdir / "config.json").exists():
            raise UserError(
                f"--workdir={workdir}: all hosts must see this folder, on storage that they share"
            )
    if jax.process_index() == 0:
        sources.keep(images)
    seen = images.get("val", images["train"])
    watched = watch.Watched(evaluate.record(config, seen), held_out="val" in images)
    broken = {
        split: damage.Damage(source, config.model.channels, config.data.max_bad_fraction)
        for split, source in images.items()
    }
    shown = jax.process_index() == 0
    with jax.set_mesh(mesh):
        for name in config.stages:
            if name == "eval":
                evaluated = workdir if len(config.stages) > 1 else origin.run
                results = evaluate.run(config, images, broken, evaluated, workdir, mesh)
                if shown:
                    print(f"\n{table.text(table.cells(results))}", flush=True)
                continue

            def start(origin=origin, name=name):
                if origin is None:
                    return {}
                parts = build.SAVED_PARTS[origin.stage]
                saved = checkpoint.read_parts(origin.folder, parts, mesh)
                return build.handover(origin.stage, saved, name)

            measure = monitor.monitor(config, name, images, mesh)
            seen, lost = build.training_images(config, name, images["train"]), broken["train"]
            if seen is not images["train"]:
                lost = damage.Damage(seen, config.model.channels, config.data.max_bad_fraction)
            train.run(config, name, seen, lost, watched, measure, workdir, mesh, start)
            origin = Origin(workdir, name)
            if name == "finetune":
                found = finetuned.classify(config, images, broken["val"], workdir, mesh)
                if shown:
                    print(finetuned.text(found), flush=True)
    if shown:
        print(f"\n{page.build(workdir, images)}")
