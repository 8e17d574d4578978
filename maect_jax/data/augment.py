"""Views of a batch of images, made on the device inside the training step.

Photometric operations work on RGB in [0, 1] and follow torchvision's definitions on Pillow
images. An image's randomness comes with it (`batch["seed"]`), so its views do not depend on
the batch, the row or the device that it lands on.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from maect_jax import sharding

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L
_BLUR_RADIUS = 8  # four times the largest sigma


@dataclasses.dataclass(frozen=True)
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
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    grayscale: float = 0.0
    solarize: float = 0.0
    solarize_threshold: float = 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a batch becomes normalised views of `size` (height, width): one colour recipe a view."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photometric: tuple[Photometric, ...]


def _cubic(x):
    """The Keys kernel with a = -0.5, which Pillow calls bicubic."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _resize_weights(start, length, size_in: int, size_out: int):
    """Matrix `[size_out, size_in]` that cuts `length` pixels from `start` on and resizes them.

    The kernel widens when it shrinks the image (antialiasing) and sees nothing outside the cut.
    """
    scale = length / size_out
    pixel = jnp.arange(size_in) - start
    centre = (jnp.arange(size_out) + 0.5) * scale
    weights = _cubic((pixel[None] + 0.5 - centre[:, None]) / jnp.maximum(scale, 1.0))
    weights = jnp.where((pixel >= 0) & (pixel < length), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def crop_resize(image: jax.Array, box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Cuts `box` (top, left, height, width) from `[H, W, C]` in 0..255, bicubic to `size`.

    Rounds to whole pixel values after each direction, as Pillow does on 8-bit images.
    """
    top, left, height, width = box.astype(jnp.float32)
    rows = _resize_weights(top, height, image.shape[0], size[0])
    cols = _resize_weights(left, width, image.shape[1], size[1])
    dot = partial(jnp.einsum, precision="highest")
    x = jnp.round(jnp.clip(dot("wj,ijc->iwc", cols, image.astype(jnp.float32)), 0, 255))
    return jnp.round(jnp.clip(dot("hi,iwc->hwc", rows, x), 0, 255))


def to_gray(x: jax.Array) -> jax.Array:
    """Luma `[H, W, 1]` of RGB `[H, W, 3]`."""
    return (x * jnp.asarray(GRAY)).sum(-1, keepdims=True)


def _blend(x, other, factor):
    return jnp.clip(factor * x + (1 - factor) * other, 0, 1)


def adjust_brightness(x: jax.Array, factor) -> jax.Array:
    """Blends with black."""
    return _blend(x, 0.0, factor)


def adjust_contrast(x: jax.Array, factor) -> jax.Array:
    """Blends with the image's mean luma."""
    return _blend(x, (to_gray(x) if x.shape[-1] == 3 else x).mean(), factor)


def adjust_saturation(x: jax.Array, factor) -> jax.Array:
    """Blends with the grayscale image; does nothing unless C is three."""
    return _blend(x, to_gray(x), factor) if x.shape[-1] == 3 else x


def adjust_hue(x: jax.Array, shift) -> jax.Array:
    """Turns the hue by `shift` (1 is a whole turn); does nothing unless C is three."""
    if x.shape[-1] != 3:
        return x
    high, low = x.max(-1), x.min(-1)
    chroma = high - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = jnp.moveaxis(x, -1, 0)
    hue = jnp.where(
        high == red,
        (green - blue) / safe,
        jnp.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # Back from HSV by the closed form f(n) = V - C max(0, min(k, 4 - k, 1)), k = n + H mod 6.
    k = (jnp.asarray([5.0, 3.0, 1.0]) + (hue + 6 * shift)[..., None]) % 6
    ramp = jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return high[..., None] - chroma[..., None] * ramp


def gaussian_blur(x: jax.Array, sigma) -> jax.Array:
    """Separable Gaussian blur of `[H, W, C]`, sigma in pixels; edges are repeated."""
    offsets = jnp.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    kernel = jnp.exp(-0.5 * jnp.square(offsets / sigma))
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (_BLUR_RADIUS, _BLUR_RADIUS)
        padded = jnp.pad(x, pad, mode="edge")
        shifts = (
            jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis)
            for i in range(len(offsets))
        )
        x = sum(weight * shifted for weight, shifted in zip(kernel, shifts, strict=True))
    return x


def solarize(x: jax.Array, threshold: float) -> jax.Array:
    """Inverts the pixel values from `threshold` (of 255) up."""
    return jnp.where(x >= threshold / 255, 1 - x, x)


def colour_jitter(x: jax.Array, key: jax.Array, recipe: Photometric) -> jax.Array:
    """Brightness, contrast, saturation and hue by random factors in random order."""
    order_key, factor_key = jax.random.split(key)
    uniform = jax.random.uniform(factor_key, (4,), minval=-1.0, maxval=1.0)
    ops = (
        lambda x: adjust_brightness(x, 1 + recipe.brightness * uniform[0]),
        lambda x: adjust_contrast(x, 1 + recipe.contrast * uniform[1]),
        lambda x: adjust_saturation(x, 1 + recipe.saturation * uniform[2]),
        lambda x: adjust_hue(x, recipe.hue * uniform[3]),
    )
    for op in jax.random.permutation(order_key, 4):
        x = jax.lax.switch(op, ops, x)
    return x


def photometric(x: jax.Array, key: jax.Array, recipe: Photometric) -> jax.Array:
    """Applies a view's colour recipe to one image `[H, W, C]` in [0, 1]."""
    keys = jax.random.split(key, 6)

    def blur(x):
        return gaussian_blur(x, jax.random.uniform(keys[5], (), jnp.float32, *recipe.blur_sigma))

    def grayscale(x):
        return jnp.broadcast_to(to_gray(x), x.shape) if x.shape[-1] == 3 else x

    operations = (
        (recipe.jitter, lambda x: colour_jitter(x, keys[4], recipe)),
        (recipe.blur, blur),
        (recipe.grayscale, grayscale),
        (recipe.solarize, lambda x: solarize(x, recipe.solarize_threshold)),
    )
    for coin, (probability, operation) in zip(keys[:4], operations, strict=True):
        if probability:
            x = jnp.where(jax.random.uniform(coin) < probability, operation(x), x)
    return x


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Images `[..., C]` in [0, 1] less the mean of each channel, over its deviation."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def normalise_pixels(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]):
    """`normalise` of uint8 images `[..., C]`."""
    return normalise(images.astype(jnp.float32) / 255, mean, std)


def denormalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """The inverse of `normalise`, as uint8 `[..., C]`."""
    return jnp.round(jnp.clip(images * jnp.asarray(std) + jnp.asarray(mean), 0, 1) * 255).astype(
        jnp.uint8
    )


def views(batch: dict, recipe: Recipe) -> jax.Array:
    """Normalised views fp32 `[B, V, H, W, C]` of a batch from the loader.

    `batch["image"]` is one of: uint8 `[B, H0, W0, C]` with the crops to cut (`box` `[B, V, 4]`
    and `flip` `[B, V]`); uint8 `[B, V, H, W, C]`, already cut; float `[B, V, H, W, C]`, already
    normalised, which is taken as it is.
    """
    images = batch["image"]
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if "box" in batch:

        def cut(image, box, flip):
            x = crop_resize(image, box, recipe.size)
            return jnp.where(flip, x[:, ::-1], x)

        per_view = jax.vmap(cut, in_axes=(None, 0, 0))
        images = jax.vmap(per_view)(images, batch["box"], batch["flip"])
    images = sharding.constrain_batch(images.astype(jnp.float32) / 255)
    keys = jax.random.wrap_key_data(batch["seed"])
    images = jnp.stack(
        [
            jax.vmap(lambda x, key, v=v, colour=colour: photometric(
                x, jax.random.fold_in(key, v), colour))(images[:, v], keys)
            for v, colour in enumerate(recipe.photometric)
        ],
        axis=1,
    )  # fmt: skip
    return normalise(images, recipe.mean, recipe.std)
