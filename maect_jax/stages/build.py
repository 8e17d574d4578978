"""From a config to a stage, and from one stage to the next."""

import numpy as np
from ml_collections import ConfigDict

from maect_jax.data import subsets
from maect_jax.data.augment import Photometric, Recipe
from maect_jax.data.sources import Source
from maect_jax.models import mae, nnclr, vit
from maect_jax.stages import optim
from maect_jax.stages.finetune import Finetune
from maect_jax.stages.mae import Mae
from maect_jax.stages.nnclr import Contrast

VIEWS = 2  # of an image, but for fine-tuning
TRAINING = ("mae", "head", "ct", "finetune")

# What a later stage or an evaluation needs of a saved state; never the optimiser's moments. An
# encoder alone, and one with a linear probe, are not trained here but imported.
SAVED_PARTS = {
    "mae": ("params",),
    "head": ("params", "frozen", "batch_stats", "queue"),
    "ct": ("params", "frozen", "batch_stats", "queue", "ema"),
    "finetune": ("params", "frozen"),
    "encoder": ("params",),
    "probe": ("params", "frozen", "batch_stats"),
}


def encoder(model: ConfigDict, frozen_blocks: int = 0, remat: str = "none") -> vit.ViT:
    """The encoder that a config's `model` section describes."""
    size = encoder_size(model)
    return vit.ViT(
        *size,
        patch_size=model.patch_size,
        frozen_blocks=frozen_blocks,
        ln_eps=model.ln_eps,
        dtype=model.dtype,
        remat=remat,
    )


def encoder_size(model: ConfigDict) -> vit.Size:
    """Width, depth and heads: the variant's, but for those that are set."""
    size = vit.VARIANTS[model.variant]
    own = {key: model[key] for key in vit.Size._fields if model[key] is not None}
    return size._replace(**own)


def frozen_blocks(model: ConfigDict, section: ConfigDict) -> int:
    """How many of the first blocks a stage leaves as they are: for `None`, half."""
    if "frozen_blocks" not in section:
        return 0
    half = encoder_size(model).depth // 2
    return half if section.frozen_blocks is None else section.frozen_blocks


def _ema_decay(section: ConfigDict, steps: int) -> float:
    """Of the encoder's average: for `None` one that looks back over a tenth of the updates."""
    return 1 - 1 / max(steps / 10, 1) if section.ema_decay is None else section.ema_decay


