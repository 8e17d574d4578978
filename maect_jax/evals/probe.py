"""Linear probes: many learning rates side by side on the same features."""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax import sharding
from maect_jax.config import fraction, numbers_above_0, positive
from maect_jax.data import augment, bad_images, loader, sources, subsets, transforms
from maect_jax.evals import features
from maect_jax.evals.base import Protocol, Result, Row
from maect_jax.evals.features import Features
from maect_jax.stages import optim
from maect_jax.stages.base import CROP_SCALE

_MOMENTUM = 0.9
_WARMUP = 0.1  # of the updates
_BN_DECAY, _BN_EPS = 0.9, 1e-5
_TOP = 5
_SEED = 100  # differs from the number of every training stage, so the probe has crops of its own

Batches = Iterator[tuple[jax.Array, jax.Array]]  # features fp32 [B, D], labels int32 [B]


class Schedule(NamedTuple):
    """How P probes are trained."""

    lrs: np.ndarray  # [P], their peak
    epochs: int
    updates: int  # an epoch
    seed: int  # of the initial weights


class Probes(NamedTuple):
    """P probes. They share one batch normalisation, as it has no parameters."""

    weights: dict  # kernel fp32 [P, D, C], bias [P, C]
    velocity: dict  # of the weights
    mean: jax.Array  # [D], a running average, like var
    var: jax.Array
    step: jax.Array


@partial(jax.jit, static_argnums=(1, 2, 3))
def _init(key, count: int, width: int, classes: int) -> Probes:
    kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (count, width, classes))
    weights = {"kernel": kernel, "bias": jnp.zeros((count, classes))}
    velocity = jax.tree.map(jnp.zeros_like, weights)
    return Probes(weights, velocity, jnp.zeros(width), jnp.ones(width), jnp.int32(0))


def _logits(weights, x, mean, var):
    x = (x - mean) * jax.lax.rsqrt(var + _BN_EPS)
    out = jnp.einsum("bd,pdc->pbc", x, weights["kernel"], precision="highest")
    return out + weights["bias"][:, None]


@partial(jax.jit, static_argnames="steps", donate_argnums=0)
def _update(probes: Probes, x, labels, lrs, *, steps: int) -> Probes:
    mean, var = x.mean(0), x.var(0)

    def loss(weights):
        out = _logits(weights, x, mean, var)
        targets = jnp.broadcast_to(labels, out.shape[:2])
        return optax.softmax_cross_entropy_with_integer_labels(out, targets).mean(1).sum()

    grads = jax.grad(loss)(probes.weights)
    velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, probes.velocity, grads)
    lr = lrs * optim.schedule(steps, int(_WARMUP * steps))(probes.step)
    lrs_of = {"kernel": lr[:, None, None], "bias": lr[:, None]}
    weights = jax.tree.map(lambda w, lr, v: w - lr * v, probes.weights, lrs_of, velocity)
    unbiased = var * len(x) / max(len(x) - 1, 1)
    running = optim.ema((probes.mean, probes.var), (mean, unbiased), _BN_DECAY)
    return Probes(weights, velocity, running[0], running[1], probes.step + 1)


@jax.jit
def _hits(probes: Probes, x, labels):
    """How often the first guess of each probe, and one of its first five, is right, `[P, 2]`."""
    out = _logits(probes.weights, x, probes.mean, probes.var)
    _, guesses = jax.lax.top_k(out, min(_TOP, out.shape[-1]))
    hits = guesses == labels[:, None]
    return jnp.stack([hits[..., 0].sum(1), hits.any(-1).sum(1)], axis=1)


def fit(
    batches: Batches, schedule: Schedule, tests: Mapping[str, Features], classes: int, mesh
) -> dict[str, np.ndarray]:
    """Trains probes by SGD with momentum, linear warm-up and cosine, without weight decay, on at
    least `epochs * updates` batches, split over the mesh, which must be the current one. Returns
    for each of `tests` the top-1 and top-5 accuracies (0 to 1) after each epoch, `[epochs, P, 2]`.
    """
    on_devices = {name: list(features.parts(part, mesh)) for name, part in tests.items()}
    lrs = sharding.replicate(np.float32(schedule.lrs), mesh)
    width = next(iter(tests.values())).x.shape[1]
    probes = _init(jax.random.key(schedule.seed), len(schedule.lrs), width, classes)
    curves: dict[str, list] = {name: [] for name in tests}
    before = None
    for _ in range(schedule.epochs):
        for _ in range(schedule.updates):
            x, labels = next(batches)
            probes = _update(probes, x, labels, lrs, steps=schedule.updates * schedule.epochs)
            jax.block_until_ready(before)  # at most one batch waits for its turn
            before = x
        for name, parts in on_devices.items():
            curves[name].append(sum(_hits(probes, *part) for part in parts))
    return {
        name: np.asarray(sharding.to_host(curve)) / len(tests[name].labels)
        for name, curve in curves.items()
    }


