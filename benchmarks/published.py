"""The results in the documents. Keeps those of runs as small files in `docs/results/`, and writes
from these the tables between markers in README.md and `docs/`, and their pictures.

    python -m benchmarks.published keep NAME [RUN] [ROW=RUN ...] --title=IMAGES --machine=MACHINE
    python -m benchmarks.published write

NAME ends in `_SEED` for one of several seeds. `ROW=RUN` adds the row of the last stage of a run, or
the only one of an evaluation, under another name. Write between two markers of a document:

    <!-- table NAME ... -->      mean and deviation over seeds; several names seed by seed in one
    <!-- measured NAME ... -->   on what it was measured, how long it took, and by which commands
    <!-- blocks NAME -->         what was measured behind blocks
    <!-- gains NAME ... -->      what `ct` gains over `mae`, a line for each name
    <!-- apart NAME OTHER -->    the difference of two names, in points and in standard errors
    <!-- end -->

`results/NAME_KEY.png`, if it is linked, has the curves of NAME, KEY being loss, nn_accuracy or
knn_accuracy; `results/gains.png` has the levels behind the gains of `docs/results.md`.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from maect_jax import config as configs
from maect_jax import errors, files
from maect_jax.errors import UserError
from maect_jax.evals import runner, table
from maect_jax.report import build, plots, style
from maect_jax.run import jsonl

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_STARTS = r"<!-- (table|measured|blocks|gains|apart) ([\w ]+) -->\n"
_MARKED = re.compile(f"({_STARTS})(?:(?!<!-- ).)*?(<!-- end -->)", re.DOTALL)
_PICTURE = re.compile(r"\]\((?:docs/)?results/(\w+)\.png\)")
# Of results: what is long, and settings, which the config has.
_DROPPED = {
    "probes", "epochs_top1", "best_any_epoch", "selection", "made_of", "made_with", "seconds",
    "features", "dtype", "temperature", "standardised", "epochs", "batch_size", "chosen_on",
    "split", "images", "l2_normalised", "pca", "minibatch", "loss", "silhouette_images",
    "chosen_by", "top5",
}  # fmt: skip
Percent = dict[str, dict[str, float]]  # by row and column
_CURVES = ("loss", "nn_accuracy", "knn_accuracy")
_POINTS = 30  # of a curve
_BEFORE, _AFTER = "mae", "ct"
_GAIN = f"{_AFTER} - {_BEFORE}"
_TITLES = {"probe, centre crops": "linear probe"}  # of columns
_LEFT_OUT = {"AMI", "silhouette"}  # of tables: near to NMI; of no use to tell which is better
_SHORT = 300  # characters of a command that is shown unfolded
_WIDTH = 110  # of its lines


def keep(name: str, run: Path | None, rows: Mapping[str, Path], about: Mapping[str, str]) -> None:
    """Writes `KEPT/NAME.json` from the folders of runs."""
    read = runner.read_results if rows else _results  # a run may be evaluated by others alone
    results = read(run) if run else {}
    for row, folder in rows.items():
        found = _results(folder)
        results[row] = found[runner.ordered(found)[0]]
    runs = list(dict.fromkeys([run] * bool(run) + list(rows.values())))
    seed, *others = sorted({build.read_config(folder).seed for folder in runs})
    if others:
        raise UserError(f"{name}: must be of runs of one seed; these have {[seed, *others]}")
    history = build.in_order(jsonl.read(runs[0] / "metrics.jsonl"))
    seconds = {entry["name"]: entry["seconds"] for entry in build.stage_timings(history)}
    seconds["eval"] = sum(sum(result["seconds"].values()) for result in results.values())
    content = {
        **about,
        "seed": seed,
        "commands": [_command(folder) for folder in runs],
        "environment": files.read_json(runs[0] / "environment.json"),
        "seconds": _thin(seconds),
        "results": _thin(results),
        "curves": _curves(history),
    }
    # A line for each part: small, and a change is seen.
    compact = json.JSONEncoder(separators=(",", ":")).encode
    lines = (f"{compact(key)}:{compact(part)}" for key, part in content.items())
    KEPT.mkdir(exist_ok=True)
    files.write_text(KEPT / f"{name}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def _results(run: Path) -> dict[str, dict]:
    if not (results := runner.read_results(run)):
        raise UserError(f"{run}: has no results yet")
    return results


def _thin(value):
    """Results without what tables do not show, to five digits."""
    if isinstance(value, Mapping):
        return {key: _thin(below) for key, below in value.items() if key not in _DROPPED}
    if isinstance(value, list):
        return [_thin(below) for below in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _curves(history: Sequence[dict]) -> dict[str, dict[str, list]]:
    """Steps and values by stage and key: means over at most `_POINTS` parts of a stage's steps."""
    curves: dict[str, dict[str, list]] = {}
    for key in _CURVES:
        for stage, runs in plots.by_stage(history, key).items():
            points = np.array(runs[""])
            parts = np.array_split(points, min(_POINTS, len(points)))
            means = [(round(x), float(f"{y:.4g}")) for x, y in (part.mean(0) for part in parts)]
            curves.setdefault(stage, {})[key] = means
    return curves


