"""MIM-Refiner on ViT-H/14: the encoder and a head on each of twelve features.

    maect run --config=refine_vith14

Starts from `runs/refine_head_vith14`: encoder, heads and queues.
Images: data/imagenet/{train,val}/<class>/; set `--config.data.path` for another folder.
Hardware: TPU or GPU; `--dry_run` prints the steps, the memory of the state and the FLOPs.
Duration: 30 epochs, 75,060 updates of 512 images x 2 global and 10 local views.
Expected (paper, of an MAE): clusters 64.6 %, linear probe 83.7 % top-1 (the encoder's EMA).
"""

from configs import common


def get_config(argument=""):
    config = common.base("refine_vith14", "H", patch_size=14)
    config.init_from = "runs/refine_head_vith14"
    # Memory: the encoder sees a quarter of the batch at a time (docs/scaling.md).
    config.encoder_microbatches = 4
    # Heads are behind blocks 20 to 30, and on the final feature.
    common.add_refine(config, 512, temperature=0.3, blocks=tuple(range(20, 31)))
    return common.finish(config, argument)
