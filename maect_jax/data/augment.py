"""Views of a batch of images, made on the device inside the training step.

Photometric operations work on RGB in [0, 1] and follow torchvision's definitions. They take
channels first, `[C, H, W]`: three channels in the last axis would leave most of a vector unit idle.
An image's random seed is part of the batch (`batch["seed"]`), so its views do not depend on the
other images, the row or the device.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from numpy.typing import ArrayLike

from maect_jax import sharding
from maect_jax.data import transforms
from maect_jax.data.transforms import FIELDS, Range, Shape

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L
_BLUR_RADIUS = 8  # pixels, four times the largest sigma
_ORDERS = tuple(itertools.permutations(range(3)))  # of brightness, contrast and saturation


@dataclass(frozen=True)
class Photometric:
    """One view's colour recipe; `jitter`, `blur`, `grayscale` and `solarize` are probabilities.

    Brightness, contrast and saturation factors are uniform in `1 +- value`, the hue shift in
    `+- value` (turns), the blur's sigma in `blur_sigma` (pixels); pixels from
    `solarize_threshold` (of 255) up are inverted.
    """

    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    blur: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    grayscale: float = 0.0
    solarize: float = 0.0
    solarize_threshold: float = 128

    @property
    def changes(self) -> bool:
        """Whether it changes any image."""
        return any((self.jitter, self.blur, self.grayscale, self.solarize))


@dataclass(frozen=True)
class Recipe:
    """How a batch becomes normalised views of one `size`, with a colour recipe each.

    `crop_scale` is the range of a crop's fraction of the area, for crops that are cut here; crops
    that the loader has cut are in the `field` of the batch. `first` is the number of the first of
    these views among all views of an image: no two of them share random numbers.
    """

    size: Shape
    crop_scale: Range
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photometric: tuple[Photometric, ...]
    field: str = FIELDS[0]
    first: int = 0


def _cubic(x):
    """The bicubic kernel of Pillow (Keys, 1981, with a = -0.5)."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _resize_weights(start, length, size_in: int, size_out: int):
    """Matrix `[size_out, size_in]` that cuts `length` pixels from `start` on and resizes them.

    The kernel widens when the image shrinks (antialiasing); pixels outside the cut have no weight.
    """
    scale = length / size_out
    pixel = jnp.arange(size_in) - start
    centre = (jnp.arange(size_out) + 0.5) * scale
    weights = _cubic((pixel[None] + 0.5 - centre[:, None]) / jnp.maximum(scale, 1.0))
    weights = jnp.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def crop_resize(image: jax.Array, box: jax.Array, size: Shape) -> jax.Array:
    """Cuts `box` (top, left, height, width) from `[C, H, W]` in 0..255, bicubic to `size`.

    Rounds to integers after each direction, as Pillow does on 8-bit images.
    """
    top, left, height, width = box.astype(jnp.float32)
    rows = _resize_weights(top, height, image.shape[1], size[0])
    cols = _resize_weights(left, width, image.shape[2], size[1])
    dot = partial(jnp.einsum, precision="highest")
    x = jnp.round(jnp.clip(dot("wj,cij->ciw", cols, image.astype(jnp.float32)), 0, 255))
    return jnp.round(jnp.clip(dot("hi,ciw->chw", rows, x), 0, 255))


def random_crop_box(key: jax.Array, shape: Sequence[int], scale: Range) -> jax.Array:
    """`transforms.random_crop_box` for the device: top, left, height and width, int32 `[4]`."""
    sides = jnp.asarray(shape)
    draws = jax.random.uniform(key, (4, 10))  # area, ratio and position of ten boxes
    area = math.prod(shape) * (scale[0] + (scale[1] - scale[0]) * draws[0])
    low, high = map(math.log, transforms.RATIO)
    aspect = jnp.exp(low + (high - low) * draws[1])
    drawn = jnp.round(jnp.sqrt(jnp.stack([area / aspect, area * aspect], 1))).astype(jnp.int32)
    fits = ((drawn > 0) & (drawn <= sides)).all(1)
    free = sides - drawn
    start = jnp.minimum((draws[2:].T * (free + 1)).astype(jnp.int32), free)
    central = jnp.asarray([transforms.central_box(shape)])
    boxes = jnp.concatenate([jnp.concatenate([start, drawn], axis=1), central])
    return boxes[jnp.argmax(jnp.append(fits, True))]  # the first that fits; the last one does


