"""Figures of numbers: training curves, the results of several runs, the map of the features,
probes, the confusion matrix."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from maect_jax.evals import table
from maect_jax.report import style

_FEW_POINTS = 10  # of a curve, which are marked: one point alone has no line
_WINDOWS = 20  # of the running mean, in a curve
_MANY_RUNS = 5  # whose running means are thin
_LEGEND_WIDTH = 55  # characters in a line
_MARKERS = "osD^vP*Xph"  # with ten colours; they tell classes apart without colour, too
_GRID = dict(axis="y", color=style.GREY, alpha=0.3, linewidth=0.6)
_PANELS = 3  # beside each other, of a comparison
_DOT = dict(markersize=3.5, markeredgewidth=0, alpha=0.85, clip_on=False)

Curves = dict[str, dict[str, list[tuple[int, float]]]]  # (step, value) by stage, then by run


def by_stage(history: Sequence[dict], key: str) -> Curves:
    """The points of `key` by stage, then by the `run` of an entry, which it may lack."""
    found: Curves = {}
    for entry in history:
        if entry.get(key) is not None:  # null at a step that was not finite
            runs = found.setdefault(entry["stage"], {})
            runs.setdefault(entry.get("run", ""), []).append((entry["step"], entry[key]))
    return found


def _is_drawn(runs: Mapping[str, Sequence]) -> bool:
    """Whether a stage has a curve: one point is none."""
    return any(len(points) > 1 for points in runs.values())


def curves(found: Curves, label: str, colours: Mapping[str, str]) -> Figure | None:
    """Draws a panel for each stage with its curves, a colour a run, else that of the stage; None
    if there is no curve.

    A long curve is drawn faint, with its running mean over a twentieth of the points.
    """
    stages = {stage: runs for stage, runs in found.items() if _is_drawn(runs)}
    if not stages:
        return None
    figure = style.new_figure(2.3)
    # Accuracies of two stages can be compared, losses cannot.
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=label != "loss")[0]
    for panel, (stage, runs) in zip(panels, stages.items(), strict=True):
        for run, points in runs.items():
            curve, colour = np.transpose(points), colours.get(run, style.COLOURS[stage])
            window = len(points) // _WINDOWS
            alpha = 0.4 / len(runs) if window > 1 else 1.0
            marker = "o" if len(points) <= _FEW_POINTS else None
            options = dict(marker=marker, markersize=3, clip_on=False)  # whole markers at the edge
            panel.plot(*curve, color=colour, linewidth=1.0, alpha=alpha, **options)
            if window > 1:
                kernel = np.full(window, 1 / window)
                means = (np.convolve(values, kernel, "valid") for values in curve)
                panel.plot(*means, color=colour, linewidth=1.8 if len(runs) < _MANY_RUNS else 1.0)
        panel.set(title=stage, xlabel="step")
        panel.margins(x=0.02)
        panel.grid(**_GRID)
        panel.locator_params(axis="x", nbins=3, integer=True)
        panel.locator_params(axis="y", nbins=5)
    panels[0].set_ylabel(label)
    return figure


def legend(figure: Figure, title: str, colours: Mapping[str, str]) -> None:
    """Adds what the colours of a figure's lines stand for, below them."""
    lines = [Line2D([], [], color=colour, linewidth=1.8) for colour in colours.values()]
    sizes = dict(fontsize=7, title_fontsize=7, handlelength=0.8, handletextpad=0.3, columnspacing=1)
    options = dict(title=title, ncols=min(len(lines), 12), **sizes)
    figure.legend(lines, list(colours), loc="outside lower center", **options)


def spread(axes, values: Sequence[float], y: float, color: str, **options) -> None:
    """Draws the mean of several values at the height `y`, and their unbiased standard deviation as
    a bar; `options` are those of the marker."""
    mean = np.mean(values)
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0
    axes.hlines(y, mean - deviation, mean + deviation, color=color, linewidth=1.4)
    axes.plot(mean, y, linestyle="", color=color, clip_on=False, **options)


