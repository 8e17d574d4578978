"""Worker processes: how many, what they import, and what is said where one cannot go on."""

import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from maect_jax import main
from maect_jax.data import loader
from maect_jax.data.base import Identity, Source
from maect_jax.data.cache import Reduced
from maect_jax.data.decode import Decoding
from maect_jax.data.loader import EvalRecord
from maect_jax.errors import RunFailedError

# What a worker does without; all of it is imported in the main process.
NOT_NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax.checkpoint", "matplotlib", "sklearn")


class Imports(Source):
    """A pixel that counts the libraries of `NOT_NEEDED` in the process that makes it."""

    classes = ()
    labels = np.zeros(4, np.int32)
    identity = Identity(4, "")

    def __len__(self):
        return 4

    def __getitem__(self, record):
        imported = sum(sys.modules.get(name) is not None for name in NOT_NEEDED)
        return np.full((1, 1, 3), imported, np.uint8), 0


class Killed(Imports):
    """Ends the worker by a signal."""

    def __init__(self, number):
        self.number = number

    def __getitem__(self, record):
        assert multiprocessing.parent_process(), "not in the main process"
        os.kill(os.getpid(), self.number)


def batches(source, workers):
    return loader.eval_batches(EvalRecord(source, Decoding(3), (1, 1), 1), 2, workers, np.arange(2))


def test_a_worker_of_a_run_imports_no_jax(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "__main__", main)  # as `python -m maect_jax.main` and `maect`
    assert "jax" in sys.modules
    source = Reduced(Imports(), Decoding(3), 8)
    pixels = [batch["image"].max() for batch in batches(source, workers=1)]
    assert pixels == [0, 0]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "advice"),
    [(signal.SIGBUS, "--shm-size"), (signal.SIGKILL, "fewer config.data.workers")],
)
def test_a_killed_worker_is_one_line(monkeypatch, number, advice):
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(RunFailedError, match=f"exit code -{number:d}.*{advice}") as raised:
        list(batches(Killed(number), workers=1))
    assert "config.data.workers" in str(raised.value)


@pytest.mark.parametrize(
    ("cores", "quota", "images", "workers"),
    [
        (2, "max 100000", 10**9, 0),  # one would be no faster than threads
        (16, "max 100000", 10**9, 15),
        (16, "400000 100000", 10**9, 3),
        (16, "50000 100000", 10**9, 0),
        (16, "max 100000", 5_500, 5),
        (16, "max 100000", 81, 0),
    ],
)
def test_as_many_workers_as_cores_and_images_warrant(monkeypatch, cores, quota, images, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    files = {"/proc/self/cgroup": "0::/pod\n", "/sys/fs/cgroup/pod/cpu.max": f"{quota}\n"}
    monkeypatch.setattr(loader.Path, "read_text", lambda path, encoding: files[str(path)])
    assert loader.num_workers(images) == workers


@pytest.mark.parametrize(("free", "workers"), [(64 << 20, 3), (10 << 20, 0), (8 << 30, 8)])
def test_workers_whose_batches_do_not_fit_into_shared_memory(monkeypatch, caplog, free, workers):
    """Of 32 images of 224 x 224 a worker needs up to 18 MiB."""
    monkeypatch.setattr(loader.sys, "platform", "linux")
    memory = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: memory)
    loader._say_shared_memory.cache_clear()
    for _ in range(2):
        assert loader._that_fit(8, batch_bytes=32 * 224 * 224 * 3) == workers
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (workers < 8)
    assert all("--shm-size" in line for line in said)
