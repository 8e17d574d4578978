"""MIM-Refiner on ViT-L/16: the encoder and a head on each of eight features.

    maect run --config=refine_vitl16

Starts from `runs/refine_head_vitl16`: encoder, heads and queues.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 30 epochs, 37,530 updates of 1024 images x 2 global and 10 local views.
Expected (the encoder's EMA): better clusters than `ct_vitl16`; the published figures are of H/14.
"""

from configs import common


def get_config(argument=""):
    config = common.base("refine_vitl16", "L", patch_size=16)
    config.init_from = "runs/refine_head_vitl16"
    # Memory: the encoder sees a quarter of the batch at a time (docs/scaling.md).
    config.encoder_microbatches = 4
    # Heads are behind blocks 16 to 22, and on the final feature.
    common.add_refine(config, batch_size=1024)
    return common.finish(config, argument)
