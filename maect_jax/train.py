"""The training loop, the same for every stage."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import closing

import jax
from etils import epy

from maect_jax import errors, sharding
from maect_jax.data import loader, sources
from maect_jax.data.bad_images import BadImages
from maect_jax.errors import PreemptedError, UserError
from maect_jax.evals.monitor import Monitor
from maect_jax.run import snapshots
from maect_jax.run.checkpoints import Checkpoints, read_position, stage_folder
from maect_jax.run.folder import Run, note_images
from maect_jax.run.logger import Logger
from maect_jax.run.preemption import Action, deferred
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState, abstract_state, create_state, state_shardings
from maect_jax.stages.step import jitted_step

with epy.lazy_imports():  # when it is first used
    from clu import parameter_overview

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """What one stage is trained with."""

    run: Run  # config, folder and mesh
    stage: type[Stage]
    images: sources.Source  # the stage's own training images (`Stage.own_images`)
    bad_images: BadImages  # counts those that cannot be read
    start: Callable[[], dict]  # reads what the stage takes over; called if there is no checkpoint
    examples: snapshots.Examples  # images whose snapshots are written at each checkpoint
    monitor: Monitor | None  # measures the encoder now and then


def batches(config, stage: type[Stage], images: sources.Source, steps: int, mesh, done: int = 0):
    """This process's rows of a stage's batches, but the first `done`."""
    batch_size, make = config[stage.name].batch_size, stage.example_maker(config, images)
    rows = sharding.local_rows(batch_size, mesh)
    order = loader.Order(len(images), batch_size, steps, make.seed, rows, done)
    return loader.train_batches(order, make, config.data.workers)


def _resumed(training: Training, stage: Stage, checkpoints: Checkpoints):
    """The batches and the state from the last checkpoint on, or from the start of the stage."""
    run, images, saved_step = training.run, training.images, checkpoints.latest or 0
    # Every stage of a pipeline draws random numbers of its own.
    key = jax.random.fold_in(jax.random.key(run.config.seed), stage.number)
    if saved_step:
        position = read_position(stage_folder(run.folder, stage.name), saved_step)
        where = f"{run.folder}: stage {stage.name}, at step {saved_step} of {position['steps']}"
        if difference := images.identity.difference(_identity(position)):
            if difference.content:
                raise UserError(
                    f"--workdir={where}, was trained on other images ({difference.text}). Restore "
                    "the images or use another --workdir."
                )
            _warn("%s, goes on: %s", where, difference.text)
        abstract = abstract_state(stage, key, {}, run.mesh)
        state, _ = checkpoints.restore(saved_step, abstract)
    else:
        if jax.process_index() == 0:
            begun = {**training.examples.images, stage.name: images}
            note_images(run.folder, {name: source.identity for name, source in begun.items()})
        state = create_state(stage, key, training.start(), run.mesh)
    stream = batches(run.config, training.stage, images, stage.steps, run.mesh, done=saved_step)
    return stream, state


def _identity(position: dict) -> dict:
    """What the images were when a checkpoint was saved."""
    return position.get("identity", {"images": position["images"]})


def _warn(*message) -> None:
    if jax.process_index() == 0:
        _LOGGER.warning(*message)


def run(training: Training) -> None:
    """Trains a stage to its end, from its last checkpoint if there is one.

    Raises:
      PreemptedError: a signal has asked for the end, and the state is saved.
      UserError: the images are not those that the stage began with.
      RunFailedError: a step is not finite, too many images are bad, or nothing can be written.
    """
    config, mesh, images = training.run.config, training.run.mesh, training.images
    stage = training.stage.for_images(config, images)
    per_epoch = training.stage.updates_per_epoch(config, len(images))
    save_every = config.checkpoint.every * per_epoch
    measure_every = config.monitor.every * per_epoch

    def on_saved(step, values):  # in the thread that saves
        logger.note(step, values)
        logger.sync()

    keep, best = config.checkpoint.keep, config.checkpoint.best
    checkpoints = Checkpoints(stage_folder(training.run.folder, stage.name), keep, best, on_saved)
    done, folder = checkpoints.latest or 0, stage_folder(training.run.folder, stage.name)
    position = read_position(folder, done) if done else {}
    training.run.writers.catch_up(stage.name, done)
    if done and done == position["steps"]:  # an earlier call has finished it
        checkpoints.close()
        if difference := images.identity.difference(_identity(position)):
            _warn("%s: the images have changed since (%s)", folder, difference.text)
        return
    stream, state = _resumed(training, stage, checkpoints)
    train_step = jitted_step(stage, state_shardings(state))
    snapshot = snapshots.writer(stage, training.examples, training.run)
    logger = Logger(training.run, stage, done, images.name)
    _log_parameters(stage, state, done)
    with closing(logger), closing(checkpoints), closing(stream), deferred() as signalled:
        for step in range(done + 1, stage.steps + 1):
            proposed = Action.STOP if signalled() else Action(checkpoints.retry_due())
            batch = training.bad_images.collect(logger.wait_for(stream))
            batch = sharding.put_batch(batch, mesh)
            state, metrics = logger.profiled(step, train_step, state, batch)
            if not images.labelled:
                # Those of no image.
                metrics = {k: x for k, x in metrics.items() if not k.startswith("nn_accuracy")}
            metrics["action"] = sharding.max_over_hosts(proposed, mesh)
            action = logger.add(step, metrics, batch["index"])  # of the step before
            if logger.has_line(step):
                training.bad_images.check()
                training.run.check_lock()
            measured, last = {}, step == stage.steps
            if training.monitor and step % measure_every == 0:
                action = max(action, logger.flush())
                measured = logger.time_apart(step, training.monitor, state)
            regular = last or step % save_every == 0
            if regular or action > Action.CONTINUE:
                # Also reads this step: if it is not finite, `nan_policy` may end the run here.
                action = max(action, logger.flush())
                training.run.check_lock()
                if regular:
                    snapshot(step, state)
                position = dict(steps=stage.steps, images=len(images))
                position["identity"] = images.identity._asdict()
                saved = step, state, position, measured
                checkpoints.save(*saved)
            if last or action == Action.STOP:
                checkpoints.finish(*saved)
            # No step follows the last one, to agree on a signal that came since.
            if action == Action.STOP or (last and not sharding.all_hosts(not signalled())):
                where = f"stage {stage.name} is saved at step {step} of {stage.steps}"
                raise PreemptedError(f"preempted, resumable: {where}. {errors.RESUME}")


def _log_parameters(stage: Stage, state: TrainState, done: int) -> None:
    if jax.process_index() == 0 and _LOGGER.isEnabledFor(logging.DEBUG):
        shapes = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        _LOGGER.debug("stage %s: steps %d to %d", stage.name, done + 1, stage.steps)
        frozen = parameter_overview.count_parameters(state.frozen)
        _LOGGER.debug("trained parameters:\n%s\nfrozen parameters: %d", shapes, frozen)
