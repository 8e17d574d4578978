"""Draws what a page trains on: some raw images, and the views that are made of them.

    python -m maect_jax.report.views --config=configs/ct_aug_vith16.py --out=views.png

One block a stage, one row an image: the raw image, then the views of three epochs, as the step
sees them.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from maect_jax import config as configs
from maect_jax import errors, pipeline
from maect_jax.data import augment, decode, sources
from maect_jax.errors import UserError
from maect_jax.report import sheets, style
from maect_jax.stages import STAGES

_IMAGES, _EPOCHS = 8, 3
_TILE, _GAP, _HEAD = 144, 6, 26  # pixels


def _tile(image: np.ndarray) -> Image.Image:
    """An image uint8 `[H, W, C]` as large as a tile allows, on white."""
    picture = Image.fromarray(style.in_colour(image))
    scale = _TILE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    # Small images keep their pixels, large ones are smoothed.
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    tile.paste(picture.resize(size, kind), tuple((_TILE - side) // 2 for side in size))
    return tile


def rows(config: ConfigDict, name: str, source: sources.Source) -> list[list[np.ndarray]]:
    """For some images, spread over all: the raw one and its views, uint8 `[H, W, C]`.

    Raises:
      UserError: the stage names images that are not there.
      RunFailedError: no image can be read.
    """
    source = STAGES[name].training_images(config, source)
    stage = STAGES[name].for_images(config, source)
    make = STAGES[name].example_maker(config, source)
    chosen = sheets.spread(len(source), _IMAGES)
    see = jax.jit(lambda batch: augment.views(batch, stage.recipe))
    shown = [[] for _ in chosen]
    for epoch in range(_EPOCHS):
        examples = [make((epoch, record)) for record in chosen]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        views = augment.denormalise(see(batch), config.data.mean, config.data.std)
        for row, own in zip(shown, np.asarray(views), strict=True):
            row += list(own)
    for row, found in zip(shown, batch["index"], strict=True):
        row.insert(0, decode.pixels(source[int(found)][0], config.model.channels))
    return shown


def sheet(blocks: dict[str, list[list[np.ndarray]]]) -> Image.Image:
    """A contact sheet of the `rows` of each stage."""
    font = ImageFont.load_default(size=15)
    columns = max(len(block[0]) for block in blocks.values())
    step = _TILE + _GAP
    height = sum(2 * _HEAD + step * len(block) for block in blocks.values()) + _GAP
    drawn = Image.new("RGB", (columns * step + (_EPOCHS + 1) * 2 * _GAP, height), "white")
    ink, top = ImageDraw.Draw(drawn), _GAP

    for name, block in blocks.items():
        views = STAGES[name].views

        def left(column, views=views):  # more room between epochs
            return _GAP + column * step + (column + views - 1) // views * 2 * _GAP

        ink.text((left(0), top), f"stage {name}", "black", font)
        for column in range(len(block[0])):
            epoch, view = divmod(column - 1, views)
            title = f"epoch {epoch}, view {view}" if column else "image"
            ink.text((left(column), top + _HEAD), title, "#555555", font)
        top += 2 * _HEAD
        for row in block:
            for column, image in enumerate(row):
                drawn.paste(_tile(image), (left(column), top))
            top += step
    return drawn


def main() -> None:
    parser = configs.parser(__doc__)
    parser.add_argument("--out", type=Path, default="views.png", help="the picture (%(default)s)")
    config, arguments = configs.from_command_line(parser)
    pipeline.check_stages(config)
    names = [stage.name for stage in pipeline.training_stages(config)]
    if not names:
        raise UserError(f"config.stages={config.stages!r}: no training stage, and so no views")
    pipeline.require_model(config)
    pipeline.check(config, devices=1)
    source = sources.make(config.data, "train", config.model.channels)
    drawn = sheet({name: rows(config, name, source) for name in names})
    try:
        drawn.save(arguments.out)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise UserError(f"--out={arguments.out}: cannot write there: {error}") from error
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(errors.run_command(main))
