"""Pictures of pictures: reconstructions, neighbours in the queue, discovered clusters."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from maect_jax.data import sources
from maect_jax.report import style

_MOMENTS = 4  # of training, whose neighbours are shown
_MONTAGE = 12  # images of a cluster

Records = Callable[[int], dict]  # from a number to `image`, uint8 [H, W, C], and `label`


@style.styled
def reconstructions(images: np.ndarray, mask: np.ndarray, filled: np.ndarray) -> Figure:
    """Originals, what the encoder sees of them, and what the decoder makes of that.

    Args:
      images, filled: uint8 `[Q, H, W, C]`.
      mask: bool `[Q, H, W]`, true where removed.
    """
    count = len(images)
    drawn = style.figure(style.WIDTH * 3.2 / (count + 1.5))
    panels = drawn.subplots(3, count, squeeze=False)
    seen = [style.in_colour(image).copy() for image in images]
    for image, hidden in zip(seen, mask, strict=True):
        image[hidden] = style.HIDDEN
    rows = {"original": images, "masked": seen, "filled in": filled}
    for row, (title, pictures) in zip(panels, rows.items(), strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            style.show(axes, picture)
        _row_title(row[0], title)
    return drawn


@style.styled
def neighbours(
    watched: Sequence[dict],
    moments: Sequence[tuple[str, np.ndarray]],
    records: Records,
    classes: Sequence[str],
) -> Figure:
    """For each watched image its nearest rows of the queue at some moments of training.

    Args:
      watched: the images with their labels (-1: unknown).
      moments: name and neighbours' record numbers int `[Q, k]` (-1: none), in order of time.
      records: the training images.
      classes: names of the labels.
    """
    moments = [moments[i] for i in spread(len(moments), _MOMENTS)]
    near = moments[0][1].shape[1]
    # A narrow empty column stands between two moments.
    widths = [1.0] + ([0.25] + [1.0] * near) * len(moments)
    drawn = style.figure(style.WIDTH * (len(watched) + 1.2) / (sum(widths) + 1.5))
    panels = drawn.subplots(len(watched), len(widths), width_ratios=widths, squeeze=False)
    for axes in panels.flat:
        style.bare(axes)
    panels[0, 0].set_title("image", fontsize=8)
    for row, example in zip(panels, watched, strict=True):
        style.show(row[0], example["image"])
        _row_title(row[0], sources.class_name(classes, example["label"]), fontsize=8)
    for moment, (title, found) in enumerate(moments):
        first = 2 + moment * (near + 1)
        panels[0, first + near // 2].set_title(title, fontsize=8)
        for row, example, nearest in zip(panels, watched, found, strict=True):
            for axes, record in zip(row[first:], nearest, strict=False):
                _neighbour(axes, int(record), example["label"], records)
    return drawn


def _neighbour(axes, record: int, label: int, records: Records) -> None:
    if record < 0:
        axes.text(0.5, 0.5, "-", ha="center", va="center", transform=axes.transAxes)
        return
    neighbour = records(record)
    style.show(axes, neighbour["image"])
    if neighbour["label"] == label >= 0:
        frame = dict(fill=False, edgecolor=style.COLOURS["ct"], linewidth=2, clip_on=False)
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **frame))


@style.styled
def montage(
    distance: np.ndarray,
    labels: np.ndarray,
    clusters: np.ndarray,
    index: np.ndarray,
    records: Records,
    classes: Sequence[str],
) -> Figure:
    """Images of each cluster, from its centre (left) to its rim (right), and the share of the class
    that it is matched with.

    Args:
      distance: of each image `[N]` from the centre of its cluster.
      labels, clusters: int `[N]`; cluster i is the one matched with the i-th class that is there.
        Without labels (-1) a cluster has its number.
      index: int `[N]`, the numbers of the images among `records`.
      records: the images.
      classes: names of the labels.
    """
    present, kept = np.unique(labels), np.unique(clusters)[: style.CLASSES]
    drawn = style.figure(style.WIDTH * (len(kept) + 0.2) / (_MONTAGE + 3.6))
    panels = drawn.subplots(len(kept), _MONTAGE, squeeze=False)
    for axes in panels.flat:
        style.bare(axes)
    for row, cluster in enumerate(kept):
        members = np.flatnonzero(clusters == cluster)
        members = members[np.argsort(distance[members], kind="stable")]
        for axes, place in zip(panels[row], spread(len(members), _MONTAGE), strict=False):
            style.show(axes, records(int(index[members[place]]))["image"])
        title = f"cluster {cluster}"
        if cluster < len(present) and present[cluster] >= 0:
            share = (labels[members] == present[cluster]).mean()
            title = f"{sources.class_name(classes, present[cluster])} {share:.0%}"
        title += f"\n{len(members)} image{'s' * (len(members) != 1)}"
        _row_title(panels[row, 0], title, fontsize=7.5)
    return drawn


def _row_title(axes, title: str, **options) -> None:
    axes.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=3, **options)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places, the first and the last among them, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()
