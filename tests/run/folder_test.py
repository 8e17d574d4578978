"""A run's folder: one run at a time, and what may change when it resumes."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maect_jax import config
from maect_jax.data.base import Identity
from maect_jax.errors import RunFailedError, UserError
from maect_jax.run import folder, lock
from tests.helpers import CONFIGS
from tests.helpers.common import mae_config, run_on


def config_with(*overrides):
    return config.load(str(CONFIGS / "quickstart.py:test"), overrides)


def opened(path, *overrides, images=None):
    return folder.opened(folder.Run(config_with(*overrides), path, None), None, images or {})


def claim(path, *overrides, images=None):
    with opened(path, *overrides, images=images):
        pass


def holder(path, **changes):
    """Writes a lock as another process would have."""
    (path / "lock").write_text(json.dumps(lock._this_process() | changes))


def test_a_second_run_is_refused_and_the_holder_named(tmp_path):
    run = tmp_path / "run"
    with opened(run) as current:
        before = (run / "config.json").read_text()
        with pytest.raises(UserError) as refused:
            claim(run, "log_every=3")
        expected = f"--workdir={run}: in use by process {os.getpid()} on {socket.gethostname()}"
        assert str(refused.value).startswith(expected)
        assert (run / "config.json").read_text() == before
        current.check_lock()
    assert {path.name for path in run.iterdir()} == {
        "config.json", "environment.json", "images.json", "origin.json",
    }  # fmt: skip
    claim(run)


@pytest.mark.parametrize("how", ["ended", "its number was given again"])
def test_the_lock_of_a_process_that_is_gone_is_stale(tmp_path, how):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    if how == "ended":
        holder(tmp_path, pid=process.pid)
    else:
        holder(tmp_path, started="1")
    claim(tmp_path)
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("other", ["host", "machine"])
def test_the_lock_of_another_machine_is_stale_after_a_minute(tmp_path, other):
    """Also of one of the same name, as two containers may have."""
    holder(tmp_path, **{other: "elsewhere"}, pid=1)
    with pytest.raises(UserError, match="in use by process 1 on "):
        claim(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}
    then = time.time() - 61
    os.utime(tmp_path / "lock", (then, then))
    claim(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_torn_lock_is_stale_after_a_minute(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(UserError, match="on unknown"):
        claim(tmp_path)
    then = time.time() - 61
    os.utime(tmp_path / "lock", (then, then))
    claim(tmp_path)


def test_a_lock_that_is_released_and_taken_meanwhile_is_left_alone(tmp_path, monkeypatch):
    holder(tmp_path)
    look, first = lock._holder, [True]
    monkeypatch.setattr(lock, "_holder", lambda path: None if first and first.pop() else look(path))
    with pytest.raises(UserError, match="in use by"):
        claim(tmp_path)
    assert (tmp_path / "lock").exists()


def test_a_lock_that_cannot_be_released_hides_nothing(tmp_path, monkeypatch):
    def away(path):
        raise OSError(errno.EIO, "Input/output error")

    def fail():
        with lock.held(tmp_path):
            monkeypatch.setattr(lock, "_holder", away)
            raise RunFailedError("the loss is not finite")

    with pytest.raises(RunFailedError, match="the loss is not finite"):
        fail()


def test_a_holder_touches_its_lock_and_notices_when_it_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_HEARTBEAT", 0.02)
    with lock.held(tmp_path) as check:
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
        check()
        holder(tmp_path, host="elsewhere")
        with pytest.raises(RunFailedError, match="another process has taken"):
            check()
    assert "elsewhere" in (tmp_path / "lock").read_text()  # it is not ours to remove


def test_a_harmless_change_is_logged_and_another_refused(tmp_path, caplog):
    claim(tmp_path)
    assert not caplog.text
    claim(tmp_path)
    assert not caplog.text
    harmless = (
        "log_every=3", "checkpoint.keep=5", "monitor.every=2", "nan_policy=skip", "remat=dots",
        "mesh.fsdp=1", "data.workers=1", "data.max_pixels=9", "debug_nans=True",
        "profile=(1,2)", "eval.pool=mean",
    )  # fmt: skip
    claim(tmp_path, *harmless)
    text = caplog.text
    assert f"{tmp_path}: resuming with changes: checkpoint.keep: 2 -> 5; " in text
    assert "; log_every: 10 -> 3; " in text
    assert "; eval.pool: '' -> 'mean'; " in text
    assert config.read(tmp_path / "config.json").log_every == 3
    environment = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps(environment | {"jax": "0.1"}))
    claim(tmp_path, *harmless)
    assert "resuming with changes: jax: '0.1' -> " in caplog.text
    before = (tmp_path / "config.json").read_text()
    changes = (
        "seed=1",
        "model.depth=2",
        "mae.base_lr=1.0",
        "mae.epochs=3",
        "name=other",
        "data.range=(0, 9)",
    )
    for change in (*changes, "data.path=other"):
        with pytest.raises(UserError) as refused:
            claim(tmp_path, *harmless, change)
        key, value = change.split("=")
        reason = re.fullmatch(
            r".*: holds another run \((.*)\)\. Use another .*", str(refused.value)
        )
        assert re.fullmatch(rf"{key}: .* -> '?{re.escape(value)}'?", reason[1])
    assert (tmp_path / "config.json").read_text() == before
    # Without its config it is not known what the checkpoints are of.
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="contains checkpoints but no config"):
        claim(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_same_images_may_be_elsewhere(tmp_path, caplog):
    images = {"train": Identity(9, "a", "b"), "val": Identity(2, "c", "d")}
    places = ("data.source=folder", "data.path=x", "data.train_split=y", "data.val_split=z")
    started = "init_from=/mnt/run"  # which may be spelled in another way as well
    claim(tmp_path, *places, started, images=images)
    # Also copied, which gives them other times, or without those that are held out.
    copied = {"train": Identity(9, "a", "B")}
    claim(tmp_path, "data.path=/mnt/x/", "data.train_split=.", f"{started}/", images=copied)
    assert config.read(tmp_path / "config.json").data.path == "/mnt/x/"
    assert not caplog.text
    other = copied | {"train": Identity(9, "A", "b")}
    # What changes before a stage begins is what the run is of.
    claim(tmp_path, "data.path=/mnt/x", "data.train_split=.", f"{started}/", images=other)
    claim(tmp_path, "data.path=y", "data.train_split=.", f"{started}/", images=other)
    claim(tmp_path, "data.path=y", "data.train_split=.", f"{started}/", images=copied)
    claim(tmp_path, "data.path=/mnt/x/", "data.train_split=.", f"{started}/", images=copied)
    (tmp_path / "checkpoints").mkdir()
    claim(
        tmp_path, "data.path=/mnt/./x", "data.train_split=.", f"{started}/", images=other
    )  # the same place
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError) as refused:
        claim(tmp_path, "data.path=x", "data.train_split=.", f"{started}/", images=other)
    reason = "(data.path: '/mnt/./x' -> 'x'; train: 9 images as before, but not the same)"
    assert f"holds another run {reason}" in str(refused.value)
    (tmp_path / "images.json").unlink()  # as version 0.1 left it
    claim(tmp_path, "data.path=/mnt/./x", "data.train_split=.", f"{started}/", images=other)
    assert not (tmp_path / "images.json").exists()  # it is not known what it was trained on
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds another run \(data\.path: '/mnt/./x' -> 'x'\)"):
        claim(tmp_path, "data.path=x", "data.train_split=.", f"{started}/", images=images)
    assert (tmp_path / "config.json").read_text() == before


def test_a_stage_goes_on_with_its_own_images_alone(tmp_path, monkeypatch, caplog):
    load, run, root = mae_config(tmp_path, epochs=2), tmp_path / "run", tmp_path / "train"

    def resumed(*settings):
        caplog.clear()
        run_on(monkeypatch, (1, 1), load(*settings), run, report=False)
        return [text for text in caplog.messages if "stage mae" in text or "/mae: " in text]

    assert resumed() == []
    os.utime(root / "00.png", ns=(0, 0))
    (line,) = resumed()  # it has ended
    assert line.startswith(f"{run}/checkpoints/mae: the images have changed since (the files have")
    shutil.rmtree(run / "checkpoints" / "mae" / "8")
    (line,) = resumed()  # from step 4
    assert line.startswith(f"{run}: stage mae, at step 4 of 8, goes on: the files have")
    tmp_path.joinpath("moved").symlink_to(tmp_path)
    moved = f"data.path={tmp_path}/moved/"
    assert resumed(moved) == []
    shutil.rmtree(run / "checkpoints" / "mae" / "8")
    noted = json.loads((run / "images.json").read_text())
    (root / "00.png").rename(root / "0.png")
    with pytest.raises(UserError, match=r"at step 4 of 8, .* \(40 images as before, but not the"):
        resumed(moved)
    (root / "0.png").unlink()
    with pytest.raises(UserError, match=r"at step 4 of 8, .* \(40 images before, 39 now\)"):
        resumed(moved)
    assert json.loads((run / "images.json").read_text()) == noted
    shutil.rmtree(run / "checkpoints" / "mae")
    shutil.copy(root / "01.png", root / "0.png")
    assert resumed() == []  # from step 0, with what there is
    now = json.loads((run / "images.json").read_text())
    assert now["train"] == now["mae"] != noted["mae"]


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_must_be_mounted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must be a folder"):
        claim(Path(name))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write there: .*Not a directory"):
        claim(tmp_path / "file" / "run")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"cannot write there: .*Read-only file system"):
        claim(tmp_path)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(UserError, match=re.escape("thesis.md")):
        claim(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.md"}


def test_a_start_that_was_cut_off_a_disk_and_logs_are_no_other_files(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    for name in ("log.txt", "nohup.out", "job.err", "run.log"):
        (tmp_path / name).touch()
    write, written = folder.files.write_json, []

    def cut_off(path, values):
        written.append(path.name)
        if path.name == "config.json":
            (tmp_path / "config.tmp").touch()
            raise KeyboardInterrupt
        write(path, values)

    monkeypatch.setattr(folder.files, "write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        claim(tmp_path)
    assert len(written) == 4
    monkeypatch.setattr(folder.files, "write_json", write)
    claim(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("override", "content", "same"),
    [
        ("seed=1", "x", True),
        ("log_every=7", "x", True),
        ("data.path=elsewhere", "x", True),
        ("seed=1", "y", False),
        ("mae.epochs=9", "x", False),
        ("eval.knn.k=3,", "x", False),
    ],
)
def test_runs_of_one_recipe_differ_in_nothing_that_counts_but_the_seed(
    tmp_path, override, content, same
):
    """Also where they start from such runs."""
    for name, key, images in (("a", "seed=0", "x"), ("b", override, content)):
        claim(tmp_path / name, key, images={"train": Identity(9, images)})
        claim(tmp_path / f"{name}_ct", f"init_from={name}", images={"train": Identity(9, "x")})
        entry = {"run": str(tmp_path / name), "stage": "mae"}
        (tmp_path / f"{name}_ct" / "origin.json").write_text(json.dumps({"from": [entry]}))
    recipes = {name: folder.recipe(tmp_path / name) for name in ("a", "b", "a_ct", "b_ct")}
    assert (recipes["a"] == recipes["b"]) == same
    assert (recipes["a_ct"] == recipes["b_ct"]) == same
    assert recipes["a"] != recipes["a_ct"]


def test_runs_from_other_files_are_of_other_recipes(tmp_path):
    claim(tmp_path, images={"train": Identity(9, "x")})
    recipes = []
    for digest in "ab":
        origin = {"from": [{"file": "mae.safetensors", "sha256": digest}]}
        (tmp_path / "origin.json").write_text(json.dumps(origin))
        recipes.append(folder.recipe(tmp_path))
    assert recipes[0] != recipes[1]
