"""k-means on sharded rows: k-means++, Lloyd's algorithm and its mini-batch variant.

Greedy k-means++ follows Arthur & Vassilvitskii (2007) with several candidates a step, mini-batches
Sculley (2010). Rows are `[G, T, D]`, G tiles of T rows, split over the devices by G; centres
`[R, K, D]` of R restarts are on every device. A pass over the rows sends the sums of the clusters
once.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import sharding
from maect_jax.evals import features

_TILE = 512  # rows
_READ = 8192  # rows that are read at a time
_COLUMNS = 1024  # centres of all restarts side by side that fill a matrix unit
_PASSES = 300
_EPOCHS = 10  # of mini-batches
_SAMPLED = 10  # rows a cluster, at least, of the sample that mini-batches start from
_FAR = 1e9  # a coordinate; its square is a finite fp32
_TOLERANCE = 1e-4  # of the mean variance: how far all centres together may still move (squared)


class Rows(NamedTuple):
    """Rows on the devices."""

    x: jax.Array  # fp32 [G, T, D]
    weight: jax.Array  # [G, T], 0 for padding


class Clustering(NamedTuple):
    """The results of R restarts."""

    centres: np.ndarray  # fp32 [R, K, D]
    clusters: np.ndarray  # int32 [R, N]
    loss: np.ndarray  # [R], the sum of squared distances
    passes: np.ndarray  # [R], over all rows


class Settings(NamedTuple):
    """How rows are clustered. Lloyd's algorithm ends when the centres move less than scikit-learn's
    tolerance, or after 300 passes; mini-batch k-means starts from a sample."""

    k: int  # clusters, at most as many as rows
    runs: int  # R, restarts
    seed: int  # restart r draws from (seed, r), no matter which ones run beside it
    memory_mb: int  # MiB that each device may use beside its rows
    batch_size: int = 0  # of mini-batch k-means; 0 for Lloyd's algorithm


def layout(order: np.ndarray, devices: int, tile: int, in_turns: bool = False) -> np.ndarray:
    """Row numbers `[G, T]` in an order, -1 for padding.

    Each device gets a contiguous part of the order; or, `in_turns`, one tile in each turn, so that
    the i-th tiles of all devices are the i-th batch, however many devices there are.
    """
    tile = min(tile, -(-len(order) // devices))
    steps = -(-len(order) // (tile * devices))
    numbers = np.pad(order, (0, steps * devices * tile - len(order)), constant_values=-1)
    if in_turns:
        numbers = numbers.reshape(steps, devices, tile).swapaxes(0, 1)
    return numbers.reshape(-1, tile)


@partial(jax.jit, donate_argnums=0)
def _filled(rows, part, start):
    """Each device's rows `[G, T, D]`, with its part of `part` from its tile `start` on."""

    def fill(rows, part, start):
        return jax.lax.dynamic_update_slice(rows, part, (start, 0, 0))

    return sharding.shard_map_batch(fill, replicated_args=1)(rows, part, start)


def place(x: features.Rows, mesh, numbers: np.ndarray, middle: np.ndarray | float = 0) -> Rows:
    """Puts rows `[N, D]`, minus `middle`, on the devices in a `layout`: a part at a time, so that
    the host has no copy of all. `mesh` must be the current one."""
    tiles, tile = numbers.shape
    step = min(max(1, _READ // (tile * mesh.size)), tiles // mesh.size)  # tiles of a device
    by_device = np.maximum(numbers, 0).reshape(mesh.size, -1, tile)
    rows = jnp.zeros((*numbers.shape, x.shape[1]), device=sharding.batch_sharding(mesh))
    for start in range(0, by_device.shape[1], step):
        start = min(start, by_device.shape[1] - step)
        part = by_device[:, start : start + step].reshape(-1)
        part = np.asarray(x[part], np.float32) - np.float32(middle)
        part = sharding.put_rows(part.reshape(-1, tile, x.shape[1]), mesh)
        rows = _filled(rows, part, np.int32(start))
    return Rows(rows, sharding.put_rows((numbers >= 0).astype(np.float32), mesh))


def _nearest(x, centres):
    """The nearest of centres `[R, K, D]` to each of `x` `[T, D]`, the first of equals, `[R, T]`."""
    restarts, k, width = centres.shape
    products = jnp.einsum("td,cd->tc", x, centres.reshape(-1, width), precision="highest")
    products = products.reshape(len(x), restarts, k) - jnp.square(centres).sum(-1) / 2
    # Two plain reductions are faster on CPUs than one argmax.
    best = products.max(-1, keepdims=True)
    numbers = jnp.arange(k, dtype=jnp.int32)
    return jnp.where(products == best, numbers, k).min(-1).T


_on_devices = partial(sharding.shard_map_batch, replicated_args=1, replicated_out=True)


def _scattered(x, weight, nearest, k: int):
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=k), (None, 0))
    return add(x * weight[:, None], nearest), add(weight, nearest)


