"""Shards: tars and parquet files, on a disk and on a bucket."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from ml_collections import ConfigDict
from pyarrow import parquet as pq

from maect_jax import config as configs
from maect_jax import pipeline
from maect_jax.data import decode, loader, shard_files, sources, subsets, tars
from maect_jax.data.base import AbsentError
from maect_jax.data.folder import Folder
from maect_jax.data.transforms import Crops
from maect_jax.errors import RunFailedError, UserError
from tests.helpers import CONFIGS
from tests.helpers.common import run_on
from tests.helpers.shards import members_of, parquet, tar

RGB = decode.Decoding(3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of the indexes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    return tmp_path / "kept" / "maect_jax" / "shards"


def opened(path, splits=("train",), **changes):
    base = dict(source="shards", path=str(path), train_split="train", val_split="val")
    base |= dict(labels="auto", label_key="label", range=(), max_pixels=10**6)
    return sources.splits(ConfigDict(base | changes), splits, 3)


def contents(members):
    return [content for name, content in members.items() if name.endswith(".png")]


@pytest.fixture
def shards(tmp_path):
    """Three shards of four images, whose labels are 0 to 2, and one that is held out."""
    for i in range(3):
        tar(tmp_path / "set" / f"train-{i:03}.tar", members_of(tmp_path, [0, 1, 2, 0], 4 * i))
    tar(tmp_path / "set" / "val-0.tar", members_of(tmp_path, [2, 1], 12))
    return tmp_path / "set"


@pytest.mark.parametrize("path", ["", "train-{000..002}.tar", "train-*.tar", "train-00{0,1,2}.tar"])
def test_images_of_tars_are_read_at_random(shards, tmp_path, path):
    found = opened(shards / path, sources.SPLITS)
    assert found["train"].name(0)
    state = pickle.dumps(found["train"])
    assert b"a/005.png" not in state  # a worker process reads the index
    source = pickle.loads(state)
    assert source.classes == []
    assert source.labels.tolist() == [0, 1, 2, 0] * 3
    expected = contents(members_of(tmp_path, [None] * 12))
    for record in (11, 0, 5, 4):
        assert source[record] == (expected[record], source.labels[record])
    assert source.name(5) == str(shards / "train-001.tar" / "a" / "005.png")
    assert found["val"].labels.tolist() == [2, 1]
    assert found["val"].name(0) == str(shards / "val-0.tar" / "a" / "012.png")


@pytest.mark.parametrize(
    ("pattern", "patterns"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{a,b{0..1}}-{,x}", ["a-", "a-x", "b0-", "b0-x", "b1-", "b1-x"]),
        ("{a}/{0..0}", ["{a}/0"]),
    ],
)
def test_braces_stand_for_what_they_do_in_a_shell(pattern, patterns):
    assert shard_files.expanded(pattern) == patterns


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_give_the_batches_of_the_same_files_in_a_folder(tmp_path, kind):
    """In the same order, with the same crops: an order is of record numbers."""
    for i in range(2):
        members = members_of(tmp_path, [i] * 5, 5 * i)
        for name, content in members.items():
            path = tmp_path / "files" / "train" / str(i) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        {"tar": tar, "parquet": parquet}[kind](tmp_path / "set" / f"train-{i}.{kind}", members)
    order = loader.Order(10, 4, 5, (0, 1), range(4))
    batches = []
    for source in (opened(tmp_path / "set")["train"], Folder(str(tmp_path / "files" / "train"))):
        make = loader.TrainRecord(source, RGB, (Crops((6, 6), (0.2, 1.0), 2),), (0, 1))
        batches.append(list(loader.train_batches(order, make, 0)))
    for ours, theirs in zip(*batches, strict=True):
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])


LABELS = {
    "names": ({"cls": ["b", "a", "b"]}, ["a", "b"], [1, 0, 1]),
    "json numbers": ({"json": ['{"label": 3}', '{"label": 0}', '{"label": 1}']}, [], [3, 0, 1]),
    "json names": ({"json": ['{"label": "x"}', '{"label": "y"}', '"x"']}, ["x", "y"], [0, 1, 0]),
    "text": ({"txt": ["2\n", " 1", "0"]}, [], [2, 1, 0]),
    "cls first": ({"txt": ["of", "any", "kind"], "cls": ["1", "0", "1"]}, [], [1, 0, 1]),
    "json null": ({"json": ['{"label": null}'] * 3}, [], [-1] * 3),
    "json without": ({"json": ["{}"] * 3, "txt": ["1", "0", "1"]}, [], [1, 0, 1]),
    "-1": ({"cls": ["-1"] * 3}, [], [-1] * 3),
    "none": ({}, [], [-1] * 3),
}


@pytest.mark.parametrize(("texts", "classes", "labels"), LABELS.values(), ids=LABELS)
def test_labels_of_tars(tmp_path, texts, classes, labels):
    members = members_of(tmp_path, [None] * 3)
    for ending, values in texts.items():
        members |= {f"a/{i:03}.{ending}": value.encode() for i, value in enumerate(values)}
    tar(tmp_path / "train.tar", members)
    source = opened(tmp_path)["train"]
    assert (source.classes, source.labels.tolist()) == (classes, labels)
    assert source.labelled == (-1 not in labels)
    assert not opened(tmp_path, labels="none")["train"].labelled


def test_other_keys_of_labels(tmp_path):
    members = members_of(tmp_path, [None] * 2)
    members |= {f"a/00{i}.json": b'{"label": [1, 2], "kind": %d}' % i for i in range(2)}
    tar(tmp_path / "train.tar", members)
    assert opened(tmp_path, label_key="kind")["train"].labels.tolist() == [0, 1]
    assert not opened(tmp_path, labels="none")["train"].labelled
    with pytest.raises(UserError, match=r"label_key='label' is \[1, 2\]"):
        opened(tmp_path)
    columns = dict(label=None, fine=[3, 4])
    parquet(tmp_path / "p" / "train-0.parquet", members_of(tmp_path, [0, 0]), **columns)
    assert opened(tmp_path / "p", label_key="fine")["train"].labels.tolist() == [3, 4]
    assert not opened(tmp_path / "p")["train"].labelled


LABEL_COLUMNS = {
    "dictionary": (pa.array(["y", "x"]).dictionary_encode(), ["x", "y"], [1, 0]),
    "view": (pa.array(["y", "x"], pa.string_view()), ["x", "y"], [1, 0]),
    "small": (pa.array([3, 0], pa.uint8()), [], [3, 0]),
    "null": (pa.nulls(2), [], [-1, -1]),
    "none": (None, [], [-1, -1]),
}


@pytest.mark.parametrize(("column", "classes", "labels"), LABEL_COLUMNS.values(), ids=LABEL_COLUMNS)
def test_kinds_of_columns_in_parquet(tmp_path, column, classes, labels):
    """What other libraries write, and features that HuggingFace describes by a list."""
    images = pa.array(contents(members_of(tmp_path, [None] * 2)), pa.binary_view())
    table = pa.table({"image": images, "tags": [[1], [2]]})
    table = table if column is None else table.append_column("label", column)
    about = json.dumps({"info": {"features": {"tags": [{"dtype": "int64", "_type": "Value"}]}}})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": about}), tmp_path / "train.parquet"
    )
    source = opened(tmp_path)["train"]
    assert (source.classes, source.labels.tolist()) == (classes, labels)
    assert source[1][0] == images[1].as_py()


def test_names_of_classes_in_parquet_and_those_of_training_number_all(tmp_path):
    """The file names a class that has no image; held-out images may be numbered otherwise."""
    names = ["tench", "ant", "bee"]
    for i, labels in enumerate(([0, 1], [1, 0, 1])):
        name = f"train-0000{i}-of-00002.parquet"
        parquet(tmp_path / "data" / name, members_of(tmp_path, labels, 2 * i), names)
    held_out = members_of(tmp_path, [0, 1, -1], 5)
    parquet(tmp_path / "data" / "test.parquet", held_out, ["bee", "ant", "cow"])
    with pytest.raises(
        UserError, match=r"1 of 3 images have no label, such as .*test\.parquet/a/007"
    ):
        opened(tmp_path / "data", sources.SPLITS, val_split="test")
    del held_out["a/007.png"], held_out["a/007.cls"]
    parquet(tmp_path / "data" / "test.parquet", held_out, ["bee", "ant", "cow"])
    found = opened(tmp_path / "data", sources.SPLITS, val_split="test")
    for source in found.values():
        assert source.classes == names
    assert found["train"].labels.tolist() == [0, 1, 1, 0, 1]
    assert found["val"].labels.tolist() == [2, 1]
    assert found["val"][0] == (held_out["a/005.png"], 2)
    unlabelled = members_of(tmp_path, [-1], 5)
    parquet(tmp_path / "data" / "test.parquet", unlabelled, names)
    found = opened(tmp_path / "data", sources.SPLITS, val_split="test")["val"]
    assert (found.classes, found.labels.tolist()) == ([], [-1])
    parquet(tmp_path / "data" / "test.parquet", held_out)
    with pytest.raises(UserError, match="labels of train are names, those of val numbers"):
        opened(tmp_path / "data", sources.SPLITS, val_split="test")
    parquet(tmp_path / "data" / "test.parquet", held_out, ["cow", "bee"])
    with pytest.raises(UserError, match="val has classes that the training images lack: cow"):
        opened(tmp_path / "data", sources.SPLITS, val_split="test")
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", held_out, ["ant", "bee"])
    with pytest.raises(UserError, match="different names of classes"):
        opened(tmp_path / "data")


def test_forms_of_images_in_parquet(tmp_path):
    """Plain bytes; a path that is not unique or absent; a row without an image, which is bad."""
    first, second = contents(members_of(tmp_path, [None] * 2))
    pq.write_table(pa.table({"label": [1, 0], "img": [first, second]}), tmp_path / "train.parquet")
    source = opened(tmp_path)["train"]
    assert [source[1], source[0]] == [(second, 0), (first, 1)]
    assert source.name(1) == str(tmp_path / "train.parquet" / "1")
    rows = [{"bytes": first, "path": "x.png"}, {"bytes": second, "path": "x.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    assert opened(tmp_path)["train"].name(0) == str(tmp_path / "train.parquet" / "0")
    rows = [{"bytes": first, "path": "x.png"}, None, {"bytes": second, "path": "y.png"}]
    pq.write_table(pa.table({"image": rows, "mask": [b""] * 3}), tmp_path / "train.parquet")
    source = opened(tmp_path)["train"]
    assert [source[0][0], source[2][0]] == [first, second]
    assert source.name(2) == str(tmp_path / "train.parquet" / "2")
    record = loader.EvalRecord(source, RGB, (4, 4), 4)
    assert [int(record(i)["bad"]) for i in range(3)] == [-1, 1, -1]


def test_long_and_unusual_names_in_tars(tmp_path, caplog):
    png = contents(members_of(tmp_path, [None]))[0]
    names = [f"./{'d' * 120}/x.png", "a.b/caf\udce9.PNG", f"a.b/{'z' * 99}é.png"]
    others = [
        f"{'d' * 120}/x.npy",
        "README",
        ".hidden.png",
        "a.b/._x.png",
        "x.seg.png",
        "a.b/notes.md",
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "train.tar", "w", format=form) as file:
            file.addfile(_folder("a.b"))
            for name in names + others:
                about = tarfile.TarInfo(name)
                about.size, about.mtime = len(png), 1.5
                file.addfile(about, io.BytesIO(png))
        source = opened(tmp_path)["train"]
        left_out = "left out 3 files: 1 without an ending, 1 .md, 1 .seg.png"
        assert caplog.messages[-1] == f"{tmp_path}: {left_out}"
        expected = [f"{tmp_path}/train.tar/{name.removeprefix('./')}" for name in names]
        assert [source.name(i) for i in range(len(source))] == expected
        assert source[2] == (png, -1)


def _folder(name):
    about = tarfile.TarInfo(name)
    about.type = tarfile.DIRTYPE
    return about


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def _link(path, _):
    with tarfile.open(path, "w") as file:
        about = tarfile.TarInfo("a/0.png")
        about.type, about.linkname = tarfile.LNKTYPE, "a/1.png"
        file.addfile(about)


def _extra(**members):
    named = {name.replace("_", "."): content for name, content in members.items()}
    return lambda path, rest: tar(path, rest | named)


BAD_TARS = {
    "cut in an image": (lambda p, _: _cut(p, 520), r"is cut off at byte 520: a/000\.png takes"),
    "cut in a header": (lambda p, _: _cut(p, 2100), r"at byte 2048: truncated header"),
    "no end": (lambda p, _: _cut(p, 2048), r"cut off at byte 2048: the mark of its end"),
    "damaged": (lambda p, _: p.write_bytes(b"x" * 2048), "damaged at byte 0: "),
    "empty file": (lambda p, _: p.write_bytes(b""), "cut off at byte 0"),
    "joined": (lambda p, _: p.write_bytes(p.read_bytes() * 2), r"after its end at byte \d+"),
    "gzip": (lambda p, _: p.write_bytes(b"\x1f\x8b" + b"x" * 2048), r"compressed \(gzip\)"),
    "no sample": (lambda p, _: tar(p, {}), "has no images$"),
    "dots": (lambda p, _: tar(p, {"0.5.png": b""}), r"has no images; has 1 file: 1 \.5\.png"),
    "no image": (_extra(b_cls=b"1"), "sample 'b' has no image"),
    "two images": (_extra(b_png=b"", b_JPG=b""), r"'b' has two images, b\.png and b\.JPG"),
    "link": (_link, r"a/0\.png is a link"),
    "no json": (_extra(b_png=b"", b_json=b"{"), "sample 'b': its .json is none"),
    "fraction": (_extra(b_png=b"", b_json=b'{"label": 0.5}'), r"label_key='label' is 0\.5"),
    "some without": (
        _extra(b_png=b""),
        r"1 of 5 images have no label, such as .*train\.tar/b\.png",
    ),
    "names and numbers": (
        _extra(b_png=b"", b_cls=b"n/a"),
        r"labels are names \(n/a\), some are numbers \(0, 1\)",
    ),
    "below 0": (_extra(b_png=b"", b_cls=b"-2"), r"must be from 0 to 1,048,576, or -1: -2"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TARS.values(), ids=BAD_TARS)
def test_a_bad_tar_is_one_clear_error(tmp_path, cache, change, message):
    members = members_of(tmp_path, [0, 1, 0, 1])
    path = tar(tmp_path / "train.tar", members)
    change(path, members)
    with pytest.raises(UserError, match=rf"^config\.data\.path: .*{message}") as raised:
        opened(tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert not list(cache.glob("*.tmp"))
    assert not list(cache.iterdir()) or "label" in message or "-1: -2" in message


def test_captions_are_no_classes(tmp_path):
    texts = [f"a photo of {i}" for i in range(101)]
    members = {f"{i:03}.png": b"" for i in range(101)}
    tar(tmp_path / "train.tar", members | {f"{i:03}.txt": x.encode() for i, x in enumerate(texts)})
    with pytest.raises(UserError, match=r"101 different labels of 101 images, .*are no classes"):
        opened(tmp_path)
    assert len(opened(tmp_path, labels="none")["train"]) == 101


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PATHS = pa.array([{"bytes": None, "path": "x.png"}], IMAGE)
BAD_PARQUET = {
    "no image": ({"label": [1]}, r"has no column of images; .*label \(int64\)"),
    "two": ({"a": [b""], "b": [b""]}, r"several columns of bytes, a, b; expected `image`"),
    "paths": ({"image": PATHS}, r"path of an image, 'x\.png'"),
    "text": ({"image": ["x.png"]}, "has no column of images"),
    "labels": ({"image": [b""], "label": [[1]]}, r"'label' is list<.*must be integers or names"),
    "no rows": ({"image": pa.array([], pa.binary())}, "has no images"),
}


@pytest.mark.parametrize(("columns", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_bad_parquet_is_one_clear_error(tmp_path, cache, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=rf"train\.parquet: .*{message}"):
        opened(tmp_path)
    assert list(cache.iterdir()) == []


def test_parquet_is_unpacked_once_whatever_its_labels_are(tmp_path, cache, monkeypatch):
    members = members_of(tmp_path, [0, 1])
    parquet(tmp_path / "train.parquet", members, other=[1, 1])
    opened(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        source = opened(tmp_path, labels="none")["train"]
    assert source[1] == (contents(members)[1], -1)
    images = list(cache.glob("*/images"))
    assert len(images) == 2
    assert images[0].samefile(images[1])
    monkeypatch.setattr(os, "link", lambda *_: os.open("", 0))  # where there are no links
    assert opened(tmp_path, label_key="other")["train"][0][0] == contents(members)[0]


def test_damaged_parquet_and_labels_that_have_another_name(tmp_path, cache):
    path = parquet(tmp_path / "train.parquet", members_of(tmp_path, [0, 1]), ["a", "b"])
    with pytest.raises(UserError, match=r"set config\.data\.label_key to one of its labels: label"):
        opened(tmp_path, label_key="kind")
    for size in (0, 100, path.stat().st_size - 1):
        _cut(path, size)
        with pytest.raises(UserError, match=r"^config\.data\.path: .*train\.parquet: "):
            opened(tmp_path)
    path.write_bytes(b"PAR1" + b"x" * 600 + b"PAR1")
    with pytest.raises(UserError, match=r"^config\.data\.path: .*train\.parquet: "):
        opened(tmp_path)
    assert list(cache.iterdir()) == []


ABSENT = {
    "nothing": ("x-*.tar", AbsentError, r"no shard matches '.*x-\*\.tar'; '.*set' has train-000"),
    "no folder": ("x/train-{0..3}.tar", AbsentError, "no shard matches .*no folder '.*x'"),
    "a gap": ("train-{000..003}.tar", UserError, r"no shard matches .*train-003\.tar; others are"),
    "backwards": ("train-{3..0}.tar", UserError, r"\{3\.\.0\} in .*: must be a range upwards"),
    "compressed": ("train-{000..003}.tar.gz", UserError, "compressed tars .*Decompress them once"),
}


@pytest.mark.parametrize(("path", "kind", "message"), ABSENT.values(), ids=ABSENT)
def test_absent_shards_are_one_clear_error(shards, path, kind, message):
    with pytest.raises(UserError, match=message) as raised:
        opened(shards / path)
    assert type(raised.value) is kind


def test_no_shard_is_left_out_or_in_two_splits_in_silence(shards):
    with pytest.raises(UserError, match=r"shards of val are trained on as well: .*val-0\.tar"):
        opened(shards / "*.tar", sources.SPLITS)
    (shards / "train-003.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot list .*: .*train-003\.tar"):
        opened(shards)


def test_gaps_in_numbers_and_names_that_may_mean_several(shards, tmp_path, caplog):
    (shards / "train-001.tar").unlink()
    assert len(opened(shards)["train"]) == 8
    assert caplog.messages == [
        f"{shards}/train-*.tar: by their numbers 1 of 3 shards are absent: train-001.tar"
    ]
    shutil.copy(shards / "train-000.tar", shards / "train.tar")
    with pytest.raises(
        UserError, match=r"train' may be any of .*train\.tar, .*train-\*\.tar; name"
    ):
        opened(shards)
    parquet(tmp_path / "of" / "train-00000-of-00002.parquet", members_of(tmp_path, [0, 1]))
    with pytest.raises(UserError, match=r"1 of 2 shards are absent: train-00001-of-00002\.parquet"):
        opened(tmp_path / "of")
    assert len(opened(tmp_path / "of" / "train-{00000..00000}-of-00002.parquet")["train"]) == 2
    compressed = tmp_path / "gz" / "train-0.tar.gz"
    compressed.parent.mkdir()
    compressed.touch()
    with pytest.raises(AbsentError, match=r"gz' has train-0\.tar\.gz\. Decompress"):
        opened(tmp_path / "gz")


def test_shards_that_are_read_hold_no_file_open(shards):
    """A set may have more shards than a process may open files, often 1,024."""
    before = os.listdir("/proc/self/fd")
    source = opened(shards)["train"]
    assert [source[record][1] for record in range(12)] == source.labels.tolist()
    assert os.listdir("/proc/self/fd") == before


def test_an_index_is_made_once_and_anew_for_a_changed_shard(shards, monkeypatch, tmp_path, capsys):
    read, made = tars.listing, []
    monkeypatch.setattr(
        tars, "listing", lambda f, *x: made.append(os.path.basename(f.name)) or read(f, *x)
    )
    opened(shards)
    assert sorted(made) == [f"train-00{i}.tar" for i in range(3)]
    assert capsys.readouterr().out.startswith("3 of 3 shards are indexed once, in ")
    opened(shards)
    assert len(made) == 3
    assert capsys.readouterr().out == ""
    path = shards / "train-001.tar"
    times = path.stat().st_mtime_ns
    members = members_of(tmp_path, [2, 2, 2, 0], 4)
    tar(path, members)  # of the same size, and time
    os.utime(path, ns=(0, times))
    assert opened(shards)["train"].labels.tolist() == [0, 1, 2, 0, 2, 2, 2, 0, 0, 1, 2, 0]
    assert made[3:] == ["train-001.tar"]
    opened(shards, labels="none")
    assert len(made) == 7


def test_what_no_run_uses_is_removed(shards, cache):
    opened(shards)
    used = set(cache.iterdir())
    for name, days in {"old": 91, "recent": 89, "cut.tmp": 2, "draft.tmp": 0}.items():
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - days * 86400,) * 2)
    for folder in used:
        os.utime(folder, (0, 0))
    opened(shards)
    assert set(cache.iterdir()) == {*used, cache / "recent", cache / "draft.tmp"}


def test_images_are_what_their_shards_are(shards, tmp_path):
    """By name, size, label, time and content, wherever they are."""
    path = shards / "train-001.tar"
    first = opened(shards)["train"].identity
    shutil.copytree(shards, tmp_path / "copied")
    assert opened(tmp_path / "copied" / "train-{000..002}.tar")["train"].identity == first
    os.utime(path, ns=(0, 0))
    touched = opened(shards)["train"].identity
    assert (touched.content, touched.times != first.times) == (first.content, True)
    seen = {first.content}
    for change in (
        lambda: tar(path, members_of(tmp_path, [0, 1, 2, 1], 4)),
        lambda: tar(path, members_of(tmp_path, [1, 2, 3, 2], 4)),
        lambda: tar(path, {f"b{x}": y for x, y in members_of(tmp_path, [1, 2, 3, 2], 4).items()}),
        lambda: tar(path, members_of(tmp_path, [0, 1, 2, 1], 8)),
        lambda: tar(path, members_of(tmp_path, [0, 1, 2], 8)),
        lambda: path.rename(shards / "train-003.tar"),
    ):
        change()
        found = opened(shards)["train"].identity
        assert found.content not in seen
        seen.add(found.content)


def test_an_index_that_is_lost_is_one_clear_error(shards, cache):
    source = pickle.loads(pickle.dumps(opened(shards)["train"]))
    for rows in cache.glob("*/rows.npy"):
        rows.write_bytes(b"")
    with pytest.raises(RunFailedError, match="the index of a shard cannot be read"):
        source.name(0)
    with pytest.raises(RunFailedError, match=r"cannot be read \(.*\)\. Remove this folder"):
        opened(shards)
    for about in cache.glob("*/about.json"):
        about.parent.joinpath("rows.npy").unlink()
        about.write_text("{}")
    with pytest.raises(RunFailedError, match="the index of a shard cannot be read"):
        opened(shards)


@pytest.mark.parametrize("shorter", [False, True])
def test_a_shard_that_is_replaced_while_it_is_read_ends_the_run(shards, tmp_path, shorter):
    """Another image must not take an image's place, with its label."""
    source, path = opened(shards)["train"], shards / "train-001.tar"
    if shorter:
        _cut(path, 520)
    else:
        members = members_of(tmp_path, [0, 1, 2, 0], 20)
        tar(path, {f"x{name}": x for name, x in members.items()})
    record = loader.TrainRecord(source, RGB, (Crops((4, 4), (0.2, 1.0), 1),), (0,))
    assert record((0, 3))["bad"] == -1
    with pytest.raises(RunFailedError, match=r"train-001\.tar: was changed after it was indexed"):
        record((0, 4))
    with pytest.raises(RunFailedError):
        source[4]
    path.unlink()  # is one bad image after the other
    assert record((0, 4))["bad"] == 4