def panels_of(titles: Sequence[str], lines: Sequence[str], height: float) -> tuple[Figure, list]:
    """A figure with a panel for each title, three beside each other, and its axes. Their y axis has
    named lines, the first at the top, at 0, -1, ..., `height` inches apart."""
    down = -(-len(titles) // _PANELS)
    figure = style.new_figure(down * (0.5 + height * len(lines)) + 0.3, wspace=0.12)
    axes = figure.subplots(down, min(len(titles), _PANELS), sharey=True, squeeze=False).flat
    for panel in axes[len(titles) :]:
        panel.remove()
    for panel, title in zip(axes, titles, strict=False):
        panel.set_title(title, fontsize=8)
        panel.set_ylim(0.5 - len(lines), 0.5)
        panel.set_yticks(range(0, -len(lines), -1), lines)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid(**_GRID | dict(axis="x"))
        panel.locator_params(axis="x", nbins=3)
        panel.margins(x=0.1)
    return figure, list(axes[: len(titles)])


def comparison(
    tables: Mapping[str, Mapping[str, dict]],
    groups: Mapping[str, Sequence[str]],
    colours: Mapping[str, str],
) -> Figure | None:
    """Draws a panel for each column of the results: in each row the dots of the runs, and the mean
    of each group with its standard deviation. None if there are no results.

    Args:
      tables: percentages by row and column (`table.percentages`), by run.
      groups: the runs, by the title of their group.
      colours: by run.
    """
    every = [(row, c) for found in tables.values() for row, line in found.items() for c in line]
    every = [(row, column) for row, column in every if not table.is_difference(row)]
    if not every:
        return None
    rows, columns = (list(dict.fromkeys(titles)) for titles in zip(*every, strict=True))
    of_row = {
        row: [title for title, names in groups.items() if any(row in tables[n] for n in names)]
        for row in rows
    }
    most = max(map(len, of_row.values()))
    figure, panels = panels_of(columns, rows, height=max(0.22, 0.1 * most + 0.06))
    markers = dict(zip(groups, itertools.cycle(_MARKERS), strict=False))
    for (panel, column), (place, row) in itertools.product(
        zip(panels, columns, strict=True), enumerate(rows)
    ):
        for i, title in enumerate(of_row[row]):
            y = -place + 0.8 * ((len(of_row[row]) - 1) / 2 - i) / most
            cells = {name: tables[name].get(row, {}) for name in groups[title]}
            found = {name: line[column] for name, line in cells.items() if column in line}
            for name, value in found.items():
                panel.plot(value, y, markers[title], color=colours[name], **_DOT)
            if len(found) > 1:
                colour = colours[groups[title][0]] if len(groups) > 1 else style.GREY
                spread(panel, list(found.values()), y=y, color=colour, marker="|", markersize=8)
        if place:
            panel.axhline(0.5 - place, color=style.GREY, alpha=0.3, linewidth=0.6)
    shown = {name: (title, name) for title, names in groups.items() for name in names}
    if len(groups) > 1:
        shown = {title: (title, names[0]) for title, names in groups.items()}
    kinds = {key: dict(marker=markers[t], color=colours[n]) for key, (t, n) in shown.items()}
    marks(figure, {key: kind | _DOT for key, kind in kinds.items()})
    return figure


def marks(figure: Figure, kinds: Mapping[str, dict]) -> None:
    """Adds what the markers of a figure stand for, below them: the options of each by its name."""
    handles = [Line2D([], [], linestyle="", **options) for options in kinds.values()]
    columns = max(1, min(len(kinds), _LEGEND_WIDTH // (max(map(len, kinds)) + 4)))
    options = dict(ncols=columns, fontsize=8, handletextpad=0.1, columnspacing=1)
    figure.legend(handles, list(kinds), loc="outside lower center", **options)


def single_points(found: Curves) -> dict[tuple[str, int], dict[str, float]]:
    """What `curves` does not draw: the values by stage and step, then by run."""
    singles: dict[tuple[str, int], dict[str, float]] = {}
    for stage, runs in found.items():
        if not _is_drawn(runs):
            for run, ((step, value),) in runs.items():
                singles.setdefault((stage, step), {})[run] = value
    return singles


def feature_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws points `[N, 2]` in the colours of their labels `[N]`; -1 is grey."""
    present = np.unique(labels)
    names, count = [style.class_name(classes, label) for label in present], len(present)
    colours = style.palette(count)
    figure = style.new_figure(4.7)
    axes = figure.subplots()
    style.hide_axes(axes)
    draw = partial(axes.scatter, s=12, linewidths=0, alpha=0.8, rasterized=True)
    for i, label in enumerate(present):
        colour = colours[i] if label >= 0 else style.GREY
        marker = _MARKERS[i % len(_MARKERS)]
        draw(*points[labels == label].T, color=colour, marker=marker, label=names[i])
    if count <= style.MANY_CLASSES:
        columns = max(1, min(5, _LEGEND_WIDTH // (max(map(len, names)) + 4)))
        options = dict(ncols=columns, handletextpad=0, markerscale=2)
        figure.legend(loc="outside lower center", **options)
    return figure


def probes(results: Mapping[str, dict]) -> Figure | None:
    """Draws a panel for each row of the results with its probes' test accuracies by epoch.

    A line is a learning rate: the higher, the stronger. None if no row has more than one epoch.
    """
    results = {name: result for name, result in results.items() if len(result["epochs_top1"]) > 1}
    if not results:
        return None
    figure = style.new_figure(2.3)
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for panel, (name, result) in zip(panels, results.items(), strict=True):
        accuracies = 100 * np.array(result["epochs_top1"])  # [epochs, rates]
        rates = [probe["last_epoch"]["base_lr"] for probe in result["probes"]]
        ranks = np.argsort(np.argsort(rates)) + 1
        for accuracy, rank in zip(accuracies.T, ranks, strict=True):
            options = dict(color=style.COLOURS[name], alpha=rank / len(rates), linewidth=1.0)
            panel.plot(np.arange(1, len(accuracy) + 1), accuracy, **options)
        panel.set(title=name, xlabel="epoch")
        panel.grid(**_GRID)
        panel.locator_params(nbins=4)
    panels[0].set_ylabel("top-1, percent")
    return figure


def blocks(found: Mapping[str, Mapping[str, dict[str, float]]], depth: int) -> Figure | None:
    """Draws a panel for each column of `table.by_block` with a line for each row, and, as a diamond
    at `depth`, its final features. None if nothing was measured behind blocks."""
    if not found:
        return None
    figure = style.new_figure(2.5)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (column, rows) in zip(panels, found.items(), strict=True):
        for row, values in rows.items():
            line = sorted((int(block), x) for block, x in values.items() if block != "final")
            options = dict(color=style.COLOURS[row], clip_on=False)
            points = np.transpose(line)
            panel.plot(*points, "o-", markersize=3, linewidth=1.4, label=row, **options)
            if "final" in values:
                end = np.transpose([line[-1], (depth, values["final"])])
                panel.plot(*end, "D:", markersize=5, markevery=[1], linewidth=1, **options)
        first = int(panel.dataLim.x0)
        ticks = MaxNLocator(4, integer=True).tick_values(first, depth)
        ticks = [int(tick) for tick in ticks if first <= tick <= depth - (depth - first) / 6]
        panel.set_xticks([*ticks, depth], [*map(str, ticks), "final"])
        panel.set(title=column, xlabel="block")
        panel.grid(**_GRID)
        panel.locator_params(axis="y", nbins=5)
    panels[0].set_ylabel("percent")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    return figure


def selection(selected: Mapping) -> Figure:
    """Draws how the number of clusters was chosen (`evals.selection`): each criterion with its
    standard deviation, relative to its largest, and thick the score; vertical lines are the chosen
    number and, dotted, the runners-up."""
    figure = style.new_figure(2.9)
    axes, numbers = figure.subplots(squeeze=False)[0, 0], selected["grid"]
    criteria = selected["criteria"]
    for (name, values), colour in zip(criteria.items(), style.palette(len(criteria)), strict=True):
        excess, deviation = (np.array(values[key]) for key in ("excess", "deviation"))
        scale = max(excess.max(), 1e-9)
        low, high = (excess - deviation) / scale, (excess + deviation) / scale
        axes.fill_between(numbers, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(numbers, excess / scale, color=colour, linewidth=1.0, label=name)
    axes.plot(numbers, selected["score"], color=style.GREY, linewidth=2.4, label="score")
    axes.axvline(selected["chosen"], color=style.ORANGE, linewidth=1.4)
    for number in selected["runners_up"]:
        axes.axvline(number, color=style.ORANGE, linewidth=1.2, linestyle=":")
    axes.set_xscale("log")
    ticks = [number for number in numbers if number & (number - 1) == 0]
    axes.set_xticks(ticks, [*map(str, ticks)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="clusters", ylabel="of the largest", ylim=(-0.25, 1.15))
    axes.grid(**_GRID)
    options = dict(ncols=5, fontsize=7, handlelength=1.2, columnspacing=1)
    figure.legend(loc="outside lower center", **options)
    return figure


def confusion(labels: np.ndarray, clusters: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws how many images of each class (column) each cluster (row) holds; both int `[N]`.

    Cluster i is matched with the i-th class, so the diagonal is what the accuracy counts. With many
    classes, shades show the fraction of a cluster instead.
    """
    present = np.unique(labels)
    counts = np.zeros((max(clusters.max() + 1, len(present)), len(present)), int)
    np.add.at(counts, (clusters, np.searchsorted(present, labels)), 1)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = style.new_figure(4.2)
    axes = figure.subplots()
    if max(counts.shape) > style.MANY_CLASSES:
        axes.imshow(fractions, cmap=style.SHADES, vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="label, by number", ylabel="cluster, by the class it is matched with")
        axes.locator_params(nbins=5)
        return figure
    for (row, column), count in np.ndenumerate(counts):
        colour = style.ORANGE if row == column else style.BLUE
        alpha = 0.75 * fractions[row, column]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=alpha))
        if count:
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5)
    names = [style.class_name(classes, label) for label in present]
    unmatched = [f"cluster {row}" for row in range(len(names), len(counts))]
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(counts) - 0.5, -0.5))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(counts)), names + unmatched)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="label", ylabel="cluster, by the class it is matched with")
    return figure
