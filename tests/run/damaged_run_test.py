"""Runs with damaged files: one clear line says so, they are made again, or left as they are."""

import errno
import io
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import config as configs
from maect_jax import files, pipeline
from maect_jax.data import arrays
from maect_jax.evals import PROTOCOLS, features, runner
from maect_jax.report import build
from maect_jax.run import checkpoints, jsonl, lineage, manifest
from maect_jax.run.folder import Run
from tests.helpers.common import logger_at, mesh_of
from tests.helpers.fuzz import DEEP, load, one_line, refused

IMAGES = arrays.Arrays(
    np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8),
    np.arange(20) % 4,
    list("abcd"),
)
SPLITS = {"train": IMAGES, "val": IMAGES}


def extracted(first):
    """Features of the images, as an encoder would give them, in batches of five."""
    for start in range(5 * first, 20, 5):
        rows = np.arange(start, start + 5)
        yield np.stack([rows, rows**2, rows % 4], 1), rows % 4, np.ones(5, bool)


def made(run):
    """What a run of stage mae with an evaluation leaves, but for its checkpoints."""
    config = load("quickstart:test").to_dict()
    line = {"stage": "mae", "loss": 1.0, "images_per_second": 9.0, "seconds": 1.0}
    names = dict.fromkeys(["maect_jax", "jax", "python", "device_kind"], "x")
    numbers = dict.fromkeys(["devices", "hosts", "cpu_cores"], 1)
    features.store({run / "features" / "mae" / "val": {"of": 1}}, 20, 5, extracted)
    files.write_json(run / "config.json", config)
    files.write_json(run / "environment.json", names | numbers)
    files.write_json(run / "origin.json", {"from": [{"file": "x", "sha256": "y"}]})
    steps = "".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 2))
    files.write_text(run / "metrics.jsonl", steps)
    files.write_text(run / "bad_steps.jsonl", steps)
    knn = [{"k": 10, "accuracy": 0.5, "temperature": 0.1, "standardised": False}]
    row = {"features": "cls", "made_of": "x", "seconds": {"knn": 1.0}, "made_with": {}, "knn": knn}
    files.write_json(run / "results.json", {"mae": row})
    own = {"clusters": IMAGES.labels, "labels": IMAGES.labels, "distance": np.arange(20.0)}
    place = runner.folder_of(run, "mae")
    files.write_arrays(place / "cluster.npz", index=np.arange(20), **own)
    near = {"index": np.arange(3), "neighbours": np.zeros((3, 5), int)}
    files.write_arrays(place / "retrieval.npz", **near)
    files.write_arrays(run / "watch" / "head" / "2.npz", **near)
    filled = {"mask": np.zeros((3, 28, 28), bool), "filled": IMAGES.images[:3]}
    files.write_arrays(run / "watch" / "mae" / "2.npz", index=np.arange(3), **filled)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("fuzz") / "run")


def npz(**found):
    with io.BytesIO() as file:
        np.savez_compressed(file, **found)
        return file.getvalue()


def npy(found, allow_pickle=False):
    with io.BytesIO() as file:
        np.save(file, found, allow_pickle)
        return file.getvalue()


NO_TEXTS = [
    b"", b"[1]", b"5", b'"x"', b"null", b"{}", b'{"a": [1]}', DEEP.encode(), b"\xff\xfe\0", None,
    b'{"stage": "mae", "step": 1}\n', b'{"stage": [], "step": "x"}\n', b'{"from": [1]}',
    b'{"stage": "none", "step": 1, "loss": "x", "seconds": [], "images_per_second": "y"}\n',
    b'{"mae": {"knn": 5}}', b'{"mae": {"knn": [], "seconds": 5}}', b'{"mae": 5}', b'{"x.y": {}}',
    b'{"model": {}, "data": {}}', b'{"model": {}, "data": {}, "stages": ["mae"]}',
    b'{"settings": {"of": 1}, "images": 20, "done": -7}',
    b'{"settings": {"of": 1}, "images": 20, "done": "x"}',
]  # fmt: skip
NO_ARRAYS = [
    b"", b"PK no zip", DEEP.encode(), None, npz(x=np.arange(3)), npy(IMAGES.labels),
    npz(index=np.float64([1e30]), neighbours=np.int64([[99]])),
    npz(
        index=[0, 2**40], mask=np.zeros(2), filled=np.zeros(2), neighbours=[[2**40]] * 2,
        clusters=[-5] * 2, labels=[9] * 2, distance=["a"] * 2,
    ),
    npy(np.array([{}], object), allow_pickle=True), npy(np.zeros(20))[:60],
]  # fmt: skip
ALL = [
    "config.json", "environment.json", "origin.json", "results.json", "metrics.jsonl",
    "bad_steps.jsonl", "watch/mae/2.npz", "watch/head/2.npz", "features/mae/cluster.npz",
    "features/mae/retrieval.npz", "features/mae/val/settings.json", "features/mae/val/x.npy",
    "features/mae/val/labels.npy", "features/mae/val/valid.npy",
]  # fmt: skip


def put(path, content):
    """Bytes in the place of a file; or a folder, for `None`."""
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


