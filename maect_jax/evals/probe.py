"""Linear probes: many learning rates side by side on the same features."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax import sharding
from maect_jax.evals import features
from maect_jax.evals.features import Features
from maect_jax.stages import optim

_MOMENTUM = 0.9
_WARMUP = 0.1  # of the updates
_BN_DECAY, _BN_EPS = 0.9, 1e-5
_TOP = 5

Batches = Iterator[tuple[jax.Array, jax.Array]]  # features fp32 [B, D], labels int32 [B]


class Probes(NamedTuple):
    """P probes. One batch normalisation serves them all: it has no parameters.

    `weights` and `velocity`: kernel fp32 `[P, D, C]`, bias `[P, C]`; `mean` and `var` `[D]`.
    """

    weights: dict
    velocity: dict
    mean: jax.Array
    var: jax.Array
    step: jax.Array


@partial(jax.jit, static_argnums=(1, 2, 3))
def _init(key, count: int, width: int, classes: int) -> Probes:
    kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (count, width, classes))
    weights = {"kernel": kernel, "bias": jnp.zeros((count, classes))}
    still = jax.tree.map(jnp.zeros_like, weights)
    return Probes(weights, still, jnp.zeros(width), jnp.ones(width), jnp.int32(0))


def _logits(weights, x, mean, var):
    """`[P, B, C]`."""
    x = (x - mean) * jax.lax.rsqrt(var + _BN_EPS)
    out = jnp.einsum("bd,pdc->pbc", x, weights["kernel"], precision="highest")
    return out + weights["bias"][:, None]


@partial(jax.jit, static_argnames="steps", donate_argnums=0)
def _update(probes: Probes, x, labels, lrs, *, steps: int) -> Probes:
    mean, var = x.mean(0), x.var(0)

    def loss(weights):
        out = _logits(weights, x, mean, var)
        truths = jnp.broadcast_to(labels, out.shape[:2])
        return optax.softmax_cross_entropy_with_integer_labels(out, truths).mean(1).sum()

    grads = jax.grad(loss)(probes.weights)
    velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, probes.velocity, grads)
    lr = lrs * optim.schedule(steps, int(_WARMUP * steps))(probes.step)

    def descend(w, v):
        return w - lr.reshape(-1, *[1] * (w.ndim - 1)) * v

    weights = jax.tree.map(descend, probes.weights, velocity)
    unbiased = var * len(x) / max(len(x) - 1, 1)
    running = optim.ema((probes.mean, probes.var), (mean, unbiased), _BN_DECAY)
    return Probes(weights, velocity, *running, probes.step + 1)


@jax.jit
def _hits(probes: Probes, x, labels):
    """How many of `x` each probe has right, at first and among its first five guesses `[P, 2]`."""
    out = _logits(probes.weights, x, probes.mean, probes.var)
    _, guesses = jax.lax.top_k(out, min(_TOP, out.shape[-1]))
    hits = guesses == labels[:, None]
    return jnp.stack([hits[..., 0].sum(1), hits.any(-1).sum(1)], axis=1)


def fit(
    batches: Batches,
    per_epoch: int,
    epochs: int,
    lrs: np.ndarray,
    tests: Mapping[str, Features],
    classes: int,
    seed: int,
    mesh,
) -> dict[str, np.ndarray]:
    """Trains probes by SGD with momentum, linear warm-up and cosine, without weight decay.

    Args:
      batches: at least `per_epoch * epochs` batches of features and labels, split over the mesh.
      per_epoch: updates an epoch.
      epochs: of the training.
      lrs: peak learning rates `[P]`.
      tests: features to judge the probes on after each epoch, by name.
      classes: C.
      seed: of the initial weights.
      mesh: the device mesh, which must be the current one.

    Returns:
      For each of `tests` the top-1 and top-5 accuracies (0 to 1) `[epochs, P, 2]`.
    """
    places = {name: list(features.parts(found, mesh)) for name, found in tests.items()}
    rates = sharding.replicate(np.float32(lrs), mesh)
    width = next(iter(tests.values())).x.shape[1]
    probes = _init(jax.random.key(seed), len(lrs), width, classes)
    curves = {name: [] for name in tests}
    before = None
    for _ in range(epochs):
        for _ in range(per_epoch):
            x, labels = next(batches)
            probes = _update(probes, x, labels, rates, steps=per_epoch * epochs)
            jax.block_until_ready(before)  # no more than one batch waits for its turn
            before = x
        for name, parts in places.items():
            curves[name].append(sum(_hits(probes, *part) for part in parts))
    return {
        name: np.asarray(sharding.to_host(curve)) / len(tests[name].labels)
        for name, curve in curves.items()
    }


def cached_batches(train: Features, batch_size: int, seed: int, mesh) -> Batches:
    """Endless batches of features that are at hand, shuffled in each epoch."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(train.x))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            # In rising order, for features that lie on disk; a batch has no order.
            rows = np.sort(order[start : start + batch_size])
            yield (
                sharding.put_rows(train.x[rows], mesh),
                sharding.put_rows(train.labels[rows], mesh),
            )
        epoch += 1


def judged(
    curves: Mapping[str, np.ndarray], base_lrs: tuple[float, ...], chosen_on: str
) -> dict[str, object]:
    """Each probe's accuracies, and those of the best, which is chosen on one of the curves.

    Args:
      curves: what `fit` returns, with "test".
      base_lrs: of the probes.
      chosen_on: the name of a curve.

    Returns:
      `probes`: of each at the last epoch and at its best; `best_last_epoch`: the probe that is
      best at the last epoch; `best_any_epoch`: the best probe and epoch of all; `epochs_top1`: the
      test accuracies of each epoch and probe. Accuracies are on the test images.
    """
    test, chosen = curves["test"], curves[chosen_on][..., 0]

    def named(epoch: int, probe: int) -> dict:
        top1, top5 = test[epoch, probe].tolist()
        return {"base_lr": base_lrs[probe], "epoch": epoch + 1, "top1": top1, "top5": top5}

    last = len(chosen) - 1
    best_epoch, best_probe = np.unravel_index(chosen.argmax(), chosen.shape)
    return {
        "chosen_on": chosen_on,
        "best_last_epoch": named(last, int(chosen[-1].argmax())),
        "best_any_epoch": named(int(best_epoch), int(best_probe)),
        "probes": [
            {"last_epoch": named(last, p), "best_epoch": named(int(chosen[:, p].argmax()), p)}
            for p in range(len(base_lrs))
        ],
        "epochs_top1": test[..., 0].tolist(),
    }