def _multiplied(x, weight, nearest, k: int):
    one_hot = jax.nn.one_hot(nearest, k, dtype=x.dtype) * weight[:, None]
    return jnp.einsum("rtk,td->rkd", one_hot, x, precision="highest"), one_hot.sum(1)


def _sums(x, weight, nearest, k: int):
    """Sums `[R, K, D]` and counts `[R, K]` of the rows of each cluster."""
    # CPUs are fast at adding row by row, matrix units at a product.
    by_platform = {"cpu": partial(_scattered, k=k), "default": partial(_multiplied, k=k)}
    return jax.lax.platform_dependent(x, weight, nearest, **by_platform)


def _pass(rows: Rows, centres):
    """Sums `[R, K, D]` and counts `[R, K]` of the clusters of all rows."""

    @_on_devices
    def sums(x, weight, centres):
        def add(total, tile):
            new = _sums(*tile, _nearest(tile[0], centres), centres.shape[1])
            return jax.tree.map(jnp.add, total, new), None

        start = jnp.zeros_like(centres), jnp.zeros(centres.shape[:2])
        return sharding.sum_over_devices(jax.lax.scan(add, start, (x, weight))[0])

    return sums(*rows, centres)


def candidates(k: int) -> int:
    """The number of rows that are tried as each next centre, as in scikit-learn."""
    return 2 + int(math.log(k))


def _drawn(uniform, potential):
    """Draws a row with probability proportional to its potential `[G, T]`, by a number in [0, 1):
    first the tile, then the row in it, so that only a tile's worth of rows is sent."""

    def draw(uniform, potential):
        sums = jnp.cumsum(potential)
        position = jnp.minimum((sums <= uniform * sums[-1]).sum(), len(sums) - 1)
        before = jnp.where(position > 0, sums[position - 1], 0.0)
        rest = (uniform * sums[-1] - before) / jnp.maximum(potential[position], 1e-38)
        return position, jnp.clip(rest, 0, 1 - 1e-7)

    tile, rest = draw(uniform, potential.sum(1))
    return tile, draw(rest, potential[tile])[0]


@partial(jax.jit, static_argnames="k")
def plus_plus(rows: Rows, keys: jax.Array, *, k: int) -> jax.Array:
    """Centres `[R, K, D]` by greedy k-means++, a key a restart."""
    x, weight = rows
    squares = jnp.square(x).sum(-1)

    def distances(points):
        """Squared distances `[L, G, T]` of all rows from points `[L, D]`."""
        # One product of two matrices; with three axes CPUs take eight times as long.
        flat = x.reshape(-1, x.shape[-1])
        products = jnp.einsum("nd,ld->nl", flat, points, precision="highest").T
        products = products.reshape(-1, *weight.shape)
        squared = squares - 2 * products + jnp.square(points).sum(-1)[:, None, None]
        return jnp.maximum(squared, 0) * weight

    def choose(key, closest):
        uniform = jax.random.uniform(key, (candidates(k),))
        points = x[jax.vmap(_drawn, (0, None))(uniform, closest)]
        closer = jnp.minimum(closest, distances(points))
        best = closer.sum((1, 2)).argmin()
        return points[best], closer[best]

    def add(i, state):
        centres, closest = state
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        points, closest = jax.vmap(choose)(step_keys, closest)
        return centres.at[:, i].set(points), closest

    first = jax.vmap(lambda key: x[_drawn(jax.random.uniform(key), weight)])(keys)
    centres = jnp.zeros((len(keys), k, x.shape[-1])).at[:, 0].set(first)
    closest = jax.vmap(lambda point: distances(point[None])[0])(first)
    return jax.lax.fori_loop(1, k, add, (centres, closest))[0]


@jax.jit
def lloyd(rows: Rows, centres: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lloyd's algorithm from centres `[R, K, D]`, until they move by less than `limit` (squared,
    all together). Returns the centres and the number of passes `[R]` of each restart."""

    def goes_on(state):
        _, moved, passes = state
        return (moved > limit).any() & (passes.max() < _PASSES)

    def move(state):
        centres, moved, passes = state
        sums, counts = _pass(rows, centres)
        counts = counts[..., None]
        new = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centres)  # empty ones stay
        active = moved > limit  # a restart that has converged stays as it is
        new = jnp.where(active[:, None, None], new, centres)
        moved = jnp.where(active, jnp.square(new - centres).sum((1, 2)), moved)
        return new, moved, passes + active

    start = centres, jnp.full(len(centres), jnp.inf), jnp.zeros(len(centres), jnp.int32)
    centres, _, passes = jax.lax.while_loop(goes_on, move, start)
    return centres, passes


@jax.jit
def mini_batch(rows: Rows, centres: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mini-batch k-means: the i-th tiles of all devices are a batch; a centre is the mean of all
    rows that it was nearest to. The rows must be in random order. Returns as `lloyd` does."""

    @_on_devices
    def learned(x, weight, centres):
        def learn(state, tile):
            centres, seen = state
            sums = _sums(*tile, _nearest(tile[0], centres), centres.shape[1])
            sums, counts = sharding.sum_over_devices(sums)
            seen = seen + counts
            step = (sums - counts[..., None] * centres) / jnp.maximum(seen, 1)[..., None]
            return (centres + step, seen), None

        def epoch(_, state):
            return jax.lax.scan(learn, state, (x, weight))[0]

        start = centres, jnp.zeros(centres.shape[:2])
        return jax.lax.fori_loop(0, _EPOCHS, epoch, start)[0]

    return learned(*rows, centres), jnp.full(len(centres), _EPOCHS, jnp.int32)


