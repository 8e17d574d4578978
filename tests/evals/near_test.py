"""Neighbours, outliers and duplicates, against what is known of hand-made features."""

import csv
import logging

import jax
import numpy as np
import pytest

from maect_jax.data.arrays import Arrays
from maect_jax.data.folder import Folder
from maect_jax.evals import assignment, cluster, duplicates, features, knn, near
from maect_jax.evals.features import Features
from maect_jax.run.folder import Run
from tests.helpers.common import mesh_of
from tests.helpers.rows import row_of

MEMORY = dict(memory_mb=64)


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(mesh_of(2, 2)):
        yield mesh_of(2, 2)


def rows_of(x):
    return near.centred(x.astype(np.float32))


def brute(x, cosine):
    """All pairs from a cosine on, and all cosines."""
    all_rows = rows_of(x)[:].astype(np.float64)
    cosines = all_rows @ all_rows.T
    return set(zip(*np.nonzero(np.triu(cosines >= cosine, 1)), strict=True)), cosines


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(duplicates, "_TILE", 16)
    monkeypatch.setattr(duplicates, "_TURN", 3)
    monkeypatch.setattr(duplicates, "_SAMPLED", 200)
    monkeypatch.setattr(features, "_PART", 50)


@pytest.mark.parametrize(("width", "cosine"), [(3, 0.999), (4, 0.995)])
def test_tiles_that_are_not_compared_have_no_pairs(rng, small_tiles, width, cosine):
    x = rng.normal(size=(700, width))
    want, _ = brute(x, cosine)
    found = duplicates.find(rows_of(x), cosine, **MEMORY)
    assert set(map(tuple, found.rows.tolist())) == want
    assert len(want) > 30
    assert found.full == 0


@pytest.mark.parametrize("falls", [0.0, 0.7])
def test_duplicates_are_those_of_all_pairs_across_tiles(rng, small_tiles, falls):
    """Also of features of which no component says more than another."""
    scale = np.arange(1, 41) ** -falls
    x = scale * rng.normal(size=(1000, 40)) + 7
    copies = rng.permutation(1000)[:300].reshape(2, -1)
    x[copies[0]] = x[copies[1]] + np.linspace(0, 0.7, 150)[:, None] * scale * rng.normal(size=40)
    want, cosines = brute(x, 0.95)
    assert 30 < len(want) < 150
    found = duplicates.find(rows_of(x), 0.95, **MEMORY)
    assert set(map(tuple, found.rows.tolist())) == want
    np.testing.assert_allclose(found.cosine, cosines[tuple(found.rows.T)], atol=1e-6)
    assert (np.diff(found.cosine) <= 0).all()
    assert found[2:] == (0, 1)


def test_of_many_alike_the_highest_pairs_are_kept(rng, small_tiles, monkeypatch):
    x = rng.normal(size=(300, 8))
    x[:200] = 3 + 0.05 * rng.normal(size=(200, 8))
    _, cosines = brute(x, 0.9)
    np.fill_diagonal(cosines, -1)
    highest = np.sort(cosines, axis=1)[:, -duplicates.MOST][:, None]
    kept = (cosines >= np.minimum(highest, highest.T)) & (cosines >= 0.9)
    found = duplicates.find(rows_of(x), 0.9, **MEMORY)
    want = set(zip(*np.nonzero(np.triu(kept)), strict=True))
    assert set(map(tuple, found.rows.tolist())) == want
    assert found.full == (highest >= 0.9).sum() >= 200
    # Groups of equal features, of which all pairs are as high, end as well.
    x[:150], x[150:] = x[0], x[299]
    monkeypatch.setattr(duplicates, "_WHOLE", 10_000)  # few of them are compared whole
    equal = duplicates.find(rows_of(x), 1.0, **MEMORY)
    assert np.bincount(equal.rows.ravel(), minlength=300).min() >= duplicates.MOST
    assert len(equal.rows) <= 300 * duplicates.MOST
    assert equal[2:] == (300, 1)
    np.testing.assert_allclose(equal.cosine, 1, atol=1e-6)


