"""From a config to a stage, and from one stage to the next."""

from ml_collections import ConfigDict

from maect_jax import optim
from maect_jax.data.augment import Photometric, Recipe
from maect_jax.models import mae, nnclr, vit
from maect_jax.stages.contrast import Contrast
from maect_jax.stages.mae import Mae

VIEWS = 2
TRAINING = ("mae", "head", "ct")

# What a later stage or an evaluation needs of a saved state; never the optimiser's moments.
SAVED_PARTS = {
    "mae": ("params",),
    "head": ("params", "frozen", "batch_stats", "queue"),
    "ct": ("params", "frozen", "batch_stats", "queue", "ema"),
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


def image_shape(model: ConfigDict) -> tuple[int, int, int]:
    """(H, W, C) of a view."""
    return (*model.image_size, model.channels)


def updates_per_epoch(records: int, batch_size: int) -> int:
    """Whole batches in an epoch; the rest of the images waits for the next shuffle."""
    return records // batch_size


def warmup_updates(fraction: float, steps: int) -> int:
    """`floor(fraction * steps)`, of the fraction as it is written: 0.29 of 100 is 29, not 28."""
    return int(round(fraction * steps, 6))


def _recipe(config: ConfigDict, section: ConfigDict) -> Recipe:
    colours = section.photometric.to_dict()
    per_view = ("jitter", "blur", "grayscale", "solarize")
    photometric = tuple(
        Photometric(**{k: v[view] if k in per_view else v for k, v in colours.items()})
        for view in range(VIEWS)
    )
    data = config.data
    return Recipe(config.model.image_size, section.crop_scale, data.mean, data.std, photometric)


def stage(config: ConfigDict, name: str, records: int) -> Mae | Contrast:
    """The stage `name` ("mae", "head" or "ct") of a config, for `records` training images."""
    section = config[name]
    per_epoch = updates_per_epoch(records, section.batch_size)
    steps = section.epochs * per_epoch
    model = config.model

    def group(base_lr, weight_decay, layer_decay=1.0, depth=0):
        lr = optim.scaled_lr(base_lr, section.batch_size, VIEWS)
        return optim.Group(lr, weight_decay, layer_decay, depth)

    common = dict(
        image_shape=image_shape(model),
        recipe=_recipe(config, section),
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
    tunes = name == "ct"
    if tunes:
        head = group(section.head_base_lr, section.head_weight_decay)
        depth = encoder_size(model).depth
        tuned = group(section.base_lr, section.weight_decay, section.layer_decay, depth)
        groups = {"encoder": tuned, "projector": head, "predictor": head}
    else:
        head = group(section.base_lr, section.weight_decay)
        groups = {"projector": head, "predictor": head}
    return Contrast(
        encoder=encoder(model, section.frozen_blocks if tunes else 0, config.remat),
        projector=nnclr.Projector(section.projector_hidden, section.projector_out, model.dtype),
        predictor=nnclr.Predictor(section.predictor_hidden, section.projector_out, model.dtype),
        pool=model.pool,
        batch_size=section.batch_size,
        queue_size=section.queue_size,
        top_k=section.top_k,
        temperature=section.temperature,
        target_factor=section.target_factor if tunes else None,
        ema_decay=section.ema_decay if tunes else None,
        groups=groups,
        warmup=warmup_updates(section.warmup_fraction, steps),
        **common,
    )


def evaluated_encoder(name: str, parts: dict) -> dict:
    """The encoder parameters, one stack, that stand for a saved stage: for ct the average."""
    if name == "mae":
        return parts["params"]["encoder"]
    frozen = parts["frozen"]["encoder"]
    trained = parts["ema"]["encoder"] if name == "ct" else {}
    return vit.merge_blocks({**frozen, **trained})


def handover(saved: str, parts: dict, name: str) -> dict:
    """What stage `name` takes over from the saved parts of stage `saved`: its `init`'s `start`."""
    start = {"encoder": evaluated_encoder(saved, parts)}
    if name == "ct":
        start |= {part: parts["params"][part] for part in ("projector", "predictor")}
        start |= {part: parts[part] for part in ("batch_stats", "queue")}
    return start
