"""Figures of images: reconstructions, nearest neighbours, clusters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from maect_jax.data.base import evenly_spaced
from maect_jax.report import style

_COLUMNS = 4  # groups of neighbours in a figure
_MONTAGE = 12  # images of a cluster

# From a record number to `image`, uint8 [H, W, C], and `label` (-1: unknown).
Records = Callable[[int], dict]


def reconstructions(images: np.ndarray, mask: np.ndarray, filled: np.ndarray) -> Figure:
    """Draws images uint8 `[Q, H, W, C]`, what the encoder sees of them, and what the decoder makes
    of that, `filled`; the mask, bool `[Q, H, W]`, is true where they lack pixels."""
    figure = style.new_figure(style.WIDTH * 3.2 / (len(images) + 1.5))
    panels = figure.subplots(3, len(images), squeeze=False)
    masked = np.stack([style.to_rgb_image(image) for image in images])
    masked[mask] = style.GREY_RGB
    rows = {"original": images, "masked": masked, "filled in": filled}
    for row, (title, pictures) in zip(panels, rows.items(), strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            style.show(axes, picture)
        _row_title(row[0], title)
    return figure


def neighbours(
    queries: Sequence[dict],
    found: Mapping[str, np.ndarray],
    records: Records,
    classes: Sequence[str],
) -> Figure:
    """Draws some images, each with its nearest neighbours at several times or by several encoders.

    Neighbours with the label of the image are framed. `found` has, by title, their record numbers
    among `records`, int `[Q, k]`, nearest first (-1: none); of many titles a few are drawn, the
    first and the last among them.
    """
    chosen = [list(found.items())[i] for i in evenly_spaced(len(found), _COLUMNS)]
    k = chosen[0][1].shape[1]
    widths = [1.0] + ([0.25] + [1.0] * k) * len(chosen)  # a gap stands before each group
    figure = style.new_figure(style.WIDTH * (len(queries) + 1.2) / (sum(widths) + 1.5))
    panels = figure.subplots(len(queries), len(widths), width_ratios=widths, squeeze=False)
    for axes in panels.flat:
        style.hide_axes(axes)
    panels[0, 0].set_title("image", fontsize=8)
    for row, query in zip(panels, queries, strict=True):
        style.show(row[0], query["image"])
        _row_title(row[0], style.class_name(classes, query["label"]), fontsize=8)
    frame = partial(Rectangle, (0, 0), 1, 1, fill=False, ec=style.ORANGE, lw=2, clip_on=False)
    for group, (title, nearest) in enumerate(chosen):
        first = 2 + group * (k + 1)
        panels[0, first + k // 2].set_title(title, fontsize=8)
        for row, query, numbers in zip(panels, queries, nearest, strict=True):
            for axes, number in zip(row[first : first + k], numbers, strict=False):
                if number < 0:
                    axes.text(0.5, 0.5, "-", ha="center", va="center", transform=axes.transAxes)
                    continue
                neighbour = records(int(number))
                style.show(axes, neighbour["image"])
                if neighbour["label"] == query["label"] >= 0:
                    axes.add_patch(frame(transform=axes.transAxes))
    return figure


def montage(found: Mapping[str, np.ndarray], records: Records, classes: Sequence[str]) -> Figure:
    """Draws images of each cluster, from the centre (left) to the rim (right).

    The title of a cluster has the class that it is matched with and the fraction of its images that
    are of that class; without labels, its number. `found` has arrays `[N]`: `index`, record
    numbers; `clusters` and `labels` (-1: unknown), int; `distance` from the centre of the cluster.
    Cluster i is matched with the i-th class that occurs.
    """
    labels, clusters = found["labels"], found["clusters"]
    present, drawn = np.unique(labels), np.unique(clusters)[: style.MANY_CLASSES]
    figure = style.new_figure(style.WIDTH * (len(drawn) + 0.2) / (_MONTAGE + 3.6))
    panels = figure.subplots(len(drawn), _MONTAGE, squeeze=False)
    for axes in panels.flat:
        style.hide_axes(axes)
    for row, cluster in zip(panels, drawn, strict=True):
        members = np.flatnonzero(clusters == cluster)
        members = members[np.argsort(found["distance"][members], kind="stable")]
        chosen = members[evenly_spaced(len(members), _MONTAGE)]
        for axes, number in zip(row, found["index"][chosen], strict=False):
            style.show(axes, records(int(number))["image"])
        title = f"cluster {cluster}"
        if cluster < len(present) and present[cluster] >= 0:
            fraction = (labels[members] == present[cluster]).mean()
            title = f"{style.class_name(classes, present[cluster])} {fraction:.0%}"
        title += f"\n{len(members)} image{'s' * (len(members) != 1)}"
        _row_title(row[0], title, fontsize=7.5)
    return figure


def _row_title(axes, title: str, **options) -> None:
    axes.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=3, **options)
