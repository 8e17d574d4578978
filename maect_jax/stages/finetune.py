"""Full fine-tuning: the encoder and a linear classifier on its pooled feature, with labels.

The recipe is that of MAE's fine-tuning (He et al., 2022, appendix A.1).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from maect_jax.data import augment, mix
from maect_jax.data.augment import Recipe
from maect_jax.models import vit
from maect_jax.stages import optim
from maect_jax.stages.microbatch import over_microbatches
from maect_jax.stages.state import TrainState

_RANKED = 5
_kernel_init = nn.initializers.truncated_normal(0.01)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """What is fixed in fine-tuning.

    `drop_path` is the rate of the last block (`vit.drop_paths`), `erasing` the probability that an
    image loses a box (`mix.erase`); `mixup_alpha` and `cutmix_alpha` are 0 for none (`mix.mix`).
    `groups`, `steps` and `warmup` are the optimiser's (`optim.adamw`), of the parts `encoder` and
    `classifier`; `image_shape` is (H, W, C); the encoder runs over `microbatches` parts of a batch.
    """

    encoder: vit.ViT
    image_shape: tuple[int, int, int]
    pool: str
    classes: int
    drop_path: float
    label_smoothing: float
    mixup_alpha: float
    cutmix_alpha: float
    erasing: float
    recipe: Recipe
    groups: Mapping[str, optim.Group]
    steps: int
    warmup: int
    microbatches: int = 1

    def optimizer(self, params):
        return optim.adamw(params, self.groups, self.steps, self.warmup)

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """The first state; `start` may hold `encoder`, else that is initialised at random, too.

        A learned position embedding of the encoder stays as it is.
        """
        encoder_key, classifier_key, rng = jax.random.split(key, 3)
        images = jnp.zeros((1, *self.image_shape))
        encoder = start.get("encoder") or self.encoder.init(encoder_key, images)["params"]
        trained, frozen = vit.split_blocks(encoder, 0)
        width = jax.eval_shape(self._features, encoder, images).shape[1]
        classifier = {
            "kernel": _kernel_init(classifier_key, (width, self.classes)),
            "bias": jnp.zeros(self.classes),
        }
        params = {"encoder": trained, "classifier": classifier}
        return TrainState(
            step=jnp.int32(0),
            params=params,
            frozen={"encoder": frozen},
            batch_stats={},
            opt_state=self.optimizer(params).init(params),
            ema={},
            target={},
            queue=None,
            rng=rng,
        )

    def _features(
        self, encoder: dict, images: jax.Array, paths: jax.Array | None = None
    ) -> jax.Array:
        return vit.features(self.encoder, encoder, images, self.pool, paths=paths)

    def logits(
        self, params: dict, frozen: dict, *rows: jax.Array, microbatches: int = 1
    ) -> jax.Array:
        """Scores fp32 `[B, classes]` of `rows`: normalised images `[B, H, W, C]`, and in training
        `[B, L, 2]`, the factors of the blocks' branches (`vit.drop_paths`)."""
        encoder = {**frozen["encoder"], **params["encoder"]}
        x = over_microbatches(partial(self._features, encoder), microbatches, *rows)
        kernel, bias = params["classifier"]["kernel"], params["classifier"]["bias"]
        # On TPU a matmul rounds its inputs to bf16 unless told otherwise.
        return jnp.matmul(x, kernel, precision="highest") + bias

    def loss(self, params, state: TrainState, views: jax.Array, batch: dict, key: jax.Array):
        """Cross entropy with smoothed and mixed labels. `views`: `[B, 1, H, W, C]`."""
        erase_key, mix_key, path_key = jax.random.split(key, 3)
        images = views[:, 0]
        targets = mix.smooth(batch["label"], self.classes, self.label_smoothing)
        if self.erasing:
            images = mix.erase(erase_key, images, self.erasing)
        if self.mixup_alpha or self.cutmix_alpha:
            shape = self.image_shape[:2]
            share = mix.own_share(mix_key, shape, self.mixup_alpha, self.cutmix_alpha)
            images, targets = mix.mix(images, targets, share)
        rows = [images]
        if self.drop_path:
            depth = self.encoder.depth
            rows.append(vit.drop_paths(path_key, self.drop_path, len(images), depth))
        logits = self.logits(params, state.frozen, *rows, microbatches=self.microbatches)
        return optax.softmax_cross_entropy(logits, targets).mean(), ({}, {})

    def ranked(self, params: dict, frozen: dict, images: jax.Array) -> jax.Array:
        """The most likely classes of normalised images `[B, H, W, C]`, the first one first: int32
        `[B, 5]`, fewer where there are not five."""
        scores = self.logits(params, frozen, images)
        return jax.lax.top_k(scores, min(_RANKED, self.classes))[1]

    def watch(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """`ranked` of some images uint8 `[Q, H, W, C]`."""
        del ids
        x = augment.normalise_pixels(images, self.recipe.mean, self.recipe.std)
        return {"ranked": self.ranked(state.params, state.frozen, x)}

    def advance(self, state: TrainState, carried: dict, finite: jax.Array) -> TrainState:
        """Nothing but the parameters moves."""
        del carried, finite
        return state