def _command(run: Path) -> dict:
    """The config of a run by its name, and its values, as a command has them."""
    config = build.read_config(run)
    if not (spellings := _spellings(config.name)):
        raise UserError(f"{run}: its config {config.name!r} is not one of configs/")
    # A run also has the model of what it starts from, which no command gives.
    given = configs.flat(configs.load(spellings[0]))
    return {
        "config": spellings[0],
        "workdir": f"runs/{run.resolve().name}",
        "values": {key: text for key, text in _texts(config).items() if key in given},
    }


def _overrides(command: Mapping) -> dict[str, str]:
    """The values that a config has not, or no longer: those that a command must give."""
    now, kept = _texts(configs.load(command["config"])), command["values"]
    return {key: kept[key] for key in now if key in kept and kept[key] != now[key]}


def _texts(config: ConfigDict) -> dict[str, str]:
    return {key: _text(key, value) for key, value in configs.flat(config).items()}


def _spellings(name: str) -> list[str]:
    """What `--config` may be of a config of this name: `a_b` is that, or variant `b` of `a`."""
    found = []
    for place in [len(name), *(i for i, letter in enumerate(name) if letter == "_")]:
        spelled = f"{name[:place]}:{name[place + 1 :]}".removesuffix(":")
        try:
            found += [spelled] * (configs.load(spelled).name == name)
        except UserError:
            continue
    return found


def _text(key: str, value) -> str:
    if isinstance(value, tuple):
        return ",".join(x if isinstance(x, str) else repr(x) for x in value)
    if isinstance(value, str) and value.startswith("/"):  # a place on the machine that it ran on
        path = Path(value)
        return f"runs/{path.name}" if (path / "config.json").exists() else path.name
    return str(value)


# What is kept, by name


def files_of(name: str) -> list[Path]:
    """The file of a name, or those of its seeds."""
    return [path for path in KEPT.glob("*.json") if re.fullmatch(rf"{name}(_\d+)?", path.stem)]


def seeds(name: str) -> list[dict]:
    """What is kept of a name, in the order of its seeds, each there once. Raises `UserError` if its
    runs differ in more than the seed."""
    found = [json.loads(path.read_text()) for path in files_of(name)]
    if len(found) != len({kept["seed"] for kept in found}) or not found:
        raise UserError(
            f"{KEPT}: must have one file for each seed of {name!r}; it has {len(found)}"
        )
    if any(_but_for_seed(kept) != _but_for_seed(found[0]) for kept in found):
        raise UserError(f"{KEPT}: the runs of {name!r} differ in more than the seed")
    return sorted(found, key=lambda kept: kept["seed"])


def _but_for_seed(kept: Mapping) -> list:
    """The commands of a seed, without it and where it starts from another run of its own."""
    commands = []
    for command in kept["commands"]:
        start = command["values"]["init_from"].removesuffix(str(kept["seed"]))
        commands.append((command["config"], command["values"] | dict(seed="", init_from=start)))
    return commands


