"""Nearest neighbours: weighted k-NN classification (Wu et al., 2018), and examples for the report.

The queries are split over the devices; tiles of the bank pass by, each on every device. So devices
exchange nothing, no more than a tile of the bank leaves the disk at a time, and the whole
test x train matrix never exists.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import sharding
from maect_jax.config import numbers_above_0, positive
from maect_jax.errors import UserError
from maect_jax.evals.base import Protocol, Result, Row
from maect_jax.evals.features import Features, Rows, moments

_BLOCK = 1024  # queries, at most, that a device compares with a tile at a time
_QUERIES, _NEIGHBOURS = 8, 5  # of the report


@jax.jit
def _normalised(x, mean, std):
    x = (x - mean) / std
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames="block", donate_argnums=0)
def _merge(best, queries, tile, *, block: int):
    """The best `(cosines, row numbers)` `[Q, k]` of the tiles so far and of this one, its
    normalised rows `[T, D]` and their numbers `[T]`, -1 for padding."""

    def on_device(best, queries, tile):
        rows, numbers = tile

        def merge_block(part):
            scores, nearest, queries = part
            new = jnp.einsum("qd,rd->qr", queries, rows, precision="highest")
            new = jnp.where(numbers >= 0, new, -jnp.inf)
            # Ties go to the first row of the bank, as the earlier ones are on the left.
            both = jnp.concatenate([scores, new], 1)
            scores, columns = jax.lax.top_k(both, scores.shape[1])
            width = nearest.shape[1]
            old = jnp.take_along_axis(nearest, jnp.minimum(columns, width - 1), 1)
            return scores, jnp.where(columns < width, old, numbers[columns - width])

        parts = tuple(x.reshape(-1, block, x.shape[1]) for x in (*best, queries))
        return tuple(x.reshape(-1, x.shape[-1]) for x in jax.lax.map(merge_block, parts))

    return sharding.shard_map_batch(on_device, replicated_args=1)(best, queries, tile)


@dataclass(frozen=True)
class Search:
    """A search for nearest rows by cosine."""

    mesh: jax.sharding.Mesh  # the current one
    memory_mb: int  # MiB that each device may use
    standardise: bool = False  # whether dimensions first get the bank's mean 0 and deviation 1

    def plan(self, bank: tuple[int, int], queries: int, k: int) -> tuple[int, int, int]:
        """Plans a search: queries of all devices at a time, queries in a block, rows in a tile.

        A device has its queries twice (as read and normalised), their best so far, two tiles (one
        is copied while the other is searched) and a third, normalised; and for a block the scores,
        with the row numbers, before and after they are merged with the best so far.
        """
        (rows, width), devices = bank, self.mesh.size
        floats = self.memory_mb * 2**20 // 4
        tile = min(rows, max(floats // 2 // (3 * width), 1))
        per_device = min(max(floats // 4 // (2 * width + 4 * k), 1), -(-queries // devices))
        block = min(_BLOCK, max(floats // 4 // (5 * (tile + k)), 1), per_device)
        return -(-per_device // block) * block * devices, block, tile

    def nearest(self, bank: Rows, queries: Rows, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k nearest rows of a bank `[N, D]` for each of queries `[M, D]`; both may lie on
        disk. Returns cosines fp32 and row numbers int32 `[M, k]`, nearest first; ties go to the
        first row."""
        width = bank.shape[1]
        size, block, tile = self.plan(bank.shape, len(queries), k)
        mean, std = np.zeros(width), np.ones(width)
        if self.standardise:
            mean, variance = moments(bank)
            std = np.sqrt(variance * len(bank) / max(len(bank) - 1, 1)) + 1e-5
        scale = [sharding.replicate(np.float32(part), self.mesh) for part in (mean, std)]

        def padded(x, start, rows):
            x = x[start : start + rows]
            return np.pad(x, ((0, rows - len(x)), (0, 0)))

        parts = []
        for first in range(0, len(queries), size):
            rows = sharding.put_rows(padded(queries, first, size), self.mesh)
            part = _normalised(rows, *scale)
            empty = np.full((size, k), -np.inf, np.float32), np.zeros((size, k), np.int32)
            best = tuple(sharding.put_rows(array, self.mesh) for array in empty)
            for start in range(0, len(bank), tile):
                rows = sharding.replicate(padded(bank, start, tile), self.mesh)
                numbers = np.arange(start, start + tile, dtype=np.int32)
                numbers[len(bank) - start :] = -1
                jax.block_until_ready(best)  # at most one tile waits for its turn
                bank_part = _normalised(rows, *scale), sharding.replicate(numbers, self.mesh)
                best = _merge(best, part, bank_part, block=block)
            parts.append(sharding.to_host(best))
        cosines, numbers = (np.concatenate(x)[: len(queries)] for x in zip(*parts, strict=True))
        return cosines, numbers


