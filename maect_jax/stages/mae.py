"""Stage 1: the masked autoencoder (He et al., 2022)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from maect_jax.data import augment
from maect_jax.data.augment import Recipe
from maect_jax.models import mae, vit
from maect_jax.stages import losses, optim
from maect_jax.stages.microbatch import over_microbatches
from maect_jax.stages.state import TrainState


@dataclasses.dataclass(frozen=True)
class Mae:
    """What is fixed in stage 1. `image_shape` is (H, W, C); `groups`, `steps` and `warmup` are the
    optimiser's (`optim.adamw`); the encoder runs over `microbatches` parts of a batch."""

    encoder: vit.ViT
    decoder: mae.Decoder
    image_shape: tuple[int, int, int]
    mask_ratio: float
    recipe: Recipe
    groups: Mapping[str, optim.Group]
    steps: int
    warmup: int
    microbatches: int = 1

    def optimizer(self, params):
        return optim.adamw(params, self.groups, self.steps, self.warmup)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in (rows, columns)."""
        return tuple(size // self.encoder.patch_size for size in self.image_shape[:2])

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """A fresh state; stage 1 takes nothing over, so `start` is empty."""
        del start
        encoder_key, decoder_key, rng = jax.random.split(key, 3)
        images = jnp.zeros((1, *self.image_shape))
        restore = jnp.arange(self.grid[0] * self.grid[1])[None]
        encoder = self.encoder.init(encoder_key, images)["params"]
        latent = jnp.zeros((1, 1, self.encoder.width))
        decoder = self.decoder.init(decoder_key, latent, restore, self.grid)["params"]
        params = {"encoder": encoder, "decoder": decoder}
        return TrainState(
            step=jnp.int32(0),
            params=params,
            frozen={},
            batch_stats={},
            opt_state=self.optimizer(params).init(params),
            ema={},
            target={},
            queue=None,
            rng=rng,
        )

    def forward(
        self, params: dict, images: jax.Array, noise: jax.Array, microbatches: int = 1
    ) -> dict:
        """Reconstructs `images [B, H, W, C]` masked by `noise [B, N]`."""
        keep, restore, mask = mae.random_mask(noise, self.mask_ratio)

        def encode(images, keep):
            return self.encoder.apply({"params": params["encoder"]}, images, keep)

        latent = over_microbatches(encode, microbatches, images, keep)
        prediction = self.decoder.apply({"params": params["decoder"]}, latent, restore, self.grid)
        target = losses.patch_targets(images, self.encoder.patch_size)
        loss = losses.reconstruction(prediction, target, mask)
        return dict(loss=loss, latent=latent, restore=restore, mask=mask, prediction=prediction)

    def loss(self, params, state: TrainState, views: jax.Array, batch: dict, key: jax.Array):
        """Every view is an image of its own, with a mask of its own. `views`: `[B, V, H, W, C]`."""
        del state, batch
        images = views.reshape(-1, *views.shape[2:])
        noise = jax.random.uniform(key, (len(images), self.grid[0] * self.grid[1]))
        found = self.forward(params, images, noise, self.microbatches)
        return found["loss"], ({}, {"mask": found["mask"]})

    def watch(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """Masks some images uint8 `[Q, H, W, C]`, the same way at every call, and fills them in.

        Returns:
          `mask` bool `[Q, H, W]`, true where removed; `filled` uint8 `[Q, H, W, C]`.
        """
        del ids
        recipe, patch = self.recipe, self.encoder.patch_size
        x = augment.normalise_pixels(images, recipe.mean, recipe.std)
        noise = jax.random.uniform(jax.random.key(0), (len(x), self.grid[0] * self.grid[1]))
        found = self.forward(state.params, x, noise)
        filled = losses.fill_patches(x, found["prediction"], found["mask"], patch)
        pixels = jnp.repeat(found["mask"][..., None], patch**2, axis=-1)
        return {
            "mask": vit.unpatchify(pixels, patch, self.grid)[..., 0] > 0,
            "filled": augment.denormalise(filled, recipe.mean, recipe.std),
        }

    def advance(self, state: TrainState, carried: dict, finite: jax.Array) -> TrainState:
        """Nothing but the parameters moves in stage 1."""
        del carried, finite
        return state
