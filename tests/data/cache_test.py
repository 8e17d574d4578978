"""Images that are decoded once: their pixels, and what is kept of them, and where."""

import errno
import pickle
import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from maect_jax.data import cache, decode, loader
from maect_jax.data.cache import Reduced
from maect_jax.data.decode import Decoding
from maect_jax.data.folder import Folder
from maect_jax.data.loader import EvalRecord, Order, TrainRecord
from maect_jax.data.transforms import Crops
from maect_jax.errors import BadImageError, UserError
from tests.helpers.common import save

RGB = Decoding(3)


def photos(folder):
    """Six photographs of various shapes, in two classes, and one that is torn."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(20, 30), (40, 24), (8, 9), (64, 64), (16, 90), (33, 31)]):
        path = folder / f"{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "b/torn.png").write_bytes(b"torn")
    return Folder(str(folder))


def batches(source):
    """All fields of what training and an evaluation read, with a torn image among them."""
    make = TrainRecord(source, RGB, (Crops((8, 8), (0.5, 1.0), 2),), (0, 0))
    yield from loader.train_batches(Order(7, 7, 2, (0, 0), range(7)), make, workers=0)
    yield from loader.eval_batches(EvalRecord(source, RGB, (8, 8), 10), 4, 0, np.arange(4))


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)


def test_an_image_is_reduced_as_pillow_does_and_never_enlarged(tmp_path):
    source = photos(tmp_path / "train")
    small = Reduced(source, RGB, 16)
    for record, (shape, label) in enumerate(
        [((16, 24), 0), ((8, 9), 0), ((16, 90), 0), ((27, 16), 1), ((16, 16), 1), ((17, 16), 1)]
    ):
        pixels, found = small[record]
        assert (pixels.shape, found) == ((*shape, 3), label)
        whole = Image.fromarray(decode.pixels(source[record][0], RGB))
        want = np.asarray(whole.resize(shape[::-1], Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(pixels - want).mean() <= 1
    assert (small.identity, small.classes) == (source.identity, ["a", "b"])
    assert [small.name(i) for i in range(7)] == [source.name(i) for i in range(7)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_kept_is_read_once_and_gives_the_same_batches(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(cache, "_PART", 3)
    monkeypatch.setattr(cache, "_IN_MEMORY", 10**6 if in_memory else 10)
    source = photos(tmp_path / "train")
    want, torn = list(batches(Reduced(source, RGB, 16))), 6
    assert {b for batch in want for b in batch["bad"].tolist()} == {-1, torn}
    kept = [Reduced(source, RGB, 16) for _ in range(2)]
    kept[0].keep(tmp_path / "cache", "train")
    shutil.move(tmp_path / "train", tmp_path / "away")  # nothing is read from there any more
    kept[1].keep(tmp_path / "cache", "train")
    for small in kept:
        assert small.in_memory == in_memory
        # As a worker process gets it.
        received = small if in_memory else pickle.loads(pickle.dumps(small))
        got = list(batches(received))
        assert_same(got, want)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # It could not be read: whether it can be is asked again, and so is why.
    with pytest.raises(FileNotFoundError):
        kept[1][torn]
    shutil.move(tmp_path / "away", tmp_path / "train")
    with pytest.raises(BadImageError, match="cannot be identified"):
        kept[1][torn]
    save(tmp_path / "train" / "b" / "torn.png", (32, 32), 7)
    assert kept[1][torn][0].shape == (16, 16, 3)


class Labelled(Folder):
    """A folder whose labels are in its records, as in a prepared set."""

    reads_labels = True

    def __getitem__(self, record):
        return super().__getitem__(record)[0], record + 5


def test_labels_that_are_in_the_records_are_kept(tmp_path):
    photos(tmp_path / "train")
    small = Reduced(Labelled(str(tmp_path / "train")), RGB, 16)
    small.keep(tmp_path / "cache", "train")
    assert small.labels.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert small[3][1] == 8


def test_labels_are_numbered_by_the_classes_of_today(tmp_path):
    """The training images may have got another class, or none, since the file was written."""
    root, folder = str(tmp_path / "val"), tmp_path / "cache"
    photos(tmp_path / "val")
    Reduced(Folder(root), RGB, 16).keep(folder, "val")
    for labels in ([-1] * 7, [1, 1, 1, 2, 2, 2, 2]):
        source = Folder(root)
        source.labels = np.array(labels, np.int32)
        small = Reduced(source, RGB, 16)
        small.keep(folder, "val")
        assert [small[i][1] for i in range(6)] == labels[:6]
        assert small.labels.tolist() == labels
    assert len(list(folder.iterdir())) == 1


def test_other_images_or_settings_make_another_file(tmp_path):
    source = photos(tmp_path / "train")

    def files(*settings) -> int:
        Reduced(*settings).keep(tmp_path / "cache", "train")
        return len(list((tmp_path / "cache").iterdir()))

    made = [files(source, RGB, 16), files(source, RGB, 17), files(source, Decoding(1), 16)]
    save(tmp_path / "train" / "a" / "9.png", (32, 32), 7)
    made.append(files(Folder(str(tmp_path / "train")), RGB, 16))
    # The images that were may come back: what is of them stays.
    made.append(files(source, RGB, 16))
    assert made == [1, 2, 3, 4, 4]


class Interrupted(Folder):
    def __getitem__(self, record):
        if record == 4:
            raise KeyboardInterrupt
        return super().__getitem__(record)


def test_a_file_that_is_not_complete_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_PART", 2)
    source, folder = photos(tmp_path / "train"), tmp_path / "cache"
    interrupted = Interrupted(str(tmp_path / "train"))
    interrupted.identity = source.identity  # for which files are read as well
    with pytest.raises(KeyboardInterrupt):
        Reduced(interrupted, RGB, 16).keep(folder, "train")
    assert list(folder.iterdir()) == []
    small = Reduced(source, RGB, 16)
    small.keep(folder, "train")
    (path,) = folder.iterdir()
    killed = path.replace(path.with_suffix(".tmp"))
    killed.write_bytes(killed.read_bytes()[:-40])
    small.keep(folder, "train")
    assert list(folder.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=f"{path}: is damaged"):
        Reduced(source, RGB, 16).keep(folder, "train")


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    source, folder = photos(tmp_path / "train"), tmp_path / "cache"
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache, "_PART", 4)  # of 7 images
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(UserError, match=r"the other train images take .* free.* config.data.cache"):
        Reduced(source, RGB, 16).keep(folder, "train")
    assert list(folder.iterdir()) == []

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.files, "fsync", full)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**6))
    with pytest.raises(UserError, match=r"the disk is full.* 16 pixels of config.data.cache"):
        Reduced(source, RGB, 16).keep(folder, "train")
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written: .*exists"):
        Reduced(source, RGB, 16).keep(folder, "train")
