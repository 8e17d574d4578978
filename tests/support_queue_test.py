"""The support queue against a plain NumPy FIFO, on one device and on eight."""

import re
from collections import deque
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import support_queue
from maect_jax.support_queue import EXCLUDED
from tests.conftest import mesh_of

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
def test_nearest_and_take_equal_numpy(rng, mesh, size, pushes):
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


def test_push_moves_nothing_and_the_search_never_the_queue(rng):
    mesh = mesh_of(4, 2)
    queue, _ = filled(rng, 64, 0)
    from maect_jax import sharding

    places = sharding.tree_shardings({"queue": queue}, mesh)["queue"]
    batch = sharding.put_batch(
        dict(rows=unit_rows(rng, BATCH), ids=np.zeros(BATCH, np.int32)), mesh
    )
    with jax.set_mesh(mesh):
        queue = jax.device_put(queue, places)
        push = jax.jit(
            lambda q, b: support_queue.push(q, b["rows"], b["ids"], b["ids"]), out_shardings=places
        )
        text = push.lower(queue, batch).compile().as_text()
        collectives = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
        assert not re.findall(collectives, text)
        search = jax.jit(lambda q, b: support_queue.nearest(q, b["rows"], b["ids"], size=64, k=K))
        text = search.lower(queue, batch).compile().as_text()
    assert re.findall(collectives, text)  # the pattern does find some
    moved = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"= \w+\[([\d,]*)\][^=]*? (?:all-gather|all-to-all)\(", text)
    ]
    assert moved
    assert max(moved) < queue.rows.size
