"""Regularisation of labelled batches on the device: label smoothing, mixup, cutmix, random erasing.

Pure functions of a key; images are normalised views, fp32 `[B, H, W, C]`. What is
drawn, and from which range, is timm's, with which fine-tuning protocols are published.
"""

import math

import jax
import jax.numpy as jnp

_ERASED_AREA = (0.02, 1 / 3)  # share of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
_TRIES = 10  # boxes that are drawn, for one that fits


def smooth(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Targets fp32 `[B, classes]` of labels int `[B]`: `smoothing` is spread over all classes
    (Szegedy et al., 2016)."""
    return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def _cut(key: jax.Array, shape: tuple[int, int], kept: jax.Array) -> jax.Array:
    """Ones `[H, W]` but for a box of zeros with the share `1 - kept` of the area, of which the part
    is lost that lies outside."""
    sides = jnp.asarray(shape)
    cut = (sides * jnp.sqrt(1 - kept)).astype(jnp.int32)
    centre = jax.random.randint(key, (2,), 0, sides)
    low, high = centre - cut // 2, centre + (cut + 1) // 2
    rows, cols = jnp.ogrid[: shape[0], : shape[1]]
    inside = (rows >= low[0]) & (rows < high[0]) & (cols >= low[1]) & (cols < high[1])
    return jnp.where(inside, 0.0, 1.0)


def kept_fraction(
    key: jax.Array, shape: tuple[int, int], mixup_alpha: float, cutmix_alpha: float
) -> jax.Array:
    """How much of each pixel `[H, W]` an image keeps when it is mixed with another.

    For mixup (Zhang et al., 2018) the same everywhere, for cutmix (Yun et al., 2019) 0 in a box and
    1 elsewhere; of both that have an alpha above 0 one is drawn, evenly. The share, in cutmix
    before the box is clipped to the image, is Beta(alpha, alpha).
    """
    which, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    kinds = []
    if mixup_alpha:
        kinds.append(jnp.full(shape, jax.random.beta(mixup_key, mixup_alpha, mixup_alpha)))
    if cutmix_alpha:
        kept = jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha)
        kinds.append(_cut(box_key, shape, kept))
    return jnp.stack(kinds)[jax.random.randint(which, (), 0, len(kinds))]


def mix(images: jax.Array, targets: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each image with that at the mirrored place of the batch, and the targets likewise.

    Args:
      images: `[B, H, W, C]`.
      targets: `[B, classes]`.
      share: of the pixels, that an image keeps (`kept_fraction`); the mean is what its target keeps.
    """
    pixels, target = share[..., None], share.mean()
    images = pixels * images + (1 - pixels) * images[::-1]
    return images, target * targets + (1 - target) * targets[::-1]


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al., 2020): with `probability` a box of an image becomes noise.

    The noise is standard normal, pixel by pixel; an image in which none of the boxes that are drawn
    fits stays as it is.
    """
    keys = jax.random.split(key, len(images))
    return jax.vmap(lambda key, image: _erased(key, image, probability))(keys, images)


def _erased(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    coin, box_key, noise_key = jax.random.split(key, 3)
    sides = jnp.asarray(image.shape[:2])
    draws = jax.random.uniform(box_key, (4, _TRIES))  # area, aspect, place
    least, most = _ERASED_AREA
    area = math.prod(image.shape[:2]) * (least + (most - least) * draws[0])
    low, high = map(math.log, _ERASED_ASPECT)
    aspect = jnp.exp(low + (high - low) * draws[1])
    boxes = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], 1))).astype(jnp.int32)
    fits = (boxes < sides).all(1)
    first = jnp.argmax(fits)
    box = boxes[first]
    start = (draws[2:, first] * (sides - box + 1)).astype(jnp.int32)
    rows, cols = jnp.ogrid[: image.shape[0], : image.shape[1]]
    inside = (rows >= start[0]) & (rows < (start + box)[0])
    inside &= (cols >= start[1]) & (cols < (start + box)[1])
    inside &= fits.any() & (jax.random.uniform(coin) < probability)
    return jnp.where(inside[..., None], jax.random.normal(noise_key, image.shape), image)
