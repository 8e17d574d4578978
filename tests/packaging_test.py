"""What an installed package consists of.

Marked slow: a wheel, installed away from the clone.
"""

import configparser
import subprocess
import sys

import pytest

from tests.helpers import CONFIGS, ROOT


def test_the_wheel_has_every_package_and_the_configs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for path in (ROOT / "maect_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup["options"]["packages"].split()) == names | {"maect_jax.configs"}
    files = {path for path in (ROOT / "maect_jax").rglob("*") if path.is_file()}
    listed = {
        path for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split()
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }  # fmt: skip
    others = {path for path in files - listed if path.suffix not in (".py", ".pyc")}
    assert not others
    assert listed <= files


@pytest.mark.slow
def test_a_wheel_runs_its_configs_away_from_the_clone(tmp_path):
    """Beside another package `configs`; the libraries are those of this environment."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    env = {"PYTHONPATH": f"{target}:{tmp_path}", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [target / "bin" / "maect", "run", "--config=quickstart:test", "--dry_run"],
        cwd=tmp_path, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quickstart_test: mae -> head -> ct -> eval;")
    own = {path.name for path in (target / "maect_jax" / "configs").glob("*.py")}
    assert own == {path.name for path in CONFIGS.glob("*.py")}
