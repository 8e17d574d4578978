"""RandAugment (Cubuk et al., 2020) on the host, as timm's `rand-m9-mstd0.5-inc1`.

Two operations are drawn from fifteen; each is applied with probability 0.5, at a magnitude of
N(9, 0.5) of 10. A larger magnitude changes an image more.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_LAYERS = 2
_PROBABILITY = 0.5
_MAGNITUDE, _STD, _MAX = 9.0, 0.5, 10.0
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


# Of an image, a level, and the keywords `resample` and `fillcolor` of what moves pixels.
Operation = Callable[[Image.Image, float, dict], Image.Image]


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
    def operation(image: Image.Image, level: float, filling: dict) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix(image, level), **filling)

    return operation


def _by_value(image: Image.Image, change: Callable[[int], int]) -> Image.Image:
    return image.point([*map(change, range(256))] * len(image.getbands()))


def _posterize(image: Image.Image, level: float, _: dict) -> Image.Image:
    dropped = 4 + int(4 * level)  # up to all 8 bits, which Pillow's own may refuse
    return _by_value(image, lambda value: value >> dropped << dropped)


def _solarize_add(image: Image.Image, level: float, _: dict) -> Image.Image:
    added = int(110 * level)
    return _by_value(image, lambda value: value + added if value < 128 else value)


def _enhance(kind: type) -> Operation:
    return lambda image, level, _: kind(image).enhance(max(0.1, 1 + 0.9 * level))


# By timm's names. The level is 0 to 1 in the first table and -1 to 1 in the second.
_ONE_WAY: dict[str, Operation] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": lambda image, s, _: ImageOps.solarize(image, 256 - int(256 * s)),
    "SolarizeAdd": _solarize_add,
}
_TWO_WAYS: dict[str, Operation] = {
    "Rotate": lambda image, s, filling: image.rotate(30 * s, **filling),
    "ColorIncreasing": _enhance(ImageEnhance.Color),
    "ContrastIncreasing": _enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhance(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda _, s: (1, 0.3 * s, 0, 0, 1, 0)),
    "ShearY": _affine(lambda _, s: (1, 0, 0, 0.3 * s, 1, 0)),
    "TranslateXRel": _affine(lambda image, s: (1, 0, 0.45 * s * image.width, 0, 1, 0)),
    "TranslateYRel": _affine(lambda image, s: (1, 0, 0, 0, 1, 0.45 * s * image.height)),
}
OPERATIONS = _ONE_WAY | _TWO_WAYS


def randaugment(rng: np.random.Generator, image: np.ndarray, mean: tuple[float, ...]) -> np.ndarray:
    """Draws operations and applies them to an image, uint8 `[H, W, C]` with one channel or three.

    Uncovered pixels get the `mean` of the data set, in [0, 1].
    """
    colour = tuple(round(255 * channel) for channel in mean)
    gray = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if gray else image)
    for name in rng.choice(list(OPERATIONS), _LAYERS):
        if rng.random() >= _PROBABILITY:
            continue
        level = np.clip(rng.normal(_MAGNITUDE, _STD), 0, _MAX) / _MAX
        if name in _TWO_WAYS and rng.random() < 0.5:
            level = -level
        resample = _RESAMPLING[rng.integers(len(_RESAMPLING))]
        filling = dict(resample=resample, fillcolor=colour[0] if gray else colour)
        picture = OPERATIONS[name](picture, float(level), filling)
    return np.asarray(picture).reshape(image.shape)
