"""The loop, once, for every training stage."""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from maect_jax import sharding
from maect_jax.data import bad_images, loader, sources
from maect_jax.errors import PreemptedError, UserError
from maect_jax.run import logger, preemption, snapshots
from maect_jax.run.bad_steps import BadSteps
from maect_jax.run.checkpoints import stage_folder
from maect_jax.run.saving import Checkpoints
from maect_jax.run.trace import Trace
from maect_jax.stages import build, state
from maect_jax.stages.step import compiled

_LOGGER = logging.getLogger(__name__)
_GO_ON, _SAVE, _STOP = range(3)  # what a host votes for; the highest vote counts


def record(config: ConfigDict, name: str, source: sources.Source) -> loader.TrainRecord:
    """What makes the training examples of stage `name`."""
    seed = (config.seed, build.TRAINING.index(name))  # no stage repeats another's crops
    section, model, data = config[name], config.model, config.data
    scales = (section.crop_scale,) * build.views(name)
    settings = (source, model.channels, model.image_size, scales, seed, data.scaled_jpeg)
    if name == "finetune":
        return loader.FinetuneRecord(*settings, data.mean if section.randaugment else None)
    return loader.TrainRecord(*settings)


def batches(config: ConfigDict, name: str, source: sources.Source, steps: int, mesh):
    """This process's rows of the batches of stage `name`, with a position that can be saved."""
    batch_size, make = config[name].batch_size, record(config, name, source)
    rows = sharding.local_rows(batch_size, mesh)
    order = loader.Order(len(source), batch_size, steps, make.seed, rows)
    return loader.train_batches(order, make, config.data.workers)


def abstract_batch(config: ConfigDict, name: str, source: sources.Source, mesh) -> dict:
    """Shapes, dtypes and shardings of the global batches of stage `name`, without an image."""
    rows, place = config[name].batch_size, sharding.batch_split(mesh)
    example = record(config, name, source)((0, 0))
    del example["bad"]  # which stays on the host
    return {
        key: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype, sharding=place)
        for key, value in example.items()
    }


def run(
    config: ConfigDict,
    name: str,
    source: sources.Source,
    broken: bad_images.Damage,
    watched: snapshots.Watched,
    measure: Callable | None,
    workdir: Path,
    mesh,
    start: Callable[[], dict],
    check: Callable[[], None],
) -> None:
    """Trains stage `name` to its end, from the last checkpoint if there is one.

    Args:
      config: a whole config.
      name: one of `build.TRAINING`.
      source: the stage's training images (`build.training_images`).
      broken: counts those that cannot be read.
      watched: images to write down at each checkpoint what the stage makes of them.
      measure: what `monitor.monitor` returns.
      workdir: the run's folder.
      mesh: the device mesh, which must be the current one.
      start: reads what the stage takes over; called only at its first start.
      check: is called now and then, and raises where the run must not go on.

    Raises:
      PreemptedError: a signal has asked for the end, and the state is saved.
      UserError: there are more images, or fewer, than when the stage began.
      RunFailedError: a step was not finite, and the last checkpoint is from before it; too many
        images cannot be read; nothing can be written.
    """
    stage = build.stage_for(config, name, source)
    log = None  # where it goes on is known below

    def told(step, values):
        log.note(step, values)
        log.keep()

    folder, settings = stage_folder(workdir, name), config.checkpoint
    checkpoints = Checkpoints(folder, settings.keep, settings.best, told)
    done = checkpoints.latest() or 0
    if done == stage.steps:
        checkpoints.close()
        return
    # Every stage of a pipeline draws random numbers of its own.
    key = jax.random.fold_in(jax.random.key(config.seed), build.TRAINING.index(name))
    stream = batches(config, name, source, stage.steps, mesh)
    if done:
        abstract = state.abstract(stage, key, {}, mesh)
        train_state, position = checkpoints.restore(done, abstract)
        if (then := position["images"]) != len(source):
            raise UserError(
                f"--workdir={workdir}: stage {name} was trained on {then:,} images to step {done}, "
                f"and now there are {len(source):,}; bring those back, or name another folder"
            )
        stream.set_state(position["loader"])
    else:
        train_state = state.create(stage, key, start(), mesh)
    places = state.shardings_of(train_state)
    update = compiled(stage, places)
    look = snapshots.watcher(stage, watched, workdir, name, mesh)
    if jax.process_index() == 0:
        _describe(name, stage, train_state, done)
    log = _open_log(config, name, stage.steps, done, source, workdir)
    trace = Trace(config.profile, workdir / "profile" / name, name)
    per_epoch = build.updates_per_epoch(len(source), config[name].batch_size)
    save_every = config.checkpoint.every * per_epoch
    measure_every = config.monitor.every * per_epoch
    try:
        with preemption.deferred() as asked:
            for now in range(done + 1, stage.steps + 1):
                vote = _STOP if asked() else _SAVE if checkpoints.due() else _GO_ON
                batch = sharding.put_batch(broken.take(log.wait_for(stream)), mesh)
                train_state, scalars = trace.run(now, update, train_state, batch)
                scalars["vote"] = sharding.highest(vote, mesh)
                wish = log.add(now, scalars, batch["index"])
                if log.tells(now):
                    broken.check()
                    check()
                measured = {}
                if measure and now % measure_every == 0:
                    wish = max(wish, log.flush())
                    measured, seconds = measure(train_state)
                    log.note(now, measured)
                    log.leave_out(seconds)
                last = now == stage.steps
                regular = last or now % save_every == 0
                if regular or wish > _GO_ON:
                    wish = max(wish, log.flush())  # a step that is not finite must not be saved
                    check()
                    if regular:
                        look(now, train_state)
                    position = dict(
                        loader=stream.get_state(), steps=stage.steps, images=len(source)
                    )
                    saved = now, train_state, position, measured
                    checkpoints.save(*saved)
                if last or wish == _STOP:
                    checkpoints.finish(*saved)
                if wish == _STOP or (last and not sharding.on_all_hosts(not asked())):
                    raise PreemptedError(
                        f"stage {name} is saved at step {now} of {stage.steps}; the same command "
                        "goes on from there"
                    )
    finally:
        stream.close()
        trace.close()
        checkpoints.close()
        log.close()


def _open_log(
    config: ConfigDict, name: str, steps: int, done: int, source: sources.Source, workdir: Path
) -> logger.Log:
    policy = config.nan_policy, config.nan_limit
    bad_steps = BadSteps(workdir / "bad_steps.jsonl", name, done, *policy, source.name)
    return logger.Log(
        workdir / "metrics.jsonl",
        name,
        steps,
        done,
        config[name].batch_size,
        config.log_every,
        shown=jax.process_index() == 0,
        bad_steps=bad_steps,
        board=workdir / "tensorboard" / name if config.tensorboard else None,
    )


def _describe(name: str, stage, train_state: state.TrainState, done: int) -> None:
    trained = parameter_overview.get_parameter_overview(train_state.params, include_stats=False)
    frozen = parameter_overview.count_parameters(train_state.frozen)
    where = f"from step {done} " if done else ""
    _LOGGER.debug(
        "stage %s: %d steps %s\ntrained parameters:\n%s", name, stage.steps, where, trained
    )
    _LOGGER.debug("frozen parameters: %d", frozen)
