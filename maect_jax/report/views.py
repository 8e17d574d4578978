"""Draws what a config trains on: some raw images, and the views that are made of them.

    maect views --config=ct_aug_vith16 --out=views.png

One block a stage, one row an image: the raw image, then its views in three epochs, as the step
sees them.
"""

import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epy
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont, ImageOps

from maect_jax import config as configs
from maect_jax import errors, files
from maect_jax.errors import UserError

with epy.lazy_imports():  # with JAX, which takes a second: `--help` and mistakes do not wait
    import jax

    from maect_jax import pipeline
    from maect_jax.data import augment, cache, decode, sources, values
    from maect_jax.data import base as data_base
    from maect_jax.report import style
    from maect_jax.stages import base

_IMAGES, _EPOCHS = 8, 3
_TILE, _GAP, _TITLE = 144, 6, 26  # pixels


class Panel(NamedTuple):
    """Images that stand together in a row, in a block no higher than a tile."""

    title: str
    side: int  # pixels of each
    images: list[np.ndarray]  # uint8 `[H, W, C]`

    @property
    def grid(self) -> tuple[int, int]:
        """Images in (rows, columns)."""
        rows = min(len(self.images), (_TILE + _GAP) // (self.side + _GAP))
        return rows, math.ceil(len(self.images) / rows)

    @property
    def width(self) -> int:
        return self.grid[1] * (self.side + _GAP)

    def draw(self, sheet: Image.Image, left: int, top: int) -> None:
        rows, columns = self.grid
        step = self.side + _GAP
        top += (_TILE + _GAP - rows * step) // 2
        for i, image in enumerate(self.images):
            row, column = divmod(i, columns)
            sheet.paste(_tile(image, self.side), (left + column * step, top + row * step))


Row = list[list[Panel]]  # the image, then each epoch


def views_of(config: ConfigDict, stage: "type[base.Stage]", images: "sources.Source") -> list[Row]:
    """Some of the images that a stage sees, with the views that it makes of them."""
    recipes = stage.for_images(config, images).recipes
    make_views = jax.jit(lambda batch: [augment.views(batch, recipe) for recipe in recipes])
    make_example = stage.example_maker(config, images)
    chosen, epochs = data_base.evenly_spaced(len(images), _IMAGES), []
    for epoch in range(_EPOCHS):
        examples = [make_example((epoch, record)) for record in chosen]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        views = [
            np.asarray(augment.denormalise(x, config.data.mean, config.data.std))
            for x in make_views(batch)
        ]  # [images, views, H, W, C]
        epochs.append([_panels(epoch, of_image) for of_image in zip(*views, strict=True)])
    # An image that cannot be read is replaced by another, whose number is its index.
    decoding = sources.decoding(config)
    raw = [decode.pixels(images[int(i)][0], decoding) for i in batch["index"]]
    shown = [[Panel("image", _TILE, [image])] for image in raw]
    return [list(row) for row in zip(shown, *epochs, strict=True)]


def _panels(epoch: int, views: Sequence[np.ndarray]) -> list[Panel]:
    """An image's views in an epoch, those of each size `[V, H, W, C]`: the first ones each in a
    tile, smaller ones together, in proportion to their pixels."""
    first, *others = views
    panels = [Panel(f"epoch {epoch}, view {i}", _TILE, [x]) for i, x in enumerate(first)]
    for local in others:
        ratio = min(1, max(local.shape[1:3]) / max(first.shape[1:3]))
        side = max(_GAP, round(ratio * (_TILE + _GAP)) - _GAP)  # two of a half are as high as one
        panels.append(Panel(f"{len(local)} local", side, [*local]))
    return panels


def _tile(image: np.ndarray, side: int) -> Image.Image:
    """An image uint8 `[H, W, C]` as large as a tile allows, on white; a small one in its pixels."""
    method = Image.Resampling.NEAREST if max(image.shape) < side else Image.Resampling.LANCZOS
    tile = Image.fromarray(style.to_rgb_image(image))
    return ImageOps.pad(tile, (side, side), method, "white")


def sheet(blocks: "dict[type[base.Stage], list[Row]]") -> Image.Image:
    """A contact sheet of the `views_of` each stage."""
    font, step = ImageFont.load_default(size=15), _TILE + _GAP
    # Between epochs there is more room than between the views of one.
    width = max(
        sum(sum(panel.width for panel in group) + 2 * _GAP for group in rows[0])
        for rows in blocks.values()
    )
    height = sum(2 * _TITLE + step * len(rows) for rows in blocks.values()) + _GAP
    drawn = Image.new("RGB", (width, height), "white")
    ink, top = ImageDraw.Draw(drawn), _GAP
    for stage, rows in blocks.items():
        ink.text((_GAP, top), f"stage {stage.name}", "black", font)
        for i, row in enumerate(rows):
            left = _GAP
            for group in row:
                for panel in group:
                    if not i:
                        ink.text((left, top + _TITLE), panel.title, "#555555", font)
                    panel.draw(drawn, left, top + 2 * _TITLE + i * step)
                    left += panel.width
                left += 2 * _GAP
        top += 2 * _TITLE + step * len(rows)
    return drawn


def main() -> None:
    parser = configs.parser(__doc__)
    parser.add_argument(
        "--out", type=files.user_path, default="views.png", help="the picture (%(default)s)"
    )
    config, arguments = configs.from_command_line(parser)
    if not os.access(arguments.out.parent, os.W_OK):
        raise UserError(f"--out={arguments.out}: its folder cannot be written, or does not exist")
    stages = pipeline.stages_to_show(config)
    pipeline.check(config, devices=1)
    images = sources.splits(config.data, ("train",), config.model.channels)
    values.check([images["train"]], sources.decoding(config))
    images = {split: cache.reduced(config, source) for split, source in images.items()}
    pipeline.set_by_images(config, images)
    own = {stage: stage.own_images(config, images)["train"] for stage in stages}
    drawn = sheet({stage: views_of(config, stage, seen) for stage, seen in own.items()})
    try:
        drawn.save(arguments.out)
    except (OSError, ValueError) as error:  # ValueError: the file name has an unknown extension
        raise UserError(f"--out={arguments.out}: cannot be written: {error}") from error
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
