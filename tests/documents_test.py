"""The Markdown documents: their links, images, commands, config keys and paths exist."""

import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from benchmarks import published
from maect_jax import config, main
from maect_jax.errors import UserError
from tests.helpers import CONFIGS, ROOT

PACKAGE = ROOT / "maect_jax"
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "tests/**/*.md") for path in ROOT.glob(pattern)
)
KEYS = {
    key
    for path in CONFIGS.glob("*.py")
    if path.stem != "common"
    for key in config.flat(config.load(str(path)))
}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
SOURCE = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
FLAGS = {"--help", *re.findall(r'"(--[a-z_]+)"', SOURCE)}
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.")  # stands for what the reader fills in


def tokens(path):
    """All tokens of a document, those within a line among them; of the changelog those of the
    latest version, as earlier ones name what there was."""
    text = path.read_text()
    if path.name == "CHANGELOG.md":
        text = "\n## ".join(text.split("\n## ")[:2])
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def anchors(path):
    """The names that GitHub gives to the headings of a document."""
    names, heading = [], False
    for token in tokens(path):
        if token.type == "inline" and heading:
            name = re.sub(r"[^\w\- ]", "", token.content.lower()).replace(" ", "-")
            names.append(f"{name}-{names.count(name)}" if name in names else name)
        heading = token.type == "heading_open"
    return names


def code(path):
    """Everything that a document shows as code within a line."""
    return [token.content for token in tokens(path) if token.type == "code_inline"]


def commands(path):
    """The words of every command in a document, with 0 for what a shell fills in."""
    scripts = [t.content for t in tokens(path) if t.type == "fence" and t.info == "bash"]
    for script in [*scripts, *code(path)]:
        for line in re.split(r"\n|;|&&", script.replace("\\\n", " ")):
            try:
                words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
            except ValueError:  # a part of a quoted text
                continue
            yield words[1:] if words[:1] == ["do"] else words


def wrong_link(path, target):
    """Whether a link or an image of a document leads nowhere."""
    if re.match(r"https?://", target):
        return False
    file, _, anchor = target.partition("#")
    file = path.parent / file if file else path
    return not file.exists() or bool(anchor and anchor not in anchors(file))


def unknown_path(text):
    """Whether a text names a file of the repository, from its top or within the package, that does
    not exist."""
    first, slash, rest = text.partition("/")
    if not first or not slash or not re.fullmatch(r"[\w./*\-]+", text) or "NAME" in text:
        return False
    if (ROOT / first).is_dir() and first != "runs":  # which git does not know
        return not list(ROOT.glob(text.rstrip("/")))
    in_package = (PACKAGE / first).is_dir() and (not rest or Path(rest).suffix)
    return bool(in_package and not list(PACKAGE.glob(text.rstrip("/"))))


def wrong_config(words):
    """The error of a command's `--config` and its overrides, or of a key without a config."""
    names = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    overrides = [text for text in overrides if not PLACEHOLDER.fullmatch(text.partition("=")[0])]
    if not names:
        return [text for text in overrides if text.partition("=")[0] not in KEYS]
    name, colon, argument = names[0].partition(":")
    if PLACEHOLDER.fullmatch(name.removesuffix(".py").removeprefix("configs/")):
        return []
    file = ROOT / name if "/" in name or name.endswith(".py") else CONFIGS / f"{name}.py"
    try:
        config.load(f"{file}{colon}{argument}", overrides)
    except UserError as error:
        return [str(error)]
    return []


def unknown_module(words):
    """The module or subcommand that a command runs, if it does not exist."""
    if words[:1] == ["maect"] and len(words) > 1:
        return [word for word in words[1:2] if word not in main._COMMANDS]
    if not words or not re.fullmatch(r"\S*python3?", words[0]) or "-m" not in words[:-1]:
        return []
    name = words[words.index("-m") + 1]
    path = ROOT / name.replace(".", "/")
    ours = path.parts[len(ROOT.parts)] in ("maect_jax", "benchmarks")
    known = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return [] if (known if ours else importlib.util.find_spec(name)) else [name]


def unknown_flags(words):
    """The flags of a command of the package that it does not have."""
    if words[:1] != ["maect"] and not any(word.startswith("maect_jax.") for word in words):
        return []
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if flag not in FLAGS and not flag.startswith("--config.")]


every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


@every_document
def test_links_and_images_lead_somewhere(path):
    targets = [
        token.attrs["href" if token.type == "link_open" else "src"]
        for token in tokens(path)
        if token.type in ("link_open", "image")
    ]
    assert [target for target in targets if wrong_link(path, target)] == []


@every_document
def test_commands_name_configs_keys_modules_flags_and_paths_that_exist(path):
    for check in (wrong_config, unknown_module, unknown_flags):
        assert [wrong for words in commands(path) for wrong in check(words)] == []
    assert [word for words in commands(path) for word in words if unknown_path(word)] == []


@every_document
def test_paths_and_keys_in_the_text_exist(path):
    assert [text for text in code(path) if unknown_path(text.partition(":")[0])] == []
    keys = [text for text in code(path) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text)]
    assert [key for key in keys if key.partition(".")[0] in SECTIONS and key not in KEYS] == []