def random_crop(image: jax.Array, key: jax.Array, recipe: Recipe) -> jax.Array:
    """A random resized crop of `[C, H, W]` in 0..255, flipped with probability 0.5."""
    box_key, flip_key = jax.random.split(key)
    box = random_crop_box(box_key, image.shape[1:], recipe.crop_scale)
    x = crop_resize(image, box, recipe.size)
    return jnp.where(jax.random.bernoulli(flip_key), x[..., ::-1], x)


def to_gray(x: jax.Array) -> jax.Array:
    """Luma `[1, H, W]` of RGB `[3, H, W]`; one channel stays as it is."""
    if len(x) == 1:
        return x
    red, green, blue = (weight * channel for weight, channel in zip(GRAY, x, strict=True))
    return (red + green + blue)[None]


def blend(x: jax.Array, kind, factor) -> jax.Array:
    """Multiplies brightness, contrast or saturation (`kind` 0, 1, 2) by `factor`.

    Blends `x` with black, with the mean of its luma or with its luma. A factor of 1 changes no bit.
    """
    gray = to_gray(x)
    other = jnp.where(kind == 0, 0.0, jnp.where(kind == 1, gray.mean(), gray))
    return jnp.clip(factor * x + (1 - factor) * other, 0, 1)


def adjust_hue(x: jax.Array, shift) -> jax.Array:
    """Shifts the hue by `shift` turns of the colour circle; does nothing unless C is three."""
    if len(x) != 3:
        return x
    red, green, blue = x
    high, low = x.max(0), x.min(0)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    # Not by `high == red`: compiled code may compute both twice and differ in the last bit.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # Back from HSV by the closed form f(n) = V - C max(0, min(k, 4 - k, 1)), k = n + H mod 6.
    k = jnp.asarray([5.0, 3.0, 1.0])[:, None, None] + hue + 6 * shift
    k -= 6 * jnp.floor(k / 6)  # `%` is a slow call for each pixel on CPUs
    return high - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def _blur_weights(size: int, sigma):
    """Matrix `[size, size]` that blurs a line; beyond its ends the end pixels are repeated."""
    radius = _BLUR_RADIUS
    offsets = jnp.arange(-radius, size + radius) - jnp.arange(size)[:, None]
    kernel = jnp.where(jnp.abs(offsets) <= radius, jnp.exp(-0.5 * jnp.square(offsets / sigma)), 0)
    kernel = kernel / kernel.sum(1, keepdims=True)
    before, line, after = jnp.split(kernel, (radius, radius + size), axis=1)
    return line.at[:, 0].add(before.sum(1)).at[:, -1].add(after.sum(1))


def gaussian_blur(x: jax.Array, sigma) -> jax.Array:
    """Separable Gaussian blur of `[C, H, W]`, sigma in pixels; edges are repeated."""
    rows, cols = (_blur_weights(size, sigma) for size in x.shape[1:])
    x = jnp.einsum("wj,cij->ciw", cols, x, precision="highest")
    return jnp.einsum("hi,ciw->chw", rows, x, precision="highest")


def solarize(x: jax.Array, threshold: float) -> jax.Array:
    """Inverts the pixel values from `threshold` (of 255) up."""
    return jnp.where(x >= threshold / 255, 1 - x, x)


