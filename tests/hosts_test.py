"""Errors of several processes as one program: each host ends, with a line, and none waits.

Marked slow: a host that cannot write its metrics, and bad images of all hosts.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from maect_jax import main, pipeline
from maect_jax.data import sources
from maect_jax.errors import UserError
from tests.helpers import FAST_COMPILE, ROOT
from tests.helpers.commands import run_main
from tests.helpers.common import few_pictures, save
from tests.helpers.hosts import CONFIG, free_address, pod


@pytest.mark.parametrize(
    ("what", "both"),
    [("checkpoints", True), pytest.param("metrics", False, marks=pytest.mark.slow)],
)
def test_a_host_that_cannot_write_leaves_none_waiting(tmp_path, what, both):
    """Where a save fails for good all hosts agree on the end; else JAX ends the others."""
    data = few_pictures(tmp_path)
    settings = (*data, "stages=('mae',)", "mae.batch_size=10", "log_every=1", "monitor.every=0")
    command = [
        sys.executable, "-m", "tests.helpers.lame_host", what, f"--config={CONFIG}",
        f"--workdir={tmp_path / 'run'}", *(f"--config.{setting}" for setting in settings),
    ]  # fmt: skip
    pod = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    pod["XLA_FLAGS"] = FAST_COMPILE
    hosts = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | pod | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        told = [host.communicate(timeout=150)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert hosts[0].returncode == 1
    assert hosts[1].returncode != 0
    assert "No space left on device" in told[0].splitlines()[-1]
    if both:
        assert hosts[1].returncode == 1
        assert "cannot be written (another host failed; see its log). There is" in told[1]


@pytest.mark.slow
def test_bad_images_of_all_hosts_together_end_all_of_them(tmp_path):
    """One host has not too many; at the same step both stop, with the same list."""
    data = few_pictures(tmp_path)
    for i in range(0, 40, 5):
        (tmp_path / "train" / f"{i:02}.png").write_bytes(b"torn")
    settings = (
        "stages=('mae',)", "mae.batch_size=20", "log_every=2", *data,
        "data.max_bad_fraction=0.19", "data.cache=28",
    )  # fmt: skip
    with pod(tmp_path / "run", tmp_path / "output", settings) as process:
        assert process.wait(200) != 0
    output = (tmp_path / "output").read_text()
    # Not only at the start of a line: the other host's progress bar may stand there.
    errors = re.findall("error: .*", output)
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith("error: 8 of 40 images cannot be read")
    assert all(f"/{i:02}.png: " in errors[0] for i in range(0, 40, 5))


@pytest.mark.parametrize("process", [0, 1])
def test_a_host_that_does_not_come_is_one_line_and_no_hang(monkeypatch, tmp_path, process):
    address = free_address()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", str(process))
    start = time.monotonic()
    done = run_main(f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--host_timeout=2")
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert done.stderr == (
        f"error: not all hosts have met at {address} within --host_timeout=2 seconds\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"), "JAX_NUM_PROCESSES=None"),
        (("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES=two"),
        (("JAX_NUM_PROCESSES",), "JAX_NUM_PROCESSES set without JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_hosts_that_cannot_be_counted_are_an_error(monkeypatch, given, wrong):
    values = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "0"}
    for name in given:
        monkeypatch.setenv(name, values.get(name, "two"))
    with pytest.raises(UserError, match=wrong):
        main._join_hosts(5)


def errors_of_hosts(monkeypatch, tmp_path, own, *flags):
    """The errors of two hosts, sorted, each with a flag of its `own`."""
    script = tmp_path / "python"
    script.write_text(
        f"""#!/usr/bin/env bash
exec {sys.executable} "$@" {own}
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:21977")
    done = subprocess.run(
        ["launch/local_pod.sh", "2", f"--config={CONFIG}", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    return sorted(line for line in done.stderr.splitlines() if line.startswith("error"))


def test_a_folder_that_hosts_do_not_share_ends_all_of_them(monkeypatch, tmp_path):
    """Each host has a folder of its own under the same name, as without shared storage."""
    own = f"--workdir={tmp_path}/$JAX_PROCESS_ID/run"
    assert errors_of_hosts(monkeypatch, tmp_path, own) == [
        "error: --workdir=" + f"{tmp_path}/1/run: all hosts must see this folder, on storage that "
        "they share",
        "error: another host failed; see its log",
    ]


def test_images_that_hosts_do_not_share_end_all_of_them(monkeypatch, tmp_path):
    """One host has other training images, and no held-out ones."""
    for host in "01":
        few_pictures(tmp_path / host)
    (tmp_path / "1" / "train" / "00.png").rename(tmp_path / "1" / "train" / "x.png")
    save(tmp_path / "0" / "val" / "0.png")
    own = f"--config.data.path={tmp_path}/$JAX_PROCESS_ID"
    flags = ("data.source=folder", "stages=('mae',)", "mae.batch_size=16")
    flags = (f"--workdir={tmp_path}/run", *(f"--config.{flag}" for flag in flags))
    failed, other = errors_of_hosts(monkeypatch, tmp_path, own, *flags)
    assert failed == "error: another host failed; see its log"
    assert "the train images of this host are not those of the first host" in other
    assert not (tmp_path / "run").exists()


def test_hosts_see_the_same_images_and_take_the_times_of_the_first(monkeypatch):
    """They ask once, in as many characters, whatever each has: else one would wait for ever."""
    asked = []

    def share(own, of_first):
        """The identities of a host, after it asked."""
        first = {split: (x.identity.content, "0123") for split, x in of_first.items()}
        monkeypatch.setattr(
            pipeline.sharding,
            "of_first_host",
            lambda text: asked.append(text) or json.dumps(first).ljust(len(text)),
        )
        pipeline._share_identities(ConfigDict({"data": {"path": "x"}}), own)
        return {split: source.identity for split, source in own.items()}

    def images(**channels):
        return {split: sources.Blank(9, count) for split, count in channels.items()}

    own = images(train=1, val=2)
    contents = {split: source.identity.content for split, source in own.items()}
    found = share(own, images(train=1, val=2))
    assert {split: x.content for split, x in found.items()} == contents
    assert {x.times for x in found.values()} == {"0123"}
    for mine, of_first, split in (
        (images(train=1, val=2), images(train=3, val=2), "train"),
        (images(train=1, val=2), images(train=1), "val"),
        (images(train=1), images(train=1, val=2), "val"),
    ):
        with pytest.raises(UserError, match=f"the {split} images of this host are not those of"):
            share(mine, of_first)
    assert len(asked) == 4
    assert len({len(text) for text in asked}) == 1


def test_hosts_start_from_the_same_weights(monkeypatch):
    """What the first host has is of another commit, or of another file under the name."""
    origin = SimpleNamespace(lineage=lambda: [{"file": "x.pth", "sha256": "0123"}])
    config, theirs = ConfigDict({"init_from": "x.pth"}), []
    monkeypatch.setattr(pipeline.jax, "process_count", lambda: 2)
    monkeypatch.setattr(pipeline.sharding, "together", nullcontext)
    monkeypatch.setattr(pipeline.sharding, "of_first_host", lambda own: theirs.append(own) or own)
    pipeline._check_same_start(config, origin)
    monkeypatch.setattr(pipeline.sharding, "of_first_host", lambda own: theirs[0])
    origin.lineage = lambda: [{"file": "x.pth", "sha256": "4567"}]
    with pytest.raises(UserError, match=r"config.init_from='x.pth': the weights of this host"):
        pipeline._check_same_start(config, origin)