def test_a_search_of_too_many_pairs_ends_and_says_so(rng, small_tiles, monkeypatch, mesh, caplog):
    monkeypatch.setattr(duplicates, "_WHOLE", 20_000)
    x = rng.normal(size=(400, 8))
    x[:300] = 3 + 0.05 * rng.normal(size=(300, 8))
    near.Near().run(row(x, mesh))
    (text,) = [text for text in caplog.messages if "not all listed" in text]
    assert "config.eval.cluster.duplicates=0.9:" in text


def row(x, mesh, *settings, images=None):
    """A row of features of these records: those that can be read, all but the first two."""
    records = np.arange(2, len(x) + 2, dtype=np.int32)
    found = Features(x.astype(np.float32), np.full(len(x), -1, np.int32), records)
    if images is None:
        images = np.arange(len(x) + 2, dtype=np.uint8).reshape(-1, 1, 1, 1)
    source = Arrays(images, np.full(len(images), -1), [])
    settings = ("eval.cluster.duplicates=0.9", "eval.cluster.clusters=4", *settings)
    return row_of({"val": found}, mesh, *settings, images={"val": source})


def test_what_is_near_far_or_the_same_is_told_and_listed(rng, mesh, tmp_path):
    centres = 5 * np.eye(6)[:3]
    x = np.repeat(centres, 40, axis=0) + rng.normal(size=(120, 6))
    x[10], x[50], x[90] = 8 * np.eye(6)[3:]  # far from all, each by itself
    x[21], x[61] = x[20], x[60] + 1e-3
    images = np.arange(122, dtype=np.uint8).reshape(-1, 1, 1, 1)
    images[23] = images[22]
    one = row(x, mesh, "eval.cluster.duplicates=0.9999", images=images)
    metrics, arrays = near.Near().run(one)
    assert arrays["index"][arrays["outlier"]].tolist() == [12, 52, 92]
    assert arrays["pairs"].tolist() == [[22, 23], [62, 63]]
    assert arrays["same"].tolist() == [True, False]
    assert metrics == {
        "split": "val", "images": 120, "outliers": 3, "duplicates": 2, "of_same_content": 1,
        "images_with_10": 0,
    }  # fmt: skip
    _, cosines = brute(x, 0.9)
    np.fill_diagonal(cosines, -2)
    highest = -np.sort(-cosines, axis=1)[:, :10]
    of_neighbours = np.take_along_axis(cosines, arrays["neighbours"] - 2, 1)
    np.testing.assert_allclose(of_neighbours, highest, atol=1e-6)
    variance, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    wide = x @ axes / np.sqrt(variance + 1e-3 * variance.max())
    apart = np.linalg.norm(wide[:, None] - wide[arrays["neighbours"] - 2], axis=2)
    np.testing.assert_allclose(arrays["far"], apart.max(1), rtol=1e-3)

    # An image far from all is one also where it is a cluster of its own.
    places = np.repeat(np.arange(3), 40)
    places[10] = 3
    folder = tmp_path / "features" / "ct"
    folder.mkdir(parents=True)
    np.savez(folder / "near.npz", **arrays)
    own = dict(index=arrays["index"], labels=np.full(120, -1), clusters=places)
    np.savez(folder / "cluster.npz", distance=np.zeros(120), **own)
    run = Run(one.config, tmp_path, mesh, None)
    near.Near().summarise(run, ["ct"], one.images)
    with (tmp_path / "outliers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["image"], line["cluster"]) for line in lines} == {
        ("image 12", "3"), ("image 52", "1"), ("image 92", "2"),
    }  # fmt: skip
    scores = [float(line["score"]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    text = (tmp_path / "duplicates.csv").read_text().splitlines()
    assert text[0] == "image,duplicate,cosine,same_content"
    assert text[1] == "image 22,image 23,1.0000,1"
    assert text[2].startswith("image 62,image 63,1.0000")
    assert text[2].endswith(",0")


def test_of_many_images_each_is_compared_with_a_sample_on_any_devices(rng, monkeypatch):
    monkeypatch.setattr(near, "_ALL", 300)
    monkeypatch.setattr(near, "_SAMPLE", 100)
    x = np.repeat(5 * np.eye(6)[:3], 200, axis=0) + rng.normal(size=(600, 6))
    x[7] = 8 * np.eye(6)[4]
    found = []
    for mesh in (mesh_of(1, 1), mesh_of(2, 2)):
        with jax.set_mesh(mesh):
            found.append(near.nearest(knn.Search(mesh, 64), rows_of(x), seed=0))
    (neighbours, far), (_, again) = found
    np.testing.assert_allclose(far, again, rtol=1e-6)
    sample = np.unique(neighbours)
    assert len(sample) <= 100
    centred = rows_of(x)[:]
    cosines = centred @ centred[sample].T
    cosines[sample, range(len(sample))] = -1
    np.testing.assert_array_equal(neighbours, sample[np.argsort(-cosines, axis=1)[:, :10]])
    assert far.argmax() == 7
    assert near.outliers(far)[7]


def test_copies_make_no_outliers_of_the_others():
    far = np.concatenate([np.zeros(90), np.linspace(1, 2, 9), [9]])
    np.testing.assert_array_equal(np.flatnonzero(near.outliers(far)), [99])
    assert not near.outliers(np.zeros(5)).any()


@pytest.mark.parametrize("count", [1, 2, 30])
def test_features_that_are_all_the_same_are_a_line(mesh, caplog, count):
    with caplog.at_level(logging.WARNING):
        metrics, arrays = near.Near().run(row(np.full((count, 4), 3.3), mesh))
    assert "all images have the same features" in caplog.text
    assert (metrics["duplicates"], metrics["outliers"]) == (0, 0)
    assert (arrays["neighbours"] == -1).all()


def test_images_that_cannot_be_read_any_more_are_not_the_same(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"same")
    source = Folder(str(tmp_path), labelled=False)
    for i in (2, 3):
        (tmp_path / f"{i}.png").unlink()
    same = near._same_content(source, np.array([[0, 1], [1, 2], [2, 3]]))
    assert same.tolist() == [True, False, False]


def test_duplicates_can_be_left_out(rng, mesh):
    x = rng.normal(size=(30, 4))
    x[1] = x[0]
    metrics, arrays = near.Near().run(row(x, mesh, "eval.cluster.duplicates=0"))
    assert metrics["duplicates"] == 0
    assert arrays["pairs"].shape == (0, 2)


def test_the_list_of_clusters_has_places_where_they_are_known():
    """Rows of earlier versions have none, and images need not be in every row."""
    source = Arrays(np.zeros((4, 1, 1, 1), np.uint8), np.array([1, 0, -1, 0]), ["a", "b"])
    old = dict(index=np.array([0, 3]), labels=np.array([1, 0]), clusters=np.array([5, 6]))
    new = dict(index=np.array([0, 2]), labels=np.array([1, -1]), clusters=np.array([1, 1]))
    new |= dict(distance=np.array([0.123456, 2e-7]), margin=np.array([np.inf, 1]))
    new |= dict(rank=np.array([1, 0]))
    assert list(cluster.lines(source, [old, new])) == [
        ("image 0", "b", "5", "", "", "", "1", "0.1235", "inf", "1"),
        ("image 2", "", "", "", "", "", "1", "2e-07", "1", "0"),
        ("image 3", "a", "6", "", "", "", "", "", "", ""),
    ]
    assert list(cluster.lines(source, [])) == []


def test_components_are_those_of_sklearn(rng):
    from sklearn.decomposition import PCA

    x = (rng.normal(size=(300, 9)) * np.arange(1, 10) + 4).astype(np.float32)
    space = assignment.Space.of(x, normalise=False, pca=4)
    peer = PCA(4, svd_solver="covariance_eigh").fit(x.astype(np.float64))
    np.testing.assert_allclose(space.components, peer.components_, atol=1e-5)
    np.testing.assert_allclose(space.view(x)[:], peer.transform(x), atol=1e-4)
    assert space.view(x).shape == (300, 4)
