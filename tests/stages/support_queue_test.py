"""The support queue against a plain NumPy FIFO, on one device and on eight."""

from collections import deque
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import sharding
from maect_jax.compile import collectives
from maect_jax.stages import state, support_queue
from maect_jax.stages.step import jitted_step
from maect_jax.stages.support_queue import EXCLUDED
from tests.helpers.common import mesh_of
from tests.helpers.tiny_stages import batch_of, contrast_stage

BATCH, DIM, K = 16, 4, 3
MESHES = {"none": None, "1": (1, 1), "8": (4, 2)}


def unit_rows(rng, *shape):
    """Rows of +-1/2: unit vectors of four dimensions whose cosines are exact, with many ties."""
    return rng.choice([-0.5, 0.5], (*shape, DIM)).astype(np.float32)


def within(mesh):
    return jax.set_mesh(mesh_of(*mesh)) if mesh else nullcontext()


def filled(rng, size, pushes):
    """A queue after some pushes, and the same as a NumPy FIFO of (row, id, label, position)."""
    queue = support_queue.init(jax.random.key(1), size, BATCH, DIM)
    slots = support_queue.slots_for(size, BATCH)
    rows = unit_rows(rng, slots, BATCH)
    queue = queue.replace(rows=jnp.asarray(rows))
    fifo = deque(maxlen=size)
    for slot in range(slots):
        fifo.extend((rows[slot, r], -1, -1, slot * BATCH + r) for r in range(BATCH))
    for push in range(pushes):
        rows, ids = unit_rows(rng, BATCH), rng.integers(0, 40, BATCH)
        labels = rng.integers(0, 5, BATCH)
        slot = push % slots
        queue = support_queue.push(queue, jnp.asarray(rows), jnp.asarray(ids), jnp.asarray(labels))
        fifo.extend((rows[r], ids[r], labels[r], slot * BATCH + r) for r in range(BATCH))
    return queue, fifo


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize(("size", "pushes"), [(64, 0), (64, 3), (64, 7), (40, 5)])
@pytest.mark.parametrize("tile", [1, 32, 4096])
def test_nearest_and_take_equal_numpy(rng, monkeypatch, mesh, size, pushes, tile):
    monkeypatch.setattr(support_queue, "_TILE", tile)
    queue, fifo = filled(rng, size, pushes)
    queries, ids = unit_rows(rng, BATCH), rng.integers(0, 40, BATCH).astype(np.int32)
    with within(mesh):
        found = jax.jit(
            lambda *a: support_queue.nearest(*a, size=size, k=K)
        )(queue, queries, ids)  # fmt: skip
        rows, labels = jax.jit(support_queue.take)(queue, found.positions[:, 1])
    for i, (query, own) in enumerate(zip(queries, ids, strict=True)):
        ranked = sorted(
            (-EXCLUDED if entry[1] == own else -float(entry[0] @ query), entry[3], entry)[:2]
            for entry in fifo
        )
        expected = ranked[:K]
        np.testing.assert_array_equal(found.scores[i], [-score for score, _ in expected])
        np.testing.assert_array_equal(found.positions[i], [position for _, position in expected])
        by_position = {entry[3]: entry for entry in fifo}
        np.testing.assert_array_equal(rows[i], by_position[expected[1][1]][0])
        assert labels[i] == by_position[expected[1][1]][2]


def test_order_of_age_survives_another_batch_size(rng):
    queue, fifo = filled(rng, 48, 5)
    again = support_queue.rebatch(queue, 48, 12)
    assert again.ids.shape == (4, 12)
    rows, ids, labels = support_queue.in_age_order(again, 48)
    np.testing.assert_array_equal(rows, [entry[0] for entry in fifo])
    np.testing.assert_array_equal(ids, [entry[1] for entry in fifo])
    np.testing.assert_array_equal(labels, [entry[2] for entry in fifo])
    # The oldest 12 go first.
    new = unit_rows(rng, 12)
    pushed = support_queue.push(again, jnp.asarray(new), jnp.arange(12), jnp.arange(12))
    rows, _, _ = support_queue.in_age_order(pushed, 48)
    np.testing.assert_array_equal(rows[:36], [entry[0] for entry in fifo][12:])
    np.testing.assert_array_equal(rows[36:], new)


def test_everything_excluded_is_defined_and_finite(rng):
    queue = support_queue.init(jax.random.key(0), 64, BATCH, DIM)
    queue = queue.replace(ids=jnp.full_like(queue.ids, 7))
    found = support_queue.nearest(queue, unit_rows(rng, 2), jnp.array([7, 8]), size=64, k=K)
    np.testing.assert_array_equal(found.scores[0], [EXCLUDED] * K)
    assert support_queue.choose(found, jax.random.key(0))[0] == found.positions[0, 0] == 0
    assert (found.scores[1] >= -1).all()


def test_choose_is_uniform_over_the_allowed():
    scores = jnp.tile(jnp.array([0.9, 0.8, 0.7, EXCLUDED]), (3000, 1))
    found = support_queue.Neighbours(scores, jnp.tile(jnp.arange(4), (3000, 1)))
    drawn = np.bincount(support_queue.choose(found, jax.random.key(3)), minlength=4)
    assert drawn[3] == 0
    # Binomial(3000, 1/3): six standard deviations.
    np.testing.assert_allclose(drawn[:3], 1000, atol=6 * np.sqrt(3000 * 2 / 9))


