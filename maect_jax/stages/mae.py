"""Stage 1: the masked autoencoder (He et al., 2022)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from maect_jax.config import at_most, fraction
from maect_jax.data import augment
from maect_jax.errors import UserError
from maect_jax.models import mae, positions, vit
from maect_jax.stages import base, losses
from maect_jax.stages.base import Stage, Views, over_microbatches
from maect_jax.stages.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE(Stage):
    """Reconstructs masked patches. Every view is an image of its own, with its own mask."""

    name = "mae"
    number = 0
    title = "masked pre-training (MAE)"
    row = "the encoder after stage 1"
    saved = ("params",)
    takes = ()
    rules = base.TRAINING | base.PHOTOMETRIC | {
        "mask_ratio": fraction,
        "warmup_epochs": base.WARMUP_EPOCHS,
        **{f"decoder.{key}": at_most(vit.MAX_UNITS) for key in vit.Size._fields},
    }  # fmt: skip

    decoder: mae.Decoder
    mask_ratio: float

    @classmethod
    def check(cls, config, devices: int) -> None:
        super().check(config, devices)
        decoder = config.mae.decoder
        vit.check_width(config.model, "mae.decoder.width", decoder.width, decoder.heads)
        patches = math.prod(positions.grid(config.model.image_size, config.model.patch_size))
        kept = mae.kept_patches(patches, config.mae.mask_ratio)
        if not kept + vit.from_config(config.model).extra_tokens:
            raise UserError(
                f"config.mae.mask_ratio={config.mae.mask_ratio}: leaves none of the {patches} "
                "patches to an encoder without class tokens or registers"
            )
        if config.init_from:
            raise UserError(
                f"config.init_from={config.init_from!r}: stage mae starts from random weights; "
                "leave it empty"
            )

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        model, group = config.model, cls._group(config)
        decoder = mae.Decoder(
            **config.mae.decoder,
            patch_size=model.patch_size,
            channels=model.channels,
            extra_tokens=vit.from_config(model).extra_tokens,
            ln_eps=model.ln_eps,
            dtype=model.dtype,
            attention=model.attention,
            remat=config.remat,
        )
        return {"decoder": decoder, "groups": {"encoder": group, "decoder": group}}

    def init(self, key: jax.Array, start: dict) -> TrainState:
        encoder_key, decoder_key, rng = jax.random.split(key, 3)
        images = jnp.zeros((1, *self.image_shape))
        restore = jnp.arange(self._patches)[None]
        encoder = self.encoder.init(encoder_key, images)["params"]
        latent = jnp.zeros((1, self.encoder.extra_tokens, self.encoder.width))
        decoder = self.decoder.init(decoder_key, latent, restore, self.grid)["params"]
        return self._init_state(rng, {"encoder": encoder, "decoder": decoder})

    def forward(
        self, params: dict, images: jax.Array, noise: jax.Array, microbatches: int = 1
    ) -> dict:
        """Reconstructs `images [B, H, W, C]` masked by `noise [B, N]`."""
        keep, restore, mask = mae.random_mask(noise, self.mask_ratio)

        def encode(images, keep):
            return self.encoder.apply({"params": params["encoder"]}, images, keep)

        latent = over_microbatches(encode, microbatches, images, keep)
        decoder = {"params": params["decoder"]}
        prediction = vit.apply(self.decoder, decoder, latent, restore, self.grid)
        target = losses.patch_targets(images, self.encoder.patch_size)
        loss = losses.reconstruction(prediction, target, mask)
        return dict(loss=loss, latent=latent, restore=restore, mask=mask, prediction=prediction)

    def loss(self, params, state: TrainState, views: Views, batch: dict, key: jax.Array):
        (x,) = views
        images = x.reshape(-1, *x.shape[2:])
        noise = jax.random.uniform(key, (len(images), self._patches))
        outputs = self.forward(params, images, noise, self.microbatches)
        return outputs["loss"], ({}, {"mask": outputs["mask"]})

    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """`mask` bool `[Q, H, W]`, true where the images lack pixels, the same at every call; and
        `filled` uint8 `[Q, H, W, C]`, the images with the reconstruction there."""
        recipe, patch = self.recipes[0], self.encoder.patch_size
        x = augment.normalise_pixels(images, recipe.mean, recipe.std)
        noise = jax.random.uniform(jax.random.key(0), (len(x), self._patches))
        outputs = self.forward(state.params, x, noise)
        filled = losses.fill_patches(x, outputs["prediction"], outputs["mask"], patch)
        pixels = jnp.repeat(outputs["mask"][..., None], patch**2, axis=-1)
        return {
            "mask": vit.unpatchify(pixels, patch, self.grid)[..., 0] > 0,
            "filled": augment.denormalise(filled, recipe.mean, recipe.std),
        }

    def flops_per_step(self, batch_size: int) -> int:
        decoder, patches, extra = self.decoder, self._patches, self.encoder.extra_tokens
        kept = mae.kept_patches(patches, self.mask_ratio)
        forward = (
            self._encoder_flops(kept)
            + 2 * (kept + extra) * self.encoder.width * decoder.width
            + base.block_flops(decoder.depth, decoder.width, patches + extra)
            + 2 * patches * decoder.width * self._patch_pixels
        )
        return batch_size * self.views * 3 * forward
