"""Geometry on the host: where to cut, and cutting. Images are uint8 `[H, W, C]`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kornia_rs import imgproc
from PIL import Image

Shape = tuple[int, int]  # height, width
Range = tuple[float, float]  # low, high
Box = tuple[int, int, int, int]  # top, left, height, width
# Of a batch, where cut views are: those of each size, in order.
FIELDS = ("image", "local")
RATIO = (3 / 4, 4 / 3)  # range of a random crop's width / height, drawn log-uniformly
_LONGEST = 64  # times the side of a crop for evaluation, of an image that is resized whole


@dataclass(frozen=True)
class Crops:
    """Random crops of an image, all of one size."""

    size: Shape
    scale: Range  # of their fraction of the area of the image
    count: int


def random_crop_box(rng: np.random.Generator, shape: Shape, scale: Range) -> Box:
    """Draws the box of a random resized crop ("Inception crop"), as torchvision does.

    `scale` is the range of its fraction of the area of an image. Returns the first of ten draws
    that fits, else the central box.
    """
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    return central_box(shape)


def central_box(shape: Sequence[int]) -> Box:
    """The largest box in the middle of an image whose width / height is within `RATIO`."""
    height, width = shape
    aspect = min(max(width / height, RATIO[0]), RATIO[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: np.ndarray, size: Shape) -> np.ndarray:
    """Bicubic with antialiasing, as in Pillow."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    # In half of Pillow's time (`benchmarks/input_speed.py`), but only for RGB.
    if image.shape[2] == 3:
        pixels = np.ascontiguousarray(image)
        return np.asarray(imgproc.resize(pixels, (height, width), "bicubic", antialias=True))
    channels = map(Image.fromarray, np.moveaxis(image, -1, 0))
    resized = (picture.resize(size[::-1], Image.Resampling.BICUBIC) for picture in channels)
    return np.stack([*map(np.asarray, resized)], axis=-1)


def reduced_shape(shape: Sequence[int], side: int) -> Shape:
    """The shape of an image whose shorter side becomes `side`, unless it is no longer than that."""
    height, width = shape
    scale = min(1.0, side / min(shape))
    return round(scale * height), round(scale * width)


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """An image of `reduced_shape`."""
    return _resize(image, reduced_shape(image.shape[:2], side))


def mirrored(image: np.ndarray) -> np.ndarray:
    """An image with its left and right exchanged."""
    if image.shape[2] == 3:  # a tenth of NumPy's time, which goes pixel by pixel
        return np.asarray(imgproc.horizontal_flip(np.ascontiguousarray(image)))
    return image[:, ::-1]


def min_scale(boxes: list[Box], sizes: list[Shape]) -> float:
    """The scale, at most 1, of an image at which each of its boxes has at least its size."""
    needed, sides = np.array(sizes), np.array(boxes)[:, 2:]
    return min(1.0, float((needed / sides).max()))


def crop_resize(image: np.ndarray, box: Box, size: Shape, shape: Shape | None = None) -> np.ndarray:
    """Cuts a box and resizes it to `size`.

    `shape`, if given, is that of the image for which the box was drawn, and `image` may be a
    smaller version of it.
    """
    top, left, height, width = box
    if shape is None or image.shape[:2] == tuple(shape):
        return _resize(image[top : top + height, left : left + width], size)
    # The edges of the box may lie between two pixels of the smaller image: Pillow takes them as
    # they are, rounding them would move the crop by up to half a pixel.
    y, x = (now / before for now, before in zip(image.shape, shape, strict=False))
    edges = (left * x, top * y, (left + width) * x, (top + height) * y)
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    crop = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=edges)
    return np.asarray(crop).reshape(*size, image.shape[2])


def centre_crop(image: np.ndarray, short_side: int, size: Shape) -> np.ndarray:
    """Crop for evaluation: resizes an image until it just covers a box, then cuts the centre.

    The box has the aspect of `size` and a shorter side of `short_side`. For a square that is
    torchvision's `Resize` and `CenterCrop`; where sides do not divide, both are rounded as there.
    """
    height, width = (round(short_side * side / min(size)) for side in size)
    # Resizing a line of pixels whole would take gigabytes.
    scale = min(image.shape[0] / height, image.shape[1] / width)
    image = _centre(image, (round(_LONGEST * height * scale), round(_LONGEST * width * scale)))
    rows, cols = image.shape[:2]
    fits_height = height * cols >= width * rows  # it is wider than the box
    target = (height, height * cols // rows) if fits_height else (width * rows // cols, width)
    return _centre(_resize(image, target), size)


def _centre(image: np.ndarray, size: Shape) -> np.ndarray:
    """The centre of an image, at most `size`."""
    height, width = map(min, image.shape, size)
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