def test_a_push_that_is_not_kept_changes_nothing(rng):
    queue, _ = filled(rng, 64, 2)
    rows = jnp.full((BATCH, DIM), jnp.nan)
    after = support_queue.push(queue, rows, jnp.arange(BATCH), jnp.arange(BATCH), keep=False)
    for old, new in zip(jax.tree.leaves(queue), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def in_place(mesh, queue):
    """The queue, as its rules place it on a mesh."""
    return jax.device_put(queue, sharding.tree_shardings({"queue": queue}, mesh)["queue"])


def test_push_moves_nothing(rng):
    mesh = mesh_of(4, 2)
    batch = sharding.put_batch(
        dict(rows=unit_rows(rng, BATCH), ids=np.zeros(BATCH, np.int32)), mesh
    )
    with jax.set_mesh(mesh):
        queue = in_place(mesh, filled(rng, 64, 0)[0])
        places = jax.tree.map(lambda x: x.sharding, queue)
        push = jax.jit(
            lambda q, b: support_queue.push(q, b["rows"], b["ids"], b["ids"]),
            out_shardings=places,
            donate_argnums=0,
        )
        program = push.lower(queue, batch).compile()
    assert collectives.read(program.as_text(), 8) == []
    # In place: nothing of the queue's size beside it.
    assert program.memory_analysis().temp_size_in_bytes < queue.rows.nbytes / 8


def collectives_of(size, shape=(4, 2), rows=BATCH):
    """What the compiled step of ct exchanges, for a queue of that size and a batch of `rows`."""
    stage, mesh = contrast_stage("ct", queue_size=size, batch_size=rows), mesh_of(*shape)
    start = state.abstract_state(stage, jax.random.key(0), {}, mesh)
    batch = {
        key: jax.ShapeDtypeStruct(
            (rows, *x.shape[1:]), x.dtype, sharding=sharding.batch_sharding(mesh)
        )
        for key, x in batch_of(0).items()
    }
    with jax.set_mesh(mesh):
        program = jitted_step(stage, state.state_shardings(start)).lower(start, batch).compile()
    return collectives.read(program.as_text(), mesh.size)


def test_what_the_step_of_ct_exchanges_does_not_grow_with_the_queue():
    small, large = collectives_of(48), collectives_of(16 * 1024)
    assert collectives.by_kind(small) == collectives.by_kind(large)
    assert {"all-gather", "all-to-all"} <= {c.kind for c in small}
    # The device's part of the large queue alone has 64 KiB.
    assert max(c.bytes for c in large) < 16 * 1024 * 8 * 4 / 8


@pytest.mark.slow
def test_what_a_device_sends_grows_by_the_gathered_rows_alone():
    """With the same number of images on each of n devices: a (n - 1) / n for what is reduced, and
    c (n - 1) for the rows that every device sends to every other."""
    sent = {n: sum(c.times * c.sent for c in collectives_of(64, (n, 1), 4 * n)) for n in (2, 4, 8)}
    terms = np.array([[(n - 1) / n, n - 1] for n in sent])
    totals = np.array(list(sent.values()))
    a, c = np.linalg.solve(terms[:2], totals[:2])
    assert totals[2] == pytest.approx(terms[2] @ [a, c], rel=0.01)
    # Reduced are the gradients, and what the batch normalisations average.
    stage = contrast_stage("ct")
    params = jax.eval_shape(stage.init, jax.random.key(0), {}).params
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 2 * gradients <= a <= 3 * gradients


def test_a_million_rows_are_searched_where_they_are():
    """1,048,576 rows of 256 numbers: each of 8 devices holds an eighth and little else."""
    devices, size, batch, dim = 8, 2**20, 4096, 256
    mesh = mesh_of(devices, 1)
    shapes = jax.eval_shape(lambda: support_queue.init(jax.random.key(0), size, batch, dim))
    places = sharding.tree_shardings({"queue": shapes}, mesh)["queue"]
    with jax.set_mesh(mesh):

        @partial(jax.jit, out_shardings=places)
        def make():
            # The cosine of row r with the first axis rises with (r * 7) mod 1048573.
            number = jnp.arange(size, dtype=jnp.int32).reshape(-1, batch)
            score = (number * 7 % 1_048_573) / 1_048_573.0
            rows = jnp.zeros((*number.shape, dim)).at[..., 0].set(score)
            rows = rows.at[..., 1].set(jnp.sqrt(1 - score**2))
            return support_queue.Queue(rows, number, number, jnp.int32(0))

        queue = make()
        queries = jnp.zeros((devices, dim)).at[:, 0].set(1.0)
        ids = jnp.full(devices, -2, jnp.int32)
        search = jax.jit(lambda q, x, i: support_queue.nearest(q, x, i, size=size, k=4))
        program = search.lower(queue, queries, ids).compile()
        found = program(queue, queries, ids)
    part = queue.rows.addressable_shards[0].data
    assert part.nbytes == 2**30 // devices
    assert program.memory_analysis().temp_size_in_bytes < part.nbytes / 4
    score = (np.arange(size, dtype=np.int32) * np.int32(7) % 1_048_573) / np.float32(1_048_573.0)
    best = np.lexsort((np.arange(size), -np.float32(score)))[:4]
    np.testing.assert_array_equal(found.positions, np.tile(best, (devices, 1)))
