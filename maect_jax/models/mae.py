"""Masking and decoder of the masked autoencoder (He et al., 2022)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maect_jax.models import vit


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Number of `patches` that the encoder sees: all at ratio 0; none close to 1, where it encodes
    only the class tokens and registers."""
    return int(patches * (1 - mask_ratio))


def random_mask(noise: jax.Array, mask_ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keeps the patches with the smallest noise, uniform `[B, N]`; `mask_ratio` is the fraction to
    remove.

    Returns:
      `keep` int32 `[B, K]`, the kept patches in noise order; `restore` int32 `[B, N]`, the index of
      every patch in the order "kept, then removed"; `mask` fp32 `[B, N]`, 1 where removed.
    """
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    kept = kept_patches(noise.shape[1], mask_ratio)
    return order[:, :kept], restore, (restore >= kept).astype(jnp.float32)


class Decoder(nn.Module):
    """Predicts the pixels of all patches from the encoded visible ones, and from the encoder's
    `extra_tokens` T before them.

    An optional parameter `pos_embed [N, D]` replaces the fixed position embedding.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    channels: int
    extra_tokens: int = 1
    ln_eps: float = 1e-6
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(self, latent: jax.Array, restore: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """`latent [B, T + K, D]`, `restore [B, N]` -> fp32 `[B, N, P*P*C]` for a patch `grid`."""
        x = vit.Linear(self.width, self.dtype, name="embed")(latent)
        mask_token = self.param("mask_token", vit.token_init, (1, 1, self.width))
        removed = restore.shape[1] + self.extra_tokens - x.shape[1]
        # Broadcast before the cast, so that its gradient is summed over all patches in fp32.
        filler = jnp.broadcast_to(mask_token, (len(x), removed, self.width)).astype(self.dtype)
        patches = jnp.concatenate([x[:, self.extra_tokens :], filler], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        patches = patches + jnp.asarray(vit.position_embedding(self, grid), self.dtype)
        x = jnp.concatenate([x[:, : self.extra_tokens], patches], axis=1)
        x, _ = vit.scanned_blocks(self, self.depth, "blocks", self.remat)(x, None, None)
        x = vit.LayerNorm(self.ln_eps, name="norm")(x)[:, self.extra_tokens :]
        pixels = self.patch_size**2 * self.channels
        return vit.Linear(pixels, self.dtype, name="pred")(x).astype(jnp.float32)
