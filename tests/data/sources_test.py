"""Where images come from: folders, buckets, files of arrays, the packaged set."""

import io
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from maect_jax.data import arrays, base, decode, sources, subsets
from maect_jax.data.folder import Folder
from maect_jax.errors import UserError
from maect_jax.report import style
from tests.helpers.common import save

RGB = decode.Decoding(3)


def data_section(**changes):
    common = dict(source="folder", path="", name="", train_split="train", val_split="val")
    return ConfigDict(common | dict(labels="auto", range=(), max_pixels=10**6) | changes)


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
    assert style.class_name(source.classes, 1) == r"caf\udce9"  # as fonts can show it
    assert style.class_name(["l" * 99], 0) == "l" * 40 + "..."  # as a figure has room for it
    assert sources.labels_digest(source)


def test_names_below_the_folder_that_all_images_share(tmp_path, images):
    assert base.relative_names(Folder(str(images / "train")))[9:12] == [
        "ant/09.png", "bee/00.png", "bee/01.png"
    ]  # fmt: skip
    for name in ("top/ab/0.png", "top/ac/0.png", "one/0.png"):
        save(tmp_path / name)
    assert base.relative_names(Folder(str(tmp_path / "top"))) == ["ab/0.png", "ac/0.png"]
    assert base.relative_names(Folder(str(tmp_path / "one"))) == ["0.png"]
    assert base.relative_names(sources.Blank(2, channels=1)) == ["image 0", "image 1"]


def test_folders_that_are_no_classes_may_be_empty_or_beside_images(images):
    (images / "train" / "2024-02-30").mkdir()
    (images / "train" / "__MACOSX" / "ant").mkdir(parents=True)
    (images / "train" / "__MACOSX" / "ant" / "._00.png").write_text("of an archive")
    save(images / "train" / "loose.png")
    source = sources.make(data_section(path=str(images), labels="none"), "train", 3)
    assert (len(source), source.classes, source.labelled) == (22, [], False)
    (images / "train" / "loose.png").unlink()
    (images / "train" / "2024-02-30").rmdir()
    assert sources.make(data_section(path=str(images)), "train", 3).classes == ["ant", "bee"]


