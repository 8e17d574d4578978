"""What a config would run, without running it."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from maect_jax import flops
from maect_jax.data import sources
from maect_jax.stages import build

IMAGENET_TRAIN = 1_281_167


def training_images(config: ConfigDict) -> tuple[sources.Source, str]:
    """The training images and whose they are; blank ones for ImageNet-1k's where the folder that
    should hold them is not there.

    Raises:
      UserError: the folder is there, and they are not.
    """
    path = config.data.path
    if config.data.source in sources.ON_DISK and not Path(path).is_dir():
        blank = sources.Blank(IMAGENET_TRAIN, config.model.channels)
        return blank, f"ImageNet-1k's, as there is no folder {path!r}"
    return sources.make(config.data, "train", config.model.channels), config.data.source


def count(tree) -> int:
    """Elements of all (abstract) arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(config: ConfigDict, records: int) -> Iterator[str]:
    """A paragraph for each stage: steps, images seen, parameters, memory, FLOPs.

    Args:
      config: a valid config.
      records: number of training images.
    """
    for name in config.stages:
        if name == "eval":
            yield "eval: k-NN, linear probe and k-means on frozen features"
            continue
        stage = build.stage(config, name, records)
        section = config[name]
        state = jax.eval_shape(stage.init, jax.random.key(0), {})
        seen = stage.steps * section.batch_size
        cost = flops.per_step(stage, section.batch_size, build.VIEWS)
        yield "\n".join(
            (
                f"{name}:",
                f"  steps                 {stage.steps:,} ({section.epochs} epochs of {records:,} "
                f"images, warm-up {stage.warmup:,})",
                f"  batch                 {section.batch_size:,} images x {build.VIEWS} views",
                f"  images seen           {seen:,} ({seen * build.VIEWS:,} views)",
                f"  parameters trained    {count(state.params):,}",
                f"  parameters frozen     {count(state.frozen):,}",
                f"  memory of the state   {_bytes(state) / 2**20:,.0f} MiB, before sharding",
                f"  FLOPs per step        {cost:.3g}",
                f"  FLOPs of the stage    {cost * stage.steps:.3g}",
            )
        )
