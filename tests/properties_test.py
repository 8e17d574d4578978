"""Numeric corner cases, as properties over drawn inputs (hypothesis)."""

from collections import deque
from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maect_jax.models import mae, nnclr, vit
from maect_jax.stages import losses, support_queue
from maect_jax.stages.step import gradients
from maect_jax.stages.support_queue import EXCLUDED
from tests.helpers.common import mesh_of
from tests.helpers.fuzz import bounded
from tests.helpers.tiny_stages import BATCH, TINY_STAGES, batch_of, mae_stage_of, started

drawn = bounded(60)
ROWS, DIM = 8, 4  # rows of a batch; rows of +-1/2 have length 1 and exact cosines, with ties
MESHES = {"none": None, "8": (4, 2)}
SIZES = (24, 20, 3)  # of whole slots, with a surplus, below a batch

halves = partial(arrays, np.float32, elements=st.sampled_from([-0.5, 0.5]))
ids_below_40 = arrays(np.int32, ROWS, elements=st.integers(0, 39), unique=True)
pushes = st.lists(st.tuples(halves((ROWS, DIM)), ids_below_40), max_size=8)
SELF = 40  # the index of the image whose neighbours are searched


def within(mesh):
    return jax.set_mesh(mesh_of(*mesh)) if mesh else nullcontext()


@cache
def programs(size, k):
    def found_and_chosen(queue, queries, ids, key):
        found = support_queue.nearest(queue, queries, ids, size=size, k=k)
        return found, support_queue.choose(found, key)

    return jax.jit(support_queue.push), jax.jit(found_and_chosen)


