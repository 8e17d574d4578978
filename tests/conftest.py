"""Eight virtual CPU devices for every test, and what several tests share."""

import atexit
import os
import shutil
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised code halves the time that the tests spend compiling, which is most of it.
FAST_COMPILE = "--xla_backend_optimization_level=0"
FAST_RUN = "--xla_backend_optimization_level=1"  # for runs of more than a few steps
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
# Programs are compiled once for all tests, their workers and the runs that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="maect_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Threads of scikit-learn that wait for a core which another test has wait busily.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh
from PIL import Image

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SMALL = "data.train_split=train[80%:]"  # 1,600 of the packaged images

# grain's worker processes read absl's flags, which `main` parses.
flags.FLAGS.mark_as_parsed()


def mesh_of(data: int, fsdp: int) -> Mesh:
    """A mesh of the first `data * fsdp` devices."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def run_on(monkeypatch, shape: tuple[int, int], config, workdir, page=True) -> None:
    """Runs a config in this process as if the devices of a mesh of that shape were all.

    Without `page`, which a test that does not look at it should leave out, none is drawn: that
    takes seconds.
    """
    from maect_jax import pipeline

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: shape[0] * shape[1])
        patch.setattr(pipeline.sharding, "make_mesh", lambda **_: mesh_of(*shape))
        if not page:
            patch.setattr(pipeline.page, "build", lambda run, images: run / "report.html")
        pipeline.run(config, workdir)


@pytest.fixture
def in_root(monkeypatch):
    """Runs the test in the checkout's top folder, as the documented commands are."""
    monkeypatch.chdir(ROOT)


def save(path, shape=(9, 7), value=0):
    """A picture of one red value, with a ramp of green."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[..., 0] = value
    pixels[..., 1] = np.linspace(0, 255, shape[0])[:, None]
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path):
    """A folder that holds `train`, with two classes and 21 images of various shapes."""
    for label, name in enumerate(("ant", "bee")):
        for i in range(10):
            shape = (9 + i, 7 + label)
            save(tmp_path / "train" / name / f"{i:02}.png", shape, 10 * i + label)
    save(tmp_path / "train" / "bee" / "deep" / "er" / "99.JPG", value=200)
    (tmp_path / "train" / "bee" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def wait_for_step(workdir, step, process):
    """Returns when a run, which `process` is, has told of a step."""
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


def pytest_terminal_summary(terminalreporter):
    """After the tests of parity: of each quantity the error nearest to its bound."""
    if "tests.figures" not in sys.modules:
        return
    from tests.figures import FOLDER, nearest

    if nearest:
        terminalreporter.section(f"errors nearest to their bounds, {FOLDER}")
        for quantity, (error, bound) in sorted(nearest.items()):
            terminalreporter.line(f"{quantity:32}{error:10.2g}{bound:10.2g}")