def merged(names: Sequence[str]) -> dict[str, dict]:
    """The results of several names by their seeds. Raises `UserError` if they lack something, have
    different seeds, or the same row."""
    found: dict[int, dict] = {}
    for name in names:
        for kept in seeds(name):
            rows = found.setdefault(kept["seed"], {})
            if twice := rows.keys() & kept["results"].keys():
                raise UserError(f"{KEPT}: {' '.join(names)}: two have the row {min(twice)!r}")
            rows.update(kept["results"])
    results = {str(seed): rows for seed, rows in found.items()}
    if lacks := table.lacking(results):
        raise UserError(f"{KEPT}: {' '.join(names)}: by seed, these lack {lacks}")
    return results


def percent(names: Sequence[str]) -> list[Percent]:
    """The numbers of a table, seed by seed."""
    return [table.percentages(results) for results in merged(names).values()]


def apart(ours: Sequence[Percent], theirs: Sequence[Percent]) -> table.Rows:
    """By how much the mean of our runs is above that of theirs, in what both have; in brackets in
    standard errors of this difference (Welch's), if there are any."""
    rows: table.Rows = {}
    for row in (row for row in ours[0] if row in theirs[0]):
        rows[row] = {}
        for column in (column for column in ours[0][row] if column in theirs[0][row]):
            sides = [np.array([run[row][column] for run in runs]) for runs in (ours, theirs)]
            points = sides[0].mean() - sides[1].mean()
            several = min(map(len, sides)) > 1
            rows[row][column] = f"{points:+.1f}"
            if several and (error := np.sqrt(sum(x.var(ddof=1) / len(x) for x in sides))):
                rows[row][column] += f" ({points / error:+.1f})"
    return rows


def shown(rows: table.Rows) -> table.Rows:
    """What documents show of a table, by row and by title of a column."""
    return {
        row: {
            _TITLES.get(column, column): cell.replace("+-", "±")
            for column, cell in cells.items()
            if column not in _LEFT_OUT
        }
        for row, cells in rows.items()
        if not ("mae" in rows and "refine_head" in row)  # whose encoder is that of mae
    }


# What is written


def _lines(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, "|---" * len(lines[0]) + "|\n", *body])


def _rows(rows: table.Rows, difference: str = "{}") -> str:
    """A line for each row, and one with all columns above; `difference` is the form of cells in
    rows of differences."""
    columns = table.columns(rows)
    lines = [["", *columns]]
    for row, cells in rows.items():
        form = difference if table.is_difference(row) else "{}"
        lines.append([row, *(form.format(cells[c]) if c in cells else "-" for c in columns)])
    return _lines(lines)


def _table(names: Sequence[str]) -> str:
    return _rows(shown(table.formatted(percent(names))), "**{}**")


def _gains(names: Sequence[str]) -> str:
    rows = {name: shown(table.formatted(percent([name])))[_GAIN] for name in names}
    columns = table.columns(rows)
    lines = [["ct over mae, points", "seeds", *columns]]
    for name, cells in rows.items():
        kept = seeds(name)
        about = [kept[0]["title"], str(len(kept))]
        lines.append([*about, *(cells.get(column, "-") for column in columns)])
    return _lines(lines)


def _apart(names: Sequence[str]) -> str:
    return _rows(shown(apart(*(percent([name]) for name in names))))


def _blocks(names: Sequence[str]) -> str:
    curves = [table.by_block(results) for results in merged(names).values()]
    lines: list[list[str]] = []
    for column, rows in curves[0].items():
        for row, values in rows.items():
            blocks = sorted(values, key=lambda block: (block == "final", block.zfill(3)))
            lines = lines or [["block", *blocks]]
            means = {b: np.mean([curve[column][row][b] for curve in curves]) for b in blocks}
            cells = (
                f"**{x:.1f}**" if x == max(means.values()) else f"{x:.1f}" for x in means.values()
            )
            lines.append([f"{column}, {row}", *cells])
    return _lines(lines)


