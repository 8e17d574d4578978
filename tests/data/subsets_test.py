"""Parts of labelled images: stratified, nested, and by lists of names."""

import numpy as np
import pytest

from maect_jax.data import subsets
from maect_jax.errors import UserError


@pytest.fixture
def labels(rng):
    return rng.permutation(np.repeat([0, 2, 5], [40, 200, 61])).astype(np.int32)


@pytest.mark.parametrize("seed", [0, 1])
def test_subsets_are_stratified_and_nested(labels, seed):
    one, two, five = (subsets.per_class(labels, n, seed) for n in (1, 2, 5))
    for n, found in ((1, one), (2, two), (5, five)):
        assert np.unique(labels[found], return_counts=True)[1].tolist() == [n] * 3
    assert set(one) < set(two) < set(five)
    hundredth, tenth = (subsets.fraction_of(labels, f, seed) for f in (0.01, 0.1))
    assert np.unique(labels[hundredth], return_counts=True)[1].tolist() == [1, 2, 1]
    assert np.unique(labels[tenth], return_counts=True)[1].tolist() == [4, 20, 6]
    assert set(one) <= set(hundredth) < set(tenth)
    assert subsets.per_class(labels, 100, seed).size == 40 + 100 + 61


def test_subsets_depend_on_the_seed_and_every_image_may_come(labels):
    drawn = [subsets.per_class(labels, 1, seed) for seed in range(400)]
    counts = np.bincount(np.concatenate(drawn), minlength=len(labels))
    # Each image of the class of 40 comes 10 times on average.
    assert counts[labels == 0].min() > 0
    assert counts[labels == 0].max() < 30


def test_listed_images_are_found_by_name(tmp_path):
    names = [f"/data/train/n0{c}/n0{c}_{i}.JPEG" for c in range(3) for i in range(4)]
    path = tmp_path / "1imgs.txt"
    path.write_text("n02_3.JPEG\nn00_0\n\nn01/n01_2.jpg\n")
    assert subsets.from_list(str(path), names).tolist() == [11, 0, 6]
    path.write_text("n02_3.JPEG\nn02_9.JPEG\n")
    with pytest.raises(UserError, match=r"1 of its 2 names are not among the 12 .* 'n02_9'"):
        subsets.from_list(str(path), names)
    with pytest.raises(UserError, match=r"absent\.txt': cannot be read"):
        subsets.from_list(str(tmp_path / "absent.txt"), names)
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        subsets.from_list(str(path), names)
