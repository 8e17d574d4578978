"""From features and a config to the results of each protocol."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from maect_jax import config as configs
from maect_jax import sharding
from maect_jax.config import (
    Rule,
    Rules,
    fraction,
    not_negative,
    numbers_above_0,
    one_of,
    positive,
    some_of,
)
from maect_jax.data import augment, bad_images, loader, sources, subsets
from maect_jax.errors import UserError
from maect_jax.evals import cluster, export, features, knn, lowshot, maps, probe
from maect_jax.evals.features import Features
from maect_jax.models import vit
from maect_jax.stages import optim
from maect_jax.stages.base import CROP_SCALE

_PART = 8192  # images that are classified at a time
_QUERIES, _NEIGHBOURS = 8, 5  # of the page's sheet of neighbours
_PROBE_SEED = 100  # no training stage has this number: the probe's crops are its own


@dataclass(frozen=True)
class Row:
    """One row of the results: an encoder, and what is at hand to evaluate it.

    Attributes:
      config: the whole config.
      encode: normalised images to features.
      features: by split, "train" and "val"; an evaluation without labels may have "train" alone.
      splits, broken: by split, the images, and what counts those that cannot be read.
      mesh: the device mesh, which must be the current one.
      classifier: of the features, kernel `[D, C]` and bias `[C]`, if the encoder came with one.
    """

    config: ConfigDict
    encode: features.Encode
    features: Mapping[str, Features]
    splits: Mapping[str, sources.Source]
    broken: Mapping[str, bad_images.BadImages]
    mesh: object
    classifier: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def memory_mb(self) -> int:
        return self.config.eval.memory_mb

    @property
    def classes(self) -> int:
        """How many, where all images have labels."""
        return 1 + int(max(found.labels.max() for found in self.features.values()))


def neighbours(row: Row) -> list[dict]:
    """k-NN."""
    train, test = row.features["train"], row.features["val"]
    section = row.config.eval.knn
    return knn.knn(
        train.x, train.labels, test.x, test.labels, section.k, row.mesh, row.memory_mb,
        section.temperature, section.standardise,
    )  # fmt: skip


def retrieved(row: Row) -> tuple[dict, dict[str, np.ndarray]]:
    """No results, but the nearest training images of some images: `index` `[Q]` and `neighbours`
    `[Q, k]`, record numbers. The images are held-out ones, where there are such, and never their
    own neighbours."""
    train, test = row.features["train"], row.features.get("val", row.features["train"])
    places = np.unique(np.linspace(0, len(test.x) - 1, _QUERIES).astype(int))
    k = min(_NEIGHBOURS + 1, len(train.x))
    _, found = knn.nearest(train.x, test.x[places], k, row.mesh, row.memory_mb)
    own = np.where("val" in row.features, -1, places)[:, None]
    # Stable: what is not the image itself moves up.
    order = np.argsort(found == own, axis=1, kind="stable")[:, :_NEIGHBOURS]
    neighbours = train.index[np.take_along_axis(found, order, 1)]
    return {}, {"index": test.index[places], "neighbours": neighbours}


def classified(row: Row) -> dict:
    """The accuracy of the classifier that the encoder came with."""
    test, (kernel, bias) = row.features["val"], row.classifier
    if row.classes != len(bias):
        return {"skipped": f"the classifier knows {len(bias)} classes, the labels {row.classes}"}
    top1, top5 = 0, 0
    for start in range(0, len(test.x), _PART):
        scores = test.x[start : start + _PART] @ kernel + bias
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        hits = ranked == test.labels[start : start + _PART, None]
        top1, top5 = top1 + hits[:, 0].sum(), top5 + hits.any(1).sum()
    images = len(test.labels)
    return {"top1": top1 / images, "top5": top5 / images, "classes": len(bias), "images": images}


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which of the training images a choice is made on, bool `[N]`: this fraction, at random."""
    drawn = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.zeros(len(labels), bool)
    chosen[drawn[: round(fraction * len(labels))]] = True
    return chosen


