"""Eight virtual CPU devices for every test, and the fixtures that several tests share."""

import atexit
import os
import shutil
import sys
import tempfile

from tests.helpers import FAST_COMPILE, ROOT

if "MAECT_ACCELERATOR" not in os.environ:  # set for `-m accelerator`, which means real kernels
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
# Programs are compiled once for all tests, their workers and the runs that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="maect_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Threads of scikit-learn that wait for a core which another test has wait busily.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
from absl import flags

from tests.helpers.commands import finished_run
from tests.helpers.common import save

# grain's worker processes read absl's flags, which `main` parses.
flags.FLAGS.mark_as_parsed()

# At most so many examples of each property (`fuzz.bounded`): few by default, all with `-m slow`.
hypothesis.settings.register_profile("few", max_examples=25)
hypothesis.settings.register_profile("all", max_examples=1000)


def pytest_configure(config):
    hypothesis.settings.load_profile("all" if config.option.markexpr == "slow" else "few")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Counts properties among the slow tests when these are asked for."""
    if config.option.markexpr == "slow":
        for item in items:
            if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def in_root(monkeypatch):
    """Runs the test in the checkout's top folder, as the documented commands are."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run, which all workers share (`commands.finished_run`).

    Tests read it only; one that changes something changes a copy.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return finished_run(folder / "finished")


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


def pytest_terminal_summary(terminalreporter):
    """After the tests of parity: of each quantity the error nearest to its bound."""
    if "tests.helpers.golden_figures" not in sys.modules:
        return
    from tests.helpers.golden_figures import FOLDER, nearest

    if nearest:
        terminalreporter.section(f"errors nearest to their bounds, {FOLDER}")
        for quantity, (error, bound) in sorted(nearest.items()):
            terminalreporter.line(f"{quantity:32}{error:10.2g}{bound:10.2g}")
