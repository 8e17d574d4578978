"""k-means on frozen features, compared with the labels if there are any.

scikit-learn and SciPy take a second to import, so only the functions that need them do.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from maect_jax import files
from maect_jax.config import Rule, between, not_negative, one_of, positive, some_of
from maect_jax.data import sources, subsets
from maect_jax.data.sources import Source
from maect_jax.errors import UserError
from maect_jax.evals import assignment, hierarchy, kmeans, selection
from maect_jax.evals.assignment import ARRAYS, Centres, Space
from maect_jax.evals.base import Protocol, Result, Row
from maect_jax.evals.features import Rows

_LOGGER = logging.getLogger(__name__)
AUTO = "auto"
_LINES = 2**16  # of `clusters.csv` at a time
# What it has of each image in each row, as Python formats it.
_COLUMNS = {"clusters": "d", "distance": ".4g", "margin": ".4g", "rank": "d"}
_GROUP = {"group": "d"}  # where `config.eval.cluster.groups` asks for it
_SILHOUETTE = 10_000  # images, a random draw if there are more: it compares each with all

# Well-known parts of ImageNet-1k, by WordNet ids.
SUBSETS = {
    "imagenet_dogs15": (
        "n02085936", "n02086646", "n02088238", "n02091467", "n02097130", "n02099601", "n02101388",
        "n02101556", "n02102177", "n02105056", "n02105412", "n02105855", "n02107142", "n02110958",
        "n02112137",
    ),
    "imagenet10": (
        "n02056570", "n02085936", "n02128757", "n02690373", "n02692877", "n03095699", "n04254680",
        "n04285008", "n04467665", "n07747607",
    ),
}  # fmt: skip


def matched(labels: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The class that the best one-to-one matching gives each of the clusters that occur, in their
    order, int32 `[K]`; those without a class have numbers after the classes'."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, clusters)
    classes, columns = linear_sum_assignment(-counts)
    number = np.full(counts.shape[1], -1)
    number[columns] = classes
    rest = np.flatnonzero(number < 0)
    number[rest] = len(counts) + np.arange(len(rest))
    return number.astype(np.int32)


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """ACC (of clusters `matched` with classes), NMI (arithmetic), AMI and ARI, each at most 1."""
    from sklearn import metrics

    classes = np.unique(labels, return_inverse=True)[1]
    places = np.unique(clusters, return_inverse=True)[1]
    return {
        "acc": float((matched(labels, clusters)[places] == classes).mean()),
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "ari": float(metrics.adjusted_rand_score(labels, clusters)),
    }


def silhouette(x: Rows, clusters: np.ndarray, seed: int) -> dict:
    """The silhouette, and the number of images that it is of; empty where it is not defined."""
    from sklearn.metrics import silhouette_score

    drawn = np.arange(len(x))
    if len(x) > _SILHOUETTE:
        drawn = np.random.default_rng(seed).choice(len(x), _SILHOUETTE, replace=False)
    rows, clusters = x[drawn], clusters[drawn]
    if not 1 < len(np.unique(clusters)) < len(rows):
        return {}
    return {"silhouette": float(silhouette_score(rows, clusters)), "silhouette_images": len(rows)}


def cluster(
    row: Row, x: np.ndarray, labels: np.ndarray | None, clusters: int | str
) -> tuple[dict, dict[str, np.ndarray]]:
    """Runs k-means many times, as `config.eval.cluster` says.

    Args:
      row: config and mesh; its features are not used.
      x: features `[N, D]`; L2-normalised, then reduced to principal components, if the config says.
      labels: int `[N]`, used only to evaluate the clusters; `None` if there are none.
      clusters: how many; 0 for as many as there are classes, "auto", or 0 without labels, for a
        number that is chosen.

    Returns:
      The settings; `selection`, how the number was chosen, if it was (`selection.select`); `best`,
      the metrics of the run with the lowest k-means loss, with its silhouette; `mean` and standard
      `deviation` (not unbiased) over all runs; and, where there are more clusters than classes,
      `read_as_classes`, the metrics of the best run with its clusters merged into as many groups as
      classes. The arrays of that best run (`Cluster`), cluster i being matched with the i-th class.
    """
    section, seed = row.config.eval.cluster, row.config.seed
    space = Space.of(x, normalise=section.normalise, pca=section.pca)
    rows = space.view(x)
    common = dict(seed=seed, memory_mb=row.config.eval.memory_mb)
    classes, chosen = 0 if labels is None else len(np.unique(labels)), {}
    if is_chosen(clusters, labels is not None):
        chosen = {"selection": selection.select(rows, mesh=row.run.mesh, **common)}
        clusters = chosen["selection"]["chosen"]
    settings = kmeans.Settings(
        k=int(clusters) or classes, runs=section.runs, batch_size=section.minibatch, **common
    )
    clustering = kmeans.kmeans(rows, settings, row.run.mesh)
    best = int(clustering.loss.argmin())
    places, assigned = np.unique(clustering.clusters[best], return_inverse=True)
    numbers = places.astype(np.int32)
    runs = [{"loss": float(loss)} for loss in clustering.loss]
    if labels is not None:
        scores = (agreement(labels, clusters) for clusters in clustering.clusters)
        runs = [score | run for score, run in zip(scores, runs, strict=True)]
        numbers = matched(labels, assigned)
    centres = clustering.centres[best][places]
    names = list(runs[0])
    values = np.array([[run[name] for name in names] for run in runs])
    metrics = {
        "clusters": settings.k,
        "images": len(x),
        "runs": section.runs,
        "l2_normalised": section.normalise,
        "pca": section.pca,
        "minibatch": section.minibatch,
        **chosen,
        "best": {**runs[best], **silhouette(rows, assigned, seed), "chosen_by": "k-means loss"},
        "mean": dict(zip(names, values.mean(0).tolist(), strict=True)),
        "deviation": dict(zip(names, values.std(0).tolist(), strict=True)),
    }
    merges = hierarchy.merges(centres)
    if labels is not None and len(centres) > classes:
        groups = hierarchy.groups(merges, classes)
        metrics["read_as_classes"] = agreement(labels, groups[assigned])
    _, distance, margin = assignment.nearest(rows, centres)
    found = dict(places=assigned, distance=distance)
    arrays = Centres.of(space, centres, numbers=numbers, **found).arrays()
    arrays |= dict(clusters=numbers[assigned], distance=distance, margin=margin, merges=merges)
    return metrics, arrays | dict(rank=subsets.ranks(assigned, distance))


def is_chosen(clusters: int | str, labelled: bool) -> bool:
    """Whether the number of clusters is chosen, by `config.eval.cluster.clusters`."""
    return clusters == AUTO or (clusters == 0 and not labelled)


def cluster_split(config: ConfigDict, splits: Mapping[str, object]) -> str:
    """The split that is clustered."""
    return config.eval.cluster.split if "val" in splits else "train"


class Cluster(Protocol):
    """k-means of the images of a split, and of well-known subsets.

    Its arrays are of each image of the split `index`, `labels`, `clusters`, `distance` (from the
    centre), `margin` (how much farther the next centre is) and `rank` (from 0 for the image nearest
    to the centre) `[N]`; and those of the clusters, `Centres.arrays` and `merges`
    (`hierarchy.merges`). Earlier versions have only `arrays`.
    """

    name = section = "cluster"
    needs_labels = False
    of_blocks = True
    arrays = ("clusters", "distance", "index", "labels")
    rules: ClassVar = {
        "runs": positive,
        "split": one_of(sources.SPLITS),
        "duplicates": between(0, 1),
        "clusters": Rule(
            "0 (as many as classes), 'auto', or a number below 2^31",
            lambda v, part: v == AUTO or (type(v) is int and not_negative.holds(v, part)),
        ),
        "groups": Rule(
            "0, or at most the number of clusters",
            lambda v, part: (
                v >= 0 and (part.cluster.clusters in (0, AUTO) or v <= part.cluster.clusters)
            ),
        ),
        **dict.fromkeys(("pca", "minibatch"), not_negative),
        "subsets": some_of(SUBSETS),
    }

    def settings(self, config) -> dict:
        found = super().settings(config)
        for key in ("groups", "duplicates"):  # read off the clusters; found by `Near`
            found[self.name].pop(key, None)
        return found | {"saved": [*ARRAYS, "merges"]}  # earlier versions have none

    def check_images(self, config, images) -> None:
        section, split = config.eval.cluster, cluster_split(config, images)
        count = len(images[split])
        if is_chosen(section.clusters, images[split].labelled) and count < selection.FEWEST:
            raise UserError(
                f"config.eval.cluster.clusters={section.clusters!r}: to choose a number takes "
                f"{selection.FEWEST} images, but there are {count} {split} images; set the number, "
                "such as --config.eval.cluster.clusters=2"
            )
        for key in ("pca", "clusters"):
            if section[key] != AUTO and section[key] > count:
                raise UserError(
                    f"config.eval.cluster.{key}={section[key]}: must be at most the number of "
                    f"{split} images ({count})"
                )

    def run(self, row: Row) -> Result:
        section, split = row.config.eval.cluster, cluster_split(row.config, row.images)
        images = row.features[split]
        labels = images.labels if images.labelled else None
        clusters = section.clusters
        if row.whole and is_chosen(clusters, images.labelled):
            clusters = row.whole[self.name]["clusters"]
        metrics, arrays = cluster(row, images.x, labels, clusters)
        metrics = {"split": split} | metrics
        if jax.process_index() == 0:
            if "selection" in metrics:
                tqdm.write(f"{row.name}: {metrics['selection']['words']}")
            if empty := metrics["clusters"] - len(arrays["numbers"]):
                text = "%s: %d of the %d clusters have no image, and are left out"
                _LOGGER.warning(text, row.name, empty, metrics["clusters"])
        if section.subsets:
            metrics["subsets"] = {name: self._subset(row, split, name) for name in section.subsets}
        return Result(metrics, arrays | dict(index=images.records, labels=images.labels))

    def _subset(self, row: Row, split: str, name: str) -> dict:
        """The metrics of the classes of a subset, or why it is skipped."""
        classes, images = row.images[split].classes, row.features[split]
        absent = [wnid for wnid in SUBSETS[name] if wnid not in classes]
        if absent or not images.labelled:
            reason = f"no class {absent[0]}" if absent else "no labels"
            return {"skipped": f"the images have {reason}"}
        wanted = [classes.index(wnid) for wnid in SUBSETS[name]]
        chosen = np.isin(images.labels, wanted)
        if chosen.sum() < max(len(wanted), row.config.eval.cluster.pca):
            return {"skipped": f"there are only {chosen.sum()} images of its classes"}
        return cluster(row, images.x[chosen], images.labels[chosen], 0)[0]

    def summarise(self, run, rows, images) -> None:
        """Lists each image with its label, and with its cluster and place there in every row."""
        found = {name: arrays for name in rows if (arrays := self.read_arrays(run.folder, name))}
        shown = _COLUMNS
        if count := run.config.eval.cluster.groups:
            found = {name: with_groups(arrays, count) for name, arrays in found.items()}
            shown = _COLUMNS | _GROUP
        columns = ["image", "label"]
        for name in found:
            columns += [name, *(f"{name}_{key}" for key in list(shown)[1:])]
        source = images[cluster_split(run.config, images)]
        of_images = partial(lines, source, list(found.values()), shown)
        files.write_csv(run.folder / "clusters.csv", columns, of_images)


def with_groups(arrays: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The arrays of a row, with the `group` of each image; without, where an earlier version has
    written them. Where there are fewer clusters, each is a group, and a warning says so."""
    if "merges" not in arrays:
        return dict(arrays)
    numbers = arrays["numbers"]
    if count > len(numbers):
        _LOGGER.warning(
            "config.eval.cluster.groups=%d: there are only %d clusters, each of which is a group",
            count, len(numbers),
        )  # fmt: skip
    groups = hierarchy.groups(arrays["merges"], count)
    return {**arrays, "group": groups[assignment.places(arrays)]}