WRONG = {
    "no folder": (lambda root: "nowhere", "there is no folder '.*nowhere'"),
    "shards": (
        lambda root: (root / "a.tar").touch() or "train-{0..3}.tar/train",
        r"there is no folder .*; shards need config\.data\.source=shards",
    ),
    "no image": (lambda root: (root / "void").mkdir() or "void", "no images below '.*void'"),
    "empty class": (
        lambda root: (root / "train" / "cat").mkdir() or "train",
        r"no images in these classes of '.*train': cat",
    ),
    "beside classes": (
        lambda root: save(root / "train" / "1.png") or "train",
        r"'.*train' has images beside its class folders, such as 1\.png.*config\.data\.labels=none",
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


def test_images_are_what_their_files_are(images):
    """By name, size, time and content, wherever they are, and however their path is spelled."""
    root, path = images / "train", images / "train" / "ant" / "00.png"
    first = Folder(str(root)).identity
    os.symlink(images, images / "other")
    for spelled in (f"{root}/", f"{images}/./train", f"{images}/other/train"):
        assert Folder(spelled).identity == first
    shutil.copytree(root, images / "copied")
    assert Folder(str(images / "copied")).identity == first  # with its times
    os.utime(path, ns=(0, 0))
    touched = Folder(str(root)).identity
    assert not touched.difference(first._asdict()).content
    assert (touched.images, touched.content) == (first.images, first.content)
    changes = (
        lambda: path.write_bytes(path.read_bytes() + b"0"),
        lambda: path.rename(path.with_name("000.png")),
        lambda: (root / "ant").rename(root / "art"),
    )
    before = touched
    for change in changes:
        change()
        now = Folder(str(root)).identity
        difference = now.difference(before._asdict())
        assert difference == (True, "21 images as before, but not the same")
        before = now
    path = root / "bee" / "deep" / "er" / "99.JPG"
    content, times = path.read_bytes(), (0, path.stat().st_mtime_ns)
    path.write_bytes(content[:-1] + b"x")  # in place, as a pixel of an image without compression
    os.utime(path, ns=times)
    assert Folder(str(root)).identity.content != before.content
    path.write_bytes(content)
    save(root / "bee" / "new.jfif.jpe")
    now = Folder(str(root)).identity
    assert now.difference(before._asdict()) == (True, "21 images before, 22 now")
    assert now.difference(now._asdict()) is now.difference({"images": 22}) is None
    of_version_0_1 = now.difference({"images": 21})
    assert of_version_0_1.content
    assert "more endings count" in of_version_0_1.text


def test_images_in_memory_are_what_is_in_them(rng):
    pixels, labels = rng.integers(0, 256, (4, 3, 2, 1), dtype=np.uint8), np.arange(4)
    same = arrays.Arrays(pixels.copy(), labels, ["a"]).identity
    assert arrays.Arrays(pixels, labels, ["a"]).identity == same
    others = [
        arrays.Arrays(pixels[::-1], labels, ["a"]),
        arrays.Arrays(pixels.reshape(4, 2, 3, 1), labels, ["a"]),
        arrays.Arrays(pixels, labels[::-1], ["a"]),
        arrays.Arrays(pixels, labels, ["b"]),
        subsets.Subset(arrays.Arrays(pixels, labels, ["a"]), [3, 2, 1, 0]),
        sources.Blank(4, 1, (3, 2, 1)),
    ]
    assert len({same, *(source.identity for source in others)}) == 7


ENDINGS = "ppm pgm pbm jfif jpe jp2 avif tga bmp gif webp TIFF ico pcx"


def test_all_endings_of_pillows_formats_count(tmp_path):
    """Each is read as well."""
    for ending in ENDINGS.split():
        save(tmp_path / f"x.{ending}", (16, 16))
    source = Folder(str(tmp_path))
    assert [source.name(i).rpartition(".")[2] for i in range(len(source))] == sorted(
        ENDINGS.split()
    )
    for record in range(len(source)):
        assert decode.pixels(source[record][0], RGB).shape == (16, 16, 3)


def test_what_is_left_out_is_counted_by_its_ending(tmp_path, caplog, monkeypatch):
    for name in ("a/0.png", "a/1.txt", "b/0.png", "b/deep/2.TXT", "b/README", "b/3.eps", "b/3.h5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for hidden in ("a/._0.png", ".cache/x.png", "b/.DS_Store"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).touch()
    assert len(Folder(str(tmp_path))) == 2
    (warning,) = caplog.messages
    assert warning == f"{tmp_path}: left out 5 files: 2 .txt, 1 without an ending, 1 .eps, 1 .h5"
    monkeypatch.setattr(decode, "endings", lambda: {".png"})
    (tmp_path / "b" / "4.heic").touch()
    assert len(Folder(str(tmp_path))) == 2
    assert "left out 6 files: 1 .heic (needs the extra [heif]), 2 .txt, " in caplog.messages[-1]
    with pytest.raises(UserError, match=r"no images below .*deep' \(left out 1 file: 1 \.txt\);"):
        Folder(str(tmp_path / "b" / "deep"))
    (tmp_path / "a" / "0.png").unlink()
    os.mkfifo(tmp_path / "a" / "x.png")  # which would be read for ever
    with pytest.raises(UserError, match=r"no images in these classes of .*: a \(left out 7 files"):
        Folder(str(tmp_path))


def test_heic_is_read_with_its_extra(tmp_path):
    pytest.importorskip("pillow_heif")
    save(tmp_path / "x.heic", (16, 16), 200)
    assert decode.pixels(Folder(str(tmp_path))[0][0], RGB)[..., 0].mean() > 150


def test_links_that_lead_nowhere_are_listed_and_named_when_they_are_read(images):
    os.symlink(images / "gone", images / "train" / "ant" / "0.png")
    os.symlink("self.png", images / "train" / "ant" / "self.png")
    source = Folder(str(images / "train"))
    assert len(source) == 23
    assert source.identity.images == 23
    with pytest.raises(OSError, match="No such file"):
        source[0]


def test_the_working_folder_itself_may_hold_the_images(images, monkeypatch):
    monkeypatch.chdir(images / "train" / "ant")
    source = sources.make(data_section(path=".", train_split="."), "train", 3)
    assert source.name(0) == str(images / "train" / "ant" / "00.png")
    assert decode.pixels(source[3][0], RGB)[0, 0, 0] == 30


def test_a_bucket_is_listed_at_once_and_read_through_etils(images, monkeypatch):
    kind, root = type(epath.Path("gs://bucket/x")), images / "train"
    local = Folder(str(root))
    same = local.identity.content
    storage = fsspec.filesystem("memory", skip_instance_cache=True)
    monkeypatch.setattr(type(storage), "store", {})
    storage.put(str(root), "/bucket/train", recursive=True)
    storage.pipe("/bucket/train/.hidden/x.png", b"")
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda url: (storage, url.removeprefix("gs:/").rstrip("/"))
    )
    monkeypatch.setattr(
        kind, "read_bytes", lambda self: storage.cat(os.fspath(self).removeprefix("gs:/"))
    )
    source = sources.splits(data_section(path="gs://bucket"), ("train",), 3)["train"]
    assert (source.classes, len(source)) == (["ant", "bee"], 21)
    assert source.labels.tolist() == local.labels.tolist()
    assert source.identity.content == same
    assert source.name(20) == "gs://bucket/train/bee/deep/er/99.JPG"
    assert decode.pixels(source[3][0], RGB).shape == (12, 7, 3)
    png = storage.cat("/bucket/train/ant/00.png")
    storage.pipe("/bucket/train/ant/00.png", png[:-1] + b"x")  # of the same size
    assert Folder("gs://bucket/train/").identity.content != same
    with pytest.raises(UserError, match="there is no folder 'gs://bucket/val'"):
        Folder("gs://bucket/val")


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
