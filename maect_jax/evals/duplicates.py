"""Pairs of rows whose cosine is high, exact for any number of rows.

For rows of length 1, |x - y|^2 = 2 - 2 cos(x, y), and in fewer components, after a rotation, two
rows can only be nearer. So rows are compared in their first principal components, with the length
of the rest as one component more; those that are still near are compared whole. Rows are sorted
into tiles of near ones, and tiles whose boxes are too far apart are not compared at all.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from maect_jax.data import loader, subsets
from maect_jax.evals import features
from maect_jax.evals.features import Prepared

MOST = 10  # pairs of a row that are kept, the highest
_TILE = 512  # rows: their products stay in a core's cache
_TURN = 64  # tiles, after which what is found is put together
_SAMPLED = 2048  # rows, by which the components are chosen
_WHOLE = 2**36  # pairs that are compared whole, at most: some 20 minutes of two cores for 768
_ROUNDING = 1e-5  # of products in fp32


class Pairs(NamedTuple):
    """Pairs of rows, the highest cosine first."""

    rows: np.ndarray  # int32 [P, 2], the lower number first
    cosine: np.ndarray  # fp32 [P]
    full: int = 0  # how many rows have `MOST` pairs or more, of which lower ones may be left out
    # The fraction of the rows that were compared with all others; the search ends where too many
    # pairs are near.
    compared: float = 1.0


class _Found(NamedTuple):
    rows: np.ndarray  # [P, 2]
    cosines: np.ndarray  # [P]
    whole: int  # how many pairs were compared in all components


def find(x: Prepared, cosine: float, *, memory_mb: int, seed: int = 0) -> Pairs:
    """Finds the pairs of rows of length 1, `[N, D]`, whose cosine is at least `cosine`, above 0; 1
    finds rows that are equal. Of each row it finds the `MOST` highest. `memory_mb` MiB are for the
    shortened rows; what is found needs at most some 250 bytes a row. `seed` draws the rows by which
    the components are chosen."""
    from threadpoolctl import threadpool_limits

    search = _Search(x, min(cosine, 1 - _ROUNDING), memory_mb=memory_mb, seed=seed)
    # Each thread has tiles of its own: NumPy compares in one thread.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(loader.cores()) as pool:
        return search.run(pool)


def _components(x: np.ndarray, cosine: float, most: int) -> np.ndarray:
    """The principal axes `[D, P]` of rows `[n, D]` of length 1, as many, up to `most`, as
    make a search fast."""
    basis = features.principal(x)[2].T.astype(np.float32)
    width, costs = len(basis), {}
    pairs = np.triu_indices(len(x), 1)
    for count in {min(width, most, 2**power) for power in range(4, 13)}:
        short = _shortened(x, basis[:, :count])
        near = float(((short @ short.T)[pairs] >= cosine).mean()) if len(x) > 1 else 0.0
        costs[count] = count + width * min(1.0, near * _TILE) ** 2  # operations a pair
    return basis[:, : min(costs, key=lambda count: (costs[count], count))]


def _shortened(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Rows `[n, D]` in components `[D, P]`, and the length of the rest: `[n, P + 1]`."""
    short = x @ basis
    rest = np.square(x).sum(1) - np.square(short).sum(1)
    return np.column_stack([short, np.sqrt(np.maximum(rest, 0))])


def _tiled(x: np.ndarray) -> list[np.ndarray]:
    """The numbers of rows `[N, P]` in tiles of near ones: halves along the widest component."""
    tiles = [np.arange(len(x), dtype=np.int32)]
    while len(tiles[-1]) > _TILE:  # the largest
        halves = []
        for rows in tiles:
            part = x[rows]
            middle = len(rows) // 2
            order = np.argpartition(part[:, part.var(0).argmax()], middle)
            halves += [rows[order[:middle]], rows[order[middle:]]]
        tiles = halves
    return tiles


