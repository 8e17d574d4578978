"""Writes the comparison of several runs, `comparison.html`: their configs, results and curves."""

import itertools
import json
import os
import string
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import matplotlib
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import files
from maect_jax.errors import UserError
from maect_jax.evals import runner, table
from maect_jax.report import build, plots, style
from maect_jax.run import folder as run_folder


def compare(histories: Mapping[Path, Sequence[dict]], path: Path) -> str:
    """Writes the comparison of runs that have a report, and its picture of the results beside it,
    as `.png`. Runs that differ in their seed alone are a group: means are of one group.

    Args:
      histories: the lines of `build.read_history`, by the resolved folder of the run.
      path: the file to write, which ends in `.html`.

    Returns:
      What the terminal shows: for each group the mean and the standard deviation of its results,
      or why there are none.

    Raises:
      UserError: it cannot be written.
    """
    folders = dict(zip(_names(histories), histories, strict=True))
    groups = _groups(folders)
    folders = {name: folders[name] for names in groups.values() for name in names}
    runs = {name: build.read_config(folder) for name, folder in folders.items()}
    results = {name: runner.read_results(folder) for name, folder in folders.items()}
    colours = _colours(groups)
    lines = {name: histories[folder] for name, folder in folders.items()}
    history = [line | {"run": name} for name in lines for line in lines[name]]
    means, notes = {}, []
    for title, names in groups.items():
        of_group = {name: results[name] for name in names}
        if lacks := table.lacking(of_group):
            listed = "; ".join(f"{name} lacks {parts}" for name, parts in lacks.items())
            notes.append(f"No mean of {title}, as its runs do not have the same results: {listed}.")
        elif table.columns_of_several(of_group):
            means[title] = table.cells_of_several(of_group)
        if len({(runs[name].seed, runs[name].get("init_from")) for name in names}) < len(names):
            notes.append(
                f"Of {title} some runs have the same seed: the deviation is not one of seeds."
            )
        if other := _other_places([folders[name] for name in names]):
            notes.append(f"The runs of {title} differ in what they ran on: {other}.")
    if not any(results.values()):
        notes = ["No run has results yet."]
    tables = {name: table.percentages(found) for name, found in results.items()}
    picture = path.with_suffix(".png")
    try:
        with matplotlib.rc_context(fname=style.SETTINGS):
            figures, numbers = build.curves(build.in_order(history), colours)
            pictures = {key: style.svg(figure, key) for key, figure in figures.items() if figure}
            if figure := plots.comparison(tables, groups, colours):
                pictures["results"] = style.save(figure, picture)
            else:
                picture.unlink(missing_ok=True)  # that of other runs
        html = build.TEMPLATES.get_template("comparison.html").render(
            runs=runs,
            links={name: _link(folder / "report.html", path) for name, folder in folders.items()},
            colours=colours,
            timings={name: build.stage_timings(lines[name]) for name in runs},
            differences=_differences(runs),
            groups=groups,
            rows=table.columns_of_several(results),
            cells={name: table.cells(results[name]) for name in runs},
            means={title: rows for title, rows in means.items() if len(groups[title]) > 1},
            notes=notes,
            pictures=dict.fromkeys(numbers, "") | pictures,
            numbers=numbers,
        )
        files.write_text(path, html)
    except (OSError, ValueError) as error:  # ValueError: it names no file
        raise UserError(f"--out={path}: cannot be written: {error}") from error
    titled = len(groups) > 1
    shown = [f"{title}\n\n" * titled + table.text(rows) for title, rows in means.items()]
    return "\n\n".join([*shown, *notes])


def _other_places(folders: Sequence[Path]) -> str:
    """In which versions and devices runs differ."""
    places = [ConfigDict(files.read_json(folder / "environment.json")) for folder in folders]
    found = [line for place in places for line in configs.differences(places[0], place)]
    return "; ".join(dict.fromkeys(found))


def _groups(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """The names of the runs of each recipe (`run_folder.recipe`), by one for all of them: `name_*`
    if they differ in the number at their end, and no other run begins so."""
    found: dict[str, list[str]] = {}
    for name, folder in folders.items():
        recipe = json.dumps(run_folder.recipe(folder), sort_keys=True, default=repr)
        found.setdefault(recipe, []).append(name)
    groups = {}
    for names in found.values():
        start, *others = {name.rstrip(string.digits) for name in names}
        others += [name for name in folders if name not in names and name.startswith(start)]
        several = len(names) > 1 and not others
        groups[f"{start}*" if several else ", ".join(names)] = names
    return groups


def _colours(groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The colour of each run: that of its group, if there are several."""
    parts = list(groups.values())
    if len(parts) == 1:
        parts = [[name] for name in parts[0]]
    palette = style.palette(len(parts))
    return {name: colour for names, colour in zip(parts, palette, strict=True) for name in names}


def _names(folders: Collection[Path]) -> list[str]:
    """The names of different folders, with as many of the folders above as tell them apart."""
    length = next(
        n for n in itertools.count(1) if len({one.parts[-n:] for one in folders}) == len(folders)
    )
    return ["/".join(folder.parts[-length:]) for folder in folders]


def _link(report: Path, path: Path) -> str:
    """The relative link from a file to a report."""
    return quote(os.fsencode(os.path.relpath(report, path.resolve().parent)))


def _differences(runs: Mapping) -> dict[str, list[str]]:
    """The values of the runs, by each key of their configs of which they differ."""
    values = [configs.flat(config) for config in runs.values()]
    keys = dict.fromkeys(key for one in values for key in one)
    shown = {key: [repr(one[key]) if key in one else "-" for one in values] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}