def test_lists_name_images_of_shards(shards, tmp_path):
    source = opened(shards)["train"]
    (tmp_path / "few.txt").write_text("007.png\na/000\ntrain-002.tar/a/010.png\n")
    found = subsets.select(source, str(tmp_path / "few.txt"), 0)
    assert found.records.tolist() == [7, 0, 10]
    assert found[0] == source[7]


def test_a_bucket_is_read_by_ranges(shards, tmp_path, monkeypatch):
    parquet(shards / "more-0.parquet", members_of(tmp_path, [0, 1], 20))
    storage = fsspec.filesystem("memory", skip_instance_cache=True)
    monkeypatch.setattr(type(storage), "store", {})
    storage.put(str(shards), "/bucket/set", recursive=True)
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda url: (storage, url.removeprefix("gs:/").rstrip("/"))
    )
    found, read = opened("gs://bucket/set", sources.SPLITS), []
    source, cat = found["train"], storage.cat_file
    assert (len(source), len(found["val"])) == (12, 2)
    assert source.name(5) == "gs://bucket/set/train-001.tar/a/005.png"
    monkeypatch.setattr(
        type(storage),
        "cat_file",
        lambda self, x, **y: read.append(y["end"] - y["start"]) or cat(x, **y),
    )
    png = source[5][0]
    assert read == [512 + len(png)]
    assert decode.pixels(png, RGB)[0, 0, 0] == 5
    assert len(opened("gs://bucket/set", train_split="more-*.parquet")["train"]) == 2
    content = source.identity.content
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    assert opened(shards)["train"].identity.content == content


