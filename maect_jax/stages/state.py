"""The training state of a stage: one pytree of arrays."""

from typing import Any

import jax
from flax.struct import PyTreeNode, field

from maect_jax import sharding
from maect_jax.stages.support_queue import Queue


class TrainState(PyTreeNode, kw_only=True):
    """Everything that a step reads and writes; saved whole, so that a resumed run is bit-equal."""

    step: jax.Array  # int32 `[]`, updates done
    params: Any  # what is trained and nothing else; gradients and moments exist for it alone
    frozen: Any = field(default_factory=dict)  # the rest of the encoder
    # Running statistics of the head's BatchNorm. The target projector's are those of the online
    # projector (the authors copy them over at each step).
    batch_stats: Any = field(default_factory=dict)
    opt_state: Any  # the optimiser's moments and counters
    # Averages: of the encoder's tuned part, which is evaluated, and in `ct` of the projector.
    ema: Any = field(default_factory=dict)
    target: Any = field(default_factory=dict)
    queue: Queue | None = None  # the support queue of contrastive stages
    rng: jax.Array  # typed key; the randomness of a step is `fold_in(rng, step)`


def abstract_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Shapes, dtypes and shardings of a stage's state, without making it (see `create_state`)."""
    return sharding.abstract(jax.eval_shape(stage.init, key, start), mesh)


def create_state(stage, key: jax.Array, start, mesh) -> TrainState:
    """Makes the first state of a `Stage`, every array born where it will stay on the mesh.

    `key` is the typed key of the run's seed; `start` what the stage takes over from the one before,
    a dict of trees (may be empty).
    """
    init = stage.init  # one object, which JAX traces once
    shardings = state_shardings(sharding.abstract(jax.eval_shape(init, key, start), mesh))
    return jax.jit(init, out_shardings=shardings)(key, start)


def state_shardings(state: TrainState) -> TrainState:
    """The sharding of each (abstract) array of a state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)
