"""The images that the stages of a config need, opened, and whether they will do."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.evals import protocols
from maect_jax.stages import build

_STEPS = 2**31 - 1  # that an int32 counts
_LOGGER = logging.getLogger(__name__)


def open_sources(config: ConfigDict, workdir: Path) -> dict[str, sources.Source]:
    """The images, by split; the run's folder may hold their index.

    Images to hold out are opened where a stage needs them or they are there to be monitored.

    Raises:
      UserError: they are not there, are fewer than a batch, or have no labels where a stage cannot
        do without.
    """
    measured = {"finetune", "eval"} & set(config.stages)
    both = measured or config.monitor.every
    try:
        needed = sources.SPLITS if both else sources.SPLITS[:1]
        found = sources.splits(config.data, needed, config.model.channels, workdir)
    except UserError as error:
        _LOGGER.info("no images to hold out: %s", error)
        # Without labels, or to train alone, images to hold out need not be there.
        found = sources.splits(config.data, sources.SPLITS[:1], config.model.channels, workdir)
        if measured and found["train"].labelled:
            raise
    bare = [split for split, source in found.items() if not source.labelled]
    if "finetune" in config.stages and bare:
        raise UserError(
            f"config.data.path={config.data.path!r}: the images of {' and '.join(bare)} have no "
            "labels, which finetune needs; leave it out of config.stages"
        )
    enough(config, found["train"])
    if "eval" in config.stages and "cluster" in config.eval.protocols:
        _clusterable(config, found)
    return found


def enough(config: ConfigDict, source: sources.Source) -> None:
    """Raises `UserError` where a stage needs more training images, or has more steps than count."""
    images = len(source)
    for name in config.stages:
        if name == "eval":
            continue
        size, seen = config[name].batch_size, len(build.training_images(config, name, source))
        if size > seen:
            raise UserError(
                f"config.{name}.batch_size={size}: must be at most the {seen} training images"
            )
        epochs, most = config[name].epochs, _STEPS // (seen // size)
        if epochs > most:
            raise UserError(
                f"config.{name}.epochs={epochs}: must be at most {most}, which are 2^31 steps"
            )
    measured = "eval" in config.stages and "knn" in config.eval.protocols and source.labelled
    if measured and max(config.eval.knn.k) > images:
        raise UserError(
            f"config.eval.knn.k={config.eval.knn.k}: must be at most the {images} training images"
        )


def _clusterable(config: ConfigDict, found: dict[str, sources.Source]) -> None:
    """k-means must know how many clusters are wanted, and have an image for each."""
    section, split = config.eval.cluster, protocols.cluster_split(config, found)
    images = len(found[split])
    if not section.clusters and not found[split].labelled:
        raise UserError(
            f"config.eval.cluster.clusters=0: the {split} images have no labels to count; say how "
            "many clusters to find"
        )
    if section.pca > images:
        raise UserError(
            f"config.eval.cluster.pca={section.pca}: must be at most the {images} {split} images"
        )
    if section.clusters > images:
        raise UserError(
            f"config.eval.cluster.clusters={section.clusters}: must be at most the {images} "
            f"{split} images"
        )
