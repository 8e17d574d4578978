"""The support set of NNCLR: a first-in-first-out queue of embeddings, sharded over devices.

The queue is a ring of whole batches, `[slots, B, D]`, split over the devices along the batch
axis like every activation (`sharding.RULES`), so a device writes the rows that it has computed
itself: `push` moves no data between devices. `nearest` moves only queries and candidates, never the
queue. A step looks neighbours up (`nearest`), draws one of each (`choose`) and reads it (`take`).

The order of neighbours is defined on any number of devices: by descending score, then by ascending
ring position `slot * B + row`. A queue size that the batch does not divide is rounded up to whole
slots, and the surplus of the oldest slot is left out of every search.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import PyTreeNode
from jax.sharding import PartitionSpec as P

Array = jax.Array | np.ndarray
_TILE = 4096  # rows of a device that are compared at a time, unless one slot has more
EXCLUDED = -2.0  # below every cosine: rows of the query's own image
_ABSENT = -3.0  # below the excluded ones: rows beyond the queue's size


class Queue(PyTreeNode):
    """A ring of batches."""

    rows: Array  # fp32 `[slots, B, D]`, L2-normalised
    ids: Array  # dataset index of each row, int32 `[slots, B]`, -1 if unknown
    labels: Array  # likewise
    slot: Array | np.int32  # int32 `[]`, the slot that is written next, which is the oldest


class Neighbours(NamedTuple):
    """What a look-up finds for each query, the best first."""

    scores: jax.Array  # fp32 `[Q, k]`: cosines, `EXCLUDED` for the query's own rows
    positions: jax.Array  # in the ring, int32 `[Q, k]`


def normalise(x: jax.Array) -> jax.Array:
    """L2-normalises the last axis, in fp32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def slots_for(size: int, batch: int) -> int:
    """How many slots of `batch` rows hold `size` rows."""
    return -(-size // batch)


def init(key: jax.Array, size: int, batch: int, dim: int) -> Queue:
    """A queue of normalised Gaussian rows that belong to no image (index and label -1)."""
    shape = (slots_for(size, batch), batch)
    rows = normalise(jax.random.normal(key, (*shape, dim)))
    none = jnp.full(shape, -1, jnp.int32)
    return Queue(rows, none, jnp.copy(none), jnp.int32(0))


def push(queue: Queue, rows: jax.Array, ids: jax.Array, labels: jax.Array, keep=True) -> Queue:
    """Overwrites the oldest slot with a batch: rows `[B, D]`, ids and labels `[B]`.

    With `keep` false (a scalar bool, may be traced) the queue stays as it is.
    """

    def write(ring, new):
        new = jnp.where(keep, new, jax.lax.dynamic_index_in_dim(ring, queue.slot, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(ring, new, queue.slot, 0)

    slot = jnp.where(keep, (queue.slot + 1) % len(queue.ids), queue.slot)
    new = rows.astype(jnp.float32), ids.astype(jnp.int32), labels.astype(jnp.int32)
    rows, ids, labels = map(write, (queue.rows, queue.ids, queue.labels), new)
    return Queue(rows, ids, labels, slot)


def in_age_order(queue: Queue, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The newest `size` rows `[size, D]`, their ids and labels `[size]`, oldest first."""

    def flat(ring):
        ring = jnp.roll(ring, -queue.slot, axis=0)
        return ring.reshape(-1, *ring.shape[2:])[-size:]

    return tuple(map(flat, (queue.rows, queue.ids, queue.labels)))


def rebatch(queue: Queue, size: int, batch: int) -> Queue:
    """The same rows in the same age order for another batch size, when a stage starts."""
    if queue.ids.shape == (slots_for(size, batch), batch):
        return queue
    surplus = slots_for(size, batch) * batch - size

    def ring(flat, fill):
        pad = jnp.full((surplus, *flat.shape[1:]), fill, flat.dtype)
        return jnp.concatenate([pad, flat]).reshape(-1, batch, *flat.shape[1:])

    rows, ids, labels = map(ring, in_age_order(queue, size), (0, -1, -1))
    return Queue(rows, ids, labels, jnp.int32(0))


def _search(queue: Queue, queries, ids, *, size, k, first_row, batch):
    """Best `k` for each of `queries [Q, D]` in the part of the ring from row `first_row` on."""
    slots, rows_here = queue.ids.shape
    surplus = slots * batch - size
    # Slots in a tile: the largest divisor of `slots` with at most `_TILE` rows, or one.
    fitting = (n for n in range(1, slots + 1) if slots % n == 0 and n * rows_here <= _TILE)
    together = max(fitting, default=1)
    tiles = slots // together
    place = jnp.arange(together * rows_here, dtype=jnp.int32)
    row = first_row + place % rows_here

    def search_tile(best, part):
        tile, rows, own = part
        # By default a TPU rounds the inputs of a matmul to bf16, which picks another
        # neighbour in about 3 % of the look-ups.
        scores = jnp.einsum("qd,rd->qr", queries, rows, precision="highest")
        scores = jnp.where(own == ids[:, None], EXCLUDED, scores)
        slot = tile * together + place // rows_here
        absent = (slot == queue.slot) & (row < surplus)
        scores = jnp.where(absent, _ABSENT, scores)
        positions = jnp.broadcast_to(slot * batch + row, scores.shape)
        # The best so far come first and have lower positions, and top_k is stable.
        scores = jnp.concatenate([best[0], scores], 1)
        positions = jnp.concatenate([best[1], positions], 1)
        scores, chosen = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(positions, chosen, 1)), None

    start = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    rows = queue.rows.reshape(tiles, len(place), -1)
    parts = jnp.arange(tiles, dtype=jnp.int32), rows, queue.ids.reshape(tiles, -1)
    best, _ = jax.lax.scan(search_tile, start, parts)
    return best


def nearest(queue: Queue, queries: jax.Array, ids: jax.Array, *, size: int, k: int) -> Neighbours:
    """The `k` rows with the highest cosine for each query, over the newest `size` rows.

    Args:
      queue: the queue; its rows are unit vectors.
      queries: unit vectors fp32 `[Q, D]`; Q is a multiple of the number of devices.
      ids: int `[Q]`, dataset index of each query; rows with the same index are excluded.
      size: number of rows that the queue holds.
      k: neighbours to return, at most `size`.

    Returns:
      Neighbours in the defined order. Where fewer than `k` rows are allowed, excluded ones fill the
      list up, by ring position.
    """
    batch = queue.ids.shape[1]
    search = partial(_search, size=size, k=k, batch=batch)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Neighbours(*search(queue, queries, ids, first_row=0))
    axes = mesh.axis_names

    def on_device(queue, queries, ids):
        first_row = jax.lax.axis_index(axes) * queue.ids.shape[1]
        gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        candidates = search(queue, gather(queries), gather(ids), first_row=first_row)
        # [Q, k] candidates among this device's rows for all queries -> [Q / n, n k] among all
        # devices' rows for this device's queries.
        swap = partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=1, tiled=True)
        scores, positions = map(swap, candidates)
        order = jax.lax.sort((-scores, positions), dimension=1, num_keys=2)
        return -order[0][:, :k], order[1][:, :k]

    specs = jax.tree.map(lambda ring: P(None, axes) if ring.ndim else P(), queue)
    on_devices = jax.shard_map(
        on_device, in_specs=(specs, P(axes), P(axes)), out_specs=P(axes), check_vma=False
    )
    return Neighbours(*on_devices(queue, queries, ids.astype(jnp.int32)))


def choose(neighbours: Neighbours, key: jax.Array) -> jax.Array:
    """Draws one of each query's neighbours uniformly: ring positions int32 `[Q]`.

    Only allowed rows are drawn, however few; if there are none, the first of the list is taken,
    the row at the lowest ring position.
    """
    allowed = jnp.maximum((neighbours.scores > EXCLUDED).sum(1), 1)
    uniform = jax.random.uniform(key, allowed.shape)
    draw = jnp.minimum((uniform * allowed).astype(jnp.int32), allowed - 1)
    return jnp.take_along_axis(neighbours.positions, draw[:, None], 1)[:, 0]


def take(queue: Queue, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows `[Q, D]` and labels `[Q]` at ring positions `[Q]`.

    On several devices each contributes the rows it has and zeros for the others, and a
    reduce-scatter of `[Q, D]` brings every query its row.
    """
    batch = queue.ids.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        slot, row = positions // batch, positions % batch
        return queue.rows[slot, row], queue.labels[slot, row]
    axes = mesh.axis_names

    def on_device(rows, labels, positions):
        local = labels.shape[1]
        positions = jax.lax.all_gather(positions, axes, tiled=True)
        slot, row = positions // batch, positions % batch - jax.lax.axis_index(axes) * local
        is_local = (row >= 0) & (row < local)
        row = jnp.clip(row, 0, local - 1)
        reduce_scatter = partial(jax.lax.psum_scatter, axis_name=axes, tiled=True)
        return (
            reduce_scatter(jnp.where(is_local[:, None], rows[slot, row], 0.0)),
            reduce_scatter(jnp.where(is_local, labels[slot, row], 0)),
        )

    return jax.shard_map(
        on_device,
        in_specs=(P(None, axes), P(None, axes), P(axes)),
        out_specs=P(axes),
        check_vma=False,
    )(queue.rows, queue.labels, positions)
