"""Weighted k-nearest-neighbour classification (Wu et al., 2018).

The queries are split over the devices; the bank comes past them in tiles, each to every device. So
nothing is sent between devices, no more than a tile of the bank leaves the disk at a time, and the
whole test x train matrix never exists.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import sharding

_BLOCK = 1024  # queries, at most, that a device compares with a tile at a time
_READ = 4096  # rows of the bank that its statistics are summed over at a time


class _Plan(NamedTuple):
    """Queries at a time, all devices together, of which a device takes `block` at a time; rows of
    the bank in a tile."""

    queries: int
    block: int
    tile: int


def plan(rows: int, queries: int, width: int, k: int, devices: int, memory_mb: int) -> _Plan:
    """How much to take at a time, so that each device needs at most `memory_mb` MiB.

    A device holds its queries twice (as they come, and normalised), their best so far, two tiles
    (one comes while the other is searched) and a third, normalised; and of a block the scores, with
    the row numbers, before and after they are joined with the best so far.
    """
    floats = memory_mb * 2**20 // 4
    tile = min(rows, max(floats // 2 // (3 * width), 1))
    block = min(_BLOCK, max(floats // 4 // (5 * (tile + k)), 1))
    own = min(max(floats // 4 // (2 * width + 4 * k), 1), -(-queries // devices))
    block = min(block, own)
    return _Plan(-(-own // block) * block * devices, block, tile)


def deviations(bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased deviation + 1e-5 of each dimension `[D]` of `[N, D]`, in float64."""
    parts = [slice(i, i + _READ) for i in range(0, len(bank), _READ)]
    mean = sum(bank[part].sum(0, dtype=np.float64) for part in parts) / len(bank)
    squares = sum(np.square(bank[part] - mean).sum(0) for part in parts)
    return mean, np.sqrt(squares / max(len(bank) - 1, 1)) + 1e-5


def _normalised(x, mean, deviation):
    x = (x - mean) / deviation
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames="block", donate_argnums=0)
def _merge(best, queries, tile, start, rows, mean, deviation, *, block: int):
    """The best `(scores, row numbers)` `[Q, k]` so far, joined with those of a tile `[T, D]`, whose
    first row is number `start` of `rows`."""

    def own(scores, found, queries, tile, start, rows, mean, deviation):
        tile = _normalised(tile, mean, deviation)
        numbers = start + jnp.arange(len(tile), dtype=jnp.int32)

        def one(block):
            scores, found, queries = block
            new = jnp.einsum("qd,rd->qr", queries, tile, precision="highest")
            new = jnp.where(numbers < rows, new, -jnp.inf)
            # What is nearer, then what comes first in the bank: the old ones stand before.
            both = jnp.concatenate([scores, new], 1)
            scores, places = jax.lax.top_k(both, scores.shape[1])
            width = found.shape[1]
            old = jnp.take_along_axis(found, jnp.minimum(places, width - 1), 1)
            return scores, jnp.where(places < width, old, start + places - width)

        parts = (x.reshape(-1, block, x.shape[1]) for x in (scores, found, queries))
        joined = jax.lax.map(one, tuple(parts))
        return tuple(x.reshape(-1, x.shape[-1]) for x in joined)

    return sharding.shard_map_batch(own, replicated_args=5)(
        *best, queries, tile, start, rows, mean, deviation
    )


@jax.jit
def _prepared(queries, mean, deviation):
    return _normalised(queries, mean, deviation)


def _chunks(queries: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Parts of `size` queries, the last filled up, and how many of each count."""
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        yield np.pad(part, ((0, size - len(part)), (0, 0))), len(part)


def nearest(
    bank: np.ndarray,
    queries: np.ndarray,
    k: int,
    mesh,
    memory_mb: int,
    standardise: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of a bank by cosine.

    Args:
      bank, queries: features `[N, D]` and `[M, D]`, which may lie on disk.
      k: at most N.
      mesh: the device mesh, which must be the current one.
      memory_mb: MiB that each device may use.
      standardise: whether each dimension is first taken less the bank's mean and over its
        deviation (`deviations`).

    Returns:
      Cosines fp32 and row numbers int32 `[M, k]`, nearest first; of equals the one that comes
      first in the bank.
    """
    width = bank.shape[1]
    size, block, tile = plan(len(bank), len(queries), width, k, mesh.size, memory_mb)
    moments = deviations(bank) if standardise else (np.zeros(width), np.ones(width))
    moments = [sharding.replicate(np.float32(part), mesh) for part in moments]
    rows, found = np.int32(len(bank)), []
    for part, count in _chunks(queries, size):
        part = _prepared(sharding.put_rows(part, mesh), *moments)
        empty = np.full((size, k), -np.inf, np.float32), np.zeros((size, k), np.int32)
        best = tuple(sharding.put_rows(array, mesh) for array in empty)
        for start in range(0, len(bank), tile):
            rest = bank[start : start + tile]
            rest = np.pad(rest, ((0, tile - len(rest)), (0, 0)))
            there = sharding.replicate(rest, mesh)
            jax.block_until_ready(best)  # no more than one tile waits for its turn
            best = _merge(best, part, there, np.int32(start), rows, *moments, block=block)
        found.append([array[:count] for array in sharding.to_host(best)])
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


@partial(jax.jit, static_argnames=("ks", "classes"))
def _vote(scores, labels, temperature, ks: tuple[int, ...], classes: int):
    """Predicted classes `[len(ks), Q]` from neighbours in order, `[Q, k]`."""
    query = jnp.arange(len(scores))[:, None]
    # Less the highest, which changes no vote, and lets none of them overflow.
    weights = jnp.exp((scores - scores[:, :1]) / temperature)

    def winner(k):
        return jnp.zeros((len(scores), classes)).at[query, labels[:, :k]].add(weights[:, :k])

    return jnp.stack([winner(k).argmax(1) for k in ks])


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    ks: tuple[int, ...],
    mesh,
    memory_mb: int,
    temperature: float = 0.07,
    standardise: bool = False,
) -> list[dict]:
    """Accuracy for several k in one pass; neighbours by cosine, weighted by exp(cosine / T).

    Args:
      train, test: features `[N, D]`, `[M, D]`.
      train_labels, test_labels: int `[N]`, `[M]`, from 0.
      ks: numbers of neighbours; those above N are left out.
      mesh, memory_mb, standardise: as `nearest` takes them.
      temperature: T.

    Returns:
      One dict a k: `k`, `accuracy` (0 to 1), and the settings.
    """
    ks = tuple(k for k in ks if k <= len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    scores, rows = nearest(train, test, max(ks), mesh, memory_mb, standardise)
    correct = np.zeros(len(ks))
    for start in range(0, len(test), _BLOCK):
        part = slice(start, start + _BLOCK)
        predicted = _vote(scores[part], train_labels[rows[part]], temperature, ks, classes)
        correct += (np.asarray(predicted) == test_labels[part]).sum(1)
    return [
        {
            "k": k,
            "accuracy": float(c / len(test)),
            "temperature": temperature,
            "standardised": standardise,
        }
        for k, c in zip(ks, correct, strict=True)
    ]