def colour_jitter(x: jax.Array, key: jax.Array, recipe: Photometric) -> jax.Array:
    """Brightness, contrast, saturation and hue by random factors, in one of their 24 orders."""
    order_key, hue_key, factor_key = jax.random.split(key, 3)
    order = jnp.asarray(_ORDERS)[jax.random.randint(order_key, (), 0, len(_ORDERS))]
    before_hue = jax.random.randint(hue_key, (), 0, 4)  # number of blends
    strength = jnp.asarray([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    change = strength * jax.random.uniform(factor_key, (4,), minval=-1.0, maxval=1.0)

    def blends(x, selected):
        for i, kind in enumerate(order):
            x = blend(x, kind, 1 + jnp.where(selected(i), change[kind], 0.0))
        return x

    # Under vmap a branch costs as much as both its sides: the hue, the most expensive operation,
    # is computed only once.
    x = blends(x, lambda i: i < before_hue)
    x = adjust_hue(x, change[3])
    return blends(x, lambda i: i >= before_hue)


def photometric(x: jax.Array, key: jax.Array, recipe: Photometric) -> jax.Array:
    """Applies a view's colour recipe to one image `[C, H, W]` in [0, 1]."""
    keys = jax.random.split(key, 6)  # of the four coins, the jitter and the blur

    def blur(x):
        return gaussian_blur(x, jax.random.uniform(keys[5], (), jnp.float32, *recipe.blur_sigma))

    operations = (
        (recipe.jitter, lambda x: colour_jitter(x, keys[4], recipe)),
        (recipe.blur, blur),
        (recipe.grayscale, lambda x: jnp.broadcast_to(to_gray(x), x.shape)),
        (recipe.solarize, lambda x: solarize(x, recipe.solarize_threshold)),
    )
    for coin, (probability, operation) in zip(keys[:4], operations, strict=True):
        if probability:
            x = jnp.where(jax.random.uniform(coin) < probability, operation(x), x)
    return x


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Images `[..., C]` in [0, 1] minus the mean of each channel, divided by its std."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def normalise_pixels(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]):
    """`normalise` of images `[..., C]`, uint8 or in [0, 1]."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    return normalise(images, mean, std)


def checked(images: ArrayLike, shape: tuple[int, int, int]) -> np.ndarray | jax.Array:
    """Images as people give them to an encoder, which takes those of a shape (H, W, C).

    Raises:
      ValueError: they are none, or not `[B, H, W, C]`; or neither uint8 from 0 to 255 nor floating
        point from 0 to 1. To see the range of floats that lie on a device it waits for them.
    """
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    if images.shape[1:] != shape:
        raise ValueError(
            f"images of shape {images.shape}: must be (B, {', '.join(map(str, shape))})"
        )
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    if images.dtype != np.uint8 and not is_float:
        raise ValueError(
            f"images of {images.dtype}: must be uint8 from 0 to 255, or floating point from 0 to 1"
        )
    if not len(images):
        raise ValueError("images: must be at least one")
    # Inside a function that is jitted there are no values yet.
    if is_float and not isinstance(images, jax.core.Tracer):
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images from {low:.4g} to {high:.4g}: must be uint8 or floats from 0 to 1"
            )
    return images


def denormalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """The inverse of `normalise`, as uint8 `[..., C]`."""
    images = jnp.clip(images * jnp.asarray(std) + jnp.asarray(mean), 0, 1)
    return jnp.round(images * 255).astype(jnp.uint8)


def views(batch: dict, recipe: Recipe) -> jax.Array:
    """Normalised views fp32 `[B, V, H, W, C]` of a batch from the loader.

    `batch["image"]` is uint8 `[B, H0, W0, C]`, from which views of any size are cut here; or
    `batch[recipe.field]` is one of: uint8 `[B, V, H, W, C]`, already cut; float `[B, V, H, W, C]`,
    already normalised, which is returned unchanged. `batch["seed"]` is uint32 `[B, 2]`.
    """
    images = batch["image"]
    if images.ndim == 5:
        images = batch[recipe.field]
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return sharding.shard_map_batch(partial(_views, recipe))(images, batch["seed"])


def _views(recipe: Recipe, images: jax.Array, seeds: jax.Array) -> jax.Array:
    whole = images.ndim == 4
    if not whole and not any(colours.changes for colours in recipe.photometric):
        return normalise_pixels(images, recipe.mean, recipe.std)
    images = jnp.moveaxis(images, -1, -3)
    keys = jax.random.wrap_key_data(seeds)
    crop = jax.vmap(partial(random_crop, recipe=recipe))
    # Channels first in memory, too: the layout of later operations must not spread to these.
    pin = partial(with_layout_constraint, layouts=Layout((0, 1, 2, 3)))

    def view(colours, number):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, recipe.first + number)
        crop_keys, colour_keys = jax.vmap(jax.random.split, out_axes=1)(own)
        x = crop(images, crop_keys) if whole else images[:, number]
        change = jax.vmap(partial(photometric, recipe=colours))
        return pin(change(pin(x.astype(jnp.float32) / 255), colour_keys))

    # Views of the same colours are a loop, which is compiled once.
    all_colours = recipe.photometric
    runs = itertools.groupby(range(len(all_colours)), all_colours.__getitem__)
    views = [jax.lax.map(partial(view, colours), jnp.array([*run])) for colours, run in runs]
    channels_last = jnp.moveaxis(jnp.concatenate(views), (1, 0, 2), (0, 1, 4))
    return normalise(channels_last, recipe.mean, recipe.std)
