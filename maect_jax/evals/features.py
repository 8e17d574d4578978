"""Features of every image of a split, once."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax import sharding
from maect_jax.data import augment
from maect_jax.models import vit


class Features(NamedTuple):
    """fp32 `[N, D]` in the order of the source; labels and record numbers int32 `[N]`."""

    x: np.ndarray
    labels: np.ndarray
    index: np.ndarray


def encode(
    encoder: vit.ViT, params: dict, pool: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[jax.Array], jax.Array]:
    """A function from uint8 images `[B, H, W, C]` to pooled features fp32 `[B, D]`."""

    def run(params, images):
        images = augment.normalise_pixels(images, mean, std)
        tokens = encoder.apply({"params": params}, images)
        return vit.pool(tokens, pool)

    jitted = jax.jit(run)
    return lambda images: jitted(params, images)


def flatten_pixels(images: jax.Array) -> jax.Array:
    """The floor: uint8 images `[B, H, W, C]` as features in [0, 1], fp32 `[B, H*W*C]`."""
    return images.reshape(len(images), -1).astype(jnp.float32) / 255


def extract(
    run: Callable[[jax.Array], jax.Array], batches: Iterator[dict[str, np.ndarray]], mesh
) -> Features:
    """Runs `run` over evaluation batches (`loader.eval_batches`); padding, and what cannot be
    read, is dropped."""
    everywhere = sharding.replicated(mesh)
    collect = jax.jit(lambda *arrays: arrays, out_shardings=everywhere)
    kept, pending = [], None
    for local in batches:
        batch = sharding.put_batch(local, mesh)
        found = collect(run(batch["image"]), batch["label"], batch["index"], batch["valid"])
        if pending is not None:  # one batch late, so that the device never waits
            kept.append(jax.device_get(pending))
        pending = found
    kept.append(jax.device_get(pending))
    *found, valid = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return Features(*(part[valid] for part in found))
