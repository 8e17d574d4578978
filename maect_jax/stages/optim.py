"""AdamW with a learning rate and a weight decay for each tensor."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

BETAS = (0.9, 0.95)
EPS = 1e-8
UNDECAYED = ("bias", "scale")  # parameters without weight decay, by name


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
    end_lr: float = 0.0  # where the schedule ends, before the layer decay
    undecayed: tuple[str, ...] = UNDECAYED


def scaled_lr(base_lr: float, batch_size: int, views: int) -> float:
    """Linear scaling rule; of an image so many views count as samples."""
    return base_lr * batch_size * views / 256


def schedule(steps: int, warmup: int, end: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """Factor of the learning rate at each update: linear warm-up, then half a cosine to `end`."""

    def factor(step):
        rise = (step + 1) / (warmup + 1)
        # (1 + cos x) / 2, written so that no digits cancel near zero.
        fall = jnp.sin(jnp.pi / 2 * (steps - step) / max(steps - warmup, 1)) ** 2
        return jnp.where(step < warmup, rise, end + (1 - end) * fall)

    return factor


def factors(
    groups: Mapping[str, Group], steps: int, warmup: int, *, step: jax.Array
) -> dict[str, jax.Array]:
    """Factor of the learning rate of each group at a step (`schedule`)."""
    ends = {name: group.end_lr / group.lr for name, group in groups.items()}
    return {name: schedule(steps, warmup, end)(step) for name, end in ends.items()}


def per_tensor(params, groups: Mapping[str, Group]):
    """Peak learning rate (scalar, or `[layers, 1, ...]`) and weight decay of each tensor: two trees
    like `params`, (abstract) arrays by the names of `groups` at their top level."""

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
        group = groups[path[0].key]
        return 0.0 if path[-1].key in group.undecayed else group.weight_decay

    by_path = jax.tree_util.tree_map_with_path
    return by_path(lr, params), by_path(weight_decay, params)


def adamw(
    params, groups: Mapping[str, Group], steps: int, warmup: int
) -> optax.GradientTransformation:
    """The optimiser of a stage (Loshchilov & Hutter, 2019); no gradient clipping."""
    lrs, decays = per_tensor(params, groups)

    def scale(updates, params):
        return jax.tree.map(lambda u, p, lr, wd: lr * (u + wd * p), updates, params, lrs, decays)

    def start(params):
        return optax.ScaleByScheduleState(jnp.int32(0))

    def scheduled(updates, state, params=None):  # as `optax.scale_by_schedule`, for each group
        now = factors(groups, steps, warmup, step=state.count)
        updates = {name: optax.tree.scale(-now[name], part) for name, part in updates.items()}
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.chain(
        optax.scale_by_adam(*BETAS, EPS),
        optax.stateless(scale),
        optax.GradientTransformation(start, scheduled),
    )


def ema(mean, new, decay: float):
    """One update of an exponential moving average: `decay * mean + (1 - decay) * new`, by leaf."""
    return jax.tree.map(lambda m, x: decay * m + (1 - decay) * x, mean, new)
