"""One update, the same for every training stage.

Parts of it that a profile should tell apart have a `jax.named_scope`: views, queue, optimizer.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import optax

from maect_jax import sharding
from maect_jax.data import augment
from maect_jax.data.sources import Source
from maect_jax.stages import optim
from maect_jax.stages.base import Stage
from maect_jax.stages.state import TrainState


def gradients(stage: Stage, state: TrainState, batch: dict):
    """`((loss, (metrics, aux)), grads)` of a step: `stage.loss` and its gradient."""
    key = jax.random.fold_in(state.rng, state.step)
    with jax.named_scope("views"):
        views = tuple(augment.views(batch, recipe) for recipe in stage.recipes)
    return jax.value_and_grad(stage.loss, has_aux=True)(state.params, state, views, batch, key)


def step(stage: Stage, state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and metrics, which are scalars. Pure.

    A step whose loss or gradients are not `finite` counts as a step and changes nothing else: not
    the parameters, moments, averages, statistics, nor the queue.
    """
    (loss, (metrics, aux)), grads = gradients(stage, state, batch)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        # The norm of the gradients is finite only if each of them is.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        optimizer = stage.optimizer(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = stage.update_buffers(state.replace(params=params, opt_state=opt_state), aux, finite)
        # The queue guards itself: selecting it whole would copy it at every step.
        queue, new = new.queue, new.replace(queue=None)
        old = state.replace(queue=None)
        new = jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, old)
        new = new.replace(queue=queue, step=state.step + 1)
    factors = optim.factors(stage.groups, stage.steps, stage.warmup, step=state.step)
    lr = reduce(jnp.maximum, (stage.groups[name].lr * x for name, x in factors.items()))
    return new, dict(loss=loss, learning_rate=lr, grad_norm=grad_norm, finite=finite, **metrics)


def jitted_step(stage: Stage, shardings: TrainState):
    """`step`, the state donated, its new arrays with the `shardings` of the old ones."""
    return jax.jit(partial(step, stage), donate_argnums=0, out_shardings=(shardings, None))


def jitted_snapshot(stage: Stage, mesh):
    """`stage.snapshot` of a batch's `images` and `ids`, with the results on every device."""

    def snapshot(state, batch):
        return stage.snapshot(state, batch["images"], batch["ids"])

    return jax.jit(snapshot, out_shardings=sharding.replicated_sharding(mesh))


def abstract_batch(stage: type[Stage], config, images: Source, mesh) -> dict:
    """Shapes, dtypes and shardings of a stage's global batches, without reading an image."""
    rows = config[stage.name].batch_size
    example = stage.example_maker(config, images)((0, 0))
    del example["bad"]  # which stays on the host
    split = sharding.batch_sharding(mesh)
    return {
        key: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype, sharding=split)
        for key, value in example.items()
    }