def _probed(row: Row, train: Features, batches: Callable, crops: str) -> dict:
    """The probes, judged after each epoch. `batches` makes them, of so many images and steps, from
    those training images that are not held out."""
    section, seed = row.config.eval.probe, row.config.seed
    tests, chosen_on = {"test": row.features["val"]}, "test"
    apart = held_out(train.labels, section.held_out, seed)
    if apart.any():
        chosen_on = "held-out training images"
        tests[chosen_on] = Features(*(part[apart] for part in train))
        train = Features(*(part[~apart] for part in train))
    size = min(section.batch_size, len(train.labels)) // row.mesh.size * row.mesh.size
    per_epoch = len(train.labels) // size
    lrs = np.array([optim.scaled_lr(lr, size, views=1) for lr in section.base_lrs])
    stream = batches(train, size, per_epoch * section.epochs)
    curves = probe.fit(stream, per_epoch, section.epochs, lrs, tests, row.classes, seed, row.mesh)
    settings = {"crops": crops, "epochs": section.epochs, "batch_size": size}
    return settings | probe.judged(curves, section.base_lrs, chosen_on)


def probed_cached(row: Row) -> dict:
    """Linear probes on features that are extracted once: the fast variant."""

    def batches(train: Features, size: int, steps: int) -> probe.Batches:
        del steps
        return probe.cached_batches(train, size, row.config.seed, row.mesh)

    return _probed(row, row.features["train"], batches, "centre crops, extracted once")


@partial(jax.jit, static_argnums=1)
def _only_view(batch: dict, recipe: augment.Recipe) -> jax.Array:
    return augment.views(batch, recipe)[:, 0]


def probed_augmented(row: Row) -> dict:
    """Linear probes on augmented images, encoded anew in each epoch: the paper's protocol."""
    config, source, broken = row.config, row.splits["train"], row.broken["train"]
    data, size = config.data, config.model.image_size
    scale, seed = config.eval.probe.crop_scale, (config.seed, _PROBE_SEED)
    recipe = augment.Recipe(size, scale, data.mean, data.std, (augment.Photometric(),))

    def batches(train: Features, batch_size: int, steps: int) -> probe.Batches:
        images, lost = source, broken
        if len(train.index) < len(source):
            images = subsets.Subset(source, train.index)
            lost = bad_images.BadImages(images, config.model.channels, data.max_bad_fraction)
        make = loader.TrainRecord(
            images, config.model.channels, size, (scale,), seed, data.scaled_jpeg
        )
        rows = sharding.local_rows(batch_size, row.mesh)
        order = loader.Order(len(images), batch_size, steps, seed, rows)
        for batch in loader.train_batches(order, make, data.workers):
            placed = sharding.put_batch(lost.collect(batch), row.mesh)
            yield row.encode(_only_view(placed, recipe)), placed["label"]
        lost.check()

    found = _probed(row, row.features["train"], batches, "augmented in each epoch")
    return found | {"crop_scale": list(scale)}


def few_labels(row: Row) -> list[dict]:
    """Low-shot logistic regressions."""
    source, section = row.splits["train"], row.config.eval.lowshot

    def names() -> list[str]:
        return [source.name(record) for record in range(len(source))]

    return lowshot.lowshot(
        row.features["train"], row.features["val"], names, row.mesh, section.images,
        section.shares, section.splits, section.lists, section.weight_decays, row.config.seed,
    )  # fmt: skip


def _subset(row: Row, name: str, split: str) -> dict:
    """k-means of the classes of a well-known subset, or why it is skipped."""
    known, found = row.splits[split].classes, row.features[split]
    absent = [wnid for wnid in cluster.SUBSETS[name] if wnid not in known]
    if absent or not found.labelled:
        reason = f"no class {absent[0]}" if absent else "no labels"
        return {"skipped": f"the images have {reason}"}
    wanted = [known.index(wnid) for wnid in cluster.SUBSETS[name]]
    own = np.isin(found.labels, wanted)
    if own.sum() < max(len(wanted), row.config.eval.cluster.pca):
        return {"skipped": f"there are only {own.sum()} images of its classes"}
    return _clustered(row, found.x[own], found.labels[own], 0)[0]


def _clustered(row: Row, x, labels, clusters: int):
    section = row.config.eval.cluster
    return cluster.cluster(
        x, labels, clusters, row.mesh, row.memory_mb, section.runs, section.normalise,
        section.pca, section.minibatch, row.config.seed,
    )  # fmt: skip


def clustered(row: Row) -> tuple[dict, dict[str, np.ndarray]]:
    """k-means of the held-out images, or of the training images where there are no others, and of
    the subsets that were asked for; and what `cluster.cluster` returns of each image."""
    section = row.config.eval.cluster
    split = cluster_split(row.config, row.splits)
    found = row.features[split]
    labels = found.labels if found.labelled else None
    results, own, distance = _clustered(row, found.x, labels, section.clusters)
    parts = {name: _subset(row, name, split) for name in section.subsets}
    arrays = {"clusters": own, "distance": distance, "index": found.index, "labels": found.labels}
    return {"split": split, **results} | ({"subsets": parts} if parts else {}), arrays


