"""Multinomial logistic regression without bias, to its optimum, for several penalties at once.

L-BFGS (Liu & Nocedal, 1989) with a zoom line search, by optax; rows split over the devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax import sharding

_FILLED = 256  # rows a device holds a multiple of, so that small parts are one program
_MEMORY = 20  # pairs of steps and gradients
# It ends where the objective is surely within this share of its optimum: a convex function whose
# curvature is at least the penalty is above its minimum by no more than |gradient|^2 / (2 penalty).
_GAP = 1e-4
_SMALL = 1e-6  # or where the gradient is, relative to the first, what rounding leaves of it


class Fit(NamedTuple):
    """For each of P penalties: weights fp32 `[P, D, C]`, the objective, the norm of its gradient
    and the steps taken `[P]`."""

    weights: jax.Array
    objective: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array


def prepare(x: np.ndarray) -> np.ndarray:
    """Rows `[N, D]` less their own mean, then L2-normalised."""
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("classes", "max_steps"))
def _solve(x, labels, penalties, *, classes: int, max_steps: int) -> Fit:
    known = labels >= 0  # the others fill up
    count = known.sum()

    def objective(weights, penalty):
        logits = jnp.einsum("nd,dc->nc", x, weights, precision="highest")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (loss * known).sum() / count + penalty / 2 * jnp.square(weights).sum()

    def fit(penalty):
        value_fn = partial(objective, penalty=penalty)
        optimiser = optax.lbfgs(memory_size=_MEMORY)
        value_and_grad = optax.value_and_grad_from_state(value_fn)

        def going(carry):
            _, _, steps, value, norm = carry
            far = norm**2 / (2 * penalty) > _GAP * value
            return far & (norm > _SMALL * first) & (steps < max_steps)

        def step(carry):
            weights, state, steps, _, _ = carry
            value, grad = value_and_grad(weights, state=state)
            updates, state = optimiser.update(
                grad, state, weights, value=value, grad=grad, value_fn=value_fn
            )
            # Of the new weights: the line search has seen them.
            value, grad = (optax.tree.get(state, key) for key in ("value", "grad"))
            weights = optax.apply_updates(weights, updates)
            return weights, state, steps + 1, value, jnp.linalg.norm(grad)

        zero = jnp.zeros((x.shape[1], classes))
        value, grad = jax.value_and_grad(value_fn)(zero)
        first = jnp.linalg.norm(grad)
        start = zero, optimiser.init(zero), jnp.int32(0), value, first
        weights, _, steps, _, _ = jax.lax.while_loop(going, step, start)
        value, grad = jax.value_and_grad(value_fn)(weights)
        return Fit(weights, value, jnp.linalg.norm(grad), steps)

    return jax.vmap(fit)(penalties)


def fit(
    x: np.ndarray, labels: np.ndarray, penalties, classes: int, mesh, max_steps: int = 1000
) -> Fit:
    """The weights W that minimise `mean cross entropy + penalty / 2 * |W|^2`.

    Args:
      x: rows `[N, D]`, as `prepare` leaves them.
      labels: int `[N]`, from 0.
      penalties: P of them.
      classes: C.
      mesh: the device mesh, which must be the current one.
      max_steps: at which it ends at the latest.
    """
    more = -len(x) % (mesh.size * _FILLED)
    x = np.pad(np.float32(x), ((0, more), (0, 0)))
    labels = np.pad(np.int32(labels), (0, more), constant_values=-1)
    rows = (sharding.put_rows(array, mesh) for array in (x, labels))
    penalties = sharding.replicate(np.float32(penalties), mesh)
    return _solve(*rows, penalties, classes=classes, max_steps=max_steps)
