"""Checkpoints: damage is detected, what fails is tried again, the last good one stays."""

import errno
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maect_jax import sharding
from maect_jax.errors import RunFailedError, UserError
from maect_jax.run import checkpoints, manifest
from maect_jax.stages import STAGES, state
from tests.helpers import CONFIGS
from tests.helpers.common import assert_trees_equal, mesh_of

TINY = {"step": jnp.int32(3), "x": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(1)}


def open_at(folder, **settings):
    return checkpoints.Checkpoints(folder, **settings)


def save_all(saver, *steps, **measured):
    for step in steps:
        value = {"knn_accuracy": measured["best"][step]} if measured else {}
        saver.save(step, {**TINY, "step": jnp.int32(step)}, {"at": step}, value)
    saver.finish()
    saver.close()


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the steps 3 and 6."""
    folder = tmp_path_factory.mktemp("two") / "mae"
    save_all(open_at(folder), 3, 6)
    return folder


def damages(data):
    """Cut off in three places, lengthened, and with a bit flipped in each of some bytes."""
    yield from (data[:end] for end in (0, len(data) // 2, len(data) - 1))
    yield data + b"\0"
    places = np.random.default_rng(len(data)).choice(len(data), min(len(data), 40), replace=False)
    for n, place in enumerate(places):
        yield data[:place] + bytes([data[place] ^ 1 << n % 8]) + data[place + 1 :]


def test_every_truncation_and_bit_flip_of_every_file_is_seen(two, tmp_path):
    folder = tmp_path / "6"
    shutil.copytree(two / "6", folder)
    assert manifest.damage(folder) is None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {"manifest.json", "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} <= {
        path.name for path in paths
    }
    seen = 0
    for path in paths:
        data = path.read_bytes()
        for wrong in filter(lambda wrong: wrong != data, damages(data)):
            path.write_bytes(wrong)
            assert path.name in manifest.damage(folder).split(":")[0]
            seen += 1
        path.unlink()
        assert manifest.damage(folder) is not None
        path.write_bytes(data)
        seen += 1
    assert manifest.damage(folder) is None
    assert seen > 500
    (folder / "state" / "more").write_text("")
    assert manifest.damage(folder) == "state/more: is not in the manifest"


def unreadable(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_damaged_one_is_named_and_the_one_before_is_taken(two, tmp_path, caplog, monkeypatch):
    folder = checkpoints.stage_folder(tmp_path, "mae")
    shutil.copytree(two, folder)
    path = next((folder / "6" / "state" / "d").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"6: is damaged \(state/d/{path.name}: its bytes"):
        checkpoints.read_parts(folder, ("x",), mesh_of(1, 1))
    assert names(folder) == {"3", "6"}  # who only reads changes nothing
    # What cannot be read is not damaged: nothing is set aside.
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_digests", unreadable)
        with pytest.raises(RunFailedError, match=r"6: cannot be read \(.*Input/output error\)"):
            open_at(folder)
        with pytest.raises(UserError, match="6: is damaged"):
            checkpoints.read_parts(folder, ("x",), mesh_of(1, 1))
        patch.setattr(type(folder), "iterdir", unreadable)
        assert "cannot be read now (Input/output" in checkpoints.last_good(tmp_path, ["mae"])
    assert names(folder) == {"3", "6"}
    saver = open_at(folder)
    assert saver.latest == 3
    assert f"{folder / '6'} is damaged (state/d/{path.name}" in caplog.text
    assert "resuming from step 3" in caplog.text
    assert names(folder) == {"3", "6.damaged"}
    save_all(saver, 6)
    assert open_at(folder).latest == 6
    for step in ("3", "6"):
        (folder / step / "position" / "metadata").unlink()
    again = open_at(folder)
    assert again.latest is None
    assert "the stage starts again" in caplog.text
    again.close()


def test_what_was_cut_off_is_cleared_away(two, tmp_path, caplog):
    folder = tmp_path / "mae"
    shutil.copytree(two, folder)
    shutil.copytree(folder / "6", folder / "9")
    (folder / "9" / "manifest.json").unlink()  # renamed, but not sealed
    shutil.copytree(folder / "6", folder / "12.orbax-checkpoint-tmp")
    (folder / "0.removed").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert checkpoints.steps_of(folder) == [3, 6]
    open_at(folder).close()
    assert names(folder) == {"3", "6", "notes.txt"}
    assert caplog.text.count("removing incomplete checkpoint") == 3
    assert f"{folder / '9'}: removing" in caplog.text


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "mae"
    metadata = {}
    saver = open_at(folder, keep=2, best="knn_accuracy", on_saved=metadata.__setitem__)
    save_all(saver, 1, 2, 3, 4, 5, best=[0, 0.2, 0.9, 0.4, 0.3, 0.5])
    assert checkpoints.steps_of(folder) == [2, 4, 5]
    assert list(metadata) == [1, 2, 3, 4, 5]
    size = sum(path.stat().st_size for path in (folder / "5").rglob("*") if path.is_file())
    size -= (folder / "5" / "manifest.json").stat().st_size
    assert metadata[5]["checkpoint_bytes"] == size
    assert 0 < metadata[5]["checkpoint_waited"] <= metadata[5]["checkpoint_seconds"]
    # What a path names, for init_from and exports.
    run = tmp_path / "run"
    path = run / "checkpoints" / "mae" / "2"
    assert checkpoints.run_of(path) == (run, "mae", 2)
    assert checkpoints.run_of(run) == (run, None, None)
    # A manifest that cannot be read does not stop the next save.
    (folder / "2" / "manifest.json").write_text("{")
    save_all(open_at(folder, keep=1, best="knn_accuracy"), 6, best=[0] * 6 + [0.1])
    assert checkpoints.steps_of(folder) == [5, 6]


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A save whose hashing blocks holds nothing up until the next one, and counts only when it is
    done; the state may be given away at once."""
    gate, digests = threading.Event(), manifest.digests

    def slow(folder):
        assert gate.wait(30)
        return digests(folder)

    monkeypatch.setattr(manifest, "digests", slow)
    saver = open_at(tmp_path / "mae")
    give_away = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    values = {"x": jnp.arange(100_000.0)}
    saver.save(1, values, {})
    values = give_away(values)
    jax.block_until_ready(give_away(values))
    assert checkpoints.steps_of(tmp_path / "mae") == []
    gate.set()
    saver.finish()
    saver.close()
    found = checkpoints.read_parts(tmp_path / "mae", ("x",), mesh_of(1, 1))
    np.testing.assert_array_equal(found["x"], np.arange(100_000.0))


