"""Where images come from: folders and their index, files of arrays, the packaged set."""

import errno
import io
import os
import pickle

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from maect_jax import files
from maect_jax.data import arrays, decode, folder, sources
from maect_jax.data.folder import Folder
from maect_jax.errors import UserError
from tests.helpers.common import save

RGB = decode.Decoding(3)


def data_section(**changes):
    base = dict(source="folder", path="", name="", train_split="train", val_split="val")
    return ConfigDict(base | dict(labels="auto", range=(), max_pixels=10**6) | changes)


def folder_of(root, **splits):
    """A folder with an image for each name of a class, by split."""
    for split, classes in splits.items():
        for i, name in enumerate(classes):
            save(root / split / name / f"{i}.png")
    return data_section(path=str(root))


def npz_of(root, **splits):
    """The same as arrays, a class being the number of a letter."""
    labels = [ord(name) - ord("a") for names in splits.values() for name in names]
    is_test = np.repeat([split == "val" for split in splits], list(map(len, splits.values())))
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    names = np.array(list("abcd"))
    np.savez(root / "all.npz", image=images, label=np.array(labels), names=names, is_test=is_test)
    return data_section(path=str(root / "all.npz"))


@pytest.mark.parametrize("made", [folder_of, npz_of])
@pytest.mark.parametrize("held_out", ["b", "ab"])
def test_one_class_is_no_labels(tmp_path, caplog, made, held_out):
    """Else every protocol gives 100 %. The held-out images follow, even if they have classes."""
    section = made(tmp_path, train="bbb", val=held_out)
    found = sources.splits(section, sources.SPLITS, 3)
    for source in found.values():
        assert (source.labelled, source.classes, source[0][1]) == (False, [], -1)
        assert source.no_labels == "no labels (train has one class, 'b')"
    assert [record.getMessage() for record in caplog.records] == [
        "the images have no labels (train has one class, 'b')"
    ]


@pytest.mark.parametrize("made", [folder_of, npz_of])
def test_labels_none(tmp_path, caplog, made):
    """Folders that mean something else, such as dates: the splits need not have the same."""
    section = made(tmp_path, train="aab", val="cd")
    section.labels = "none"
    found = sources.splits(section, sources.SPLITS, 3)
    for source in found.values():
        assert (source.labelled, source.classes, source[1][1]) == (False, [], -1)
        assert source.no_labels == "no labels (config.data.labels='none')"
    assert caplog.records == []


@pytest.mark.parametrize("made", [folder_of, npz_of])
def test_a_split_with_fewer_classes_is_named(tmp_path, caplog, made):
    sources.splits(made(tmp_path, train="aabc", val="bb"), sources.SPLITS, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "val has no image of 2 of the 3 classes of train: a, c"
    ]


def test_arrays_with_a_class_that_train_lacks_are_named(tmp_path, caplog):
    """Of a folder it is an error."""
    sources.splits(npz_of(tmp_path, train="ab", val="abd"), sources.SPLITS, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "train has no image of 1 of the 3 classes of val: d"
    ]


def test_packaged_images_are_split_without_overlap():
    train, val = (arrays.fashion_mnist(split) for split in sources.SPLITS)
    assert (len(train), len(val)) == (8000, 2000)
    assert train.shape == (28, 28, 1)
    assert set(np.unique(train.labels)) == set(range(10))
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) <= 2  # the set has a few twins
    pixels = train.images / 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [0.286, 0.353], atol=2e-3)


def test_settings_are_chosen_on_training_images_alone():
    parts = [arrays.fashion_mnist(name).images for name in ("train[:80%]", "train[80%:]")]
    assert [len(part) for part in parts] == [6400, 1600]
    np.testing.assert_array_equal(np.concatenate(parts), arrays.fashion_mnist("train").images)


def test_folder_reads_nested_files_by_class(images):
    source = Folder(str(images / "train"))
    assert source.classes == ["ant", "bee"]
    assert len(source) == 21
    image, label = source[3]
    pixels = decode.pixels(image, RGB)
    assert (pixels.shape, pixels[0, 0, 0], label) == ((12, 7, 3), 30, 0)
    assert source[20][1] == 1
    assert source.name(20) == str(images / "train" / "bee" / "deep" / "er" / "99.JPG")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).labels, source.labels)


def test_images_without_classes_have_no_label(images):
    source = Folder(str(images / "train" / "ant"))
    assert (len(source), source.classes, source[3][1]) == (10, [], -1)
    section = data_section(path=str(images / "train" / "ant"), train_split=".")
    assert len(sources.make(section, "train", 3)) == 10


