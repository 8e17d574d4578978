"""What a config would run, without running it."""

import math
import os
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from maect_jax.data import sources
from maect_jax.errors import UserError
from maect_jax.stages import build, flops

IMAGENET_TRAIN = 1_281_167
# Training images, the shape that all have, and classes, of sets that need not be at hand.
_KNOWN = {"imagenet2012": (IMAGENET_TRAIN, None, 1000), "cifar10": (50_000, (32, 32, 3), 10)}


def training_images(config: ConfigDict) -> tuple[sources.Source, str]:
    """The training images and whose they are; blank ones where they are not there: as many as a
    known set has, ImageNet-1k for a folder.

    Raises:
      UserError: they are there, but not such as are needed; or nothing is known of them.
    """
    data, channels = config.data, config.model.channels
    known = _KNOWN.get(data.name if data.source == "tfds" else "imagenet2012")
    try:
        return sources.make(data, "train", channels), data.path or data.source
    except UserError:
        prepared = data.source == "tfds" and not data.path.endswith(".npz")
        # Of a bucket the source has said what is wrong.
        there = data.source == "fashion_mnist" or "://" in data.path or os.path.exists(data.path)
        if not known or (there and not prepared):
            raise
    where = f"there is no {data.path!r}" if data.source == "folder" else "it is not prepared"
    whose = data.name if data.source == "tfds" else "ImageNet-1k"
    return sources.Blank(known[0], channels, *known[1:]), f"{whose}'s, as {where}"


def count(tree) -> int:
    """Elements of all (abstract) arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(config: ConfigDict, images: sources.Source) -> Iterator[str]:
    """A paragraph for each stage: steps, images seen, parameters, memory, FLOPs.

    Args:
      config: a valid config.
      images: the training images.
    """
    for name in config.stages:
        if name == "eval":
            yield f"eval: {', '.join(config.eval.protocols)} on frozen features"
            continue
        section, views = config[name], build.views(name)
        own = build.training_images(config, name, images)
        stage = build.stage_for(config, name, own)
        state = jax.eval_shape(stage.init, jax.random.key(0), {})
        seen, epochs = stage.steps * section.batch_size, section.epochs
        per_image = f"{views} view{'s' * (views > 1)}"
        cost = flops.per_step(stage, section.batch_size, views)
        yield "\n".join(
            (
                f"{name}:",
                f"  steps                 {stage.steps:,} ({epochs} epochs of {len(own):,} "
                f"images, warm-up {stage.warmup:,})",
                f"  batch                 {section.batch_size:,} images x {per_image}",
                f"  images seen           {seen:,} ({seen * views:,} views)",
                f"  parameters trained    {count(state.params):,}",
                f"  parameters frozen     {count(state.frozen):,}",
                f"  memory of the state   {_bytes(state) / 2**20:,.0f} MiB, before sharding",
                f"  FLOPs per step        {cost:.3g}",
                f"  FLOPs of the stage    {cost * stage.steps:.3g}",
            )
        )
