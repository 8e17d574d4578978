"""Storage that is full, or away for a while, under a whole run."""

import errno
import itertools
import os
import subprocess

import jax
import numpy as np
import pytest

from maect_jax import files
from maect_jax.errors import RunFailedError
from maect_jax.run import checkpoints, jsonl, manifest
from tests.helpers.common import mae_config, mesh_of, run_on

QUICK = (0.05, 0.1, 0.1)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(checkpoints, "_PAUSES", QUICK)
    monkeypatch.setattr(files, "_PAUSES", QUICK)


@pytest.fixture
def load(tmp_path):
    return mae_config(tmp_path / "images", epochs=4)


def steps_told(run):
    return [line["step"] for line in jsonl.read(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2.5 MiB: two checkpoints, and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2560k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_loses_nothing(small_disk, load, monkeypatch, quick, caplog):
    run = small_disk / "run"
    with pytest.raises(RunFailedError) as failed:
        run_on(monkeypatch, (1, 1), load(), run, report=False)
    folder = checkpoints.stage_folder(run, "mae")
    last = checkpoints.steps_of(folder)[-1]
    assert "(No space left on device). The last" in str(failed.value)
    assert f" {folder / str(last)}. Run the same command to resume." in str(failed.value)
    assert "next try in" in caplog.text
    assert manifest.damage(folder / str(last)) is None
    assert last in (4, 8)
    # Somebody makes room, and the same command goes on.
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run_on(monkeypatch, (1, 1), load(), run, report=False)
    assert steps_told(run) == list(range(1, 17))
    assert checkpoints.steps_of(folder) == [12, 16]


def test_an_outage_is_waited_for_and_leaves_no_hole(tmp_path, load, monkeypatch, quick, caplog):
    """Each kind of file fails now and then, half written; the run is the same as without."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_on(monkeypatch, (1, 1), load(), whole, report=False)

    def flaky(work, half=None):
        calls = itertools.count()

        def write(*arguments, **settings):
            if next(calls) % 3 == 1:
                if half:
                    half(*arguments)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return work(*arguments, **settings)

        return write

    class File:
        def __init__(self, file):
            self._file = file
            self.write = flaky(file.write, lambda data: file.write(data[:7]))

        def __getattr__(self, name):
            return getattr(self._file, name)

    class Lines(jsonl.Writer):
        def __init__(self, path):
            super().__init__(path)
            self._file = File(self._file)

    monkeypatch.setattr(jsonl, "Writer", Lines)
    monkeypatch.setattr(manifest, "digests", flaky(manifest.digests))
    monkeypatch.setattr(
        files.np, "savez_compressed",
        flaky(np.savez_compressed, lambda file, **_: file.write(b"PK")),
    )  # fmt: skip
    run_on(monkeypatch, (1, 1), load(), run, report=False)
    for text in ("metrics.jsonl: cannot be written", "a checkpoint cannot be written"):
        assert text in caplog.text
    assert ".npz: cannot be written" in caplog.text
    losses = [
        [(line["step"], line["loss"]) for line in jsonl.read(r / "metrics.jsonl") if "loss" in line]
        for r in (whole, run)
    ]
    assert losses[0] == losses[1]
    parts = [
        checkpoints.read_parts(checkpoints.stage_folder(r, "mae"), ("params",), mesh_of(1, 1))
        for r in (whole, run)
    ]
    jax.tree.map(np.testing.assert_array_equal, *parts)
    assert {p.name for p in run.rglob("*.tmp")} == set()


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, on_disk, named = tmp_path / "a.json", [], []
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append(os.fstat(file).st_ino))
    rename = type(path).replace
    monkeypatch.setattr(
        type(path), "replace", lambda *names: named.append(list(on_disk)) or rename(*names)
    )
    files.write_json(path, {"a": 1})
    assert named == [[path.stat().st_ino]]


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path, monkeypatch, quick):
    path, tries = tmp_path / "results.json", []
    files.write_json(path, {"a": 1})

    def full(number):
        def write_bytes(self, content):
            tries.append(number)
            with self.open("wb") as file:
                file.write(content[:3])
            raise OSError(number, os.strerror(number))

        return write_bytes

    for number, count in ((errno.ENOSPC, 1), (errno.EIO, len(QUICK) + 1)):
        tries.clear()
        monkeypatch.setattr(type(path), "write_bytes", full(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            files.write_json(path, {"a": 2})
        assert len(tries) == count
        assert files.read_json(path) == {"a": 1}
        assert list(tmp_path.iterdir()) == [path]