@pytest.mark.parametrize("at", ["seal", "orbax"])
def test_a_full_disk_is_waited_for_and_then_an_error(tmp_path, monkeypatch, caplog, at):
    folder, full = tmp_path / "mae", [False]
    saver = open_at(folder)
    saver.save(1, TINY, {"at": 1})
    saver.finish()
    holder, name = (manifest, "seal") if at == "seal" else (saver._writer, "save")
    work = getattr(holder, name)

    def write(*arguments, **settings):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return work(*arguments, **settings)

    monkeypatch.setattr(holder, name, write)
    monkeypatch.setattr(checkpoints, "_PAUSES", (0.05, 0.05, 0.05))
    full[0] = True
    for step in (2, 3):
        saver.save(step, TINY, {"at": step})
        while not saver.retry_due():
            pass
    text = f"{folder}: a checkpoint cannot be written (No space left on device); last saved step: 1"
    assert caplog.text.count(text) == 2
    assert checkpoints.steps_of(folder) == [1]
    full[0] = False  # somebody has made room
    saver.save(4, TINY, {"at": 4})
    saver.finish(4, TINY, {"at": 4})
    assert names(folder) == {"1", "4"}  # what a try has left takes no room
    assert not saver.retry_due()
    full[0] = True
    saver.save(5, TINY, {"at": 5})
    with pytest.raises(RunFailedError, match=r"mae: a checkpoint cannot be written \(No space"):
        saver.finish(5, TINY, {"at": 5})
    saver.close()
    assert checkpoints.steps_of(folder) == [1, 4]
    assert open_at(folder).latest == 4


def test_an_outage_of_a_bucket_is_waited_for(tmp_path, monkeypatch, caplog):
    """At the end of a stage, when no step comes any more; what was half written does not matter."""
    failures = iter([True, True, False])
    seal, room = manifest.seal, checkpoints.shutil.disk_usage

    def flaky(*arguments):
        if next(failures):
            raise OSError(errno.EIO, "Input/output error")
        seal(*arguments)

    def away(path):
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: sizeless)
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    sizeless = room(tmp_path)._replace(total=0, used=0, free=0)  # as some buckets say they are
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", away)
    monkeypatch.setattr(manifest, "seal", flaky)
    monkeypatch.setattr(checkpoints, "_PAUSES", (0.01, 0.01, 0.01))
    announced = []
    saver = open_at(tmp_path / "mae", on_saved=lambda step, values: announced.append(step))
    saver.save(5, TINY, {"at": 5})
    saver.save(6, TINY, {"at": 6})
    saver.finish(6, TINY, {"at": 6})
    saver.close()
    assert announced == [6]
    assert caplog.text.count("endpoint is not connected") == 1
    assert caplog.text.count("Input/output error") == 2
    assert open_at(tmp_path / "mae").latest == 6


def test_a_restored_state_is_bit_equal_on_other_devices(tmp_path):
    """The whole state of ct, saved on one device, restored on 4 x 2, and back."""
    from maect_jax import config

    loaded = config.load(str(CONFIGS / "quickstart.py:test"))
    stage = STAGES["ct"].from_config(loaded, 1600)
    key, one, eight = jax.random.key(5), mesh_of(1, 1), mesh_of(4, 2)
    with jax.set_mesh(one):
        made = state.create_state(stage, key, {}, one)
        saver = open_at(tmp_path / "ct")
        saver.save(1, made, {"loader": {"next": 1}})
        saver.finish()
    restored, position = saver.restore(1, state.abstract_state(stage, key, {}, eight))
    saver.close()
    assert position == {"loader": {"next": 1}}
    assert {x.sharding.mesh.size for x in jax.tree.leaves(restored)} == {8}
    assert_trees_equal(sharding.to_host(restored), jax.device_get(made))
