"""Maps of features in two dimensions."""

import numpy as np
import pytest

from maect_jax.evals import maps


@pytest.mark.parametrize("how", maps.NAMES)
def test_maps_keep_neighbours_and_accept_features_that_are_all_the_same(how, rng):
    if how == "umap":
        pytest.importorskip("umap")
    labels = np.repeat([0, 1, 2], 40)
    x = 9 * np.eye(3, 8)[labels] + rng.normal(size=(120, 8))
    points = maps.points(x.astype(np.float32), how)
    apart = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(120)
    assert (labels[apart.argmin(1)] == labels).mean() > 0.95
    for x in (np.ones((50, 4)), np.ones((1, 4)), np.eye(3)):
        points = maps.points(x, how)
        assert points.shape == (len(x), 2)
        assert np.isfinite(points).all()
