"""Losses of MAE, NNCLR and MIM-Refiner, in fp32; that of fine-tuning is in `finetune`."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from maect_jax.models import positions, vit
from maect_jax.stages.support_queue import normalise


def _patch_statistics(patches):
    """Mean and unbiased standard deviation of each patch, `[B, N, 1]`."""
    mean = patches.mean(-1, keepdims=True)
    return mean, jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)


def patch_targets(images: jax.Array, patch_size: int) -> jax.Array:
    """Pixels of each patch `[B, N, P*P*C]`, normalised by its mean and unbiased variance."""
    patches = vit.patchify(images.astype(jnp.float32), patch_size)
    mean, std = _patch_statistics(patches)
    return (patches - mean) / std


def fill_patches(
    images: jax.Array, prediction: jax.Array, mask: jax.Array, patch_size: int
) -> jax.Array:
    """`images [B, H, W, C]` with their removed patches replaced by those of `prediction`.

    The mean and standard deviation of a removed patch, which the model does not predict, are those
    of the image.
    """
    patches = vit.patchify(images, patch_size)
    mean, std = _patch_statistics(patches)
    filled = jnp.where(mask[..., None] > 0, prediction * std + mean, patches)
    return vit.unpatchify(filled, patch_size, positions.grid(images.shape[1:3], patch_size))


def reconstruction(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared error over all masked patches of the batch (MAE, section 3); 0 without any.

    `prediction`, `target`: `[B, N, P*P*C]`; `mask`: `[B, N]`, 1 where the patch was removed.
    """
    per_patch = jnp.square(prediction - target).mean(-1)
    return (per_patch * mask).sum() / jnp.maximum(mask.sum(), 1)


def nearest_neighbour(neighbours: jax.Array, predicted: jax.Array, temperature: float) -> jax.Array:
    """One direction of the contrastive loss of NNCLR (Dwibedi et al., 2021, equation 3): unit
    vectors `[B, D]`, the neighbours of one view, without gradient, against the predictor's output
    `[B, D]` for the other. The negatives of a row are all other rows of the global batch."""
    # By default a TPU rounds the inputs of a matmul to bf16.
    logits = jnp.matmul(neighbours, normalise(predicted).T, precision="highest") / temperature
    return _own_row(logits)


def alignment(
    projected: jax.Array, neighbours: jax.Array, predicted: jax.Array, *, temperature: float
) -> jax.Array:
    """Nearest-neighbour alignment (MIM-Refiner, Alkin et al., 2024) of each of G views with each of
    V: their losses `[G, V]`.

    The positive is the cosine with the neighbour, the negatives are those with the view itself: a
    neighbour of another row may be an image of the row's own object.

    Args:
      projected: unit vectors `[B, G, D]` of the views, without gradient.
      neighbours: unit vectors `[B, G, D]`, their neighbours, likewise.
      predicted: `[B, V, D]`, the predictor's output for the V views; the negatives of a row are
        all other rows of the global batch.
      temperature: divides the cosines.
    """
    predicted = normalise(predicted)
    dot = partial(jnp.einsum, precision="highest")
    negatives = dot("agd,bvd->gvab", projected, predicted)
    positives = dot("agd,avd->gva", neighbours, predicted)
    is_positive = jnp.eye(len(projected), dtype=bool)
    return _own_row(jnp.where(is_positive, positives[..., None], negatives) / temperature)


def _own_row(logits: jax.Array) -> jax.Array:
    """Mean cross entropy `[...]` of logits `[..., B, B]`, the right class of a row being its own
    number."""
    labels = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(-1)
