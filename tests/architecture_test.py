"""The plan of the house (docs/architecture.md), read from the sources."""

import ast

import pytest
from importlinter import cli

from tests.helpers import CONFIGS, ROOT

PACKAGE = ROOT / "maect_jax"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}"


def test_imports_point_down(monkeypatch, capsys):
    """The contracts in setup.cfg: the order of the rooms, and who sees which library."""
    monkeypatch.chdir(ROOT)
    status = cli.lint_imports(config_filename="setup.cfg", no_cache=True)
    assert status == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


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


def test_the_package_has_sixteen_doors():
    doors = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    doors = {path.name for path in doors} - {"__init__.py", "__pycache__"}
    assert len(doors) <= 16, doors
