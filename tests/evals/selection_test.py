"""The number of clusters, and their hierarchy."""

import json

import jax
import numpy as np
import pytest

from maect_jax.evals import hierarchy, kmeans, selection
from tests.helpers.common import mesh_of


def blobs(rng, k, width, rows=400):
    """Blobs of unit variance whose centres are 14 or more apart."""
    centres = rng.normal(size=(k, width))
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(k, 1)]
    return 14 / apart.min() * centres[np.arange(rows) % k] + rng.normal(size=(rows, width))


def select(x, shape=(1, 1)):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        return selection.select(np.float32(x), seed=0, memory_mb=64, mesh=mesh)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Halves of 80 images, and so at most 8 clusters."""
    monkeypatch.setattr(selection, "_HALF", 80)
    monkeypatch.setattr(selection, "_SPLITS", 2)


def test_the_number_of_separate_blobs_is_found(rng):
    for k in (3, 6):
        found = select(x := blobs(rng, k, 6))
        assert (found["chosen"], found["images"]) == (k, 160)
        assert found["sure"] in ("clear", "fair")
        assert len(found["agree"]) >= 2
    for name in selection.CRITERIA:
        values = found["criteria"][name]
        assert {len(of) for of in values.values()} == {len(found["grid"])}
    place = found["grid"].index(6)
    assert found["criteria"]["restarts"]["value"][place] > 0.8
    assert found["criteria"]["halves"]["value"][place] > 0.9
    assert found["criteria"]["silhouette"]["value"][place] > 0.6
    assert found["score"][place] == max(found["score"]) > 0.9
    assert json.loads(json.dumps(found)) == select(x) == found


@pytest.mark.slow
def test_the_number_is_the_same_on_any_devices(rng):
    x = blobs(rng, 6, 6)
    one, many = select(x), select(x, (2, 2))
    assert one["chosen"] == many["chosen"] == 6
    for name, values in one["criteria"].items():
        place = one["grid"].index(6)
        near = pytest.approx(values["value"][place], rel=1e-3)
        assert many["criteria"][name]["value"][place] == near


@pytest.mark.slow
@pytest.mark.parametrize(("k", "width"), [(2, 2), (5, 3), (12, 16), (26, 40)])
def test_the_number_of_separate_blobs_is_found_in_any_dimension(rng, monkeypatch, k, width):
    monkeypatch.setattr(selection, "_HALF", 400)
    found = select(blobs(rng, k, width, rows=900))
    assert found["chosen"] == k
    assert found["sure"] in ("clear", "fair")


def test_images_without_clusters_have_no_clear_number(rng):
    narrower = rng.normal(size=(200, 6)) / np.arange(1, 7)
    for x in (narrower, rng.uniform(size=(200, 6)), np.ones((200, 6))):
        found = select(x)
        assert found["sure"] == "none"
        assert "no clear number" in found["words"]


def test_all_hosts_choose_by_what_the_first_one_measures(rng, monkeypatch):
    monkeypatch.setattr(selection.sharding, "of_first_host", lambda text: len(text) * "0")
    found = select(blobs(rng, 3, 6))
    assert not np.any(found["criteria"]["halves"]["value"])
    assert found["sure"] == "none"


def test_runners_up_are_other_peaks_and_words_follow_the_agreement():
    counts = [2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16]
    values = np.zeros((3, 4, 2, len(counts)))

    def chosen(*peaks):
        """Of criteria that are 1 at the first peaks, and `height` at another."""
        values[0] = np.arange(len(counts)) / 1000
        for of_criterion, heights in zip(values[0], peaks, strict=True):
            for number, height in heights.items():
                of_criterion[:, counts.index(number)] = height
        return selection._chosen(counts, values)

    found = chosen(*[{5: 1.0, 6: 0.9, 10: 0.7}] * 4)
    assert (found["chosen"], found["runners_up"], found["sure"]) == (5, [], "clear")
    assert found["agree"] == list(selection.CRITERIA)
    found = chosen(*[{2: 0.85, 3: 0.1, 5: 1.0, 10: 0.9, 11: 0.9, 16: 0.82}] * 4)
    assert (found["runners_up"], found["sure"]) == ([10, 2], "fair")
    assert found["words"].endswith("Runners-up: 10 (90% of its score), 2 (85% of its score).")
    found = chosen({5: 1}, {16: 1, 5: 0.9}, {2: 1, 5: 0.9}, {10: 1, 5: 0.9})
    assert found["score"][counts.index(5)] == pytest.approx(0.95)  # the gap does not decide
    assert (found["chosen"], found["agree"], found["sure"]) == (5, ["silhouette"], "weak")
    found = chosen(*[{13: 1.0}] * 4)  # near the end of the grid
    assert (found["chosen"], found["sure"]) == (13, "weak")
    assert "largest number" in found["words"]
    values[:] = 0
    found = chosen(*[{5: 0.02, 16: 0.0}] * 4)
    assert found["sure"] == "none"


def test_clusters_of_several_numbers_are_those_of_each(rng):
    x, mesh = np.float32(blobs(rng, 7, 5)), mesh_of(1, 1)
    settings = kmeans.Settings(k=9, runs=3, seed=2, memory_mb=64)
    with jax.set_mesh(mesh):
        found, alone = kmeans.over(x, (9, 2, 5), settings, mesh), kmeans.kmeans(x, settings, mesh)
    jax.tree.map(np.testing.assert_array_equal, found[9], alone)
    for k, clustering in found.items():
        assert clustering.centres.shape == (3, k, 5)
        assert [len(np.unique(clusters)) for clusters in clustering.clusters] == [k] * 3
        apart = x - clustering.centres[1][clustering.clusters[1]]
        assert clustering.loss[1] == pytest.approx(np.square(apart).sum(), rel=1e-4)


def test_clusters_are_read_as_groups_of_those_that_are_alike():
    # Two pairs, and one alone that is nearer to the second pair.
    centres = np.array([[0.0, 0], [9, 0], [0.5, 0], [9, 1], [12, 0]], np.float32)
    merges = hierarchy.merges(centres)
    assert merges.shape == (4, 4)
    groups = {count: hierarchy.groups(merges, count).tolist() for count in (1, 2, 3, 5, 9)}
    assert groups == {
        1: [0] * 5, 2: [0, 1, 0, 1, 1], 3: [0, 1, 0, 1, 2], 5: [*range(5)], 9: [*range(5)],
    }  # fmt: skip
    assert hierarchy.groups(merges, 2).dtype == np.int32
    many = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    assert len({*hierarchy.groups(hierarchy.merges(many), 7)}) == 7
    assert hierarchy.merges(many[:1]).shape == (0, 4)
    assert hierarchy.groups(hierarchy.merges(many[:1]), 1).tolist() == [0]
    merges = np.array([[0, 1, 1, 2], [2, 3, 1, 2], [4, 6, 2, 3], [5, 7, 4, 5]], float)
    assert hierarchy.groups(merges, 4).tolist() == [0, 0, 1, 2, 3]  # equals in their order


def test_silhouettes_are_0_where_they_are_not_defined():
    equal, clusterings = np.zeros((6, 2), np.float32), [np.zeros(6, int), np.arange(6) % 2]
    assert selection._silhouettes(equal, [*clusterings, np.arange(6)]) == [0, 0, 0]