def cached_batches(train: Features, batch_size: int, seed: int, mesh) -> Batches:
    """Yields batches of extracted features without end, shuffled in each epoch."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(train.x))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            # Ascending, for features that lie on disk; a batch has no order.
            rows = np.sort(order[start : start + batch_size])
            x, labels = train.x[rows], train.labels[rows]
            yield sharding.put_rows(x, mesh), sharding.put_rows(labels, mesh)


def summary(
    curves: Mapping[str, np.ndarray], base_lrs: tuple[float, ...], chosen_on: str
) -> dict[str, object]:
    """The accuracies on the test images of the probes and epochs that do best on `chosen_on`, a
    curve beside "test" (`fit`).

    Returns:
      `best_last_epoch`: the best probe at the last epoch; `best_any_epoch`: the best probe and
      epoch; `probes`: each at the last and its best epoch; `epochs_top1`: `[epochs, P]`.
    """
    test, chosen = curves["test"], curves[chosen_on][..., 0]
    last = len(chosen) - 1

    def entry(epoch: int, probe: int) -> dict:
        top1, top5 = test[epoch, probe].tolist()
        return {"base_lr": base_lrs[probe], "epoch": epoch + 1, "top1": top1, "top5": top5}

    best = enumerate(chosen.argmax(0).tolist())
    return {
        "chosen_on": chosen_on,
        "best_last_epoch": entry(last, int(chosen[-1].argmax())),
        "best_any_epoch": entry(*divmod(int(chosen.argmax()), len(base_lrs))),
        "probes": [{"last_epoch": entry(last, p), "best_epoch": entry(e, p)} for p, e in best],
        "epochs_top1": test[..., 0].tolist(),
    }


class Probe(Protocol):
    """Linear probes on features that are extracted once: the fast variant."""

    name = section = "probe"
    crops = "centre crops, extracted once"
    rules: ClassVar = {
        **dict.fromkeys(("epochs", "batch_size"), positive),
        "base_lrs": numbers_above_0,
        "crop_scale": CROP_SCALE,
        "held_out": fraction,
    }

    def run(self, row: Row) -> Result:
        return Result(self._metrics(row))

    def _metrics(self, row: Row) -> dict:
        section, seed, devices = row.config.eval.probe, row.config.seed, row.run.mesh.size
        train, tests, chosen_on = row.features["train"], {"test": row.features["val"]}, "test"
        drawn = np.random.default_rng(seed).permutation(len(train.labels))
        held_out = np.zeros(len(drawn), bool)
        held_out[drawn[: round(section.held_out * len(drawn))]] = True
        if held_out.any():
            chosen_on = "held-out training images"
            tests[chosen_on] = Features(*(part[held_out] for part in train))
            train = Features(*(part[~held_out] for part in train))
        size = min(section.batch_size, len(train.labels)) // devices * devices
        lrs = np.array([optim.scaled_lr(lr, size, views=1) for lr in section.base_lrs])
        schedule = Schedule(lrs, section.epochs, updates=len(train.labels) // size, seed=seed)
        batches = self._batches(row, train, size)
        curves = fit(batches, schedule, tests, classes=row.classes, mesh=row.run.mesh)
        settings = {"crops": self.crops, "epochs": section.epochs, "batch_size": size}
        return settings | summary(curves, section.base_lrs, chosen_on)

    def _batches(self, row: Row, train: Features, batch_size: int) -> Batches:
        """Batches of those training images that are not held out."""
        return cached_batches(train, batch_size, seed=row.config.seed, mesh=row.run.mesh)


@partial(jax.jit, static_argnums=1)
def _only_view(batch: dict, recipe: augment.Recipe) -> jax.Array:
    return augment.views(batch, recipe)[:, 0]


class AugmentedProbe(Probe):
    """Linear probes on augmented images, encoded anew in each epoch: the paper's protocol."""

    name = "probe_augmented"
    crops = "augmented in each epoch"

    def _metrics(self, row: Row) -> dict:
        crop_scale = {"crop_scale": list(row.config.eval.probe.crop_scale)}
        return super()._metrics(row) | crop_scale

    def _batches(self, row: Row, train: Features, batch_size: int) -> Batches:
        data, model, mesh = row.config.data, row.config.model, row.run.mesh
        images, bad = row.images["train"], row.bad_images["train"]
        decoding = sources.decoding(row.config)
        if len(train.records) < len(images):
            images = subsets.Subset(images, train.records)
            bad = bad_images.BadImages(images, decoding, data.max_bad_fraction)
        section, size, seed = row.config.eval.probe, model.image_size, (row.config.seed, _SEED)
        scale, steps = section.crop_scale, len(images) // batch_size * section.epochs
        crops = (transforms.Crops(size, scale, count=1),)
        make = loader.TrainRecord(images, decoding, crops, seed, data.scaled_jpeg)
        recipe = augment.Recipe(size, scale, data.mean, data.std, (augment.Photometric(),))
        rows = sharding.local_rows(batch_size, mesh)
        order = loader.Order(len(images), batch_size, steps, seed, rows)
        for batch in loader.train_batches(order, make, data.workers):
            batch = sharding.put_batch(bad.collect(batch), mesh)
            yield row.encode(_only_view(batch, recipe)), batch["label"]
        bad.check()