def fifo_of(size, batches):
    """A queue after `batches` (it goes round after three), and the same as a NumPy FIFO of
    (row, id, position in the ring)."""
    queue = support_queue.init(jax.random.key(0), size, ROWS, DIM)
    rows = jnp.tile(jnp.array([0.5, -0.5, 0.5, -0.5]), (*queue.ids.shape, 1))
    queue, slots = queue.replace(rows=rows), len(queue.ids)
    fifo = deque(((rows[0, 0], -1, i) for i in range(slots * ROWS)), maxlen=size)
    for number, (rows, ids) in enumerate(batches):
        queue = programs(size, 1)[0](queue, rows, ids, ids)
        first = number % slots * ROWS
        fifo.extend((rows[i], ids[i], first + i) for i in range(ROWS))
    return queue, fifo


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
@drawn
@given(
    st.sampled_from(SIZES), st.sampled_from([1, 3, "size"]), pushes, halves((ROWS, DIM)),
    st.sampled_from([0, 1, 2, "all"]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_neighbours_are_numpys(mesh, size, k, batches, queries, excluded, random):
    """Wrap-around, ties, and the image's own index on no row, one, two or all; `k` up to the
    queue's size, so also above the number of allowed rows."""
    k = size if k == "size" else k
    queue, fifo = fifo_of(size, batches)
    positions = [position for _, _, position in fifo]
    mine = set(positions if excluded == "all" else random.sample(positions, min(excluded, size)))
    held = np.array(queue.ids).ravel()
    held[list(mine)] = SELF
    queue = queue.replace(ids=jnp.asarray(held.reshape(queue.ids.shape)))
    with within(mesh):
        found, chosen = programs(size, k)[1](
            queue, queries, np.full(ROWS, SELF, np.int32), jax.random.key(len(batches))
        )
    for i, query in enumerate(queries):
        scores = [EXCLUDED if place in mine else float(row @ query) for row, _, place in fifo]
        ranked = sorted((-score, place) for score, place in zip(scores, positions, strict=True))
        np.testing.assert_array_equal(found.scores[i], [-score for score, _ in ranked[:k]])
        np.testing.assert_array_equal(found.positions[i], [place for _, place in ranked[:k]])
        assert int(chosen[i]) in found.positions[i]
        if len(mine) < size:
            assert int(chosen[i]) not in mine
        else:  # the first of the ring that the queue holds
            assert int(chosen[i]) == min(positions)


@drawn
@given(st.sampled_from(SIZES), pushes)
def test_the_queue_keeps_the_newest_rows_in_order(size, batches):
    queue, fifo = fifo_of(size, batches)
    rows, ids, labels = support_queue.in_age_order(queue, size)
    np.testing.assert_array_equal(rows, np.stack([entry[0] for entry in fifo]))
    np.testing.assert_array_equal(ids, [entry[1] for entry in fifo])
    np.testing.assert_array_equal(labels, [entry[1] for entry in fifo])


@drawn
@given(
    st.integers(1, 40).flatmap(
        # Few values, so that there are ties: of equal noise the first patch is kept.
        lambda n: arrays(np.float32, (2, n), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_a_mask_keeps_its_share_and_comes_back(noise, ratio):
    patches = noise.shape[1]
    keep, restore, mask = (np.asarray(x) for x in mae.random_mask(jnp.asarray(noise), ratio))
    kept = int(patches * (1 - ratio))
    order = np.argsort(noise, axis=1, kind="stable")
    np.testing.assert_array_equal(keep, order[:, :kept])
    np.testing.assert_array_equal(mask.sum(1), patches - kept)
    np.testing.assert_array_equal(np.take_along_axis(mask, keep, 1), 0)
    np.testing.assert_array_equal(np.take_along_axis(order, restore, 1), [range(patches)] * 2)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.95, 0), (0.999, 0)])
def test_mae_with_nothing_or_everything_masked(rng, ratio, kept):
    """No patch masked: the loss is zero. All of them: the class token alone is encoded."""
    networks = vit.ViT(16, 2, 2, 2), mae.Decoder(8, 1, 2, 2, 3)
    stage = mae_stage_of(*networks, (8, 8, 3), ratio)
    params = jax.jit(stage.init)(jax.random.key(0), {}).params
    images, noise = rng.normal(size=(2, 8, 8, 3)), jnp.asarray(rng.random((2, 16)))

    def loss(params):
        got = stage.forward(params, images, noise)
        return got["loss"], got

    (value, got), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert got["latent"].shape == (2, 1 + kept, 16)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    if kept == 16:
        assert value == largest == 0
    else:
        target = losses.patch_targets(images, 2)
        np.testing.assert_allclose(value, np.square(got["prediction"] - target).mean(), rtol=1e-5)
        assert 0 < largest < np.inf


@drawn
@given(arrays(np.float32, (1, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_batch_norm_of_one_row_is_its_bias(row):
    """There is no spread: the output is the bias, the gradient of the input zero, and a running
    variance that PyTorch refuses to make (0 / 0) moves towards 0."""
    norm = nnclr.BatchNorm()
    variables = norm.init(jax.random.key(0), row, train=True)
    variables["params"]["bias"] = jnp.array([1.0, -2.0, 3.0])

    def run(row):
        y, new = norm.apply(variables, row, train=True, mutable=["batch_stats"])
        return (y * y).sum(), (y, new["batch_stats"])

    grad, (y, stats) = jax.grad(run, has_aux=True)(row)
    np.testing.assert_array_equal(y, [[1, -2, 3]])
    np.testing.assert_array_equal(grad, np.zeros((1, 3)))
    np.testing.assert_allclose(stats["mean"], 0.1 * row[0], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9] * 3, rtol=1e-6)


@cache
def started_and_look():
    return started(TINY_STAGES["ct"]), jax.jit(partial(gradients, TINY_STAGES["ct"]))


labels_of = partial(arrays, np.int32, elements=st.integers(-1, 2))


@bounded(20)
@given(labels_of(BATCH), labels_of((3, BATCH)), st.sampled_from(["all", "some", "none"]))
def test_a_step_without_labels_or_allowed_neighbours(labels, stored, excluded):
    """The loss and its gradient are finite, and the neighbour accuracy counts the images whose
    label is known: 0 where none is. Where no neighbour is allowed, the queue's first row stands
    in."""
    train_state, look = started_and_look()
    ids = np.full((3, BATCH), 7 if excluded == "all" else -1, np.int32)
    ids[0] = 7 if excluded == "some" else ids[0]
    queue = train_state.queue.replace(ids=jnp.asarray(ids), labels=jnp.asarray(stored))
    train_state = train_state.replace(queue=queue)
    batch = batch_of(0) | {"index": np.full(BATCH, 7, np.int32), "label": labels}
    (loss, (metrics, aux)), grads = look(train_state, batch)
    positions = np.asarray(aux["positions"])
    for x in (loss, *jax.tree.leaves(grads)):
        assert np.isfinite(x).all()
    if excluded == "all":
        assert (positions == 0).all()
    elif excluded == "some":
        assert (positions >= BATCH).all()
    known = labels >= 0
    hits = stored.ravel()[positions[:, 0]][known] == labels[known]
    np.testing.assert_allclose(metrics["nn_accuracy"], hits.mean() if known.any() else 0)
