"""Runs the stages of a config in order, each starting from the one before."""

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from maect_jax import inputs, plan, sharding, train, validate
from maect_jax.data import bad_images, sources
from maect_jax.errors import RunFailedError, UserError
from maect_jax.evals import finetuned, monitor, runner, table
from maect_jax.report import page
from maect_jax.run import board, checkpoints, lineage, snapshots
from maect_jax.run import folder as folders
from maect_jax.stages import build


def prepare(config: ConfigDict) -> lineage.Origin | None:
    """Checks a config against the machine and what it starts from.

    A page without a model of its own gets that of the run.

    Returns:
      Where the first stage starts, `None` for nowhere.

    Raises:
      UserError: a value is not allowed, or there is nothing such to start from.
    """
    validate.stages(config)
    found, first = None, config.stages[0]
    needs_run = first == "eval" or "model" not in config
    if first != "mae" and (config.init_from != lineage.RANDOM or needs_run):
        found = lineage.find(config.init_from, first, needs_run)
        if "model" not in config:
            with config.unlocked():
                config.model = found.saved.config.model
    validate.settings(config, jax.device_count())
    if config.tensorboard:
        board.available()
    if found:
        validate.succession(found.saved.config, found.saved.stage, config, first)
    return found


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


def _can_keep_best(config: ConfigDict, images: Mapping[str, sources.Source]) -> None:
    if config.checkpoint.best and not monitor.measures(config, images):
        raise UserError(
            f"config.checkpoint.best={config.checkpoint.best!r}: is measured on held-out images, "
            "and all images must have labels"
        )


def dry_run(config: ConfigDict) -> None:
    """Prints what `run` would do. The images and the run to start from need not be there."""
    validate.stages(config)
    if "model" not in config:
        try:
            model = lineage.find(config.init_from, config.stages[0]).saved.config.model
        except UserError as error:
            print(f"{config.name}: {' -> '.join(config.stages)}; its model is not known: {error}")
            return
        with config.unlocked():
            config.model = model
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
    if config.init_from == lineage.RANDOM:
        return "random weights"
    try:
        return lineage.find(config.init_from, config.stages[0], config.stages[0] == "eval").name
    except UserError as error:
        return f"nothing yet: {error}"


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs all stages; goes on where an earlier call was stopped.

    Args:
      config: a locked config from `config.load`.
      workdir: the run's folder; made if need be.

    Raises:
      UserError: bad input, before anything is written.
      PreemptedError: a signal has asked for the end.
      RunFailedError: it cannot go on; the text names the last good checkpoint.
    """
    with ExitStack() as held:
        with _together():
            before = prepare(config)
            mesh = sharding.make_mesh(**config.mesh)
            images = inputs.open_sources(config, workdir)
            _can_keep_best(config, images)
            check = held.enter_context(folders.claimed(workdir, config, before))
        with _together():
            if not (workdir / "config.json").exists():
                raise UserError(
                    f"--workdir={workdir}: all hosts must see this folder, on storage that they "
                    "share"
                )
        held.enter_context(jax.set_mesh(mesh))
        held.enter_context(jax.debug_nans(config.debug_nans))
        try:
            _stages(config, workdir, before, mesh, images, check)
        except (RunFailedError, OSError) as error:
            trained = [name for name in config.stages if name != "eval"]
            good = f"; {checkpoints.last_good(workdir, trained)}" if trained else ""
            raise RunFailedError(f"{error}{good}") from error


def _stages(config: ConfigDict, workdir: Path, before, mesh, images, check) -> None:
    """Runs all stages on images that are open, in a folder that is this run's (see `run`)."""
    if jax.process_index() == 0:
        sources.keep(images)
    seen = images.get("val", images["train"])
    watched = snapshots.Watched(runner.record(config, seen), held_out="val" in images)
    broken = {
        split: bad_images.Damage(source, config.model.channels, config.data.max_bad_fraction)
        for split, source in images.items()
    }
    shown = jax.process_index() == 0
    for name in config.stages:
        if name == "eval":
            rows = lineage.encoders(workdir) if len(config.stages) > 1 else before.rows()
            results = runner.run(config, images, broken, rows, workdir, mesh)
            if shown:
                print(f"\n{table.text(table.cells(results))}", flush=True)
            continue

        def start(before=before, name=name):
            return before.start(config.model, name, mesh) if before else {}

        measure = monitor.monitor(config, name, images, mesh)
        seen, lost = build.training_images(config, name, images["train"]), broken["train"]
        if seen is not images["train"]:
            lost = bad_images.Damage(seen, config.model.channels, config.data.max_bad_fraction)
        train.run(config, name, seen, lost, watched, measure, workdir, mesh, start, check)
        before = lineage.of_run(workdir, name)
        if name == "finetune":
            found = finetuned.classify(config, images, broken["val"], workdir, mesh)
            if shown:
                print(finetuned.text(found), flush=True)
    if shown:
        print(f"\n{page.build(workdir, images)}")
