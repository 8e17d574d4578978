"""Labels in a file of their own: what it says, what is wrong with it, which images have one."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from maect_jax.data import labels, sources, subsets
from maect_jax.errors import UserError
from tests.helpers.common import save

NAMES = ("a/0.png", "a/1.png", "b/0.png", "0.png", 'x, "y".png', "caf\udce9.png")


def data_section(path, file):
    section = dict(source="folder", path=str(path), train_split="train", val_split="val")
    return ConfigDict(section | dict(labels=str(file), range=(), max_pixels=10**6))


@pytest.fixture
def section(tmp_path):
    """Images of one folder, and a function that gives it a file of labels."""
    for i, name in enumerate(NAMES):
        save(tmp_path / "train" / name, value=i)

    def with_labels(content):
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return data_section(tmp_path, path)

    return with_labels


def labels_of(section, split="train"):
    """The names of the labels of a split, by the names of its images."""
    source = sources.splits(section, (split,), 3)[split]
    start = len(f"{section.path}/{split}/")
    of = [sources.class_name(source.classes, source[i][1]) for i in range(len(source))]
    return {source.name(i)[start:]: label for i, label in enumerate(of) if label != "unlabelled"}


FILES = {
    "some images": "image,label\na/0.png,red\nb/0.png,blue\n",
    "byte-order mark, CRLF": b"\xef\xbb\xbfimage,label\r\n\r\na/0.png,red\r\nb/0.png,blue",
    "UTF-16": "image,label\na/0.png,red\nb/0.png,blue\n".encode("utf-16"),
    "a spreadsheet's": b"\xef\xbb\xbfimage;label\r\na/0.png;red\r\nb/0.png;blue\r\n;\r\n;\r\n",
    "its Unicode text": "image\tlabel\r\na/0.png\tred\r\nb/0.png\tblue\r\n".encode("utf-16"),
    "other columns": "cluster,label,image\n1, red ,./a/0.png\n2,blue,b/0.png\n",
    "spaces": 'image, label\na/0.png, "red"\nb/0.png, blue\n',
    "no ending": "image,label\na/0,red\nb/0.JPEG,blue\n",
    "an empty label": "image,label\na/0.png,red\na/1.png,\nb/0.png,blue\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_line_is_the_label_of_one_image(section, content):
    assert labels_of(section(content)) == {"a/0.png": "red", "b/0.png": "blue"}


def test_names_are_exact_quoted_and_need_not_be_utf_8(section, caplog):
    """`0.png` is the one in the folder itself, though other paths end in it."""
    content = 'image,label\n0.png,"Öl, fett"\n"x, ""y"".png",blue\ncaf\udce9.png,Öl\n'
    given = section(content.encode(errors="surrogateescape"))
    assert labels_of(given) == {"0.png": "Öl, fett", 'x, "y".png': "blue", "caf\udce9.png": "Öl"}
    source = sources.splits(given, ("train",), 3)["train"]
    assert source.classes == ["blue", "Öl", "Öl, fett"]
    assert not source.labelled
    assert source.no_labels == f"no labels for 3 of 6 ({given.labels})"
    said = caplog.records[0].getMessage()
    assert "labels 3 of 6 train images, as 3 classes: blue, Öl" in said
    assert "folders, are not used" in said


WRONG = {
    "no such file": (None, "there is no such file"),
    "empty": ("", "its first line is nothing; must have the columns image,label"),
    "other columns": ("image,kind\na/0.png,red", "its first line is image, kind; must have"),
    "a column twice": ("image,label,label\n", "its first line is image, label, label; must"),
    "a comma": ("image,label\nx, y.png,red\n", "line 2 has 3 columns, the first line 2"),
    "a semicolon": ("image;label\nx; y.png;red\n", "a text with ';' must be in quotes"),
    "not UTF-8": (b"image,label\na/0.png,M\xfcll\n", "line 2: the label M\\udcfcll is not UTF-8"),
    "too few": ("image,label\na/0.png\n", "line 2 has 1 columns"),
    "quotes that do not end": ('image,label\n"a/0.png,red\n', "unexpected end of data"),
    "no label": ("image,label\na/0.png, \n", "has no label"),
    "no image": ("image,label\na/9.png,red\nb/0.png,blue", "1 of its 2 names are not among the 6"),
    "a part of a name": ("image,label\n/0.png,red\n", "1 of its 1 names are not among"),
    "several without ending": ("image,label\n0,red\n", "of several images: 0 (the first is"),
    "twice": ("image,label\na/0.png,red\na/0.png,red\n", "line 3: a/0.png is listed twice"),
    "twice, in two ways": ("image,label\na/0.png,red\na/0,blue\n", "images that are listed twice"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_one_clear_line(section, content, message):
    given = section(content or "")
    if content is None:
        given.labels = given.labels.replace("labels.csv", "absent.csv")
    with pytest.raises(UserError) as error:
        sources.splits(given, ("train",), 3)
    assert str(error.value).startswith(f"config.data.labels={given.labels!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_class_is_no_labels(section):
    source = sources.splits(section("image,label\na/0.png,red\nb/0.png,red\n"), ("train",), 3)
    assert source["train"].no_labels.endswith("labels.csv has one class, 'red')")
    assert (source["train"].labelled, source["train"].classes) == (False, [])


def test_a_file_labels_all_splits_and_replaces_the_classes_of_folders(section, tmp_path):
    """Names of both splits are told apart by the folder of the split."""
    for name in ("b/0.png", "c/7.png"):
        save(tmp_path / "val" / name)
    given = section("image,label\ntrain/b/0.png,red\na/1.png,blue\nval/b/0.png,blue\nc/7.png,red\n")
    assert labels_of(given) == {"b/0.png": "red", "a/1.png": "blue"}
    assert labels_of(given, "val") == {"b/0.png": "blue", "c/7.png": "red"}
    with pytest.raises(UserError, match=r"of several images: b/0.png \(the first is .*val/b/0.png"):
        labels_of(section("image,label\nb/0.png,red\na/1.png,blue\n"))
    with pytest.raises(UserError, match="no training image is of green, as held-out images are"):
        labels_of(section("image,label\na/0.png,red\na/1.png,blue\nc/7.png,green\n"))
    images = sources.splits(section("image,label\nc/7.png,red\nval/b/0.png,blue\n"), ("train",), 3)
    assert "has those of val images alone" in images["train"].no_labels


def test_images_without_a_path_are_named_by_number(tmp_path):
    path = tmp_path / "all.npz"
    np.savez(path, image=np.zeros((5, 2, 2, 3), np.uint8), is_test=[0, 0, 0, 1, 1], label=range(5))
    csv = tmp_path / "labels.csv"
    csv.write_text("image,label\nimage 2,b\ntrain/image 0,a\nval/image 1,a\n")
    section = data_section(path, csv)
    found = sources.splits(section, sources.SPLITS, 3)
    assert {split: x.labels.tolist() for split, x in found.items()} == {
        "train": [0, -1, 1], "val": [-1, 0]
    }  # fmt: skip
    csv.write_text("image,label\nimage 1,b\ntrain/image 0,a\n")
    with pytest.raises(UserError, match=r"image 1 \(the first is train/image 1, val/image 1\)"):
        sources.splits(section, sources.SPLITS, 3)


def test_other_labels_are_another_identity_of_the_same_images(section):
    def identity(content):
        return sources.splits(section(content), ("train",), 3)["train"].identity

    one = identity("image,label\na/0.png,red\nb/0.png,blue\n")
    assert identity("image,label\nb/0.png,blue\n./a/0.png,red\n") == one
    for other in ("a/0.png,red\na/1.png,blue\n", "a/0.png,reds\nb/0.png,blue\n"):
        change = identity(f"image,label\n{other}").difference(one._asdict())
        assert (change.content, change.text) == (True, "6 images as before, but with other labels")


class Marked(sources.Blank):
    """Images with these labels."""

    def __init__(self, of):
        super().__init__(len(of), 3, classes=3)
        self.labels = np.array(of)


def test_a_tenth_of_each_class_is_held_out_where_no_held_out_image_has_a_label():
    train = Marked([-1] * 5 + [0] * 40 + [1] * 14 + [2] * 2)
    for images in ({"train": train}, {"train": train, "val": Marked([-1] * 9)}):
        parts = labels.known(images, seed=3)
        kept, held_out = parts["train"], parts["val"]
        assert isinstance(held_out, labels.HeldOut)
        assert np.bincount(held_out.labels).tolist() == [4, 1, 1]
        assert sorted([*kept.records, *held_out.records]) == list(range(5, 61))
        assert kept.labelled
        assert held_out.labelled
    others = {tuple(labels.known({"train": train}, seed)["val"].records) for seed in range(5)}
    assert len(others) == 5
    assert tuple(held_out.records) in others
    # The last image of a class is trained on.
    few = labels.known({"train": Marked([0, 1, 1])}, 0)
    assert (few["train"].labels.tolist(), few["val"].labels.tolist()) == ([0, 1], [1])
    with pytest.raises(UserError, match="the 3 images with a label are each of another class"):
        labels.known({"train": Marked([0, 1, 2, -1])}, 0)


def test_held_out_images_with_a_label_are_used():
    train, val = Marked([0, -1, 1]), Marked([-1, 1, 0, -1])
    parts = labels.known({"train": train, "val": val}, 0)
    assert [parts[split].records.tolist() for split in ("train", "val")] == [[0, 2], [1, 2]]
    assert type(parts["val"]) is subsets.Subset
    whole = {"train": Marked([0, 1]), "val": Marked([1])}
    assert labels.known(whole, 0) == whole
    none = {"train": Marked([-1, -1])}
    assert labels.known(none, 0) == none