class _Search:
    """The pairs that are found so far, and what is still searched for. Rows are in the order of
    the tiles here, but for `self._order`, which has their numbers."""

    def __init__(self, x: Prepared, cosine: float, *, memory_mb: int, seed: int):
        self._x, self._cosine = x, cosine
        drawn = np.random.default_rng(seed).choice(len(x), min(len(x), _SAMPLED), replace=False)
        most = max(1, memory_mb * 2**20 // (2 * 4 * len(x)) - 1)  # twice, as they are sorted
        basis = _components(x[np.sort(drawn)], cosine, most)
        short = np.concatenate([_shortened(part, basis) for part in features.in_parts(x)])
        tiles = _tiled(short)
        self._order = np.concatenate(tiles)
        self._short = short[self._order]
        ends = np.cumsum([len(tile) for tile in tiles])
        self._tiles = [slice(end - len(tile), end) for end, tile in zip(ends, tiles, strict=True)]
        self._low = np.stack([self._short[tile].min(0) for tile in self._tiles])
        self._high = np.stack([self._short[tile].max(0) for tile in self._tiles])
        self._rows = np.zeros((0, 2), np.int32)
        self._cosines = np.zeros(0, np.float32)
        # What a pair must have to be one of the highest of a row.
        self._least = np.full(len(x), cosine, np.float32)
        self._whole = 0

    def run(self, pool: ThreadPoolExecutor) -> Pairs:
        """Compares all tiles: first each with itself, where the highest are."""
        tiles = range(len(self._tiles))
        self._keep(pool.map(lambda tile: self._compare(tile, [tile]), tiles))
        done = 0
        while done < len(tiles) and self._whole <= _WHOLE:
            turn = tiles[done : done + _TURN]
            self._keep(pool.map(lambda tile: self._compare(tile, self._near(tile)), turn))
            done += len(turn)
        rows = np.sort(self._order[self._rows], axis=1)
        order = np.lexsort((rows[:, 1], rows[:, 0], -self._cosines))
        full = int((self._least > self._cosine).sum())
        return Pairs(rows[order], self._cosines[order], full, done / len(tiles))

    def _near(self, tile: int) -> Iterable[int]:
        """The tiles after one whose boxes are near it."""
        low, high = self._low[tile + 1 :], self._high[tile + 1 :]
        apart = np.maximum(np.maximum(low - self._high[tile], self._low[tile] - high), 0)
        near = np.square(apart).sum(1) <= 2 - 2 * self._cosine + _ROUNDING
        return tile + 1 + np.flatnonzero(near)

    def _compare(self, tile: int, others: Iterable[int]) -> _Found:
        """Compares the rows of a tile with those of others."""
        first, whole = self._tiles[tile], 0
        rows, cosines = [self._rows[:0]], [self._cosines[:0]]
        for other in others:
            second = self._tiles[other]
            least = min(self._least[first].min(), self._least[second].min())
            if least > 1 - _ROUNDING:  # none can be higher
                continue
            products = self._short[first] @ self._short[second].T
            if products.max() < least - _ROUNDING:
                continue
            near = products >= least - _ROUNDING
            if tile == other:
                near = np.triu(near, 1)
            i, j = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
            x, y = (self._x[self._order[t][n]] for t, n in ((first, i), (second, j)))
            exact = np.minimum(x @ y.T, 1)
            found = np.nonzero((exact >= least) & near[np.ix_(i, j)])
            pairs = np.column_stack([first.start + i[found[0]], second.start + j[found[1]]])
            pairs, high, _ = _highest(pairs.astype(np.int32), exact[found])
            rows.append(pairs)
            cosines.append(high)
            whole += exact.size
        return _Found(np.concatenate(rows), np.concatenate(cosines), whole)

    def _keep(self, found: Iterable[_Found]) -> None:
        """Adds pairs, of which the highest are kept."""
        rows, cosines, whole = zip((self._rows, self._cosines, self._whole), *found, strict=True)
        self._whole = sum(whole)
        self._rows, self._cosines, (full, least) = _highest(
            np.concatenate(rows), np.concatenate(cosines)
        )
        self._least[full] = np.maximum(self._least[full], least)


def _highest(rows: np.ndarray, cosines: np.ndarray):
    """Of pairs `[P, 2]` those that are one of the `MOST` highest of a row of theirs, and their
    cosines; and the rows that have so many, with the lowest of these."""
    ends, both = rows.T.ravel(), np.tile(cosines, 2)
    ranks = subsets.ranks(ends, -both)
    kept = (ranks < MOST).reshape(2, -1).any(0)
    last = ranks == MOST - 1
    return rows[kept], cosines[kept], (ends[last], both[last])
