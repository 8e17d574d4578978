"""Evaluation protocols against NumPy, scikit-learn and hand cases."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from maect_jax.data import subsets
from maect_jax.errors import UserError
from maect_jax.evals import assignment, cluster, features, kmeans, knn, lowshot, probe
from maect_jax.evals.assignment import Centres
from tests.helpers.common import mesh_of
from tests.helpers.rows import row_of

METRICS = ("acc", "nmi", "ami", "ari")


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(mesh_of(2, 2)) as _:
        yield mesh_of(2, 2)


def drawn(rng, centres, rows, noise):
    labels = np.concatenate([np.arange(len(centres)), rng.integers(0, len(centres), rows)])
    x = 2 * centres[labels] + noise * rng.normal(size=(len(labels), centres.shape[1])) + 3
    return features.Features(x.astype(np.float32), labels.astype(np.int32), np.arange(len(labels)))


@pytest.fixture
def blobs(rng):
    """Seven Gaussian blobs that overlap a little: train and test features."""
    centres = rng.normal(size=(7, 12))
    return drawn(rng, centres, 4999, 1.8), drawn(rng, centres, 1300, 1.8)


def test_why_a_protocol_is_skipped():
    """Where only some images have a label, or none is held out."""
    own = knn.KNN()
    some, all_ = (features.Features(np.zeros((2, 1)), np.array(y), None) for y in ([0, -1], [0, 1]))

    def reason(**parts):
        images = {split: SimpleNamespace(no_labels=f"no labels of {split}") for split in parts}
        return own.skip_reason(SimpleNamespace(features=parts, images=images))

    assert reason(train=all_, val=all_) == ""
    assert reason(train=all_) == "no images are held out"
    assert reason(train=some) == "the images have no labels of train"
    assert reason(train=all_, val=some) == "the images have no labels of val"


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("memory_mb", [1, 64])
def test_knn_equals_sklearn_neighbours_and_a_weighted_vote(blobs, mesh, standardised, memory_mb):
    train, test = blobs
    ks = (1, 7, 20)
    search = knn.Search(mesh, memory_mb, standardised)
    got = knn.classify(search, train, test, (*ks, 6000))
    bank, queries = train.x, test.x
    if standardised:
        mean, std = bank.mean(0), bank.std(0, ddof=1) + 1e-5
        bank, queries = (bank - mean) / std, (queries - mean) / std
    peer = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(bank)
    distance, rows = peer.kneighbors(queries)
    cold = knn.classify(search, train, test, (20,), temperature=0.005)[0]["accuracy"]
    nearest_alone = (train.labels[rows[:, 0]] == test.labels).mean()
    assert cold == pytest.approx(nearest_alone, abs=0.02)  # not all votes are infinite
    cosines, found = search.nearest(train.x, test.x, 20)
    np.testing.assert_allclose(cosines, 1 - distance, atol=2e-6)
    assert (found == rows).mean() > 0.999  # but for two that are as near as rounding tells
    assert [entry["k"] for entry in got] == list(ks)  # more than there are is left out
    for entry in got:
        k = entry["k"]
        votes = np.zeros((len(queries), 7))
        for i in range(k):
            weight = np.exp((1 - distance[:, i]) / 0.07)
            votes[np.arange(len(votes)), train.labels[rows[:, i]]] += weight
        expected = (votes.argmax(1) == test.labels).mean()
        assert entry["accuracy"] == pytest.approx(expected, abs=1.5 / len(votes))
        assert entry["standardised"] is standardised
        assert 0.5 < expected < 0.99


def test_equal_neighbours_come_in_the_order_of_the_bank(rng, mesh):
    bank = np.repeat(rng.normal(size=(40, 8)), 50, axis=0).astype(np.float32)
    _, found = knn.Search(mesh, 1).nearest(bank, bank[::50], 60)
    for query, rows in enumerate(found):
        assert rows[:50].tolist() == list(range(50 * query, 50 * query + 50))


def test_knn_keeps_to_its_memory():
    """The plan's arrays, counted; and that of the compiled search, by XLA's own account."""
    width, k, memory_mb = 64, 10, 8
    mesh = mesh_of(1, 1)
    size, block, tile = knn.Search(mesh, memory_mb).plan((10**6, width), 10**5, k)
    assert tile < 10**6
    assert size < 10**5
    shape = jax.ShapeDtypeStruct
    best = shape((size, k), np.float32), shape((size, k), np.int32)
    queries, rows = shape((size, width), np.float32), shape((tile, width), np.float32)
    with jax.set_mesh(mesh):
        numbered = rows, shape((tile,), np.int32)
        lowered = knn._merge.lower(best, queries, numbered, block=block)
    memory = lowered.compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    # Wide rows, few at a time.
    wide_queries, wide_block, _ = knn.Search(mesh, 1024).plan((10**5, 150_528), 10**4, k)
    assert wide_block <= wide_queries < 300
    # One more tile comes meanwhile and is normalised, and the queries as they came.
    waiting = 4 * width * (2 * tile + size)
    assert used + waiting <= memory_mb * 2**20
    assert used + waiting > memory_mb * 2**20 / 3  # and it makes use of it


def fit(train, test, lrs, mesh, epochs=10, batch_size=256):
    batches = probe.cached_batches(train, batch_size, 0, mesh)
    per_epoch = len(train.labels) // batch_size
    schedule = probe.Schedule(np.asarray(lrs) * batch_size / 256, epochs, per_epoch, seed=0)
    return probe.fit(batches, schedule, {"test": test}, classes=7, mesh=mesh)


def test_probe_learns_as_well_as_can_be(blobs, mesh):
    train, test = blobs
    curves = fit(train, test, (0.1, 0.05), mesh)
    # The best linear rule for equal spherical blobs is the nearest mean.
    means = np.stack([train.x[train.labels == c].mean(0) for c in range(7)])
    distance = ((test.x[:, None] - means) ** 2).sum(-1)
    optimum = (distance.argmin(1) == test.labels).mean()
    five = np.argsort(distance, 1)[:, :5]
    optimum5 = (five == test.labels[:, None]).any(1).mean()
    assert curves["test"].shape == (10, 2, 2)
    np.testing.assert_allclose(curves["test"][-1, :, 0], optimum, atol=0.02)
    np.testing.assert_allclose(curves["test"][-1, :, 1], optimum5, atol=0.02)
    assert optimum5 > optimum + 0.05


def test_probe_is_torch_sgd_on_normalised_features(blobs, mesh, monkeypatch):
    """A few updates against the same ones in NumPy, in float64."""
    train, test = blobs
    x, labels = train.x[:96].astype(np.float64), train.labels[:96]
    order = [np.arange(i, i + 32) for i in (0, 32, 64)]
    batches = iter([(train.x[rows], train.labels[rows]) for rows in order])
    monkeypatch.setattr(probe, "_WARMUP", 0.34)
    part = features.Features(test.x[:400], test.labels[:400], test.records[:400])
    seen = {}
    monkeypatch.setattr(probe, "_hits", lambda probes, *_: seen.update(probes=probes) or 0)
    start = jax.device_get(probe._init(jax.random.key(3), 2, 12, 7))
    schedule = probe.Schedule(np.array([0.4, 0.1]), epochs=1, updates=3, seed=3)
    probe.fit(batches, schedule, {"test": part}, classes=7, mesh=mesh)
    kernel = start.weights["kernel"].astype(np.float64)
    bias, mean, var = np.zeros((2, 7)), np.zeros(12), np.ones(12)
    velocity = [0.0, 0.0]
    factors = [1 / 2, 1.0, np.sin(np.pi / 2 * 1 / 2) ** 2]  # one step of warm-up, then the cosine
    for rows, factor in zip(order, factors, strict=True):
        m, v = x[rows].mean(0), x[rows].var(0)
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * 32 / 31
        z = (x[rows] - m) / np.sqrt(v + 1e-5)
        logits = np.einsum("bd,pdc->pbc", z, kernel) + bias[:, None]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        p[:, np.arange(32), labels[rows]] -= 1
        grads = [np.einsum("bd,pbc->pdc", z, p) / 32, p.mean(1)]
        velocity = [0.9 * old + new for old, new in zip(velocity, grads, strict=True)]
        lr = np.array([0.4, 0.1]) * factor
        kernel = kernel - lr[:, None, None] * velocity[0]
        bias = bias - lr[:, None] * velocity[1]
    got = jax.device_get(seen["probes"])
    np.testing.assert_allclose(got.weights["kernel"], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.weights["bias"], bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)


def test_the_best_probe_is_chosen_where_it_is_said():
    test = np.array([[[0.1, 0.5], [0.7, 0.8]], [[0.3, 0.6], [0.2, 0.9]]])
    apart = np.array([[[0.6, 0.0], [0.1, 0.0]], [[0.2, 0.0], [0.4, 0.0]]])
    curves = {"test": test, "held-out": apart}
    own = probe.summary(curves, (0.1, 0.05), "test")
    assert own["best_last_epoch"] == {"base_lr": 0.1, "epoch": 2, "top1": 0.3, "top5": 0.6}
    assert own["best_any_epoch"] == {"base_lr": 0.05, "epoch": 1, "top1": 0.7, "top5": 0.8}
    assert own["probes"][1]["last_epoch"]["top1"] == 0.2
    assert own["probes"][1]["best_epoch"]["epoch"] == 1
    other = probe.summary(curves, (0.1, 0.05), "held-out")
    assert other["best_last_epoch"]["top1"] == 0.2  # the second probe, judged on the test images
    assert other["best_any_epoch"] == {"base_lr": 0.1, "epoch": 1, "top1": 0.1, "top5": 0.5}
    assert other["chosen_on"] == "held-out"


@pytest.mark.parametrize(
    ("rows", "width", "classes", "noise"), [(13, 32, 7, 1.0), (500, 24, 7, 2.5), (700, 48, 60, 1.5)]
)
def test_logistic_regression_reaches_sklearns_optimum(rng, mesh, rows, width, classes, noise):
    centres = rng.normal(size=(classes, width))
    train, test = (drawn(rng, centres, n, noise) for n in (rows, 2000))
    x, queries = (lowshot.prepare(part.x).astype(np.float64) for part in (train, test))
    count = len(x)
    penalties = np.array([2.5e-4, 1e-2]) / count
    found = jax.device_get(lowshot.fit(x, train.labels, penalties, classes=classes, mesh=mesh))

    def judged(weights, penalty):
        logits = x @ weights
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        loss = np.log(p.sum(1)) - logits[np.arange(count), train.labels]
        p /= p.sum(1, keepdims=True)
        p[np.arange(count), train.labels] -= 1
        gradient = x.T @ p / count + penalty * weights
        value = loss.mean() + penalty / 2 * (weights**2).sum()
        accuracy = ((queries @ weights).argmax(1) == test.labels).mean()
        return value, np.linalg.norm(gradient), accuracy

    for i, penalty in enumerate(penalties):
        peer = LogisticRegression(
            C=1 / (penalty * count), fit_intercept=False, tol=1e-8, max_iter=100_000
        ).fit(x, train.labels)
        optimum, _, expected = judged(peer.coef_.T, penalty)
        value, norm, accuracy = judged(found.weights[i].astype(np.float64), penalty)
        assert value <= optimum * (1 + 1e-4)  # the gap at which it may end; asked are 1e-3
        assert accuracy == pytest.approx(expected, abs=0.002)
        assert found.objective[i] == pytest.approx(value, rel=1e-4)
        assert found.gradient_norm[i] == pytest.approx(norm, rel=0.2, abs=1e-6)
        assert found.steps[i] < 1000


def of_lowshot(*settings):
    return tuple(f"eval.lowshot.{setting}" for setting in settings)


def test_lowshot_draws_nested_splits_and_tells_how_it_did(blobs, mesh):
    train, test = blobs
    settings = (*of_lowshot("images=(1,5,5000)", "shares=(0.01,)", "splits=2"), "seed=3")
    settings += of_lowshot("weight_decays=(2.5e-4,1e-2)")
    row = row_of({"train": train, "val": test}, mesh, *settings)
    one, five, many, share = lowshot.LowShot().run(row).metrics
    assert one["images"] == 7
    assert five["images"] == 35
    assert share["images"] == len(subsets.fraction_of(train.labels, 0.01, 3))
    assert "a class has only" in many["skipped"]
    assert 0.2 < one["accuracy"] < five["accuracy"] < 0.99
    for entry in (one, five):
        accuracies = entry["accuracies"]
        assert entry["splits"] == len(accuracies) == 2
        assert entry["accuracy"] == pytest.approx(np.mean(accuracies))
        assert entry["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
        assert accuracies[0] != accuracies[1]
        assert [w["weight_decay"] for w in entry["weight_decays"]] == [2.5e-4, 1e-2]
        assert entry["weight_decays"][0]["accuracy"] == entry["accuracy"]
        assert 0 < entry["gradient_norm"] < 0.01
    # By hand: the regression on the same images.
    part = subsets.per_class(train.labels, 5, 3)
    x, queries = lowshot.prepare(train.x[part]), lowshot.prepare(test.x)
    peer = LogisticRegression(C=1 / 2.5e-4, fit_intercept=False, tol=1e-8, max_iter=10_000)
    peer.fit(x.astype(np.float64), train.labels[part])
    assert five["accuracies"][0] == pytest.approx(peer.score(queries, test.labels), abs=0.002)


class Named(list):
    """Images of which nothing is known but their names."""

    name = list.__getitem__


def test_lowshot_takes_lists_of_names(blobs, mesh, tmp_path):
    train, test = blobs
    train = features.Features(train.x, train.labels, train.records + 1)  # image 0 cannot be read
    names = [f"c/{i}.jpg" for i in range(len(train.labels) + 1)]
    paths = []
    for split in range(2):
        (tmp_path / f"{split}").mkdir()
        paths.append(str(tmp_path / f"{split}" / "5imgs.txt"))
        part = subsets.per_class(train.labels, 5, split) + 1
        chosen = [names[i] for i in part] + ["c/0.jpg"]
        (tmp_path / f"{split}" / "5imgs.txt").write_text("\n".join(chosen))
    images = {"train": Named(names)}

    def measured(*settings):
        row = row_of({"train": train, "val": test}, mesh, *of_lowshot(*settings), images=images)
        return lowshot.LowShot().run(row).metrics

    (entry,) = measured(f"lists={tuple(paths)}")
    (drawn,) = measured("images=(5,)", "shares=()", "splits=2")
    assert entry["accuracies"] == pytest.approx(drawn["accuracies"], abs=0.002)
    assert (entry["list"], entry["splits"], entry["images"]) == ("5imgs.txt", 2, 35)
    assert entry["images_per_class"] == 5
    assert lowshot.size_of(train.labels, subsets.fraction_of(train.labels, 0.1, 0)) == {
        "share": 0.1
    }
    assert entry["drawn"] == paths
    with pytest.raises(UserError, match=r"list '.*absent'"):
        measured(f"lists=('{tmp_path / 'absent'}',)")


def test_matched_accuracy_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert cluster.agreement(labels, np.array([2, 2, 2, 0, 0, 1]))["acc"] == 1
    assert cluster.agreement(labels, np.array([1, 1, 0, 0, 0, 0]))["acc"] == pytest.approx(4 / 6)
    assert cluster.agreement(labels, np.zeros(6, int))["acc"] == pytest.approx(3 / 6)


def test_nmi_ami_and_ari_by_hand():
    labels, clusters = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    found = cluster.agreement(labels, clusters)
    # Entropies ln 2 and 1.5 ln 2, mutual information ln 2.
    assert found["nmi"] == pytest.approx(1 / 1.25)
    # By chance, over all ways to hand out the clusters, the information is 2/3 ln 2: of the six
    # pairs that cluster 0 may be, two are a class, which leaves ln 2; four leave 1/2 ln 2.
    chance = (2 * 1 + 4 * 0.5) / 6
    assert found["ami"] == pytest.approx((1 - chance) / (1.25 - chance))
    # Of six pairs: together in both 1, in labels 2, in clusters 1.
    assert found["ari"] == pytest.approx((1 - 2 / 6) / (1.5 - 2 / 6))
    assert found["acc"] == 0.75


def test_agreement_does_not_depend_on_names_and_knows_chance(rng):
    labels, clusters = rng.integers(0, 8, 4000), rng.integers(0, 12, 4000)
    clusters[:2500] = labels[:2500]
    known = cluster.agreement(labels, clusters)
    assert 0.3 < known["acc"] < 0.8
    renamed = cluster.agreement(rng.permutation(8)[labels], rng.permutation(12)[clusters])
    assert renamed == pytest.approx(known)
    swapped = cluster.agreement(clusters, labels)
    assert {k: swapped[k] for k in ("nmi", "ami", "ari")} == pytest.approx(
        {k: known[k] for k in ("nmi", "ami", "ari")}
    )
    chance = cluster.agreement(labels, rng.integers(0, 8, 4000))
    assert abs(chance["ami"]) < 0.01 > abs(chance["ari"])
    assert cluster.agreement(labels, labels) == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_clusters_are_numbered_by_the_class_that_they_are_matched_with():
    labels, clusters = np.array([3, 5, 9, 9, 3]), np.array([1, 2, 0, 0, 2])
    assert cluster.matched(labels, clusters).tolist() == [2, 0, 1]
    # More clusters than classes: the others come after.
    assert cluster.matched(np.array([4, 4, 4, 6]), np.array([0, 0, 1, 2])).tolist() == [0, 2, 1]


def test_clustering_reports_best_by_loss_mean_and_deviation(rng, mesh, monkeypatch):
    def clustered(x, settings, mesh):
        """Run r has loss 10 - r, and clusters that get worse with r."""
        assert settings[:2] == (2, 2)
        found, centres = np.array([[0, 0, 1, 1], [1, 0, 1, 1]]), np.zeros((2, 2, 3), np.float32)
        centres[1, 0] = 9
        return kmeans.Clustering(centres, found, np.array([10.0, 9.0]), np.array([1, 1]))

    monkeypatch.setattr(kmeans, "kmeans", clustered)
    labels, x = np.array([0, 0, 1, 1]), rng.normal(size=(4, 3))
    row = row_of({}, mesh, "eval.cluster.runs=2", "eval.cluster.normalise=False")
    result, arrays = cluster.cluster(row, x, labels, clusters=0)
    assert arrays["clusters"].tolist() == [1, 0, 1, 1]  # of the best run
    assert result["best"]["acc"] == 0.75  # of the lowest loss, not of the highest accuracy
    assert result["best"]["loss"] == 9
    assert result["mean"]["acc"] == pytest.approx(0.875)
    assert result["deviation"]["acc"] == pytest.approx(0.125)
    first, second = np.linalg.norm(x, axis=1), np.linalg.norm(x - 9, axis=1)
    np.testing.assert_allclose(arrays["distance"], first, rtol=1e-6)
    np.testing.assert_allclose(arrays["margin"], second - first, rtol=1e-6)
    assert arrays["rank"][1] == 0
    assert arrays["rank"][[0, 2, 3]].tolist() == np.argsort(np.argsort(first[[0, 2, 3]])).tolist()
    bare, _ = cluster.cluster(row, x, None, clusters=2)
    assert set(bare["best"]) == {"loss", "silhouette", "silhouette_images", "chosen_by"}


def test_clusters_of_no_image_are_left_out_and_counted(mesh, caplog):
    x = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    found = features.Features(x, np.full(12, -1), np.arange(12, dtype=np.int32))
    images = {"val": SimpleNamespace(classes=[])}
    row = row_of({"val": found}, mesh, "eval.cluster.clusters=5", images=images)
    metrics, arrays = cluster.Cluster().run(row)
    assert (metrics["clusters"], len(arrays["numbers"]), len(set(arrays["clusters"]))) == (5, 3, 3)
    assert "2 of the 5 clusters have no image" in caplog.text


def test_clusters_of_separate_blobs_are_found(rng, mesh, monkeypatch):
    labels = np.repeat(np.arange(4), 50)
    found = 20 * np.eye(4)[labels] + rng.normal(size=(200, 4))
    for setting in ("pca=0", "pca=3", "minibatch=64"):
        row = row_of({}, mesh, "eval.cluster.runs=5", f"eval.cluster.{setting}")
        result, arrays = cluster.cluster(row, found, 3 * labels, clusters=0)
        np.testing.assert_array_equal(arrays["clusters"], labels)  # numbered by class, in order
        # The saved centres assign the same images alike, in parts or not.
        monkeypatch.setattr(assignment, "_FLOATS", 300)
        again = Centres.read(arrays).assign(found, {2: "two"})
        np.testing.assert_array_equal(again.cluster, labels)
        assert ((again.name == "two") == (labels == 2)).all()
        np.testing.assert_allclose(again.distance, arrays["distance"], rtol=1e-5)
        np.testing.assert_allclose(again.margin, arrays["margin"], rtol=1e-4)
        assert arrays["sizes"].tolist() == [50] * 4
        rim = arrays["rim"][np.argsort(arrays["numbers"])][labels]
        assert (arrays["distance"] > rim).sum() == 4  # one of 50, in each
        # The centre of the 49 others is farther from an image by a fiftieth.
        np.testing.assert_array_equal(again.beyond_rim, arrays["distance"] > rim * 50 / 49)
        best = {name: result["best"][name] for name in METRICS}
        assert best == pytest.approx(dict.fromkeys(METRICS, 1.0))
        assert result["best"]["silhouette"] > 0.8
        assert result["best"]["silhouette_images"] == 200


def test_silhouette_of_many_images_is_sampled(rng, monkeypatch):
    monkeypatch.setattr(cluster, "_SILHOUETTE", 300)
    labels = rng.integers(0, 3, 2000)
    x = 3 * np.eye(3)[labels] + rng.normal(size=(2000, 3))
    sampled = cluster.silhouette(x, labels, 0)
    assert sampled["silhouette_images"] == 300
    assert sampled["silhouette"] == pytest.approx(silhouette_score(x, labels), abs=0.05)
    assert cluster.silhouette(x, np.zeros(2000, int), 0) == {}


def test_known_subsets_are_those_of_the_literature():
    assert [len(set(wnids)) for wnids in cluster.SUBSETS.values()] == [15, 10]
    sums = {name: sum(int(w[1:]) for w in wnids) for name, wnids in cluster.SUBSETS.items()}
    assert sums == {"imagenet_dogs15": 31_500_699, "imagenet10": 35_505_172}
