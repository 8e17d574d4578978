"""Sources, geometry on the host, and the loader's order."""

import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from scipy import stats

from maect_jax.data import arrays, decode, loader, sources, transforms
from maect_jax.data.base import AbsentError
from maect_jax.data.folder import Folder
from maect_jax.data.loader import EvalRecord, Order, TrainRecord
from maect_jax.data.transforms import Crops
from maect_jax.errors import UserError
from tests.helpers.fuzz import only


def prepare(folder, name, version, features, sizes):
    """A prepared set of TFDS with red images of these sizes, written without TensorFlow."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    home = folder / name / version
    home.mkdir(parents=True)
    features.save_config(str(home))
    records = home / f"{name}-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(records), "group_size:1")
    for i, size in enumerate(sizes):
        png = io.BytesIO()
        Image.new("RGB", size, (10 * i, 0, 0)).save(png, "PNG")
        example = tf_example_pb2.Example()
        for key in features:
            example.features.feature[key].bytes_list.value.append(b"")
        example.features.feature["image"].bytes_list.value[0] = png.getvalue()
        example.features.feature["label"].int64_list.value.append(i % 3)
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "shardLengths": [str(len(sizes))],
        "numBytes": "1000",
    }
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": [split]}
    (home / "dataset_info.json").write_text(json.dumps(info | {"moduleName": name}))


@pytest.fixture
def prepared_tfds(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(num_classes=3)
    features = tfds.features.FeaturesDict({"image": image, "label": label})
    prepare(tmp_path, "tiny", "1.0.0", features, [(6, 4 + i) for i in range(5)])
    return tmp_path


def data_section(**changes):
    base = dict(source="tfds", path="", name="tiny", train_split="train", val_split="train")
    return ConfigDict(base | dict(labels="auto", range=(), max_pixels=10**6) | changes)


def test_tfds_is_read_without_tensorflow(prepared_tfds):
    source = sources.make(data_section(path=str(prepared_tfds)), "train", channels=3)
    assert len(source) == 5
    image, label = source[4]
    pixels = decode.pixels(image, decode.Decoding(3))
    assert (pixels.shape, pixels[0, 0, 0], label) == ((8, 6, 3), 40, 1)
    assert sources.make(data_section(path=str(prepared_tfds)), "val", 1)[0][1] == 0
    assert "tensorflow" not in sys.modules
    assert source.classes == ["0", "1", "2"]
    unlabelled = sources.make(data_section(path=str(prepared_tfds), labels="none"), "train", 3)
    assert (unlabelled[4][1], unlabelled.labelled, unlabelled.classes) == (-1, False, [])
    shutil.copytree(prepared_tfds, prepared_tfds / "copied")
    copied = sources.make(data_section(path=str(prepared_tfds / "copied")), "train", 3)
    assert copied.identity == source.identity  # with the times of its files
    section = data_section(path=str(prepared_tfds / "copied"), train_split="train[:3]")
    assert sources.make(section, "train", 3).identity.content != source.identity.content
    (shard,) = prepared_tfds.glob("tiny/*/*.array_record*")
    os.utime(shard, (0, 0))
    again = sources.make(data_section(path=str(prepared_tfds)), "train", 3).identity
    assert not again.difference(source.identity._asdict()).content
    shard.write_bytes(shard.read_bytes() + b"0")
    again = sources.make(data_section(path=str(prepared_tfds)), "train", 3).identity
    assert again.content != source.identity.content
    again = sources.make(data_section(path=str(prepared_tfds)), "train", 3)
    shard.unlink()
    with pytest.raises(UserError, match=r"config.data.name='tiny': .*array_record"):
        again.identity  # noqa: B018
    with pytest.raises(UserError, match=r"config.data.name='absent'.*tfds build") as error:
        sources.make(data_section(path=str(prepared_tfds), name="absent"), "train", 3)
    assert not isinstance(error.value, AbsentError)
    with pytest.raises(AbsentError, match="Unknown split 'val'"):
        sources.make(data_section(path=str(prepared_tfds), val_split="val"), "val", 3)


@pytest.mark.parametrize(("name", "shape"), [("cifar10", (32, 32, 3)), ("imagenet2012", None)])
def test_the_sets_of_the_configs_are_read_as_tfds_lays_them_out(tmp_path, name, shape):
    """With the features of their own builders; where all are of one shape, they travel whole."""
    import tensorflow_datasets as tfds

    info = tfds.builder(name, data_dir=str(tmp_path), file_format="array_record").info
    prepare(tmp_path, name, str(info.version), info.features, [(32, 32)] * 3)
    source = sources.make(data_section(path=str(tmp_path), name=name), "train", channels=3)
    assert (len(source), source.shape) == (3, shape)
    assert len(source.classes) == info.features["label"].num_classes
    example = TrainRecord(source, decode.Decoding(3), (Crops((8, 8), (0.2, 1.0), 2),), (0,))((0, 2))
    assert example["image"].shape == ((32, 32, 3) if shape else (2, 8, 8, 3))
    assert (example["label"], example["image"].max()) == (2, 20)


def test_random_crop_boxes_have_the_asked_area_and_ratio(rng):
    shape = (300, 400)
    boxes = [transforms.random_crop_box(rng, shape, (0.2, 1.0)) for _ in range(4000)]
    top, left, height, width = np.array(boxes).T
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, ratio = height * width / (300 * 400), width / height
    assert 0.198 < area.min() < 0.25
    assert 0.9 < area.max() <= 1
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    # Small crops always fit, so their log-ratio is uniform: mean 0, deviation log(16/9)/sqrt(12).
    small = np.log(ratio[area < 0.4])
    np.testing.assert_allclose([small.mean(), small.std()], [0, 0.166], atol=0.02)


@pytest.mark.parametrize(
    ("shape", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))]
)
def test_crop_that_never_fits_is_central(rng, shape, box):
    assert transforms.random_crop_box(rng, shape, (1.0, 1.0)) == box


def test_centre_crop():
    image = np.zeros((300, 600, 3), np.uint8)
    image[:, 300:] = 255
    crop = transforms.centre_crop(image, 256, (224, 224))
    assert crop.shape == (224, 224, 3)
    assert crop[:, :108].max() <= 20
    assert crop[:, 116:].min() >= 235
    assert transforms.centre_crop(image[:28, :28], 28, (28, 28)).shape == (28, 28, 3)
    assert transforms.centre_crop(image[:5, :2], 256, (224, 224)).shape == (224, 224, 3)


def positions_of(shape):
    """An image of a shape whose pixels say where they are."""
    rows, cols = np.indices(shape)
    return np.stack([rows % 256, cols % 256, rows // 256 * 16 + cols // 256], -1).astype(np.uint8)


@pytest.mark.parametrize(("side", "short_side"), [(28, 28), (7, 28), (14, 18), (13, 20)])
def test_a_square_crop_is_torchvisions_to_the_pixel(side, short_side):
    """Its rule: `Resize` gives the longer side int(short_side * longer / shorter), `CenterCrop`
    starts at round(difference / 2)."""
    for shape in itertools.product((1, 2, 13, 20, 28, 29, 31, 57), (3, 20, 28, 33, 51, 58)):
        image = positions_of(shape)
        rows, cols = (int(short_side * length / min(shape)) for length in shape)
        resized = transforms.crop_resize(image, (0, 0, *shape), (rows, cols))
        top, left = round((rows - side) / 2.0), round((cols - side) / 2.0)
        want = resized[top : top + side, left : left + side]
        got = transforms.centre_crop(image, short_side, (side, side))
        np.testing.assert_array_equal(got, want, err_msg=str(shape))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (30, 100), (96, 34)])
def test_a_crop_that_is_not_square_loses_only_what_its_aspect_excludes(size):
    height, width = size
    for factor in (1, 2, 3):  # of the model's aspect: all of the image
        image = positions_of((factor * height, factor * width))
        want = transforms.crop_resize(image, (0, 0, *image.shape[:2]), size)
        np.testing.assert_array_equal(transforms.centre_crop(image, min(size), size), want)
    tall, wide = positions_of((2 * height, width)), positions_of((height, 2 * width))
    for image, axis in ((tall, 0), (wide, 1)):  # all of one side, the centre of the other
        got = transforms.centre_crop(image, min(size), size)
        start = size[axis] // 2
        np.testing.assert_array_equal(got, np.take(image, range(start, start + size[axis]), axis))
    # A box twice as large: the centre of an image that is twice as large.
    image = positions_of((2 * height, 2 * width))
    got = transforms.centre_crop(image, 2 * min(size), size)
    top, left = height // 2, width // 2
    np.testing.assert_array_equal(got, image[top : top + height, left : left + width])


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32), (30, 100)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (20_000, 2), (2, 3000), (31, 17), (70, 65)])
def test_a_crop_of_an_image_of_any_shape_has_its_size(shape, size, monkeypatch):
    pixels, resize = [], transforms._resize

    def counted(image, target):
        pixels.append(math.prod(target))
        return resize(image, target)

    monkeypatch.setattr(transforms, "_resize", counted)
    image = np.full((*shape, 3), 77, np.uint8)
    for short_side in (min(size), min(size) + 5):
        got = transforms.centre_crop(image, short_side, size)
        assert got.shape == (*size, 3)
        assert (got == 77).all()
    assert max(pixels) < 10**6  # a line of 10,000 pixels does not become one of 10 million


def test_every_epoch_is_a_permutation_cut_to_whole_batches():
    order = Order(records=23, batch_size=5, steps=8, seed=(0, 1), rows=range(5))
    where = [order[i] for i in range(len(order))]
    assert len(where) == 40
    first, second = [r for e, r in where if e == 0], [r for e, r in where if e == 1]
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    other = Order(records=23, batch_size=5, steps=8, seed=(1, 1), rows=range(5))
    assert [other[i][1] for i in range(20)] != first


def test_processes_read_their_rows_of_the_same_global_batches():
    whole = Order(records=40, batch_size=8, steps=10, seed=(3, 0), rows=range(8))
    for rows in ((0, 1, 6, 7), (2, 3, 4, 5)):
        part = Order(40, 8, 10, (3, 0), rows)
        assert len(part) == 40
        for step in range(10):
            mine = [part[step * 4 + i] for i in range(4)]
            assert mine == [whole[step * 8 + row] for row in rows]


CROPS = (Crops((8, 8), (0.2, 1.0), 2), Crops((6, 4), (0.05, 0.25), 3))


def example_of(images):
    return TrainRecord(Folder(str(images / "train")), decode.Decoding(3), CROPS, (0, 2))


def assert_batches_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("workers", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_views_with_worker_processes_and_after_a_restart(images, workers):
    order = Order(records=21, batch_size=4, steps=10, seed=(0, 2), rows=range(4))
    batches = list(loader.train_batches(order, example_of(images), workers=0))
    assert len(batches) == 10
    assert batches[0]["image"].shape == (4, 2, 8, 8, 3)
    assert batches[0]["local"].shape == (4, 3, 6, 4, 3)
    later = dataclasses.replace(order, done=6)
    for again, number in ((later, workers), (later, 0)):
        rest = list(loader.train_batches(again, example_of(images), workers=number))
        for batch, expected in zip(rest, batches[6:], strict=True):
            assert_batches_equal(batch, expected)


def test_a_batch_of_arrays_is_what_its_records_are(rng):
    pixels = rng.integers(0, 256, (23, 5, 4, 3), dtype=np.uint8)
    source = arrays.Arrays(pixels, rng.integers(0, 9, 23), [])
    make = TrainRecord(source, decode.Decoding(3), (Crops((8, 8), (0.2, 1.0), 2),), (7, 2))
    order = Order(records=23, batch_size=6, steps=8, seed=(7, 2), rows=(1, 2, 5))
    batches = list(loader.train_batches(order, make, workers=2))
    assert len(batches) == 8
    for step, batch in enumerate(batches):
        examples = [make(order[3 * step + row]) for row in range(3)]
        expected = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
        assert_batches_equal(batch, expected)
        assert {k: x.dtype for k, x in batch.items()} == {k: x.dtype for k, x in expected.items()}
    state = loader.train_batches(order, make, workers=0)
    seeds = {tuple(seed) for batch in state for seed in batch["seed"].tolist()}
    assert len(seeds) == 24  # each of the eight steps' three images has its own


def test_views_differ_between_epochs_and_follow_the_record(images):
    example = example_of(images)
    one, again, later = example((0, 5)), example((0, 5)), example((1, 5))
    assert_batches_equal(one, again)
    assert not np.array_equal(one["seed"], later["seed"])
    assert one["index"] == later["index"] == 5
    assert not np.array_equal(one["image"][0], one["image"][1])


def test_crops_of_each_size_have_their_scale_and_boxes_of_their_own(monkeypatch, rng):
    source = only(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    make = TrainRecord(source, decode.Decoding(3), CROPS, (0,))
    alone = TrainRecord(source, decode.Decoding(3), CROPS[:1], (0,))
    example = make((0, 0))
    pixels = [example["image"], example["local"]]
    assert [(x.shape, x.dtype) for x in pixels] == [
        ((2, 8, 8, 3), "uint8"),
        ((3, 6, 4, 3), "uint8"),
    ]
    assert make.nbytes == sum(x.nbytes for x in pixels)
    drawn, crop_resize = {make: [], alone: []}, transforms.crop_resize

    def spied(image, box, size, shape):
        drawn[maker].append(box)
        return crop_resize(image, box, size, shape)

    monkeypatch.setattr(transforms, "crop_resize", spied)
    for maker in drawn:
        for epoch in range(400):
            maker((epoch, 0))
    boxes = np.array(drawn[make]).reshape(400, 5, 4)
    assert len(np.unique(boxes.reshape(-1, 4), axis=0)) > 1990  # no two views share their draws
    # Further sizes leave the first one's boxes as they are.
    np.testing.assert_array_equal(boxes[:, :2], np.array(drawn[alone]).reshape(400, 2, 4))
    area = boxes[:, 2:, 2:].prod(-1) / (300 * 400)
    assert stats.kstest(area.ravel(), "uniform", (0.05, 0.2)).pvalue > 1e-3


def test_a_smaller_image_has_enough_pixels_for_each_crop():
    boxes, sizes = [(0, 0, 100, 200), (5, 5, 40, 40)], [(50, 50), (8, 30)]
    assert transforms.min_scale(boxes, sizes) == 0.75
    assert transforms.min_scale(boxes, sizes[::-1]) == 1.0


def test_evaluation_sees_every_image_once(images):
    source = Folder(str(images / "train"))
    example = EvalRecord(source, decode.Decoding(3), (8, 8), 8)
    for processes in (1, 2):
        shares = np.arange(8).reshape(processes, -1)
        streams = [loader.eval_batches(example, 8, 0, share) for share in shares]
        rows = []
        for parts in zip(*streams, strict=True):
            for part in parts:
                assert part["image"].shape == (8 // processes, 8, 8, 3)
                keep = part["valid"]
                rows += list(zip(part["image"][keep], part["label"][keep], strict=True))
        assert len(rows) == 21
        for record, (image, label) in enumerate(rows):
            np.testing.assert_array_equal(image, example(record)["image"])
            assert label == source.labels[record]