@partial(jax.jit, static_argnames=("ks", "classes"))
def _vote(scores, labels, temperature, *, ks: tuple[int, ...], classes: int):
    """Predicted classes `[len(ks), Q]` from sorted neighbours `[Q, k]`."""
    query = jnp.arange(len(scores))[:, None]
    # Relative to the highest, which changes no vote, so that none of them overflows.
    weights = jnp.exp((scores - scores[:, :1]) / temperature)

    def winner(k):
        return jnp.zeros((len(scores), classes)).at[query, labels[:, :k]].add(weights[:, :k])

    return jnp.stack([winner(k).argmax(1) for k in ks])


def classify(
    search: Search, train: Features, test: Features, ks: tuple[int, ...], temperature: float = 0.07
) -> list[dict]:
    """Measures accuracy for several k in one pass; votes are weighted by exp(cosine / temperature).
    Returns a dict for each k, but those above the number of training images: `k`, `accuracy` (0 to
    1), and the settings."""
    ks = tuple(k for k in ks if k <= len(train.x))
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    scores, rows = search.nearest(train.x, test.x, max(ks))
    correct = np.zeros(len(ks))
    for start in range(0, len(test.x), _BLOCK):
        part = slice(start, start + _BLOCK)
        labels = train.labels[rows[part]]
        predicted = _vote(scores[part], labels, temperature, ks=ks, classes=classes)
        correct += (np.asarray(predicted) == test.labels[part]).sum(1)
    accuracies = (correct / len(test.x)).tolist()
    settings = {"temperature": temperature, "standardised": search.standardise}
    return [{"k": k, "accuracy": x, **settings} for k, x in zip(ks, accuracies, strict=True)]


class KNN(Protocol):
    """k-NN among the training images."""

    name = section = "knn"
    of_blocks = True
    rules: ClassVar = {"k": numbers_above_0, "temperature": positive}

    def check_training_images(self, config, images) -> None:
        most = max(config.eval.knn.k)
        if images.labelled and most > len(images):
            raise UserError(
                f"config.eval.knn.k={config.eval.knn.k}: must be at most the number of training "
                f"images ({len(images)})"
            )

    def run(self, row: Row) -> Result:
        section, (train, test) = row.config.eval.knn, (row.features[s] for s in ("train", "val"))
        search = Search(row.run.mesh, row.config.eval.memory_mb, section.standardise)
        return Result(classify(search, train, test, ks=section.k, temperature=section.temperature))


class Retrieval(Protocol):
    """No metrics, but `index` int32 `[Q]`, the record numbers of some images, and `neighbours`
    `[Q, k]`, those of the nearest training images.

    The images are held out, or else training images, which are not their own neighbours.
    """

    name = "retrieval"
    needs_labels = False
    arrays = ("index", "neighbours")

    def run(self, row: Row) -> Result:
        train = row.features["train"]
        test = row.features.get("val", train)
        queries = np.unique(np.linspace(0, len(test.x) - 1, _QUERIES).astype(int))
        k = min(_NEIGHBOURS + 1, len(train.x))
        search = Search(row.run.mesh, row.config.eval.memory_mb)
        _, nearest = search.nearest(train.x, test.x[queries], k)
        itself = np.where("val" in row.features, -1, queries)[:, None]
        # The sort is stable: all but the image itself move up.
        order = np.argsort(nearest == itself, axis=1, kind="stable")[:, :_NEIGHBOURS]
        neighbours = train.records[np.take_along_axis(nearest, order, 1)]
        return Result({}, {"index": test.records[queries], "neighbours": neighbours})
