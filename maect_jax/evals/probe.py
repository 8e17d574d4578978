"""Linear probes: many learning rates side by side on the same features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maect_jax import optim

_MOMENTUM = 0.9
_WARMUP = 0.1  # of the updates
_BN_DECAY, _BN_EPS = 0.9, 1e-5


def _batch_norm(x, mean, var):
    return (x - mean) * jax.lax.rsqrt(var + _BN_EPS)


@partial(jax.jit, static_argnames=("batch_size", "epochs", "classes"))
def _train(key, x, labels, test, test_labels, lrs, *, batch_size, epochs, classes):
    """Test accuracy `[epochs, P]` of P probes after each epoch."""
    rows, width = x.shape
    per_epoch = rows // batch_size
    steps = epochs * per_epoch
    factor = optim.schedule(steps, int(_WARMUP * steps))
    # One batch normalisation serves all probes: it has no parameters.
    stats = jnp.zeros(width), jnp.ones(width)
    kernel = 0.01 * jax.random.truncated_normal(key, -2, 2, (len(lrs), width, classes))
    weights = {"kernel": kernel, "bias": jnp.zeros((len(lrs), classes))}

    def logits(weights, x):
        return (
            jnp.einsum("bd,pdc->pbc", x, weights["kernel"], precision="highest")
            + weights["bias"][:, None]
        )

    def update(carry, batch):
        weights, velocity, stats, step = carry
        mean, var = x[batch].mean(0), x[batch].var(0)
        unbiased = var * batch_size / max(batch_size - 1, 1)
        stats = tuple(
            _BN_DECAY * old + (1 - _BN_DECAY) * new
            for old, new in zip(stats, (mean, unbiased), strict=True)
        )
        inputs, truth = _batch_norm(x[batch], mean, var), labels[batch]

        def loss(weights):
            out = logits(weights, inputs)
            truths = jnp.broadcast_to(truth, out.shape[:2])
            return optax.softmax_cross_entropy_with_integer_labels(out, truths).mean(1).sum()

        velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, jax.grad(loss)(weights))
        lr = lrs * factor(step)
        weights = jax.tree.map(
            lambda w, v: w - lr.reshape(-1, *[1] * (w.ndim - 1)) * v, weights, velocity
        )
        return (weights, velocity, stats, step + 1), None

    def run_epoch(carry, epoch):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        batches = order[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        carry, _ = jax.lax.scan(update, carry, batches)
        weights, _, stats, _ = carry
        predicted = logits(weights, _batch_norm(test, *stats)).argmax(-1)
        return carry, (predicted == test_labels).mean(1)

    start = weights, jax.tree.map(jnp.zeros_like, weights), stats, 0
    return jax.lax.scan(run_epoch, start, jnp.arange(epochs))[1]


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    base_lrs: tuple[float, ...],
    batch_size: int = 1024,
    epochs: int = 50,
    seed: int = 0,
) -> dict:
    """Batch normalisation without affine, then a linear layer; SGD with momentum, cosine.

    The features are those of centre crops, extracted once: the fast variant of the paper's
    protocol, which augments the images anew in each epoch.

    Args:
      train, test: features `[N, D]`, `[M, D]`.
      train_labels, test_labels: int `[N]`, `[M]`, from 0.
      base_lrs: learning rates of the probes, multiplied by `batch_size / 256`.
      batch_size: at most N; larger ones are cut to N.
      epochs: over the train features.
      seed: of the initial weights and the order.

    Returns:
      The accuracies (0 to 1) of each probe at the last epoch, the best of them, and the best
      over all epochs, with the settings. Which is best is decided on the test images.
    """
    batch_size = min(batch_size, len(train))
    lrs = jnp.asarray([optim.scaled_lr(lr, batch_size, views=1) for lr in base_lrs])
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    arrays = map(jnp.asarray, (train, train_labels, test, test_labels))
    options = dict(batch_size=batch_size, epochs=epochs, classes=classes)
    accuracy = np.asarray(_train(jax.random.key(seed), *arrays, lrs, **options))
    best_epoch = int(accuracy.max(1).argmax())
    return {
        "crops": "centre crops, extracted once",
        "epochs": epochs,
        "batch_size": batch_size,
        "probes_last_epoch": [
            {"base_lr": lr, "accuracy": float(a)}
            for lr, a in zip(base_lrs, accuracy[-1], strict=True)
        ],
        "best_last_epoch": float(accuracy[-1].max()),
        "best_any_epoch": float(accuracy.max()),
        "best_any_epoch_is": best_epoch + 1,
        "chosen_on": "test",
    }
