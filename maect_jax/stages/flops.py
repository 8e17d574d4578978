"""Floating-point operations by formula: a multiplication and an addition count as two.

Matrix products only; norms, activations and the optimiser are below one percent. A backward
pass costs twice its forward pass.
"""

from maect_jax.models import mae
from maect_jax.stages.finetune import Finetune
from maect_jax.stages.mae import Mae
from maect_jax.stages.nnclr import Contrast


def blocks(depth: int, width: int, tokens: int) -> int:
    """Forward pass of `depth` transformer blocks over one image of `tokens` tokens."""
    linear = 12 * width**2  # qkv 3, projection 1, MLP 8
    attention = 2 * tokens * width  # scores and weighted sum
    return 2 * depth * tokens * (linear + attention)


def per_step(stage: Mae | Contrast | Finetune, batch_size: int, views: int) -> int:
    """One update of a stage on the global batch, forward and backward."""
    crops = batch_size * views
    height, width, channels = stage.image_shape
    encoder = stage.encoder
    patches = (height // encoder.patch_size) * (width // encoder.patch_size)
    pixels = encoder.patch_size**2 * channels
    if isinstance(stage, Mae):
        return crops * 3 * _mae(stage, patches, pixels)
    tokens = patches + 1
    embed = 2 * patches * pixels * encoder.width
    if isinstance(stage, Finetune):
        classifier = 2 * encoder.width * stage.classes
        return crops * 3 * (embed + blocks(encoder.depth, encoder.width, tokens) + classifier)
    lower = embed + blocks(encoder.frozen_blocks, encoder.width, tokens)
    upper = blocks(encoder.depth - encoder.frozen_blocks, encoder.width, tokens)
    hidden, out = stage.projector.hidden, stage.projector.out
    projector = 2 * (encoder.width * hidden + hidden**2 + hidden * out)
    predictor = 2 * 2 * out * stage.predictor.hidden
    target = projector if stage.target_factor is not None else 0
    look_up = 2 * stage.queue_size * out
    logits = 3 * 2 * batch_size * out
    trained = 3 if stage.tunes_encoder else 1
    per_crop = lower + trained * upper + 3 * (projector + predictor) + target + look_up + logits
    return crops * per_crop


def _mae(stage: Mae, patches: int, pixels: int) -> int:
    encoder, decoder = stage.encoder, stage.decoder
    kept = mae.kept_patches(patches, stage.mask_ratio)
    return (
        2 * kept * pixels * encoder.width
        + blocks(encoder.depth, encoder.width, kept + 1)
        + 2 * (kept + 1) * encoder.width * decoder.width
        + blocks(decoder.depth, decoder.width, patches + 1)
        + 2 * patches * decoder.width * pixels
    )
