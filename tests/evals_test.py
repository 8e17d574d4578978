"""Evaluation protocols against NumPy, scikit-learn and hand cases."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from maect_jax.evals import cluster, features, knn, probe
from tests.conftest import mesh_of


@pytest.fixture
def blobs(rng):
    """Five Gaussian blobs that overlap a little: train and test features with labels."""
    centres = rng.normal(size=(5, 12))

    def draw(rows):
        labels = rng.integers(0, 5, rows)
        x = 2 * centres[labels] + 1.8 * rng.normal(size=(rows, 12)) + 3
        return x.astype(np.float32), labels.astype(np.int32)

    return *draw(5000), *draw(1300)


@pytest.mark.parametrize("standardised", [False, True])
def test_knn_equals_sklearn_neighbours_and_a_weighted_vote(blobs, standardised):
    train, train_labels, test, test_labels = blobs
    ks = (1, 7, 20)
    got = knn.knn(*blobs, ks=(*ks, 6000), temperature=0.07, standardised=standardised)
    if standardised:
        mean, deviation = train.mean(0), train.std(0, ddof=1) + 1e-5
        train, test = (train - mean) / deviation, (test - mean) / deviation
    search = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(train)
    distance, rows = search.kneighbors(test)
    assert [entry["k"] for entry in got] == list(ks)  # more than there are is left out
    for entry in got:
        k = entry["k"]
        votes = np.zeros((len(test), 5))
        for i in range(k):
            votes[np.arange(len(test)), train_labels[rows[:, i]]] += np.exp(
                (1 - distance[:, i]) / 0.07
            )
        expected = (votes.argmax(1) == test_labels).mean()
        assert entry["accuracy"] == pytest.approx(expected, abs=1.5 / len(test))
        assert entry["standardised"] is standardised
        assert 0.5 < expected < 0.99


def test_probe_learns_and_reports_each_rate(blobs):
    result = probe.linear_probe(*blobs, base_lrs=(0.1, 0.01), batch_size=256, epochs=10)
    train, train_labels, test, test_labels = blobs
    # The best linear rule for equal spherical blobs is the nearest mean.
    means = np.stack([train[train_labels == c].mean(0) for c in range(5)])
    nearest = ((test[:, None] - means) ** 2).sum(-1).argmin(1)
    optimum = (nearest == test_labels).mean()
    last = [entry["accuracy"] for entry in result["probes_last_epoch"]]
    assert [entry["base_lr"] for entry in result["probes_last_epoch"]] == [0.1, 0.01]
    assert result["best_last_epoch"] == max(last) <= result["best_any_epoch"]
    assert optimum - 0.02 < max(last) < optimum + 0.02
    assert result["crops"].startswith("centre crops")


def test_probes_side_by_side_equal_each_alone(blobs):
    options = dict(batch_size=512, epochs=3, seed=4)
    pair = probe.linear_probe(*blobs, base_lrs=(0.05, 0.02), **options)["probes_last_epoch"]
    alone = probe.linear_probe(*blobs, base_lrs=(0.05,), **options)["probes_last_epoch"]
    # The initial weights differ (they are small), the accuracy hardly.
    assert pair[0]["accuracy"] == pytest.approx(alone[0]["accuracy"], abs=0.01)


def test_matched_accuracy_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert cluster.matched_accuracy(labels, np.array([2, 2, 2, 0, 0, 1])) == 1
    assert cluster.matched_accuracy(labels, np.array([1, 1, 0, 0, 0, 0])) == pytest.approx(4 / 6)
    assert cluster.matched_accuracy(labels, np.zeros(6, int)) == pytest.approx(3 / 6)


def test_clusters_are_numbered_by_the_class_that_they_are_matched_with():
    labels, clusters = np.array([3, 5, 9, 9, 3]), np.array([1, 2, 0, 0, 2])
    assert cluster.matched(labels, clusters).tolist() == [0, 1, 2, 2, 1]


def test_clustering_reports_best_by_loss_mean_and_deviation(rng, monkeypatch):
    class Fit:
        """k-means whose run r has loss 10 - r, and whose labels get worse with r."""

        def __init__(self, clusters, n_init, random_state, **_):
            assert (clusters, n_init) == (2, 1)
            self.run = random_state

        def fit(self, x):
            self.inertia_ = 10.0 - self.run
            self.labels_ = np.array([0, 0, 1, 1])
            self.labels_[: self.run] = 1
            return self

    monkeypatch.setattr(cluster, "KMeans", Fit)
    labels = np.array([0, 0, 1, 1])
    result, clusters = cluster.cluster(rng.normal(size=(4, 3)), labels, runs=2)
    assert clusters.tolist() == [1, 0, 1, 1]  # of the best run
    assert result["best"]["acc"] == 0.75  # of the lowest loss, not of the highest accuracy
    assert result["best"]["loss"] == 9
    assert result["mean"]["acc"] == pytest.approx(0.875)
    assert result["deviation"]["acc"] == pytest.approx(0.125)


def test_clusters_of_separate_blobs_are_found(rng):
    labels = np.repeat(np.arange(4), 50)
    found = 20 * np.eye(4)[labels] + rng.normal(size=(200, 4))
    result, clusters = cluster.cluster(found, 3 * labels, runs=5)
    np.testing.assert_array_equal(clusters, labels)  # numbered by class, in order
    best = {name: result["best"][name] for name in cluster.METRICS}
    assert best == pytest.approx(dict.fromkeys(cluster.METRICS, 1.0))


def test_features_are_in_the_order_of_the_source_without_padding():
    def batches():
        for record in ([0, 1, 2], [3, 4, 5]):
            record = np.array(record)
            image = np.repeat(10 * record[:, None], 2, 1)
            yield {"image": image, "label": record % 3, "index": record, "valid": record < 5}

    found = features.extract(lambda images: images + 1, batches(), mesh_of(1, 1))
    np.testing.assert_array_equal(found.x[:, 0], [1, 11, 21, 31, 41])
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(found.index, range(5))
