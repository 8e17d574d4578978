"""Writes the comparison of several runs, `comparison.html`: their configs, results and curves."""

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import matplotlib

from maect_jax import config as configs
from maect_jax import files
from maect_jax.errors import UserError
from maect_jax.evals import runner, table
from maect_jax.report import build, style


def compare(histories: Mapping[Path, Sequence[dict]], path: Path) -> str:
    """Writes the comparison of runs that have a report.

    Args:
      histories: the lines of `build.read_history`, by the resolved folder of the run.
      path: the file to write.

    Returns:
      What the terminal shows: the mean and the standard deviation of the results, or why there are
      none.

    Raises:
      UserError: it cannot be written.
    """
    folders = dict(zip(_names(histories), histories, strict=True))
    runs = {name: build.read_config(folder) for name, folder in folders.items()}
    results = {name: runner.read_results(folder) for name, folder in folders.items()}
    colours = dict(zip(runs, style.palette(len(runs)), strict=True))
    lines = {name: histories[folder] for name, folder in folders.items()}
    history = [line | {"run": name} for name in lines for line in lines[name]]
    with matplotlib.rc_context(fname=style.SETTINGS):
        figures, numbers = build.curves(build.in_order(history), colours)
        pictures = {key: style.svg(figure, key) for key, figure in figures.items() if figure}
    rows, lacks, means, reason = table.columns_of_several(results), table.lacking(results), {}, ""
    if lacks:
        listed = "; ".join(f"{name} lacks {parts}" for name, parts in lacks.items())
        reason = f"No mean, as the runs do not have the same results: {listed}."
    elif rows:
        means = table.cells_of_several(results)
    else:
        reason = "No run has results yet."
    html = build.TEMPLATES.get_template("comparison.html").render(
        runs=runs,
        links={name: _link(folder / "report.html", path) for name, folder in folders.items()},
        colours=colours,
        timings={name: build.stage_timings(lines[name]) for name in runs},
        differences=_differences(runs),
        rows=rows,
        cells={name: table.cells(results[name]) for name in runs},
        means=means,
        reason=reason,
        pictures=dict.fromkeys(numbers, "") | pictures,
        numbers=numbers,
    )
    try:
        files.write_text(path, html)
    except (OSError, ValueError) as error:  # ValueError: it names no file
        raise UserError(f"--out={path}: cannot be written: {error}") from error
    return table.text(means) if means else reason


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