def test_tables_and_pictures_of_results_are_those_of_the_kept_files():
    """`python -m benchmarks.published write` writes them."""
    texts = {path: path.read_text() for path in published.DOCUMENTS}
    assert [path for path, text in texts.items() if published.written(text) != text] == []
    pictures = published.pictures()
    drawn = {picture: published.drawn_of(picture) for picture in pictures}
    assert drawn == {picture: published.digest(names) for picture, names in pictures.items()}
    assert {path.stem for path in published.KEPT.glob("*.png")} == set(pictures)
    marked = {name for text in texts.values() for name in published.names_in(text)}
    used = {path for name in marked for path in published.files_of(name)}
    assert set(published.KEPT.glob("*.json")) == used


def test_a_kept_result_is_a_table_again(tmp_path, monkeypatch):
    """Of two seeds: what the program prints for the runs, its config by what differs from the named
    one, without the places of the machine."""
    monkeypatch.setattr(published, "KEPT", tmp_path / "kept")
    scores = {"acc": 0.5, "nmi": 0.25, "ari": 0.125}
    for seed, accuracy in enumerate((0.6, 0.64)):
        run = tmp_path / f"run_{seed}"
        run.mkdir()
        overrides = [f"seed={seed}", "eval.knn.k=1,10", "data.path=/secret/images.npz"]
        named = config.load("quickstart:refine", overrides)
        row = {"knn": [{"k": 10, "accuracy": accuracy}], "seconds": {"knn": 1.0}, "made_of": "x"}
        row["cluster"] = {"best": scores, "mean": scores, "selection": list(range(999))}
        write(run / "config.json", named.to_dict())
        write(run / "results.json", {"mae": row, "refine": row, "ct": row})
        write(run / "environment.json", {"jax": "0.1", "python": "3.11"})
        losses = [
            {"stage": "mae", "step": step, "loss": 2.0, "images_per_second": 1.0, "seconds": step}
            for step in range(1, 1001)
        ]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in losses))
        about = {"title": "Clothes", "machine": "an abacus"}
        published.keep(f"x_{seed}", run, {"other": run}, about)
    text = published.written("<!-- table x -->\n<!-- end -->")
    assert "| ct - mae | **+0.0 ± 0.0** | **+0.0 ± 0.0** |" in text
    assert "| mae | 62.0 ± 2.8 | 50.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 |" in text
    assert "| other | 62.0 ± 2.8 |" in text
    assert published.written(text) == text
    with pytest.raises(UserError, match="`gains x` has no `<!-- end -->`"):
        published.written(f"<!-- gains x -->\n{text}")
    content = (tmp_path / "kept" / "x_1.json").read_text()
    assert "secret" not in content
    assert str(tmp_path) not in content
    assert "selection" not in content
    assert len(json.loads(content)["curves"]["mae"]["loss"]) == 30
    assert "| Clothes | 2 | +0.0 ± 0.0 |" in published.written("<!-- gains x -->\n<!-- end -->")
    measured = published.written("<!-- measured x -->\n<!-- end -->")
    assert "an abacus" in measured
    script = measured.partition("```bash\n")[2].partition("\n```")[0]
    assert " ".join(script.replace("\\\n", " ").split()) == (
        "for seed in 0 1; do maect run --config=quickstart:refine --workdir=runs/run_$seed "
        "--config.data.path=images.npz --config.eval.knn.k=1,10 --config.seed=$seed done"
    )
    with pytest.raises(UserError, match="two have the row 'ct'"):
        published.merged(["x", "x"])
    for seed in (1, 0):  # as if the config has changed since the runs
        path = tmp_path / "kept" / f"x_{seed}.json"
        kept = json.loads(path.read_text())
        kept["commands"][0]["values"]["refine.epochs"] = "9"
        write(path, kept)
        if seed:
            with pytest.raises(UserError, match="the runs of 'x' differ in more than the seed"):
                published.written("<!-- table x -->\n<!-- end -->")
    assert "--config.refine.epochs=9" in published.written(measured)
    write(path, kept | {"machine": "a slide rule"})
    lines = published.written(measured).splitlines()[1:3]
    assert [line.partition(" (")[0] for line in lines] == [
        "`x`, seed 0: a slide rule", "`x`, seed 1: an abacus",
    ]  # fmt: skip
    write(run / "results.json", {})
    with pytest.raises(UserError, match="run_1: has no results yet"):
        published.keep("x_1", run, {}, about)
    with pytest.raises(UserError, match="run_1: has no results yet"):
        published.keep("x_1", None, {"other": run}, about)
    later = tmp_path / "later"  # the run is evaluated by another, which has its model
    later.mkdir()
    evaluation = config.load("eval", ["seed=1"]).to_dict()
    write(later / "config.json", evaluation | {"model": named.model.to_dict()})
    write(later / "results.json", {"encoder": row})
    published.keep("y_1", run, {"ct": later}, about)
    kept = json.loads((tmp_path / "kept" / "y_1.json").read_text())
    assert [*kept["results"]] == ["ct"]
    assert [command["config"] for command in kept["commands"]] == ["quickstart:refine", "eval"]
    assert "model.width" not in kept["commands"][1]["values"]


def write(path, content):
    path.write_text(json.dumps(content))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_the_commands_that_ci_runs_are_documented_once():
    scripts = (ROOT / ".ci/run", ROOT / ".github/workflows/tests.yml")
    wanted = {name for s in scripts for name in re.findall(r'"([a-z ]*command)"', s.read_text())}
    named = [
        block.content
        for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
        for block, following in itertools.pairwise(tokens(path))
        if following.type == "fence" and block.type == "html_block"
    ]
    assert "test command" in wanted
    assert {name: named.count(f"<!-- {name} -->\n") for name in wanted} == dict.fromkeys(wanted, 1)
