"""Meshes, runs in this process, pictures and comparisons."""

import time
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
from PIL import Image

from maect_jax import config as configs
from maect_jax.run.folder import Run
from maect_jax.run.logger import Logger
from maect_jax.run.writers import NO_WRITERS
from tests.helpers import CONFIGS


def mesh_of(data: int, fsdp: int) -> Mesh:
    """A mesh of the first `data * fsdp` devices."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def run_on(monkeypatch, shape: tuple[int, int], config, workdir, report=True) -> None:
    """Runs a config in this process as if the devices of a mesh of that shape were all.

    Without `report`, which a test that does not look at it should leave out, none is drawn: that
    takes seconds.
    """
    from maect_jax import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: shape[0] * shape[1])
        patch.setattr(pipeline.sharding, "make_mesh", lambda **_: mesh_of(*shape))
        if not report:
            patch.setattr("maect_jax.report.build.report", lambda run, _: run / "report.html")
        pipeline.run(config, workdir)


def save(path, shape=(9, 7), value=0):
    """A picture of one red value, with a ramp of green."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[..., 0] = value
    pixels[..., 1] = np.linspace(0, 255, shape[0])[:, None]
    Image.fromarray(pixels).save(path)


def few_pictures(folder, count=40) -> tuple[str, ...]:
    """Writes pictures of 28 x 28 pixels; returns the settings of a config that trains on them."""
    for i in range(count):
        save(folder / "train" / f"{i:02}.png", (28, 28), i)
    return "data.source=folder", f"data.path={folder}"


def mae_config(folder, epochs):
    """A function that loads the config of an autoencoder on few pictures, with changes."""
    own = (
        "stages=('mae',)", "mae.batch_size=10", f"mae.epochs={epochs}", "log_every=1",
        "monitor.every=0", *few_pictures(folder),
    )  # fmt: skip
    return lambda *settings: configs.load(str(CONFIGS / "quickstart.py:test"), [*own, *settings])


def wait_for_step(workdir, step, process):
    """Returns when a run, which `process` is, has logged a step."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def assert_trees_equal(a, b) -> None:
    """Bit-equal leaves and equal structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def logger_at(folder, done, steps, stage="ct", writers=NO_WRITERS, **settings):
    """A logger of a stage of so many steps, with batches of one image."""
    defaults = dict(log_every=1, profile=())
    config = ConfigDict(defaults | settings | {stage: {"batch_size": 1}})
    run = Run(config, folder, None, writers=writers)
    return Logger(run, SimpleNamespace(name=stage, steps=steps), done, str)