def cluster_split(config: ConfigDict, splits: Mapping[str, object]) -> str:
    """Which images are clustered."""
    return config.eval.cluster.split if "val" in splits else "train"


# By the name of the protocol. The first two are not asked for: one is for the page, one for an
# encoder that comes with a classifier.
PROTOCOLS = {
    "retrieval": retrieved,
    "classifier": classified,
    "knn": neighbours,
    "probe": probed_cached,
    "probe_augmented": probed_augmented,
    "lowshot": few_labels,
    "cluster": clustered,
}
NAMES = tuple(PROTOCOLS)[2:]


def settings(config: ConfigDict, task: str) -> dict:
    """What one of `PROTOCOLS` is set by, in plain JSON, with the content of the files it reads."""
    section = config.eval.get(task.removesuffix("_augmented"), ConfigDict()).to_dict()
    lists = [Path(path) for path in section.get("lists", ())]
    texts = [path.read_text() if path.is_file() else "" for path in lists]
    return {"seed": config.seed, "texts": texts, task: section}


def skipped(protocol: str, found: Mapping[str, Features]) -> str:
    """Why a protocol cannot be run on these features; nothing where it can."""
    if protocol in ("retrieval", "cluster") or (
        "val" in found and all(f.labelled for f in found.values())
    ):
        return ""
    return "the images have no labels"


# Rules of the `eval` section

RULES: Rules = {
    "batch_size": positive,
    "protocols": some_of(NAMES),
    "pool": one_of(("", *vit.POOLS, "cls+mean")),
    "dtype": one_of(("", *vit.DTYPES)),
    "map": one_of(maps.NAMES),
    "export": one_of(("", *export.KINDS)),
    **dict.fromkeys(
        ("memory_mb", "knn.temperature", "lowshot.splits", "probe.epochs", "probe.batch_size",
         "cluster.runs"),
        positive,
    ),
    "probe.held_out": fraction,
    "probe.crop_scale": CROP_SCALE,
    **dict.fromkeys(("knn.k", "probe.base_lrs", "lowshot.weight_decays"), numbers_above_0),
    "lowshot.images": Rule("numbers above 0", lambda v, _: all(n > 0 for n in v)),
    "lowshot.shares": Rule("from above 0 to 1", lambda v, _: all(0 < s <= 1 for s in v)),
    "lowshot.lists": Rule(
        "paths of text files that exist",
        lambda v, _: all(isinstance(path, str) and os.path.isfile(path) for path in v),
    ),
    "cluster.split": one_of(sources.SPLITS),
    **dict.fromkeys(("cluster.clusters", "cluster.pca", "cluster.minibatch"), not_negative),
    "cluster.subsets": some_of(cluster.SUBSETS),
}  # fmt: skip


def check(config: ConfigDict, devices: int) -> None:
    """Checks the `eval` section of a config. Raises `UserError`."""
    configs.check(config, "eval", RULES)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, devices)
    if config.eval.map == "umap" and not importlib.util.find_spec("umap"):
        raise UserError("config.eval.map='umap': install the extra, pip install -e '.[umap]'")


def check_neighbours(config: ConfigDict, images: sources.Source) -> None:
    """Raises `UserError` where k-NN wants more neighbours than there are training images."""
    most = max(config.eval.knn.k)
    if "knn" in config.eval.protocols and images.labelled and most > len(images):
        raise UserError(
            f"config.eval.knn.k={config.eval.knn.k}: must be at most the {len(images)} training "
            "images"
        )


def check_images(config: ConfigDict, images: Mapping[str, sources.Source]) -> None:
    """Raises `UserError` where k-means cannot tell how many clusters are wanted, or there are fewer
    images."""
    if "cluster" not in config.eval.protocols:
        return
    section, split = config.eval.cluster, cluster_split(config, images)
    count = len(images[split])
    if not section.clusters and not images[split].labelled:
        raise UserError(
            f"config.eval.cluster.clusters=0: the {split} images have no labels to count; say how "
            "many clusters to find"
        )
    for key in ("pca", "clusters"):
        if section[key] > count:
            raise UserError(
                f"config.eval.cluster.{key}={section[key]}: must be at most the {count} {split} "
                "images"
            )