@jax.jit
def _assigned(rows: Rows, centres: jax.Array):
    """Clusters `[G, R, T]` of the rows, and the losses `[R]`."""

    def on_device(x, weight, centres):
        def assign(tile):
            x, weight = tile
            nearest = _nearest(x, centres)
            chosen = jnp.take_along_axis(centres, nearest[..., None], 1)
            return nearest, (jnp.square(x - chosen).sum(-1) * weight).sum(1)

        return jax.lax.map(assign, (x, weight))

    nearest, loss = sharding.shard_map_batch(on_device, replicated_args=1)(*rows, centres)
    return nearest, loss.sum(0)


def restarts_at_a_time(
    shape: tuple[int, int], k: int, *, tile: int, devices: int, memory_mb: int
) -> int:
    """How many restarts run side by side: as many as `memory_mb` MiB a device allow, but no more
    than fill the matrix unit, as those that have converged would only wait for the others."""
    rows, width = shape
    distances = -(-rows // devices) * (candidates(k) + 3)
    floats = distances + tile * (3 * k + 2 * width) + 5 * k * (width + 1)
    return max(1, min(memory_mb * 2**20 // (4 * floats), -(-_COLUMNS // k)))


def kmeans(x: features.Rows, settings: Settings, mesh) -> Clustering:
    """Clusters rows `[N, D]` in many seeded restarts. `mesh` must be the current one."""
    return over(x, (settings.k,), settings, mesh)[settings.k]


def over(
    x: features.Rows, counts: Sequence[int], settings: Settings, mesh
) -> dict[int, Clustering]:
    """Clusters rows `[N, D]` into each of several numbers of clusters, `settings.k` or fewer.

    A restart draws the centres of all of them at once, as k-means++ adds one after the other; a
    smaller number has the first ones. Numbers up to a power of two share a compiled program, in
    which the centres that one lacks are far from all rows.
    """
    k, runs, seed, memory_mb, batch_size = settings
    mean, variance = features.moments(x)
    middle = mean.astype(np.float32)  # far from the origin distances would lose their digits
    limit = np.float32(_TOLERANCE * variance.mean())
    if batch_size:
        order = np.random.default_rng(seed).permutation(len(x))
        numbers = layout(order, mesh.size, -(-batch_size // mesh.size), in_turns=True)
        rows = place(x, mesh, numbers, middle)
        sample = order[: max(3 * batch_size, _SAMPLED * k)]
        first_rows = place(x, mesh, layout(sample, mesh.size, _TILE), middle)
    else:
        numbers = layout(np.arange(len(x)), mesh.size, _TILE)
        rows = first_rows = place(x, mesh, numbers, middle)
    limits = dict(tile=numbers.shape[1], devices=mesh.size, memory_mb=memory_mb)
    parts: dict[int, list[Clustering]] = {count: [] for count in counts}
    together = restarts_at_a_time(x.shape, k, **limits)
    for first in range(0, runs, together):
        restarts = jnp.arange(first, min(first + together, runs))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), restarts)
        drawn = plus_plus(first_rows, keys, k=k)
        for count in counts:
            lacking = jnp.arange(min(k, 2 ** (count - 1).bit_length())) >= count
            centres = jnp.where(lacking[:, None], _FAR, drawn[:, : len(lacking)])
            found = mini_batch(rows, centres) if batch_size else lloyd(rows, centres, limit)
            (centres, passes), (nearest, loss) = sharding.to_host(
                (found, _assigned(rows, found[0]))
            )
            clusters = np.empty((len(restarts), len(x)), np.int32)
            clusters[:, numbers[numbers >= 0]] = np.moveaxis(nearest, 1, 0)[:, numbers >= 0]
            parts[count].append(Clustering(centres[:, :count] + middle, clusters, loss, passes))
    return {
        count: Clustering(*map(np.concatenate, zip(*found, strict=True)))
        for count, found in parts.items()
    }
