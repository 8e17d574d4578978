"""Pictures of numbers: curves, the map of the features, the confusion of clusters and labels."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from maect_jax.data import sources
from maect_jax.evals import table
from maect_jax.report import style

MAP_IMAGES = 1_000  # a map of more is a cloud, and t-SNE takes its time
_FEW = 10  # points in a curve, which are marked: one alone has no line
_SMOOTHED = 20  # windows in a curve
_LEGEND = 55  # characters that fit into a row of the legend
_MARKS = "osD^vP*Xph"  # with ten colours: classes are told apart without colour, too


def _stages(metrics: Sequence[dict], key: str) -> dict[str, tuple[list, list]]:
    """Steps and values of `key` by stage, in order."""
    found: dict[str, tuple[list, list]] = {}
    for entry in metrics:
        if entry.get(key) is not None:  # as that of a bad step is
            steps, values = found.setdefault(entry["stage"], ([], []))
            steps.append(entry["step"])
            values.append(entry[key])
    return found


def _running_mean(steps: Sequence[int], values: Sequence[float], window: int):
    """Means over `window` neighbouring points, at the mean of their steps."""
    return (np.convolve(x, np.full(window, 1 / window), "valid") for x in (steps, values))


@style.styled
def curves(metrics: Sequence[dict], key: str, label: str) -> Figure | None:
    """A panel a stage with its curve of `key`; `None` where nothing has it.

    A long curve is drawn faint, with its running mean over a twentieth of the points.
    """
    stages = _stages(metrics, key)
    if not stages:
        return None
    drawn = style.figure(2.3)
    # Accuracies of two stages may be compared, losses may not.
    panels = drawn.subplots(1, len(stages), squeeze=False, sharey=key != "loss")[0]
    for panel, (stage, (steps, values)) in zip(panels, stages.items(), strict=True):
        colour, window = style.COLOURS[stage], len(values) // _SMOOTHED
        alpha, mark = 0.4 if window > 1 else 1.0, "o" if len(values) <= _FEW else None
        look = dict(marker=mark, markersize=3, clip_on=False)  # nor cut a mark at the edge
        panel.plot(steps, values, color=colour, linewidth=1.0, alpha=alpha, **look)
        if window > 1:
            panel.plot(*_running_mean(steps, values, window), color=colour, linewidth=1.8)
        panel.set_title(stage)
        panel.set_xlabel("step")
        panel.margins(x=0.02)
        panel.grid(axis="y", color=style.FAINT, alpha=0.3, linewidth=0.6)
        panel.locator_params(axis="x", nbins=3, integer=True)
        panel.locator_params(axis="y", nbins=5)
    panels[0].set_ylabel(label)
    return drawn


@style.styled
def feature_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Points `[N, 2]` in the colour of their label; labels of -1 are drawn in grey."""
    drawn = style.figure(4.7)
    axes = drawn.subplots()
    style.bare(axes)
    shown = np.unique(labels)
    names = [sources.class_name(classes, label) for label in shown]
    for place, (label, colour) in enumerate(zip(shown, style.palette(len(shown)), strict=True)):
        axes.scatter(
            *points[labels == label].T,
            s=12,
            color=colour if label >= 0 else style.FAINT,
            marker=_MARKS[place % len(_MARKS)],
            linewidths=0,
            alpha=0.8,
            label=names[place],
            rasterized=True,
        )
    if len(shown) <= style.CLASSES:
        columns = max(1, min(5, _LEGEND // (max(map(len, names)) + 4)))
        options = dict(ncols=columns, handletextpad=0, markerscale=2)
        drawn.legend(loc="outside lower center", **options)
    return drawn


@style.styled
def probes(results: Mapping[str, dict]) -> Figure | None:
    """A panel a row of the results with its probes' test accuracies by epoch, a line a learning
    rate; `None` where there are none."""
    found = {}
    for name, result in results.items():
        for protocol in ("probe", "probe_augmented"):  # the latter, where both are there
            if table.there(result, protocol):
                found[name] = result[protocol]
    if not found:
        return None
    drawn = style.figure(2.3)
    panels = drawn.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for panel, (name, result) in zip(panels, found.items(), strict=True):
        accuracies = 100 * np.array(result["epochs_top1"])
        rates = [probe["last_epoch"]["base_lr"] for probe in result["probes"]]
        strong = np.argsort(np.argsort(rates)) + 1  # the higher the rate, the stronger the line
        for line, rank in zip(accuracies.T, strong, strict=True):
            epochs = np.arange(1, len(line) + 1)
            colour = style.COLOURS.get(name, style.FAINT)
            panel.plot(epochs, line, color=colour, alpha=rank / len(rates), linewidth=1.0)
        panel.set(title=name, xlabel="epoch")
        panel.grid(axis="y", color=style.FAINT, alpha=0.3, linewidth=0.6)
        panel.locator_params(nbins=4)
    panels[0].set_ylabel("top-1, percent")
    return drawn


@style.styled
def confusion(labels: np.ndarray, clusters: np.ndarray, classes: Sequence[str]) -> Figure:
    """How many images of each class (column) each cluster (row) holds.

    Cluster i is the one matched with class i, so the diagonal is what the accuracy counts. With
    many classes, the share of each in a cluster as a shade.
    """
    present = np.unique(labels)
    counts = np.zeros((max(clusters.max() + 1, len(present)), len(present)), int)
    np.add.at(counts, (clusters, np.searchsorted(present, labels)), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    drawn = style.figure(4.2)
    axes = drawn.subplots()
    if max(counts.shape) > style.CLASSES:
        axes.imshow(shares, cmap=style.SHADES, vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="label, by number", ylabel="cluster, by the class it is matched with")
        axes.locator_params(nbins=5)
        return drawn
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        colour = style.COLOURS["ct" if row == column else "mae"]
        square = Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.75 * share)
        axes.add_patch(square)
        if count:
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5)
    names = [sources.class_name(classes, label) for label in present]
    others = [f"cluster {row}" for row in range(len(names), len(counts))]
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(counts) - 0.5, -0.5))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(counts)), names + others)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="label", ylabel="cluster, by the class it is matched with")
    return drawn
