"""k-means against scikit-learn: the same optima, on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus

from maect_jax.evals import kmeans
from tests.helpers.common import mesh_of


def overlapping(rng, rows=3001, width=16, k=20):
    centres = rng.normal(size=(k, width))
    x = centres[rng.integers(0, k, rows)] + 0.9 * rng.normal(size=(rows, width)) + 5
    return x.astype(np.float32)


def placed(x, mesh):
    return kmeans.place(x, mesh, kmeans.layout(np.arange(len(x)), mesh.size, 100))


def test_rows_are_placed_part_by_part(rng, monkeypatch):
    monkeypatch.setattr(kmeans, "_READ", 100)
    x, mesh = rng.normal(size=(501, 5)).astype(np.float32), mesh_of(2, 2)
    numbers = kmeans.layout(rng.permutation(501), 4, 10)
    with jax.set_mesh(mesh):
        rows = kmeans.place(x, mesh, numbers, np.float32(0.5))
    np.testing.assert_array_equal(rows.x[numbers >= 0], x[numbers[numbers >= 0]] - np.float32(0.5))
    np.testing.assert_array_equal(rows.weight, numbers >= 0)


def test_lloyd_from_the_same_centres_ends_where_sklearn_does(rng):
    x, k = overlapping(rng), 20
    x -= x.mean(0)
    start, _ = kmeans_plusplus(x, k, random_state=0)
    peer = KMeans(k, init=start, n_init=1, algorithm="lloyd").fit(x)
    mesh = mesh_of(2, 2)
    with jax.set_mesh(mesh):
        rows = placed(x, mesh)
        limit = np.float32(1e-4 * x.var(0).mean())
        centres, passes = kmeans.lloyd(rows, jnp.asarray(start)[None], limit)
        nearest, loss = kmeans._assigned(rows, centres)
    np.testing.assert_allclose(centres[0], peer.cluster_centers_, atol=1e-4)
    assert loss[0] == pytest.approx(peer.inertia_, rel=1e-5)
    assert abs(int(passes[0]) - peer.n_iter_) <= 1
    assert (np.asarray(nearest)[:, 0].ravel()[: len(x)] == peer.labels_).mean() > 0.999


@pytest.mark.parametrize(("k", "minibatch"), [(20, 0), (60, 0), (20, 512)])
def test_restarts_reach_sklearns_inertia(rng, k, minibatch):
    x, runs = overlapping(rng), 10
    mesh = mesh_of(1, 2)
    with jax.set_mesh(mesh):
        found = kmeans.kmeans(x, kmeans.Settings(k, runs, 0, 64, minibatch), mesh)
    kind = partial(MiniBatchKMeans, batch_size=minibatch) if minibatch else KMeans
    peers = [kind(k, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(runs)]
    assert found.loss.min() <= min(peers) * 1.005
    assert found.loss.mean() <= np.mean(peers) * 1.005
    # The loss is that of the clusters and centres that are told.
    for run in range(runs):
        apart = x - found.centres[run][found.clusters[run]]
        assert found.loss[run] == pytest.approx((apart**2).sum(), rel=1e-4)
        squares = ((x[::50, None] - found.centres[run]) ** 2).sum(-1)
        assert (squares.argmin(1) == found.clusters[run][::50]).mean() > 0.98


@pytest.mark.parametrize("minibatch", [0, 96])
def test_clusters_do_not_depend_on_devices_or_on_restarts_side_by_side(rng, monkeypatch, minibatch):
    x, together = overlapping(rng, 1000, 8, 10), []
    several = []
    for shape, columns in (((1, 1), 1024), ((2, 2), 1024), ((4, 2), 10)):
        monkeypatch.setattr(kmeans, "_COLUMNS", columns)
        limits = dict(tile=512, devices=1, memory_mb=64)
        together.append(kmeans.restarts_at_a_time(x.shape, 10, **limits))
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            settings = kmeans.Settings(10, 4, 7, 64, minibatch)
            several.append(kmeans.kmeans(x, settings, mesh))
    assert together == [103, 103, 1]
    for other in several[1:]:
        np.testing.assert_allclose(other.loss, several[0].loss, rtol=1e-5)
        assert (other.clusters == several[0].clusters).mean() > 0.999
    assert len(set(several[0].loss.tolist())) == 4  # each restart draws for itself


def test_plus_plus_draws_in_proportion_to_the_potential(rng):
    potential = rng.uniform(size=(6, 8)).astype(np.float32)
    potential[2] = 0
    shares = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)
    tiles, rows = jax.vmap(kmeans._drawn, (0, None))(shares, jnp.asarray(potential))
    counts = np.zeros((6, 8))
    np.add.at(counts, (np.asarray(tiles), np.asarray(rows)), 1)
    np.testing.assert_allclose(counts / 20_000, potential / potential.sum(), atol=2e-4)


def test_plus_plus_takes_distinct_far_rows(rng):
    x = np.repeat(10 * np.eye(6, dtype=np.float32), 30, axis=0)
    x = rng.permutation(x + 0.01 * rng.normal(size=x.shape).astype(np.float32))
    mesh = mesh_of(2, 1)
    with jax.set_mesh(mesh):
        keys = jax.random.split(jax.random.key(0), 8)
        centres = kmeans.plus_plus(placed(x, mesh), keys, k=6)
    assert (np.sort(np.asarray(centres).argmax(-1), 1) == np.arange(6)).all()


def test_fewer_rows_than_devices_and_as_many_clusters_as_rows(rng):
    x = rng.normal(size=(5, 3)).astype(np.float32)
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh):
        found = kmeans.kmeans(x, kmeans.Settings(k=5, runs=3, seed=0, memory_mb=64), mesh)
    assert found.loss.max() < 1e-6
    assert (np.sort(found.clusters, 1) == np.arange(5)).all()


def test_sums_are_the_same_both_ways(rng):
    """By scattering, as on CPU, and by a product with one-hot rows, as on TPU."""
    x, nearest = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 5, (3, 40))
    weight = (rng.uniform(size=40) < 0.8).astype(np.float32)
    sums, counts = kmeans._sums(x, weight, jnp.asarray(nearest, jnp.int32), 5)
    one_hot = np.eye(5, dtype=np.float32)[nearest] * weight[:, None]
    np.testing.assert_allclose(sums, np.einsum("rtk,td->rkd", one_hot, x), atol=1e-5)
    np.testing.assert_allclose(counts, one_hot.sum(1))
    other, number = kmeans._multiplied(x, weight, jnp.asarray(nearest, jnp.int32), 5)
    np.testing.assert_allclose(sums, other, atol=1e-5)
    np.testing.assert_allclose(counts, number)


def test_restarts_side_by_side_keep_to_their_memory():
    """By XLA's own account of the passes over wide rows, and of what starts them."""
    mesh, width, k, tile, memory_mb = mesh_of(1, 1), 512, 10, 2048, 64
    limits = dict(tile=tile, devices=1, memory_mb=memory_mb)
    together = kmeans.restarts_at_a_time((4096, width), k, **limits)
    assert 1 < together < 103
    shape = jax.ShapeDtypeStruct
    rows = kmeans.Rows(shape((2, tile, width), np.float32), shape((2, tile), np.float32))
    centres = shape((together, k, width), np.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), together))
    with jax.set_mesh(mesh):
        lowered = (
            kmeans.lloyd.lower(rows, centres, shape((), np.float32)),
            kmeans.plus_plus.lower(rows, keys, k=k),
            kmeans._assigned.lower(rows, centres),
        )
    for one in lowered:
        memory = one.compile().memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert used <= memory_mb * 2**20