def test_no_place_for_the_index_is_one_clear_error(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "val-0.tar"))
    with pytest.raises(UserError, match=r"cannot be kept: .*Set XDG_CACHE_HOME"):
        opened(shards)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    parquet(tmp_path / "p" / "train.parquet", members_of(tmp_path, [0, 1]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    assert opened(shards)
    with pytest.raises(UserError, match=r"unpacked there, .*GiB are free\. Set XDG_CACHE_HOME"):
        opened(tmp_path / "p")


def test_what_is_in_the_name_of_the_folder_is_meant_as_it_is(shards):
    shards.rename(shards.parent / "set [1]")
    assert len(opened(shards.parent / "set [1]")["train"]) == 12


def test_settings_that_cannot_be_meant(shards, monkeypatch):
    load = partial(configs.load, str(CONFIGS / "quickstart.py:test"))
    settings = ["data.source=shards", f"data.path={shards}/train-{{000..002}}.tar"]
    sources.check(load(settings))
    for key, value in (("train_split", "other"), ("label_key", "")):
        with pytest.raises(UserError, match=rf"^config\.data\.{key}='{value}': must be"):
            sources.check(load([*settings, f"data.{key}={value}"]))
    paths = [f"--config.data.path={shards}/train-00{i}.tar" for i in range(3)]
    monkeypatch.setattr(sys, "argv", ["maect", "--config=quickstart:test", *paths])
    with pytest.raises(UserError, match=r"data\.path is given 3 times.*quotes"):
        configs.from_command_line(configs.parser("x"))


def test_hosts_index_shards_before_they_meet(shards, cache, tmp_path):
    """Those that have met must not wait for another."""
    settings = ["data.source=shards", f"data.path={shards}/train-{{000..002}}.tar"]
    pipeline.fetch(configs.load(str(CONFIGS / "quickstart.py:test"), settings), tmp_path)
    assert len(list(cache.iterdir())) == 4
    settings[1] += "x"  # is an error of all hosts, when they have met
    pipeline.fetch(configs.load(str(CONFIGS / "quickstart.py:test"), settings), tmp_path)


def test_a_plan_needs_no_shards_but_none_may_be_missing(shards):
    def planned(path):
        settings = ["data.source=shards", f"data.path={shards}/{path}", "model.channels=3"]
        config = configs.load(str(CONFIGS / "quickstart.py:test"), settings)
        return pipeline.images_to_plan(config)[0]["train"]

    assert len(planned("x-{0..3}.tar")) == sources.IMAGENET_TRAIN
    assert len(planned("train-{000..002}.tar")) == 12
    with pytest.raises(UserError, match=r"no shard matches .*train-003\.tar"):
        planned("train-{000..003}.tar")


@pytest.mark.slow
def test_a_run_on_shards_is_that_on_the_same_files_in_a_folder(tmp_path, monkeypatch):
    """Training, all protocols, few images of a list, the cache and the report."""
    for split, count in (("train", 40), ("val", 20)):
        for label, kind in enumerate("ab"):
            members = members_of(tmp_path, [label] * (count // 2), 100 * label)
            parquet(tmp_path / "set" / f"{split}-{label}.parquet", members, ["a", "b"])
            for name, content in members.items():
                path = tmp_path / "files" / split / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    (tmp_path / "few.txt").write_text("001.png\n101.png\n002\n102\n")
    results = {}
    for source, folder in (("shards", "set"), ("folder", "files")):
        config = configs.load(
            str(CONFIGS / "quickstart.py:test"),
            [
                "stages=('mae','head','ct','eval')", f"data.source={source}", "mae.epochs=1",
                f"data.path={tmp_path / folder}", "data.cache=32", "monitor.every=0",
                *(f"{stage}.batch_size=8" for stage in ("mae", "head", "ct")),
                "head.queue_size=16", "ct.queue_size=16", "eval.knn.k=(1,)", "eval.map=pca",
                f"eval.lowshot.lists=('{tmp_path}/few.txt',)",
                "eval.protocols=('knn','probe','probe_augmented','lowshot','cluster')",
            ],
        )  # fmt: skip
        run_on(monkeypatch, (1, 1), config, tmp_path / source)
        scores = json.loads((tmp_path / source / "results.json").read_text())
        results[source] = {
            row: {x: of[x] for x in of if x not in ("made_with", "made_of", "seconds")}
            for row, of in scores.items()
        }
        assert (tmp_path / source / "report.html").exists()
        clusters = (tmp_path / source / "clusters.csv").read_text()
        first = {"shards": "set/val-0.parquet/a/000.png", "folder": "files/val/a/a/000.png"}[source]
        assert f"\n{tmp_path}/{first},a," in clusters
    assert results["shards"] == results["folder"]
