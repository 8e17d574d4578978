"""Geometry on the host: where to cut, and cutting. Images are uint8 `[H, W, C]`."""

import math

import numpy as np
from kornia_rs import imgproc
from PIL import Image

Box = tuple[int, int, int, int]  # top, left, height, width


def random_crop_box(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random resized crop's box ("Inception crop", as torchvision draws it).

    Args:
      rng: source of randomness.
      shape: height and width of the image.
      scale: range of the crop's share of the area.
      ratio: range of its width / height, drawn log-uniformly.

    Returns:
      The first of ten draws that fits, else the largest central box within `ratio`.
    """
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    return central_box(shape, ratio)


def central_box(shape: tuple[int, int], ratio: tuple[float, float]) -> Box:
    """The largest box in the middle of an image whose width / height is within `ratio`."""
    height, width = shape
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing to `size` (height, width), as Pillow has it.

    kornia_rs takes half of Pillow's time (`benchmarks/input_speed.py`), and only RGB.
    """
    if image.shape[:2] == tuple(size):
        return image
    if image.shape[2] == 3:
        return imgproc.resize(np.ascontiguousarray(image), tuple(size), "bicubic", antialias=True)
    picture = Image.fromarray(image[..., 0])
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))[..., None]


def crop_resize(image: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Cuts a box and resizes it to `size` (height, width)."""
    top, left, height, width = box
    return _resize(image[top : top + height, left : left + width], size)


def smallest_scale(boxes: list[Box], size: tuple[int, int]) -> float:
    """How far an image may be shrunk before any of the boxes in it has less than `size` pixels."""
    return min(1.0, max(s / side for box in boxes for s, side in zip(size, box[2:], strict=True)))


def crop_resize_shrunk(
    image: np.ndarray, shape: tuple[int, int], box: Box, size: tuple[int, int]
) -> np.ndarray:
    """`crop_resize` of an image that was shrunk, by a box in its former `shape` (height, width).

    Pillow's edges may lie between two pixels, as those of the box do in the smaller image: to whole
    ones the crop would move by up to half a pixel.
    """
    if image.shape[:2] == tuple(shape):
        return crop_resize(image, box, size)
    top, left, height, width = box
    y, x = (now / before for now, before in zip(image.shape, shape, strict=False))
    edges = (left * x, top * y, (left + width) * x, (top + height) * y)
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    found = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=edges)
    return np.asarray(found).reshape(*size, image.shape[2])


def centre_crop(image: np.ndarray, short_side: int, size: tuple[int, int]) -> np.ndarray:
    """Evaluation: resizes the short side to `short_side`, then cuts the centre `size`.

    Where sides do not divide, both are rounded as torchvision's `Resize` and `CenterCrop` do.
    """
    shorter = min(image.shape[:2])
    target = tuple(short_side * side // shorter for side in image.shape[:2])
    image = _resize(image, target)
    top, left = (round((have - want) / 2) for have, want in zip(target, size, strict=True))
    return image[top : top + size[0], left : left + size[1]]