def image_shape(model: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of a view."""
    return (*model.image_size, model.channels)


def views(name: str) -> int:
    """How many views of an image a batch of stage `name` has."""
    return 1 if name == "finetune" else VIEWS


def training_images(config: ConfigDict, name: str, source: Source) -> Source:
    """Those of the training images that stage `name` sees: for finetune, what it names.

    Raises:
      UserError: it names images that are not there.
    """
    if name != "finetune":
        return source
    return subsets.chosen(source, config.finetune.images, config.seed)


def updates_per_epoch(records: int, batch_size: int) -> int:
    """Whole batches in an epoch; the rest of the images waits for the next shuffle."""
    return records // batch_size


def warmup_updates(fraction: float, steps: int) -> int:
    """`floor(fraction * steps)`, of the fraction as it is written: 0.29 of 100 is 29, not 28."""
    return int(round(fraction * steps, 6))


def _recipe(config: ConfigDict, name: str) -> Recipe:
    section, data = config[name], config.data
    # Fine-tuning changes colours on the host.
    colours = section.photometric.to_dict() if "photometric" in section else {}
    per_view = ("jitter", "blur", "grayscale", "solarize")
    photometric = tuple(
        Photometric(**{k: v[view] if k in per_view else v for k, v in colours.items()})
        for view in range(views(name))
    )
    return Recipe(config.model.image_size, section.crop_scale, data.mean, data.std, photometric)


def stage_for(config: ConfigDict, name: str, source: Source) -> Mae | Contrast | Finetune:
    """The stage `name` of a config, to be trained on the images of `source`."""
    classes = subsets.classes_of(source) if name == "finetune" else 0
    return stage(config, name, len(source), classes)


def stage(
    config: ConfigDict, name: str, records: int, classes: int = 0
) -> Mae | Contrast | Finetune:
    """The stage `name` (one of `TRAINING`) of a config.

    Args:
      config: a config with a section of that name.
      name: of the stage.
      records: number of training images.
      classes: of their labels, which finetune alone needs.
    """
    section = config[name]
    per_epoch = updates_per_epoch(records, section.batch_size)
    steps = section.epochs * per_epoch
    model = config.model

    def group(base_lr, weight_decay, layer_decay=1.0, depth=0):
        lr = optim.scaled_lr(base_lr, section.batch_size, views(name))
        return optim.Group(lr, weight_decay, layer_decay, depth)

    common = dict(
        image_shape=image_shape(model),
        recipe=_recipe(config, name),
        steps=steps,
        microbatches=config.encoder_microbatches,
    )
    if name == "mae":
        one = group(section.base_lr, section.weight_decay)
        return Mae(
            encoder=encoder(model, remat=config.remat),
            decoder=mae.Decoder(
                **section.decoder,
                patch_size=model.patch_size,
                channels=model.channels,
                ln_eps=model.ln_eps,
                dtype=model.dtype,
                remat=config.remat,
            ),
            mask_ratio=section.mask_ratio,
            groups={"encoder": one, "decoder": one},
            warmup=section.warmup_epochs * per_epoch,
            **common,
        )
    depth = encoder_size(model).depth
    if name == "finetune":
        tuned = group(section.base_lr, section.weight_decay, section.layer_decay, depth)
        return Finetune(
            encoder=encoder(model, remat=config.remat),
            pool=model.pool,
            classes=classes,
            drop_path=section.drop_path,
            label_smoothing=section.label_smoothing,
            mixup_alpha=section.mixup_alpha,
            cutmix_alpha=section.cutmix_alpha,
            erasing=section.erasing,
            groups={
                "encoder": tuned,
                "classifier": group(section.base_lr, section.weight_decay),
            },
            warmup=section.warmup_epochs * per_epoch,
            **common,
        )
    tunes = name == "ct"
    if tunes:
        head = group(section.head_base_lr, section.head_weight_decay)
        tuned = group(section.base_lr, section.weight_decay, section.layer_decay, depth)
        groups = {"encoder": tuned, "projector": head, "predictor": head}
    else:
        head = group(section.base_lr, section.weight_decay)
        groups = {"projector": head, "predictor": head}
    return Contrast(
        encoder=encoder(model, frozen_blocks(model, section), config.remat),
        projector=nnclr.Projector(section.projector_hidden, section.projector_out, model.dtype),
        predictor=nnclr.Predictor(section.predictor_hidden, section.projector_out, model.dtype),
        pool=model.pool,
        batch_size=section.batch_size,
        queue_size=section.queue_size,
        top_k=section.top_k,
        temperature=section.temperature,
        target_factor=section.target_factor if tunes else None,
        ema_decay=_ema_decay(section, steps) if tunes else None,
        groups=groups,
        warmup=warmup_updates(section.warmup_fraction, steps),
        **common,
    )


def evaluated_encoder(name: str, parts: dict) -> dict:
    """The encoder parameters, one stack, that stand for a saved stage: for ct the average."""
    if name in ("mae", "encoder"):
        return parts["params"]["encoder"]
    frozen = parts["frozen"]["encoder"]
    whose = {"ct": "ema", "finetune": "params"}
    trained = parts[whose[name]]["encoder"] if name in whose else {}
    return vit.merge_blocks({**frozen, **trained})


def classifier(parts: dict, bn_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """A linear classifier's kernel fp32 `[D, C]` and bias `[C]`, with the batch normalisation of a
    probe in them.

    Args:
      parts: `params` and, of a probe, `batch_stats` of the classifier, NumPy arrays.
      bn_eps: of a probe's batch normalisation.
    """
    kernel, bias = (np.asarray(parts["params"][key], np.float64) for key in ("kernel", "bias"))
    if "batch_stats" in parts:
        mean, var = (np.asarray(parts["batch_stats"][key], np.float64) for key in ("mean", "var"))
        kernel = kernel / np.sqrt(var + bn_eps)[:, None]
        bias = bias - mean @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)


def handover(saved: str, parts: dict, name: str) -> dict:
    """What stage `name` takes over from the saved parts of stage `saved`: its `init`'s `start`."""
    start = {"encoder": evaluated_encoder(saved, parts)}
    if name == "ct":
        start |= {part: parts["params"][part] for part in ("projector", "predictor")}
        start |= {part: parts[part] for part in ("batch_stats", "queue")}
    return start