def _measured(names: Sequence[str]) -> str:
    parts = []
    for name in names:
        alike: dict[str, list[dict]] = {}
        for kept in seeds(name):
            by = kept["environment"]
            on = f"{kept['machine']} (JAX {by['jax']}, Python {by['python']})"
            alike.setdefault(on, []).append(kept)
        for on, several in alike.items():
            numbers = ", ".join(str(kept["seed"]) for kept in several)
            many = len(several) > 1
            times = [
                f"{key} {_duration(np.mean([kept['seconds'][key] for kept in several]))}"
                for key in several[0]["seconds"]
            ]
            parts.append(
                f"`{name}`, seed{'s' * many} {numbers}: {on}; {', '.join(times)}"
                f"{' in the mean' * many}."
            )
    script = "\n".join(_script(seeds(name)) for name in names)
    block = f"```bash\n{script}\n```\n"
    if len(script) > _SHORT:
        block = f"<details><summary>Commands</summary>\n\n{block}\n</details>\n"
    return "\n".join(parts) + f"\n\n{block}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _script(kept: Sequence[dict]) -> str:
    """The commands of some seeds: a loop, if they differ in nothing else."""
    if len(kept) == 1:
        return "\n".join(_bash(command, None) for command in kept[0]["commands"])
    scripts = [
        "\n".join(_bash(command, one["seed"]) for command in one["commands"]) for one in kept
    ]
    loops = {
        re.sub(rf"((seed|workdir|init_from)=\S*?){one['seed']}(?!\S)", r"\1$seed", script)
        for script, one in zip(scripts, kept, strict=True)
    }
    if len(loops) > 1:
        return "\n".join(scripts)
    listed = " ".join(str(one["seed"]) for one in kept)
    return f"for seed in {listed}; do\n  {loops.pop().replace(chr(10), chr(10) + '  ')}\ndone"


def _bash(command: Mapping, seed: int | None) -> str:
    overrides = _overrides(command) | ({} if seed is None else {"seed": str(seed)})
    words = [f"--config={command['config']}", f"--workdir={command['workdir']}"]
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    text = " ".join(["maect run", *map(shlex.quote, words)])
    indented = dict(subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(textwrap.wrap(text, _WIDTH, **indented))


_WRITTEN = {
    "table": _table, "gains": _gains, "apart": _apart, "blocks": _blocks, "measured": _measured,
}  # fmt: skip


def written(text: str) -> str:
    """A document with what belongs between its markers."""

    def fill(match: re.Match) -> str:
        start, kind, names, end = match.groups()
        return f"{start}{_WRITTEN[kind](names.split())}{end}"

    closed = {(kind, names) for _, kind, names, _ in _MARKED.findall(text)}
    for kind, names in set(re.findall(_STARTS, text)) - closed:
        raise UserError(f"marker `{kind} {names}` has no `<!-- end -->` before the next comment")
    return _MARKED.sub(fill, text)


def names_in(text: str) -> list[str]:
    """The names whose results a document has in its tables."""
    return [name for _, _, names, _ in _MARKED.findall(text) for name in names.split()]


def pictures() -> dict[str, list[str]]:
    """The pictures in `KEPT` that documents link, each with the names whose results it draws."""
    linked = {name for path in DOCUMENTS for name in _PICTURE.findall(path.read_text())}
    found = {}
    for picture in sorted(linked):
        if picture == "gains":
            marked = _MARKED.findall((ROOT / "docs/results.md").read_text())
            found[picture] = next(names.split() for _, kind, names, _ in marked if kind == "gains")
        else:
            found[picture] = [picture.removesuffix(f"_{_key(picture)}")]
    return found


def _key(picture: str) -> str:
    return next((key for key in _CURVES if picture.endswith(f"_{key}")), "")


def digest(names: Sequence[str]) -> str:
    """Of the kept results that a picture draws; the picture says it of itself."""
    return hashlib.sha256(json.dumps([seeds(name) for name in names]).encode()).hexdigest()


def drawn_of(picture: str) -> str:
    """The `digest` of what a picture was drawn of; empty if there is no picture."""
    path = KEPT / f"{picture}.png"
    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("Comment"))


