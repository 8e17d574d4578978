"""RandAugment (Cubuk et al., 2020) on the host, as timm has it under `rand-m9-mstd0.5-inc1`.

Two operations are drawn from fifteen, each is applied with probability 0.5, at a magnitude of
N(9, 0.5) of 10; a larger magnitude changes an image more.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_LAYERS = 2
_PROBABILITY = 0.5
_MAGNITUDE, _DEVIATION, _MOST = 9.0, 0.5, 10.0
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


class Filling(NamedTuple):
    """How an operation that moves pixels fills in: between them, and where there are none."""

    resample: Image.Resampling
    colour: tuple[int, ...] | int


Operation = Callable[[Image.Image, float, Filling], Image.Image]


def _moved(matrix: tuple[float, ...], image: Image.Image, filling: Filling) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, filling.resample, fillcolor=filling.colour
    )


def _rotate(image: Image.Image, level: float, filling: Filling) -> Image.Image:
    return image.rotate(30 * level, filling.resample, fillcolor=filling.colour)


def _shear_x(image: Image.Image, level: float, filling: Filling) -> Image.Image:
    return _moved((1, 0.3 * level, 0, 0, 1, 0), image, filling)


def _shear_y(image: Image.Image, level: float, filling: Filling) -> Image.Image:
    return _moved((1, 0, 0, 0.3 * level, 1, 0), image, filling)


def _translate_x(image: Image.Image, level: float, filling: Filling) -> Image.Image:
    return _moved((1, 0, 0.45 * level * image.width, 0, 1, 0), image, filling)


def _translate_y(image: Image.Image, level: float, filling: Filling) -> Image.Image:
    return _moved((1, 0, 0, 0, 1, 0.45 * level * image.height), image, filling)


def _by_value(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, level: float, _: Filling) -> Image.Image:
    # Not Pillow's, which may refuse to keep no bit at all, as the highest level does.
    dropped = 4 + int(4 * level)
    return _by_value(image, [value >> dropped << dropped for value in range(256)])


def _solarize(image: Image.Image, level: float, _: Filling) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image: Image.Image, level: float, _: Filling) -> Image.Image:
    added = int(110 * level)
    return _by_value(image, [v + added if v < 128 else v for v in range(256)])


def _enhanced(kind: type) -> Operation:
    def run(image, level, _):
        return kind(image).enhance(max(0.1, 1 + 0.9 * level))

    return run


# By timm's names. Those of the second table go either way: their level is -1 to 1, else 0 to 1.
_ONE_WAY: dict[str, Operation] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
}
_TWO_WAYS: dict[str, Operation] = {
    "Rotate": _rotate,
    "ColorIncreasing": _enhanced(ImageEnhance.Color),
    "ContrastIncreasing": _enhanced(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhanced(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhanced(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
OPERATIONS = _ONE_WAY | _TWO_WAYS
_NAMES = tuple(OPERATIONS)


def randaugment(rng: np.random.Generator, image: np.ndarray, mean: tuple[float, ...]) -> np.ndarray:
    """Draws operations and applies them to an image, uint8 `[H, W, C]` of one channel or three.

    `mean` is the data set's, in [0, 1]; uncovered pixels get it.
    """
    colour = tuple(round(255 * channel) for channel in mean)
    gray = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if gray else image)
    for name in rng.choice(_NAMES, _LAYERS):
        if rng.random() >= _PROBABILITY:
            continue
        level = np.clip(rng.normal(_MAGNITUDE, _DEVIATION), 0, _MOST) / _MOST
        if name in _TWO_WAYS and rng.random() < 0.5:
            level = -level
        resample = _RESAMPLING[rng.integers(len(_RESAMPLING))]
        filling = Filling(resample, colour[0] if gray else colour)
        picture = OPERATIONS[name](picture, float(level), filling)
    return np.asarray(picture).reshape(image.shape)
