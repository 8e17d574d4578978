"""The layers (docs/architecture.md), read from the sources."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import CONFIGS, ROOT

PACKAGE = ROOT / "maect_jax"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}"


def lint_imports(folder):
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_imports_point_down():
    """The contracts in setup.cfg: the order of the layers, and who sees which library."""
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("stages/losses", "from maect_jax.run import lock"),
        ("models/vit", "from maect_jax.data import mix"),
        ("evals/knn", "import orbax"),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path, module, line):
    shutil.copytree(PACKAGE, tmp_path / "maect_jax")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    with (tmp_path / "maect_jax" / f"{module}.py").open("a") as file:
        file.write(f"{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert f"maect_jax.{module.replace('/', '.')} -> {line.split()[1]}" in done.stdout


@pytest.mark.parametrize("path", list(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_configs_never_import_the_package(path):
    assert {name.split(".")[0] for name in imported(path)} <= {"configs", "ml_collections"}


def test_axis_names_are_known_to_sharding_alone():
    for path in PACKAGE.rglob("*.py"):
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "fsdp" not in strings or path.name == "sharding.py", path


def test_the_package_has_at_most_seventeen_parts():
    parts = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    parts = {path.name for path in parts} - {"__init__.py", "__pycache__"}
    assert len(parts) <= 17, parts