def read_whole(run):
    """All that reads a run again: its report, its command, and runs that start from it."""
    config, place = load("quickstart:test"), run / "features" / "mae" / "val"
    for read in (
        lambda: build.report(run, SPLITS),
        lambda: configs.differences(configs.read(run / "config.json"), config),
        lambda: pipeline.check(configs.read(run / "config.json"), 1),
        lambda: lineage.write_lineage(run, [{"file": "x", "sha256": "y"}]),
        lambda: logger_at(run, 1, 9, stage="mae").close(),
        lambda: jsonl.truncate(run / "metrics.jsonl", "mae", 1),
        lambda: PROTOCOLS["cluster"].summarise(Run(config, run, None), ["mae"], SPLITS),
    ):
        with one_line():
            read()
    if not (place / "settings.json").is_dir():  # which ends a run as a disk does that is full
        features.store({place: {"of": 1}}, 20, 5, extracted)
        assert features.load(place).x.shape == (20, 3)


@pytest.mark.parametrize("name", ALL)
def test_a_file_with_other_content_is_one_line(run, tmp_path, name, monkeypatch):
    # The pictures are made, and not written: that takes the time.
    monkeypatch.setattr(build, "_save", lambda drawn, run: {})
    whole = (run / name).read_bytes()
    halves = [whole[: len(whole) // 2], whole[:-1], whole[:90] + b"\x07" + whole[91:]]
    beside = [path for path in (run / name).parent.iterdir() if path.is_file()]
    for lie in [*(NO_ARRAYS if name[-4:] in (".npz", ".npy") else NO_TEXTS), *halves]:
        other = tmp_path / "run"
        for path in {*beside, *(run / name for name in ALL[:4])}:
            copy = other / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        put(other / name, lie)
        read_whole(other)
        shutil.rmtree(other)


def test_a_whole_run_has_a_page(run):
    assert build.report(run, SPLITS).exists()


def odd(stage):
    """A stage's folder with unexpected content and no checkpoint."""
    stage.mkdir(parents=True)
    (stage / "7").write_text("a file")
    (stage / "8").symlink_to("nowhere")
    (stage / "5.removed").write_text("a file")
    (stage / "6.damaged").write_text("a file")
    kept = ("0006", "-3", "\u00b2", "9" * 30, "2024-01-01", "notes 1", "x")
    for name in kept:
        (stage / name).mkdir()
        (stage / name / "manifest.json").write_text("{}")
    return {*kept, "6.damaged"}


SHAPES = ["[]", "5", "{}", '{"files": 5}', '{"files": ["a"], "measured": [1]}', DEEP,
          '{"files": {}, "measured": {"knn_accuracy": "x"}}']  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_a_folder_with_odd_content_is_opened_and_saved_into(tmp_path, shape):
    stage = tmp_path / "checkpoints" / "mae"
    kept = odd(stage)
    (stage / "6").mkdir()
    (stage / "6" / "manifest.json").write_text(shape)
    assert checkpoints.steps_of(stage) == [6]
    assert manifest.measured(stage / "6") == {}
    with refused("is damaged"):
        checkpoints.read_parts(stage, ("x",), mesh_of(1, 1))
    (tmp_path / "config.json").write_text(json.dumps(load("quickstart:test").to_dict()))
    for name in ("", "checkpoints/mae/6", "checkpoints/mae/\u00b2", "checkpoints/mae/" + "9" * 99):
        with refused("damaged|there is no|no checkpoint"):
            lineage.find(str(tmp_path / name), "head").read(mesh_of(1, 1))
    saver = checkpoints.Checkpoints(stage, keep=1, best="knn_accuracy")
    assert saver.latest is None
    for step in (7, 9):
        saver.save(step, {"x": jnp.arange(3.0)}, {"steps": 9}, {"knn_accuracy": 0.5})
    saver.finish()
    saver.close()
    assert checkpoints.steps_of(stage) == [9]
    assert (stage / "6.damaged").is_dir()
    assert {path.name for path in stage.iterdir()} == kept | {"9"}


def test_a_file_for_a_folder_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load("quickstart:test").to_dict()))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mae").write_text("a file")
    with refused("no checkpoint yet"):
        lineage.find(str(tmp_path), "head")
    with pytest.raises(OSError, match="mae"):  # a run ends with it
        checkpoints.Checkpoints(tmp_path / "checkpoints" / "mae")


WRITES = {
    "text": lambda path: files.write_text(path, "new" * 10_000),
    "json": lambda path: files.write_json(path, {"new": "x" * 10_000}),
    "arrays": lambda path: files.write_arrays(path, new=np.random.default_rng(0).bytes(100_000)),
}


class Full(io.FileIO):
    """A file on a disk that has room for some bytes."""

    def write(self, data):
        if self.tell() + len(data) > 1000:
            super().write(bytes(data)[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_disk_that_is_full_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch, write):
    path = tmp_path / "file.x"
    path.write_text("old")

    def opened(self, mode="r", *_, **__):
        file = io.BufferedWriter(Full(str(self), "wb"))
        return io.TextIOWrapper(file) if "b" not in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", opened)
        patch.setattr(io, "open", lambda file, mode="r", *_, **__: opened(file, mode))
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.x"]


REFUSED = [
    "ct.epochs=" + "-" * 10_000 + "1", "model.depth=10000000", "data.workers=1000000",
    "model.image_size=(16380,16380)", "mae.epochs=1000000000",
]  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_refused_leaves_no_folder(tmp_path, override):
    with refused(override.partition("=")[0]):
        pipeline.run(load("quickstart:test", override), tmp_path / "run")
    assert not (tmp_path / "run").exists()
