"""Weighted k-nearest-neighbour classification (Wu et al., 2018)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_TILE = 4096  # rows of the bank compared at a time; the whole matrix is never built
_QUERIES = 1024


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both less the train mean, over the train deviation (unbiased) + 1e-5, per dimension."""
    mean, deviation = train.mean(0), train.std(0, ddof=1) + 1e-5
    return (train - mean) / deviation, (test - mean) / deviation


def _normalise(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames="k")
def _nearest(queries, bank, rows: int, k: int):
    """Cosines and row numbers `[Q, k]` of the best of `rows` rows of `bank [tiles, T, D]`."""

    def search_tile(best, tile):
        scores = jnp.einsum("qd,rd->qr", queries, bank[tile], precision="highest")
        row = tile * bank.shape[1] + jnp.arange(bank.shape[1])
        scores = jnp.where(row < rows, scores, -jnp.inf)
        scores = jnp.concatenate([best[0], scores], 1)
        found = jnp.concatenate([best[1], jnp.broadcast_to(row, (len(queries), len(row)))], 1)
        scores, chosen = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(found, chosen, 1)), None

    start = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    return jax.lax.scan(search_tile, start, jnp.arange(len(bank)))[0]


@partial(jax.jit, static_argnames=("ks", "classes"))
def _vote(scores, labels, temperature, ks: tuple[int, ...], classes: int):
    """Predicted classes `[len(ks), Q]` from neighbours in order, `[Q, k]`."""
    query = jnp.arange(len(scores))[:, None]
    weights = jnp.exp(scores / temperature)

    def winner(k):
        return jnp.zeros((len(scores), classes)).at[query, labels[:, :k]].add(weights[:, :k])

    return jnp.stack([winner(k).argmax(1) for k in ks])


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    ks: tuple[int, ...],
    temperature: float = 0.07,
    standardised: bool = False,
) -> list[dict]:
    """Accuracy for several k in one pass; neighbours by cosine, weighted by exp(cosine / T).

    Args:
      train, test: features `[N, D]`, `[M, D]`.
      train_labels, test_labels: int `[N]`, `[M]`, from 0.
      ks: numbers of neighbours; those above N are left out.
      temperature: T.
      standardised: whether each dimension is standardised with the train statistics first.

    Returns:
      One dict a k: `k`, `accuracy` (0 to 1), and the settings.
    """
    if standardised:
        train, test = standardise(train, test)
    train, test = _normalise(train), _normalise(test)
    ks = tuple(k for k in ks if k <= len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = np.pad(train, ((0, -len(train) % _TILE), (0, 0))).reshape(-1, _TILE, train.shape[1])
    bank, labels = jnp.asarray(bank), jnp.asarray(train_labels)
    correct = np.zeros(len(ks))
    for start in range(0, len(test), _QUERIES):
        queries, truth = test[start : start + _QUERIES], test_labels[start : start + _QUERIES]
        scores, rows = _nearest(queries, bank, len(train), max(ks))
        predicted = _vote(scores, labels[rows], temperature, ks, classes)
        correct += (np.asarray(predicted) == truth).sum(1)
    return [
        {
            "k": k,
            "accuracy": float(c / len(test)),
            "temperature": temperature,
            "standardised": standardised,
        }
        for k, c in zip(ks, correct, strict=True)
    ]
