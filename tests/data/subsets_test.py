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
    with pytest.raises(UserError, match=r"1 of its 2 names are not among the 12 .*: n02_9\.JPEG"):
        subsets.from_list(str(path), names)
    with pytest.raises(UserError, match=r"absent\.txt': cannot be read"):
        subsets.from_list(str(tmp_path / "absent.txt"), names)
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        subsets.from_list(str(path), names)


def test_a_path_below_the_folder_of_all_is_exact(tmp_path):
    names = [f"/sets/train/{name}" for name in ("b/a/0.jpg", "a/0.jpg", "b/a/1.jpg", "c/b/a/1.jpg")]
    path = tmp_path / "list.txt"
    path.write_text("a/0.jpg\nb/a/0.jpg\nb/a/1.jpg")
    assert subsets.from_list(str(path), names).tolist() == [1, 0, 2]
    path.write_text("a/1.jpg")
    with pytest.raises(UserError, match="of several images"):
        subsets.from_list(str(path), names)


# Three folders with equal names; one image in two formats; dots, and bytes that are not UTF-8.
NAMES = [
    *(f"/sets/train/{c}/{i}.jpg" for c in "abc" for i in range(3)),
    "/sets/train/a/0.png", "/sets/train/a/IMG.2020.jpg", "/sets/train/a/IMG.jpg",
    "/sets/train/b/caf\udce9.tif", "/sets/train/b/two words.gif",
]  # fmt: skip
LISTS = {
    "exact path first": (b"a/0.png\na/0.jpg\n/sets/train/b/0.jpg", [9, 0, 3]),
    "no ending": (b"c/2\nb/1", [8, 4]),
    "another ending": (b"c/2.JPEG\nb/1.heic", [8, 4]),
    "dots are no ending": (b"a/IMG.2020\nIMG", [10, 11]),
    "byte-order mark": (b"\xef\xbb\xbfa/1.jpg\n", [1]),
    "UTF-16": ("a/1.jpg\nb/1.jpg".encode("utf-16"), [1, 4]),
    "CRLF and blank lines": (b"\r\na/1.jpg\r\n\r\n  \n b/1.jpg \r\n", [1, 4]),
    "not UTF-8": (b"b/caf\xe9.tif\n./two words.gif", [12, 13]),
}
WRONG_LISTS = {
    "several of a name": (b"0.jpg\na/1.jpg", "1 of its 2 names are each of several images: 0.jpg"),
    "several without ending": (
        b"a/0",
        "a/0 (the first is /sets/train/a/0.jpg, /sets/train/a/0.png)",
    ),
    "no part of a name": (b"MG.jpg\nin/a/1.jpg", "2 of its 2 names are not among the 14"),
    "an ending is no name": (b"a/IMG.2021", "not among the 14 training images: a/IMG.2021"),
    "both": (b"0.jpg\nd/1.jpg", "images: d/1.jpg; 1 of its 2 names are each of several"),
    "twice": (b"a/1.jpg\nb/1.jpg\na/1", "images that are listed twice: /sets/train/a/1.jpg"),
}


@pytest.mark.parametrize(("content", "records"), LISTS.values(), ids=LISTS)
def test_a_line_names_one_image(tmp_path, content, records):
    (tmp_path / "list.txt").write_bytes(content)
    assert subsets.from_list(str(tmp_path / "list.txt"), NAMES).tolist() == records


@pytest.mark.parametrize(("content", "message"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_what_is_ambiguous_absent_or_repeated_is_refused(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError) as refused:
        subsets.from_list(str(tmp_path / "list.txt"), NAMES)
    assert message in str(refused.value)
