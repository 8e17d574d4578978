"""Tiny stages and their batches."""

import dataclasses

import jax
import numpy as np

from maect_jax.data.augment import Photometric, Recipe
from maect_jax.models import mae, nnclr, vit
from maect_jax.stages import STAGES, optim
from maect_jax.stages.mae import MAE

BATCH = 16


SHAPE = (8, 8, 3)


ENCODER = vit.ViT(16, 4, 2, 4)


RECIPE = Recipe(SHAPE[:2], (0.2, 1.0), (0.5,) * 3, (0.25,) * 3, (Photometric(), Photometric()))


HEAD = optim.Group(0.01, 1e-5)


def mae_stage():
    group = optim.Group(0.01, 0.05)
    return MAE(
        encoder=ENCODER,
        decoder=mae.Decoder(8, 1, 2, 4, 3),
        image_shape=SHAPE,
        mask_ratio=0.75,
        recipes=(RECIPE,),
        groups={"encoder": group, "decoder": group},
        steps=40,
        warmup=2,
    )


LOCAL = dataclasses.replace(
    RECIPE, size=(4, 4), photometric=(Photometric(),) * 3, field="local", first=2
)


def contrast_stage(name, **changes):
    kind, groups = STAGES[name], {"projector": HEAD, "predictor": HEAD}
    tuning = {}
    if name in ("ct", "refine"):
        groups["encoder"] = optim.Group(0.01, 0.05, 0.65, 4)
        tuning = dict(ema_decay=0.99)
    if name == "ct":
        tuning["target_momentum"] = 0.9
    if name.startswith("refine"):
        tuning |= dict(recipes=(RECIPE, LOCAL), blocks=(1, 2))
    settings = dict(
        encoder=ENCODER.clone(frozen_blocks=2 if name == "ct" else 0),
        projector=nnclr.Projector(24, 8),
        predictor=nnclr.Predictor(24, 8),
        image_shape=SHAPE,
        pool="cls",
        batch_size=BATCH,
        queue_size=48,
        top_k=4,
        temperature=0.2,
        recipes=(RECIPE,),
        groups=groups,
        steps=40,
        warmup=2,
    )
    return kind(**settings | tuning | changes)


TINY_STAGES = {
    "mae": mae_stage(),
    "head": contrast_stage("head", top_k=1),
    "ct": contrast_stage("ct"),
    "refine_head": contrast_stage("refine_head", top_k=1),
    "refine": contrast_stage("refine"),
}


def with_local_views(crops):
    """Stage `head` with further views of a second size."""

    class WithLocalViews(STAGES["head"]):
        @classmethod
        def view_sets(cls, config):
            local = Photometric(blur=0.5)
            return (*super().view_sets(config), (crops, (local,) * crops.count))

    return WithLocalViews


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return dict(
        image=rng.integers(0, 256, (BATCH, 2, *SHAPE), dtype=np.uint8),
        index=rng.permutation(100)[:BATCH].astype(np.int32),
        label=rng.integers(0, 3, BATCH).astype(np.int32),
        seed=rng.integers(0, 2**32, (BATCH, 2), dtype=np.uint32),
        local=rng.integers(0, 256, (BATCH, 3, 4, 4, 3), dtype=np.uint8),
    )


def started(stage):
    return jax.jit(stage.init)(jax.random.key(0), {})


def mae_stage_of(encoder, decoder, image_shape, mask_ratio):
    """An MAE without views or an optimiser to speak of."""
    group = optim.Group(0.1, 0.0)
    return MAE(
        encoder=encoder,
        decoder=decoder,
        image_shape=image_shape,
        mask_ratio=mask_ratio,
        recipes=(),
        groups={"encoder": group, "decoder": group},
        steps=1,
        warmup=0,
    )