def lines(
    source: Source, rows: Sequence[Mapping[str, np.ndarray]], shown: Mapping[str, str] = _COLUMNS
) -> Iterator[Sequence]:
    """The lines of `clusters.csv`: of each image its name, its label, and by the arrays of each row
    what is `shown` of them, a format by its name; empty where a row does not have it."""
    titles = dict(enumerate(source.classes))  # as they are, also where they are no UTF-8
    all_records = [arrays["index"] for arrays in rows] or [np.zeros(0, np.int32)]
    records = np.unique(np.concatenate(all_records))
    for start in range(0, len(records), _LINES):
        part = records[start : start + _LINES]
        labels, columns = np.full(len(part), -1), []
        for arrays in rows:
            places = np.minimum(np.searchsorted(arrays["index"], part), len(arrays["index"]) - 1)
            has = arrays["index"][places] == part
            labels = np.where(has, arrays["labels"][places], labels)
            for key, form in shown.items():
                has_it = has & (key in arrays)  # not in those of earlier versions
                values = arrays.get(key, arrays["clusters"])[places].tolist()
                cells = zip(values, has_it.tolist(), strict=True)
                columns.append([f"{value:{form}}" if is_shown else "" for value, is_shown in cells])
        names = map(source.name, part.tolist())
        own = (titles.get(label, label) if label >= 0 else "" for label in labels.tolist())
        yield from zip(names, own, *columns, strict=True)