def _draw_gains(names: Sequence[str]) -> Figure:
    """A line for each name, a panel for each column: from `mae` to `ct`."""
    tables = {name: percent([name]) for name in names}
    columns = table.columns({name: runs[0][_GAIN] for name, runs in tables.items()})
    columns = [column for column in columns if column not in _LEFT_OUT]
    labels = [seeds(name)[0]["title"].replace(", ", "\n") for name in names]
    titles = [_TITLES.get(column, column) for column in columns]
    figure, panels = plots.panels_of(titles, labels, height=0.32)
    kinds = {
        row: dict(marker="o", markersize=5, color=style.COLOURS[row], markerfacecolor=face)
        for row, face in ((_BEFORE, "white"), (_AFTER, style.COLOURS[_AFTER]))
    }
    for panel, column in zip(panels, columns, strict=True):
        for place, runs in enumerate(tables.values()):
            if column in runs[0][_GAIN]:
                values = {row: [rows[row][column] for rows in runs] for row in kinds}
                ends = [np.mean(values[row]) for row in kinds]
                panel.plot(ends, [-place, -place], color=style.GREY, linewidth=1, zorder=1)
                for row, options in kinds.items():
                    plots.spread(panel, values[row], y=-place, **options)
    plots.marks(figure, kinds)
    return figure


def _draw_curves(name: str, key: str) -> Figure:
    kept = seeds(name)
    colours = {}
    if len(kept) > 1:
        palette = style.palette(len(kept))
        colours = {str(one["seed"]): c for one, c in zip(kept, palette, strict=True)}
    history = [
        {"run": str(one["seed"]), "stage": stage, "step": step, key: value}
        for one in kept
        for stage, curves in one["curves"].items()
        for step, value in curves.get(key, ())
    ]
    figure = build.curves(build.in_order(history), colours)[0][key]
    if figure is None:
        raise UserError(f"{KEPT}: {name} has no curve of {key}")
    if colours:
        plots.legend(figure, "seed", colours)
    return figure


def write() -> None:
    """Writes all tables, and draws the pictures of what has changed."""
    for path in DOCUMENTS:
        text = path.read_text()
        if (new := written(text)) != text:
            files.write_text(path, new)
            print(path)
    linked = pictures()
    for path in KEPT.glob("*.png"):
        if path.stem not in linked:
            path.unlink()
    with matplotlib.rc_context(fname=style.SETTINGS):
        for picture, names in linked.items():
            if drawn_of(picture) != digest(names):
                gains = picture == "gains"
                figure = _draw_gains(names) if gains else _draw_curves(names[0], _key(picture))
                path = KEPT / f"{picture}.png"
                metadata = {"Comment": digest(names)}
                figure.savefig(path, dpi=200, facecolor="white", metadata=metadata)
                print(path)


def main() -> None:
    parser = errors.OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep")
    keeping.add_argument("name", type=_name)
    keeping.add_argument("sources", nargs="+", metavar="[ROW=]RUN")
    keeping.add_argument("--title", required=True, help="the images")
    keeping.add_argument("--machine", required=True)
    commands.add_parser("write")
    flags = parser.parse_args()
    if flags.command == "write":
        write()
        return
    rows = {
        row: Path(run) for row, equals, run in (s.rpartition("=") for s in flags.sources) if equals
    }
    runs = [Path(source) for source in flags.sources if "=" not in source]
    if len(runs) > 1:
        raise UserError(f"{runs[1]}: is a second run. Write ROW=RUN to take one row of it.")
    about = {"title": flags.title, "machine": flags.machine}
    keep(flags.name, runs[0] if runs else None, rows, about)


def _name(text: str) -> str:
    if not re.fullmatch(r"\w+", text):
        raise argparse.ArgumentTypeError("must consist of letters, digits and _")
    return text


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
