"""The whole truth about a training stage: one pytree of arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

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

    @classmethod
    def at_start(cls, rng: jax.Array, params, opt_state, **parts) -> "TrainState":
        """The state at step 0; fields that are not among `parts` are empty."""
        empty = dict(frozen={}, batch_stats={}, ema={}, target={}, queue=None)
        given = empty | parts
        return cls(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng, **given)


def abstract_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Shapes, dtypes and shardings of a stage's state, without making it (see `create_state`)."""
    shapes = jax.eval_shape(stage.init, key, start)
    return sharding.abstract(shapes, mesh)


def create_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Makes a stage's first state, every array born where it will stay.

    Args:
      stage: a `Stage`.
      key: typed key of the run's seed.
      start: what the stage takes over from the one before, a dict of trees (may be empty).
      mesh: the device mesh.
    """
    shardings = state_shardings(abstract_state(stage, key, start, mesh))
    return jax.jit(stage.init, out_shardings=shardings)(key, start)


def state_shardings(state: TrainState) -> TrainState:
    """The sharding of each (abstract) array of a state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
