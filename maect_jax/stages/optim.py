"""AdamW with a learning rate and a weight decay for each tensor."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

BETAS = (0.9, 0.95)
EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Group:
    """Optimisation of one part of the parameters.

    With `layer_decay` the last block of an encoder has `lr * layer_decay`, the one below
    `lr * layer_decay^2`, and so on; the final norm has `lr`.
    """

    lr: float  # at the schedule's peak, already scaled (`scaled_lr`)
    weight_decay: float  # decoupled, multiplied with the learning rate
    layer_decay: float = 1.0
    depth: int = 0  # blocks of the whole encoder, frozen ones included


def scaled_lr(base_lr: float, batch_size: int, views: int) -> float:
    """Linear scaling rule; every view of an image counts as a sample."""
    return base_lr * batch_size * views / 256


def schedule(steps: int, warmup: int) -> Callable[[jax.Array], jax.Array]:
    """Factor of the learning rate at each update: linear warm-up, then half a cosine to zero."""

    def factor(step):
        rise = (step + 1) / (warmup + 1)
        # (1 + cos x) / 2, written so that no digits cancel near zero.
        fall = jnp.sin(jnp.pi / 2 * (steps - step) / max(steps - warmup, 1)) ** 2
        return jnp.where(step < warmup, rise, fall)

    return factor


def per_tensor(params, groups: Mapping[str, Group]):
    """Peak learning rate (scalar, or `[layers, 1, ...]`) and weight decay of each tensor.

    Args:
      params: tree of (abstract) arrays whose top level are the names of `groups`.
      groups: the optimisation of each part.

    Returns:
      Two trees of the structure of `params`.
    """

    def lr(path, leaf):
        group, part = groups[path[0].key], path[1].key
        if group.layer_decay == 1.0 or part == "norm":
            return np.float32(group.lr)
        distance = group.depth + 1
        if part == "blocks":
            # Stacked [layers, ...]: the last ones of `depth`, as the frozen ones are elsewhere.
            distance = np.arange(leaf.shape[0], 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
        return np.asarray(group.lr * group.layer_decay**distance, np.float32)

    def weight_decay(path, _):
        # By name, not by rank: stacked biases and scales have two dimensions.
        return 0.0 if path[-1].key in ("bias", "scale") else groups[path[0].key].weight_decay

    by_path = jax.tree_util.tree_map_with_path
    return by_path(lr, params), by_path(weight_decay, params)


def adamw(
    params, groups: Mapping[str, Group], steps: int, warmup: int
) -> optax.GradientTransformation:
    """The optimiser of a stage (Loshchilov & Hutter, 2019); no gradient clipping."""
    lrs, decays = per_tensor(params, groups)

    def scale(updates, params):
        return jax.tree.map(lambda u, p, lr, wd: lr * (u + wd * p), updates, params, lrs, decays)

    factor = schedule(steps, warmup)
    return optax.chain(
        optax.scale_by_adam(*BETAS, EPS),
        optax.stateless(scale),
        optax.scale_by_schedule(lambda step: -factor(step)),
    )


def ema(mean, new, decay: float):
    """One update of an exponential moving average: `decay * mean + (1 - decay) * new`, by leaf."""
    return jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, mean, new)
