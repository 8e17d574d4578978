"""The whole truth about a training stage: one pytree of arrays."""

from dataclasses import field
from typing import Any

import flax.struct
import jax

from maect_jax import sharding
from maect_jax.stages.support_queue import Queue


@flax.struct.dataclass(kw_only=True)
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
    frozen: Any = field(default_factory=dict)
    batch_stats: Any = field(default_factory=dict)
    opt_state: Any
    ema: Any = field(default_factory=dict)
    target: Any = field(default_factory=dict)
    queue: Queue | None = None
    rng: jax.Array


def abstract_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Shapes, dtypes and shardings of a stage's state, without making it (see `create_state`)."""
    return sharding.abstract(jax.eval_shape(stage.init, key, start), mesh)


def create_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Makes the first state of a `Stage`, every array born where it will stay on the mesh.

    `key` is the typed key of the run's seed; `start` what the stage takes over from the one before,
    a dict of trees (may be empty).
    """
    shardings = state_shardings(abstract_state(stage, key, start, mesh))
    return jax.jit(stage.init, out_shardings=shardings)(key, start)


def state_shardings(state: TrainState) -> TrainState:
    """The sharding of each (abstract) array of a state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