def test_names_that_are_no_utf8(tmp_path):
    root = os.fsencode(tmp_path / "train")
    for path in (b"caf\xe9/1.png", b"b/\xe9.png"):
        os.makedirs(os.path.join(root, os.path.dirname(path)))
        Image.new("RGB", (2, 2)).save(os.fsdecode(os.path.join(root, path)))
    source = sources.make(data_section(path=str(tmp_path)), "train", 3)
    assert [os.fsencode(source.name(i)) for i in (0, 1)] == [
        root + b"/b/\xe9.png",
        root + b"/caf\xe9/1.png",
    ]
    assert os.fsencode(source.classes[1]) == b"caf\xe9"
    assert (
        sources.class_name(source.classes, 1) == r"caf\udce9"
    )  # as fonts and terminals can show it
    assert sources.class_name(["l" * 99], 0) == "l" * 40 + "..."  # as a figure has room for it
    assert sources.labels_digest(source)


WRONG = {
    "no folder": (lambda root: "nowhere", "there is no folder '.*nowhere'"),
    "no image": (lambda root: (root / "void").mkdir() or "void", "no images below '.*void'"),
    "empty class": (
        lambda root: (root / "train" / "cat").mkdir() or "train",
        r"no images in these classes of '.*train': cat",
    ),
    "beside classes": (
        lambda root: save(root / "train" / "1.png") or "train",
        r"'.*train' has images beside its class folders, such as 1\.png",
    ),
    "loop": (
        lambda root: os.symlink(root / "train", root / "train" / "bee" / "again") or "train",
        r"'.*bee/again' is a symbolic link that leads back into itself",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_folder_that_cannot_be_meant_is_one_clear_error(images, make, message):
    path = make(images)
    with pytest.raises(UserError, match=rf"^config\.data\.path: {message}"):
        Folder(str(images / path))


def test_linked_folders_are_followed(images):
    other = images / "linked"
    other.mkdir()
    for name in ("ant", "bee"):
        os.symlink(images / "train" / name, other / name)
    assert len(Folder(str(other))) == 21


def test_held_out_images_are_numbered_by_the_classes_of_training(images):
    save(images / "val" / "bee" / "1.png")
    found = sources.splits(data_section(path=str(images)), sources.SPLITS, 3)
    assert found["val"].labels.tolist() == [1]
    assert found["val"].classes == ["ant", "bee"]
    save(images / "val" / "cow" / "1.png")
    with pytest.raises(UserError, match=r"has classes that the training images lack: cow"):
        sources.splits(data_section(path=str(images)), sources.SPLITS, 3)


@pytest.fixture
def listed(monkeypatch):
    """The folders that were listed; every index is large enough to be saved."""
    roots, make = [], folder._make_index
    monkeypatch.setattr(folder, "_LARGE", 1)
    monkeypatch.setattr(
        folder, "_make_index", lambda root, given: roots.append(root) or make(root, given)
    )
    return roots


def opened(path):
    """A folder whose index is saved."""
    source = Folder(str(path))
    source.save_index()
    return source


def test_an_index_is_made_once_and_again_when_a_file_comes(images, listed):
    first, again = opened(images / "train"), opened(images / "train")
    assert len(listed) == 1
    assert [again.name(i) for i in range(21)] == [first.name(i) for i in range(21)]
    assert (again.classes, again.labels.tolist()) == (first.classes, first.labels.tolist())
    save(images / "train" / "ant" / "aa.png")
    assert [len(opened(images / "train")) for _ in range(2)] == [22, 22]
    assert len(listed) == 2
    index = images / ".train.index.npz"
    whole = index.read_bytes()
    for torn in (b"torn", whole[: len(whole) // 2], whole[:100] + b"torn" + whole[104:]):
        index.write_bytes(torn)
        assert len(Folder(str(images / "train"))) == 22
    assert len(listed) == 5


def test_what_comes_while_an_index_is_made_makes_it_anew(images, listed, monkeypatch):
    list_folder = folder._listed

    def slow(where):
        found = list_folder(where)
        if where.name == "ant":
            save(images / "train" / "ant" / "late.png")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_listed", slow)
        assert len(opened(images / "train")) == 21
    assert len(Folder(str(images / "train"))) == 22


def test_the_working_folder_itself_may_hold_the_images(images, monkeypatch):
    monkeypatch.chdir(images / "train" / "ant")
    source = sources.make(data_section(path=".", train_split="."), "train", 3)
    assert source.name(0) == str(images / "train" / "ant" / "00.png")
    assert decode.pixels(source[3][0], RGB)[0, 0, 0] == 30


def test_where_images_can_only_be_read_the_run_keeps_the_index(images, listed, monkeypatch):
    write, beside = files.write_arrays, images / ".train.index.npz"

    def refused(path, **arrays):
        if path == beside:
            raise OSError(errno.EROFS, "read-only file system")
        write(path, **arrays)

    monkeypatch.setattr(files, "write_arrays", refused)
    run = images / "run"
    for _ in range(2):
        found = sources.splits(data_section(path=str(images)), ("train",), 3, run)
        found["train"].save_index()
    assert len(listed) == 1
    assert [path.name for path in run.iterdir()] == ["train.index.npz"]
    assert not beside.exists()


def test_a_bucket_is_read_through_etils(images, listed, monkeypatch):
    kind, asked = type(epath.Path("gs://bucket/x")), []

    def local(path):
        asked.append(path)
        return images / os.fspath(path).removeprefix("gs://bucket/")

    monkeypatch.setattr(kind, "is_dir", lambda self: local(self).is_dir())
    monkeypatch.setattr(kind, "read_bytes", lambda self: local(self).read_bytes())
    monkeypatch.setattr(
        kind, "iterdir", lambda self: (self / path.name for path in local(self).iterdir())
    )
    run = images / "run"
    run.mkdir()
    found = sources.splits(data_section(path="gs://bucket"), ("train",), 3, run)
    source = found["train"]
    assert (source.classes, len(source)) == (["ant", "bee"], 21)
    assert source.name(0) == "gs://bucket/train/ant/00.png"
    assert decode.pixels(source[3][0], RGB).shape == (12, 7, 3)
    source.save_index()
    asked.clear()
    again = sources.splits(data_section(path="gs://bucket"), ("train",), 3, run)["train"]
    assert [again.name(i) for i in range(21)] == [source.name(i) for i in range(21)]
    assert (len(listed), asked) == (1, [])


def encoded(pixels):
    """The arrays of images as PNG files."""
    found = []
    for image in pixels:
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "PNG")
            found.append(file.getvalue())
    ends = np.cumsum([0, *map(len, found)])
    return {"blob": np.frombuffer(b"".join(found), np.uint8), "offsets": ends}


def test_arrays_of_pixels_and_of_files_are_the_same(tmp_path, rng):
    pixels = rng.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    rest = dict(label=np.uint8([2, 1, 0, 1, 2, 1]), names=["a", "b", "c"], is_test=[0, 1] * 3)
    np.savez(tmp_path / "pixels.npz", image=pixels, **rest)
    np.savez(tmp_path / "files.npz", **encoded(pixels), **rest)
    for name in ("pixels", "files"):
        section = data_section(path=str(tmp_path / f"{name}.npz"))
        found = sources.splits(section, sources.SPLITS, 3)
        np.testing.assert_array_equal(found["train"].images, pixels[::2])
        np.testing.assert_array_equal(found["val"].images, pixels[1::2])
        assert found["val"][0][1] == 1
        assert found["train"].shape == (5, 4, 3)
        assert found["train"].classes == ["a", "b", "c"]
    np.savez(tmp_path / "gray.npz", image=pixels[..., 0])
    gray = arrays.npz(str(tmp_path / "gray.npz"), "train", decode.Decoding(1))
    assert (gray.shape, gray.classes, gray[0][1]) == ((5, 4, 1), [], -1)


COLOUR = np.zeros((2, 4, 4, 3), np.uint8)
BAD_ARRAYS = {
    "no file": (None, "not a readable .npz file"),
    "one array": ({"array": COLOUR}, "not a readable .npz file"),
    "other keys": ({"x": [1]}, "has x; must have `image`, or `blob` and `offsets`"),
    "no val": ({"image": COLOUR}, "has no image for val, by its `is_test`"),
    "float": ({"image": COLOUR / 2, "is_test": [True] * 2}, "`image` is float64 (2, 4, 4, 3)"),
    "gray": ({"image": COLOUR[..., 0], "is_test": [True] * 2}, "`image` is uint8 (2, 4, 4, 1)"),
    "labels": ({"image": COLOUR, "label": [1]}, "`label` is int64 (1,); must be integers"),
    "names as labels": ({"image": COLOUR, "label": ["a", "b"]}, "`label` is <U1 (2,); must be"),
    "offsets": ({"blob": COLOUR, "offsets": [0.0, 9.0]}, "`offsets` is float64 (2,); must be"),
    "one number": ({"image": np.uint8(3), "is_test": [True]}, "`image` is uint8"),
    "torn": (
        {"blob": np.zeros(9, np.uint8), "offsets": [0, 9], "is_test": [True]},
        "image 0 cannot be read",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_a_wrong_file_of_arrays_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "x.npz"
    if content is None:
        path.write_bytes(b"PK no zip")
    elif "array" in content:
        with path.open("wb") as file:
            np.save(file, content["array"])
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=r"config\.data\.path=") as error:
        arrays.npz(str(path), "val", RGB)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
