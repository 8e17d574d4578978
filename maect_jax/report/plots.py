"""Pictures of numbers: curves, the map of the features, the confusion of clusters and labels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize

from maect_jax.report import style

MAP_IMAGES = 1_000  # t-SNE of more takes its time
_SMOOTHED = 20  # windows in a curve
_LEGEND = 55  # characters that fit into a row of the legend
_MARKS = "osD^vP*Xph"  # with ten colours: classes are told apart without colour, too


def _stages(metrics: Sequence[dict], key: str) -> dict[str, tuple[list, list]]:
    """Steps and values of `key` by stage, in order."""
    found: dict[str, tuple[list, list]] = {}
    for entry in metrics:
        if key in entry:
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
        panel.plot(steps, values, color=colour, linewidth=1.0, alpha=0.4 if window > 1 else 1.0)
        if window > 1:
            panel.plot(*_running_mean(steps, values, window), color=colour, linewidth=1.8)
        panel.set_title(stage)
        panel.set_xlabel("step")
        panel.margins(x=0.02)
        panel.grid(axis="y", color=style.FAINT, alpha=0.3, linewidth=0.6)
        panel.locator_params(axis="x", nbins=3)
        panel.locator_params(axis="y", nbins=5)
    panels[0].set_ylabel(label)
    return drawn


def map_points(x: np.ndarray) -> np.ndarray:
    """t-SNE of features `[N, D]`, L2-normalised first, as k-means sees them: `[N, 2]`.

    Features that are all the same have one place.
    """
    x = normalize(x)
    if len(x) < 4 or np.ptp(x, axis=0).max() < 1e-6:
        return np.zeros((len(x), 2))
    perplexity = min(30.0, len(x) / 4)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(x)


@style.styled
def feature_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Points `[N, 2]` in the colour of their label; labels of -1 are drawn in grey."""
    drawn = style.figure(4.7)
    axes = drawn.subplots()
    style.bare(axes)
    shown = np.unique(labels)
    names = [style.name_of(classes, label) for label in shown]
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
def confusion(labels: np.ndarray, clusters: np.ndarray, classes: Sequence[str]) -> Figure:
    """How many images of each class (column) each cluster (row) holds.

    Cluster i is the one matched with class i, so the diagonal is what the accuracy counts.
    """
    present = np.unique(labels)
    counts = np.zeros((len(present), len(present)), int)
    np.add.at(counts, (clusters, np.searchsorted(present, labels)), 1)
    names = [style.name_of(classes, label) for label in present]
    drawn = style.figure(4.2)
    axes = drawn.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        colour = style.COLOURS["ct" if row == column else "mae"]
        square = Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.75 * share)
        axes.add_patch(square)
        if count:
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5)
    ticks = range(len(names))
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="label", ylabel="cluster, by the class it is matched with")
    return drawn
