"""The whole truth about a training stage: one pytree of arrays."""

from typing import Any

import flax.struct
import jax

from maect_jax import sharding
from maect_jax.stages.support_queue import Queue


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; saved whole, so that a resumed run is bit-equal.

    Attributes:
      step: int32 `[]`, updates done.
      params: what is trained and nothing else; gradients and moments exist for it alone.
      frozen: the rest of the encoder.
      batch_stats: running statistics of the head's BatchNorm. The target projector's are those
        of the online projector (the authors copy them over at each step).
      opt_state: the optimiser's moments and counters.
      ema: average of the trained part of the encoder, which is what is evaluated (stage 3).
      target: the target projector's parameters, an average of the projector's (stage 3).
      queue: the support queue (stages 2 and 3).
      rng: typed key; the randomness of a step is `fold_in(rng, step)`.
    """

    step: jax.Array
    params: Any
    frozen: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    target: Any
    queue: Queue | None
    rng: jax.Array


def abstract(stage, key: jax.Array, start, mesh) -> TrainState:
    """Shapes, dtypes and shardings of a stage's state, without making it (see `create`)."""
    shapes = jax.eval_shape(stage.init, key, start)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def create(stage, key: jax.Array, start, mesh) -> TrainState:
    """Makes a stage's first state, every array born where it will stay.

    Args:
      stage: a `stages.mae.Mae`, `stages.contrast.Contrast` or `stages.finetune.Finetune`.
      key: typed key of the run's seed.
      start: what the stage takes over from the one before, a dict of trees (may be empty).
      mesh: the device mesh.
    """
    places = shardings_of(abstract(stage, key, start, mesh))
    return jax.jit(stage.init, out_shardings=places)(key, start)


def shardings_of(state: TrainState) -> TrainState:
    """The sharding of each (abstract) array of a state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
