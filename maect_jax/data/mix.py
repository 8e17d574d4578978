"""Regularisation of labelled batches on the device: mixup, cutmix, random erasing.

Pure functions of a key; images are normalised views, fp32 `[B, H, W, C]`. Draws and their ranges
are those of timm, with which fine-tuning protocols are published.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
_TRIES = 10  # boxes drawn to find one that fits


def _inside(shape: Sequence[int], low: jax.Array, high: jax.Array) -> jax.Array:
    """Whether a pixel is in a box, bool `[H, W]`; corners are (row, column), `high` excluded."""
    rows, cols = jnp.ogrid[: shape[0], : shape[1]]
    return (rows >= low[0]) & (rows < high[0]) & (cols >= low[1]) & (cols < high[1])


def kept_fraction(
    key: jax.Array, shape: tuple[int, int], mixup_alpha: float, cutmix_alpha: float
) -> jax.Array:
    """Fraction of each pixel `[H, W]` that an image keeps when it is mixed with another.

    For mixup (Zhang et al., 2018) the same everywhere; for cutmix (Yun et al., 2019) 0 in a box and
    1 elsewhere. Of both, if both alphas are above 0, one is drawn evenly. The fraction is
    Beta(alpha, alpha), in cutmix before the box is clipped to the image.
    """
    which, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    kinds = []
    if mixup_alpha:
        kinds.append(jnp.full(shape, jax.random.beta(mixup_key, mixup_alpha, mixup_alpha)))
    if cutmix_alpha:
        kept, sides = jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha), jnp.asarray(shape)
        cut = (sides * jnp.sqrt(1 - kept)).astype(jnp.int32)
        centre = jax.random.randint(box_key, (2,), 0, sides)
        inside = _inside(shape, centre - cut // 2, centre + (cut + 1) // 2)
        kinds.append(jnp.where(inside, 0.0, 1.0))
    return jnp.stack(kinds)[jax.random.randint(which, (), 0, len(kinds))]


def mix(images: jax.Array, targets: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes each of `images [B, H, W, C]` with the one at the mirrored position of the batch. An
    image keeps a fraction of each pixel (`kept_fraction`), its target, of `[B, classes]`, the mean.
    """
    pixels, target = kept[..., None], kept.mean()
    images = pixels * images + (1 - pixels) * images[::-1]
    return images, target * targets + (1 - target) * targets[::-1]


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al., 2020): with `probability` a box of an image becomes noise.

    The noise is standard normal, pixel by pixel; an image stays unchanged if no drawn box fits.
    """
    keys = jax.random.split(key, len(images))
    return jax.vmap(lambda key, image: _erased(key, image, probability))(keys, images)


def _erased(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    coin, box_key, noise_key = jax.random.split(key, 3)
    sides = jnp.asarray(image.shape[:2])
    draws = jax.random.uniform(box_key, (4, _TRIES))  # area, aspect, position
    low, high = _ERASED_AREA
    area = math.prod(image.shape[:2]) * (low + (high - low) * draws[0])
    low, high = map(math.log, _ERASED_ASPECT)
    aspect = jnp.exp(low + (high - low) * draws[1])
    boxes = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], 1))).astype(jnp.int32)
    fits = (boxes < sides).all(1)
    first = jnp.argmax(fits)
    box = boxes[first]
    start = (draws[2:, first] * (sides - box + 1)).astype(jnp.int32)
    inside = _inside(image.shape, start, start + box)
    inside &= fits.any() & (jax.random.uniform(coin) < probability)
    return jnp.where(inside[..., None], jax.random.normal(noise_key, image.shape), image)
