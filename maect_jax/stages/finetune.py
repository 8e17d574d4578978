"""Full fine-tuning: the encoder and a linear classifier on its pooled feature, with labels.

The recipe is that of MAE's fine-tuning (He et al., 2022, appendix A.1).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from maect_jax.config import Rule, at_most, between, fraction, not_negative
from maect_jax.data import augment, labels, mix, subsets
from maect_jax.data.loader import FinetuneRecord, TrainRecord
from maect_jax.data.sources import Source
from maect_jax.models import vit
from maect_jax.stages import base
from maect_jax.stages.base import Stage, Views
from maect_jax.stages.state import TrainState

_RANKED = 5
_UPDATES, _LARGEST_BATCH = 8, 64  # of an epoch, and of a batch, where a config leaves it open
_kernel_init = nn.initializers.truncated_normal(0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Stage):
    """The whole encoder and a classifier."""

    name = "finetune"
    number = 3
    title = "fine-tuning with labels"
    row = "the fine-tuned encoder"
    views = 1
    needs_labels = True
    learns_features = False
    saved = ("params", "frozen")
    encoder_in = ("frozen", "params")
    starts_from = ("refine", "ct", "refine_head", "head", "mae", "finetune")
    rules = base.TRAINING | {
        "warmup_epochs": base.WARMUP_EPOCHS,
        "images": Rule(
            "'all', a share from above '0%' to '100%', or the path of a list of names",
            lambda v, _: subsets.is_percentage(v) if v.endswith("%") else bool(v),
        ),
        "layer_decay": at_most(1),
        "drop_path": fraction,
        "label_smoothing": fraction,
        "mixup_alpha": not_negative,
        "cutmix_alpha": not_negative,
        "erasing": between(0, 1),
    }  # fmt: skip

    pool: str  # how tokens become a feature (`vit.features`)
    classes: int
    drop_path: float  # rate of the last block (`vit.drop_paths`)
    label_smoothing: float  # the part of a target that is spread over all classes
    mixup_alpha: float  # 0 for none, as in the next (`mix.kept_fraction`)
    cutmix_alpha: float
    erasing: float  # probability that an image loses a box (`mix.erase`)

    @classmethod
    def with_encoder(cls, encoder: dict) -> dict:
        trained, frozen = vit.split_blocks(encoder, 0)
        return {"params": {"encoder": trained}, "frozen": {"encoder": frozen}}

    @classmethod
    def by_images(cls, section, images: int, unit: int) -> dict[str, float]:
        """A batch of an eighth of the images, at most 64."""
        return {"batch_size": base.multiple(min(images // _UPDATES, _LARGEST_BATCH), unit)}

    @classmethod
    def own_images(cls, config, images: Mapping[str, Source]) -> Mapping[str, Source]:
        """Those with a label (`labels.known`); of the training images those that
        `config.finetune.images` names. Raises as `labels.known` and `subsets.select` do."""
        known = labels.known(images, config.seed)
        train = subsets.select(known["train"], config.finetune.images, config.seed)
        return known | {"train": train}

    @classmethod
    def example_maker(
        cls, config, images: Source, make: type[TrainRecord] = FinetuneRecord, **settings
    ) -> TrainRecord:
        mean = config.data.mean if config.finetune.randaugment else None
        return super().example_maker(config, images, make, mean=mean, **settings)

    @classmethod
    def _parts(cls, config, steps: int, classes: int) -> dict:
        encoder = cls._group(config, layer_decay=config.finetune.layer_decay)
        groups = {"encoder": encoder, "classifier": cls._group(config)}
        return {"pool": config.model.pool, "classes": classes, "groups": groups}

    def init(self, key: jax.Array, start: dict) -> TrainState:
        """`start` may hold `encoder`, whose learned position embedding stays as it is."""
        encoder_key, classifier_key, rng = jax.random.split(key, 3)
        images = jnp.zeros((1, *self.image_shape))
        encoder = start.get("encoder") or self.encoder.init(encoder_key, images)["params"]
        trained, frozen = vit.split_blocks(encoder, 0)
        kernel = _kernel_init(classifier_key, (self.encoder.width, self.classes))
        classifier = {"kernel": kernel, "bias": jnp.zeros(self.classes)}
        params = {"encoder": trained, "classifier": classifier}
        return self._init_state(rng, params, frozen={"encoder": frozen})

    def logits(
        self, params: dict, frozen: dict, *rows: jax.Array, microbatches: int = 1
    ) -> jax.Array:
        """Scores fp32 `[B, classes]` of `rows`: normalised images `[B, H, W, C]` and, in training,
        factors of the blocks' branches (`vit.drop_paths`)."""
        encoder = frozen["encoder"] | params["encoder"]

        def encode(images, paths=None):
            return vit.features(self.encoder, encoder, images, self.pool, paths=paths)

        x = base.over_microbatches(encode, microbatches, *rows)
        kernel, bias = params["classifier"]["kernel"], params["classifier"]["bias"]
        # By default a TPU rounds the inputs of a matmul to bf16.
        return jnp.matmul(x, kernel, precision="highest") + bias

    def loss(self, params, state: TrainState, views: Views, batch: dict, key: jax.Array):
        """Cross entropy with smoothed and mixed labels."""
        erase_key, mix_key, path_key = jax.random.split(key, 3)
        (x,) = views
        images = x[:, 0]
        one_hot = jax.nn.one_hot(batch["label"], self.classes)
        targets = optax.smooth_labels(one_hot, self.label_smoothing)
        if self.erasing:
            images = mix.erase(erase_key, images, self.erasing)
        if self.mixup_alpha or self.cutmix_alpha:
            shape = self.image_shape[:2]
            kept = mix.kept_fraction(mix_key, shape, self.mixup_alpha, self.cutmix_alpha)
            images, targets = mix.mix(images, targets, kept)
        rows = [images]
        if self.drop_path:
            size = len(images), self.encoder.depth
            rows.append(vit.drop_paths(path_key, self.drop_path, *size))
        logits = self.logits(params, state.frozen, *rows, microbatches=self.microbatches)
        return optax.softmax_cross_entropy(logits, targets).mean(), ({}, {})

    def ranked(self, params: dict, frozen: dict, images: jax.Array) -> jax.Array:
        """The most likely classes of normalised images `[B, H, W, C]`, the first one first: int32
        `[B, min(5, classes)]`."""
        scores = self.logits(params, frozen, images)
        return jax.lax.top_k(scores, min(_RANKED, self.classes))[1]

    def snapshot(self, state: TrainState, images: jax.Array, ids: jax.Array) -> dict:
        """`ranked` of images uint8 `[Q, H, W, C]`."""
        x = augment.normalise_pixels(images, self.recipes[0].mean, self.recipes[0].std)
        return {"ranked": self.ranked(state.params, state.frozen, x)}

    def flops_per_step(self, batch_size: int) -> int:
        classifier = 2 * self.encoder.width * self.classes
        return batch_size * self.views * 3 * (self._encoder_flops(self._patches) + classifier)
