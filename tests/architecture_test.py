"""Who may import whom: the plan of the house, read from the sources."""

import ast

import pytest

from tests.helpers import CONFIGS, ROOT

# From the top floor down; a module imports only from floors below its own.
FLOORS = (
    ("main", "compile", "report.__main__", "data.show", "convert.__main__"),
    ("pipeline", "encoder", "convert.exporting"),
    ("workdir",),
    ("convert.card",),
    ("report.page",),
    ("report.words",),
    ("report.plots", "report.sheets"),
    ("command", "train", "plan", "validate", "inputs", "evals.finetuned"),
    ("checks",),
    ("monitor", "report.style"),
    ("evaluate", "table", "paper"),
    ("origin",),
    ("convert.importing",),
    ("convert.describe",),
    ("convert.recognise", "convert.shapes"),
    ("saving", "metrics"),
    ("checkpoint", "flops", "watch", "bad_steps", "board"),
    ("stages.build", "stages.step"),
    ("evals.protocols",),
    ("evals.lowshot", "evals.probe", "evals.export"),
    ("stages.mae", "stages.contrast", "stages.finetune", "evals.features"),
    (
        "stages.microbatch",
        "losses",
        "state",
        "convert.head_names",
        "convert.layouts",
        "data.augment",
        "data.loader",
    ),
    (
        "models.mae",
        "models.nnclr",
        "support_queue",
        "convert.names",
        "convert.tensors",
        "data.damage",
        "data.subsets",
    ),
    ("models.vit", "data.sources", "data.transforms"),
    ("data.arrays", "data.folder"),
    ("data.decode",),
    ("evals.knn", "evals.cluster"),
    ("evals.kmeans", "evals.logistic"),
    ("data.mix", "data.randaugment"),
    ("sharding", "optim", "convert.told", "config", "evals.maps", "models.positions"),
    ("manifest", "jsonl", "lock"),
    ("files", "chips", "collectives", "preemption", "trace"),
    ("errors",),
)
# Who alone sees a library.
OWNERS = {
    "grain": {"data.loader"},
    "orbax": {"checkpoint", "saving"},
    "absl": {"main", "compile", "command", "data.show"},
    "tensorflow_datasets": {"data.sources"},
    "tensorflow": set(),
    "tensorboardX": {"board"},
    "ml_collections": {
        "config", "validate", "pipeline", "plan", "train", "evaluate", "stages.build", "command",
        "evals.protocols", "monitor", "compile", "report.page", "report.words", "data.show",
        "evals.finetuned", "inputs", "checks", "origin", "convert.importing", "convert.recognise",
        "convert.shapes", "convert.describe", "convert.exporting", "workdir",
    },
    "matplotlib": {"report.style", "report.plots", "report.sheets", "report.page"},
    "jinja2": {"report.page"},
    "torch": {"convert.tensors"},
    "safetensors": {"convert.tensors"},
}  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT / "maect_jax").with_suffix("").parts): path
    for path in (ROOT / "maect_jax").rglob("*.py")
}
MODULES = {name: path for name, path in FILES.items() if not name.endswith("__init__")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name):
    """The module of this package that an imported name is in, or `None`."""
    parts = name.split(".")[1:]
    if name.split(".")[0] != "maect_jax":
        return None
    whole, holder = ".".join(parts), ".".join(parts[:-1])
    return whole if whole in MODULES else holder


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def test_every_module_has_its_floor():
    assert sorted(MODULES) == sorted(name for names in FLOORS for name in names)


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_point_down(module):
    for name in imported(MODULES[module]):
        target = own(name)
        if target:
            assert floor(target) > floor(module), f"{module} imports {target}"
        for library, owners in OWNERS.items():
            if name.split(".")[0] == library:
                assert module in owners, f"{module} imports {library}"


@pytest.mark.parametrize("path", list(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_config_pages_never_import_the_package(path):
    assert {name.split(".")[0] for name in imported(path)} <= {"configs", "ml_collections"}


def test_axis_names_are_known_to_sharding_alone():
    for name, path in MODULES.items():
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "fsdp" not in strings or name == "sharding", name


def test_rooms_are_small():
    for path in FILES.values():
        assert len(path.read_text().splitlines()) <= 300, path
