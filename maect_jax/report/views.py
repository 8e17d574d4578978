"""Draws what a config trains on: some raw images, and the views that are made of them.

    maect views --config=ct_aug_vith16 --out=views.png

One block a stage, one row an image: the raw image, then its views in three epochs, as the step
sees them.
"""

import os
import sys

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


def views_of(config: ConfigDict, stage: "type[base.Stage]", images: "sources.Source") -> list[list]:
    """For some of the images, the raw one and the views of a stage, uint8 `[H, W, C]`."""
    images = stage.training_images(config, images)
    recipe = stage.for_images(config, images).recipes[0]
    make_views = jax.jit(lambda batch: augment.views(batch, recipe))
    make_example = stage.example_maker(config, images)
    chosen, epochs = data_base.evenly_spaced(len(images), _IMAGES), []
    for epoch in range(_EPOCHS):
        examples = [make_example((epoch, record)) for record in chosen]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        views = augment.denormalise(make_views(batch), config.data.mean, config.data.std)
        epochs.append(np.asarray(views))  # [images, views, H, W, C]
    # An image that cannot be read is replaced by another, whose number is its index.
    decoding = sources.decoding(config)
    raw = [decode.pixels(images[int(i)][0], decoding) for i in batch["index"]]
    return [[image, *views] for image, views in zip(raw, np.concatenate(epochs, 1), strict=True)]


def _tile(image: np.ndarray) -> Image.Image:
    """An image uint8 `[H, W, C]` as large as a tile allows, on white; a small one in its pixels."""
    method = Image.Resampling.NEAREST if max(image.shape) < _TILE else Image.Resampling.LANCZOS
    tile = Image.fromarray(style.to_rgb_image(image))
    return ImageOps.pad(tile, (_TILE, _TILE), method, "white")


def sheet(blocks: "dict[type[base.Stage], list[list[np.ndarray]]]") -> Image.Image:
    """A contact sheet of the `views_of` each stage."""
    font, step = ImageFont.load_default(size=15), _TILE + _GAP
    columns = max(len(rows[0]) for rows in blocks.values())
    height = sum(2 * _TITLE + step * len(rows) for rows in blocks.values()) + _GAP
    drawn = Image.new("RGB", (columns * step + (_EPOCHS + 1) * 2 * _GAP, height), "white")
    ink, top = ImageDraw.Draw(drawn), _GAP
    for stage, rows in blocks.items():
        # Between epochs there is more room than between the views of one.
        epochs = [-1, *(i // stage.views for i in range(_EPOCHS * stage.views))]
        left = [_GAP + i * step + (epoch + 1) * 2 * _GAP for i, epoch in enumerate(epochs)]
        ink.text((left[0], top), f"stage {stage.name}", "black", font)
        for i, epoch in enumerate(epochs):
            title = f"epoch {epoch}, view {(i - 1) % stage.views}" if i else "image"
            ink.text((left[i], top + _TITLE), title, "#555555", font)
        top += 2 * _TITLE
        for row in rows:
            for x, image in zip(left, row, strict=True):
                drawn.paste(_tile(image), (x, top))
            top += step
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
    images = sources.make(config.data, "train", config.model.channels)
    values.check([images], sources.decoding(config))
    images = cache.reduced(config, images)
    drawn = sheet({stage: views_of(config, stage, images) for stage in stages})
    try:
        drawn.save(arguments.out)
    except (OSError, ValueError) as error:  # ValueError: the file name has an unknown extension
        raise UserError(f"--out={arguments.out}: cannot be written: {error}") from error
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
